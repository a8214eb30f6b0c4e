"""Adapters that start from the weight they adapt: PiSSA from its largest part, LoftQ from what NF4 lost of it.

The frozen base itself never changes here, so that one NF4 base serves every adapter, and an adapter is right on the
very base it was trained on. PiSSA (Meng et al. 2024, arXiv:2404.02948) trains B A, which begins as the largest part
s B0 A0 of W; where the paper takes that part out of the base, here the frozen pair is subtracted beside it: W x +
s (B A - B0 A0) x, the same function, saved as plain LoRA of twice the rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.errors import ConfigError
from fastft_jax.models.layers import Frozen
from fastft_jax.models.lora import INITIALISATIONS, Site
from fastft_jax.quant.low_rank import low_rank_pair
from fastft_jax.quant.nf4 import NF4Array, dequantize

PISSA = "pissa"
LOFTQ = "loftq"


def checked_init(init: bool | str, loftq_config: dict[str, Any] | None) -> bool | str:
    """`init_lora_weights`, or "loftq" where loftq_config is given; ConfigError or NotImplementedError for what is not
    one of true, false, gaussian, pissa, pissa_niter_<k>, loftq, or for a loftq_config that cannot be meant."""
    if init == LOFTQ or loftq_config:
        if init not in (True, LOFTQ):
            raise ConfigError(f"loftq_config starts the adapter, and so does init_lora_weights={init!r}: give one")
        unknown = sorted(set(loftq_config or {}) - {"loftq_bits", "loftq_iter"})
        if unknown:
            raise ConfigError(f"loftq_config has no {unknown[0]!r}, only loftq_bits and loftq_iter")
        bits, turns = ((loftq_config or {}).get(key, value) for key, value in (("loftq_bits", 4), ("loftq_iter", 1)))
        if bits != 4 or isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
            raise ConfigError(f"loftq_config={loftq_config!r}: loftq_bits is 4, loftq_iter a whole number from 1 on")
        if turns > 1:
            raise NotImplementedError(
                f"loftq_iter={turns} is not built: from the second turn on, LoftQ changes the base, on which the saved "
                "adapter would no longer fit; loftq_iter=1 leaves it as it is"
            )
        return LOFTQ
    if isinstance(init, str) and init.startswith(PISSA):
        power_iterations(init)
    elif init not in INITIALISATIONS:
        raise NotImplementedError(f"init_lora_weights={init!r} is not built yet")
    return init


def power_iterations(init: bool | str) -> int | None:
    """k of "pissa_niter_k", None for "pissa"; ConfigError for any other spelling that begins so."""
    count = str(init).removeprefix(PISSA).removeprefix("_niter_")
    if init != PISSA and not count.isdecimal():
        raise ConfigError(f"init_lora_weights={init!r}: write pissa, or pissa_niter_4 for 4 power iterations")
    return int(count) if count else None


def start_from_principal_part(targets: Sequence[Site], iterations: int | None) -> None:
    """PiSSA, in place: A and B become the largest part of each target's weight, and a frozen copy is subtracted."""
    _set_pairs(targets, lambda site, w, r: low_rank_pair(w, r, iterations))
    for linear in {id(site.linear): site.linear for site in targets}.values():
        linear.start_A, linear.start_B = (
            Frozen(jnp.array(pair.get_value(), copy=True)) for pair in (linear.lora_A, linear.lora_B)
        )


def start_from_quantisation_error(targets: Sequence[Site], original: Callable[[Site], np.ndarray]) -> None:
    """LoftQ's first iteration, in place: s B A becomes the largest part of `original(site)` less its NF4 code.

    ConfigError for a base that is not NF4.
    """
    if not all(isinstance(site.linear.weight.get_value(), NF4Array) for site in targets):
        raise ConfigError("LoftQ makes up for what NF4 loses: it needs load_in_4bit=True")

    def pair(site: Site, w: Array, r: int):
        return low_rank_pair(jnp.asarray(original(site)).astype(jnp.float32) - w, r)

    _set_pairs(targets, pair)


def _set_pairs(targets: Sequence[Site], make: Callable[[Site, Array, int], tuple[Array, Array]]) -> None:
    """A and B of every target from make(site, W as it is decoded, rank), which gives the product s B A."""
    by_linear: dict[int, list[Site]] = {}
    for site in targets:
        by_linear.setdefault(id(site.linear), []).append(site)
    for group in by_linear.values():
        linear, pairs = group[0].linear, []
        widest = linear.lora_A.get_value().shape[1]
        for at, site in enumerate(sorted(group, key=lambda site: site.row)):
            r = widest if linear.ranks is None else linear.ranks[at]
            scaling = linear.scaling[at] if isinstance(linear.scaling, tuple) else linear.scaling
            a, b = (
                part / scaling**0.5 for part in make(site, _decoded(linear.weight.get_value(), jnp.int32(site.row)), r)
            )
            if a.shape[0] < r:
                raise ConfigError(f"r={r} is more than the rank that {site.hf_path} can have: at most {a.shape[0]}")
            pairs.append((jnp.pad(a, ((0, widest - r), (0, 0))), jnp.pad(b, ((0, 0), (0, widest - r)))))
        a, b = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
        linear.lora_A, linear.lora_B = nnx.LoRAParam(a), nnx.LoRAParam(b)


@jax.jit
def _decoded(weight: Float[Array, "L N K"] | NF4Array, row: Int[Array, ""]) -> Float[Array, "N K"]:
    if isinstance(weight, NF4Array):
        return dequantize(weight.at(row), jnp.float32)
    return weight[row].astype(jnp.float32)
