"""Checkpoints that hold all experts of a layer in one tensor, read as if each expert's matrices were tensors.

GPT-OSS, in 16 bits: `...experts.gate_up_proj` [E, D, 2F], `.down_proj` [E, F, D], that is, transposed; as published, in
MXFP4: `..._blocks` uint8 [E, N, K / 32, 16] and `..._scales` uint8 [E, N, K / 32], not transposed. Biases are
`..._bias` [E, N]. Of gate_up the rows are in turns gate's and up's; here gate's come first, then up's:

    ...experts.3.gate_up_proj.weight [2F, D]    ...experts.3.gate_up_proj.bias [2F]
    ...experts.3.down_proj.weight [D, F]        ...experts.3.down_proj.bias [D]

Layouts read from transformers 5 (models/gpt_oss, integrations/mxfp4).
"""

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.quant import mxfp4

_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)(?P<kind>|_blocks|_scales|_bias)")
TURNS = "gate_up_proj"  # whose rows take turns


class _Part(NamedTuple):
    """One expert's share of a tensor."""

    source: str
    expert: int
    kind: str  # "", "_blocks" or "_bias"
    in_turns: bool


class FusedExperts:
    """Answers `convert.hf.load_decoder` as a Checkpoint does; weights come as arrays on the device, in 16 bits or what
    the file has. CheckpointError for tensors that have no such layout."""

    def __init__(self, checkpoint: Checkpoint):
        self.folder, self._checkpoint = checkpoint.folder, checkpoint
        self._parts: dict[str, _Part] = {}
        self._others: dict[str, None] = {}
        for name in checkpoint.names:
            match = _FUSED.fullmatch(name)
            if match is None:
                self._others[name] = None
            elif match["kind"] == "_scales":
                self._require(name.removesuffix("scales") + "blocks", name)
            else:
                self._add(name, match["experts"], match["leaf"], match["kind"])

    def _add(self, source: str, experts: str, leaf: str, kind: str) -> None:
        dtype, shape = self._checkpoint.info(source)
        if len(shape) != {"": 3, "_blocks": 4, "_bias": 2}[kind]:
            raise CheckpointError(f"{self.path_of(source)}: {source!r} has shape {list(shape)}: no experts' {leaf}")
        if kind == "_blocks":
            scales = self._scales_of(source)
            self._require(scales, source)
            found = self._checkpoint.info(scales)
            if (dtype, found[0], shape[3], found[1]) != (np.uint8, np.uint8, mxfp4.BLOCK // 2, shape[:3]):
                raise CheckpointError(
                    f"{self.path_of(source)}: {source!r} {dtype.name}{list(shape)} with {scales!r} "
                    f"{found[0].name}{list(found[1])} is not MXFP4: uint8 [E, N, G, 16] with uint8 [E, N, G] is"
                )
        for expert in range(shape[0]):
            name = f"{experts}.{expert}.{leaf}.{'bias' if kind == '_bias' else 'weight'}"
            if name in self._parts:
                raise CheckpointError(f"{self.folder} holds both {self._parts[name].source!r} and {source!r}")
            self._parts[name] = _Part(source, expert, kind, leaf == TURNS)

    def _require(self, name: str, other: str) -> None:
        if name not in self._checkpoint:
            raise CheckpointError(f"{self.folder} lacks {name!r}, without which {other!r} cannot be read")

    @staticmethod
    def _scales_of(blocks: str) -> str:
        return blocks.removesuffix("blocks") + "scales"

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._others, *self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._others

    def missing(self, expected: Iterable[str]) -> list[str]:
        there = set(self.names)
        return [name for name in expected if name not in there]

    def unexpected(self, expected: Iterable[str]) -> list[str]:
        known = set(expected)
        return [name for name in self.names if name not in known]

    def path_of(self, name: str) -> Path:
        return self._checkpoint.path_of(self._parts[name].source if name in self._parts else name)

    def info(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        if name not in self._parts:
            return self._checkpoint.info(name)
        part = self._parts[name]
        dtype, shape = self._checkpoint.info(part.source)
        if part.kind == "_blocks":
            return np.dtype(ml_dtypes.bfloat16), (shape[1], shape[2] * mxfp4.BLOCK)
        return dtype, shape[:0:-1]

    def read(self, name: str) -> np.ndarray | Array:
        """One tensor; of an expert's, only its bytes are read from the file."""
        if name not in self._parts:
            return self._checkpoint.read(name)
        source, expert, kind, in_turns = self._parts[name]
        values = self._checkpoint.read(source, expert)
        if kind == "_bias":
            return np.concatenate([values[::2], values[1::2]]) if in_turns else values
        if kind == "":
            return _matrix(values, in_turns=in_turns, transposed=True)
        scales = self._checkpoint.read(self._scales_of(source), expert)
        if scales.max(initial=0) > mxfp4.LARGEST_SCALE:
            raise CheckpointError(
                f"{self.path_of(name)}: {self._scales_of(source)!r} holds the scale {scales.max()}, whose power of two "
                f"is too large for 16 bits (at most {mxfp4.LARGEST_SCALE}): the file is damaged"
            )
        return _matrix(mxfp4.decode(values, scales), in_turns=in_turns, transposed=False)


@partial(jax.jit, static_argnames=("in_turns", "transposed"))
def _matrix(w: Float[Array, "..."], *, in_turns: bool, transposed: bool) -> Float[Array, "N K"]:
    w = w.T if transposed else w
    return w.reshape(-1, 2, w.shape[1]).swapaxes(0, 1).reshape(w.shape) if in_turns else w
