"""Ollama's Modelfile, its template derived from the tokenizer's own.

The chat template is rendered on marked messages; what stands between the marks is what each role's message begins and
ends with. The derived template is used only if, put together again, it gives what the tokenizer gives for a longer
conversation; otherwise the Modelfile says so and leaves the template to Ollama, which knows the common ones by the one
inside the GGUF file.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_SYSTEM, _USER, _REPLY, _AGAIN = "\x01system\x01", "\x01user\x01", "\x01reply\x01", "\x01again\x01"


@dataclass(frozen=True)
class Turns:
    """What surrounds each role's text. `default` stands where a conversation has no system message."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    default: str

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for the next reply, as Ollama will put it together."""
        system = [m["content"] for m in messages if m["role"] == "system"]
        out = self.system[0] + system[0] + self.system[1] if system else self.default
        for m in messages:
            if m["role"] != "system":
                before, after = getattr(self, m["role"])
                out += before + m["content"] + after
        return out + self.assistant[0]


def modelfile(files: Sequence[str], tokenizer: Any) -> str:
    """The Modelfile's text: the first file, the template and the words to stop at."""
    lines = [f"FROM ./{files[0]}"]
    lines += [f"# FROM ./{other}" for other in files[1:]]
    turns = derive_turns(tokenizer)
    if turns is None:
        lines.append(
            "# The chat template has no plain form: Ollama takes the one inside the GGUF file where it knows it."
        )
        stops = [tokenizer.eos_token]
    else:
        lines.append(f'TEMPLATE """{_go_template(turns)}"""')
        stops = _stops(turns, tokenizer)
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop]
    return "\n".join(lines) + "\n"


def derive_turns(tokenizer: Any) -> Turns | None:
    """The turns of the tokenizer's chat template, or None where it is not a sequence of them."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = None
    for system in (True, False):
        with suppress(Exception):  # templates raise what they like, for roles or orders that they refuse
            turns = turns or _derive(tokenizer, system)
    parts = () if turns is None else (turns.default, *turns.user, *turns.assistant, *(turns.system or ()))
    return None if any("{{" in part or '"""' in part for part in parts) else turns


def _derive(tokenizer: Any, system: bool) -> Turns | None:
    """Prompts are lead, user, middle, reply, again, user, middle: each cut between two of the marks."""

    def render(contents: Sequence[str], prompt: bool = True) -> str:
        text = tokenizer.apply_chat_template(_messages(contents), tokenize=False, add_generation_prompt=prompt)
        return text.removeprefix(tokenizer.bos_token or "")  # llama.cpp adds it

    first = [_SYSTEM, _USER] if system else [_USER]
    try:
        lead, middle = _cut(render([_USER]), _USER)
        *around, _, again, _ = _cut(render([*first, _REPLY, _AGAIN]), *first, _REPLY, _AGAIN)
    except ValueError:  # a mark that is missing, or there twice
        return None
    user = _common_end([lead, again, *around[1:]])
    end, plain = again.removesuffix(user), render([_USER], prompt=False)
    if render([_USER]).startswith(plain):
        reply = render([_USER]).removeprefix(plain)
    else:
        reply = middle.removeprefix(end) if end else ""
    turns = Turns(
        system=(around[0], around[1].removesuffix(user)) if system else None,
        user=(user, middle.removesuffix(reply)),
        assistant=(reply, end),
        default=lead.removesuffix(user),
    )
    for contents in ([_USER], [_USER, _REPLY, _AGAIN], first, [*first, _REPLY, _AGAIN]):
        if turns.render(_messages(contents)) != render(contents):
            return None
    return turns


def _messages(contents: Sequence[str]) -> list[dict[str, str]]:
    roles = {_SYSTEM: "system", _REPLY: "assistant"}
    return [{"role": roles.get(content, "user"), "content": content} for content in contents]


def _common_end(texts: Sequence[str]) -> str:
    shortest = min(map(len, texts))
    same = next((n for n in range(shortest) if len({text[-1 - n] for text in texts}) > 1), shortest)
    return texts[0][len(texts[0]) - same :]


def _cut(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        before, text = text.split(mark)
        parts.append(before)
    return [*parts, text]


def _go_template(turns: Turns) -> str:
    """Go's text/template, with Ollama's variables."""
    out = ""
    if turns.system is not None:
        before, after = turns.system
        otherwise = f"{{{{ else }}}}{turns.default}" if turns.default else ""
        out = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{otherwise}{{{{ end }}}}"
    else:
        out = turns.default
    (u, v), (a, b) = turns.user, turns.assistant
    return (
        f'{out}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{u}{{{{ .Content }}}}{v}'
        f'{{{{ else if eq .Role "assistant" }}}}{a}{{{{ .Content }}}}{b}{{{{ end }}}}{{{{ end }}}}{a}'
    )


def _stops(turns: Turns, tokenizer: Any) -> list[str]:
    """The tokens that end a reply or begin a turn: control tokens among what surrounds the messages, and the eos."""
    around = "".join((*turns.user, *turns.assistant))
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = [t for t in control if t in around and t != tokenizer.bos_token]
    ends = turns.assistant[1].strip()
    return list(dict.fromkeys([*filter(None, [tokenizer.eos_token]), *found, *([ends] if ends and not found else [])]))
