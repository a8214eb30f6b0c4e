"""The tensors of a merged checkpoint: every weight of the decoder with its adapter added, one in memory at a time.

    W' = W + scaling * B A, in float32, rounded once (Hu et al. 2021, arXiv:2106.09685, section 4.1); with DoRA, rows
    then scaled to the magnitudes; an embedding's is W + scaling * (B A)^T

W is what was trained against (for an NF4 base: decoded, and rounded to the decoder's dtype, as in the forward pass), or
the original 16-bit weight, which is another function: the adapter was trained to make up for NF4's errors, too.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from fastft_jax.convert.bitsandbytes import packed_matrices
from fastft_jax.convert.bitsandbytes.eight_bits import int8_matrices
from fastft_jax.convert.hf import FLOATS, dtype_of, tensor_requests
from fastft_jax.convert.merged.merge import adapter_of, added_bias, folded, one_of, require_biases, with_own_tokens
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.models import lora
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import Linear
from fastft_jax.quant.dense import Quantised, dense, is_quantised
from fastft_jax.quant.nf4 import NF4Array

_ADDED = re.compile(
    r"\.(lora_([AB]\.weight|B\.bias|embedding_[AB]|magnitude_vector)|token_adapter\.trainable_tokens_delta)$"
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written: known beforehand, computed when its turn comes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Leaf:
    """One tensor of the decoder as checkpoints have it: a row of a stacked leaf, an expert's matrix in such a row, or a
    leaf outside the layers."""

    name: str  # Hugging Face's name for it
    path: str  # ours, inside its layer
    shape: tuple[int, ...]
    module: nnx.Module
    row: int | None  # None outside the layers
    expert: int | None = None

    @property
    def linear(self) -> bool:
        """A matrix inside a layer: what may have an adapter, and what is quantised."""
        return self.row is not None and isinstance(self.module, Linear) and self.path.endswith(".weight")

    @property
    def nf4(self) -> NF4Array | None:
        """The stack that the live base keeps this matrix in, where it is in NF4."""
        value = self.module.weight.get_value() if self.linear else None
        return value if isinstance(value, NF4Array) else None

    @property
    def trained_whole(self) -> bool:
        """Is the tensor itself trained (modules_to_save, biases), so that the base has no say in it?"""
        kind = self.path.rpartition(".")[2]
        if kind == "bias" and isinstance(self.module, Linear) and self.module.trained_bias is not None:
            rows = self.module.trained_bias_rows
            return rows is None or self.row in rows
        return isinstance(getattr(self.module, kind), nnx.Param)


def leaves(decoder: Decoder, names: NameTable) -> Iterator[Leaf]:
    """Every tensor of the checkpoint, in the usual order: embedding, layers, last norm, head (unless tied)."""
    requests = list(tensor_requests(decoder.config))
    top = [r for r in requests if r.layers is None]
    paths = [(r.path, r.shape) for r in top]
    if decoder.lm_head is not None and "lm_head.weight" not in dict(paths):  # untied by modules_to_save
        paths.append(("lm_head.weight", dict(paths)["embed_tokens.weight"]))
    outside = [Leaf(names.hf_name(path), path, shape, _module(decoder, path), None) for path, shape in paths]
    yield from (leaf for leaf in outside if leaf.path.startswith("embed_tokens"))
    for layer in range(decoder.config.num_hidden_layers):
        s, p, row = decoder.config.place_of(layer)
        place = decoder.segments[s][p]
        for r in requests:
            if r.layers is not None and layer in r.layers:
                module = _module(place, r.path)
                for e in r.experts:
                    yield Leaf(names.hf_name(r.path, layer, e), r.path, r.tensor_shape, module, row, e)
    yield from (leaf for leaf in outside if not leaf.path.startswith("embed_tokens"))


class Weights:
    """The merged values of a decoder's leaves.

    `original`: a checkpoint of the same model in 16 or 32 bits, to merge onto instead of the decoder's own base.
    """

    def __init__(self, decoder: Decoder, names: NameTable, original: Checkpoint | None = None):
        self.decoder, self.names = decoder, names
        self.leaves = tuple(leaves(decoder, names))
        self._trained = lora.trainable_tensors(decoder, names)
        self._original, self._there = original, {}
        require_biases(decoder)
        self._check_trained()
        if original is not None:
            self._there = self._find(names.stored(original.__contains__))
            self._check_original()

    @property
    def onto_original(self) -> bool:
        return self._original is not None

    def adapted(self, leaf: Leaf) -> bool:
        module = leaf.name.removesuffix(".weight")
        return f"{module}.lora_A.weight" in self._trained or f"{module}.lora_embedding_A" in self._trained

    def packed(self, leaf: Leaf) -> NF4Array:
        """The live base's codes and scales of one matrix in NF4."""
        return one_of(leaf.nf4, leaf.row, leaf.expert)

    def read(self, leaf: Leaf, dtype: Any, *, exact: bool = False) -> Array | np.ndarray:
        """The merged tensor in `dtype`. exact: an NF4 base is decoded in float32, not rounded as the model computes."""
        if self._original is not None and not leaf.trained_whole:
            value = self._original.read(self._there[leaf.name])
        else:
            value = _live(leaf)
        adapter = adapter_of(leaf.module, leaf.row, leaf.expert) if self.adapted(leaf) else ([], np.float32(1), None)
        if leaf.path.endswith(".bias") and (added := added_bias(leaf.module, leaf.row)) is not None:
            return (np.asarray(value, np.float32) + added).astype(dtype)
        if not adapter[0] and not is_quantised(value):
            on_device = isinstance(value, jax.Array) and value.dtype != dtype
            value = np.asarray(value.astype(dtype) if on_device else value).astype(dtype, copy=False)
            return with_own_tokens(leaf.module, value)
        via = jnp.float32 if exact else self.decoder.dtype
        return _merge(value, *adapter, via=jnp.dtype(via), dtype=jnp.dtype(dtype))

    def _check_trained(self) -> None:
        """Whatever is trained must be among what is merged here."""
        merged = {leaf.name for leaf in self.leaves if leaf.trained_whole}
        modules = {leaf.name.removesuffix(".weight") for leaf in self.leaves if leaf.path.endswith(".weight")}
        left = [n for n in self._trained if n not in merged and _ADDED.sub("", n) not in modules]
        if left:
            raise NotImplementedError(f"{left[0]!r} is trained, and merging it is not built yet; export the adapter")
        if self.decoder.embed_tokens.adapted and self.decoder.lm_head is None:
            raise NotImplementedError(
                "the head is tied to the embedding, whose adapter it does not have: merged, they could not stay tied; "
                "export the adapter"
            )

    def _find(self, names: NameTable) -> dict[str, str]:
        """Leaf name -> its name in the original. The head that modules_to_save unties begins as the embedding."""
        there = {leaf.name: o.name for leaf, o in zip(self.leaves, leaves(self.decoder, names), strict=True)}
        if self.decoder.config.tie_word_embeddings and self.decoder.lm_head is not None:
            there[self.names.hf_name("lm_head.weight")] = names.hf_name("embed_tokens.weight")
        return there

    def _check_original(self) -> None:
        """What will be read from the original must be there, of the right shape, and not packed."""
        wanted = {self._there[leaf.name]: leaf for leaf in self.leaves if not leaf.trained_whole}
        folder = self._original.folder
        missing = self._original.missing(wanted)
        if missing:
            raise CheckpointError(f"{folder} lacks {missing[0]!r}: it is not the base of this model")
        shapes = {n: leaf.shape for n, leaf in wanted.items() if leaf.linear}
        in_4, in_8 = packed_matrices(self._original, shapes), int8_matrices(self._original, shapes)
        if in_4 or in_8:
            raise CheckpointError(
                f"{folder} holds {next(iter(in_4 or in_8))!r} packed in {4 if in_4 else 8} bits, so it is no "
                "original to merge onto; give the folder or hub id of the 16-bit weights as base, or leave base out"
            )
        for name, leaf in wanted.items():
            dtype, shape = self._original.info(name)
            if tuple(shape) != leaf.shape or dtype.name not in FLOATS:
                raise CheckpointError(
                    f"{folder}: {name!r} is {dtype.name}{list(shape)}, the trained model's is {list(leaf.shape)}: it "
                    "is not the base of this model"
                )


