"""How much arithmetic a training step needs, for model-FLOPs utilisation."""

import numpy as np

from fastft_jax.models.config import DecoderConfig


def useful_flops(
    config: DecoderConfig, batch: dict[str, np.ndarray], trainable: int, *, full_finetuning: bool = False
) -> float:
    """FLOPs of one step on a batch, recomputation not counted.

    Frozen matrices cost 2 a weight and token forward and 2 backward (no weight gradient), trained ones 6; attention
    costs 4 N H a visible key forward and 2.5 times that backward; the head counts as frozen. In full
    fine-tuning every matrix, the head among them, costs 6.
    """
    c = config
    real = batch["segment_ids"] > 0
    tokens = int(real.sum())
    attention_width = c.num_attention_heads * c.head_dim
    qkvo = c.hidden_size * (2 * attention_width + 2 * c.num_key_value_heads * c.head_dim)
    mlp = (3 if c.gated_mlp else 2) * c.hidden_size * c.intermediate_size
    linears = c.num_hidden_layers * (qkvo + mlp) + c.vocab_size * c.hidden_size
    keys = batch["positions"][real].astype(np.int64) + 1
    seen = {window: int(np.minimum(keys, window or keys.max(initial=0)).sum()) for window in set(c.layer_windows)}
    visible = sum(seen[window] for window in c.layer_windows)
    weights = 6.0 * linears if full_finetuning else 4.0 * linears + 6.0 * trainable
    return weights * tokens + 14.0 * attention_width * visible
