"""The optimizer of a run: clip, turn gradients into steps, decay weights, scale by a schedule.

The trainable tree may be any pytree of float arrays; rules go by a leaf's path. State is a pytree of arrays.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fastft_jax.errors import ConfigError
from fastft_jax.trainers.adam_8bit import scale_by_adam_8bit
from fastft_jax.trainers.schedules import Schedule, make_schedule, unknown_name

# name -> how gradients become steps, given b1, b2, eps. The names are transformers's; several mean the same
# mathematics.
_ADAM = lambda b1, b2, eps: optax.scale_by_adam(b1, b2, eps)  # noqa: E731
_ADAM_8BIT = lambda b1, b2, eps: scale_by_adam_8bit(b1, b2, eps)  # noqa: E731
OPTIMIZERS: dict[str, Callable[[float, float, float], optax.GradientTransformation]] = {
    "adamw": _ADAM,
    "adamw_torch": _ADAM,
    "adamw_torch_fused": _ADAM,
    "adamw_8bit": _ADAM_8BIT,
    "adamw_bnb_8bit": _ADAM_8BIT,
    "lion_32bit": lambda b1, b2, eps: optax.scale_by_lion(b1, b2),
    "sgd": lambda b1, b2, eps: optax.identity(),
}
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw", "paged_lion_8bit", "paged_lion_32bit")

_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)(?:$|\.)")


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a leaf: ('layers', 0, 'q_proj', 'lora_A', '.value') -> "layers.0.q_proj.lora_A.value"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_decayed(name: str) -> bool:
    """transformers's rule: weight decay leaves out biases and the weights of norms, wherever they are."""
    return _NOT_DECAYED.search(name.lower()) is None


def is_embedding(name: str) -> bool:
    """Whether `embedding_learning_rate` applies: the input embedding and the head, with or without LoRA on them."""
    return _EMBEDDING.search(name) is not None


def global_norm(grads: Any) -> Float[Array, ""]:
    """sqrt(sum over all leaves of g^2), float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """g * min(1, max_norm / (norm + 1e-6)): torch.nn.utils.clip_grad_norm_, which differs from optax in the 1e-6."""

    def update(grads, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (global_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class DescentState(NamedTuple):
    count: Int[Array, ""]


def descend(schedule: Schedule, embedding_schedule: Schedule, weight_decay: float) -> optax.GradientTransformation:
    """p <- p - lr (u + weight_decay p): decoupled decay (arXiv 1711.05101); rate and decay go by the leaf's path."""

    def init(params):
        del params
        return DescentState(jnp.zeros([], jnp.int32))

    def update(steps, state, params):
        rate, embedding_rate = schedule(state.count), embedding_schedule(state.count)

        def one(path, step, param):
            name = leaf_name(path)
            decay = weight_decay if is_decayed(name) else 0.0
            decayed = step + decay * param.astype(jnp.float32) if decay else step
            return -(embedding_rate if is_embedding(name) else rate) * decayed

        updates = jax.tree_util.tree_map_with_path(one, steps, params)
        return updates, DescentState(state.count + 1)

    return optax.GradientTransformation(init, update)


def _check(**numbers: tuple[float, float, float]) -> None:
    for name, (value, low, high) in numbers.items():
        if not low <= value < high:
            raise ConfigError(f"{name} must lie in [{low:g}, {high:g}), got {value}")


def make_optimizer(
    *,
    learning_rate: float,
    total_steps: int,
    optim: str = "adamw_torch",
    warmup_steps: int = 0,
    lr_scheduler_type: str = "linear",
    lr_scheduler_kwargs: Mapping[str, Any] | None = None,
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    max_grad_norm: float | None = 1.0,
    embedding_learning_rate: float | None = None,
) -> tuple[optax.GradientTransformation, Schedule]:
    """The transformation for `optax.apply_updates`, and its learning rate by step (of the main group, for the report).

    max_grad_norm None or 0: no clipping. lion_32bit takes its betas from adam_beta1 and adam_beta2; sgd has no
    momentum. Raises ConfigError for unknown names and impossible numbers, NotImplementedError for paged optimizers.
    """
    if optim in PAGED:
        raise NotImplementedError(
            f"optim={optim!r}: paging optimizer state to host memory is not built; use adamw_8bit"
        )
    if optim not in OPTIMIZERS:
        raise unknown_name("optim", optim, OPTIMIZERS)
    inf = float("inf")
    _check(
        weight_decay=(weight_decay, 0, inf),
        adam_beta1=(adam_beta1, 0, 1),
        adam_beta2=(adam_beta2, 0, 1),
        adam_epsilon=(adam_epsilon, 0, inf),
        max_grad_norm=(max_grad_norm or 0, 0, inf),
    )
    plan = {"total_steps": total_steps, "warmup_steps": warmup_steps}
    schedule = make_schedule(lr_scheduler_type, learning_rate, **plan, lr_scheduler_kwargs=lr_scheduler_kwargs)
    embedding_schedule = schedule
    if embedding_learning_rate is not None:
        _check(embedding_learning_rate=(embedding_learning_rate, 0, inf))
        # One factor for every group, as torch's LambdaLR applies it: min_lr and lr_end are relative to `learning_rate`.
        ratio = embedding_learning_rate / learning_rate
        embedding_schedule = lambda step: schedule(step) * ratio  # noqa: E731
    transform = optax.chain(
        clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
        OPTIMIZERS[optim](adam_beta1, adam_beta2, adam_epsilon),
        descend(schedule, embedding_schedule, weight_decay),
    )
    return transform, schedule
