"""Mixtures of experts as GGUF: stacked experts, llama.cpp's own recipes for them, adapters; llama.cpp is the judge.

What needs llama.cpp runs where llama-cpp-python is installed (see test_gguf_llama_cpp.py).
"""

import ctypes

import gguf
import gguf_tiny
import numpy as np
import pytest
import tiny
import torch

from fastft_jax import FastLanguageModel
from fastft_jax.convert.gguf.architectures import architecture_of
from fastft_jax.convert.gguf.recipes import METHODS
from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.registry import config_from_hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
# As llama.cpp has them: experts in every layer. Mixtral is wide enough for k-quants where a width can be a multiple of
# 256, with the 8 experts that have recipes of their own, and a layer of every kind the recipes know.
MODELS = {
    "mixtral": dict(
        sliding_window=None, hidden_size=256, intermediate_size=32, num_hidden_layers=3, num_local_experts=8
    ),
    "qwen-2-moe": dict(mlp_only_layers=[], moe_intermediate_size=64, shared_expert_intermediate_size=96),
    "qwen-3-moe": dict(decoder_sparse_step=1),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """(name, transformers model, ours, our files by method)"""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), gguf_tiny.byte_tokenizer()
    reference = gguf_tiny.make_family(request.param, **MODELS[request.param])
    hf = gguf_tiny.save_folder(reference, tokenizer, folder / "hf")
    model, _ = FastLanguageModel.from_pretrained(hf, max_seq_length=64, dtype="float32", load_in_4bit=False)
    methods = list(METHODS) if request.param == "mixtral" else ["f32"]
    paths = model.save_pretrained_gguf(folder / "gguf", tokenizer, methods)
    return request.param, reference, model, dict(zip(methods, paths, strict=True))


def test_names_and_metadata_are_those_of_the_gguf_package(case):
    name, _, model, paths = case
    metadata, tensors = gguf_tiny.contents(paths["f32"])
    arch = {"mixtral": "llama", "qwen-2-moe": "qwen2moe", "qwen-3-moe": "qwen3moe"}[name]
    known = gguf.MODEL_TENSORS[{v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch]]
    patterns = {gguf.TENSOR_NAMES[kind] for kind in known}
    assert {n.rpartition(".")[0].replace("blk.1.", "blk.{bid}.") for n in tensors if "blk.1." in n} <= patterns
    e = model.decoder.config.experts
    assert metadata["general.architecture"] == arch and metadata[f"{arch}.expert_count"] == e.num_experts
    assert metadata[f"{arch}.expert_used_count"] == e.top_k
    assert metadata[f"{arch}.expert_feed_forward_length"] == e.intermediate_size
    assert metadata.get(f"{arch}.expert_shared_feed_forward_length") == e.shared_intermediate_size
    kind, router = tensors["blk.1.ffn_gate_inp.weight"]
    assert kind == "F32" and router.shape == (e.num_experts, model.decoder.config.hidden_size)
    if name == "qwen-2-moe":
        assert tensors["blk.1.ffn_gate_inp_shexp.weight"][1].ndim == 1


def test_llama_cpp_computes_the_models_logits(case, llama_cpp):
    _, reference, _, paths = case
    with torch.no_grad():
        expected = reference(torch.tensor(llama_cpp.IDS)[None]).logits[0].numpy()
    np.testing.assert_allclose(llama_cpp.logits(paths["f32"]), expected, atol=1e-4)


def quantised(llama_cpp, source, method, out, imatrix=None):
    """What llama_model_quantize makes of a float32 file."""
    options = llama_cpp.llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = METHODS[method][1], 1
    if imatrix is not None:
        options.imatrix = imatrix
    made = llama_cpp.llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options))
    assert made == 0
    return gguf_tiny.contents(out)


def same(ours, theirs):
    (mine, tensors), (metadata, others) = ours, theirs
    assert mine == metadata
    assert {n: kind for n, (kind, _) in tensors.items()} == {n: kind for n, (kind, _) in others.items()}
    assert not [n for n in tensors if not np.array_equal(tensors[n][1], others[n][1])]


