"""Training speed of Unsloth on the work of `python -m fastft_jax.bench --config FILE --policy none`: the same geometry,
random weights, rank, batch and optimizer.

    python benchmarks/unsloth_steps.py --config benchmarks/configs/qwen3-8b.json --out unsloth.jsonl

A LoRA training step of an NF4 base (double quantisation, bf16 compute; rank 32, alpha 32, no dropout, on q, k, v, o,
gate, up and down; 2 x 4096 random ids, all labels valid; bitsandbytes' AdamW8bit, gradients clipped to norm 1, no
gradient checkpointing unless --checkpointing says so): warm-up steps, then steps timed one by one, the device
synchronised before and after each. Appends one JSON line: median, smallest and largest step, tokens a second, the
allocator's peak of the steps, the losses, versions, card, what Unsloth said of itself, which attention it chose, and
the longest kernels of one more step that a profiler saw; or the error, if a step failed.

Unsloth is used through its documented API, unmodified: FastLanguageModel.from_pretrained on a local folder,
get_peft_model, for_training, loss = model(input_ids, labels).loss under bf16 autocast, as its trainer runs it. The
folder (5 GB under TMPDIR: a checkpoint quantised beforehand, as Unsloth publishes them, and a byte-level tokenizer) is
made by a second process on the same card while Unsloth is imported. Nothing is downloaded.

FILE is a Hugging Face config.json of model_type llama, mistral, qwen2, qwen3 or gemma2.

Needs one NVIDIA GPU and an environment of its own, without fastft_jax. The records in peers.jsonl were made with Python
3.12.3, unsloth and unsloth_zoo 2026.10.9, torch 2.11.0 (CUDA 13.0, cuDNN 9.19.0), triton 3.6.0, transformers 5.17.0,
bitsandbytes 0.50.2, peft 0.21.0, accelerate 1.15.0, trl 1.15.0, torchao 0.18.0, cut-cross-entropy 25.1.1; neither
flash-attn nor xformers was installed. Exit codes: 0 measured, 1 not, 2 a wrong option.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

STARTED = time.perf_counter()
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
NF4 = {
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": ["lm_head"],
    "load_in_4bit": True,
    "quant_method": "bitsandbytes",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = {"none": False, "full": True, "unsloth": "unsloth"}
SPECIAL = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "unk_token": "<|unknown|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
PACKAGES = ["unsloth", "unsloth_zoo", "bitsandbytes", "torch", "triton", "transformers", "peft", "accelerate", "trl"]
PACKAGES += ["nvidia-cudnn-cu13", "torchao", "cut-cross-entropy", "flash-attn", "xformers"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="a Hugging Face config.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the JSON line to FILE")
    parser.add_argument("--checkpointing", choices=CHECKPOINTING, default="none", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--r", type=int, default=32, help="LoRA rank and alpha (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="timed steps (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write the checkpoint into FOLDER")
    arguments = parser.parse_args()
    try:
        config = read_config(arguments.config)
    except (OSError, ValueError) as error:
        parser.error(f"--config {arguments.config}: {error}")
    if arguments.layers is not None:
        config["num_hidden_layers"] = arguments.layers
    if arguments.prepare is not None:
        write_checkpoint(arguments.prepare, config)
        return 0
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory(prefix="unsloth-steps-") as folder:
        record = measure(arguments, Path(folder))
    line = json.dumps(record)
    print(line, flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(line + "\n")
    return int("error" in record)


def read_config(path: Path) -> dict:
    """The config.json, its weights tied as transformers does where it does not say. ValueError for another family."""
    config = json.loads(path.read_text(encoding="utf-8"))
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}, not one of {', '.join(FAMILIES)}")
    return {"tie_word_embeddings": family == "gemma2"} | config


# The checkpoint


def write_checkpoint(folder: Path, config: dict) -> None:
    """config.json, a tokenizer and random weights: linear layers in NF4 as bitsandbytes saves them, others in bf16."""
    import torch
    from bitsandbytes import functional
    from safetensors.torch import save_file

    write_tokenizer(folder, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensors(shapes):
        for name, shape in shapes:
            if name.endswith("norm.weight"):
                gain = float(config["model_type"] != "gemma2")  # Gemma's are added to one
                yield name, torch.full(shape, gain, dtype=torch.bfloat16)
                continue
            value = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
            if not name.endswith("_proj.weight"):
                yield name, value.cpu()
                continue
            codes, state = functional.quantize_4bit(
                value, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
            )
            yield name, codes.cpu()
            for part, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{part}", tensor.cpu().contiguous()

    shards = shard_shapes(config)
    index, size = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = dict(tensors(shapes))
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        size += sum(tensor.nbytes for tensor in shard.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "config.json", config | ids | {"dtype": "bfloat16", "quantization_config": NF4})


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def shard_shapes(config: dict) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of the weights as transformers saves them: the embedding and head, then eight layers a file."""
    keys = ("hidden_size", "intermediate_size", "vocab_size", "model_type")
    width, ffn, vocab, family = (config[key] for key in keys)
    head = config.get("head_dim") or width // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shards = [[("model.embed_tokens.weight", (vocab, width)), ("model.norm.weight", (width,))]]
    if not config["tie_word_embeddings"]:
        shards[0].append(("lm_head.weight", (vocab, width)))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(config["num_hidden_layers"]):
        if layer % 8 == 0:
            shards.append([])
        at = f"model.layers.{layer}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shards[-1].append((f"{at}self_attn.{name}_proj.weight", (rows, width)))
            if family == "qwen2":
                shards[-1].append((f"{at}self_attn.{name}_proj.bias", (rows,)))
        shards[-1].append((f"{at}self_attn.o_proj.weight", (width, q)))
        if family == "qwen3":
            shards[-1] += [(f"{at}self_attn.{name}_norm.weight", (head,)) for name in "qk"]
        shards[-1] += [(f"{at}mlp.{name}_proj.weight", (ffn, width)) for name in ("gate", "up")]
        shards[-1].append((f"{at}mlp.down_proj.weight", (width, ffn)))
        shards[-1] += [(f"{at}{name}.weight", (width,)) for name in norms]
    return shards


