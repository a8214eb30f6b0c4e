"""XLA's compilation cache on disk: a second run of the same program starts in seconds."""

import os
from pathlib import Path

import jax


def use_compile_cache(folder: str | os.PathLike | None) -> None:
    """Keep compiled programs in `folder` (None: the user's cache folder), unless a cache is set up already."""
    if jax.config.jax_compilation_cache_dir is None:
        default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fastft-jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(Path(folder or default).expanduser()))
