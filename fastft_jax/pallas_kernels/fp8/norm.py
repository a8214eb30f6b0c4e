"""RMSNorm that scales its rows to e4m3 on the way: the fp8 product's operand costs no other pass over the rows."""

from typing import Literal

from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.fp8 import norm_reference
from fastft_jax.pallas_kernels.rms_norm import select_implementation

Implementation = Literal["xla", "triton"]


def rms_norm_rows(
    x: Float[Array, "M D"],
    weight: Float[Array, "D"],
    *,
    eps: float,
    plus_one: bool = False,
    room: int = 0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "M D+room"], Float[Array, "M D"], Float[Array, "M"]]:
    """`y = rms_norm(x, weight, room=room)`, and `quantise_rows(y, columns=D)`: its rows in e4m3 and their scales.

    Not differentiable. `None` picks "triton" on a GPU up to D = 16384, else "xla". Raises ValueError for shapes and
    names that do not fit.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or room < 0:
        raise ValueError(f"x [M, D], weight [D] and room >= 0 do not fit: {x.shape}, {weight.shape}, {room}")
    options = dict(eps=eps, plus_one=plus_one, room=room)
    if select_implementation(x.shape[1], False, implementation) == "xla":
        return norm_reference.forward(x, weight, **options)
    from fastft_jax.pallas_kernels.fp8 import norm_triton

    return norm_triton.forward(x, weight, **options)
