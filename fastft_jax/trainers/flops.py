"""How much arithmetic a training step needs, for model-FLOPs utilisation."""

import jax
import numpy as np
from flax import nnx

from fastft_jax.models.config import DecoderConfig


def active_parameters(config: DecoderConfig, trainable: nnx.State) -> float:
    """How many trained values a token meets: of those of experts, the share that its own have."""
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainable):
        in_experts = any(getattr(key, "key", None) == "experts" for key in path)
        total += leaf.size * (config.experts.top_k / config.experts.num_experts if in_experts else 1)
    return total


def useful_flops(
    config: DecoderConfig, batch: dict[str, np.ndarray], trainable: float, *, full_finetuning: bool = False
) -> float:
    """FLOPs of one step on a batch, recomputation not counted.

    Frozen matrices cost 2 a weight and token forward and 2 backward (no weight gradient), trained ones 6; attention
    costs 4 N H a visible key forward (H: a key's and a value's width, averaged) and 2.5 times that backward; the head
    counts as frozen. In full fine-tuning every matrix, the head among them, costs 6. Of experts only those count that a
    token goes to; `trainable` is what `active_parameters` says.
    """
    c = config
    real = batch["segment_ids"] > 0
    tokens = int(real.sum())
    attention_width = c.num_attention_heads * (c.head_dim + c.value_dim) / 2
    qkvo = _attention(c)
    mlps = sum(_mlp(c, kind.sparse) for kind in c.layer_kinds)
    linears = c.num_hidden_layers * qkvo + mlps + c.vocab_size * c.hidden_size
    keys = batch["positions"][real].astype(np.int64) + 1
    seen = {window: int(np.minimum(keys, window or keys.max(initial=0)).sum()) for window in set(c.layer_windows)}
    visible = sum(seen[window] for window in c.layer_windows)
    weights = 6.0 * linears if full_finetuning else 4.0 * linears + 6.0 * trainable
    return weights * tokens + 14.0 * attention_width * visible


def _attention(config: DecoderConfig) -> int:
    """Weights of a layer's attention."""
    c, m = config, config.latent
    if m is None:
        return c.hidden_size * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    heads, width = c.num_attention_heads, c.hidden_size
    query = heads * c.head_dim * (m.q_rank or width) + (m.q_rank or 0) * width
    kv = width * (m.kv_rank + m.rope_dim) + m.kv_rank * heads * (m.nope_dim + m.value_dim)
    return query + kv + heads * m.value_dim * width


def _mlp(config: DecoderConfig, sparse: bool) -> int:
    """Weights of a layer's feed-forward part that a token meets."""
    c, e = config, config.experts
    if not sparse:
        return (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size
    shared = e.shared_intermediate_size
    routed = 3 * c.hidden_size * e.intermediate_size * e.top_k + c.hidden_size * e.num_experts
    gate = c.hidden_size if e.shared_gate else 0
    return routed if shared is None else routed + 3 * c.hidden_size * shared + gate
