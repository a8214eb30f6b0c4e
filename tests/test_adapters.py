"""Adapters of every kind that PEFT writes: read, computed, trained and written again as PEFT does it."""

import warnings

import jax
import numpy as np
import pytest
import tiny

from fastft_jax import FastLanguageModel
from fastft_jax.convert.safetensors import SafetensorsFile

TOLERANCE = 1e-4  # float32 on both sides
GOLDEN = "all7 basic bf16 dora embed_lora layers_1_3 modules_to_save norms_saved patterns rslora".split()
IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 24))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is what these tests' time goes into."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", "load_in_4bit": False, **options})[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tied, with biases on q, k, v: what the ends and the biases need."""
    return tiny.save(tiny.make_model("qwen-2.5-tied", num_hidden_layers=2), tmp_path_factory.mktemp("tied"))


# --- what PEFT wrote -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_llama(stories):
    """The trained tiny Llama, on which the golden adapters were made; every test leaves it bare."""
    return load(stories())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_adapter_computes_peft_s_logits_and_is_written_as_it_was(name, shared_data, trained_llama, tmp_path):
    model, source = trained_llama, shared_data / "peft" / name
    reference = np.load(source / "reference.npz")
    model.load_adapter(source, name)
    try:
        ours = np.asarray(model(reference["input_ids"]))
        np.testing.assert_allclose(ours, reference["logits"], atol=TOLERANCE, rtol=0)
        model.save_pretrained(tmp_path)
    finally:
        model.delete_adapter(name)
    assert (tmp_path / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
    written, read = (SafetensorsFile(f / "adapter_model.safetensors") for f in (tmp_path, source))
    assert written.tensors.keys() == read.tensors.keys()
    for tensor in read.tensors:  # bf16 comes back as float32, which is what trains
        np.testing.assert_array_equal(written.read(tensor), read.read(tensor).astype(np.float32))
    if name != "bf16":
        bytes_of = lambda f: (f / "adapter_model.safetensors").read_bytes()  # noqa: E731
        assert bytes_of(tmp_path) == bytes_of(source)
