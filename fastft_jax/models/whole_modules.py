"""Modules that train whole beside an adapter (PEFT's modules_to_save): the embedding, the head, the norms."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fastft_jax.models.adapter_swap import Originals
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import Embedding, LayerNorm, Linear, RMSNorm


@dataclass(frozen=True)
class Whole:
    """One Hugging Face module that may train whole: a module of ours, or one row of a stack."""

    hf_path: str  # model.layers.3.input_layernorm
    path: tuple[Any, ...]  # in the decoder
    module: Embedding | Linear | RMSNorm | LayerNorm
    row: int | None

    def trained(self) -> Iterator[tuple[str, nnx.Variable]]:
        """weight, and a norm's bias, where they train."""
        for leaf in ("weight", "bias"):
            variable = getattr(self.module, leaf, None)
            if isinstance(variable, nnx.Param):
                yield leaf, variable


def saveable(decoder: Decoder, names: NameTable) -> Iterator[Whole]:
    """The embedding, the head (unless tied), every norm of the layers and the last one."""
    for name in ("embed_tokens", "lm_head", "norm"):
        module = getattr(decoder, name)
        if module is not None:
            yield Whole(names.hf_name(f"{name}.weight").removesuffix(".weight"), (name,), module, None)
    for layer in range(decoder.config.num_hidden_layers):
        s, p, row = decoder.config.place_of(layer)
        for path, module in nnx.iter_modules(decoder.segments[s][p]):
            if isinstance(module, RMSNorm | LayerNorm):
                hf_path = names.hf_name(".".join(map(str, path)) + ".weight", layer).removesuffix(".weight")
                yield Whole(hf_path, ("segments", s, p, *path), module, row)


def train_whole(decoder: Decoder, names: NameTable, hf_paths: Collection[str], originals: Originals) -> None:
    """Train the modules at `hf_paths` in float32, in place. A tied pair is untied: PEFT trains a copy of the one named.

    NotImplementedError for a head with a bias, for norms of queries and keys by head (a kernel reads those), and for
    a norm of some layers only.
    """
    head = names.hf_name("lm_head.weight").removesuffix(".weight")
    ends = {head, names.hf_name("embed_tokens.weight").removesuffix(".weight")}
    if head in hf_paths and decoder.config.head_bias:
        raise NotImplementedError("modules_to_save=['lm_head'] is not built yet for a head with a bias")
    if decoder.lm_head is None and ends & set(hf_paths):
        decoder.lm_head = Linear(decoder.embed_tokens.weight.get_value())
    known = list(saveable(decoder, names))
    unknown = sorted(set(hf_paths) - {whole.hf_path for whole in known})
    if unknown:
        raise NotImplementedError(
            f"modules_to_save={unknown[0]!r} is not built: only the embedding, the head and norms train whole"
        )
    for whole in known:
        if whole.hf_path not in hf_paths or isinstance(whole.module.weight, nnx.Param):
            continue
        if whole.path[-1] in ("q_norm", "k_norm") and decoder.config.qk_norm == "head":
            raise NotImplementedError(f"modules_to_save={whole.hf_path!r} is not built: norms of heads stay frozen")
        left = [other.hf_path for other in known if other.path == whole.path and other.hf_path not in hf_paths]
        if left:
            raise NotImplementedError(f"modules_to_save has {whole.hf_path!r} but not {left[0]!r}: all layers or none")
        leaves = ["weight"]
        if isinstance(whole.module, LayerNorm) and whole.module.bias is not None:
            leaves.append("bias")
        for leaf in leaves:
            originals.keep(whole.path, leaf, whole.module)
            # A copy even when it is float32 already: the trainer donates what it trains, and must not free the base.
            value = jnp.array(getattr(whole.module, leaf).get_value(), jnp.float32, copy=True)
            setattr(whole.module, leaf, nnx.Param(value))
