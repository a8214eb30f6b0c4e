"""Merged checkpoints of mixtures of experts: expert by expert under the hub's names, as transformers computes them."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny
from test_merged import IDS, TOLERANCE, adapt, load, tensors_of, transformers_logits

from fastft_jax.convert.read_back import folder_logits
from fastft_jax.convert.safetensors import Checkpoint

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.filterwarnings("ignore:.*tokenizer")]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Qwen's: a shared expert with its gate. (folder, our model of it in NF4, adapted)"""
    base = tiny.save(
        tiny.make_model("qwen-2-moe", num_hidden_layers=1, mlp_only_layers=[]), tmp_path_factory.mktemp("base")
    )
    return base, adapt(load(base), target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])


def test_onto_the_original_weights_experts_are_merged_one_by_one(case, tmp_path):
    """W + scaling B A of each expert in float64, from the adapter's own file; what is not adapted keeps its bytes."""
    base, model = case
    model.save_pretrained_merged(tmp_path / "merged", base="original", dtype="float32", verify=False)
    model.save_pretrained(tmp_path / "adapter")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    pairs = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    changed = 0
    for name, w in before.items():
        pair = [pairs.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight") for half in "AB"]
        if pair[0] is None:
            np.testing.assert_array_equal(after[name], w)
            continue
        changed += ".experts." in name
        exact = np.float64(w) + 6 / 4 * np.float64(pair[1]) @ np.float64(pair[0])
        np.testing.assert_allclose(after[name], exact, atol=1e-6, rtol=0, err_msg=name)
    assert changed == 6 * 3


def test_merged_4bit_leaves_experts_in_16_bits_as_transformers_5_reads_them(case, tmp_path):
    """Every linear that transformers packs is packed here, and none beside; logits are those of what was written."""
    base, model = case
    model.save_pretrained_merged(tmp_path / "merged", save_method="merged_4bit", dtype="float32", verify=False)
    names = Checkpoint.open(tmp_path / "merged").names
    packed = {n.partition(".weight.quant_state")[0] for n in names if "quant_state" in n}
    experts = "model.layers.0.mlp.experts"
    assert f"{experts}.5.down_proj.weight" in names and not any("experts" in n.split(".") for n in packed)
    skipped = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert skipped["llm_int8_skip_modules"] == [
        "lm_head", "model.layers.0.mlp.gate", experts, "model.layers.0.mlp.shared_expert_gate"
    ]  # fmt: skip
    expected, theirs = transformers_logits(tmp_path / "merged")
    assert {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"} == packed
    ours = np.asarray(folder_logits(tmp_path / "merged", IDS, np.ones_like(IDS), np.float32))
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)
