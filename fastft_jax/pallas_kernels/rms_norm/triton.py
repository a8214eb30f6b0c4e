"""RMSNorm kernels: a program normalises whole rows in registers, so each array is read or written once."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.rms_norm.rows import STEPS, Rows, roomy, store_row


def _rstd(x: Float[Array, "rows width"], d: int, eps: float) -> Float[Array, "rows 1"]:
    return jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / d + eps)


def _scale(weight_ref, tiles: Rows, plus_one: bool, dtype) -> Float[Array, "1 width"]:
    """What multiplies the quotient: 1 + w in float32, or w rounded to x's dtype."""
    weight = pallas.load(weight_ref, mask=tiles.columns(), other=0.0)[None, :]
    return 1.0 + weight.astype(jnp.float32) if plus_one else weight.astype(dtype).astype(jnp.float32)


def normalised(
    x: Float[Array, "rows width"], weight_ref, tiles: Rows, eps: float, plus_one: bool
) -> Float[Array, "rows width"]:
    """A tile's result, of x in its own dtype, before the last rounding to it."""
    xf = x.astype(jnp.float32)
    normed = xf * _rstd(xf, tiles.d, eps)
    if not plus_one:
        normed = normed.astype(x.dtype).astype(jnp.float32)
    return normed * _scale(weight_ref, tiles, plus_one, x.dtype)


