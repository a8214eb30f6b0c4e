"""Adapters of every kind that PEFT writes: read, computed, trained and written again as PEFT does it."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.convert.safetensors import SafetensorsFile, write_safetensors
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import lora
from fastft_jax.models.layers import Linear, drop, project
from fastft_jax.models.residuals import Keep
from fastft_jax.quant.low_rank import loftq, low_rank_pair
from fastft_jax.quant.nf4 import dequantize, quantize
from fastft_jax.trainers.optim import make_optimizer
from fastft_jax.trainers.step import LossOptions, gradients

TOLERANCE = 1e-4  # float32 on both sides
GOLDEN = "all7 basic bf16 dora embed_lora layers_1_3 modules_to_save norms_saved patterns rslora".split()
IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 12))


pytestmark = pytest.mark.usefixtures("quick_compilation")


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, **{"dtype": "float32", "load_in_4bit": False, **options})[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two layers, the head tied to the embedding, biases on q, k, v."""
    return tiny.save(tiny.make_model("qwen-2.5-tied", num_hidden_layers=2), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def bare(folder):
    """The model of `folder`; every test leaves it without an adapter."""
    return load(folder)


# --- what PEFT wrote -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_llama(stories):
    """The trained tiny Llama, on which the golden adapters were made; every test leaves it bare."""
    return load(stories())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_adapter_computes_peft_s_logits_and_is_written_as_it_was(name, shared_data, trained_llama, tmp_path):
    model, source = trained_llama, shared_data / "peft" / name
    reference = np.load(source / "reference.npz")
    model.load_adapter(source, name)
    try:
        ours = np.asarray(model(reference["input_ids"]))
        np.testing.assert_allclose(ours, reference["logits"], atol=TOLERANCE, rtol=0)
        model.save_pretrained(tmp_path)
    finally:
        model.delete_adapter(name)
    assert (tmp_path / "adapter_config.json").read_bytes() == (source / "adapter_config.json").read_bytes()
    written, read = (SafetensorsFile(f / "adapter_model.safetensors") for f in (tmp_path, source))
    assert written.tensors.keys() == read.tensors.keys()
    for tensor in read.tensors:  # bf16 comes back as float32, which is what trains
        np.testing.assert_array_equal(written.read(tensor), read.read(tensor).astype(np.float32))
    if name != "bf16":
        bytes_of = lambda f: (f / "adapter_model.safetensors").read_bytes()  # noqa: E731
        assert bytes_of(tmp_path) == bytes_of(source)


# --- training ------------------------------------------------------------------------------------------------------

DENSE = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TRAINED = {
    "patterns, both ends and norms": dict(
        r=3,
        lora_alpha=6,
        target_modules=[*DENSE, "embed_tokens", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 5, "down_proj": 2, "lm_head": 4},
        alpha_pattern={"layers.0.mlp.up_proj": 9, "embed_tokens": 2},
        modules_to_save=["input_layernorm", "model.norm"],
    ),
    "dora, in some layers": dict(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "0.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj"],
        use_dora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 5},
    ),
}


@pytest.fixture(scope="module", params=TRAINED)
def made_by_peft(request, folder, tmp_path_factory):
    """(PEFT's model with a random adapter, the folder it is saved in)."""
    base = tiny.make_model("qwen-2.5-tied", num_hidden_layers=2)
    options = TRAINED[request.param]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied weights, and on saving the embedding
        config = peft.LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_embedding" in name:
                    p.mul_(0.1)  # PEFT draws both from N(0, 1), which drowns the model
                if "magnitude" in name or "modules_to_save" in name:
                    p.mul_(1 + 0.3 * torch.rand_like(p))
        model.peft_config["default"].base_model_name_or_path = str(folder)
        saved = tmp_path_factory.mktemp("peft")
        model.save_pretrained(saved)
    return model.eval(), saved


def loss_and_gradients(model):
    """Mean loss of predicting IDS, through the trainer's own step, and the gradient of every trained tensor."""
    labels = np.full_like(IDS, -100)
    labels[:, :-1] = IDS[:, 1:]
    positions = np.broadcast_to(np.arange(IDS.shape[1]), IDS.shape)
    batch = {"input_ids": IDS, "labels": labels, "positions": positions, "segment_ids": np.ones_like(IDS)}
    batch = {name: np.asarray(value, np.int32)[None] for name, value in batch.items()}
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    options = LossOptions(policy="full", chunk_size=32, max_segments=1)
    loss, grads = jax.jit(gradients, static_argnums=(0, 4))(definition, trainable, frozen, batch, options, None)
    return float(loss), nnx.merge(definition, grads, frozen)


