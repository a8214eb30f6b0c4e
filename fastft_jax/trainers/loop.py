"""The training loop: batches in, one compiled step, metrics and checkpoints out.

What a run computes depends on the configuration and the step number alone: the data order comes from (seed, epoch),
dropout from (seed, step). So a run resumed from a checkpoint continues exactly as if it had not stopped.
"""

import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fastft_jax.errors import ConfigError, TrainingError
from fastft_jax.models.active_kernels import base_in_use
from fastft_jax.pallas_kernels.attention import select_implementation
from fastft_jax.pallas_kernels.linear_cross_entropy import default_chunk_size
from fastft_jax.pallas_kernels.pallas import current_device
from fastft_jax.trainers.checkpoint import CheckpointStore, find_checkpoint
from fastft_jax.trainers.compile import compile_step, compiler_options, program_bytes
from fastft_jax.trainers.data import BatchSource
from fastft_jax.trainers.diagnose import first_non_finite
from fastft_jax.trainers.flops import active_parameters, useful_flops
from fastft_jax.trainers.optim import make_optimizer
from fastft_jax.trainers.options import fingerprint
from fastft_jax.trainers.report import Reporter
from fastft_jax.trainers.sft_config import SFTConfig
from fastft_jax.trainers.step import LossOptions, make_eval_step

ARRAYS = ("input_ids", "labels", "positions", "segment_ids")


