"""Packing: every tensor arrives, nothing half-written counts, and what goes wrong is said in one line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewfire import packed
from fewfire.checkpoint import open_checkpoint
from fewfire.errors import CheckpointError, FewfireError
from fewfire.library import cached_sources
from fewfire.pack import pack
from fewfire.packed import DESCRIPTION, TEMPLATE, TOKENIZER, is_packed, open_packed
from fewfire.quantize import FORMATS
from tiny import CHATML, FAMILIES, tiny_tokenizer, write_tiny
from unpack import tensors

LOST = {"f32": 0.0, "bf16": 0.003, "q8": 0.01, "q4": 0.1}  # of a tensor's norm


def check_tensors(checkpoint_path: Path, packed_path: Path) -> None:
    checkpoint, found = open_checkpoint(checkpoint_path), open_packed(packed_path)
    assert found.config == checkpoint.config
    for name, values in tensors(found).items():
        expected = checkpoint.read(name)
        assert values.shape == expected.shape
        error = np.linalg.norm(values - expected) / np.linalg.norm(expected)
        exact = found.weights == "f32" or expected.ndim == 1 or name == "positions.weight"
        assert error <= (0.0 if exact else LOST[found.weights]), name


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_arrives(
    family: str, weights: str, tiny_path: Callable[[str], Path], packed_path: Callable[[str, str], Path]
) -> None:
    check_tensors(tiny_path(family), packed_path(family, weights))


@pytest.mark.parametrize("weights", FORMATS)
def test_sizes_that_are_no_multiple_of_anything(weights: str, tmp_path: Path) -> None:
    """More rows than are encoded at a time, too."""
    sizes: dict[str, Any] = {
        "hidden_size": 40, "intermediate_size": 2100, "num_attention_heads": 5, "num_key_value_heads": 1,
        "head_dim": 6, "vocab_size": 4500, "num_hidden_layers": 1,
    }  # fmt: skip
    source = write_tiny("qwen3", tmp_path / "source", **sizes)
    check_tensors(source, pack(source, tmp_path / "out", weights))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_q4_throughout(family: str, tiny_path: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Also the down rows, as large models have them."""
    monkeypatch.setattr(packed, "_SMALL", 0)
    out = pack(tiny_path(family), tmp_path / "out", "q4")
    assert open_packed(out).formats.down == "q4"
    check_tensors(tiny_path(family), out)


