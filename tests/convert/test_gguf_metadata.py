"""A GGUF file's metadata as a config.json: the decoder that was written, and what files of llama.cpp's converter say.

That the tensors and logits come back: test_compatibility.py."""

from dataclasses import replace

import gguf
import gguf_tiny
import numpy as np
import pytest
import test_gguf_export
import test_internlm
import transformers
from released import RELEASED

from fastft_jax.convert.gguf.architectures import add_hyperparameters, architecture_of, extra_tensors
from fastft_jax.convert.gguf.read import GGUFModel
from fastft_jax.models.families.registry import config_from_hf

pytestmark = pytest.mark.filterwarnings("ignore:llama.cpp ignores")


HEAD = ("output.weight", np.zeros((1, 1), np.float32))


def write(path, architecture: str, add, tensors=()) -> GGUFModel:
    """The file's head, by the gguf package, and an embedding [V, 1]."""
    writer = gguf.GGUFWriter(path, architecture)
    add(writer)
    for name, w in [("token_embd.weight", np.zeros((gguf_tiny.VOCABULARY, 1), np.float32)), *tensors]:
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFModel(path)


NAMES = ("gemma", "gemma-2", "gemma-3", "phi-4-mini", "granite", "smollm-3", "olmo-2", "olmo-3", "cohere", "cohere-2")
OWN = {
    **{name: {"tie_word_embeddings": True} for name in NAMES},
    **dict.fromkeys(("olmo-2", "olmo-3"), {"tie_word_embeddings": False}),
    "internlm2": {"bias": False, "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", OWN)
def test_metadata_come_back_as_the_same_decoder(name, tmp_path):
    """The decoder of the config.json that it was written from, and llama.cpp computes. transformers reads the new
    config.json, which merged models get, as the same decoder, too."""
    values = test_internlm.INTERNLM2 if name == "internlm2" else test_gguf_export.tiny_config(name)
    config, _ = config_from_hf(values | OWN[name] | {"vocab_size": gguf_tiny.VOCABULARY})
    if config.rope.rope_type == "yarn":  # what no value means, which a file says
        config = replace(config, rope=replace(config.rope, beta_fast=32.0, beta_slow=1.0))
    architecture = architecture_of(config)
    head = [] if config.tie_word_embeddings else [HEAD]
    file = write(
        tmp_path / "tiny.gguf",
        architecture.name,
        lambda writer: add_hyperparameters(writer, config, architecture),
        [*extra_tensors(config), *head],
    )
    found = file.hf_config()
    assert config_from_hf(found)[0] == config
    if name != "internlm2":  # no class for it
        theirs = transformers.AutoConfig.for_model(**found).to_dict()
        assert config_from_hf(theirs)[0] == config


def as_converted(writer: gguf.GGUFWriter, hf: dict) -> None:
    """The keys that llama.cpp's converter writes of a release (conversion/gemma.py, phi.py), and no others."""
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_sliding_window(hf["sliding_window"] or 0)
    if hf["model_type"] == "phi3":
        width = hf["hidden_size"] // hf["num_attention_heads"]
        writer.add_rope_scaling_orig_ctx_len(hf["original_max_position_embeddings"])
        writer.add_rope_dimension_count(int(hf.get("partial_rotary_factor", 1.0) * width))
        writer.add_rope_freq_base(hf["rope_theta"])
        if hf["rope_scaling"]:
            writer.add_rope_scaling_attn_factors(1.1902380714)  # sqrt(1 + ln 32 / ln 4096)
        return
    writer.add_key_length(hf["head_dim"])
    writer.add_value_length(hf["head_dim"])
    if hf["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    else:
        writer.add_rope_freq_base(hf["rope_theta"])


@pytest.mark.parametrize(
    "name", ["gemma-2-27b", "gemma-3-1b-pt", "Phi-3-mini-4k-instruct", "phi-4", "Phi-4-mini-instruct"]
)
def test_files_of_llama_cpps_converter_are_the_released_models(name, tmp_path):
    hf = RELEASED[name][0] | {"vocab_size": gguf_tiny.VOCABULARY}
    scaling = hf.get("rope_scaling") or {}
    for kind in ("long_factor", "short_factor") if scaling else ():  # a file has them in float32
        scaling = scaling | {kind: [float(str(np.float32(x))) for x in scaling[kind]]}
    expected, _ = config_from_hf(hf | {"rope_scaling": scaling or None})
    factors = [
        (f"rope_factors_{kind}.weight", np.array(scaling[f"{kind}_factor"], np.float32))
        for kind in ("long", "short") if scaling
    ]  # fmt: skip
    head = [] if expected.tie_word_embeddings else [HEAD]
    architecture = {"gemma3_text": "gemma3"}.get(hf["model_type"], hf["model_type"])
    file = write(tmp_path / "m.gguf", architecture, lambda writer: as_converted(writer, hf), [*head, *factors])
    found, _ = config_from_hf(file.hf_config())
    assert found == expected
