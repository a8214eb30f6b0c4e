"""How a row becomes a batch.

1. `load_rows` reads a file, a folder, a hub id or `tfds:NAME` to rows and tells their format (rows.py, formats.py).
2. `prepare` makes each row a conversation or a text, renders conversations with the chat template (templates.py),
   finds the characters that are trained (spans.py), tokenises, masks and truncates (tokenize.py).
3. `BatchSource` packs the documents and lays them out as [B, T] arrays (packing.py, loader.py).
"""

from fastft_jax.trainers.data.builtin_templates import BUILTIN_TEMPLATES
from fastft_jax.trainers.data.formats import FORMATS, detect_format
from fastft_jax.trainers.data.loader import BatchSource
from fastft_jax.trainers.data.packing import pack
from fastft_jax.trainers.data.prepared import DataStats, PreparedDataset
from fastft_jax.trainers.data.rows import load_rows
from fastft_jax.trainers.data.tokenize import check_tokenizer, prepare

__all__ = [
    "BUILTIN_TEMPLATES",
    "FORMATS",
    "BatchSource",
    "DataStats",
    "PreparedDataset",
    "check_tokenizer",
    "detect_format",
    "load_rows",
    "pack",
    "prepare",
]