def test_what_else_is_in_it(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_path("llama")
    out = pack(source, tmp_path / "new" / "out", "q8", name="a name")
    assert sorted(os.listdir(out)) == sorted([DESCRIPTION, TEMPLATE, TOKENIZER, packed.WEIGHTS])
    assert open_packed(out).name == "a name"
    assert open_packed(pack(source, tmp_path / "unnamed")).name == source.name
    assert json.loads((out / TOKENIZER).read_text()) == json.loads(tiny_tokenizer())
    assert (out / TEMPLATE).read_text() == CHATML


def test_the_digest_is_that_of_all_weights(packed_path: Callable[[str, str], Path]) -> None:
    for family, weights in (("gemma3", "q4"), ("opt", "f32")):
        opened = open_packed(packed_path(family, weights))
        everything = b"".join(array.tobytes() for array in opened.arrays.values())
        contents = json.loads((opened.path / DESCRIPTION).read_text())["contents"]
        assert contents == hashlib.sha256(everything).hexdigest()


def test_no_chat_template(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    (source / "tokenizer_config.json").unlink()
    assert not (pack(source, tmp_path / "out") / TEMPLATE).exists()


def test_progress(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    pack(tiny_path("llama"), tmp_path / "out", "q8", lambda *call: calls.append(call), "mine")
    assert {stage for stage, _, _ in calls} == {"packing mine as q8"}
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert len({total for _, _, total in calls}) == 1
    assert calls[-1][1] == calls[-1][2]


# --- bad input --------------------------------------------------------------------------------------------------------


def fails(error: type[Exception], source: Path, out: Path, *words: str, weights: str = "q4", **options: Any) -> None:
    """In one line with these words, and nothing is left next to the target."""
    before = sorted(os.listdir(out.parent)) if out.parent.is_dir() else None
    with pytest.raises(error) as caught:
        pack(source, out, weights, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "None" not in message
    for word in words:
        assert word in message
    if before is not None:
        assert sorted(os.listdir(out.parent)) == before


def test_options(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    fails(ValueError, tiny_path("llama"), tmp_path / "out", "'q5'", weights="q5")
    fails(ValueError, tiny_path("llama"), tmp_path, "exists already")
    (tmp_path / "file").write_text("mine")
    fails(ValueError, tiny_path("llama"), tmp_path / "file", "exists already")
    fails(FewfireError, tiny_path("llama"), tmp_path / "file" / "out", "cannot write")
    assert (tmp_path / "file").read_text() == "mine"
    fails(CheckpointError, tmp_path / "nothing", tmp_path / "out", "nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(FewfireError, tiny_path("llama"), tmp_path / "locked" / "out", "cannot write", "Permission denied")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()  # of the last tensor, when all others have been packed
    file.write_bytes(data)
    fails(CheckpointError, source, tmp_path / "out", "head.weight", "NaN")


def test_a_missing_tensor(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.xx_proj"))
    fails(CheckpointError, source, tmp_path / "out", "layers.1.up.weight", "missing")


def test_a_missing_tokenizer_is_found_before_the_work_begins(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source")
    (source / "tokenizer.json").unlink()

    def progress(*_: object) -> None:
        raise AssertionError("began to pack")

    fails(CheckpointError, source, tmp_path / "out", "tokenizer.json", progress=progress)


def test_weights_that_a_format_cannot_hold(tmp_path: Path, monkeypatch: Any) -> None:
    source = write_tiny("llama", tmp_path / "source")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(1e30).tobytes()
    file.write_bytes(data)
    for weights in ("q4", "q8"):
        fails(CheckpointError, source, tmp_path / "out", "head.weight", "bf16 or f32", weights=weights)
    pack(source, tmp_path / "out", "bf16")


# --- interruptions and a full disk ------------------------------------------------------------------------------------


def test_an_interruption_at_any_step(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    calls, last = 0, 0

    def progress(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt

    pack(tiny_path("llama"), tmp_path / "whole", "q8", progress)
    for step in {*range(1, calls, 5), calls}:
        calls, last = 0, step
        with pytest.raises(KeyboardInterrupt):
            pack(tiny_path("llama"), tmp_path / "out", "q8", progress)
        assert os.listdir(tmp_path) == ["whole"]


def run(code: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command, pipe = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such signal")
def test_killed_in_the_middle(tiny_path: Callable[[str], Path], own_cache: Path) -> None:
    """Nobody can clean up then, but nothing that is there counts as a model."""
    code = """
        import sys, time
        from pathlib import Path
        from fewfire.library import packed_dir
        from fewfire.pack import pack
        def progress(stage, done, total):
            if done > total // 2:
                print("half", flush=True)
                time.sleep(60)
        pack(Path(sys.argv[1]), packed_dir() / "out", "q8", progress)
    """
    with run(code, tiny_path("llama")) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        child.send_signal(signal.SIGKILL)
    out = own_cache / "packed" / "out"
    assert not out.exists()
    assert not any(is_packed(path) for path in out.parent.iterdir())
    assert cached_sources() == []
    assert is_packed(pack(tiny_path("llama"), out, "q8"))


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits")
def test_the_disk_is_full(
    tiny_path: Callable[[str], Path], packed_path: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for it: the kernel takes part of a write and refuses the rest."""
    code = """
        import resource, sys
        from pathlib import Path
        from fewfire.errors import FewfireError
        from fewfire.pack import pack
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for size in map(int, sys.argv[3:]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit))
            try:
                pack(Path(sys.argv[1]), Path(sys.argv[2]), "q8")
            except FewfireError as error:
                print(error)
    """
    whole = (packed_path("llama", "q8") / packed.WEIGHTS).stat().st_size
    sizes = [0, 1000, 5000, whole // 3, whole // 2, whole - 5000, whole - 1]
    with run(code, tiny_path("llama"), tmp_path / "out", *sizes) as child:
        said, errors = child.communicate(timeout=120)
    assert errors == ""
    assert said.splitlines() == [f"cannot write the packed model to {tmp_path / 'out'} (File too large)"] * len(sizes)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no limits")
def test_the_disk_is_full_when_the_small_files_are_written(tmp_path: Path) -> None:
    source = write_tiny("llama", tmp_path / "source", num_hidden_layers=1)
    tokenizer = json.loads(tiny_tokenizer()) | {"padding": None, "comment": "x" * 2_000_000}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    code = """
        import resource, sys
        from pathlib import Path
        from fewfire.pack import pack
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            pack(Path(sys.argv[1]), Path(sys.argv[2]), "q8")
        except Exception as error:
            print(error)
    """
    with run(code, source, tmp_path / "out") as child:
        said, errors = child.communicate(timeout=120)
    assert errors == ""
    assert said == f"cannot write the packed model to {tmp_path / 'out'} (File too large)\n"
    assert os.listdir(tmp_path) == ["source"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 42 MB in bf16."""
    shapes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 2}
    return write_tiny("llama", tmp_path_factory.mktemp("large") / "model", dtype="bf16", **shapes)


def peak(source: Path, out: Path, weights: str) -> int:
    """The most bytes that a process had resident which only packed."""
    code = """
        import sys
        from pathlib import Path
        from fewfire.pack import pack
        pack(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
        lines = Path("/proc/self/status").read_text().splitlines()
        print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    """
    with run(code, source, out, weights) as child:
        said, errors = child.communicate(timeout=300)
    assert errors == ""
    return 1024 * int(said)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("weights", ["q4", "f32"])
def test_memory(weights: str, large: Path, tmp_path: Path, tiny_path: Callable[[str], Path]) -> None:
    """Four times the largest layer, as it is in the checkpoint, beyond what packing a tiny model takes."""
    config = open_checkpoint(large).config
    layer = 2 * sum(int(np.prod(s)) for n, s in config.shapes().items() if n.startswith("layers.0."))
    least, most = peak(tiny_path("llama"), tmp_path / "least", weights), peak(large, tmp_path / "most", weights)
    print(f"layer {layer >> 20} MB, peak {most >> 20} MB, of a tiny model {least >> 20} MB")
    assert most - least < 4 * layer
    assert most < 4 * layer + 300_000_000


def test_what_a_killed_pack_left_is_swept_away(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    """Once it is old: a pack that is still at work writes all the time."""
    old, new, other = (tmp_path / f".out.{end}" for end in ("0123456789abcdef", "1" * 16, "backup"))
    for left in (old, new, other):
        left.mkdir()
        (left / "weights.safetensors").write_bytes(b"half")
        if left != new:
            for file in (left / "weights.safetensors", left):
                os.utime(file, (0, 0))
    pack(tiny_path("llama"), tmp_path / "out", "q8")
    assert not old.exists()
    assert new.exists()
    assert other.exists()  # the user's own


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
def test_the_umask_counts(tiny_path: Callable[[str], Path], tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        out = pack(tiny_path("llama"), tmp_path / "out", "q8")
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o700
