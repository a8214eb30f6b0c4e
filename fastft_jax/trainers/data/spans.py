"""Which characters of a rendered conversation are trained: what the model has to write, and nothing else.

A trained span is an assistant's turn from the end of its header to the end of its closing token(s). No template tells
where that is, so it is found from outside, by rendering again:

1. {% generation %} marks, where the template has them.
2. Prefixes. The conversation before turn i with the generation prompt, P, and through turn i, Q: when both are
   prefixes of the whole text, the turn is what lies between. True of most templates.
3. Where a template rewrites earlier turns (Qwen3 drops old thoughts, Mistral moves tools to the last user, Phi-3.5
   ends every text with an end-of-text token), sentinels: the whole conversation is rendered once more with a marker
   word at each content's edges; taking the words out must give the same text, and tells where each content lies.
   What follows a content in P is the next header; what closes a turn is learned once per template from a probe.

What can be placed by none of these is an error, never a guess.
"""

import json
import re
from dataclasses import dataclass

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.formats import Conversation
from fastft_jax.trainers.data.templates import ChatTemplate, Messages, Span, TemplateFailure

_SENTINEL = re.compile(r"fastft([SE])(\d+)x")
# Marker tokens as templates write them, for tokenizers that do not have them as tokens.
_MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]")


@dataclass(frozen=True)
class TurnShape:
    """How a template dresses an assistant's turn, learned from a conversation of four words.

    header: what comes before its content; closing: what comes after it, without trailing blanks; prompted: the
    template writes the header when asked for a generation prompt.
    """

    header: str | None
    closing: str
    prompted: bool


class SpanFinder:
    """Trained spans for the conversations of one data set."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self._shapes: dict[str, TurnShape | None] = {}

    def find(self, conversation: Conversation, text: str, number: int) -> list[Span]:
        """Spans [start, stop) of `text`, the rendered conversation, in order. Raises DataError naming row `number`."""
        turns = [i for i, trained in enumerate(conversation.trained) if trained]
        if not turns:
            return []
        marks = self.template.marks(conversation.messages, conversation.tools)
        if marks is not None:
            return self._marked(conversation, marks, turns, number)
        placing = _Placing(self.template, conversation, text, self._shape(conversation.tools))
        spans: list[Span] = []
        for i in turns:
            span = placing.turn(i)
            if span is None or (spans and span[0] < spans[-1][1]):
                raise DataError(
                    f"row {number}: the loss mask cannot be placed: where assistant message {i} begins and ends in the "
                    f"text of the chat template ({self.template.name}) cannot be told. Use another chat_template, put "
                    "{% generation %} marks in it, or turn train_on_responses_only off"
                )
            spans.append(span)
        return spans

    def _marked(self, conversation: Conversation, marks: list[Span], turns: list[int], number: int) -> list[Span]:
        assistants = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if turns == assistants:
            return marks
        if len(marks) != len(assistants):
            raise DataError(
                f"row {number}: the loss mask cannot be placed: the chat template ({self.template.name}) marks "
                f"{len(marks)} generations for {len(assistants)} assistant messages, of which only some are trained"
            )
        return [mark for mark, i in zip(marks, assistants, strict=True) if i in turns]

    def _shape(self, tools: list | None) -> TurnShape | None:
        key = self.template.text(tools)
        if key not in self._shapes:
            self._shapes[key] = None  # for a template that refuses the probe: placed by prefixes or not at all
            for given in (None, tools):  # Hermes's tool template wants tools
                try:
                    self._shapes[key] = _probe(self.template, given)
                    break
                except (TemplateFailure, ValueError):
                    continue
        return self._shapes[key]


def _probe(template: ChatTemplate, tools: list | None) -> TurnShape:
    words = ["fastftA", "fastftB", "fastftC", "fastftD"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
    text, bare = template.render(messages, tools), template.render(messages[:1], tools)
    asked = template.render(messages[:1], tools, generation_prompt=True)
    begin = text.index(words[1])
    header = None
    if text.startswith(bare) and len(bare) <= begin:
        header = text[len(bare) : begin]
    elif text.startswith(asked) and len(asked) <= begin:
        header = text[len(asked) : begin]
    between = text[begin + len(words[1]) : text.index(words[2])]
    short = template.render(messages[:2], tools)
    last = short[short.index(words[1]) + len(words[1]) :]
    if between.startswith(last.rstrip()):
        closing = last.rstrip()
    else:  # the last turn ends otherwise than the others (Phi-3.5): what both begin with, up to a whole token
        closing = _common_prefix(between, last, template.tokenizer.get_added_vocab()).rstrip()
    return TurnShape(header, closing, prompted=asked != bare)


def _common_prefix(a: str, b: str, tokens: dict[str, int]) -> str:
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    for text in (a, b):
        for match in _MARKER.finditer(text):
            if match.start() < n < match.end():
                n = match.start()
        for token in tokens:
            at = text.find(token)
            while at >= 0:
                if at < n < at + len(token):
                    n = at
                at = text.find(token, at + 1)
    return a[:n]


class _Placing:
    """The search for the turns of one conversation; sentinels are rendered only if a turn needs them."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, text: str, shape: TurnShape | None):
        self.template = template
        self.messages = conversation.messages
        self.tools = conversation.tools
        self.text = text
        self.shape = shape
        self._edges: dict[tuple[str, int], int] | None = None

    def turn(self, i: int) -> Span | None:
        start = self._start(i)
        stop = None if start is None else self._stop(i, start)
        if start is None or stop is None or stop < start:
            return None
        content = self.messages[i]["content"].strip()
        tail = content.rsplit("</think>", 1)[-1].strip()
        turn = self.text[start:stop]
        if tail and not shows(tail, turn) and not self.messages[i].get("tool_calls"):
            return None  # wherever this is, it is not the turn
        for call in self.messages[i].get("tool_calls", ()):
            if call["function"]["name"] not in turn:
                return None
        closed = turn.rstrip()
        # Blanks after a closing token belong to the template; without one they are all that ends the turn.
        has_closing = bool(self.shape.closing) if self.shape else not closed.endswith(content or "\0")
        return (start, start + len(closed)) if has_closing else (start, stop)

    def _prefix(self, n: int, generation_prompt: bool) -> str | None:
        try:
            return self.template.render(self.messages[:n], self.tools, generation_prompt) if n else None
        except TemplateFailure:
            return None  # a template may refuse a conversation cut short

    def _start(self, i: int) -> int | None:
        asked = self._prefix(i, generation_prompt=True)
        header = self.shape.header if self.shape else None
        if asked is not None and self.text.startswith(asked):
            start = len(asked)
            if header and not self.shape.prompted and self.text.startswith(header, start):
                start += len(header)  # a template without generation prompts: the header is still not the model's
            return start
        bare = self._prefix(i, generation_prompt=False)
        if bare is not None and header is not None and self.text.startswith(bare + header):
            return len(bare) + len(header)
        edges = self._edges_of(self.messages)
        before = edges.get(("E", i - 1))
        if before is not None and asked is not None:
            follows = _after_last_content(self.template, self.messages[:i], self.tools)
            if follows is not None and self.text.startswith(follows, before):
                return before + len(follows)
        if before is not None and header:
            # Between the content before and this turn there is the template's text alone: the first header is ours.
            at = self.text.find(header, before, edges.get(("S", i)))
            if at >= 0:
                return at + len(header)
        return edges.get(("S", i))

    def _stop(self, i: int, start: int) -> int | None:
        if i == len(self.messages) - 1:
            return len(self.text)
        through = self._prefix(i + 1, generation_prompt=False)
        if through is not None and self.text.startswith(through):
            return len(through)
        if self.shape is None:
            return None
        closing, edges = self.shape.closing, self._edges_of(self.messages)
        end = edges.get(("E", i))
        if end is not None:
            blanks = len(self.text) - end - len(self.text[end:].lstrip())
            if self.text.startswith(closing, end + blanks):
                return end + blanks + len(closing) if closing else end
        # Tool calls follow the content: the turn's closing is the last one before the next content.
        bound = next((edges[key] for j in range(i + 1, len(self.messages)) if (key := ("S", j)) in edges), None)
        if not closing or bound is None:
            return None
        at = self.text.rfind(closing, start, bound)
        return at + len(closing) if at >= 0 else None

    def _edges_of(self, messages: Messages) -> dict[tuple[str, int], int]:
        if self._edges is None:
            # A word at the start of a content may hide a <think> block from the template: then only at the ends.
            self._edges = _edges(self.template, messages, self.tools, self.text, starts=True) or _edges(
                self.template, messages, self.tools, self.text, starts=False
            )
        return self._edges


