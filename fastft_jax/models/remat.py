"""Which activations a training step keeps, which it sends to the host, and which it computes again: as data.

A policy is a table from residual name to "save" or "offload"; every name it does not list is recomputed in the
backward pass. Names are given where the values are made (`checkpoint_name` in decoder.py and the attention kernels).
"""

from collections.abc import Callable, Mapping

import jax

from fastft_jax.errors import ConfigError

LAYER_INPUT = "layer_input"
RESIDUAL_NAMES = (LAYER_INPUT, "q", "k", "v", "attn_out", "attn_lse", "mid_residual", "gate", "up")

Policy = tuple[tuple[str, str], ...]  # a user's own table, as pairs so that it can be a static argument

POLICIES: dict[str, Mapping[str, str]] = {
    "none": {name: "save" for name in RESIDUAL_NAMES},
    "selective": {name: "save" for name in ("q", "k", "v", "attn_out", "attn_lse", "mid_residual")},
    "offload": {LAYER_INPUT: "offload"},
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


def checkpoint_layer(body: Callable, policy: str | Policy) -> Callable:
    """Wrap a scan body so that its residuals follow the policy (scan itself keeps XLA from undoing it)."""
    table = POLICIES[policy] if isinstance(policy, str) else dict(policy)
    saved = [name for name, how in table.items() if how == "save"]
    offloaded = [name for name, how in table.items() if how == "offload"]
    if offloaded:
        rule = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=saved,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        rule = jax.checkpoint_policies.save_only_these_names(*saved)
    return jax.checkpoint(body, policy=rule, prevent_cse=False)
