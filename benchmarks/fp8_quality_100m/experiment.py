"""The stages of `run` in their order, and what their records say together."""

import datetime
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from compare import compare, worst_linear
from finetune import Arm, Base, Plan, held_out_batches, quantise
from prepare import load_questions
from pretrain import Pretraining, pretrain

from fastft_jax.bench.record import append
from fastft_jax.models.compute_dtype import check_compute_dtype
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.trainers.environment import environment

KEEP_FROM = 1.5  # times the others' error: from there on a linear is tried in bf16
COMPARED_BATCHES = 4


class Scale(NamedTuple):
    """The model's sizes and how long it is trained."""

    width: int
    ffn: int
    layers: int
    heads: int
    pretraining: Pretraining
    plan: Plan
    test_documents: int | None = None


FULL = Scale(768, 2048, 14, 12, Pretraining(16, 512, 6, 6e-4, 100), Plan(8, 1024, 2, 1e-3))
SMALL = Scale(128, 256, 2, 2, Pretraining(4, 128, 1, 2e-3, 5, 16), Plan(2, 640, 1, 2e-3, max_steps=8), 4)


def experiment(
    tokens: dict[str, np.ndarray], scale: Scale, seeds: list[int], keep: str | None, other: int, out: Path, command: str
) -> None:
    """Everything of `run`; a record after every part."""
    check_compute_dtype("fp8")
    start, known = time.perf_counter(), environment(jax.local_devices()[0])
    common = {"date": datetime.date.today().isoformat(), "device": known["device"], "driver": known.get("driver")}
    common |= {"packages": known["packages"], "xla_flags": known["xla_flags"], "command": command}

    def write(stage: str, record: dict[str, Any]) -> None:
        record = {"stage": stage} | record | {"at_seconds": round(time.perf_counter() - start, 1)}
        append(out, common | record)
        print(json.dumps({key: value for key, value in record.items() if key not in _LONG}), flush=True)

    info, plan = json.loads(str(tokens["info"])), scale.plan
    hf_config = llama(scale, info["vocab_size"])
    config, names = config_from_hf(hf_config)
    weights, record = pretrain(config, tokens["corpus"], scale.pretraining)
    arrays, nf4_errors = quantise(config, weights)
    del weights
    write("pretrain", {"model": hf_config, "data": info} | record | {"nf4_weight_errors": nf4_errors})

    base = Base(config, names, hf_config, arrays)
    train = load_questions(tokens, "train")
    test, options = held_out_batches(load_questions(tokens, "test", scale.test_documents), plan, config)
    records: list[dict] = []

    def finetune(arm: Arm, adapter_seed: int, data_seed: int) -> Any:
        trainable, record = arm.train(train, adapter_seed, data_seed)
        records.append(record)
        write("finetune", {"plan": plan._asdict()} | record)
        return trainable

    bf16 = Arm("bf16", base, plan, test, options, compute=None)
    fp8 = Arm("fp8", base, plan, test, options, compute="fp8")
    tuned = None
    for seed in seeds:
        trainable = finetune(bf16, seed, seed)
        tuned = trainable if tuned is None else tuned
        finetune(fp8, seed, seed)
    finetune(bf16, other, seeds[0])
    write("summary", summary(records))

    errors = compare(base, plan, tuned, test[:COMPARED_BATCHES], options)
    for kind in ("linears", "gradient_cosines"):
        for name, found in errors[kind].items():
            print(f"{kind} {name:26s}", *(f"{arm} median {found[arm]['median']:.5f}" for arm in found), flush=True)
    worst, ratio = worst_linear(errors["linears"])
    write("errors", errors | {"worst_linear": worst, "times_the_others": round(ratio, 3)})
    if keep is None and ratio > KEEP_FROM:
        keep = worst
    if keep is not None:
        kept = Arm(f"fp8 but {keep}", base, plan, test, options, compute="fp8", keep=(keep,))
        for seed in seeds:
            finetune(kept, seed, seed)
        write("summary", summary(records))


def llama(scale: Scale, vocab_size: int) -> dict[str, Any]:
    """Its config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": scale.width,
        "intermediate_size": scale.ffn,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.heads,
        "head_dim": scale.width // scale.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab_size,
    }


def summary(records: list[dict]) -> dict[str, Any]:
    """Final held-out losses of each arm over the seeds, and each arm's difference from bf16 seed by seed.

    standard_error is that of the mean of the paired differences. other_adapter: how far another start of the adapter
    moves bf16, the data unchanged.
    """
    paired = [record for record in records if record["adapter_seed"] == record["data_seed"]]
    finals: dict[str, dict[int, float]] = {}
    for record in paired:
        finals.setdefault(record["arm"], {})[record["data_seed"]] = record["final_held_out_loss"]
    out: dict[str, Any] = {"final_held_out_loss": {}, "minus_bf16": {}}
    for arm, by_seed in finals.items():
        out["final_held_out_loss"][arm] = _statistics(list(by_seed.values()))
        if arm != "bf16":
            found = _statistics([by_seed[seed] - finals["bf16"][seed] for seed in by_seed])
            if found["sd"] is not None:
                found["standard_error"] = round(found["sd"] / len(by_seed) ** 0.5, 6)
            out["minus_bf16"][arm] = found
    for record in records:
        if record["adapter_seed"] != record["data_seed"]:
            difference = record["final_held_out_loss"] - finals[record["arm"]][record["data_seed"]]
            out["other_adapter"] = round(difference, 6)
    return out


def _statistics(values: list[float]) -> dict[str, Any]:
    sd = round(float(np.std(values, ddof=1)), 6) if len(values) > 1 else None
    return {"values": [round(value, 6) for value in values], "mean": round(float(np.mean(values)), 6), "sd": sd}


_LONG = ("model", "data", "plan", "train_losses", "linears", "gradient_cosines")
