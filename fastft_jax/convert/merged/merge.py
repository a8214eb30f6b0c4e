"""The model with its adapter folded in, a tensor at a time: W + scaling * B A over the base it was trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.convert.hf import tensor_requests
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import Embedding, ExpertLinear, Linear
from fastft_jax.quant.dense import Quantised, dense, is_quantised


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
        module, kind = self.module, self.path.rpartition(".")[2]
        if isinstance(module, ExpertLinear) and kind == "weight":
            out = np.empty(self.shape, np.float32)
            for e in range(module.num_experts):
                own = one_of(module.weight.get_value(), self.row, e)
                out[e] = _merged(own, None, *adapter_of(module, self.row, e))
            return out
        if isinstance(module, Linear | Embedding) and kind == "weight":
            w = np.asarray(_merged(module.weight.get_value(), self._row, *adapter_of(module, self.row)))
            return with_own_tokens(module, w)
        variable, row = getattr(module, kind), self.row
        if isinstance(module, Linear) and row is not None and module.trained_bias is not None:
            at = _position(module.trained_bias_rows, row)
            variable, row = (variable, row) if at is None else (module.trained_bias, at)
        value = variable.get_value()
        value = np.asarray(value if row is None else value[row], np.float32)
        return value if kind != "bias" or added_bias(module, self.row) is None else value + added_bias(module, self.row)

    @property
    def _row(self) -> np.int32 | None:
        return None if self.row is None else np.int32(self.row)


def merged_layout(decoder: Decoder) -> list[MergedTensor]:
    """Every tensor of the merged model in the order of its layers; a tied head is not among them, one that was untied
    by training it or the embedding is. NotImplementedError as `require_biases`.
    """
    require_biases(decoder)
    config, found = decoder.config, []
    for request in tensor_requests(config):
        module_path, _, _ = request.path.rpartition(".")
        for layer in request.layers or (None,):
            root, row = decoder, None
            if layer is not None:
                segment, place, row = config.place_of(layer)
                root = decoder.segments[segment][place]
            found.append(MergedTensor(request.path, layer, request.shape, attrgetter(module_path)(root), row))
    head = decoder.lm_head
    if head is None and decoder.embed_tokens.adapted:  # LoRA on a tied embedding leaves the head as it was
        head = Linear(decoder.embed_tokens.weight.get_value())
    if config.tie_word_embeddings and head is not None:
        found.append(MergedTensor("lm_head.weight", None, (config.vocab_size, config.hidden_size), head, None))
    first = [t for t in found if t.path == "embed_tokens.weight"]
    last = [t for t in found if t.layer is None and t not in first]
    return first + sorted((t for t in found if t.layer is not None), key=lambda t: t.layer) + last


def merged_tensors(decoder: Decoder, names: NameTable) -> Iterator[tuple[str, Float[np.ndarray, "..."]]]:
    """(Hugging Face's name, float32 array) of every tensor, one on the host at a time."""
    for tensor in merged_layout(decoder):
        w = tensor.read()
        if isinstance(tensor.module, ExpertLinear):
            yield from ((names.hf_name(tensor.path, tensor.layer, e), each) for e, each in enumerate(w))
        else:
            yield names.hf_name(tensor.path, tensor.layer), w


def adapter_of(
    module: Linear | Embedding, row: int | None, expert: int | None = None
) -> tuple[list[tuple[Array, Array]], np.float32, Float[Array, "N"] | None]:
    """What `folded` adds to the matrix of one layer (row None: outside of layers): pairs (A, B) with what a start from
    the weight itself (PiSSA) subtracts, their scaling, DoRA's magnitudes or None. No pairs where it has no adapter.
    expert: whose matrix it is, where a layer has one an expert."""
    if isinstance(module, Embedding):
        if not module.adapted:
            return [], np.float32(1), None
        a, b = module.lora_embedding_A.get_value(), module.lora_embedding_B.get_value()
        return [(b.T, a.T)], np.float32(module.scaling), None
    at = None if row is None else _position(module.adapted_rows, row)
    if not module.adapted or (row is not None and at is None):
        return [], np.float32(1), None

    def pick(variable):
        return variable.get_value() if row is None else one_of(variable.get_value(), at, expert)

    pairs = [(pick(module.lora_A), pick(module.lora_B))]
    if module.start_A is not None:
        pairs.append((pick(module.start_A), -pick(module.start_B)))
    scaling = module.scaling[at] if isinstance(module.scaling, tuple) else module.scaling
    return pairs, np.float32(scaling), None if module.magnitude is None else pick(module.magnitude)


def require_biases(decoder: Decoder) -> None:
    """NotImplementedError where LoRA has biases and the base none to add them to."""
    for path, module in nnx.iter_modules(decoder):
        if isinstance(module, Linear) and module.lora_bias is not None and module.bias is None:
            if module.trained_bias is None:
                raise NotImplementedError(
                    f"{path[-1]} has no bias that lora_bias could be merged into; export the adapter"
                )


def added_bias(module: nnx.Module, row: int | None) -> Float[np.ndarray, "N"] | None:
    """What LoRA's own bias adds to that of a layer."""
    if not isinstance(module, Linear) or module.lora_bias is None or row is None:
        return None
    at = _position(module.adapted_rows, row)
    if at is None:
        return None
    scaling = module.scaling[at] if isinstance(module.scaling, tuple) else module.scaling
    return np.float32(scaling) * np.asarray(module.lora_bias.get_value()[at])


def with_own_tokens(module: nnx.Module, w: Array | np.ndarray) -> Array | np.ndarray:
    """An embedding's matrix with its trained rows in it (trainable_token_indices); any other as it is."""
    if not isinstance(module, Embedding) or module.tokens is None:
        return w
    w = np.array(w)
    w[list(module.token_rows)] = np.asarray(module.tokens.get_value()).astype(w.dtype)
    return w


def one_of(stack: Array | Quantised, row: int, expert: int | None = None) -> Array | Quantised:
    """One matrix (or vector) of a stack, copied out of it; one expert's where a row holds experts."""
    return _at(stack, np.array([row] if expert is None else [row, expert], np.int32))


@jax.jit
def _at(stack: Array | Quantised, index: Int[Array, "n"]) -> Array | Quantised:
    return jax.tree.map(lambda leaf: leaf[tuple(index)], stack)


def folded(
    w: Float[Array, "N K"],
    pairs: list[tuple[Float[Array, "R K"], Float[Array, "N R"]]],
    scaling: Any,
    magnitude: Float[Array, "N"] | None,
) -> Float[Array, "N K"]:
    """W + scaling * sum(B A), in float32; its rows of length `magnitude` where that is given (DoRA)."""
    w = w.astype(jnp.float32)
    for a, b in pairs:
        w = w + scaling * jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    if magnitude is None:
        return w
    return w * (magnitude / jnp.linalg.norm(w, axis=1))[:, None]


def _position(rows: tuple[int, ...] | None, row: int) -> int | None:
    """Where a stack's row is in a leaf that holds only `rows` (None: all)."""
    if rows is None:
        return row
    return rows.index(row) if row in rows else None


@jax.jit
def _merged(
    weight: Quantised | Float[Array, "*L N K"],
    row: Array | None,
    pairs: list[tuple[Float[Array, "R K"], Float[Array, "N R"]]],
    scaling: Any,
    magnitude: Float[Array, "N"] | None,
) -> Float[Array, "N K"]:
    if row is not None:
        weight = weight.at(row) if is_quantised(weight) else weight[row]
    return folded(dense(weight, jnp.float32), pairs, scaling, magnitude)
