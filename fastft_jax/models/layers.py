"""The decoder's small modules: containers of arrays with one equation each.

Variables say what may be trained: `Frozen` never has a gradient; `nnx.LoRAParam` and `nnx.Param` always do (base
weights are that in full fine-tuning, `full.py`). Inside the decoder every layer's arrays are stacked over the layers of
one place, `[L, ...]`, and lax.scan slices that axis away before any of these modules is called.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.dora import column_factor
from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.pallas_kernels.glu import Activation, glu
from fastft_jax.pallas_kernels.layer_norm import layer_norm
from fastft_jax.pallas_kernels.rms_norm import rms_norm
from fastft_jax.quant import fp8
from fastft_jax.quant.fp8_mlp import fp8_mlp
from fastft_jax.quant.glu_linear import glu_linear
from fastft_jax.quant.grouped_glu import grouped_glu_linear
from fastft_jax.quant.grouped_lora import grouped_lora_linear
from fastft_jax.quant.lora_linear import Projection, contract, lora_linear
from fastft_jax.quant.norm_linear import Norm, norm_linear
from fastft_jax.quant.trained_linear import trained_experts, trained_linear


class Frozen(nnx.Variable):
    """An array (or quantised array) of the base model: read, never differentiated, never donated."""


class Linear(nnx.Module):
    """`y = x W^T + b + scaling * (dropout(x) A^T) B^T`; W frozen (plain or quantised), A and B float32 (as in PEFT).

    weight [L, N, K]; bias [L, N]; lora_A [r, R, K] and lora_B [r, N, R], where r rows of the stack are adapted:
    `adapted_rows` names them, None for all. `trained_bias` replaces the bias of those rows.
    Where layers differ, `ranks` and `scaling` are tuples of r values: R is the largest rank, and the rows of A and
    columns of B beyond a layer's own are zero and stay so, since the gradient of either is a product with the other.
    `magnitude` m [r, N] makes it DoRA: everything but the bias times m / ||W + scaling B A||, row by row (`dora.py`).
    `start_A`, `start_B` [as A and B]: a frozen pair that is subtracted, for adapters that start from W itself (PiSSA).
    `lora_bias` [r, N] float32 is a bias of B: scaling times it is added to the output (PEFT's lora_bias).
    `requantised` says that `weight` was coded anew for this adapter (LoftQ).
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, weight, bias=None):
        self.weight = Frozen(weight)
        # nnx.data(None): attributes that may hold a variable later
        self.bias = nnx.data(None if bias is None else Frozen(bias))
        self.lora_A, self.lora_B, self.trained_bias = nnx.data(None), nnx.data(None), nnx.data(None)
        self.magnitude, self.start_A, self.start_B = nnx.data(None), nnx.data(None), nnx.data(None)
        self.lora_bias = nnx.data(None)
        self.row_scaling, self.has_magnitude = nnx.data(None), nnx.data(None)  # made by `expand`
        self.dropout, self.requantised = 0.0, False
        self.scaling: float | tuple[float, ...] = 1.0
        self.ranks: tuple[int, ...] | None = None
        self.adapted_rows: tuple[int, ...] | None = None
        self.trained_bias_rows: tuple[int, ...] | None = None

    @property
    def adapted(self) -> bool:
        return self.lora_A is not None

    def expand(self, rows: int) -> None:
        """Give every layer of the stack its own slice: zeros where a layer has no adapter, so scan sees one shape."""
        if isinstance(self.scaling, tuple):
            self.row_scaling, self.scaling = Frozen(jnp.array(self.scaling, jnp.float32)), 1.0
        if self.adapted and self.adapted_rows is not None:
            for name in ("lora_A", "lora_B", "magnitude", "start_A", "start_B", "row_scaling", "lora_bias"):
                leaf = getattr(self, name)
                if leaf is not None:
                    setattr(self, name, type(leaf)(_scatter(leaf[...], self.adapted_rows, rows)))
            if self.magnitude is not None:
                self.has_magnitude = Frozen(jnp.zeros(rows, bool).at[jnp.array(self.adapted_rows)].set(True))
        if self.trained_bias is not None:
            trained = self.trained_bias[...]
            if self.trained_bias_rows is not None:
                trained = self.bias[...].astype(trained.dtype).at[jnp.array(self.trained_bias_rows)].set(trained)
            self.bias, self.trained_bias = nnx.Param(trained), None

    def __call__(self, x: Float[Array, "B T K"], keep: Keep, dropout_key: Array | None = None) -> Float[Array, "B T N"]:
        return project((self,), x, keep, (dropout_key,))