@dataclass
class TrainOutput:
    """What `train` did: optimizer steps reached, the last loss, and whether a signal stopped it early."""

    global_step: int
    training_loss: float
    stopped: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Loop:
    """Trains the adapter of `model` on the rows of a BatchSource; `source.batch_size` rows make one optimizer step.

    model: a FastLanguageModel with an adapter. identity: whatever else fixes the run's maths (lora settings, data); a
    resumed run must have the same.
    """

    def __init__(
        self, model: Any, args: SFTConfig, train: BatchSource, evaluation: BatchSource | None, identity: dict[str, Any]
    ):
        self.model, self.args, self.train_source, self.eval_source = model, args, train, evaluation
        self.micro_batches = args.gradient_accumulation_steps
        self.steps_per_epoch = train.steps_per_epoch
        self.total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(train))
        self.optimizer, self.schedule = make_optimizer(
            optim=args.optim,
            learning_rate=args.learning_rate,
            total_steps=self.total_steps,
            warmup_steps=args.warmup(self.total_steps),
            lr_scheduler_type=args.lr_scheduler_type,
            lr_scheduler_kwargs=args.lr_scheduler_kwargs,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_epsilon=args.adam_epsilon,
            max_grad_norm=args.max_grad_norm,
            embedding_learning_rate=args.embedding_learning_rate,
        )
        self.identity = {"training": args.maths(), "total_steps": self.total_steps, **identity}
        self.store = CheckpointStore(args.output_dir, args.save_total_limit)
        self.policy: Any = None  # decided when the step is compiled
        self._definition, self.trainable, self._frozen = nnx.split(model.decoder, nnx.Param, ...)
        if not jax.tree.leaves(self.trainable):
            raise ConfigError("the model has nothing to train; call FastLanguageModel.get_peft_model first")
        self.opt_state = jax.jit(self.optimizer.init)(self.trainable)
        self._active_count = active_parameters(model.decoder.config, self.trainable)
        self._eval_step = None

    def resume(self, resume_from_checkpoint: bool | str | None) -> int:
        """Take the state of a checkpoint (True: the newest complete one); the step to go on from, 0 for a fresh run.

        True where there is none yet means a fresh run: the run before may have been killed at any moment.
        Raises TrainingError when the checkpoint's run was configured otherwise, naming what differs.
        """
        if resume_from_checkpoint is True and self.store.latest() is None:
            return 0
        found = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if found is None:
            return 0
        folder, step = found
        store = CheckpointStore(folder)
        changed = _differences(store.meta(step)["identity"], _jsonable(self.identity))
        if changed:
            raise TrainingError(
                f"{store.path(step)} belongs to a run with other settings ({'; '.join(changed[:4])}); "
                "give the same ones, or start afresh in another output_dir"
            )
        arrays, _ = store.restore(step, {"trainable": self.trainable, "opt_state": self.opt_state})
        self.trainable, self.opt_state = arrays["trainable"], arrays["opt_state"]
        return step

    def run(self, first: int, reporter: Reporter) -> TrainOutput:
        """Optimizer steps first + 1 .. total_steps. SIGTERM and SIGINT save a checkpoint and end the run early."""
        args = self.args
        step_fn = self._compile(reporter)
        # all at once, and now: computed when it is reported, a rate would wait behind the step that is queued by then
        rates = np.asarray(jax.jit(jax.vmap(self.schedule))(np.arange(self.total_steps, dtype=np.int32)))
        window = _Window()
        pending: tuple[int, dict, Future] | None = None
        loss, saved = math.nan, first
        # A thread reads each step's numbers as they come, so that the next step starts at once and times are right: a
        # call may return when its step has begun, or when it is nearly done.
        with _stop_on_signals() as stop, ThreadPoolExecutor(1) as reader:
            for index in range(first, self.total_steps):
                batch = self.train_source.batch(*divmod(index, self.steps_per_epoch))
                self.trainable, self.opt_state, metrics = step_fn(
                    self.trainable, self.opt_state, self._frozen, self._device_batch(batch), self._key(index)
                )
                for value in metrics.values():
                    value.copy_to_host_async()  # queued now, or it would wait behind the next step
                if pending is not None:
                    loss = self._finish(*pending, rates, window, reporter)
                pending = (index + 1, batch, reader.submit(_read, metrics))
                step, last_of_epoch = index + 1, (index + 1) % self.steps_per_epoch == 0
                stopping = stop.is_set()  # asked once: a signal from here on is the next step's to save
                saving = args.saves_at(step, last_of_epoch=last_of_epoch) or stopping
                evaluating = self.eval_source is not None and args.evaluates_at(step, last_of_epoch=last_of_epoch)
                if saving or evaluating or step == self.total_steps:
                    loss, pending = self._finish(*pending, rates, window, reporter), None
                with window.paused():
                    if evaluating:
                        self._evaluate_and_report(step, reporter)
                    if saving:
                        self.save(step)
                        saved = step
                if stopping:
                    reporter.say(f"stopped by a signal: step {step} is saved in {self.store.path(step)}")
                    return TrainOutput(step, loss, stopped=True)
            if args.save_strategy != "no" and saved < self.total_steps:
                self.save(self.total_steps)
        return TrainOutput(self.total_steps, loss)

    def evaluate(self) -> dict[str, float]:
        """Mean loss, perplexity and token accuracy over the evaluation rows, through the training loss."""
        if self.eval_source is None:
            raise ConfigError("there is no evaluation data: give eval_dataset")
        if self._eval_step is None:
            self._eval_step = jax.jit(make_eval_step(self._definition, self._options("none", self.eval_source)))
        totals = np.zeros(3)
        for batch in self.eval_source.epoch(0):
            arrays = {name: jnp.asarray(batch[name]) for name in ARRAYS}
            out = self._eval_step(self.trainable, self._frozen, arrays)
            totals += [float(out["loss_sum"]), int(out["tokens"]), int(out["correct"])]
        loss_sum, tokens, correct = totals
        if tokens == 0:
            raise TrainingError("the evaluation rows have no trained token")
        return {"loss": loss_sum / tokens, "token_accuracy": correct / tokens}

    def write_back(self) -> None:
        """Give the trained values back to the model object."""
        nnx.update(self.model.decoder, self.trainable)

    def save(self, step: int) -> None:
        """A checkpoint of everything that a later process needs to go on from `step`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        identity = _jsonable(self.identity)
        meta = {"step": step, "data": {"epoch": epoch, "index": index}, "identity": identity}
        meta |= {"config_hash": fingerprint(identity), "prng": {"seed": self.args.seed, "folded_in": step}}
        self.store.save(step, {"trainable": self.trainable, "opt_state": self.opt_state}, meta)

    def program_bytes(self) -> int | None:
        """Device memory of the compiled training step, once there is one."""
        return None if self._compiled is None else program_bytes(self._compiled)

    _compiled: Any = None

    def _compile(self, reporter: Reporter) -> Callable:
        """Compile the one step of the run ahead of time: it cannot be compiled again by accident."""
        batch = self._device_batch(self.train_source.batch(0, 0))
        arguments = (self.trainable, self.opt_state, self._frozen, batch, self._key(0))

        reporter.say(self._kernels())
        start = time.perf_counter()
        options = self._options(self.model.remat_policy, self.train_source)
        self.policy, self._compiled = compile_step(self._definition, self.optimizer, options, arguments)
        reporter.say(
            f"compiled in {time.perf_counter() - start:.1f} s | recomputation: {self.policy} | "
            f"the step needs {program_bytes(self._compiled) / 2**30:.2f} GiB"
        )
        for name, value in compiler_options(self.policy, jax.default_backend()).items():
            reporter.say(f"XLA option for this step: {name}={value}")
        return self._compiled

    def _kernels(self) -> str:
        """Which kernels the step uses on this device, and why not faster ones."""
        c, source = self.model.decoder.config, self.train_source
        shape = (source.batch_size // self.micro_batches, source.width)
        platform, capability = current_device()
        chosen = select_implementation(
            q_shape=(*shape, c.num_attention_heads, c.head_dim),
            kv_shape=(*shape, c.num_key_value_heads, c.head_dim),
            dtype=self.model.decoder.dtype,
            softcap=c.attention_softcap,
            packed=source.packing,
            max_segments=source.max_segments,
            platform=platform,
            compute_capability=capability,
        )
        why = f" ({'; '.join(chosen.reasons)})" if chosen.reasons else ""
        return f"kernels: attention {chosen.name}{why} | {base_in_use(self.model.decoder)}"

    def _options(self, policy: Any, source: BatchSource) -> LossOptions:
        vocab = self.model.decoder.config.vocab_size
        return LossOptions(
            policy=policy,
            chunk_size=self.args.loss_chunk_size or default_chunk_size(vocab),
            max_segments=source.max_segments if source.packing else None,
            max_document_length=source.longest,
        )

    def _device_batch(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """[k B, T] host rows -> [k, B, T] device arrays."""
        shape = (self.micro_batches, -1, self.train_source.width)
        return {name: jax.device_put(batch[name].reshape(shape)) for name in ARRAYS}

    def _key(self, index: int) -> jax.Array | None:
        """Of the dropout in a step; nothing is compiled for it where there is none."""
        if not (self.model.peft_config or {}).get("lora_dropout"):
            return None
        return jax.random.fold_in(jax.random.key(self.args.seed), index)

    def _finish(
        self, step: int, batch: dict, numbers: Future, rates: np.ndarray, window: "_Window", reporter: Reporter
    ) -> float:
        """Wait for a step's numbers, report them when due, and stop the run if they are not finite."""
        metrics, done = numbers.result()
        if not metrics["finite"]:
            self._fail(step, batch, metrics)
        flops = useful_flops(
            self.model.decoder.config, batch, self._active_count, full_finetuning=self.model.full_finetuning
        )
        window.add(metrics["loss"], batch, flops)
        if step % self.args.logging_steps == 0 or step == self.total_steps:
            reporter.step(
                step,
                epoch=step / self.steps_per_epoch,
                learning_rate=float(rates[step - 1]),
                grad_norm=metrics["grad_norm"],
                **window.take(done),
            )
        else:
            reporter.advance(step)
        return metrics["loss"]

    def _fail(self, step: int, batch: dict[str, Any], metrics: dict[str, float]) -> None:
        options = self._options(self.policy, self.train_source)
        where = first_non_finite(self._definition, self.trainable, self._frozen, self._device_batch(batch), options)
        rows = ", ".join(map(str, batch["rows"][:8])) + (", ..." if len(batch["rows"]) > 8 else "")
        last = self.store.latest()
        kept = "no checkpoint was saved before it" if last is None else f"the last good one is {self.store.path(last)}"
        found = f"loss {metrics['loss']}, grad_norm {metrics['grad_norm']}"
        raise TrainingError(f"step {step}: {found} on data rows {rows}: {where}; {kept}")

    def _evaluate_and_report(self, step: int, reporter: Reporter) -> None:
        result = self.evaluate()
        reporter.evaluation(step, epoch=step / self.steps_per_epoch, **result)


