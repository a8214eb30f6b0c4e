"""Mixtures of experts compute what transformers and PEFT compute, and lose no token on the way."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import test_generate
import test_parity
import tiny
import torch
from flax import nnx

from fastft_jax import FastLanguageModel
from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError, ConfigError
from fastft_jax.models import lora
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.layers import ExpertLinear
from fastft_jax.models.moe import collect, sort_by_expert, spread
from fastft_jax.models.router import load_balancing_loss, router_load
from fastft_jax.quant import int8
from fastft_jax.quant.grouped_lora import grouped_lora_linear
from fastft_jax.quant.lora_linear import Projection
from fastft_jax.trainers.flops import active_parameters, useful_flops
from fastft_jax.trainers.step import LossOptions, gradients

pytestmark = pytest.mark.usefixtures("quick_compilation")
R = 4


@pytest.fixture(scope="module", params=tiny.EXPERTS)
def case(request, tmp_path_factory):
    """(transformers model, our model with an adapter on every linear, experts included); read from several shards."""
    model = tiny.make_model(request.param)
    folder = tiny.save(model, tmp_path_factory.mktemp(request.param), max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = test_parity.load(folder)
    FastLanguageModel.get_peft_model(ours, r=R, lora_alpha=6, init_lora_weights=False)
    return model, ours


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A folder of the smallest Mixtral, and its transformers model."""
    model = tiny.make_model("mixtral", sliding_window=None)
    return tiny.save(model, tmp_path_factory.mktemp("mixtral")), model


def test_greedy_text_equals_transformers(mixtral):
    folder, model = mixtral
    ours, prompts = test_parity.load(folder), test_generate.prompts()[:2]
    assert ours.generate(prompts, max_new_tokens=4) == [test_generate.greedy(model, prompt)[:4] for prompt in prompts]


