"""Ids and labels: the same as TRL's and transformers', nothing lost but what is counted, errors if nothing is left."""

import importlib.util
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MARKED, build_tokenizer
from transformers import PreTrainedTokenizerFast

from fastft_jax.errors import DataError
from fastft_jax.trainers.data import BatchSource, check_tokenizer, load_rows, prepare
from fastft_jax.trainers.data.tokenize import tokens_in_spans

TOKENIZER = build_tokenizer(eos_token="</s>")
CHAT = {"messages": [{"role": "user", "content": "Hello world"}, {"role": "assistant", "content": "the answer is 42."}]}


def trained_text(data, i=0, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(data.labels[i][data.labels[i] != -100])


def test_prompt_completion_ids_and_labels_equal_trl_s(shared_data):
    """TRL 1.16's collated SFT batch on the same four pairs, completion-only and full text."""
    tool = shared_data.parent / "tools" / "llama2c_to_hf.py"
    spec = importlib.util.spec_from_file_location("llama2c_to_hf", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pieces = module.read_tokenizer(shared_data / "stories260K" / "tok512.bin", 512)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=module.build_tokenizer(pieces), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    pairs = json.loads((shared_data / "oracle/trl/trl_oracle.json").read_text())["pairs"]
    oracle = np.load(shared_data / "oracle/trl/trl_oracle.npz")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion, _ in pairs]
    for only, name in ((True, "sft"), (False, "sft_text")):
        data = prepare(rows, tokenizer, max_length=64, train_on_responses_only=only)
        for i, (ids, labels) in enumerate(zip(data.input_ids, data.labels, strict=True)):
            n = len(ids)
            assert n == oracle[f"{name}.attention_mask"][i].sum()
            np.testing.assert_array_equal(ids, oracle[f"{name}.input_ids"][i, :n])
            # They leave a label on the first token, which their shift then drops.
            np.testing.assert_array_equal(labels[1:], oracle[f"{name}.labels"][i, 1:n])


@pytest.mark.parametrize("which", ["byte-level", "tinyllama"])
def test_chat_ids_and_mask_equal_transformers_assistant_mask(which, request):
    tokenizer = TOKENIZER if which == "byte-level" else request.getfixturevalue("tinyllama")
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate(
            ["Hello", "how are you?", "中文 ok", "the  answer\n\nis 42", "x", "def add(a):\n    return"]
        )
    ]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    data = prepare(
        [{"messages": messages}], tokenizer, max_length=512, chat_template=MARKED, train_on_responses_only=True
    )
    assert data.input_ids[0].tolist() == theirs["input_ids"]
    ours, mask = data.labels[0] != -100, np.array(theirs["assistant_masks"], bool)
    assert not (mask & ~ours).any()
    # transformers asks which token a span's first character is in, and gets the first of several that share it; we
    # train all that share it (sentencepiece's blank and line break, the bytes of a letter). No other difference.
    text = tokenizer.apply_chat_template(messages, chat_template=MARKED, tokenize=False)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for i in np.flatnonzero(ours != mask):
        assert offsets[i] in offsets[:i] + offsets[i + 1 :]


def test_a_token_that_joins_the_header_s_blank_with_the_first_word_is_trained():
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    data = prepare([CHAT], TOKENIZER, max_length=64, chat_template=source, train_on_responses_only=True)
    assert trained_text(data) == " the answer is 42.</s>"


def test_blanks_that_offsets_leave_out_belong_to_the_token_after_them():
    offsets = np.array([[0, 2], [3, 3], [3, 5], [6, 6]])
    assert tokens_in_spans(offsets, [(2, 6)]).tolist() == [False, True, True, True]
    assert tokens_in_spans(offsets, [(0, 1), (5, 6)]).tolist() == [True, False, False, True]
    assert tokens_in_spans(np.zeros((0, 2), int), [(0, 1)]).tolist() == []


def test_bos_is_there_once_whoever_writes_it():
    for rows, kind in (
        ([{"text": "Hello"}], None),
        ([CHAT], "zephyr"),
        ([{"prompt": "Hello", "completion": "x"}], None),
    ):
        ids = prepare(rows, TOKENIZER, max_length=64, chat_template=kind).input_ids[0].tolist()
        assert ids[0] == 0 and ids.count(0) == 1
    no_bos = build_tokenizer(bos=None, eos_token="</s>")
    assert 0 not in prepare([{"text": "Hello"}], no_bos, max_length=64).input_ids[0]


