"""Formats: which columns a data set has, and what a row of each becomes.

Three things come out, and the rest of the package knows only these:
- `Conversation`: messages for a chat template (alpaca, sharegpt, messages, question/answer);
- `Passage`: a prompt and its completion as plain text (prompt/completion strings; alpaca without a chat template);
- `Document`: running text (a text column, a .txt file).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.messages import normalise_messages, normalise_tools

if TYPE_CHECKING:
    from fastft_jax.trainers.data.rows import Row, Rows

FORMATS = {
    "messages": "messages: [{role, content}, ...], optional tools",
    "sharegpt": "conversations: [{from, value}, ...], optional system, tools",
    "alpaca": "instruction, output, optional input, system, history",
    "prompt_completion": "prompt and completion (or question/answer, prompt/response), strings or message lists",
    "text": "text",
}
_CHAT_COLUMNS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "response"), ("query", "response"))
_ALPACA_OUTPUTS = ("output", "response")
_ALPACA_INPUTS = ("input", "context")

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(slots=True)
class Conversation:
    """Messages as chat templates read them, and which of them may be trained on.

    trained[i]: message i is an assistant's and no weight of 0 forbids it.
    weighted: the row itself says what to train (a message has loss weight 0), so it is masked whether asked or not.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    trained: list[bool]
    weighted: bool = False


@dataclass(slots=True)
class Passage:
    """prompt + completion, joined as they are, then the end-of-sequence token."""

    prompt: str
    completion: str


@dataclass(slots=True)
class Document:
    """Running text, cut into consecutive pieces of max_length tokens: nothing of it is lost."""

    text: str


def column_names(rows: "Rows") -> list[str]:
    """All columns, in the order they appear."""
    names = getattr(rows, "column_names", None)
    return list(names) if names is not None else list(dict.fromkeys(key for row in rows for key in row))


def detect_format(rows: "Rows", wanted: str | None = None) -> str:
    """The format whose columns the rows have; `wanted` overrides and is checked.

    A text column beside a structured format is that format rendered by somebody else, so it does not count.
    Raises DataError when no format fits or several do.
    """
    columns = column_names(rows)
    if wanted is not None and wanted not in FORMATS:
        raise DataError(f"unknown data format {wanted!r}; known are {', '.join(FORMATS)}")
    fitting = _fitting(rows, columns)
    if wanted is not None:
        # from/value and role/content are read alike, so either name may be given for both.
        alike = {"messages", "sharegpt"} if wanted in ("messages", "sharegpt") else {wanted}
        if not alike & set(fitting):
            raise DataError(f"format {wanted!r} wants {FORMATS[wanted]}; the columns are {', '.join(columns)}")
        return wanted
    structured = [name for name in fitting if name != "text"]
    if len(structured) > 1:
        raise DataError(
            f"the columns ({', '.join(columns)}) fit several formats: {', '.join(structured)}; set the data format"
        )
    if not fitting:
        known = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
        raise DataError(f"the columns ({', '.join(columns)}) fit no known format. Known: {known}")
    return (structured or fitting)[0]


def _fitting(rows: "Rows", columns: list[str]) -> list[str]:
    have = set(columns)
    fitting = []
    chat = next((name for name in _CHAT_COLUMNS if name in have), None)
    if chat is not None:
        fitting.append("sharegpt" if _speaks_from_value(rows, chat) else "messages")
    if "instruction" in have and have & set(_ALPACA_OUTPUTS):
        fitting.append("alpaca")
    elif any(have.issuperset(pair) for pair in _PAIRS):
        fitting.append("prompt_completion")
    if "text" in have:
        fitting.append("text")
    return fitting


def _speaks_from_value(rows: "Rows", column: str) -> bool:
    for i in range(len(rows)):
        turns = rows[i].get(column)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return "from" in turns[0]
    return False


def convert(row: "Row", number: int, data_format: str, has_template: bool) -> Conversation | Passage | Document:
    """One row of `data_format` as the object that the tokeniser wants. `number` names the row in errors."""
    if data_format in ("messages", "sharegpt"):
        return _chat(row, number)
    if data_format == "alpaca":
        return _alpaca(row, number, has_template)
    if data_format == "prompt_completion":
        return _prompt_completion(row, number, has_template)
    return Document(_string(row, "text", number))


def _conversation(raw: list, number: int, row: "Row", n_context: int = 0) -> Conversation:
    messages, weights = normalise_messages(raw, number)
    system = row.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        weights.insert(0, None)
        n_context += 1
    trained = [
        message["role"] == "assistant" and weight is not False and i >= n_context
        for i, (message, weight) in enumerate(zip(messages, weights, strict=True))
    ]
    return Conversation(messages, normalise_tools(row.get("tools"), number), trained, weighted=False in weights)


def _chat(row: "Row", number: int) -> Conversation:
    turns = next((row[name] for name in _CHAT_COLUMNS if row.get(name) is not None), None)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"row {number}: no list of messages, or an empty one")
    return _conversation(turns, number, row)


def _alpaca(row: "Row", number: int, has_template: bool) -> Conversation | Passage:
    instruction = _string(row, "instruction", number)
    output = _string(row, next((name for name in _ALPACA_OUTPUTS if name in row), "output"), number)
    given = next((row[name] for name in _ALPACA_INPUTS if row.get(name)), "")
    if not isinstance(given, str):
        raise DataError(f"row {number}: the input is a {type(given).__name__}, not text")
    if not has_template:
        if row.get("history") or row.get("system"):
            raise DataError(f"row {number}: history and system need a chat template; set chat_template")
        prompt = ALPACA_PROMPT_WITH_INPUT if given else ALPACA_PROMPT
        return Passage(prompt.format(instruction=instruction, input=given), output)
    turns = []
    for pair in row.get("history") or []:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise DataError(f"row {number}: history is a list of [question, answer] pairs")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = f"{instruction}\n\n{given}" if given else instruction
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _conversation(turns, number, row)


def _prompt_completion(row: "Row", number: int, has_template: bool) -> Conversation | Passage:
    """prompt/completion strings are joined as they are; the other names are a question and its answer, so they become
    a conversation where there is a chat template, and are joined by a line break where there is none."""
    first, second = next((pair for pair in _PAIRS if set(pair) <= set(row)), _PAIRS[0])
    if isinstance(row.get(first), list) or isinstance(row.get(second), list):
        context, answer = (
            value if isinstance(value, list) else [{"role": role, "content": _string(row, name, number)}]
            for name, value, role in ((first, row.get(first), "user"), (second, row.get(second), "assistant"))
        )
        if not context or not answer:
            raise DataError(f"row {number}: {first} or {second} is an empty list of messages")
        return _conversation([*context, *answer], number, row, n_context=len(context))
    prompt, completion = _string(row, first, number), _string(row, second, number)
    if second == "completion":
        return Passage(prompt, completion)
    if not has_template:
        return Passage(prompt + "\n", completion)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _conversation(turns, number, row)


def _string(row: "Row", column: str, number: int) -> str:
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # answers such as 42
    raise DataError(f"row {number}: {column!r} is {'missing' if value is None else type(value).__name__}, not text")
