"""Linears that are one here and several in llama.cpp, cut by rows: InternLM2's q, k and v, Granite 4's gate and up."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from fastft_jax.models.config import DecoderConfig

Rows = Int[np.ndarray, "N"] | slice  # a slice: all of them


def parts_of(path: str, config: DecoderConfig) -> dict[str, Rows]:
    """The tensors that llama.cpp has in place of ours at `path`, under the paths they would have here: which of our
    rows each holds, in order. Of most it is the tensor itself with all its rows."""
    module, _, kind = path.rpartition(".")
    if module == "self_attn.qkv_proj" and config.grouped_qkv:  # [K, N / K + 2, H]: see models/attention.py
        queries = config.num_attention_heads // config.num_key_value_heads
        rows = np.arange(config.num_key_value_heads * (queries + 2) * config.head_dim)
        q, k, v = np.split(rows.reshape(-1, queries + 2, config.head_dim), (queries, queries + 1), axis=1)
        cut = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
    elif module == "mlp.gate_up_proj" and config.fused_gate_up:
        cut = dict(
            zip(("mlp.gate_proj", "mlp.up_proj"), np.arange(2 * config.intermediate_size).reshape(2, -1), strict=True)
        )
    else:
        return {path: slice(None)}
    return {f"{part}.{kind}": rows.reshape(-1) for part, rows in cut.items()}


def joined(
    path: str, config: DecoderConfig, read: Callable[[str], Float[np.ndarray, "..."]]
) -> Float[np.ndarray, "..."]:
    """Our tensor at `path` of its parts, which `read` has by the paths of `parts_of`."""
    parts = parts_of(path, config)
    if list(parts) == [path]:
        return read(path)
    values = [read(part) for part in parts]
    out = np.empty((sum(map(len, values)), *values[0].shape[1:]), values[0].dtype)
    for rows, value in zip(parts.values(), values, strict=True):
        out[rows] = value
    return out
