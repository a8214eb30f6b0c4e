"""Benchmarks of training on this machine's card, on random weights of a published geometry.

    python -m fastft_jax.bench --like llama-3.1-8b --policy none full --batch 2 --seq 4096 [--profile]
    python -m fastft_jax.bench --kernels [rms_norm nf4 ...]
    python -m fastft_jax.bench --check [--layers 8]

Exit codes: 0 done, 1 a run failed (the others went on) or a check did, 2 a wrong option.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft_jax.bench.geometries import GEOMETRIES
from fastft_jax.errors import ConfigError, FastFTError

# bf16 FLOP/s that long runs of large products settle at under the card's power limit: measured, not from a data sheet
SUSTAINED = {"NVIDIA H200": 656e12}
FULL = "RESOURCE_EXHAUSTED"  # in what jax says when a device's memory is full


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m fastft_jax.bench", description="Time training steps, or kernels.")
    at_least_one = _at_least(1)
    out.add_argument("--like", choices=GEOMETRIES, default="llama-3.1-8b", help="whose geometry (default: %(default)s)")
    out.add_argument("--config", metavar="FILE", help="a Hugging Face config.json, instead of --like")
    out.add_argument("--policy", nargs="+", default=["auto"], help="none selective offload full auto, or a JSON table")
    out.add_argument("--batch", nargs="+", type=at_least_one, help="rows of a step (default: 2; --check: 1)")
    out.add_argument("--seq", nargs="+", type=_at_least(2), help="tokens of a row (default: 4096; --check: 1024)")
    out.add_argument("--layers", type=at_least_one, help="of the model (default: all)")
    out.add_argument("--packed", action="store_true", help="several documents a row")
    out.add_argument(
        "--r", type=at_least_one, default=32, help="LoRA rank, on all linear layers (default: %(default)s)"
    )
    out.add_argument("--optim", default="adamw_8bit", help="optimizer (default: %(default)s)")
    out.add_argument("--dtype", default="bfloat16", help="of activations and what is not quantised")
    out.add_argument("--compute-dtype", help="of the large products, where the model has a choice")
    out.add_argument("--steps", type=at_least_one, default=8, help="timed steps (default: %(default)s)")
    out.add_argument("--warmup", type=at_least_one, default=2, help="steps before them (default: %(default)s)")
    out.add_argument("--profile", action="store_true", help="also print where a step's time goes")
    out.add_argument(
        "--trace", type=Path, metavar="DIR", help="keep the profiles, for Perfetto or XProf (and --profile)"
    )
    out.add_argument(
        "--kernels", nargs="*", metavar="PART", help="time kernels instead: all, or names with these parts"
    )
    out.add_argument(
        "--check", action="store_true", help="compare loss and gradients with plain references instead of timing"
    )
    out.add_argument("--compile-cache", metavar="DIR", help="use XLA's cache on disk (default: compile anew)")
    out.add_argument("--out", type=Path, metavar="FILE", help="append a JSON line a run")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser().parse_args(argv)
    arguments.batch = arguments.batch or ([1] if arguments.check else [2])
    arguments.seq = arguments.seq or ([1024] if arguments.check else [4096])
    # settings of this process, made before jax starts
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    command = "python -m fastft_jax.bench " + shlex.join(sys.argv[1:] if argv is None else argv)
    try:
        run = _check if arguments.check else _steps if arguments.kernels is None else _kernels
        return run(arguments, command)
    except (ConfigError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FastFTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if FULL not in str(error):
            raise
        print("error: the device's memory is too small for this model or kernel", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _at_least(least: int):
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return number


def _policies(texts: Sequence[str]) -> list[Any]:
    """Policies by name, or tables as lora.use_gradient_checkpointing takes them, in JSON."""
    from fastft_jax.models.remat import resolve_policy

    try:
        return [resolve_policy(json.loads(text) if text.startswith("{") else text) for text in texts]
    except json.JSONDecodeError as error:
        raise ConfigError(f"--policy: {error.doc} is not a JSON table: {error}") from error


def _speeds(copy: float | None) -> Any:
    import jax

    from fastft_jax.bench.profile import Speeds
    from fastft_jax.trainers.environment import device_peak_flops

    kind = jax.local_devices()[0].device_kind
    return Speeds(device_peak_flops(kind), SUSTAINED.get(kind), copy)


def _prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Set up the cache, say what the run is on, and return it."""
    import jax

    from fastft_jax.trainers.compile_cache import use_compile_cache
    from fastft_jax.trainers.environment import environment, environment_lines

    if arguments.compile_cache is not None:
        use_compile_cache(arguments.compile_cache)
    known = environment(jax.local_devices()[0])
    for line in environment_lines(known):
        print(line)
    return known


