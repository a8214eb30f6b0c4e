"""A released model's config.json becomes the decoder that its publisher describes; wrong ones are refused by name."""

import json
import math
import warnings

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.convert.hf import tensor_requests
from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import RopeConfig, plan_segments
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.rope import rope_tables

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def published(model_type: str, d: int, f: int, layers: int, heads: int, kv: int, vocab: int, longest: int, **more):
    """What of a published config.json decides the maths, under its own names."""
    return {
        "model_type": model_type,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": longest,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        **more,
    }


def llama_31(d, f, layers, heads, vocab=128256, kv=8, **more):
    return published("llama", d, f, layers, heads, kv, vocab, 131072, rope_theta=5e5, rope_scaling=LLAMA3_ROPE, **more)


def qwen(model_type, d, f, layers, heads, kv, vocab, longest=32768, **more):
    """Qwen's files name a window that they do not use."""
    window = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": layers}
    return published(model_type, d, f, layers, heads, kv, vocab, longest, rope_theta=1e6, **window, **more)


def gemma(model_type, d, f, layers, heads, kv, **more):
    values = published(model_type, d, f, layers, heads, kv, 256000, 8192, hidden_act="gelu_pytorch_tanh")
    return values | {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0} | more


GEMMA2 = {
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


def gemma3(d, f, layers, **more):
    """The files of the multimodal releases leave out what is transformers' default."""
    text = {"model_type": "gemma3_text", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, **more}
    vision = {"hidden_size": 1152, "model_type": "siglip_vision_model"}
    return {"model_type": "gemma3", "image_token_index": 262144, "text_config": text, "vision_config": vision}


def vision(d: int) -> int:
    """Parameters of the same releases' SigLIP tower (So400m, 896 pixels) and of its projector: a norm and a matrix."""
    return 416_866_032 + 1152 + 1152 * d


def phi3(d, f, layers, heads, kv, vocab, longest, **more):
    off = {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_scaling": None}
    off |= {"original_max_position_embeddings": min(longest, 4096) if vocab != 100352 else longest}
    return published("phi3", d, f, layers, heads, kv, vocab, longest, **{"rope_theta": 10000.0, **off, **more})


PHI4_MINI = {
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "long_factor": [
            *(1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649),
            *(2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533),
            *(5.984965424, 6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651),
            *(14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03),
            *(32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5),
            *(44.16, 47.77),
        ],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}


def phi(d, f, layers, partial):
    more = {"partial_rotary_factor": partial, "rope_theta": 10000.0, "qk_layernorm": False, "resid_pdrop": 0.1}
    return layer_norm(published("phi", d, f, layers, 32, 32, 51200, 2048, **more | {"hidden_act": "gelu_new"}))


def granite(d, f, attention_multiplier, logits_scaling):
    multipliers = {"attention_multiplier": attention_multiplier, "logits_scaling": logits_scaling}
    multipliers |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": True}
    return published("granite", d, f, 40, 32, 8, 49155, 4096, attention_bias=False, mlp_bias=False, **multipliers)


SMOLLM3 = {
    "attention_bias": False,
    "layer_types": ["full_attention"] * 36,
    "max_window_layers": 28,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "use_sliding_window": False,
}


def layer_norm(values):
    return {key: value for key, value in values.items() if key != "rms_norm_eps"} | {"layer_norm_eps": 1e-5}


OLMO3 = {
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
COMMAND_R7B = {
    "cache_implementation": "hybrid",
    "layer_switch": 4,
    "logit_scale": 0.25,
    "model_type": "cohere2",
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
}


def cohere(d, f, layers, heads, kv, theta, model_type="cohere", **more):
    more = {"attention_bias": False, "logit_scale": 0.0625, "rope_theta": theta, "tie_word_embeddings": True} | more
    return layer_norm(published(model_type, d, f, layers, heads, kv, 256000, 8192, **more))


def mixtral(d, f, layers, heads, vocab, longest, **more):
    off = {"output_router_logits": False, "sliding_window": None, "attention_dropout": 0.0}
    experts = {"num_experts_per_tok": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.02}
    return published("mixtral", d, f, layers, heads, 8, vocab, longest, rope_theta=1e6, **off, **experts, **more)


def qwen_moe(model_type, d, f, width, layers, heads, kv, experts, top_k, **more):
    more |= {"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": top_k}
    more |= {"decoder_sparse_step": 1, "output_router_logits": False, "router_aux_loss_coef": 0.001}
    return qwen(model_type, d, f, layers, heads, kv, 151936, 40960, **more)


QWEN3_MOE = {"attention_bias": False, "mlp_only_layers": []}
PHI_35_MOE = {
    "attention_bias": True,
    "input_jitter_noise": 0.01,
    "lm_head_bias": True,
    "num_experts_per_tok": 2,
    "num_local_experts": 16,
    "original_max_position_embeddings": 4096,
    "output_router_logits": False,
    "rope_scaling": {
        "long_factor": [1.0 + i for i in range(64)],  # their values are not what is tested here
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64,
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 131072,
}


def stablelm(d, f, layers, heads, vocab, **more):
    more = {"partial_rotary_factor": 0.25, "rope_theta": 10000, "use_qkv_bias": False, "qk_layernorm": False} | more
    return layer_norm(published("stablelm", d, f, layers, heads, heads, vocab, 4096, **more))


# name -> (what of the release's config.json decides the maths, its parameters). Those from Gemma on were written down
# without the files at hand; that count and config agree is what speaks for both.
RELEASED = {
    "Llama-2-7B": (published("llama", 4096, 11008, 32, 32, 32, 32000, 4096), 6_738_415_616),
    "Llama-2-13B": (published("llama", 5120, 13824, 40, 40, 40, 32000, 4096), 13_015_864_320),
    "Llama-2-70B": (published("llama", 8192, 28672, 80, 64, 8, 32000, 4096), 68_976_648_192),
    "Meta-Llama-3-8B": (published("llama", 4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=5e5), 8_030_261_248),
    "Llama-3.1-8B": (llama_31(4096, 14336, 32, 32), 8_030_261_248),
    "Llama-3.2-1B": (llama_31(2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True), 1_235_814_400),
    "Llama-3.2-3B": (llama_31(3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True), 3_212_749_824),
    "Llama-3.3-70B-Instruct": (llama_31(8192, 28672, 80, 64), 70_553_706_496),
    "Mistral-7B-v0.1": (
        published("mistral", 4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096),
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        published("mistral", 4096, 14336, 32, 32, 8, 32768, 32768, sliding_window=None, rope_theta=1e6),
        7_248_023_552,
    ),
    "Mistral-Nemo-Base-2407": (
        published("mistral", 5120, 14336, 40, 32, 8, 131072, 128000, sliding_window=None, head_dim=128, rope_theta=1e6),
        12_247_782_400,
    ),
    "Mistral-Large-Instruct-2407": (
        published("mistral", 12288, 28672, 88, 96, 8, 32768, 131072, sliding_window=None, head_dim=128, rope_theta=1e6),
        122_610_069_504,
    ),
    "Qwen1.5-7B": (qwen("qwen2", 4096, 11008, 32, 32, 32, 151936), 7_721_324_544),
    "Qwen2.5-0.5B": (qwen("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-1.5B": (qwen("qwen2", 1536, 8960, 28, 12, 2, 151936, tie_word_embeddings=True), 1_543_714_304),
    "Qwen2.5-7B": (qwen("qwen2", 3584, 18944, 28, 28, 4, 152064, 131072), 7_615_616_512),
    "Qwen2.5-72B": (qwen("qwen2", 8192, 29568, 80, 64, 8, 152064, 131072), 72_706_203_648),
    "Qwen3-0.6B": (
        qwen("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "Qwen3-4B": (
        qwen("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, head_dim=128, tie_word_embeddings=True),
        4_022_468_096,
    ),
    "Qwen3-8B": (qwen("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960, head_dim=128), 8_190_735_360),
    "Qwen3-32B": (qwen("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960, head_dim=128), 32_762_123_264),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        published("qwen2", 1536, 8960, 28, 12, 2, 151936, 131072, use_sliding_window=False, rope_theta=1e4),
        1_777_088_000,
    ),
    "DeepSeek-R1-Distill-Qwen-14B": (
        published("qwen2", 5120, 13824, 48, 40, 8, 152064, 131072, use_sliding_window=False, rope_theta=1e6),
        14_770_033_664,
    ),
    "DeepSeek-R1-Distill-Qwen-32B": (
        published("qwen2", 5120, 27648, 64, 40, 8, 152064, 131072, use_sliding_window=False, rope_theta=1e6),
        32_763_876_352,
    ),
    "Mistral-Small-24B-Base-2501": (
        published("mistral", 5120, 32768, 40, 32, 8, 131072, 32768, sliding_window=None, head_dim=128, rope_theta=1e8),
        23_572_403_200,
    ),
    "TinyLlama-1.1B": (published("llama", 2048, 5632, 22, 32, 4, 32000, 2048), 1_100_048_384),
    "SmolLM2-135M": (
        published("llama", 576, 1536, 30, 9, 3, 49152, 8192, tie_word_embeddings=True, rope_theta=1e5),
        134_515_008,
    ),
    "SmolLM2-1.7B": (
        published("llama", 2048, 8192, 24, 32, 32, 49152, 8192, tie_word_embeddings=True, rope_theta=130000),
        1_711_376_384,
    ),
    "Yi-6B": (published("llama", 4096, 11008, 32, 32, 4, 64000, 4096, rope_theta=5e6), 6_061_035_520),
    "Yi-34B": (published("llama", 7168, 20480, 60, 56, 8, 64000, 4096, rope_theta=5e6), 34_388_917_248),
    "Falcon3-1B-Base": (
        published("llama", 2048, 8192, 18, 8, 4, 131072, 8192, head_dim=256, rope_theta=1000042),
        1_669_408_768,
    ),
    "Falcon3-7B-Base": (
        published("llama", 3072, 23040, 28, 12, 4, 131072, 32768, head_dim=256, rope_theta=1000042),
        7_455_550_464,
    ),
    "gemma-2b": (gemma("gemma", 2048, 16384, 18, 8, 1, hidden_act="gelu"), 2_506_172_416),
    "gemma-7b": (gemma("gemma", 3072, 24576, 28, 16, 16, hidden_act="gelu"), 8_537_680_896),
    "gemma-2-2b": (gemma("gemma2", 2304, 9216, 26, 8, 4, **GEMMA2), 2_614_341_888),
    "gemma-2-9b": (gemma("gemma2", 3584, 14336, 42, 16, 8, **GEMMA2), 9_241_705_984),
    "gemma-2-27b": (
        gemma("gemma2", 4608, 36864, 46, 32, 16, **GEMMA2 | {"head_dim": 128, "query_pre_attn_scalar": 144}),
        27_227_128_320,
    ),
    "gemma-3-270m": (gemma("gemma3_text", 640, 2048, 18, 4, 1, **GEMMA3), 268_098_176),
    "gemma-3-1b-pt": (gemma("gemma3_text", 1152, 6912, 26, 4, 1, **GEMMA3), 999_885_952),
    "gemma-3-4b-pt": (gemma3(2560, 10240, 34), 4_300_079_472 - vision(2560)),
    "gemma-3-12b-pt": (
        gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
        12_187_325_040 - vision(3840),
    ),
    "gemma-3-27b-pt": (
        gemma3(
            5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168
        ),
        27_432_406_640 - vision(5376),
    ),
    "phi-1_5": (phi(2048, 8192, 24, 0.5), 1_418_270_720),
    "phi-2": (phi(2560, 10240, 32, 0.4), 2_779_683_840),
    "Phi-3-mini-4k-instruct": (phi3(3072, 8192, 32, 32, 32, 32064, 4096, sliding_window=2047), 3_821_079_552),
    "Phi-3-medium-4k-instruct": (phi3(5120, 17920, 40, 40, 10, 32064, 4096, sliding_window=2047), 13_960_238_080),
    "phi-4": (phi3(5120, 17920, 40, 40, 10, 100352, 16384, rope_theta=250000, sliding_window=None), 14_659_507_200),
    "Phi-4-mini-instruct": (phi3(3072, 8192, 32, 24, 8, 200064, 131072, **PHI4_MINI), 3_836_021_760),
    "granite-3.0-2b-base": (granite(2048, 8192, 1 / 64, 8.0), 2_533_531_648),
    "granite-3.0-8b-base": (granite(4096, 12800, 1 / 128, 16.0), 8_170_848_256),
    "SmolLM3-3B": (
        published("smollm3", 2048, 11008, 36, 16, 4, 128256, 65536, rope_theta=5e6, **SMOLLM3),
        3_075_098_624,
    ),
    "OLMo-2-0425-1B": (published("olmo2", 2048, 8192, 16, 16, 16, 100352, 4096, rope_theta=5e5), 1_484_916_736),
    "OLMo-2-1124-7B": (published("olmo2", 4096, 11008, 32, 32, 32, 100352, 4096, rope_theta=5e5), 7_298_617_344),
    "OLMo-2-1124-13B": (published("olmo2", 5120, 13824, 40, 40, 40, 100352, 4096, rope_theta=5e5), 13_716_198_400),
    "c4ai-command-r-v01": (cohere(8192, 22528, 40, 64, 64, 8e6), 34_980_831_232),
    "aya-23-8B": (cohere(4096, 14336, 32, 32, 8, 1e4), 8_028_033_024),
    "Olmo-3-1025-7B": (
        published("olmo3", 4096, 11008, 32, 32, 32, 100278, 65536, **OLMO3),
        7_298_011_136,
    ),
    "c4ai-command-r7b-12-2024": (cohere(4096, 14336, 32, 32, 8, 5e4, **COMMAND_R7B), 8_028_033_024),
    "stablelm-3b-4e1t": (stablelm(2560, 6912, 32, 32, 50304), 2_795_443_200),
    "stablelm-2-1_6b": (stablelm(2048, 5632, 24, 32, 100352, use_qkv_bias=True), 1_644_515_328),
    "Mixtral-8x7B-v0.1": (mixtral(4096, 14336, 32, 32, 32000, 32768), 46_702_792_704),
    "Mixtral-8x22B-v0.1": (mixtral(6144, 16384, 56, 48, 32000, 65536), 140_620_634_112),
    "Qwen1.5-MoE-A2.7B": (
        qwen_moe("qwen2_moe", 2048, 5632, 1408, 24, 16, 16, 60, 4, shared_expert_intermediate_size=5632),
        14_315_784_192,
    ),
    "Qwen2-57B-A14B": (
        qwen_moe("qwen2_moe", 3584, 18944, 2560, 28, 28, 4, 64, 8, shared_expert_intermediate_size=20480),
        57_408_658_944,
    ),
    "Qwen3-30B-A3B": (
        qwen_moe("qwen3_moe", 2048, 6144, 768, 48, 32, 4, 128, 8, head_dim=128, norm_topk_prob=True, **QWEN3_MOE),
        30_532_122_624,
    ),
    "Qwen3-235B-A22B": (
        qwen_moe("qwen3_moe", 4096, 12288, 1536, 94, 64, 4, 128, 8, head_dim=128, norm_topk_prob=True, **QWEN3_MOE),
        235_093_634_560,
    ),
    "Phi-3.5-MoE-instruct": (published("phimoe", 4096, 6400, 32, 32, 8, 32064, 131072, **PHI_35_MOE), 41_873_153_344),
}


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


GOOD = published("llama", 64, 96, 2, 4, 2, 160, 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2'", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": "mine", "auto_map": {"AutoModel": "x.py"}}, ["model_type='mine'", "trust_remote_code"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "'awq'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "'gptq'"]),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, ["load_in_4bit=False"]),
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