def test_eos_ends_texts_and_is_trained():
    data = prepare([{"prompt": "2+2=", "completion": "4"}], TOKENIZER, max_length=64, train_on_responses_only=True)
    assert trained_text(data) == "4</s>"
    data = prepare([{"prompt": "2+2=", "completion": "4"}], TOKENIZER, max_length=64)
    assert trained_text(data) == "2+2=4</s>" and data.labels[0][0] == -100


def test_a_message_weight_masks_even_if_not_asked():
    rows = [{"messages": [m | {"loss_weight": float(m["role"] == "assistant")} for m in CHAT["messages"]]}]
    assert trained_text(prepare(rows, TOKENIZER, max_length=64, chat_template="zephyr")) == "the answer is 42.</s>"


def test_truncation_keeps_the_start_and_is_counted_and_lost_answers_are_dropped():
    rows = [CHAT, {"messages": [{"role": "user", "content": "Hello " * 60}, CHAT["messages"][1]]}]
    whole = prepare(rows, TOKENIZER, max_length=2048, chat_template="zephyr", train_on_responses_only=True)
    n = len(whole.input_ids[0]) - 3
    cut = prepare(rows, TOKENIZER, max_length=n, chat_template="zephyr", train_on_responses_only=True)
    np.testing.assert_array_equal(cut.input_ids[0], whole.input_ids[0][:n])
    assert cut.row_numbers == [0] and (cut.stats.n_truncated, cut.stats.n_dropped) == (2, 1)
    assert "2 rows, 2 truncated (100.0%), 1 dropped" in cut.stats.summary()
    with pytest.raises(DataError, match="nothing would be trained: in all 2 rows no response is left.*max_length=8"):
        prepare(rows, TOKENIZER, max_length=8, chat_template="zephyr", train_on_responses_only=True)


def test_conversations_without_an_answer_leave_nothing_to_train():
    with pytest.raises(DataError, match="nothing would be trained"):
        prepare([{"messages": CHAT["messages"][:1]}], TOKENIZER, max_length=64, chat_template="zephyr",
                train_on_responses_only=True)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=5), st.integers(3, 20))
def test_text_is_cut_in_pieces_and_no_token_of_it_is_lost(texts, max_length):
    data = prepare([{"text": text} for text in texts], TOKENIZER, max_length=max_length)
    whole = [i for text in texts for i in [0, *TOKENIZER(text, add_special_tokens=False)["input_ids"], 1]]
    assert np.concatenate(data.input_ids).tolist() == whole
    assert all(2 <= len(ids) <= max_length for ids in data.input_ids)
    assert data.stats.n_truncated == 0 == data.stats.n_dropped


def test_the_sample_shows_what_is_trained_as_far_as_it_was_kept():
    data = prepare([CHAT], TOKENIZER, max_length=64, chat_template="zephyr", train_on_responses_only=True)
    assert data.sample_text() == "<s><|user|>\nHello world</s>\n<|assistant|>\n«the answer is 42.</s>»\n"
    assert "\x1b[32mthe answer is 42.</s>\x1b[0m" in data.sample_text(color=True)
    cut = prepare([CHAT], TOKENIZER, max_length=len(data.input_ids[0]) - 2, chat_template="zephyr",
                  train_on_responses_only=True)  # fmt: skip
    assert cut.sample_text().endswith("«the answer is 42.»")
    text = prepare([{"prompt": "a", "completion": " b"}], TOKENIZER, max_length=64, train_on_responses_only=True)
    assert text.sample_text() == "a« b</s>»"


def test_the_summary_counts_tokens_and_their_trained_share():
    data = prepare([CHAT], TOKENIZER, max_length=64, chat_template="zephyr", train_on_responses_only=True)
    labels = BatchSource(data, 1, 64).batch(0, 0)["labels"]
    assert data.stats.n_trained == (labels != -100).sum()
    assert data.stats.trained_share == data.stats.n_trained / len(data.input_ids[0])
    assert data.stats.summary().endswith(f"{data.stats.trained_share:.1%} trained")


def test_a_dropped_system_turn_is_reported():
    source = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    rows = [{"messages": [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]}, CHAT]
    data = prepare(rows, TOKENIZER, max_length=64, chat_template=source)
    assert data.stats.n_altered == 1 and "in 1 rows the chat template drops" in data.stats.summary()