def _kernels(arguments: argparse.Namespace, command: str) -> int:
    known = _prepare(arguments)
    from fastft_jax.bench import kernels, record

    copy = kernels.copy_speed()
    print("memory: " + ("-" if copy is None else f"{copy / 1e12:.2f} TB/s, a copy's read plus write"))
    facts, speeds, failed = record.facts(command, known) | {"copy_bytes_per_second": copy}, _speeds(copy), False
    print(kernels.HEADER)
    for case in kernels.cases(arguments.kernels):
        measured = kernels.measure(case, speeds)
        failed |= "error" in measured["kernel"]
        print(kernels.line(measured), flush=True)
        if arguments.out:
            record.append(arguments.out, facts | measured)
    return int(failed)


def _geometry(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastft_jax.bench.geometries import read_geometry

    values = read_geometry(arguments.like, arguments.config)
    return values | ({} if arguments.layers is None else {"num_hidden_layers": arguments.layers})


def _check(arguments: argparse.Namespace, command: str) -> int:
    hf_config = _geometry(arguments)
    from fastft_jax.bench import check, record
    from fastft_jax.bench.measure import Workload
    from fastft_jax.bench.random_model import add_adapter, random_base

    policies = _policies(arguments.policy)
    known = _prepare(arguments)
    kinds = {"dtype": arguments.dtype, "compute_dtype": arguments.compute_dtype}
    model = add_adapter(random_base(hf_config, **kinds, max_length=max(arguments.seq)), arguments.r, init=False)
    failed = False
    for policy, batch, seq in itertools.product(policies, arguments.batch, arguments.seq):
        policy = "none" if policy == "auto" else policy
        print(f"{arguments.config or arguments.like}: policy {policy}, {batch} x {seq}")
        found = check.check(model.decoder, Workload(policy, batch, seq, arguments.packed))
        failed |= not found["within_noise"]
        for text in check.lines(found):
            print("  " + text, flush=True)
        if arguments.out:
            what = {"policy": policy, "batch": batch, "seq": seq, "packed": arguments.packed}
            record.append(arguments.out, record.facts(command, known) | _chosen(arguments) | what | {"check": found})
    return int(failed)


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The model of a record."""
    chosen = {key: getattr(arguments, key) for key in ("layers", "r", "optim", "dtype", "compute_dtype")}
    return {"model": arguments.config or arguments.like} | chosen


def _steps(arguments: argparse.Namespace, command: str) -> int:
    hf_config = _geometry(arguments)
    import jax

    from fastft_jax.bench import profile, record
    from fastft_jax.bench.kernels import copy_speed
    from fastft_jax.bench.measure import Bench, Profiling, Workload
    from fastft_jax.bench.random_model import add_adapter, random_base
    from fastft_jax.bench.start import Start

    policies = _policies(arguments.policy)
    start = Start()
    start.end("imports")
    known = _prepare(arguments)
    start.end("device")
    kinds = {"dtype": arguments.dtype, "compute_dtype": arguments.compute_dtype}
    model = random_base(hf_config, **kinds, max_length=max(arguments.seq))
    start.end("weights")
    bench = Bench(add_adapter(model, arguments.r), optim=arguments.optim)
    del model
    start.end("adapter")
    print(f"{arguments.config or arguments.like}: random weights, {bench.trainable_count:,} trained parameters")
    print(record.HEADER)

    @functools.cache
    def common() -> dict[str, Any]:
        cached = {"compile_cache": arguments.compile_cache is not None}
        return record.facts(command, known) | _chosen(arguments) | cached

    failed, speeds = False, functools.cache(lambda: _speeds(copy_speed()))
    for index, (policy, batch, seq) in enumerate(itertools.product(policies, arguments.batch, arguments.seq)):
        work, profiling, table = Workload(policy, batch, seq, arguments.packed), None, None
        if arguments.profile or arguments.trace:
            profiling = Profiling(arguments.trace and arguments.trace / f"{policy}-{batch}x{seq}", speeds)
        try:
            # later runs have nothing to start
            began = start if index == 0 else None
            run, table = bench.run(
                work, steps=arguments.steps, warmup=arguments.warmup, profiling=profiling, start=began
            )
        except Exception as error:
            if FULL not in str(error):
                raise
            failed, run = True, {"policy": policy, "batch": batch, "seq": seq, "error": "the device's memory is full"}
        print(record.line(run), flush=True)
        if index == 0:
            print("  " + start.line())
        if table and jax.default_backend() == "gpu":
            print("  profile of the same step without CUDA graphs, a little slower:")
        for text in profile.lines(table) if table else ():
            print("  " + text)
        if arguments.out:
            record.append(arguments.out, common() | run | ({"profile": profile.as_record(table)} if table else {}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
