"""Full fine-tuning: transformers' gradient of every parameter, resumable runs, and a folder that transformers loads."""

import errno
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import test_family_features
import tiny
import tiny_run
import torch
import transformers
from flax import nnx
from test_parity import TOLERANCE, load, loss_and_gradient, padded_batch, torch_logits

from fastft_jax import FastLanguageModel
from fastft_jax.convert import hf_writer
from fastft_jax.convert.hf_writer import checkpoint_entries, write_model
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models.active_kernels import base_in_use
from fastft_jax.models.full import train_everything
from fastft_jax.models.layers import ExpertLinear, Frozen, Linear
from fastft_jax.models.moe import bias_rows
from fastft_jax.models.residuals import Keep
from fastft_jax.quant.trained_linear import trained_experts, trained_linear
from fastft_jax.trainers.sft import check_output_dir

gemma3 = test_family_features.gemma3


pytestmark = pytest.mark.usefixtures("quick_compilation")


def tensors(decoder, names) -> dict[str, np.ndarray]:
    """Every weight under transformers' name."""
    return {name: entry.read() for name, entry in checkpoint_entries(decoder, names, np.float32).items()}


# plain; sandwich norms by 1 + w, tied, caps; LayerNorm, biases, a head's bias; norms of heads; experts, a shared one
# with its gate; the other router; sinks, biases of experts and routers, experts in one tensor; latent attention with a
# router's buffer
FAMILIES = ["llama-2", "gemma-2", "phi-2", "qwen-3", "qwen-2-moe", "phi-3.5-moe", "gpt-oss", "deepseek-v3"]
CHANGES = {"qwen-2-moe": dict(mlp_only_layers=[]), "gpt-oss": dict(num_hidden_layers=1)}
CHANGES["deepseek-v3"] = dict(num_hidden_layers=1, first_k_dense_replace=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_of_every_parameter_is_transformers(name, tmp_path):
    """float32 on both sides: only the order of sums differs, a few 1e-6 of gradients up to 3 in size."""
    balanced = dict(output_router_logits=True, router_aux_loss_coef=0.5) if name in tiny.EXPERTS else {}
    changes = CHANGES.get(name, {})
    theirs = tiny.make_model(name, **{"num_hidden_layers": 2} | balanced | changes)
    model = load(tiny.save(theirs, tmp_path), full_finetuning=True)
    ids, mask = padded_batch()
    ids = np.maximum(ids, 1)  # torch leaves out the gradient of looking up a family's padding token, 0 here
    labels = np.where(mask == 1, ids, -100)
    labels[1, 13] = -100  # the first real token would be predicted from padding
    loss = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
    loss.backward()
    mine, gradient = loss_and_gradient(model, ids, mask, labels, "selective")
    np.testing.assert_allclose(mine, loss.item(), rtol=1e-5)
    grads = tensors(gradient, model.names)
    # under the names that transformers gives a checkpoint's tensors
    theirs.save_pretrained(tmp_path / "gradient", state_dict={n: p.grad for n, p in theirs.named_parameters()})
    named = safetensors.numpy.load_file(tmp_path / "gradient" / "model.safetensors")
    buffers = {n: b for n, b in grads.items() if n.endswith("e_score_correction_bias")}  # no parameters there, either
    assert grads.keys() - buffers.keys() == named.keys()
    for parameter, value in named.items():
        np.testing.assert_allclose(grads[parameter], value, atol=TOLERANCE, rtol=TOLERANCE, err_msg=parameter)
    trained = theirs.num_parameters()
    assert model.num_parameters() == (trained, trained + sum(b.size for b in buffers.values()))
    if name in tiny.EXPERTS:  # saved again: every tensor as transformers wrote it
        model.save_pretrained(tmp_path / "saved")
        before, after = (safetensors.numpy.load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "saved"))
        assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)
        assert "equal to the bit" in model.verify_adapter(tmp_path / "saved")


