"""Which modules a target selects: our matching against PEFT's own, on a tiny Llama."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft_jax.convert import peft as ours
from fastft_jax.errors import ConfigError


@pytest.fixture(scope="module")
def llama():
    """Twelve layers on the meta device: names and classes without weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2, vocab_size=16)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def linear_paths(model):
    import torch

    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FRAGMENTS = [
    *LEAVES,
    "lm_head",
    "self_attn.q_proj",
    "layers.1.mlp.down_proj",
    "model.layers.2.self_attn.k_proj",
    "1.mlp.up_proj",
    "proj",
    "no_such_module",
]
PATTERNS = [r".*\.q_proj", r"model\.layers\.(1|2)\..*_proj", r".*(mlp|lm_head).*_proj", "q_proj", r".*head", "nothing"]
specs = st.fixed_dictionaries(
    {"target_modules": st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4, unique=True)},
    optional={
        "exclude_modules": st.one_of(
            st.lists(st.sampled_from(FRAGMENTS), max_size=2), st.sampled_from([r".*\.1\..*", "", r".*proj"])
        ),
        "layers_to_transform": st.one_of(
            st.integers(0, 12), st.lists(st.integers(0, 12), max_size=4), st.just([0, 1, 2, 3, 10, 11])
        ),
        "layers_pattern": st.sampled_from([None, "layers", ["h", "layers"], ["layers", "h"], "blocks", "layer.", []]),
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "embed_tokens", "mlp", "norm"]), max_size=2),
    },
)
string_specs = st.fixed_dictionaries(
    {"target_modules": st.sampled_from([*PATTERNS, "all-linear", "All-Linear"])},
    optional={
        "exclude_modules": st.lists(st.sampled_from(FRAGMENTS), max_size=2),
        "modules_to_save": st.lists(st.sampled_from(["lm_head", "mlp"]), max_size=2),
    },
)


def theirs_matched(model, spec):
    """PEFT's own answer for each linear module, or None where it raises for want of a match."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import (
        _ExcludedModule,
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    config = _maybe_include_all_linear_layers(LoraConfig(**spec), model)
    found = []
    for path in linear_paths(model):
        result = check_target_module_exists(config, path)
        if result and not isinstance(result, _ExcludedModule):
            found.append(path)
    return found


@settings(max_examples=150, deadline=None)  # each takes 5 ms
@given(spec=st.one_of(specs, string_specs))
def test_targets_match_what_peft_matches(llama, spec):
    if spec.get("layers_pattern") and spec.get("layers_to_transform") is None:
        spec = {key: value for key, value in spec.items() if key != "layers_pattern"}  # both refuse it, tested below
    expected = theirs_matched(llama, spec)
    try:
        found = ours.match_targets(module_paths=linear_paths(llama), **spec)
    except ConfigError:
        found = []
    assert found == expected


@pytest.mark.parametrize(
    "spec",
    [
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.(1|2)\.mlp\..*_proj"},
    ],
)
def test_targets_match_what_peft_wraps_in_a_whole_model(llama, spec):
    import peft
    import torch

    with torch.device("meta"):
        wrapped = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(task_type="CAUSAL_LM", **spec))
    assert ours.match_targets(module_paths=linear_paths(llama), **spec) == list(wrapped.targeted_module_names)


@pytest.mark.parametrize(
    "spec",
    [
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    ],
)
def test_contradicting_options_are_refused_where_peft_refuses_them(llama, spec):
    from peft import LoraConfig

    with pytest.raises(ValueError):
        LoraConfig(**spec)
    with pytest.raises(ConfigError):
        ours.match_targets(module_paths=linear_paths(llama), **spec)


@pytest.mark.parametrize(
    "spec, word",
    [
        (
            {"target_modules": ["q_prj"]},
            r"\['q_prj'\] match no module \(did you mean q_proj\?\); the modules are down_pr",
        ),
        ({"target_modules": "v_proj"}, r"a string is an expression for the whole path, write \['v_proj'\]"),
        ({"target_modules": "(["}, "not a regular expression"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [99]}, r"no match is in layers_to_transform=\[99\]"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "every match is in exclude_modules"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": [3]}, "list of module names"),
        ({"target_modules": []}, "match no module"),
    ],
)
def test_a_target_without_a_match_says_what_there_is(llama, spec, word):
    with pytest.raises(ConfigError, match=word):
        ours.match_targets(module_paths=linear_paths(llama), **spec)


def test_entries_that_name_nothing_are_refused_by_name(llama):
    with pytest.raises(ConfigError, match="no module is called w1, c_attn"):
        ours.require_targets(["q_proj", "w1", "self_attn.v_proj", "c_attn"], linear_paths(llama))
    ours.require_targets(["q_proj", "self_attn.v_proj"], linear_paths(llama))
    ours.require_targets("all-linear", linear_paths(llama))


def test_all_linear_is_written_as_leaf_names_like_peft_does_for_a_model_of_many_layers(llama, tmp_path):
    import peft
    import torch

    paths = linear_paths(llama)
    matched = ours.match_targets("all-linear", paths)
    with torch.device("meta"):
        wrapped = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(target_modules="all-linear"))
    assert ours.condense_targets(matched, paths) == sorted(wrapped.peft_config["default"].target_modules)
    some = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert ours.condense_targets(some, paths) == sorted(some)  # leaf names would select all layers


@pytest.mark.parametrize(
    "pattern",
    [
        {"q_proj": 2},
        {"^model.layers.1.self_attn.q_proj": 6, "down_proj": 2},
        {"layers.1": 3, "1.mlp.down_proj": 4},
        {r"layers\.(0|1)\..*_proj": 5, "q_proj": 9},
        {"proj": 2, r".*\.mlp\..*": 7},
    ],
)
def test_a_module_s_rank_by_pattern_is_peft_s(pattern):
    from peft.utils.other import get_pattern_key

    for path in (f"model.layers.{i}.{m}" for i in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.down_proj")):
        assert ours.value_of(pattern, path, 8) == pattern.get(get_pattern_key(pattern.keys(), path), 8)
    assert ours.value_of(None, "model.layers.0.self_attn.q_proj", 8) == 8
