"""Optimizers, schedules, clipping and groups against torch, bitsandbytes and transformers."""

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from fastft_jax.errors import ConfigError
from fastft_jax.trainers import optim
from fastft_jax.trainers.adam_8bit import Moment
from fastft_jax.trainers.schedules import make_schedule

STEPS = 10
BIG, SMALL = (16, 300), (5, 7)  # above and below AdamW8bit's 4096 elements; 300 is no multiple of 256


def start(shapes=(BIG, SMALL)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"p{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}


def gradients(params, step: int, zeros: float = 0.1) -> dict[str, np.ndarray]:
    """Gradients of very different sizes, some of them zero."""
    rng = np.random.default_rng(step)
    sized = {k: rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-4, 0, p.shape) for k, p in params.items()}
    return {k: np.where(rng.random(g.shape) < zeros, 0, g).astype(np.float32) for k, g in sized.items()}


def ours(params, make_grads=gradients, steps=STEPS, stop_at=None, **options):
    """Every step's parameters and the last state; `stop_at` passes everything through numpy after that many steps."""
    transform, _ = optim.make_optimizer(learning_rate=1e-2, total_steps=steps, **options)

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state, trajectory = transform.init(params), []
    for i in range(steps):
        if i == stop_at:
            params, state = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, (params, state)))
        params, state = step(params, state, make_grads(params, i))
        trajectory.append(jax.tree.map(np.asarray, params))
    return trajectory, state


def theirs(params, optimizer, scheduler=None, make_grads=gradients, steps=STEPS, clip=None):
    """`optimizer` makes a torch optimizer from a dict of parameters, `scheduler` a scheduler from that."""
    tensors = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    opt = optimizer(tensors)
    schedule = scheduler(opt) if scheduler else None
    trajectory = []
    for i in range(steps):
        for name, grad in make_grads(params, i).items():
            tensors[name].grad = torch.tensor(grad)
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        opt.step()
        if schedule:
            schedule.step()
        trajectory.append({k: v.detach().numpy().copy() for k, v in tensors.items()})
    return trajectory, opt, tensors


def assert_close(a, b, atol):
    for step, (p, q) in enumerate(zip(a, b, strict=True)):
        for name in p:
            np.testing.assert_allclose(p[name], q[name], rtol=0, atol=atol, err_msg=f"{name} after step {step}")


OPTIMIZERS = {
    "adamw": lambda p, wd: torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=wd),
    "adamw_torch": lambda p, wd: torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=wd),
    "sgd": lambda p, wd: torch.optim.SGD(p.values(), lr=1e-2, weight_decay=wd),
    "lion_32bit": lambda p, wd: bitsandbytes.optim.Lion(p.values(), lr=1e-2, betas=(0.9, 0.999), weight_decay=wd),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_follow_torch_step_by_step(name, weight_decay):
    expected, *_ = theirs(start(), lambda p: OPTIMIZERS[name](p, weight_decay))
    kept = {"lr_scheduler_type": "constant", "weight_decay": weight_decay, "max_grad_norm": None}
    trajectory, _ = ours(start(), optim=name, **kept)
    # ten roundings of parameters up to 4 (half an ulp is 2.4e-7);
    # optax's 1 - 0.999^t in float32 is off by 5e-5 of a step
    assert_close(trajectory, expected, 3e-6)


def test_adam_takes_its_betas_and_epsilon():
    expected, *_ = theirs(start(), lambda p: torch.optim.AdamW(p.values(), 1e-2, (0.8, 0.95), 1e-3, weight_decay=0.0))
    numbers = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3}
    trajectory, _ = ours(start(), lr_scheduler_type="constant", max_grad_norm=0.0, **numbers)
    assert_close(trajectory, expected, 3e-6)


@pytest.mark.parametrize("weight_decay, eps", [(0.0, 1e-8), (0.1, 1e-3)])
def test_adamw_8bit_follows_bitsandbytes_step_by_step(weight_decay, eps):
    def make(p):
        return bitsandbytes.optim.AdamW8bit(p.values(), lr=1e-2, weight_decay=weight_decay, eps=eps)

    expected, opt, tensors = theirs(start(), make)
    options = {"lr_scheduler_type": "constant", "weight_decay": weight_decay, "adam_epsilon": eps}
    trajectory, state = ours(start(), optim="adamw_8bit", max_grad_norm=None, **options)
    for a, b in zip(trajectory, expected, strict=True):
        np.testing.assert_allclose(a["p1"], b["p1"], rtol=0, atol=3e-6)  # float32 moments
        # A moment on the edge of two codes may fall to either side, as the last bit before it has it: one entry of the
        # map apart, at most about 7% of that one moment. All else is equal up to float32 rounding.
        off = np.abs(a["p0"] - b["p0"])
        assert np.mean(off > 3e-6) < 2e-3 and off.max() < 1e-2
    adam = state[1]
    for moments, key, number in ((adam.m, "state1", "absmax1"), (adam.v, "state2", "absmax2")):
        big = moments["['p0']"]
        codes, absmax = opt.state[tensors["p0"]][key], opt.state[tensors["p0"]][number]
        apart = np.abs(np.asarray(big.codes, np.int32).reshape(BIG) - codes.numpy())
        assert np.mean(apart > 0) < 2e-3 and apart.max() <= 1
        np.testing.assert_allclose(big.absmax[0], absmax, rtol=1e-5)


