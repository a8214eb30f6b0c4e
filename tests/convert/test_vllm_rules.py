"""What vLLM would refuse of an adapter: its rules, as facts of its 0.33 reader, one by one."""

import pytest

from fastft_jax.convert import peft
from fastft_jax.convert.peft.vllm import serving_rank, vllm_refusals

LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
PLAIN = [f"{LORA}A.weight", f"{LORA}B.weight"]
SERVED = "all7 basic bf16 embed_lora layers_1_3 patterns rslora".split()
REFUSED = {"dora": "use_dora", "modules_to_save": "embed_tokens", "norms_saved": "input_layernorm"}


def config(**options):
    return peft.adapter_config(
        **{"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": None, **options}
    )


@pytest.mark.parametrize("name", [*SERVED, *REFUSED])
def test_the_golden_adapters_are_served_or_refused_as_vllm_s_own_reader_did(shared_data, name):
    refusals = vllm_refusals(*peft.read_adapter(shared_data / "peft" / name))
    assert bool(refusals) == (name in REFUSED)
    assert all(REFUSED[name] in reason for reason in refusals)


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(bias="all"), "bias='all'"),
        (dict(modules_to_save=["lm_head"]), "lm_head"),
        (dict(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
        (dict(init_lora_weights="olora"), "olora"),
        (dict(r=1024), "rank 1024"),
        (dict(rank_pattern={"q_proj": 600}), "rank 600"),
    ],
)
def test_each_option_that_it_has_no_place_for_is_named(options, word):
    assert vllm_refusals(config(), PLAIN) == []
    [reason] = vllm_refusals(config(**options), PLAIN)
    assert word in reason


@pytest.mark.parametrize("key", ["lora_bias", "trainable_token_indices"])
def test_options_that_only_other_trainers_set_are_named(key):
    [reason] = vllm_refusals(config() | {key: True}, PLAIN)
    assert key in reason


@pytest.mark.parametrize(
    "name", [f"{LORA}magnitude_vector", f"{LORA}B.bias", "base_model.model.model.norm.weight", "running_mean"]
)
def test_tensors_that_its_config_does_not_mention_are_found(name):
    [reason] = vllm_refusals(config(), [*PLAIN, name])
    assert repr(name) in reason


def test_the_rank_to_serve_with_is_the_next_that_vllm_takes():
    assert vllm_refusals(config(modules_to_save=["score"], r=17, use_rslora=True), PLAIN, max_lora_rank=32) == []
    assert "max_lora_rank=16" in vllm_refusals(config(r=17), PLAIN, max_lora_rank=16)[0]
    assert [serving_rank(config(r=r)) for r in (1, 8, 9, 300, 513)] == [1, 8, 16, 320, None]
    assert serving_rank(config(rank_pattern={"q_proj": 40})) == 64
