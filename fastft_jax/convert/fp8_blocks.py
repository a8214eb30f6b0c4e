"""Matrices in fp8 with a scale for every block of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 are published.

A scaled `W.weight` is e4m3 [N, K]; beside it lies `W.weight_scale_inv`, floats [ceil(N/128), ceil(K/128)] by which its
elements are multiplied: w[i, j] = w8[i, j] * scale[i // 128, j // 128] in float32. Blocks at the lower and right edge
may be cut off. Which matrices are scaled is told by these tensors alone: embeddings, head, routers and norms are not.
Source: DeepSeek-V3's README_WEIGHTS.md; transformers' `finegrained_fp8`.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastft_jax.convert.safetensors import Checkpoint
from fastft_jax.errors import CheckpointError

BLOCK = 128
SCALE = "_scale_inv"  # weight_scale_inv
FP8 = "float8_e4m3fn"
_SCALE_FLOATS = ("float32", "bfloat16", "float16")


def scaled_matrices(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Those of the named matrices that are in fp8 -> the names of their scales.

    Raises CheckpointError for scales that are missing, or not of the shape and kind that the matrix calls for.
    """
    present = (name for name in shapes if name in checkpoint and checkpoint.info(name)[0].name == FP8)
    return {name: _scales_of(checkpoint, name, shapes[name]) for name in present}


@partial(jax.jit, static_argnums=2)
def decode(codes: Float[Array, "N K"], scales: Float[Array, "n k"], dtype) -> Float[Array, "N K"]:
    """The product in float32, rounded to `dtype` once."""
    n, k = codes.shape
    scales = jnp.repeat(jnp.repeat(scales.astype(jnp.float32), BLOCK, 0)[:n], BLOCK, 1)[:, :k]
    return (codes.astype(jnp.float32) * scales).astype(dtype)


def _scales_of(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> str:
    scales = name + SCALE
    if scales not in checkpoint:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {scales!r}, without which {name!r}, which is {FP8}, cannot be decoded"
        )
    wanted = tuple(-(-size // BLOCK) for size in shape)
    dtype, found = checkpoint.info(scales)
    if dtype.name not in _SCALE_FLOATS or tuple(found) != wanted:
        raise CheckpointError(
            f"{checkpoint.path_of(scales)}: {scales!r} is {dtype.name}{list(found)}, which is not "
            f"{' or '.join(_SCALE_FLOATS)} of {list(wanted)}, one a block of {BLOCK} x {BLOCK} of a matrix of shape "
            f"{list(shape)}"
        )
    return scales
