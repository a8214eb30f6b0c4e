"""Where a non-finite loss or gradient came from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from fastft_jax.trainers.step import Batch, LossOptions, gradients


def first_non_finite(
    definition: nnx.GraphDef, trainable: nnx.State, frozen: nnx.State, batch: Batch, options: LossOptions
) -> str:
    """In words: the first layer whose output is not finite, else the loss, else the first such gradient leaf.

    batch is a train step's [k, B, T]. Runs once, when a run has already failed; it may be slow.
    """
    for i in range(batch["labels"].shape[0]):
        micro = {name: value[i] for name, value in batch.items()}
        bad = np.flatnonzero(~np.asarray(_layers_finite(definition, trainable, frozen, micro, options)))
        if bad.size:
            return f"the output of {'the embedding' if bad[0] == 0 else f'layer {bad[0] - 1}'} is not finite"
    loss, grads = jax.jit(gradients, static_argnums=(0, 4))(definition, trainable, frozen, batch, options, None)
    if not np.isfinite(loss):
        return "all layers are finite, the loss is not"
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        if not np.isfinite(leaf).all():
            return f"the loss is finite, the gradient of {jax.tree_util.keystr(path)} is not"
    if not np.isfinite(optax.tree.norm(grads)):
        return "every gradient is finite, their norm is too large for float32"
    return "it does not recur without dropout"


@jax.jit(static_argnums=(0, 4))
def _layers_finite(definition, trainable, frozen, micro, options):
    decoder = nnx.merge(definition, trainable, frozen)
    real = (micro["segment_ids"] > 0)[..., None]
    return decoder.map_layers(
        lambda x: jnp.isfinite(jnp.where(real, x, 0)).all(),
        micro["input_ids"],
        micro["positions"],
        None if options.max_segments is None else micro["segment_ids"],
    )
