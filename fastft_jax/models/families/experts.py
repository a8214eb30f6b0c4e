"""What the config.json files and tensor names of mixture-of-experts families share."""

from collections.abc import Mapping
from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import ExpertsConfig
from fastft_jax.models.families.hf_config import HFConfig


def names(block: str, router: str, gate: str, up: str, down: str) -> Mapping[str, str]:
    """Our paths inside a layer -> theirs, of a block whose experts are numbered modules."""
    linears = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    experts = {f"mlp.experts.{ours}": f"{block}.experts.{{}}.{theirs}" for ours, theirs in linears.items()}
    return experts | {"mlp.router": f"{block}.{router}"}


MIXTRAL_NAMES = names("block_sparse_moe", "gate", "w1", "w3", "w2")
QWEN_NAMES = names("mlp", "gate", "gate_proj", "up_proj", "down_proj")


def experts(hf: HFConfig, count_key: str, width_key: str, **family: Any) -> ExpertsConfig:
    """`family` gives or overrides ExpertsConfig's fields. The auxiliary loss is on where transformers adds it."""
    coefficient = hf.number("router_aux_loss_coef", 0.001)
    if not isinstance(hf.get("output_router_logits", False), bool):
        raise CheckpointError("config.json: output_router_logits must be true or false")
    return ExpertsConfig(
        **{
            "num_experts": hf.count(count_key),
            "top_k": hf.count("num_experts_per_tok"),
            "intermediate_size": hf.count(width_key),
            "aux_loss_coef": coefficient if hf.get("output_router_logits", False) else None,
            **family,
        }
    )


def dense_layers(hf: HFConfig) -> tuple[int, ...]:
    """Layers without experts: those in `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    step, listed = hf.count("decoder_sparse_step", 1), hf.get("mlp_only_layers", [])
    layers = range(hf.count("num_hidden_layers"))
    if not isinstance(listed, list) or not all(layer in layers for layer in listed):
        raise CheckpointError(f"config.json: mlp_only_layers={listed!r} must list layers from 0 to {len(layers) - 1}")
    return tuple(i for i in layers if i in listed or (i + 1) % step)
