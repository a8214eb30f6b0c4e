"""Grouped-query self-attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.layers import RMSNorm, project_normed
from fastft_jax.models.residuals import Keep
from fastft_jax.pallas_kernels.attention import attention
from fastft_jax.pallas_kernels.rope import rope_qkv


class Sequence(NamedTuple):
    """What attention must know of a batch besides its activations; the same for every layer."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]
    segment_ids: Int[Array, "B T"] | None = None  # documents in a row, 1.., 0 for padding; None: one document a row
    max_segments: int | None = None  # static bounds on the documents in a row and on their tokens, for kernels that
    max_document_length: int | None = None  # want them
    kv_segment_ids: Int[Array, "B S"] | None = None  # the same for cached keys; None: the keys are this call's
    q_offset: Int[Array, ""] | int = 0  # index in the cache of this call's first token


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, of one layer (or stacked over layers)."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class Attention(nnx.Module):
    """`softmax(q k^T / sqrt(H)) v`, causal, with rotary positions; optional q/k RMSNorm per head (Qwen3).

    Source: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries).
    """

    def __init__(self, config: DecoderConfig, load, window: int | None):
        c = config
        n, k, d = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
        self.q_proj = load.linear("self_attn.q_proj", n, d, c.qkv_bias)
        self.k_proj = load.linear("self_attn.k_proj", k, d, c.qkv_bias)
        self.v_proj = load.linear("self_attn.v_proj", k, d, c.qkv_bias)
        self.o_proj = load.linear("self_attn.o_proj", d, n, c.o_bias)
        self.q_norm = RMSNorm(load("self_attn.q_norm.weight", (c.head_dim,)), c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(load("self_attn.k_norm.weight", (c.head_dim,)), c.rms_norm_eps) if c.qk_norm else None
        self.num_heads, self.num_kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim, self.window = c.head_dim, window

    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RMSNorm,
        seq: Sequence,
        keep: Keep,
        cache: KVCache | None = None,
        keys: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], KVCache | None]:
        """Attention over norm(x), x for the residual connection, and the cache with this call's keys and values
        written at `seq.q_offset`."""
        drop = (None,) * 4 if keys is None else keys
        qkv, x = project_normed(norm, (self.q_proj, self.k_proj, self.v_proj), x, keep, drop[:3])
        q, k, v = rope_qkv(
            qkv,
            seq.cos,
            seq.sin,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm=None if self.q_norm is None else self.q_norm.weight.get_value(),
            k_norm=None if self.k_norm is None else self.k_norm.weight.get_value(),
            eps=None if self.q_norm is None else self.q_norm.eps,
        )
        q, k, v = keep("q", q), keep("k", k), keep("v", v)
        if cache is not None:
            at = (0, seq.q_offset, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), at)
            v = jax.lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), at)
            cache = KVCache(k, v)
        out = attention(
            q,
            k,
            v,
            scale=self.head_dim**-0.5,
            window=self.window,
            q_segment_ids=seq.segment_ids,
            kv_segment_ids=seq.segment_ids if cache is None else seq.kv_segment_ids,
            q_offset=seq.q_offset,
            max_segments=seq.max_segments,
            max_document_length=seq.max_document_length,
            keep=keep,
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), keep, drop[3]), x, cache


def positions_of(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token within its document: counts from 0 where the segment id changes."""
    index = jnp.arange(segment_ids.shape[1])[None]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
