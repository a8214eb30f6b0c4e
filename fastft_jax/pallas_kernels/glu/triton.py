"""Gated linear units in one kernel each way: a program does 2048 columns of one row of gate and of up."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.glu.activations import linear_half, value_and_slope
from fastft_jax.pallas_kernels.rms_norm.rows import power_of_two

BLOCK = 2048
"""Columns a program, 16 a thread."""


def _load_pair(refs, f: int, blocks: int, inside: Bool[Array, "1 block"]) -> list[Float[Array, "1 block"]]:
    """Gate and up of this program's row, zero beyond F. refs: index in the stack, the stack [rows, 2F], rows of one."""
    index_ref, ref, m = refs
    block = inside.shape[1]
    row = index_ref[0] * m + pallas.program_id(0) // blocks
    first = pallas.program_id(0) % blocks * block
    at = [ref.at[pallas.ds(row, 1), pallas.ds(half * f + first, block)] for half in (0, 1)]
    return [pallas.load(one, mask=inside, other=0.0).astype(jnp.float32) for one in at]


def _act(gate, activation, dtype):
    """Activation rounded as transformers rounds it, and its slope."""
    act, slope = value_and_slope(activation, gate)
    return act.astype(dtype).astype(jnp.float32), slope


def _linear(up, activation, dtype):
    """What act is multiplied with, rounded as transformers rounds it, and its slope."""
    up, slope = linear_half(activation, up)
    return up.astype(dtype).astype(jnp.float32), slope


def _columns(blocks: int, block: int) -> Array:
    return (pallas.program_id(0) % blocks * block + jnp.arange(block))[None, :]


