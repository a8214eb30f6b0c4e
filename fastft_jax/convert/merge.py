"""The model with its adapter folded in, a tensor at a time: W + scaling * B A over the base it was trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.convert.hf import tensor_requests
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import Linear
from fastft_jax.quant.dense import dense, is_quantised
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.nf4 import NF4Array


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model, computed when it is read: our path, its layer (None outside of layers)."""

    path: str
    layer: int | None
    shape: tuple[int, ...]
    module: nnx.Module
    row: int | None

    def read(self) -> Float[np.ndarray, "..."]:
        """float32, in an array of its own on the host."""
        kind = self.path.rpartition(".")[2]
        if not isinstance(self.module, Linear) or self.row is None:
            value = getattr(self.module, kind).get_value()
            return np.asarray(value if self.row is None else value[self.row], np.float32)
        linear = self.module
        if kind == "bias":
            at = _position(linear.trained_bias_rows, self.row)
            trained = linear.trained_bias is not None and at is not None
            leaf, row = (linear.trained_bias, at) if trained else (linear.bias, self.row)
            return np.asarray(leaf.get_value()[row], np.float32)
        at = _position(linear.adapted_rows, self.row)
        pair = None
        if linear.adapted and at is not None:
            pair = linear.lora_A.get_value()[at], linear.lora_B.get_value()[at]
        return np.asarray(_merged(linear.weight.get_value(), np.int32(self.row), pair, np.float32(linear.scaling)))


def merged_layout(decoder: Decoder) -> list[MergedTensor]:
    """Every tensor of the merged model in the order of its layers; a tied head is not among them, one that was untied
    by training it or the embedding is.
    """
    config, found = decoder.config, []
    for request in tensor_requests(config):
        module_path, _, _ = request.path.rpartition(".")
        for layer in request.layers or (None,):
            root, row = decoder, None
            if layer is not None:
                segment, place, row = config.place_of(layer)
                root = decoder.segments[segment][place]
            found.append(MergedTensor(request.path, layer, request.shape, attrgetter(module_path)(root), row))
    if config.tie_word_embeddings and decoder.lm_head is not None:
        shape = (config.vocab_size, config.hidden_size)
        found.append(MergedTensor("lm_head.weight", None, shape, decoder.lm_head, None))
    first = [t for t in found if t.path == "embed_tokens.weight"]
    last = [t for t in found if t.layer is None and t not in first]
    return first + sorted((t for t in found if t.layer is not None), key=lambda t: t.layer) + last


def merged_tensors(decoder: Decoder, names: NameTable) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """(Hugging Face's name, float32 array) of every tensor, one on the host at a time."""
    for tensor in merged_layout(decoder):
        yield names.hf_name(tensor.path, tensor.layer), tensor.read()


def _position(rows: tuple[int, ...] | None, row: int) -> int | None:
    """Where a stack's row is in a leaf that holds only `rows` (None: all)."""
    if rows is None:
        return row
    return rows.index(row) if row in rows else None


@jax.jit
def _merged(
    weight: NF4Array | Int8Array | Float[Array, "L N K"],
    row: Array,
    pair: tuple[Float[Array, "R K"], Float[Array, "N R"]] | None,
    scaling: Any,
) -> Float[Array, "N K"]:
    w = dense(weight.at(row) if is_quantised(weight) else weight[row], jnp.float32)
    if pair is None:
        return w
    a, b = pair
    return w + scaling * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
