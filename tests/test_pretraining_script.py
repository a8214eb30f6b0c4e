"""The forward pass that trains a Llama from random weights, and the script that makes examples/tiny-base with it."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.registry import config_from_hf

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # three queries a key
    "head_dim": 8,  # and 6 * 8 is not the width
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 50,
}


@pytest.fixture
def scripts(repo, monkeypatch):
    """(trainable_llama, pretrain_tiny_base); the import path is as before afterwards."""
    monkeypatch.setattr(sys, "path", [str(repo / "scripts"), *sys.path])
    import pretrain_tiny_base
    import trainable_llama

    return trainable_llama, pretrain_tiny_base


@pytest.fixture
def llama(scripts):
    """A configuration, its names, and random weights of it: norms too are not 1."""
    config, names = config_from_hf(HF)
    rng, weights = np.random.default_rng(0), {}
    for request in scripts[0].weight_requests(config):
        shape = request.shape if request.layers is None else (len(request.layers), *request.shape)
        norm = request.path.endswith("norm.weight")
        weights[request.path] = jnp.asarray(rng.normal(norm, 0.3 if norm else 0.2, shape), jnp.float32)
    return config, names, weights


def by_hf_name(scripts, config, names, tree):
    """{Hugging Face's name: array} of a dict by the decoder's paths."""
    out = {}
    for request in scripts[0].weight_requests(config):
        array = np.asarray(tree[request.path])
        out |= zip(request.hf_names(names), [array] if request.layers is None else array, strict=True)
    return out


def test_loss_and_the_gradients_of_all_weights_are_those_of_transformers_in_float64(scripts, llama):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config, names, weights = llama
    ids = np.random.default_rng(1).integers(0, HF["vocab_size"], (3, 17))
    model = LlamaForCausalLM(LlamaConfig(**HF, attn_implementation="eager")).double()
    state = {
        name: torch.tensor(array, dtype=torch.float64)
        for name, array in by_hf_name(scripts, config, names, weights).items()
    }
    left = model.load_state_dict(state, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys  # the tied head
    wanted = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
    wanted.backward()

    loss_of = lambda w: scripts[1].training_loss(config, w, jnp.asarray(ids))  # noqa: E731
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(weights)
    assert abs(float(loss) / wanted.item() - 1) < 1e-6
    found, exact = by_hf_name(scripts, config, names, gradients), dict(model.named_parameters())
    assert set(found) == set(exact) and len(found) == 2 + 9 * 3
    for name, gradient in found.items():
        expected = exact[name].grad.numpy()
        # float32 sums of 51 tokens through three layers; transformers' rotary tables are float32 too
        assert np.linalg.norm(gradient - expected) < 1e-5 * np.linalg.norm(expected), name
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_hidden_states_are_the_decoders(scripts, llama, dtype, bound):
    config, _, weights = llama
    ids = np.random.default_rng(2).integers(0, HF["vocab_size"], (2, 9))
    decoder = Decoder(config, lambda path, shape, layers: weights[path].astype(dtype), dtype)
    both = jax.jit(lambda w, decoder: (scripts[0].hidden_states(config, w, ids, dtype), decoder.hidden_states(ids)))
    got, wanted = both(weights, decoder)
    assert got.dtype == wanted.dtype == dtype and got.shape == wanted.shape == (2, 9, 36)
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    assert np.linalg.norm(got - wanted) < bound * np.linalg.norm(wanted)  # rounded to `dtype` at the same places


def test_what_the_forward_pass_leaves_out_is_refused(scripts):
    config, _ = config_from_hf(HF)
    for change in ({"qk_norm": True}, {"qkv_bias": True}, {"layer_windows": (4, 4, 4)}):
        with pytest.raises(ValueError, match="a plain Llama has no"):
            scripts[0].hidden_states(dataclasses.replace(config, **change), {}, np.zeros((1, 2), int), jnp.float32)


def test_the_script_trains_every_weight_and_saves_what_transformers_reads(scripts, repo, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    script = scripts[1]
    smaller = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 2}
    monkeypatch.setattr(script, "CONFIG", script.CONFIG | smaller)
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "LENGTH", 48)
    tokenizer = Tokenizer.from_file(str(repo / "examples" / "tiny-base" / "tokenizer.json"))
    config, names = config_from_hf(script.CONFIG)
    start = script.random_weights(config)
    ids = next(script.batches(tokenizer)).astype(np.int64)
    loss_of = jax.jit(lambda w: script.training_loss(config, w, ids))
    weights = script.train(config, start, tokenizer, 12)
    assert float(loss_of(start)) > 6 and float(loss_of(weights)) < float(loss_of(start)) - 1
    changed = by_hf_name(scripts, config, names, {path: weights[path] - w for path, w in start.items()})
    assert all(np.all(np.any(change, axis=-1)) for name, change in changed.items() if name.endswith("_proj.weight"))
    assert all(np.all(change) for name, change in changed.items() if name.endswith("norm.weight"))

    script.save(tmp_path, weights, tokenizer)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        saved = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    rounded = {path: w.astype(jnp.bfloat16).astype(jnp.float32) for path, w in weights.items()}
    assert abs(float(loss_of(rounded)) / saved - 1) < 1e-5
