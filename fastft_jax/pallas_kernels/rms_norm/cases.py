"""RMSNorm at the sizes of an 8B model, and at an odd one."""

import functools
import math

import jax
import jax.numpy as jnp

from fastft_jax.pallas_kernels.case import Case
from fastft_jax.pallas_kernels.rms_norm import reference, triton
from fastft_jax.pallas_kernels.rms_norm.rows import MAX_TRAINED_WIDTH


def memory_bound(name: str, run, reference, *args: jax.ShapeDtypeStruct, unread: int = 0) -> Case:
    """A case that reads its operands once, but for `unread` bytes, and writes its results once."""
    arrays = [*args, *jax.tree.leaves(jax.eval_shape(reference, *args))]
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    return Case(name, run, reference, args, bytes=moved - unread)


def _cases(m: int, d: int):
    x, weight = jax.ShapeDtypeStruct((m, d), jnp.bfloat16), jax.ShapeDtypeStruct((d,), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct((m, d + 64), jnp.bfloat16)
    size = f"{m}x{d}"

    def case(name, op, args, **options):
        return memory_bound(
            f"rms_norm/{name}/{size}",
            functools.partial(getattr(triton, op), **options),
            functools.partial(getattr(reference, op), **options),
            *args,
        )

    norm = {"eps": 1e-5, "plus_one": False}
    frozen = norm | {"train_weight": False}
    yield case("forward", "forward", (x, weight), **norm, room=0)
    yield case("forward_plus_one_room", "forward", (x, weight), eps=1e-6, plus_one=True, room=64)
    yield case("add_forward", "add_forward", (x, x, weight), **norm, room=0)
    yield case("add_forward_room", "add_forward", (x, x, weight), **norm, room=64)
    yield case("backward_residual", "backward", (x, x, weight, x), **frozen)
    yield case("backward_residual_normed", "backward", (x, x, weight, x), **norm, with_normed=True)
    yield case("backward_residual_room", "backward", (wide, x, weight, x), **frozen)
    if d <= MAX_TRAINED_WIDTH:
        yield case("backward_weight", "backward", (x, x, weight, x), **norm, train_weight=True)


CASES: tuple[Case, ...] = (*_cases(8192, 4096), *_cases(8192, 8192), *_cases(1000, 3584), *_cases(37, 16384))
