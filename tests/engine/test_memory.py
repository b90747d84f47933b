import gc
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
    if not memory._large_page():
        pytest.skip("no large pages on this system")
    monkeypatch.setattr(memory, "_large_page", lambda: LARGE)
    monkeypatch.setattr(memory, "_free", lambda: 1 << 33)


def written(path: Path, size: int) -> bytes:
    data = np.random.default_rng().bytes(size)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", [LARGE, LARGE + 1, 3 * LARGE + 17, 4 * LARGE - 1])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("roomy")
def test_held(size: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes, which nobody can change, at the beginning of a large page; a read may give less than asked."""
    data, read = written(tmp_path / "file", size), os.preadv
    monkeypatch.setattr(memory, "_PIECE", 1_000_003)
    monkeypatch.setattr(os, "preadv", lambda file, into, at: read(file, [into[0][:70_001]], at))
    with (tmp_path / "file").open("rb") as file:
        held = memory.contents(file, threads)
    (tmp_path / "file").write_bytes(b"")  # it is no view of the file
    assert held.tobytes() == data
    assert held.ctypes.data % LARGE == 0
    assert not held.flags.writeable


@pytest.mark.usefixtures("roomy")
def test_what_has_no_room_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", None)  # nothing is read
    for size, name, value in (
        (3 * LARGE, "_free", 6 * LARGE - 1), (3 * LARGE, "_large_page", 0), (LARGE - 1, "_free", 1 << 33)
    ):  # fmt: skip
        data = written(tmp_path / "file", size)
        with monkeypatch.context() as patch, (tmp_path / "file").open("rb") as file:
            patch.setattr(memory, name, lambda value=value: value)
            found = memory.contents(file, 1)
        assert found.tobytes() == data
        assert not found.flags.writeable


@pytest.mark.usefixtures("roomy")
def test_a_file_is_held_once_as_long_as_it_is_in_use(tmp_path: Path) -> None:
    written(tmp_path / "file", 2 * LARGE)

    def held() -> np.ndarray:
        with (tmp_path / "file").open("rb") as file:
            return np.frombuffer(memory.contents(file, 1).data, np.uint8)[7:]

    first, second = held(), held()
    assert np.shares_memory(first, second)
    data = written(tmp_path / "file", 2 * LARGE)  # another one
    os.utime(tmp_path / "file", ns=(1, 1))
    assert held().tobytes() == data[7:]
    del first, second
    gc.collect()
    assert not memory._HELD


@pytest.mark.usefixtures("roomy")
def test_arrays_that_lie_together(random: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in large pages, each from the beginning of a line; as they are where there are no such."""
    shapes: tuple[tuple[type, tuple[int, ...]], ...] = (
        (np.uint8, (3, 1_000_001)), (np.float32, (7,)), (np.int32, ()), (np.uint8, (0, 5)), (np.float32, (400, 33))
    )  # fmt: skip
    arrays = {str(i): (99 * random.random(shape)).astype(kind) for i, (kind, shape) in enumerate(shapes)}
    found = memory.together(arrays)
    assert found["0"].ctypes.data % LARGE == 0
    before = {name: array.copy() for name, array in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], before[name])
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].flags.c_contiguous
        assert found[name].ctypes.data % 64 == 0
        found[name][...] = 0  # it is no view of the array
        np.testing.assert_array_equal(array, before[name])
    assert arrays["0"].any()
    small = {"small": arrays["4"]}
    assert memory.together(small)["small"] is small["small"]
    monkeypatch.setattr(memory, "_large_page", lambda: 0)
    assert memory.together(arrays)["0"] is arrays["0"]


@pytest.mark.usefixtures("roomy")
def test_a_file_that_is_cut_off_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "file", 2 * LARGE)
    read = os.preadv

    def cut(*arguments: object) -> int:
        os.truncate(tmp_path / "file", 5_000)
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", cut)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="cut off"):
        memory.contents(file, 1)


def test_progress_ends_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: None) -> None:
    written(tmp_path / "file", 2 * LARGE + 5)
    monkeypatch.setattr(memory, "_PIECE", 1_000_000)
    monkeypatch.setattr(memory, "_LONG", 2 * LARGE)
    calls = list[tuple[int, int]]()
    with (tmp_path / "file").open("rb") as file:
        memory.contents(file, 2, lambda stage, done, total: calls.append((done, total)))
    assert calls == [(min(1_000_000 * i, 2 * LARGE + 5), 2 * LARGE + 5) for i in range(1, 6)]


MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    4000 kB\nBuffers: 1 kB\n"


@pytest.mark.parametrize(
    ("free", "files"),
    [
        (0, {}),
        (4_096_000, {"/proc/meminfo": MEMINFO}),
        (4_096_000, {"/proc/meminfo": MEMINFO, "/proc/self/cgroup": "0::/a/b\n"}),
        (4_096_000, {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n"}),
        (60_000, {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "60000\n"}),
        (60_000, {"/proc/self/cgroup": "1:cpu:/\n0::/a/b\n", "/sys/fs/cgroup/memory.max": "60000\n"}),
        (900, {"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/memory.max": "900\n"}),
        (50_000, {"/proc/self/cgroup": "4:cpu,memory:/c\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "50000\n"}),
    ],
)
def test_free(free: int, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system has to give, or less where a container has a limit, of which cached files take nothing."""
    files = {"/proc/meminfo": MEMINFO} | files if files else files
    for place in ("/sys/fs/cgroup", "/sys/fs/cgroup/a", "/sys/fs/cgroup/a/b"):
        files |= {f"{place}/memory.current": "1000\n", f"{place}/memory.stat": "anon 1\ninactive_file 1000\n"}
    v1 = {"memory.usage_in_bytes": "3000\n", "memory.stat": "inactive_file 5\ntotal_inactive_file 3000\n"}
    files |= {f"/sys/fs/cgroup/memory/{name}": text for name, text in v1.items()}

    def text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", text)
    assert memory._free() == free


def test_a_model_runs_from_memory_as_it_does_from_its_file(
    packed_path: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, roomy: None
) -> None:
    path = packed_path("llama", "q4")
    monkeypatch.setattr(memory, "_large_page", lambda: PAGE)  # it is a small one
    held, mapped = open_packed(path, threads=2), open_packed(path)
    for name, array in mapped.arrays.items():
        np.testing.assert_array_equal(held.arrays[name], array)
        assert held.arrays[name].ctypes.data % PAGE == 0
        assert not held.arrays[name].flags.writeable
    np.testing.assert_array_equal(*(Model(packed, 1).logits([5, 6, 7]) for packed in (held, mapped)))
