"""Full fine-tuning: every weight of a decoder trains, from float32 master copies."""

import jax.numpy as jnp
from flax import nnx

from fastft_jax.models.decoder import Decoder
from fastft_jax.models.layers import Frozen

LEAVES = ("weight", "bias", "sinks")
BUFFERS = ("e_score_correction_bias",)  # of a router: not trained by gradient in transformers either


def train_everything(decoder: Decoder) -> None:
    """Turn every frozen weight, bias and attention sink into an `nnx.Param` in float32, in place.

    None may be quantised. Activations and products stay in the decoder's dtype: weights are cast where they are used.
    NotImplementedError for a leaf of another kind, which would be left behind.
    """
    for _, module in list(nnx.iter_modules(decoder)):
        for name in LEAVES:
            variable = getattr(module, name, None)
            if isinstance(variable, Frozen):
                setattr(module, name, nnx.Param(jnp.asarray(variable.get_value(), jnp.float32)))
        left = [name for name, value in vars(module).items() if isinstance(value, Frozen) and name not in BUFFERS]
        if left:
            raise NotImplementedError(f"full_finetuning=True is not built yet for {left[0]} of {type(module).__name__}")


def trains_everything(decoder: Decoder) -> bool:
    """Whether `train_everything` was called: only then do the layers' linears train themselves."""
    return isinstance(decoder.segments[0][0].self_attn.o_proj.weight, nnx.Param)
