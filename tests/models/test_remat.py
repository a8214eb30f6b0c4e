"""What the backward pass keeps or recomputes changes memory, never the loss or a gradient."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx

from fastft_jax.errors import ConfigError
from fastft_jax.models.remat import POLICIES, RESIDUAL_NAMES, parts, resolve_policy
from fastft_jax.trainers.compile import compile_fitting
from fastft_jax.trainers.step import LossOptions, gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")
USERS_TABLE = {"q": "save", "attn_out": "save", "gate_up": 0.3, "v": "recompute", "layer_input": "offload"}


@pytest.fixture(scope="module")
def compiled_with(tmp_path_factory):
    """`compiled_with(policy)`: (loss, gradients, the compiled program), of 8 layers with dropout and packed rows."""
    folder = tiny_run.save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=8)
    model = tiny_run.load(folder, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    batch, source = tiny_run.whole(tiny_run.documents([40, 20, 33, 12, 50, 61]), packing=True)
    batch = {name: value[None] for name, value in batch.items()}
    key = jax.random.key(0)
    jitted = jax.jit(gradients, static_argnums=(0, 4))
    done = {}

    def run(policy):
        if policy not in done:
            options = LossOptions(policy=policy, chunk_size=64, max_segments=source.max_segments)
            program = jitted.lower(definition, trainable, frozen, batch, options, key).compile()
            done[policy] = (*program(trainable, frozen, batch, key), program)
        return done[policy]

    return run


@pytest.mark.parametrize("policy", ["selective", "full", "offload", resolve_policy(USERS_TABLE)], ids=str)
def test_every_policy_has_the_loss_and_gradients_of_none(compiled_with, policy):
    loss, grads, _ = compiled_with("none")
    other_loss, other_grads, _ = compiled_with(policy)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True):
        assert np.abs(a).max() > 0
        # the same operations in the same precision; XLA may fuse them otherwise
        atol = 1e-6 * max(1.0, float(np.linalg.norm(a)))
        np.testing.assert_allclose(b, a, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_the_leaner_the_policy_the_less_memory(compiled_with):
    temp = {name: compiled_with(name)[2].memory_analysis().temp_size_in_bytes for name in ("none", "selective", "full")}
    assert temp["full"] < temp["selective"] < temp["none"]
    one_layers_input = 4 * 64 * 64 * 4  # B T D in float32
    assert temp["none"] - temp["full"] > 7 * 5 * one_layers_input  # at least q, k, v, gate and up of all but one layer


def program(size: int):
    return SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=100, output_size_in_bytes=60, alias_size_in_bytes=60, temp_size_in_bytes=size
        )
    )


@pytest.mark.parametrize(
    "limit, chosen, tried",
    [
        (None, "none", ["none"]),
        (1100, "none", ["none"]),
        (1099, "selective", ["none", "selective"]),
        (150, "offload", ["none", "selective", "offload"]),
        (1, "offload", ["none", "selective", "offload"]),  # the last resort, fitting or not
    ],
)
def test_auto_takes_the_first_policy_that_fits(limit, chosen, tried):
    sizes = {"none": 1000, "selective": 500, "offload": 50}
    made = []

    def make(policy):
        made.append(policy)
        return program(sizes[policy])

    policy, compiled = compile_fitting(make, "auto", limit)
    assert (policy, made) == (chosen, tried)
    assert compiled.memory_analysis().temp_size_in_bytes == sizes[chosen]


def test_a_named_policy_is_taken_whether_it_fits_or_not():
    assert compile_fitting(lambda policy: program(10**9), "selective", 1)[0] == "selective"


@pytest.mark.parametrize(
    "written, means",
    [(True, "full"), (False, "none"), ("unsloth", "offload"), ("true", "full"), ("false", "none"), ("auto", "auto")],
)
def test_what_users_of_unsloth_and_peft_write(written, means):
    assert resolve_policy(written) == means


@pytest.mark.parametrize("name", [*POLICIES])
def test_policy_names_mean_themselves(name):
    assert resolve_policy(name) == name
    assert set(POLICIES[name]) <= set(RESIDUAL_NAMES)


def test_a_share_is_of_the_last_layers():
    table = {"gate_up": 0.25, "q": 0.5, "k": "save", "layer_input": "recompute"}
    always = {"k": "save", "layer_input": "save", "routing": "save"}
    assert parts(resolve_policy(table), 8) == (
        (0, 4, always | {"q": "recompute", "gate_up": "recompute"}),
        (4, 6, always | {"q": "save", "gate_up": "recompute"}),
        (6, 8, always | {"q": "save", "gate_up": "save"}),
    )
    always.pop("k")
    assert parts(resolve_policy({"q": 0.1}), 3) == ((0, 3, always | {"q": "recompute"}),)
    assert parts("full", 3) == parts(resolve_policy({"routing": "recompute"}), 3) == ((0, 3, always),)


WRONG = ["gradient", None, {"q": "keep"}, {"queries": "save"}, ["q"], {"q": 1.5}, {"q": True}, {"layer_input": 0.5}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_anything_else_is_a_config_error_that_lists_the_choices(wrong):
    with pytest.raises(ConfigError, match="use_gradient_checkpointing.*(selective|mid_residual)"):
        resolve_policy(wrong)
