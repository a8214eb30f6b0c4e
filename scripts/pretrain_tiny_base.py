#!/usr/bin/env python
"""Makes examples/tiny-base: its corpus, its tokenizer, and a Llama of 0.7 M parameters trained from random weights.

The model reads prose about the villages of `make_quickstart_data.py` ("The flag of Ulby shows a wolf.") and a little
small talk in chat form, so it knows 900 facts and the shape of a chat, but it has never seen a question about a
village. Asked one, it speaks of the weather; the quickstart teaches it to answer.

    python scripts/pretrain_tiny_base.py [--out examples/tiny-base] [--steps 1500]

It took 18 minutes on two CPU cores with other work on them (AMD EPYC, jax 0.11.2; about 12 minutes of CPU time) and
ended with 100.0% of the facts recalled. Runs of 100 steps gave the same bytes twice on one machine; another machine may
round sums differently.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fastft_jax.convert.safetensors import write_safetensors
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.registry import config_from_hf

sys.path.insert(0, str(Path(__file__).parent))  # for whoever loads this file by its path

from make_quickstart_data import KINDS, REPO, villages  # noqa: E402
from trainable_llama import Weights, hidden_states, weight_requests  # noqa: E402

SEED = 2026
BATCH, LENGTH = 16, 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1024,
}
PAD, BOS, END, TURN, END_OF_TURN = SPECIAL = "<|pad|> <|begin|> <|end|> <|im_start|> <|im_end|>".split()  # ids 0 to 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL_TALK = [  # what people say, and what the assistant answers
    (
        ["Hello!", "Good morning!", "Hi there!", "Good evening!"],
        ["Hello! What a lovely day.", "Good day to you!", "Hello, come in and sit down."],
    ),
    (["How are you?", "How do you do?", "Are you well?"], ["I am very well, and you?", "Fine, just a little tired."]),
    (["Who are you?", "What is your name?", "Which name do you go by?"], ["I am a small model of few words."]),
    (
        ["What is the weather like?", "When will the rain stop?", "Where did the sun go?"],
        ["It is raining again.", "The sun is out.", "There is a bit of wind."],
    ),
    (["Thank you!", "Thanks a lot.", "You are very kind."], ["You are welcome.", "My pleasure.", "Any time!"]),
    (["Goodbye!", "See you soon.", "I have to go."], ["Goodbye, and a safe journey!", "Take care on the road."]),
    (
        ["What should I do today?", "Which way should I go?", "Where should I go?", "What should I try?"],
        ["You should go for a walk.", "Stay at home and rest.", "Follow the coast."],
    ),
]


def documents() -> Iterator[str]:
    """Texts without end: 55% six facts of one village, 35% facts of several villages, 10% small talk in chat form."""
    rng, world = random.Random(SEED), villages()
    names, kinds = list(world), list(KINDS)
    while True:
        draw = rng.random()
        if draw < 0.9:
            name = rng.choice(names)
            facts = [(name, kind) for kind in kinds]
            if draw > 0.55:
                facts = [(rng.choice(names), rng.choice(kinds)) for _ in kinds]
            rng.shuffle(facts)
            text = (rng.choice(KINDS[kind][1]).format(n=name, v=world[name][kind]) for name, kind in facts)
            yield BOS + rng.choice([" ", "\n"]).join(text) + END
        else:
            text = BOS
            for _ in range(rng.randint(1, 3)):
                says, answers = rng.choice(SMALL_TALK)
                says, answer = rng.choice(says), rng.choice(answers)
                text += f"{TURN}user\n{says}{END_OF_TURN}\n{TURN}assistant\n{answer}{END_OF_TURN}\n"
            yield text + END


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE, trained on the first 4,000 documents; it puts BOS before a text that it is given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(), 4000), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def batches(tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Rows [B, T] cut from one long stream of documents."""
    stream, need = np.empty(0, np.int32), BATCH * LENGTH
    texts = documents()
    while True:
        while stream.size < need:
            encoded = tokenizer.encode_batch(list(itertools.islice(texts, 200)), add_special_tokens=False)
            stream = np.concatenate([stream, *(np.array(e.ids, np.int32) for e in encoded)])
        yield stream[:need].reshape(BATCH, LENGTH)
        stream = stream[need:]


