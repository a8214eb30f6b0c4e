"""What single families need beyond logits and gradients: other tensor names, fused projections, roundings, defaults."""

import jax
import numpy as np
import peft
import pytest
import safetensors.torch
import test_generate
import test_parity
import tiny
import torch
import transformers
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.trainers.step import LossOptions, gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXT_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture(scope="module")
def gemma3():
    """A tiny multimodal Gemma 3."""
    text = tiny.COMMON | tiny.TINY["gemma-3"][1] | {"num_hidden_layers": 2}
    text["layer_types"] = text["layer_types"][1:]
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4, image_token_index=150
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(-0.4, 0.4) if "norm" in name else parameter.normal_(0, 0.15)
    return model.float().eval()


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids, mask = test_parity.padded_batch()
    return np.minimum(ids, 149), mask  # 150 would be an image


def test_the_text_part_of_a_multimodal_gemma3_reads_under_both_namings(gemma3, tmp_path):
    ids, mask = batch()
    real, theirs = mask.astype(bool), test_parity.torch_logits(gemma3, *batch())
    tiny.save(gemma3, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    hub = {name for name in tensors if name.startswith("language_model.model.")}
    swap = (
        ("language_model.model.", "model.language_model.")
        if hub
        else ("model.language_model.", "language_model.model.")
    )
    for folder_tensors in (tensors, {name.replace(*swap): value for name, value in tensors.items()}):
        safetensors.torch.save_file(folder_tensors, file, metadata={"format": "pt"})
        ours = np.asarray(test_parity.load(tmp_path)(ids, mask))
        np.testing.assert_allclose(ours[real], theirs[real], atol=test_parity.TOLERANCE, rtol=0)


def test_an_adapter_of_a_multimodal_gemma3_goes_to_peft_and_back(gemma3, tmp_path):
    tiny.save(gemma3, tmp_path / "base")
    ids, mask = batch()
    real = mask.astype(bool)
    ours = test_parity.load(tmp_path / "base")
    ours = FastLanguageModel.get_peft_model(ours, r=4, target_modules=TEXT_LINEARS, init_lora_weights=False)
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(gemma3, tmp_path / "adapter")
    try:
        mine = np.asarray(ours(ids, mask))
        logits = test_parity.torch_logits(theirs, ids, mask)
        np.testing.assert_allclose(mine[real], logits[real], atol=test_parity.TOLERANCE, rtol=0)
        without = test_parity.torch_logits(theirs.unload(), ids, mask)
        assert np.abs(without - logits)[real].max() > 0.1
    finally:
        theirs.unload()


def test_gemmas_embedding_is_scaled_by_a_rounded_root_in_16_bits(tmp_path):
    theirs = tiny.make_model("gemma", num_hidden_layers=1, hidden_size=48).bfloat16()
    tiny.save(theirs, tmp_path)
    ours = FastLanguageModel.from_pretrained(tmp_path, dtype="bfloat16", load_in_4bit=False)[0]
    ids = np.arange(40)[None]
    mine = np.asarray(ours.decoder.map_layers(lambda x: x, ids)[0].astype("float32"))
    with torch.no_grad():
        np.testing.assert_array_equal(mine, theirs.model.embed_tokens(torch.tensor(ids)).float().numpy())


@pytest.mark.parametrize("name", ["gemma-2", "gemma-3"])
def test_greedy_text_equals_transformers(name, tmp_path):
    theirs, prompts = tiny.make_model(name), test_generate.prompts()
    tiny.save(theirs, tmp_path)
    mine = test_parity.load(tmp_path).generate(prompts, max_new_tokens=test_generate.NEW)
    assert mine == [test_generate.greedy(theirs, prompt) for prompt in prompts]


def test_the_default_targets_are_all_linears_of_a_family_with_fused_ones(tmp_path):
    tiny.save(tiny.make_model("phi-3"), tmp_path)
    model = FastLanguageModel.get_peft_model(test_parity.load(tmp_path), r=4)
    assert model.peft_config["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_biases_of_norms_are_not_trained_silently(tmp_path):
    tiny.save(tiny.make_model("stablelm", num_hidden_layers=1), tmp_path)
    with pytest.raises(NotImplementedError, match="norms have biases"):
        FastLanguageModel.get_peft_model(test_parity.load(tmp_path), target_modules=["q_proj"], bias="all")


def test_a_head_with_a_bias_is_not_trained_without_it(tmp_path):
    tiny.save(tiny.make_model("phi-2", num_hidden_layers=1), tmp_path)
    with pytest.raises(NotImplementedError, match="head with a bias"):
        FastLanguageModel.get_peft_model(
            test_parity.load(tmp_path), target_modules=["q_proj"], modules_to_save=["lm_head"]
        )


def test_norms_behind_a_block_have_the_same_gradients_whether_their_input_is_kept_or_not(tmp_path):
    tiny.save(tiny.make_model("gemma-2"), tmp_path)
    model = test_parity.load(tmp_path, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    ids = np.random.default_rng(0).integers(0, 160, (1, 1, 24)).astype(np.int32)
    micro = {"input_ids": ids, "labels": np.roll(ids, -1, 2), "segment_ids": np.ones_like(ids)}
    micro["positions"] = np.broadcast_to(np.arange(24, dtype=np.int32), ids.shape)
    jitted = jax.jit(gradients, static_argnums=(0, 4))
    results = [
        jitted(definition, trainable, frozen, micro, LossOptions(policy, 16, 1), None) for policy in ("none", "offload")
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(np.linalg.norm(a))), rtol=0)
