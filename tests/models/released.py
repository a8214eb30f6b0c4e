"""What the config.json files of released models say, as far as it decides the maths, and their parameter counts."""

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


def gpt_oss(layers, experts):
    rope = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
    own = {
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "num_experts_per_tok": 4,
        "num_local_experts": experts,
        "output_router_logits": False,
        "quantization_config": {
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
            "quant_method": "mxfp4",
        },
        "rope_scaling": rope | {"original_max_position_embeddings": 4096},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    }
    return published("gpt_oss", 2880, 2880, layers, 64, 8, 201088, 131072, **own)


def internlm2(d, f, layers, heads):
    own = {"attn_implementation": "eager", "auto_map": {"AutoConfig": "configuration_internlm2.py"}, "bias": False}
    rope = {"rope_scaling": {"factor": 2.0, "type": "dynamic"}, "rope_theta": 1000000}
    return published("internlm2", d, f, layers, heads, 8, 92544, 32768, **own, **rope)


INTERNLM3 = {
    "bias": False,
    "head_dim": 128,
    "qkv_bias": False,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
}
GRANITE4 = {
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12,
    "init_method": "mup",
    "layer_types": ["attention"] * 40,
    "logits_scaling": 10,
    **{"mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 256},
    **{"mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False},
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 0,
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.01,
    "shared_intermediate_size": 8192,
    "tie_word_embeddings": True,
}


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


def deepseek(model_type, d, f, width, layers, heads, vocab, mscale, **more):
    """Latent attention of one shape in all releases."""
    attention = {"attention_bias": False, "attention_dropout": 0.0, "kv_lora_rank": 512, "q_lora_rank": 1536}
    attention |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    yarn = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": mscale, "mscale_all_dim": mscale}
    yarn |= {"original_max_position_embeddings": 4096, "type": "yarn"}
    experts = {"moe_intermediate_size": width, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
    settings = attention | experts | {"rope_scaling": yarn, "rope_theta": 10000, "rms_norm_eps": 1e-6, "ep_size": 1}
    return published(model_type, d, f, layers, heads, heads, vocab, 163840, **settings | more)


DEEPSEEK_V2 = {
    "first_k_dense_replace": 1,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
DEEPSEEK_V2_LITE = DEEPSEEK_V2 | {
    "n_group": 1,
    "n_routed_experts": 64,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
DEEPSEEK_V3 = {
    "first_k_dense_replace": 3,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
}


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
    "DeepSeek-V2": (deepseek("deepseek_v2", 5120, 12288, 1536, 60, 128, 102400, 0.707, **DEEPSEEK_V2), 235_741_434_880),
    "DeepSeek-V2-Lite": (
        deepseek("deepseek_v2", 2048, 10944, 1408, 27, 16, 102400, 0.707, **DEEPSEEK_V2_LITE),
        15_706_484_224,
    ),
    # without the layer that predicts the token after the next
    "DeepSeek-V3": (deepseek("deepseek_v3", 7168, 18432, 2048, 61, 128, 129280, 1.0, **DEEPSEEK_V3), 671_026_419_200),
    "DeepSeek-R1": (deepseek("deepseek_v3", 7168, 18432, 2048, 61, 128, 129280, 1.0, **DEEPSEEK_V3), 671_026_419_200),
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
    "gpt-oss-20b": (gpt_oss(24, 32), 20_914_757_184),
    "gpt-oss-120b": (gpt_oss(36, 128), 116_829_156_672),
    "internlm2-7b": (internlm2(4096, 14336, 32, 32), 7_737_708_544),
    "internlm2-20b": (internlm2(6144, 16384, 48, 48), 19_861_149_696),
    "internlm3-8b-instruct": (
        published("internlm3", 4096, 10240, 48, 32, 2, 128512, 32768, **INTERNLM3),
        8_804_241_408,
    ),
    "granite-4.0-micro": (
        published("granitemoehybrid", 2560, 8192, 40, 40, 8, 100352, 131072, **GRANITE4),
        3_402_836_480,
    ),
    "Phi-3.5-MoE-instruct": (published("phimoe", 4096, 6400, 32, 32, 8, 32064, 131072, **PHI_35_MOE), 41_873_153_344),
}
