"""Adapter folders against PEFT itself: configs, bytes and names, and every way in which a folder can be broken."""

import json
import os
import re
import warnings

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import pytest
import safetensors.numpy

from fastft_jax.convert import peft as ours
from fastft_jax.convert.peft.names import current_names
from fastft_jax.convert.safetensors import SafetensorsFile, write_safetensors
from fastft_jax.errors import CheckpointError, ConfigError

FIXTURES = "all7 basic bf16 dora embed_lora layers_1_3 modules_to_save norms_saved patterns rslora".split()


def tiny_qwen2():
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


# --- the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURES)
def test_an_adapter_written_by_peft_is_read_and_written_again_byte_for_byte(shared_data, tmp_path, name):
    folder = shared_data / "peft" / name
    config, tensors = ours.read_adapter(folder)
    theirs = SafetensorsFile(folder / "adapter_model.safetensors")
    assert list(tensors) == list(theirs.tensors)
    ours.write_adapter(tmp_path / "new", config, tensors)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "new" / file).read_bytes() == (folder / file).read_bytes()
    assert sorted(os.listdir(tmp_path / "new")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", FIXTURES)
def test_nothing_is_unsupported_in_an_ordinary_adapter(shared_data, name):
    assert ours.unsupported(*ours.read_adapter(shared_data / "peft" / name)) == []


OPTIONS = [
    dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    dict(r=4, lora_alpha=8.5, target_modules=["v_proj"], lora_dropout=0.05, bias="all", use_rslora=True),
    dict(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], revision="main"),
    dict(r=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[3, 1], layers_pattern="layers"),
    dict(r=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=2, layers_pattern=["layers", "h"]),
    dict(r=4, lora_alpha=8, target_modules=r".*\.q_proj", exclude_modules=["model.layers.0.self_attn.q_proj"]),
    dict(r=4, lora_alpha=8, target_modules=["k_proj"], exclude_modules=".*0.*", init_lora_weights="gaussian"),
    dict(r=4, lora_alpha=8, target_modules=["o_proj"], init_lora_weights=False, task_type=None),
    dict(
        r=4,
        lora_alpha=8,
        target_modules=["o_proj"],
        rank_pattern={"o_proj": 2},
        alpha_pattern={"1.x": 3},
        use_dora=True,
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_the_config_has_all_41_keys_as_peft_writes_them(tmp_path, options):
    import peft

    settings = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", **options})
    settings.inference_mode = True  # as PeftModel.save_pretrained sets it
    settings.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    theirs = json.loads(text)
    config = ours.adapter_config(base_model_name_or_path="org/base", **options)
    assert len(config) == 41 and list(theirs) == sorted(config)

    # PEFT keeps these two as sets, whose order is accidental; ours is sorted. All the rest is equal text.
    for key in ("target_modules", "exclude_modules"):
        if isinstance(theirs[key], list):
            assert config[key] == sorted(theirs[key])
            theirs[key] = config[key]
    assert json.dumps(config, indent=2, sort_keys=True) == json.dumps(theirs, indent=2)
    assert peft.__version__ == config["peft_version"] == theirs["peft_version"]


def small_adapter(rank=4, module="model.layers.0.self_attn.q_proj"):
    rng = np.random.default_rng(0)
    a, b = ours.lora_names(module)
    tensors = {a: rng.normal(size=(rank, 16)).astype("f"), b: rng.normal(size=(16, rank)).astype("f")}
    config = ours.adapter_config(
        r=rank, lora_alpha=8, target_modules=["q_proj"], base_model_name_or_path='/models/a "b"'
    )
    return config, tensors


def test_peft_loads_what_we_write_and_its_update_is_the_formulas(tmp_path):
    import peft
    import torch

    config, tensors = small_adapter()
    config["use_rslora"] = True
    ours.write_adapter(tmp_path / "adapter", config, tensors)
    model = peft.PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "adapter")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = (torch.from_numpy(tensors[name]) for name in ours.lora_names("model.layers.0.self_attn.q_proj"))
    # 1e-6: one product of the same float32 numbers in another order
    torch.testing.assert_close(layer.get_delta_weight("default"), 8 / 4**0.5 * b @ a, rtol=1e-6, atol=1e-6)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "/models/a \\"b\\""\nlibrary_name: peft\n')


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_have_the_names_that_peft_gives_them_and_peft_loads_them(tmp_path, bias):
    """Qwen2 has biases on q, k, v; with q and o adapted, "all" saves three a layer and "lora_only" q's alone."""
    import peft
    import torch

    model = peft.get_peft_model(
        tiny_qwen2(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "o_proj"], bias=bias)
    )
    model.save_pretrained(tmp_path / "theirs")
    config, tensors = ours.read_adapter(tmp_path / "theirs")
    wanted = {"all": ("q_proj", "k_proj", "v_proj"), "lora_only": ("q_proj",)}[bias]
    expected = {
        ours.bias_name(f"model.layers.{layer}.self_attn.{leaf}", adapted=leaf == "q_proj")
        for layer in range(2)
        for leaf in wanted
    }
    assert {name for name in tensors if name.endswith("bias")} == expected
    assert ours.unsupported(config, tensors) == []

    changed = {name: array + 1 if name in expected else array for name, array in tensors.items()}
    ours.write_adapter(tmp_path / "ours", config, changed)
    state = peft.PeftModel.from_pretrained(tiny_qwen2(), tmp_path / "ours").state_dict()
    for name in expected:
        assert torch.equal(state[name], torch.from_numpy(changed[name]))


