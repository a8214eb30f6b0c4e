"""One step of Adam on 8-bit moments in one kernel: 6 bytes read and 6 written a parameter, and no float32 moments."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.adamw_8bit.codes import BLOCK, nearest_codes, search_tree
from fastft_jax.pallas_kernels.adamw_8bit.reference import Moment, adam
from fastft_jax.pallas_kernels.nf4.codebooks import dynamic_map

BLOCKS_PER_PROGRAM = 8
NUM_WARPS = 4
MAX_CODE_BYTES = 2**31
"""Pallas's offsets are 32-bit for arrays up to 4 GiB, and signed: a byte array must stay below 2 GiB."""


def _kernel(
    grad_ref,
    m_codes_ref,
    m_absmax_ref,
    v_codes_ref,
    v_absmax_ref,
    corrections_ref,
    signed_map_ref,
    signed_tree_ref,
    unsigned_map_ref,
    unsigned_tree_ref,
    update_ref,
    new_m_codes_ref,
    new_m_absmax_ref,
    new_v_codes_ref,
    new_v_absmax_ref,
    *,
    groups: int,
    b1: float,
    b2: float,
    eps: float,
) -> None:
    inside = pallas.program_id(0) * BLOCKS_PER_PROGRAM + jnp.arange(BLOCKS_PER_PROGRAM) < groups
    elements = jnp.broadcast_to(inside[:, None], (BLOCKS_PER_PROGRAM, BLOCK))

    def decode(codes_ref, absmax_ref, map_ref):
        codes = pallas.load(codes_ref, mask=elements, other=0).astype(jnp.int32)
        return map_ref[codes] * pallas.load(absmax_ref, mask=inside, other=0.0)[:, None]

    def encode(blocks, codes_ref, absmax_ref, tree_ref):
        absmax = jnp.max(jnp.abs(blocks), axis=1)
        codes = nearest_codes(blocks, absmax, lambda i: tree_ref[i])
        pallas.store(codes_ref, codes.astype(jnp.uint8), mask=elements)
        pallas.store(absmax_ref, absmax, mask=inside)

    grad = pallas.load(grad_ref, mask=elements, other=0.0)
    m = decode(m_codes_ref, m_absmax_ref, signed_map_ref)
    v = decode(v_codes_ref, v_absmax_ref, unsigned_map_ref)
    update, m, v = adam(grad, m, v, corrections_ref[0], corrections_ref[1], b1=b1, b2=b2, eps=eps)
    pallas.store(update_ref, update, mask=elements)
    encode(m, new_m_codes_ref, new_m_absmax_ref, signed_tree_ref)
    encode(v, new_v_codes_ref, new_v_absmax_ref, unsigned_tree_ref)


def adam_8bit(
    grad: Float[Array, "G 256"],
    m: Moment,
    v: Moment,
    correction1: Float[Array, ""],
    correction2: Float[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
    interpret: bool | None = None,
) -> tuple[Float[Array, "G 256"], Moment, Moment]:
    """`reference.adam_8bit`; the update takes the place of a float32 gradient. Raises ValueError for 2 GiB of codes."""
    groups = grad.shape[0]
    if grad.size >= MAX_CODE_BYTES:
        raise ValueError(f"the triton kernel takes less than 2 GiB of codes, got {grad.size:,} bytes: split the leaf")
    values = pallas.BlockSpec((BLOCKS_PER_PROGRAM, BLOCK), lambda i: (i, 0))
    scales = pallas.BlockSpec((BLOCKS_PER_PROGRAM,), lambda i: (i,))
    whole = lambda n: pallas.BlockSpec((n,), lambda i: (0,))  # noqa: E731
    tables = [jnp.asarray(t) for signed in (True, False) for t in (dynamic_map(signed), search_tree(signed))]
    array = jax.ShapeDtypeStruct
    moment = [array((groups, BLOCK), jnp.uint8), array((groups,), jnp.float32)]
    update, *moments = pallas.call(
        functools.partial(_kernel, groups=groups, b1=b1, b2=b2, eps=eps),
        name="adam_8bit",
        grid=(pallas.cdiv(groups, BLOCKS_PER_PROGRAM),),
        in_specs=[values, values, scales, values, scales, whole(2), *4 * [whole(256)]],
        out_specs=[values, values, scales, values, scales],
        out_shape=[array((groups, BLOCK), jnp.float32), *moment, *moment],
        num_warps=NUM_WARPS,
        input_output_aliases={0: 0} if grad.dtype == jnp.float32 else None,
        interpret=interpret,
    )(grad, *m, *v, jnp.stack([correction1, correction2]), *tables)
    return update, Moment(*moments[:2]), Moment(*moments[2:])
