"""GPT-OSS and DeepSeek as GGUF: tensors that llama.cpp keeps as two, types of quantised ones, adapters, refusals.

Logits of narrower ones: test_compatibility.py. What needs llama.cpp runs where llama-cpp-python is installed.
"""

import warnings

import gguf_tiny
import numpy as np
import pytest
import tiny
import torch

from fastft_jax import FastLanguageModel
from fastft_jax.convert.gguf import parts as gguf_parts
from fastft_jax.convert.gguf.architectures import architecture_of
from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.registry import config_from_hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
ATTENTION = {"kv_lora_rank": 256, "qk_nope_head_dim": 32, "v_head_dim": 32}  # k-quants for values, and rows too short
# Wide enough for k-quants where a width can be a multiple of 256
MODELS = {
    "gpt-oss": dict(hidden_size=256, intermediate_size=32, num_hidden_layers=2),
    "deepseek-v3": gguf_tiny.DEEPSEEK | ATTENTION | dict(hidden_size=256, num_hidden_layers=2),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(name, transformers model, ours, our files by method)"""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), gguf_tiny.byte_tokenizer()
    reference = gguf_tiny.make_family(request.param, **MODELS[request.param])
    hf = gguf_tiny.save_folder(reference, tokenizer, folder / "hf")
    model, _ = FastLanguageModel.from_pretrained(hf, max_seq_length=64, dtype="float32", load_in_4bit=False)
    methods = ["f32", "q8_0", "q4_k_m", "q2_k"]
    paths = model.save_pretrained_gguf(folder / "gguf", tokenizer, methods, verify=False)
    return request.param, reference, model, dict(zip(methods, paths, strict=True))


def test_llama_cpp_computes_the_models_logits(case, llama_cpp):
    _, reference, _, paths = case
    with torch.no_grad():
        expected = reference(torch.tensor(llama_cpp.IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(llama_cpp.logits(paths["f32"]), expected, atol=1e-4)


def test_files_equal_those_of_llama_cpps_quantiser(case, llama_cpp, tmp_path):
    """Every tensor's type and bytes."""
    from test_gguf_experts import quantised, same

    _, _, _, paths = case
    for method in ("q8_0", "q4_k_m", "q2_k"):
        same(gguf_tiny.contents(paths[method]), quantised(llama_cpp, paths["f32"], method, tmp_path / "theirs.gguf"))


@pytest.mark.parametrize("case", ["deepseek-v3"], indirect=True)  # GPT-OSS's, on all linears: test_compatibility.py
def test_a_deepseek_adapter_alone_does_in_llama_cpp_what_it_does_here(case, llama_cpp, tmp_path):
    """Experts, shared experts, dense layers and attention's way out. The model's last test."""
    _, _, model, paths = case
    modules = ["gate_proj", "up_proj", "down_proj", "o_proj"]
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=6, target_modules=modules, init_lora_weights=False)
    (adapter,) = model.save_pretrained_gguf(tmp_path, quantization_method="lora")
    expected = np.asarray(model(llama_cpp.IDS[None]))[0]
    np.testing.assert_allclose(llama_cpp.logits(paths["f32"], lora_path=str(adapter)), expected, atol=2e-4)
    assert np.abs(llama_cpp.logits(paths["f32"]) - expected).max() > 0.5


def config_of(name: str, **changes):
    model_type, values = tiny.EXPERTS[name]
    released = gguf_tiny.DEEPSEEK if name.startswith("deepseek") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_from_hf({"model_type": model_type, **tiny.COMMON, **values, **released, **changes})[0]


def yarn(**changes):
    return {"rope_parameters": gguf_tiny.DEEPSEEK["rope_parameters"] | changes}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("deepseek-v2", {}, "topk_method='group_limited_greedy'"),
        ("deepseek-v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 .there the latents' norms, of 1e-06"),
        ("deepseek-v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek-v3", yarn(mscale=1.0), "yarn with an own .* or an mscale that is not mscale_all_dim"),
        (
            "deepseek-v3",
            yarn(mscale=None, mscale_all_dim=None),
            "yarn with an own .* or an mscale that is not mscale_all_dim",
        ),
        ("deepseek-v3", yarn(rope_type="linear", mscale=None, mscale_all_dim=None), "rope_type='linear'"),
        ("deepseek-v3", {"num_hidden_layers": 27}, "q_lora_rank=24 in 27 layers"),
        ("deepseek-v3", {"attention_bias": True}, "biases of o projections"),
        ("gpt-oss", {"tie_word_embeddings": True}, "a head that is tied"),
        ("gpt-oss", {"attention_bias": False}, "attention without biases"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_with_the_reason(name, changes, said):
    with pytest.raises(CheckpointError, match=f"does not compute this model: {said}.*export merged_16bit instead"):
        architecture_of(config_of(name, **changes))


def test_that_llama_cpp_rounds_the_bounds_of_gpt_oss_yarn_is_said_where_it_matters():
    scaling = {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
    released = {"rope_parameters": tiny.YARN | {"rope_theta": 150_000.0} | scaling}
    with pytest.warns(UserWarning, match="rounds the bounds .* near this model's, not equal"):
        architecture_of(config_of("gpt-oss", head_dim=64, **released))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        architecture_of(config_of("gpt-oss"))  # both bounds are at the ends, rounded or not


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("mlp.experts.gate_up_proj.weight", (4, 6, 5)),
        ("mlp.experts.gate_up_proj.bias", (4, 6)),
        ("self_attn.kv_b_proj.weight", (4 * (16 + 12), 16)),
    ],
)
def test_split_tensors_join_to_what_they_were(path, shape):
    w, config = np.arange(np.prod(shape), dtype=np.float32).reshape(shape), config_of("deepseek-v2")
    parts = gguf_parts.split(path, w, config)
    assert [part.shape for part in parts] == gguf_parts.shapes_of_parts(path, shape, config)
    np.testing.assert_array_equal(gguf_parts.join(path, parts, config), w)
    if "kv_b" in path:  # of head 1, by the publisher's layout: 16 rows for keys, 12 for values
        np.testing.assert_array_equal(parts[0][1], w[28:44].T)
        np.testing.assert_array_equal(parts[1][1], w[44:56])
