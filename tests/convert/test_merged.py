"""Merged checkpoints: transformers computes from the folder what the live model computes; faults leave nothing."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from flax import nnx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastft_jax import FastLanguageModel
from fastft_jax.convert import atomic, merged
from fastft_jax.convert.model_files import write_tokenizer
from fastft_jax.convert.read_back import compare, folder_logits
from fastft_jax.convert.safetensors import Checkpoint, write_sharded
from fastft_jax.convert.tokenizer import load_tokenizer
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models.compute_dtype import set_compute_dtype

TOLERANCE = 1e-4  # float32 on both sides; the bound of every parity test
IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 20))
pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.filterwarnings("ignore:.*tokenizer")]


def load(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, max_seq_length=64, **{"dtype": "float32"} | options)[0]


def adapt(model, **options):
    return FastLanguageModel.get_peft_model(model, **{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options)


def transformers_logits(folder, ids=IDS):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy(), model


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder):
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names}


# The names and forms that differ: fused projections, 1 + w, biases, other names, tied heads; kinds of adapters, which
# do not depend on those.
FAMILIES = {
    "llama-3.2-tied": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]},
    "llama-biases": {"bias": "lora_only", "layers_to_transform": [1], "use_rslora": True, "init_lora_weights": "pissa"},
    "gemma-2": {"target_modules": "all-linear", "use_dora": True},
    "phi-4-mini": {"target_modules": ["qkv_proj", "gate_up_proj"], "modules_to_save": ["embed_tokens"]},
    "phi-2": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"fc1": 3}},
    "cohere": {"target_modules": ["v_proj", "lm_head"]},
}
IN_NF4 = ("llama-3.2-tied", "phi-4-mini")  # the base's kind and its family do not depend on one another


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_live_models_logits(name, tmp_path):
    """Merged in float32 the folder is the very function that was trained: float32 noise is all that is allowed."""
    base = tiny.save(tiny.make_model(name, num_hidden_layers=2), tmp_path / "base")
    before = snapshot(base)
    model = adapt(load(base, load_in_4bit=name in IN_NF4), **FAMILIES[name])
    for _, linear in nnx.iter_modules(model.decoder):  # as training would leave it: no longer what it began with
        if getattr(linear, "start_A", None) is not None:
            linear.lora_B.set_value(linear.lora_B.get_value() * 1.5)
    for module in ("embed_tokens", "lm_head"):
        if module in (model.peft_config["modules_to_save"] or ()):
            weight = getattr(model.decoder, module).weight
            weight.set_value(weight.get_value() * 1.5)
    written = model.save_pretrained_merged(tmp_path / "merged", dtype="float32", max_shard_size="100KB", rows=IDS)
    assert len(written.files) > 2 and written.difference.mean < 1e-4
    expected, theirs = transformers_logits(tmp_path / "merged")
    np.testing.assert_allclose(np.asarray(model(IDS)), expected, atol=TOLERANCE, rtol=0)
    names = set(tensors_of(tmp_path / "merged"))
    untied = bool(model.peft_config["modules_to_save"]) or "lm_head" in model.peft_config["target_modules"]
    assert ("lm_head.weight" in names) == (untied or not theirs.config.tie_word_embeddings)
    values, old = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "merged", base))
    assert {k for k in old if values.get(k) != old[k]} <= ({"tie_word_embeddings"} if untied else set())
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == before["generation_config.json"]
    assert snapshot(base) == before


# One small model, adapted and in NF4, for the rest -----------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.make_model("llama-2", num_hidden_layers=2), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base):
    return adapt(load(base), target_modules=["q_proj", "up_proj"])


def merge(model, folder, *arguments, **options):
    return model.save_pretrained_merged(folder, None, *arguments, **{"rows": IDS} | options)


def test_merging_onto_the_original_weights_gives_what_peft_merges(model, base, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    before = snapshot(base), snapshot(tmp_path / "adapter")
    merge(model, tmp_path / "original", base="original", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    ours = tensors_of(tmp_path / "original")
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_allclose(ours[name], tensor.numpy(), atol=1e-6, rtol=0, err_msg=name)  # one product, summed
        if "q_proj" not in name and "up_proj" not in name:  # bytes of the original, not of NF4
            np.testing.assert_array_equal(ours[name], tensor.numpy())
    merge(model, tmp_path / "named", base=base, dtype="float32", verify=False)  # the same folder, by its name
    assert snapshot(tmp_path / "named")["model.safetensors"] == snapshot(tmp_path / "original")["model.safetensors"]
    assert (snapshot(base), snapshot(tmp_path / "adapter")) == before


def test_in_bfloat16_transformers_reads_what_we_read_and_the_difference_is_within_the_bound(model, tmp_path):
    written = merge(model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"  # was float32
    expected, _ = transformers_logits(tmp_path / "merged")
    mask = np.ones_like(IDS)
    ours = folder_logits(tmp_path / "merged", IDS, mask, np.float32)
    np.testing.assert_allclose(np.asarray(ours), expected, atol=TOLERANCE, rtol=0)
    live, theirs = np.float64(model(IDS)), np.float64(expected)
    d = written.difference
    assert d.mean == pytest.approx(np.abs(live - theirs).mean(), rel=1e-2)
    assert d.max == pytest.approx(np.abs(live - theirs).max(), rel=1e-2)
    p, q = (torch.tensor(x).log_softmax(-1) for x in (live, theirs))
    assert d.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.1)
    for logs, said in ((p, d.perplexity), (q, d.perplexity_export)):
        nll = -logs[:, :-1].gather(2, torch.tensor(IDS)[:, 1:, None]).mean()
        assert said == pytest.approx(float(nll.exp()), rel=1e-4)
    assert 1e-4 < d.mean < written.bound < 0.2 * d.spread


def test_fp8_products_are_no_part_of_the_comparison(model, tmp_path):
    """The export's weights are compared, so the live model computes in its own dtype for that."""
    set_compute_dtype(model.decoder, "fp8")
    try:
        written = merge(model, tmp_path / "merged", dtype="float32")
        assert model.decoder.segments[0][0].mlp.up_proj.weight.get_value().compute == "fp8"
    finally:
        set_compute_dtype(model.decoder, None)
    assert written.difference.mean < 1e-5


