"""GPT-OSS as it is published, in MXFP4: read exactly, computed as transformers does, adapted as PEFT does."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import test_generate
import test_parity
import tiny
import torch
import transformers
from flax import nnx
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fastft_jax import FastLanguageModel
from fastft_jax.convert.fused_entries import fused_entries
from fastft_jax.convert.fused_experts import FusedExperts
from fastft_jax.convert.merged import Entry
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.quant import mxfp4
from fastft_jax.quant.nf4 import dequantize_stack

pytestmark = pytest.mark.usefixtures("quick_compilation")
E, D, F = 4, 64, 32
QUANTISED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def published(folder, model) -> None:
    """Saves the model as published: random MXFP4 experts, which it gets itself as transformers decodes them."""
    tiny.save(model, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for layer, block in enumerate(model.model.layers):
        for leaf, n, k in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            blocks = rng.integers(0, 256, (E, n, k // 32, 16), np.uint8)
            scales = rng.integers(121, 125, (E, n, k // 32), np.uint8)
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
            getattr(block.mlp.experts, leaf).data = decoded
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=QUANTISED)


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(transformers model, folder in MXFP4, our model of it in float32)."""
    model = tiny.make_model("gpt-oss", intermediate_size=F, num_hidden_layers=2)
    folder = tmp_path_factory.mktemp("gpt-oss")
    published(folder, model)
    return model, folder, test_parity.load(folder)


def test_every_code_is_decoded_as_transformers_decodes_it():
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (7, 1))[:, None]
    scales = np.repeat(np.array([0, 1, 2, 90, 127, 200, mxfp4.LARGEST_SCALE], np.uint8), 16)[:, None]
    wanted = convert_moe_packed_tensors(torch.tensor(blocks[None]), torch.tensor(scales[None]), dtype=torch.float32)
    wanted = wanted[0].T.numpy()
    wanted = np.where(np.abs(wanted) < 2.0**-126, 0, wanted)  # NF4 takes those for 0, too
    ours = np.asarray(mxfp4.decode(blocks, scales), np.float32)
    np.testing.assert_array_equal(ours, wanted)
    assert np.isfinite(ours).all() and np.abs(ours).max() == 6 * 2.0 ** (mxfp4.LARGEST_SCALE - 127)


def test_logits_of_an_mxfp4_checkpoint_equal_transformers_packed_or_padded(case):
    model, _, ours = case
    ids, mask = test_parity.padded_batch()
    real = mask.astype(bool)
    padded = np.asarray(ours(ids, mask))
    np.testing.assert_allclose(
        padded[real], test_parity.torch_logits(model, ids, mask)[real], atol=test_parity.TOLERANCE, rtol=0
    )
    # one row of two documents, each longer than the window of 8, against each as a padded row
    segments, positions = np.ones_like(ids), np.tile(np.arange(40), (2, 1))
    segments[:, 23:], positions[:, 23:] = 2, np.arange(17)
    packed = np.asarray(ours(ids, segment_ids=segments, positions=positions))
    second = np.roll(ids, -23, axis=1)
    for start, length, rows in ((0, 23, ids), (23, 17, second)):
        alone = np.asarray(ours(rows, np.tile(np.arange(40) < length, (2, 1))))[:, :length]
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-5, rtol=0)


def test_greedy_text_equals_transformers(case):
    model, _, ours = case
    prompts = test_generate.prompts()[:2]
    assert ours.generate(prompts, max_new_tokens=4) == [test_generate.greedy(model, prompt)[:4] for prompt in prompts]


def test_sinks_take_their_share_of_the_attention(case):
    """Without them the logits are others, so it is not for want of sinks that they equal transformers'."""
    _, _, ours = case
    ids = np.arange(80).reshape(2, 40)
    with_sinks = np.asarray(ours(ids, np.ones_like(ids)))
    sinks = ours.decoder.segments[0][0].self_attn.sinks
    own = sinks.get_value()
    sinks.set_value(jnp.full_like(own, -1e4))
    try:
        assert np.abs(np.asarray(ours(ids, np.ones_like(ids))) - with_sinks).max() > 1e-2
    finally:
        sinks.set_value(own)


