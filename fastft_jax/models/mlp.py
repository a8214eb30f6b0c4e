"""The gated feed-forward layer."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fastft_jax.models.config import DecoderConfig
from fastft_jax.pallas_kernels.glu import silu_glu


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig, load):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = load.linear("mlp.gate_proj", f, d, bias)
        self.up_proj = load.linear("mlp.up_proj", f, d, bias)
        self.down_proj = load.linear("mlp.down_proj", d, f, bias)

    def __call__(self, x: Float[Array, "B T D"], keys: Array | None = None) -> Float[Array, "B T D"]:
        drop = (None,) * 3 if keys is None else keys
        gate = checkpoint_name(self.gate_proj(x, drop[0]), "gate")
        up = checkpoint_name(self.up_proj(x, drop[1]), "up")
        return self.down_proj(silu_glu(gate, up), drop[2])
