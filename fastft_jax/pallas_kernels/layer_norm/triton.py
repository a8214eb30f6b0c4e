"""LayerNorm kernels: a program normalises whole rows in registers, so each array is read or written once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.rms_norm.rows import STEPS, Rows, roomy, store_row


def _normalise(
    x: Float[Array, "rows width"], inside: Bool[Array, "rows width"], d: int, eps: float
) -> tuple[Float[Array, "rows width"], Float[Array, "rows 1"]]:
    mean = jnp.sum(x, axis=1, keepdims=True) / d
    centred = jnp.where(inside, x - mean, 0.0)  # masked columns read 0, which is not the mean
    rstd = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1, keepdims=True) / d + eps)
    return centred * rstd, rstd


def _row(ref, tiles: Rows) -> Float[Array, "1 width"]:
    return pallas.load(ref, mask=tiles.columns(), other=0.0)[None, :].astype(jnp.float32)


def _forward_kernel(x_ref, weight_ref, *refs, tiles: Rows, eps: float, room: int) -> None:
    """refs: [bias,] out."""
    *bias_ref, out_ref = refs
    _, inside = tiles.tile(0, tiles.first_row())
    x = pallas.load(x_ref, mask=inside, other=0.0).astype(jnp.float32)
    y = _normalise(x, inside, tiles.d, eps)[0] * _row(weight_ref, tiles)
    if bias_ref:
        y = y + _row(bias_ref[0], tiles)
    store_row(out_ref, y, tiles, inside, room)


def _backward_kernel(dy_ref, x_ref, weight_ref, dx_ref, *sum_refs, tiles: Rows, eps: float) -> None:
    """sum_refs: dw and db of this program's rows, where they are wanted."""
    first = tiles.first_row()
    scale = _row(weight_ref, tiles)

    def one_tile(step, sums):
        rows, inside = tiles.tile(step, first)
        read = lambda ref: pallas.load(ref.at[rows, :], mask=inside, other=0.0).astype(jnp.float32)  # noqa: E731
        mean = lambda a: jnp.sum(a, axis=1, keepdims=True) / tiles.d  # noqa: E731
        x, dy = read(x_ref), read(dy_ref)
        normed, rstd = _normalise(x, inside, tiles.d, eps)
        g = dy * scale
        dx = rstd * (g - mean(g) - normed * mean(g * normed))
        pallas.store(dx_ref.at[rows, :], dx.astype(dx_ref.dtype), mask=inside)
        return (sums[0] + dy * normed, sums[1] + dy) if sums else ()

    if sum_refs:
        zeros = jnp.zeros((tiles.rows, tiles.width), jnp.float32)
        totals = jax.lax.fori_loop(0, tiles.steps, one_tile, (zeros, zeros))
        for ref, total in zip(sum_refs, totals, strict=True):
            pallas.store(ref, jnp.sum(total, axis=0, keepdims=True), mask=tiles.columns()[None, :])
    else:
        one_tile(0, ())


def forward(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    bias: Float[Array, "D"] | None,
    *,
    eps: float,
    room: int = 0,
    interpret: bool | None = None,
) -> Float[Array, "*B D+room"]:
    *lead, d = x.shape
    tiles = Rows(x.size // d, d)
    affine = [weight] if bias is None else [weight, bias]
    out = pallas.call(
        functools.partial(_forward_kernel, tiles=tiles, eps=eps, room=room),
        name="layer_norm",
        grid=(tiles.programs,),
        in_specs=[tiles.spec()] + [tiles.weight_spec()] * len(affine),
        out_specs=tiles.spec(roomy(tiles, room)),
        out_shape=jax.ShapeDtypeStruct((tiles.m, d + room), x.dtype),
        num_warps=tiles.num_warps,
        interpret=interpret,
    )(x.reshape(tiles.m, d), *affine)
    return out.reshape(*lead, d + room)


def backward(
    dy: Float[Array, "*B D+room"],
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    train_weight: bool = False,
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "D"] | None, Float[Array, "D"] | None]:
    """dx, and float32 dw and db summed in two steps: by 16 tiles of rows in a program, then by XLA. No atomics."""
    d = x.shape[-1]
    tiles = Rows(x.size // d, d, steps=STEPS if train_weight else 1)
    sums = 2 * train_weight
    dx, *partial = pallas.call(
        functools.partial(_backward_kernel, tiles=tiles, eps=eps),
        name="layer_norm_backward_weight" if train_weight else "layer_norm_backward",
        grid=(tiles.programs,),
        in_specs=[tiles.spec(), tiles.spec(), tiles.weight_spec()],
        out_specs=[tiles.spec()] + [tiles.partial_spec()] * sums,
        out_shape=[jax.ShapeDtypeStruct((tiles.m, d), x.dtype)]
        + [jax.ShapeDtypeStruct((tiles.programs, d), jnp.float32)] * sums,
        num_warps=tiles.num_warps,
        interpret=interpret,
    )(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, d), weight)
    dw, db = (jnp.sum(p, axis=0) for p in partial) if train_weight else (None, None)
    return dx.reshape(x.shape), dw, db
