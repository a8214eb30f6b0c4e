"""Adapters of experts that one tensor holds (GPT-OSS), in the layout that PEFT 0.21 writes for target_parameters.

Of a layer's two parameters PEFT wraps the first, gate_up_proj, and then the other around it:

    ...mlp.experts.base_layer.lora_A.weight [E R, D]   .lora_B.weight [2F, R E]    of gate_up_proj
    ...mlp.experts.lora_A.weight            [E R, F]   .lora_B.weight [D, R E]     of down_proj, or of the only one

Row e R + k of A and column k E + e of B are expert e's. Of gate_up_proj the rows of B are in turns gate's and up's.
Inside this package every expert has a pair of its own, named as in fused_experts.py, with gate's rows first.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fastft_jax.convert.fused_experts import TURNS
from fastft_jax.convert.peft.experts import DOWN, GATE_UP
from fastft_jax.convert.peft.names import parse_name
from fastft_jax.errors import CheckpointError

_FUSED = re.compile(r"(?P<experts>.*\.experts)(?P<inner>\.base_layer)?\.lora_(?P<half>[AB])\.weight")
_SPLIT = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.lora_(?P<half>[AB])\.weight")


def is_fused(config: Mapping[str, Any], tensors: Collection[str]) -> bool:
    """Whether an adapter has this layout, by its config and the names of its tensors."""
    parameters = config["target_parameters"] or ()
    return bool(parameters) and all(p.endswith((GATE_UP, DOWN)) for p in parameters) and any(map(fused_module, tensors))


def fused_module(name: str) -> bool:
    """Whether PEFT's tensor of that name is of all experts of a layer."""
    parsed = parse_name(name)
    return parsed is not None and parsed.module.endswith((".experts", ".experts.base_layer"))


def fused(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An adapter's tensors by PEFT's names with the experts' pairs put together; the others as they are."""
    found: dict[str, np.ndarray] = {}
    groups: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
    for name, value in tensors.items():
        if match := _SPLIT.fullmatch(name):
            groups.setdefault((match["experts"], match["leaf"], match["half"]), {})[int(match["expert"])] = value
        else:
            found[name] = value
    for (experts, leaf, half), by_expert in groups.items():
        inner = ".base_layer" if leaf == TURNS and (experts, "down_proj", half) in groups else ""
        stack = np.stack([by_expert[expert] for expert in sorted(by_expert)])  # [E, R, K] or [E, N, R]
        if half == "B":
            stack = _in_turns(stack) if leaf == TURNS else stack
            stack = stack.transpose(1, 2, 0)
            value = stack.reshape(stack.shape[0], -1)
        else:
            value = stack.reshape(-1, stack.shape[2])
        found[f"{experts}{inner}.lora_{half}.weight"] = np.ascontiguousarray(value)
    return found


def split(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], num_experts: int) -> dict[str, np.ndarray]:
    """The inverse of `fused`; `config` says which parameter it is where a layer has only one.

    CheckpointError for a rank that is not the same for all experts.
    """
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            found[name] = value
            continue
        experts, half = match["experts"], match["half"]
        both = f"{experts}.base_layer.lora_{half}.weight" in tensors
        leaf = TURNS if match["inner"] or (not both and _adapts_gate_up(config, experts)) else "down_proj"
        axis = 0 if half == "A" else 1
        if value.shape[axis] % num_experts:
            raise CheckpointError(f"{name!r} has shape {list(value.shape)}, not the pairs of {num_experts} experts")
        if half == "A":
            stack = value.reshape(num_experts, -1, value.shape[1])
        else:
            stack = value.reshape(value.shape[0], -1, num_experts).transpose(2, 0, 1)
            stack = _one_after_the_other(stack) if leaf == TURNS else stack
        for expert in range(num_experts):
            found[f"{experts}.{expert}.{leaf}.lora_{half}.weight"] = np.ascontiguousarray(stack[expert])
    return found


def _adapts_gate_up(config: Mapping[str, Any], experts: str) -> bool:
    path = f"{experts}.{TURNS}"
    return any(path.endswith(f".{parameter}") for parameter in config["target_parameters"])


def _in_turns(b: np.ndarray) -> np.ndarray:
    """[E, gate's rows then up's, R] -> [E, a row of each in turns, R]."""
    return b.reshape(b.shape[0], 2, -1, b.shape[2]).swapaxes(1, 2).reshape(b.shape)


def _one_after_the_other(b: np.ndarray) -> np.ndarray:
    return b.reshape(b.shape[0], -1, 2, b.shape[2]).swapaxes(1, 2).reshape(b.shape)
