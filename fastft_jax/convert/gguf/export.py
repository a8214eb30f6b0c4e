"""A model, merged with its adapter, as GGUF files of one or several quantisation methods."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float

from fastft_jax.convert.atomic import write_bytes
from fastft_jax.convert.gguf import recipes
from fastft_jax.convert.gguf.adapter import save_gguf_adapter
from fastft_jax.convert.gguf.architectures import (
    Architecture,
    add_hyperparameters,
    architecture_of,
    extra_tensors,
    shape_there,
    tensor_name,
    to_llama_cpp,
)
from fastft_jax.convert.gguf.imatrix import check_imatrix, read_imatrix
from fastft_jax.convert.gguf.modelfile import modelfile
from fastft_jax.convert.gguf.parts import parts_of, shapes_of_parts, split
from fastft_jax.convert.gguf.read_back import ReadBack
from fastft_jax.convert.gguf.vocabulary import read_vocabulary
from fastft_jax.convert.gguf.writer import File, Tensor, write_gguf
from fastft_jax.convert.merged.merge import MergedTensor, merged_layout
from fastft_jax.convert.read_back import Difference
from fastft_jax.convert.sample_rows import comparison_rows
from fastft_jax.errors import ConfigError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder


def save_gguf(
    decoder: Decoder,
    folder: Path | str,
    tokenizer: Any,
    methods: Sequence[str],
    *,
    name: str,
    context: int | None = None,
    imatrix_file: Path | str | None = None,
    check: Callable[[Path, str, Path], None] | None = None,
) -> list[Path]:
    """Writes `folder/NAME-METHOD.gguf` for each method, in one pass over the weights, and a Modelfile for Ollama.

    name: the model's, of which the last part is taken. context: how many tokens the model is said to read, by default
    the decoder's max_position_embeddings. imatrix_file: an importance matrix that k-quants follow. Files of the same
    name are replaced, each at once and when it is complete; before that, `check(draft, method, path)` may look at it,
    and raise.
    Raises CheckpointError for a family, tokenizer or decoder that llama.cpp does not know, ConfigError for an unknown
    method.
    """
    methods = list(dict.fromkeys(recipes.resolve_method(method) for method in methods))
    if not methods:
        raise ConfigError("quantization_method is empty")
    folder, stem = Path(folder).expanduser(), file_stem(name)
    config, architecture = decoder.config, architecture_of(decoder.config)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    layout = merged_layout(decoder)
    tensors = [Tensor(n, w.shape, partial(np.asarray, w)) for n, w in extra_tensors(config)]
    tensors += [tensor for t in layout for tensor in _tensors(t, config, architecture)]
    if imatrix_file is not None:
        means = read_imatrix(imatrix_file)
        check_imatrix(imatrix_file, means, {t.name: t.shape for t in tensors})
        tensors = [replace(t, importance=means.get(t.name)) for t in tensors]
    shape = recipes.Shape(
        architecture.name,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        tied=not any(t.path == "lm_head.weight" for t in layout),
        experts=config.experts.num_experts if config.experts else 0,
    )
    files = []
    for method in methods:
        writer = gguf.GGUFWriter(None, architecture.name)
        writer.add_type("model")
        writer.add_name(stem)
        writer.add_size_label(gguf.size_label(sum(int(np.prod(t.shape)) for t in tensors), 0, 0, 0))
        add_hyperparameters(writer, config, architecture, context)
        vocabulary.write(writer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(recipes.METHODS[method][1])
        kinds = {t.name: recipes.tensor_type(method, t.name, t.shape, shape) for t in tensors}
        files.append(File(folder / f"{stem}-{method.upper()}.gguf", writer, kinds))
    made = dict(zip((file.path for file in files), methods, strict=True))
    write_gguf(files, tensors, check and (lambda file, draft: check(draft, made[file.path], file.path)))
    write_bytes(folder / "Modelfile", modelfile([file.path.name for file in files], tokenizer).encode())
    return [file.path for file in files]


def file_stem(name: str) -> str:
    """What the files are called: the last part of a path or hub id, safe in a file's name."""
    last = Path(str(name).rstrip("/")).name.removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip(".-") or "model"


def _tensors(t: MergedTensor, config: DecoderConfig, architecture: Architecture) -> Iterator[Tensor]:
    """What is written of one of our tensors: itself, or its parts, for each of which it is computed again (so that no
    more of it is in memory than is written)."""

    def read(part: str, i: int) -> Float[np.ndarray, "..."]:
        return to_llama_cpp(part, np.ascontiguousarray(split(t.path, t.read(), config)[i]), config, architecture)

    parts, shapes = parts_of(t.path, config), shapes_of_parts(t.path, t.shape, config)
    for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        yield Tensor(tensor_name(part, t.layer, architecture), shape_there(part, shape), partial(read, part, i))


class Files(list[Path]):
    """The paths that were written; `differences`: how each of them computes, read back."""

    def __init__(self):
        super().__init__()
        self.differences: dict[Path, Difference] = {}

    def __str__(self) -> str:
        said = {path: f"read back: {found}" for path, found in self.differences.items()}
        return ", ".join(f"{path}: {said[path]}" if path in said else str(path) for path in self)


def save_model_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any,
    methods: str | Sequence[str],
    imatrix_file: Path | str | None = None,
    *,
    verify: bool = True,
    rows: Sequence[Sequence[int]] | None = None,
) -> Files:
    """`FastLanguageModel.save_pretrained_gguf`: the methods may have "lora", the adapter alone, among them."""
    methods = [methods] if isinstance(methods, str) else list(methods)
    merged = [method for method in methods if method.lower() != "lora"]
    paths = Files()
    if len(merged) < len(methods):
        alpha = (model.peft_config or {}).get("lora_alpha", 1.0)
        stem = file_stem(model.name_or_path)
        path = folder.expanduser() / f"{stem}-LoRA-F32.gguf"
        paths.append(save_gguf_adapter(model.decoder, path, name=stem, alpha=float(alpha)))
    if merged or not methods:
        # Command-R reads further than its max_position_embeddings says
        context = model.hf_config.get("model_max_length") if model.decoder.config.model_type == "cohere" else None
        found = comparison_rows(rows, tokenizer, model.decoder.config.vocab_size)
        live = cache(lambda: ReadBack(model, found))  # computed when the first file is there

        def check(draft: Path, method: str, path: Path) -> None:
            paths.differences[path] = live().check(draft, method, path)

        options = {"name": model.name_or_path, "context": context, "imatrix_file": imatrix_file}
        paths += save_gguf(model.decoder, folder, tokenizer, merged, check=check if verify else None, **options)
    return paths
