"""Bad input is answered in a line or two that name the culprit, and leaves nothing half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from fastft_jax.convert.safetensors import Checkpoint, write_safetensors, write_sharded

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def refused(cli, tmp_path):
    """`refused(code, words, *arguments)`: that exit code, one or two lines, these words in them, no output folder."""

    def check(code: int, words: list[str], *arguments: str) -> str:
        ran = cli(*arguments)
        said = [line for line in ran.err.splitlines() if not line.startswith("warning: ")]
        assert (ran.code, "Traceback" in ran.err) == (code, False), ran.err
        assert 1 <= len(said) <= 2 and said[0].startswith("error: "), ran.err
        assert [word for word in words if word not in ran.err] == [], ran.err
        assert not (tmp_path / "out").exists()
        assert list(tmp_path.glob(".out*")) == []
        return ran.err

    return check


@pytest.fixture
def folder(repo, tmp_path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(repo / "examples" / "tiny-base", tmp_path / "model"))


def _tensors(folder: Path) -> dict:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


def _shard(folder: Path) -> list[str]:
    tensors = _tensors(folder)
    (folder / "model.safetensors").unlink()
    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    names = write_sharded(folder, layout, tensors.get, "400KB", durable=False)
    assert len(names) > 2
    return names


def _rewrite(folder: Path, **changes) -> None:
    """The weights with some tensors changed, or taken out (None)."""
    tensors = _tensors(folder) | {name.replace("__", "."): array for name, array in changes.items()}
    write_safetensors(folder / "model.safetensors", {n: a for n, a in tensors.items() if a is not None})


def _edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def _missing_shard(folder):
    names = _shard(folder)
    (folder / names[1]).unlink()
    return [names[1], "lacks 1 of"]


def _outside(folder):
    _shard(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    return [name, "outside the folder", "../elsewhere.safetensors"]


def _truncated(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    return ["model.safetensors", "truncated"]


def _wrong_shape(folder):
    name = "model.layers.1.self_attn.q_proj.weight"
    _rewrite(folder, **{name: _tensors(folder)[name][:, :-8].copy()})
    return [name, "[128, 120]", "[128, 128]"]


def _missing_tensor(folder):
    _rewrite(folder, **{"model.layers.2.mlp.up_proj.weight": None})
    return ["lacks 'model.layers.2.mlp.up_proj.weight'"]


def _unexpected_tensor(folder):
    name = "model.layers.0.self_attn.q_proj.bias"
    _rewrite(folder, **{name: _tensors(folder)["model.norm.weight"]})
    return [f"holds '{name}'", "config.json does not call for"]


def _wrong_dtype(folder):
    name = "model.layers.0.self_attn.q_proj.weight"
    _rewrite(folder, **{name: _tensors(folder)[name].astype("int16")})
    return [name, "int16", "bfloat16"]


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return ["pytorch_model.bin", "safetensors only", "convert_bin_to_safetensors.py"]


def _lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return ["model.safetensors", "git lfs pull"]


def _no_weights(folder):
    (folder / "model.safetensors").unlink()
    return ["has no weights", "model.safetensors"]


def _remote_code(folder):
    _edit(folder / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    return ["model_type='mine'", "llama, mistral, qwen2, qwen3", "trust_remote_code"]


def _awq(folder):
    _edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    return ["quantization_config", "'awq'"]


def _more_layers(folder):
    _edit(folder / "config.json", num_hidden_layers=4)
    return ["lacks 'model.layers.3.input_layernorm.weight'", "more tensors"]


def _softcapping(folder):
    _edit(folder / "config.json", attn_logit_softcapping=50.0)
    return ["attn_logit_softcapping=50.0"]


def _no_config(folder):
    (folder / "config.json").unlink()
    return ["no config.json"]


def _broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')
    return ["config.json is not valid JSON"]


def _no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return ["warning: ", "no tokenizer files", "error: there is no tokenizer"]


def _broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return ["the tokenizer in", "cannot be read"]


def _sentencepiece_only(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    return ["tokenizer.model but no tokenizer.json", "save_pretrained"]


def _neither_pad_nor_eos(folder):
    _edit(folder / "tokenizer_config.json", pad_token=..., eos_token=...)
    return ["neither a pad_token nor an eos_token"]


def _tokenizer_too_large(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    kind = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"] += [{"id": 1024 + i, "content": f"<|new{i}|>", **kind} for i in range(3)]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return ["up to id 1,02", "embedding has 1,024 rows"]


def _no_template(folder):
    _edit(folder / "tokenizer_config.json", chat_template=...)
    return ["no chat template", "chatml"]


def _broken_template(folder):
    _edit(folder / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content }}")
    return ["row 0", "chat template", "endfor"]


BROKEN_MODELS = [
    *(_missing_shard, _outside, _truncated, _wrong_shape, _missing_tensor, _unexpected_tensor, _wrong_dtype),
    *(_pickle_only, _lfs_pointer, _no_weights, _remote_code, _awq, _more_layers, _softcapping, _no_config),
    *(_broken_config, _no_tokenizer, _broken_tokenizer, _sentencepiece_only, _neither_pad_nor_eos),
    *(_tokenizer_too_large, _no_template, _broken_template),
]


@pytest.mark.parametrize("damage", BROKEN_MODELS, ids=lambda damage: damage.__name__.strip("_"))
def test_a_broken_model_folder(damage, folder, refused, run_config):
    words = damage(folder)
    refused(1, words, "--config", run_config({"model": {"model_name": str(folder)}}))


def test_a_config_key_without_a_meaning_is_only_a_warning(folder, cli, run_config):
    _edit(folder / "config.json", my_note="hello")
    ran = cli("--config", run_config({"model": {"model_name": str(folder)}}), "--dry-run")
    assert ran.code == 0
    assert ran.err.splitlines() == ["warning: config.json keys without a meaning here are ignored: my_note='hello'"]


def test_no_model_folder(refused, run_config, tmp_path):
    refused(1, [f"{tmp_path}/none", "no folder"], "--config", run_config(), f"model.model_name={tmp_path}/none")
    (tmp_path / "file").write_text("x")
    refused(1, [f"{tmp_path}/file is a file"], "--config", run_config(), f"model.model_name={tmp_path}/file")


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
LONG = {"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "Hello"}]}
GOOD = json.dumps(CHAT)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", "", ["rows.jsonl", "empty"]),
        ("rows.json", "[]", ["rows.json", "no rows"]),
        ("rows.jsonl", f"{GOOD}\n{GOOD[:-3]}\n", ["rows.jsonl", "malformed JSON at line 2"]),
        ("rows.json", '[{"messages": 1},', ["rows.json", "malformed JSON"]),
        ("rows.json", '{"a": 1}', ["rows.json", "list of objects"]),
        ("rows.jsonl", '{"title": "x", "body": "y"}\n', ["title, body", "no known format", "instruction"]),
        ("rows.jsonl", f'{GOOD}\n{{"messages": []}}\n', ["row 1", "empty"]),
        ("rows.jsonl", f'{GOOD}\n{{"messages": [{{"role": "wizard", "content": "x"}}]}}\n', ["row 1", "wizard"]),
        ("rows.jsonl", GOOD.encode() + b'\n{"messages": "\xff\xfe"}\n', ["not UTF-8 at line 2", "0xff"]),
        ("rows.csv", "instruction,output\na,b\nc\n", ["rows.csv", "line 3 has 1 values, the header 2"]),
        ("rows.parquet", "PAR1 not really", ["rows.parquet", "not a readable parquet file"]),
        ("rows.xml", "<rows/>", ["rows.xml", "unknown kind of file", ".jsonl"]),
        ("rows.jsonl", json.dumps(LONG) + "\n", ["nothing would be trained", "max_length=32", "1 were truncated"]),
        ("rows.txt", "some text\n", ["train_on_responses_only", "text column has no responses"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:24],
)
def test_a_data_set_that_cannot_be_trained_on(name, content, words, refused, run_config, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(1, words, "--config", run_config({"data": {"path": str(path), "split": ..., "max_length": 32}}))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=/none/rows.jsonl", ["/none/rows.jsonl: no such file"]),
        ("data.split=train[5000:]", ["no rows in split 'train[5000:]'"]),
        ("data.split=test", ["one file is one split", "split='test'"]),
        ("data.split=train[", ["train["]),
        ("data.data_format=alpaca", ["'alpaca' wants instruction, output", "the columns are messages"]),
        ("data.chat_template=chatmll", ["chat_template 'chatmll'", "did you mean 'chatml'?"]),
        ("data.eval_fraction=0.001 training.eval_strategy=epoch", ["eval_fraction=0.001 of 24 rows"]),
        ("training.resume_from_checkpoint=/none/checkpoint-3", ["/none/checkpoint-3 is not a checkpoint"]),
        ("training.output_dir=/proc/none/out", ["/proc/none", "No such file or directory"]),
        (f"training.output_dir={'x' * 300}", ["File name too long"]),
        (f"model.model_name=/{'x' * 300}", ["File name too long"]),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:40],
)
def test_what_only_the_disk_or_the_data_can_tell_fails_with_1(override, words, refused, run_config):
    refused(1, words, "--config", run_config(), *override.split())


def test_no_permission_to_read_the_data(refused, run_config, monkeypatch):
    """Simulated, because root may read anything."""

    def denied(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(1, ["quickstart_train.jsonl", "Permission denied"], "--config", run_config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"learning_rte": 1e-4}}, ["learning_rte", "did you mean learning_rate?"]),
        ({"model": {"model_nam": "x", "model_name": "y"}}, ["model_nam", "did you mean model_name?"]),
        ({"trainig": {"max_steps": 1}}, ["no section trainig", "did you mean training?"]),
        ({"lora": {"r": "sixteen"}}, ["lora.r is 'sixteen'", "whole number"]),
        ({"lora": {"r": 0}}, ["lora.r is 0", "at least 1"]),
        ({"lora": {"lora_dropout": 1.5}}, ["lora.lora_dropout is 1.5", "less than 1"]),
        ({"training": {"learning_rate": -1}}, ["training.learning_rate is -1", "greater than 0"]),
        ({"training": {"optim": "adamm"}}, ["training.optim is 'adamm'", "adamw_8bit"]),
        ({"data": {"packing": "sometimes"}}, ["data.packing is 'sometimes'", "true or false"]),
        ({"data": {"path": ...}}, ["data.path is required"]),
        ({"data": {"max_length": 4096}}, ["data.max_length 4096 is beyond model.max_seq_length 128"]),
        ({"lora": {"target_modules": ["q_prj"]}}, ["q_prj", "did you mean q_proj?"]),
        ({"lora": {"target_modules": "(q_proj"}}, ["(q_proj", "not a regular expression"]),
        ({"lora": {"layers_to_transform": [7]}}, ["layers_to_transform=[7]"]),
        ({"lora": {"modules_to_save": ["q_proj"]}}, ["modules_to_save", "q_proj"]),
        # options whose promise is not built
        ({"model": {"load_in_8bit": True, "full_finetuning": True}}, ["load_in_8bit=True", "take one"]),
        ({"model": {"full_finetuning": True}}, ["take out lora.r, lora.target_modules"]),
        ({"lora": {"loftq_config": {"bits": 4}}}, ["loftq_config has no 'bits'"]),
        ({"lora": {"init_lora_weights": "olora"}}, ["init_lora_weights", "olora"]),
        ({"lora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True}}, ["use_dora=True with lm_head"]),
    ],
    ids=lambda value: None if isinstance(value, list) else json.dumps(value, default=str)[:50],
)
def test_a_wrong_or_unbuilt_option_fails_with_2(changes, words, refused, run_config):
    refused(2, words, "--config", run_config(changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["run.yaml: there is no such file"]),
        (b"model: [1\n", ["run.yaml:"]),
        (b"model:\n  model_name: \xff\n", ["run.yaml: not UTF-8"]),
        (b"", ["model", "is required"]),
        (b"- 1\n", ["run.yaml:1: a config is a mapping of sections"]),
    ],
)
def test_a_config_file_that_cannot_be_read_fails_with_2(content, words, refused, tmp_path):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    refused(2, words, "--config", str(path))
    refused(2, ["Is a directory"], "--config", str(tmp_path))


def test_an_unknown_flag_is_a_usage_line_and_2(cli, run_config):
    ran = cli("--config", run_config(), "--dryrun")
    assert ran.code == 2 and "--dryrun" in ran.err and "Traceback" not in ran.err
    ran = cli()
    assert ran.code == 2 and "--config" in ran.err


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("left", ["metrics.jsonl", "adapter_config.json", "checkpoint-5/manifest.json"])
def test_an_output_folder_with_another_run_in_it_stays_as_it_is(left, cli, run_config, tmp_path):
    out = tmp_path / "out"
    (out / left).parent.mkdir(parents=True)
    (out / left).write_text("{}")
    before = _snapshot(out)
    ran = cli("--config", run_config())
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert all(words in ran.err for words in (str(out), left.split("/")[0], "overwrite_output_dir", "resume_from"))
    assert _snapshot(out) == before


def test_an_output_folder_that_is_a_file_or_the_models_own(cli, run_config, folder, tmp_path):
    before = _snapshot(folder)
    ran = cli("--config", run_config(), f"training.output_dir={folder}", "training.overwrite_output_dir=true")
    assert ran.code == 2 and "holds a model" in ran.err
    assert _snapshot(folder) == before
    ran = cli("--config", run_config(), f"training.output_dir={folder / 'config.json'}")
    assert ran.code == 2 and "config.json is a file" in ran.err


def _adapter(repo, folder: Path, **changes) -> Path:
    from fastft_jax import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(repo / "examples" / "tiny-base", max_seq_length=128)
    FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj", "v_proj"]).save_pretrained(folder)
    _edit(folder / "adapter_config.json", **changes)
    return folder


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"base_model_name_or_path": None}, 1, ["does not name its base model"]),
        ({"base_model_name_or_path": "/none/base"}, 1, ["the base of adapter", "/none/base"]),
        ({"base_model_name_or_path": "ITSELF"}, 1, ["is itself an adapter"]),
        ({"r": 8}, 1, ["rank 4", "r=8"]),
        ({"peft_type": "IA3"}, 1, ["'IA3'", "LORA"]),
        ({"use_dora": True}, 1, ["lacks", "lora_magnitude_vector"]),
        ({"init_lora_weights": "pissa"}, 2, ["init_lora_weights='pissa'"]),
        ({"target_modules": ["q_proj"]}, 1, ["v_proj", "unexpected"]),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, 1, ["lacks", "k_proj"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_an_adapter_that_cannot_be_gone_on_from(changes, code, words, repo, refused, run_config, tmp_path):
    adapter = tmp_path / "adapter"
    if changes.get("base_model_name_or_path") == "ITSELF":
        changes = {"base_model_name_or_path": str(adapter)}
    _adapter(repo, adapter, **changes)
    refused(code, words, "--config", run_config({"model": {"model_name": str(adapter)}}))


def _full_disk(monkeypatch, wanted: str) -> None:
    """From now on the disk has no room for files whose path holds `wanted`."""
    real = os.write

    def write(fd, data):
        if wanted in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)


def test_a_full_disk_while_the_adapter_or_a_checkpoint_is_saved(cli, run_config, tmp_path, monkeypatch):
    """One run that works, then the same one with a disk that is full at the end, and in the middle."""
    path = run_config({"training": {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": True}})
    out = tmp_path / "out"
    ran = cli("--config", path)
    assert ran.code == 0, ran.err
    before = _snapshot(out)
    assert {name.split("/")[0] for name in before} > {"adapter_config.json", "checkpoint-2", "checkpoint-3"}

    with monkeypatch.context() as patch:
        _full_disk(patch, "adapter_model.safetensors")
        ran = cli("--config", path)
    assert ran.code == 1 and len(ran.err.splitlines()) == 1
    assert "adapter_model.safetensors" in ran.err and "No space left on device" in ran.err
    after = _snapshot(out)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert after[name] == before[name]
    # trained and checkpointed, so once there is room the adapter costs no training
    assert {"checkpoint-2", "checkpoint-3"} < {name.split("/")[0] for name in after}
    assert not [name for name in after if ".tmp" in name or ".new" in name]
    ran = cli("--config", path, "training.resume_from_checkpoint=true")
    assert ran.code == 0, ran.err
    assert _snapshot(out)["adapter_model.safetensors"] == before["adapter_model.safetensors"]

    import orbax.checkpoint as ocp

    real = ocp.PyTreeCheckpointer.save

    def save(self, directory, *arguments, **options):
        if "checkpoint-3" in str(directory):
            real(self, directory, *arguments, **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        return real(self, directory, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointer, "save", save)
        ran = cli("--config", path)
    assert ran.code == 1 and len(ran.err.splitlines()) == 1
    assert "no room for checkpoint 3" in ran.err and "Older checkpoints are intact" in ran.err
    folders = {p.name for p in out.iterdir() if p.is_dir()}
    assert folders == {"checkpoint-2"}
    assert _snapshot(out)["adapter_model.safetensors"] == before["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["run.draft", "tokenizer.json"])
def test_a_full_disk_while_other_files_are_written(name, cli, run_config, tmp_path):
    """/dev/full is a disk without room, made by the kernel; run.draft is where run.json is built."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to("/dev/full")
    ran = cli("--config", run_config())
    assert ran.code == 1 and "No space left on device" in ran.err and len(ran.err.splitlines()) == 1, ran.err
    assert (out / "adapter_model.safetensors").exists() == (name == "tokenizer.json")


def test_too_little_device_memory_says_what_to_lower(cli, run_config, monkeypatch):
    """The words are XLA's; there is no such limit on a CPU, so the error is raised by hand."""
    import jax

    from fastft_jax.trainers import loop

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.")

    monkeypatch.setattr(loop, "compile_step", full)
    ran = cli("--config", run_config())
    assert ran.code == 1 and len(ran.err.splitlines()) == 1
    assert "memory is full" in ran.err and "per_device_train_batch_size" in ran.err


def test_a_fault_of_the_program_keeps_its_traceback(cli, run_config, monkeypatch):
    from fastft_jax.trainers import loop

    def wrong(*_):
        raise AssertionError("a bug")

    monkeypatch.setattr(loop, "compile_step", wrong)
    with pytest.raises(AssertionError, match="a bug"):
        cli("--config", run_config())


def test_the_small_run_that_these_tests_spoil_is_good(cli, run_config):
    path = run_config()
    assert yaml.safe_load(Path(path).read_text())["data"]["packing"] is True
    ran = cli("--config", path, "--dry-run")
    assert (ran.code, ran.err) == (0, "")
