"""GGUF models: the same config and weights as the directory they would be converted from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from fewfire.checkpoint import fingerprint, open_checkpoint
from fewfire.config import Rope
from fewfire.errors import CheckpointError
from fewfire.tokenizer import Tokenizer
from tiny import write_tiny
from tiny_gguf import ARCHITECTURES, write_tiny_gguf


def refusal(path: Path) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_same_as_the_directory(family: str, tmp_path: Path) -> None:
    directory = open_checkpoint(write_tiny(family, tmp_path / "hf"))
    gguf = open_checkpoint(write_tiny_gguf(family, tmp_path / "x.gguf"))
    ours, theirs = gguf.config, directory.config
    if family == "gemma3":  # not in GGUF: llama.cpp takes the head size for query_pre_attn_scalar
        theirs = replace(theirs, attention_scale=ours.head_dim**-0.5)
    if family == "llama-llama3":
        assert ours.rope is not None
        assert theirs.rope is not None
        np.testing.assert_allclose(ours.rope.inverse_frequencies(16), theirs.rope.inverse_frequencies(16), 1e-6)
        theirs = replace(theirs, rope=ours.rope)
    assert ours == replace(theirs, eos_token_ids=(2,))
    for name, shape in ours.shapes().items():
        rows = gguf.read(name)
        assert (rows.shape, rows.dtype) == (shape, np.float32)
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows, directory.read(name))


@pytest.mark.parametrize("rows", [(0, 64), (0, 1), (5, 6), (3, 21), (16, 32), (63, 64), (20, 20)])
@pytest.mark.parametrize("family", ["llama-bias", "qwen2"])
def test_row_ranges_of_permuted_matrices(family: str, rows: tuple[int, int], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf(family, tmp_path / "x.gguf"))
    for name in ("layers.1.q.weight", "layers.1.q.bias", "layers.0.o.weight"):
        if name in checkpoint.config.shapes():
            np.testing.assert_array_equal(checkpoint.read(name, *rows), checkpoint.read(name)[slice(*rows)])
    with pytest.raises(ValueError, match="not in 0:64"):
        checkpoint.read("layers.1.q.weight", 0, 65)


@pytest.mark.parametrize(
    ("kind", "error"), [("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q5_1", 0.05), ("Q4_1", 0.1), ("Q4_0", 0.15)]
)
def test_number_formats(kind: str, error: float, tmp_path: Path) -> None:
    exact = open_checkpoint(write_tiny_gguf("llama", tmp_path / "exact.gguf"))
    stored = open_checkpoint(write_tiny_gguf("llama", tmp_path / "x.gguf", kind=GGMLQuantizationType[kind]))
    for name in exact.config.shapes():
        one, other = exact.read(name), stored.read(name)
        assert np.abs(one - other).max() <= error * np.abs(one).max()


def test_a_format_that_the_package_cannot_read(tmp_path: Path) -> None:
    integers = np.ones((96, 64), np.int8)
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={"blk.1.ffn_up.weight": integers})
    assert refusal(path) == "tensor blk.1.ffn_up.weight has the format I8, which cannot be read; use another"


@pytest.mark.parametrize(
    ("family", "metadata", "rope"),
    [
        ("llama", {"llama.rope.scaling.type": "none"}, Rope(10000.0)),
        ("llama", {"llama.rope.scale_linear": 4}, Rope(10000.0, "linear", factor=4.0)),
    ],
)
def test_rope_metadata(family: str, metadata: dict[str, Any], rope: Rope, tmp_path: Path) -> None:
    config = open_checkpoint(write_tiny_gguf(family, tmp_path / "x.gguf", metadata=metadata)).config
    assert config.rope == rope


def test_gemma3_as_older_converters_wrote_it(tmp_path: Path) -> None:
    """Without the pattern and the local base, which llama.cpp had in its code."""
    path = write_tiny_gguf("gemma3", tmp_path / "x.gguf", num_hidden_layers=6, sliding_window_pattern=6)
    config = open_checkpoint(path).config
    assert config.sliding_layers == (True,) * 5 + (False,)
    assert config.rope_local == Rope(10000.0)
    assert config.rope == Rope(1e6, "linear", factor=8.0)


@pytest.mark.parametrize(
    ("family", "metadata", "message"),
    [
        ("llama", {"llama.expert_count": 8}, "mixture-of-experts models .llama.expert_count. are not supported"),
        ("llama", {"split.count": 3}, "one part of a split GGUF"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported; supported: none, linear"),
        ("llama", {"llama.rope.dimension_count": 8}, "dimension_count is 8, expected 16"),
        ("llama", {"llama.attention.key_length": 32}, "tensor layers.0.q.weight has shape .64, 64."),
        ("llama", {"llama.attention.value_length": 32}, "value_length is 32, expected the same as key_length"),
        ("llama", {"llama.attention.key_length": 17}, "key_length is 17, expected an even|key_length"),
        ("llama", {"tokenizer.ggml.eot_token_id": 10**6}, "eot_token_id is 1000000, expected token ids"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30}, "final_logit_softcapping is 30"),
    ],
)
def test_what_is_refused(family: str, metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(family, tmp_path / "x.gguf", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hidden_layers": 0}, "llama.block_count is 0, expected a whole number from 1 to 1024"),
        ({"num_key_value_heads": 3}, "llama.attention.head_count_kv is 3, expected a divisor"),
        ({"max_position_embeddings": 0}, "llama.context_length is 0"),
    ],
)
def test_nonsense_in_the_metadata(overrides: dict[str, int], message: str, tmp_path: Path) -> None:
    assert refusal(write_tiny_gguf("llama", tmp_path / "x.gguf", **overrides)).startswith(message)


def test_an_unknown_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    expected = "architecture 'mamba' is not supported in GGUF; supported: llama, qwen2, qwen3, gemma3"
    assert refusal(path) == expected


def test_missing_and_misshapen_tensors(tmp_path: Path) -> None:
    up = "blk.2.ffn_up.weight"
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={up: None})
    assert refusal(path) == "tensor layers.2.up.weight missing: the checkpoint is incomplete"
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={up: np.zeros((64, 96), np.float32)})
    assert refusal(path).startswith("tensor layers.2.up.weight has shape (64, 96)")
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={"token_embd.weight": None, "output.weight": None})
    assert refusal(path).startswith("llama.vocab_size is missing")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "x.gguf")
    down = open_checkpoint(path).read("layers.0.down.weight")
    down[3, 7] = value
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={"blk.0.ffn_down.weight": down})
    checkpoint = open_checkpoint(path)
    checkpoint.read("layers.0.down.weight", 4)
    with pytest.raises(CheckpointError, match=r"tensor layers.0.down.weight has NaN"):
        checkpoint.read("layers.0.down.weight", 3, 4)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_damaged_rope_factors(value: float, tmp_path: Path) -> None:
    factors = np.full(8, value, np.float32)
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={"rope_freqs.weight": factors})
    assert refusal(path).startswith("tensor rope_freqs.weight is damaged")
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", replace={"rope_freqs.weight": factors[:5]})
    assert refusal(path).startswith("tensor rope_freqs.weight has shape (5,)")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.02, 0.05, 0.3, 0.6, 0.9, 0.99])
def test_truncated(share: float, tmp_path: Path) -> None:
    path = write_tiny_gguf("qwen3", tmp_path / "x.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert refusal(path).startswith("truncated")


def test_tokenizer_template_and_tokens(tmp_path: Path) -> None:
    """The directory's tokenizer, from what the file says of it."""
    directory = open_checkpoint(write_tiny("llama", tmp_path / "hf"))
    gguf = open_checkpoint(write_tiny_gguf("llama", tmp_path / "x.gguf"))
    one, other = (Tokenizer.from_json(c.tokenizer_json()) for c in (directory, gguf))
    for text in ("The lamp turns, 12 times.", "  é\n\n", "<|im_start|>user\nhi<|im_end|>", ""):
        assert one.encode(text) == other.encode(text)
        assert one.encode(text, parse_special=True) == other.encode(text, parse_special=True)
        assert other.decode(other.encode(text)) == text
    assert gguf.chat_template() == directory.chat_template()
    assert (gguf.config.bos_token_id, gguf.config.eos_token_ids, gguf.config.add_bos_token) == (1, (2,), False)


