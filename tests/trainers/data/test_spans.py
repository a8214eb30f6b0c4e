"""Which characters are trained, for templates of every habit: compared with texts written by hand, with the marks of
TRL's training templates, and with what the real templates of nine model families render."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MARKED, build_tokenizer

from fastft_jax.errors import DataError
from fastft_jax.trainers.data import BUILTIN_TEMPLATES, load_rows
from fastft_jax.trainers.data.formats import Conversation, convert
from fastft_jax.trainers.data.spans import SpanFinder, shows
from fastft_jax.trainers.data.templates import ChatTemplate, TemplateFailure, resolve_template

TOKENIZER = build_tokenizer(eos_token="</s>")
CLOSING = {
    "zephyr": "</s>", "chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>",
    "phi-3": "<|end|>", "alpaca": "</s>", "vicuna": "</s>",
}  # fmt: skip


def chat(*contents: str, tools=None, system=None, **last) -> Conversation:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    messages = [{"role": "system", "content": system}] * (system is not None) + messages
    messages[-1] |= last
    return Conversation(messages, tools, [message["role"] == "assistant" for message in messages])


def trained(source: str, conversation: Conversation, tokenizer=TOKENIZER) -> list[str]:
    template = ChatTemplate(tokenizer, source, "this one")
    text = template.render(conversation.messages, conversation.tools)
    return [text[a:b] for a, b in SpanFinder(template).find(conversation, text, number=5)]


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_built_in_templates_train_answers_with_their_closing_and_no_header(name):
    contents = ["What?", "One.", "<b>And</b>?", "Two\n\nlines", "Again", "One."]
    lead = " " if name == "vicuna" else ""  # its generation prompt ends before the blank, so the model writes it
    expected = [lead + answer + CLOSING[name] for answer in contents[1::2]]
    assert trained(BUILTIN_TEMPLATES[name], chat(*contents)) == expected
    assert trained(BUILTIN_TEMPLATES[name], chat(*contents, system="Be brief.")) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(["<|im_end|>", "\n", " a ", "</s>\n<|assistant|>\n", "fastftB"]),
                min_size=2, max_size=8), st.sampled_from(["zephyr", "chatml"]))  # fmt: skip
def test_any_content_is_trained_whole_even_if_it_looks_like_the_template(contents, name):
    conversation = chat(*contents)
    answers = [
        message["content"] + CLOSING[name] for message in conversation.messages if message["role"] == "assistant"
    ]
    assert trained(BUILTIN_TEMPLATES[name], conversation) == answers


TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "call00000", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


@pytest.mark.parametrize("name", ["zephyr", "chatml", "llama-3"])
def test_tool_calls_are_trained_and_their_results_are_not(name):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sun", "tool_call_id": "call00000"},
        {"role": "assistant", "content": "Sun.", "reasoning_content": "It says sun."},
    ]
    conversation = Conversation(messages, [TOOL], [False, True, False, True])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    assert trained(BUILTIN_TEMPLATES[name], conversation) == [
        f"{call}\n{call}{CLOSING[name]}",
        f"<think>\nIt says sun.\n</think>\n\nSun.{CLOSING[name]}",
    ]


LOOP = "{% for m in messages %}"
END = "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    ("habit", "source", "expected"),
    [
        (
            "no generation prompt: the header is still not the model's",
            LOOP + "<|{{ m.role }}|>\n{{ m.content }}</s>\n" + END,
            ["one</s>", "two</s>"],
        ),
        (
            "no closing token: the answer ends with the blanks that end the turn",
            LOOP + "{{ m.role }}: {{ m.content }}\n" + END + "{% if add_generation_prompt %}assistant:{% endif %}",
            [" one\n", " two\n"],
        ),
        (
            "contents trimmed, an end-of-text token after everything (Phi-3.5)",
            LOOP + "<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n" + END
            + "{% if add_generation_prompt %}<|assistant|>{% else %}</s>{% endif %}",
            ["one<|end|>", "two<|end|>\n</s>"],
        ),
        (
            "earlier turns rendered otherwise than the last (Qwen3)",
            LOOP + "<|{{ m.role }}|>{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|end|>" + END + PROMPT,
            ["one<|end|>", "<think></think>two<|end|>"],
        ),
        (
            "a generation prompt that history does not have (DeepSeek-R1)",
            LOOP + "<|{{ m.role }}|>{{ m.content }}<|end|>" + END
            + "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
            ["one<|end|>", "two<|end|>"],
        ),
        (
            "something moved to the last user (Mistral's tools), so that no prefix stays one",
            "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}" + LOOP
            + "{% if m.role == 'user' %}{{ '[TOOLS]' if m == users[-1] }}[INST]{{ m.content }}[/INST]"
            "{% else %}{{ m.content }}</s>{% endif %}" + END,
            ["one</s>", "two</s>"],
        ),
    ],
)  # fmt: skip
def test_templates_that_rewrite_turns_are_placed_all_the_same(habit, source, expected):
    assert trained(source, chat("q1", "one", "q2", "two")) == expected, habit


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages | reverse %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{{ messages | length }}{% endfor %}",
        "{{ messages | length }}: {% for m in messages %}{{ m.content | reverse }}{% endfor %}",
    ],
)
def test_a_mask_that_cannot_be_placed_is_an_error_that_names_the_row(source):
    with pytest.raises(DataError, match="row 5: the loss mask cannot be placed.*assistant message 1.*this one"):
        trained(source, chat("first", "answer", "second", "other"))


def test_generation_marks_decide_where_a_template_has_them():
    conversation = chat("q", "one", "q", "two")
    assert trained(MARKED, conversation) == ["one</s>\n", "two</s>\n"]
    conversation.trained[1] = False
    assert trained(MARKED, conversation) == ["two</s>\n"]
    with pytest.raises(DataError, match="row 5: .* marks 1 generations for 2"):
        trained("{% generation %}{{ messages[1].content }}{% endgeneration %}", conversation)


TRL_PAIRS = ["qwen2_5", "llama3", "gemma", "phi3_5", "phi3"]


@pytest.mark.parametrize("family", TRL_PAIRS)
def test_spans_equal_the_marks_of_trl_s_training_templates_but_for_blanks_after_the_closing(family):
    """TRL rewrote these templates by hand with {% generation %} marks; we are given the unmarked originals."""
    import trl  # a requirement of the tests, whose version has all five

    folder = Path(trl.__file__).parent / "chat_templates"
    conversation = chat("Hello?", "  One \n", "<x>", "Two", "Three?", "One \n")
    original, marked = ((folder / f"{family}{kind}.jinja").read_text() for kind in ("", "_training"))
    ours, theirs = trained(original, conversation), trained(marked, conversation)
    if family in ("phi3", "phi3_5"):  # they mark the end-of-text token apart
        theirs = [*theirs[:-2], theirs[-2] + theirs[-1]]
    if family == "qwen2_5":  # they count the header's line break as the model's
        theirs = [span.removeprefix("\n") for span in theirs]
    assert ours == [span.rstrip() for span in theirs] and len(ours) == 3


SETS = ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl", "v1_sft_demo.jsonl"]
# What a template says when a conversation is not for it: no system turn, no tools, strict alternation, one call a turn.
REFUSALS = ("not supported", "alternate", "not iterable", "recursion", "single tool-calls", "no place for tool")
REAL = {
    "NousResearch-Hermes-2-Pro": ("<|im_start|>assistant\n", "<|im_end|>"),
    "Qwen-Qwen2.5": ("<|im_start|>assistant\n", "<|im_end|>"),
    "Qwen-Qwen3": ("<|im_start|>assistant\n", "<|im_end|>"),
    "deepseek-ai": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "google-gemma-2": ("<start_of_turn>model\n", "<end_of_turn>"),
    "meta-llama-Llama-3.1": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "meta-llama-Llama-3.2": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "microsoft-Phi-3.5": ("<|assistant|>\n", "<|end|>"),
    "mistralai-Mistral-Nemo": ("]", "</s>"),  # [/INST], [/TOOL_RESULTS]
}


@pytest.mark.parametrize("model", REAL)
@pytest.mark.parametrize("file", SETS)
def test_real_templates_on_real_conversations_train_the_assistant_s_turns_alone(shared_data, tinyllama, model, file):
    header, closing = REAL[model]
    (path,) = (shared_data / "chat_templates").glob(f"{model}*.jinja")
    template = resolve_template(tinyllama, str(path))
    finder = SpanFinder(template)
    rows, data_format = load_rows(shared_data / "sft" / file, split="train[:60]")
    for number, row in enumerate(rows):
        conversation = convert(row, number, data_format, has_template=True)
        try:
            text = template.render(conversation.messages, conversation.tools)
        except TemplateFailure as error:
            assert any(words in str(error) for words in REFUSALS), error
            continue
        turns = [message for message in conversation.messages if message["role"] == "assistant"]
        calls = [call["function"]["name"] for message in turns for call in message.get("tool_calls", ())]
        if calls and model in ("deepseek-ai", "microsoft-Phi-3.5"):
            with pytest.raises(DataError, match=f"row {number}: the loss mask cannot be placed"):
                finder.find(conversation, text, number)
            continue
        spans = finder.find(conversation, text, number)
        assert len(spans) == len(turns)
        untrained = "".join(text[a:b] for a, b in zip([0, *(b for _, b in spans)], [a for a, _ in spans], strict=False))
        for (start, stop), message in zip(spans, turns, strict=True):
            span = text[start:stop]
            assert text[:start].endswith(header)
            assert span.endswith((closing, closing + "\n</s>")) and span.count(closing) == 1
            if not message.get("tool_calls"):
                assert shows(message["content"].rsplit("</think>")[-1], span)
            assert all(call["function"]["name"] in span for call in message.get("tool_calls", ()))
        users = [message["content"] for message in conversation.messages if message["role"] == "user"]
        assert all(shows(content, untrained) for content in users)
