"""Checkpoints that transformers and bitsandbytes packed to 8 bits: the codes are taken as they are, or decoded."""

import warnings

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastft_jax import FastLanguageModel
from fastft_jax.errors import CheckpointError
from fastft_jax.quant import int8
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.quant.nf4 import NF4Array, to_bitsandbytes

IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 24))
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:.*tokenizer"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("up", "down"))


def load(folder, **options):
    options = {"dtype": "float32", "load_in_4bit": False} | options
    return FastLanguageModel.from_pretrained(folder, max_seq_length=64, **options)[0]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(the folder that transformers wrote in 8 bits, its tensors, the same model with weights that bitsandbytes
    decodes)"""
    folder = tmp_path_factory.mktemp("packed")
    base = tiny.save(tiny.make_model("llama-2", num_hidden_layers=2), folder / "base")
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(folder / "int8")
    decoded = transformers.AutoModelForCausalLM.from_pretrained(folder / "int8", device_map="cpu").dequantize()
    return folder / "int8", load_file(folder / "int8" / "model.safetensors"), decoded


def mlp(model):
    return model.decoder.segments[0][0].mlp


def test_codes_and_scales_are_the_checkpoints_and_logits_those_of_its_decoded_weights(packed):
    folder, tensors, decoded = packed
    model = load(folder, load_in_8bit=True)
    weight = mlp(model).up_proj.weight.get_value()
    assert isinstance(weight, Int8Array)
    np.testing.assert_array_equal(weight.codes[1], tensors[f"{UP}.weight"].numpy())
    exact = tensors[f"{UP}.weight"].double() * tensors[f"{UP}.SCB"].double()[:, None] / 127
    np.testing.assert_allclose(int8.dequantize(weight.at(1), "float32"), exact, rtol=2**-22)  # two roundings
    with torch.no_grad():
        expected = decoded(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(model(IDS), expected, atol=1e-4)
    np.testing.assert_allclose(load(folder)(IDS), expected, atol=1e-4)  # decoded, without quantisation


def test_in_4_bits_the_decoded_weights_are_quantised_which_is_said(packed):
    folder, tensors, _ = packed
    with pytest.warns(UserWarning, match="is in 8 bits: its matrices are quantised again"):
        model = load(folder, load_in_4bit=True)
    weight = mlp(model).down_proj.weight.get_value()
    assert isinstance(weight, NF4Array)
    codes, _ = bnb.quantize_4bit(
        tensors[f"{DOWN}.weight"].float() * (tensors[f"{DOWN}.SCB"] / 127)[:, None], quant_type="nf4"
    )
    np.testing.assert_array_equal(to_bitsandbytes(weight.at(1).sliced())["weight"], codes.numpy())


def test_a_merged_checkpoint_onto_it_is_refused_and_one_of_its_own_is_plain(packed, tmp_path):
    folder, _, decoded = packed
    model = load(folder, load_in_8bit=True)
    with pytest.raises(CheckpointError, match="packed in 8 bits, so it is no original"):
        model.save_pretrained_merged(tmp_path / "merged", base="original")
    model.save_pretrained_merged(tmp_path / "merged", dtype="float32", verify=False)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for (name, ours), theirs in zip(merged.named_parameters(), decoded.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-21, atol=0, msg=name)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop(f"{UP}.SCB"), f"lacks '{UP}.SCB'"),
        (lambda t: t.update({f"{UP}.SCB": torch.zeros(3)}), r"SCB' is float32\[3\], which is not float32\[96\]"),
        (lambda t: t.update({f"{UP}.weight_format": torch.tensor(2, dtype=torch.uint8)}), "weight_format' is 2"),
        (lambda t: t.update({"model.stray.SCB": torch.zeros(2)}), "stray"),
    ],
)
def test_a_packing_that_is_not_understood_is_refused_by_name(packed, damage, said, tmp_path):
    folder, tensors, _ = packed
    tensors = dict(tensors)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for options in ({}, {"load_in_8bit": True}):
        with pytest.raises(CheckpointError, match=said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(tmp_path, **options)


def test_a_layer_left_in_16_bits_puts_all_of_its_place_there(packed, tmp_path):
    folder, tensors, _ = packed
    tensors = dict(tensors)
    assert tensors.pop(f"{DOWN}.weight_format") == 0  # row by row
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"] * (tensors.pop(f"{DOWN}.SCB") / 127)[:, None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.warns(UserWarning, match="down_proj.weight: 1 of 2 layers are not in 8 bits"):
        model = load(tmp_path, load_in_8bit=True)
    assert isinstance(mlp(model).up_proj.weight.get_value(), Int8Array)
    np.testing.assert_allclose(mlp(model).down_proj.weight.get_value()[1], tensors[f"{DOWN}.weight"], rtol=2**-22)
