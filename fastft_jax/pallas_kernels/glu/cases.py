"""Gated linear units at the sizes of an 8B model, and at odd ones."""

import functools

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.glu import reference, triton
from fastft_jax.pallas_kernels.rms_norm.cases import memory_bound


def _cases(m: int, f: int, activation: str, room: int = 0):
    gate_up, d_act = (jax.ShapeDtypeStruct((m, columns), jnp.bfloat16) for columns in (2 * f, f + room))

    def case(name, op, args, **options):
        run, plain = (functools.partial(getattr(m, op), activation=activation, **options) for m in (triton, reference))
        return memory_bound(f"glu_{activation}/{name}/{m}x{f}", run, plain, *args)

    suffix = "_room" if room else ""
    yield case(f"forward{suffix}", "forward", (gate_up,), room=room)
    yield case(f"backward{suffix}", "backward", (gate_up, d_act), room=room, with_act=False)
    yield case(f"backward_act{suffix}", "backward", (gate_up, d_act), room=room, with_act=True)


def _weighted(m: int, f: int, activation: str):
    """With a weight of each row, as experts have it."""
    spec = jax.ShapeDtypeStruct
    args = spec((m, 2 * f), jnp.bfloat16), spec((m,), jnp.float32), spec((m, f), jnp.bfloat16)

    def forward(module, gate_up, weight, **options):
        return module.forward(gate_up, row_weight=weight, activation=activation, **options)

    def backward(module, gate_up, weight, d_act, **options):
        return module.backward(gate_up, d_act, row_weight=weight, activation=activation, **options)

    for op, operands, options in ((forward, args[:2], {"room": 0}), (backward, args, {"room": 0, "with_act": True})):
        run, plain = (functools.partial(op, module, **options) for module in (triton, reference))
        yield memory_bound(f"glu_{activation}/{op.__name__}_weighted/{m}x{f}", run, plain, *operands)


CASES: tuple[Case, ...] = (
    *_cases(8192, 14336, "silu"),
    *_cases(8192, 14336, "silu", room=64),
    *_cases(8192, 14336, "gelu_tanh"),
    *_cases(8192, 14336, "gelu"),
    *_cases(37, 18944, "silu"),
    *_cases(1000, 3584, "silu"),
    *_cases(32768, 2880, "clamped_silu"),  # gpt-oss: four experts a token
    *_weighted(16384, 14336, "silu"),  # Mixtral: two
)
