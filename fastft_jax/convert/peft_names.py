"""Names of the tensors in PEFT's adapter_model.safetensors.

`base_model.model.` + the module's path in transformers + what the tensor is:

    .lora_A.weight [R, in]   .lora_B.weight [out, R]   the update is scale * B A, scale = alpha / R (or / sqrt(R))
    .weight                                            a module trained in full (modules_to_save)
    .bias   .base_layer.bias                           a trained bias, of a module without and with LoRA
    .base_layer.weight                                 the base's own weight beside LoRA on the embedding or the head
"""

from typing import NamedTuple

PREFIX = "base_model.model."


class TensorName(NamedTuple):
    """`module` is the path in transformers; `kind` what follows it, e.g. "lora_A.weight" or "base_layer.bias"."""

    module: str
    kind: str


_KINDS = (  # longest first: "x.base_layer.weight" also ends with ".weight"
    *("lora_A.weight", "lora_B.weight", "base_layer.weight", "base_layer.bias"),
    *("lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
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
