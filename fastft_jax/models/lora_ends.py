"""Adapters of the decoder's two ends, the embedding and the head, which are not stacked: LoRA, and trained tokens."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import Linear


def adapt_head(
    decoder: Decoder, *, r: int, scaling: float, dropout: float = 0.0, init: bool | str = True, seed: int = 3407
) -> None:
    """LoRA on the head, in place; A and B start as in `add_lora`. A tied head becomes one of its own that shares the
    embedding's array, so the embedding itself stays as it is (as PEFT has it)."""
    if decoder.lm_head is None:
        decoder.lm_head = Linear(decoder.embed_tokens.weight.get_value())
    v, d = decoder.lm_head.weight.get_value().shape
    keys = jax.random.split(jax.random.key(seed ^ 0x4EAD))
    bound = 1 / math.sqrt(d)
    a = jax.random.normal(keys[0], (r, d)) / r
    if init != "gaussian":
        a = jax.random.uniform(keys[0], (r, d), minval=-bound, maxval=bound)
    b = jnp.zeros((v, r))
    if init is False:
        b = jax.random.uniform(keys[1], (v, r), minval=-1, maxval=1) / math.sqrt(r)
    decoder.lm_head.lora_A, decoder.lm_head.lora_B = nnx.LoRAParam(a), nnx.LoRAParam(b)
    decoder.lm_head.scaling, decoder.lm_head.dropout = scaling, dropout


def adapt_embedding(decoder: Decoder, *, r: int, scaling: float, init: bool | str = True, seed: int = 3407) -> None:
    """LoRA on the embedding, in place: A = 0, B ~ N(0, 1), as in PEFT; with init False both are normal. It has no
    dropout there either."""
    v, d = decoder.embed_tokens.weight.get_value().shape
    keys = jax.random.split(jax.random.key(seed ^ 0xE4BED))
    a = jax.random.normal(keys[0], (r, v)) if init is False else jnp.zeros((r, v))
    embedding = decoder.embed_tokens
    embedding.lora_embedding_A = nnx.LoRAParam(a)
    embedding.lora_embedding_B = nnx.LoRAParam(jax.random.normal(keys[1], (d, r)))
    embedding.scaling = scaling


def train_tokens(decoder: Decoder, rows: Sequence[int]) -> None:
    """The embedding's rows of these tokens train (PEFT's trainable_token_indices), in place, from what they are; a tied
    head has them, too."""
    embedding = decoder.embed_tokens
    values = embedding.weight.get_value()[jnp.array(rows)].astype(jnp.float32)
    embedding.tokens, embedding.token_rows = nnx.Param(values), tuple(rows)


def trained_ends(decoder: Decoder, names: NameTable) -> dict[str, nnx.Variable]:
    """The trained leaves of the two ends by their names in Hugging Face's module tree."""
    out: dict[str, nnx.Variable] = {}
    embedding, head = decoder.embed_tokens, decoder.lm_head
    if embedding.adapted:
        path = names.hf_name("embed_tokens.weight").removesuffix(".weight")
        out[f"{path}.lora_embedding_A"] = embedding.lora_embedding_A
        out[f"{path}.lora_embedding_B"] = embedding.lora_embedding_B
    if embedding.tokens is not None:
        path = names.hf_name("embed_tokens.weight").removesuffix(".weight")
        out[f"{path}.token_adapter.trainable_tokens_delta"] = embedding.tokens
    if head is not None and head.adapted:
        path = names.hf_name("lm_head.weight").removesuffix(".weight")
        out[f"{path}.lora_A.weight"] = head.lora_A
        out[f"{path}.lora_B.weight"] = head.lora_B
    return out
