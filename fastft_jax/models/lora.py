"""LoRA on a decoder: which linears, how they start, how many parameters train. Everything as PEFT does it.

Source: Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.models.adapter_swap import Originals
from fastft_jax.models.decoder import Decoder
from fastft_jax.models.dora import stacked_row_norms
from fastft_jax.models.families.names import NameTable
from fastft_jax.models.layers import ExpertLinear, Linear
from fastft_jax.models.lora_ends import trained_ends
from fastft_jax.models.whole_modules import saveable

INITIALISATIONS = (True, False, "gaussian")


@dataclass(frozen=True)
class Site:
    """One Hugging Face module as our decoder holds it: a row of a stacked linear, or one expert in it."""

    hf_path: str  # model.layers.3.self_attn.q_proj
    path: str  # self_attn.q_proj
    linear: Linear
    row: int
    layer: int
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
                yield Site(name.removesuffix(".weight"), path, linear, row, layer, expert)


def layer_linears(layer: nnx.Module) -> list[tuple[str, Linear]]:
    """(path, linear) of one layer's linears."""
    found = [(".".join(map(str, path)), m) for path, m in nnx.iter_modules(layer) if isinstance(m, Linear)]
    return sorted(found, key=lambda item: item[0])


def add_lora(
    decoder: Decoder,
    targets: Sequence[Site],
    *,
    r: int | Sequence[int],
    scaling: float | Sequence[float],
    dropout: float = 0.0,
    init: bool | str = True,
    use_dora: bool = False,
    lora_bias: bool = False,
    seed: int = 3407,
) -> None:
    """Attach float32 A [rows, R, K] and B [rows, N, R] to the targets' linears, in place; [rows, E, ...] to experts.

    r and scaling: one for all targets, or one for each; a stack is as wide as its largest rank (see `Linear`).
    init True: A ~ U(-1/sqrt(K), 1/sqrt(K)) (kaiming-uniform with a = sqrt(5)), B = 0; "gaussian": A ~ N(0, 1/r^2),
    B = 0; False: A as for True, B ~ U(-1/sqrt(r), 1/sqrt(r)), so that the adapter acts from the start.
    use_dora adds the magnitudes, which start as the adapted rows' own lengths; lora_bias biases of B, which start as 0,
    or for init False as torch's, U(-1/sqrt(r), 1/sqrt(r)).
    """
    each = zip(targets, _each(r, len(targets)), _each(scaling, len(targets)), strict=True)
    by_linear: dict[int, list[tuple[Site, int, float]]] = {}
    for target in each:
        by_linear.setdefault(id(target[0].linear), []).append(target)
    stacks = [_one_a_row(group) for group in by_linear.values()]
    shapes = tuple((len(group), *_matrices(group[0][0].linear), max(rank for _, rank, _ in group)) for group in stacks)
    pairs = _initial(np.uint32(seed & 0xFFFFFFFF), init, shapes)
    biases: list[Array] = []
    for group, (a, b) in zip(stacks, pairs, strict=True):
        linear, rows = group[0][0].linear, tuple(site.row for site, _, _ in group)
        ranks, scalings = tuple(rank for _, rank, _ in group), tuple(float(s) for _, _, s in group)
        if len(set(ranks)) > 1:
            linear.ranks = ranks
            a, b = _of_own_ranks(a, b, np.array(ranks), init)
        linear.lora_A, linear.lora_B = nnx.LoRAParam(a), nnx.LoRAParam(b)
        linear.scaling, linear.dropout = scalings if len(set(scalings)) > 1 else scalings[0], dropout
        linear.adapted_rows = None if len(rows) == _stack_size(linear) else rows
        if lora_bias:
            shape = (len(rows), linear.weight.get_value().shape[-2])
            key = jax.random.fold_in(jax.random.key(seed ^ 0xB1A5), len(biases))
            biases.append(jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(a.shape[-2]))
            linear.lora_bias = nnx.Param(biases[-1] if init is False else jnp.zeros(shape))
        if use_dora:
            own = np.array(scalings, np.float32)[:, None, None]
            norms = stacked_row_norms(linear.weight.get_value(), jnp.array(rows), a, b * own)
            linear.magnitude = nnx.Param(norms)


def _each(value: Any, count: int) -> Sequence[Any]:
    return [value] * count if isinstance(value, int | float) else value


def _one_a_row(group: list[tuple[Site, int, float]]) -> list[tuple[Site, int, float]]:
    """The targets of a stack by row; of a layer's experts, which share their rank and scaling, one."""
    return [target for _, target in sorted({target[0].row: target for target in group}.items())]


