"""From rows to token ids and labels: render, tokenise, mask, truncate, count."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.formats import Conversation, Document, Passage, convert, detect_format
from fastft_jax.trainers.data.prepared import IGNORED, DataStats, PreparedDataset, Sample
from fastft_jax.trainers.data.rows import iterate
from fastft_jax.trainers.data.spans import SpanFinder, shows
from fastft_jax.trainers.data.templates import ChatTemplate, Span, TemplateFailure, builtin_names, resolve_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fastft_jax.trainers.data.rows import Rows

_CHUNK = 1000  # rows tokenised together: enough for the tokenizer's threads, little memory


@dataclass(slots=True)
class _Rendered:
    """A row as text. spans: trained characters, None for all. raw: no template ran, so BOS and EOS are ours to add."""

    number: int
    text: str
    spans: list[Span] | None
    raw: bool
    chunked: bool = False


def check_tokenizer(tokenizer: "PreTrainedTokenizerFast", vocab_size: int | None = None) -> int:
    """The id to pad with: pad_token's, or eos_token's where there is none.

    Raises DataError for a tokenizer that is not a fast one, has neither token, or knows ids that an embedding of
    vocab_size rows does not have.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json): offsets are needed")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError(
            "the tokenizer has neither a pad_token nor an eos_token; set one, e.g. tokenizer.eos_token = '</s>', "
            "or eos_token in its tokenizer_config.json"
        )
    if vocab_size is not None:
        token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if largest >= vocab_size:
            raise DataError(
                f"the tokenizer knows {len(tokenizer):,} tokens, up to id {largest:,} ({token!r}), but the "
                f"model's embedding has {vocab_size:,} rows: this tokenizer is not this model's"
            )
    return pad


