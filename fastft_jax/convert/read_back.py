"""What a written model computes, layer by layer: no more than one layer is in memory, whatever the model's size.

A folder is read as any other is: config.json decides the family, names and dtypes are checked, packed matrices are
taken as they are. GGUF files: convert/gguf/read_back.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.convert.bitsandbytes import packed_matrices
from fastft_jax.convert.fused_experts import FusedExperts
from fastft_jax.convert.hf import Request, dtype_of, read_config
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.models.attention import Sequence
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder, DecoderLayer, Loader, LoadFn
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.rope import rope_tables


def folder_logits(
    folder: Path, input_ids: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B T"], dtype: Any
) -> Float[Array, "B T V"]:
    """float32 logits of the model in `folder`, computed in `dtype`; mask is 0 for padding."""
    checkpoint = Checkpoint.open(folder)
    config, names = config_from_hf(read_config(folder))
    checkpoint = FusedExperts(checkpoint) if names.fused_experts else checkpoint
    names = names.stored(checkpoint.__contains__)

    def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
        request = Request(path, shape, layers)
        name, *_ = tensors = request.hf_names(names)
        if request.experts != (None,):
            return jnp.stack([jnp.asarray(checkpoint.read(each)).astype(dtype) for each in tensors])
        packed = packed_matrices(checkpoint, {name: shape}) if layers is not None and len(shape) == 2 else {}
        if name in packed:
            return packed[name].assemble([checkpoint.read(part) for part in packed[name].tensors])
        return jnp.asarray(checkpoint.read(name)).astype(dtype_of(path, dtype))

    return layered_logits(config, load, input_ids, mask, dtype)


def layered_logits(
    config: DecoderConfig, load: LoadFn, input_ids: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B T"], dtype: Any
) -> Float[Array, "B T V"]:
    """float32 logits of the decoder whose tensors `load` gives, asked for a layer at a time."""
    outer = Decoder(replace(config, num_hidden_layers=0, layer_windows=(), second_rope_layers=()), load, dtype)
    ids, segments = jnp.asarray(input_ids, jnp.int32), jnp.asarray(mask, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    tables = tuple(rope_tables(rope, config.rope_dim, positions) for rope in config.ropes)
    x = outer.map_layers(lambda x: x, ids)[0]
    for i in range(config.num_hidden_layers):  # a layer has no name here, so that it is freed before the next is read
        x = jax.block_until_ready(
            _layer(*nnx.split(DecoderLayer(config, Loader(load, (i,)))), x, tables, segments),
        )
    return outer.logits(outer.norm(x))


@partial(jax.jit, static_argnums=0)
def _layer(definition, state, x, tables, segments) -> Float[Array, "B T D"]:
    return nnx.merge(definition, state)(x, Sequence(tables, segments))[0]


@dataclass(frozen=True)
class Difference:
    """How far the logits of an export are from the live model's, over the rows' real tokens."""

    tokens: int
    max: float
    mean: float
    kl: float  # mean KL(live || export) a token, in nats
    perplexity: float  # of the rows, by the live model
    perplexity_export: float
    spread: float  # standard deviation of the live logits: what the differences are to be measured against

    def __str__(self) -> str:
        return (
            f"|logit difference| max {self.max:.3g}, mean {self.mean:.3g} (logits spread {self.spread:.3g}); "
            f"KL {self.kl:.3g}; perplexity {self.perplexity_export:.4g}, the live model's {self.perplexity:.4g}; "
            f"{self.tokens} tokens"
        )


def compare(
    live: Float[Array, "B T V"],
    export: Float[Array, "B T V"],
    input_ids: Int[np.ndarray, "B T"],
    mask: Int[np.ndarray, "B T"],
) -> Difference:
    """Differences of two sets of logits, row by row, so that no third array of their size is made."""
    sums = np.zeros(7)
    largest = 0.0
    for row in range(live.shape[0]):
        top, *parts = _compare_row(live[row], export[row], jnp.asarray(input_ids[row]), jnp.asarray(mask[row]))
        largest = max(largest, float(top)) if not np.isnan(top) else float("nan")
        sums += np.array([float(part) for part in parts])
    difference, kl, total, squares, nll, nll_export, predicted = sums
    tokens, vocab = int(mask.sum()), live.shape[-1]
    count = tokens * vocab
    spread = float(np.sqrt(max(squares / count - (total / count) ** 2, 0.0)))
    ppl, ppl_export = (float(np.exp(min(n / max(predicted, 1), 700.0))) for n in (nll, nll_export))
    return Difference(tokens, largest, difference / count, kl / tokens, ppl, ppl_export, spread)


@jax.jit
def _compare_row(live, export, ids, mask):
    real = (mask != 0)[:, None]
    delta = jnp.where(real, jnp.abs(live - export), 0.0)
    p, q = jax.nn.log_softmax(live), jax.nn.log_softmax(export)
    kl = jnp.where(real[:, 0], jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0.0)
    following = jnp.where((mask[1:] != 0) & (mask[:-1] != 0), 1.0, 0.0)
    nll = [-jnp.sum(jnp.take_along_axis(x[:-1], ids[1:, None], axis=1)[:, 0] * following) for x in (p, q)]
    kept = jnp.where(real, live, 0.0)
    return delta.max(), delta.sum(), kl.sum(), kept.sum(), (kept**2).sum(), *nll, following.sum()