def test_logits_and_gradients_equal_transformers_with_the_adapter_in_peft(case, tmp_path):
    model, ours = case
    ours.save_pretrained(tmp_path)
    ids, mask = test_parity.padded_batch()
    real = mask.astype(bool)
    without = test_parity.torch_logits(model, ids, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that rank_pattern matched no module: it matches parameters
        theirs = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    try:
        logits = test_parity.torch_logits(theirs, ids, mask)
        np.testing.assert_allclose(np.asarray(ours(ids, mask))[real], logits[real], atol=test_parity.TOLERANCE, rtol=0)
        assert np.abs(logits - without)[real].max() > 1
        labels = np.where(real, ids, -100)
        labels[1, 13] = -100  # the first real token would be predicted from padding
        their_loss, fused = test_parity.torch_gradients(theirs, ids, mask, labels)
        policy = "none" if ours.decoder.config.unread_layers else "full"  # once with what latent attention keeps
        our_loss, mine = test_parity.our_gradients(ours, ids, mask, labels, policy)
        np.testing.assert_allclose(our_loss, their_loss, rtol=1e-5)
        wanted = one_by_one(fused, ours)
        assert mine.keys() == wanted.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(mine[name], value, atol=test_parity.TOLERANCE, rtol=0, err_msg=name)
    finally:
        theirs.unload()


def test_transformers_computes_the_merged_models_logits(case, tmp_path):
    """Under the names of published files: every tensor of the base's folder is there, of its shape."""
    model, ours = case
    ours.save_pretrained_merged(tmp_path / "merged", dtype="float32", verify=False)
    before, after = Checkpoint.open(ours.base_folder), Checkpoint.open(tmp_path / "merged")
    assert {n: before.info(n) for n in before.names} == {n: after.info(n) for n in after.names}
    merged = type(model).from_pretrained(tmp_path / "merged")
    ids, mask = test_parity.padded_batch()
    theirs, real = test_parity.torch_logits(merged.eval(), ids, mask), mask.astype(bool)
    np.testing.assert_allclose(np.asarray(ours(ids, mask))[real], theirs[real], atol=test_parity.TOLERANCE, rtol=0)
    assert np.abs(theirs - test_parity.torch_logits(model, ids, mask))[real].max() > 1


def one_by_one(fused: dict[str, np.ndarray], model) -> dict[str, np.ndarray]:
    """PEFT's gradients by our names: its fused pairs taken apart, as formats have them. A [E R', K] in rows e R' + k,
    B [N, R' E] in columns k E + e; gate and up side by side, R' = 2 R, but for GPT-OSS."""
    out = {name: value for name, value in fused.items() if ".experts." not in name}
    e = model.decoder.config.experts.num_experts
    for site in lora.sites(model.decoder, model.names):
        if site.expert is None:
            continue
        layer = site.hf_path.split(".")[2]
        kind = site.path.rpartition(".")[2]
        leaf = "experts" if kind == "down_proj" else "experts.base_layer"
        a, b = (fused[f"model.layers.{layer}.mlp.{leaf}.lora_{half}.weight"] for half in "AB")
        a, b = a.reshape(e, -1, a.shape[1])[site.expert], b.reshape(b.shape[0], -1, e)[:, :, site.expert]
        half = b.shape[0] // 2
        a, b = {
            "down_proj": (a, b),
            "gate_proj": (a[:R], b[:half, :R]),
            "up_proj": (a[R:], b[half:, R:]),
            "gate_up_proj": (a, np.concatenate([b[::2], b[1::2]])),  # GPT-OSS: one pair, rows in turns
        }[kind]
        out[f"{site.hf_path}.lora_A.weight"], out[f"{site.hf_path}.lora_B.weight"] = a, b
    return out


def packed_batch(length: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 160, (1, 2, length)).astype(np.int32)
    segments = np.ones_like(ids)
    segments[..., 12:] = 2
    segments[:, 1, 25:] = 0  # padding
    labels = np.where(segments > 0, np.roll(ids, -1, 2), -100)
    positions = np.arange(length) - 12 * (np.arange(length) >= 12)
    return {
        "input_ids": ids,
        "labels": labels.astype(np.int32),
        "segment_ids": segments,
        "positions": np.broadcast_to(positions, ids.shape).astype(np.int32),
    }


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Our model of a Mixtral in NF4, the balancing loss on."""
    model = tiny.make_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    ours = test_parity.load(tiny.save(model, tmp_path_factory.mktemp("nf4")), load_in_4bit=True)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(ours, r=R, target_modules=targets, init_lora_weights=False)


def test_every_recomputation_policy_and_accumulation_have_the_same_loss_and_gradients(quantised):
    """With the balancing loss in it: of equal micro-batches the mean is added, so twice the batch changes nothing."""
    definition, trainable, frozen = nnx.split(quantised.decoder, nnx.Param, ...)
    jitted = jax.jit(gradients, static_argnums=(0, 4))
    batch = packed_batch()
    twice = {name: np.concatenate([value, value]) for name, value in batch.items()}
    results = {
        policy: jitted(definition, trainable, frozen, rows, LossOptions(policy, 32, 2), None)
        for policy, rows in {"none": batch, "selective": batch, "full": twice, "offload": batch}.items()
    }
    loss, grads = results.pop("none")
    for other_loss, other in results.values():
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other), strict=True):
            assert np.abs(a).max() > 0, path
            atol = 1e-6 * max(1.0, float(np.linalg.norm(a)))  # XLA may fuse the same operations otherwise
            np.testing.assert_allclose(b, a, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_packed_documents_give_the_logits_of_each_alone(quantised):
    batch = {name: value[0] for name, value in packed_batch().items()}
    packed = np.asarray(quantised(batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"]))
    alone = np.asarray(quantised(np.stack([batch["input_ids"][0, :12], batch["input_ids"][0, 12:24]])))
    np.testing.assert_allclose(packed[0, :24].reshape(2, 12, -1), alone, atol=5e-5, rtol=0)


def test_experts_are_quantised_one_by_one_as_bitsandbytes_does_and_routers_are_not(mixtral):
    import bitsandbytes.functional as bnb

    folder, theirs = mixtral
    layer = test_parity.load(folder, load_in_4bit=True).decoder.segments[0][0]
    weight = layer.mlp.experts.up_proj.weight.get_value()
    assert weight.codes.shape == (2, 4, 96, 32) and weight.shape == (96, 64)
    assert layer.mlp.router.weight.get_value().dtype == jnp.float32
    from fastft_jax.quant.nf4 import dequantize_stack

    ours = np.asarray(dequantize_stack(weight.at(jnp.int32(1)), jnp.float32))
    for expert in range(4):
        w = theirs.model.layers[1].mlp.experts.gate_up_proj[expert, 96:].detach().contiguous()
        wanted = bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True))
        np.testing.assert_array_equal(ours[expert], wanted.numpy())


def test_experts_are_int8_one_by_one(mixtral):
    folder, theirs = mixtral
    weight = test_parity.load(folder, load_in_8bit=True).decoder.segments[0][0].mlp.experts.down_proj.weight.get_value()
    w = jnp.asarray(theirs.model.layers[1].mlp.experts.down_proj[3].detach().numpy())
    for ours, wanted in zip(*map(jax.tree.leaves, (weight.at(1), int8.quantize(w))), strict=True):
        np.testing.assert_array_equal(ours[3], wanted)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 96)), jnp.float32)
    got = grouped_lora_linear(x, jnp.array([0, 0, 0, 5]), [Projection(weight.at(1))], [1.0])
    np.testing.assert_allclose(got, x @ int8.dequantize(int8.quantize(w), jnp.float32).T, rtol=1e-5, atol=1e-5)


def test_the_balancing_loss_and_its_gradient_are_transformers(tmp_path):
    """coefficient 5: the loss's own part of the gradients is then as large as the rest."""
    model = tiny.make_model("phi-3.5-moe", output_router_logits=True, router_aux_loss_coef=5.0)
    tiny.save(model, tmp_path)
    ours = FastLanguageModel.get_peft_model(
        test_parity.load(tmp_path), r=R, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    ids, mask = test_parity.padded_batch()
    labels = np.where(mask, ids, -100)
    labels[1, 13] = -100
    their_loss, wanted = test_parity.torch_gradients(theirs, ids, mask, labels)
    with torch.no_grad():
        out = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), labels=torch.tensor(labels))
    our_loss, mine = test_parity.our_gradients(ours, ids, mask, labels)
    assert float(out.aux_loss) > 2.0  # top_k where the load is even
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-5)
    assert mine.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(mine[key], value, atol=test_parity.TOLERANCE, rtol=0, err_msg=key)


