"""Text generation: the tokens transformers would give, whatever the batch."""

import warnings

import numpy as np
import pytest
import tiny
import torch

from fastft_jax import FastLanguageModel

NEW = 12
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=["llama-3.1", "mistral-7b-v0.1", "qwen-3"])
def pair(request, tmp_path_factory):
    theirs = tiny.make_model(request.param)
    folder = tiny.save(theirs, tmp_path_factory.mktemp(request.param))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no tokenizer in this folder
        ours, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    return theirs, ours


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(1, tiny.COMMON["vocab_size"], n).tolist() for n in (5, 17, 11)]


def greedy(model, prompt: list[int]) -> list[int]:
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_text_of_a_left_padded_batch_equals_transformers_one_by_one(pair):
    theirs, ours = pair
    assert ours.generate(prompts(), max_new_tokens=NEW) == [greedy(theirs, prompt) for prompt in prompts()]


def test_generation_stops_behind_the_end_token(pair):
    _, ours = pair
    full = ours.generate(prompts(), max_new_tokens=NEW)
    end = full[0][4]
    stopped = ours.generate(prompts(), max_new_tokens=NEW, eos_token_ids=(end,))
    for long, short in zip(full, stopped, strict=True):
        assert short == (long[: long.index(end) + 1] if end in long else long)


# What follows the logits is one code for every family: its tests take one
@pytest.mark.parametrize("pair", ["llama-3.1"], indirect=True, scope="module")
def test_sampling_follows_the_softmax_and_its_seed(pair):
    _, ours = pair
    prompt = prompts()[0]
    logits = np.asarray(ours(np.array([prompt])))[0, -1].astype(np.float64) / 2.0
    p = np.exp(logits - logits.max())
    p /= p.sum()
    draws = [row[0] for row in ours.generate([prompt] * 4000, max_new_tokens=1, temperature=2.0, seed=1)]
    seen = np.bincount(draws, minlength=len(p)) / len(draws)
    # 4000 draws: a frequency's standard deviation is at most sqrt(0.25 / 4000) = 0.008
    assert np.abs(seen - p).max() < 0.04
    again = ours.generate([prompt] * 4, max_new_tokens=NEW, temperature=2.0, seed=1)
    assert again == ours.generate([prompt] * 4, max_new_tokens=NEW, temperature=2.0, seed=1)


@pytest.mark.parametrize("pair", ["llama-3.1"], indirect=True, scope="module")
def test_empty_prompts_are_refused(pair):
    with pytest.raises(ValueError, match="prompt"):
        pair[1].generate([[1], []], max_new_tokens=1)