def prepare(
    rows: "Rows",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    max_length: int,
    data_format: str | None = None,
    chat_template: str | None = None,
    train_on_responses_only: bool = False,
) -> PreparedDataset:
    """Tokenise a data set.

    Conversations are rendered by the chat template, which writes BOS and EOS itself. Other text gets the tokenizer's
    BOS, if it uses one, and eos_token at its end. A document longer than max_length keeps its start; a text document
    is cut into consecutive pieces instead, so nothing of it is lost. With train_on_responses_only the labels are the
    assistant's turns (a completion's tokens); a token is trained when any of its characters is.
    Documents in which nothing is left to train are dropped and counted.

    Raises DataError: wrong columns or values (naming the row), no chat template for conversations, a mask that cannot
    be placed, and nothing to train in the whole data set.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}; a document of fewer than 2 tokens has nothing to predict")
    pad_id = check_tokenizer(tokenizer)
    if len(rows) == 0:
        raise DataError("the data set has no rows")
    data_format = detect_format(rows, data_format)
    if data_format == "text" and train_on_responses_only:
        raise DataError("train_on_responses_only: a text column has no responses; turn it off or use another format")
    template = resolve_template(tokenizer, chat_template)
    builder = _Builder(tokenizer, max_length)
    chunk: list[_Rendered] = []
    for item in _render(rows, data_format, template, train_on_responses_only, builder):
        chunk.append(item)
        if len(chunk) == _CHUNK:
            builder.add(chunk)
            chunk = []
    builder.add(chunk)
    if not builder.input_ids:
        raise DataError(
            f"nothing would be trained: in all {len(rows):,} rows no "
            + ("response" if train_on_responses_only else "token to predict")
            + f" is left within max_length={max_length} ({builder.n_truncated:,} were truncated)"
        )
    stats = DataStats(
        data_format=data_format,
        n_rows=len(rows),
        n_examples=len(builder.input_ids),
        n_truncated=builder.n_truncated,
        n_dropped=builder.n_dropped,
        n_altered=builder.n_altered,
        n_tokens=sum(map(len, builder.input_ids)),
        n_trained=sum(int((labels != IGNORED).sum()) for labels in builder.labels),
        longest=max(map(len, builder.input_ids)),
    )
    notes = []
    if builder.used_template and not builder.has_stop:
        notes.append(
            f"the turns of the chat template ({template.name}) end in no special token of this tokenizer, so "
            "generation will not know where to stop; chat_template: zephyr ends them with eos_token"
        )
    return PreparedDataset(
        builder.input_ids,
        builder.labels,
        builder.row_numbers,
        stats,
        builder.sample,
        template.source if template is not None and builder.used_template else None,
        pad_id,
        max_length,
        tuple(notes),
    )


def _render(
    rows: "Rows", data_format: str, template: ChatTemplate | None, mask: bool, builder: "_Builder"
) -> Iterator[_Rendered]:
    finder = SpanFinder(template) if template is not None else None
    for number, row in enumerate(iterate(rows)):
        example = convert(row, number, data_format, has_template=template is not None)
        if isinstance(example, Document):
            yield _Rendered(number, example.text, None, raw=True, chunked=True)
        elif isinstance(example, Passage):
            text = example.prompt + example.completion
            yield _Rendered(number, text, [(len(example.prompt), len(text))] if mask else None, raw=True)
        else:
            if template is None or finder is None:
                raise DataError(
                    f"row {number} is a conversation, and there is no chat template (the tokenizer has none, or it is "
                    f"'none'). Set chat_template to a built-in name ({builtin_names()}), a .jinja file or jinja text"
                )
            builder.used_template = True
            yield _render_conversation(example, number, template, finder, mask, builder)


def _render_conversation(
    example: Conversation, number: int, template: ChatTemplate, finder: SpanFinder, mask: bool, builder: "_Builder"
) -> _Rendered:
    try:
        text = template.render(example.messages, example.tools)
    except TemplateFailure as error:
        raise DataError(
            f"row {number}: the chat template ({template.name}) refuses this conversation: {error}"
        ) from None
    calls = [call["function"]["name"] for message in example.messages for call in message.get("tool_calls", ())]
    if calls and ("tool_calls" not in template.text(example.tools) or not all(name in text for name in calls)):
        raise DataError(
            f"row {number}: the chat template ({template.name}) leaves tool calls out; use one that knows tools, "
            "e.g. chat_template: chatml"
        )
    lost = any(not shows(message["content"], text) for message in example.messages)
    lost |= any(not shows(message.get("reasoning_content", ""), text) for message in example.messages)
    lost |= any(tool["function"].get("name", "") not in text for tool in example.tools or ())
    builder.n_altered += lost
    spans = finder.find(example, text, number) if mask or example.weighted else None
    return _Rendered(number, text, spans, raw=False)


class _Builder:
    """Collects documents; counts what was cut and what was dropped."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.input_ids: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.row_numbers: list[int] = []
        self.sample = Sample("", [])
        self.n_truncated = self.n_dropped = self.n_altered = 0
        self.used_template = self.has_stop = False
        self._bos: list[int] | None = None
        self._special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def add(self, items: list[_Rendered]) -> None:
        """Tokenise rendered rows together and keep what can be trained on."""
        if not items:
            return
        need_offsets = any(item.spans is not None for item in items) or not self.input_ids
        encoded = self.tokenizer(
            [item.text for item in items], add_special_tokens=False, return_attention_mask=False,
            return_offsets_mapping=need_offsets, verbose=False,
        )  # fmt: skip
        for k, item in enumerate(items):
            ids = np.asarray(encoded["input_ids"][k], np.int32)
            offsets = np.asarray(encoded["offset_mapping"][k], np.int64).reshape(-1, 2) if need_offsets else None
            trained = np.ones(len(ids), bool) if item.spans is None else tokens_in_spans(offsets, item.spans)
            self._add_one(item, ids, trained, offsets)

    def _add_one(self, item: _Rendered, ids: np.ndarray, trained: np.ndarray, offsets: np.ndarray | None) -> None:
        n_before = 0
        if item.raw:
            before, after = self._affixes()
            n_before = len(before)
            ids = np.concatenate([np.asarray(before, np.int32), ids, np.asarray(after, np.int32)])
            trained = np.concatenate([np.zeros(n_before, bool), trained, np.ones(len(after), bool)])
        if item.chunked:
            cuts = _cuts(len(ids), self.max_length)
        else:
            # A turn's closing token may have a line break after it.
            self.has_stop |= not item.raw and any(int(i) in self._special for i in ids[-2:])
            cuts = [(0, min(len(ids), self.max_length))]
            self.n_truncated += len(ids) > self.max_length
        kept = False
        for start, stop in cuts:
            labels = np.where(trained[start:stop], ids[start:stop], np.int32(IGNORED)).astype(np.int32)
            labels[:1] = IGNORED  # nothing comes before it to predict it from
            if not (labels != IGNORED).any():
                continue
            kept = True
            if not self.input_ids:
                self.sample = self._sample(item, offsets, labels != IGNORED, n_before)
            self.input_ids.append(np.ascontiguousarray(ids[start:stop]))
            self.labels.append(labels)
            self.row_numbers.append(item.number)
        self.n_dropped += not kept

    def _affixes(self) -> tuple[list[int], list[int]]:
        """Ids before and after text that no template rendered: what the tokenizer puts first (BOS), and eos_token."""
        if self._bos is None:
            with_special = self.tokenizer("a", add_special_tokens=True)["input_ids"]
            without = self.tokenizer("a", add_special_tokens=False)["input_ids"]
            n = len(with_special) - len(without)
            starts = [k for k in range(n + 1) if with_special[k : k + len(without)] == without]
            self._bos = with_special[: starts[0]] if starts else []
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token to end a text with; set tokenizer.eos_token")
        return self._bos, [self.tokenizer.eos_token_id]

    def _sample(self, item: _Rendered, offsets: np.ndarray, trained: np.ndarray, n_before: int) -> Sample:
        """The text of the first document as far as it was kept, with the spans that its labels cover."""
        text, eos = item.text, self.tokenizer.eos_token or ""
        where = [(0, 0)] * n_before + [(int(a), int(b)) for a, b in _without_gaps(offsets)]
        if item.raw:
            where.append((len(text), len(text) + len(eos)))
            text += eos
        where = where[: len(trained)]
        spans: list[Span] = []
        for (start, stop), on in zip(where, trained, strict=True):
            if on and spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
            elif on:
                spans.append((start, stop))
        return Sample(text[: max(stop for _, stop in where)], spans)


def tokens_in_spans(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Which tokens have a character in a trained span. offsets: int [T, 2] -> bool [T].

    Any character is enough: a token that joins the header's last blank with the answer's first word must be trained.
    """
    start, stop = _without_gaps(offsets).T
    trained = np.zeros(len(offsets), bool)
    for first, last in spans:
        trained |= (stop > first) & (start < last)
    return trained


def _without_gaps(offsets: np.ndarray) -> np.ndarray:
    """Byte-level tokenizers leave blanks at a token's start out of its offsets (trim_offsets): put them back."""
    if len(offsets) == 0:
        return offsets
    end_before = np.concatenate([[0], np.maximum.accumulate(offsets[:-1, 1])])
    return np.stack([np.minimum(offsets[:, 0], end_before), offsets[:, 1]], axis=1)


def _cuts(n: int, size: int) -> list[tuple[int, int]]:
    """Consecutive pieces of `size`. A last piece of one token could not be trained: it takes one from its neighbour."""
    bounds = [*range(0, n, size), n]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and size > 2:
        bounds[-2] -= 1
    return list(zip(bounds, bounds[1:], strict=False))
