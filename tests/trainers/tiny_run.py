"""What the trainer's tests train: a 2-layer model saved by transformers, a word tokenizer, and rows of random words."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastft_jax import FastLanguageModel, SFTConfig, SFTTrainer
from fastft_jax.trainers.data import BatchSource, PreparedDataset
from fastft_jax.trainers.data.prepared import DataStats, Sample

WORDS = [f"w{i}" for i in range(150)]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_LENGTH = 64
ARRAYS = ("input_ids", "labels", "positions", "segment_ids")


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def save_base(folder: Path, name: str = "llama-2", **changes) -> Path:
    """A tiny random checkpoint with a tokenizer, as a user has it on disk."""
    tiny.save(tiny.make_model(name, **{"num_hidden_layers": 2, **changes}), folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, *, in_4bit: bool = False, **lora) -> FastLanguageModel:
    """The base with an adapter; a zero B would hide most of the maths, so B is random unless asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder may have no tokenizer
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=MAX_LENGTH, dtype="float32", load_in_4bit=in_4bit
        )
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False, "use_gradient_checkpointing": "none"}
    return FastLanguageModel.get_peft_model(model, **(options | lora))


def rows(count: int, seed: int = 0, longest: int = 12) -> list[dict[str, str]]:
    """Prompt and completion of random words, of random lengths."""
    rng = random.Random(seed)

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, longest)))

    return [{"prompt": words(), "completion": " " + words()} for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trainer(model, output_dir: Path, train, evaluation=None, **options) -> SFTTrainer:
    defaults = {"per_device_train_batch_size": 2, "save_strategy": "no", "learning_rate": 1e-3, "optim": "adamw"}
    args = SFTConfig(output_dir=str(output_dir), **(defaults | options))
    return SFTTrainer(model, tokenizer(), train, evaluation, args)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def documents(lengths: list[int], seed: int = 0, trained: float = 0.6, vocab: int = 160) -> PreparedDataset:
    """Random documents of these lengths, `trained` of whose tokens have labels."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, vocab, n).astype(np.int32) for n in lengths]
    labels = [np.where(rng.random(len(x)) < trained, x, -100).astype(np.int32) for x in ids]
    for label in labels:
        label[0] = -100  # nothing predicts the first token
    n = sum(lengths)
    count = len(lengths)
    stats = DataStats("text", count, count, 0, 0, 0, n, sum(int((x != -100).sum()) for x in labels), max(lengths))
    return PreparedDataset(ids, labels, list(range(count)), stats, Sample("", []), None, 0, MAX_LENGTH)


def whole(data: PreparedDataset, *, packing: bool) -> tuple[dict[str, np.ndarray], BatchSource]:
    """All documents as one batch [B, T], and the source it came from."""
    rows = BatchSource(data, 1, MAX_LENGTH, packing=packing, shuffle=False).n_rows
    source = BatchSource(data, rows, MAX_LENGTH, packing=packing, shuffle=False)
    batch = source.batch(0, 0)
    return {name: batch[name] for name in ARRAYS}, source
