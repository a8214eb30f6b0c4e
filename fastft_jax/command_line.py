"""What every command of ours shares: settings of the process before jax starts, errors in a line, exit codes."""

import os
import sys
import warnings
from collections.abc import Callable

from fastft_jax.errors import ConfigError, FastFTError


def guarded(run: Callable[[], int]) -> int:
    """`run()`'s exit code; 2 for a wrong configuration, 1 for a failed run, 130 for Ctrl-C, each with a line.

    A fault in the program keeps its traceback.
    """
    _prepare_process()
    try:
        return run()
    except (ConfigError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FastFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        cause = _cause_outside(error)
        if cause is None:
            raise  # a fault in the program: its traceback is wanted
        print(f"error: {cause}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _cause_outside(error: Exception) -> str | None:
    """What to say of an error that the disk or the memory is the cause of; None for any other."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    if isinstance(error, MemoryError):
        return f"the host's memory is full: {error}"
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the device's memory is full; lower per_device_train_batch_size (and raise gradient_accumulation_steps), "
            "max_length or lora.r, or set lora.use_gradient_checkpointing: offload"
        )
    return None


def _prepare_process() -> None:
    """Settings of this process, made before jax starts: they are ours to make here, and nowhere else."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")  # one program on the card: let it have the card
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that torch is missing, as it should be
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
