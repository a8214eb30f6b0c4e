"""Every family's training step on a card, and what else of a model runs there: int8, DoRA, full training, text, files.

A step is right where its gradients are about as far from float32's as those of the plain references in bfloat16 are
(`bench --check`'s criterion; `Compared.faults` says all that is not).
"""

import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_families as small
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from fastft_jax import FastLanguageModel
from fastft_jax.bench.check import in_float32
from fastft_jax.convert.hf_writer import write_model
from fastft_jax.models.families.registry import FAMILIES
from fastft_jax.models.full import train_everything
from fastft_jax.pallas_kernels import pallas
from fastft_jax.quant.int8 import Int8Array
from fastft_jax.trainers.compile import compile_step
from fastft_jax.trainers.optim import make_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*tokenizer")]
POLICIES = ("none", "selective", "full")
NO_LIBRARY_ATTENTION = ("gemma2", "gpt_oss")  # softcap, sinks
ATTENTION, ADAM_8BIT = "/attention_forward/pallas_call", "/adam_8bit/pallas_call"


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def load(folder, **options) -> FastLanguageModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FastLanguageModel.from_pretrained(folder, max_seq_length=small.TOKENS, dtype="bfloat16", **options)[0]


def save(model_type: str, folder):
    """The family's weights in 16 bits as a Hugging Face folder."""
    model = small.base(model_type, load_in_4bit=False)
    write_model(folder, model.decoder, model.hf_config)
    return folder


def every_weight_trains(model_type: str) -> FastLanguageModel:
    model = small.base(model_type, dtype=jnp.float32, load_in_4bit=False)
    model.decoder.dtype = jnp.bfloat16
    train_everything(model.decoder)
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora_on_nf4_trains_as_with_the_references(model_type):
    policy = POLICIES[FAMILIES.index(model_type) % 3]
    model = small.adapted(small.base(model_type))
    found = small.compare(model.decoder, policy)
    faults = found.faults()
    if "nf4_dequantize" not in found.text:
        faults.append("no kernel decodes NF4")
    if "__cudnn$fmha" not in found.text and ATTENTION not in found.text:
        faults.append("no kernel for attention")
    if model_type in NO_LIBRARY_ATTENTION and ATTENTION not in found.text:
        faults.append("attention is not the kernel of ours")
    assert not faults, "\n".join([f"policy {policy}", *faults])


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss"])
def test_what_layers_that_come_in_pairs_offload_is_not_copied_on_the_host(model_type):
    """Two values of one shape a turn of the loop: their host buffers must not be one that XLA copies every step.

    Two turns: a loop of one is no loop, and XLA keeps nothing on the host. Gradients are those of keeping everything:
    the same operations, fused by XLA in other ways, so that bfloat16 roundings may tip (2.7% of a leaf on a CPU).
    """
    decoder = small.adapted(small.base(model_type, num_hidden_layers=2 * small.LAYERS)).decoder
    ours, kept = small.compute(decoder, "offload"), small.compute(decoder, "none")
    assert ours.text.count("AllocateBuffer") == 4 and not re.search(r"S\(5\)\} copy\(", ours.text)
    assert abs(ours.loss - kept.loss) < 1e-3 * kept.loss
    off = {name: np.linalg.norm(ours.grads[name] - g) / np.linalg.norm(g) for name, g in kept.grads.items()}
    assert max(off.values()) < 0.05, off


@pytest.mark.parametrize("model_type", ["llama", "phi", "gpt_oss"])
def test_lora_on_int8_trains_as_with_the_references(model_type, tmp_path):
    model = small.adapted(load(save(model_type, tmp_path / "base"), load_in_8bit=True))
    assert isinstance(model.decoder.segments[-1][0].self_attn.o_proj.weight.get_value(), Int8Array)
    faults = small.compare(model.decoder).faults()
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("model_type", ["gemma2", "phi", "qwen3_moe"])
def test_dora_trains_as_with_the_references(model_type):
    targets = ["q_proj", "o_proj"] if model_type == "qwen3_moe" else "all-linear"  # PEFT has no DoRA of experts
    model = small.adapted(small.base(model_type), use_dora=True, target_modules=targets)
    found = small.compare(model.decoder)
    faults = found.faults()
    if not any("magnitude" in name for name in found.errors):
        faults.append(f"no magnitude trains: {list(found.errors)}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi", "gpt_oss", "deepseek_v3"])
