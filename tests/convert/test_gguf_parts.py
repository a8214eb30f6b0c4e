"""Linears that llama.cpp has in parts: which rows go where, and what of InternLM2 its graph lacks. That llama.cpp
computes these files and adapters: test_compatibility.py."""

import numpy as np
import pytest
import test_internlm
import tiny
import torch

from fastft_jax.convert.gguf.architectures import architecture_of
from fastft_jax.convert.gguf.parts import join, parts_of, shapes_of_parts, split
from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.registry import config_from_hf


def test_internlm2s_rows_are_cut_as_published_and_come_back():
    """Llama's tensors, put together as modeling_internlm2.py has them."""
    llama = tiny.make_model("llama-2", num_hidden_layers=2, attention_bias=True).state_dict()
    with torch.no_grad():
        for value in llama.values():
            value.uniform_(-1, 1)
    config, names = config_from_hf(test_internlm.INTERNLM2)
    fused = test_internlm.as_internlm2(llama)
    for kind in ("weight", "bias"):
        path = f"self_attn.qkv_proj.{kind}"
        whole = fused[names.hf_name(path, 1)].numpy()
        parts = dict(zip(parts_of(path, config), split(path, whole, config), strict=True))
        assert list(parts) == [f"self_attn.{x}_proj.{kind}" for x in "qkv"]
        for part, values in parts.items():
            np.testing.assert_array_equal(values, llama[f"model.layers.1.{part}"].numpy())
        assert shapes_of_parts(path, whole.shape, config) == [part.shape for part in parts.values()]
        np.testing.assert_array_equal(join(path, [*parts.values()], config), whole)


def test_granite_4s_gate_is_the_first_half_and_what_is_whole_stays_so():
    config, _ = config_from_hf({"model_type": "granitemoehybrid"} | tiny.COMMON | tiny.TINY["granite-4-dense"][1])
    path = "mlp.gate_up_proj.weight"
    assert parts_of(path, config) == ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    whole = np.arange(160 * 2).reshape(160, 2)
    gate, up = split(path, whole, config)
    np.testing.assert_array_equal(np.concatenate([gate, up]), whole)
    assert gate.shape == up.shape == (80, 2)
    phi, _ = config_from_hf({"model_type": "phi3"} | tiny.COMMON | tiny.TINY["phi-3"][1])
    for path in ("mlp.gate_up_proj.weight", "self_attn.qkv_proj.weight", "norm.weight"):  # fused there, too
        assert parts_of(path, phi) == (path,) and split(path, whole, phi) == [whole]
        assert join(path, [whole], phi) is whole and shapes_of_parts(path, (3, 2), phi) == [(3, 2)]


@pytest.mark.filterwarnings("ignore:llama.cpp ignores")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": True}, "'internlm2' does not compute this model: biases of o projections"),
        ({"bias": False, "tie_word_embeddings": True}, "a head that is tied to the embedding"),
    ],
)
def test_internlm2_as_llama_cpp_has_it_not_is_refused(change, message):
    config, _ = config_from_hf(test_internlm.INTERNLM2 | {"bias": False})
    assert architecture_of(config).name == "internlm2"
    config, _ = config_from_hf(test_internlm.INTERNLM2 | change)
    with pytest.raises(CheckpointError, match=message):
        architecture_of(config)
