"""LoRA on the NF4 base through the product's own compiled step, in several arms: bf16, fp8, fp8 with a part kept.

An arm is compiled once; its runs differ in the values that go in: the adapter's start and the order of the data.
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pretrain import Weights, means, tensor_requests_of

from fastft_jax.language_model import FastLanguageModel
from fastft_jax.models.compute_dtype import set_compute_dtype
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.pallas_kernels.linear_cross_entropy import default_chunk_size
from fastft_jax.quant.nf4 import NF4Array, dequantize, quantize
from fastft_jax.trainers.compile import compile_step
from fastft_jax.trainers.data import BatchSource, PreparedDataset
from fastft_jax.trainers.loop import ARRAYS
from fastft_jax.trainers.optim import make_optimizer
from fastft_jax.trainers.step import LossOptions, make_eval_step

CHECKS = 8


class Base(NamedTuple):
    """A frozen base: linears in NF4, encoded from bfloat16, the rest in bfloat16, as loading a checkpoint leaves it."""

    config: DecoderConfig
    names: NameTable
    hf_config: dict[str, Any]
    arrays: dict[str, Any]


class Plan(NamedTuple):
    """A run: rows of `length` tokens, `rows` a step, `epochs` times over the data (no more than `max_steps`)."""

    rows: int
    length: int
    epochs: int
    learning_rate: float
    r: int = 16
    alpha: int = 32
    max_steps: int | None = None


class Parts(NamedTuple):
    """A model with its adapter, taken apart as the trainer does."""

    definition: nnx.GraphDef
    trainable: nnx.State
    frozen: nnx.State


def quantise(config: DecoderConfig, weights: Weights) -> tuple[dict[str, Any], dict[str, float]]:
    """The base's arrays, and NF4's own error of each linear: ||W_nf4 - W|| / ||W|| over all layers."""
    arrays, errors = {}, {}
    encode = jax.jit(lambda w: jax.lax.map(quantize, w))
    decode = jax.jit(lambda q: jax.lax.map(lambda one: dequantize(one, jnp.float32), q))
    for path, shape, layers in tensor_requests_of(config):
        w = weights[path].astype(jnp.bfloat16)
        if layers is None or len(shape) != 2:
            arrays[path] = w
            continue
        arrays[path] = encode(w)
        exact = w.astype(jnp.float32)
        error = jnp.linalg.norm(decode(arrays[path]) - exact) / jnp.linalg.norm(exact)
        errors[path.removesuffix(".weight")] = round(float(error), 4)
    return arrays, errors


def build(base: Base, plan: Plan, seed: int, dtype: Any, compute: str | None, keep: tuple[str, ...] = ()) -> Parts:
    """The decoder on this base that computes in `dtype` (and `compute`), with a fresh adapter on every linear."""

    def load(path, shape, layers):
        array = base.arrays[path]
        return array if isinstance(array, NF4Array) else array.astype(dtype)

    decoder = Decoder(base.config, load, dtype)
    set_compute_dtype(decoder, compute, keep)
    model = FastLanguageModel(decoder, base.names, base.hf_config, name="pretrained", max_seq_length=plan.length)
    FastLanguageModel.get_peft_model(
        model, r=plan.r, lora_alpha=plan.alpha, target_modules="all-linear", random_state=seed
    )
    return Parts(*nnx.split(model.decoder, nnx.Param, ...))


class Arm:
    """One way to compute, its programs compiled once."""

    def __init__(self, name: str, base: Base, plan: Plan, test: list[dict], test_options: LossOptions, **compute: Any):
        self.name, self.base, self.plan, self._compute = name, base, plan, compute
        self.parts = build(base, plan, 0, jnp.bfloat16, **compute)
        self._test, self._step = test, None
        self._evaluate = jax.jit(make_eval_step(self.parts.definition, test_options))

    def train(self, data: PreparedDataset, adapter_seed: int, data_seed: int) -> tuple[nnx.State, dict]:
        """The trained adapter, and the run's curves."""
        plan = self.plan
        source = BatchSource(data, plan.rows, plan.length, packing=True, seed=data_seed)
        steps = min(len(source) * plan.epochs, plan.max_steps or 10**9)
        optimizer, _ = make_optimizer(
            learning_rate=plan.learning_rate,
            total_steps=steps,
            warmup_steps=max(steps // 20, 1),
        )
        trainable = build(self.base, plan, adapter_seed, jnp.bfloat16, **self._compute).trainable
        state = jax.jit(optimizer.init)(trainable)
        first = (trainable, state, self.parts.frozen, _on_device(source.batch(0, 0)), None)
        start = time.perf_counter()
        if self._step is None:  # the schedule is part of the program: every run of an arm has as many steps
            options = options_for(source, self.base.config)
            _, self._step = compile_step(self.parts.definition, optimizer, options, first)
        held_out = [[0, self.evaluate(trainable)]]
        since = time.perf_counter()
        before, losses, training_seconds = since - start, [], 0.0
        checked = set(np.linspace(0, steps, CHECKS + 1).round().astype(int)[1:].tolist())
        for number in range(steps):
            batch = _on_device(source.batch(*divmod(number, len(source))))
            trainable, state, metrics = self._step(trainable, state, self.parts.frozen, batch, None)
            losses.append(metrics["loss"])
            if number + 1 in checked:
                jax.block_until_ready(trainable)
                training_seconds += time.perf_counter() - since
                held_out.append([number + 1, self.evaluate(trainable)])
                since = time.perf_counter()
        record = {
            "arm": self.name,
            "adapter_seed": adapter_seed,
            "data_seed": data_seed,
            "steps": steps,
            "final_held_out_loss": held_out[-1][1],
            "held_out_losses": held_out,
            "train_losses": means(losses),
            "seconds_before": round(before, 1),  # compiling, in an arm's first run, and the first check
            "tokens_per_second": round(steps * plan.rows * source.width / training_seconds),
        }
        return trainable, record

    def evaluate(self, trainable: nnx.State) -> float:
        """Mean held-out loss."""
        totals = [self._evaluate(trainable, self.parts.frozen, batch) for batch in self._test]
        loss = sum(float(out["loss_sum"]) for out in totals)
        return round(loss / sum(int(out["tokens"]) for out in totals), 6)


def held_out_batches(
    data: PreparedDataset, plan: Plan, config: DecoderConfig
) -> tuple[list[dict[str, jax.Array]], LossOptions]:
    """All of the data in batches on the device, and what the loss must know of them."""
    source = BatchSource(data, plan.rows, plan.length, packing=True, shuffle=False)
    batches = [{name: jnp.asarray(batch[name]) for name in ARRAYS} for batch in source.epoch(0)]
    return batches, options_for(source, config)


def options_for(source: BatchSource, config: DecoderConfig) -> LossOptions:
    return LossOptions("none", default_chunk_size(config.vocab_size), source.max_segments, source.longest)


def _on_device(batch: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(batch[name])[None] for name in ARRAYS}
