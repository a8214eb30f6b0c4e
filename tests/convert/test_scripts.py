"""The two scripts that make checkpoints: random ones, and safetensors out of pickles."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastft_jax.convert.peft import read_adapter
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError

RANDOM, CONVERT = "scripts/make_random_checkpoint.py", "scripts/convert_bin_to_safetensors.py"


def load_script(repo, path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, repo / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(repo, script, *arguments):
    command = [sys.executable, repo / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=repo)


@pytest.fixture
def random_script(repo):
    return load_script(repo, RANDOM)


@pytest.fixture
def convert(repo):
    return load_script(repo, CONVERT).convert


# --- make_random_checkpoint ----------------------------------------------------------------------------------------

# Parameters of the published checkpoints, from their model cards or safetensors indices.
PARAMETERS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}


@pytest.mark.parametrize("like", [*PARAMETERS, "mixtral-8x7b"])
def test_the_geometry_has_as_many_parameters_as_the_published_model(random_script, like):
    shapes = random_script.tensor_shapes(random_script.MODELS[like])
    published = PARAMETERS | {"mixtral-8x7b": 46_702_792_704}  # whose names transformers has fused in memory
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == published[like]


def test_names_and_shapes_of_experts_are_those_that_are_read(random_script):
    from fastft_jax.convert.hf import tensor_requests
    from fastft_jax.models.families.registry import config_from_hf

    values = random_script.MODELS["mixtral-8x7b"] | {"num_hidden_layers": 2}
    config, names = config_from_hf(values)
    read = {name: request.tensor_shape for request in tensor_requests(config) for name in request.hf_names(names)}
    assert random_script.tensor_shapes(values) == read


@pytest.mark.parametrize("like", [*PARAMETERS, "tiny-llama"])
def test_names_and_shapes_are_those_of_transformers(random_script, like):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = random_script.MODELS[like] | {"num_hidden_layers": 2}
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    if settings["tie_word_embeddings"]:
        del state["lm_head.weight"]
    assert random_script.tensor_shapes(settings) == {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_script_writes_a_folder_that_transformers_loads_and_a_tokenizer_that_fits(repo, tmp_path):
    out = tmp_path / "out"
    done = run(repo, RANDOM, "--like", "tiny-llama", "--max-shard-size", "100KB", out)
    assert done.returncode == 0 and "M parameters" in done.stdout, done.stderr
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16" and len(list(out.glob("model-*-of-*.safetensors"))) > 1
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    assert len(tokenizer) == 260 <= model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.bos_token_id == tokenizer.bos_token_id
    text = "Grüße, 世界!\n  two  spaces <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id in ids and max(ids) < 260
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    again = run(repo, RANDOM, "--like", "tiny-llama", out)
    assert again.returncode == 1 and "exists and is not empty" in again.stderr and "Traceback" not in again.stderr


def test_weights_are_normal_with_std_002_all_different_and_the_seed_decides(random_script, tmp_path):
    def make(name, seed, **options):
        defaults = dict(dtype="bfloat16", max_shard_size="5GB", layers=3)
        random_script.make("tiny-llama", tmp_path / name, seed=seed, **defaults | options)
        checkpoint = Checkpoint.open(tmp_path / name)
        return {tensor: checkpoint.read(tensor) for tensor in checkpoint.names}

    first, same, other = make("a", 0), make("b", 0), make("c", 1)
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert len([name for name in first if name.startswith("model.layers.2.")]) == 9
    weights = [name for name in first if not name.endswith("norm.weight")]
    assert all((array == 1).all() for name, array in first.items() if name not in weights)
    assert not any(np.array_equal(first[name], other[name]) for name in weights)
    by_shape: dict[tuple, list] = {}
    for name in weights:
        by_shape.setdefault(first[name].shape, []).append(first[name].tobytes())
    assert all(len(set(found)) == len(found) for found in by_shape.values())
    values = np.concatenate([first[name].astype(np.float64).ravel() for name in weights])
    # 2e5 values: the standard error of the std is 3e-5, of the share within one std 1e-3
    assert abs(values.std() - 0.02) < 2e-4 and abs(values.mean()) < 2e-4
    assert abs((np.abs(values) < 0.02).mean() - 0.6827) < 0.005
    assert {array.dtype.name for array in make("d", 0, dtype="float16").values()} == {"float16"}


def test_large_tensors_do_not_repeat_row_by_row(random_script):
    """Rows that repeat would make a matrix of low rank, unlike any model's."""
    matrix = random_script.RandomWeights(0, np.dtype(np.float32)).fill("w", (12_000, 256))  # three pieces
    assert len({row.tobytes() for row in matrix}) == len(matrix)
    assert np.linalg.matrix_rank(matrix[::40]) == 256