def write_tokenizer(folder: Path, config: dict) -> None:
    """One token a byte, then the special ones: training here takes ids, but Unsloth wants a tokenizer."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = SPECIAL | {"chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": config["max_position_embeddings"], "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    write_json(folder / "special_tokens_map.json", SPECIAL)


# The measurement


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """The record of the run; with `error` where it did not come to its end."""
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "model": arguments.config.stem,
        "layers": arguments.layers,
        "r": arguments.r,
        "optim": "adamw_8bit",
        "dtype": "bfloat16",
        "policy": arguments.checkpointing,
        "batch": arguments.batch,
        "seq": arguments.seq,
        "tokens_per_step": arguments.batch * arguments.seq,
        "seconds": {},
    }
    # a process of its own: it needs the card, whose allocator Unsloth's import sets up in this one
    writer = subprocess.Popen([sys.executable, *sys.argv, "--prepare", str(folder)])
    output: list[str] = []
    with contextlib.redirect_stdout(Tee(sys.stdout, output)), contextlib.redirect_stderr(Tee(sys.stderr, output)):
        try:
            import unsloth  # noqa: F401, I001 - before everything that it changes
            import torch

            record["seconds"]["import"] = since(STARTED)
            record |= machine(torch)
            model = load(arguments, folder, writer, record["seconds"])
            record["attention"] = {"implementation": model.config._attn_implementation}
            record["loaded_bytes"] = torch.cuda.memory_allocated()
            record["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            record |= time_steps(model, arguments)
        except Exception as error:
            traceback.print_exc()
            record["error"] = brief(error)
            if "loaded_bytes" in record:
                record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        finally:
            if writer.poll() is None:
                writer.kill()
                writer.wait()
    lines = [line.strip(" \\/=()") for line in "".join(output).splitlines()]
    return record | {"said": [line for line in lines if "Unsloth" in line or "Xformers =" in line]}


class Tee:
    """A stream that also remembers what was written to it: Unsloth says what it patched, compiles and found."""

    def __init__(self, stream, kept: list[str]):
        self.stream, self.kept = stream, kept

    def write(self, text: str) -> int:
        self.kept.append(text)
        return self.stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def load(arguments: argparse.Namespace, folder: Path, writer: subprocess.Popen, seconds: dict):
    """The model with its adapters, by Unsloth."""
    import torch
    from unsloth import FastLanguageModel

    checkpointing = CHECKPOINTING[arguments.checkpointing]
    start = time.perf_counter()
    if writer.wait() != 0:
        raise RuntimeError("the process that writes the checkpoint failed")
    seconds["wait_for_weights"] = since(start)
    start = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=arguments.seq,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    seconds["load"] = since(start)
    linear = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    if linear != len(TARGETS) * model.config.num_hidden_layers:
        raise RuntimeError(f"{linear} linear layers are in 4 bits, not all")
    start = time.perf_counter()
    model = FastLanguageModel.get_peft_model(
        model,
        r=arguments.r,
        lora_alpha=arguments.r,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=checkpointing,
        random_state=0,
    )
    seconds["adapters"] = since(start)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    return model


def time_steps(model, arguments: argparse.Namespace) -> dict:
    """Warm up, time the steps, then profile one more."""
    import torch
    from bitsandbytes.optim import AdamW8bit

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(parameters, lr=2e-4, weight_decay=0.01)
    generator = torch.Generator("cuda").manual_seed(0)

    def step() -> float:
        shape = (arguments.batch, arguments.seq)
        ids = torch.randint(model.config.vocab_size, shape, device="cuda", generator=generator)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids.clone()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, losses, first = [], [], None
    for number in range(arguments.warmup + arguments.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        first = first or since(STARTED)
        print(f"step {number}: {times[-1]:.4f} s, loss {losses[-1]:.4f}", flush=True)
    timed = times[arguments.warmup :]
    milliseconds = [round(1e3 * each, 2) for each in timed]
    tokens = arguments.batch * arguments.seq
    out = {
        "steps": arguments.steps,
        "milliseconds_per_step": round(1e3 * statistics.median(timed), 2),
        "milliseconds_per_step_range": [min(milliseconds), max(milliseconds)],
        "milliseconds": milliseconds,
        "tokens_per_second": round(tokens / statistics.median(timed), 1),
        "tokens_per_second_range": [round(tokens / max(timed), 1), round(tokens / min(timed), 1)],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "warmup_seconds": [round(each, 2) for each in times[: arguments.warmup]],
        "start_to_first_step_seconds": first,
        "losses": [round(each, 4) for each in losses],
        "checkpointing_modules": sum(bool(getattr(m, "gradient_checkpointing", False)) for m in model.modules()),
        "clocks": smi("clocks.sm,power.draw,temperature.gpu"),
    }
    try:
        out["kernels"] = kernels(step)
    except Exception as error:  # the times are what counts
        out["kernels_error"] = brief(error)
    return out


def kernels(step, most: int = 24) -> list[list]:
    """[name, milliseconds, launches] of the longest kernels of one step."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    total: dict[str, list] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = total.setdefault(event.name, [0.0, 0])
            entry[0] += event.time_range.elapsed_us() / 1e3
            entry[1] += 1
    rows = [[name[:160], round(ms, 3), count] for name, (ms, count) in total.items()]
    return sorted(rows, key=lambda row: -row[1])[:most]


# What it ran on


def machine(torch) -> dict:
    packages = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    facts = smi("driver_version,power.limit")
    return {
        "device": torch.cuda.get_device_name(),
        "driver": facts.get("driver_version"),
        "power_limit_watts": facts.get("power.limit"),
        "packages": packages,
    }


def smi(fields: str) -> dict:
    """What nvidia-smi says of the first card, numbers as such; empty where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split(",")
    except (OSError, subprocess.SubprocessError):
        return {}
    found = dict(zip(fields.split(","), (value.strip() for value in values), strict=False))
    return {key: float(text) if text.replace(".", "", 1).isdigit() else text for key, text in found.items()}


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:600]}"


def since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


if __name__ == "__main__":
    sys.exit(main())
