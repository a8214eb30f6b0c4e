"""Merged checkpoints out: planned, checked, streamed into a folder beside the target, read back, then renamed."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.convert.atomic import atomic_folder, check_free_space, write_bytes
from fastft_jax.convert.fused_entries import fused_entries
from fastft_jax.convert.fused_experts import FusedExperts
from fastft_jax.convert.hub import resolve_model
from fastft_jax.convert.merged import Entry, Weights, entries_16bit, entries_beside, layout
from fastft_jax.convert.merged.four_bits import entries_4bit, packed_leaves, quantization_config, unpacked_modules
from fastft_jax.convert.model_card import model_card
from fastft_jax.convert.model_files import copy_beside, refuse_to_replace, write_config, write_tokenizer
from fastft_jax.convert.read_back import Difference, compare, folder_logits
from fastft_jax.convert.rounding import accumulated
from fastft_jax.convert.safetensors import Checkpoint, write_sharded
from fastft_jax.convert.safetensors.header import nbytes
from fastft_jax.convert.safetensors.writer import parse_size
from fastft_jax.convert.sample_rows import comparison_rows
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models.compute_dtype import set_compute_dtype
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable

METHODS = ("merged_16bit", "merged_4bit")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Written:
    """A merged checkpoint that was written: where, its files, its bytes, and how it compares with the live model."""

    folder: Path
    files: tuple[str, ...]
    nbytes: int
    difference: Difference | None  # None when it was not read back
    bound: float | None

    def __str__(self) -> str:
        size = f"{self.folder}: {len(self.files)} file{'s' * (len(self.files) != 1)}, {self.nbytes / 1e9:.2f} GB"
        if self.difference is None:
            return f"{size}; not read back"
        return f"{size}; read back: {self.difference} (bound of the mean {self.bound:.3g})"


def save_merged(
    model: Any,
    folder: str | Path,
    tokenizer: Any | None = None,
    save_method: str = "merged_16bit",
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    verify: bool = True,
    rows: Sequence[Sequence[int]] | None = None,
    token: str | None = None,
) -> Written:
    """Write the model with its adapter merged in, as a Hugging Face folder; the model itself stays as it is.

    model: a FastLanguageModel. save_method: "merged_16bit" (all in `dtype`), or "merged_4bit" (the layers' matrices in
    bitsandbytes's NF4, double-quantised, the rest in `dtype`). base: None merges onto the weights that were trained
    against (an NF4 base as it decodes), "original" onto the 16-bit weights that were loaded, read again tensor by
    tensor; a folder or hub id names these. dtype: bfloat16, float16 or float32; None means the base's own if it is a
    16-bit one, else bfloat16. rows: token ids to compare on; None: a few sentences.

    With `verify` the folder is read back before it gets its name; CheckpointError when its logits' mean difference is
    above the bound (see `difference_bound`), and nothing is left. Raises ConfigError for options, CheckpointError for
    a base that is missing or another model's, a full disk, a target that is not empty.
    """
    if save_method not in METHODS:
        raise ConfigError(f"save_method={save_method!r} is not one of {', '.join((*METHODS, 'lora'))}")
    name = dtype or _default_dtype(model.hf_config)
    if name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    parse_size(max_shard_size)
    rows = comparison_rows(rows, tokenizer, model.decoder.config.vocab_size)
    source = Path(model.base_folder)
    original = None if base is None else _original(model, base, token)
    if original is not None and model.names.fused_experts:
        original = FusedExperts(original)
    weights = Weights(model.decoder, model.names, original)
    names, beside = _names_and_rest(source, model.names)
    plan = entries_16bit if save_method == "merged_16bit" else entries_4bit
    entries = {**plan(weights, names, DTYPES[name]), **beside}
    if names.fused_experts:
        entries = fused_entries(entries)
    total = sum(nbytes(*entry) for entry in layout(entries).values())
    final = Path(folder).expanduser().absolute()
    refuse_to_replace(final, source, model.adapter_path, None if original is None else original.folder)
    existing = next(parent for parent in final.parents if parent.exists())
    check_free_space(existing, total, str(final))
    with atomic_folder(final, overwrite=overwrite) as draft:
        # atomic_folder syncs the whole folder once, at its end
        files = write_sharded(draft, layout(entries), lambda n: entries[n].read(), max_shard_size, durable=False)
        write_config(draft, source, model.hf_config, _config_changes(model, weights, names, save_method, name))
        copy_beside(draft, source)
        write_tokenizer(draft, source, tokenizer)
        difference, bound = None, None
        if verify:
            loose = save_method == "merged_4bit" or (base is not None and _in_nf4(weights))
            difference = _read_back(model, draft, rows)
            bound = difference_bound(model.decoder, DTYPES[name], difference.spread, loose=loose)
            if not difference.mean <= bound:
                raise CheckpointError(
                    f"{final} was not written: read back, its logits differ from the live model's by "
                    f"{difference.mean:.3g} on average, above the bound of {bound:.3g} ({difference})"
                )
        written = Written(final, tuple(files), total, difference, bound)
        write_bytes(draft / "README.md", model_card(model, save_method, written.difference).encode())
    return written


def difference_bound(decoder: Decoder, dtype: Any, spread: float, *, loose: bool) -> float:
    """What the mean |logit difference| of a right export stays under; spread: the logits' standard deviation.

    Rounding to p bits changes a matrix by u = 2**-p relatively, and so, as an independent error, what it adds to the
    residual stream; 2 L such errors sum to sqrt(2 L) u of the stream, thus of the logits' spread. Two models of the
    same dtype differ by as much through their activations. A factor of 8 is room for models that amplify. A 4-bit
    grid (`loose`) is no small error (0.1 relatively, for each matrix): there the bound only tells the model from
    another one, three quarters of the spread (independent logits differ by 1.13 of it).
    """
    if loose:
        return 0.75 * spread
    u = max(2.0 ** -(jnp.finfo(d).nmant + 1) for d in (dtype, decoder.dtype))
    u = max(u, 2.0**-16)  # float32 sums in another order, and GPUs' products of float32
    return min(8 * u * accumulated(decoder.config), 0.75) * spread


def _default_dtype(hf_config: dict[str, Any]) -> str:
    inner = hf_config.get("text_config") or {}
    for values in (hf_config, inner):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) in ("bfloat16", "float16"):
                return values[key]
    return "bfloat16"


def _original(model: Any, base: str | Path, token: str | None) -> Checkpoint:
    """The 16-bit checkpoint to merge onto."""
    if base != "original":
        return Checkpoint.open(resolve_model(str(base), token=token))
    folder = Path(model.base_folder)
    if not folder.is_dir():  # a hub id may be downloaded again
        try:
            folder = resolve_model(model.name_or_path, token=token)
        except CheckpointError as error:
            raise CheckpointError(
                f"base='original' needs the weights that {model.name_or_path} was loaded from, and {folder} is gone "
                f"({error}); give their folder as base, or leave base out"
            ) from error
    return Checkpoint.open(folder)


def _names_and_rest(source: Path, names: NameTable) -> tuple[NameTable, dict[str, Entry]]:
    """The names to write, those of the base's own files, and what these hold beside the decoder (a vision tower)."""
    if not (names.stored_as or names.ignored_under):
        return names, {}
    try:
        checkpoint = Checkpoint.open(source)
    except CheckpointError as error:
        raise CheckpointError(f"the parts beside the text decoder are copied from its base: {error}") from error
    return names.stored(checkpoint.__contains__), entries_beside(checkpoint, names)


def _config_changes(model: Any, weights: Weights, names: NameTable, save_method: str, dtype: str) -> dict[str, Any]:
    """What config.json must say otherwise than the base's: no more than the weights ask for."""
    changes: dict[str, Any] = {}
    both = (model.hf_config, model.hf_config.get("text_config") or {})
    for key in ("dtype", "torch_dtype"):
        if any(values.get(key, dtype) != dtype for values in both):
            changes[key] = dtype
    if model.decoder.config.tie_word_embeddings and model.decoder.lm_head is not None:
        changes["tie_word_embeddings"] = False
    if save_method == "merged_4bit":
        packed = packed_leaves(weights)
        kept = unpacked_modules(weights) + [part.removesuffix(".") for part in names.ignored_under]
        double = all(leaf.nf4 is None or leaf.nf4.absmax_scale is not None for leaf in packed)
        changes["quantization_config"] = quantization_config(dtype, kept, double)
    elif "quantization_config" in model.hf_config:
        changes["quantization_config"] = None
    return changes


def _in_nf4(weights: Weights) -> bool:
    return any(leaf.nf4 is not None for leaf in weights.leaves)


def _read_back(model: Any, draft: Path, rows: tuple[np.ndarray, np.ndarray]) -> Difference:
    ids, mask = rows
    return compare(live_logits(model, ids, mask), folder_logits(draft, ids, mask, model.decoder.dtype), ids, mask)


def live_logits(model: Any, input_ids: Int[np.ndarray, "B T"], mask: Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
    """What a model with its adapter computes in its own dtype: weights are compared, not fp8 products."""
    live = copy.copy(model)
    live.decoder = nnx.clone(model.decoder)  # own variables, same arrays
    set_compute_dtype(live.decoder, None)
    return live(input_ids) if mask.all() else live(input_ids, attention_mask=mask)