def test_files_of_8_experts_equal_those_of_llama_cpps_quantiser(case, llama_cpp, tmp_path):
    """Every tensor's type and bytes, method by method; of qwen's 6 experts the usual rules, in one method."""
    name, _, model, paths = case
    if name != "mixtral":
        tokenizer = gguf_tiny.byte_tokenizer()
        paths = paths | {"q4_k_m": model.save_pretrained_gguf(tmp_path, tokenizer, "q4_k_m")[0]}
    for method in paths.keys() - {"f32", "f16", "bf16"}:
        same(gguf_tiny.contents(paths[method]), quantised(llama_cpp, paths["f32"], method, tmp_path / "theirs.gguf"))
    for kind in paths.keys() & {"f16", "bf16"}:
        tensors = gguf_tiny.contents(paths[kind])[1]
        assert (
            tensors["blk.0.ffn_gate_inp.weight"][0] == "F32" and tensors["blk.0.ffn_up_exps.weight"][0] == kind.upper()
        )


@pytest.mark.parametrize("case", ["mixtral"], indirect=True)  # the others are too narrow for k-quants
def test_each_expert_has_its_own_importance(case, llama_cpp, tmp_path):
    """llama-imatrix's file, [E, K] of experts: the same bytes as llama.cpp's quantiser, and others than without."""
    _, _, model, paths = case
    rng = np.random.default_rng(1)
    names = [f"blk.{i}.{part}.weight" for i in range(3) for part in ("ffn_gate_exps", "attn_q")]
    entries = (llama_cpp.llama_cpp.llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    writer = gguf.GGUFWriter(tmp_path / "imatrix.gguf", "imatrix")
    kept = []
    for entry, weight in zip(entries, names, strict=False):
        experts = 8 if "exps" in weight else 1
        sums = rng.lognormal(sigma=2, size=(experts, 256)).astype(np.float32)
        writer.add_tensor(f"{weight}.in_sum2", sums)
        writer.add_tensor(f"{weight}.counts", np.full((experts, 1), 2, np.float32))
        kept.append(np.ascontiguousarray(sums / 2))
        entry.name, entry.size = weight.encode(), sums.size
        entry.data = kept[-1].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    tokenizer = gguf_tiny.byte_tokenizer()
    (ours,) = model.save_pretrained_gguf(tmp_path / "out", tokenizer, "q4_k_s", tmp_path / "imatrix.gguf")
    made, plain = gguf_tiny.contents(ours), gguf_tiny.contents(paths["q4_k_s"])
    same((None, made[1]), (None, quantised(llama_cpp, paths["f32"], "q4_k_s", tmp_path / "theirs.gguf", entries)[1]))
    assert not np.array_equal(made[1][names[0]][1], plain[1][names[0]][1])


@pytest.mark.parametrize("case", ["qwen-2-moe"], indirect=True)  # which has tensors of all the others' kinds
def test_an_adapter_alone_does_in_llama_cpp_what_it_does_here(case, llama_cpp, tmp_path):
    """Experts, shared experts and attention, with rsLoRA's scaling folded in. The model's last test."""
    _, _, model, paths = case
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False)
    (adapter,) = model.save_pretrained_gguf(tmp_path, quantization_method="lora")
    expected = np.asarray(model(llama_cpp.IDS[None]))[0]
    np.testing.assert_allclose(llama_cpp.logits(paths["f32"], lora_path=str(adapter)), expected, atol=2e-4)
    assert np.abs(llama_cpp.logits(paths["f32"]) - expected).max() > 1


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("phi-3.5-moe", {}, "experts weighted by 'sparsemixer'.* LayerNorm"),
        ("qwen-2-moe", {}, r"layers without experts \(0\)"),
        ("qwen-2-moe", {"mlp_only_layers": [], "norm_topk_prob": True}, "norm_topk_prob=True .there it is False"),
        ("qwen-2-moe", {"mlp_only_layers": [], "tie_word_embeddings": True}, "a head that is tied"),
        ("qwen-3-moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}, "norm_topk_prob=False"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_with_the_reason(name, changes, said):
    model_type, values = tiny.EXPERTS[name]
    config, _ = config_from_hf({"model_type": model_type, **tiny.COMMON, **values, **changes})
    with pytest.raises(CheckpointError, match=f"does not compute this model: {said}.*export merged_16bit instead"):
        architecture_of(config)
