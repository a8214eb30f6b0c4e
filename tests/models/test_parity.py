"""Every family, with each of its odd features, computes what transformers and PEFT compute, in float32."""

import warnings

import jax
import numpy as np
import peft
import pytest
import tiny
import torch
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.models import lora
from fastft_jax.trainers.step import LossOptions, gradients

# float32 on both sides: what is left is the order of sums, a few 1e-6 at logits of size 5; the project's bound is 1e-4
TOLERANCE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"]
TARGETS += ["dense", "fc1", "fc2", "input_linear", "output_linear"]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=tiny.TINY)
def case(request, tmp_path_factory):
    """(transformers model, the folder it is saved in); shared by the tests of one family."""
    model = tiny.make_model(request.param)
    return model, tiny.save(model, tmp_path_factory.mktemp(request.param))


def load(folder, load_in_4bit=False, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in these folders
        return FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=load_in_4bit, **options)[0]


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    """Two rows, the second left-padded; long enough to pass every tiny window and original context."""
    ids = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (2, 40))
    mask = np.ones_like(ids)
    mask[1, :13] = 0
    return ids, mask


def torch_logits(model, ids, mask) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


def test_logits_of_a_padded_batch_equal_transformers(case):
    model, folder = case
    ids, mask = padded_batch()
    real = mask.astype(bool)
    ours = np.asarray(load(folder)(ids, mask))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[real], torch_logits(model, ids, mask)[real], atol=TOLERANCE, rtol=0)


def test_adapter_made_by_peft_gives_its_logits_and_gradients(case, tmp_path):
    model, folder = case
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", bias="none"
    )
    model = peft.get_peft_model(model, config)
    try:
        model.peft_config["default"].base_model_name_or_path = str(folder)
        model.save_pretrained(tmp_path)
        ids, mask = padded_batch()
        ours = load(tmp_path)
        real = mask.astype(bool)
        np.testing.assert_allclose(
            np.asarray(ours(ids, mask))[real], torch_logits(model, ids, mask)[real], atol=TOLERANCE, rtol=0
        )
        labels = np.where(real, ids, -100)
        labels[1, 13] = -100  # the first real token would be predicted from padding
        their_loss, theirs = torch_gradients(model, ids, mask, labels)
        our_loss, mine = our_gradients(ours, ids, mask, labels)
        np.testing.assert_allclose(our_loss, their_loss, rtol=1e-5)
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, atol=TOLERANCE, rtol=0, err_msg=name)
    finally:
        model.unload()


def torch_gradients(model, ids, mask, labels) -> tuple[float, dict[str, np.ndarray]]:
    loss = model(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
    loss.backward()
    prefix, suffix = "base_model.model.", ".default.weight"
    return loss.item(), {
        name.removeprefix(prefix).replace(suffix, ".weight"): p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def our_gradients(model, ids, mask, labels, policy="full") -> tuple[float, dict[str, np.ndarray]]:
    loss, gradient = loss_and_gradient(model, ids, mask, labels, policy)
    return loss, {name: np.asarray(v) for name, v in lora.trainable_tensors(gradient, model.names).items()}


def loss_and_gradient(model, ids, mask, labels, policy="full"):
    """Through the trainer's own loss, labels shifted as the data pipeline does; the gradient as a decoder."""
    shifted = np.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    batch = {
        "input_ids": ids,
        "labels": shifted,
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        "segment_ids": mask,
    }
    batch = {name: np.asarray(value, np.int32)[None] for name, value in batch.items()}
    definition, trainable, frozen = nnx.split(model.decoder, nnx.Param, ...)
    options = LossOptions(policy=policy, chunk_size=32, max_segments=1)
    loss, grads = jax.jit(gradients, static_argnums=(0, 4))(definition, trainable, frozen, batch, options, None)
    return float(loss), nnx.merge(definition, jax.device_get(grads), frozen)


@pytest.mark.parametrize(
    "name",
    ["llama-3.1", "mistral-7b-v0.1", "qwen-2-window", "qwen-3", "gemma-2", "gemma-3", "smollm-3"],
)
def test_packed_documents_give_the_logits_of_each_alone(name, tmp_path):
    model = load(tiny.save(tiny.make_model(name), tmp_path))
    rng = np.random.default_rng(1)
    lengths = [11, 23, 1, 9]
    documents = [rng.integers(0, tiny.COMMON["vocab_size"], n) for n in lengths]
    row = np.concatenate([*documents, np.zeros(6, int)])[None]
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(6, int)])[None]
    positions = np.concatenate([np.arange(n) for n in lengths] + [np.zeros(6, int)])[None]
    packed = np.asarray(model(row, segment_ids=segments, positions=positions))[0]
    start = 0
    for document in documents:
        alone = np.asarray(model(document[None]))[0]
        np.testing.assert_allclose(packed[start : start + len(document)], alone, atol=1e-5, rtol=0)
        start += len(document)


def test_sharded_checkpoint_gives_the_logits_of_the_single_file(tmp_path):
    model = tiny.make_model("llama-2")
    single = load(tiny.save(model, tmp_path / "single"))
    sharded_folder = tiny.save(model, tmp_path / "sharded", max_shard_size="50KB")
    assert len(list(sharded_folder.glob("*.safetensors"))) > 2
    ids, mask = padded_batch()
    np.testing.assert_array_equal(np.asarray(single(ids, mask)), np.asarray(load(sharded_folder)(ids, mask)))


def test_transformers_4_style_config_reads_as_transformers_5_style(tmp_path):
    import json

    model = tiny.make_model("llama-3.1")
    folder = tiny.save(model, tmp_path)
    new = load(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).decoder.config == new.decoder.config