def test_templates_that_lose_tool_calls_or_refuse_a_row_are_errors_that_name_it():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    rows = [CHAT, {"messages": [CHAT["messages"][0], call]}]
    plain = "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match="row 1: the chat template .* leaves tool calls out"):
        prepare(rows, TOKENIZER, max_length=64, chat_template=plain)
    with pytest.raises(DataError, match=r"row 1: the chat template \(gemma\) refuses .* no place for tool_calls"):
        prepare(rows, TOKENIZER, max_length=64, chat_template="gemma")
    with pytest.raises(DataError, match=r"row 0: .*\(gemma\) refuses this conversation: roles must alternate"):
        prepare([{"messages": CHAT["messages"][::-1]}], TOKENIZER, max_length=64, chat_template="gemma")


def test_chat_templates_by_name_path_and_text(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(MARKED)
    by_path = prepare([CHAT], TOKENIZER, max_length=64, chat_template=str(path))
    by_text = prepare([CHAT], TOKENIZER, max_length=64, chat_template=MARKED)
    assert by_path.sample == by_text.sample and by_path.chat_template == MARKED
    own = build_tokenizer(eos_token="</s>")
    own.chat_template = MARKED
    mine = prepare([CHAT], own, max_length=64)
    assert mine.sample == by_path.sample and mine.chat_template is None
    with pytest.raises(DataError, match="row 0 is a conversation, and there is no chat template.*zephyr, chatml"):
        prepare([CHAT], TOKENIZER, max_length=64)
    with pytest.raises(DataError, match="did you mean 'chatml'"):
        prepare([CHAT], TOKENIZER, max_length=64, chat_template="chatm")
    with pytest.raises(DataError, match="line 1"):
        prepare([CHAT], TOKENIZER, max_length=64, chat_template="{% for %}")


def test_alpaca_without_a_template_is_the_alpaca_prompt():
    row = {"instruction": "Say hello", "input": "", "output": "hello"}
    data = prepare([row], TOKENIZER, max_length=512, train_on_responses_only=True)
    assert data.sample_text().endswith("### Instruction:\nSay hello\n\n### Response:\n«hello</s>»")


def test_a_template_whose_turns_end_in_no_token_is_noted():
    bare = build_tokenizer(markers=[], eos_token="</s>")
    assert "chatml" in prepare([CHAT], bare, max_length=256, chat_template="chatml").notes[0]
    assert not prepare([CHAT], bare, max_length=256, chat_template="zephyr").notes
    assert not prepare([CHAT], TOKENIZER, max_length=256, chat_template="chatml").notes


def test_tokenizers_that_cannot_work_are_refused_with_what_to_do():
    assert check_tokenizer(TOKENIZER) == 1  # pads with eos
    assert check_tokenizer(build_tokenizer(eos_token="</s>", pad_token="<|end|>")) != 1
    with pytest.raises(DataError, match="neither a pad_token nor an eos_token"):
        check_tokenizer(build_tokenizer())
    with pytest.raises(DataError, match="no eos_token to end a text"):
        prepare([{"text": "a"}], build_tokenizer(pad_token="<|end|>"), max_length=8)
    size = len(TOKENIZER)
    check_tokenizer(TOKENIZER, size)
    check_tokenizer(TOKENIZER, size + 100)
    with pytest.raises(DataError, match=f"has {size - 1} rows"):
        check_tokenizer(TOKENIZER, size - 1)


def test_options_that_cannot_be_met_are_errors():
    with pytest.raises(DataError, match="a text column has no responses"):
        prepare([{"text": "a"}], TOKENIZER, max_length=8, train_on_responses_only=True)
    with pytest.raises(DataError, match="max_length is 1"):
        prepare([{"text": "a"}], TOKENIZER, max_length=1)
    with pytest.raises(DataError, match="no rows"):
        prepare([], TOKENIZER, max_length=8)


def test_real_files_become_batches(shared_data, tinyllama):
    for file, template in (("sft/alpaca_zh_demo.json", None), ("sft/glaive_toolcall_en_demo.json", "zephyr"),
                           ("sft/reason_tool_use_demo_50.jsonl", "chatml"), ("gsm8k/train.jsonl", None)):  # fmt: skip
        rows, data_format = load_rows(shared_data / file, split="train[:40]")
        data = prepare(rows, tinyllama, max_length=512, data_format=data_format, chat_template=template,
                       train_on_responses_only=True)  # fmt: skip
        source = BatchSource(data, 2, 512, packing=True)
        assert 0.05 < data.stats.trained_share < 0.95 and source.fill > 0.6
        assert sum((source.batch(0, i)["labels"] != -100).sum() for i in range(len(source))) == data.stats.n_trained
