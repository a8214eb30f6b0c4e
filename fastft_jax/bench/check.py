"""Proof that speed changed nothing: loss and LoRA gradients as the product computes them, against plain references.

Three passes over the same random tokens: (a) as training does it, kernels and all; (b) with every op's XLA reference
instead, in the same dtype; (c) with the references in float32. The error of a gradient is its distance from (c)'s, and
what (b) is off by is what the dtype costs in any case. So the kernels are right if (a) is off by no more, up to
chance: the two round at different places.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.bench.measure import Workload, on_device
from fastft_jax.errors import ConfigError
from fastft_jax.models.compute_dtype import set_compute_dtype
from fastft_jax.models.decoder import Decoder
from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.linear_cross_entropy import default_chunk_size
from fastft_jax.trainers.compile import compiler_options
from fastft_jax.trainers.step import Batch, LossOptions, gradients

WORST_RATIO = 2.0  # of a matrix's error in (a) to that in (b)
WAYS = ("kernels", "references", "float32")


@dataclass(frozen=True)
class Distances:
    """How far a pass is from the float32 one, a number a matrix: ||g - g32|| / ||g32||, and the cosine of the two."""

    error: np.ndarray
    cosine: np.ndarray


def check(decoder: Decoder, work: Workload) -> dict[str, Any]:
    """The record of a check of `decoder`, whose adapters must have a B that is not zero. work.policy is (a)'s.

    A decoder that computes in fp8 does so in (b), too, emulated. Raises ConfigError for one in float32, which leaves
    nothing to compare with.
    """
    if decoder.dtype == jnp.float32:
        raise ConfigError("--check compares 16-bit training with float32: --dtype is bfloat16 or float16")
    source = work.source(decoder.config.vocab_size, 1)
    batch = on_device(source.batch(0, 0))
    options = LossOptions(
        policy=work.policy,
        chunk_size=default_chunk_size(decoder.config.vocab_size),
        max_segments=source.max_segments if work.packed else None,
        max_document_length=source.longest,
    )
    losses, found = {}, {}
    losses["kernels"], found["kernels"] = _gradients(decoder, batch, options)
    with pallas.references():
        losses["references"], found["references"] = _gradients(decoder, batch, options._replace(policy="none"))
        losses["float32"], wanted = _gradients(in_float32(decoder), batch, options._replace(policy="none"))
    off = {way: distances(found[way], wanted) for way in WAYS[:2]}
    return judge(losses, off, matrix_names(wanted))


def in_float32(decoder: Decoder) -> Decoder:
    """The same weights, computed with in float32: variables of its own, the same arrays."""
    definition, state = nnx.split(decoder)
    exact = nnx.merge(definition, jax.tree.map(lambda leaf: leaf, state))
    exact.dtype = jnp.float32
    set_compute_dtype(exact, None)
    return exact


def _gradients(decoder: Decoder, batch: Batch, options: LossOptions) -> tuple[float, nnx.State]:
    definition, trainable, frozen = nnx.split(decoder, nnx.Param, ...)
    run = partial(gradients, definition, options=options, key=None)
    xla = compiler_options(options.policy, jax.default_backend())
    loss, found = jax.jit(run, compiler_options=xla)(trainable, frozen, batch)
    return float(loss), found


@jax.jit
def _products(got: Float[Array, "L ..."], wanted: Float[Array, "L ..."]) -> tuple[Float[Array, "L"], ...]:
    g, w = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (got, wanted))
    return tuple(jnp.sum(x * y, axis=1) for x, y in ((g - w, g - w), (w, w), (g, g), (g, w)))


def distances(got: nnx.State, wanted: nnx.State) -> Distances:
    """Of every matrix of every stacked leaf [L, ...], leaf by leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    sums = [np.stack(_products(g, w)).astype(np.float64) for g, w in pairs]
    off, w2, g2, gw = np.concatenate(sums, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a gradient that is all zeros has no direction
        return Distances(np.sqrt(off / w2), gw / np.sqrt(w2 * g2))


def matrix_names(tree: nnx.State) -> list[str]:
    """`segments.0.0.mlp.up_proj.lora_A.value layer 3` for every matrix, in the order of `distances`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = ((jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape[0]) for path, leaf in leaves)
    return [f"{name} layer {i}" for name, count in named for i in range(count)]


def judge(losses: dict[str, float], off: dict[str, Distances], names: list[str]) -> dict[str, Any]:
    """The record: losses, errors, cosines, ratios of errors, and whether all of it is within the noise of the dtype."""
    ratio = off["kernels"].error / off["references"].error
    within = bool(np.all(ratio <= WORST_RATIO) and np.isfinite(list(losses.values())).all())  # a NaN is not <=
    record: dict[str, Any] = {"losses": losses, "matrices": len(names)}
    record["relative_loss_difference"] = {way: abs(losses[way] / losses["float32"] - 1) for way in WAYS[:2]}
    for way, distance in off.items():
        record[way] = {
            "error_median": float(np.median(distance.error)),
            "error_max": float(np.max(distance.error)),
            "cosine_median": float(np.median(distance.cosine)),
            "cosine_min": float(np.min(distance.cosine)),
        }
    worst = int(np.argmax(np.where(np.isfinite(ratio), ratio, np.inf)))
    record["error_ratio"] = {"median": float(np.median(ratio)), "max": float(ratio[worst]), "worst": names[worst]}
    return record | {"largest_ratio_allowed": WORST_RATIO, "within_noise": within}


def lines(record: dict[str, Any]) -> list[str]:
    """The record for people."""
    losses, ratio = record["losses"], record["error_ratio"]
    out = ["loss: " + ", ".join(f"{way} {losses[way]:.6f}" for way in WAYS)]
    out.append(f"gradients of {record['matrices']} LoRA matrices against float32:")
    out.append(f"{'':12s} {'loss off':>9s} {'error':>9s} {'largest':>9s} {'cosine':>9s} {'smallest':>9s}")
    for way in WAYS[:2]:
        r, loss = record[way], record["relative_loss_difference"][way]
        out.append(
            f"{way:12s} {loss:9.2e} {r['error_median']:9.2e} {r['error_max']:9.2e} "
            f"{r['cosine_median']:9.6f} {r['cosine_min']:9.6f}"
        )
    out.append(f"error of kernels over error of references: median {ratio['median']:.3f}, largest {ratio['max']:.3f}")
    out.append(f"  ({ratio['worst']})")
    verdict = "within the noise of the dtype" if record["within_noise"] else "NOT within the noise of the dtype"
    return [*out, f"{verdict} (ratios up to {record['largest_ratio_allowed']:g})"]
