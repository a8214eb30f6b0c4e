"""DeepSeek-V3, V3.1, R1: V2's attention; experts by sigmoid scores, their load balanced by a bias. arXiv:2412.19437.

A released checkpoint also holds what predicts the token after the next (`num_nextn_predict_layers` layers behind the
last), which serves pretraining and speculative decoding: it is not read. No load-balancing loss is added, as in
transformers.
"""

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.deepseek_v2 import NAMES, latent_decoder, maybe_none, routed, routing_groups
from fastft_jax.models.families.hf_config import HFConfig

__all__ = ["NAMES", "config_from_hf"]


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048)
    hf.defaults(q_lora_rank=1536, first_k_dense_replace=3)
    hf.require("scoring_func", ("sigmoid",), "sigmoid")
    hf.require("topk_method", ("noaux_tc",), "noaux_tc")
    groups = routing_groups(hf, 8, 4)
    if hf.count("n_routed_experts") < 2 * groups["groups"]:
        raise CheckpointError(
            f"config.json: n_group={groups['groups']} groups of n_routed_experts={hf.get('n_routed_experts')} have "
            "fewer than the two experts by which a group is judged"
        )
    experts = routed(
        hf,
        router="sigmoid",
        normalise=hf.get("norm_topk_prob", True),
        scaling=hf.number("routed_scaling_factor", 2.5),
        **groups,
    )
    return latent_decoder(
        hf,
        experts,
        rope_interleaved=hf.get("rope_interleave", True),
        unread_layers=maybe_none(hf, "num_nextn_predict_layers"),
    )
