"""DeepSeek-V2, V2-Lite, V2.5, Coder-V2: latent attention, many small experts and shared ones. arXiv:2405.04434.

transformers adds no load-balancing loss for these models, and neither is one added here.
"""

from typing import Any

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig, ExpertsConfig, LatentConfig, RopeConfig
from fastft_jax.models.families.experts import QWEN_NAMES
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.rope import scale_correction

_SHARED = {
    f"mlp.shared_expert.{linear}": f"mlp.shared_experts.{linear}" for linear in ("gate_proj", "up_proj", "down_proj")
}
NAMES = NameTable(modules=QWEN_NAMES | _SHARED)


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1407, q_lora_rank=1536)
    hf.require("scoring_func", ("softmax",), "softmax")
    hf.require("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    # The publisher's code then drops routed_scaling_factor, and transformers ignores it; no release switches it on.
    hf.require("norm_topk_prob", (False,), False)
    for key in ("n_group", "topk_group"):
        hf.get(key)  # without a meaning to "greedy"
    groups = routing_groups(hf) if hf.get("topk_method") == "group_limited_greedy" else {}
    scaling = hf.number("routed_scaling_factor", 1.0)
    experts = routed(hf, normalise=False, scaling=scaling, **groups)
    return latent_decoder(hf, experts, mlp_bias=hf.get("mlp_bias", False))


def latent_decoder(hf: HFConfig, experts: ExpertsConfig, **family: Any) -> DecoderConfig:
    """What V2 and V3 share."""
    heads = hf.count("num_attention_heads")
    if hf.count("num_key_value_heads", heads) != heads:
        raise CheckpointError(
            f"config.json: num_key_value_heads={hf.get('num_key_value_heads')} must be num_attention_heads={heads}: "
            "latent attention expands keys and values for every head"
        )
    latent = LatentConfig(
        kv_rank=hf.count("kv_lora_rank", 512),
        q_rank=None if hf.get("q_lora_rank") is None else hf.count("q_lora_rank"),
        nope_dim=hf.count("qk_nope_head_dim", 128),
        rope_dim=hf.count("qk_rope_head_dim", 64),
        value_dim=hf.count("v_head_dim", 128),
    )
    width = latent.nope_dim + latent.rope_dim
    if latent.value_dim > width:
        raise CheckpointError(
            f"config.json: v_head_dim={latent.value_dim} is more than qk_nope_head_dim + qk_rope_head_dim = {width}"
        )
    for key in ("head_dim", "qk_head_dim"):
        hf.get(key)  # transformers writes them, and computes them anew
    rope = hf.rope()
    bias = hf.get("attention_bias", False)
    fields = {"head_dim": width, "qkv_bias": bias, "o_bias": bias, "rope": rope, "rope_interleaved": True}
    fields |= {"attention_scale": _scale(width, rope), "experts": experts, "latent": latent}
    return common(hf, **fields | family)


def routed(hf: HFConfig, **family: Any) -> ExpertsConfig:
    """The experts; the first layers, `first_k_dense_replace` of them, have none."""
    hf.require("moe_layer_freq", (1,), 1)
    for key in ("aux_loss_alpha", "seq_aux", "ep_size", "output_router_logits"):
        hf.get(key)  # of pretraining, of its machines, and of what transformers returns beside the logits
    width = hf.count("moe_intermediate_size")
    experts = {"num_experts": hf.count("n_routed_experts"), "top_k": hf.count("num_experts_per_tok")}
    groups = family.get("groups", 1)
    if groups > 1 and experts["top_k"] > experts["num_experts"] // groups * family["top_groups"]:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={experts['top_k']} is more than the experts in topk_group="
            f"{family['top_groups']} of n_group={groups} groups"
        )
    return ExpertsConfig(
        **experts,
        intermediate_size=width,
        shared_intermediate_size=hf.count("n_shared_experts") * width,
        shared_gate=False,
        float32_logits=True,
        dense_layers=tuple(range(maybe_none(hf, "first_k_dense_replace"))),
        **family,
    )


def routing_groups(hf: HFConfig, groups: int | None = None, top: int | None = None) -> dict[str, int]:
    """The groups of experts, and how many of them a token may use."""
    count, groups, top = hf.count("n_routed_experts"), hf.count("n_group", groups), hf.count("topk_group", top)
    if count % groups or top > groups:
        raise CheckpointError(
            f"config.json: n_group={groups} must divide n_routed_experts={count}, and topk_group={top} must not be more"
        )
    return {"groups": groups, "top_groups": top}


def maybe_none(hf: HFConfig, key: str) -> int:
    """A whole number; 0 where the file says 0 or nothing."""
    return hf.count(key) if hf.get(key) else 0


def _scale(width: int, rope: RopeConfig) -> float | None:
    correction = scale_correction(rope)
    return None if correction == 1.0 else width**-0.5 * correction
