"""The feed-forward layers."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.layers import (
    LayerNorm,
    RMSNorm,
    project_fp8_mlp,
    project_glu,
    project_normed,
    runs_in_fp8,
)
from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.pallas_kernels.glu.reference import ACTIVATIONS


class GatedMLP(nnx.Module):
    """`down(act(gate(n)) * up(n))` with n = norm(x); gate and up may be one linear. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config: DecoderConfig, load, path: str = "mlp", width: int | None = None):
        d, f, bias = config.hidden_size, width or config.intermediate_size, config.mlp_bias
        self.fused, self.activation = config.fused_projections or config.fused_gate_up, config.activation
        if self.fused:
            self.gate_up_proj = load.linear(f"{path}.gate_up_proj", 2 * f, d, bias)
        else:
            self.gate_proj = load.linear(f"{path}.gate_proj", f, d, bias)
            self.up_proj = load.linear(f"{path}.up_proj", f, d, bias)
        self.down_proj = load.linear(f"{path}.down_proj", d, f, bias)

    def __call__(
        self, x: Slot, norm: RMSNorm | LayerNorm | None, keep: Keep, keys: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """The output, and x for the residual connection."""
        drop = (None,) * 3 if keys is None else keys
        if isinstance(norm, RMSNorm) and not norm.trained and not self.fused:
            linears = (self.gate_proj, self.up_proj, self.down_proj)
            if runs_in_fp8(linears, x.value, drop):
                return project_fp8_mlp(norm, linears, x, keep, self.activation)
        linears = (self.gate_up_proj,) if self.fused else (self.gate_proj, self.up_proj)
        gate_up, x = project_normed(norm, linears, x, keep, drop[: len(linears)])
        return project_glu(self.down_proj, keep.slot("gate_up", gate_up), keep, drop[2], self.activation), x


class PlainMLP(nnx.Module):
    """`down(act(up(n)))` with n = norm(x), the activation in float32."""

    def __init__(self, config: DecoderConfig, load):
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.up_proj = load.linear("mlp.up_proj", f, d, bias)
        self.down_proj = load.linear("mlp.down_proj", d, f, bias)
        self.activation = config.activation

    def __call__(
        self, x: Slot, norm: RMSNorm | LayerNorm | None, keep: Keep, keys: Array | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """The output, and x for the residual connection."""
        drop = (None,) * 2 if keys is None else keys
        up, x = project_normed(norm, (self.up_proj,), x, keep, drop[:1])
        up = keep("gate_up", up)
        act = ACTIVATIONS[self.activation](up.astype(jnp.float32)).astype(up.dtype)
        return self.down_proj(act, keep, drop[1]), x
