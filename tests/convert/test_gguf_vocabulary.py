"""Tokenizers into GGUF's vocabulary and out of it again, against released files and their test vectors."""

import json

import gguf
import gguf_tiny
import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.convert.gguf.pre_tokenizers import pre_tokenizer_name
from fastft_jax.convert.gguf.tokenizer import gguf_tokenizer
from fastft_jax.convert.gguf.vocabulary import read_vocabulary
from fastft_jax.errors import CheckpointError


@pytest.fixture(scope="module", params=["qwen2", "phi-3"])
def released(request, shared_data):
    """(file, our tokenizer of it, its texts, the ids that llama.cpp's own tests expect of them)."""
    path = shared_data / "tokenizers" / "gguf_vocab" / f"ggml-vocab-{request.param}.gguf"
    texts = path.with_suffix(".gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = path.with_suffix(".gguf.out").read_text().split("\n")[: len(texts)]
    file = GGUFFile(path)
    return file, gguf_tokenizer(file), texts, [[int(number) for number in line.split()] for line in lines]


def test_released_vocabularies_tokenise_their_test_vectors(released):
    _, tokenizer, texts, expected = released
    assert len(texts) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text


def test_a_vocabulary_read_and_written_is_the_released_one(released):
    file, tokenizer, _, _ = released
    tokens = file.get("tokenizer.ggml.tokens")
    vocabulary = read_vocabulary(tokenizer, len(tokens))
    assert vocabulary.tokens == tokens
    assert (vocabulary.model, vocabulary.pre) == (file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre"))
    assert vocabulary.add_bos == file.get("tokenizer.ggml.add_bos_token", False)
    assert vocabulary.special["eos"] == file.get("tokenizer.ggml.eos_token_id")
    assert vocabulary.chat_template == file.get("tokenizer.chat_template")
    types = file.get("tokenizer.ggml.token_type")
    if vocabulary.model == "gpt2":
        assert vocabulary.types == types and vocabulary.merges == file.get("tokenizer.ggml.merges")
        return
    # an older converter's file: <unk> is control there, and padding unknown
    differ = {t for t, a, b in zip(tokens, vocabulary.types, types, strict=True) if a != b and "[PAD" not in t}
    assert differ == {"<unk>"}


def test_scores_from_merges_order_pieces_as_sentencepiece_does(shared_data):
    """tokenizer.model of Llama 2 holds real scores; ours come from tokenizer.json alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = shared_data / "tokenizers" / "tinyllama"
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **special)
    vocabulary = read_vocabulary(tokenizer, 32_003)
    count = model.vocab_size()
    assert vocabulary.tokens[:count] == [model.id_to_piece(i) for i in range(count)]
    assert vocabulary.tokens[count:] == [f"[PAD{i}]" for i in range(count, 32_003)]
    assert vocabulary.types[count:] == [gguf.TokenType.UNUSED] * 3
    kinds = [
        (model.IsUnknown, gguf.TokenType.UNKNOWN),
        (model.IsControl, gguf.TokenType.CONTROL),
        (model.IsByte, gguf.TokenType.BYTE),
    ]
    for i in range(count):
        assert vocabulary.types[i] == next((kind for test, kind in kinds if test(i)), gguf.TokenType.NORMAL)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    made = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges}
    at = [i for i in range(count) if vocabulary.tokens[i] in made]
    assert len(at) > 29_000
    ours, theirs = np.array(vocabulary.scores)[at], np.array([model.get_score(i) for i in at])
    np.testing.assert_array_equal(np.argsort(-ours, kind="stable"), np.argsort(-theirs, kind="stable"))
    assert vocabulary.add_bos and not vocabulary.add_eos and vocabulary.add_space_prefix


@pytest.mark.parametrize(
    ("rules", "name"), [("gpt2", "gpt-2"), ("digits", "smollm"), ("llama3", "llama-bpe"), ("qwen2", "qwen2")]
)
def test_a_tokenizer_of_ones_own_is_named_by_its_rules_and_survives_the_file(rules, name, tmp_path):
    tokenizer = gguf_tiny.byte_tokenizer(rules)
    tokenizer.chat_template = "{{ messages }}"
    vocabulary = read_vocabulary(tokenizer, gguf_tiny.VOCABULARY)
    assert vocabulary.pre == name
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    again = gguf_tokenizer(GGUFFile(tmp_path / "v.gguf"))
    for text in gguf_tiny.TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (again.bos_token, again.eos_token, again.chat_template) == ("<s>", "</s>", "{{ messages }}")


def test_tokenizers_that_llama_cpp_would_cut_otherwise_are_refused():
    tokenizer = gguf_tiny.byte_tokenizer("qwen2")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    with pytest.raises(CheckpointError, match="no name for this tokenizer's pre_tokenizer"):
        pre_tokenizer_name(tokenizer, description)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))
    with pytest.raises(CheckpointError, match="of type 'Unigram' cannot be written"):
        read_vocabulary(unigram, 10)
