"""A trained Llama (stories260K) and published data sets go through the command line, and PEFT repeats the result."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastft_jax import FastLanguageModel
from fastft_jax.models import lora
from fastft_jax.quant.nf4 import NF4Array, dequantize

TOLERANCE = 1e-4  # float32 on both sides: the order of sums differs


def losses(folder: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


@pytest.fixture
def write(stories, tmp_path):
    """The YAML of a QLoRA run on the real model; evaluated before (see `untrained`) and after."""

    def write_config(data: dict, training: dict | None = None) -> Path:
        sections = {
            "model": {"model_name": str(stories()), "max_seq_length": 512, "dtype": "float32"},
            "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            "data": {"packing": True, "train_on_responses_only": True, **data},
            "training": {
                "output_dir": str(tmp_path / "out"),
                "num_train_epochs": 2,
                "per_device_train_batch_size": 2,
                "learning_rate": 5e-3,
                "optim": "adamw",
                "eval_strategy": "epoch",
                "save_strategy": "no",
                **(training or {}),
            },
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    return write_config


def untrained_loss(config: Path) -> float:
    """Held-out loss of the model before training, by the trainer's own evaluation."""
    from fastft_jax.config import load_config
    from fastft_jax.sft import _rows
    from fastft_jax.trainers.sft import SFTTrainer

    options, _ = load_config(config)
    model, tokenizer = FastLanguageModel.from_pretrained(**options.model.model_dump())
    model = FastLanguageModel.get_peft_model(model, **options.lora.model_dump())
    return SFTTrainer(model, tokenizer, *_rows(options), options.training).evaluate()["eval_loss"]


# name -> (data section, changes to the training section, what the log says of the rows). This model's 512 pieces make
# long texts, so the sets are small and many rows are cut.
SETS = {
    "alpaca columns": (
        {"path": "alpaca_en_demo.json", "chat_template": "alpaca", "split": "train[:24]", "eval_split": "train[24:34]"},
        {"optim": "adamw_8bit"},
        "train: 24 rows",
    ),
    # messages whose content is a list of parts, with loss weights; the English ones
    "messages": (
        {"path": "v1_sft_demo.jsonl", "chat_template": "zephyr", "split": "train[100:124]"}
        | {"eval_split": "train[124:134]"},
        {},
        "train: 24 rows",
    ),
    # sharegpt turns with tools, calls and observations; the tools' descriptions alone are 300 tokens
    "tool calls": (
        {"path": "glaive_toolcall_en_demo.json", "chat_template": "chatml", "split": "train[:12]"}
        | {"eval_split": "train[12:18]", "max_length": 512},
        {},
        "train: 12 rows",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_qlora_on_real_rows_lowers_held_out_loss_and_peft_repeats_it(name, shared_data, write, cli, tmp_path):
    data, training, said = SETS[name]
    config = write({"max_length": 256} | data | {"path": str(shared_data / "sft" / data["path"])}, training)
    before = untrained_loss(config)
    ran = cli("--config", config)
    assert ran.code == 0, ran.err
    assert "read back: 70 tensors" in ran.out and said in ran.out
    after = losses(tmp_path / "out", "eval_loss")[-1]
    print(f"{name}: held-out loss {before:.3f} -> {after:.3f}")
    assert after < before - 0.1
    check_against_peft(tmp_path / "out")


def check_against_peft(adapter: Path) -> None:
    """PEFT on transformers, holding our NF4 base dequantised, gives our logits and our greedy tokens."""
    import peft
    import torch
    import transformers

    ours, tokenizer = FastLanguageModel.from_pretrained(adapter, dtype="float32", max_seq_length=512)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for site in lora.sites(ours.decoder, ours.names):
            w = site.linear.weight.get_value()
            one = NF4Array(*(x[site.row] for x in (w.codes, w.absmax, w.absmax_scale, w.absmax_offset)), w.shape)
            model.get_submodule(site.hf_path).weight.copy_(torch.tensor(np.asarray(dequantize(one, "float32"))))
    model = peft.PeftModel.from_pretrained(model, adapter).eval()

    questions = ["What is a dog?", "Tell me a story about Lily and a red ball.", "Write three words."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for question in questions
    ]
    answers = ours.generate(prompts, max_new_tokens=24, eos_token_ids=(tokenizer.eos_token_id,))
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    logits = np.asarray(  # one padded batch: one program to compile
        ours(
            [row + [0] * (width - len(row)) for row in rows],
            [[1] * len(row) + [0] * (width - len(row)) for row in rows],
        )
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            theirs = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
            )[0, len(prompt) :].tolist()
            expected = model(torch.tensor([rows[i]])).logits[0].numpy()
        assert answer == theirs
        np.testing.assert_allclose(logits[i, : len(rows[i])], expected, atol=TOLERANCE, rtol=0)


def test_the_documented_story_comes_out_greedily(shared_data, stories):
    """The start of the 200 tokens that llama2.c documents for this model at temperature 0."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        stories(), dtype="float32", load_in_4bit=False, max_seq_length=512
    )
    (new,) = model.generate([[tokenizer.bos_token_id]], max_new_tokens=60)
    text = tokenizer.decode(new)
    assert text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
