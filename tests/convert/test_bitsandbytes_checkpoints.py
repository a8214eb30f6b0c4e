"""Checkpoints that bitsandbytes packed to 4 bits load bit for bit, and give what their decoded weights give."""

import json
import shutil

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastft_jax import FastLanguageModel
from fastft_jax.errors import CheckpointError
from fastft_jax.quant.nf4 import NF4Array

IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 24))
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def pack(folder, out, *, double, skip=(), quant_type="nf4"):
    """The folder with its layers' linears packed by bitsandbytes; and the same in 16 bits, decoded by it."""
    packed, decoded = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        packed[name] = decoded[name] = w
        if ".layers." not in name or w.ndim != 2 or any(part in name for part in skip):
            continue
        codes, state = bnb.quantize_4bit(w.to(torch.bfloat16), compress_statistics=double, quant_type=quant_type)
        packed |= {name: codes} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        state.dtype = torch.float32  # what a product in float32 decodes to
        decoded[name] = bnb.dequantize_4bit(codes, state)
    for path, tensors in ((out / "packed", packed), (out / "decoded", decoded)):
        shutil.copytree(folder, path)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    return out / "packed", out / "decoded"


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype="float32", **options)[0]


def linears(model) -> dict:
    decoder = model.decoder.segments[0][0]
    return {n: getattr(decoder.mlp, n).weight.get_value() for n in ("gate_proj", "up_proj", "down_proj")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.make_model("llama-2", num_hidden_layers=2), tmp_path_factory.mktemp("base"))


@pytest.mark.filterwarnings("ignore:.*tokenizer")
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_codes_and_scales_are_the_checkpoints_and_logits_those_of_its_decoded_weights(base, tmp_path, double):
    packed, decoded = pack(base, tmp_path, double=double)
    model = load(packed)
    assert all(isinstance(w, NF4Array) and (w.absmax_scale is not None) is double for w in linears(model).values())
    expected = load(decoded, load_in_4bit=False)
    np.testing.assert_allclose(model(IDS), expected(IDS), atol=1e-5)
    if double:  # ours, of the same bfloat16 weights: the same codes, so that mirrors and originals train alike
        own = linears(load(base))
        for name, w in linears(model).items():
            assert np.mean(np.asarray(w.codes) != np.asarray(own[name].codes)) < 0.02  # the base here is float32
    in_full = load(packed, load_in_4bit=False)
    np.testing.assert_allclose(in_full(IDS), expected(IDS), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*tokenizer")
def test_matrices_left_in_16_bits_are_not_quantised(base, tmp_path):
    packed, decoded = pack(base, tmp_path, double=True, skip=["layers.1.mlp.down_proj", "up_proj"])
    with pytest.warns(UserWarning, match="mlp.down_proj.weight: 1 of 2 layers are not in 4 bits"):
        model = load(packed)
    kinds = {name: isinstance(w, NF4Array) for name, w in linears(model).items()}
    assert kinds == {"gate_proj": True, "up_proj": True, "down_proj": False}
    codes = linears(load(base))["up_proj"].codes  # no part of up_proj is packed: it is a 16-bit matrix like any other
    np.testing.assert_array_equal(linears(model)["up_proj"].codes, codes)
    assert np.abs(np.asarray(model(IDS)) - np.asarray(load(decoded, load_in_4bit=False)(IDS))).max() < 1


def _set(key, value):
    def damage(tensors):
        name = next(n for n in tensors if n.endswith("quant_state.bitsandbytes__nf4"))
        state = json.loads(bytes(tensors[name].numpy())) | {key: value}
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return damage


def _drop(suffix):
    return lambda tensors: tensors.pop(next(n for n in tensors if n.endswith(suffix)))


def _shorten(suffix):
    def damage(tensors):
        name = next(n for n in tensors if n.endswith(suffix))
        tensors[name] = tensors[name][:-1].clone()

    return damage


def _other_map(tensors):
    name = next(n for n in tensors if n.endswith(".quant_map"))
    tensors[name] = tensors[name] * 2


@pytest.mark.filterwarnings("ignore:.*tokenizer")
@pytest.mark.parametrize(
    "damage, said",
    [
        (_set("blocksize", 128), "blocksize=128"),
        (_set("shape", [3, 5]), r"shape=\[3, 5\]"),
        (_drop(".absmax"), "absmax"),
        (_shorten(".absmax"), "absmax.*numbers of uint8"),
        (_other_map, "quant_map.*own map"),
        (lambda tensors: tensors.update({"model.stray.weight.absmax": torch.zeros(2)}), "stray"),
    ],
    ids=["blocksize", "shape", "dropped", "short", "map", "stray"],
)
def test_a_packing_that_is_not_understood_is_refused_by_name(base, tmp_path, damage, said):
    packed, _ = pack(base, tmp_path, double=True)
    tensors = load_file(packed / "model.safetensors")
    damage(tensors)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load(packed)


@pytest.mark.filterwarnings("ignore:.*tokenizer")
def test_fp4_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="FP4"):
        load(pack(base, tmp_path, double=False, quant_type="fp4")[0])


@pytest.mark.filterwarnings("ignore:.*tokenizer")
@pytest.mark.parametrize("name", ["stories260k-nf4", "stories260k-nf4-dq"])
def test_real_checkpoints_give_the_logits_that_transformers_gives(shared_data, name):
    folder = shared_data / "bnb" / name
    reference = np.load(folder / "reference.npz")
    model = load(folder)
    logits = np.asarray(model(reference["input_ids"]), np.float32)
    np.testing.assert_allclose(logits, reference["logits_fp32"], atol=1e-4)
    assert all(isinstance(w, NF4Array) for w in linears(model).values())
