"""Fine-tune open-weight language models on one GPU, from JAX.

    from fastft_jax import FastLanguageModel, SFTTrainer, SFTConfig

Names are imported when they are first used: importing the package touches no device, network or global state.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "FastLanguageModel": "fastft_jax.language_model",
    "SFTTrainer": "fastft_jax.trainers.sft",
    "SFTConfig": "fastft_jax.trainers.sft_config",
    "FastFTError": "fastft_jax.errors",
}
__all__ = ["FastFTError", "FastLanguageModel", "SFTConfig", "SFTTrainer", "__version__"]

if TYPE_CHECKING:
    from fastft_jax.errors import FastFTError
    from fastft_jax.language_model import FastLanguageModel
    from fastft_jax.trainers.sft import SFTTrainer
    from fastft_jax.trainers.sft_config import SFTConfig


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fastft_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