def test_no_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny_gguf("llama", tmp_path / "x.gguf", tokenizer=False))
    assert checkpoint.chat_template() is None
    assert checkpoint.config.eos_token_ids == ()
    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.model is missing|the file has no tokenizer"):
        checkpoint.tokenizer_json()


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "x.gguf", vocab_size=200)
    with pytest.raises(CheckpointError, match="300 tokens, but the embedding has only 200 rows"):
        open_checkpoint(path).tokenizer_json()


def test_fewer_tokens_than_rows(tmp_path: Path) -> None:
    """Embeddings are padded for alignment: their rows count."""
    checkpoint = open_checkpoint(write_tiny_gguf("llama", tmp_path / "x.gguf", vocab_size=320))
    assert checkpoint.config.vocab_size == 320
    assert Tokenizer.from_json(checkpoint.tokenizer_json()).vocab_size == 300


def test_fingerprint(tmp_path: Path) -> None:
    path = write_tiny_gguf("llama", tmp_path / "x.gguf")
    first = fingerprint(path)
    assert first == fingerprint(path)
    assert fingerprint(write_tiny_gguf("llama-tied", path)) != first


def test_real_model(smollm2_path: Path) -> None:
    """SmolLM2; the ids are llama.cpp's."""
    checkpoint = open_checkpoint(smollm2_path)
    config = checkpoint.config
    assert (config.architecture, config.num_hidden_layers, config.num_attention_heads) == ("Llama", 30, 9)
    assert (config.norm_eps, config.rope, config.tie_word_embeddings) == (1e-5, Rope(100_000.0), True)
    assert (config.bos_token_id, config.eos_token_ids, config.add_bos_token) == (1, (2,), False)
    tokenizer = Tokenizer.from_json(checkpoint.tokenizer_json())
    ids = [19556, 905, 216, 33, 34, 35, 17, 339, 5248, 216, 1535, 1116, 197, 104, 26411, 15107, 232, 227]
    text = "Hello world 123! I'm  here\n\n\tx é 🎉"
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    chat = "<|im_start|>user\nhi<|im_end|>"
    assert tokenizer.encode(chat, parse_special=True) == [1, 4093, 198, 6004, 2]
    template = checkpoint.chat_template()
    assert template is not None
    assert "<|im_start|>" in template
