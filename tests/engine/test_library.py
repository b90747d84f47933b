import json

import pytest

from fewfire import library
from fewfire.errors import SourceError
from fewfire.library import cached_sources, packed_dir, remove
from fewfire.sources import ALIASES


def packed(directory, about='{"name": "smollm2", "weights": "q4"}', size=1000):
    path = packed_dir() / directory
    path.mkdir(parents=True)
    (path / "weights.safetensors").write_bytes(b"w" * size)
    if about is not None:
        (path / "fewfire.json").write_text(about)
    return path


def source(name):
    path = library.sources_dir() / name
    path.mkdir(parents=True)
    with (path / ALIASES[name].file).open("wb") as file:
        file.truncate(ALIASES[name].size)  # sparse: takes no room
    return path


def listed():
    return [(entry.name, entry.kind, entry.damaged) for entry in cached_sources()]


def test_nothing_there(own_cache):
    assert cached_sources() == []
    with pytest.raises(ValueError, match="no model 'smollm2' in the cache; it has: nothing"):
        remove("smollm2")


def test_list(own_cache):
    source("smollm2")
    packed("smollm2-q4")
    packed("abc", '{"weights": "q8"}', size=5)
    (library.sources_dir() / ".smollm2.lock").touch()
    (library.sources_dir() / ".smollm2.fetch-xyz").mkdir()
    assert listed() == [
        ("smollm2", "source", False),
        ("abc:q8", "packed", False),
        ("smollm2:q4", "packed", False),
    ]
    sizes = [entry.bytes for entry in cached_sources()]
    assert sizes[0] == ALIASES["smollm2"].size
    assert sizes[1] == 5 + len('{"weights": "q8"}')


@pytest.mark.parametrize("about", [None, "", "{", "[]", "3", "[" * 100_000, '{"name": "\udcff"}'])
def test_damaged_packed_models_are_listed_and_removed(own_cache, about):
    path = packed_dir() / "broken"
    path.mkdir(parents=True)
    if about is not None:
        (path / "fewfire.json").write_bytes(about.encode("utf-8", "surrogateescape"))
    assert listed() == [("broken", "packed", True)]
    remove("broken")
    assert not path.exists()


@pytest.mark.parametrize("about", [{"name": 3, "weights": "q4"}, {"name": None}, {"weights": 4}])
def test_odd_descriptions(own_cache, about):
    packed("odd", json.dumps(about))
    assert listed() == [("odd", "packed", True)]


def test_a_source_cut_short_is_damaged(own_cache):
    path = source("smollm2")
    (path / ALIASES["smollm2"].file).write_bytes(b"short")
    (library.sources_dir() / "unknown").mkdir()
    assert listed() == [("smollm2", "source", True), ("unknown", "source", True)]


def test_remove_one_form_or_all(own_cache):
    source("smollm2")
    packed("smollm2-q4")
    packed("smollm2-q8", '{"name": "smollm2", "weights": "q8"}')
    packed("other")
    packed("other-q4", '{"name": "other", "weights": "q4"}')
    assert [entry.name for entry in remove("smollm2:q8")] == ["smollm2:q8"]
    assert len(remove("smollm2")) == 3
    assert listed() == [("other:q4", "packed", False)]
    assert list(packed_dir().iterdir()) == [packed_dir() / "other-q4"]
    with pytest.raises(ValueError, match="no model 'x' in the cache; it has: other:q4"):
        remove("x")


def test_links_are_removed_not_what_they_lead_to(own_cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "fewfire.json").write_text('{"name": "m", "weights": "q4"}')
    packed_dir().mkdir(parents=True)
    try:
        (packed_dir() / "link").symlink_to(elsewhere, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert [(entry.name, entry.bytes) for entry in cached_sources()] == [("m:q4", 0)]
    remove("m")
    assert (elsewhere / "fewfire.json").exists()
    assert cached_sources() == []


def test_interrupted_removal_leaves_nothing_that_counts(own_cache, monkeypatch):
    packed("smollm2-q4")

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(library.shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        remove("smollm2")
    assert cached_sources() == []


def test_what_cannot_be_removed(own_cache, monkeypatch):
    packed("smollm2-q4")

    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(library.os, "replace", deny)
    with pytest.raises(SourceError, match=r"cannot remove .*smollm2-q4: Permission denied"):
        remove("smollm2")
