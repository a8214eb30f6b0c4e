"""The weights of a checkpoint as they were before they were quantised, one at a time."""

from pathlib import Path

import numpy as np

from fastft_jax.convert.hf import FLOATS
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.names import NameTable


class OriginalWeights:
    """Reads the matrices of a Hugging Face folder by our paths.

    CheckpointError for a matrix that is not there, or only in quantised form.
    """

    def __init__(self, folder: Path, names: NameTable):
        self._checkpoint = Checkpoint.open(folder)
        self._names = names.stored(lambda name: not self._checkpoint.missing([name]))

    def __call__(self, path: str, layer: int) -> np.ndarray:
        """The weight [N, K] of `self_attn.q_proj` of a layer, in the checkpoint's dtype."""
        name = self._names.hf_name(f"{path}.weight", layer)
        missing = self._checkpoint.missing([name])
        if missing or self._checkpoint.info(name)[0].name not in FLOATS:
            raise CheckpointError(
                f"{self._checkpoint.folder} does not hold {name!r} in {', '.join(FLOATS)}: "
                "LoftQ needs the weights as they were before they were quantised"
            )
        return self._checkpoint.read(name)
