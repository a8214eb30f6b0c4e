"""Tensors that are one here and several in llama.cpp.

    self_attn.qkv_proj (InternLM2)           ->  q_proj, k_proj, v_proj: rows, in turns by key head
    mlp.gate_up_proj (Granite 4)             ->  gate_proj, up_proj: the halves of its rows
    mlp.experts.gate_up_proj [E, 2F, D]      ->  gate_proj and up_proj [E, F, D]; biases [E, 2F] alike
    self_attn.kv_b_proj [N (P + H), C], of each head P rows for keys, then H for values
                                             ->  k_b_proj [N, C, P], transposed, and v_b_proj [N, H, C]

The parts have paths as if they were ours. Of latent attention, llama.cpp multiplies queries into the latent instead of
expanding keys: hence the transposition (src/models/deepseek2.cpp, conversion/deepseek.py).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from fastft_jax.models.config import DecoderConfig

EXPERTS, LATENT = "mlp.experts.gate_up_proj", "self_attn.kv_b_proj"


def parts_of(path: str, config: DecoderConfig) -> tuple[str, ...]:
    """The paths of the parts of our tensor at `path`; its own for most."""
    module, _, kind = path.rpartition(".")
    if module == EXPERTS:
        names = "mlp.experts.gate_proj", "mlp.experts.up_proj"
    elif module == LATENT:
        names = "self_attn.k_b_proj", "self_attn.v_b_proj"
    else:
        names = tuple(_rows(module, config))
    return tuple(f"{name}.{kind}" for name in names) or (path,)


def _rows(module: str, config: DecoderConfig) -> dict[str, Int[np.ndarray, "N"]]:
    """Which rows of a linear each of its parts holds, in order; nothing where they are no matter of rows."""
    if module == "self_attn.qkv_proj" and config.grouped_qkv:  # [K, N / K + 2, H]: see models/attention.py
        queries = config.num_attention_heads // config.num_key_value_heads
        rows = np.arange(config.num_key_value_heads * (queries + 2) * config.head_dim)
        cut = np.split(rows.reshape(-1, queries + 2, config.head_dim), (queries, queries + 1), axis=1)
        names = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    elif module == "mlp.gate_up_proj" and config.fused_gate_up:
        cut = np.arange(2 * config.intermediate_size).reshape(2, -1)
        names = "mlp.gate_proj", "mlp.up_proj"
    else:
        return {}
    return {name: rows.reshape(-1) for name, rows in zip(names, cut, strict=True)}


def split(path: str, w: Float[np.ndarray, "..."], config: DecoderConfig) -> list[Float[np.ndarray, "..."]]:
    """The parts, in the order of `parts_of`, as views where that is possible. w may be a LoRA's B as well."""
    module = path.rpartition(".")[0]
    if module == EXPERTS:
        return np.split(w, 2, axis=1)
    if module == LATENT:
        k, v = np.split(w.reshape(config.num_attention_heads, -1, w.shape[-1]), [config.latent.nope_dim], axis=1)
        return [k.swapaxes(1, 2), v]
    return [w[rows] for rows in _rows(module, config).values()] or [w]


def shapes_of_parts(path: str, shape: tuple[int, ...], config: DecoderConfig) -> list[tuple[int, ...]]:
    """The shapes of the parts of a tensor of this shape."""
    rows = _rows(path.rpartition(".")[0], config)
    if rows:
        return [(len(part), *shape[1:]) for part in rows.values()]
    return [part.shape for part in split(path, np.broadcast_to(np.float32(0), shape), config)]


def join(path: str, parts: Sequence[Float[np.ndarray, "..."]], config: DecoderConfig) -> Float[np.ndarray, "..."]:
    """The inverse of `split`."""
    module = path.rpartition(".")[0]
    if module == EXPERTS:
        return np.concatenate(parts, axis=1)
    if module == LATENT:
        k, v = parts
        return np.concatenate([k.swapaxes(1, 2), v], axis=1).reshape(-1, v.shape[-1])
    if len(parts) == 1:
        return parts[0]
    out = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rows, part in zip(_rows(module, config).values(), parts, strict=True):
        out[rows] = part
    return out
