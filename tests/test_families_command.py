"""The table of families: made from the code, true to the released configs, and to what the operations choose."""

import dataclasses
import runpy

import jax
import jax.numpy as jnp
from released import RELEASED

from fastft_jax import families
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.families.examples import EXAMPLES
from fastft_jax.models.families.registry import FAMILIES, config_from_hf
from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.glu import glu
from fastft_jax.pallas_kernels.rms_norm import rms_norm


def test_every_family_has_an_example_and_it_is_the_released_model():
    assert set(EXAMPLES) == set(FAMILIES), "put a released model into models/families/examples.py"

    def plain(values):
        config = config_from_hf(values)[0]
        no_factors = dataclasses.replace(config.rope, long_factor=None, short_factor=None)
        return dataclasses.replace(config, rope=no_factors)

    for model_type, example in EXAMPLES.items():
        assert example.values["model_type"] == model_type
        assert plain(example.values) == plain(RELEASED[example.name][0]), model_type


def test_the_readmes_table_is_what_the_code_says(repo):
    script = runpy.run_path(str(repo / "scripts" / "write_families_table.py"))
    text = (repo / "README.md").read_text()
    assert text == script["page"](text), "run python scripts/write_families_table.py"


def kernels(card):
    return {name: families.kernels_of(EXAMPLES[name].values, families.CARDS[card]) for name in FAMILIES}


def test_kernels_and_reasons_on_cards_that_are_not_here():
    h100, a100, l4, cpu = map(kernels, ("h100", "a100", "l4", "cpu"))
    assert {active.name for active in h100["llama"].values()} == {"cudnn", "triton", "yes"}
    assert not any(active.why for active in h100["llama"].values())
    assert h100["gemma2"]["attention"] == ("triton", ("cuDNN attention has no logit softcap",))
    assert h100["gemma"]["attention"].name == "cudnn" and "head_dim 256" in a100["gemma"]["attention"].why[0]
    assert h100["llama"]["packed"].name == "cudnn" and "9.0 (Hopper)" in a100["llama"]["packed"].why[0]
    assert (a100["llama"]["fp8"].name, l4["llama"]["fp8"].name) == ("no", "yes")
    assert h100["phi"]["mlp"].name == "xla" and h100["phi"]["norms"].why and not h100["llama"]["norms"].why
    latent, why = h100["deepseek_v3"]["attention"]
    assert latent == "cudnn" and why == ("values of width 128 are filled up with zeros to 192",)
    assert (
        a100["deepseek_v3"]["attention"].name == "triton" and "head_dim 192" in a100["deepseek_v3"]["attention"].why[0]
    )
    assert "2 GiB" in h100["cohere"]["nf4"].why[0]  # 40 matrices [22528, 8192] are 3.7 GB of codes
    for active in cpu.values():
        assert {each.name for each in active.values()} == {"xla", "emulated"} and all(
            each.why for each in active.values()
        )


def test_operations_do_choose_what_the_table_says_of_a_gpu():
    """Traced by the operations' own choice: a kernel is called, or not."""
    x, weight = jnp.ones((4, 64), jnp.bfloat16), jnp.ones(64, jnp.bfloat16)
    for operation in (lambda: rms_norm(x, weight, eps=1e-6), lambda: glu(x)):
        for gpu in (True, False):
            with pallas.imagine(gpu):
                text = str(jax.make_jaxpr(lambda op=operation: op())())
            assert ("pallas_call" in text) == gpu


def test_the_command_prints_tables_and_refuses_unknown_names(repo, capsys):
    assert families.main(["gemma2", "phi", "--card", "l4", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| gemma2 | Gemma 2 | gemma-2-9b | RMSNorm by 1 + w;" in out and "Kernels on l4" in out
    assert "| phi | cudnn | triton (" in out and "\n1. cuDNN attention has no logit softcap" in out
    assert families.main(["llama"]) == 0  # the device that is here
    assert f"Kernels on {jax.local_devices()[0].device_kind}" in capsys.readouterr().out
    assert families.main(["--config", str(repo / "examples" / "tiny-base" / "config.json"), "--card", "h200"]) == 0
    assert "tiny-base" in capsys.readouterr().out
    assert families.main(["--config", str(repo / "README.md")]) == 2 and "config.json" in capsys.readouterr().err
    assert families.main(["gpt2"]) == 2 and "no family gpt2" in capsys.readouterr().err


def test_the_contributors_guide_quotes_a_real_family_and_knows_every_field(repo):
    guide = (repo / "docs" / "adding_a_family.md").read_text()
    quoted = guide.split("```python\n")[1].split("```")[0]
    title, code = quoted.split("\n", 1)
    assert code == (repo / title.removeprefix("# ")).read_text()
    sizes = {f.name for f in dataclasses.fields(DecoderConfig) if f.default is dataclasses.MISSING}
    missing = [f.name for f in dataclasses.fields(DecoderConfig) if f.name not in sizes and f"`{f.name}`" not in guide]
    assert not missing, f"docs/adding_a_family.md does not say what {missing[0]} is"
