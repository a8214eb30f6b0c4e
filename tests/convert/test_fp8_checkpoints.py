"""Checkpoints in fp8 with a scale a block of 128 x 128 load as what their decoded weights are."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from fastft_jax import FastLanguageModel
from fastft_jax.errors import CheckpointError
from fastft_jax.models.families.registry import config_from_hf

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.filterwarnings("ignore:.*tokenizer")]
IDS = np.random.default_rng(0).integers(0, tiny.COMMON["vocab_size"], (1, 16))
SETTINGS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
BEHIND = "model.layers.2."  # what predicts the token after the next lies behind the last layer


def scaled(w: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(e4m3, scales, what they decode to), block by block in a loop."""
    rows, columns = (-(-size // 128) for size in w.shape)
    codes, decoded = torch.empty_like(w, dtype=torch.float8_e4m3fn), torch.empty_like(w)
    scales = torch.empty(rows, columns, dtype=kind)
    for i in range(rows):
        for j in range(columns):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = w[block].abs().max() / 448 * (1 + i + j)  # so that no two neighbours' are alike
            codes[block] = (w[block] / scales[i, j].float()).to(torch.float8_e4m3fn)
            decoded[block] = codes[block].float() * scales[i, j].float()
    return codes, scales, decoded


def write(folder, out, kind=torch.float32, behind=False):
    """The folder with its layers' linears in fp8, and two tensors `behind` the last layer; and the same decoded."""
    packed, decoded = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        packed[name] = decoded[name] = w
        if ".layers." in name and w.ndim == 2 and not name.endswith("mlp.gate.weight"):
            packed[name], packed[f"{name}_scale_inv"], decoded[name] = scaled(w, kind)
    if behind:
        some = next(name for name in packed if name.endswith("down_proj.weight_scale_inv"))
        for name in (some.removesuffix("_scale_inv"), some):
            packed[BEHIND + name.split(".", 3)[3]] = packed[name].clone()
    for path, tensors in ((out / "fp8", packed), (out / "decoded", decoded)):
        shutil.copytree(folder, path)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (out / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": SETTINGS}))
    return out / "fp8", out / "decoded"


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, max_seq_length=64, dtype="float32", **options)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A DeepSeek-V3, a dense layer and one of experts, wide enough for several blocks, whole and cut off."""
    sizes = dict(
        hidden_size=160, intermediate_size=144, moe_intermediate_size=136, kv_lora_rank=124, n_routed_experts=8
    )
    model = tiny.make_model("deepseek-v3", **sizes)
    out = tmp_path_factory.mktemp("fp8")
    return write(tiny.save(model, out / "base"), out, behind=True)


def leaves(model) -> dict:
    import jax
    from flax import nnx

    found = jax.tree_util.tree_leaves_with_path(nnx.state(model.decoder))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in found}


def test_a_scaled_checkpoint_loads_as_its_decoded_weights_and_what_is_behind_the_last_layer_is_left(folders):
    """To the bit: one product in float32."""
    with pytest.warns(UserWarning, match=r"2 tensors of model\.layers\.2\. are not read: .*num_nextn_predict_layers"):
        ours = leaves(load(folders[0], load_in_4bit=False))
    wanted = leaves(load(folders[1], load_in_4bit=False))
    assert ours.keys() == wanted.keys() and len(ours) > 20
    for name, value in wanted.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_scales_of_16_bits_are_read_as_transformers_reads_them_and_nf4_codes_are_those_of_the_decoded_weights(tmp_path):
    """As Qwen3-FP8 has them. Widths are whole blocks: transformers takes no others."""
    sizes = dict(hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4, num_hidden_layers=2)
    model = tiny.make_model("qwen-3", **sizes)
    folder, decoded = write(tiny.save(model, tmp_path / "base"), tmp_path, torch.bfloat16)
    theirs = type(model).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(load(folder, load_in_4bit=False)(IDS), wanted, atol=1e-4)
    ours, wanted = leaves(load(folder)), leaves(load(decoded))
    for name, value in wanted.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


NAME = "model.layers.0.self_attn.kv_b_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{NAME}_scale_inv": None}, f"lacks '{NAME}_scale_inv'"),
        ({f"{NAME}_scale_inv": torch.ones(1, 2)}, rf"'{NAME}_scale_inv' is float32\[1, 2\].* of \[1, 1\]"),
        ({f"{NAME}_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, rf"'{NAME}_scale_inv' is int32\[1, 1\]"),
        ({"model.layers.0.self_attn.stray.weight_scale_inv": torch.ones(1, 1)}, "stray.weight_scale_inv"),
        ({"lm_head.weight": torch.ones(160, 160).to(torch.float8_e4m3fn)}, "'lm_head.weight' is float8_e4m3fn"),
    ],
    ids=["missing", "shape", "kind", "stray", "head"],
)
@pytest.mark.filterwarnings("ignore:.*are not read")
def test_scales_that_do_not_fit_are_refused_by_name(folders, tmp_path, change, said):
    tensors = load_file(folders[0] / "model.safetensors") | change
    shutil.copy(folders[0] / "config.json", tmp_path)
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\]"),
        ({"weight_block_size": None}, "weight_block_size=None"),
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
    ],
)
def test_other_fp8_settings_are_refused_by_name(folders, change, said):
    values = json.loads((folders[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=said):
        config_from_hf(values | {"quantization_config": SETTINGS | change})
