"""llama.cpp as the tests use it: its logits, with float32 keys and values; or why it is not here."""

import sys
from pathlib import Path

import numpy as np

try:
    import llama_cpp
except (ImportError, OSError, RuntimeError):  # not installed, or its library does not load
    llama_cpp = None

_SAID = Path(sys.prefix) / "llama-cpp-missing"  # by scripts/setup_llama_cpp.sh
WHY_NOT = _SAID.read_text().strip() if _SAID.exists() else "llama-cpp-python is not installed (make test installs it)"


IDS = np.random.default_rng(0).integers(4, 300, 40)


def load(path, **options):
    return llama_cpp.Llama(
        str(path),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        flash_attn=False,
        type_k=0,
        type_v=0,
        **options,
    )


def logits(path, ids=IDS, **options) -> np.ndarray:
    """float32 [T, V], with the keys and values kept in float32."""
    model = load(path, **options)
    model.eval([int(i) for i in ids])
    return np.array(model.scores[: len(ids)])