def _of_own_ranks(a: Array, b: Array, ranks: np.ndarray, init: bool | str) -> tuple[Array, Array]:
    """A and B drawn for the largest rank, as if drawn for each layer's own: zeros beyond it, the rest of its scale."""
    inside, widest = np.arange(a.shape[1]) < ranks[:, None], a.shape[1]
    wider = np.where(init == "gaussian", widest / ranks, 1.0)[:, None] * inside
    b = b * (inside * np.sqrt(widest / ranks)[:, None]).astype(np.float32)[:, None, :]
    return a * wider.astype(np.float32)[:, :, None], b


@partial(jax.jit, static_argnums=(1, 2))
def _initial(seed, init: bool | str, shapes: tuple[tuple[int, ...], ...]) -> list[tuple[Array, Array]]:
    """A and B for linears of (rows, N, K, R) or (rows, E, N, K, R), in one program: start-ups are made of compiling."""
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(seed), len(shapes)))

    def within(key, shape, bound):
        return jax.random.uniform(key, shape, minval=-1, maxval=1) / math.sqrt(bound)

    def draw_a(key, shape):
        return jax.random.normal(key, shape) / shape[-2] if init == "gaussian" else within(key, shape, shape[-1])

    a = _draw_each(draw_a, keys[:, 0], [(*lead, r, k) for *lead, _, k, r in shapes])
    shapes_b = [(*lead, n, r) for *lead, n, _, r in shapes]
    if init is False:
        return list(
            zip(a, _draw_each(lambda key, shape: within(key, shape, shape[-1]), keys[:, 1], shapes_b), strict=True)
        )
    return list(zip(a, map(jnp.zeros, shapes_b), strict=True))


