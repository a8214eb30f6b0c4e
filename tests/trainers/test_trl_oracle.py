"""The training loss equals TRL's on its own batch: a real trained model with a PEFT adapter."""

import json
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.trainers.step import LossOptions, gradients, make_eval_step


@pytest.fixture(scope="module")
def oracle(shared_data, tmp_path_factory):
    """(model with TRL's adapter, TRL's batches, TRL's values)."""
    folder = tmp_path_factory.mktemp("stories")
    source = shared_data / "stories260K"
    convert = shared_data.parent / "tools" / "llama2c_to_hf.py"
    subprocess.run(
        [sys.executable, convert, source / "stories260K.bin", source / "tok512.bin", folder / "base"],
        check=True,
        capture_output=True,
    )
    adapter = folder / "adapter"
    adapter.mkdir()
    stored = shared_data / "oracle" / "trl"
    config = json.loads((stored / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes((stored / "adapter" / "adapter_model.safetensors").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = FastLanguageModel.from_pretrained(adapter, dtype="float32", load_in_4bit=False, max_seq_length=64)
    return model, np.load(stored / "trl_oracle.npz"), json.loads((stored / "trl_oracle.json").read_text())["values"]


@pytest.mark.parametrize("batch, value", [("sft", "sft.completion_only"), ("sft_text", "sft.full_text")])
def test_loss_on_trls_batch_equals_trls(oracle, batch, value):
    model, arrays, values = oracle
    ids, labels, mask = (arrays[f"{batch}.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    shifted = np.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]  # TRL shifts inside the model, we in the data
    rows = {
        "input_ids": ids,
        "labels": shifted,
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        "segment_ids": mask,
    }
    rows = {name: np.asarray(array, np.int32) for name, array in rows.items()}
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    for segments in (None, 1):  # padding hidden by causality alone, and by segment ids
        options = LossOptions(policy="none", chunk_size=64, max_segments=segments)
        step = jax.jit(make_eval_step(definition, options))
        out = step(trainable, frozen, rows)
        # TRL's own number is float32 from another library's order of sums
        assert float(out["loss_sum"]) / int(out["tokens"]) == pytest.approx(values[value], abs=1e-4)
    two = {name: array.reshape(2, -1, ids.shape[1]) for name, array in rows.items()}
    loss, _ = jax.jit(gradients, static_argnums=(0, 4))(definition, trainable, frozen, two, options, None)
    assert float(loss) == pytest.approx(values[value], abs=1e-4)
