"""The tokenizer inside a GGUF file, as transformers has it."""

from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.convert.gguf.pre_tokenizers import LLAMA3, QWEN2, TEKKEN
from fastft_jax.errors import CheckpointError

_SPACE = "\u2581"
_CUTS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2),
    "tekken": TEKKEN,
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token is not merged again
_GPT2 = ("gpt-2", "phi-2", "olmo")
_DIGITS = ("smollm", "refact", "starcoder", "command-r")


def gguf_tokenizer(file: GGUFFile) -> Any:
    """A fast tokenizer with the file's vocabulary, special tokens and chat template.

    CheckpointError for a kind of tokenizer or pre-tokenizer that is not known here.
    """
    tokens, types = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.token_type")
    kind = file.get("tokenizer.ggml.model")
    if kind not in ("llama", "gpt2") or tokens is None or types is None:
        raise CheckpointError(
            f"{file.path}: tokenizers of kind {kind!r} cannot be read (can be: llama, gpt2); pass tokenizer_name=..."
        )
    made = _sentencepiece(file, tokens, types) if kind == "llama" else _byte_level(file, tokens, types)
    unknown = file.get("tokenizer.ggml.unknown_token_id")
    special = [i for i, t in enumerate(types) if t == gguf.TokenType.CONTROL or i == unknown]
    own = [i for i, t in enumerate(types) if t == gguf.TokenType.USER_DEFINED]
    made.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in own])
    made.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in special])
    names = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := file.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    _frame(made, file, names)
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = file.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    pre = file.get("tokenizer.ggml.pre", "default")
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != gguf.TokenType.UNUSED}
    merges = [tuple(pair.split(" ")) for pair in file.get("tokenizer.ggml.merges", [])]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre in _CUTS:
        cut = pre_tokenizers.Split(Regex(_CUTS[pre]), "isolated")
        steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    elif pre in _GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        raise CheckpointError(f"{file.path}: pre-tokenizer {pre!r} is not known here; pass tokenizer_name=...")
    made.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """Pieces join in the order of their scores: each way to cut a piece in two known ones is a merge of its rank."""
    scores = file.get("tokenizer.ggml.scores")
    vocab = {t: i for i, t in enumerate(tokens) if types[i] != gguf.TokenType.UNUSED}
    pieces = {t for i, t in enumerate(tokens) if types[i] == gguf.TokenType.NORMAL}
    merges = [
        (-scores[i], i, k)
        for i, piece in enumerate(tokens)
        if types[i] == gguf.TokenType.NORMAL
        for k in range(1, len(piece))
        if piece[:k] in pieces and piece[k:] in pieces
    ]
    pairs = [(tokens[i][:k], tokens[i][k:]) for _, i, k in sorted(merges)]
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    made = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", _SPACE)]
    strip = []
    if file.get("tokenizer.ggml.add_space_prefix", True):
        spaces, strip = [normalizers.Prepend(_SPACE), *spaces], [decoders.Strip(" ", 1, 0)]
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return made


def _frame(made: Tokenizer, file: GGUFFile, names: dict[str, str]) -> None:
    """The tokens before and after every text. llama.cpp's defaults where the file does not say."""
    sentencepiece = file.get("tokenizer.ggml.model") == "llama"
    first = sentencepiece or file.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
    bos = names.get("bos_token") if file.get("tokenizer.ggml.add_bos_token", first) else None
    eos = names.get("eos_token") if file.get("tokenizer.ggml.add_eos_token", False) else None
    if bos or eos:
        around = [f"{bos}:0"] * bool(bos), [f"{eos}:0"] * bool(eos)
        made.post_processor = processors.TemplateProcessing(
            single=[*around[0], "$A:0", *around[1]],
            pair=[*around[0], "$A:0", *around[1], *around[0], "$B:1", *around[1]],
            special_tokens=[(t, made.token_to_id(t)) for t in {bos, eos} - {None}],
        )