def _weighted(y: Array, dtype, weight_ref, blocks: int) -> Array:
    """y rounded, and times its row's weight, if there is one."""
    y = y.astype(dtype)
    if weight_ref is None:
        return y
    return (y.astype(jnp.float32) * weight_ref[pallas.program_id(0) // blocks]).astype(dtype)


def _forward_kernel(
    index_ref, gate_up_ref, *refs, activation: str, m: int, f: int, room: int, blocks: int, block: int, weighted: bool
) -> None:
    """refs: [weight,] out."""
    weight_ref, out_ref = refs if weighted else (None, *refs)
    columns = _columns(blocks, block)
    gate, up = _load_pair((index_ref, gate_up_ref, m), f, blocks, columns < f)
    # Beyond F gate and up read 0, and every activation maps 0 to 0: the room fills itself.
    act, _ = _act(gate, activation, out_ref.dtype)
    up, _ = _linear(up, activation, out_ref.dtype)
    pallas.store(out_ref, _weighted(act * up, out_ref.dtype, weight_ref, blocks), mask=columns < f + room)


def _backward_kernel(
    index_ref,
    gate_up_ref,
    d_ref,
    *refs,
    activation: str,
    m: int,
    f: int,
    room: int,
    blocks: int,
    block: int,
    weighted: bool,
) -> None:
    """refs: [weight,] d_gate_up[, act][, this program's part of the weight's gradient]."""
    weight_ref, part_ref = (refs[0], refs[-1]) if weighted else (None, None)
    d_gate_up_ref, *act_ref = refs[1:-1] if weighted else refs
    columns = _columns(blocks, block)
    inside = columns < f
    gate, up = _load_pair((index_ref, gate_up_ref, m), f, blocks, inside)
    d = pallas.load(d_ref, mask=inside, other=0.0).astype(jnp.float32)
    dtype = d_gate_up_ref.dtype
    act, slope = _act(gate, activation, dtype)
    up, up_slope = _linear(up, activation, dtype)
    row, first = pallas.program_id(0) // blocks, pallas.program_id(0) % blocks * block
    scaled = d * weight_ref[row] if weighted else d
    for half, grad in enumerate((scaled * up * slope, scaled * act * up_slope)):
        at = d_gate_up_ref.at[pallas.ds(row, 1), pallas.ds(half * f + first, block)]
        pallas.store(at, grad.astype(dtype), mask=inside)
    if act_ref:
        pallas.store(act_ref[0], _weighted(act * up, dtype, weight_ref, blocks), mask=columns < f + room)
    if weighted:  # last: threads wait for each other in a sum, and would hold all that comes after it
        part_ref[0] = jnp.sum(d * (act * up).astype(dtype).astype(jnp.float32))


def _call(kernel, name, gate_up, index, others, outs, activation, room, interpret, in_place=False, weight=None):
    """`outs` names the outputs: "pair" is [M, 2F], "single" [M, F + room]; room counts where a single is written;
    "parts" has one float32 of each program, [M, programs a row].

    `in_place`, a pair takes the place of gate_up, and a single that of `others`' if it is as wide: each element is read
    by the program that writes it.
    """
    f = gate_up.shape[-1] // 2
    m = math.prod(gate_up.shape[:-1]) if index is None else math.prod(gate_up.shape[1:-1])
    rows = gate_up.reshape(-1, 2 * f)
    block = min(BLOCK, power_of_two(f + room))
    blocks = pallas.cdiv(f + room, block)
    whole = lambda a: pallas.BlockSpec(a.shape, lambda i: (0,) * a.ndim)  # noqa: E731
    single = pallas.BlockSpec((1, block), lambda i: (i // blocks, i % blocks))
    shapes = {name: jax.ShapeDtypeStruct((m, n), gate_up.dtype) for name, n in (("pair", 2 * f), ("single", f + room))}
    shapes["parts"] = jax.ShapeDtypeStruct((m * blocks,), jnp.float32)
    specs = {"pair": whole(shapes["pair"]), "single": single, "parts": pallas.BlockSpec((1,), lambda i: (i,))}
    others = [other.reshape(m, -1) for other in others]
    weights = [] if weight is None else [weight.astype(jnp.float32).reshape(m)]
    aliases = {1: 0} if in_place and index is None else {}
    if in_place and "single" in outs and (others[0].shape, others[0].dtype) == (shapes["single"].shape, gate_up.dtype):
        aliases[2] = outs.index("single")
    index = jnp.asarray(0 if index is None else index, jnp.int32).reshape(1)
    numbers = dict(m=m, f=f, room=room, blocks=blocks, block=block)
    return pallas.call(
        functools.partial(kernel, activation=activation, **numbers, weighted=weight is not None),
        name=f"{activation}_{name}",
        grid=(m * blocks,),
        in_specs=[whole(index), whole(rows)] + [single] * len(others) + [whole(a) for a in weights],
        out_specs=[specs[out] for out in outs],
        out_shape=[shapes[out] for out in outs],
        input_output_aliases=aliases,
        num_warps=max(1, block // 512),
        interpret=interpret,
    )(index, rows, *others, *weights)


def forward(
    gate_up: Float[Array, "*B 2F"],
    *,
    activation: str,
    room: int = 0,
    index: Int[Array, ""] | None = None,
    row_weight: Float[Array, "*B"] | None = None,
    interpret: bool | None = None,
) -> Float[Array, "*B F+room"]:
    options = dict(weight=row_weight)
    (out,) = _call(_forward_kernel, "glu", gate_up, index, [], ["single"], activation, room, interpret, **options)
    return out.reshape(*(gate_up.shape[:-1] if index is None else gate_up.shape[1:-1]), -1)


def backward(
    gate_up: Float[Array, "*B 2F"],
    d_act: Float[Array, "*B F+room"],
    *,
    activation: str,
    room: int = 0,
    with_act: bool = True,
    index: Int[Array, ""] | None = None,
    in_place: bool = False,
    row_weight: Float[Array, "*B"] | None = None,
    interpret: bool | None = None,
) -> tuple[Array | None, ...]:
    """`in_place` is for operands that nothing reads afterwards: XLA would copy them."""
    outs = ["pair"] + ["single"] * with_act + ["parts"] * (row_weight is not None)
    room = room if with_act else 0
    options = (activation, room, interpret, in_place, row_weight)
    d_gate_up, *rest = _call(_backward_kernel, "glu_backward", gate_up, index, [d_act], outs, *options)
    lead = gate_up.shape[:-1] if index is None else gate_up.shape[1:-1]
    act = rest[0].reshape(*lead, -1) if with_act else None
    d_weight = () if row_weight is None else (jnp.sum(rest[-1].reshape(*lead, -1), axis=-1),)
    return d_gate_up.reshape(*lead, -1), act, *d_weight
