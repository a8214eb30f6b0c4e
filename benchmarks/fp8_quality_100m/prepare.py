"""Real text -> token ids in one .npz: the corpus to pretrain on, and questions with answers to fine-tune on.

The corpus: any .txt, .json and .jsonl files, or folders of them. A .txt file is cut at line ends into documents; of a
JSON row every string is taken, but for keys that hold no prose. Documents stand one after another, each between BOS and
EOS. The questions go the product's own way: `load_rows` and `prepare`, with the tokenizer's chat template and the loss
on the answers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastft_jax.convert.tokenizer import load_tokenizer
from fastft_jax.trainers.data import DataStats, PreparedDataset, load_rows
from fastft_jax.trainers.data import prepare as prepare_rows
from fastft_jax.trainers.data.prepared import IGNORED, Sample

PIECE = 8000  # characters of a document cut from a .txt file
NO_PROSE = {"id", "name", "role", "from", "type", "loss_weight", "tools", "is_classification", "label"}


def prepare(text: list[Path], train: Path, test: Path, tokenizer_folder: Path, max_length: int, out: Path) -> dict:
    """Write `out`; returns what is in it, for people and records."""
    tokenizer = load_tokenizer(tokenizer_folder)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    files = [file for path in text for file in _files(path)]
    texts = list(dict.fromkeys(document for file in files for document in documents(file) if document.strip()))
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    corpus = np.concatenate([np.array([bos, *ids, eos]) for ids in encoded])
    arrays = {"corpus": _small(corpus)}
    for name, path in (("train", train), ("test", test)):
        rows, data_format = load_rows(path)
        data = prepare_rows(
            rows, tokenizer, max_length=max_length, data_format=data_format, train_on_responses_only=True
        )
        arrays[f"{name}_ids"] = _small(np.concatenate(data.input_ids))
        arrays[f"{name}_trained"] = np.concatenate(data.labels) != IGNORED
        arrays[f"{name}_lengths"] = np.array([len(ids) for ids in data.input_ids], np.int32)
    info = {
        "corpus": [file.name for file in files],
        "corpus_documents": len(texts),
        "corpus_tokens": len(corpus),
        "train": f"{train.parent.name}/{train.name}",
        "test": f"{test.parent.name}/{test.name}",
        "tokenizer": tokenizer_folder.name,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "pad_id": tokenizer.pad_token_id,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, info=json.dumps(info), **arrays)
    return info


def documents(file: Path) -> Iterator[str]:
    """The texts of one file."""
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".txt":
        piece = ""
        for line in content.splitlines(keepends=True):
            if piece and len(piece) + len(line) > PIECE:
                yield piece
                piece = ""
            piece += line
        yield piece
        return
    rows = json.loads(content) if file.suffix == ".json" else map(json.loads, content.splitlines())
    for row in rows:
        yield "\n".join(_strings(row))


def load_questions(data: Any, name: str, limit: int | None = None) -> PreparedDataset:
    """The first `limit` documents of "train" or "test" of a loaded .npz, as `BatchSource` takes them."""
    lengths = data[f"{name}_lengths"]
    ends = np.cumsum(lengths)[: limit or len(lengths)]
    total = ends[-1]
    flat, trained = data[f"{name}_ids"][:total].astype(np.int32), data[f"{name}_trained"][:total]
    ids = np.split(flat, ends[:-1])
    labels = np.split(np.where(trained, flat, IGNORED), ends[:-1])
    n, longest = len(ids), int(lengths[:limit].max())
    stats = DataStats("prompt_completion", n, n, 0, 0, 0, int(total), int(trained.sum()), longest)
    info = json.loads(str(data["info"]))
    return PreparedDataset(ids, labels, list(range(n)), stats, Sample("", []), None, info["pad_id"], longest)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".json", ".jsonl"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in NO_PROSE:
                yield from _strings(part)


def _small(ids: np.ndarray) -> np.ndarray:
    if ids.max() >= 2**16:
        raise SystemExit(f"token ids up to {ids.max()} do not fit 16 bits: use a smaller vocabulary")
    return ids.astype(np.uint16)
