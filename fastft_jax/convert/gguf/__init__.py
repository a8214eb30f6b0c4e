"""GGUF, the format of llama.cpp and Ollama: models and adapters out, models in.

Nothing is imported before it is needed: few runs touch these files, and start-up counts.
"""

from pathlib import Path
from typing import Any

# the keys of recipes.METHODS, and the adapter alone
FORMS = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "lora"),
)


def open_gguf(name: str | Path, tokenizer_name: str | Path | None = None) -> tuple[Any, Any]:
    """(the open file, its tokenizer unless another is named), or two times None for a folder or hub id."""
    if not str(name).endswith(".gguf") or Path(name).expanduser().is_dir():
        return None, None
    from fastft_jax.convert.gguf.read import GGUFModel
    from fastft_jax.convert.gguf.tokenizer import gguf_tokenizer

    source = GGUFModel(Path(name).expanduser())
    return source, None if tokenizer_name else gguf_tokenizer(source)