def _draw_each(draw: Callable, keys: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """draw(key, shape) of every key; equal shapes in one kernel, which takes half a second to compile."""
    out: dict[int, Array] = {}
    for shape in dict.fromkeys(shapes):
        at = [i for i, other in enumerate(shapes) if other == shape]
        drawn = jax.vmap(lambda key, shape=shape: draw(key, shape))(keys[np.array(at)])
        out |= zip(at, jax.lax.optimization_barrier(drawn), strict=True)  # or every slice becomes a kernel that draws
    return [out[i] for i in range(len(shapes))]


def train_biases(decoder: Decoder, bias: str, originals: Originals) -> None:
    """`bias="all"`: every bias of the layers trains; "lora_only": those of adapted linears. float32 from here on.

    NotImplementedError for "all" where norms or experts have biases: PEFT would train those, too.
    """
    experts = decoder.config.experts
    for what, has in (("norms", decoder.config.norm_bias), ("experts", experts is not None and experts.bias)):
        if bias == "all" and has:
            raise NotImplementedError(f'bias="all" is not built yet for models whose {what} have biases')
    for path, linear in nnx.iter_modules(decoder.segments):
        if not isinstance(linear, Linear) or isinstance(linear, ExpertLinear) or linear.bias is None:
            continue
        if bias == "lora_only" and not linear.adapted:
            continue
        rows = linear.adapted_rows if bias == "lora_only" else None
        values = linear.bias.get_value().astype(jnp.float32)
        linear.trained_bias = nnx.Param(values if rows is None else values[jnp.array(rows)])
        linear.trained_bias_rows = rows
        if rows is None:
            originals.keep(("segments", *path), "bias", linear)
            linear.bias = None


def lora_scaling(r: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r


def trainable_tensors(decoder: Decoder, names: NameTable) -> dict[str, Float[Array, "..."]]:
    """What is trained, by Hugging Face module path: `<path>.lora_A.weight` [R, K], `.lora_B.weight` [N, R] (R a layer's
    own rank), `.lora_magnitude_vector` [N], `.lora_B.bias` [N], `<path>.bias`, `lora_embedding_A` [R, V] and `_B`
    [D, R], and the weights of modules trained whole under their own names."""
    out: dict[str, Array] = {}
    on_host: dict[int, np.ndarray] = {}  # experts are many: slices of a device array would take seconds
    for site in sites(decoder, names):
        linear, at = site.linear, _position(site.linear.adapted_rows, site.row)
        if linear.adapted and at is not None:
            rank = slice(None) if linear.ranks is None else slice(linear.ranks[at])
            a, b = (leaf.get_value() for leaf in (linear.lora_A, linear.lora_B))
            if site.expert is not None:
                a, b = (on_host.setdefault(id(leaf), np.asarray(leaf))[:, site.expert] for leaf in (a, b))
            out[f"{site.hf_path}.lora_A.weight"] = a[at][rank]
            out[f"{site.hf_path}.lora_B.weight"] = b[at][:, rank]
            if linear.magnitude is not None:
                out[f"{site.hf_path}.lora_magnitude_vector"] = linear.magnitude.get_value()[at]
            if linear.lora_bias is not None:
                out[f"{site.hf_path}.lora_B.bias"] = linear.lora_bias.get_value()[at]
        at = _position(linear.trained_bias_rows, site.row)
        if linear.trained_bias is not None and at is not None:
            out[f"{site.hf_path}.bias"] = linear.trained_bias.get_value()[at]
    for name, variable in trained_ends(decoder, names).items():
        out[name] = variable.get_value()
    for whole in saveable(decoder, names):
        for leaf, variable in whole.trained():
            out[f"{whole.hf_path}.{leaf}"] = (
                variable.get_value() if whole.row is None else variable.get_value()[whole.row]
            )
    return out


def set_trainable_tensors(decoder: Decoder, names: NameTable, tensors: Mapping[str, Array]) -> None:
    """The inverse of `trainable_tensors`: every trained leaf takes its values from `tensors`, as float32."""
    stacks: dict[int, tuple[nnx.Variable, dict[int, Array]]] = {}
    experts: dict[int, tuple[nnx.Variable, np.ndarray]] = {}  # filled on the host: they are many

    def put(variable: nnx.Variable | None, at: int | None, name: str, shape: tuple[int, ...] | None = None) -> None:
        if variable is None or at is None:
            return
        value = jnp.asarray(tensors[name], jnp.float32)
        if shape is not None and value.shape != shape:
            value = jnp.pad(value, [(0, n - m) for n, m in zip(shape, value.shape, strict=True)])
        stacks.setdefault(id(variable), (variable, {}))[1][at] = value

    for site in sites(decoder, names):
        linear, at = site.linear, _position(site.linear.adapted_rows, site.row)
        if site.expert is not None:
            if linear.adapted and at is not None:
                for leaf in ("lora_A", "lora_B"):
                    variable = getattr(linear, leaf)
                    fresh = (variable, np.empty(variable.get_value().shape, np.float32))
                    values = experts.setdefault(id(variable), fresh)[1]
                    values[at, site.expert] = tensors[f"{site.hf_path}.{leaf}.weight"]
            continue
        if linear.adapted:
            put(linear.lora_A, at, f"{site.hf_path}.lora_A.weight", linear.lora_A.get_value().shape[1:])
            put(linear.lora_B, at, f"{site.hf_path}.lora_B.weight", linear.lora_B.get_value().shape[1:])
            put(linear.magnitude, at, f"{site.hf_path}.lora_magnitude_vector")
            put(linear.lora_bias, at, f"{site.hf_path}.lora_B.bias")
        put(linear.trained_bias, _position(linear.trained_bias_rows, site.row), f"{site.hf_path}.bias")
    for whole in saveable(decoder, names):
        for leaf, variable in whole.trained():
            if whole.row is not None:
                put(variable, whole.row, f"{whole.hf_path}.{leaf}")
            else:
                # copy: the value becomes a donated buffer, and may be the caller's own array
                variable.set_value(jnp.array(tensors[f"{whole.hf_path}.{leaf}"], jnp.float32, copy=True))
    for name, variable in trained_ends(decoder, names).items():
        variable.set_value(jnp.array(tensors[name], jnp.float32, copy=True))
    for variable, parts in stacks.values():
        variable.set_value(jnp.stack([parts[i] for i in sorted(parts)]))
    for variable, values in experts.values():
        variable.set_value(jnp.asarray(values))


def start_tensors(decoder: Decoder, names: NameTable) -> dict[str, Float[Array, "..."]]:
    """The frozen pairs that are subtracted (PiSSA), by the names of the trained ones."""
    out: dict[str, Array] = {}
    for site in sites(decoder, names):
        at = _position(site.linear.adapted_rows, site.row)
        if site.linear.start_A is not None and at is not None:
            rank = slice(None) if site.linear.ranks is None else slice(site.linear.ranks[at])
            out[f"{site.hf_path}.lora_A.weight"] = site.linear.start_A.get_value()[at][rank]
            out[f"{site.hf_path}.lora_B.weight"] = site.linear.start_B.get_value()[at][:, rank]
    return out


def padding(decoder: Decoder) -> int:
    """Elements of the trained leaves that are always zero: ranks below their stack's largest."""
    linears = [m for _, m in nnx.iter_modules(decoder.segments) if isinstance(m, Linear) and m.ranks is not None]
    return sum(
        sum(m.lora_A.get_value().shape[1] - r for r in m.ranks)
        * (m.lora_A.get_value().shape[2] + m.lora_B.get_value().shape[1])
        for m in linears
    )


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