def test_adapter_made_by_peft_gives_its_logits_gradients_and_step(made_by_peft, bare):
    """And what fills a small rank up to its stack's largest has a gradient of exactly zero."""
    theirs, saved = made_by_peft
    bare.load_adapter(saved, "theirs")
    try:
        with torch.no_grad():
            expected = theirs(torch.tensor(IDS)).logits.numpy()
        np.testing.assert_allclose(np.asarray(bare(IDS)), expected, atol=TOLERANCE, rtol=0)
        loss, grads = loss_and_gradients(bare)
        theirs.zero_grad()
        their_loss = theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
        their_loss.backward()
        np.testing.assert_allclose(loss, their_loss.item(), rtol=1e-5)
        wanted = {bare_name(name): p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
        mine = {n: np.asarray(v) for n, v in lora.trainable_tensors(grads, bare.names).items()}
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(mine[name], value, atol=TOLERANCE, rtol=0, err_msg=name)
        trainable, total = bare.num_parameters()
        assert trainable == sum(value.size for value in wanted.values())
        replaced = sum(value.size for name, value in wanted.items() if "norm" in name)
        assert total - trainable + replaced == sum(p.numel() for p in tiny_base(theirs))

        q_proj = grads.segments[0][0].self_attn.q_proj
        a, b = np.asarray(q_proj.lora_A[...]), np.asarray(q_proj.lora_B[...])
        assert q_proj.ranks == (3, 5) and a[0, :3].all() and a[1].all()  # one stack
        assert not a[0, 3:].any() and not b[0, :, 3:].any()
    finally:
        bare.delete_adapter("theirs")


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion_32bit"])
def test_what_is_zero_and_has_no_gradient_stays_zero_under_an_optimizer_with_weight_decay(optim):
    """So the zeros that fill a small rank up need no mask."""
    rng = np.random.default_rng(0)
    inside = np.arange(8) < 5
    leaf, gradient = (jnp.array(rng.normal(size=(8, 4096)).astype("f") * inside[:, None]) for _ in range(2))
    optimizer, _ = make_optimizer(learning_rate=0.1, total_steps=9, optim=optim, weight_decay=0.1)
    update, state = jax.jit(optimizer.update), optimizer.init(leaf)
    for _ in range(2):
        step, state = update(gradient, state, leaf)
        leaf = leaf + step
    assert not np.asarray(leaf[5:]).any() and np.asarray(step[:5]).all()


def tiny_base(model) -> list:
    """The base's own parameters, a tied one once."""
    return [p for name, p in model.named_parameters() if "lora_" not in name and "modules_to_save" not in name]


def bare_name(name: str) -> str:
    """PEFT's name of a live parameter -> the module's path and what it is."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


# --- several on one base -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_by_peft", ["patterns, both ends and norms"], indirect=True)
def test_adapters_are_switched_by_name_and_the_base_comes_back_to_the_bit(folder, bare, made_by_peft, tmp_path):
    base = np.asarray(bare(IDS))
    first = load(folder)
    FastLanguageModel.get_peft_model(first, r=2, bias="all", modules_to_save=["lm_head"], init_lora_weights=False)
    first.save_pretrained(tmp_path / "first")
    logits = {"first": np.asarray(first(IDS))}
    first.load_adapter(made_by_peft[1], "second")
    assert first.adapter_names == ["default", "second"]
    np.testing.assert_array_equal(np.asarray(first(IDS)), logits["first"])
    before = nnx.state(first.decoder, nnx.Param)
    first.set_adapter("second")
    assert first.active_adapter == "second" and first.adapter_path == made_by_peft[1]
    logits["second"] = np.asarray(first(IDS))
    assert np.abs(logits["second"] - logits["first"]).max() > 0.1
    with first.disable_adapter():
        np.testing.assert_array_equal(np.asarray(first(IDS)), base)
        assert first.num_parameters() == bare.num_parameters() and first.peft_config is None
    first.set_adapter("default")
    np.testing.assert_array_equal(np.asarray(first(IDS)), logits["first"])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(first.decoder, nnx.Param))

    with pytest.raises(ConfigError, match="'default' already"):
        first.load_adapter(tmp_path / "first", "default")
    with pytest.raises(ConfigError, match="'third'; there are: default, second"):
        first.set_adapter("third")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    (tmp_path / "first" / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": None}))
    with pytest.raises(CheckpointError, match="which nothing here takes"):
        first.load_adapter(tmp_path / "first", "third")
    assert first.adapter_names == ["default", "second"]
    np.testing.assert_array_equal(np.asarray(first(IDS)), logits["first"])
    first.delete_adapter("default")
    np.testing.assert_array_equal(np.asarray(first(IDS)), base)


@pytest.mark.parametrize("made_by_peft", ["patterns, both ends and norms"], indirect=True)
def test_an_adapter_with_the_embedding_of_another_base_is_refused(made_by_peft, bare, tmp_path):
    """PEFT saves the embedding's own weight beside LoRA on it, and puts it in the base's place without a word."""
    theirs, saved = made_by_peft
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    file = SafetensorsFile(saved / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((saved / "adapter_config.json").read_bytes())
    tensors = {key: file.read(key) for key in file.tensors}
    write_safetensors(tmp_path / "adapter_model.safetensors", tensors | {name: tensors[name] + 1})
    with pytest.raises(CheckpointError, match="trained on another base"):
        bare.load_adapter(tmp_path, "other")
    assert bare.adapter_names == [] and bare.peft_config is None


# --- DoRA by formula -----------------------------------------------------------------------------------------------


def test_dora_reads_dropped_inputs_as_peft_does():
    """With dropout PEFT's DoRA gives W (x - d) + m / ||W + s B A|| (W d + s B A d), d the dropped x; in float64."""
    rng = np.random.default_rng(0)
    w, a, b = (rng.normal(size=shape).astype("f") for shape in ((6, 8), (2, 8), (6, 2)))
    m, x = rng.normal(size=6).astype("f"), rng.normal(size=(2, 5, 8)).astype("f")
    linear = Linear(jnp.array(w))
    linear.lora_A, linear.lora_B, linear.magnitude = nnx.LoRAParam(a), nnx.LoRAParam(b), nnx.Param(m)
    linear.scaling, linear.dropout, key = 1.5, 0.4, jax.random.key(3)
    d = np.asarray(drop(jnp.array(x), 0.4, key), np.float64)
    merged = w + 1.5 * b.astype(np.float64) @ a
    factor = m / np.linalg.norm(merged, axis=1)
    plain = Linear(jnp.array(w))
    y = project((linear, plain), jnp.array(x), Keep(), (key, None))
    np.testing.assert_allclose(y[..., :6], (x - d) @ w.T + (d @ merged.T) * factor, atol=1e-5)
    np.testing.assert_allclose(y[..., 6:], x @ w.T, atol=1e-5)
    np.testing.assert_allclose(project((linear,), jnp.array(x), Keep(), (None,)), (x @ merged.T) * factor, atol=1e-5)


# --- adapters that start from the weights --------------------------------------------------------------------------


def test_pissa_starts_as_the_base_does_and_is_saved_as_plain_lora_that_peft_computes(folder, bare, tmp_path):
    base = np.asarray(bare(IDS))
    model = load(folder)
    options = dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], rank_pattern={"1.mlp.down_proj": 2})
    FastLanguageModel.get_peft_model(model, **options, init_lora_weights="pissa")
    np.testing.assert_allclose(np.asarray(model(IDS)), base, atol=TOLERANCE, rtol=0)
    site = next(site for site in lora.sites(model.decoder, model.names) if site.hf_path.endswith("0.mlp.down_proj"))
    reference = torch.nn.Linear(*site.linear.weight[0].shape[::-1], bias=False)
    reference.weight.data = torch.tensor(np.asarray(site.linear.weight[0]))
    theirs = peft.get_peft_model(
        torch.nn.Sequential(reference),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights="pissa"),
    ).base_model.model[0]
    mine = np.asarray(site.linear.lora_B[0] @ site.linear.lora_A[0])  # the pair itself has free signs
    np.testing.assert_allclose(mine, theirs.get_delta_weight("default").detach().numpy() / 1.5, atol=1e-5)

    state = nnx.state(model.decoder, nnx.LoRAParam)
    nnx.update(model.decoder, jax.tree.map(lambda leaf: leaf * 1.1, state))  # as training would
    model.save_pretrained(tmp_path)
    assert "equal to the bit" in model.verify_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 12, {"1.mlp.down_proj": 4})
    assert config["init_lora_weights"] is True
    peft_model = peft.PeftModel.from_pretrained(tiny.make_model("qwen-2.5-tied", num_hidden_layers=2), tmp_path).eval()
    with torch.no_grad():
        expected = peft_model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=TOLERANCE, rtol=0)


