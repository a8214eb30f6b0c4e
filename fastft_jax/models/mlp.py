"""The gated feed-forward layer."""

from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.layers import RMSNorm, project_fp8_mlp, project_glu, project_normed, runs_in_fp8
from fastft_jax.models.residuals import Keep


class GatedMLP(nnx.Module):
    """`down(silu(gate(n)) * up(n))` with n = norm(x). Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig, load):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = load.linear("mlp.gate_proj", f, d, bias)
        self.up_proj = load.linear("mlp.up_proj", f, d, bias)
        self.down_proj = load.linear("mlp.down_proj", d, f, bias)

    def __call__(
        self, x: Float[Array, "B T D"], norm: RMSNorm, keep: Keep, keys: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """The output, and x for the residual connection."""
        drop = (None,) * 3 if keys is None else keys
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if runs_in_fp8(linears, x, drop):
            return project_fp8_mlp(norm, linears, x, keep)
        gate_up, x = project_normed(norm, linears[:2], x, keep, drop[:2])
        return project_glu(self.down_proj, keep.slot("gate_up", gate_up), keep, drop[2]), x
