"""Models and adapters written as GGUF: their tensors, names, metadata and Modelfile, and what happens when it fails."""

import json
import shutil

import gguf
import gguf_tiny
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from fastft_jax import FastLanguageModel
from fastft_jax.convert import atomic
from fastft_jax.convert.gguf import FORMS, recipes
from fastft_jax.convert.gguf.architectures import ARCHITECTURES, architecture_of, tensor_name
from fastft_jax.convert.gguf.export import file_stem
from fastft_jax.convert.gguf.modelfile import derive_turns, modelfile
from fastft_jax.convert.hf import tensor_requests
from fastft_jax.convert.merged.merge import merged_tensors
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.export import Settings, export
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.lora import layer_linears
from fastft_jax.quant.dense import dense, is_quantised
from fastft_jax.quant.nf4 import dequantize

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tuned(repo):
    """The example's base in NF4 with a rsLoRA adapter that acts, on the layers 0 and 2."""
    model, tokenizer = FastLanguageModel.from_pretrained(repo / "examples" / "tiny-base", max_seq_length=32)
    FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, layers_to_transform=[0, 2]
    )
    return model, tokenizer


@pytest.fixture(scope="module")
def written(tuned, tmp_path_factory):
    model, tokenizer = tuned
    folder = tmp_path_factory.mktemp("gguf")
    paths = model.save_pretrained_gguf(folder, tokenizer, ["F32", "q8_0", "q4_k_m", "lora", "f32"], verify=False)
    return {path.stem.removeprefix("tiny-base-"): path for path in paths}


def test_files_are_named_by_model_and_method_with_a_modelfile_beside_them(written):
    folder = written["F32"].parent
    assert set(written) == {"F32", "Q8_0", "Q4_K_M", "LoRA-F32"}
    assert sorted(p.name for p in folder.iterdir()) == sorted([*(p.name for p in written.values()), "Modelfile"])
    assert file_stem("org/My model!/") == "My-model" and file_stem("a/b.gguf") == "b"
    assert (folder / "Modelfile").read_text().startswith("FROM ./tiny-base-F32.gguf\n# FROM ./tiny-base-Q8_0.gguf\n")


def test_merged_weights_are_the_float64_sum_of_base_and_adapter(tuned, written):
    """W + alpha / sqrt(r) B A over the decoded NF4 base, q and k rows in llama.cpp's order; float32 rounding."""
    model, _ = tuned
    _, tensors = gguf_tiny.contents(written["F32"])
    layer = model.decoder.segments[0][0]
    for path, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        linear = getattr(layer.self_attn, path)
        for row, at in ((0, 0), (1, None), (2, 1)):  # layer 1 has no adapter
            w = np.asarray(dequantize(linear.weight.get_value().at(row), jnp.float32), np.float64)
            if at is not None:
                a, b = (np.asarray(x.get_value()[at], np.float64) for x in (linear.lora_A, linear.lora_B))
                w = w + 6 / 4**0.5 * b @ a
            if heads:  # halves of a head -> neighbours
                half = w.reshape(heads, 2, 16, -1)
                w = np.stack([half[:, 0], half[:, 1]], axis=2).reshape(w.shape)
            np.testing.assert_allclose(tensors[f"blk.{row}.{theirs}.weight"][1], w, rtol=1e-6, atol=1e-7)