def test_loftq_takes_back_part_of_what_nf4_lost(folder, bare, tmp_path):
    """One turn beside the base as it is; with two the adapter has a base of its own, which a reader codes again."""
    exact, model = np.asarray(bare(IDS)), load(folder, load_in_4bit=True)
    plain, decoded = np.asarray(model(IDS)), jax.jit(lambda weight, row: dequantize(weight.at(row), jnp.float32))
    options = dict(r=16, lora_alpha=8, target_modules=["q_proj", "o_proj"])  # of one shape: there is one to compile for
    FastLanguageModel.get_peft_model(model, **options, loftq_config={"loftq_iter": 1})
    trainable, total = model.num_parameters()
    assert total - trainable == bare.num_parameters()[1]
    one_turn = np.linalg.norm(np.asarray(model(IDS)) - exact)
    assert one_turn < 0.95 * np.linalg.norm(plain - exact)
    for mine, other in zip(lora.sites(model.decoder, model.names), lora.sites(bare.decoder, bare.names), strict=True):
        if mine.adapted:
            w, q = other.linear.weight[mine.row], decoded(mine.linear.weight.get_value(), mine.row)
            pair = mine.linear.scaling * mine.linear.lora_B[mine.row] @ mine.linear.lora_A[mine.row]
            left = np.linalg.svd(np.asarray(w - q, np.float64), compute_uv=False)[16:]  # what rank 16 cannot give back
            np.testing.assert_allclose(np.linalg.norm(w - q - pair), np.linalg.norm(left), rtol=1e-4)
    assert model.peft_config["init_lora_weights"] is True
    model.delete_adapter("default")
    np.testing.assert_array_equal(np.asarray(model(IDS)), plain)

    FastLanguageModel.get_peft_model(model, **options, loftq_config={"loftq_iter": 2})
    two_turns = np.asarray(model(IDS))
    assert np.linalg.norm(two_turns - exact) < one_turn
    model.save_pretrained(tmp_path)
    assert "equal to the bit" in model.verify_adapter(tmp_path)
    model.load_adapter(tmp_path, "again")
    with model.disable_adapter():
        np.testing.assert_array_equal(np.asarray(model(IDS)), plain)
    model.set_adapter("again")
    np.testing.assert_array_equal(np.asarray(model(IDS)), two_turns)


