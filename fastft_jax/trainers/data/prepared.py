"""What `prepare` hands on: documents as ids and labels, what became of the rows, and one document to look at."""

from dataclasses import dataclass

import numpy as np

IGNORED = -100  # the label of a token that is not trained
Span = tuple[int, int]


@dataclass(frozen=True)
class DataStats:
    """What became of the rows. n_trained counts tokens that are predicted and learned from."""

    data_format: str
    n_rows: int
    n_examples: int
    n_truncated: int
    n_dropped: int
    n_altered: int
    n_tokens: int
    n_trained: int
    longest: int

    @property
    def trained_share(self) -> float:
        return self.n_trained / self.n_tokens

    def summary(self) -> str:
        """One line, such as "999 rows, 3 truncated (0.3%), 0 dropped, 123,456 tokens, 41.2% trained"."""
        line = (
            f"{self.n_rows:,} rows, {self.n_truncated:,} truncated ({self.n_truncated / self.n_rows:.1%}), "
            f"{self.n_dropped:,} dropped, {self.n_tokens:,} tokens, {self.trained_share:.1%} trained"
        )
        if self.n_examples + self.n_dropped != self.n_rows:
            line += f", cut into {self.n_examples:,} documents"
        if self.n_altered:
            line += f"; in {self.n_altered:,} rows the chat template drops or rewrites part of a message"
        return line


@dataclass(frozen=True)
class Sample:
    """A rendered document and the character spans of it that are trained."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class PreparedDataset:
    """Documents ready for `BatchSource`.

    input_ids[i], labels[i]: int32 [T_i]; labels are the ids where trained and -100 elsewhere, not shifted (the first
    is always -100: nothing predicts it). row_numbers[i]: the source row. chat_template: jinja text to be saved with the
    tokenizer, because it was used instead of the tokenizer's own; None where its own was used, or none.
    notes: what the user should know before training, one sentence each.
    """

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    row_numbers: list[int]
    stats: DataStats
    sample: Sample
    chat_template: str | None
    pad_id: int
    max_length: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def sample_text(self, color: bool = False, limit: int = 4000) -> str:
        """The first document with its trained part in green (ANSI), or between « and » without colour."""
        begin, end = ("\x1b[32m", "\x1b[0m") if color else ("«", "»")
        pieces, at = [], 0
        for start, stop in self.sample.spans:
            pieces += [self.sample.text[at:start], begin, self.sample.text[start:stop], end]
            at = stop
        text = "".join([*pieces, self.sample.text[at:]])
        return text if len(text) <= limit else text[:limit] + (end if color else "") + " ..."
