"""RMSNorm and the scaling of its rows, as the two ops that they are."""

from jaxtyping import Array, Float

from fastft_jax.pallas_kernels.fp8.reference import quantise_rows
from fastft_jax.pallas_kernels.rms_norm import reference as rms_norm


def forward(
    x: Float[Array, "M D"], weight: Float[Array, "D"], *, eps: float, plus_one: bool, room: int
) -> tuple[Float[Array, "M D+room"], Float[Array, "M D"], Float[Array, "M"]]:
    y = rms_norm.forward(x, weight, eps=eps, plus_one=plus_one, room=room)
    return y, *quantise_rows(y, x.shape[1], "e4m3")
