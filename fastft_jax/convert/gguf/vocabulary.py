"""A transformers tokenizer as GGUF's vocabulary: byte-level BPE ("gpt2") or sentencepiece's BPE ("llama")."""

import json
import re
from dataclasses import dataclass
from typing import Any

import gguf

from fastft_jax.convert.gguf.pre_tokenizers import pre_tokenizer_name
from fastft_jax.errors import CheckpointError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>", re.DOTALL)  # as llama.cpp's converter
_SPACE = "\u2581"  # sentencepiece's
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass
class Vocabulary:
    """What llama.cpp needs to tokenise as transformers does. `tokens` are as long as the model's embedding."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None
    texts: dict[str, str]  # of the special ones

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for kind, number in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """The vocabulary of a fast tokenizer, padded to the `size` rows of the embedding.

    CheckpointError for tokenizers of other kinds than BPE, for one with rules that llama.cpp lacks, and for one with
    more tokens than rows.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError("GGUF needs the model's tokenizer (a fast one, with tokenizer.json), not None")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(f"GGUF: tokenizers of type {model.get('type')!r} cannot be written, only BPE")
    sentencepiece = bool(model.get("byte_fallback"))
    added = {int(t["id"]): t for t in description.get("added_tokens", [])}
    texts = {number: text for text, number in model["vocab"].items()} | {n: t["content"] for n, t in added.items()}
    if max(texts) >= size:
        raise CheckpointError(
            f"GGUF: the tokenizer has ids up to {max(texts)}, the model's embedding {size} rows: it is another model's"
        )
    special = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in _SPECIAL}
    special = {kind: number for kind, number in special.items() if number is not None}
    merges = [m if isinstance(m, list) else m.split(" ", 1) for m in model["merges"]]
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_type(i, texts, added, sentencepiece, model.get("unk_token")) for i in range(size)]
    if sentencepiece:  # llama.cpp looks for a user's token in the text before spaces are replaced
        tokens = [
            t.replace(_SPACE, " ") if kind == gguf.TokenType.USER_DEFINED else t
            for t, kind in zip(tokens, types, strict=True)
        ]
    frame = tokenizer.encode("")  # what stands around every text
    add_bos = frame[:1] == [special.get("bos")]
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else pre_tokenizer_name(tokenizer, description),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, merges) if sentencepiece else None,
        merges=None if sentencepiece else [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges],
        special=special,
        add_bos=add_bos,
        add_eos=frame[add_bos:][-1:] == [special.get("eos")],
        add_space_prefix=_space_prefix(description) if sentencepiece else None,
        chat_template=template if isinstance(template, str) else (template or {}).get("default"),
        texts={kind: texts[number] for kind, number in special.items()},
    )


def _type(number: int, texts: dict[int, str], added: dict[int, dict], sentencepiece: bool, unknown: str | None) -> int:
    """GGUF's kind of a token. Bytes and the unknown are sentencepiece's; some releases forget what is special."""
    if number not in texts:
        return gguf.TokenType.UNUSED
    text = texts[number]
    if sentencepiece and text == unknown:
        return gguf.TokenType.UNKNOWN
    if number in added:
        control = added[number]["special"] or _LOOKS_SPECIAL.fullmatch(text)
        return gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
    if sentencepiece and _BYTE.fullmatch(text):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes a piece: the order in which sentencepiece joined pieces.

    llama.cpp joins the neighbours whose piece scores highest. Pieces that no merge makes (characters) come last;
    they are never the result of joining.
    """
    ranks: dict[str, int] = {}
    for a, b in merges:
        ranks.setdefault(a + b, len(ranks))
    normal = gguf.TokenType.NORMAL
    return [
        float(-ranks.get(token, len(ranks))) if kind == normal else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _space_prefix(description: dict[str, Any]) -> bool:
    """Whether a space is put before the text. CheckpointError for a normalizer that does more than spaces."""
    normalizer = description.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    for step in steps:
        spaces = step["type"] == "Replace" and step.get("content") == _SPACE
        if not spaces and step["type"] != "Prepend":
            raise CheckpointError(f"GGUF: llama.cpp has no normalizer {step!r:.200}, so it would tokenise differently")
    pre = description.get("pre_tokenizer") or {}
    metaspace = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    return metaspace or any(step["type"] == "Prepend" for step in steps)
