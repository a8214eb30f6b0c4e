"""A Hugging Face folder -> a decoder: every tensor named, checked, read alone and quantised on the device."""

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fastft_jax.convert import fp8_blocks
from fastft_jax.convert.bitsandbytes import Packed, belongs_to, packed_matrices
from fastft_jax.convert.bitsandbytes.eight_bits import DecodedInt8, PackedInt8, int8_matrices
from fastft_jax.convert.fused_experts import FusedExperts
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.quant import int8
from fastft_jax.quant.dense import Quantised, dense, is_quantised
from fastft_jax.quant.nf4 import quantize

FLOATS = ("bfloat16", "float16", "float32")
UNQUANTISED = ("mlp.router.weight", "mlp.shared_expert_gate.weight")
IN_FLOAT32 = ("mlp.router.e_score_correction_bias",)  # whatever the model's dtype: rounded, it chooses other experts


@dataclass(frozen=True)
class Request:
    """One leaf of the decoder: where it is, the shape of one layer's tensor, which layers it stacks.

    Of experts [E, N, K] and [E, N] each one's matrix and bias is a tensor of its own in a checkpoint.
    """

    path: str
    shape: tuple[int, ...]
    layers: tuple[int, ...] | None

    def hf_names(self, names: NameTable) -> list[str]:
        """All its tensors, layer by layer and within a layer expert by expert."""
        return [names.hf_name(self.path, layer, e) for layer in (self.layers or (None,)) for e in self.experts]

    @property
    def experts(self) -> tuple[int | None, ...]:
        """Their numbers; (None,) for what is one tensor a layer."""
        return tuple(range(self.shape[0])) if self.path.startswith("mlp.experts.") else (None,)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each of its tensors."""
        return self.shape if self.experts == (None,) else self.shape[1:]

    @property
    def lead(self) -> tuple[int, ...]:
        """How its tensors are stacked."""
        return () if self.layers is None else (len(self.layers), *self.shape[: -len(self.tensor_shape)])

    @property
    def quantisable(self) -> bool:
        """The linears inside layers; embeddings, head, norms and biases stay as they are (as bitsandbytes does), and so
        do routers."""
        return self.layers is not None and len(self.tensor_shape) > 1 and not self.path.endswith(UNQUANTISED)


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


def load_decoder(
    source: Path | Checkpoint,
    config: DecoderConfig,
    names: NameTable,
    *,
    dtype,
    load_in_4bit: bool,
    load_in_8bit: bool = False,
) -> Decoder:
    """The decoder of a folder or open checkpoint: linears in NF4 (double-quantised), int8 or `dtype`, the rest in that.

    Matrices that bitsandbytes packed keep their codes and scales, bit for bit; those in 8 bits only in int8, else they
    are decoded, as those in block-scaled fp8 are. Host memory holds two tensors at a time: the one being quantised and
    the next, read ahead by a thread.
    Raises CheckpointError for missing, unexpected or misshapen tensors, ConfigError for int8 of a checkpoint in 4 bits,
    before any is read.
    """
    checkpoint = Checkpoint.open(source) if isinstance(source, str | Path) else source
    if names.fused_experts:
        checkpoint = FusedExperts(checkpoint)
    names = names.stored(lambda name: not checkpoint.missing([name]))
    requests = list(tensor_requests(config))
    matrices = [request for request in requests if request.quantisable]
    shapes = {n: r.tensor_shape for r in matrices for n in r.hf_names(names)}
    packed, int8_packed = packed_matrices(checkpoint, shapes), int8_matrices(checkpoint, shapes)
    scaled = fp8_blocks.scaled_matrices(checkpoint, shapes)
    if load_in_8bit:
        packed |= int8_packed
    elif int8_packed:
        checkpoint = DecodedInt8(checkpoint, int8_packed)
        if load_in_4bit:
            warnings.warn(
                f"{checkpoint.folder} is in 8 bits: its matrices are quantised again, to 4 bits; load_in_8bit=True "
                "takes them as they are",
                stacklevel=3,
            )
    _check(checkpoint, requests, names, config, packed, scaled)
    if load_in_8bit and any(isinstance(p, Packed) for p in packed.values()):
        raise ConfigError(
            f"load_in_8bit=True: {checkpoint.folder} holds matrices in 4 bits already; use load_in_4bit=True"
        )
    quantised = "nf4" if load_in_4bit else "int8" if load_in_8bit else None
    wanted = [name for request in requests for name in request.hf_names(names)]
    parts = {name: [name, scales] for name, scales in scaled.items()} | {n: p.tensors for n, p in packed.items()}
    order = iter([part for name in wanted for part in parts.get(name, [name])])
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor() as compilers:
        ahead = _ReadAhead(checkpoint, order, pool)
        programs = {
            kind: compilers.submit(_compile_fill, *kind)
            for kind in dict.fromkeys(
                _kind(request, np.dtype(dtype) if name in scaled else checkpoint.info(name)[0], dtype, quantised)
                for request in requests
                if len(request.tensor_shape) > 1 and request.layers is not None
                for name in request.hf_names(names)
                if name not in packed
            )
        }

        def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
            request = Request(path, shape, layers)
            if layers is None:
                return jax.block_until_ready(_cast(ahead.next(), dtype))
            if len(request.tensor_shape) == 1:
                held_in = dtype_of(path, dtype)
                rows = [ahead.next().astype(held_in) for _ in request.hf_names(names)]
                return jax.device_put(np.stack(rows).reshape(len(layers), *shape))
            tensors = request.hf_names(names)
            here = [packed.get(name) for name in tensors]
            if any(here):
                return with_lead(_unpacked(path, here, ahead, dtype, quantised), request.lead)
            stack = None
            for i, name in enumerate(tensors):
                w = ahead.next()
                w = fp8_blocks.decode(w, ahead.next(), dtype) if name in scaled else w
                room, fill = programs[_kind(request, w.dtype, dtype, quantised)].result()
                # Waiting keeps the host at two tensors: otherwise transfers queue up behind the reader.
                stack = room() if stack is None else stack
                stack = jax.block_until_ready(fill(stack, w.reshape(-1), np.int32(i)))
            if is_quantised(stack):
                return with_lead(dataclasses.replace(stack, shape=request.tensor_shape), request.lead)
            return stack.reshape(len(layers), *shape)

        return Decoder(config, load, dtype)


def dtype_of(path: str, dtype: Any) -> Any:
    """The dtype of an unquantised tensor, in a decoder and in checkpoints of it, where `dtype` is the model's."""
    return np.float32 if path in IN_FLOAT32 else dtype


