"""The observation against the forward pass that it takes apart, on every family."""

import numpy as np
import pytest

import unpack
from fewfire import reference
from fewfire.checkpoint import open_checkpoint
from fewfire.observe import Observation, head_rows
from fewfire.packed import open_packed
from tiny import FAMILIES, VOCAB_SIZE, prompt

WINDOWS = [prompt(40), prompt(9, seed=1), prompt(1, seed=2)]


def expected(config, tensors) -> np.ndarray:
    return np.concatenate([reference.forward(config, tensors, window) for window in WINDOWS])


@pytest.mark.parametrize("family", FAMILIES)
def test_final_states_give_the_logits_of_the_checkpoint(family, tiny_path, packed_path):
    checkpoint = open_checkpoint(tiny_path(family))
    tensors = {name: checkpoint.read(name) for name in checkpoint.config.shapes()}
    seen = Observation(open_packed(packed_path(family, "f32")), WINDOWS)
    assert [layer.number for layer in seen] == [0, 1, 2]
    logits = seen.final @ head_rows(seen.packed).T
    np.testing.assert_allclose(logits, expected(checkpoint.config, tensors), atol=1e-4)


@pytest.mark.parametrize("weights", ["q4", "q8", "bf16"])
@pytest.mark.parametrize("family", ["llama-bias", "gemma3", "opt", "bamboo", "qwen3"])
def test_stored_weights_are_decoded(family, weights, packed_path):
    packed = open_packed(packed_path(family, weights))
    seen = Observation(packed, WINDOWS)
    list(seen)
    np.testing.assert_allclose(
        seen.final @ head_rows(packed).T, expected(packed.config, unpack.tensors(packed)), atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_of_a_layer_fit_together(family, packed_path):
    packed = open_packed(packed_path(family, "f32"))
    c = packed.config
    layers = list(Observation(packed, WINDOWS))
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        assert layer.attn_in.shape == layer.ffn_in.shape == layer.residual.shape == (50, c.hidden_size)
        assert layer.joined.shape == (50, c.num_attention_heads * c.head_dim)
        assert layer.gate.shape == layer.fired.shape == (50, c.intermediate_size)
        assert (layer.up is not None) == c.gated
        np.testing.assert_array_equal(layer.fired, layer.gate if layer.up is None else layer.gate * layer.up)
        shapes = {name: tensor.shape for name, tensor in layer.tensors.items()}
        at = f"layers.{layer.number}."
        assert shapes == {n.removeprefix(at): shape for n, shape in c.shapes().items() if n.startswith(at)}
        assert layer.tensors["down.weight"].T.flags.c_contiguous
        if following is not None:
            y = reference.linear(layer.tensors, "down", layer.fired)
            if "bypass.weight" in layer.tensors:
                y = y + reference.linear(layer.tensors, "bypass", layer.ffn_in)
            if c.post_norms:
                y = reference.normed(c, layer.tensors, "ffn_post_norm", y)
            again = reference.normed_input(c, following.tensors, "attn_norm", layer.residual + y)
            np.testing.assert_allclose(following.attn_in, again, atol=1e-5)


def test_windows_do_not_see_each_other(packed_path):
    packed = open_packed(packed_path("llama", "q4"))
    alone, together = Observation(packed, WINDOWS[1:2]), Observation(packed, WINDOWS)
    for one, all_three in zip(alone, together, strict=True):
        np.testing.assert_allclose(all_three.fired[40:49], one.fired, atol=1e-5)
    assert together.tokens.tolist() == [*WINDOWS[0], *WINDOWS[1], *WINDOWS[2]]
    assert together.positions.tolist() == [*range(40), *range(9), 0]


def test_head_rows_in_parts(packed_path):
    packed = open_packed(packed_path("llama", "q4"))
    np.testing.assert_array_equal(
        np.concatenate([head_rows(packed, 0, 7), head_rows(packed, 7, 300)]), head_rows(packed)
    )


def test_progress_and_a_second_pass(packed_path):
    calls = []
    seen = Observation(open_packed(packed_path("llama", "q4")), WINDOWS, lambda *a: calls.append(a[1:]))
    with pytest.raises(ValueError, match="after the last layer"):
        _ = seen.final
    list(seen)
    first = seen.final
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    list(seen)
    np.testing.assert_array_equal(seen.final, first)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no tokens"),
        ([[1], []], "no tokens"),
        ([[VOCAB_SIZE]], "from 0 to 299"),
        ([[-1]], "from 0 to 299"),
        ([prompt(161)], "160 positions"),
    ],
)
def test_bad_windows(windows, message, packed_path):
    with pytest.raises(ValueError, match=message):
        Observation(open_packed(packed_path("llama", "q4")), windows)
