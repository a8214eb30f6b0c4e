"""How far bf16 and fp8 are from float32 on the same NF4 base: every linear, the residual stream, the gradients.

float32 decodes the same codes and multiplies without TF32, so that what differs is the products' precision alone.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from finetune import Base, Parts, Plan, build
from flax import nnx
from jaxtyping import Array, Float

from fastft_jax.models.attention import Sequence
from fastft_jax.models.layers import project
from fastft_jax.models.residuals import Keep
from fastft_jax.models.rope import rope_tables
from fastft_jax.pallas_kernels.glu import glu
from fastft_jax.trainers.step import LossOptions, gradients

ARMS = {"float32": (jnp.float32, None), "bf16": (jnp.bfloat16, None), "fp8": (jnp.bfloat16, "fp8")}
GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)))
GROUPS += (("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))


def compare(base: Base, plan: Plan, trainable: nnx.State, batches: list[dict], options: LossOptions) -> dict:
    """The record: errors of linears and of the residual stream, gradient cosines, losses."""
    parts = {}
    for arm, (dtype, compute) in ARMS.items():
        parts[arm] = build(base, plan, 0, dtype, compute)._replace(trainable=trainable)
    outputs, slopes = forward_errors(parts, batches, options), gradient_errors(parts, batches, options)
    return {"batches": len(batches)} | outputs | slopes


def forward_errors(parts: dict[str, Parts], batches: list[dict], options: LossOptions) -> dict:
    """||y - y_32|| / ||y_32|| over the tokens of a batch, by layer, the mean over batches.

    linears: of one product each, with the inputs that float32 sees. residual_stream: after each layer of a whole
    forward pass, where errors have gathered.
    """
    definitions = [part.definition for part in parts.values()]
    states = [(part.trainable, part.frozen) for part in parts.values()]
    run = jax.jit(lambda states, batch: _lockstep(definitions, states, batch, options))
    seen = [jax.device_get(run(states, batch)) for batch in batches]
    seen = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *seen)
    linears, stream = {}, {}
    for arm, (local, residual) in seen.items():
        stream[arm] = _rounded(residual)
        for name, by_layer in local.items():
            linears.setdefault(name, {})[arm] = _spread(by_layer) | {"by_layer": _rounded(by_layer)}
    return {"linears": linears, "residual_stream": stream}


def gradient_errors(parts: dict[str, Parts], batches: list[dict], options: LossOptions) -> dict:
    """The cosine with float32's gradient: of each adapter matrix in each layer and batch, and of all as one vector."""
    lowered = [
        jax.jit(_gradient_function(part.definition, options)).lower(part.trainable, part.frozen, batches[0])
        for part in parts.values()
    ]
    with ThreadPoolExecutor() as pool:
        runs = dict(zip(parts, pool.map(lambda program: program.compile(), lowered), strict=True))
    cosines, whole, losses = {}, {}, {arm: [] for arm in parts}
    for batch in batches:
        found = {}
        for arm, part in parts.items():
            loss, gradient = jax.device_get(runs[arm](part.trainable, part.frozen, batch))
            losses[arm].append(round(float(loss), 6))
            found[arm] = {".".join(map(str, path[3:])): leaf[...] for path, leaf in nnx.to_flat_state(gradient)}
        exact = found.pop("float32")
        for arm, gradient in found.items():
            for name, leaf in gradient.items():
                by_layer = [_cosine(a, b) for a, b in zip(leaf, exact[name], strict=True)]
                cosines.setdefault(name, {}).setdefault(arm, []).append(by_layer)
            flat = [np.concatenate([one[name].ravel() for name in exact]) for one in (gradient, exact)]
            whole.setdefault(arm, []).append(round(_cosine(*flat), 6))
    leaves = {
        name: {arm: _spread(np.array(values)) for arm, values in by_arm.items()} for name, by_arm in cosines.items()
    }
    return {"gradient_cosines": leaves, "whole_gradient_cosines": whole, "losses": losses}


