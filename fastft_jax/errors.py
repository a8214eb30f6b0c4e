"""Errors a user can act on: what is wrong, where, and what to do, in a line or two."""


class FastFTError(Exception):
    """Base of every error that fastft-jax raises on purpose."""


class ConfigError(FastFTError, ValueError):
    """The options given do not make a valid run (the command line exits with code 2)."""


class CheckpointError(FastFTError):
    """A model or adapter folder cannot be used as it is."""


class DataError(FastFTError):
    """The dataset, the chat template or the tokenizer cannot be used as asked."""


class TrainingError(FastFTError):
    """A run failed after it began (the command line exits with code 1)."""
