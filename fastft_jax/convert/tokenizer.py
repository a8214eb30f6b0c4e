"""The tokenizer of a model folder, as transformers reads it."""

import warnings
from pathlib import Path
from typing import Any

from fastft_jax.errors import CheckpointError


def load_tokenizer(folder: Path, *, warn: bool = True) -> Any | None:
    """The folder's fast tokenizer with its chat template, or None (with a warning) where it has none.

    Only `tokenizer.json` is read: it is complete, and reading it needs neither torch nor sentencepiece.
    """
    if not (folder / "tokenizer.json").exists():
        if (folder / "tokenizer.model").exists():
            raise CheckpointError(
                f"{folder} has a sentencepiece tokenizer.model but no tokenizer.json; make one with "
                f"`AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})` of transformers"
            )
        if warn:
            warnings.warn(f"{folder} has no tokenizer files: the tokenizer is None", stacklevel=3)
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged file
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
