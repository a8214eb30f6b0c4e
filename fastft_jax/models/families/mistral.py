"""Mistral 7B (sliding window in v0.1), Nemo (own head width), Large. Jiang et al. 2023, arXiv:2310.06825."""

from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.hf_config import HFConfig
from fastft_jax.models.families.llama import common
from fastft_jax.models.families.names import NameTable

NAMES = NameTable()


def config_from_hf(hf: HFConfig) -> DecoderConfig:
    # transformers' default where the key is absent; published files without a window say null
    given = "sliding_window" not in hf or hf.get("sliding_window") is not None
    window = hf.count("sliding_window", 4096) if given else None
    return common(hf, layer_windows=(window,) * hf.count("num_hidden_layers"))
