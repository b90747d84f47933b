"""Directories in the Hugging Face layout: every layout there is gets read, every defect is one clear line."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fewfire.checkpoint import fingerprint, open_checkpoint
from fewfire.errors import CheckpointError
from fewfire.families import canonical_to, family_of
from fewfire.fields import Fields
from tiny import FAMILIES, tiny_config, tiny_shapes, tiny_tensor, write_safetensors, write_tiny

WEIGHTS = "model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_weights(directory: Path, **changes: np.ndarray | None) -> None:
    """Change tensors of model.safetensors, with dots in names written as two underscores."""
    tensors = load_file(directory / WEIGHTS) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / WEIGHTS)


def refusal(path: Path) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["f32", "f16", "bf16", "shards"])
def test_reads_every_tensor(family: str, layout: Any, tmp_path: Path) -> None:
    if layout == "shards":
        write_tiny(family, tmp_path, shards=3)
    else:
        write_tiny(family, tmp_path, dtype=layout)
    checkpoint = open_checkpoint(tmp_path)
    config = tiny_config(family)
    names, stored = family_of(Fields(config, ""))[1].names, dict(tiny_shapes(config))
    for name, shape in checkpoint.config.shapes().items():
        read = checkpoint.read(name)
        original = canonical_to(names, name)
        if original not in stored:  # thresholds that are alike
            expected = np.full(shape, config["hidden_act_param"], np.float32)
        else:
            expected = tiny_tensor(config, original, stored[original])[-shape[0] :]
        if family == "gemma3" and "norm" in name:
            expected = expected + np.float32(1)
        assert (read.shape, read.dtype) == (shape, np.float32)
        assert read.flags.c_contiguous
        tolerance = {"f16": 2e-3, "bf16": 1e-2}.get(layout, 0)
        np.testing.assert_allclose(read, expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(checkpoint.read(name, 1, 3), read[1:3])
        np.testing.assert_array_equal(checkpoint.read(name, shape[0] - 1), read[-1:])


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_names_without_the_model_prefix(family: str, tmp_path: Path) -> None:
    whole, bare = write_tiny(family, tmp_path / "whole"), write_tiny(family, tmp_path / "bare")
    tensors = load_file(bare / WEIGHTS)
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, bare / WEIGHTS)
    one, other = open_checkpoint(whole), open_checkpoint(bare)
    for name in one.config.shapes():
        np.testing.assert_array_equal(one.read(name), other.read(name))


def test_one_file_by_any_name(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "weights.safetensors")
    open_checkpoint(tmp_path)
    (tmp_path / "more.safetensors").write_bytes(b"")
    assert refusal(tmp_path).startswith(": 2 .safetensors files and no index")


def test_reading_rows_takes_little_memory(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, dtype="bf16", vocab_size=50_000)
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    checkpoint.read("embed.weight", 40_000, 40_100)
    assert tracemalloc.get_traced_memory()[1] < 300_000  # of 12 MB
    tracemalloc.stop()


def test_thresholds_of_the_activation(tmp_path: Path) -> None:
    """Of a layer in config.json, of its neurons in a tensor, which goes first."""
    path = write_tiny("sparsellama", tmp_path, hidden_act_param=[0.1, 0, 0.3])
    stored, ours = "model__layers__{}__mlp__act_threshold__weight", "layers.{}.act_threshold.weight"
    checkpoint = open_checkpoint(path)
    each = [checkpoint.read(ours.format(i)) for i in range(3)]
    np.testing.assert_array_equal(each, np.repeat(np.array([[0.1], [0], [0.3]], np.float32), 96, axis=1))
    with pytest.raises(ValueError, match="rows 0:97"):
        checkpoint.read(ours.format(0), 0, 97)
    own = np.linspace(0, 1, 96, dtype=np.float32)
    edit_weights(path, **{stored.format(1): own})
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.read(ours.format(1)), own)
    np.testing.assert_array_equal(checkpoint.read(ours.format(2)), each[2])
    edit_json(path / "config.json", hidden_act_param=None)
    assert "hidden_act_param is missing, expected the activation's threshold" in refusal(path)
    edit_weights(path, **{stored.format(i): own for i in range(3)})
    assert open_checkpoint(path).config.hidden_act == "fatrelu"
    edit_weights(path, **{stored.format(1): own[1:]})
    assert "layers.1.act_threshold.weight has shape (95,), the config asks for (96,)" in refusal(path)


@pytest.mark.parametrize("rows", [(-1, 2), (2, 1), (0, 301), (301, 301)])
def test_rows_out_of_range(rows: tuple[int, int], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny("llama", tmp_path))
    with pytest.raises(ValueError, match=r"rows .* of embed.weight are not in 0:300"):
        checkpoint.read("embed.weight", *rows)


def test_tied_heads(tmp_path: Path) -> None:
    """config.json decides, then the family; an lm_head that is stored all the same is not looked at."""
    tied = write_tiny("llama-tied", tmp_path / "tied")
    edit_weights(tied, lm_head__weight=np.zeros((3, 3), np.float32))
    assert "head.weight" not in open_checkpoint(tied).config.shapes()

    untied = write_tiny("llama", tmp_path / "untied")
    edit_json(untied / "config.json", tie_word_embeddings=None)
    assert "head.weight" in open_checkpoint(untied).config.shapes()
    edit_weights(untied, lm_head__weight=None)
    assert refusal(untied) == ": tensor head.weight missing: the checkpoint is incomplete"


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    wrong = np.zeros((96, 63), np.float32)
    edit_weights(tmp_path, model__layers__1__mlp__up_proj__weight=wrong)
    expected = ": tensor layers.1.up.weight has shape (96, 63), the config asks for (96, 64)"
    assert refusal(tmp_path) == expected
    edit_weights(tmp_path, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    assert refusal(tmp_path).startswith(": tensor layers.1.up.weight and 1 more missing")


@pytest.mark.parametrize("layers", [4, 2])
def test_a_config_of_another_model(layers: int, tmp_path: Path) -> None:
    """Too few tensors are an error, more than needed are not: some files carry extras."""
    write_tiny("llama", tmp_path)
    edit_json(tmp_path / "config.json", num_hidden_layers=layers)
    if layers == 4:
        assert refusal(tmp_path).startswith(": tensor layers.3.attn_norm.weight and 8 more missing")
    else:
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_weights_that_are_no_numbers(value: float, dtype: Any, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.mlp.gate_proj.weight"][50, 3] = value
    write_safetensors(tmp_path / WEIGHTS, tensors, dtype)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.read("layers.0.gate.weight", 0, 50)
    with pytest.raises(CheckpointError, match=r"tensor layers.0.gate.weight has NaN or infinite weights"):
        checkpoint.read("layers.0.gate.weight", 50)


def test_other_number_formats(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    edit_weights(tmp_path, model__norm__weight=np.ones(64, np.float64))
    assert refusal(tmp_path).endswith("tensor final_norm.weight is stored as F64; supported: F32, F16, BF16")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 3000, -1])
def test_truncated(kept: int, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:kept])
    assert refusal(tmp_path).startswith(f"/{WEIGHTS}: truncated")


def test_shards(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path, shards=3)
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()
    last = tmp_path / "model-00003-of-00003.safetensors"
    data = last.read_bytes()

    last.write_bytes(data[:-1])
    assert "00003-of-00003.safetensors: truncated: tensor" in refusal(tmp_path)
    last.unlink()
    assert refusal(tmp_path).startswith(": 1 of 3 shards missing, such as model-00003-of-00003.safetensors")
    last.write_bytes(data)
    for damaged in (
        '{"weight_map": 3}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 3}}',
    ):
        index.write_text(damaged)
        assert refusal(tmp_path).startswith("/model.safetensors.index.json: weight_map is missing or damaged")
    index.write_text(whole[: len(whole) // 2])
    assert refusal(tmp_path).startswith("/model.safetensors.index.json: not valid JSON")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"a": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "architectures and model_type are missing; supported: LlamaForCausalLM"),
    ],
)
def test_damaged_configs(content: str, message: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert refusal(tmp_path).startswith(f"/config.json: {message}")


@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config", "tokenizer"])
def test_text_that_is_not_utf8(name: str, tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / f"{name}.json").write_bytes(b'{"a": "\xff\xfe"}')
    assert refusal(tmp_path) == f"/{name}.json: not valid JSON; fetch the file again"


def test_what_is_no_model(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == ": no such model directory or .gguf file"
    assert refusal(tmp_path).startswith(": no config.json")
    (tmp_path / "file.txt").write_text("hello")
    assert "not a GGUF file" in refusal(tmp_path / "file.txt")
    write_tiny("llama", tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    assert refusal(tmp_path / "model").startswith(": no .safetensors file")


def test_no_tokenizer(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tokenizer.json; add the model's"):
        checkpoint.tokenizer_json()


def test_tokenizer_and_template(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tokenizer_json() == (tmp_path / "tokenizer.json").read_text()
    settings = tmp_path / "tokenizer_config.json"
    assert checkpoint.chat_template() == json.loads(settings.read_text())["chat_template"]
    edit_json(settings, chat_template=[{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}])
    assert checkpoint.chat_template() == "D"
    edit_json(settings, chat_template=None)
    assert checkpoint.chat_template() is None
    (tmp_path / "chat_template.jinja").write_text("J")
    assert checkpoint.chat_template() == "J"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read as UTF-8"):
        checkpoint.chat_template()


def test_everything_that_ends_a_text_or_a_turn(tmp_path: Path) -> None:
    """config.json, generation_config.json, the tokenizer's eos_token, and the usual ends of turns by name."""
    write_tiny("llama", tmp_path)
    assert open_checkpoint(tmp_path).config.eos_token_ids == (2, 0)
    edit_json(tmp_path / "generation_config.json", eos_token_id=7)
    assert open_checkpoint(tmp_path).config.eos_token_ids == (2, 7)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    assert open_checkpoint(tmp_path).config.eos_token_ids == (0, 2)
    (tmp_path / "tokenizer_config.json").unlink()
    assert open_checkpoint(tmp_path).config.eos_token_ids == (2,)