def test_every_weight_trains_as_with_the_references(model_type):
    faults = small.compare(every_weight_trains(model_type).decoder).faults()
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("model_type", "optim"), [("gemma2", "adamw_8bit"), ("qwen2_moe", "adamw")])
def test_full_training_goes_down_as_with_the_references(model_type, optim):
    """Four steps of the trainer's own compiled program on one batch. Roundings differ, and Adam's first steps have the
    size of the rate whatever the gradient's: where a sign is noise, weights go apart by that much. The losses' ways
    down are the same within a 20th of them."""
    decoder = every_weight_trains(model_type).decoder
    batch, options = small.packed_batch()
    definition, trainable, frozen = nnx.split(decoder, nnx.Param, ...)

    def losses() -> np.ndarray:
        optimizer, _ = make_optimizer(optim=optim, learning_rate=1e-3, total_steps=100)
        mine = jax.tree.map(jnp.copy, trainable)  # a step takes its arguments' memory
        state = jax.jit(optimizer.init)(mine)
        _, step = compile_step(definition, optimizer, options, (mine, state, frozen, batch, None))
        texts.append(step.as_text())
        found = []
        for _ in range(4):
            mine, state, metrics = step(mine, state, frozen, batch, None)
            found.append(float(metrics["loss"]))
        return np.array(found)

    texts: list[str] = []
    kernels = losses()
    with pallas.references():
        references = losses()
    down = references[0] - references[-1]
    assert down > 0.02 * references[0], (kernels, references)
    np.testing.assert_allclose(kernels, references, rtol=0, atol=0.05 * down)
    assert (ADAM_8BIT in texts[0]) == (optim == "adamw_8bit") and ADAM_8BIT not in texts[1]


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_text_is_what_whole_forward_passes_choose(model_type):
    """Every token is float32's choice at its place, or one whose logit is as near to it as bfloat16's rounding is
    large (twice that: two logits are off); most are the choice itself. Prompts are longer than windows."""
    model = small.adapted(small.base(model_type))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(1, small.VOCAB, n).tolist() for n in (70, 100, 91)]
    new, longest = 8, 108
    texts = model.generate(prompts, max_new_tokens=new)
    ids, mask = np.zeros((3, longest), np.int32), np.zeros((3, longest), np.int32)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        assert len(text) == new
        ids[i, : len(prompt) + new] = prompt + text
        mask[i, : len(prompt) + new] = 1
    with pallas.references():
        rounded = np.asarray(model(ids, mask))
        with jax.default_matmul_precision("highest"):
            model.decoder = in_float32(model.decoder)
            exact = np.asarray(model(ids, mask))
    at = [(i, len(prompts[i]) - 1 + k) for i in range(3) for k in range(new)]  # each of them chose the token after it
    noise = max(np.abs(rounded[i, t] - exact[i, t]).max() for i, t in at)
    behind = np.array([exact[i, t].max() - exact[i, t, ids[i, t + 1]] for i, t in at])
    spread = np.mean([exact[i, t].std() for i, t in at])
    assert noise < 0.1 * spread  # else this says nothing
    assert behind.max() <= 3 * noise and np.mean(behind == 0) >= 0.75, (model_type, noise, spread, behind)


