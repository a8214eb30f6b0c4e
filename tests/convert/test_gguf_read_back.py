"""A GGUF file is decoded again before it gets its name, and computes what the live model computes; or it gets none."""

import gguf_tiny
import numpy as np
import pytest
import torch
import transformers

from fastft_jax import FastLanguageModel
from fastft_jax.convert.gguf import export
from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.convert.gguf.read_back import file_logits, method_bound
from fastft_jax.convert.merged import merge
from fastft_jax.convert.read_back import compare
from fastft_jax.convert.sample_rows import ROW_LENGTH, TEXT, comparison_rows
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.export import Settings
from fastft_jax.export import export as export_all

IDS = np.random.default_rng(0).integers(4, 300, (2, 24))
MASK = np.ones_like(IDS)
METHODS = ["f32", "bf16", "q8_0", "q4_k_m", "q2_k"]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tokenizer():
    return gguf_tiny.byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A Llama with rows of k-quants' 256, and an adapter."""
    folder = tmp_path_factory.mktemp("base")
    small = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    gguf_tiny.save_folder(gguf_tiny.make_family("llama-2", **small), tokenizer, folder)
    made, _ = FastLanguageModel.from_pretrained(folder, 64, dtype="float32", load_in_4bit=False)
    return FastLanguageModel.get_peft_model(made, r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)


@pytest.fixture(scope="module")
def written(model, tokenizer, tmp_path_factory):
    return model.save_pretrained_gguf(tmp_path_factory.mktemp("out"), tokenizer, METHODS, rows=IDS)


def test_every_file_says_how_it_differs_and_fewer_bits_differ_more(model, written):
    means = [written.differences[path].mean for path in written]
    assert means == sorted(means) and means[0] < 1e-5 < means[1]
    bounds = [method_bound(model.decoder, method, written.differences[written[0]].spread) for method in METHODS]
    assert all(mean < bound for mean, bound in zip(means, bounds, strict=True))
    assert means[2] > bounds[0] and means[3] > bounds[1]  # a bound tells its method from coarser ones
    assert str(written).startswith(f"{written[0]}: read back: |logit difference| max ")


@pytest.mark.parametrize("method", ["f32", "q4_k_m"])
def test_the_logits_read_back_are_those_of_transformers_reading_the_file(method, model, written):
    """transformers decodes GGUF by itself; float32 on both sides, so the bound of every parity test."""
    path = written[METHODS.index(method)]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    ours = file_logits(path, model.decoder.config, IDS, MASK, np.float32)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4, rtol=0)
    again, found = compare(model(IDS), ours, IDS, MASK), written.differences[path]
    assert found.max == pytest.approx(again.max, rel=1e-3, abs=1e-5) and found.tokens == IDS.size


@pytest.mark.parametrize("wrong", ["rows in another order", "without the adapter"])
def test_a_file_that_computes_something_else_gets_no_name(wrong, model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained_gguf(tmp_path, tokenizer, "f16", verify=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    if wrong == "without the adapter":
        monkeypatch.setattr(merge, "adapter_of", lambda *_: ([], np.float32(1), None))
    else:
        monkeypatch.setattr(export, "to_llama_cpp", lambda path, w, *_: w)
    with pytest.raises(CheckpointError, match=r"F16.gguf was not written: .*above the bound of 0.\d+ \(\|logit"):
        model.save_pretrained_gguf(tmp_path, tokenizer, "f16", rows=IDS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    model.save_pretrained_gguf(tmp_path, tokenizer, "f16", verify=False)  # as it was asked for
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} != before


def test_the_export_command_prints_the_comparison_and_no_verify_skips_it(model, tokenizer, tmp_path):
    (said,) = export_all(model, tokenizer, ["gguf:q8_0"], tmp_path / "a", Settings(rows=IDS.tolist()))
    assert "Q8_0.gguf: read back: |logit difference| max " in said and f"; {IDS.size} tokens" in said
    (said,) = export_all(model, tokenizer, ["gguf:q8_0"], tmp_path / "b", Settings(verify=False))
    assert said.endswith("Q8_0.gguf")


def test_an_adapter_alone_is_read_back_number_by_number(model, tmp_path, monkeypatch):
    model.save_pretrained_gguf(tmp_path, quantization_method="lora")
    real = GGUFFile.decode
    monkeypatch.setattr(GGUFFile, "decode", lambda self, name: real(self, name) * (1 + 1e-6 * ("blk.1" in name)))
    with pytest.raises(CheckpointError, match="blk.1.attn_q.weight.lora_a of the GGUF adapter read back is not what"):
        model.save_pretrained_gguf(tmp_path / "new", quantization_method="lora")
    assert not list((tmp_path / "new").iterdir())


def test_without_rows_a_few_sentences_are_compared_on_and_random_tokens_where_nothing_reads_them(tokenizer):
    before = tokenizer.backend_tokenizer.to_str()
    ids, mask = comparison_rows(None, tokenizer, 320)
    assert tokenizer.backend_tokenizer.to_str() == before  # which is saved with the model
    assert ids.shape == (len(TEXT), ROW_LENGTH) and tokenizer.decode(ids[0]) == TEXT[0][: len(tokenizer.decode(ids[0]))]
    assert mask.all() and ids.max() < 300
    for other, vocab in ((None, 320), (tokenizer, 40)):  # another model's tokenizer knows ids that this model has not
        ids, mask = comparison_rows(None, other, vocab)
        assert ids.max() < vocab and mask.all() and len(np.unique(ids)) > 30
    ids, mask = comparison_rows([[3, 4], [5]], tokenizer, 320)
    assert ids.tolist() == [[3, 4], [5, 0]] and mask.tolist() == [[1, 1], [1, 0]]
    for rows, said in (([[1, 320]], "vocabulary of 320"), ([[]], "rows is empty")):
        with pytest.raises(ConfigError, match=said):
            comparison_rows(rows, tokenizer, 320)
