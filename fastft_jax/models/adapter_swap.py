"""Taking an adapter off a decoder and putting it back, so that several share one base."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fastft_jax.models.decoder import Decoder
from fastft_jax.models.layers import Frozen

# What adapters set on the decoder's modules, and its value without one
_ATTRIBUTES: dict[str, Any] = {
    **dict.fromkeys(("lora_A", "lora_B", "magnitude", "start_A", "start_B", "trained_bias", "lora_bias")),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B", "tokens", "token_rows")),
    **dict.fromkeys(("ranks", "adapted_rows", "trained_bias_rows")),
    **{"scaling": 1.0, "dropout": 0.0, "requantised": False},
}
_REPLACED = ("weight", "bias")  # of modules that train whole: a Param in place of the base's Frozen

Path = tuple[Any, ...]


class Originals:
    """The base's own values of what adapters replace, on the host: the device holds what stands in their place."""

    def __init__(self):
        self._values: dict[tuple[Path, str], Any] = {}

    def keep(self, path: Path, leaf: str, module: nnx.Module) -> None:
        """Copy `module.leaf`, before the first adapter replaces it."""
        variable = getattr(module, leaf)
        if isinstance(variable, Frozen) and (path, leaf) not in self._values:
            self._values[path, leaf] = jax.device_get(variable.get_value())

    def restore(self, path: Path, leaf: str, module: nnx.Module) -> None:
        if (path, leaf) in self._values:
            setattr(module, leaf, Frozen(jax.tree.map(jnp.asarray, self._values[path, leaf])))


def take_off(decoder: Decoder, originals: Originals) -> dict[Any, Any]:
    """Leave the bare base behind, in place; what `put_on` needs to undo that."""
    taken: dict[Any, Any] = {}
    for path, module in list(nnx.iter_modules(decoder)):
        own = {name: getattr(module, name) for name in _ATTRIBUTES if hasattr(module, name)}
        bias_trains = own.get("trained_bias") is not None and module.bias is None
        own |= {n: v for n in _REPLACED if isinstance(v := getattr(module, n, None), nnx.Param)}
        if own.get("requantised"):
            own["weight"] = module.weight
        if own:
            taken[path] = own | ({"bias": None} if bias_trains else {})
    if decoder.config.tie_word_embeddings:
        taken["lm_head"], decoder.lm_head = decoder.lm_head, None
    for path, module in list(nnx.iter_modules(decoder)):
        for name in taken.get(path, ()):
            if name in _ATTRIBUTES:
                setattr(module, name, _ATTRIBUTES[name])
            else:
                originals.restore(path, name, module)
    return taken


def put_on(decoder: Decoder, taken: dict[Any, Any]) -> None:
    """Give a bare base the adapter that `take_off` returned, in place."""
    if decoder.config.tie_word_embeddings:
        decoder.lm_head = taken["lm_head"]
    for path, module in list(nnx.iter_modules(decoder)):
        for name, value in taken.get(path, {}).items():
            setattr(module, name, value)
