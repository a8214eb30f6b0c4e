"""What llama.cpp's "deepseek2" reads beside the usual, and what of DeepSeek-V2 and V3 it computes otherwise.

Read from src/models/deepseek2.cpp and llama-graph.cpp (build_moe_ffn) of llama.cpp 0c1e57098. It multiplies queries
into the latent, so that all heads share one key of kv_rank + rope_dim numbers and one value of kv_rank.
"""

from collections.abc import Iterator

import gguf

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.latent_attention import LATENT_EPS

# Products that its graph computes without looking at adapters (ggml_mul_mat, not build_lora_mm), or in another form
WITHOUT_LORA = frozenset(
    f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
)


def add_deepseek_hyperparameters(writer: gguf.GGUFWriter, c: DecoderConfig) -> None:
    """The keys of latent attention and of its experts."""
    m, e = c.latent, c.experts
    writer.add_q_lora_rank(m.q_rank or 0)  # required but for 26 and 27 layers; 0 is for none
    writer.add_kv_lora_rank(m.kv_rank)
    writer.add_key_length(m.kv_rank + m.rope_dim)
    writer.add_value_length(m.kv_rank)
    writer.add_key_length_mla(c.head_dim)
    writer.add_value_length_mla(m.value_dim)
    if c.rope.rope_type == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * c.rope.mscale_all_dim)  # it divides by 0.1
    writer.add_leading_dense_block_count(len(e.dense_layers))
    writer.add_expert_shared_count(e.shared_intermediate_size // e.intermediate_size)
    writer.add_expert_weights_scale(e.scaling)
    writer.add_expert_weights_norm(e.normalise)
    sigmoid = e.router == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if e.top_groups < e.groups:
        writer.add_expert_group_count(e.groups)
        writer.add_expert_group_used_count(e.top_groups)


def deepseek_differences(c: DecoderConfig) -> Iterator[str]:
    """What its graph has otherwise, in words."""
    rope, e = c.rope, c.experts
    if c.rms_norm_eps != LATENT_EPS:
        yield f"rms_norm_eps={c.rms_norm_eps:g} (there the latents' norms, of {LATENT_EPS:g}, have it, too)"
    if not c.rope_interleaved:
        yield "rope_interleave=False"
    if rope.rope_type not in ("default", "yarn"):
        yield f"rope_type={rope.rope_type!r}"
    if rope.rope_type == "yarn" and (
        rope.mscale != rope.mscale_all_dim or not rope.mscale or rope.attention_factor is not None or not rope.truncate
    ):
        yield "yarn with an own attention_factor or truncate, or an mscale that is not mscale_all_dim"
    if e.router == "softmax" and e.top_groups < e.groups:
        yield "topk_method='group_limited_greedy' (there a group is as good as its best two experts, here as its best)"
    lite = c.num_hidden_layers in (26, 27) or (c.num_hidden_layers, c.vocab_size) == (48, 128256)
    if c.latent.q_rank is not None and lite:
        yield f"q_lora_rank={c.latent.q_rank} in {c.num_hidden_layers} layers (there such a model is V2-Lite)"
