"""Matrices that bitsandbytes packed to 8 bits (LLM.int8): W[n, k] = weight[n, k] * SCB[n] / 127.

A packed `a.weight` is int8 [N, K]; beside it lies `a.SCB`, float32 [N], the largest magnitude of each row, and, in
files of transformers 4, `a.weight_format`, a number that says the order of the elements: 0, row by row. The columns
that LLM.int8 multiplies in 16 bits are chosen by the activations: a checkpoint holds nothing of them.
Source: Dettmers et al. 2022, arXiv:2208.07339; bitsandbytes 0.50, `functional.int8_vectorwise_dequant`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.quant.int8 import Int8Array

SCALES, FORMAT = "SCB", "weight_format"


@dataclass(frozen=True)
class PackedInt8:
    """One packed matrix of a checkpoint; `tensors` are those with its values, in the order `assemble` wants them."""

    shape: tuple[int, ...]
    tensors: tuple[str, str]
    double: bool = False  # there is one way to pack

    def assemble(self, arrays: Sequence[np.ndarray]) -> Int8Array:
        """As they are: the same codes, and no columns in 16 bits."""
        codes, largest = arrays
        none = jnp.zeros((self.shape[0], 0), jnp.float32), jnp.zeros(0, jnp.int32)
        return Int8Array(jnp.asarray(codes), jnp.asarray(largest / np.float32(127)), *none, self.shape)


def int8_matrices(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PackedInt8]:
    """Those of the named matrices that are packed. Raises CheckpointError for a packing that cannot be read."""
    there = [name for name in shapes if name in checkpoint and checkpoint.info(name)[0].name == "int8"]
    return {name: _packed(checkpoint, name, shapes[name]) for name in there}


class DecodedInt8:
    """A checkpoint whose packed matrices are read as float32; for `convert.hf.load_decoder` it is a Checkpoint."""

    def __init__(self, checkpoint: Checkpoint, packed: Mapping[str, PackedInt8]):
        self.folder, self._checkpoint, self._packed = checkpoint.folder, checkpoint, packed
        self._beside = {beside(name, part) for name in packed for part in (SCALES, FORMAT)}

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint and name not in self._beside

    def info(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        dtype, shape = self._checkpoint.info(name)
        return (np.dtype(np.float32) if name in self._packed else dtype), shape

    def read(self, name: str) -> np.ndarray:
        if name not in self._packed:
            return self._checkpoint.read(name)
        codes, largest = (self._checkpoint.read(part) for part in self._packed[name].tensors)
        return codes.astype(np.float32) * (largest / np.float32(127))[:, None]

    def path_of(self, name: str) -> Path:
        return self._checkpoint.path_of(name)

    def missing(self, expected: Iterable[str]) -> list[str]:
        return self._checkpoint.missing(expected)

    def unexpected(self, expected: Iterable[str]) -> list[str]:
        return [name for name in self._checkpoint.unexpected(expected) if name not in self._beside]


def beside(name: str, part: str) -> str:
    """The name of what belongs to a packed matrix: `a.weight` -> `a.SCB`."""
    return f"{name.removesuffix('weight')}{part}"


def _packed(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> PackedInt8:
    scales, order = beside(name, SCALES), beside(name, FORMAT)
    if scales not in checkpoint:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {scales!r}, without which {name!r}, which is int8, means nothing"
        )
    for tensor, wanted in ((name, ("int8", tuple(shape))), (scales, ("float32", (shape[0],)))):
        dtype, found = checkpoint.info(tensor)
        if (dtype.name, tuple(found)) != wanted:
            raise CheckpointError(
                f"{checkpoint.path_of(tensor)}: {tensor!r} is {dtype.name}{list(found)}, which is not "
                f"{wanted[0]}{list(wanted[1])} as a matrix of shape {list(shape)} packed to 8 bits has"
            )
    if order in checkpoint and (value := checkpoint.read(order)).any():
        raise CheckpointError(
            f"{checkpoint.path_of(order)}: {order!r} is {value.reshape(-1)[0]}: only matrices packed row by row (0) "
            "can be read; save the model again with a current bitsandbytes"
        )
    return PackedInt8(tuple(shape), (name, scales))
