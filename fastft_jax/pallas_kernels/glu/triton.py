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


def _forward_kernel(
    index_ref, gate_up_ref, out_ref, *, activation: str, m: int, f: int, room: int, blocks: int, block: int
) -> None:
    columns = _columns(blocks, block)
    gate, up = _load_pair((index_ref, gate_up_ref, m), f, blocks, columns < f)
    # Beyond F gate and up read 0, and every activation maps 0 to 0: the room fills itself.
    act, _ = _act(gate, activation, out_ref.dtype)
    up, _ = _linear(up, activation, out_ref.dtype)
    pallas.store(out_ref, (act * up).astype(out_ref.dtype), mask=columns < f + room)


def _backward_kernel(
    index_ref,
    gate_up_ref,
    d_ref,
    d_gate_up_ref,
    *act_ref,
    activation: str,
    m: int,
    f: int,
    room: int,
    blocks: int,
    block: int,
) -> None:
    columns = _columns(blocks, block)
    inside = columns < f
    gate, up = _load_pair((index_ref, gate_up_ref, m), f, blocks, inside)
    d = pallas.load(d_ref, mask=inside, other=0.0).astype(jnp.float32)
    dtype = d_gate_up_ref.dtype
    act, slope = _act(gate, activation, dtype)
    up, up_slope = _linear(up, activation, dtype)
    row, first = pallas.program_id(0) // blocks, pallas.program_id(0) % blocks * block
    for half, grad in enumerate((d * up * slope, d * act * up_slope)):
        at = d_gate_up_ref.at[pallas.ds(row, 1), pallas.ds(half * f + first, block)]
        pallas.store(at, grad.astype(dtype), mask=inside)
    if act_ref:
        pallas.store(act_ref[0], (act * up).astype(dtype), mask=columns < f + room)


def _call(kernel, name, gate_up, index, others, outs, activation, room, interpret, in_place=False):
    """`outs` names the outputs: "pair" is [M, 2F], "single" [M, F + room]; room counts where a single is written.

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
    others = [other.reshape(m, -1) for other in others]
    aliases = {1: 0} if in_place and index is None else {}
    if in_place and "single" in outs and (others[0].shape, others[0].dtype) == (shapes["single"].shape, gate_up.dtype):
        aliases[2] = outs.index("single")
    index = jnp.asarray(0 if index is None else index, jnp.int32).reshape(1)
    return pallas.call(
        functools.partial(kernel, activation=activation, m=m, f=f, room=room, blocks=blocks, block=block),
        name=f"{activation}_{name}",
        grid=(m * blocks,),
        in_specs=[whole(index), whole(rows)] + [single] * len(others),
        out_specs=[whole(shapes["pair"]) if out == "pair" else single for out in outs],
        out_shape=[shapes[out] for out in outs],
        input_output_aliases=aliases,
        num_warps=max(1, block // 512),
        interpret=interpret,
    )(index, rows, *others)


def forward(
    gate_up: Float[Array, "*B 2F"],
    *,
    activation: str,
    room: int = 0,
    index: Int[Array, ""] | None = None,
    interpret: bool | None = None,
) -> Float[Array, "*B F+room"]:
    (out,) = _call(_forward_kernel, "glu", gate_up, index, [], ["single"], activation, room, interpret)
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
    interpret: bool | None = None,
) -> tuple[Float[Array, "*B 2F"], Float[Array, "*B F+room"] | None]:
    """`in_place` is for operands that nothing reads afterwards: XLA would copy them."""
    outs = ["pair"] + ["single"] * with_act
    room = room if with_act else 0
    d_gate_up, *act = _call(
        _backward_kernel, "glu_backward", gate_up, index, [d_act], outs, activation, room, interpret, in_place
    )
    lead = gate_up.shape[:-1] if index is None else gate_up.shape[1:-1]
    return d_gate_up.reshape(*lead, -1), act[0].reshape(*lead, -1) if with_act else None