def _with_sentinels(messages: Messages, starts: bool) -> Messages:
    marked = []
    for i, message in enumerate(messages):
        content = message["content"]
        inner = content.strip()
        if inner:
            at = content.index(inner)
            before = f"fastftS{i}x" if starts or message["role"] != "assistant" else ""
            content = f"{content[:at]}{before}{inner}fastftE{i}x{content[at + len(inner) :]}"
        marked.append({**message, "content": content})
    return marked


def _edges(
    template: ChatTemplate, messages: Messages, tools: list | None, text: str, starts: bool
) -> dict[tuple[str, int], int]:
    """Positions in `text` of each content's start ("S", i) and end ("E", i); empty when the words change the text."""
    try:
        marked = template.render(_with_sentinels(messages, starts), tools)
    except TemplateFailure:
        return {}
    edges, pieces, at, seen = {}, [], 0, set()
    for match in _SENTINEL.finditer(marked):
        pieces.append(marked[at : match.start()])
        at = match.end()
        key = (match[1], int(match[2]))
        if key in seen:  # rendered twice: no telling which one is the turn
            edges.pop(key, None)
            continue
        seen.add(key)
        edges[key] = sum(map(len, pieces))
    pieces.append(marked[at:])
    return edges if "".join(pieces) == text else {}


def _after_last_content(template: ChatTemplate, messages: Messages, tools: list | None) -> str | None:
    """What a template writes between the last content and the assistant's first word."""
    last = len(messages) - 1
    try:
        marked = template.render(_with_sentinels(messages, starts=False), tools, generation_prompt=True)
    except TemplateFailure:
        return None
    word = f"fastftE{last}x"
    return _SENTINEL.sub("", marked[marked.index(word) :]) if marked.count(word) == 1 else None


def shows(content: str, text: str) -> bool:
    """Whether a text holds this content, as it is or as JSON."""
    content = content.strip()
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text or json.dumps(content)[1:-1] in text
