"""Which dtype the products of the frozen base run in: a property of each quantised weight, set once after loading."""

import dataclasses
from collections.abc import Sequence

from fastft_jax.errors import ConfigError
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.layers import ExpertLinear
from fastft_jax.models.lora import layer_linears
from fastft_jax.pallas_kernels.pallas import FP8_CAPABILITY, current_device
from fastft_jax.quant.nf4 import NF4Array

COMPUTE_DTYPES = ("fp8",)


def check_compute_dtype(compute_dtype: str | None, load_in_4bit: bool = True) -> None:
    """Raises ConfigError for a compute_dtype that there is not, or not for this base, or not on this GPU."""
    if compute_dtype is None:
        return
    if compute_dtype not in COMPUTE_DTYPES:
        raise ConfigError(f"compute_dtype={compute_dtype!r} is not one of {', '.join(COMPUTE_DTYPES)}, or null")
    if not load_in_4bit:
        raise ConfigError(f"compute_dtype={compute_dtype!r} is for an NF4 base: it needs load_in_4bit=True")
    _, capability = current_device()
    if capability is not None and capability < FP8_CAPABILITY:
        raise ConfigError(
            f"compute_dtype={compute_dtype!r} needs a GPU of compute capability 8.9 (Ada, Hopper) or more, "
            f"this one has {capability[0]}.{capability[1]}"
        )


def set_compute_dtype(decoder: Decoder, compute_dtype: str | None, keep: Sequence[str] = ()) -> None:
    """Run the products with the NF4 weights of `decoder`'s layers in `compute_dtype`, in place; None: in its own dtype.

    `keep` names linears ("mlp.down_proj") that go on in the decoder's dtype; of linears that read one input together,
    such as q, k and v, one is enough. Experts always do: their grouped products have no fp8 form. On a CPU fp8 is
    emulated: the same rounding, float32 products.
    """
    for segment in decoder.segments:
        for place in segment:
            for path, linear in layer_linears(place):
                weight = linear.weight.get_value()
                if isinstance(weight, NF4Array):
                    wanted = None if path in keep or isinstance(linear, ExpertLinear) else compute_dtype
                    linear.weight.set_value(dataclasses.replace(weight, compute=wanted))
