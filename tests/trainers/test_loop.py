"""The loop trains what it says and nothing else, compiles once, evaluates right, and stops on a non-finite number."""

import collections
import re

import jax
import numpy as np
import peft
import pytest
import tiny
import tiny_run
from flax import nnx

from fastft_jax.errors import ConfigError, TrainingError
from fastft_jax.models import lora
from fastft_jax.models.layers import Frozen
from fastft_jax.trainers.data import BatchSource
from fastft_jax.trainers.report import METRICS

FEW = ["q_proj", "down_proj"]
pytestmark = pytest.mark.usefixtures("quick_compilation", "xla_cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory, xla_cache):
    return tiny_run.save_base(tmp_path_factory.mktemp("base"))


def frozen_bytes(model) -> dict[str, bytes]:
    state = nnx.state(model.decoder, Frozen)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def trained(model) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in lora.trainable_tensors(model.decoder, model.names).items()}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": tiny_run.TARGETS, "layers_to_transform": [1]},
        {"target_modules": ["o_proj", "up_proj"], "bias": "lora_only"},
        {"target_modules": ["o_proj", "up_proj"], "bias": "lora_only", "layers_to_transform": [1]},
        {"target_modules": ["k_proj"], "bias": "all"},
        {"target_modules": ["down_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=lambda options: "-".join(str(v) for k, v in options.items() if k != "target_modules") or "plain",
)
def test_what_trains_is_what_peft_trains(options, tmp_path_factory):
    folder = _bases(tmp_path_factory)
    theirs = peft.get_peft_model(
        tiny.make_model("llama-biases"), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    )
    expected = {
        name.removeprefix("base_model.model.")
        .replace(".default", "").replace(".modules_to_save", "").replace(".base_layer", ""): tuple(p.shape)
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }  # fmt: skip
    model = tiny_run.load(folder, init_lora_weights=True, **options)
    # PEFT trains every bias in the model for "all"; the decoder's linears are all there are in this family
    assert {name: value.shape for name, value in trained(model).items()} == expected
    # and in the decoder: these numbers, in leaves of float32, are all that has a gradient or optimizer state
    leaves = jax.tree.leaves(nnx.state(model.decoder, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == sum(int(np.prod(shape)) for shape in expected.values())
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    others = nnx.state(model.decoder, nnx.Not(nnx.Param))
    kinds = {type(v) for v in jax.tree.leaves(others, is_leaf=lambda v: isinstance(v, nnx.Variable))}
    assert kinds == {Frozen}


_CACHE = {}


def _bases(factory):
    if "biases" not in _CACHE:
        _CACHE["biases"] = tiny_run.save_base(factory.mktemp("biases"), "llama-biases", num_hidden_layers=3)
    return _CACHE["biases"]


def test_float16_is_refused_for_training(base, tmp_path):
    model = tiny_run.load(base, target_modules=FEW)
    model.decoder.dtype = np.float16
    with pytest.raises(NotImplementedError, match="float16"):
        tiny_run.trainer(model, tmp_path / "out", tiny_run.rows(4))


def test_training_an_nf4_base_changes_the_adapter_and_no_frozen_byte(base, tmp_path):
    model = tiny_run.load(base, in_4bit=True, target_modules=FEW, init_lora_weights=True, layers_to_transform=[1])
    before, frozen = trained(model), frozen_bytes(model)
    assert any("codes" in name for name in frozen)
    trainer = tiny_run.trainer(model, tmp_path / "out", tiny_run.rows(12), packing=True, weight_decay=0.1, max_steps=3)
    moments = collections.Counter(x.shape for x in jax.tree.leaves(trainer.loop.opt_state) if x.ndim)
    # Adam's two moments of each trained leaf, and nothing of any other
    assert moments == collections.Counter(2 * [x.shape for x in jax.tree.leaves(nnx.state(model.decoder, nnx.Param))])
    trainer.train()
    after = trained(model)
    assert frozen_bytes(model) == frozen
    assert before.keys() == after.keys() and len(after) == 4
    for name, value in before.items():
        assert np.isfinite(after[name]).all() and not np.array_equal(after[name], value), name
        if name.endswith("lora_A.weight"):
            np.testing.assert_allclose(after[name], value, atol=0.02)  # three steps of 1e-3


class Compilations:
    """Names of the programs that XLA compiled, in order."""

    def __init__(self):
        self.names: list[str] = []

    def __call__(self, event: str, seconds: float, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(facts.get("fun_name", "")))


@pytest.fixture
def compilations():
    from jax._src import monitoring

    seen = Compilations()
    jax.monitoring.register_event_duration_secs_listener(seen)
    yield seen
    monitoring.unregister_event_duration_listener(seen)


def test_one_step_is_compiled_and_nothing_after_the_second_in_epochs_with_packing(
    base, tmp_path, compilations, monkeypatch
):
    compiled_before_batch = []
    original = BatchSource.batch

    def batch(self, epoch, index):
        compiled_before_batch.append(len(compilations.names))
        return original(self, epoch, index)

    monkeypatch.setattr(BatchSource, "batch", batch)
    model = tiny_run.load(base, target_modules=FEW, lora_dropout=0.1)
    trainer = tiny_run.trainer(
        model, tmp_path / "out", tiny_run.rows(27), packing=True, max_length=48, num_train_epochs=3,
        per_device_train_batch_size=1, gradient_accumulation_steps=3,
    )  # fmt: skip
    source = trainer.loop.train_source
    assert source.n_rows % source.batch_size and source.steps_per_epoch > 2  # the last batch is not full
    compilations.names.clear()
    output = trainer.train()
    assert output.global_step == 3 * source.steps_per_epoch
    assert sum("step" in name for name in compilations.names) == 1, compilations.names
    # batch() is called once to compile, then once a step; what reporting the first step compiles is ready by the third
    assert len(compiled_before_batch) == output.global_step + 1
    assert compiled_before_batch[3] == compiled_before_batch[-1], compilations.names


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory):
    """A trainer with dropout whose evaluation rows do not fill the last batch."""
    model = tiny_run.load(base, target_modules=FEW, lora_dropout=0.5)
    return tiny_run.trainer(
        model, tmp_path_factory.mktemp("eval") / "out", tiny_run.rows(4), tiny_run.rows(7, seed=1),
        per_device_eval_batch_size=3, train_on_responses_only=True,
    )  # fmt: skip


def test_evaluation_is_that_of_the_models_own_logits(evaluated):
    data = evaluated.eval_data
    nll, right, count = 0.0, 0, 0
    for ids, labels in zip(data.input_ids, data.labels, strict=True):
        padded = np.pad(ids, (0, tiny_run.MAX_LENGTH - len(ids)))
        logits = np.asarray(evaluated.model(padded[None]))[0, : len(ids) - 1].astype(np.float64)
        targets = labels[1:]
        chosen = targets != -100
        log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_probs -= logits.max(-1, keepdims=True)
        nll -= log_probs[np.arange(len(targets)), targets][chosen].sum()
        right += (logits.argmax(-1) == targets)[chosen].sum()
        count += chosen.sum()
    result = evaluated.evaluate()
    assert len(data) % 3 and count == data.stats.n_trained
    assert result["eval_loss"] == pytest.approx(nll / count, rel=2e-6)  # float32 logits
    assert result["eval_perplexity"] == pytest.approx(np.exp(nll / count), rel=2e-5)
    assert result["eval_token_accuracy"] == pytest.approx(right / count, abs=1e-12)


def test_evaluation_has_no_dropout(evaluated):
    assert evaluated.evaluate() == evaluated.evaluate()


def test_evaluation_needs_rows(base, tmp_path):
    trainer = tiny_run.trainer(tiny_run.load(base, target_modules=FEW), tmp_path / "out", tiny_run.rows(4))
    with pytest.raises(ConfigError, match="eval_dataset"):
        trainer.evaluate()


def test_logged_losses_are_token_weighted_and_evaluation_is_recorded(base, tmp_path):
    """With logging_steps=3 a row is the mean over the trained tokens of its three steps."""
    rows, held_out = tiny_run.rows(12), tiny_run.rows(3, seed=1)

    def run(name, **options):
        model = tiny_run.load(base, target_modules=FEW)
        trainer = tiny_run.trainer(model, tmp_path / name, rows, held_out, max_steps=6, **options)
        trainer.train()
        return tiny_run.metrics(tmp_path / name), trainer

    each, trainer = run("each", eval_strategy="steps", eval_steps=3)
    thirds, _ = run("thirds", logging_steps=3)
    steps = [row for row in each if "loss" in row]
    evaluations = [row for row in each if "eval_loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in evaluations] == [3, 6] and [row["step"] for row in thirds] == [3, 6]
    assert evaluations[-1]["eval_loss"] == trainer.evaluate()["eval_loss"]
    for row, part in zip(thirds, (steps[:3], steps[3:]), strict=True):
        tokens = [s["trained_tokens"] for s in part]
        assert row["trained_tokens"] == sum(tokens)
        assert row["loss"] == pytest.approx(np.average([s["loss"] for s in part], weights=tokens), rel=1e-12)
    source = trainer.loop.train_source
    expected = [(source.batch(*divmod(i, source.steps_per_epoch))["labels"] != -100).sum() for i in range(6)]
    assert [s["trained_tokens"] for s in steps] == expected


def failing_run(model, folder, rows, **options):
    trainer = tiny_run.trainer(model, folder, rows, shuffle=False, save_strategy="steps", save_steps=1, **options)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    return trainer, str(error.value)


def test_a_nan_in_one_rows_embedding_stops_the_run_at_that_row(base, tmp_path):
    model = tiny_run.load(base, target_modules=FEW)
    rows = tiny_run.rows(8)
    for row in rows:
        row["prompt"] = row["prompt"].replace("w7 ", "w8 ")
    rows[5]["prompt"] = "w1 w149"  # in the third step of two rows
    bad = tiny_run.tokenizer().convert_tokens_to_ids("w149")
    table = np.array(model.decoder.embed_tokens.weight.get_value())
    table[bad] = np.nan
    model.decoder.embed_tokens.weight.set_value(jax.numpy.asarray(table))
    rows = [row for row in rows if row is rows[5] or "w149" not in row["prompt"] + row["completion"]]
    step = rows.index(next(r for r in rows if r["prompt"] == "w1 w149")) // 2 + 1
    _, said = failing_run(model, tmp_path / "out", rows)
    assert step > 1 and said.startswith(f"step {step}: loss nan")
    assert f"on data rows {2 * step - 2}, {2 * step - 1}: " in said
    assert "the output of the embedding is not finite" in said
    assert said.endswith(f"the last good one is {tmp_path / 'out' / f'checkpoint-{step - 1}'}") and "\n" not in said
    assert all(np.isfinite(value).all() for value in trained(model).values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {METRICS, "run.json", *(f"checkpoint-{i}" for i in range(1, step))}  # no adapter of a failed run
    assert [row["step"] for row in tiny_run.metrics(tmp_path / "out")] == list(range(1, step))


def test_an_infinite_frozen_weight_is_found_in_its_layer(base, tmp_path):
    model = tiny_run.load(base, target_modules=FEW)
    before = trained(model)
    weight = model.decoder.segments[0][0].self_attn.o_proj.weight
    values = np.array(weight.get_value())
    values[1, 3, 5] = np.inf
    weight.set_value(jax.numpy.asarray(values))
    trainer, said = failing_run(model, tmp_path / "out", tiny_run.rows(4), gradient_accumulation_steps=2)
    assert re.match(r"step 1: loss (nan|inf), grad_norm nan on data rows 0, 1, 2, 3: ", said)
    assert "the output of layer 1 is not finite; no checkpoint was saved before it" in said
    for name, value in trained(model).items():  # the step changed nothing, moments included
        np.testing.assert_array_equal(value, before[name])
    assert all(not leaf.any() for leaf in jax.tree.leaves(trainer.loop.opt_state))


@pytest.mark.parametrize(
    "size, what", [(1e38, "the loss is finite, the gradient of .*lora_A.* is not"), (1e30, "every gradient is finite")]
)
def test_a_gradient_that_overflows_is_named(base, tmp_path, size, what):
    model = tiny_run.load(base, target_modules=FEW)
    q = model.decoder.segments[0][0].self_attn.q_proj
    q.lora_A.set_value(jax.numpy.zeros_like(q.lora_A.get_value()))  # so that the huge B does nothing forwards
    q.lora_B.set_value(jax.numpy.full_like(q.lora_B.get_value(), size))
    _, said = failing_run(model, tmp_path / "out", tiny_run.rows(4))
    assert re.search(what, said), said
    assert all(np.isfinite(value).all() for value in trained(model).values())


def test_there_must_be_an_adapter(base, tmp_path):
    from fastft_jax import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(base, dtype="float32", load_in_4bit=False, max_seq_length=64)
    with pytest.raises((ConfigError, TrainingError), match="get_peft_model"):
        tiny_run.trainer(model, tmp_path / "out", tiny_run.rows(4))