def test_whole_modules_have_the_names_that_peft_gives_them(tmp_path):
    import peft

    model = peft.get_peft_model(
        tiny_qwen2(),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    )
    model.save_pretrained(tmp_path)
    _, tensors = ours.read_adapter(tmp_path)
    saved = {name for name in tensors if "lora_" not in name}
    assert saved == {ours.saved_name("model.embed_tokens"), ours.saved_name("lm_head")}
    paths = ["model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"]
    assert ours.match_saved_modules(["lm_head", "embed_tokens"], paths) == ["model.embed_tokens", "lm_head"]
    with pytest.raises(ConfigError, match=r"modules_to_save: no module is called 'lm_heat' \(did you mean lm_head\?\)"):
        ours.match_saved_modules(["lm_heat"], paths)


def test_names_parse_back_to_module_and_kind():
    path = "model.layers.3.mlp.weight"  # a module may itself be called like a kind
    a, b = ours.lora_names(path)
    assert ours.parse_name(a) == (path, "lora_A.weight") and ours.parse_name(b) == (path, "lora_B.weight")
    assert ours.parse_name(ours.saved_name(path)) == (path, "weight")
    assert ours.parse_name(ours.bias_name(path, adapted=True)) == (path, "base_layer.bias")
    assert ours.parse_name(ours.bias_name(path, adapted=False)) == (path, "bias")
    assert ours.parse_name("model.layers.0.weight") is None
    assert ours.parse_name("base_model.model.x.running_mean") is None