def test_each_turn_of_loftq_brings_the_sum_closer_to_the_weight():
    """Frobenius distance to a weight with outliers, in float64, against NF4 alone and against the best pair alone."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 0.02, (96, 128)).astype("f") * np.exp(rng.normal(0, 1, (1, 128))).astype("f")

    decode = jax.jit(lambda q: dequantize(q, jnp.float32))

    def distance(q, a, b):
        return np.linalg.norm(w.astype(np.float64) - np.asarray(decode(q), np.float64) - b @ a)

    q = jax.jit(quantize)(w)
    none = distance(q, np.zeros((1, 128)), np.zeros((96, 1)))
    found = [distance(*map(jax.device_get, loftq(jnp.array(w), 8, n)[:3])) for n in (1, 2, 5)]
    assert none > found[0] > found[1] > found[2] and found[2] < 0.8 * none
    np.testing.assert_array_equal(loftq(jnp.array(w), 8, 1).q.codes, q.codes)
    u, s, vt = np.linalg.svd(w.astype(np.float64))
    best = u[:, :8] * s[:8] @ vt[:8]
    for powers, bound in ((None, 1e-5), (4, 1e-2)):
        a, b = low_rank_pair(jnp.array(w), 8, powers)
        assert np.linalg.norm(np.asarray(b @ a) - best) < bound * np.linalg.norm(best)


def test_what_cannot_be_meant_is_refused_by_name(bare):
    for options, word in [
        (dict(rank_pattern={"q_proj": 0}), "whole number of at least 1"),
        (dict(alpha_pattern={"q_prj": 2}), "alpha_pattern: 'q_prj' matches none.*q_proj"),
        (dict(rank_pattern={"(": 2}), "not a regular expression"),
        (dict(use_dora=True, target_modules=["q_proj", "lm_head"]), "use_dora=True with lm_head"),
        (dict(use_dora=True, init_lora_weights="pissa"), "use_dora=True with init_lora_weights='pissa'"),
        (dict(init_lora_weights="pissa_niter_x"), "pissa_niter_4"),
        (dict(init_lora_weights="olora"), "olora"),
        (dict(loftq_config={"loftq_iters": 2}), "loftq_iters"),
        (dict(loftq_config={"loftq_bits": 2}), "loftq_bits is 4"),
        (dict(loftq_config={"loftq_iter": 0}), "loftq_iter a whole number"),
        (dict(init_lora_weights="loftq"), "load_in_4bit=True"),
        (dict(init_lora_weights="pissa", r=300), "r=300"),
        (dict(modules_to_save=["q_proj"]), "only embed_tokens, lm_head and norms"),
        (dict(modules_to_save=["0.input_layernorm"]), "all layers or none"),
    ]:
        with pytest.raises((ConfigError, NotImplementedError), match=word):
            FastLanguageModel.get_peft_model(bare, **options)
        assert bare.peft_config is None and nnx.state(bare.decoder, nnx.Param) == nnx.State({}), options
