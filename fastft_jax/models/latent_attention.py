"""Multi-head latent attention in the form for training: keys and values of every head are written out.

(The other form multiplies queries into the latent and keeps that in the cache: less memory for generation, and a dot
product three times as wide.)
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.models.attention import KVCache, Sequence
from fastft_jax.models.config import DecoderConfig, LayerKind
from fastft_jax.models.layers import LayerNorm, Linear, RMSNorm, project_normed
from fastft_jax.models.residuals import Keep, Slot
from fastft_jax.pallas_kernels.attention import attention
from fastft_jax.pallas_kernels.rope import apply_rope

LATENT_EPS = 1e-6  # of the latents' norms, whatever the config's rms_norm_eps (as in the publisher's code)


class LatentAttention(nnx.Module):
    """`softmax(scale q k^T) v`, causal, k and v expanded from one latent c a token.

    With n = norm(x): q = q_b(rms(q_a(n))), or q_proj(n) without a latent for queries; [c, r] = kv_a(n); a head's
    [k', v] = kv_b(rms(c)), k = [k', rope(r)] with the r that all heads share, and of q the last part is rotated.
    Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
    """

    def __init__(self, config: DecoderConfig, load, kind: LayerKind):
        c, m, d = config, config.latent, config.hidden_size
        self.config, self.num_heads, self.head_dim = m, c.num_attention_heads, c.head_dim
        n = self.num_heads * self.head_dim

        def norm(name: str, width: int) -> RMSNorm:
            return RMSNorm(load(f"self_attn.{name}.weight", (width,)), LATENT_EPS)

        if m.q_rank is None:
            self.q_proj = load.linear("self_attn.q_proj", n, d, False)
        else:
            self.q_a_proj = load.linear("self_attn.q_a_proj", m.q_rank, d, c.qkv_bias)
            self.q_a_layernorm = norm("q_a_layernorm", m.q_rank)
            self.q_b_proj = load.linear("self_attn.q_b_proj", n, m.q_rank, False)
        self.kv_a_proj_with_mqa = load.linear("self_attn.kv_a_proj_with_mqa", m.kv_rank + m.rope_dim, d, c.qkv_bias)
        self.kv_a_layernorm = norm("kv_a_layernorm", m.kv_rank)
        expanded = self.num_heads * (m.nope_dim + m.value_dim)
        self.kv_b_proj = load.linear("self_attn.kv_b_proj", expanded, m.kv_rank, False)
        self.o_proj = load.linear("self_attn.o_proj", d, self.num_heads * m.value_dim, c.o_bias)
        self.scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        self.softcap, self.window, self.rope = c.attention_softcap, kind.window, kind.rope
        self.interleaved = c.rope_interleaved

    def __call__(
        self,
        x: Slot,
        norm: RMSNorm | LayerNorm | None,
        seq: Sequence,
        keep: Keep,
        cache: KVCache | None = None,
        keys: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], KVCache | None]:
        """As `Attention`'s."""
        m, drop = self.config, (None,) * 5 if keys is None else keys
        first: Linear = self.q_proj if m.q_rank is None else self.q_a_proj
        latents, x = project_normed(norm, (first, self.kv_a_proj_with_mqa), x, keep, drop[:2])
        latents = keep("latent", latents)
        q, c, r = jnp.split(latents, (latents.shape[-1] - m.kv_rank - m.rope_dim, latents.shape[-1] - m.rope_dim), -1)
        if m.q_rank is not None:
            q, _ = project_normed(self.q_a_layernorm, (self.q_b_proj,), Slot(q), keep, drop[2:3])
        kv, _ = project_normed(self.kv_a_layernorm, (self.kv_b_proj,), Slot(c), keep, drop[4:])
        q = keep("q", self._with_rotation(*self._parts(q, m.rope_dim), seq))
        k, v = self._parts(kv, m.value_dim)
        k, v = keep("k", self._with_rotation(k, r[:, :, None], seq)), keep("v", v)
        if cache is not None:
            at = (0, seq.q_offset, 0, 0)
            k = jax.lax.dynamic_update_slice(cache.k, k.astype(cache.k.dtype), at)
            v = jax.lax.dynamic_update_slice(cache.v, v.astype(cache.v.dtype), at)
            cache = KVCache(k, v)
        # Values are narrower than keys (128 against 192), which the attention kernels, cuDNN's through jax among them,
        # do not take: zeros fill them up. That is a fifth more arithmetic, and keeps the fast path.
        out = attention(
            q,
            k,
            jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, self.head_dim - m.value_dim))),
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            q_segment_ids=seq.segment_ids,
            kv_segment_ids=seq.segment_ids if cache is None else seq.kv_segment_ids,
            q_offset=seq.q_offset,
            max_segments=seq.max_segments,
            max_document_length=seq.max_document_length,
            keep=keep,
        )[..., : m.value_dim]
        return self.o_proj(out.reshape(*x.shape[:2], -1), keep, drop[3]), x, cache

    def _parts(self, y: Float[Array, "B T N"], last: int) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
        """Heads cut in two, the second part `last` wide."""
        heads = y.reshape(*y.shape[:2], self.num_heads, -1)
        return heads[..., :-last], heads[..., -last:]

    def _with_rotation(
        self, head: Float[Array, "B T N P"], rotated: Float[Array, "B T n Q"], seq: Sequence
    ) -> Float[Array, "B T N H"]:
        """The two parts of a head, the second one rotated first; it may be one for all heads."""
        if self.interleaved:  # even elements before odd ones: q k^T is the same in any order
            pairs = rotated.reshape(*rotated.shape[:3], -1, 2)
            rotated = jnp.swapaxes(pairs, -1, -2).reshape(rotated.shape)
        rotated = apply_rope(rotated, *seq.tables[self.rope])
        rotated = jnp.broadcast_to(rotated, (*head.shape[:3], rotated.shape[-1]))
        return jnp.concatenate([head, rotated], axis=-1)