def tensor_requests(config: DecoderConfig) -> Iterator[Request]:
    """What a decoder of this configuration will ask for, in the order it asks."""
    asked: list[Request] = []

    def record(path, shape, layers):
        asked.append(Request(path, shape, layers))
        return np.empty(0)

    Decoder(config, record, None)
    yield from asked


def _check(
    checkpoint: Checkpoint,
    requests: list[Request],
    names: NameTable,
    config: DecoderConfig,
    packed: dict[str, Packed | PackedInt8],
    scaled: dict[str, str],
) -> None:
    expected = {name: request.tensor_shape for request in requests for name in request.hf_names(names)}
    missing = checkpoint.missing(expected)
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {_few(missing)}, which its config.json calls for")
    ignored = [*names.ignored, names.top["lm_head.weight"]] if config.tie_word_embeddings else list(names.ignored)
    unread = tuple(names.layer_prefix.format(config.num_hidden_layers + i) for i in range(config.unread_layers))
    unexpected = [
        n
        for n in checkpoint.unexpected([*expected, *scaled.values()])
        if not n.endswith(tuple(ignored)) and not n.startswith(names.ignored_under) and belongs_to(n) not in packed
    ]
    if behind := [n for n in unexpected if n.startswith(unread)]:
        warnings.warn(
            f"{checkpoint.folder}: {len(behind)} tensors of {', '.join(unread)} are not read: they predict tokens "
            "further ahead (num_nextn_predict_layers), which serves pretraining and speculative decoding",
            stacklevel=3,
        )
        unexpected = [n for n in unexpected if not n.startswith(unread)]
    if unexpected:
        raise CheckpointError(f"{checkpoint.folder} holds {_few(unexpected)}, which its config.json does not call for")
    for name, shape in expected.items():
        if name in packed:
            continue  # checked by its own rules
        found_dtype, found = checkpoint.info(name)
        if tuple(found) != shape:
            raise CheckpointError(
                f"{checkpoint.path_of(name)}: {name!r} has shape {list(found)}, config.json calls for {list(shape)}"
            )
        if found_dtype.name not in FLOATS and name not in scaled:
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


