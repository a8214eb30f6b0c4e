"""Writes a checkpoint with the geometry of a published model and random weights: no download, any speed or memory test.

    python scripts/make_random_checkpoint.py --like llama-3.1-8b OUT [--layers N] [--max-shard-size 5GB]

config.json has what decides the published one's maths; the ids of the special tokens are of the byte-level tokenizer
written beside it (chatml template, 260 ids), so that the folder can be trained on at once. Norms are 1, all other
weights normal(0, 0.02). Needs numpy, ml_dtypes and tokenizers; memory for one tensor.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastft_jax.bench.geometries import GEOMETRIES
from fastft_jax.convert.safetensors import atomic_folder, write_sharded
from fastft_jax.errors import FastFTError

TINY = {  # of no published model: small enough for a test
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 176,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 320,
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True}
MODELS = {
    name: COMMON | {"architectures": [CLASSES[geometry["model_type"]]]} | geometry
    for name, geometry in {**GEOMETRIES, "tiny-llama": TINY}.items()
    if geometry["model_type"] in CLASSES
}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them, in the order of the model."""
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (out, width)
            if config["model_type"] == "qwen2":
                shapes[f"{at}self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{at}self_attn.o_proj.weight"] = (width, q)
        if config["model_type"] == "qwen3":
            shapes[f"{at}self_attn.q_norm.weight"] = shapes[f"{at}self_attn.k_norm.weight"] = (head,)
        if config["model_type"] == "mixtral":
            shapes[f"{at}block_sparse_moe.gate.weight"] = (config["num_local_experts"], width)
            for expert in range(config["num_local_experts"]):
                for name, shape in (("w1", (ffn, width)), ("w2", (width, ffn)), ("w3", (ffn, width))):
                    shapes[f"{at}block_sparse_moe.experts.{expert}.{name}.weight"] = shape
        else:
            shapes[f"{at}mlp.gate_proj.weight"] = shapes[f"{at}mlp.up_proj.weight"] = (ffn, width)
            shapes[f"{at}mlp.down_proj.weight"] = (width, ffn)
        shapes[f"{at}input_layernorm.weight"] = shapes[f"{at}post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


class RandomWeights:
    """normal(0, 0.02) at the speed of memory: pieces of one large block of normals, each from a place drawn anew."""

    BLOCK, PIECE = 1 << 23, 1 << 20

    def __init__(self, seed: int, dtype: np.dtype):
        self.rng = np.random.default_rng(seed)
        normals = self.rng.standard_normal(self.BLOCK, np.float32)
        self.block = (normals * np.float32(0.02)).astype(dtype)
        self.buffer = np.empty(0, dtype)

    def fill(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor, in a buffer that the next call overwrites: fresh pages for each would take half of the time."""
        size = int(np.prod(shape))
        if self.buffer.size < size:
            self.buffer = np.empty(size, self.block.dtype)
        flat = self.buffer[:size]
        if name.endswith("norm.weight"):
            flat.fill(1)
            return flat.reshape(shape)
        for start in range(0, flat.size, self.PIECE):
            piece = flat[start : start + self.PIECE]
            at = self.rng.integers(self.BLOCK - piece.size)
            piece[:] = self.block[at : at + piece.size]
        return flat.reshape(shape)


def write_tokenizer(folder: Path, max_length: int) -> dict[str, int]:
    """One token a byte and the four special ones; returns the ids that config.json names."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|endoftext|>",
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": max_length,
        "pad_token": "<|pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {f"{kind}_token_id": tokenizer.token_to_id(settings[f"{kind}_token"]) for kind in ("bos", "eos")}


def make(like: str, out: Path, *, seed: int, dtype: str, max_shard_size: str, layers: int | None) -> int:
    """Writes the folder (it appears whole at the end) and returns the number of parameters."""
    config = dict(MODELS[like])
    if layers is not None:
        config["num_hidden_layers"] = layers
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    shapes = tensor_shapes(config)
    weights = RandomWeights(seed, numpy_dtype)
    layout = {name: (numpy_dtype, shape) for name, shape in shapes.items()}
    with atomic_folder(out, durable=False) as folder:  # it can be made again
        ids = write_tokenizer(folder, config["max_position_embeddings"])
        config |= ids | {"torch_dtype": dtype}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2, sort_keys=True) + "\n")
        write_sharded(folder, layout, lambda name: weights.fill(name, shapes[name]), max_shard_size, durable=False)
    return sum(int(np.prod(shape)) for shape in shapes.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--like", required=True, choices=MODELS, help="whose geometry")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the model has")
    options = vars(parser.parse_args())
    if options["layers"] is not None and options["layers"] < 1:
        parser.error("--layers must be at least 1")
    began = time.perf_counter()
    try:
        parameters = make(**options)
    except FastFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options['out']}: {parameters / 1e6:,.1f} M parameters in {time.perf_counter() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