def _read(metrics: dict[str, jax.Array]) -> tuple[dict[str, Any], float]:
    """A step's numbers, and when they were there."""
    return {name: np.asarray(value).item() for name, value in metrics.items()}, time.perf_counter()


class _Window:
    """What has happened since the last reported step."""

    def __init__(self):
        self._restart(time.perf_counter())

    def _restart(self, start: float) -> None:
        self._loss, self._trained, self._tokens, self._flops = 0.0, 0, 0, 0.0
        self._start = start

    @contextmanager
    def paused(self):
        """Time spent inside is not training time."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def add(self, loss: float, batch: dict[str, Any], flops: float) -> None:
        trained = int((batch["labels"] != -100).sum())
        self._loss += loss * trained
        self._trained += trained
        self._tokens += int((batch["segment_ids"] > 0).sum())
        self._flops += flops

    def take(self, done: float) -> dict[str, float]:
        """The numbers for a report of a step that was done at that time; the next window starts there."""
        out = {
            "loss": self._loss / max(self._trained, 1),
            "tokens": self._tokens,
            "seconds": done - self._start,
            "trained_tokens": self._trained,
            "flops": self._flops,
        }
        self._restart(done)
        return out


@contextmanager
def _stop_on_signals():
    """An event that SIGTERM or SIGINT sets; the handlers before come back at the first signal and the end."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers
        return
    before = {}

    def handle(number, frame):
        stop.set()
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _jsonable(value: Any) -> Any:
    """As it comes back from a JSON file, so that stored and present settings compare equal."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value) if isinstance(value, Path) else value


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    """`training.learning_rate was 0.0002, is 0.001` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{at}.{key}".strip("."))]
    return [] if old == new else [f"{at} was {old!r}, is {new!r}"]
