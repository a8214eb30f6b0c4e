"""llama.cpp's name for how a byte-level BPE tokenizer cuts text before merging.

llama.cpp has these cutting rules compiled in and picks one by name (tokenizer.ggml.pre). Its converter knows released
tokenizers by a hash of what they make of one text; the hashes here are its table (convert_hf_to_gguf, MIT licence), of
the families we write. A tokenizer it never saw, say one trained on the user's own text, is told by its rules instead.
"""

import hashlib
from typing import Any

from fastft_jax.errors import CheckpointError

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ "
    "🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
RELEASED = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",
    "d772b220ace2baec124bed8cfafce0ead7d6c38a4b65ef11261cf9d5d62246d1": "tiny_aya",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer_name(tokenizer: Any, description: dict[str, Any]) -> str:
    """The name for a tokenizer whose tokenizer.json is `description`; CheckpointError for unknown rules."""
    made = hashlib.sha256(str(tokenizer(PROBE, verbose=False)["input_ids"]).encode()).hexdigest()
    name = RELEASED.get(made) or _by_rules(description)
    if name is None:
        raise CheckpointError(
            "GGUF: llama.cpp has no name for this tokenizer's pre_tokenizer "
            f"({description.get('pre_tokenizer')!r:.200}), so it would cut text differently; the adapter alone "
            "can still be exported, for a base model in GGUF from elsewhere"
        )
    return name


def _by_rules(description: dict[str, Any]) -> str | None:
    steps = description.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    signature = tuple(_step(step) for step in steps)
    if any(step is None for step in signature):
        return None
    whole = bool(description["model"].get("ignore_merges"))  # a word that is a token is taken whole
    by_rules = {
        (("split", LLAMA3), "bytes"): "llama-bpe" if whole else "dbrx",
        (("split", QWEN2), "bytes"): "qwen2",
        (("split", TEKKEN), "bytes"): "tekken",
        ("gpt2",): "gpt-2",
        ("digits", "gpt2"): "smollm",
    }
    name = by_rules.get(signature)
    return None if whole and name not in ("llama-bpe", "tekken") else name


def _step(step: dict[str, Any]) -> Any:
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "gpt2" if step.get("use_regex", True) else "bytes"
        case "Digits" if step.get("individual_digits"):
            return "digits"
        case "Split" if step.get("behavior") in ("Isolated", "Removed") and not step["pattern"].get("String"):
            return ("split", step["pattern"]["Regex"])
    return None
