"""Which activations a training step keeps, which it sends to the host, and which it computes again: as data.

A policy is a table from residual name to "save", "offload", or a share between 0 and 1: saved in that part of the
layers, the last ones, so that a large value takes the memory that is left. Every name it does not list is recomputed in
the backward pass. Names are given where the values are made (`keep(name, value)` in the layers; see residuals.py).
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastft_jax.errors import ConfigError

LAYER_INPUT = "layer_input"
# Which experts each token goes to: a few kilobytes, and computed again it might differ by a rounding, after which no
# kept row of an expert would be the right one.
ROUTING = "routing"
RESIDUAL_NAMES = (
    *(LAYER_INPUT, "latent", "qkv", "q", "k", "v", "attn_out", "attn_lse", "mid_residual", "gate_up", "lora_h"),
    *("block_out", ROUTING),
)
ALWAYS = (LAYER_INPUT, ROUTING)  # kept whatever the policy says

How = str | float  # "save", "offload", "recompute", or the share of the layers that save
Policy = tuple[tuple[str, How], ...]  # a user's own table, as pairs so that it can be a static argument

POLICIES: dict[str, Mapping[str, How]] = {
    "none": {name: "save" for name in RESIDUAL_NAMES},
    # gate_up in 7 of 32 layers: what 20 GiB leave beside an 8B model at 2 x 4096
    "selective": {name: "save" for name in RESIDUAL_NAMES if name != LAYER_INPUT} | {"gate_up": 0.22},
    # What a host link carries while a layer computes, and no more: two arrays of B T D a layer, 4.3 GB a step of an 8B
    # model at 2 x 4096. Measured on an H200: with q, k, v or mid_residual as well the step waits for the link.
    "offload": {LAYER_INPUT: "offload", "attn_out": "offload", "attn_lse": "save"},
    "full": {},
}

# Fastest first: what "auto" tries until one fits the card. "full" is neither faster nor leaner than "offload".
AUTO_ORDER = ("none", "selective", "offload")

# What users of Unsloth and PEFT write for use_gradient_checkpointing.
ALIASES = {True: "full", False: "none", "unsloth": "offload", "true": "full", "false": "none"}


def resolve_policy(value: str | bool | Mapping[str, How]) -> str | Policy:
    """A policy name ("auto" included) or a checked user table, from what a user wrote; ConfigError if it is neither."""
    if isinstance(value, Mapping):
        unknown = [name for name, how in value.items() if name not in RESIDUAL_NAMES or not _is_how(name, how)]
        if unknown:
            raise ConfigError(
                f"use_gradient_checkpointing: bad entries {unknown}; names are {', '.join(RESIDUAL_NAMES)}, "
                f"values save, offload, recompute, or (but for {' and '.join(ALWAYS)}) the share of the layers that "
                "save, as 0.5"
            )
        return tuple(sorted(value.items()))
    name = ALIASES.get(value, value) if isinstance(value, str | bool) else None
    if name != "auto" and name not in POLICIES:
        known = ", ".join(["auto", *POLICIES, "unsloth", "true", "false"])
        raise ConfigError(f"use_gradient_checkpointing={value!r} is not one of {known}")
    return name


def table_of(policy: str | Policy) -> Mapping[str, How]:
    """The policy as a mapping from residual name to what is done with it ("recompute" for names not in it)."""
    return POLICIES[policy] if isinstance(policy, str) else dict(policy)


class Part(NamedTuple):
    """Layers start..stop-1 of a stack, and what each of them does with its values: "save", "offload" or "recompute"."""

    start: int
    stop: int
    table: Mapping[str, str]


def parts(policy: str | Policy, count: int) -> tuple[Part, ...]:
    """A stack of `count` layers cut where a share begins; layer inputs and routing are always kept."""
    table = {**dict.fromkeys(ALWAYS, "save"), **table_of(policy)}
    table |= {name: "save" for name in ALWAYS if table[name] == "recompute"}
    begins = {name: count - round(how * count) for name, how in table.items() if not isinstance(how, str)}
    cuts = sorted({0, count, *begins.values()})

    def here(start: int) -> dict[str, str]:
        return {
            name: how if isinstance(how, str) else "save" if start >= begins[name] else "recompute"
            for name, how in table.items()
        }

    return tuple(Part(start, stop, here(start)) for start, stop in itertools.pairwise(cuts))


def _is_how(name: str, how: Any) -> bool:
    if isinstance(how, str):
        return how in ("save", "offload", "recompute")
    return name not in ALWAYS and isinstance(how, float) and 0.0 < how < 1.0
