"""Sizes that the step is compiled and timed on: LoRA of rank 32 on an 8B model, its largest leaf, and an odd one."""

import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.adamw_8bit import codes, reference, triton
from fastft_jax.pallas_kernels.adamw_8bit.reference import Moment
from fastft_jax.pallas_kernels.case import Case

NUMBERS = dict(b1=0.9, b2=0.999, eps=1e-8)


def _flat(f, grad, m_codes, m_absmax, v_codes, v_absmax, *corrections, **options):
    moments = Moment(m_codes, m_absmax), Moment(v_codes, v_absmax)
    return jax.tree.leaves(f(grad, *moments, *corrections, **NUMBERS, **options))


def _case(groups: int) -> Case:
    shape = (groups, codes.BLOCK)

    def draw(seed: int):
        keys = jax.random.split(jax.random.key(seed), 3)
        grad, m, v = (1e-3 * jax.random.normal(key, shape, jnp.float32) for key in keys)
        # the corrections of step 10
        return grad, *codes.encode(m, True), *codes.encode(v * v, False), jnp.float32(0.651), jnp.float32(0.0997)

    array = jax.ShapeDtypeStruct
    moment = array(shape, jnp.uint8), array((groups,), jnp.float32)
    return Case(
        name=f"adamw_8bit/step/{groups * codes.BLOCK}",
        run=functools.partial(_flat, triton.adam_8bit),
        reference=functools.partial(_flat, reference.adam_8bit),
        args=(array(shape, jnp.float32), *moment, *moment, array((), jnp.float32), array((), jnp.float32)),
        bytes=groups * (12 * codes.BLOCK + 16),
        draw=draw,
    )


CASES: tuple[Case, ...] = (
    _case(84_000_000 // codes.BLOCK),  # every LoRA parameter of an 8B model at rank 32
    _case(32 * 32 * 14336 // codes.BLOCK),  # one leaf: [L, R, F]
    _case(1001),
)