def test_gradients_of_float32_masters_are_not_rounded_to_the_compute_dtype():
    """Against float64 on the bfloat16 values: 1e-6 is float32's; a bfloat16 gradient would be 4e-3 away."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((2, 12, n)), jnp.bfloat16) for n in (16, 12))
    w = [jnp.asarray(rng.standard_normal((n, 16)), jnp.float32) for n in (8, 4)]
    y, pull_back = jax.vjp(trained_linear, x, w)
    dx, dw = pull_back(dy)
    assert (y.dtype, dx.dtype, dw[0].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.einsum("btn,btk->nk", np.float64(dy), np.float64(x))
    np.testing.assert_allclose(np.concatenate(dw), exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_nor_are_those_of_experts():
    """The same, expert by expert; one without rows, and two weights at once."""
    rng, sizes = np.random.default_rng(1), np.array([5, 0, 4])
    x, dy = (jnp.asarray(rng.standard_normal((9, n)), jnp.bfloat16) for n in (16, 12))
    w = tuple(jnp.asarray(rng.standard_normal((3, n, 16)), jnp.float32) for n in (8, 4))
    y, pull_back = jax.vjp(trained_experts, x, jnp.asarray(sizes), w)
    dx, _, dw = pull_back(dy)
    assert (y.dtype, dx.dtype, dw[0].dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    whole = np.float64(np.concatenate(w, axis=1).astype("bfloat16"))
    for e, rows in enumerate(np.split(np.arange(9), np.cumsum(sizes)[:-1])):
        exact = np.float64(dy)[rows].T @ np.float64(x)[rows]
        bound = 1e-6 * np.abs(exact).max()
        np.testing.assert_allclose(np.concatenate([part[e] for part in dw]), exact, rtol=0, atol=bound)
        np.testing.assert_allclose(np.float64(y)[rows], np.float64(x)[rows] @ whole[e].T, rtol=2**-8, atol=1e-6)
        np.testing.assert_allclose(np.float64(dx)[rows], np.float64(dy)[rows] @ whole[e], rtol=2**-6, atol=2**-6)


def test_nor_are_those_of_biases():
    """Sums over 512 rows in float32 are within 1e-6 of what was added; summed in bfloat16 they are 1% off."""
    rng, experts = np.random.default_rng(2), np.random.default_rng(2).integers(0, 2, 512)  # the third has no row
    x, dy = (jnp.asarray(rng.standard_normal((1, 512, n)), jnp.bfloat16) for n in (16, 8))
    w, b, by_expert = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 16), (8,), (3, 8)))

    def trained(linear, bias):
        linear.weight, linear.bias = nnx.Param(linear.weight.get_value()), nnx.Param(bias)
        return linear

    _, pull_back = jax.vjp(lambda b: trained(Linear(w), b)(x, Keep()), b)
    exact, bound = np.float64(dy).sum((0, 1)), 1e-6 * np.abs(np.float64(dy)).sum((0, 1)).max()
    np.testing.assert_allclose(pull_back(dy)[0], exact, rtol=0, atol=bound)
    picked = lambda b: bias_rows((trained(ExpertLinear(w, 3), b),), experts)  # noqa: E731
    rows, pull_back = jax.vjp(picked, by_expert)
    np.testing.assert_array_equal(rows, np.asarray(by_expert)[experts])
    exact = np.stack([np.float64(dy)[0][experts == e].sum(0) for e in range(3)])
    np.testing.assert_allclose(pull_back(dy[0].astype(jnp.float32))[0], exact, rtol=0, atol=bound)


ROWS = tiny_run.rows(3, longest=16)  # a batch: every step sees the same
RUN = {"per_device_train_batch_size": 3, "learning_rate": 5e-3, "optim": "adamw"}
RUN |= {"max_steps": 6, "weight_decay": 0.01, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory, xla_cache):
    return tiny_run.save_base(tmp_path_factory.mktemp("base"), intermediate_size=64)


def full(folder, dtype="float32", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FastLanguageModel.from_pretrained(
            folder, max_seq_length=tiny_run.MAX_LENGTH, dtype=dtype, full_finetuning=True, **options
        )[0]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """(the trained model, its folder)"""
    folder = tmp_path_factory.mktemp("run") / "out"
    trainer = tiny_run.trainer(full(base), folder, ROWS, **RUN)
    trainer.train()
    return trainer.model, folder


def test_a_run_lowers_the_loss_and_resumes_to_the_same_bytes(base, run, tmp_path):
    _, folder = run
    losses = [row["loss"] for row in tiny_run.metrics(folder)]
    assert losses[-1] < 0.9 * losses[0]
    resumed = tiny_run.trainer(full(base), tmp_path / "out", ROWS, **RUN)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes() != (base / name).read_bytes()
    with pytest.raises(ConfigError, match="another run"):  # a finished one is not written over
        check_output_dir(resumed.args.model_copy(update={"output_dir": str(folder)}), None)


def test_transformers_loads_what_was_saved_with_the_trained_models_logits(run):
    model, folder = run
    assert "equal to the bit" in model.verify_adapter(folder)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and theirs.dtype == torch.float32
    ids, mask = padded_batch()
    real = mask.astype(bool)
    ours = np.asarray(model(ids, mask))[real]
    np.testing.assert_allclose(ours, torch_logits(theirs.eval(), ids, mask)[real], atol=TOLERANCE, rtol=0)


def test_bfloat16_runs_keep_float32_masters_and_save_shards_in_bfloat16(base, tmp_path):
    model = full(base, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model.decoder))} == {jnp.dtype("float32")}
    write_model(tmp_path, model.decoder, model.hf_config, source=model.base_folder, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    original = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for (name, saved), given in zip(theirs.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(saved, given), name
    write_model(tmp_path, model.decoder, model.hf_config)  # one file over many: none of the old ones stays
    assert [p.name for p in sorted(tmp_path.glob("model*"))] == ["model.safetensors"]


def test_a_multimodal_checkpoints_decoder_is_saved_as_the_text_model_it_is(gemma3, tmp_path):
    model = load(tiny.save(gemma3, tmp_path / "base"), full_finetuning=True)
    model.save_pretrained(tmp_path / "saved")
    text, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(text).__name__ == "Gemma3ForCausalLM" and not info["missing_keys"] and not info["unexpected_keys"]
    ids, mask = test_family_features.batch()
    logits = torch_logits(text.eval(), ids, mask) - torch_logits(gemma3, ids, mask)
    np.testing.assert_allclose(logits[mask == 1], 0, atol=1e-5)  # both torch, with the same weights


def test_a_full_disk_leaves_the_model_that_was_there(run, monkeypatch):
    model, folder = run
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_writer, "write_sharded", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert not list(folder.glob(".*"))


def test_what_full_finetuning_cannot_be_combined_with_is_refused(base, run, tmp_path):
    model, folder = run
    assert base_in_use(model.decoder) == "weights float32 (trained)"
    with pytest.raises(ConfigError, match="every weight"):
        FastLanguageModel.get_peft_model(model)
    with pytest.raises(ConfigError, match="NF4"):
        full(base, compute_dtype="fp8")
    with pytest.raises(ConfigError, match="loaded from"):
        full(base).save_pretrained(base)
    strange = nnx.clone(load(base).decoder)
    strange.norm.gains = Frozen(jnp.zeros(2))
    with pytest.raises(NotImplementedError, match="not built yet for gains of RMSNorm"):
        train_everything(strange)
    onto_itself = tiny_run.trainer(full(folder), folder, ROWS, **RUN, overwrite_output_dir=True)
    with pytest.raises(ConfigError, match="loaded from"):  # at the start, not at the end
        onto_itself.train()
    with pytest.raises(CheckpointError, match="already holds a model"):
        model.save_pretrained(folder, overwrite=False)
    adapter = FastLanguageModel.get_peft_model(load(base), target_modules=["q_proj"])
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is an adapter"):
        full(tmp_path)
