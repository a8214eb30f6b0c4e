"""A model of any geometry with random weights, made on the device: nothing is downloaded, nothing is read."""

import zlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fastft_jax.convert.hf import Request
from fastft_jax.errors import ConfigError
from fastft_jax.language_model import DTYPES, FastLanguageModel
from fastft_jax.models.compute_dtype import check_compute_dtype, set_compute_dtype
from fastft_jax.models.decoder import Decoder, LoadFn
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.quant.nf4 import quantize

SCALE = 0.02  # of the normal distribution: as wide as trained weights are


def random_model(
    hf_config: dict[str, Any], *, dtype: str = "bfloat16", compute_dtype: str | None = None, max_length: int, r: int
) -> FastLanguageModel:
    """The model of a config.json with an NF4 base and a LoRA adapter of rank r on every linear.

    Norms are 1, all other weights normal(0, 0.02). Raises CheckpointError for a config that is not supported,
    ConfigError for a dtype or a compute_dtype that there is not, or not on this device.
    """
    config, names = config_from_hf(hf_config)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    check_compute_dtype(compute_dtype)
    decoder = Decoder(config, random_weights(DTYPES[dtype]), DTYPES[dtype])
    set_compute_dtype(decoder, compute_dtype)
    model = FastLanguageModel(decoder, names, hf_config, name="random", max_seq_length=max_length)
    return FastLanguageModel.get_peft_model(model, r=r, lora_alpha=r, target_modules="all-linear")


def random_weights(dtype: Any, load_in_4bit: bool = True, seed: int = 0) -> LoadFn:
    """A LoadFn that draws every tensor from (seed, its path): linears of layers in NF4, everything else in `dtype`."""

    def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
        quantised = load_in_4bit and Request(path, shape, layers).quantisable
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{path} {layers}".encode()))
        keys = key if layers is None else jax.random.split(key, len(layers))
        norm = path.endswith("norm.weight")
        return jax.block_until_ready(_draw(keys, shape, dtype, "ones" if norm else "nf4" if quantised else "normal"))

    return load


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(keys: jax.Array, shape: tuple[int, ...], dtype: Any, kind: str):
    """One tensor, or a stack with one for each key. A loop draws them in turn, so that one is there unquantised."""

    def one(key):
        if kind == "ones":
            return jnp.ones(shape, dtype)
        w = (jax.random.normal(key, shape, dtype) * SCALE).astype(dtype)
        return quantize(w) if kind == "nf4" else w

    return one(keys) if keys.ndim == 0 else jax.lax.map(one, keys)
