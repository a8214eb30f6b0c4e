"""Text from a decoder: batched, cached, greedy or sampled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from fastft_jax.models.decoder import Decoder


def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: tuple[int, ...] = (),
    pad_token_id: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    pad_to_multiple_of: int = 32,
) -> list[list[int]]:
    """New token ids of every prompt, up to and including the first of `eos_token_ids`.

    Prompts are left-padded to one length (rounded up so that few programs are compiled); padding is never attended to
    and positions count from each prompt's first token, so a row's text does not depend on its neighbours.
    temperature 0 takes the most likely token, else tokens are drawn from softmax(logits / temperature).
    """
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and no empty ones")
    longest = max(map(len, prompts))
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    ids = np.full((len(prompts), width), pad_token_id, np.int32)
    mask = np.zeros((len(prompts), width), np.int32)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    definition, state = nnx.split(decoder)
    new = _generate(
        definition,
        state,
        jnp.asarray(ids),
        jnp.asarray(mask),
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        eos=tuple(eos_token_ids),
        pad=pad_token_id,
        temperature=temperature,
    )
    return [_until_eos(row.tolist(), eos_token_ids) for row in np.asarray(new)]


@partial(jax.jit, static_argnums=0, static_argnames=("max_new_tokens", "eos", "pad", "temperature"))
def _generate(definition, state, ids, mask, key, *, max_new_tokens, eos, pad, temperature) -> Int[Array, "B new"]:
    decoder = nnx.merge(definition, state)
    batch, width = ids.shape
    total = width + max_new_tokens
    lengths = mask.sum(axis=1)
    cached = jnp.zeros((batch, total), jnp.int32).at[:, :width].set(mask)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    caches = decoder.empty_caches(batch, total)
    hidden, caches = decoder.decode(ids, positions, mask, cached, 0, caches)

    def choose(hidden, step):
        logits = decoder.logits(hidden[:, -1:])[:, 0]
        if temperature == 0.0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        drawn = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature)
        return drawn.astype(jnp.int32)

    def ended(token):
        return jnp.isin(token, jnp.array(eos, jnp.int32)) if eos else jnp.zeros(token.shape, bool)

    def more(carry):
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~done.all()

    def next_token(carry):
        step, token, done, out, cached, caches = carry
        at = width + step - 1  # where the previous token's keys go
        cached = cached.at[:, at].set(1)
        one = jnp.ones((batch, 1), jnp.int32)
        hidden, caches = decoder.decode(token[:, None], (lengths + step - 1)[:, None], one, cached, at, caches)
        token = jnp.where(done, pad, choose(hidden, step))
        return step + 1, token, done | ended(token), out.at[:, step].set(token), cached, caches

    token = choose(hidden, 0)
    out = jnp.full((batch, max_new_tokens), pad, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, ended(token), out, cached, caches)
    return jax.lax.while_loop(more, next_token, carry)[3]


def _until_eos(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in eos:
            return tokens[: i + 1]
    return tokens
