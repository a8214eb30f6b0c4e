"""Mistral 7B (sliding window in v0.1), Nemo (own head width), Large. Jiang et al. 2023, arXiv:2310.06825."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    # transformers' default where the key is absent; published files without a window say null
    window = hf.get("sliding_window") if "sliding_window" in hf else 4096
    return common(hf, layer_windows=(window,) * hf.need("num_hidden_layers"))
