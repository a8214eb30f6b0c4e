"""LoRA on a decoder: which linears, how they start, how many parameters train. Everything as PEFT does it.

Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.errors import ConfigError
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import ExpertLinear, Frozen, Linear

SAVEABLE = ("embed_tokens", "lm_head")
INITIALISATIONS = (True, False, "gaussian")


@dataclass(frozen=True)
class Site:
    """One Hugging Face module as our decoder holds it: a row of a stacked linear, or one expert in it."""

    hf_path: str  # model.layers.3.self_attn.q_proj
    path: str  # self_attn.q_proj
    linear: Linear
    row: int
    expert: int | None = None

    @property
    def adapted(self) -> bool:
        """Does this very module have an adapter (its linear may have one for other layers only)?"""
        return self.linear.adapted and _position(self.linear.adapted_rows, self.row) is not None


def sites(decoder: Decoder, names: NameTable) -> Iterator[Site]:
    """Every linear inside the layers, in layer order."""
    for layer in range(decoder.config.num_hidden_layers):
        s, p, row = decoder.config.place_of(layer)
        for path, linear in layer_linears(decoder.segments[s][p]):
            for expert in range(linear.num_experts) if isinstance(linear, ExpertLinear) else (None,):
                name = names.hf_name(f"{path}.weight", layer, expert)
                yield Site(name.removesuffix(".weight"), path, linear, row, expert)


def layer_linears(layer: nnx.Module) -> list[tuple[str, Linear]]:
    """(path, linear) of one layer's linears."""
    found = [(".".join(map(str, path)), m) for path, m in nnx.iter_modules(layer) if isinstance(m, Linear)]
    return sorted(found, key=lambda item: item[0])


def add_lora(
    decoder: Decoder,
    targets: Sequence[Site],
    *,
    r: int,
    scaling: float,
    dropout: float = 0.0,
    init: bool | str = True,
    seed: int = 3407,
) -> None:
    """Attach float32 A [rows, R, K] and B [rows, N, R] to the targets' linears, in place; [rows, E, ...] to experts.

    init True: A ~ U(-1/sqrt(K), 1/sqrt(K)) (kaiming-uniform with a = sqrt(5)), B = 0; "gaussian": A ~ N(0, 1/r^2),
    B = 0; False: A as for True, B ~ U(-1/sqrt(r), 1/sqrt(r)), so that the adapter acts from the start.
    """
    by_linear: dict[int, list[Site]] = {}
    for site in targets:
        by_linear.setdefault(id(site.linear), []).append(site)
    stacks = [(group[0].linear, tuple(sorted({site.row for site in group}))) for group in by_linear.values()]
    shapes = tuple((len(rows), *_matrices(linear)) for linear, rows in stacks)
    pairs = _initial(np.uint32(seed & 0xFFFFFFFF), init, r, shapes)
    for (linear, rows), (a, b) in zip(stacks, pairs, strict=True):
        linear.lora_A, linear.lora_B = nnx.LoRAParam(a), nnx.LoRAParam(b)
        linear.scaling, linear.dropout = scaling, dropout
        linear.adapted_rows = None if len(rows) == _stack_size(linear) else rows


@partial(jax.jit, static_argnums=(1, 2, 3))
def _initial(seed, init: bool | str, r: int, shapes: tuple[tuple[int, ...], ...]) -> list[tuple[Array, Array]]:
    """A and B for linears of (rows, .., N, K), in one program: a start-up is made of compiling."""
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(seed), len(shapes)))

    def within(key, shape, bound):
        return jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(bound)

    def draw_a(key, shape):
        return jax.random.normal(key, shape) / r if init == "gaussian" else within(key, shape, shape[-1])

    a = _draw_each(draw_a, keys[:, 0], [(*lead, r, k) for *lead, _, k in shapes])
    shapes_b = [(*lead, n, r) for *lead, n, _ in shapes]
    if init is False:
        return list(zip(a, _draw_each(lambda key, shape: within(key, shape, r), keys[:, 1], shapes_b), strict=True))
    return list(zip(a, map(jnp.zeros, shapes_b), strict=True))


