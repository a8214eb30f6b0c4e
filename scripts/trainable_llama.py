"""A Llama's forward pass that has a gradient for every weight: for the scripts that train one from random weights.

`models.decoder.Decoder` freezes its base: its ops give the gradients of adapters alone. So the pass is written out here
from the ops that differentiate in all of their inputs. Weights are a dict by the decoder's paths, those of layers
stacked [L, ...], which `Decoder(config, lambda path, shape, layers: weights[path], dtype)` takes too.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fastft_jax.convert.hf import Request, tensor_requests
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.rope import rope_tables
from fastft_jax.pallas_kernels.attention import attention
from fastft_jax.pallas_kernels.glu import glu
from fastft_jax.pallas_kernels.rms_norm import rms_norm
from fastft_jax.pallas_kernels.rope import rope_qkv

Weights = dict[str, Float[Array, "..."]]


def weight_requests(config: DecoderConfig) -> list[Request]:
    """Path, shape and layers of every weight, in the decoder's order; ValueError for anything but a plain Llama."""
    free = ("tie_word_embeddings",)
    fields = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    found = [f.name for f in fields if f.name not in free and getattr(config, f.name) != f.default]
    found += ["sliding windows"] if any(config.layer_windows) else []
    if found:
        raise ValueError(f"a plain Llama has no {', '.join(found)}")
    return list(tensor_requests(config))


def hidden_states(
    config: DecoderConfig, weights: Weights, ids: Int[Array, "B T"], dtype: jnp.dtype
) -> Float[Array, "B T D"]:
    """Final hidden states, after the last norm, of rows that are one document each; computed in `dtype`.

    As `Decoder.hidden_states(ids)` with these weights in `dtype`. Raises ValueError as `weight_requests` does.
    """
    c, in_layers = config, [request.path for request in weight_requests(config) if request.layers is not None]
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    cos, sin = rope_tables(c.rope, c.head_dim, positions)
    heads = dict(num_heads=c.num_attention_heads, num_kv_heads=c.num_key_value_heads, head_dim=c.head_dim)

    def norm(x, weight):
        return rms_norm(x, weight.astype(dtype), eps=c.rms_norm_eps, train_weight=True)

    def layer(x, w):
        def project(x, *names):
            return x @ jnp.concatenate([w[f"{name}.weight"].astype(dtype) for name in names]).T

        normed = norm(x, w["input_layernorm.weight"])
        qkv = project(normed, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        q, k, v = rope_qkv(qkv, cos, sin, **heads)
        out = attention(q, k, v, scale=c.head_dim**-0.5)
        x = x + project(out.reshape(*x.shape[:2], -1), "self_attn.o_proj")
        gate_up = project(norm(x, w["post_attention_layernorm.weight"]), "mlp.gate_proj", "mlp.up_proj")
        return x + project(glu(gate_up), "mlp.down_proj"), None

    x = weights["embed_tokens.weight"][ids].astype(dtype)
    x, _ = jax.lax.scan(layer, x, {path: weights[path] for path in in_layers})
    return norm(x, weights["norm.weight"])