def _cast(w: np.ndarray, dtype) -> Array:
    """On the device, in `dtype`; nothing is compiled where it has that dtype already."""
    w = jax.device_put(w)
    return w if w.dtype == dtype else w.astype(dtype)


def _unpacked(
    path: str, packed: list[Packed | PackedInt8 | None], ahead: "_ReadAhead", dtype, quantised: str | None
) -> Quantised | Array:
    """The stack of one place whose matrices, some or all, are packed: as they are, or all of them in `dtype`.

    A place is one array, so a single matrix in 16 bits puts all of it in 16 bits: nothing is quantised again.
    """
    alike = all(packed) and len({p.double for p in packed}) == 1
    keep = quantised is not None and alike
    if quantised is not None and not alike:
        bits = 4 if quantised == "nf4" else 8
        left = sum(p is None for p in packed)
        warnings.warn(
            f"{path}: {left} of {len(packed)} layers are not in {bits} bits in this checkpoint, "
            f"or not all in the same way, so all of them are kept in {jnp.dtype(dtype).name}",
            stacklevel=2,
        )
    stack = None
    for i, p in enumerate(packed):
        part = ahead.next() if p is None else p.assemble([ahead.next() for _ in p.tensors])
        if not keep:
            part = _cast(part, dtype) if p is None else dense(part, dtype)
        if stack is None:
            stack = jax.tree.map(lambda leaf: jnp.zeros((len(packed), *leaf.shape), leaf.dtype), part)
        stack = jax.block_until_ready(_put(stack, part, np.int32(i)))
    return stack


def with_lead(stack: Quantised | Array, lead: tuple[int, ...]) -> Quantised | Array:
    """Matrices that were stacked on one axis, on the axes `lead`: layers, and experts if there are any."""
    return stack if len(lead) < 2 else _split_first_axis(stack, lead)


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def _split_first_axis(stack, lead: tuple[int, ...]):
    return jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), stack)


@partial(jax.jit, donate_argnums=0)
def _put(stack, part, index):
    return jax.tree.map(lambda leaf, p: jax.lax.dynamic_update_index_in_dim(leaf, p, index, 0), stack, part)


class _Kind(NamedTuple):
    """What fixes the program that fills a stack: matrices of equal size share one, whatever their shape (not int8)."""

    layers: int
    shape: tuple[int, ...]
    source: np.dtype
    dtype: Any
    quantised: str | None  # "nf4" or "int8"


def _kind(request: Request, source: np.dtype, dtype, quantised: str | None) -> _Kind:
    quantised = quantised if request.quantisable else None
    shape = request.tensor_shape if quantised == "int8" else (math.prod(request.tensor_shape),)
    return _Kind(math.prod(request.lead), shape, np.dtype(source), dtype, quantised)


def _compile_fill(
    layers: int, shape: tuple[int, ...], source: np.dtype, dtype, quantised: str | None
) -> tuple[Callable, Callable]:
    """`room()`: an empty stack; `fill(stack, w, i)`: with w (flat) at index i, in place, in `dtype` or its NF4 or int8
    code (quantised from `dtype`, as transformers does).

    Compiled ahead, in threads, while tensors are read: encoding takes XLA seconds a size.
    """

    def pack(w):
        w = w.astype(dtype)
        return quantize(w) if quantised == "nf4" else int8.quantize(w.reshape(shape)) if quantised else w

    def fill(stack, w, i):
        put = lambda leaf, part: jax.lax.dynamic_update_index_in_dim(leaf, part, i, 0)  # noqa: E731
        return jax.tree.map(put, stack, pack(w))

    w = jax.ShapeDtypeStruct((math.prod(shape),), source)
    stack = jax.tree.map(lambda s: jax.ShapeDtypeStruct((layers, *s.shape), s.dtype), jax.eval_shape(pack, w))
    room = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stack))
    filler = jax.jit(fill, donate_argnums=0).lower(stack, w, jax.ShapeDtypeStruct((), jnp.int32))
    return room.lower().compile(), filler.compile()