def test_older_spellings_are_read_as_what_they_are_called_today(tmp_path):
    """An adapter's name inside, wrappers of modules_to_save, a base weight from before `base_layer`, no prefix."""
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    today = {
        f"{layer}.lora_A.weight": f"{layer}.lora_A.default.weight",
        f"{layer}.lora_B.weight": f"{layer}.lora_B.default.weight",
        f"{layer}.lora_magnitude_vector": f"{layer}.lora_magnitude_vector.default.weight",
        f"{layer}.base_layer.bias": f"{layer}.bias",
        "base_model.model.lm_head.weight": "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.norm.weight": "base_model.model.model.norm.modules_to_save.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A": "model.embed_tokens.lora_embedding_A.default",
        "base_model.model.model.embed_tokens.lora_embedding_B": "model.embed_tokens.lora_embedding_B.default",
        "base_model.model.model.embed_tokens.base_layer.weight": "base_model.model.model.embed_tokens.weight",
    }
    left_out = ["base_model.model.lm_head.original_module.weight"]
    assert current_names([*today.values(), *left_out]) == today
    assert current_names(today) == {name: name for name in today}
    folder = tmp_path / "adapter"
    ours.write_adapter(folder, *small_adapter())
    _, tensors = small_adapter()
    old = {name.replace("lora_A", "lora_A.default"): value for name, value in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", old)
    assert ours.read_adapter(folder)[1].keys() == tensors.keys()


# --- what cannot be read -------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    ours.write_adapter(folder, *small_adapter())
    return folder


def set_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        ours.read_adapter(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path, adapter):
    refused(tmp_path / "absent", "is not a folder")
    (tmp_path / "model").mkdir()
    refused(tmp_path / "model", "has no adapter_config.json")
    (adapter / "adapter_config.json").write_text('{"r": 4}')
    refused(adapter, "no peft_type")
    (adapter / "adapter_config.json").write_text("{")
    refused(adapter, "not valid JSON")


def test_another_kind_of_adapter_is_refused(adapter):
    set_config(adapter, peft_type="IA3")
    refused(adapter, "peft_type is 'IA3'; only LORA")


def test_missing_pickled_and_truncated_tensors_are_told_apart(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(adapter, "truncated")
    file.unlink()
    refused(adapter, "has no adapter_model.safetensors: the adapter is incomplete")
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    refused(adapter, "safetensors only; convert with scripts/convert_bin_to_safetensors.py")


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"r": 0}, "r must be"),
        ({"r": "4"}, "r must be"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"bias": "some"}, "bias"),
    ],
)
def test_a_config_with_a_senseless_value_is_refused(adapter, changes, word):
    set_config(adapter, **changes)
    refused(adapter, word)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "q_proj has lora_B alone"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj has lora_A alone"),
        (lambda t: t.update({f"{Q}.lora_B.weight": np.zeros((16, 3), "f")}), r"lora_A \[4, 16\] and lora_B \[16, 3\]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((4, 0), "f")}), r"lora_A \[4, 0\]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.zeros(4, "f")}), r"lora_A \[4\]"),
        (lambda t: t.update({"x": np.zeros(1)}), "'x' is not a name"),
        (lambda t: t.update({f"{Q}.lora_A.default.weight": np.zeros(4, "f")}), "two spellings of one tensor"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(adapter, change, word):
    _, tensors = small_adapter()
    change(tensors)
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    refused(adapter, word)


def test_a_rank_other_than_the_configs_is_refused_unless_a_pattern_explains_it(adapter):
    set_config(adapter, r=8)
    refused(adapter, "q_proj has rank 4, the config says r=8")
    set_config(adapter, rank_pattern={"q_proj": 2})
    refused(adapter, "q_proj has rank 4, its rank_pattern says r=2")
    set_config(adapter, rank_pattern={"(": 2})
    refused(adapter, "is not a regular expression")
    set_config(adapter, rank_pattern={"self_attn.q_proj": 4})
    assert ours.read_adapter(adapter)[0]["r"] == 8


@pytest.mark.parametrize(
    "key, value",
    [
        ("trainable_token_indices", {"lm_head": [1]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 1]]),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"a": 1}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("modules_to_save", ["score"]),
        ("key_of_a_later_peft", "on"),
    ],
)
def test_every_key_that_changes_the_maths_is_refused_by_name(adapter, key, value):
    set_config(adapter, **{key: value})
    shown = "'score'" if key == "modules_to_save" else repr(value)
    with pytest.raises(NotImplementedError, match=re.escape(f"{key}={shown}")):
        ours.read_adapter(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"key_of_a_later_peft": None},
        {"key_of_a_later_peft": False},
        {"loftq_config": None, "alpha_pattern": None},
        {"modules_to_save": ["model.embed_tokens", "lm_head"]},
    ],
)
def test_keys_that_leave_the_maths_alone_are_accepted(adapter, changes):
    set_config(adapter, **changes)
    ours.read_adapter(adapter)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "pissa", "olora"])
