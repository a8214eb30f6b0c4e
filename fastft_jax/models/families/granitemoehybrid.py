"""Granite 4.0 dense (350m, 1b): Granite 3 with one linear for gate and up; the hybrids with Mamba layers or experts are
refused. IBM 2025, https://huggingface.co/ibm-granite/granite-4.0-1b."""

from dataclasses import replace

from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families import granite
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.names import NameTable

NAMES = NameTable(modules={"mlp.gate_up_proj": "shared_mlp.input_linear", "mlp.down_proj": "shared_mlp.output_linear"})


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    hf.defaults(num_local_experts=8)
    hf.require("num_local_experts", (0,))
    for key in ("layer_types", "layers_block_type"):
        kinds = hf.get(key)
        if key == "layer_types" and kinds is None and "layers_block_type" not in hf:
            kinds = ["mamba"]  # transformers' default
        for kind in kinds or ():
            if kind not in ("attention", "full_attention"):
                raise CheckpointError(
                    f"config.json: {kind!r} in {key} is not supported for {hf.model_type} models (supported: attention)"
                )
    hf.require("position_embedding_type", ("rope",))
    hf.require("normalization_function", ("rmsnorm",), "rmsnorm")
    hf.skip("mamba_", "time_step_limit", "init_method")
    hf.skip("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")
    width = hf.count("shared_intermediate_size", 1024)
    return replace(granite.config_from_hf(hf), fused_gate_up=True, intermediate_size=width)