def mxfp4(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict, dict]:
    """(as published, as transformers decodes that, quantization_config), of random experts."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng, packed, decoded = np.random.default_rng(0), dict(tensors), dict(tensors)
    for name, w in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            e, k, n = w.shape
            blocks = torch.tensor(rng.integers(0, 256, (e, n, k // 32, 16), np.uint8))
            scales = torch.tensor(rng.integers(119, 122, (e, n, k // 32), np.uint8))  # 2^-8 to 2^-6
            del packed[name]
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    assert len(packed) > len(tensors)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return packed, decoded, {"quant_method": "mxfp4", "modules_to_not_convert": kept}


def fp8_blocks(tensors: dict[str, torch.Tensor]) -> tuple[dict, dict, dict]:
    """The same of e4m3 in blocks of 128 x 128; scales are powers of 2, so that bfloat16 holds what they decode to."""
    packed, decoded = dict(tensors), dict(tensors)
    for name, w in tensors.items():
        if ".layers." in name and w.ndim == 2 and not name.endswith("mlp.gate.weight"):
            rows, columns = (-(-size // 128) for size in w.shape)
            scales = 2.0 ** (-12 + (torch.arange(rows)[:, None] + torch.arange(columns)) % 3)
            each = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
            codes = (w.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
            packed |= {name: codes, f"{name}_scale_inv": scales}
            decoded[name] = (codes.float() * each).bfloat16()
    assert len(packed) > len(tensors)
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return packed, decoded, settings


@pytest.mark.parametrize(("model_type", "published"), [("gpt_oss", mxfp4), ("deepseek_v3", fp8_blocks)])
def test_a_checkpoint_as_published_is_its_decoded_weights_trains_and_is_merged(model_type, published, tmp_path):
    first = save(model_type, tmp_path / "published")
    packed, decoded, settings = published(load_file(first / "model.safetensors"))
    second = shutil.copytree(first, tmp_path / "decoded")
    save_file(packed, first / "model.safetensors", {"format": "pt"})
    save_file(decoded, second / "model.safetensors", {"format": "pt"})
    config = json.loads((first / "config.json").read_text())
    (first / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    ids = np.random.default_rng(1).integers(0, small.VOCAB, (2, small.TOKENS))
    faults = []
    for in_4bit in (False, True):
        model, other = (load(folder, load_in_4bit=in_4bit) for folder in (first, second))
        states = [jax.tree_util.tree_leaves_with_path(nnx.state(each.decoder)) for each in (model, other)]
        for (path, ours), (_, wanted) in zip(*states, strict=True):
            if not np.array_equal(ours, wanted):
                faults.append(f"in_4bit={in_4bit}: {jax.tree_util.keystr(path)} differs")
        logits = [np.asarray(each(ids)) for each in (model, other)]
        if not np.allclose(*logits, rtol=0, atol=1e-3 * logits[1].std()):  # one program; atomic sums may differ
            faults.append(f"in_4bit={in_4bit}: logits differ by {np.abs(logits[0] - logits[1]).max()}")
    small.adapted(model)
    step = small.compute(model.decoder, "none")  # that of such a model is compared above: here it must run
    if not np.isfinite(step.loss):
        faults.append(f"loss {step.loss}")
    faults += [f"gradient of {n} is 0 or not finite" for n, g in step.grads.items() if not 0 < np.abs(g).sum() < np.inf]
    try:
        model.save_pretrained_merged(tmp_path / "merged")  # raises if what is read back computes something else
    except Exception as error:  # with all the rest that is wrong
        faults.append(f"merged: {error!r}")
    assert not faults, "\n".join(faults)


def test_files_written_from_a_model_on_the_card_compute_what_it_does(repo, tmp_path):
    """Merged and GGUF, both read back by what writes them, and loaded again here as a user would."""
    model, tokenizer = FastLanguageModel.from_pretrained(repo / "examples" / "tiny-base", max_seq_length=64)
    FastLanguageModel.get_peft_model(model, r=4, lora_alpha=6, init_lora_weights=False)
    merged = model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert merged.difference.mean <= merged.bound
    files = model.save_pretrained_gguf(tmp_path / "gguf", tokenizer, ["q8_0", "q4_k_m"])
    assert len(files.differences) == 2
    ids = np.random.default_rng(0).integers(0, 1024, (2, 64))
    wanted = np.asarray(model(ids))
    faults = []
    # bfloat16's rounding of merged weights, and of every layer; Q8_0 has 8 bits as well
    for name, path in (("merged", tmp_path / "merged"), ("q8_0", files[0])):
        found = np.asarray(load(path, load_in_4bit=False)(ids))
        off = np.abs(found - wanted).mean() / wanted.std()
        if not off < 0.03:
            faults.append(f"{name}: {off:.2%} of the spread off")
    assert not faults, "\n".join(faults)