def test_the_load_of_evenly_used_experts_costs_top_k():
    logits = jnp.asarray(np.tile(np.eye(4) * 3.0, (5, 1)) + np.tile(np.roll(np.eye(4), 1, 1), (5, 1)), jnp.float32)
    counted = jnp.ones(20, bool)
    assert float(load_balancing_loss(router_load(logits, 2, counted), 20.0)) == pytest.approx(2.0)
    half = router_load(logits, 2, counted.at[10:].set(False))
    np.testing.assert_allclose(half, router_load(logits[:10], 2, counted[:10]), rtol=1e-6)


def test_sorting_keeps_every_token_and_its_derivative_is_exact():
    rng = np.random.default_rng(0)
    experts = jnp.asarray(np.stack([rng.permutation(5)[:2] for _ in range(9)]))
    order, place, sizes = sort_by_expert(experts, 5)
    assert int(sizes.sum()) == 18 and (np.diff(np.asarray(experts).reshape(-1)[order]) >= 0).all()
    x, ct = jnp.asarray(rng.normal(size=(9, 3)), jnp.float32), jnp.asarray(rng.normal(size=(18, 3)), jnp.float32)
    np.testing.assert_allclose(collect(2, spread(2, x, order, place), order, place), 2 * x, rtol=1e-6)
    plain = jax.vjp(lambda x: x[order // 2], x)[1](ct)[0]
    np.testing.assert_allclose(jax.vjp(lambda x: spread(2, x, order, place), x)[1](ct)[0], plain, rtol=1e-5, atol=1e-6)


def test_users_of_mixtral_may_write_gate_proj_or_w1(mixtral, tmp_path):
    folder, _ = mixtral
    ours = test_parity.load(folder)
    FastLanguageModel.get_peft_model(ours, r=R, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert ours.peft_config["target_modules"] == ["w1", "w2", "w3"]
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == []
    assert written["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    read, _ = FastLanguageModel.from_pretrained(tmp_path, dtype="float32", load_in_4bit=False)
    assert read.peft_config["target_modules"] == ["w1", "w2", "w3"] and not read.peft_config["rank_pattern"]
    assert read.num_parameters() == ours.num_parameters()
    assert "equal to the bit" in ours.verify_adapter(tmp_path)


def test_an_adapter_on_some_layers_and_with_rslora_goes_to_peft(mixtral, tmp_path):
    folder, model = mixtral
    ours = test_parity.load(folder)
    FastLanguageModel.get_peft_model(
        ours,
        r=R,
        layers_to_transform=[1],
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["w1", "w2", "w3", "q_proj"],
    )
    ours.save_pretrained(tmp_path)
    ids, mask = test_parity.padded_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    try:
        wanted, real = test_parity.torch_logits(theirs, ids, mask), mask.astype(bool)
        np.testing.assert_allclose(np.asarray(ours(ids, mask))[real], wanted[real], atol=test_parity.TOLERANCE, rtol=0)
    finally:
        theirs.unload()
    read, _ = FastLanguageModel.from_pretrained(tmp_path, dtype="float32", load_in_4bit=False)
    np.testing.assert_array_equal(np.asarray(read(ids, mask))[real], np.asarray(ours(ids, mask))[real])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(target_modules=["q_proj", "gate_proj"]), "on their gate projections alone"),
        (dict(lora_dropout=0.1), "lora_dropout=0.1 does not go with LoRA on experts"),
        (dict(target_modules=r".*experts\.[01]\.w."), "2 of the 4 experts of model.layers.0"),
        (dict(target_modules=["q_proj", "shared_expert_gate"]), "no module is called shared_expert_gate"),
        (dict(use_dora=True), "use_dora=True is not built yet for experts"),
        (dict(init_lora_weights="pissa"), "PiSSA or LoftQ is not built yet for experts"),
        (dict(rank_pattern={"w2": 2}), "rank_pattern for model.layers.0.*w2 is not built yet for experts"),
    ],
)
def test_adapters_that_no_reader_could_hold_are_refused(mixtral, options, said):
    model = test_parity.load(mixtral[0])
    with pytest.raises((ConfigError, NotImplementedError), match=said):
        FastLanguageModel.get_peft_model(model, **options)
    assert not any(linear.adapted for _, linear in lora.layer_linears(model.decoder.segments[0][0]))


MIXTRAL = {"model_type": "mixtral"} | tiny.COMMON | tiny.EXPERTS["mixtral"][1]
QWEN = {"model_type": "qwen2_moe"} | tiny.COMMON | tiny.EXPERTS["qwen-2-moe"][1]
PHI = {"model_type": "phimoe"} | tiny.COMMON | tiny.EXPERTS["phi-3.5-moe"][1]
DEEPSEEK_V2 = {"model_type": "deepseek_v2"} | tiny.COMMON | tiny.EXPERTS["deepseek-v2"][1]
DEEPSEEK_V3 = {"model_type": "deepseek_v3"} | tiny.COMMON | tiny.EXPERTS["deepseek-v3"][1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (MIXTRAL | {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4"),
        (MIXTRAL | {"num_local_experts": 0}, "num_local_experts=0"),
        (MIXTRAL | {"output_router_logits": "yes"}, "output_router_logits"),
        (QWEN | {"mlp_only_layers": [9]}, r"mlp_only_layers=\[9\]"),
        (PHI | {"num_experts_per_tok": 3}, "num_experts_per_tok=3"),
        (DEEPSEEK_V2 | {"norm_topk_prob": True}, "norm_topk_prob=True"),
        (DEEPSEEK_V2 | {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        (DEEPSEEK_V2 | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        (DEEPSEEK_V2 | {"n_group": 3}, "n_group=3 must divide n_routed_experts=8"),
        (DEEPSEEK_V2 | {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the experts in topk_group=2 of"),
        (DEEPSEEK_V2 | {"num_key_value_heads": 2}, "num_key_value_heads=2 must be num_attention_heads=4"),
        (DEEPSEEK_V2 | {"v_head_dim": 25}, "v_head_dim=25 is more than qk_nope_head_dim"),
        (DEEPSEEK_V2 | {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 is odd"),
        (DEEPSEEK_V2 | {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (DEEPSEEK_V3 | {"topk_group": 5}, "topk_group=5 must not be more"),
        (DEEPSEEK_V3 | {"n_group": 8, "num_experts_per_tok": 2}, "fewer than the two experts"),
        (MIXTRAL | {"kv_lora_rank": 16}, "kv_lora_rank=16 is not supported for mixtral"),
        (PHI | {"rope_parameters": PHI["rope_parameters"] | {"long_mscale": 1.3}}, "short_mscale=1.2.*long_mscale=1.3"),
    ],
)
def test_configs_that_are_not_supported_are_refused_by_key_and_value(values, said):
    with pytest.raises(CheckpointError, match=said):
        config_from_hf(values)


def test_where_the_experts_are_and_what_a_token_costs(quantised):
    config, _ = config_from_hf(QWEN | {"decoder_sparse_step": 2, "num_hidden_layers": 6, "mlp_only_layers": [3]})
    assert [kind.sparse for kind in config.layer_kinds] == [False, True, False, False, False, True]
    # three experts of width 48, the router, the shared expert and its gate; then a token's other linears, and the head
    sparse = 3 * 64 * 48 * 3 + 64 * 6 + 3 * 64 * 80 + 64
    others = 6 * 64 * (2 * 64 + 2 * 32) + 4 * 3 * 64 * 96 + 160 * 64
    batch = {"segment_ids": np.ones((1, 1), np.int32), "positions": np.full((1, 1), -1)}
    assert useful_flops(config, batch, 0) == 4 * (2 * sparse + others)
    made, trainable = quantised.decoder, nnx.state(quantised.decoder, nnx.Param)
    linears = [linear for _, linear in lora.layer_linears(made.segments[0][0]) if linear.adapted]
    wanted = sum(
        (linear.lora_A.size + linear.lora_B.size) * (2 / 4 if isinstance(linear, ExpertLinear) else 1)
        for linear in linears
    )
    assert active_parameters(made.config, trainable) == wanted < quantised.num_parameters()[0]
