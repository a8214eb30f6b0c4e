"""RMSNorm kernels: a program normalises whole rows in registers, so each array is read or written once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def _backward_kernel(*refs, tiles: Rows, eps: float, plus_one: bool, residual: bool, train_weight: bool) -> None:
    """refs: dy, x, weight[, d_residual], dx[, dw of this program's rows]."""
    dy_ref, x_ref, weight_ref = refs[:3]
    dx_ref = refs[3 + residual]
    first = tiles.first_row()
    scale = _scale(weight_ref, tiles, plus_one, x_ref.dtype)

    def one_tile(step, dw):
        rows, inside = tiles.tile(step, first)
        read = lambda ref: pallas.load(ref.at[rows, :], mask=inside, other=0.0).astype(jnp.float32)  # noqa: E731
        x, dy = read(x_ref), read(dy_ref)
        rstd = _rstd(x, tiles.d, eps)
        normed, g = x * rstd, dy * scale
        dx = rstd * (g - normed * (jnp.sum(g * normed, axis=1, keepdims=True) / tiles.d))
        if residual:
            dx = dx + read(refs[3])
        pallas.store(dx_ref.at[rows, :], dx.astype(dx_ref.dtype), mask=inside)
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
    x: Float[Array, "*B D"],
    weight: Float[Array, "D"],
    d_residual: Float[Array, "*B D"] | None = None,
    *,
    eps: float,
    plus_one: bool = False,
    train_weight: bool = False,
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "D"] | None]:
    """The weight gradient is summed in two steps, by 16 tiles of rows in a program and then by XLA: no atomics."""
    d = x.shape[-1]
    tiles = Rows(x.size // d, d, steps=STEPS if train_weight else 1)
    residuals = [] if d_residual is None else [d_residual.reshape(-1, d)]
    dx, *partial = pallas.call(
        functools.partial(
            _backward_kernel,
            tiles=tiles,
            eps=eps,
            plus_one=plus_one,
            residual=d_residual is not None,
            train_weight=train_weight,
        ),
        name="rms_norm_backward_weight" if train_weight else "rms_norm_backward",
        grid=(tiles.programs,),
        in_specs=[tiles.spec(), tiles.spec(), tiles.weight_spec()] + [tiles.spec()] * len(residuals),
        out_specs=[tiles.spec()] + [tiles.partial_spec()] * train_weight,
        out_shape=[jax.ShapeDtypeStruct((tiles.m, d), x.dtype)]
        + [jax.ShapeDtypeStruct((tiles.programs, d), jnp.float32)] * train_weight,
        num_warps=tiles.num_warps,
        interpret=interpret,
    )(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, d), weight, *residuals)
    dw = jnp.sum(partial[0], axis=0).astype(weight.dtype) if train_weight else None
    return dx.reshape(x.shape), dw
