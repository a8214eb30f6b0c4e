"""merged_4bit: what transformers and bitsandbytes load from the folder, and which codes are in it."""

import json
import warnings

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny
import torch
import transformers
from test_bitsandbytes_checkpoints import pack

from fastft_jax import FastLanguageModel
from fastft_jax.convert.read_back import folder_logits
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError

IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 20))
STATE = "weight.quant_state.bitsandbytes__nf4"


pytestmark = pytest.mark.usefixtures("quick_compilation")


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype="float32", **options)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.make_model("llama-2", num_hidden_layers=2), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def merged(base, tmp_path_factory):
    """(the model, its merged folder, the checkpoint it began from, which bitsandbytes packed)."""
    folder = tmp_path_factory.mktemp("packed")
    packed, _ = pack(base, folder, double=True, skip=["layers.1.self_attn.o_proj"])  # so o_proj is kept in 16 bits
    model = load(packed)
    FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False, target_modules=["q_proj", "o_proj"])
    written = model.save_pretrained_merged(folder / "merged", None, "merged_4bit", rows=IDS)
    assert written.difference.mean < written.bound < 1.13 * written.difference.spread
    return model, folder / "merged", packed


def test_transformers_loads_it_and_computes_what_we_read(merged):
    _, folder, _ = merged
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    modules = dict(theirs.named_modules())
    packed = {name for name, module in modules.items() if isinstance(module, bnb.nn.Linear4bit)}
    kinds = {name.rpartition(".")[2] for name in packed}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    for name in packed:  # float32 products, as ours; norms and the embedding are kept in bfloat16 by transformers
        modules[name].compute_dtype = torch.float32
    for name, parameter in theirs.named_parameters():
        if name.removesuffix(".weight") not in packed:
            parameter.data = parameter.data.float()
    theirs.train()  # in eval mode some CPUs pack the weights anew, in place
    expected = theirs(torch.tensor(IDS)).logits.detach().numpy()
    ours = folder_logits(folder, IDS, np.ones_like(IDS), np.float32)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4, rtol=0)  # the bound of every parity test


def test_matrices_without_an_adapter_keep_their_codes_and_scales_bit_for_bit(merged):
    _, folder, source = merged
    ours, theirs = Checkpoint.open(folder), Checkpoint.open(source)
    # every part that bitsandbytes writes, and no other
    assert set(ours.names) == {n for n in theirs.names if "o_proj.weight." not in n}
    for name in ours.names:
        if "q_proj" in name or "o_proj" in name:
            continue
        a, b = ours.read(name), theirs.read(name)
        if name.endswith(STATE):  # ours ends with spaces
            a, b = (json.loads(x.tobytes()) for x in (a, b))
            assert a.pop("dtype") == b.pop("dtype") == "bfloat16" and a == b
        elif "self_attn" in name or "mlp" in name:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_array_equal(a, b.astype("bfloat16"))


def test_an_adapted_matrix_is_merged_in_float32_and_has_the_codes_that_bitsandbytes_gives_it(merged):
    model, folder, source = merged
    ours, theirs, name = Checkpoint.open(folder), Checkpoint.open(source), "model.layers.1.self_attn.q_proj."
    parts = {n.removeprefix(name): torch.tensor(theirs.read(n)) for n in theirs.names if n.startswith(name)}
    codes = parts.pop("weight")
    state = bnb.functional.QuantState.from_dict(
        {f"weight.{k.removeprefix('weight.')}": v for k, v in parts.items()}, "cpu"
    )
    state.dtype = torch.float32
    linear = model.decoder.segments[0][0].self_attn.q_proj
    a, b = (torch.tensor(np.asarray(x.get_value()[1])) for x in (linear.lora_A, linear.lora_B))
    w = bnb.functional.dequantize_4bit(codes, state) + linear.scaling * (b @ a)
    wanted, state = bnb.functional.quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    found = ours.read(name + "weight")
    assert np.mean(found != wanted.numpy()) < 0.002  # a product summed in another order moves what sits on an edge
    assert np.mean(found != theirs.read(name + "weight")) > 0.1
    assert np.mean(ours.read(name + "weight.absmax") != state.absmax.numpy()) < 0.02
    np.testing.assert_allclose(ours.read(name + "weight.nested_absmax"), state.state2.absmax.numpy(), rtol=1e-5)
    said = json.loads(ours.read(name + STATE).tobytes())
    assert said["nested_offset"] == pytest.approx(float(state.offset), rel=1e-6) and said["shape"] == list(w.shape)


def test_a_16_bit_base_is_packed_as_bitsandbytes_packs_it(base, tmp_path):
    packed, _ = pack(base, tmp_path, double=True)
    load(base, load_in_4bit=False).save_pretrained_merged(tmp_path / "merged", None, "merged_4bit", verify=False)
    ours, theirs = Checkpoint.open(tmp_path / "merged"), Checkpoint.open(packed)
    assert set(ours.names) == set(theirs.names)
    for name in theirs.names:
        if name.endswith("_proj.weight"):  # bitsandbytes was given the float32 base rounded to bfloat16
            assert np.mean(ours.read(name) != theirs.read(name)) < 0.02
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert transformers.BitsAndBytesConfig.from_dict(settings).to_dict() == settings
    assert settings["llm_int8_skip_modules"] is None and settings["bnb_4bit_use_double_quant"]


def test_a_packed_base_goes_out_in_16_bits_or_32(merged, tmp_path):
    model, _, source = merged
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", rows=IDS)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    expected = theirs(torch.tensor(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match="packed in 4 bits, so it is no original to merge onto"):
        model.save_pretrained_merged(tmp_path / "original", base="original")
    assert not (tmp_path / "original").exists()