def test_experts_are_quantised_one_by_one_from_the_decoded_values(case):
    import bitsandbytes.functional as bnb

    model, folder, _ = case
    layer = test_parity.load(folder, load_in_4bit=True).decoder.segments[1][0]  # the second layer
    gate_up = layer.mlp.experts.gate_up_proj
    ours = np.asarray(dequantize_stack(gate_up.weight.get_value().at(jnp.int32(0)), jnp.float32))
    for expert in range(E):
        w = model.model.layers[1].mlp.experts.gate_up_proj[expert].detach().T
        w = torch.cat([w[::2], w[1::2]]).contiguous()  # gate's rows, then up's
        wanted = bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True))
        np.testing.assert_array_equal(ours[expert], wanted.numpy())
    bias = model.model.layers[1].mlp.experts.gate_up_proj_bias.detach().numpy()
    np.testing.assert_array_equal(gate_up.bias.get_value()[0], np.concatenate([bias[:, ::2], bias[:, 1::2]], 1))


@pytest.mark.parametrize("parameters", [["gate_up_proj", "down_proj"], ["gate_up_proj"]], ids=["both", "gate_up"])
def test_an_adapter_made_by_peft_for_some_layers_is_read_and_written_again(case, tmp_path, parameters):
    model, folder, base = case
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj"],
        target_parameters=[f"1.mlp.experts.{name}" for name in parameters],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(model, config)
    try:
        theirs.peft_config["default"].base_model_name_or_path = str(folder)
        theirs.save_pretrained(tmp_path / "theirs")
        ids, mask = test_parity.padded_batch()
        wanted = test_parity.torch_logits(theirs, ids, mask)
    finally:
        theirs.unload()
    base.load_adapter(tmp_path / "theirs", "theirs")
    try:
        real = mask.astype(bool)
        if len(parameters) == 2:  # a pair alone is the same program less another pair
            ours = np.asarray(base(ids, mask))[real]
            np.testing.assert_allclose(ours, wanted[real], atol=test_parity.TOLERANCE, rtol=0)
        base.save_pretrained(tmp_path / "ours")
    finally:
        base.delete_adapter("theirs")
    first, second = (
        safetensors.numpy.load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["target_parameters"] == sorted(f"model.layers.1.mlp.experts.{name}" for name in parameters)
    assert (written["rank_pattern"], written["target_modules"]) == ({}, ["q_proj"])


@pytest.mark.filterwarnings("ignore:.*no tokenizer")
def test_full_finetuning_reads_mxfp4_and_writes_the_16_bit_tensors_that_transformers_loads(case, tmp_path):
    """Nothing is trained in between (test_full_finetuning.py has the gradients), so every tensor is the one decoded."""
    model, folder, _ = case
    ours = FastLanguageModel.from_pretrained(folder, dtype="bfloat16", full_finetuning=True)[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(ours.decoder))} == {jnp.dtype("float32")}
    ours.save_pretrained(tmp_path)
    assert "equal to the bit" in ours.verify_adapter(tmp_path)
    assert not {"quantization_config", "dtype"} & set(json.loads((tmp_path / "config.json").read_text()))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    loaded, decoded = dict(theirs.named_parameters()), dict(model.named_parameters())
    assert loaded.keys() == decoded.keys()
    for name, value in decoded.items():
        assert torch.equal(loaded[name], value.bfloat16()), name


def test_users_may_write_the_names_of_llamas_projections(case):
    _, _, ours = case
    with pytest.raises(NotImplementedError, match="experts have biases"):
        FastLanguageModel.get_peft_model(ours, r=4, bias="all")
    FastLanguageModel.get_peft_model(ours, r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    try:
        assert ours.peft_config["target_modules"] == ["down_proj", "gate_up_proj", "q_proj"]
        # q, then of every expert A [R, D] and B [2F, R], A [R, F] and B [D, R]
        assert ours.num_parameters()[0] == 2 * 4 * (64 + 4 * 24 + E * (D + 2 * F + F + D))
    finally:
        ours.delete_adapter("default")


def rewrite(folder, tmp_path, change) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())


UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{UP}_scales"), f"lacks '{UP}_scales', without which '{UP}_blocks'"),
        (lambda t: t.pop(f"{UP}_blocks"), f"lacks '{UP}_blocks', without which '{UP}_scales'"),
        (lambda t: t.update({UP: np.zeros((E, D, 2 * F), np.float32)}), f"holds both '{UP}.* and '{UP}"),
        (lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, :3]}), r"is not MXFP4: uint8 \[E, N, G, 16\]"),
        (lambda t: t[f"{UP}_scales"].fill(255), "holds the scale 255, .* the file is damaged"),
        (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"][0]}), r"has shape \[64, 2, 16\]: no experts'"),
        (lambda t: t.update({f"{UP}_bias": t[f"{UP}_bias"][:3]}), "lacks 'model.layers.0.mlp.experts.3.gate_up_proj.b"),
    ],
    ids=["no scales", "no blocks", "both", "shape", "scale", "axes", "experts"],
)
def test_damaged_mxfp4_is_refused_by_tensor(case, tmp_path, change, said):
    rewrite(case[1], tmp_path, change)
    with pytest.raises(CheckpointError, match=said):
        test_parity.load(tmp_path)


GPT_OSS = {"model_type": "gpt_oss"} | tiny.COMMON | tiny.EXPERTS["gpt-oss"][1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (GPT_OSS | {"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        (GPT_OSS | {"swiglu_alpha": 1.0}, "swiglu_alpha=1.0"),
        (GPT_OSS | {"experts_per_token": 3}, "experts_per_token=3"),
        (GPT_OSS | {"layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention' in layer_types"),
        (GPT_OSS | {"quantization_config": {"quant_method": "gptq"}}, "'gptq' cannot be read"),
        ({"model_type": "llama"} | tiny.COMMON | {"quantization_config": QUANTISED}, "'mxfp4' cannot be read"),
    ],
)
def test_configs_that_are_not_supported_are_refused_by_key_and_value(values, said):
    with pytest.raises(CheckpointError, match=said):
        config_from_hf(values)


def test_a_config_without_rope_settings_has_those_that_transformers_assumes():
    from transformers import GptOssConfig

    values = {key: value for key, value in GPT_OSS.items() if key not in ("rope_parameters", "max_position_embeddings")}
    rope, theirs = config_from_hf(values)[0].rope, GptOssConfig().rope_parameters
    assert {key: getattr(rope, key) for key in theirs} == theirs


def test_only_an_experts_own_bytes_are_read(case):
    """A layer's experts are one tensor of the file, and host memory holds two tensors of ours."""
    checkpoint = Checkpoint.open(case[1])
    whole, row = checkpoint.read(f"{UP}_blocks"), checkpoint.read(f"{UP}_blocks", 2)
    np.testing.assert_array_equal(row, whole[2])
    view = FusedExperts(checkpoint)
    assert view.info("model.layers.0.mlp.experts.2.down_proj.weight")[1] == (D, F)
    assert UP not in " ".join(view.names) and f"{UP.replace('experts', 'experts.2')}.weight" in view


def test_experts_taken_apart_and_put_together_again_are_the_files_own_bytes(tmp_path):
    tiny.save(tiny.make_model("gpt-oss"), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    view = FusedExperts(checkpoint)
    entries = {n: Entry(*view.info(n), lambda n=n: np.asarray(view.read(n))) for n in view.names}
    fused = fused_entries(entries)
    assert set(fused) == set(checkpoint.names) and len(fused) < len(entries)
    for name, entry in fused.items():
        assert (entry.dtype, entry.shape) == checkpoint.info(name)
        np.testing.assert_array_equal(entry.read(), checkpoint.read(name), err_msg=name)


def test_peft_adapters_of_fused_experts_do_not_go_on_other_families(case, tmp_path):
    model, folder, _ = case
    config = peft.LoraConfig(r=4, target_parameters=["mlp.experts.down_proj"], target_modules=[], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config)
    try:
        theirs.save_pretrained(tmp_path / "adapter")
    finally:
        theirs.unload()
    llama = test_parity.load(tiny.save(tiny.make_model("llama-2", num_hidden_layers=1), tmp_path / "llama"))
    with pytest.raises(NotImplementedError, match="target_parameters=.*do not hold in one tensor"):
        llama.load_adapter(tmp_path / "adapter", "other")