def test_the_accepted_inits_leave_peft_s_base_weights_alone_and_the_refused_ones_do_not(init):
    """The reason why a trained adapter with one of the former needs nothing but its own tensors."""
    import peft
    import torch

    base = tiny_qwen2()
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init, **config)
        )
    after = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(before, after) == (init in ("gaussian", "orthogonal", "eva"))


def test_a_config_of_an_older_peft_gets_the_keys_it_lacks(adapter):
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "enable_lora": None}
    (adapter / "adapter_config.json").write_text(json.dumps(written))
    config, _ = ours.read_adapter(adapter)
    assert len(config) == 42 and config["use_rslora"] is False and config["bias"] == "none"
    config["rank_pattern"]["x"] = 1  # a caller's change must not leak into the next config
    assert ours.read_adapter(adapter)[0]["rank_pattern"] == {}


# --- writing over what is there ------------------------------------------------------------------------------------


def test_an_adapter_is_replaced_only_when_asked_and_other_files_stay(adapter):
    (adapter / "metrics.jsonl").write_text("kept")
    (adapter / "README.md").write_text("the user's own")
    config, tensors = small_adapter(rank=2)
    with pytest.raises(CheckpointError, match="already holds an adapter"):
        ours.write_adapter(adapter, config, tensors)
    ours.write_adapter(adapter, config, tensors, overwrite=True)
    assert ours.read_adapter(adapter)[0]["r"] == 2
    assert (adapter / "metrics.jsonl").read_text() == "kept" and (adapter / "README.md").read_text() == "the user's own"
    assert len(list(adapter.iterdir())) == 4


def test_a_folder_with_other_files_takes_an_adapter(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    ours.write_adapter(tmp_path, *small_adapter())
    assert ours.read_adapter(tmp_path)[0]["r"] == 4
    with pytest.raises(CheckpointError, match="is not a folder"):
        ours.write_adapter(tmp_path / "metrics.jsonl", *small_adapter())


class Killed(BaseException):
    """Stands for the process's death: nothing after it runs but what `finally` undoes."""


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("step", range(12))
def test_interrupted_at_any_step_the_folder_is_the_old_adapter_or_the_new_one_or_refused(
    adapter, monkeypatch, step, rank
):
    """Every rename, unlink and fsync is a step; the old adapter has rank 4, so rank 2 also changes the config."""
    old = ours.read_adapter(adapter)[1]
    config, tensors = small_adapter(rank)
    tensors = {name: array + 1 for name, array in tensors.items()}
    calls = []

    def dying(real):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) == step + 1:
                raise Killed
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            ours.write_adapter(adapter, config, tensors, overwrite=True)
        except Killed:
            pass
    try:
        _, found = ours.read_adapter(adapter)
    except CheckpointError as error:
        assert rank == 2 and "has no adapter_config.json" in str(error)
        return
    assert any(
        found.keys() == want.keys() and all(np.array_equal(found[name], want[name]) for name in want)
        for want in (old, tensors)
    )


def test_a_full_disk_leaves_the_old_adapter_untouched(adapter, monkeypatch):
    from fastft_jax.convert import atomic

    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match="the disk has 10 left"):
        ours.write_adapter(adapter, *small_adapter(2), overwrite=True)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    with pytest.raises(CheckpointError):
        ours.write_adapter(adapter.parent / "new", *small_adapter(2))
    assert os.listdir(adapter.parent) == ["adapter"]


def test_peft_s_bytes_come_from_the_safetensors_library_as_ours_do(adapter, tmp_path):
    _, tensors = ours.read_adapter(adapter)
    safetensors.numpy.save_file(tensors, tmp_path / "x", {"format": "pt"})
    assert (adapter / "adapter_model.safetensors").read_bytes() == (tmp_path / "x").read_bytes()