class ExpertLinear(Linear):
    """E linears side by side, `y[m] = x[m] W_e^T + scaling (x[m] A_e^T) B_e^T` for the rows m of expert e.

    weight [L, E, N, K]; lora_A [r, E, R, K] and lora_B [r, E, N, R]; no dropout. Called through `project_experts`,
    which adds the bias [L, E, N], if there is one and it is frozen, and leaves a trained one to the caller.
    """

    def __init__(self, weight, num_experts: int, bias=None):
        super().__init__(weight, bias)
        self.num_experts = num_experts


def project_experts(
    linears: Sequence[ExpertLinear], x: Float[Array, "M K"], sizes: Int[Array, "E"], keep: Keep
) -> Float[Array, "M N"]:
    """The outputs of linears that read the same rows, sorted by expert (`sizes` of each), side by side in one array."""
    if _trained(linears):
        return trained_experts(x, sizes, tuple(m.weight.get_value() for m in linears))
    projections, scalings = [_projection(m) for m in linears], [m.scaling for m in linears]
    return grouped_lora_linear(x, sizes, projections, scalings, keep, _frozen_biases(linears))


def project_experts_glu(
    linear: ExpertLinear,
    gate_up: Slot,
    weight: Float[Array, "M"],
    sizes: Int[Array, "E"],
    keep: Keep,
    activation: Activation,
) -> Float[Array, "M D"]:
    """`weight * linear(act(gate) * up)` of rows sorted by expert, each with its float32 weight.

    A trained bias is left to the caller, weighted as well.
    """
    if _trained((linear,)):
        act = glu(gate_up.read(), activation=activation, row_weight=weight)
        return project_experts((linear,), act, sizes, keep)
    value, stack, index = gate_up
    options = dict(activation=activation, stack=stack, index=index, keep=keep, bias=_frozen_biases((linear,)))
    return grouped_glu_linear(value, weight, sizes, _projection(linear), linear.scaling, **options)


def _frozen_biases(linears: Sequence[ExpertLinear]) -> Float[Array, "E N"] | None:
    """Those of several linears side by side."""
    if any(m.bias is None or isinstance(m.bias, nnx.Param) for m in linears):
        return None
    return jnp.concatenate([m.bias.get_value() for m in linears], axis=1)


def project(
    linears: Sequence[Linear], x: Float[Array, "B T K"], keep: Keep, dropout_keys: Sequence[Array | None]
) -> Float[Array, "B T N"]:
    """The outputs of linears that read the same x, side by side in one array: one large product for all."""
    if _trained(linears):
        return _with_biases(trained_linear(x, [m.weight.get_value() for m in linears]), linears)
    dropped = None
    if _drops(linears, dropout_keys):
        dropped = [
            drop(x, m.dropout, key) if _drops((m,), (key,)) else None
            for m, key in zip(linears, dropout_keys, strict=True)
        ]
        if any(m.magnitude is not None for m in linears):
            return _with_biases(_through_dropped(linears, x, dropped, keep), linears)
    y = lora_linear(x, [_projection(m) for m in linears], [m.scaling for m in linears], dropped, keep)
    return _finished(y, linears)


def project_normed(
    norm: "RMSNorm | LayerNorm | None",
    linears: Sequence[Linear],
    slot: Slot,
    keep: Keep,
    dropout_keys: Sequence[Array | None],
) -> tuple[Float[Array, "B T N"], Float[Array, "B T K"]]:
    """`project(linears, norm(x))`, and x again: a residual connection that starts from it costs no extra pass.

    Without a norm the linears read x itself. Only RMSNorm is one op with its linears, while they are frozen.
    """
    x, stack, index = slot
    if not isinstance(norm, RMSNorm) or norm.trained or _drops(linears, dropout_keys) or _trained(linears):
        return project(linears, x if norm is None else norm(x), keep, dropout_keys), x
    projections, scalings = [_projection(m) for m in linears], [m.scaling for m in linears]
    normed = Norm(norm.eps, norm.plus_one)
    y, x = norm_linear(x, norm.weight.get_value(), normed, projections, scalings, keep, stack=stack, index=index)
    return _finished(y, linears), x


