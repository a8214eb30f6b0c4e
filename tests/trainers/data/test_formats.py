"""Formats: the columns decide, every spelling of a conversation becomes the same messages, bad rows are named."""

import json

import pytest

from fastft_jax.errors import DataError
from fastft_jax.trainers.data import detect_format
from fastft_jax.trainers.data.formats import Conversation, Document, Passage, convert
from fastft_jax.trainers.data.messages import normalise_tools

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
        ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, "alpaca"),
        ({"instruction": "i", "input": "", "output": "o", "text": "rendered"}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
        ({"conversations": [U]}, "messages"),
        ({"messages": [U], "prompt": "p"}, "messages"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"question": "p", "answer": "c"}, "prompt_completion"),
        ({"prompt": [U], "response": [A]}, "prompt_completion"),
        ({"text": "t", "url": "u"}, "text"),
    ],
)
def test_columns_tell_the_format(row, name):
    assert detect_format([row]) == name


def test_columns_that_fit_nothing_or_two_things_are_errors_that_list_them():
    with pytest.raises(DataError, match=r"prompt, chosen, rejected.*alpaca \(instruction"):
        detect_format([{"prompt": 1, "chosen": 2, "rejected": 3}])
    both = [{"messages": [U], "question": "q", "answer": "a"}]
    with pytest.raises(DataError, match="messages, prompt_completion; set the data format"):
        detect_format(both)
    assert detect_format(both, "prompt_completion") == "prompt_completion"
    with pytest.raises(DataError, match="wants instruction"):
        detect_format(both, "alpaca")
    with pytest.raises(DataError, match="unknown data format 'llama'"):
        detect_format(both, "llama")


def test_every_spelling_of_a_conversation_is_the_same_conversation():
    spellings = [
        ({"messages": [U, A]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                       {"role": "assistant", "content": [{"type": "text", "value": "a"}]}]}, "messages"),
        ({"prompt": [U], "completion": [A]}, "prompt_completion"),
        ({"prompt": [U], "completion": "a"}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "prompt_completion"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
    ]  # fmt: skip
    for row, name in spellings:
        assert convert(row, 0, name, has_template=True) == Conversation([U, A], None, [False, True]), row


def test_alpaca_has_its_standard_prompt_without_a_template_and_keeps_braces():
    row = {"instruction": "Use {input}.", "input": "{x}", "output": "o"}
    passage = convert(row, 0, "alpaca", has_template=False)
    assert passage.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nUse {input}.\n\n### Input:\n{x}\n\n"
        "### Response:\n"
    )
    assert passage.completion == "o"
    assert "### Input" not in convert(row | {"input": ""}, 0, "alpaca", has_template=False).prompt
    chat = convert(row | {"system": "s", "history": [["1", "2"]]}, 0, "alpaca", has_template=True)
    assert [message["content"] for message in chat.messages] == ["s", "1", "2", "Use {input}.\n\n{x}", "o"]
    assert chat.trained == [False, False, True, False, True]


def test_strings_of_prompt_and_completion_are_joined_as_they_are():
    row = {"prompt": "2+2=", "completion": 4}
    assert convert(row, 0, "prompt_completion", has_template=True) == Passage("2+2=", "4")
    assert convert({"question": "q", "answer": "a"}, 0, "prompt_completion", has_template=False) == Passage("q\n", "a")
    assert convert({"text": "t"}, 0, "text", has_template=True) == Document("t")


def test_tool_calls_of_every_spelling_become_openai_s_with_ids_that_results_refer_to():
    arguments = {"city": "Paris"}
    function = {"name": "weather", "arguments": arguments}
    text = json.dumps(function)
    as_text = function | {"arguments": json.dumps(arguments)}
    expected = [{"id": "call00000", "type": "function", "function": function}]
    for call in (
        {"from": "function_call", "value": text},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": as_text}],
        },
        {"role": "assistant", "tool_calls": [function]},
        {"role": "assistant", "content": None, "function_call": function},
        {"role": "assistant", "content": [{"type": "tool_call", "value": text}]},
    ):
        chat = convert({"messages": [U, call, {"from": "observation", "value": "sun"}]}, 0, "messages", True)
        assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": expected}
        assert chat.messages[2] == {"role": "tool", "content": "sun", "tool_call_id": "call00000"}
        assert chat.trained == [False, True, False]
    assert normalise_tools('[{"name": "f"}]', 0) == [{"type": "function", "function": {"name": "f"}}]
    assert normalise_tools("[]", 0) is None is normalise_tools("", 0)


def test_reasoning_parts_become_reasoning_content():
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    chat = convert({"messages": [U, {"role": "assistant", "content": parts}]}, 0, "messages", True)
    assert chat.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


@pytest.mark.parametrize("key", ["loss_weight", "weight", "train"])
def test_a_weight_of_zero_takes_a_message_out_of_training(key):
    rows = {"messages": [U | {key: 0}, A | {key: 0.0}, U, A | {key: 1}]}
    chat = convert(rows, 0, "messages", True)
    assert chat.trained == [False, False, False, True] and chat.weighted
    assert all(key not in message for message in chat.messages)
    with pytest.raises(DataError, match="row 0, message 1: .* 0.5"):
        convert({"messages": [U, A | {key: 0.5}]}, 0, "messages", True)


def test_only_the_completion_is_trained_of_message_lists():
    chat = convert({"prompt": [U, A, U], "completion": [A]}, 0, "prompt_completion", True)
    assert chat.trained == [False, False, False, True] and not chat.weighted


@pytest.mark.parametrize(
    ("row", "name", "says"),
    [
        ({"instruction": "i", "output": None}, "alpaca", "row 7: 'output' is missing"),
        ({"text": ["a"]}, "text", "row 7: 'text' is list"),
        ({"messages": []}, "messages", "row 7: no list of messages"),
        ({"messages": "hi"}, "messages", "row 7: no list of messages"),
        ({"messages": ["hi"]}, "messages", "row 7, message 0: a str"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "row 7, message 0: role 'wizard'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "row 7, message 0: the content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "messages", "type 'image'"),
        (
            {"messages": [{"from": "function_call", "value": "not json"}]},
            "sharegpt",
            "the function_call is not JSON",
        ),
        ({"messages": [{"from": "function_call", "value": "[1]"}]}, "sharegpt", "needs a name"),
        ({"messages": [U], "tools": "{"}, "messages", "row 7: the tools column is not JSON"),
        ({"prompt": [U], "completion": []}, "prompt_completion", "row 7: .* empty list"),
    ],
)
def test_bad_rows_are_named(row, name, says):
    with pytest.raises(DataError, match=says):
        convert(row, 7, name, has_template=True)
