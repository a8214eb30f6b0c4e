"""A Hugging Face folder -> a decoder: every tensor named, checked, read alone and quantised on the device."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.quant.nf4 import quantize, stack

FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Request:
    """One leaf of the decoder: where it is, the shape of one layer's tensor, which layers it stacks."""

    path: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None

    def hf_names(self, names: NameTable) -> list[str]:
        return [names.hf_name(self.path, layer) for layer in (self.layers or (None,))]

    @property
    def quantisable(self) -> bool:
        """The linears inside layers; embeddings, head, norms and biases stay as they are (as bitsandbytes does)."""
        return self.layers is not None and len(self.shape) == 2


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as a dict."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face model folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return values


def load_decoder(folder: Path, config: DecoderConfig, names: NameTable, *, dtype, load_in_4bit: bool) -> Decoder:
    """The decoder of `folder` with linears in NF4 (double-quantised) or in `dtype`, everything else in `dtype`.

    Host memory holds two tensors at a time: the one being quantised and the next, read ahead by a thread.
    Raises CheckpointError for missing, unexpected or misshapen tensors, before any is read.
    """
    checkpoint = Checkpoint.open(folder)
    names = names.stored(lambda name: not checkpoint.missing([name]))
    requests = list(tensor_requests(config))
    _check(checkpoint, requests, names, config)
    order = iter([name for request in requests for name in request.hf_names(names)])
    with ThreadPoolExecutor(1) as pool:
        ahead = _ReadAhead(checkpoint, order, pool)

        def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
            request = Request(path, shape, layers)
            quantised = load_in_4bit and request.quantisable
            # Waiting keeps the host at two tensors: otherwise transfers queue up behind the reader.
            parts = [jax.block_until_ready(_pack(ahead.next(), dtype, quantised)) for _ in request.hf_names(names)]
            if layers is None:
                return parts[0]
            return stack(parts) if quantised else jnp.stack(parts)

        return Decoder(config, load, dtype)


def tensor_requests(config: DecoderConfig) -> Iterator[Request]:
    """What a decoder of this configuration will ask for, in the order it asks."""
    asked: list[Request] = []

    def record(path, shape, layers):
        asked.append(Request(path, shape, layers))
        return np.empty(0)

    Decoder(config, record, None)
    yield from asked


def _check(checkpoint: Checkpoint, requests: list[Request], names: NameTable, config: DecoderConfig) -> None:
    expected = {name: request.shape for request in requests for name in request.hf_names(names)}
    missing = checkpoint.missing(expected)
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {_few(missing)}, which its config.json calls for")
    ignored = [*names.ignored, names.top["lm_head.weight"]] if config.tie_word_embeddings else list(names.ignored)
    unexpected = [
        n
        for n in checkpoint.unexpected(expected)
        if not n.endswith(tuple(ignored)) and not n.startswith(names.ignored_under)
    ]
    if unexpected:
        raise CheckpointError(f"{checkpoint.folder} holds {_few(unexpected)}, which its config.json does not call for")
    for name, shape in expected.items():
        found_dtype, found = checkpoint.info(name)
        if tuple(found) != shape:
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: {name!r} has shape {list(found)}, config.json calls for {list(shape)}"
            )
        if found_dtype.name not in FLOATS:
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: {name!r} is {found_dtype.name}; only {', '.join(FLOATS)} can be read"
            )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


class _ReadAhead:
    """Reads the tensors of a known order, one ahead of the caller."""

    def __init__(self, checkpoint: Checkpoint, order: Iterator[str], pool: ThreadPoolExecutor):
        self._checkpoint, self._order, self._pool = checkpoint, order, pool
        self._pending: Future | None = None
        self._submit()

    def next(self) -> np.ndarray:
        tensor = self._pending.result()
        self._submit()
        return tensor

    def _submit(self) -> None:
        name = next(self._order, None)
        self._pending = None if name is None else self._pool.submit(self._checkpoint.read, name)


@partial(jax.jit, static_argnums=(1, 2))
def _pack(w: Array, dtype, quantised: bool):
    """A tensor in `dtype`, or its NF4 code (quantised from `dtype`, as transformers does)."""
    w = w.astype(dtype)
    return quantize(w) if quantised else w
