"""A released model's config.json becomes the decoder that its publisher describes; wrong ones are refused by name."""

import json
import math
import warnings

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from released import LLAMA3_ROPE, RELEASED, published

from fastft_jax.convert.hf import tensor_requests
from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import RopeConfig, plan_segments
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.rope import rope_tables


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_gives_the_published_number_of_parameters(name):
    values, count = RELEASED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a published file has no key that we do not understand
        config, _ = config_from_hf(values)
    ours = sum(math.prod(request.shape) * len(request.layers or (None,)) for request in tensor_requests(config))
    assert ours == count


def test_what_a_released_config_switches_on_is_on():
    def config(name):
        return config_from_hf(RELEASED[name][0])[0]

    assert config("Llama-2-7B").rope == RopeConfig(rope_theta=1e4, max_position_embeddings=4096)
    assert config("Llama-3.1-8B").rope == RopeConfig(
        rope_theta=5e5,
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        max_position_embeddings=131072,
    )
    assert set(config("Mistral-7B-v0.1").layer_windows) == {4096}
    assert set(config("Mistral-7B-v0.3").layer_windows) == {None}
    assert config("Mistral-Nemo-Base-2407").head_dim == 128 != 5120 // 32
    assert config("Llama-3.2-1B").tie_word_embeddings and not config("Llama-3.1-8B").tie_word_embeddings
    qwen2, qwen3 = config("Qwen2.5-7B"), config("Qwen3-8B")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, None)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, "head", 128)
    assert set(qwen2.layer_windows) == {None}  # the file names a window, and says that it is not used
    gemma2, gemma3 = config("gemma-2-27b"), config("gemma-3-27b-pt")
    assert gemma2.layer_windows == (4096, None) * 23 and gemma2.segments == plan_segments((4096, None) * 23)
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.attention_scale) == (50.0, 30.0, 1 / 12)
    assert gemma2.embedding_scale == math.sqrt(4608) and gemma2.tie_word_embeddings
    assert gemma3.layer_windows == ((1024,) * 5 + (None,)) * 10 + (1024,) * 2
    assert [len(place) for segment in gemma3.segments for place in segment] == [10] * 6 + [2]
    assert (gemma3.rope.rope_theta, gemma3.rope.rope_type, gemma3.rope.factor) == (1e6, "linear", 8.0)
    assert (gemma3.second_rope.rope_theta, gemma3.second_rope.rope_type) == (1e4, "default")
    assert [kind.rope for kind in gemma3.layer_kinds[:7]] == [1, 1, 1, 1, 1, 0, 1]
    assert config("gemma-3-1b-pt").second_rope_layers == tuple(i for i in range(26) if (i + 1) % 6)
    assert (gemma3.attention_scale, gemma3.qk_norm, gemma3.vocab_size) == (168**-0.5, "head", 262208)
    phi = config("Phi-4-mini-instruct")
    assert (phi.rope.rope_type, phi.rope.rotary_dim(phi.head_dim), phi.fused_projections) == ("longrope", 96, True)
    assert phi.rope.original_max_position_embeddings == 4096
    smollm3 = config("SmolLM3-3B")
    assert smollm3.rope.rope_theta == 5e6 and smollm3.second_rope_layers == tuple(range(3, 36, 4))
    olmo3, command = config("Olmo-3-1025-7B"), config("c4ai-command-r7b-12-2024")
    assert (olmo3.rope.rope_type, olmo3.second_rope.rope_type, olmo3.layer_windows[:4]) == (
        "yarn",
        "default",
        (4096, 4096, 4096, None),
    )
    assert command.second_rope_layers == tuple(range(3, 32, 4)) and command.layer_windows == olmo3.layer_windows
    assert config("stablelm-3b-4e1t").rope.rotary_dim(80) == 20
    mixtral_, qwen2_moe, qwen3_moe = (
        config(name).experts for name in ("Mixtral-8x7B-v0.1", "Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B")
    )
    assert (mixtral_.num_experts, mixtral_.top_k, mixtral_.normalise, mixtral_.aux_loss_coef) == (8, 2, True, None)
    assert (qwen2_moe.normalise, qwen2_moe.shared_intermediate_size, qwen2_moe.dense_layers) == (False, 5632, ())
    assert (qwen3_moe.normalise, qwen3_moe.shared_intermediate_size, qwen3_moe.top_k) == (True, None, 8)
    v2, lite, v3 = map(config, ("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-V3"))
    assert (v2.latent.q_rank, lite.latent.q_rank, v2.latent.kv_rank, v2.head_dim, v2.rope_dim) == (
        *(1536, None, 512, 192, 64),
    )
    # the publisher's formula: both softmax's scale and, by mscale / mscale_all_dim, cos and sin
    assert v3.attention_scale == pytest.approx(192**-0.5 * (0.1 * 1.0 * math.log(40) + 1) ** 2, rel=1e-12)
    assert lite.attention_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2, rel=1e-12)
    np.testing.assert_array_equal(rope_tables(v3.rope, v3.rope_dim, np.zeros((1, 1), int))[0], np.ones((1, 1, 32)))
    assert (v2.experts.groups, v2.experts.top_groups, v2.experts.scaling, lite.experts.groups) == (8, 3, 16.0, 1)
    assert (v3.experts.router, v3.experts.normalise, v3.experts.scaling, v3.unread_layers) == ("sigmoid", True, 2.5, 1)
    assert v3.experts.dense_layers == (0, 1, 2) and [len(s[0]) for s in v3.segments] == [3, 58]
    gpt_oss, granite4 = config("gpt-oss-120b"), config("granite-4.0-micro")
    assert gpt_oss.layer_windows == (128, None) * 18 and len(gpt_oss.segments) == 1 and gpt_oss.attention_sinks
    assert (gpt_oss.rope.rope_type, gpt_oss.rope.truncate, gpt_oss.activation) == ("yarn", False, "clamped_silu")
    assert (gpt_oss.experts.top_k, gpt_oss.experts.bias, gpt_oss.experts.aux_loss_coef) == (4, True, None)
    assert (granite4.fused_gate_up, granite4.attention_scale, granite4.logit_scale) == (True, 1 / 64, 0.1)
    assert config("internlm2-20b").grouped_qkv and not config("internlm2-20b").qkv_bias
    assert config("internlm3-8b-instruct").rope.factor == 6.0
    phimoe = config("Phi-3.5-MoE-instruct")
    assert (phimoe.experts.router, phimoe.experts.router_epsilon, phimoe.head_bias) == ("sparsemixer", 0.01, True)
    assert phimoe.rope.attention_factor == 1.243163121016122 and phimoe.norm_bias and phimoe.o_bias


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        LLAMA3_ROPE,
    ],
)
def test_both_styles_of_rope_settings_read_alike(scaling):
    base = published("llama", 64, 96, 2, 4, 2, 160, 4096)
    kind = "type" if scaling and scaling["rope_type"] != "llama3" else "rope_type"  # as files of that age have it
    old_scaling = scaling and {(kind if key == "rope_type" else key): value for key, value in scaling.items()}
    old = base | {"rope_theta": 5e5, "rope_scaling": old_scaling}
    new = base | {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5}}
    assert config_from_hf(old)[0] == config_from_hf(new)[0]


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.8,
    },
    "llama3": LLAMA3_ROPE | {"original_max_position_embeddings": 64},
    "longrope": tiny.LONGROPE | {"original_max_position_embeddings": 64},
    "longrope-no-factor": {
        key: value
        for key, value in (tiny.LONGROPE | {"original_max_position_embeddings": 64}).items()
        if key != "factor"
    },
}


