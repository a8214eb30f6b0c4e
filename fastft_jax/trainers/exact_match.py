"""Held-out questions answered greedily: how many answers are right to the letter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastft_jax.errors import DataError
from fastft_jax.trainers.data.formats import Conversation, convert
from fastft_jax.trainers.data.rows import iterate

BATCH = 64  # prompts generated side by side

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Answers:
    """Questions, expected answers and the model's own, in order."""

    questions: list[str]
    expected: list[str]
    given: list[str]

    @property
    def exact_match(self) -> float:
        right = sum(e.strip() == g.strip() for e, g in zip(self.expected, self.given, strict=True))
        return right / len(self.expected)


def questions(rows: Any, data_format: str, limit: int) -> list[Turns]:
    """The first `limit` conversations that end with an assistant's turn."""
    found: list[Turns] = []
    for number, row in enumerate(iterate(rows)):
        example = convert(row, number, data_format, has_template=True)
        turns = example.messages if isinstance(example, Conversation) else []
        if len(turns) >= 2 and turns[-1]["role"] == "assistant":
            found.append(turns)
        if len(found) == limit:
            break
    if not found:
        raise DataError("exact_match_rows: no held-out row is a conversation that ends with an assistant's turn")
    return found


def answer_held_out(
    generate: Callable[..., list[list[int]]],
    tokenizer: Any,
    conversations: list[Turns],
    *,
    chat_template: str | None,
    max_new_tokens: int,
) -> Answers:
    """Answer the last assistant turn of each conversation from the turns before it."""
    prompts = [
        tokenizer.apply_chat_template(
            turns[:-1], tokenize=False, add_generation_prompt=True, chat_template=chat_template
        )
        for turns in conversations
    ]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    # An answer ends at the end-of-text token or at any other special token (a chat template's end of turn).
    stops = tuple(sorted({tokenizer.eos_token_id, *tokenizer.all_special_ids} - {None}))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Shortest first, so that a batch pads little; the last batch is filled up, so that it compiles no other program.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    given = [""] * len(ids)
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        filler = [chunk[-1]] * (min(BATCH, len(order)) - len(chunk))
        out = generate(
            [ids[i] for i in chunk + filler], max_new_tokens=max_new_tokens, eos_token_ids=stops, pad_token_id=pad
        )
        for i, tokens in zip(chunk, out, strict=False):
            given[i] = tokenizer.decode(tokens, skip_special_tokens=True)
    return Answers([turns[-2]["content"] for turns in conversations], [t[-1]["content"] for t in conversations], given)
