"""InternLM2 and 3, which transformers has no classes for, against Llama and Qwen2 with their weights laid out anew.

Layout as published (modeling_internlm2.py): wqkv [K (N / K + 2) H, D] is, of each key head, its queries, itself and its
value; w1 is the gate, w3 up, w2 down.
"""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import test_parity
import tiny
import torch

from fastft_jax.models.families.registry import config_from_hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
K, GROUP, H, D, R, ALPHA = 2, 2, 16, 64, 4, 6  # 4 query heads, 2 key heads
DYNAMIC = {"type": "dynamic", "factor": 2.0}
INTERNLM2 = {"model_type": "internlm2", "bias": True, "rope_theta": 1e4, "rope_scaling": DYNAMIC} | tiny.COMMON
INTERNLM2 |= {"num_hidden_layers": 2, "max_position_embeddings": 24, "hidden_act": "silu"}
LINEARS = {"attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj"}
LINEARS |= {"feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
TOP = {"model.tok_embeddings": "model.embed_tokens", "model.norm": "model.norm", "output": "lm_head"}


def as_internlm2(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Llama's tensors under InternLM2's names and in its layout."""
    out = {f"{new}.weight": llama[f"{old}.weight"] for new, old in TOP.items()}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for new, old in (LINEARS | NORMS).items():
            for kind in ("weight", "bias"):
                if f"{prefix}{old}.{kind}" in llama:
                    out[f"{prefix}{new}.{kind}"] = llama[f"{prefix}{old}.{kind}"]
        for kind, shape in (("weight", (H, D)), ("bias", (H,))):
            q, k, v = (llama[f"{prefix}self_attn.{name}_proj.{kind}"].view(K, -1, *shape) for name in "qkv")
            out[f"{prefix}attention.wqkv.{kind}"] = torch.cat([q, k, v], 1).reshape(-1, *shape[1:])
    return out


def as_llama(internlm2: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse, differentiable."""
    out = {f"{old}.weight": internlm2[f"{new}.weight"] for new, old in TOP.items()}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for new, old in (LINEARS | NORMS).items():
            for kind in ("weight", "bias"):
                if f"{prefix}{new}.{kind}" in internlm2:
                    out[f"{prefix}{old}.{kind}"] = internlm2[f"{prefix}{new}.{kind}"]
        for kind, shape in (("weight", (D,)), ("bias", ())):
            parts = internlm2[f"{prefix}attention.wqkv.{kind}"].view(K, GROUP + 2, H, *shape).split([GROUP, 1, 1], 1)
            for name, part in zip("qkv", parts, strict=True):
                out[f"{prefix}self_attn.{name}_proj.{kind}"] = part.reshape(-1, *shape)
    return out


def test_an_internlm2_adapter_has_the_logits_and_gradients_of_a_rearranged_llama(tmp_path):
    """With biases and beyond the original context; LoRA on wqkv, wo, w1, w2 and w3, as PEFT names those modules. The
    merged checkpoint is the sum, in the published layout, with the publisher's code beside it."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    options = dict(num_hidden_layers=2, max_position_embeddings=24, rope_parameters=scaling, attention_bias=True)
    llama = tiny.make_model("llama-2", **options)
    base = {name: value.detach() for name, value in as_internlm2(llama.state_dict()).items()}
    for name, value in as_llama(base).items():
        assert torch.equal(value, llama.state_dict()[name]), name
    save = lambda tensors, path: safetensors.numpy.save_file(  # noqa: E731
        {name: value.detach().contiguous().numpy() for name, value in tensors.items()}, path, {"format": "pt"}
    )
    folder, adapter = tmp_path / "base", tmp_path / "adapter"
    folder.mkdir()
    save(base, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(INTERNLM2 | {"auto_map": {"AutoModel": "modeling_internlm2.Model"}}))
    for name in ("modeling_internlm2.py", "train.py"):
        (folder / name).write_text("raise SystemExit")

    adapted = [f"model.layers.{i}.{name}" for i in range(2) for name in ("attention.wqkv", *LINEARS)]
    torch.manual_seed(1)
    pairs = {}
    for module in adapted:
        n, k = base[f"{module}.weight"].shape
        pairs[f"{module}.lora_A.weight"] = (torch.randn(R, k) / k**0.5).requires_grad_()
        pairs[f"{module}.lora_B.weight"] = (torch.randn(n, R) / R**0.5 / 4).requires_grad_()
    targets = ["wqkv", "wo", "w1", "w2", "w3"]
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(folder)
    config.save_pretrained(adapter)
    save({f"base_model.model.{name}": value for name, value in pairs.items()}, adapter / "adapter_model.safetensors")

    ids, mask = test_parity.padded_batch()
    real = mask.astype(bool)
    labels = np.where(real, ids, -100)
    labels[1, 13] = -100  # the first real token would be predicted from padding
    merged = dict(base)
    for module in adapted:
        update = pairs[f"{module}.lora_B.weight"] @ pairs[f"{module}.lora_A.weight"]
        merged[f"{module}.weight"] = base[f"{module}.weight"] + ALPHA / R * update
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    out = torch.func.functional_call(llama, as_llama(merged), kwargs=batch)
    out.loss.backward()

    ours = test_parity.load(adapter)
    logits = np.asarray(ours(ids, mask))[real]
    np.testing.assert_allclose(logits, out.logits.detach().numpy()[real], atol=test_parity.TOLERANCE, rtol=0)
    loss, mine = test_parity.our_gradients(ours, ids, mask, labels)
    np.testing.assert_allclose(loss, out.loss.item(), rtol=1e-5)
    assert mine.keys() == pairs.keys()
    for name, value in pairs.items():
        np.testing.assert_allclose(mine[name], value.grad, atol=test_parity.TOLERANCE, rtol=0, err_msg=name)

    ours.save_pretrained(tmp_path / "again")
    again = safetensors.numpy.load_file(tmp_path / "again" / "adapter_model.safetensors")
    for name, value in pairs.items():
        np.testing.assert_array_equal(again[f"base_model.model.{name}"], value.detach().numpy())

    ours.save_pretrained_merged(tmp_path / "merged", dtype="float32", verify=False)
    again = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    assert again.keys() == merged.keys()
    for name, value in merged.items():  # float32 products of rank 4, in another order
        np.testing.assert_allclose(again[name], value.detach().numpy(), atol=1e-6, rtol=1e-6, err_msg=name)
    full = test_parity.load(folder, full_finetuning=True)  # not trained: the same tensors again
    full.save_pretrained(tmp_path / "full")
    again = safetensors.numpy.load_file(tmp_path / "full" / "model.safetensors")
    assert again.keys() == base.keys() and all(np.array_equal(again[name], value) for name, value in base.items())
    for saved in ("merged", "full"):
        assert (tmp_path / saved / "modeling_internlm2.py").exists() and not (tmp_path / saved / "train.py").exists()


def test_new_adapters_on_internlm2_leave_its_head_alone():
    """`output` is what PEFT's all-linear leaves out, as lm_head elsewhere."""
    from fastft_jax.convert.peft import match_targets

    paths = ["model.layers.0.attention.wqkv", "model.layers.0.feed_forward.w1", "output"]
    assert match_targets("all-linear", paths) == paths[:2]


def test_internlm3_is_qwen2_with_a_head_width_and_dynamic_rope(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 1e4}
    model = tiny.make_model("qwen-1.5", num_hidden_layers=1, max_position_embeddings=24, rope_parameters=scaling)
    tiny.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    values = {key: written[key] for key in (*tiny.COMMON, "hidden_act")}
    values |= {"model_type": "internlm3", "qkv_bias": True, "bias": False, "head_dim": 16, "rope_theta": 1e4}
    values |= {"rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids, mask = test_parity.padded_batch()
    real = mask.astype(bool)
    ours = np.asarray(test_parity.load(tmp_path)(ids, mask))[real]
    np.testing.assert_allclose(ours, test_parity.torch_logits(model, ids, mask)[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("qkv_bias", "bias"), [(True, True), (False, False)])
def test_internlm3_with_both_biases_or_none_is_llama(qkv_bias, bias):
    ours, _ = config_from_hf({"model_type": "internlm3", "qkv_bias": qkv_bias, "bias": bias} | tiny.COMMON)
    llama, _ = config_from_hf({"model_type": "llama", "attention_bias": qkv_bias, "mlp_bias": bias} | tiny.COMMON)
    assert ours.layer_kinds == llama.layer_kinds and ours.rope == llama.rope
    switches = ("qkv_bias", "o_bias", "mlp_bias", "norm", "block", "activation", "head_dim", "grouped_qkv")
    assert all(getattr(ours, name) == getattr(llama, name) for name in switches)
