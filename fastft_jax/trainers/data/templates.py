"""Chat templates: which one applies, and rendering with it.

Rendering is transformers' `apply_chat_template(tokenize=False)`, so the text is what inference will see.
"""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.builtin_templates import BUILTIN_TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Span = tuple[int, int]
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateFailure(Exception):
    """A template refused a conversation; whoever knows the row's number makes a DataError of it."""


class ChatTemplate:
    """A tokenizer and the template in use. `source` is the jinja text, None for the tokenizer's own."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", source: str | None, name: str):
        self.tokenizer = tokenizer
        self.source = source
        self.name = name

    def text(self, tools: list | None = None) -> str:
        """The jinja text that applies (a tokenizer may have another one for rows with tools)."""
        return self.source if self.source is not None else self.tokenizer.get_chat_template(None, tools)

    def render(self, messages: Messages, tools: list | None = None, generation_prompt: bool = False) -> str:
        """The conversation as text; with generation_prompt, up to where the assistant begins to write."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # a template may raise anything: it is a program, in the sandbox of jinja
            raise TemplateFailure(_first_line(error)) from error

    def marks(self, messages: Messages, tools: list | None) -> list[Span] | None:
        """Character spans between {% generation %} marks, where a template has them: its author says what to train."""
        text = self.text(tools)
        if not _GENERATION_TAG.search(text):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        _, indices = render_jinja_template(
            [messages], tools=tools, chat_template=text, return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        return [tuple(span) for span in indices[0]]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def resolve_template(tokenizer: "PreTrainedTokenizerFast", chat_template: str | None) -> ChatTemplate | None:
    """The template to use, or None when there is none.

    chat_template: None (the tokenizer's own, if it has one), "none" (no template even so: alpaca rows become the
    Alpaca prompt, question/answer rows are joined), a built-in name, a path to a .jinja file, or jinja text.
    Raises DataError for a name or path that does not exist and for text that does not compile.
    """
    if chat_template is None:
        return ChatTemplate(tokenizer, None, "the tokenizer's own") if tokenizer.chat_template else None
    if chat_template == "none":
        return None
    if chat_template in BUILTIN_TEMPLATES:
        return ChatTemplate(tokenizer, BUILTIN_TEMPLATES[chat_template], chat_template)
    if "{{" in chat_template or "{%" in chat_template:
        source, name = chat_template, "the one given"
    else:
        path = Path(chat_template).expanduser()
        if not path.is_file():
            near = difflib.get_close_matches(chat_template, BUILTIN_TEMPLATES, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(f"chat_template {chat_template!r} is no built-in name, no file and no jinja text{hint}. "
                            f"Built-in: {builtin_names()}")  # fmt: skip
        try:
            source, name = path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise DataError(f"{path}: the chat template is not UTF-8 text") from None
    _check_syntax(source, name)
    return ChatTemplate(tokenizer, source, name)


def _check_syntax(source: str, name: str) -> None:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"chat template {name}: line {error.lineno}: {error.message}") from None


def builtin_names() -> str:
    return ", ".join(BUILTIN_TEMPLATES)
