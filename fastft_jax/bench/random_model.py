"""A model of any geometry with random weights, made on the device: nothing is downloaded, nothing is read."""

import math
import zlib
from typing import Any

import jax
import numpy as np

from fastft_jax.bench.random_values import SCALE, nf4_blocks, normal
from fastft_jax.convert.hf import Request, with_lead
from fastft_jax.errors import ConfigError
from fastft_jax.language_model import DTYPES, FastLanguageModel
from fastft_jax.models.compute_dtype import check_compute_dtype, set_compute_dtype
from fastft_jax.models.decoder import Decoder, LoadFn
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.quant.nf4 import BLOCK, NF4Array


def random_base(
    hf_config: dict[str, Any], *, dtype: str = "bfloat16", compute_dtype: str | None = None, max_length: int
) -> FastLanguageModel:
    """The model of a config.json with an NF4 base, without an adapter.

    Norms are 1, all other weights normal(0, 0.02). Raises CheckpointError for a config that is not supported,
    ConfigError for a dtype or a compute_dtype that there is not, or not on this device.
    """
    config, names = config_from_hf(hf_config)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    check_compute_dtype(compute_dtype)
    decoder = Decoder(config, random_weights(DTYPES[dtype]), DTYPES[dtype])
    set_compute_dtype(decoder, compute_dtype)
    return FastLanguageModel(decoder, names, hf_config, name="random", max_seq_length=max_length)


def random_model(hf_config: dict[str, Any], *, r: int, **options: Any) -> FastLanguageModel:
    """`random_base` with a LoRA adapter of rank r on every linear."""
    return add_adapter(random_base(hf_config, **options), r)


def add_adapter(model: FastLanguageModel, r: int, init: bool = True) -> FastLanguageModel:
    """LoRA of rank r on every linear, in place; `init` False makes B random, too."""
    return FastLanguageModel.get_peft_model(
        model, r=r, lora_alpha=r, target_modules="all-linear", init_lora_weights=init
    )


def random_weights(dtype: Any, load_in_4bit: bool = True, seed: int = 0) -> LoadFn:
    """A LoadFn that draws every tensor from (seed, its path): linears of layers in NF4, everything else in `dtype`."""

    def load(path: str, shape: tuple[int, ...], layers: tuple[int, ...] | None):
        request = Request(path, shape, layers)
        stacked = shape if layers is None else (len(layers), *shape)
        keys = [f"{seed} {path} {layer}" for layer in layers or (None,)]
        if len(request.lead) == 2:
            keys = [f"{key} {expert}" for key in keys for expert in range(shape[0])]
        seeds = np.array([zlib.crc32(key.encode()) for key in keys], np.uint32)
        if len(request.tensor_shape) == 1:  # small: made on the host, so that nothing is compiled for it
            norm = path.endswith("norm.weight")
            values = np.ones(stacked) if norm else np.random.default_rng(seeds).normal(0, SCALE, stacked)
            return jax.device_put(values.astype(dtype))
        if load_in_4bit and request.quantisable:
            # by the number of blocks alone, so that matrices of one size share a program
            blocks = nf4_blocks(seeds, -(-math.prod(request.tensor_shape) // BLOCK))
            return with_lead(NF4Array(*blocks, request.tensor_shape), request.lead)
        flat = stacked if layers is None else (len(seeds), *request.tensor_shape)
        return with_lead(normal(seeds, flat, dtype), request.lead)

    return load
