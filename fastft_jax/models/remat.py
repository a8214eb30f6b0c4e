"""Which activations a training step keeps, which it sends to the host, and which it computes again: as data.

A policy is a table from residual name to "save" or "offload"; every name it does not list is recomputed in the
backward pass. Names are given where the values are made (`keep(name, value)` in the layers; see residuals.py).
"""

from collections.abc import Mapping

from fastft_jax.errors import ConfigError

LAYER_INPUT = "layer_input"
RESIDUAL_NAMES = (LAYER_INPUT, "q", "k", "v", "attn_out", "attn_lse", "mid_residual", "gate_up", "lora_h")

Policy = tuple[tuple[str, str], ...]  # a user's own table, as pairs so that it can be a static argument

POLICIES: dict[str, Mapping[str, str]] = {
    "none": {name: "save" for name in RESIDUAL_NAMES},
    "selective": {name: "save" for name in ("q", "k", "v", "attn_out", "attn_lse", "mid_residual", "lora_h")},
    # What a host link carries while a layer computes, and no more: two arrays of B T D a layer, 4.3 GB a step of an 8B
    # model at 2 x 4096. Measured on an H200: with q, k, v or mid_residual as well the step waits for the link.
    "offload": {LAYER_INPUT: "offload", "attn_out": "offload", "attn_lse": "save"},
    "full": {},
}

# Fastest first: what "auto" tries until one fits the card.
AUTO_ORDER = ("none", "selective", "full", "offload")

# What users of Unsloth and PEFT write for use_gradient_checkpointing.
ALIASES = {True: "full", False: "none", "unsloth": "offload", "true": "full", "false": "none"}


def resolve_policy(value: str | bool | Mapping[str, str]) -> str | Policy:
    """A policy name ("auto" included) or a checked user table, from what a user wrote; ConfigError if it is neither."""
    if isinstance(value, Mapping):
        hows = ("save", "offload", "recompute")
        unknown = [name for name, how in value.items() if name not in RESIDUAL_NAMES or how not in hows]
        if unknown:
            raise ConfigError(
                f"use_gradient_checkpointing: bad entries {unknown}; names are {', '.join(RESIDUAL_NAMES)}, "
                "values save, offload or recompute"
            )
        return tuple(sorted(value.items()))
    name = ALIASES.get(value, value) if isinstance(value, str | bool) else None
    if name != "auto" and name not in POLICIES:
        known = ", ".join(["auto", *POLICIES, "unsloth", "true", "false"])
        raise ConfigError(f"use_gradient_checkpointing={value!r} is not one of {known}")
    return name


def table_of(policy: str | Policy) -> Mapping[str, str]:
    """The policy as a mapping from residual name to "save" or "offload" (or "recompute", as for names not in it)."""
    return POLICIES[policy] if isinstance(policy, str) else dict(policy)
