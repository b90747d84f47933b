import json

from commandline import run


def test_an_empty_cache(own_cache):
    result = run("models")
    assert (result.code, result.out) == (0, f"no models in {own_cache}\n")
    assert run("models", "--json").out == "[]\n"


def test_list_and_remove(own_cache, model):
    for weights in ("q4", "q8"):
        assert run("generate", model, "x", "--max-tokens", 1, "--weights", weights).code == 0
    out = run("models").out
    assert "llama:q4  packed" in out
    assert "llama:q8  packed" in out
    assert str(own_cache) in out.splitlines()[-1]
    rows = json.loads(run("models", "--json").out)
    assert {row["name"] for row in rows} == {"llama:q4", "llama:q8"}
    assert all(row["bytes"] > 0 and not row["damaged"] for row in rows)

    assert "removed llama:q8" in run("models", "remove", "llama:q8").out
    assert [row["name"] for row in json.loads(run("models", "--json").out)] == ["llama:q4"]
    assert run("generate", model, "x", "--max-tokens", 1, "--weights", "q8").code == 0
    assert run("models", "remove", "llama").out.count("removed") == 2
    run("models", "remove", "llama").failed(2, "llama")
    run("models", "remove").failed(2, "NAME")
    run("models", "bogus").failed(2, "bogus")


def test_a_damaged_entry_is_listed_and_can_be_removed(own_cache):
    (own_cache / "packed" / "broken").mkdir(parents=True)
    (own_cache / "packed" / "broken" / "fewfire.json").write_text("{")
    assert "damaged" in run("models").out
    assert run("models", "remove", "broken").code == 0
    assert run("models", "--json").out == "[]\n"
