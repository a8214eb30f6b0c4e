"""Kernels of gated linear units between fp8 products: a program finishes one tile of gate, of up and of d_act."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.fp8.tile import Place, Tiles, finished, load_low_rank, load_scaled, store, whole
from fastft_jax.pallas_kernels.glu.activations import linear_half, value_and_slope

FORWARD, BACKWARD = Tiles(64, 64, 8), Tiles(64, 64, 8)
RANKS = 32
"""Of each product at a time: with more of three products the registers would spill."""


def _kernel(index_ref, *refs, tiles: Tiles, m: int, f: int, sizes, activation: str, ranks) -> None:
    """refs: those of gate_up, those of d_act (backward), the outputs; `sizes` counts the first two."""
    gate_up, d_act = refs[: sizes[0]], refs[sizes[0] : sum(sizes)]
    *d_gate_up_ref, act_ref = refs[sum(sizes) :]
    place, above = Place.of(tiles, m, f), index_ref[0] * m
    # All is asked for before anything is computed, the largest first: up to RANKS, a program waits for memory once.
    products = [(gate_up, above, 0), (gate_up, above, f)] + [(d_act, 0, 0)] * bool(d_act)
    scaled = [load_scaled(of, place, rows, columns) for of, rows, columns in products]
    low_rank = [
        load_low_rank(of, place, r, columns, RANKS) for (of, _, columns), r in zip(products, ranks, strict=True)
    ]
    gate, up, *d = (finished(*parts, act_ref.dtype) for parts in zip(scaled, low_rank, strict=True))
    act, slope = value_and_slope(activation, gate)
    act = act.astype(act_ref.dtype).astype(jnp.float32)  # rounded as transformers rounds it
    up, up_slope = linear_half(activation, up)
    store(act_ref, place, act * up)
    if d:
        store(d_gate_up_ref[0], place, d[0] * up * slope)
        store(d_gate_up_ref[0], place, d[0] * act * up_slope, f)


def _call(
    name, gate_up, d_act, tiles: Tiles, dtype, activation, ranks, index, interpret, in_place=False
) -> list[Array]:
    """d_gate_up (where there is a d_act) and act; in the places of gate_up's sums and of d_act's where they may be."""
    sums, *others = gate_up
    m, f = sums.shape[-2], sums.shape[-1] // 2
    operands = [jnp.asarray(0 if index is None else index, jnp.int32).reshape(1), sums.reshape(-1, 2 * f), *others]
    operands += d_act
    outs = [jax.ShapeDtypeStruct((m, 2 * f), dtype)] * bool(d_act) + [jax.ShapeDtypeStruct((m, f), dtype)]
    options = dict(m=m, f=f, activation=activation, ranks=ranks)
    # A program has read its tiles before it writes them; asked for where nothing reads the operands afterwards.
    aliases = {1: 0, 1 + len(gate_up): 1} if in_place else {}
    aliases = {
        i: o for i, o in aliases.items() if (operands[i].shape, operands[i].dtype) == (outs[o].shape, outs[o].dtype)
    }
    if index is not None:
        aliases.pop(1, None)  # a stack of many layers' stays as it is
    return pallas.call(
        functools.partial(_kernel, tiles=tiles, sizes=(len(gate_up), len(d_act)), **options),
        name=f"fp8_{activation}_{name}",
        grid=(tiles.programs(m, f),),
        in_specs=[whole(a) for a in operands],
        out_specs=[whole(a) for a in outs],
        out_shape=outs,
        input_output_aliases=aliases,
        num_warps=tiles.num_warps,
        num_stages=1,
        interpret=interpret,
    )(*operands)


def _present(*operands: Array | None) -> list[Array]:
    return [a for a in operands if a is not None]


def forward(
    sums: Float[Array, "*L M 2F"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"] | None = None,
    b: Float[Array, "2F R"] | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    activation: str,
    ranks: tuple[tuple[int, int], ...],
    index: Int[Array, ""] | None = None,
    tiles: Tiles = FORWARD,
    interpret: bool | None = None,
) -> Float[Array, "M F"]:
    gate_up = _present(sums, scale, h, b)
    (act,) = _call("glu", gate_up, [], tiles, dtype, activation, ranks, index, interpret)
    return act


def backward(
    sums: Float[Array, "*L M 2F"],
    scale: Float[Array, "M"],
    h: Float[Array, "M R"] | None,
    b: Float[Array, "2F R"] | None,
    d_sums: Float[Array, "M F"],
    d_scale: Float[Array, "M"],
    dh: Float[Array, "M S"] | None = None,
    d_b: Float[Array, "F S"] | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    activation: str,
    ranks: tuple[tuple[int, int], ...],
    index: Int[Array, ""] | None = None,
    in_place: bool = False,
    tiles: Tiles = BACKWARD,
    interpret: bool | None = None,
) -> tuple[Float[Array, "M 2F"], Float[Array, "M F"]]:
    gate_up, d_act = _present(sums, scale, h, b), _present(d_sums, d_scale, dh, d_b)
    return tuple(_call("glu_backward", gate_up, d_act, tiles, dtype, activation, ranks, index, interpret, in_place))