def test_merged_tensors_have_hugging_faces_names_and_shapes(tuned, repo):
    model, _ = tuned
    merged = dict(merged_tensors(model.decoder, model.names))
    with open(repo / "examples" / "tiny-base" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert {name: list(w.shape) for name, w in merged.items()} == {n: t["shape"] for n, t in header.items()}
    assert {w.dtype for w in merged.values()} == {np.dtype(np.float32)}


def test_a_trained_head_is_untied_and_written(repo, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        repo / "examples" / "tiny-base", max_seq_length=32, load_in_4bit=False
    )
    FastLanguageModel.get_peft_model(model, r=2, target_modules=["v_proj"], modules_to_save=["lm_head"])
    model.decoder.lm_head.weight.set_value(model.decoder.lm_head.weight.get_value() * 2)
    (path,) = model.save_pretrained_gguf(tmp_path, tokenizer, "f32")
    _, tensors = gguf_tiny.contents(path)
    np.testing.assert_array_equal(tensors["output.weight"][1], 2 * tensors["token_embd.weight"][1])
    with pytest.raises(ConfigError, match="cannot hold lm_head, which was trained whole"):
        model.save_pretrained_gguf(tmp_path, quantization_method="lora")


@pytest.mark.parametrize("options", [{"load_in_8bit": True, "load_in_4bit": False}, {"full_finetuning": True}])
def test_int8_and_fully_tuned_models_are_written_as_they_compute(options, repo, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        repo / "examples" / "tiny-base", max_seq_length=32, dtype="float32", **options
    )
    (path,) = model.save_pretrained_gguf(tmp_path, tokenizer, "f32")
    _, tensors = gguf_tiny.contents(path)
    weight = model.decoder.segments[0][0].mlp.down_proj.weight.get_value()
    expected = dense(weight.at(1) if is_quantised(weight) else weight[1], jnp.float32)
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"][1], expected)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k_m"])
def test_a_trained_models_files_are_llama_cpps(kind, shared_data, stories_files):
    """convert_hf_to_gguf and llama-quantize wrote the others: the same tensors, types, bytes and metadata."""
    (ours, mine), (theirs, tensors) = (
        gguf_tiny.contents(path) for path in (stories_files[kind], shared_data / "gguf" / f"stories260k-{kind}.gguf")
    )
    assert mine.keys() == tensors.keys()
    for name, (type_name, data) in tensors.items():
        assert mine[name][0] == type_name, name
        np.testing.assert_array_equal(mine[name][1], data, err_msg=name)
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    # theirs from tokenizer.model: another scale; ours says what is llama.cpp's default, theirs that there is no sep
    assert differ <= {"tokenizer.ggml.scores", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_sep_token"}
    normal = np.array(theirs["tokenizer.ggml.token_type"]) == gguf.TokenType.NORMAL
    made = {a + b for a, b in stories_files["merges"]}  # what scores are compared for
    at = [i for i in np.flatnonzero(normal) if theirs["tokenizer.ggml.tokens"][i] in made]
    order = [np.argsort(np.array(f["tokenizer.ggml.scores"])[at], kind="stable") for f in (ours, theirs)]
    np.testing.assert_array_equal(*order)


@pytest.fixture(scope="module")
def stories_files(stories, tmp_path_factory):
    folder = stories()
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype="float32", load_in_4bit=False)
    model.name_or_path = "stories260K"
    kinds = ["f32", "f16", "q8_0", "q4_k_m"]
    paths = model.save_pretrained_gguf(tmp_path_factory.mktemp("stories"), tokenizer, kinds, verify=False)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    return dict(zip(kinds, paths, strict=True)) | {"merges": merges}


@pytest.mark.parametrize("variant", ["all7", "rslora"])
def test_an_adapters_tensors_are_llama_cpps(variant, shared_data, stories, tmp_path):
    """convert_lora_to_gguf wrote the other from the same PEFT folder; of rsLoRA it forgets sqrt(r), ours is in B."""
    adapter = shutil.copytree(shared_data / "peft" / variant, tmp_path / "adapter", copy_function=shutil.copyfile)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(stories())}))
    model, _ = FastLanguageModel.from_pretrained(adapter, max_seq_length=64, dtype="float32", load_in_4bit=False)
    (path,) = model.save_pretrained_gguf(tmp_path, quantization_method="lora")
    metadata, tensors = gguf_tiny.contents(path)
    assert metadata["adapter.lora.alpha"] == 16.0 and metadata["general.type"] == "adapter"
    if variant == "all7":
        _, theirs = gguf_tiny.contents(shared_data / "gguf" / "stories260k-lora-all7-f32.gguf")
        assert tensors.keys() == theirs.keys()
        for name, (_, data) in theirs.items():
            np.testing.assert_array_equal(tensors[name][1], data, err_msg=name)
        return
    v = model.decoder.segments[0][0].self_attn.v_proj
    expected = np.asarray(v.lora_B.get_value()[0]) * np.float32(8**0.5)  # alpha / sqrt(r) = (alpha / r) sqrt(r)
    np.testing.assert_allclose(tensors["blk.0.attn_v.weight.lora_b"][1], expected, rtol=1e-6)


def tiny_config(name: str) -> dict:
    model_type, arguments = tiny.TINY[name]
    return {"model_type": model_type} | tiny.COMMON | arguments | gguf_tiny.AS_IN_LLAMA_CPP.get(name, {})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", gguf_tiny.FAMILIES)
