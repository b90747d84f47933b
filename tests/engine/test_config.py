"""A model's description: there and back, RoPE's frequencies, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fewfire.config import ModelConfig, Rope

CONFIG = ModelConfig(
    architecture="test", vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    rope=Rope(10000.0, "factors", factors=(1.0, 2.0)), sliding_window=8, sliding_layers=(True, False),
    eos_token_ids=(3,),
)  # fmt: skip


def test_there_and_back() -> None:
    assert ModelConfig.from_dict(CONFIG.to_dict()) == CONFIG


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_hidden_layers": 0},
        {"hidden_size": -64},
        {"vocab_size": 1.5},
        {"intermediate_size": 1 << 40},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"sliding_layers": (True,)},
        {"hidden_act": "swish"},
        {"norm": "batch"},
        {"sliding_window": -1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_sizes_that_no_model_has(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"size|heads|layer|unknown"):
        ModelConfig.from_dict({**CONFIG.to_dict(), **wrong})


def test_fields_that_do_not_exist() -> None:
    with pytest.raises(TypeError):
        ModelConfig.from_dict({**CONFIG.to_dict(), "colour": "red"})


def test_windows_and_ropes_of_layers() -> None:
    local = Rope(100.0)
    config = replace(CONFIG, rope_local=local)
    assert [config.window(i) for i in range(2)] == [8, 0]
    assert [config.layer_rope(i) for i in range(2)] == [local, CONFIG.rope]
    assert CONFIG.layer_rope(0) == CONFIG.rope


def test_frequencies() -> None:
    plain = Rope(100.0).inverse_frequencies(4)
    np.testing.assert_allclose(plain, [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(Rope(100.0, "linear", 4.0).inverse_frequencies(4), plain / 4, rtol=1e-6)
    np.testing.assert_allclose(
        Rope(100.0, "factors", factors=(1.0, 5.0)).inverse_frequencies(4), [1.0, 0.02], rtol=1e-6
    )


def test_llama3_keeps_fast_rotations_and_slows_slow_ones() -> None:
    rope = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = Rope(500000.0).inverse_frequencies(128), rope.inverse_frequencies(128)
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
