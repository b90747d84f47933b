import re

import pytest

from fewfire import hub, sources, wheels
from fewfire.errors import SourceError
from fewfire.sources import ALIASES, resolve


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(source, message):
    with pytest.raises(SourceError, match=message) as caught:
        resolve(source)
    assert "\n" not in str(caught.value)


def test_aliases_are_pinned():
    for name, model in ALIASES.items():
        assert model.name == name
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert all("==" in requirement for requirement, _ in model.parts)


@pytest.mark.parametrize("marker", ["config.json", "fewfire.json"])
def test_model_directories(here, marker):
    (here / "m").mkdir()
    (here / "m" / marker).write_text("{}")
    assert resolve(here / "m") == here / "m"
    assert resolve("m").resolve() == here / "m"


def test_gguf_files(here):
    (here / "a.gguf").write_bytes(b"GGUF")
    (here / "download").write_bytes(b"GGUF and more")  # a name that says nothing
    assert resolve("a.gguf").name == "a.gguf"
    assert resolve("download").name == "download"


def test_home_directory(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("USERPROFILE", str(here))
    (here / "a.gguf").write_bytes(b"GGUF")
    assert resolve("~/a.gguf") == here / "a.gguf"


def test_alias(monkeypatch, here):
    monkeypatch.setattr(wheels, "fetch", lambda model, progress: here / model.file)
    assert resolve("smollm2") == here / ALIASES["smollm2"].file


def test_a_path_wins_over_an_alias_and_a_hub_id(here, monkeypatch):
    for name in ("smollm2", "owner/name"):
        (here / name).mkdir(parents=True)
        (here / name / "config.json").write_text("{}")
        assert resolve(name).resolve() == here / name
    (here / "smollm2" / "config.json").unlink()
    fails("smollm2", "to use the alias of that name, run where no such directory is")


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("owner/name", ("owner/name", None)),
        ("owner/name-1.5_B:file-q4.gguf", ("owner/name-1.5_B", "file-q4.gguf")),
        ("owner/name:sub/file.gguf", ("owner/name", "sub/file.gguf")),
    ],
)
def test_hub_ids(here, monkeypatch, source, call):
    monkeypatch.setattr(hub, "download", lambda repo, file, progress: (repo, file))
    assert resolve(source) == call


@pytest.mark.parametrize(
    "source",
    [
        "nosuch",
        "./owner/name",
        "/no/such/model",
        "a/b/c",
        "models/a.gguf",
        "owner/name:file.bin",
        "a\0b",
        "x" * 9999,
    ],
)
def test_neither_here_nor_known(here, monkeypatch, source):
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the hub"))
    fails(source, "no model .*pass an alias .*smollm2.*gemma3")


@pytest.mark.parametrize("source", ["", "  "])
def test_empty(source):
    with pytest.raises(ValueError, match=r"no model named: pass an alias \(smollm2"):
        resolve(source)


def test_directories_that_are_no_model(here):
    (here / "empty").mkdir()
    fails("empty", "empty is a directory without config.json or fewfire.json")
    (here / "empty" / "m.gguf").write_bytes(b"GGUF")
    fails("empty", "pass the file itself: empty.m.gguf")


def test_files_that_are_no_model(here):
    (here / "model.safetensors").write_bytes(b"12345678{}")
    fails("model.safetensors", "pass the directory it is in")
    (here / "notes.txt").write_text("hello")
    fails("notes.txt", "notes.txt is not a GGUF file")


def test_unreadable(here, monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")

    (here / "m").mkdir()
    monkeypatch.setattr(sources.os, "listdir", deny)
    fails("m", "cannot read m: Permission denied")