def test_padding_does_not_count(model):
    mask = np.ones_like(IDS)
    mask[1, 12:] = 0
    live = np.asarray(model(IDS))
    other = np.where(mask[..., None] == 1, live, 99.0)
    d = compare(live, other, IDS, mask)
    assert (d.tokens, d.max, d.mean, d.kl) == (32, 0.0, 0.0, 0.0) and d.perplexity == d.perplexity_export


@given(data=st.data())
@settings(max_examples=6, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_a_bfloat16_checkpoint_goes_in_and_out_byte_for_byte(base, tmp_path_factory, data):
    """Whatever the bits (NaN, infinities, subnormals), whatever the sharding, tied or not."""
    folder = tmp_path_factory.mktemp("bits")
    tied, limit = data.draw(st.booleans()), data.draw(st.sampled_from(["40KB", "90KB", "5GB"]))
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16", "tie_word_embeddings": tied}
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    shapes = {n: t.shape for n, t in tensors_of(base).items() if not (tied and n == "lm_head.weight")}
    bits = {name: random.integers(0, 2**16, shape, np.uint16) for name, shape in shapes.items()}
    (folder / "in").mkdir()
    layout = {name: (np.dtype("bfloat16"), shape) for name, shape in shapes.items()}
    write_sharded(folder / "in", layout, lambda n: bits[n].view("bfloat16"), limit, durable=False)
    (folder / "in" / "config.json").write_text(json.dumps(config))
    (folder / "in" / "generation_config.json").write_text('{"eos_token_id":   2}')
    model = load(folder / "in", dtype="bfloat16", load_in_4bit=False)
    model.save_pretrained_merged(folder / "out", max_shard_size=limit, verify=False)
    for name, tensor in tensors_of(folder / "out").items():
        np.testing.assert_array_equal(tensor.view(np.uint16), bits.pop(name))
    assert not bits
    ours, theirs = snapshot(folder / "out"), snapshot(folder / "in")
    for name in ["config.json", "generation_config.json"] + ["model.safetensors"] * (limit == "5GB"):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize("name", ["rslora", "modules_to_save"])
def test_a_real_model_with_an_adapter_that_peft_made(name, shared_data, stories, tmp_path):
    """transformers on the merged folder gives the logits that PEFT recorded; the tied head keeps the old embedding."""
    adapter = shutil.copytree(shared_data / "peft" / name, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(stories())}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model, tokenizer = FastLanguageModel.from_pretrained(adapter, 512, dtype="float32", load_in_4bit=False)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, dtype="float32", verify=False)
    reference = np.load(adapter / "reference.npz")
    logits, _ = transformers_logits(tmp_path / "merged", reference["input_ids"])
    np.testing.assert_allclose(logits, reference["logits"], atol=TOLERANCE, rtol=0)
    written, base = snapshot(tmp_path / "merged"), snapshot(stories())
    tokenizers = [file for file in base if "token" in file]
    assert "tokenizer.json" in tokenizers and all(written[file] == base[file] for file in tokenizers)


