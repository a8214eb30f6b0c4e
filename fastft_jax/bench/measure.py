"""Times the product's own compiled training step on random tokens."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from fastft_jax.bench import profile
from fastft_jax.bench.hlo import Program
from fastft_jax.bench.process import process_age
from fastft_jax.bench.start import Start
from fastft_jax.bench.trace import profiled, read_events
from fastft_jax.errors import TrainingError
from fastft_jax.language_model import FastLanguageModel
from fastft_jax.models.config import DecoderConfig
from fastft_jax.models.remat import Policy
from fastft_jax.pallas_kernels.linear_cross_entropy import default_chunk_size
from fastft_jax.trainers.compile import compile_step, program_bytes
from fastft_jax.trainers.data import BatchSource, DataStats, PreparedDataset
from fastft_jax.trainers.data.prepared import Sample
from fastft_jax.trainers.environment import device_peak_flops, peak_memory
from fastft_jax.trainers.flops import active_parameters, useful_flops
from fastft_jax.trainers.loop import ARRAYS
from fastft_jax.trainers.optim import make_optimizer
from fastft_jax.trainers.step import LossOptions

LEARNING_RATE = 2e-4  # SFTConfig's default
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Workload:
    """One point of a sweep: rows a step, tokens a row, whether documents share rows, and what is recomputed."""

    policy: str
    batch: int
    seq: int
    packed: bool = False

    def source(self, vocab_size: int, steps: int) -> BatchSource:
        """Random tokens for `steps` steps, every label but a document's first trained.

        A row is one document of `seq` tokens; packed, documents of a 40th to a half of that share rows.
        """
        rng, rows = np.random.default_rng(0), self.batch * steps
        if self.packed:
            low, high = max(2, self.seq // 40), max(2, self.seq // 2)
            lengths = rng.integers(low, high + 1, size=rows * self.seq // low)
            lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), rows * self.seq)) + 1]
        else:
            lengths = [self.seq] * rows
        return BatchSource(_documents(lengths, vocab_size, rng), self.batch, self.seq, packing=self.packed)


@dataclass(frozen=True)
class Profiling:
    """Where to leave the profile of a run (None: nowhere), and what the card can do, to be asked after the run."""

    folder: Path | None
    speeds: Callable[[], profile.Speeds]


class Bench:
    """A model whose step is timed again and again, from the same adapter each time.

    The adapter's first values wait on the host: the device holds what training holds, and nothing else.
    """

    def __init__(self, model: FastLanguageModel, *, optim: str):
        self.config: DecoderConfig = model.decoder.config
        self._optim = optim
        # q, k and v may have their adapters side by side, padded to 64; but base products are as wide as k at least
        wide = -(-3 * model.peft_config["r"] // 64) * 64
        self._lora_width = min(wide, self.config.num_key_value_heads * self.config.head_dim - 1)
        self._definition, trainable, self._frozen = nnx.split(model.decoder, nnx.Param, ...)
        self._start = jax.device_get(trainable)
        self.trainable_count = sum(x.size for x in jax.tree.leaves(trainable))
        self._active_count = active_parameters(self.config, trainable)
        for leaf in jax.tree.leaves(trainable):
            leaf.delete()

    def run(
        self,
        work: Workload,
        *,
        steps: int,
        warmup: int,
        profiling: Profiling | None = None,
        start: Start | None = None,
    ) -> tuple[dict[str, Any], profile.Profile | None]:
        """What a run of warmup + steps steps measured, and the profile of a few more.

        `start` is told what the run does until the end of its first step, and its numbers are in the result.
        `warmup` steps (at least 1) are left out of the times. A step's time runs from the moment the numbers of the
        one before were there to the moment its own are, as in training: the next step is queued before that.
        """
        device = jax.local_devices()[0]
        before = peak_memory(device)
        source = work.source(self.config.vocab_size, warmup + steps)
        optimizer, _ = make_optimizer(optim=self._optim, learning_rate=LEARNING_RATE, total_steps=warmup + steps)
        trainable = jax.device_put(self._start, may_alias=False)  # it is donated, and must stay what it is
        state = jax.block_until_ready((trainable, jax.jit(optimizer.init)(trainable)))
        del trainable
        batches = [source.batch(0, i % source.steps_per_epoch) for i in range(warmup + steps)]
        arguments = (*state, self._frozen, on_device(batches[0]), None)
        options = LossOptions(
            policy=work.policy,
            chunk_size=default_chunk_size(self.config.vocab_size),
            max_segments=source.max_segments if work.packed else None,
            max_document_length=source.longest,
        )
        if start is not None:
            start.end("state")
        before_compile = time.perf_counter(), 0.0 if start is None else start.xla_seconds
        policy, compiled = compile_step(self._definition, optimizer, options, arguments)
        compile_seconds = time.perf_counter() - before_compile[0]
        if start is not None:
            start.end_compile(before_compile[1])
        peak_compiled = peak_memory(device)
        state, losses, times, age = _train(compiled, state, self._frozen, batches)
        if start is not None:
            start.end("first_step", age)
        seconds = np.diff(times)[warmup - 1 :]
        tokens = [int((batch["segment_ids"] > 0).sum()) for batch in batches[warmup:]]
        flops = [useful_flops(self.config, batch, self._active_count) for batch in batches[warmup:]]
        speeds = [n / s for n, s in zip(tokens, seconds, strict=True)]
        rates = [f / s for f, s in zip(flops, seconds, strict=True)]
        peak_flops, peak = device_peak_flops(device.device_kind), peak_memory(device)
        result = {
            "policy": policy,
            "batch": work.batch,
            "seq": work.seq,
            "packed": work.packed,
            "tokens_per_step": round(statistics.mean(tokens)),
            "steps": steps,
            "tokens_per_second": round(statistics.median(speeds), 1),
            "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
            "milliseconds_per_step": round(1e3 * statistics.median(seconds), 2),
            "mfu": peak_flops and round(statistics.median(rates) / peak_flops, 4),
            # The device counts its peak since the process began: an earlier run's may be higher than this one's.
            "peak_memory_bytes": peak if peak is not None and peak > (before or 0) else None,
            # when the run began, and when its step was compiled: XLA tries out products on buffers of its own
            "peak_memory_bytes_before": {"run": before, "first_step": peak_compiled},
            "program_bytes": program_bytes(compiled),
            "compile_seconds": round(compile_seconds, 2),
            "start_to_first_step_seconds": None if start is None else age,
            "losses": [round(loss, 4) for loss in losses],
        }
        result |= {} if start is None else start.record()
        if profiling is None:
            return result, None
        if device.platform == "gpu":
            options = options._replace(policy=policy)
            arguments = (*state, self._frozen, on_device(batches[0]), None)
            # inside a CUDA graph a profiler does not say which instruction a kernel is of
            _, compiled = compile_step(self._definition, optimizer, options, arguments, cuda_graphs=False)
            state, *_ = _train(compiled, state, self._frozen, batches[:1])
        return result, self._profile(compiled, state, batches, policy, profiling)

    def _profile(self, compiled, state, batches, policy: str | Policy, profiling: Profiling) -> profile.Profile:
        with tempfile.TemporaryDirectory() as scratch:
            folder = profiling.folder or Path(scratch)
            with profiled(folder):
                _train(compiled, state, self._frozen, batches[-PROFILED_STEPS:])
            events = read_events(folder)
        attention = statistics.mean(attention_flops(self.config, batch) for batch in batches[-PROFILED_STEPS:])
        return profile.summarise(
            events,
            min(PROFILED_STEPS, len(batches)),
            program=Program(compiled.as_text()),
            lora_width=self._lora_width,
            speeds=profiling.speeds(),
            floors={"attention": attention},
        )


def attention_flops(config: DecoderConfig, batch: dict[str, np.ndarray]) -> float:
    """FLOPs of attention's products in a step, forward (4 N H a visible key) and backward (2.5 times that)."""
    without = useful_flops(config, batch | {"positions": np.full_like(batch["positions"], -1)}, 0)
    return useful_flops(config, batch, 0) - without


