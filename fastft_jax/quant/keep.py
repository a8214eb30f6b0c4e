"""What the ops of this floor ask of whoever keeps activations for the backward pass (models/residuals.py)."""

from typing import Protocol

from jaxtyping import Array, Int


class Keep(Protocol):
    """Gives back a value, or what was kept of it."""

    def __call__(self, name: str, value: Array) -> Array: ...

    def slot(self, name: str, value: Array) -> tuple[Array, Array | None, Int[Array, ""] | None]:
        """The value and where it is kept: (value, stack, index)."""
        ...

    def keeps(self, name: str) -> bool:
        """Whether values of that name are kept at all; if not, they are computed again."""
        ...
