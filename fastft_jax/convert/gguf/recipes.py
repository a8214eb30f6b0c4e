"""Which type each tensor gets: a file called q4_k_m mixes types, by llama.cpp's rules (llama-quant.cpp, MIT licence).

A recipe's base type goes to every matrix; the tensors that lose most get a better one: the output head, the value
projections and the feed-forward's way down, in some or all layers. Norms, biases and other vectors stay in F32, and so
do routers. A layer's experts are one tensor, of one type; models of 8 experts have rules of their own.
"""

from dataclasses import dataclass

from fastft_jax.convert.gguf.encode import block_size
from fastft_jax.errors import ConfigError

# method -> (base type, GGUF's number for such a file, LlamaFileType)
METHODS = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
    "q6_k": ("Q6_K", 18),
    "q5_k_m": ("Q5_K", 17),
    "q5_k_s": ("Q5_K", 16),
    "q5_0": ("Q5_0", 8),
    "q4_k_m": ("Q4_K", 15),
    "q4_k_s": ("Q4_K", 14),
    "q4_0": ("Q4_0", 2),
    "q3_k_l": ("Q3_K", 13),
    "q3_k_m": ("Q3_K", 12),
    "q3_k_s": ("Q3_K", 11),
    "q2_k": ("Q2_K", 10),
}
_ALIASES = {"fast_quantized": "q8_0", "quantized": "q4_k_m", "not_quantized": "f16", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Shape:
    """What of a model the rules look at. `architecture` is GGUF's name of the family."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    experts: int = 0

    @property
    def seventy_billion(self) -> bool:
        """llama.cpp's "70B": 80 layers in these two families, with grouped queries in Llama's."""
        grouped = self.heads != self.kv_heads or self.architecture == "qwen2"
        return self.layers == 80 and self.architecture in ("llama", "qwen2") and grouped


def resolve_method(method: str) -> str:
    """The method's name as METHODS has it; ConfigError, with the list, for one that is not there."""
    name = _ALIASES.get(method.lower(), method.lower())
    if name not in METHODS:
        raise ConfigError(f"quantization_method={method!r} is not one of {', '.join(METHODS)}")
    return name


def tensor_type(method: str, name: str, shape: tuple[int, ...], model: Shape) -> str:
    """The GGUF type of the tensor called `name` (GGUF's name) of `shape` [.., columns] in a file of this method."""
    base, _ = METHODS[method]
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return "F32"
    if base in ("F32", "F16", "BF16"):
        return base
    return fitting(_mixed(method, base, name, shape[-1], model), shape[-1])


def fitting(kind: str, columns: int) -> str:
    """`kind`, or what llama.cpp falls back to where a row is no whole number of blocks."""
    if columns % block_size(kind) == 0:
        return kind
    smaller = _FALLBACK.get(kind, kind)
    return smaller if columns % block_size(smaller) == 0 else "F16"


def _mixed(method: str, base: str, name: str, columns: int, model: Shape) -> str:
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return "Q8_0" if base == "Q8_0" or columns % block_size(base) else "Q6_K"
    if name == "token_embd.weight":
        return base
    _, number, part = name.removesuffix(".weight").split(".", 2)
    layer, layers = int(number), model.layers
    if model.experts == 8 and part in ("attn_k", "attn_v", "attn_qkv"):  # Mixtral's are a small part of it
        return "Q8_0"
    if part in ("attn_v", "attn_qkv"):
        kind = _values(method, base, layer, model)
        return "Q5_K" if model.seventy_billion and kind in ("Q3_K", "Q4_K") else kind
    if part in ("ffn_down", "ffn_down_exps", "ffn_down_shexp"):
        if method == "q3_k_m":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        if method in ("q4_k_m", "q5_k_m"):
            return "Q6_K" if _more_bits(layer, layers) else base
        if method == "q4_k_s":
            return "Q5_K" if layer < layers // 8 else base
        return {"q2_k": "Q3_K", "q3_k_l": "Q5_K"}.get(method, base)
    if part == "attn_output" and model.experts == 8:
        return "Q5_K" if method in ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m") else base
    if part == "attn_output":
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(method, base)
    return base


def _values(method: str, base: str, layer: int, model: Shape) -> str:
    if method == "q2_k":
        return "Q4_K" if model.heads // model.kv_heads >= 4 else "Q3_K"
    if method == "q3_k_m":
        return "Q5_K" if layer < 2 else "Q4_K"
    if method == "q3_k_l":
        return "Q5_K"
    if method in ("q4_k_m", "q5_k_m"):
        return "Q6_K" if _more_bits(layer, model.layers) else base
    return "Q5_K" if method == "q4_k_s" and layer < 4 else base


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third one between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2
