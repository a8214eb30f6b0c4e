"""Messages in every spelling data sets use, to the one that chat templates read.

Out: {"role", "content": str, optionally "tool_calls", "reasoning_content", "tool_call_id", "name"}, tool calls as
{"id", "type": "function", "function": {"name", "arguments": dict}}.
"""

import json
from typing import Any

from fastft_jax.errors import DataError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
    "tool": "tool",
}
_WEIGHTS = ("loss_weight", "weight", "train")
_CONSUMED = {"role", "from", "content", "value", "tool_calls", "function_call", *_WEIGHTS}


def normalise_messages(raw: list, number: int) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """The messages of row `number` and each one's weight: True, False, or None where the data say nothing."""
    messages, weights = [], []
    for position, message in enumerate(raw):
        where = f"row {number}, message {position}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: a {type(message).__name__}, not an object with role and content")
        messages.append(_normalise(message, where))
        weights.append(_weight(message, where))
    _link_tool_calls(messages)
    return messages, weights


def _normalise(raw: dict[str, Any], where: str) -> dict[str, Any]:
    speaker = raw.get("role", raw.get("from"))
    if speaker not in _ROLES:
        raise DataError(f"{where}: role {speaker!r} is not one of {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": _ROLES[speaker]}
    content = raw.get("content", raw.get("value"))
    calls = raw.get("tool_calls") or raw.get("function_call") or []
    if isinstance(calls, str):
        calls = _json(calls, where, "tool call")
    calls = list(calls) if isinstance(calls, list) else [calls]
    reasoning = ""
    if speaker == "function_call":
        found = _json(content, where, "function_call") if isinstance(content, str) else content
        calls += found if isinstance(found, list) else [found]
        content = ""
    elif isinstance(content, list):
        content, reasoning, parts = _join_parts(content, where)
        calls += parts
    if content is None and (calls or raw.get("reasoning_content")):
        content = ""
    if isinstance(content, dict) and message["role"] == "tool":
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise DataError(f"{where}: the content is {'missing' if content is None else type(content).__name__}, not text")
    message["content"] = content
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
    message |= {key: value for key, value in raw.items() if key not in _CONSUMED and value is not None}
    return message


def _join_parts(parts: list, where: str) -> tuple[str, str, list]:
    """Text, reasoning and tool calls of a content given as a list of {"type", ...} parts."""
    texts, reasoning, calls = [], [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "str":
            texts.append(part)
            continue
        value = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind in ("text", "reasoning", "thinking") and value is None:
            value = part.get(kind)
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in ("reasoning", "thinking") and isinstance(value, str):
            reasoning.append(value)
        elif kind == "tool_call" and value is not None:
            found = _json(value, where, "tool_call") if isinstance(value, str) else value
            calls += found if isinstance(found, list) else [found]
        else:
            raise DataError(
                f"{where}: a content part of type {kind!r} is not supported; text, reasoning, tool_call are"
            )
    return "".join(texts), "\n".join(reasoning), calls


def _tool_call(raw: Any, where: str) -> dict[str, Any]:
    function = raw.get("function", raw) if isinstance(raw, dict) else raw
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call needs a name and arguments, found {raw!r}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        # Templates write arguments as JSON: a string would be written as a string inside a string.
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError:
            raise DataError(f"{where}: the arguments of tool call {function['name']!r} are not JSON") from None
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if isinstance(raw.get("id"), str):
        call["id"] = raw["id"]
    return call


def _link_tool_calls(messages: list[dict[str, Any]]) -> None:
    """Give calls without an id one (nine letters and digits, as Mistral's templates demand), results their call's."""
    n_calls, waiting = 0, []
    for message in messages:
        for call in message.get("tool_calls", ()):
            call.setdefault("id", f"call{n_calls:05d}")
            n_calls += 1
            waiting.append(call["id"])
        if message["role"] == "tool":
            answered = message.setdefault("tool_call_id", waiting[0]) if waiting else message.get("tool_call_id")
            if answered in waiting:
                waiting.remove(answered)


def _weight(raw: dict[str, Any], where: str) -> bool | None:
    for key in _WEIGHTS:
        value = raw.get(key)
        if value is not None:
            if value not in (0, 1):
                raise DataError(f"{where}: {key} is {value!r}; only 0 (not trained) and 1 (trained) are supported")
            return bool(value)
    return None


def normalise_tools(raw: Any, number: int) -> list[dict[str, Any]] | None:
    """The tools column (a list, or JSON text of one) as [{"type": "function", "function": {...}}], or None."""
    where = f"row {number}"
    tools = _json(raw, where, "tools column") if isinstance(raw, str) and raw.strip() else raw
    if not tools:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{where}: the tools column is a {type(tools).__name__}, not a list of tools")
    wrapped = []
    for tool in tools:
        tool = _json(tool, where, "tool") if isinstance(tool, str) else tool
        if not isinstance(tool, dict):
            raise DataError(f"{where}: a tool is a {type(tool).__name__}, not an object")
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return wrapped


def _json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: the {what} is not JSON: {error.msg}") from None