def project_glu(
    linear: Linear, gate_up: Slot, keep: Keep, dropout_key: Array | None, activation: Activation = "silu"
) -> Float[Array, "B T D"]:
    """`linear(act(gate) * up)`."""
    if _drops((linear,), (dropout_key,)) or _trained((linear,)):
        return linear(glu(gate_up.read(), activation=activation), keep, dropout_key)
    value, stack, index = gate_up
    y = glu_linear(
        value, _projection(linear), linear.scaling, activation=activation, stack=stack, index=index, keep=keep
    )
    return _finished(y, (linear,))


def runs_in_fp8(linears: Sequence[Linear], x: Float[Array, "B T K"], dropout_keys: Sequence[Array | None]) -> bool:
    """Whether `project_fp8_mlp` computes what these linears do: in fp8, without biases, dropout and magnitudes."""
    weights = [m.weight.get_value() for m in linears]
    plain = all(m.bias is None and m.lora_bias is None and m.magnitude is None for m in linears) and not _drops(
        linears, dropout_keys
    )
    return plain and fp8.takes(x.size // x.shape[-1], weights)


def project_fp8_mlp(
    norm: "RMSNorm", linears: Sequence[Linear], slot: Slot, keep: Keep, activation: Activation = "silu"
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """`down(act(gate(n)) * up(n))` with n = norm(x), in fp8; and x again. linears: gate, up, down."""
    projections, scalings = [_projection(m) for m in linears], [m.scaling for m in linears]
    normed = Norm(norm.eps, norm.plus_one)
    x, stack, at = slot
    return fp8_mlp(x, norm.weight.get_value(), normed, projections, scalings, keep, activation, stack=stack, at=at)


def _projection(linear: Linear) -> Projection:
    if not linear.adapted:
        return Projection(linear.weight.get_value())
    a, b = linear.lora_A.get_value(), linear.lora_B.get_value()
    if linear.start_A is not None:
        a = jnp.concatenate([a, linear.start_A.get_value()])
        b = jnp.concatenate([b, -linear.start_B.get_value()], axis=1)
    if linear.row_scaling is not None:
        b = b * linear.row_scaling.get_value()
    return Projection(linear.weight.get_value(), a, b)


def _through_dropped(
    linears: Sequence[Linear], x: Float[Array, "B T K"], dropped: Sequence[Array | None], keep: Keep
) -> Float[Array, "B T N"]:
    """As PEFT's DoRA has it, whose base product reads the dropped input d as the adapter does, with the factor c of
    `column_factor`: W (x - d) + c (W d + scaling B A d)."""
    out = []
    for m, d in zip(linears, dropped, strict=True):
        if m.magnitude is None or d is None:
            y = lora_linear(x, [_projection(m)], [m.scaling], None if d is None else [d], keep)
            out.append(_scaled((m,), y))
        else:
            y = _scaled((m,), lora_linear(d, [_projection(m)], [m.scaling], None, keep))
            out.append(y + lora_linear(x - d, [Projection(m.weight.get_value())], [1.0], None, keep))
    return jnp.concatenate(out, axis=-1)


def _scaled(linears: Sequence[Linear], y: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
    """y with DoRA's magnitudes in place of the weights' own, where there are some."""
    if all(m.magnitude is None for m in linears):
        return y
    factors = []
    for m in linears:
        weight, a, b = _projection(m)
        if m.magnitude is None:
            factors.append(jnp.ones(weight.shape[0], jnp.float32))
            continue
        factor = column_factor(weight, a, b * m.scaling, m.magnitude.get_value())
        factors.append(factor if m.has_magnitude is None else jnp.where(m.has_magnitude.get_value(), factor, 1.0))
    return (y * jnp.concatenate(factors)).astype(y.dtype)


def _finished(y: Float[Array, "B T N"], linears: Sequence[Linear]) -> Float[Array, "B T N"]:
    return _with_biases(_scaled(linears, y), linears)


def _with_biases(y: Float[Array, "B T N"], linears: Sequence[Linear]) -> Float[Array, "B T N"]:
    if all(m.bias is None and m.lora_bias is None for m in linears):
        return y
    if any(isinstance(m.bias, nnx.Param) for m in linears):  # in 16 bits the gradient would be a sum of 16 bits
        return (y + jnp.concatenate([_bias_of(m, jnp.float32) for m in linears])).astype(y.dtype)
    return y + jnp.concatenate([_bias_of(m, y.dtype) for m in linears])


def _bias_of(linear: Linear, dtype) -> Float[Array, "N"]:
    n = linear.weight.get_value().shape[0]
    bias = jnp.zeros(n, dtype) if linear.bias is None else linear.bias.get_value().astype(dtype)
    if linear.lora_bias is None:
        return bias
    factor = linear.scaling if linear.row_scaling is None else linear.row_scaling.get_value()
    return (bias.astype(jnp.float32) + factor * linear.lora_bias.get_value()).astype(dtype)


def _drops(linears: Sequence[Linear], keys: Sequence[Array | None]) -> bool:
    """Does any of these adapters read its input through dropout?"""
    return any(key is not None and m.dropout > 0.0 and m.adapted for m, key in zip(linears, keys, strict=True))


def _trained(linears: Sequence[Linear]) -> bool:
    """Do the weights themselves train (full fine-tuning)?"""
    return any(isinstance(m.weight, nnx.Param) for m in linears)


def drop(x: Float[Array, "*B K"], rate: float, key: Array) -> Float[Array, "*B K"]:
    """Dropout: zeros at `rate`, the rest scaled up."""
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`weight * x / rms(x)`, or with `plus_one` `(1 + weight) * x / rms(x)`; weight [L, D]."""

    def __init__(self, weight, eps: float, plus_one: bool = False):
        self.weight = Frozen(weight)
        self.eps, self.plus_one = eps, plus_one

    @property
    def trained(self) -> bool:
        return isinstance(self.weight, nnx.Param)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.weight.get_value(), eps=self.eps, plus_one=self.plus_one, train_weight=self.trained)


class LayerNorm(nnx.Module):
    """`weight * (x - mean(x)) / std(x) + bias`; weight and bias [L, D], the bias may be None."""

    def __init__(self, weight, bias, eps: float):
        self.weight = Frozen(weight)
        self.bias = nnx.data(None if bias is None else Frozen(bias))
        self.eps = eps

    @property
    def trained(self) -> bool:
        return isinstance(self.weight, nnx.Param)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        bias = None if self.bias is None else self.bias.get_value()
        return layer_norm(x, self.weight.get_value(), bias, eps=self.eps, train_weight=self.trained)


def make_norm(config: DecoderConfig, load, path: str, width: int) -> RMSNorm | LayerNorm:
    """The kind of norm that this decoder has, with the weights at `path`."""
    weight = load(f"{path}.weight", (width,))
    if config.norm == "layer":
        bias = load(f"{path}.bias", (width,)) if config.norm_bias else None
        return LayerNorm(weight, bias, config.rms_norm_eps)
    return RMSNorm(weight, config.rms_norm_eps, plus_one=config.norm == "rms_plus_one")


class Embedding(nnx.Module):
    """`weight[ids] + scaling * (B A)^T[ids]`; weight [V, D], A float32 [R, V] and B float32 [D, R] where adapted.

    `tokens` float32 [n, D] are trained rows, of the vocabulary's tokens `token_rows`, that stand in the weight's place.
    """

    def __init__(self, weight):
        self.weight = Frozen(weight)
        self.lora_embedding_A, self.lora_embedding_B = nnx.data(None), nnx.data(None)
        self.tokens = nnx.data(None)
        self.token_rows: tuple[int, ...] | None = None
        self.scaling = 1.0

    @property
    def adapted(self) -> bool:
        return self.lora_embedding_A is not None

    def __call__(self, ids: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        weight = self.weight.get_value()
        x = weight[ids].astype(dtype)
        if self.tokens is not None:
            count = len(self.token_rows)
            place = jnp.full(weight.shape[0], count).at[jnp.array(self.token_rows)].set(jnp.arange(count))[ids]
            own = self.tokens.get_value()[jnp.minimum(place, count - 1)].astype(dtype)
            return jnp.where((place < count)[..., None], own, x)
        if not self.adapted:
            return x
        a, b = self.lora_embedding_A.get_value(), self.lora_embedding_B.get_value()
        return x + (contract(a.T[ids], b, 2, 1, jnp.float32) * self.scaling).astype(dtype)


def _scatter(leaf: Float[Array, "r ..."], rows: tuple[int, ...], count: int) -> Float[Array, "L ..."]:
    return jnp.zeros((count, *leaf.shape[1:]), leaf.dtype).at[jnp.array(rows)].set(leaf)