def test_adamw_8bit_treats_a_stack_of_layers_as_bitsandbytes_treats_the_layers():
    layers = {f"layer{i}": v for i, v in enumerate(start([(3, 2, 2100)])["p0"])}  # 4,200 = 16 blocks and a part each
    small = np.ones((9, 30, 30), np.float32)  # 8,100 elements, but 900 a layer: float32 moments
    expected, *_ = theirs(
        layers, lambda p: bitsandbytes.optim.AdamW8bit(p.values(), lr=1e-2, weight_decay=0.0), steps=4
    )

    def stacked(_, step):
        grads = gradients(layers, step)
        return {"stack": np.stack([grads[k] for k in layers]), "small": np.ones_like(small)}

    trajectory, state = ours(
        {"stack": np.stack(list(layers.values())), "small": small},
        stacked,
        4,
        optim="adamw_8bit",
        lr_scheduler_type="constant",
        max_grad_norm=None,
    )
    assert isinstance(state[1].m["['stack']"], Moment) and not isinstance(state[1].m["['small']"], Moment)
    for a, b in zip(trajectory, expected, strict=True):
        assert np.mean(np.abs(a["stack"] - np.stack([b[k] for k in layers])) > 3e-6) < 2e-3


def test_adamw_8bit_state_is_a_quarter_of_float32_and_a_plain_pytree_of_arrays():
    params = {"a": jnp.zeros((64, 1024)), "b": jnp.zeros((4096,))}
    transform, _ = optim.make_optimizer(learning_rate=1e-3, total_steps=3, optim="adamw_8bit")
    leaves = jax.tree.leaves(transform.init(params))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert sum(leaf.nbytes for leaf in leaves) < 0.26 * 2 * sum(4 * p.size for p in params.values())


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_follows_torch(max_norm):
    expected, *_ = theirs(start(), lambda p: torch.optim.SGD(p.values(), lr=1e-2), clip=max_norm)
    trajectory, _ = ours(start(), optim="sgd", lr_scheduler_type="constant", max_grad_norm=max_norm)
    assert_close(trajectory, expected, 3e-6)


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr": 2e-5},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
    "inverse_sqrt": {},
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_transformers_at_every_step(name, warmup):
    rate, total = 2e-4, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=SCHEDULES[name])
    expected = []
    for _ in range(total + 3):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    schedule = make_schedule(name, rate, total_steps=total, warmup_steps=warmup, lr_scheduler_kwargs=SCHEDULES[name])
    # float32 against Python's float64; near its zero a cosine loses the digits of 1 + cos, hence relative to the peak
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(np.arange(total + 3)), expected, rtol=1e-6, atol=3e-7 * rate)


def test_schedule_drives_the_updates_from_step_zero_as_transformers_does():
    def scheduler(opt):
        return transformers.get_scheduler("cosine", opt, 3, STEPS)

    expected, *_ = theirs(start(), lambda p: torch.optim.AdamW(p.values(), lr=1e-2, weight_decay=0.1), scheduler)
    trajectory, _ = ours(start(), lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.1, max_grad_norm=None)
    assert_close(trajectory, expected, 3e-6)


def test_embeddings_have_their_own_rate_and_biases_and_norms_no_decay():
    decayed, plain = ["layers.lora_A", "model.embed_tokens.weight"], ["layers.bias", "layers.k_norm.weight"]
    tree = {
        "layers": {"lora_A": np.ones((2, 3)), "bias": np.ones(3), "k_norm": {"weight": np.ones(3)}},
        "model": {"embed_tokens": {"weight": np.ones((2, 3))}},
    }
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    flat = {optim.leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert sorted(flat) == sorted(decayed + plain)

    def torch_groups(p):
        groups = [
            {"params": [p[n] for n in decayed[:1]], "weight_decay": 0.1},
            {"params": [p[n] for n in decayed[1:]], "weight_decay": 0.1, "lr": 1e-3},
            {"params": [p[n] for n in plain], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-2)

    def scheduler(opt):
        return transformers.get_scheduler("linear", opt, 0, 5)

    expected, *_ = theirs(flat, torch_groups, scheduler, steps=5)

    def nested(_, step):
        grads = gradients(flat, step)
        return jax.tree_util.tree_map_with_path(lambda path, _: grads[optim.leaf_name(path)], tree)

    trajectory, _ = ours(tree, nested, 5, weight_decay=0.1, max_grad_norm=None, embedding_learning_rate=1e-3)
    named = [{optim.leaf_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(t)} for t in trajectory]
    assert_close(named, expected, 3e-6)


def test_decay_rule_equals_transformers_on_a_real_models_names():
    config = transformers.Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=16, attention_bias=True,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    expected = set(transformers.Trainer.get_decay_parameter_names(None, model))
    assert {name for name, _ in model.named_parameters() if optim.is_decayed(name)} == expected


def test_a_run_restored_from_host_arrays_is_bit_identical_to_an_uninterrupted_one():
    (first, state), (second, restored) = (ours(start(), optim="adamw_8bit", stop_at=stop) for stop in (None, 4))
    assert all(np.array_equal(first[-1][k], second[-1][k]) for k in first[-1])
    assert jax.tree.structure(state) == jax.tree.structure(restored)
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state, restored)), strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optim": "adamw_8bits"}, "did you mean 'adamw_8bit'"),
        ({"optim": "madgrad"}, "use one of adamw"),
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, "takes no options"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"adam_beta2": 1.0}, "adam_beta2"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"embedding_learning_rate": -1.0}, "embedding_learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"total_steps": 0}, "total_steps"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        optim.make_optimizer(**({"learning_rate": 1e-3, "total_steps": 10} | options))


def test_paged_optimizers_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="paged_adamw_8bit"):
        optim.make_optimizer(learning_rate=1e-3, total_steps=10, optim="paged_adamw_8bit")