def worst_linear(linears: dict[str, Any]) -> tuple[str, float]:
    """The linear with the largest median fp8 error, and how many times the median of the others that is."""
    medians = {name: errors["fp8"]["median"] for name, errors in linears.items()}
    worst = max(medians, key=medians.get)
    others = [value for name, value in medians.items() if name != worst]
    return worst, medians[worst] / float(np.median(others))


class _Recorder(Keep):
    """Notes what a layer would keep for its backward pass."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, Array] = {}

    def __call__(self, name, value):
        self.seen[name] = value
        return value


def _lockstep(definitions: list, states: list, batch: dict[str, Array], options: LossOptions) -> dict:
    """Every arm layer by layer, beside float32 (the first): {arm: ({linear: [L]}, [L])}."""
    decoders = [nnx.merge(definition, *state) for definition, state in zip(definitions, states, strict=True)]
    config, real = decoders[0].config, batch["segment_ids"][..., None] > 0
    tables = rope_tables(config.rope, config.head_dim, batch["positions"])
    seq = Sequence(*tables, batch["segment_ids"], options.max_segments, options.max_document_length)
    graphs, stacks = zip(*[nnx.split(decoder.segments[0][0]) for decoder in decoders], strict=True)
    arms = list(ARMS)[1:]

    def body(xs, stacks):
        layers = [nnx.merge(graph, stack) for graph, stack in zip(graphs, stacks, strict=True)]
        recorders = [_Recorder() for _ in layers]
        ys = [layer(x, seq, keep=keep)[0] for layer, x, keep in zip(layers, xs, recorders, strict=True)]
        exact, seen = layers[0], recorders[0].seen
        inputs = (
            exact.input_layernorm(xs[0]),
            seen["attn_out"].reshape(*xs[0].shape[:2], -1),
            exact.post_attention_layernorm(seen["mid_residual"]),
            glu(seen["gate_up"]),
        )
        out = {}
        for arm, layer, x, y in zip(arms, layers[1:], xs[1:], ys[1:], strict=True):
            local = {}
            for (block, names), given in zip(GROUPS, inputs, strict=True):
                want = _outputs(exact, block, names, given)
                have = _outputs(layer, block, names, given.astype(x.dtype))
                for name, a, b in zip(names, have, want, strict=True):
                    local[f"{block}.{name}"] = _relative(a, b, real)
            out[arm] = (local, _relative(y, ys[0], real))
        return ys, out

    xs = [decoder.embed_tokens(batch["input_ids"], decoder.dtype) for decoder in decoders]
    return jax.lax.scan(body, xs, list(stacks))[1]


def _outputs(layer: nnx.Module, block: str, names: tuple[str, ...], x: Float[Array, "B T K"]) -> list[Array]:
    """What the linears that read x together make of it."""
    linears = [getattr(getattr(layer, block), name) for name in names]
    y = project(linears, x, Keep(), [None] * len(linears))
    widths = np.cumsum([linear.weight.get_value().shape[0] for linear in linears])
    return jnp.split(y, widths[:-1].tolist(), axis=-1)


def _relative(y: Array, exact: Array, real: Array) -> Float[Array, ""]:
    error = jnp.where(real, y.astype(jnp.float32) - exact, 0)
    return jnp.linalg.norm(error) / jnp.linalg.norm(jnp.where(real, exact, 0))


def _gradient_function(definition: nnx.GraphDef, options: LossOptions):
    def run(trainable, frozen, batch):
        batch = {name: array[None] for name, array in batch.items()}
        return gradients(definition, trainable, frozen, batch, options, None)

    return run


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _spread(values: np.ndarray) -> dict[str, float]:
    found = {"min": np.min(values), "median": np.median(values), "max": np.max(values)}
    return {name: round(float(value), 6) for name, value in found.items()}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 6) for value in values]
