"""Adapters that start from the weight they adapt: PiSSA from its largest part, LoftQ from what NF4 lost of it.

The frozen base itself stays as it is, so that one NF4 base serves every adapter, and an adapter is right on the very
base it was trained on; only LoftQ of more than one turn codes its own base anew. PiSSA (Meng et al. 2024,
arXiv:2404.02948) trains B A, which begins as the largest part s B0 A0 of W; where the paper takes that part out of the
base, here the frozen pair is subtracted beside it: W x + s (B A - B0 A0) x, the same function, saved as plain LoRA of
twice the rank.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from fastft_jax.errors import ConfigError
from fastft_jax.models.adapter_swap import Originals
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.layers import Frozen, Linear
from fastft_jax.models.lora import INITIALISATIONS, Site
from fastft_jax.quant.dense import Quantised, dense, is_quantised
from fastft_jax.quant.low_rank import loftq, low_rank_pair, requantised
from fastft_jax.quant.nf4 import NF4Array, stack

Original = Callable[[Site], np.ndarray]  # a target's weight [N, K] as the checkpoint has it

START_A, START_B = "loftq_start_A", "loftq_start_B"
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
    _set_pairs(
        targets,
        lambda site, r: low_rank_pair(_decoded(site.linear.weight.get_value(), jnp.int32(site.row)), r, iterations),
    )
    for linear in {id(site.linear): site.linear for site in targets}.values():
        linear.start_A, linear.start_B = (
            Frozen(jnp.array(pair.get_value(), copy=True)) for pair in (linear.lora_A, linear.lora_B)
        )


def start_from_quantisation_error(
    decoder: Decoder, targets: Sequence[Site], original: Original, turns: int, originals: Originals
) -> dict[str, np.ndarray]:
    """LoftQ, in place: s B A becomes the largest part of original(site) less its NF4 code.

    From the second turn on the base of this adapter is coded anew; what is returned is then what `requantise` needs to
    code it so again: the last pair but one of each target, unscaled. ConfigError for a base that is not NF4.
    """
    codes: dict[str, NF4Array] = {}
    last: dict[str, np.ndarray] = {}

    def pair(site: Site, r: int):
        weight = _nf4(site)
        found = loftq(jnp.asarray(original(site)), r, turns, double_quant=weight.absmax_scale is not None)
        if turns > 1:
            codes[site.hf_path] = found.q
            last[f"{site.hf_path}.{START_A}"], last[f"{site.hf_path}.{START_B}"] = jax.device_get(found[3:])
        return found.a, found.b

    _set_pairs(targets, pair)
    _recode(decoder, targets, codes, originals)
    return last


def requantise(
    decoder: Decoder, targets: Sequence[Site], original: Original, last: Mapping[str, np.ndarray], originals: Originals
) -> None:
    """Code the base of a saved LoftQ adapter as it was coded when that was made, in place."""
    codes = {
        site.hf_path: requantised(
            jnp.asarray(original(site)),
            jnp.asarray(last[f"{site.hf_path}.{START_A}"]),
            jnp.asarray(last[f"{site.hf_path}.{START_B}"]),
            _nf4(site).absmax_scale is not None,
        )
        for site in targets
    }
    _recode(decoder, targets, codes, originals)


def _nf4(site: Site) -> NF4Array:
    weight = site.linear.weight.get_value()
    if not isinstance(weight, NF4Array):
        raise ConfigError("LoftQ makes up for what NF4 loses: it needs load_in_4bit=True")
    return weight


def _recode(decoder: Decoder, targets: Sequence[Site], codes: dict[str, NF4Array], originals: Originals) -> None:
    """Give the targets' stacks these codes in their rows."""
    paths = {id(m): path for path, m in nnx.iter_modules(decoder) if isinstance(m, Linear)}
    for group in _by_linear([site for site in targets if site.hf_path in codes]):
        linear, weight = group[0].linear, _nf4(group[0])
        rows = {site.row: codes[site.hf_path] for site in group}
        plain = dataclasses.replace(weight, compute=None)
        whole = [rows.get(row) or plain.at(jnp.int32(row)).sliced() for row in range(weight.codes.shape[0])]
        originals.keep(paths[id(linear)], "weight", linear)
        linear.weight, linear.requantised = Frozen(dataclasses.replace(stack(whole), compute=weight.compute)), True


def _by_linear(targets: Sequence[Site]) -> list[list[Site]]:
    """The targets of each stack, in the order of its rows."""
    groups: dict[int, list[Site]] = {}
    for site in targets:
        groups.setdefault(id(site.linear), []).append(site)
    return [sorted(group, key=lambda site: site.row) for group in groups.values()]


def _set_pairs(targets: Sequence[Site], make: Callable[[Site, int], tuple[Array, Array]]) -> None:
    """A and B of every target from make(site, rank), which gives the product s B A."""
    for group in _by_linear(targets):
        linear, pairs = group[0].linear, []
        widest = linear.lora_A.get_value().shape[1]
        for at, site in enumerate(group):
            r = widest if linear.ranks is None else linear.ranks[at]
            scaling = linear.scaling[at] if isinstance(linear.scaling, tuple) else linear.scaling
            a, b = (part / scaling**0.5 for part in make(site, r))
            if a.shape[0] < r:
                raise ConfigError(f"r={r} is more than the rank that {site.hf_path} can have: at most {a.shape[0]}")
            pairs.append((jnp.pad(a, ((0, widest - r), (0, 0))), jnp.pad(b, ((0, 0), (0, widest - r)))))
        a, b = (jnp.stack(parts) for parts in zip(*pairs, strict=True))
        linear.lora_A, linear.lora_B = nnx.LoRAParam(a), nnx.LoRAParam(b)


@jax.jit
def _decoded(weight: Float[Array, "L N K"] | Quantised, row: Int[Array, ""]) -> Float[Array, "N K"]:
    return dense(weight.at(row) if is_quantised(weight) else weight[row], jnp.float32)
