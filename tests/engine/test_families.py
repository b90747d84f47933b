"""The table of families: what a config.json means, both spellings of RoPE, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fewfire.config import Rope
from fewfire.errors import CheckpointError
from fewfire.families import FAMILIES, canonical_to, read_config, read_thresholds
from tiny import FAMILIES as TINY
from tiny import tiny_config, tiny_shapes

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(family: str, **overrides: Any) -> Any:
    return read_config(tiny_config(family, **overrides))[1]


@pytest.mark.parametrize("tiny", TINY)
def test_every_tensor_has_its_name(tiny: str) -> None:
    """What the config asks for is what the checkpoint has, by name and shape."""
    data = tiny_config(tiny)
    family, ours = read_config(data)
    stored = dict(tiny_shapes(data))
    alike = "hidden_act_param" in data  # thresholds that are no tensors
    names = [name for name in ours.shapes() if not (alike and "act_threshold" in name)]
    expected = {canonical_to(family.names, name): ours.shapes()[name] for name in names}
    if "positions.weight" in ours.shapes():
        rows, width = expected[family.names["positions"] + ".weight"]
        expected[family.names["positions"] + ".weight"] = (rows + family.position_offset, width)
    assert expected == stored


@pytest.mark.parametrize("name", FAMILIES)
def test_architecture_or_model_type_names_the_family(name: str) -> None:
    tiny = {"Gemma 3": "gemma3"}.get(name, name.lower())
    data = tiny_config(tiny)
    assert read_config(data)[1].architecture == name
    del data["architectures"]
    assert read_config(data)[1].architecture == name


def test_llama() -> None:
    ours = config("llama")
    assert (ours.hidden_act, ours.gated, ours.act_on_up, ours.norm) == ("silu", True, False, "rms")
    assert (ours.head_dim, ours.num_key_value_heads, ours.norm_eps) == (16, 2, 1e-5)
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))
    assert (ours.qkv_bias, ours.o_bias, ours.ffn_bias, ours.tie_word_embeddings) == (False,) * 4
    assert ours.rope == Rope(10000.0)
    assert ours.window(0) == 0
    assert config("llama-tied").tie_word_embeddings
    biased = config("llama-bias")
    assert biased.qkv_bias
    assert biased.o_bias
    assert biased.ffn_bias


def test_heads_default_to_no_grouping_and_an_even_share() -> None:
    ours = config("llama", num_key_value_heads=None)
    assert (ours.num_key_value_heads, ours.head_dim) == (4, 16)
    assert config("llama", head_dim=8).head_dim == 8


@pytest.mark.parametrize(
    ("hidden_act", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("relu_squared", "relu2"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_activations(hidden_act: str, expected: str) -> None:
    assert config("llama", hidden_act=hidden_act).hidden_act == expected
    assert config("mistral", hidden_act=hidden_act).hidden_act == expected


def test_sparse_families() -> None:
    assert config("sparsellama").hidden_act == "fatrelu"
    assert config("llama-fatsilu").hidden_act == "fatsilu"
    bamboo = config("bamboo")
    assert (bamboo.hidden_act, bamboo.act_on_up) == ("relu", True)
    assert config("qwen3", norm_relu=True).norm_relu
    assert not config("llama").norm_relu
    assert config("mistral", mlp_bias=True).ffn_bias, "a shifted ReLU"


def test_thresholds_of_layers() -> None:
    assert read_thresholds({}, 3) == read_thresholds({"hidden_act_param": None}, 3) == ()
    assert read_thresholds({"hidden_act_param": 0.01}, 3) == (0.01, 0.01, 0.01)
    assert read_thresholds({"hidden_act_param": [0.1, 0, 2]}, 3) == (0.1, 0.0, 2.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-0.1, r"hidden_act_param is -0.1, expected a number from 0"),
        ("much", r"hidden_act_param is 'much', expected a number from 0"),
        ([0.1, 0.2], r"hidden_act_param is a list of 2 entries, expected a list of 3 entries"),
        ([0.1, -1, 0.2], r"hidden_act_param\[1\] is -1, expected a number from 0"),
        ([0.1, None, 0.2], r"hidden_act_param\[1\] is missing, expected a number from 0"),
        (float("inf"), r"hidden_act_param is inf, expected a number from 0"),
    ],
)
def test_thresholds_that_are_refused(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: {message}") as caught:
        read_thresholds({"hidden_act_param": value}, 3)
    assert "\n" not in str(caught.value)


def test_mistral_window() -> None:
    assert config("mistral").sliding_layers == (True, True, True)
    assert config("mistral").sliding_window == 12
    data = tiny_config("mistral")
    assert read_config(data | {"sliding_window": None})[1].sliding_window == 0
    del data["sliding_window"]  # transformers' default
    assert read_config(data)[1].sliding_window == 4096


def test_qwen() -> None:
    two, three = config("qwen2"), config("qwen3")
    assert (two.qkv_bias, two.o_bias, two.qk_norm, two.sliding_window) == (True, False, False, 0)
    assert (three.qkv_bias, three.o_bias, three.qk_norm) == (False, False, True)
    assert config("qwen3", head_dim=None).head_dim == 128
    assert config("qwen3", attention_bias=True).o_bias
    sliding = config("qwen2-sliding")
    assert (sliding.sliding_window, sliding.sliding_layers) == (12, (False, True, True))
    listed = ["full_attention", "sliding_attention", "full_attention"]
    assert config("qwen2-sliding", layer_types=listed).sliding_layers == (False, True, False)


def test_gemma3() -> None:
    ours = config("gemma3")
    assert (ours.hidden_act, ours.post_norms, ours.qk_norm) == ("gelu_tanh", True, True)
    assert ours.tie_word_embeddings  # when config.json says nothing
    assert ours.attention_scale == 24**-0.5
    assert ours.embedding_scale == np.float32(8.0)
    assert ours.sliding_layers == (True, False, True)
    assert (ours.rope, ours.rope_local) == (Rope(1e6, "linear", factor=8.0), Rope(1e4))
    assert config("gemma3", hidden_size=640).embedding_scale == np.float32(640**0.5)
    assert config("gemma3", sliding_window_pattern=None, num_hidden_layers=6).sliding_layers == (True,) * 5 + (False,)
    listed = ["full_attention", "sliding_attention", "sliding_attention"]
    assert config("gemma3", layer_types=listed).sliding_layers == (False, True, True)


def test_gemma3_as_transformers_5_writes_it() -> None:
    old = tiny_config("gemma3")
    new = {key: value for key, value in old.items() if not key.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read_config(new)[1] == read_config(old)[1]


def test_opt() -> None:
    ours = config("opt")
    assert (ours.norm, ours.norm_eps, ours.gated, ours.rope) == ("layer", 1e-5, False, None)
    assert (ours.hidden_act, ours.tie_word_embeddings, ours.intermediate_size) == ("relu", True, 96)
    assert ours.qkv_bias
    assert ours.o_bias
    assert ours.ffn_bias
    assert not config("opt", enable_bias=False).qkv_bias


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {"type": "llama3"} | LLAMA3 | {"original_max_position_embeddings": 64},
        },
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}},
        {"rope_theta": 5e5, "rope_parameters": LLAMA3, "original_max_position_embeddings": 64},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 64},
    ],
)
def test_spellings_of_llama3_rope(rope: dict[str, Any]) -> None:
    data = {k: v for k, v in tiny_config("llama").items() if not k.startswith("rope")} | rope
    assert read_config(data)[1].rope == Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, Rope(1e4)),
        ({"rope_scaling": {"rope_type": "default"}}, Rope(1e4)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(1e4, "linear", factor=2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, Rope(7e3)),
        ({"rope_parameters": {"rope_theta": 7e3}, "rope_theta": 1.0}, Rope(7e3)),
        ({"rope_parameters": None, "rope_theta": 8e3}, Rope(8e3)),
    ],
)
def test_other_ropes(rope: dict[str, Any], expected: Rope) -> None:
    data = {k: v for k, v in tiny_config("llama").items() if not k.startswith("rope")} | rope
    assert read_config(data)[1].rope == expected


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        (
            "llama",
            {"architectures": ["FalconForCausalLM"]},
            "'FalconForCausalLM' is not supported; supported: Llama",
        ),
        (
            "llama",
            {"architectures": [], "model_type": "t5"},
            "'t5' is not supported; supported: LlamaForCausalLM",
        ),
        ("llama", {"architectures": None, "model_type": None}, "architectures and model_type are missing"),
        ("llama", {"hidden_act": "gelu"}, "activation 'gelu' is not supported; supported: silu"),
        ("llama", {"hidden_act": None}, "hidden_act is missing, expected one of silu"),
        ("llama", {"hidden_act": 3}, "hidden_act is 3, expected a string"),
        ("llama", {"norm_relu": 1}, "norm_relu is 1, expected true or false"),
        ("llama", {"quantization_config": {"bits": 4}}, "already quantised .quantization_config."),
        ("llama", {"sparse_config": {"block": 64}}, "sparse_config"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "'yarn' is not supported; supported: default",
        ),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4}}, "'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling is a list of 1 entries, expected an object"),
        ("llama", {"rope_theta": 0}, "rope_theta is 0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": -64}, "hidden_size is -64, expected a whole number from 1"),
        ("llama", {"hidden_size": 63}, "num_attention_heads is 4, expected a divisor of hidden_size, 63"),
        ("llama", {"hidden_size": 68}, "head_dim is 17, expected an even number"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ("llama", {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("llama", {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("llama", {"vocab_size": True}, "vocab_size is True"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        (
            "llama",
            {"eos_token_id": [2, 300]},
            "eos_token_id is a list of 2 entries, expected token ids from 0 to 299",
        ),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1"),
        ("qwen2-sliding", {"layer_types": ["full_attention"]}, "layer_types is a list of 1 entries"),
        (
            "qwen2-sliding",
            {"layer_types": ["chunked"] * 3},
            "expected only full_attention and sliding_attention",
        ),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, expected null"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False, expected true"),
        ("opt", {"_remove_final_layer_norm": True}, "without the weights of its layer norms"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32, expected hidden_size, 64"),
        ("opt", {"ffn_dim": None}, "ffn_dim is missing"),
    ],
)
def test_what_is_refused(family: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^config.json: .*{message}") as caught:
        read_config(tiny_config(family) | overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_names_every_supported_one() -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config({"architectures": ["X"]}, "somewhere/config.json")
    for family in FAMILIES.values():
        for name in family.architectures:
            assert re.search(rf"\b{name}\b", str(caught.value))
    assert str(caught.value).startswith("somewhere/config.json: ")
