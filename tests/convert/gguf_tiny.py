"""What the GGUF tests share: tiny models of every family as llama.cpp accepts them, and small tokenizers."""

import json
from pathlib import Path

import gguf
import numpy as np
import tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fastft_jax.convert.gguf.pre_tokenizers import LLAMA3, QWEN2

VOCABULARY = 320
TEXTS = (
    "Hello world, this is a text. It's 12345 o'clock!\n\n  We'll see: I'D say 3.14",
    "日本語のテキスト、你好世界。Привет, мир! Ünïcödé — “quotes” …",
    "def f(x):\n\treturn x  #   spaces \U0001f999\U0001f680\n",
    "<|im_start|>user\nhi<|im_end|> \r\n\r\n x",
)
# what llama.cpp hard-codes, where the tiny models of other tests have it otherwise
AS_IN_LLAMA_CPP = {
    "gemma-2": dict(query_pre_attn_scalar=24),
    "gemma-3": dict(
        query_pre_attn_scalar=24, num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"]
    ),
    "smollm-3": dict(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0]),
    "cohere-2": dict(num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
}
# one epsilon for all norms, no biases, and one mscale, as the releases have them; layers of both kinds
DEEPSEEK = dict(
    rms_norm_eps=1e-6,
    attention_bias=False,
    first_k_dense_replace=1,
    rope_parameters=tiny.YARN | dict(rope_theta=1e4, mscale=0.7, mscale_all_dim=0.7),
)
FAMILIES = (
    *("llama-2-linear", "llama-2-yarn", "llama-3.1", "llama-3.2-tied", "llama-biases", "mistral-nemo"),
    *("qwen-2.5-tied", "qwen-3", "gemma", "gemma-2", "gemma-3", "phi-2", "phi-3", "phi-4-mini", "granite", "smollm-3"),
    *("olmo-2", "olmo-3", "cohere", "cohere-2", "stablelm", "stablelm-parallel"),
)


def make_family(name: str, **changes):
    """The tiny transformers model of a family, with room for `byte_tokenizer`'s vocabulary."""
    options = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "vocab_size": VOCABULARY}
    return tiny.make_model(name, **AS_IN_LLAMA_CPP.get(name, {}) | options | changes)


def byte_tokenizer(rules: str = "gpt2", size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on TEXTS, which cuts text by the rules of GPT-2, Llama 3 or Qwen 2."""
    made = Tokenizer(models.BPE(ignore_merges=rules == "llama3"))
    steps = {
        "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    }
    for name, regex in (("llama3", LLAMA3), ("qwen2", QWEN2)):
        cut = pre_tokenizers.Split(Regex(regex), "isolated")
        steps[name] = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    made.pre_tokenizer = steps[rules][0] if len(steps[rules]) == 1 else pre_tokenizers.Sequence(steps[rules])
    made.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*TEXTS] * 2, trainer)
    if rules == "llama3":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def contents(path: Path) -> tuple[dict, dict[str, tuple[str, np.ndarray]]]:
    """(metadata, name -> (type, stored data)) of a GGUF file, by the gguf package."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return metadata, {t.name: (t.tensor_type.name, np.asarray(t.data)) for t in reader.tensors}


def save_folder(model, tokenizer, folder: Path) -> Path:
    """A Hugging Face folder, as published ones are."""
    tiny.save(model, folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder
