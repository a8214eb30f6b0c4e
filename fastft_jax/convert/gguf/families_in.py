"""What config.json would say of a GGUF model beyond what every family has, by the architecture's name in the file.

Where a file is silent, what llama.cpp's graph for the architecture assumes (src/models/*.cpp) is written out.
"""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft_jax.convert.gguf.read import GGUFModel

Values = dict[str, Any]


def _llama(file: "GGUFModel", values: Values) -> Values:
    return {"model_type": "llama"} | _biases(file)


def _granite(file: "GGUFModel", values: Values) -> Values:
    scales = {
        "embedding_multiplier": file.key("embedding_scale", 1.0),
        "residual_multiplier": file.key("residual_scale", 1.0),
        "attention_multiplier": file.key("attention.scale", values["head_dim"] ** -0.5),
        "logits_scaling": file.key("logit_scale", 1.0),
    }
    return {"model_type": "granite"} | _biases(file) | scales


def _internlm2(file: "GGUFModel", values: Values) -> Values:
    return {"model_type": "internlm2", "bias": False}


def _smollm3(file: "GGUFModel", values: Values) -> Values:
    return {"model_type": "smollm3", "no_rope_layer_interval": 4} | _biases(file)


def _gemma2(file: "GGUFModel", values: Values) -> Values:
    caps = {"attn_logit_softcapping": file.key("attn_logit_softcapping", 50.0)}
    caps["final_logit_softcapping"] = file.key("final_logit_softcapping", 30.0)
    return {"model_type": "gemma2"} | _windows(file, values, 2, 4096) | caps | _gemma_scale(values, 46)


def _gemma3(file: "GGUFModel", values: Values) -> Values:
    local = {"rope_local_base_freq": file.key("rope.freq_base_swa", 10_000.0)}
    if cap := file.key("final_logit_softcapping", 0.0):
        local["final_logit_softcapping"] = cap
    return {"model_type": "gemma3_text"} | _windows(file, values, 6, 0) | local | _gemma_scale(values, 62)


def _gemma_scale(values: Values, layers_of_27b: int) -> Values:
    """Attention is scaled by the head's width, in 27B by the model's over the heads: known by its number of layers."""
    width = values["hidden_size"] // values["num_attention_heads"]
    return {"query_pre_attn_scalar": width if values["num_hidden_layers"] == layers_of_27b else values["head_dim"]}


def _phi3(file: "GGUFModel", values: Values) -> Values:
    longest = values["max_position_embeddings"]
    original = file.key("rope.scaling.original_context_length", longest)
    out = {
        "model_type": "phi3",
        "original_max_position_embeddings": original,
        "partial_rotary_factor": file.key("rope.dimension_count", values["head_dim"]) / values["head_dim"],
        "sliding_window": file.key("attention.sliding_window", 0) or None,
    }
    if "rope_factors_long.weight" not in file.tensors:
        return out
    scaling: Values = {"type": "longrope"}
    for kind in ("long", "short"):
        factors = file.decode(f"rope_factors_{kind}.weight")
        scaling[f"{kind}_factor"] = [float(str(x)) for x in factors]  # 1.1 where it would be 1.10000002
    factor, written = longest / original, file.key("rope.scaling.attn_factor", 1.0)
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if not math.isclose(written, usual, rel_tol=1e-6):
        scaling["attention_factor"] = written
    return out | {"rope_scaling": scaling}


def _olmo2(file: "GGUFModel", values: Values) -> Values:
    if not file.key("attention.sliding_window", 0):
        return {"model_type": "olmo2"}
    theta = values["rope_theta"]
    full = {"rope_type": "default", "rope_theta": theta} | (file.rope_scaling(values) or {})
    local = {"rope_type": "default", "rope_theta": theta}  # transformers has a default of its own here
    rope = {"rope_parameters": {"full_attention": full, "sliding_attention": local}}
    return {"model_type": "olmo3"} | _windows(file, values, 4, 0) | rope


def _cohere(file: "GGUFModel", values: Values) -> Values:
    return {"model_type": "cohere", "logit_scale": file.key("logit_scale", 1.0)}


def _cohere2(file: "GGUFModel", values: Values) -> Values:
    return {"model_type": "cohere2", "logit_scale": file.key("logit_scale", 1.0)} | _windows(file, values, 4, 4096)


def _biases(file: "GGUFModel") -> Values:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def _windows(file: "GGUFModel", values: Values, every: int, window: int) -> Values:
    """Which layers have one: a list of them in the file, or, by default, all but every n-th. No window: none."""
    window = file.key("attention.sliding_window", window)
    pattern = file.key("attention.sliding_window_pattern", every)
    layers = range(values["num_hidden_layers"])
    slides = pattern if isinstance(pattern, list) else [not pattern or (i + 1) % pattern for i in layers]
    kinds = ["sliding_attention" if window and slides[i] else "full_attention" for i in layers]
    return {"layer_types": kinds} | ({"sliding_window": window} if window else {})


# GGUF's names of the architectures that can be read
READABLE = {
    "llama": _llama,
    "qwen2": lambda file, values: {"model_type": "qwen2"},
    "qwen3": lambda file, values: {"model_type": "qwen3"},
    "gemma": lambda file, values: {"model_type": "gemma"},
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "granite": _granite,
    "internlm2": _internlm2,
    "smollm3": _smollm3,
    "olmo2": _olmo2,
    "command-r": _cohere,
    "cohere2": _cohere2,
}
