"""The oracle itself: against transformers live, against its stored outputs, and against itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewfire.checkpoint import Checkpoint, open_checkpoint
from fewfire.config import ModelConfig
from fewfire.reference import ReferenceCache, activate, forward, softmax
from tiny import FAMILIES, prompt, write_tiny

GOLDEN = Path(__file__).parent.parent / "golden"
OWN = ("sparsellama", "bamboo", "llama-fatsilu", "llama-centred")  # what transformers does not have
TOLERANCE = 2e-4  # ten times under what the engine has to meet; float32 rounding alone gives 5e-5
# Widths that are no multiple of anything, one key head for all, a vocabulary larger than the tokenizer's
ODD: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 50,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "vocab_size": 311,
}


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: checkpoint.read(name) for name in checkpoint.config.shapes()}


def reference(checkpoint: Checkpoint, ids: list[int]) -> np.ndarray:
    return forward(checkpoint.config, tensors(checkpoint), ids)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Checkpoint:
    return open_checkpoint(smollm2_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_transformers(family: str, tmp_path: Path, peers: Any) -> None:
    """As transformers itself reads the directory, and as it computes with the tensors that we read."""
    ids = prompt(64)
    checkpoint = open_checkpoint(write_tiny(family, tmp_path))
    ours = reference(checkpoint, ids)
    assert 1 < ours.std() < 4
    assert np.abs(ours - peers.logits(peers.from_directory(tmp_path), ids)).max() < TOLERANCE
    assert np.abs(ours - peers.logits(peers.transformers_model(checkpoint), ids)).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_transformers_at_odd_sizes(family: str, tmp_path: Path, peers: Any) -> None:
    ids = prompt(33, vocab_size=311, seed=1)
    checkpoint = open_checkpoint(write_tiny(family, tmp_path, seed=1, **ODD))
    theirs = peers.logits(peers.from_directory(tmp_path), ids)
    assert np.abs(reference(checkpoint, ids) - theirs).max() < TOLERANCE


@pytest.mark.parametrize("norm", ["llama-tied", "gemma3", "opt"])
def test_relu_after_norms(norm: str, tmp_path: Path, peers: Any) -> None:
    """Only after those that feed attention and FFN: not with a sandwich's others, and after a layer norm's bias."""
    ids = prompt(64)
    checkpoint = open_checkpoint(write_tiny(norm, tmp_path / "relu", norm_relu=True))
    plain = open_checkpoint(write_tiny(norm, tmp_path / "plain"))
    ours = reference(checkpoint, ids)
    assert np.abs(ours - peers.logits(peers.from_directory(tmp_path / "relu"), ids)).max() < TOLERANCE
    assert np.abs(ours - reference(plain, ids)).max() > 0.1


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in OWN])
def test_reads_what_transformers_writes(family: str, tmp_path: Path, peers: Any) -> None:
    """Newer versions spell config.json otherwise (rope_parameters, layer_types) than tiny.py does."""
    tiny = open_checkpoint(write_tiny(family, tmp_path / "tiny"))
    peers.from_directory(tiny.path).save_pretrained(tmp_path / "rewritten")
    rewritten = open_checkpoint(tmp_path / "rewritten")
    assert rewritten.config == tiny.config
    assert all(np.array_equal(rewritten.read(name), tiny.read(name)) for name in tiny.config.shapes())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_matches_transformers_in_half_precision_files(dtype: Any, tmp_path: Path, peers: Any) -> None:
    ids = prompt(20)
    checkpoint = open_checkpoint(write_tiny("gemma3", tmp_path, dtype=dtype, shards=3))
    theirs = peers.logits(peers.from_directory(tmp_path), ids)
    assert np.abs(reference(checkpoint, ids) - theirs).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_golden(family: str, tmp_path: Path) -> None:
    """Without torch: logits after the last token of the prompt, stored by golden/make.py."""
    ours = reference(open_checkpoint(write_tiny(family, tmp_path)), prompt(64))
    with np.load(GOLDEN / "tiny.npz") as golden:
        assert np.abs(ours[-1] - golden[family]).max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_continues(family: str, tmp_path: Path) -> None:
    """In pieces of any size, a prompt gives what it gives at once."""
    ids = prompt(40)
    checkpoint = open_checkpoint(write_tiny(family, tmp_path))
    weights = tensors(checkpoint)
    at_once = forward(checkpoint.config, weights, ids)
    cache = ReferenceCache()
    pieces = []
    for piece in (ids[:17], ids[17:18], ids[18:19], ids[19:]):
        pieces.append(forward(checkpoint.config, weights, piece, cache))
    assert cache.length == 40
    assert np.abs(np.concatenate(pieces) - at_once).max() < TOLERANCE


def test_real_model_matches_golden(smollm2: Checkpoint) -> None:
    """Greedy continuations of transformers, in one pass each: every next token is our likeliest too."""
    weights = tensors(smollm2)
    with np.load(GOLDEN / "smollm2.npz") as golden:
        for i in range(int(golden["n"])):
            start, continuation = golden[f"prompt_{i}"], golden[f"continuation_{i}"]
            ours = forward(smollm2.config, weights, np.concatenate([start, continuation]).tolist())
            likeliest = ours[len(start) - 1 : -1].argmax(axis=-1)
            np.testing.assert_array_equal(likeliest, continuation)
            top = np.take_along_axis(ours[golden[f"positions_{i}"]], golden[f"top_ids_{i}"], axis=-1)
            assert np.abs(top - golden[f"top_logits_{i}"]).max() < 2e-3


def test_real_model_matches_transformers(smollm2: Checkpoint, peers: Any) -> None:
    with np.load(GOLDEN / "smollm2.npz") as golden:
        ids = np.concatenate([golden["prompt_0"], golden["continuation_0"]]).tolist()[:64]
    theirs = peers.logits(peers.transformers_model(smollm2), ids)
    assert np.abs(reference(smollm2, ids) - theirs).max() < 2e-3


def test_softmax_and_silu_stay_finite() -> None:
    config = ModelConfig("test", 8, 8, 8, 1, 1, 1, 8, 8)
    huge = np.array([[-1e9, -1e4, 0, 1e4, 1e9]], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(softmax(huge), [[0, 0, 0, 0, 1]])
        np.testing.assert_allclose(activate(config, huge), [[0, 0, 0, 1e4, 1e9]], atol=1e-20)


def test_says_when_there_is_nothing_or_too_much_to_do(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_tiny("opt", tmp_path, max_position_embeddings=8))
    with pytest.raises(ValueError, match="at least one"):
        reference(checkpoint, [])
    with pytest.raises(ValueError, match="position 8 is past the model's 8"):
        reference(checkpoint, prompt(9))
