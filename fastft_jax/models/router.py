"""Which experts a token goes to, with what weight, and how evenly tokens are spread.

All from the router's logits, in float32 as transformers computes it. Noise that some models add while they are
pretrained (jitter, sampled experts) is left out.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fastft_jax.models.config import ExpertsConfig
from fastft_jax.models.remat import ROUTING
from fastft_jax.models.residuals import Keep


def route(
    logits: Float[Array, "M E"], config: ExpertsConfig, keep: Keep, correction: Float[Array, "E"] | None = None
) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
    """Weights (float32, differentiable) and indices of each token's `top_k` experts, the best one first.

    `correction` is added to the scores for the choice alone: it keeps the load even without a loss (Wang et al. 2024,
    arXiv:2408.15664).
    """
    scores = logits.astype(jnp.float32)
    if config.router == "sparsemixer":
        return _sparsemixer(scores, config.router_epsilon, keep)
    probabilities = jax.nn.sigmoid(scores) if config.router == "sigmoid" else jax.nn.softmax(scores, axis=-1)
    ranked = lax.stop_gradient(probabilities)
    ranked = ranked if correction is None else ranked + correction.astype(jnp.float32)
    if config.groups > 1:
        ranked = _of_the_best_groups(ranked, config)
    experts = keep(ROUTING, lax.top_k(ranked, config.top_k)[1])
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if config.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
    return (weights if config.scaling == 1.0 else weights * config.scaling), experts


def _of_the_best_groups(ranked: Float[Array, "M E"], config: ExpertsConfig) -> Float[Array, "M E"]:
    """-inf for experts outside of a token's best groups. A group is as good as its best expert ("softmax"; DeepSeek-V2,
    arXiv:2405.04434, section 2.2.2) or its best two together ("sigmoid"; DeepSeek-V3, arXiv:2412.19437, 2.1.2)."""
    grouped = ranked.reshape(ranked.shape[0], config.groups, -1)
    best = lax.top_k(grouped, 2 if config.router == "sigmoid" else 1)[0].sum(axis=-1)
    chosen = lax.top_k(best, config.top_groups)[1]
    inside = jnp.any(chosen[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(ranked.shape)


def _sparsemixer(
    scores: Float[Array, "M E"], epsilon: float, keep: Keep
) -> tuple[Float[Array, "M 2"], Int[Array, "M 2"]]:
    """Two experts, one after the other: each time the best of those left, weighted by its softmax among the near ones.

    Near means (best - score) / max(|score|, best) <= 2 epsilon. Source: Liu et al. 2024, arXiv:2409.12136, as
    transformers evaluates Phi-3.5-MoE.
    """
    _, experts = lax.top_k(lax.stop_gradient(scores), 2)
    experts = keep(ROUTING, experts)
    left, weights = scores, []
    for i in range(2):
        chosen = experts[:, i : i + 1]
        best = jnp.take_along_axis(left, chosen, axis=-1)
        far = (best - left) / jnp.maximum(jnp.abs(scores), best) > 2 * epsilon
        shares = jax.nn.softmax(jnp.where(lax.stop_gradient(far), -jnp.inf, left), axis=-1)
        weights.append(jnp.take_along_axis(shares, chosen, axis=-1))
        left = jnp.where(jnp.arange(scores.shape[1]) == chosen, -jnp.inf, left)
    return jnp.concatenate(weights, axis=-1), experts


def router_load(logits: Float[Array, "M E"], top_k: int, counted: Bool[Array, "M"]) -> Float[Array, "2 E"]:
    """How many of the counted tokens have each expert among their top_k, and the sum of its probabilities."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen = lax.top_k(lax.stop_gradient(probabilities), top_k)[1]
    picked = jnp.sum(jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32), axis=1)
    return jnp.sum(jnp.stack([picked, probabilities]) * counted[:, None], axis=1)


def load_balancing_loss(load: Float[Array, "2 E"], rows: Float[Array, ""]) -> Float[Array, ""]:
    """E sum_e f_e p_e over all sparse layers: f_e the share of rows that picked e, p_e its mean probability.

    `load` is the sum of `router_load` over layers, `rows` the counted tokens times those layers. It is top_k where the
    load is even. Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, over layers as transformers does.
    """
    picked, probability = load / rows
    return load.shape[1] * jnp.sum(lax.stop_gradient(picked) * probability)
