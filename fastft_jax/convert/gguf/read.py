"""A GGUF file as a base model: its metadata as a config.json, its tensors under Hugging Face's names, decoded."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastft_jax.convert.gguf.architectures import ARCHITECTURES, from_llama_cpp, tensor_name
from fastft_jax.convert.gguf.encode import TYPES
from fastft_jax.convert.gguf.families_in import READABLE
from fastft_jax.convert.gguf.file import PLAIN, GGUFFile
from fastft_jax.convert.gguf.parts import join, parts_of
from fastft_jax.convert.hf import tensor_requests
from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig, RopeConfig
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.rope import llama3_divisors

_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


class GGUFModel(GGUFFile):
    """A file that can be a base model; its tensors are decoded when asked for.

    After `bind` it answers `convert.hf.load_decoder` as a safetensors Checkpoint does. CheckpointError for adapters,
    parts of a split model, and architectures and types that cannot be read.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.folder, self.architecture = self.path, self.get("general.architecture")
        if self.get("general.type", "model") != "model":
            raise CheckpointError(f"{path} holds a GGUF {self.get('general.type')}, not a model")
        if self.get("split.count", 1) > 1:
            raise CheckpointError(f"{path} is one part of {self.get('split.count')}; join them with llama-gguf-split")
        if self.architecture not in READABLE or self.key("expert_count", 0):
            experts = " with experts" if self.key("expert_count", 0) else ""
            raise CheckpointError(
                f"{path}: GGUF models of architecture {self.architecture!r}{experts} cannot be read "
                f"(can be: {', '.join(READABLE)})"
            )
        for name, tensor in self.tensors.items():
            if tensor.kind not in TYPES:
                raise CheckpointError(
                    f"{path}: {name} is of type {tensor.kind}, which cannot be read (can be: {', '.join(TYPES)})"
                )
        self._names: dict[str, tuple[str, int | None]] = {}

    def key(self, key: str, default: Any = None) -> Any:
        """A value of the metadata under the architecture's own name; CheckpointError where there is no default."""
        value = self.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path} has no {self.architecture}.{key}: it is not a whole model")
        return value

    def hf_config(self) -> dict[str, Any]:
        """What this model's config.json would say."""
        heads, width = self.key("attention.head_count"), self.key("embedding_length")
        if "token_embd.weight" not in self.tensors:
            raise CheckpointError(f"{self.path} has no token_embd.weight: it is not a whole model")
        head_dim = self.key("attention.key_length", width // heads)
        if self.architecture != "phi3" and self.key("rope.dimension_count", head_dim) != head_dim:
            raise CheckpointError(f"{self.path}: rope.dimension_count is not the head's width of {head_dim}")
        values = {
            "vocab_size": self.tensors["token_embd.weight"].shape[0],
            "hidden_size": width,
            "intermediate_size": self.key("feed_forward_length"),
            "num_hidden_layers": self.key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.key("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self.key("context_length"),
            "rope_theta": self.key("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }
        if self.architecture in ("command-r", "cohere2"):
            values["layer_norm_eps"] = self.key("attention.layer_norm_epsilon")
        else:
            values["rms_norm_eps"] = self.key("attention.layer_norm_rms_epsilon")
        values |= READABLE[self.architecture](self, values)
        if "rope_scaling" not in values and "rope_parameters" not in values:
            values["rope_scaling"] = self.rope_scaling(values)
        return {key: value for key, value in values.items() if key != "rope_scaling" or value}

    def rope_scaling(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """config.json's table of that name, None for no scaling; CheckpointError for one that is not known here."""
        kind = self.key("rope.scaling.type", "none")
        if kind == "linear":
            return {"rope_type": kind, "factor": self.key("rope.scaling.factor")}
        if kind == "yarn":
            yarn = {"rope_type": kind, "factor": self.key("rope.scaling.factor")}
            yarn["original_max_position_embeddings"] = self.key("rope.scaling.original_context_length")
            for key in ("beta_fast", "beta_slow"):
                yarn[key] = self.key(f"rope.scaling.yarn_{key}", 32.0 if key == "beta_fast" else 1.0)
            return yarn
        if kind != "none" or "rope_factors_long.weight" in self.tensors:
            raise CheckpointError(f"{self.path}: rope scaling {kind!r} cannot be read")
        if "rope_freqs.weight" not in self.tensors:
            return None
        divisors = self.decode("rope_freqs.weight")
        for original in (8192, *(2**k for k in range(4, 21))):
            scaling = {
                "factor": float(divisors.max()),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            rope = RopeConfig(rope_theta=values["rope_theta"], rope_type="llama3", **scaling)
            if np.allclose(llama3_divisors(rope, values["head_dim"]), divisors, rtol=1e-5):
                return {"rope_type": "llama3", **scaling}
        raise CheckpointError(f"{self.path}: rope_freqs.weight is not the scaling of Llama 3.1 and cannot be read")

    def bind(self, config: DecoderConfig, names: NameTable) -> None:
        """Gives the tensors their Hugging Face names; CheckpointError for one that the decoder has no place for."""
        self._config, self._architecture = config, ARCHITECTURES[config.model_type]
        used: set[str] = set()
        for request in tensor_requests(config):
            for layer in request.layers or (None,):
                theirs = {tensor_name(part, layer, self._architecture) for part in parts_of(request.path, config)}
                if theirs <= self.tensors.keys():
                    self._names[names.hf_name(request.path, layer)] = request.path, layer
                    used |= theirs
        left = self.tensors.keys() - used - _ROPE_TENSORS
        if left:
            raise CheckpointError(f"{self.path} holds {min(left)!r}, which its metadata does not call for")

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def info(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        path, layer = self._names[name]
        parts = parts_of(path, self._config)
        tensors = [self.tensors[tensor_name(part, layer, self._architecture)] for part in parts]
        kinds, (rows, *columns) = {tensor.kind for tensor in tensors}, tensors[0].shape
        rows += sum(tensor.shape[0] for tensor in tensors[1:])
        return PLAIN.get(kinds.pop() if len(kinds) == 1 else "F32", PLAIN["F32"]), (rows, *columns)

    def read(self, name: str) -> np.ndarray:
        path, layer = self._names[name]

        def part(path: str) -> np.ndarray:
            whole = self.decode(tensor_name(path, layer, self._architecture))
            return from_llama_cpp(path, whole, self._config, self._architecture)

        w = join(path, [part(p) for p in parts_of(path, self._config)], self._config)
        return np.ascontiguousarray(w.astype(self.info(name)[0], copy=False))

    def path_of(self, name: str) -> Path:
        return self.path

    def missing(self, expected: Iterable[str]) -> list[str]:
        return [name for name in expected if name not in self._names]

    def unexpected(self, expected: Iterable[str]) -> list[str]:
        known = set(expected)
        return [name for name in self._names if name not in known]
