"""A LoRA adapter alone as GGUF, for `llama.cpp --lora` beside a base model in GGUF.

Tensors `blk.N.X.weight.lora_a` [R, K] and `.lora_b` [N, R], float32; [E, R, K] and [E, N, R] of experts.
llama.cpp applies (alpha / R) B A with one alpha a file, so whatever else an adapter's scaling is made of (rsLoRA, an
alpha of its own a module) is multiplied into B.
"""

import math
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from flax import nnx

from fastft_jax.convert.gguf.architectures import architecture_of, heads_of, interleave, tensor_name
from fastft_jax.convert.gguf.file import GGUFFile
from fastft_jax.convert.gguf.parts import parts_of, split
from fastft_jax.convert.gguf.writer import File, Tensor, write_gguf
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import lora
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.layers import LayerNorm, Linear, RMSNorm


def save_gguf_adapter(decoder: Decoder, path: Path, *, name: str, alpha: float) -> Path:
    """Writes the adapter to `path`, whole or not at all. ConfigError for none, and for one with more than LoRA."""
    config, architecture = decoder.config, architecture_of(decoder.config)
    _only_lora(decoder)
    alpha = alpha or 1.0  # llama.cpp takes 0 for "no scaling"
    tensors = []
    for layer in range(config.num_hidden_layers):
        segment, place, row = config.place_of(layer)
        for module, linear in lora.layer_linears(decoder.segments[segment][place]):
            rows = linear.adapted_rows
            if not linear.adapted or (rows is not None and row not in rows):
                continue
            if module in architecture.without_lora:
                raise ConfigError(
                    f"a GGUF adapter: llama.cpp's {architecture.name!r} ignores LoRA on {module.rpartition('.')[2]}: "
                    "export the merged model, or train without it in target_modules"
                )
            at = row if rows is None else rows.index(row)
            rank = slice(None) if linear.ranks is None else slice(linear.ranks[at])
            a, b = (np.asarray(leaf.get_value()[at], np.float32) for leaf in (linear.lora_A, linear.lora_B))
            a, b = a[..., rank, :], b[..., rank]  # [E, R, K] and [E, N, R] of experts
            if linear.start_A is not None:  # what PiSSA started from is subtracted: an adapter of twice the rank
                start_a, start_b = (np.asarray(x.get_value()[at], np.float32) for x in (linear.start_A, linear.start_B))
                a = np.concatenate([a, start_a[..., rank, :]], axis=-2)
                b = np.concatenate([b, -start_b[..., rank]], axis=-1)
            scaling = linear.scaling[at] if isinstance(linear.scaling, tuple) else linear.scaling
            factor = scaling * a.shape[-2] / alpha
            if not math.isclose(factor, 1.0, rel_tol=1e-9):
                b = b * np.float32(factor)
            weight = f"{module}.weight"
            for part, own in zip(parts_of(weight, config), split(weight, b, config), strict=True):  # each uses all of A
                if architecture.permuted and part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                    own = interleave(own, heads_of(part.removesuffix(".weight"), config))
                base = tensor_name(part, layer, architecture)
                pair = ("lora_a", a), ("lora_b", np.ascontiguousarray(own))
                tensors += [Tensor(f"{base}.{half}", w.shape, partial(np.asarray, w)) for half, w in pair]
    if not tensors:
        raise ConfigError("this model has no adapter to export; call FastLanguageModel.get_peft_model first")
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = dict.fromkeys((t.name for t in tensors), "F32")
    write_gguf([File(path, writer, kinds)], tensors, lambda _, draft: _check_values(draft, tensors))
    return path


def _check_values(draft: Path, tensors: list[Tensor]) -> None:
    """float32 in, float32 out: CheckpointError unless the file holds the very numbers."""
    file = GGUFFile(draft)
    for tensor in tensors:
        if not np.array_equal(file.decode(tensor.name), tensor.read()):
            raise CheckpointError(f"{tensor.name} of the GGUF adapter read back is not what was written")


def _only_lora(decoder: Decoder) -> None:
    """ConfigError for an adapter with anything that llama.cpp's form has no place for."""
    found = None
    for name in ("embed_tokens", "lm_head"):
        module = getattr(decoder, name)
        if module is not None and isinstance(module.weight, nnx.Param):
            found = f"{name}, which was trained whole"
        elif module is not None and module.adapted:
            found = f"LoRA on {name}"
        elif getattr(module, "tokens", None) is not None:
            found = "trained tokens"
    for _, module in nnx.iter_modules(decoder):
        if isinstance(module, RMSNorm | LayerNorm) and isinstance(module.weight, nnx.Param):
            found = found or "trained norms"
        if isinstance(module, Linear):
            if isinstance(module.weight, nnx.Param) and module is not decoder.lm_head:
                found = found or "base weights that were trained"
            if module.magnitude is not None:
                found = found or "DoRA's magnitudes"
            if module.lora_bias is not None:
                found = found or "biases of LoRA"
            if module.trained_bias is not None:
                found = found or "trained biases"
            if module.requantised:
                found = found or "LoftQ's own base"
    if found:
        raise ConfigError(f"a GGUF adapter cannot hold {found}: export the merged model")