def _train(compiled, state, frozen, batches) -> tuple[tuple, list[float], list[float], float | None]:
    """Steps through `batches`: (state, losses, when each loss was there, the process's age after the first one)."""
    losses, times, age = [], [], None

    def read(loss):
        value = float(loss)
        return value, time.perf_counter(), process_age()

    # The loop's way: a thread reads each step's numbers as they come, while the next step is being queued.
    with ThreadPoolExecutor(1) as reader:
        pending = []
        for batch in batches:
            *state, metrics = compiled(*state, frozen, on_device(batch), None)
            metrics["loss"].copy_to_host_async()
            pending.append(reader.submit(read, metrics["loss"]))
            if len(pending) > 1:
                pending[-2].result()
        for future in pending:
            loss, done, then = future.result()
            losses.append(loss)
            times.append(done)
            age = then if age is None else age
    if not all(map(math.isfinite, losses)):
        raise TrainingError(f"the loss of a step is not finite: {losses}")
    return tuple(state), losses, times, age


def on_device(batch: dict[str, Any]) -> dict[str, jax.Array]:
    """[B, T] host rows -> [1, B, T] device arrays: one micro-batch."""
    return {name: jax.device_put(batch[name][None]) for name in ARRAYS}


def _documents(lengths, vocab_size: int, rng: np.random.Generator) -> PreparedDataset:
    ids = [rng.integers(0, vocab_size, int(n), dtype=np.int32) for n in lengths]
    labels = [np.concatenate([[-100], x[1:]]).astype(np.int32) for x in ids]
    count, tokens, longest = len(ids), int(np.sum(lengths)), int(np.max(lengths))
    stats = DataStats("text", count, count, 0, 0, 0, tokens, tokens - count, longest)
    return PreparedDataset(ids, labels, list(range(count)), stats, Sample("", []), None, 0, longest)