# The accelerator packages are made impossible to import, as on a machine that has only these three.
WITHOUT = """
import runpy, sys
for name in ("jax", "jaxlib", "flax", "torch", "transformers", "safetensors"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_random_checkpoints_need_neither_jax_nor_torch(repo, tmp_path):
    script = [repo / RANDOM, "--like", "tiny-llama", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(Checkpoint.open(tmp_path / "out").names) == 21


def test_without_torch_the_converter_says_what_it_needs(repo, tmp_path):
    script = [repo / CONVERT, tmp_path, tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *script], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: reading pickled weights needs torch: pip install torch\n"


# --- convert_bin_to_safetensors ------------------------------------------------------------------------------------


def torch_state():
    import torch

    torch.manual_seed(0)
    embed = torch.randn(8, 4)
    return {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": embed,
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "f8": torch.randn(4).to(torch.float8_e4m3fn),
        "transposed": torch.randn(3, 5).T,
        "scalar": torch.tensor(3.0),
        "counts": torch.arange(4),
    }


def assert_equal(checkpoint, state):
    import torch

    assert set(checkpoint.names) == set(state)
    for name, tensor in state.items():
        found = checkpoint.read(name)
        assert found.shape == tuple(tensor.shape) and found.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert found.astype(np.float64).tolist() == tensor.to(torch.float64).tolist()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bin_checkpoint_becomes_safetensors_with_equal_values(repo, tmp_path, legacy):
    import torch

    source = tmp_path / "source"
    source.mkdir()
    state = torch_state()
    if legacy:
        del state["f8"]  # younger than that format: torch itself cannot load it
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (source / "config.json").write_text('{"tie_word_embeddings": false}')
    (source / "training.py").write_text("code is not copied")
    done = run(repo, CONVERT, source, tmp_path / "out")
    assert done.returncode == 0 and f"{len(state)} tensors, read back and compared" in done.stdout, done.stderr
    assert_equal(Checkpoint.open(tmp_path / "out"), state)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_shards_are_followed_and_a_tied_head_is_kept_once(tmp_path, convert):
    import torch

    state = torch_state()
    names = list(state)
    torch.save({name: state[name] for name in names[:3]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[3:]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {name: f"pytorch_model-0000{1 + (i >= 3)}-of-00002.bin" for i, name in enumerate(names)}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert convert(tmp_path, tmp_path / "out", "100") == 6
    state.pop("lm_head.weight")
    assert_equal(Checkpoint.open(tmp_path / "out"), state)

    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="lacks the shard pytorch_model-00002-of-00002.bin"):
        convert(tmp_path, tmp_path / "again", "5GB")
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    with pytest.raises(CheckpointError, match="points outside the folder"):
        convert(tmp_path, tmp_path / "again", "5GB")
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        convert(tmp_path, tmp_path / "again", "5GB")


def test_an_adapter_is_converted_too(shared_data, tmp_path, convert):
    import safetensors.torch
    import torch

    basic = shared_data / "peft" / "basic"
    (tmp_path / "source").mkdir()
    torch.save(
        safetensors.torch.load_file(basic / "adapter_model.safetensors"), tmp_path / "source" / "adapter_model.bin"
    )
    (tmp_path / "source" / "adapter_config.json").write_bytes((basic / "adapter_config.json").read_bytes())
    convert(tmp_path / "source", tmp_path / "out", "5GB")
    read_adapter(tmp_path / "out")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (basic / name).read_bytes()


class Code:
    """A pickle that would run something when it is loaded."""

    def __reduce__(self):
        return print, ("the pickle ran",)


@pytest.mark.parametrize(
    "content, word",
    [({"w": Code()}, "cannot be loaded as plain tensors"), ({"epoch": 3}, "no table of tensors"), ([1], "no table")],
)
def test_pickles_of_anything_but_tensors_are_refused_unrun(tmp_path, convert, capsys, content, word):
    import torch

    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=word) as caught:
        convert(tmp_path, tmp_path / "out", "5GB")
    assert "\n" not in str(caught.value)
    assert "the pickle ran" not in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 cut off"])
def test_a_damaged_pickle_and_an_empty_folder_are_errors(tmp_path, convert, content):
    with pytest.raises(CheckpointError, match="has none of pytorch_model.bin"):
        convert(tmp_path, tmp_path / "out", "5GB")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        convert(tmp_path, tmp_path / "out", "5GB")
    assert not (tmp_path / "out").exists()