@pytest.mark.parametrize("length", [40, 600], ids=["within", "beyond"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_tables_equal_transformers_also_beyond_the_original_context(name, length):
    """1e-6 of the frequencies; the angle is position x frequency in float32 on both sides, so it may be off by an ulp
    of 600 (6e-5), which the bound on cos and sin follows."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs_config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=256,
        rope_parameters=ROPES[name] | {"rope_theta": 1e4},
    )
    rotary = LlamaRotaryEmbedding(theirs_config)
    positions = torch.arange(length)[None]
    cos, sin = rotary(torch.zeros(1, length, 64), positions)
    config, _ = config_from_hf(theirs_config.to_dict())
    ours_cos, ours_sin = rope_tables(config.rope, config.head_dim, positions.numpy())
    half = config.head_dim // 2
    one = np.asarray(ours_cos)[0, 0]  # position 0: cos is the attention factor
    np.testing.assert_allclose(one, cos[0, 0, :half].numpy(), rtol=1e-6)
    # position 1: sin(frequency) x factor, so the frequencies themselves
    np.testing.assert_allclose(np.asarray(ours_sin)[0, 1], sin[0, 1, :half].numpy(), rtol=1e-6, atol=1e-9)
    atol = 1e-6 * max(1, length / 10)
    np.testing.assert_allclose(np.asarray(ours_cos)[0], cos[0, :, :half].numpy(), atol=atol, rtol=0)
    np.testing.assert_allclose(np.asarray(ours_sin)[0], sin[0, :, :half].numpy(), atol=atol, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([None, 8, 16]), min_size=1, max_size=40).map(tuple))
def test_segments_replay_the_layers_in_order_and_a_place_has_one_kind(kinds):
    replayed = []
    for segment in plan_segments(kinds):
        assert len({len(place) for place in segment}) == 1  # scanned together, so of one length
        for place in segment:
            assert len({kinds[layer] for layer in place}) == 1
        for row in range(len(segment[0])):
            replayed += [place[row] for place in segment]
    assert replayed == list(range(len(kinds)))


def test_regular_patterns_are_one_segment():
    assert plan_segments((None,) * 32) == (((*range(32),),),)
    assert plan_segments((8, None) * 3) == (((0, 2, 4), (1, 3, 5)),)
    assert plan_segments((8, 8, None) * 2) == (((0, 3), (1, 4), (2, 5)),)
    assert [len(s[0]) for s in plan_segments((None,) * 28 + (8,) * 4)] == [28, 4]


GRANITE_4 = {"model_type": "granitemoehybrid", "num_local_experts": 0, "position_embedding_type": "rope"}
GOOD = published("llama", 64, 96, 2, 4, 2, 160, 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": "mine", "auto_map": {"AutoModel": "x.py"}}, ["model_type='mine'", "trust_remote_code"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "'awq'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "'gptq'"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, ["load_in_4bit=False"]),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            ["bnb_4bit_quant_type='fp4'"],
        ),
        ({"quantization_config": "awq"}, ["quantization_config", "'awq'"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size=64", "num_attention_heads=5"]),
        ({"head_dim": 15}, ["head_dim=15"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"hidden_size": None}, ["'hidden_size'"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers='two'"]),
        ({"vocab_size": -1}, ["vocab_size=-1"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps='small'"]),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_type='su'", "llama3"]),
        ({"rope_scaling": {"type": "linear"}}, ["'linear'", "'factor'"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor='2'"]),
        ({"rope_scaling": "linear"}, ["rope_scaling='linear'"]),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, ["mrope_section"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"num_experts": 8}, ["num_experts=8"]),
        ({"num_local_experts": 8}, ["num_local_experts=8"]),
        ({"layer_types": ["linear_attention", "full_attention"]}, ["layer_types"]),
        ({"model_type": "qwen3", "layer_types": ["linear_attention", "full_attention"]}, ["'linear_attention'"]),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"]},
            ["layer_types has 1 entries for 2 layers"],
        ),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window=0"]),
        (
            {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": True},
            ["use_bidi"],
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        ({"model_type": "gemma3"}, ["'text_config'"]),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, ["hidden_activation='relu'", "gelu_pytorch_tanh"]),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            ["8: one"],
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, ["partial_rotary_factor=0.2"]),
        ({"model_type": "phi3", "attention_bias": True}, ["attention_bias=True"]),
        ({"model_type": "cohere", "use_qk_norm": True}, ["use_qk_norm=True"]),
        ({"model_type": "stablelm", "qk_layernorm": True}, ["qk_layernorm=True"]),
        ({"model_type": "granitemoehybrid"}, ["num_local_experts=8", "supported: 0"]),
        (GRANITE_4 | {"layer_types": ["mamba", "attention"]}, ["'mamba' in layer_types", "granitemoehybrid"]),
        (GRANITE_4 | {"layers_block_type": ["linear_attention"] * 2}, ["'linear_attention' in layers_block_type"]),
        (GRANITE_4, ["'mamba' in layer_types"]),  # transformers' default
        (GRANITE_4 | {"layer_types": ["attention"] * 2, "position_embedding_type": None}, ["position_embedding_type"]),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ["no_rope_layers has 1 entries for 2 layers"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_supported_is_refused_by_name_and_value(changes, said):
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(GOOD | changes)
    assert [words for words in said if words not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1


def test_values_that_switch_nothing_on_are_accepted_and_unknown_keys_only_warn():
    off = {"attn_logit_softcapping": None, "num_experts": 0, "partial_rotary_factor": 1.0, "layer_types": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, _ = config_from_hf(GOOD | off)
    with pytest.warns(UserWarning, match="made_up='yes'"):
        assert config_from_hf(GOOD | {"made_up": "yes", "transformers_version": "4.40.0"})[0] == config


def test_a_window_that_is_on_but_not_named_is_transformers_default():
    from transformers import Qwen2Config

    values = GOOD | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    theirs = Qwen2Config(**values)
    kinds = {"full_attention": None, "sliding_attention": theirs.sliding_window}
    assert config_from_hf(values)[0].layer_windows == tuple(kinds[kind] for kind in theirs.layer_types)