def test_begin_token(tmp_path: Path) -> None:
    """tokenizer_config.json decides; where it does not say, the tokenizer's post-processor."""
    write_tiny("llama", tmp_path)
    assert open_checkpoint(tmp_path).config.bos_token_id == 1
    assert not open_checkpoint(tmp_path).config.add_bos_token
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    edit_json(tmp_path / "tokenizer.json", post_processor=template)
    assert open_checkpoint(tmp_path).config.add_bos_token
    byte_level = {"type": "ByteLevel", "trim_offsets": False}
    edit_json(tmp_path / "tokenizer.json", post_processor={"type": "Sequence", "processors": [byte_level, template]})
    assert open_checkpoint(tmp_path).config.add_bos_token
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=False)
    assert not open_checkpoint(tmp_path).config.add_bos_token
    edit_json(tmp_path / "tokenizer_config.json", add_bos_token=True)
    edit_json(tmp_path / "tokenizer.json", post_processor=byte_level)
    assert open_checkpoint(tmp_path).config.add_bos_token
    edit_json(tmp_path / "config.json", bos_token_id=None)
    edit_json(tmp_path / "tokenizer_config.json", bos_token="<|im_end|>")
    assert open_checkpoint(tmp_path).config.bos_token_id == 2
    edit_json(tmp_path / "tokenizer_config.json", bos_token="unknown")
    assert open_checkpoint(tmp_path).config.bos_token_id is None
    assert not open_checkpoint(tmp_path).config.add_bos_token


def test_fingerprint(tmp_path: Path) -> None:
    write_tiny("llama", tmp_path)
    first = fingerprint(tmp_path)
    assert first == fingerprint(tmp_path)
    assert len(first) == 16
    edit_json(tmp_path / "tokenizer_config.json", chat_template="other")
    assert fingerprint(tmp_path) != first


def test_fingerprint_of_models_that_differ_in_weights_alone(tmp_path: Path) -> None:
    """As two fine-tuned models do in an image whose files all have one time."""
    found = set()
    for seed in (1, 2):
        path = write_tiny("llama", tmp_path / str(seed) / "model", seed=seed)
        for file in path.iterdir():
            os.utime(file, (0, 0))
        found.add(fingerprint(path))
    assert len(found) == 2
