"""Mixture of experts: a router sends each token to a few of many gated feed-forward layers; none is dropped.

Tokens are sorted by expert, and each projection is one grouped product over the sorted rows. Shazeer et al. 2017,
arXiv:1701.06538; dropless as in Gale et al. 2022, arXiv:2211.15841.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.layers import ExpertLinear, Frozen, LayerNorm, RMSNorm, project_experts, project_experts_glu
from fastft_jax.models.mlp import GatedMLP
from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.models.router import route, router_load
from fastft_jax.quant.lora_linear import contract
from fastft_jax.quant.trained_linear import trained_linear


class Sorted(NamedTuple):
    """Each token once for each of its k experts, sorted by expert: row i is token `order[i] // k`."""

    order: Int[Array, "Mk"]
    place: Int[Array, "Mk"]  # the inverse: token m's j-th expert has it in row place[m k + j]
    sizes: Int[Array, "E"]  # rows of each expert


def sort_by_expert(experts: Int[Array, "M k"], num_experts: int) -> Sorted:
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Sorted(order, jnp.argsort(order), sizes)


# The two are each other's derivative; written out, so that no scatter-add is needed.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread(k: int, x: Float[Array, "M D"], order: Int[Array, "Mk"], place: Int[Array, "Mk"]) -> Float[Array, "Mk D"]:
    """Rows of tokens -> rows sorted by expert."""
    return x[order // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect(k: int, y: Float[Array, "Mk D"], order: Int[Array, "Mk"], place: Int[Array, "Mk"]) -> Float[Array, "M D"]:
    """Rows sorted by expert -> the sum of each token's k rows, in float32 with one cast."""
    return jnp.sum(y[place].reshape(-1, k, y.shape[1]), axis=1, dtype=jnp.float32).astype(y.dtype)


spread.defvjp(
    lambda k, x, order, place: (spread(k, x, order, place), (order, place)),
    lambda k, indices, dy: (collect(k, dy, *indices), None, None),
)
collect.defvjp(
    lambda k, y, order, place: (collect(k, y, order, place), (order, place)),
    lambda k, indices, dx: (spread(k, dx, *indices), None, None),
)


class Experts(nnx.Module):
    """E gated feed-forward layers, `down_e(act(gate_e(x)) * up_e(x))`; weights [L, E, F, D] and [L, E, D, F].

    Gate and up may be one linear, [L, E, 2F, D]. Biases are [L, E, N], and train in full fine-tuning alone.
    """

    def __init__(self, config: DecoderConfig, load):
        e, f, d = config.experts.num_experts, config.experts.intermediate_size, config.hidden_size
        bias, self.fused = config.experts.bias, config.fused_gate_up
        if self.fused:
            self.gate_up_proj = load.experts("mlp.experts.gate_up_proj", e, 2 * f, d, bias)
        else:
            self.gate_proj = load.experts("mlp.experts.gate_proj", e, f, d, bias)
            self.up_proj = load.experts("mlp.experts.up_proj", e, f, d, bias)
        self.down_proj = load.experts("mlp.experts.down_proj", e, d, f, bias)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "M D"], weights: Float[Array, "M k"], experts: Int[Array, "M k"], keep: Keep
    ) -> Float[Array, "M D"]:
        """`sum_j weights[m, j] expert_{experts[m, j]}(x[m])`."""
        k = experts.shape[1]
        order, place, sizes = sort_by_expert(experts, self.down_proj.num_experts)
        rows, expert = spread(k, x, order, place), experts.reshape(-1)[order]
        trained = isinstance(self.down_proj.bias, nnx.Param)  # frozen biases are part of the products
        linears = (self.gate_up_proj,) if self.fused else (self.gate_proj, self.up_proj)
        gate_up = project_experts(linears, rows, sizes, keep)
        if trained:
            gate_up = gate_up + bias_rows(linears, expert).astype(x.dtype)
        weight = spread(1, weights.reshape(-1, 1), order, place)  # [M k, 1], in the rows' order
        # Weighted before the last product and not behind it: its result is then not needed for the weights' gradient.
        gate_up = keep.slot("gate_up", gate_up)
        out = project_experts_glu(self.down_proj, gate_up, weight[:, 0], sizes, keep, self.activation)
        if trained:
            out = out + (bias_rows((self.down_proj,), expert) * weight).astype(out.dtype)
        return collect(k, out, order, place)