def entries_16bit(weights: Weights, names: NameTable, dtype: Any) -> dict[str, Entry]:
    """Every tensor in one 16- (or 32-) bit dtype, but for those that stay in float32, under the names of `names`."""
    called = leaves(weights.decoder, names)
    kept = [np.dtype(dtype_of(leaf.path, dtype)) for leaf in weights.leaves]
    return {
        other.name: Entry(held_in, leaf.shape, partial(_on_host, weights, leaf, held_in))
        for leaf, other, held_in in zip(weights.leaves, called, kept, strict=True)
    }


def entries_beside(checkpoint: Checkpoint, names: NameTable) -> dict[str, Entry]:
    """Tensors of a checkpoint that are no part of the decoder (a vision tower), to be taken over as they are."""
    beside = [name for name in checkpoint.names if names.ignored_under and name.startswith(names.ignored_under)]
    return {name: Entry(*checkpoint.info(name), partial(checkpoint.read, name)) for name in beside}


def layout(entries: Mapping[str, Entry]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (np.dtype(entry.dtype), tuple(entry.shape)) for name, entry in entries.items()}


def _on_host(weights: Weights, leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    return np.asarray(weights.read(leaf, dtype))


def _module(root: nnx.Module, path: str) -> nnx.Module:
    for part in path.split(".")[:-1]:
        root = getattr(root, part)
    return root


def _live(leaf: Leaf) -> Array | Quantised:
    kind = leaf.path.rpartition(".")[2]
    if kind == "bias" and leaf.trained_whole and getattr(leaf.module, "trained_bias", None) is not None:
        rows = leaf.module.trained_bias_rows
        return leaf.module.trained_bias.get_value()[leaf.row if rows is None else rows.index(leaf.row)]
    value = getattr(leaf.module, kind).get_value()
    return value if leaf.row is None else one_of(value, leaf.row, leaf.expert)


@partial(jax.jit, static_argnames=("via", "dtype"))
def _merge(
    w: Float[Array, "N K"] | Quantised,
    pairs: list[tuple[Array, Array]],
    scaling: Array,
    magnitude: Float[Array, "N"] | None,
    *,
    via: Any,
    dtype: Any,
) -> Float[Array, "N K"]:
    """`folded`, rounded once; without pairs the weight itself. via: the dtype in which W takes part in products."""
    if is_quantised(w):
        w = dense(w, jnp.float32)
        if via != jnp.float32:  # a cast there and back is one that XLA may drop
            w = lax.reduce_precision(w, jnp.finfo(via).nexp, jnp.finfo(via).nmant)
    return (folded(w, pairs, scaling, magnitude) if pairs else w).astype(dtype)