def test_a_multimodal_checkpoint_keeps_its_names_and_its_vision_tower(tmp_path):
    """Gemma 3's text decoder out of a checkpoint as it is published, and back into one."""
    text = tiny.save(
        tiny.make_model("gemma-3", num_hidden_layers=2, layer_types=["sliding_attention"] * 2), tmp_path / "text"
    )
    base = tmp_path / "base"
    base.mkdir()
    tensors = {f"language_{name}": t for name, t in tensors_of(text).items()}  # model.x -> language_model.model.x
    tensors = {name.replace("language_model.", "language_model.model."): t for name, t in tensors.items()}
    tensors["vision_tower.patch.weight"] = np.arange(6, dtype=np.float16).reshape(2, 3)
    write_sharded(base, {n: (t.dtype, t.shape) for n, t in tensors.items()}, tensors.get, "90KB", durable=False)
    values = json.loads((text / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": values, "vision_config": {}}))
    model = adapt(load(base, load_in_4bit=False), target_modules=["q_proj"])
    merge(model, tmp_path / "merged", dtype="float32")
    found = tensors_of(tmp_path / "merged")
    assert {n for n, t in tensors.items() if not np.array_equal(t, found.pop(n))} == {
        f"language_model.model.layers.{i}.self_attn.q_proj.weight" for i in range(2)
    }
    assert found == {} and (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    merge(model, tmp_path / "half", verify=False)
    values = json.loads((tmp_path / "half" / "config.json").read_text())
    assert values["text_config"]["dtype"] == "bfloat16" and values["vision_config"] == {}
    assert tensors_of(tmp_path / "half")["vision_tower.patch.weight"].dtype == np.float16


def test_the_tokenizers_files_are_copied_as_they_lie_and_written_anew_only_when_it_changed(repo, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(repo / "examples" / "tiny-base", source)
    (source / "tokenizer.model").write_bytes(b"pieces")  # which transformers would not write
    tokenizer = load_tokenizer(source)
    for name in ("given", "none", "changed"):
        (tmp_path / name).mkdir()
    write_tokenizer(tmp_path / "given", source, tokenizer)
    write_tokenizer(tmp_path / "none", source, None)
    names = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    copied = {name: data for name, data in snapshot(source).items() if name in names}
    assert snapshot(tmp_path / "given") == snapshot(tmp_path / "none") == copied
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.add_tokens(["<new>"])
    write_tokenizer(tmp_path / "changed", source, tokenizer)
    back = load_tokenizer(tmp_path / "changed")
    assert back.chat_template == tokenizer.chat_template and "<new>" in back.get_vocab()
    assert (tmp_path / "changed" / "tokenizer.model").read_bytes() == b"pieces"


# Faults ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100_000})
    with monkeypatch.context() as patch:  # known before the first byte
        patch.setattr(atomic.shutil, "disk_usage", lambda folder: usage)
        patch.setattr(atomic.os, "write", lambda fd, data: pytest.fail("wrote to a full disk"))
        with pytest.raises(CheckpointError, match="merged needs 164480 bytes and the disk has 100000 left"):
            merge(model, tmp_path / "merged")
    real, written = os.write, []

    def write(fd, data):  # full in the middle
        written.append(len(data))
        if sum(written) > 100_000:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match="could not be written .*No space left on device"):
        merge(model, tmp_path / "merged", max_shard_size="50KB")
    assert len(written) > 5 and list(tmp_path.iterdir()) == []


def test_a_folder_that_does_not_compute_what_was_trained_is_not_written(model, tmp_path, monkeypatch):
    old = tmp_path / "merged"
    old.mkdir()
    (old / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        merge(model, old)
    real = merged._merge

    def without_adapter(w, pair, *arguments, **options):
        return real(w, (), *arguments, **options)

    monkeypatch.setattr(merged, "_merge", without_adapter)
    with pytest.raises(CheckpointError, match=r"was not written.*above the bound of 0.0\d.*max \d.*KL"):
        merge(model, old, overwrite=True)
    assert snapshot(tmp_path) == {"merged/mine": b"x"}
    monkeypatch.undo()
    merge(model, old, overwrite=True, verify=False)
    assert "mine" not in snapshot(old)


def test_what_cannot_be_merged_onto_is_said_and_nothing_is_written(model, base, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    other = tiny.save(tiny.make_model("llama-2", num_hidden_layers=1), tmp_path / "other")
    refusals = [
        ({"base": other}, CheckpointError, "lacks 'model.layers.1.*not the base of this model"),
        ({"base": "/none/base"}, CheckpointError, "/none/base"),
        ({"save_method": "merged_8bit"}, ConfigError, "merged_16bit, merged_4bit, lora"),
        ({"dtype": "int8"}, ConfigError, "dtype='int8'"),
        ({"rows": [[1, 160]]}, ConfigError, "vocabulary of 160"),
        ({"max_shard_size": "5 apples"}, ConfigError, "5 apples"),
    ]
    for folder in (base, base.parent):  # a base is never replaced by its merge, whatever is asked for
        for method in ("merged_16bit", "lora"):
            with pytest.raises(ConfigError, match="holds what is exported"):
                model.save_pretrained_merged(folder, None, method, overwrite=True)
    for options, kind, words in refusals:
        with pytest.raises(kind, match=words):
            merge(model, out, **options)
    with monkeypatch.context() as patch:
        patch.setattr(model, "base_folder", tmp_path / "gone")
        patch.setattr(model, "name_or_path", str(tmp_path / "gone"))
        with pytest.raises(CheckpointError, match="base='original' needs the weights.*is gone.*leave base out"):
            merge(model, out, base="original")
    with pytest.raises(CheckpointError, match="config.json/merged could not be written: .*File exists"):
        merge(model, base / "config.json" / "merged")

    def read_only(path, *arguments, **options):  # simulated, because root may write anywhere
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(CheckpointError, match="merged could not be written: .*Read-only file system"):
            merge(model, out)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_memory_holds_a_few_tensors_however_many_there_are(tmp_path, monkeypatch):
    """Host (numpy) and device allocations while a folder is written from the original and read back again, against a
    model of 40 matrices of which the two largest may be held."""
    changes = {"num_hidden_layers": 5, "hidden_size": 512, "intermediate_size": 2048}
    base = tiny.save(tiny.make_model("llama-2", **changes), tmp_path / "base")
    model = adapt(load(base, load_in_4bit=False), target_modules=["up_proj"])
    largest, total = 2048 * 512 * 4, sum(t.nbytes for t in tensors_of(base).values())
    assert total > 18 * largest
    tracemalloc.start()
    try:
        merge(model, tmp_path / "merged", base="original", dtype="float32", max_shard_size="9MB", verify=False)
        host = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert host < 2 * largest + 2**20  # two tensors, and what Python allocates beside them
    before, peak = sum(a.nbytes for a in jax.live_arrays()), 0
    real = Checkpoint.read

    def watched(self, name):
        nonlocal peak
        peak = max(peak, sum(a.nbytes for a in jax.live_arrays()) - before)
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "read", watched)
    folder_logits(tmp_path / "merged", IDS, np.ones_like(IDS), np.float32)
    assert largest < peak < 5 * largest  # one layer: three such matrices and four of a quarter of the size


KILLED = """
import sys, time
from fastft_jax import FastLanguageModel
from fastft_jax.convert.merged import save
model, _ = FastLanguageModel.from_pretrained(sys.argv[1], load_in_4bit=False, dtype="float32")
real = save.copy_beside
def slow(*arguments):
    print("half", flush=True)
    time.sleep(60)
save.copy_beside = slow
model.save_pretrained_merged(sys.argv[2])
"""


def test_a_kill_in_the_middle_leaves_nothing_under_the_name_and_the_next_export_clears_the_rest(model, base, tmp_path):
    out = tmp_path / "merged"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, base, out]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n"
    child.kill()
    child.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".merged.") and (left / "model.safetensors").exists()
    merge(model, out, verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
