"""Learning-rate schedules: transformers's `lr_scheduler_type` names with transformers's values, step by step."""

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.errors import ConfigError

Schedule = Callable[[Any], Float[Array, ""]]

# Every schedule, and the keys of `lr_scheduler_kwargs` it understands.
OPTIONS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "constant_with_warmup": (),
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
}


def unknown_name(option: str, value: object, known: Mapping[str, Any]) -> ConfigError:
    near = get_close_matches(str(value), known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"{option}={value!r} is not known{hint}: use one of {', '.join(known)}")


def _min_lr_rate(learning_rate: float, options: Mapping[str, Any]) -> float:
    if ("min_lr" in options) == ("min_lr_rate" in options):
        raise ConfigError("cosine_with_min_lr needs either min_lr or min_lr_rate in lr_scheduler_kwargs")
    return options["min_lr_rate"] if "min_lr_rate" in options else options["min_lr"] / learning_rate


def _decay(
    name: str, learning_rate: float, total_steps: int, warmup_steps: int, options: Mapping[str, Any]
) -> Callable[[Array], Array]:
    """The factor on the learning rate from the end of the warmup on, as a function of the step (float32)."""

    def progress(step):
        return (step - warmup_steps) / max(1, total_steps - warmup_steps)

    if name in ("constant", "constant_with_warmup"):
        return jnp.ones_like
    if name == "linear":
        return lambda step: jnp.maximum(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if name in ("cosine", "cosine_with_min_lr"):
        turns = 2.0 * math.pi * options.get("num_cycles", 0.5)
        floor = _min_lr_rate(learning_rate, options) if name == "cosine_with_min_lr" else 0.0
        wave = lambda step: 0.5 * (1.0 + jnp.cos(turns * progress(step)))  # noqa: E731
        return lambda step: jnp.maximum(0.0, wave(step) * (1.0 - floor) + floor)
    if name == "cosine_with_restarts":
        cycles = options.get("num_cycles", 1)
        wave = lambda p: 0.5 * (1.0 + jnp.cos(math.pi * ((cycles * p) % 1.0)))  # noqa: E731
        return lambda step: jnp.where(progress(step) >= 1.0, 0.0, wave(progress(step)))
    if name == "polynomial":
        end, power = options.get("lr_end", 1e-7) / learning_rate, options.get("power", 1.0)
        if end >= 1.0:
            raise ConfigError(
                f"lr_end must be below the learning rate {learning_rate}, got {options.get('lr_end', 1e-7)}"
            )
        left = lambda step: jnp.clip(1.0 - progress(step), 0.0, 1.0)  # noqa: E731
        return lambda step: (1.0 - end) * left(step) ** power + end
    timescale = options.get("timescale") or warmup_steps or 10_000  # inverse_sqrt
    return lambda step: 1.0 / jnp.sqrt((step + (timescale - warmup_steps)) / timescale)


def make_schedule(
    name: str,
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    lr_scheduler_kwargs: Mapping[str, Any] | None = None,
) -> Schedule:
    """The learning rate (float32 []) of the update with number `step` = 0, 1, ...; works on ints and traced counts.

    A linear warmup from 0 over `warmup_steps` (none for "constant", as in transformers), then the named decay to
    `total_steps`. Raises ConfigError for an unknown name or option and for impossible numbers.
    Source: transformers, optimization.py.
    """
    if name not in OPTIONS:
        raise unknown_name("lr_scheduler_type", name, OPTIONS)
    options = dict(lr_scheduler_kwargs or {})
    for key in options:
        if key not in OPTIONS[name]:
            allowed = ", ".join(OPTIONS[name]) or "no options"
            raise ConfigError(f"lr_scheduler_kwargs has {key!r}, but lr_scheduler_type={name!r} takes {allowed}")
    if total_steps < 1 or warmup_steps < 0:
        raise ConfigError(f"a schedule needs total_steps >= 1 and warmup_steps >= 0, got {total_steps}, {warmup_steps}")
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ConfigError(f"learning_rate must be a positive number, got {learning_rate}")
    decay = _decay(name, learning_rate, total_steps, warmup_steps, options)
    warmup = 0 if name == "constant" else warmup_steps

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        factor = jnp.where(step < warmup, step / max(1, warmup), decay(jnp.maximum(step, warmup)))
        return (learning_rate * factor).astype(jnp.float32)

    return schedule