def bias_rows(linears: Sequence[ExpertLinear], expert: Int[Array, "Mk"]) -> Float[Array, "Mk N"]:
    """Of each row its expert's biases, float32, those of several linears side by side.

    They are picked by a product with ones and zeros: exact, and its derivative, the sum over an expert's rows, is a
    product in float32 and no scatter of colliding rows.
    """
    biases = jnp.concatenate([m.bias.get_value() for m in linears], axis=1)
    return contract(jax.nn.one_hot(expert, biases.shape[0], dtype=biases.dtype), biases, 1, 0, biases.dtype)


class Router(nnx.Module):
    """`x W^T + b`, in float32 if so configured; weight [L, N, D] and bias [L, N], if there is one, stay in 16 or 32
    bits and take no adapter: both train in full fine-tuning alone.

    e_score_correction_bias [L, N] (checkpoints' name), where there is one, is for `route`, and never trained.
    """

    def __init__(self, weight, bias=None, float32: bool = False, e_score_correction_bias=None):
        self.weight = Frozen(weight)
        correction = e_score_correction_bias
        self.bias, self.e_score_correction_bias = (
            nnx.data(None if value is None else Frozen(value)) for value in (bias, correction)
        )
        self.float32 = float32

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M N"]:
        weight, dtype = self.weight.get_value(), jnp.float32 if self.float32 else x.dtype
        if isinstance(self.weight, nnx.Param):
            logits = trained_linear(x.astype(dtype), [weight])
        else:
            logits = contract(x, weight.astype(x.dtype), 1, 1, dtype)
        if self.bias is None:
            return logits
        # a trained bias, float32, is added in float32: in 16 bits its gradient would be a sum of 16 bits
        return (logits + self.bias.get_value()).astype(dtype)

    @property
    def correction(self) -> Float[Array, "N"] | None:
        return None if self.e_score_correction_bias is None else self.e_score_correction_bias.get_value()


class MixtureOfExperts(nnx.Module):
    """`experts(n) + sigmoid(shared_gate(n)) shared_expert(n)` with n = norm(x); the second term where there is one, and
    its gate, too."""

    def __init__(self, config: DecoderConfig, load):
        c, d = config.experts, config.hidden_size
        self.config = c
        weight, bias, correction = load("mlp.router.weight", (c.num_experts, d)), None, None
        if c.bias:
            bias = load("mlp.router.bias", (c.num_experts,))
        if c.router == "sigmoid":
            correction = load("mlp.router.e_score_correction_bias", (c.num_experts,))
        self.router = Router(weight, bias, c.float32_logits, correction)
        self.experts = Experts(config, load)
        self.shared_expert, self.shared_expert_gate = nnx.data(None), nnx.data(None)
        if c.shared_intermediate_size is not None:
            self.shared_expert = GatedMLP(config, load, "mlp.shared_expert", c.shared_intermediate_size)
            if c.shared_gate:
                self.shared_expert_gate = Router(load("mlp.shared_expert_gate.weight", (1, d)))

    def __call__(
        self,
        x: Slot,
        norm: RMSNorm | LayerNorm | None,
        keep: Keep,
        keys: Array | None = None,
        counted: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Float[Array, "2 E"] | None]:
        """The output, x for the residual connection, and the router's load over the `counted` tokens if any are."""
        x = x.value
        normed = x if norm is None else norm(x)
        rows = normed.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        out = self.experts(rows, *route(logits, self.config, keep, self.router.correction), keep).reshape(x.shape)
        if self.shared_expert is not None:
            shared, _ = self.shared_expert(Slot(normed), None, keep, keys)
            if self.shared_expert_gate is not None:
                shared = jax.nn.sigmoid(self.shared_expert_gate(rows)).reshape(*x.shape[:-1], 1) * shared
            out = out + shared
        load = None if counted is None else router_load(logits, self.config.top_k, counted.reshape(-1))
        return out, x, load
