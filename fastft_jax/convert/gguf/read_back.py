"""A GGUF file's own logits, and how far they may be from those of the model that it was written from.

The tensors are decoded by the inverse of the map they were written by, one layer at a time, and go through our decoder:
this proves what the file holds. That llama.cpp computes the same from it is what the tests prove.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from fastft_jax.convert.gguf.architectures import ARCHITECTURES, from_llama_cpp, tensor_name
from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.convert.gguf.parts import join, parts_of
from fastft_jax.convert.gguf.recipes import METHODS
from fastft_jax.convert.hf import dtype_of
from fastft_jax.convert.merged.save import difference_bound, live_logits
from fastft_jax.convert.read_back import Difference, compare, layered_logits
from fastft_jax.errors import CheckpointError
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder

_FLOATS = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}


class ReadBack:
    """Compares files with a live model on the same rows, whose logits are computed once."""

    def __init__(self, model: Any, rows: tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]):
        self._decoder, self._rows = model.decoder, rows
        self._live = live_logits(model, *rows)

    def check(self, file: Path, method: str, name: Path) -> Difference:
        """How `file`, which will be called `name`, differs; CheckpointError above the method's bound."""
        ids, mask = self._rows
        logits = file_logits(file, self._decoder.config, ids, mask, self._decoder.dtype)
        difference = compare(self._live, logits, ids, mask)
        bound = method_bound(self._decoder, method, difference.spread)
        if not difference.mean <= bound:
            raise CheckpointError(
                f"{name} was not written: read back, its logits differ from the live model's by "
                f"{difference.mean:.3g} on average, above the bound of {bound:.3g} ({difference})"
            )
        return difference


def file_logits(
    path: Path, config: DecoderConfig, input_ids: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B T"], dtype: Any
) -> Float[Array, "B T V"]:
    """float32 logits of a file that was written from a decoder of `config`, computed in `dtype`."""
    file, architecture = GGUFFile(path), ARCHITECTURES[config.model_type]
    config = replace(config, tie_word_embeddings="output.weight" not in file.tensors)

    def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
        def part(path: str) -> np.ndarray:
            name = tensor_name(path, None if layers is None else layers[0], architecture)
            whole = file.decode(name, np.float32 if len(shape) == 1 else np.dtype(dtype))  # 1 + w is not to be rounded
            return from_llama_cpp(path, whole, config, architecture)

        whole = join(path, [part(p) for p in parts_of(path, config)], config)
        return jnp.asarray(whole.reshape(shape), dtype_of(path, dtype))

    return layered_logits(config, load, input_ids, mask, dtype)


def method_bound(decoder: Decoder, method: str, spread: float) -> float:
    """What the mean |logit difference| of a right file stays under; spread: the logits' standard deviation.

    Of floats: `difference_bound`. A block of a b-bit type spreads its values over 2**b steps of a range of about six of
    their standard deviations, and a rounding error is a step over sqrt(12): relatively u = 6 / (sqrt(12) 2**b), which
    adds up as there, 8 u sqrt(2 L) of the spread. From 5 bits down that is no bound any more: there it only tells the
    model from another one, as the spread itself does in 3 and 2 bits (independent logits differ by 1.13 of it; a random
    model of 9 layers by 0.3 in 4 bits, 0.5 in 3, and 0.7 in 2). With experts it is 8 u 2 L: an error sends some tokens
    to another expert, and such jumps do not average out.
    """
    if method in _FLOATS:
        return difference_bound(decoder, _FLOATS[method], spread, loose=False)
    bits = int(METHODS[method][0][1])
    u, sublayers = 6 / (math.sqrt(12) * 2**bits), 2 * decoder.config.num_hidden_layers
    summed = math.sqrt(sublayers) if decoder.config.experts is None else sublayers
    return min(8 * u * summed, 0.75 if bits > 3 else 1.0) * spread
