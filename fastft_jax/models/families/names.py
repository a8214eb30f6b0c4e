"""Where Hugging Face keeps each of our tensors. PEFT's and GGUF's names derive from these."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NameTable:
    """Our path -> Hugging Face's name; what is not listed has the same path in both.

    `layer` templates are completed with the layer index. `ignored` are suffixes of tensors that carry no weights of the
    model (buffers that older checkpoints saved).
    """

    layer_prefix: str = "model.layers.{}."
    top: Mapping[str, str] = field(
        default_factory=lambda: {
            "embed_tokens.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "lm_head.weight": "lm_head.weight",
        }
    )
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def hf_name(self, path: str, layer: int | None = None) -> str:
        """`self_attn.q_proj.weight` of layer 3 -> `model.layers.3.self_attn.q_proj.weight`."""
        return self.top[path] if layer is None else self.layer_prefix.format(layer) + path
