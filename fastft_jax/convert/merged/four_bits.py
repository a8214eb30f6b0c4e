"""A merged checkpoint in bitsandbytes's NF4: what transformers loads in 4 bits as it is.

Matrices inside the layers are packed, one tensor of codes and its scales each, as `convert/bitsandbytes/` describes;
everything else stays in 16 bits, as bitsandbytes leaves it: experts, too. A matrix without an adapter keeps its codes
and scales bit for bit; one with an adapter is merged in float32 and encoded anew, so a change smaller than half a step
of the 4-bit grid is lost in it.
"""

import json
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fastft_jax.convert.bitsandbytes import NESTED_BLOCK, STATE
from fastft_jax.convert.hf import dtype_of
from fastft_jax.convert.merged import Entry, Leaf, Weights, leaves
from fastft_jax.models.families.names import NameTable
from fastft_jax.quant.nf4 import BLOCK, NF4Array, quantize, to_bitsandbytes

_OFFSET_DIGITS = 24  # the longest repr of a float64


def entries_4bit(weights: Weights, names: NameTable, dtype: Any) -> dict[str, Entry]:
    """Every tensor: packed matrices with their scales, the rest in `dtype`, under the names of `names`."""
    dtype = np.dtype(dtype)
    packer, packed = _Packer(weights), packed_leaves(weights)
    entries: dict[str, Entry] = {}
    for leaf, other in zip(weights.leaves, leaves(weights.decoder, names), strict=True):
        if leaf not in packed:
            kept = np.dtype(dtype_of(leaf.path, dtype))
            read = lambda leaf=leaf, kept=kept: np.asarray(weights.read(leaf, kept))  # noqa: E731
            entries[other.name] = Entry(kept, leaf.shape, read)
            continue
        for suffix, (kind, shape) in _parts(leaf.shape, _double(leaf), dtype).items():
            entries[other.name + suffix] = Entry(np.dtype(kind), shape, partial(packer.part, leaf, suffix, dtype.name))
    return entries


def packed_leaves(weights: Weights) -> set[Leaf]:
    """The matrices that are packed: all of the layers', but experts and those that a 4-bit base had left in 16 bits.

    transformers 5 holds a layer's experts in two parameters, which bitsandbytes has no layer for: it loads them in 16
    bits alone.
    """
    matrices = {leaf for leaf in weights.leaves if leaf.linear and leaf.expert is None}
    return {leaf for leaf in matrices if leaf.nf4 is not None} or matrices


def unpacked_modules(weights: Weights) -> list[str]:
    """The layers' matrices that are not packed, by their modules; a layer's experts together, by the module they are
    in. transformers 5 would pack Qwen's gate of a shared expert, transformers 4 and vLLM routers and experts, too."""
    packed, found = packed_leaves(weights), {}
    for leaf in weights.leaves:
        if leaf.row is not None and len(leaf.shape) == 2 and leaf not in packed:
            end = ".weight" if leaf.expert is None else f".{leaf.expert}."
            found[leaf.name.rpartition(end)[0]] = None
    return list(found)


def quantization_config(dtype_name: str, skipped: Iterable[str], double: bool) -> dict[str, Any]:
    """config.json's entry as transformers 5 writes it; `skipped` are modules beside the head that are not packed."""
    skipped = list(skipped)
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype_name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head", *skipped] if skipped else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


class _Packer:
    """Packs one matrix at a time. A file asks for a matrix's float32 parts first and for its bytes much later, so each
    is encoded twice, rather than all kept."""

    def __init__(self, weights: Weights):
        self._weights = weights
        self._last: tuple[Leaf | None, dict[str, Any]] = (None, {})

    def part(self, leaf: Leaf, suffix: str, dtype: str) -> np.ndarray:
        if self._last[0] is not leaf:
            self._last = (leaf, to_bitsandbytes(self._encoded(leaf)))
        state = self._last[1]
        if suffix == f".{STATE}nf4":
            return np.frombuffer(_state(leaf.shape, dtype, state.get("nested_offset")), np.uint8)
        return np.ascontiguousarray(state[suffix.removeprefix(".") or "weight"])

    def _encoded(self, leaf: Leaf) -> NF4Array:
        if leaf.nf4 is not None and not self._weights.adapted(leaf) and not self._weights.onto_original:
            return self._weights.packed(leaf)
        w = jnp.asarray(self._weights.read(leaf, jnp.float32, exact=True))
        return _quantize(w, double=_double(leaf))


def _double(leaf: Leaf) -> bool:
    """Double quantisation, but where the base itself is packed without."""
    return leaf.nf4 is None or leaf.nf4.absmax_scale is not None


@partial(jax.jit, static_argnames="double")
def _quantize(w, *, double: bool) -> NF4Array:
    return quantize(w, double_quant=double)


def _parts(shape: tuple[int, ...], double: bool, dtype: np.dtype) -> dict[str, tuple[str, tuple[int, ...]]]:
    """suffix -> dtype and shape of each tensor of a packed matrix."""
    n = math.prod(shape)
    blocks = -(-n // BLOCK)
    parts = {"": ("uint8", (-(-n // 2), 1)), ".absmax": ("uint8" if double else "float32", (blocks,))}
    if double:
        parts |= {
            ".nested_absmax": ("float32", (-(-blocks // NESTED_BLOCK),)),
            ".nested_quant_map": ("float32", (256,)),
        }
    size = len(_state(shape, dtype.name, 0.0 if double else None))
    return parts | {".quant_map": ("float32", (16,)), f".{STATE}nf4": ("uint8", (size,))}


def _state(shape: tuple[int, ...], dtype: str, nested_offset: float | None) -> bytes:
    """The JSON beside a packed matrix. Spaces behind it make its length the same for every offset: a file's layout is
    fixed before its tensors are computed, and JSON allows them."""
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(shape)}
    room = 0
    if nested_offset is not None:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested_offset}
        room = len(json.dumps(state)) - len(repr(nested_offset)) + _OFFSET_DIGITS
    return json.dumps(state).ljust(room).encode()
