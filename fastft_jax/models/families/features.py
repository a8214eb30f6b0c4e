"""What sets a decoder apart from a plain Llama, in a few words: read off its DecoderConfig."""

from fastft_jax.models.config import DecoderConfig, RopeConfig

_NORMS = {"rms": "RMSNorm", "rms_plus_one": "RMSNorm by 1 + w", "layer": "LayerNorm"}
_BLOCKS = {"post": "norms on the blocks' outputs", "sandwich": "norms around the blocks", "parallel": "parallel blocks"}
_QK_NORMS = {"head": "q/k norm by head", "projection": "q/k norm over all heads"}
_GATES = {"silu": "SwiGLU", "gelu_tanh": "GeGLU (tanh)", "gelu": "GeGLU", "clamped_silu": "clamped SwiGLU"}
_PLAIN = {"silu": "SiLU MLP", "gelu_tanh": "GELU (tanh) MLP", "gelu": "GELU MLP"}


def features(config: DecoderConfig) -> list[str]:
    """Norm, block, attention, rope, MLP and the rest, in that order; what every Llama has is left out but for the norm
    and the MLP."""
    c = config
    found = [_NORMS[c.norm] + (" with bias" if c.norm_bias else ""), _BLOCKS.get(c.block), _QK_NORMS.get(c.qk_norm)]
    found.append(_latent(c))
    found += [_windows(c), None if c.attention_softcap is None else "attention softcap"]
    found.append("attention sinks" if c.attention_sinks else None)
    found += [_rope(rope) for rope in dict.fromkeys(c.ropes) if _rope(rope)]
    found.append("interleaved rope" if c.rope_interleaved else None)
    if c.second_rope is not None and c.second_rope.rope_type != "none" and c.second_rope != c.rope:
        found.append("another rope in windowed layers")
    found.append((_GATES if c.gated_mlp else _PLAIN)[c.activation])
    found.append(_experts(c))
    fused = {"qkv": c.fused_projections or c.grouped_qkv, "gate_up": c.fused_projections or c.fused_gate_up}
    found.append(f"fused {' and '.join(name for name, on in fused.items() if on)}" if any(fused.values()) else None)
    experts = c.experts is not None and c.experts.bias
    biases = {"qkv": c.qkv_bias, "o": c.o_bias, "MLP": c.mlp_bias, "experts": experts, "head": c.head_bias}
    found.append(f"biases ({', '.join(name for name, on in biases.items() if on)})" if any(biases.values()) else None)
    scales = {
        "embedding": c.embedding_scale is not None,
        "residual": c.residual_multiplier != 1.0,
        "attention": c.attention_scale is not None,
        "logits": c.logit_scale != 1.0,
    }
    found.append(f"scaled {', '.join(name for name, on in scales.items() if on)}" if any(scales.values()) else None)
    found.append("final softcap" if c.final_softcap is not None else None)
    found.append("tied embeddings" if c.tie_word_embeddings else None)
    return [text for text in found if text]


def _experts(config: DecoderConfig) -> str | None:
    e = config.experts
    if e is None:
        return None
    shared = "" if e.shared_intermediate_size is None else ", one shared" if e.shared_gate else ", shared ones"
    groups = f" in {e.top_groups} of {e.groups} groups" if e.groups > 1 else ""
    router = {"sparsemixer": " (sparsemixer)", "sigmoid": " (sigmoid scores, a bias in the choice)"}.get(e.router, "")
    dense = f", from layer {len(e.dense_layers)} on" if e.dense_layers == (*range(len(e.dense_layers)),) != () else ""
    return f"{e.top_k} of {e.num_experts} experts{groups}{router}{shared}{dense}"


def _latent(config: DecoderConfig) -> str | None:
    m = config.latent
    if m is None:
        return None
    queries = "" if m.q_rank is None else f"queries from {m.q_rank}, "
    return f"latent attention ({queries}keys and values from {m.kv_rank} numbers a token)"


def _windows(config: DecoderConfig) -> str | None:
    windows = config.layer_windows
    wide = [w for w in windows if w is not None and w < config.max_position_embeddings]
    if not wide:
        return None
    if len(wide) == len(windows):
        return f"window {wide[0]}"
    pattern = len(config.segments[0])
    inside = sum(windows[layers[0]] is not None for layers in config.segments[0])
    return f"window {wide[0]} in {inside} of {pattern} layers"


def _rope(rope: RopeConfig) -> str | None:
    if rope.rope_type == "none":
        return "layers without rope"
    kind = {"default": "rope", "longrope": "longrope"}.get(rope.rope_type, f"{rope.rope_type} rope")
    if rope.partial_rotary_factor != 1.0:
        return f"{kind} of {rope.partial_rotary_factor:g} of a head"
    return None if rope.rope_type == "default" else kind
