"""What trains beside LoRA's pairs: rows of the embedding (PEFT's trainable_token_indices) and of a head that is tied to
it, and B's biases (lora_bias)."""

import json

import numpy as np
import peft
import pytest
import safetensors.numpy
import tiny
import torch
import transformers
from test_parity import TOLERANCE, load, our_gradients, padded_batch, torch_gradients, torch_logits

from fastft_jax import FastLanguageModel
from fastft_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENS = [7, 3, 150]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """(transformers model whose head is its embedding, with biases of q, k and v; its folder)"""
    model = tiny.make_model("qwen-2.5-tied", num_hidden_layers=2)
    return model, tiny.save(model, tmp_path_factory.mktemp("tied"))


def test_an_adapter_made_by_peft_gives_its_logits_and_gradients_and_is_written_and_merged_as_there(tied, tmp_path):
    model, folder = tied
    options = {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "trainable_token_indices": TOKENS}
    options["layers_to_transform"] = [1]
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config)
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.mul_(-1.5)
        model.peft_config["default"].base_model_name_or_path = str(folder)
        model.save_pretrained(tmp_path / "theirs")
        ours, (ids, mask) = load(tmp_path / "theirs"), padded_batch()
        ids[:, 20:23], real = TOKENS, mask.astype(bool)
        expected = torch_logits(model, ids, mask)
        np.testing.assert_allclose(np.asarray(ours(ids, mask))[real], expected[real], atol=TOLERANCE, rtol=0)
        with model.disable_adapter():
            without = torch_logits(model, ids, mask)
        assert np.abs(without - expected)[real].max() > 1
        labels = np.where(real, ids, -100)
        labels[1, 13] = -100  # the first real token would be predicted from padding
        their_loss, theirs = torch_gradients(model, ids, mask, labels)
        our_loss, mine = our_gradients(ours, ids, mask, labels)
        np.testing.assert_allclose(our_loss, their_loss, rtol=1e-5)
        theirs = {name.replace(".default", ""): value for name, value in theirs.items()}
        assert mine.keys() == theirs.keys() and "model.embed_tokens.token_adapter.trainable_tokens_delta" in mine
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, atol=TOLERANCE, rtol=0, err_msg=name)
    finally:
        model.unload()
    ours.save_pretrained(tmp_path / "ours")
    assert "equal to the bit" in ours.verify_adapter(tmp_path / "ours")
    before, after = (tmp_path / name / "adapter_model.safetensors" for name in ("theirs", "ours"))
    assert before.read_bytes() == after.read_bytes()
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["trainable_token_indices"] == TOKENS
    ours.save_pretrained_merged(tmp_path / "merged", dtype="float32", verify=False)
    assert "lm_head.weight" not in safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(torch_logits(merged, ids, mask)[real], expected[real], atol=TOLERANCE, rtol=0)
    with pytest.raises(ConfigError, match="cannot hold (trained tokens|biases of LoRA)"):
        ours.save_pretrained_gguf(tmp_path, quantization_method="lora")
    with ours.disable_adapter():
        np.testing.assert_allclose(np.asarray(ours(ids, mask))[real], without[real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(trainable_token_indices=[160]), ConfigError, r"\[160\] must list different tokens, .* from 0 to 159"),
        (dict(trainable_token_indices=[1, 1]), ConfigError, "must list different tokens"),
        (dict(trainable_token_indices=[]), ConfigError, "must list different tokens"),
        (dict(lora_bias=True, use_dora=True), NotImplementedError, "lora_bias=True with use_dora=True"),
        (dict(lora_bias=True, target_modules=["lm_head"]), NotImplementedError, "lora_bias=True with lm_head"),
        (dict(trainable_token_indices={"lm_head": [1]}), NotImplementedError, "only embed_tokens"),
        (
            dict(trainable_token_indices=[1], target_modules=["lm_head"]),
            NotImplementedError,
            "an adapted or saved lm_head",
        ),
        (
            dict(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
            NotImplementedError,
            "saved embed_tokens",
        ),
    ],
)
def test_what_cannot_be_trained_so_is_refused(tied, options, error, said):
    model = load(tied[1])
    with pytest.raises(error, match=said):
        FastLanguageModel.get_peft_model(model, **{"target_modules": ["q_proj"]} | options)
    assert model.decoder.embed_tokens.tokens is None
