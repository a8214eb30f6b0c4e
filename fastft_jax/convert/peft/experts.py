"""Adapters of mixtures of experts, in the one layout that PEFT 0.21, llama.cpp and vLLM all read.

Every expert's pair is a tensor pair of its own, under the names of the checkpoint's modules
(`...mlp.experts.3.gate_proj.lora_A.weight`). transformers 5 holds a layer's experts in two fused parameters, so the
config names those in `target_parameters`, and what else is adapted in the feed-forward layers by its full path: a leaf
name like gate_proj in `target_modules` would make PEFT take all of them for experts. Gate and up projection are one
parameter to PEFT, with the pairs of both side by side: twice the rank and, so that the scaling is the same, twice alpha
(times sqrt(2) with rsLoRA). Inside this package such an adapter is one with plain target_modules.

Where checkpoints themselves hold both in one parameter (gate_up_proj), there is one pair for both, in the layout of
fused.py, and a rank and alpha as everywhere.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastft_jax.convert.peft.names import parse_name
from fastft_jax.convert.peft.targets import condense_targets, value_of
from fastft_jax.errors import ConfigError

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
PATTERN = r".*\.experts\.gate_up_proj"  # of rank_pattern and alpha_pattern
_EXPERT = re.compile(r"(?P<layer>.*\.)(?:mlp|block_sparse_moe)\.experts\.\d+\.(?P<leaf>\w+)")
_GATE, _UP = {"gate"}, {"up"}
_KINDS = {"gate_proj": _GATE, "w1": _GATE, "up_proj": _UP, "w3": _UP, "gate_up_proj": _GATE | _UP}


def has_experts(module_paths: Collection[str]) -> bool:
    """Whether any of these modules is one of a number of experts."""
    return any(_EXPERT.fullmatch(path) for path in module_paths)


def is_per_expert(config: Mapping[str, Any], tensors: Collection[str]) -> bool:
    """Whether an adapter has this layout: parameters as `written_config` names them, tensors expert by expert."""
    parameters = config["target_parameters"] or ()
    known = parameters and all(p.endswith((GATE_UP, DOWN, ".weight")) for p in parameters)
    modules = [parsed.module for name in tensors if (parsed := parse_name(name))]
    fused = any(module.endswith((".experts", ".experts.base_layer")) for module in modules)
    return bool(known) and has_experts(modules) and not fused


def check_expert_targets(adapted: Collection[str], module_paths: Collection[str], lora_dropout: float) -> None:
    """ConfigError for what cannot be trained or written in this layout: dropout, some of a layer's experts, or
    some of their three linears."""
    if not has_experts(adapted):
        return
    if lora_dropout:
        raise ConfigError(
            f"lora_dropout={lora_dropout} does not go with LoRA on experts (nor does it in PEFT): set it to 0, or "
            "leave the experts out of target_modules"
        )
    for layer, kinds in _kinds_by_layer(adapted).items():
        if kinds != {"gate", "up", "down"} and not _gate_up_is_one(module_paths):
            given = " and ".join(sorted(kinds))
            raise ConfigError(
                f"target_modules: the experts of {layer.rstrip('.')} would have LoRA on their {given} projections "
                "alone, which PEFT cannot read: name gate_proj, up_proj and down_proj, or none of them"
            )
    counts, all_counts = _counts(adapted), _counts(module_paths)
    for (layer, leaf), count in counts.items():
        if count != all_counts[layer, leaf]:
            raise ConfigError(
                f"target_modules: {count} of the {all_counts[layer, leaf]} experts of {layer.rstrip('.')} would have "
                f"LoRA on {leaf}: name all of a layer's experts or none"
            )


def require_plain(config: Mapping[str, Any], adapted: Collection[str], from_weights: bool) -> None:
    """NotImplementedError for adapters of experts that are more than LoRA of one rank."""
    experts = [path for path in adapted if _EXPERT.fullmatch(path)]
    if not experts:
        return
    own = [
        f"{key} for {path}"
        for key, default in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"]))
        for path in (experts if config[key] else ())
        if value_of(config[key], path, default) != default
    ]
    found = (
        [f"{key}=True" for key in ("use_dora", "lora_bias") if config[key]] + ["PiSSA or LoftQ"] * from_weights + own
    )
    if found:
        raise NotImplementedError(f"{found[0]} is not built yet for experts: leave them out of target_modules")


def written_config(config: Mapping[str, Any], adapted: Collection[str], module_paths: Sequence[str]) -> dict[str, Any]:
    """adapter_config.json for an adapter on the modules `adapted`; `config` itself where none of them is an expert."""
    if not has_experts(adapted):
        return dict(config)
    check_expert_targets(adapted, module_paths, 0.0)
    parameters, layers = _parameters(adapted), _kinds_by_layer(module_paths)
    used = {parameter for _, parameter in parameters}
    if parameters == {(layer, parameter) for layer in layers for parameter in used}:
        parameters = {("", parameter) for parameter in used}
    others = [path for path in adapted if not _EXPERT.fullmatch(path)]
    beside = [path for path in others if ".mlp." in path]
    modules = [path for path in others if ".mlp." not in path]
    out = dict(config)
    if not _gate_up_is_one(module_paths):
        out["rank_pattern"] = config["rank_pattern"] | {PATTERN: 2 * config["r"]}
        out["alpha_pattern"] = config["alpha_pattern"] | {PATTERN: _alpha_factor(config) * config["lora_alpha"]}
    out |= {
        "target_modules": condense_targets(modules, module_paths),
        "target_parameters": sorted(f"{layer and layer + 'mlp.'}{parameter}" for layer, parameter in parameters)
        + sorted(f"{path}.weight" for path in beside),
        "layers_to_transform": None,  # the lists say it; PEFT would not apply it to parameters
        "layers_pattern": None,
        "exclude_modules": None,
    }
    if config["layers_to_transform"] is not None:
        out["target_modules"] = sorted(modules)
    return out


def plain_config(config: Mapping[str, Any], tensors: Collection[str], module_paths: Sequence[str]) -> dict[str, Any]:
    """The inverse of `written_config`: what stands in the file's tensors is what is adapted.

    A config with other target_parameters, or other patterns of rank and alpha, keeps them: they are not this layout.
    """
    if not is_per_expert(config, tensors):
        return dict(config)
    parsed = [parse_name(name) for name in tensors]
    adapted = {name.module for name in parsed if name and name.kind == "lora_A.weight"}
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    if not _gate_up_is_one(module_paths):
        rank, alpha = 2 * config["r"], _alpha_factor(config) * config["lora_alpha"]
        ranks = {k: v for k, v in ranks.items() if k != PATTERN or v != rank}
        alphas = {k: v for k, v in alphas.items() if k != PATTERN or not math.isclose(v, alpha)}
    return dict(config) | {
        "target_modules": condense_targets(adapted, module_paths),
        "target_parameters": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _alpha_factor(config: Mapping[str, Any]) -> float:
    """What keeps the scaling when the rank doubles."""
    return math.sqrt(2) if config["use_rslora"] else 2


def _kinds_by_layer(paths: Collection[str]) -> dict[str, set[str]]:
    """`model.layers.3.` -> which of gate, up and down its experts' paths hold."""
    found: dict[str, set[str]] = {}
    for path in paths:
        if match := _EXPERT.fullmatch(path):
            found.setdefault(match["layer"], set()).update(_KINDS.get(match["leaf"], {"down"}))
    return found


def _parameters(adapted: Collection[str]) -> set[tuple[str, str]]:
    """(layer, parameter) of what is adapted, as PEFT sees it."""
    pairs = ((GATE_UP, "gate"), (DOWN, "down"))
    layers = _kinds_by_layer(adapted).items()
    return {(layer, parameter) for layer, kinds in layers for parameter, kind in pairs if kind in kinds}


def _gate_up_is_one(module_paths: Collection[str]) -> bool:
    matches = map(_EXPERT.fullmatch, module_paths)
    return any(match["leaf"] == "gate_up_proj" for match in matches if match)


def _counts(paths: Collection[str]) -> Counter[tuple[str, str]]:
    """How many experts each layer has for each of their linears."""
    matches = map(_EXPERT.fullmatch, paths)
    return Counter((match["layer"], match["leaf"]) for match in matches if match)
