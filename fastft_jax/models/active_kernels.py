"""Which implementation of each operation a decoder would use on a card, and why not a faster one.

The operations are asked themselves, by the rules that they follow when they run.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from fastft_jax.models.compute_dtype import FP8_CAPABILITY
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.lora import layer_linears
from fastft_jax.pallas_kernels import attention, nf4, pallas, rms_norm
from fastft_jax.pallas_kernels.quantised_matmul import supported as few_rows_take
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.nf4 import NF4Array

ROWS, TOKENS, DOCUMENTS = 1, 4096, 16  # of the batch that is asked about

Matrix = tuple[tuple[int, int], int]  # shape [N, K] and how many layers are stacked


class Card(NamedTuple):
    """A JAX platform and, for NVIDIA GPUs, the compute capability."""

    platform: str
    capability: tuple[int, int] | None


class Active(NamedTuple):
    """The implementation that runs, and why each faster one does not (empty: it is the fastest)."""

    name: str
    why: tuple[str, ...] = ()


def active_kernels(config: DecoderConfig, matrices: list[Matrix], card: Card) -> dict[str, Active]:
    """operation -> implementation, for a bfloat16 decoder of this config with these NF4 matrices on that card."""
    with pallas.imagine(card.platform == "gpu"):
        default = Active("triton") if pallas.on_gpu() else Active("xla", ("the kernels need an NVIDIA GPU",))
        return {
            "attention": _attention(config, card, packed=False),
            "packed": _attention(config, card, packed=True),
            "norms": _norms(config, default),
            "rope": _rope(config, default),
            "mlp": default if config.gated_mlp else Active("xla", ("an MLP without gate has no kernel of its own",)),
            "nf4": _nf4(matrices, default),
            "decoding": _decoding(config, matrices, default),
            "loss": default,
            "fp8": _fp8(config, card),
        }


def base_in_use(decoder: Decoder) -> str:
    """How a decoder's linears are held, and what decodes them here: `nf4 triton`, `int8 xla`, `weights bfloat16`."""
    linears = [linear for segment in decoder.segments for place in segment for _, linear in layer_linears(place)]
    weights = [linear.weight.get_value() for linear in linears]
    if any(isinstance(w, Int8Array) for w in weights):
        return "int8 xla"
    codes = [w.codes for w in weights if isinstance(w, NF4Array)]
    if not codes:
        return f"weights {weights[0].dtype.name}{' (trained)' if isinstance(linears[0].weight, nnx.Param) else ''}"
    if not pallas.on_gpu():
        return "nf4 xla"
    copied = sum(not nf4.in_reach(each.size) for each in codes)
    return f"nf4 triton, {copied} of {len(codes)} stacks copied by layer (of 2 to 4 GiB)" if copied else "nf4 triton"


def _attention(c: DecoderConfig, card: Card, *, packed: bool) -> Active:
    if card.platform != "gpu":
        return Active("xla", ("the kernels need an NVIDIA GPU",))
    chosen = attention.select_implementation(
        q_shape=(ROWS, TOKENS, c.num_attention_heads, c.head_dim),
        kv_shape=(ROWS, TOKENS, c.num_key_value_heads, c.head_dim),
        dtype=jnp.bfloat16,
        softcap=c.attention_softcap,
        sinks=c.attention_sinks,
        packed=packed,
        max_segments=DOCUMENTS if packed else None,
        platform=card.platform,
        compute_capability=card.capability,
    )
    if c.value_dim < c.head_dim:
        padded = f"values of width {c.value_dim} are filled up with zeros to {c.head_dim}"
        return Active(chosen.name, (*chosen.reasons, padded))
    return Active(*chosen)


def _norms(c: DecoderConfig, default: Active) -> Active:
    name = rms_norm.select_implementation(c.hidden_size, False, None)
    if name != "triton":
        return Active(name, default.why or (f"rows of {c.hidden_size} are wider than the kernels take",))
    alone = c.norm == "layer" or c.block in ("post", "parallel")
    return Active(name, ("a kernel of its own, not one with the products after it",) if alone else ())


def _rope(c: DecoderConfig, default: Active) -> Active:
    if c.latent is not None:
        return Active("xla", default.why or ("latent attention's heads of two parts have no rope kernel",))
    notes = [
        "XLA sorts even and odd elements first" if c.rope_interleaved else None,
        "q/k norm over all heads is a pass of its own" if c.qk_norm == "projection" else None,
    ]
    return default._replace(why=default.why or tuple(note for note in notes if note))


def _nf4(matrices: list[Matrix], default: Active) -> Active:
    """The kernel decodes codes where they lie in a stack, but for stacks of 2 to 4 GiB and rows of parts of blocks."""
    if default.why:
        return default
    for (n, k), layers in matrices:
        if not nf4.in_reach(layers * n * k // 2):
            return Active(
                "triton", (f"{layers} matrices [{n}, {k}] are more than 2 GiB, up to 4: codes are copied by layer",)
            )
        if k % 64:
            return Active("triton", (f"[{n}, {k}] is not in whole blocks of 64: a copy more",))
    return default


def _decoding(c: DecoderConfig, matrices: list[Matrix], default: Active) -> Active:
    """Whether new tokens are multiplied with the 4-bit codes as they are."""
    if c.experts is not None and not default.why:
        return Active("triton", ("all experts of a layer are decoded in whole for a new token",))
    bad = [shape for shape, _ in matrices if not few_rows_take(1, shape, jnp.bfloat16)]
    if default.why or not bad:
        return default
    return Active("xla", (f"the few-row kernel does not take [{bad[0][0]}, {bad[0][1]}]",))


def _fp8(c: DecoderConfig, card: Card) -> Active:
    """Of the option compute_dtype: fp8."""
    if card.platform != "gpu":
        return Active("emulated", ("fp8 products need an NVIDIA GPU",))
    if card.capability is None or card.capability < FP8_CAPABILITY:
        return Active("no", ("fp8 needs compute capability 8.9",))
    fused = c.norm != "layer" and c.gated_mlp and not c.mlp_bias and c.block != "post"
    fused = fused and not (c.fused_projections or c.fused_gate_up)
    return Active("yes", () if fused and c.block != "parallel" else ("the MLP is not one fused operation",))