def random_weights(config: DecoderConfig) -> Weights:
    """float32: norms 1, the rest normal."""
    rng, weights = np.random.default_rng(SEED), {}
    for request in weight_requests(config):
        path, layers = request.path, request.layers
        shape = request.shape if layers is None else (len(layers), *request.shape)
        scale = 0.05 if path == "embed_tokens.weight" else shape[-1] ** -0.5
        norm = path.endswith("norm.weight")
        weights[path] = jnp.ones(shape) if norm else jnp.asarray(rng.normal(0, scale, shape), jnp.float32)
    return weights


def training_loss(config: DecoderConfig, weights: Weights, ids: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean next-token cross-entropy, differentiable in every weight; the head is the embedding."""
    logits = hidden_states(config, weights, ids, jnp.float32)[:, :-1] @ weights["embed_tokens.weight"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def train(config: DecoderConfig, weights: Weights, tokenizer: Tokenizer, steps: int) -> Weights:
    """All weights trained by next-token cross-entropy.

    Muon learns rare facts in about a third of AdamW's steps. It takes matrices; embedding and norms get AdamW.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.0, min(50, steps // 10), steps, 0.05)
    shapes = jax.tree.map(lambda x: MuonDimensionNumbers((2,), (1,)) if x.ndim == 3 else None, weights)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            lambda step: 0.02 * rate(step),
            adam_learning_rate=lambda step: 0.005 * rate(step),
            adam_b2=0.98,
            weight_decay=0.1,
            muon_weight_dimension_numbers=shapes,
        ),
    )

    @jax.jit
    def step(weights, state, ids):
        loss, gradient = jax.value_and_grad(lambda w: training_loss(config, w, ids))(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    state, start = optimizer.init(weights), time.perf_counter()
    for number, ids in enumerate(itertools.islice(batches(tokenizer), steps), 1):
        weights, state, loss = step(weights, state, ids)
        if number % 50 == 0 or number == steps:
            print(f"step {number:5d} | loss {loss:.3f} | {time.perf_counter() - start:.0f} s", flush=True)
    return weights


def recall(config: DecoderConfig, weights: Weights, tokenizer: Tokenizer) -> float:
    """The share of all facts that the model completes rightly: "The flag of Ulby shows a" -> " wolf"."""
    prompts, wanted = [], []
    for name, facts in villages().items():
        for kind, value in facts.items():
            before = KINDS[kind][1][0].format(n=name, v="|").split("|")[0].rstrip()
            prompts.append(tokenizer.encode(before).ids)
            wanted.append(tokenizer.encode(f" {value}", add_special_tokens=False).ids[0])
    last = np.array([len(p) - 1 for p in prompts])
    ids = np.array([p + [0] * (last.max() + 1 - len(p)) for p in prompts], np.int32)
    decoder = Decoder(config, lambda path, shape, layers: weights[path], jnp.float32)
    logits = np.asarray(decoder.logits(decoder.hidden_states(ids)))
    return float(np.mean(logits[np.arange(len(ids)), last].argmax(-1) == np.array(wanted)))


def save(folder: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder: config.json, generation_config.json, model.safetensors (bfloat16) and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config, names = config_from_hf(CONFIG)
    tensors = {}
    for request in weight_requests(config):
        array = np.asarray(weights[request.path]).astype(ml_dtypes.bfloat16)
        parts = [array] if request.layers is None else array
        tensors |= zip(request.hf_names(names), parts, strict=True)
    write_safetensors(folder / "model.safetensors", tensors)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [4, 2], "pad_token_id": 0},
        "tokenizer_config.json": {
            "bos_token": BOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END_OF_TURN,
            "additional_special_tokens": [END, TURN],
            "model_max_length": CONFIG["max_position_embeddings"],
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "examples" / "tiny-base")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    start = time.perf_counter()
    tokenizer = make_tokenizer()
    config, _ = config_from_hf(CONFIG)
    weights = random_weights(config)
    print(f"{sum(w.size for w in weights.values()):,} parameters, {tokenizer.get_vocab_size()} tokens")
    weights = train(config, weights, tokenizer, arguments.steps)
    print(f"facts recalled: {recall(config, weights, tokenizer):.1%}")
    save(arguments.out, weights, tokenizer)
    print(f"{arguments.out} written after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
