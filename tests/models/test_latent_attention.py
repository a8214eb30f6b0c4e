"""Latent attention and its families beyond logits and gradients (`test_moe.py`): packing, text, roundings, routing."""

import jax.numpy as jnp
import numpy as np
import pytest
import test_generate
import test_parity
import tiny
from released import RELEASED

from fastft_jax import FastLanguageModel
from fastft_jax.models.config import ExpertsConfig
from fastft_jax.models.families.registry import config_from_hf
from fastft_jax.models.residuals import Keep
from fastft_jax.models.router import route
from fastft_jax.trainers.flops import useful_flops

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """A V2-Lite, whose router is greedy: transformers' and ours."""
    model = tiny.make_model("deepseek-v2", topk_method="greedy", num_hidden_layers=1)
    return model, test_parity.load(tiny.save(model, tmp_path_factory.mktemp("lite")))


def test_packed_documents_give_transformers_logits_of_each_alone(lite):
    """The first is longer than the context before yarn, and the second ends at padding."""
    model, ours = lite
    lengths = (26, 10)
    documents = [np.random.default_rng(n).integers(0, tiny.COMMON["vocab_size"], n) for n in lengths]
    padding = np.zeros(4, int)
    row = np.concatenate([*documents, padding])[None]
    segments = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(lengths)), padding])[None]
    positions = np.concatenate([*map(np.arange, lengths), padding])[None]
    packed = np.asarray(ours(row, segment_ids=segments, positions=positions))[0]
    for document, start in zip(documents, (0, 26), strict=True):
        alone = test_parity.torch_logits(model, document[None], np.ones_like(document)[None])[0]
        here = packed[start : start + len(document)]
        np.testing.assert_allclose(here, alone, atol=test_parity.TOLERANCE, rtol=0)


def test_greedy_text_equals_transformers(lite):
    """Keys and values are cached as attention reads them, each as wide as it is."""
    model, ours = lite
    prompts = test_generate.prompts()[:2]
    assert ours.generate(prompts, max_new_tokens=4) == [test_generate.greedy(model, prompt)[:4] for prompt in prompts]
    ((cache,),) = ours.decoder.empty_caches(2, 5)
    assert (cache.k.shape, cache.v.shape) == ((1, 2, 5, 4, 24), (1, 2, 5, 4, 12))


def test_the_bias_in_a_routers_choice_and_its_logits_are_never_rounded(tmp_path):
    """As transformers keeps both in float32: in 16 bits, near scores would change places."""
    theirs = tiny.make_model("deepseek-v3", num_hidden_layers=1, first_k_dense_replace=0)
    tiny.save(theirs, tmp_path)
    ours = FastLanguageModel.from_pretrained(tmp_path, dtype="bfloat16", load_in_4bit=False)[0]
    router = ours.decoder.segments[0][0].mlp.router
    wanted = theirs.model.layers[0].mlp.gate.e_score_correction_bias.numpy()
    np.testing.assert_array_equal(np.asarray(router.e_score_correction_bias.get_value()[0]), wanted)
    router.weight.set_value(router.weight.get_value()[0])
    assert router(jnp.ones((1, 64), jnp.bfloat16)).dtype == jnp.float32


def test_experts_are_chosen_within_the_best_groups_and_weighted_without_the_bias():
    """Four groups of two, of which two count; worked out by hand."""
    config = ExpertsConfig(8, 2, 4, router="sigmoid", groups=4, top_groups=2, scaling=3.0)
    probabilities = np.array([[0.9, 0.1, 0.6, 0.5, 0.4, 0.45, 0.2, 0.3]])
    logits = jnp.asarray(np.log(probabilities / (1 - probabilities)), jnp.float32)
    # sums of groups 1.0, 1.1, 0.85, 0.5: the first two groups, and in them 0 and 2
    weights, experts = route(logits, config, Keep())
    assert experts.tolist() == [[0, 2]]
    np.testing.assert_allclose(weights, [[3 * 0.9 / 1.5, 3 * 0.6 / 1.5]], rtol=1e-5)
    # 0.4 more for number 5: sums 1.0, 1.1, 1.25, 0.5, so the best expert of all is out; weights are the plain scores'
    weights, experts = route(logits, config, Keep(), jnp.zeros(8).at[5].set(0.4))
    assert experts.tolist() == [[5, 2]]
    np.testing.assert_allclose(weights, [[3 * 0.45 / 1.05, 3 * 0.6 / 1.05]], rtol=1e-5)
    # "softmax" judges a group by its best alone: 0.9 and 0.6
    by_best = ExpertsConfig(8, 3, 4, normalise=False, groups=4, top_groups=2)
    assert route(logits, by_best, Keep())[1].tolist() == [[0, 2, 3]]


@pytest.mark.parametrize(
    ("name", "active", "rel"),
    [("DeepSeek-V2", 21e9, 0.01), ("DeepSeek-V2-Lite", 2.4e9, 0.03), ("DeepSeek-V3", 36.6e9, 0.001)],
)
def test_a_tokens_arithmetic_is_that_of_the_published_active_parameters(name, active, rel):
    """As the releases count them, without the embedding; to the digits that they give."""
    one_token = {"segment_ids": np.ones((1, 1), np.int32), "positions": np.full((1, 1), -1)}  # that sees no key
    flops = useful_flops(config_from_hf(RELEASED[name][0])[0], one_token, 0)
    assert flops == pytest.approx(4 * active, rel=rel)
