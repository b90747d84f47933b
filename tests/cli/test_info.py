import json
import math

import pytest

from commandline import run
from fewfire.checkpoint import open_checkpoint
from tiny import FAMILIES


def test_what_it_says(model):
    out = run("info", model).out
    for text in (
        "Llama",
        "3, 64 wide",
        "4 heads of 16, 2 for keys and values",
        "96 per layer, silu",
        "160 tokens",
        "q4",
    ):
        assert text in out
    assert all(len(line) <= 80 or str(model) in line for line in out.splitlines())


def test_json_before_and_after_packing_agree(model, tmp_path):
    before = json.loads(run("info", model, "--weights", "q8", "--json").out)
    assert run("pack", model, tmp_path / "packed", "--weights", "q8").code == 0
    after = json.loads(run("info", tmp_path / "packed", "--json").out)
    for key in ("weights", "bytes", "parameters", "config", "chat_template"):
        assert before[key] == after[key]
    file = tmp_path / "packed" / "weights.safetensors"
    assert sum(after["bytes"].values()) <= file.stat().st_size


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_a_part(tiny_path, family):
    data = json.loads(run("info", tiny_path(family), "--weights", "f32", "--json").out)
    shapes = open_checkpoint(tiny_path(family)).config.shapes().values()
    assert sum(data["parameters"].values()) == sum(math.prod(shape) for shape in shapes)
    assert run("info", tiny_path(family)).code == 0


def test_bad_input(tmp_path):
    run("info", tmp_path).failed(1, str(tmp_path))
    run("info", "no/such/model").failed(1, "no/such/model")
