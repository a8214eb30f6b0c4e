"""The decoder's small modules: containers of arrays with one equation each.

Variables say what may be trained: `Frozen` never has a gradient; `nnx.LoRAParam` and `nnx.Param` always do. Inside the
decoder every layer's arrays are stacked over the layers of one place, `[L, ...]`, and lax.scan slices that axis away
before any of these modules is called.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.pallas_kernels.rms_norm import rms_norm
from fastft_jax.quant.matmul import lora, matmul


class Frozen(nnx.Variable):
    """An array (or quantised array) of the base model: read, never differentiated, never donated."""


class Linear(nnx.Module):
    """`y = x W^T + b + scaling * (dropout(x) A^T) B^T`; W frozen (plain or NF4), A and B float32 (LoRA as in PEFT).

    weight [L, N, K]; bias [L, N]; lora_A [r, R, K] and lora_B [r, N, R], where r rows of the stack are adapted:
    `adapted_rows` names them, None for all. `trained_bias` replaces the bias of those rows.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, weight, bias=None):
        self.weight = Frozen(weight)
        # nnx.data(None): attributes that may hold a variable later
        self.bias = nnx.data(None if bias is None else Frozen(bias))
        self.lora_A, self.lora_B, self.trained_bias = nnx.data(None), nnx.data(None), nnx.data(None)
        self.scaling, self.dropout = 1.0, 0.0
        self.adapted_rows: tuple[int, ...] | None = None
        self.trained_bias_rows: tuple[int, ...] | None = None

    @property
    def adapted(self) -> bool:
        return self.lora_A is not None

    def expand(self, rows: int) -> None:
        """Give every layer of the stack its own slice: zeros where a layer has no adapter, so scan sees one shape."""
        if self.adapted and self.adapted_rows is not None:
            self.lora_A, self.lora_B = (
                nnx.LoRAParam(_scatter(leaf[...], self.adapted_rows, rows)) for leaf in (self.lora_A, self.lora_B)
            )
        if self.trained_bias is not None:
            trained = self.trained_bias[...]
            if self.trained_bias_rows is not None:
                trained = self.bias[...].astype(trained.dtype).at[jnp.array(self.trained_bias_rows)].set(trained)
            self.bias, self.trained_bias = nnx.Param(trained), None

    def __call__(self, x: Float[Array, "B T K"], dropout_key: Array | None = None) -> Float[Array, "B T N"]:
        y = matmul(x, self.weight.get_value())
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        if self.adapted:
            y = y + lora(self._drop(x, dropout_key), self.lora_A.get_value(), self.lora_B.get_value(), self.scaling)
        return y

    def _drop(self, x: Float[Array, "B T K"], key: Array | None) -> Float[Array, "B T K"]:
        if key is None or self.dropout == 0.0:
            return x
        kept = jax.random.bernoulli(key, 1.0 - self.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - self.dropout), 0).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`weight * x / rms(x)`; weight [L, D]."""

    def __init__(self, weight, eps: float):
        self.weight = Frozen(weight)
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.weight.get_value(), eps=self.eps)


class Embedding(nnx.Module):
    """`weight[ids]`; weight [V, D]."""

    def __init__(self, weight):
        self.weight = Frozen(weight)

    def __call__(self, ids: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        return self.weight.get_value()[ids].astype(dtype)


def _scatter(leaf: Float[Array, "r ..."], rows: tuple[int, ...], count: int) -> Float[Array, "L ..."]:
    return jnp.zeros((count, *leaf.shape[1:]), leaf.dtype).at[jnp.array(rows)].set(leaf)
