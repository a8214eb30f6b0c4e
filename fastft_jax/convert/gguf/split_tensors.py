"""Tensors of ours that llama.cpp keeps as two: experts' gate and up, and latent attention's rows for keys and values.

    mlp.experts.gate_up_proj.weight [E, 2F, D], .bias [E, 2F]  ->  gate_proj and up_proj, [E, F, D] and [E, F]
    self_attn.kv_b_proj.weight [N (P + H), C], of each head P rows for keys, then H for values
                                       ->  k_b_proj [N, C, P], transposed, and v_b_proj [N, H, C]

The parts have paths as if they were ours. llama.cpp multiplies queries into the latent instead of expanding keys: hence
the transposition (src/models/deepseek2.cpp, conversion/deepseek.py).
"""

import numpy as np
from jaxtyping import Float

from fastft_jax.models.config import DecoderConfig

_PARTS = {
    "mlp.experts.gate_up_proj": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "self_attn.kv_b_proj": ("self_attn.k_b_proj", "self_attn.v_b_proj"),
}


def parts_of(path: str) -> tuple[str, ...]:
    """The paths of the parts, in the order of `split`; none for a tensor that is one there, too."""
    module, _, kind = path.rpartition(".")
    return tuple(f"{part}.{kind}" for part in _PARTS.get(module, ()))


def split(
    path: str, w: Float[np.ndarray, "..."], config: DecoderConfig
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """The two parts, as views where that is possible."""
    if path.startswith("mlp.experts."):
        return tuple(np.split(w, 2, axis=1))
    k, v = np.split(w.reshape(config.num_attention_heads, -1, w.shape[-1]), [config.latent.nope_dim], axis=1)
    return k.swapaxes(1, 2), v


def shapes_of_parts(path: str, shape: tuple[int, ...], config: DecoderConfig) -> list[tuple[int, ...]]:
    """The shapes of the parts of a tensor of this shape."""
    return [part.shape for part in split(path, np.broadcast_to(np.float32(0), shape), config)]


def join(path: str, parts: list[Float[np.ndarray, "..."]]) -> Float[np.ndarray, "..."]:
    """The inverse of `split`."""
    first, second = parts
    if path.startswith("mlp.experts."):
        return np.concatenate([first, second], axis=1)
    return np.concatenate([first.swapaxes(1, 2), second], axis=1).reshape(-1, second.shape[-1])
