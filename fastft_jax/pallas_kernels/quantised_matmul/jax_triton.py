"""Launches the raw Triton kernels through jax-triton, an optional dependency that is imported here and nowhere else."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastft_jax.pallas_kernels import pallas
from fastft_jax.pallas_kernels.nf4.codebooks import NF4_CODE, dynamic_map
from fastft_jax.pallas_kernels.quantised_matmul import few_rows, fixed_point, tiles

DOT_STAGES = 3
"""Steps of K in flight: codes and x come by asynchronous copies."""


def quantised_matmul(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "L G 32"],
    absmax: Float[Array, "L G"] | UInt8[Array, "L G"],
    absmax_scale: Float[Array, "L S"] | None,
    absmax_offset: Float[Array, "L"] | None,
    layer: Int[Array, ""] | int = 0,
    *,
    shape: tuple[int, int],
    compute_capability: int | None = None,
) -> Float[Array, "M N"]:
    """x W^T for matrix `layer` of a stack; M in 1..64, x bfloat16 or float16, K a multiple of 64.

    Above 4 rows it goes by way of float32 sums [splits, M, N]. Has no interpreter: off a GPU, name a compute
    capability (90) to compile for one. Raises ImportError without jax-triton, ValueError off a GPU.
    """
    try:
        import jax_triton

        from fastft_jax.pallas_kernels.quantised_matmul import raw_triton
    except ImportError as error:
        raise ImportError("implementation='jax_triton' needs jax-triton: pip install jax-triton triton") from error
    if compute_capability is None and not pallas.on_gpu():
        raise ValueError("implementation='jax_triton' runs on a GPU only: use 'xla' here")
    (m, k), n = x.shape, shape[0]
    double = absmax_scale is not None
    vector = m <= tiles.VECTOR_ROWS
    tile = tiles.vector_tiles(m, n, k) if vector else tiles.dot_tiles(m, n, k)
    # a float32 absmax has no map, scale or offset: the kernel never reads what stands in their place
    decoder = (jnp.asarray(dynamic_map()), absmax_scale, absmax_offset) if double else (absmax,) * 3
    weight = jnp.asarray(layer, jnp.int32).reshape(1), codes, absmax, *decoder
    sizes = dict(M=m, N=n, K=k, DOUBLE=double, ROWS=tile.rows, BLOCKS=tile.blocks)
    launch = functools.partial(
        jax_triton.triton_call, num_warps=tile.warps, compute_capability=compute_capability, **sizes
    )
    tiles_n = -(-n // tile.rows)
    if vector:
        return launch(
            few_rows.lookup_table(tile.blocks),
            *few_rows.quantise_x(x, interpret=False),
            *weight,
            kernel=raw_triton.vector_kernel,
            name="quantised_matvec",
            out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
            grid=(tiles_n,),
            MULTIPLY=fixed_point.multiply_asm(tile.split_low),
            CONSTRAINTS=fixed_point.CONSTRAINTS,
        )
    sums = launch(
        tiles.x_interleaved(x),
        jnp.asarray(NF4_CODE),
        *weight,
        kernel=raw_triton.dot_kernel,
        name="quantised_matmul",
        out_shape=jax.ShapeDtypeStruct((tile.splits, m, n), jnp.float32),
        grid=(tiles_n, tile.splits),
        num_stages=DOT_STAGES,
        **dict(PADDED_M=tile.padded_m, STEPS=tile.steps, STAGES=DOT_STAGES),
    )
    return jnp.sum(sums, axis=0).astype(x.dtype)