def _draw_each(draw: Callable, keys: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """draw(key, shape) of every key; equal shapes in one kernel, which takes half a second to compile."""
    out: dict[int, Array] = {}
    for shape in dict.fromkeys(shapes):
        at = [i for i, other in enumerate(shapes) if other == shape]
        drawn = jax.vmap(lambda key, shape=shape: draw(key, shape))(keys[np.array(at)])
        out |= zip(at, jax.lax.optimization_barrier(drawn), strict=True)  # or every slice becomes a kernel that draws
    return [out[i] for i in range(len(shapes))]


def train_biases(decoder: Decoder, bias: str) -> None:
    """`bias="all"`: every bias of the layers trains; "lora_only": those of adapted linears. float32 from here on.

    NotImplementedError for "all" where norms have biases: PEFT would train those, too.
    """
    if bias == "all" and decoder.config.norm_bias:
        raise NotImplementedError('bias="all" is not built yet for models whose norms have biases')
    for segment in decoder.segments:
        for place in segment:
            for _, linear in layer_linears(place):
                if linear.bias is None or (bias == "lora_only" and not linear.adapted):
                    continue
                rows = linear.adapted_rows if bias == "lora_only" else None
                values = linear.bias.get_value().astype(jnp.float32)
                linear.trained_bias = nnx.Param(values if rows is None else values[jnp.array(rows)])
                linear.trained_bias_rows = rows
                if rows is None:
                    linear.bias = None


def save_modules(decoder: Decoder, modules: Sequence[str]) -> None:
    """Train the embedding or the head whole, in float32. A tied pair is untied: PEFT trains a copy of the one named."""
    for name in modules:
        if name not in SAVEABLE:
            raise ConfigError(f"modules_to_save={name!r} is not one of {', '.join(SAVEABLE)}")
        if name == "lm_head" and decoder.config.head_bias:
            raise NotImplementedError("modules_to_save=['lm_head'] is not built yet for a head with a bias")
    if decoder.lm_head is None and modules:
        decoder.lm_head = Linear(decoder.embed_tokens.weight.get_value())
    for name in modules:
        module = getattr(decoder, name)
        # A copy even when it is float32 already: the trainer donates what it trains, and must not free the base.
        module.weight = nnx.Param(jnp.array(module.weight.get_value(), jnp.float32, copy=True))


def forget_adapters(decoder: Decoder) -> None:
    """Take away what `add_lora` and `train_biases` attached, so that another adapter can be; in place."""
    for segment in decoder.segments:
        for place in segment:
            for _, linear in layer_linears(place):
                if linear.bias is None and linear.trained_bias is not None:  # the base's own values are gone
                    linear.bias = Frozen(linear.trained_bias.get_value())
                linear.lora_A = linear.lora_B = linear.trained_bias = None
                linear.adapted_rows = linear.trained_bias_rows = None
                linear.scaling, linear.dropout = 1.0, 0.0


def lora_scaling(r: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def trainable_tensors(decoder: Decoder, names: NameTable) -> dict[str, Float[Array, "..."]]:
    """What is trained, by Hugging Face module path: `<path>.lora_A.weight` [R, K], `.lora_B.weight` [N, R], and
    `<path>.bias`, `embed_tokens` and `lm_head` weights under their own names."""
    out: dict[str, Array] = {}
    on_host: dict[int, np.ndarray] = {}  # experts are many: slices of a device array would take seconds
    for site in sites(decoder, names):
        linear = site.linear
        at = _position(linear.adapted_rows, site.row)
        if linear.adapted and at is not None:
            for leaf in ("lora_A", "lora_B"):
                value = getattr(linear, leaf).get_value()
                if site.expert is not None:
                    value = on_host.setdefault(id(value), np.asarray(value))[:, site.expert]
                out[f"{site.hf_path}.{leaf}.weight"] = value[at]
        at = _position(linear.trained_bias_rows, site.row)
        if linear.trained_bias is not None and at is not None:
            out[f"{site.hf_path}.bias"] = linear.trained_bias.get_value()[at]
    for name in trained_modules(decoder):
        out[names.hf_name(f"{name}.weight")] = getattr(decoder, name).weight.get_value()
    return out


def set_trainable_tensors(decoder: Decoder, names: NameTable, tensors: Mapping[str, Array]) -> None:
    """The inverse of `trainable_tensors`: every trained leaf takes its values from `tensors`, as float32."""
    stacks: dict[tuple[int, str], tuple[Linear, dict[tuple[int, int], Array]]] = {}
    for site in sites(decoder, names):
        linear = site.linear
        for leaf, suffix, rows in (
            ("lora_A", "lora_A.weight", linear.adapted_rows),
            ("lora_B", "lora_B.weight", linear.adapted_rows),
            ("trained_bias", "bias", linear.trained_bias_rows),
        ):
            at = _position(rows, site.row)
            if getattr(linear, leaf) is not None and at is not None:
                _, parts = stacks.setdefault((id(linear), leaf), (linear, {}))
                parts[at, site.expert or 0] = np.asarray(tensors[f"{site.hf_path}.{suffix}"], np.float32)
    for (_, leaf), (linear, parts) in stacks.items():
        variable = getattr(linear, leaf)
        values = np.stack([parts[i] for i in sorted(parts)])
        variable.set_value(jnp.asarray(values.reshape(variable.get_value().shape)))
    for name in trained_modules(decoder):
        # copy: the value becomes a donated buffer, and may be the caller's own array
        value = jnp.array(tensors[names.hf_name(f"{name}.weight")], jnp.float32, copy=True)
        getattr(decoder, name).weight.set_value(value)


def trained_modules(decoder: Decoder) -> list[str]:
    """Which of embed_tokens and lm_head train."""
    found = [(n, getattr(decoder, n)) for n in SAVEABLE]
    return [name for name, module in found if module is not None and isinstance(module.weight, nnx.Param)]


def _position(rows: tuple[int, ...] | None, row: int) -> int | None:
    """Where a stack row's values are in a leaf that holds only `rows`."""
    if rows is None:
        return row
    return rows.index(row) if row in rows else None


def _matrices(linear: Linear) -> tuple[int, ...]:
    """(N, K), with (E,) before it for experts."""
    shape = linear.weight.get_value().shape[-2:]
    return (linear.num_experts, *shape) if isinstance(linear, ExpertLinear) else shape


def _stack_size(linear: Linear) -> int:
    return jax.tree.leaves(linear.weight.get_value())[0].shape[0]