def _forward_kernel(*refs, tiles: Rows, eps: float, plus_one: bool, room: int) -> None:
    """refs: x, weight, out; or with an addition: x, delta, weight, h, out."""
    x_ref, *delta_ref, weight_ref = refs[: len(refs) // 2 + 1]
    *h_ref, out_ref = refs[len(refs) // 2 + 1 :]
    _, inside = tiles.tile(0, tiles.first_row())
    x = pallas.load(x_ref, mask=inside, other=0.0)
    if delta_ref:
        delta = pallas.load(delta_ref[0], mask=inside, other=0.0)
        x = (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)
        pallas.store(h_ref[0], x, mask=inside)  # the norm sees the rounded sum, as a reader of h would
    store_row(out_ref, normalised(x, weight_ref, tiles, eps, plus_one), tiles, inside, room)


def _backward_kernel(
    *refs, tiles: Rows, eps: float, plus_one: bool, residual: bool, train_weight: bool, stacked: bool, with_normed: bool
) -> None:
    """refs: [index,] dy, x or a stack of it, weight[, d_residual], dx[, normed][, dw of this program's rows]."""
    index_ref = refs[0]
    dy_ref, x_ref, weight_ref, *others = refs[stacked:]
    dx_ref = others[residual]
    first = tiles.first_row()
    scale = _scale(weight_ref, tiles, plus_one, x_ref.dtype)

    def one_tile(step, dw):
        rows, inside = tiles.tile(step, first)
        read = lambda ref: pallas.load(ref.at[rows, :], mask=inside, other=0.0).astype(jnp.float32)  # noqa: E731
        if stacked:
            here = pallas.ds(index_ref[0] * tiles.m + first + step * tiles.rows, tiles.rows)
            x = pallas.load(x_ref.at[here, pallas.ds(0, tiles.width)], mask=inside, other=0.0).astype(jnp.float32)
        else:
            x = read(x_ref)
        dy = read(dy_ref)
        rstd = _rstd(x, tiles.d, eps)
        normed, g = x * rstd, dy * scale
        dx = rstd * (g - normed * (jnp.sum(g * normed, axis=1, keepdims=True) / tiles.d))
        if residual:
            dx = dx + read(others[0])
        pallas.store(dx_ref.at[rows, :], dx.astype(dx_ref.dtype), mask=inside)
        if with_normed:
            ref = others[residual + 1]
            quotient = normed if plus_one else normed.astype(ref.dtype).astype(jnp.float32)
            pallas.store(ref.at[rows, :], (quotient * scale).astype(ref.dtype), mask=inside)
        return dw + dy * normed if train_weight else dw

    if train_weight:
        dw = jax.lax.fori_loop(0, tiles.steps, one_tile, jnp.zeros((tiles.rows, tiles.width), jnp.float32))
        pallas.store(refs[-1], jnp.sum(dw, axis=0, keepdims=True), mask=tiles.columns()[None, :])
    else:
        one_tile(0, None)


def forward(
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    room: int = 0,
    interpret: bool | None = None,
) -> Float[Array, "*B D+room"]:
    (out,) = _forward((x,), weight, eps, plus_one, room, interpret)
    return out


def add_forward(
    x: Float[Array, "*B D"],
    delta: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    room: int = 0,
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D+room"]]:
    """`h = x + delta` and the norm of h."""
    return _forward((x, delta), weight, eps, plus_one, room, interpret)


def _forward(addends, weight, eps, plus_one, room, interpret) -> tuple[Array, ...]:
    x = addends[0]
    *lead, d = x.shape
    tiles = Rows(x.size // d, d)
    sums = len(addends) - 1  # how many outputs h comes to
    outs = pallas.call(
        functools.partial(_forward_kernel, tiles=tiles, eps=eps, plus_one=plus_one, room=room),
        name="add_rms_norm" if sums else "rms_norm",
        grid=(tiles.programs,),
        in_specs=[tiles.spec()] * len(addends) + [tiles.weight_spec()],
        out_specs=[tiles.spec()] * sums + [tiles.spec(roomy(tiles, room))],
        out_shape=[jax.ShapeDtypeStruct((tiles.m, d), x.dtype)] * sums
        + [jax.ShapeDtypeStruct((tiles.m, d + room), x.dtype)],
        num_warps=tiles.num_warps,
        interpret=interpret,
    )(*(a.reshape(tiles.m, d) for a in addends), weight)
    return tuple(out.reshape(*lead, out.shape[-1]) for out in outs)


def backward(
    dy: Float[Array, "*B D+room"],
    x: Float[Array, "*L_B D"],
    weight: Float[Array, "D"],
    d_residual: Float[Array, "*B D"] | None = None,
    *,
    eps: float,
    plus_one: bool = False,
    train_weight: bool = False,
    index: Int[Array, ""] | None = None,
    with_normed: bool = False,
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "D"] | Float[Array, "*B D"] | None]:
    """dx, and the gradient of the weight or `with_normed` the norm's result.

    The weight gradient is summed in two steps, by 16 tiles of rows in a program and then by XLA: no atomics.
    """
    *lead, d = x.shape if index is None else x.shape[1:]
    m, stacked = math.prod(lead), index is not None
    tiles = Rows(m, d, steps=STEPS if train_weight else 1)
    x = x.reshape(-1, d)
    x_spec = pallas.BlockSpec(x.shape, lambda i: (0, 0)) if stacked else tiles.spec()
    residuals = [] if d_residual is None else [d_residual.reshape(-1, d)]
    indices = [jnp.asarray(index, jnp.int32).reshape(1)] if stacked else []
    dx, *more = pallas.call(
        functools.partial(
            _backward_kernel,
            tiles=tiles,
            eps=eps,
            plus_one=plus_one,
            residual=d_residual is not None,
            train_weight=train_weight,
            stacked=stacked,
            with_normed=with_normed,
        ),
        name="rms_norm_backward_weight" if train_weight else "rms_norm_backward",
        grid=(tiles.programs,),
        in_specs=[pallas.BlockSpec((1,), lambda i: (0,))] * stacked
        + [tiles.spec(), x_spec, tiles.weight_spec()]
        + [tiles.spec()] * len(residuals),
        out_specs=[tiles.spec()] * (1 + with_normed) + [tiles.partial_spec()] * train_weight,
        out_shape=[jax.ShapeDtypeStruct((m, d), x.dtype)] * (1 + with_normed)
        + [jax.ShapeDtypeStruct((tiles.programs, d), jnp.float32)] * train_weight,
        num_warps=tiles.num_warps,
        interpret=interpret,
    )(*indices, dy.reshape(m, -1), x, weight, *residuals)
    dx = dx.reshape(*lead, d)
    if with_normed:
        return dx, more[0].reshape(*lead, d)
    return dx, jnp.sum(more[0], axis=0).astype(weight.dtype) if train_weight else None