def test_names_are_those_that_the_gguf_package_maps_hugging_faces_to(name):
    config, names = config_from_hf(tiny_config(name))
    architecture = architecture_of(config)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for request in tensor_requests(config):
        hf = names.hf_name(request.path, request.layers and request.layers[0])
        ours = tensor_name(request.path, request.layers and request.layers[0], architecture)
        assert ours == table.get_name(hf, try_suffixes=(".weight", ".bias")), hf


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-longrope", {}, "'llama' does not compute this model: longrope"),
        ("gemma-2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar=20 \\(there it is 24\\)"),
        ("smollm-3", {"no_rope_layers": [1, 0, 1, 1]}, "not every fourth"),
        ("qwen-3", {"attention_bias": True}, "biases of"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(name, change, message):
    config, _ = config_from_hf(tiny_config(name) | change)
    with pytest.raises(CheckpointError, match=message):
        architecture_of(config)


def test_what_llama_cpp_ignores_is_said():
    config, _ = config_from_hf(tiny_config("mistral-7b-v0.1"))
    with pytest.warns(UserWarning, match="ignores the sliding window of mistral models: .* up to 8 tokens"):
        assert architecture_of(config) is ARCHITECTURES["mistral"]


def test_a_failing_export_leaves_what_was_there(tuned, tmp_path, monkeypatch):
    model, tokenizer = tuned
    (path,) = model.save_pretrained_gguf(tmp_path, tokenizer, "q8_0", verify=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
        with pytest.raises(CheckpointError, match="needs .* bytes and the disk has 1000 left"):
            model.save_pretrained_gguf(tmp_path, tokenizer, ["q8_0", "f16"], verify=False)
    weight = next(linear for path, linear in layer_linears(model.decoder.segments[0][0]) if "down" in path).lora_B
    value = weight.get_value()
    weight.set_value(value.at[0, 0, 0].set(jnp.nan))
    with pytest.raises(CheckpointError, match="blk.0.ffn_down.weight has values that are not finite"):
        model.save_pretrained_gguf(tmp_path, tokenizer, ["f16", "q8_0"], verify=False)
    weight.set_value(value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        model.save_pretrained_gguf(tmp_path / "file" / "sub", tokenizer, "q8_0", verify=False)


def test_mistakes_are_told_before_anything_is_written(tuned, tmp_path):
    model, tokenizer = tuned
    with pytest.raises(ConfigError, match="quantization_method='iq1_s' is not one of"):
        model.save_pretrained_gguf(tmp_path, tokenizer, ["q8_0", "iq1_s"], verify=False)
    with pytest.raises(ConfigError, match="empty"):
        model.save_pretrained_gguf(tmp_path, tokenizer, [], verify=False)
    with pytest.raises(CheckpointError, match="needs the model's tokenizer"):
        model.save_pretrained_gguf(tmp_path, None, "q8_0", verify=False)
    other = gguf_tiny.byte_tokenizer()
    other.add_tokens([f"word{i}" for i in range(1100 - len(other))])
    with pytest.raises(CheckpointError, match="ids up to 1099, the model's embedding 1024 rows"):
        model.save_pretrained_gguf(tmp_path, other, "q8_0", verify=False)
    assert not list(tmp_path.iterdir())


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi {{ .Name }}"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def test_the_modelfiles_template_is_derived_from_the_tokenizers():
    tokenizer = gguf_tiny.byte_tokenizer()
    tokenizer.chat_template = CHATML
    text = modelfile(["m.gguf"], tokenizer)
    assert text == (
        'FROM ./m.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\n'
        'PARAMETER stop "</s>"\nPARAMETER stop "<|im_start|>"\nPARAMETER stop "<|im_end|>"\n'
    )
    for template in ("{{ messages | tojson }}", "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        assert derive_turns(tokenizer) is None and "TEMPLATE" not in modelfile(["m.gguf"], tokenizer)


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Qwen3-0.6B", "Phi-3.5", "gemma-2", "Llama-3.1-8B", "Mistral-Nemo"])
def test_derived_turns_render_released_templates(name, shared_data):
    tokenizer = gguf_tiny.byte_tokenizer()
    path = next(p for p in (shared_data / "chat_templates").iterdir() if name in p.name)
    tokenizer.chat_template = path.read_text()
    turns = derive_turns(tokenizer)
    talk = TALK if turns.system else TALK[1:]
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert turns.render(talk) == expected.removeprefix("<s>")


@pytest.mark.parametrize("variant", ["dora", "embed_lora", "patterns", "norms_saved"])
def test_merged_files_of_every_kind_of_adapter_compute_what_peft_merged_does(variant, shared_data, stories, tmp_path):
    """PEFT's logits in the shared data, against the float32 file read back; and what llama.cpp's form cannot hold."""
    adapter = shutil.copytree(shared_data / "peft" / variant, tmp_path / "adapter", copy_function=shutil.copyfile)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(stories())}))
    options = {"max_seq_length": 64, "dtype": "float32", "load_in_4bit": False}
    model, tokenizer = FastLanguageModel.from_pretrained(adapter, **options)
    (path,) = model.save_pretrained_gguf(tmp_path, tokenizer, "f32")
    merged, _ = FastLanguageModel.from_pretrained(path, **options)
    reference = np.load(shared_data / "peft" / variant / "reference.npz")
    np.testing.assert_allclose(merged(reference["input_ids"]), reference["logits"], atol=2e-4)
    if variant != "patterns":
        with pytest.raises(ConfigError, match="a GGUF adapter cannot hold"):
            model.save_pretrained_gguf(tmp_path, quantization_method="lora")


def test_the_export_command_knows_every_form(tuned, tmp_path):
    assert set(FORMS) == {*recipes.METHODS, "lora"}
    said = list(export(*tuned, ["gguf:q8_0,gguf:lora"], tmp_path, Settings()))
    assert [line.partition(":")[0] for line in said] == ["gguf", "gguf"]
    assert (tmp_path / "gguf-q8_0" / "tiny-base-Q8_0.gguf").exists() and (tmp_path / "gguf-lora").is_dir()
    with pytest.raises(ConfigError, match="write gguf: and one of f32"):
        list(export(*tuned, ["gguf:q9"], tmp_path, Settings()))
