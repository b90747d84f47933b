import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fewfire import memory
from fewfire.model import Model
from fewfire.packed import PAGE, open_packed

LARGE = 1 << 21


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with large pages and memory to spare."""
    if not hasattr(os, "preadv"):
        pytest.skip("not on this system")
    monkeypatch.setattr(memory, "_has_large_pages", lambda: True)
    monkeypatch.setattr(memory, "_free", lambda: 1 << 33)


def written(path: Path, size: int) -> bytes:
    data = np.random.default_rng().bytes(size)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", [1, 4095, 4097, LARGE, 3 * LARGE + 17])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("roomy")
def test_held(size: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes, which nobody can change, at the beginning of a large page; a read may give less than asked."""
    data, read = written(tmp_path / "file", size), os.preadv
    monkeypatch.setattr(memory, "_PIECE", 1_000_003)
    monkeypatch.setattr(os, "preadv", lambda file, into, at: read(file, [into[0][:70_001]], at))
    with (tmp_path / "file").open("rb") as file:
        held = memory.held(file, threads)
    (tmp_path / "file").write_bytes(b"")  # it is no view of the file
    assert held.tobytes() == data
    assert held.ctypes.data % LARGE == 0
    assert not held.flags.writeable


@pytest.mark.usefixtures("roomy")
def test_what_has_no_room_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(tmp_path / "file", 10_000)
    monkeypatch.setattr(os, "preadv", None)  # nothing is read
    for name, value in (("_free", 19_999), ("_has_large_pages", False)):
        with monkeypatch.context() as patch, (tmp_path / "file").open("rb") as file:
            patch.setattr(memory, name, lambda value=value: value)
            found = memory.held(file, 1)
        assert found.tobytes() == data
        assert not found.flags.writeable


@pytest.mark.usefixtures("roomy")
def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "file", 10_000)
    read = os.preadv

    def cut(*arguments: object) -> int:
        os.truncate(tmp_path / "file", 5_000)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", cut)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="cut off"):
        memory.held(file, 1)


def test_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system has to give, or less where a container has a limit."""
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nBuffers: 1 kB\n"}

    def text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", text)
    assert memory._free() == 4_096_000
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000\n"}
    assert memory._free() == 4_096_000
    files["/sys/fs/cgroup/memory.max"] = "51000\n"
    assert memory._free() == 50_000


def test_a_model_runs_from_memory_as_it_does_from_its_file(packed_path: Callable[[str, str], Path]) -> None:
    path = packed_path("llama", "q4")
    held, mapped = open_packed(path, threads=2), open_packed(path)
    for name, array in mapped.arrays.items():
        np.testing.assert_array_equal(held.arrays[name], array)
        assert held.arrays[name].ctypes.data % PAGE == 0
        assert not held.arrays[name].flags.writeable
    np.testing.assert_array_equal(*(Model(packed, 1).logits([5, 6, 7]) for packed in (held, mapped)))
