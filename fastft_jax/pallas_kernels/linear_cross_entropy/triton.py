"""The losses of a chunk of logits and their gradient in one kernel: fp32 logits are read once, their gradient written.

Softmax needs the sum of the whole row before it can be written. Where the gradient is softmax(z) - onehot(y) (no label
smoothing, no z-loss), the kernel writes exp(z - guess) instead, the guess being the maximum of the row's first tile,
and returns exp(guess - lse) as the row's factor, to be applied after the GEMM that sums over the row: bfloat16 has
float32's exponents, so nothing is lost. A row whose maximum lies far above its guess takes a second pass that writes
the gradient itself, and so do all rows of other losses.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.linear_cross_entropy.reference import ChunkLoss, Terms, logits_and_slope

TILE = 4096
NUM_WARPS = 8
FAR = 40.0
"""exp(40) = 2e17 leaves the GEMM's sums room in float32, and what underflows at exp(-87) is no part of a softmax."""


def _kernel(x_ref, label_ref, *out_refs, names: tuple[str, ...], vocab: int, tile: int, terms: Terms) -> None:
    """One row: x_ref [V], label_ref [1]. `names` says which outputs are wanted, and so what is computed."""
    out = dict(zip(names, out_refs, strict=True))
    eps, zeta = terms.label_smoothing, terms.z_loss
    tiles = pallas.cdiv(vocab, tile)
    label = label_ref[0]
    trained = label != terms.ignore_index
    in_vocab = trained & (label >= 0) & (label < vocab)
    written_last = jnp.where(in_vocab, label, -1)

    def read(t):
        """(columns, inside, z, slope) of a tile; z is -inf outside."""
        columns = t * tile + jnp.arange(tile)
        inside = columns < vocab
        x = pallas.load(x_ref.at[pallas.ds(t * tile, tile)], mask=inside, other=0.0)
        z, slope = logits_and_slope(x, terms)
        return columns, inside, jnp.where(inside, z, -jnp.inf), 1.0 if slope is None else slope

    def write(t, value, mask):
        ref = out["gradient"]
        pallas.store(ref.at[pallas.ds(t * tile, tile)], value.astype(ref.dtype), mask=mask)

    # First pass. A lane keeps its own sums and maximum: one reduction at the end, not one a tile.
    guess = jnp.max(read(0)[2])

    def first(t, lanes):
        columns, inside, z, slope = read(t)
        exp = jnp.exp(z - guess)
        new = {"sum": lanes["sum"] + exp, "peak": jnp.maximum(lanes["peak"], z)}
        if "correct" in out:
            new["best"] = jnp.where(z > lanes["peak"], columns, lanes["best"])
        if eps:
            new["total"] = lanes["total"] + jnp.where(inside, z, 0.0)
        if "factor" in out:
            write(t, exp * slope, inside & (columns != written_last))
        return new

    zeros = jnp.zeros((tile,), jnp.float32)
    start = {"sum": zeros, "peak": jnp.full((tile,), -jnp.inf, jnp.float32)}
    if "correct" in out:
        start["best"] = jnp.zeros((tile,), jnp.int32)
    if eps:
        start["total"] = zeros
    lanes = lax.fori_loop(0, tiles, first, start)

    # Where the guess was too low, sum again; other rows run this loop no times.
    peak = jnp.max(lanes["peak"])
    far = peak - guess > FAR
    far_tiles = far.astype(jnp.int32) * tiles
    base = jnp.where(far, peak, guess)
    again = lambda t, total: total + jnp.exp(read(t)[2] - peak)  # noqa: E731
    resummed = lax.fori_loop(0, far_tiles, again, zeros)
    lse = base + jnp.log(jnp.where(far, jnp.sum(resummed), jnp.sum(lanes["sum"])))

    # A label outside the vocabulary reads NaN: a wrong label must not pass for a right one.
    one, is_one = pallas.ds(jnp.where(in_vocab, label, 0), 1), jnp.broadcast_to(in_vocab, (1,))
    target, slope = logits_and_slope(pallas.load(x_ref.at[one], mask=is_one, other=jnp.nan), terms)
    loss = lse - (1 - eps) * target + zeta * lse * lse
    if eps:
        loss -= eps / vocab * jnp.sum(lanes["total"])
    out["loss"][...] = loss
    if "correct" in out:
        best = jnp.min(jnp.where(lanes["peak"] == peak, lanes["best"], vocab))
        out["correct"][0] = (best == label).astype(jnp.int32)

    def second(i, _):
        t = tiles - 1 - i  # backwards: the end of the row is still in the cache
        columns, inside, z, slope = read(t)
        value = jnp.exp(z - lse) * (1 + 2 * zeta * lse) - (1 - eps) * (columns == label) - eps / vocab
        write(t, jnp.where(trained, value * slope * terms.logit_scale, 0.0), inside)

    if "factor" in out:
        lax.fori_loop(0, far_tiles, second, None)
        # The label's own entry, softmax - 1, is known only now.
        value = (jnp.exp(target - lse) - 1) * jnp.exp(lse - base) * (1.0 if slope is None else slope)
        pallas.store(out["gradient"].at[one], value.astype(out["gradient"].dtype), mask=is_one & ~far)
        factor = jnp.where(far, 1.0, jnp.exp(base - lse) * terms.logit_scale)
        out["factor"][0] = jnp.where(trained, factor, 0.0)
    elif "gradient" in out:
        lax.fori_loop(0, tiles, second, None)


def chunk_loss(
    x: Float[Array, "C V"],
    labels: Int[Array, "C"],
    terms: Terms,
    *,
    gradient_dtype: jax.typing.DTypeLike | None,
    with_accuracy: bool,
    interpret: bool | None = None,
) -> ChunkLoss:
    """`reference.chunk_loss`, one program a row."""
    tokens, vocab = x.shape
    tile = min(TILE, 1 << (vocab - 1).bit_length())
    row = pallas.BlockSpec((None, pallas.cdiv(vocab, tile) * tile), lambda i: (i, 0))
    number = pallas.BlockSpec((1,), lambda i: (i,))
    outs = {"loss": (jax.ShapeDtypeStruct((tokens,), jnp.float32), number)}
    if with_accuracy:
        outs["correct"] = (jax.ShapeDtypeStruct((tokens,), jnp.int32), number)
    if gradient_dtype is not None:
        outs["gradient"] = (jax.ShapeDtypeStruct(x.shape, gradient_dtype), row)
        # float16 has too few exponents for exp(z - guess).
        if not terms.label_smoothing and not terms.z_loss and gradient_dtype != jnp.float16:
            outs["factor"] = (jax.ShapeDtypeStruct((tokens,), jnp.float32), number)
    results = pallas.call(
        functools.partial(_kernel, names=tuple(outs), vocab=vocab, tile=tile, terms=terms),
        name="cross_entropy_loss" if gradient_dtype is None else "cross_entropy_gradient",
        grid=(tokens,),
        in_specs=[row, number],
        out_specs=[spec for _, spec in outs.values()],
        out_shape=[shape for shape, _ in outs.values()],
        num_warps=NUM_WARPS,
        interpret=interpret,
    )(x, labels.astype(jnp.int32))
    named = dict(zip(outs, results, strict=True))
    correct = named["correct"].astype(bool) if with_accuracy else None
    return ChunkLoss(named["loss"], correct, named.get("gradient"), named.get("factor"))
