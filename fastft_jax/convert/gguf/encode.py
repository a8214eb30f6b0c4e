"""A matrix as the bytes of one of GGUF's types: plain floats, 32-element blocks, k-quants."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial

import gguf
import numpy as np
from jaxtyping import Float, UInt8

from fastft_jax.convert.gguf import k_quants

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *k_quants.ENCODERS)
_CHUNK = 1 << 18  # elements a task encodes: its dozen float32 temporaries stay near a core's caches


def block_size(kind: str) -> int:
    """How many elements of a row share a block; a row must be a multiple of it."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]


def encoded_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor of this shape takes."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(shape)) // block * size


def encode(
    kind: str, w: Float[np.ndarray, "*N K"], pool: Executor, importance: Float[np.ndarray, "*E K"] | None = None
) -> Iterator[UInt8[np.ndarray, "bytes"]]:
    """The bytes of w in row order, in pieces; `pool`'s threads work ahead of the reader.

    importance: how much each column matters, of each expert where w is [E, N, K]; k-quants look at it. ValueError for a
    row that is no multiple of `block_size(kind)`.
    """
    if w.shape[-1] % block_size(kind):
        raise ValueError(f"rows of {w.shape[-1]} are no multiple of {kind}'s blocks of {block_size(kind)}")
    if importance is not None and importance.ndim > 1:
        for each, own in zip(w, importance, strict=True):
            yield from encode(kind, each, pool, own)
        return
    flat, starts = w.reshape(-1), range(0, w.size, _CHUNK)
    yield from pool.map(partial(_piece, kind, importance), starts, (flat[i : i + _CHUNK] for i in starts))


def threads() -> int:
    """How many threads encode: one for each core this process may use."""
    return len(os.sched_getaffinity(0))


def _piece(kind: str, importance: np.ndarray | None, start: int, flat: np.ndarray) -> UInt8[np.ndarray, "bytes"]:
    x = np.ascontiguousarray(flat, np.float32)
    if kind == "F32":
        return x.view(np.uint8)
    if kind == "F16":
        return x.astype(np.float16).view(np.uint8)
    if kind in k_quants.ENCODERS:
        blocks = (-1, k_quants.SUPER_BLOCK)
        if importance is not None:  # of every row the same
            importance = np.resize(np.roll(importance, -start % len(importance)), x.size).reshape(blocks)
        return k_quants.ENCODERS[kind](x.reshape(blocks), importance).reshape(-1)
    return gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind]).reshape(-1).view(np.uint8)
