"""FastLanguageModel: adapters as PEFT makes and reads them, in every variant offered."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch

from fastft_jax import FastLanguageModel
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import lora

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-4  # float32 on both sides
IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 24))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One untied model with biases everywhere, one tied."""
    return {
        name: tiny.save(tiny.make_model(name), tmp_path_factory.mktemp(name))
        for name in ("llama-biases", "llama-3.2-tied", "qwen-1.5")
    }


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", "load_in_4bit": False, **options})[0]


def randomise(model) -> None:
    """Give every trained leaf other values, so that it shows whether it is used."""
    rng = np.random.default_rng(1)
    tensors = lora.trainable_tensors(model.decoder, model.names)
    moved = {n: np.asarray(v) + rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in tensors.items()}
    lora.set_trainable_tensors(model.decoder, model.names, moved)


def peft_logits(base, adapter) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


VARIANTS = {
    "all-linear": ("llama-biases", dict(target_modules="all-linear")),
    "two-modules": ("llama-biases", dict(target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5)),
    "expression": ("llama-biases", dict(target_modules=r".*\.(0|2)\.self_attn\.[qv]_proj")),
    "rslora": ("qwen-1.5", dict(use_rslora=True, r=8, lora_alpha=4)),
    "layers": ("qwen-1.5", dict(layers_to_transform=[0, 2])),
    "bias-all": ("llama-biases", dict(bias="all", target_modules=["q_proj"])),
    "bias-lora-only": ("llama-biases", dict(bias="lora_only", target_modules=["q_proj", "up_proj"])),
    "bias-lora-only-layers": ("llama-biases", dict(bias="lora_only", layers_to_transform=[1])),
    "bias-all-layers": ("llama-biases", dict(bias="all", target_modules=["q_proj"], layers_to_transform=[1])),
    "saved-modules": ("qwen-1.5", dict(modules_to_save=["embed_tokens", "lm_head"])),
    "tied-saved-embedding": ("llama-3.2-tied", dict(modules_to_save=["embed_tokens"])),
    "tied-saved-head": ("llama-3.2-tied", dict(modules_to_save=["lm_head"])),
    "random-start": ("qwen-1.5", dict(init_lora_weights=False)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_saved_here_gives_the_same_logits_in_peft_and_comes_back_equal(variant, folders, tmp_path):
    base, options = VARIANTS[variant]
    model = FastLanguageModel.get_peft_model(load(folders[base]), **{"r": 4, "lora_alpha": 6, **options})
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    ours = np.asarray(model(IDS))
    np.testing.assert_allclose(ours, peft_logits(folders[base], tmp_path / "adapter"), atol=TOLERANCE, rtol=0)
    again = load(tmp_path / "adapter")
    np.testing.assert_array_equal(np.asarray(again(IDS)), ours)
    again.save_pretrained(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    assert "equal to the bit" in model.verify_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("variant", ["all-linear", "layers", "bias-lora-only", "saved-modules", "tied-saved-embedding"])
def test_trainable_parameters_are_as_many_as_in_peft(variant, folders, capsys):
    import transformers

    base, options = VARIANTS[variant]
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    model = FastLanguageModel.get_peft_model(load(folders[base]), **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[base])
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trainable, total = theirs.get_nb_trainable_parameters()
    if variant == "saved-modules":
        # PEFT keeps the frozen originals of embedding and head beside the trained copies; here there are none
        total -= 2 * tiny.COMMON["vocab_size"] * tiny.COMMON["hidden_size"]
    assert model.num_parameters() == (trainable, total)
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: {total:,d} ||")


def test_a_fresh_adapter_changes_nothing_and_starts_as_peft_says(folders):
    model = load(folders["qwen-1.5"])
    before = np.asarray(model(IDS))
    model = FastLanguageModel.get_peft_model(model, r=8, target_modules="all-linear")
    np.testing.assert_array_equal(np.asarray(model(IDS)), before)
    for name, value in lora.trainable_tensors(model.decoder, model.names).items():
        if name.endswith("lora_A.weight"):
            bound = 1 / np.sqrt(value.shape[1])  # kaiming-uniform with a = sqrt(5)
            assert 0.9 * bound < np.abs(value).max() <= bound
            assert abs(float(value.std()) - bound / np.sqrt(3)) < 0.15 * bound
        else:
            assert not np.asarray(value).any()
        assert value.dtype == jnp.float32


def test_random_state_alone_decides_the_start(folders):
    def first(seed):
        model = FastLanguageModel.get_peft_model(load(folders["qwen-1.5"]), random_state=seed)
        return np.asarray(next(iter(lora.trainable_tensors(model.decoder, model.names).values())))

    np.testing.assert_array_equal(first(1), first(1))
    assert (first(1) != first(2)).any()


def test_what_cannot_be_meant_is_refused_by_name(folders):
    for options, word in [
        (dict(r=0), "r=0"),
        (dict(lora_dropout=1.0), "lora_dropout"),
        (dict(bias="some"), "bias"),
        (dict(target_modules=["q_prj"]), "q_proj"),
        (dict(target_modules=["q_proj", "v_prj"]), "v_prj"),
        (dict(modules_to_save=["o_proj"]), "o_proj"),
        (dict(use_gradient_checkpointing="sometimes"), "use_gradient_checkpointing"),
        (dict(layers_to_transform=[7]), "layers_to_transform"),
    ]:
        with pytest.raises((ConfigError, NotImplementedError), match=word):
            FastLanguageModel.get_peft_model(load(folders["qwen-1.5"]), **options)
    with pytest.raises(ConfigError, match="take one"):
        load(folders["qwen-1.5"], load_in_8bit=True, full_finetuning=True)
    model = FastLanguageModel.get_peft_model(load(folders["qwen-1.5"]))
    with pytest.raises(ConfigError, match="adapter already"):
        FastLanguageModel.get_peft_model(model)
    with pytest.raises(ConfigError, match="get_peft_model"):
        load(folders["qwen-1.5"]).save_pretrained("nowhere")
    with pytest.raises(ValueError, match="vocabulary"):
        model(np.array([[10_000]]))


def test_an_adapter_whose_base_is_gone_or_of_another_size_says_so(folders, tmp_path):
    model = FastLanguageModel.get_peft_model(load(folders["qwen-1.5"]), r=4)
    model.name_or_path = model.peft_config["base_model_name_or_path"] = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="gone"):
        load(tmp_path / "a")
    model.peft_config["base_model_name_or_path"] = str(folders["llama-3.2-tied"])
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(CheckpointError, match="shape"):
        load(tmp_path / "b")


def test_a_saved_adapter_that_was_altered_does_not_pass_for_what_was_trained(folders, tmp_path):
    model = FastLanguageModel.get_peft_model(load(folders["qwen-1.5"]), r=4)
    model.save_pretrained(tmp_path)
    randomise(model)
    with pytest.raises(CheckpointError, match="not what was trained"):
        model.verify_adapter(tmp_path)


def test_reading_back_compares_what_the_file_says_and_not_the_live_model_with_itself(folders, tmp_path):
    model = FastLanguageModel.get_peft_model(load(folders["qwen-1.5"]), r=4, lora_alpha=4, bias="all")
    randomise(model)
    model.save_pretrained(tmp_path)
    before = np.asarray(model(IDS))
    assert "difference| 0.0" in model.verify_adapter(tmp_path)
    np.testing.assert_array_equal(np.asarray(model(IDS)), before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(CheckpointError, match="logits differ"):
        model.verify_adapter(tmp_path)
