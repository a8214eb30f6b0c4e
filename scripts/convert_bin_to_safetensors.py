"""Converts a checkpoint (or adapter) of pickled weights to safetensors, once and on purpose.

    python scripts/convert_bin_to_safetensors.py SOURCE OUT

Reads pytorch_model.bin, its shards by their index, or adapter_model.bin with torch.load(weights_only=True), which
refuses pickles that hold more than tensors; copies config and tokenizer files; reads every tensor back and compares.
The only place of this project that needs torch.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fastft_jax.convert.safetensors import Checkpoint, SafetensorsFile, atomic_folder, write_sharded, write_streamed
from fastft_jax.errors import CheckpointError, FastFTError

COPIED = (".json", ".txt", ".model", ".jinja", ".md")
INDEX = "pytorch_model.bin.index.json"
# numpy has no bfloat16 or float8 of its own: the bits are handed over as integers and named by ml_dtypes
AS_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def pickled_files(source: Path) -> list[Path]:
    """The weight files, in order; CheckpointError when there are none or the index is unsafe."""
    for single in ("pytorch_model.bin", "adapter_model.bin"):
        if (source / single).is_file():
            return [source / single]
    if not (source / INDEX).is_file():
        raise CheckpointError(f"{source} has none of pytorch_model.bin, {INDEX} and adapter_model.bin")
    try:
        entries = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source / INDEX} is damaged: {error!r}") from error
    for entry in entries:
        if not isinstance(entry, str) or "/" in entry or "\\" in entry:
            raise CheckpointError(f"{source / INDEX} points outside the folder ({entry!r}); refused")
        if not (source / entry).is_file():
            raise CheckpointError(f"{source} lacks the shard {entry}")
    return [source / entry for entry in entries]


def load(path: Path) -> dict:
    """{name: torch tensor}, mapped from the file where its format allows it."""
    import torch

    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or refused pickle surfaces as almost any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be loaded as plain tensors: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no table of tensors (a training checkpoint?): save the model's state_dict")
    return state


def to_numpy(tensor) -> np.ndarray:
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach().contiguous()
    if kind in AS_BITS:
        bits = tensor.reshape(-1).view(getattr(torch, AS_BITS[kind])).numpy()
        return bits.view(getattr(ml_dtypes, kind)).reshape(tensor.shape)
    return tensor.numpy()


def numpy_dtype(tensor) -> np.dtype:
    return to_numpy(tensor.reshape(-1)[:0]).dtype


def convert(source: Path, out: Path, max_shard_size: str) -> int:
    """Writes the new folder (it appears whole at the end) and returns the number of tensors."""
    files = pickled_files(source)
    tensors = {}
    for file in files:
        for name, tensor in load(file).items():
            if name in tensors:
                raise CheckpointError(f"{source}: tensor {name!r} is in two shards")
            tensors[name] = tensor
    config = source / "config.json"
    tied = config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings") is True
    if tied and "model.embed_tokens.weight" in tensors:
        tensors.pop("lm_head.weight", None)  # the same numbers again; a safetensors checkpoint has them once
    layout = {name: (numpy_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read(name: str) -> np.ndarray:
        return to_numpy(tensors[name])

    with atomic_folder(out) as folder:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in COPIED and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        if files[0].name == "adapter_model.bin":
            write_streamed(folder / "adapter_model.safetensors", layout, read)
            written = SafetensorsFile(folder / "adapter_model.safetensors")
        else:
            write_sharded(folder, layout, read, max_shard_size)
            written = Checkpoint.open(folder)
        for name in tensors:
            if written.read(name).tobytes() != read(name).tobytes():
                raise CheckpointError(f"tensor {name!r} reads back differently: the disk or the source is failing")
    return len(tensors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder with pickled weights")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--max-shard-size", default="5GB")
    options = parser.parse_args()
    try:
        import torch  # noqa: F401
    except ImportError:
        print("error: reading pickled weights needs torch: pip install torch", file=sys.stderr)
        return 1
    try:
        count = convert(options.source, options.out, options.max_shard_size)
    except (FastFTError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {count} tensors, read back and compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
