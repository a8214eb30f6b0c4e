"""Where Hugging Face keeps each of our tensors. PEFT's and GGUF's names derive from these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class NameTable:
    """Our path -> Hugging Face's name; what is not listed has the same path in both.

    `layer_prefix` is completed with the layer index; `modules` are paths inside a layer, those of experts with a place
    for their number. Names are those of the modules
    in transformers, which adapters use; `stored_as` are other beginnings that checkpoints give them. `ignored` are
    endings, `ignored_under` beginnings of tensors that carry no weights of the decoder. With `fused_experts`
    checkpoints and adapters hold all experts of a layer in one tensor (convert/fused_experts.py has the names here).
    """

    layer_prefix: str = "model.layers.{}."
    modules: Mapping[str, str] = field(default_factory=dict)
    top: Mapping[str, str] = field(
        default_factory=lambda: {
            "embed_tokens.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "norm.bias": "model.norm.bias",
            "lm_head.weight": "lm_head.weight",
            "lm_head.bias": "lm_head.bias",
        }
    )
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    ignored_under: tuple[str, ...] = ()
    stored_as: tuple[Mapping[str, str], ...] = ()
    fused_experts: bool = False

    def hf_name(self, path: str, layer: int | None = None, expert: int | None = None) -> str:
        """`self_attn.q_proj.weight` of layer 3 -> `model.layers.3.self_attn.q_proj.weight`."""
        if layer is None:
            return self.top[path]
        module, _, kind = path.rpartition(".")
        module = self.modules.get(module, module)
        return f"{self.layer_prefix.format(layer)}{module if expert is None else module.format(expert)}.{kind}"

    def leaf(self, target: str) -> str:
        """The name of a LoRA target here: gate_proj, up_proj and down_proj are w1, w3 and w2 in Mixtral's experts."""
        return self.modules.get(f"mlp.experts.{target}", target).rpartition(".")[2]

    def stored(self, has: Callable[[str], bool]) -> "NameTable":
        """The names of a checkpoint's tensors, of which `has` knows: these, or the first of `stored_as` that fits."""
        for beginnings in self.stored_as:
            renamed = replace(
                self,
                layer_prefix=_renamed(self.layer_prefix, beginnings),
                top={path: _renamed(name, beginnings) for path, name in self.top.items()},
            )
            if has(renamed.top["embed_tokens.weight"]):
                return renamed
        return self


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    for ours, theirs in beginnings.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
