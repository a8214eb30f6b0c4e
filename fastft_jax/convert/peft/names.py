"""Names of the tensors in PEFT's adapter_model.safetensors.

`base_model.model.` + the module's path in transformers + what the tensor is:

    .lora_A.weight [R, in]   .lora_B.weight [out, R]   the update is scale * B A, scale = alpha / R (or / sqrt(R))
    .weight                                            a module trained in full (modules_to_save)
    .bias   .base_layer.bias                           a trained bias, of a module without and with LoRA
    .base_layer.weight                                 the base's own weight beside LoRA on the embedding or the head
    .lora_embedding_A [R, V]   .lora_embedding_B [D, R]  LoRA on the embedding
    .lora_magnitude_vector [out]                       DoRA's
    .loftq_start_A, .loftq_start_B                     ours alone: what the base of a LoftQ adapter was coded less
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from fastft_jax.errors import CheckpointError

PREFIX = "base_model.model."


class TensorName(NamedTuple):
    """`module` is the path in transformers; `kind` what follows it, e.g. "lora_A.weight" or "base_layer.bias"."""

    module: str
    kind: str


_KINDS = (  # longest first: "x.base_layer.weight" also ends with ".weight"
    *("lora_A.weight", "lora_B.weight", "base_layer.weight", "base_layer.bias"),
    *("lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    *("loftq_start_A", "loftq_start_B"),
    *("token_adapter.trainable_tokens_delta", "weight", "bias"),
)


def lora_names(module_path: str) -> tuple[str, str]:
    """Names of A [R, in] and B [out, R] in the file."""
    return f"{PREFIX}{module_path}.lora_A.weight", f"{PREFIX}{module_path}.lora_B.weight"


def saved_name(module_path: str) -> str:
    """Name of the whole weight of a module in modules_to_save."""
    return f"{PREFIX}{module_path}.weight"


def bias_name(module_path: str, adapted: bool) -> str:
    """Name of a trained bias. PEFT wraps an adapted module, so its own bias moves to `base_layer`.

    bias="lora_only" saves the biases of adapted modules; bias="all" those of every module that has one.
    """
    return f"{PREFIX}{module_path}.base_layer.bias" if adapted else f"{PREFIX}{module_path}.bias"


def parse_name(name: str) -> TensorName | None:
    """The inverse of the functions above; None for a name that is none of PEFT's."""
    if name.startswith(PREFIX):
        for kind in _KINDS:
            module = name.removeprefix(PREFIX).removesuffix("." + kind)
            if len(module) + len(kind) + 1 == len(name) - len(PREFIX):
                return TensorName(module, kind)
    return None


_LORA = r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"


def current_names(stored: Iterable[str]) -> dict[str, str]:
    """Today's name of each tensor -> the name it is stored by; names that are current already are themselves.

    Other spellings that files on the hub have: an adapter's name inside (`lora_A.default.weight`), the wrappers of
    modules_to_save (`lm_head.modules_to_save.default.weight`; the `original_module` beside it is the base's and left
    out), a magnitude's `.weight`, no prefix, and the weight and bias of an adapted module from before it was called
    `base_layer`. CheckpointError where two spellings of one tensor meet.
    """
    stored = list(stored)
    adapted = {match[1] for name in stored if (match := re.match(rf"(.*)\.{_LORA}(\.|$)", _prefixed(name)))}
    found: dict[str, str] = {}
    for name in stored:
        new = re.sub(r"\.modules_to_save(\.[^.]+)?\.(weight|bias)$", r".\2", _prefixed(name))
        if new.endswith((".original_module.weight", ".original_module.bias")):
            continue
        new = re.sub(rf"\.{_LORA}\.[^.]+\.(weight|bias)$", r".\1.\2", new)
        new = re.sub(r"\.(lora_embedding_[AB])\.[^.]+$", r".\1", new)
        new = re.sub(r"\.lora_magnitude_vector(\.[^.]+)*$", ".lora_magnitude_vector", new)
        module, _, kind = new.rpartition(".")
        if module in adapted and kind in ("weight", "bias"):
            new = f"{module}.base_layer.{kind}"
        if new in found:
            raise CheckpointError(f"{found[new]!r} and {name!r} are two spellings of one tensor of the adapter")
        found[new] = name
    return found


def _prefixed(name: str) -> str:
    bare = re.match(rf"(model\..*|lm_head)\.{_LORA}", name) is not None
    return PREFIX + name if bare else name
