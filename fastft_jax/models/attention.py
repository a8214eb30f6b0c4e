"""Grouped-query self-attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fastft_jax.models.config import DecoderConfig, LayerKind
from fastft_jax.models.layers import Frozen, LayerNorm, Linear, RMSNorm, project_normed
from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.pallas_kernels.attention import attention
from fastft_jax.pallas_kernels.rope import rope_qkv


class Sequence(NamedTuple):
    """What attention must know of a batch besides its activations; the same for every layer."""

    # cos and sin of each of the decoder's rotations; P elements of a head are rotated
    tables: tuple[tuple[Float[Array, "B T P/2"], Float[Array, "B T P/2"]], ...]
    segment_ids: Int[Array, "B T"] | None = None  # documents in a row, 1.., 0 for padding; None: one document a row
    max_segments: int | None = None  # static bounds on the documents in a row and on their tokens, for kernels that
    max_document_length: int | None = None  # want them
    kv_segment_ids: Int[Array, "B S"] | None = None  # the same for cached keys; None: the keys are this call's
    q_offset: Int[Array, ""] | int = 0  # index in the cache of this call's first token
    counted: Bool[Array, "B T"] | None = None  # the tokens over which routers report their load; None: they do not


class KVCache(NamedTuple):
    """Keys and values of earlier tokens, of one layer (or stacked over layers)."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class Attention(nnx.Module):
    """`softmax(scale q k^T) v`, causal, with rotary positions; optional RMSNorm of q and k, per head or of all at once.

    sinks [L, N], where there are some, are logits in the softmax's denominator only; they train in full
    fine-tuning alone.
    Sources: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries); Xiao et al. 2023, arXiv:2309.17453 (sinks).
    """

    def __init__(self, config: DecoderConfig, load, kind: LayerKind):
        c = config
        n, k, d = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.hidden_size
        self.fused, self.grouped = c.fused_projections or c.grouped_qkv, c.grouped_qkv
        if self.fused:
            self.qkv_proj = load.linear("self_attn.qkv_proj", n + 2 * k, d, c.qkv_bias)
        else:
            self.q_proj = load.linear("self_attn.q_proj", n, d, c.qkv_bias)
            self.k_proj = load.linear("self_attn.k_proj", k, d, c.qkv_bias)
            self.v_proj = load.linear("self_attn.v_proj", k, d, c.qkv_bias)
        self.o_proj = load.linear("self_attn.o_proj", d, n, c.o_bias)
        sinks = Frozen(load("self_attn.sinks", (c.num_attention_heads,))) if c.attention_sinks else None
        self.sinks = nnx.data(sinks)

        def qk_norm(name: str, width: int) -> RMSNorm | None:
            if c.qk_norm is None:
                return None
            weight = load(f"self_attn.{name}.weight", (c.head_dim if c.qk_norm == "head" else width,))
            return RMSNorm(weight, c.rms_norm_eps, plus_one=c.norm == "rms_plus_one")

        self.q_norm, self.k_norm, self.qk_norm = qk_norm("q_norm", n), qk_norm("k_norm", k), c.qk_norm
        self.num_heads, self.num_kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        self.softcap, self.window, self.rope = c.attention_softcap, kind.window, kind.rope
        self.interleaved = c.rope_interleaved

    @property
    def _projections(self) -> tuple[Linear, ...]:
        return (self.qkv_proj,) if self.fused else (self.q_proj, self.k_proj, self.v_proj)

    def __call__(
        self,
        x: Slot,
        norm: RMSNorm | LayerNorm | None,
        seq: Sequence,
        keep: Keep,
        cache: KVCache | None = None,
        keys: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], KVCache | None]:
        """Attention over norm(x) (over x without a norm), x for the residual connection, and the cache with this
        call's keys and values written at `seq.q_offset`."""
        drop = (None,) * 4 if keys is None else keys
        linears = self._projections
        qkv, x = project_normed(norm, linears, x, keep, drop[: len(linears)])
        slot = self._kept(qkv, keep)
        by_head = self.qk_norm == "head"
        trained = by_head and self.q_norm.trained
        q, k, v = rope_qkv(
            slot.read() if trained else slot.value,
            *seq.tables[self.rope],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm=self.q_norm.weight.get_value() if by_head else None,
            k_norm=self.k_norm.weight.get_value() if by_head else None,
            eps=self.q_norm.eps if by_head else None,
            plus_one=by_head and self.q_norm.plus_one,
            train_weight=trained,
            stack=None if trained else slot.stack,
            index=None if trained else slot.index,
        )
        if not keep.keeps("qkv"):
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
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            q_segment_ids=seq.segment_ids,
            kv_segment_ids=seq.segment_ids if cache is None else seq.kv_segment_ids,
            q_offset=seq.q_offset,
            max_segments=seq.max_segments,
            max_document_length=seq.max_document_length,
            sinks=None if self.sinks is None else self.sinks.get_value(),
            keep=keep,
        )
        return self.o_proj(out.reshape(*x.shape[:2], -1), keep, drop[3]), x, cache

    def _kept(self, qkv: Float[Array, "B T N"], keep: Keep) -> Slot:
        """The projections as kept for the backward pass, then all queries, all keys and all values, as rope reads
        them, with a norm over whole projections applied."""
        if not self.grouped and self.qk_norm != "projection" and not self.interleaved:
            return keep.slot("qkv", qkv)
        qkv = keep("qkv", qkv)
        if self.grouped:
            qkv = self._ungrouped(qkv)
        if self.qk_norm == "projection":
            qkv = self._norm_whole(qkv)
        return Slot(self._halves(qkv) if self.interleaved else qkv)

    def _ungrouped(self, qkv: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
        """[K, N / K + 2, H], of each key head its queries, it and its value -> all queries, all keys, all values."""
        queries = self.num_heads // self.num_kv_heads
        groups = qkv.reshape(*qkv.shape[:2], self.num_kv_heads, queries + 2, self.head_dim)
        parts = jnp.split(groups, (queries, queries + 1), axis=3)
        return jnp.concatenate([part.reshape(*qkv.shape[:2], -1) for part in parts], axis=-1)

    def _norm_whole(self, qkv: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
        """RMSNorm over all query heads at once, and over all key heads."""
        n, k = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, key, v = jnp.split(qkv, (n, n + k), axis=-1)
        return jnp.concatenate([self.q_norm(q), self.k_norm(key), v], axis=-1)

    def _halves(self, qkv: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
        """Query and key heads with their even elements before the odd ones: q k^T is the same in any order."""
        wide = (self.num_heads + self.num_kv_heads) * self.head_dim
        qk, v = jnp.split(qkv, (wide,), axis=-1)
        pairs = qk.reshape(*qk.shape[:2], -1, self.head_dim // 2, 2)
        return jnp.concatenate([jnp.swapaxes(pairs, -1, -2).reshape(qk.shape), v], axis=-1)


def positions_of(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token within its document: counts from 0 where the segment id changes."""
    index = jnp.arange(segment_ids.shape[1])[None]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
