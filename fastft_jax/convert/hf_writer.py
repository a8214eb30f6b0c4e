"""A decoder whose weights are all unquantised -> a Hugging Face folder that transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from fastft_jax.convert.atomic import sync_folder, write_bytes
from fastft_jax.convert.fused_entries import fused_entries
from fastft_jax.convert.merged import Entry, Weights, entries_16bit, layout
from fastft_jax.convert.model_files import own_code
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.convert.safetensors.writer import write_sharded
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.families.registry import standalone

_DRAFT = ".model.new"
_COPIED = ("generation_config.json",)


def write_model(
    folder: Path | str,
    decoder: Decoder,
    hf_config: dict[str, Any],
    *,
    source: Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = True,
) -> None:
    """config.json and (sharded) safetensors in the decoder's dtype, under transformers' names; memory: one tensor.

    `hf_config` is the config.json that the decoder was read from; a decoder out of a multimodal checkpoint is saved as
    the text model that it is. `source` is the folder it was read from: its generation_config.json and the model's own
    code are copied, and writing into it is refused. Everything is written under another name first, so a full disk
    loses nothing.
    Raises ConfigError for the source folder, CheckpointError where it cannot be written, or exists (not `overwrite`).
    """
    folder = Path(folder).expanduser()
    if source is not None and folder.resolve() == Path(source).resolve():
        raise ConfigError(f"{folder} is the folder that the model was loaded from: save it in another one")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is not a folder: choose another one for the model")
    if not overwrite and (folder / "config.json").exists():
        raise CheckpointError(f"{folder} already holds a model: choose another folder, or ask to overwrite it")
    values, names = standalone(hf_config)
    values = {k: v for k, v in values.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    values["torch_dtype"] = np.dtype(decoder.dtype).name
    entries = checkpoint_entries(decoder, names, decoder.dtype)
    draft = folder / _DRAFT
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        draft.mkdir(parents=True)
        write_sharded(draft, layout(entries), lambda name: entries[name].read(), max_shard_size)
        for name in () if source is None else (*_COPIED, *own_code(Path(source))):
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, draft / name)
        (folder / "config.json").unlink(missing_ok=True)  # from here to the end no reader takes the folder for a model
        for old in [*folder.glob("model-*-of-*.safetensors"), *folder.glob("model.safetensors*")]:
            old.unlink()
        for new in [p for p in draft.iterdir() if p.is_file()]:
            new.rename(folder / new.name)
        sync_folder(folder)
        write_bytes(folder / "config.json", (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"the model could not be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def checkpoint_entries(decoder: Decoder, names: NameTable, dtype: Any) -> dict[str, Entry]:
    """Every tensor as the folder holds it: the experts of a layer in one, where those of the family are."""
    entries = entries_16bit(Weights(decoder, names), names, dtype)
    return fused_entries(entries) if names.fused_experts else entries


def verify_model(folder: Path | str, decoder: Decoder, hf_config: dict[str, Any]) -> str:
    """Read a folder of `write_model` back: every tensor must be the live one, rounded to its dtype, bit for bit.

    Returns a line that says so; raises CheckpointError if not.
    """
    checkpoint = Checkpoint.open(Path(folder))
    names = standalone(hf_config)[1]
    entries = checkpoint_entries(decoder, names, decoder.dtype)
    if checkpoint.missing(entries) or checkpoint.unexpected(entries):
        raise CheckpointError(f"{folder} does not hold the tensors of this model")
    for name, entry in entries.items():
        if not np.array_equal(checkpoint.read(name), entry.read()):
            raise CheckpointError(f"{folder}: {name!r} is not what was trained")
    return f"{len(entries)} tensors of {folder} are equal to the bit"
