"""Matrices that bitsandbytes packed to NF4: found in a checkpoint, checked, and taken over as they are.

A packed `W.weight` is uint8 [ceil(N K / 2), 1]; beside it lie `.absmax`, `.quant_map`, with double quantisation
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, JSON in bytes, with the shape and the
block sizes. Which matrices are packed is told by these tensors alone: mirrors leave some of them in 16 bits.
Source: bitsandbytes 0.50, `functional.QuantState.as_dict(packed=True)`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.pallas_kernels.nf4 import dynamic_map
from fastft_jax.quant.nf4 import BLOCK, NF4_CODE, NF4Array, from_bitsandbytes

STATE = "quant_state.bitsandbytes__"
NESTED_BLOCK = 256
_CODES, _LEVELS, _NESTED, _NESTED_LEVELS = "", ".absmax", ".nested_absmax", ".nested_quant_map"


@dataclass(frozen=True)
class Packed:
    """One packed matrix of a checkpoint; `tensors` are those with its values, in the order `assemble` wants them."""

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    nested_offset: float | None

    @property
    def double(self) -> bool:
        return self.nested_offset is not None

    def assemble(self, arrays: Sequence[np.ndarray]) -> NF4Array:
        codes, absmax, *nested = arrays
        return from_bitsandbytes(codes, absmax, self.shape, *nested, nested_offset=self.nested_offset)


def packed_matrices(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Packed]:
    """Those of the named matrices that are packed. Raises CheckpointError for a packing that cannot be read."""
    found = ((name, _packed(checkpoint, name, shape)) for name, shape in shapes.items())
    return {name: packed for name, packed in found if packed is not None}


def belongs_to(name: str) -> str:
    """The matrix that a tensor is a part of, by its name: `a.weight.absmax` -> `a.weight`."""
    if name.endswith((".SCB", ".weight_format")):  # of LLM.int8: eight_bits.py
        return f"{name.rpartition('.')[0]}.weight"
    for suffix in (f".{STATE}nf4", ".quant_map", _NESTED_LEVELS, _NESTED, _LEVELS):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _packed(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Packed | None:
    if f"{name}.{STATE}fp4" in checkpoint:
        raise CheckpointError(f"{checkpoint.path_of(name)}: {name!r} is packed as FP4; only NF4 can be read")
    if f"{name}.{STATE}nf4" not in checkpoint:
        return None
    state = _state(checkpoint, name)
    double = "nested_offset" in state
    parts = (_CODES, _LEVELS, _NESTED) if double else (_CODES, _LEVELS)
    maps = {".quant_map": NF4_CODE} | ({_NESTED_LEVELS: dynamic_map()} if double else {})
    missing = checkpoint.missing(f"{name}{suffix}" for suffix in (*parts, *maps))
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {missing[0]!r}, without which {name!r} cannot be unpacked")
    wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
    wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"} if double else {}
    for key, value in wanted.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: {name!r} is packed with {key}={state.get(key)!r}, not {value!r}"
            )
    for suffix, levels in maps.items():
        if not np.array_equal(checkpoint.read(name + suffix), levels):
            raise CheckpointError(f"{checkpoint.path_of(name)}: {name + suffix!r} is not bitsandbytes's own map")
    blocks = -(-shape[0] * shape[1] // BLOCK)
    sizes = {_CODES: -(-shape[0] * shape[1] // 2), _LEVELS: blocks, _NESTED: -(-blocks // NESTED_BLOCK)}
    dtypes = {_CODES: "uint8", _LEVELS: "uint8" if double else "float32", _NESTED: "float32"}
    for suffix in parts:
        dtype, found = checkpoint.info(name + suffix)
        if (dtype.name, int(np.prod(found))) != (dtypes[suffix], sizes[suffix]):
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: {name + suffix!r} is {dtype.name}{list(found)}, which is not "
                f"{sizes[suffix]} numbers of {dtypes[suffix]} as a matrix of shape {list(shape)} has"
            )
    return Packed(shape, tuple(name + suffix for suffix in parts), state["nested_offset"] if double else None)


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    key = f"{name}.{STATE}nf4"
    try:
        state = json.loads(checkpoint.read(key).tobytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{checkpoint.path_of(key)}: {key!r} is not valid JSON: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{checkpoint.path_of(key)}: {key!r} does not hold a JSON object")
    return state
