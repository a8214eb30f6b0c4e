"""XLA's compilation cache on disk: a second run of the same program starts in seconds."""

import os
from pathlib import Path

import jax


def use_compile_cache(folder: str | os.PathLike | None) -> None:
    """Keep compiled programs in `folder` (None: the user's cache folder), unless a cache is set up already.

    Small programs are kept, too: jax leaves out what compiles in less than a second, of which a run has dozens. Its
    variable JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is obeyed.
    """
    if jax.config.jax_compilation_cache_dir is None:
        default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "fastft-jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(Path(folder or default).expanduser()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
