"""GGUF files as base models: values, names, tokenizer, round trips, and files that cannot be used."""

import gguf
import gguf_tiny
import numpy as np
import pytest
import torch

from fastft_jax import FastLanguageModel
from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.errors import CheckpointError
from fastft_jax.quant.nf4 import NF4Array

pytestmark = pytest.mark.usefixtures("quick_compilation")
IDS = np.random.default_rng(0).integers(4, 300, (1, 24))


def load(path, **options):
    return FastLanguageModel.from_pretrained(
        path, max_seq_length=32, dtype="float32", **{"load_in_4bit": False} | options
    )


@pytest.fixture(scope="module")
def tokenizer():
    return gguf_tiny.byte_tokenizer("llama3")


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """(transformers' model, its folder, our files of it): Llama 3.1 with rows of 256, for k-quants."""
    folder = tmp_path_factory.mktemp("llama")
    reference = gguf_tiny.make_family("llama-3.1", hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    model, _ = load(gguf_tiny.save_folder(reference, tokenizer, folder / "hf"))
    methods = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q6_k"]
    paths = model.save_pretrained_gguf(folder, tokenizer, methods, verify=False)
    return reference, model, dict(zip(methods, paths, strict=True))


@pytest.mark.parametrize("method", ["f32", "bf16", "q4_k_m"])
def test_out_in_out_gives_the_same_file(method, llama, tokenizer, tmp_path):
    """Plain floats lose nothing; a quantised base written as float32 holds what the gguf package decodes of it."""
    _, _, paths = llama
    model, own = load(paths[method])
    metadata, tensors = gguf_tiny.contents(paths[method])
    (again,) = model.save_pretrained_gguf(tmp_path, own, method if method != "q4_k_m" else "f32", verify=False)
    if method != "q4_k_m":
        differ = {key for key, value in gguf_tiny.contents(again)[0].items() if metadata[key] != value}
        assert differ == {"general.name"}  # that of the file that was read
    for name, (_, data) in gguf_tiny.contents(again)[1].items():
        kind, stored = tensors[name]
        if method != "q4_k_m":
            np.testing.assert_array_equal(data, stored, err_msg=name)
            continue
        decoded = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(data.reshape(decoded.shape), decoded, err_msg=name)


def test_logits_are_transformers(llama):
    reference, _, paths = llama
    model, _ = load(paths["f32"])
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(model(IDS), expected, atol=1e-4)
    assert model.hf_config["rope_scaling"]["original_max_position_embeddings"] == 16


def test_a_gguf_base_is_quantised_and_takes_an_adapter(llama):
    _, plain, paths = llama
    model, tokenizer = load(paths["q8_0"], load_in_4bit=True)
    assert isinstance(model.decoder.segments[0][0].mlp.up_proj.weight.get_value(), NF4Array)
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["q_proj"])
    assert model.peft_config["base_model_name_or_path"] == str(paths["q8_0"])
    assert tokenizer("hi")["input_ids"][0] == tokenizer.bos_token_id
    difference = np.asarray(model(IDS)) - np.asarray(plain(IDS))
    assert 0.01 < np.sqrt((difference**2).mean()) < np.std(plain(IDS))  # NF4's error, not another model


@pytest.mark.parametrize("name", ["qwen-2.5-tied", "qwen-3", "llama-biases"])
def test_other_architectures_come_back_equal(name, tokenizer, tmp_path):
    model, _ = load(gguf_tiny.save_folder(gguf_tiny.make_family(name, num_hidden_layers=1), tokenizer, tmp_path / "hf"))
    (path,) = model.save_pretrained_gguf(tmp_path, tokenizer, "f32", verify=False)
    again, _ = load(path)
    assert again.decoder.config == model.decoder.config
    np.testing.assert_array_equal(again(IDS), model(IDS))


@pytest.mark.parametrize(("method", "error"), [("f32", 0.0), ("f16", 0.05), ("q8_0", 0.4), ("q4_k_m", 3.0)])
def test_llama_cpps_own_files_load(method, error, shared_data, stories):
    """Files that llama.cpp wrote of the trained model; logits within what llama.cpp itself deviates by, twice."""
    model, tokenizer = load(shared_data / "gguf" / f"stories260k-{method}.gguf")
    expected, original = load(stories())
    assert np.abs(np.asarray(model(IDS)) - np.asarray(expected(IDS))).max() <= error
    for text in gguf_tiny.TEXTS:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]


def rewritten(source, target, change):
    """A copy of a GGUF file's metadata and its first tensors, after change(metadata)."""
    metadata, tensors = gguf_tiny.contents(source)
    fields = {k: f for k, f in gguf.GGUFReader(source).fields.items() if not k.startswith("GGUF.")}
    values = change(dict(metadata))
    writer = gguf.GGUFWriter(target, values.pop("general.architecture"))
    for key, value in values.items():
        kinds = fields[key].types if key in fields else [gguf.GGUFValueType.UINT32]
        writer.add_key_value(key, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for name, (_, data) in tensors.items():
        if name in values.get("keep", tensors):
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' cannot be read \\(can be: llama, qwen2, qwen3, gemma, ",
        ),
        ({"general.type": "adapter"}, "holds a GGUF adapter, not a model"),
        ({"llama.expert_count": 8}, "'llama' with experts cannot be read"),
        ({"split.count": 3}, "is one part of 3; join them"),
        ({"llama.block_count": 3}, "lacks 'model.layers.2"),
        ({"llama.block_count": 1}, "holds 'blk.1.*', which its metadata does not call for"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is not the head's width of 64"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizers of kind 'bert' cannot be read .*tokenizer_name"),
        ({"llama.embedding_length": None}, "has no llama.embedding_length: it is not a whole model"),
    ],
)
def test_files_that_cannot_be_a_base_say_why(change, message, llama, tmp_path):
    _, _, paths = llama

    def apply(metadata):
        return {key: value for key, value in (metadata | change).items() if value is not None}

    path = rewritten(paths["f32"], tmp_path / "changed.gguf", apply)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_damaged_and_missing_files_say_so(llama, tmp_path):
    data = llama[2]["q4_0"].read_bytes()
    for name, content in (
        ("cut", data[: len(data) // 2]),
        ("head", data[:100]),
        ("text", b"hello" * 100),
        ("none", b""),
    ):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}.gguf cannot be read as GGUF"):
            load(tmp_path / f"{name}.gguf")
    with pytest.raises(CheckpointError, match="missing.gguf cannot be read as GGUF.*No such file"):
        load(tmp_path / "missing.gguf")


def test_another_tokenizer_can_be_named(llama, tmp_path):
    other = gguf_tiny.byte_tokenizer("gpt2")
    other.save_pretrained(tmp_path)
    _, tokenizer = load(llama[2]["f16"], tokenizer_name=tmp_path)
    assert tokenizer("Hello 12345")["input_ids"] == other("Hello 12345")["input_ids"]


def test_metadata_and_values_are_those_that_the_gguf_package_reads(llama):
    for method in ("q4_k_m", "bf16"):
        path = llama[2][method]
        ours, (metadata, tensors) = GGUFFile(path), gguf_tiny.contents(path)
        for key, value in metadata.items():
            assert ours.get(key) == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
        assert ours.tensors.keys() == tensors.keys()
        for name, (kind, data) in tensors.items():
            expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
            np.testing.assert_array_equal(ours.decode(name), expected.reshape(ours.tensors[name].shape))
