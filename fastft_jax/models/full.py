"""Full fine-tuning: every weight of a decoder trains, from float32 master copies."""

import operator

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.models.decoder import Decoder
from fastft_jax.models.layers import Frozen


def train_everything(decoder: Decoder) -> None:
    """Turn every frozen weight and bias into an `nnx.Param` in float32, in place; none may be quantised.

    Activations and products stay in the decoder's dtype: weights are cast where they are used.
    """
    for _, module in list(nnx.iter_modules(decoder)):
        for name in ("weight", "bias"):
            variable = getattr(module, name, None)
            if isinstance(variable, Frozen):
                setattr(module, name, nnx.Param(jnp.asarray(variable.get_value(), jnp.float32)))


def trains_everything(decoder: Decoder) -> bool:
    """Whether `train_everything` was called: only then do the layers' linears train themselves."""
    return isinstance(decoder.segments[0][0].self_attn.o_proj.weight, nnx.Param)


def weight_at(decoder: Decoder, path: str, layer: int | None) -> Float[Array, "..."]:
    """The unstacked value at a path as a LoadFn knows it: `self_attn.q_proj.weight` of layer 3, or `norm.weight`."""
    if layer is None:
        return operator.attrgetter(path)(decoder).get_value()
    segment, place, row = decoder.config.place_of(layer)
    return operator.attrgetter(path)(decoder.segments[segment][place]).get_value()[row]
