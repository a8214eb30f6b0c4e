"""Few rows times NF4 on a real card: both kernels against a float64 product on the host, at sizes that fit no tile."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastft_jax.pallas_kernels import nf4
from fastft_jax.pallas_kernels.quantised_matmul import few_rows, quantised_matmul, tiles

pytestmark = pytest.mark.gpu

IMPLEMENTATIONS = ["triton", "jax_triton"]


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


def operands(m, n, k, double, dtype=jnp.bfloat16):
    rng = np.random.default_rng([m, n, k])
    groups = n * k // 64
    x = rng.standard_normal((m, k)).astype(dtype)
    codes = rng.integers(0, 256, (groups, 32), dtype=np.uint8)
    if not double:
        absmax = rng.uniform(0, 0.2, groups).astype(np.float32)
        return (x, codes, absmax, None, None), decoded(codes, absmax, (n, k))
    scale = rng.uniform(0, 0.1, -(-groups // 256)).astype(np.float32)
    absmax, offset = rng.integers(0, 256, groups, dtype=np.uint8), np.float32(0.07)
    value = nf4.dynamic_map()[absmax] * np.repeat(scale, 256)[:groups] + offset
    return (x, codes, absmax, scale, offset), decoded(codes, value, (n, k))


def decoded(codes, absmax, shape):
    return (nf4.NF4_CODE[np.concatenate([codes >> 4, codes & 15], 1)] * absmax[:, None]).reshape(shape)


def compare(implementation, args, w, shape):
    """The error of the product in norm, against float64 on the host."""
    if implementation == "jax_triton" and importlib.util.find_spec("jax_triton") is None:
        pytest.skip("needs the optional jax-triton")
    f = jax.jit(lambda *a: quantised_matmul(*a, shape=shape, implementation=implementation))
    y = np.asarray(f(*jax.device_put(args)), np.float64)
    exact = np.asarray(args[0], np.float64) @ np.asarray(w, np.float64).T
    return np.linalg.norm(y - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 3584), (130, 14336), (5, 64)])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 16, 17, 37, 64])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kernel_equals_the_float64_product(implementation, m, shape):
    args, w = operands(m, *shape, double=True)
    # bfloat16 results: 1.7e-3 in norm; above 4 rows the weight is rounded as well: 2.4e-3
    assert compare(implementation, args, w, shape) < 4e-3


@pytest.mark.parametrize("split_low", [True, False])
@pytest.mark.parametrize("shape", [(64, 4096), (37, 3584), (5, 64)])
def test_the_inline_assembly_equals_its_interpretation(shape, split_low):
    """Both sum the same integers: what remains is the order of float32 sums and a result's last bit."""
    (x, *weight), _ = operands(3, *shape, double=True)
    weight = [a[None] for a in weight]
    tile = tiles.vector_tiles(3, *shape)._replace(split_low=split_low)
    run = lambda interpret: few_rows.quantised_matvec(  # noqa: E731
        *jax.device_put((x, *weight)), shape=shape, tile=tile, interpret=interpret
    )
    card, host = (np.asarray(run(interpret), np.float64) for interpret in (False, True))
    assert np.linalg.norm(card - host) < 5e-4 * np.linalg.norm(host)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_few_rows_err_less_than_a_weight_rounded_to_bfloat16(implementation, m):
    """float16 results, as a rounding to bfloat16 would hide what is compared."""
    args, w = operands(m, 520, 4096, double=False, dtype=jnp.float16)
    exact = np.asarray(args[0], np.float64) @ np.asarray(w, np.float64).T
    rounded = np.asarray(args[0], np.float64) @ w.astype(jnp.bfloat16).astype(np.float64).T
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert compare(implementation, args, w, (520, 4096)) < error / 3


@pytest.mark.parametrize("m", [1, 4, 20])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float16_and_a_float32_absmax(implementation, m):
    args, w = operands(m, 520, 1088, double=False, dtype=jnp.float16)
    assert compare(implementation, args, w, (520, 1088)) < 5e-4


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_loop_reads_the_layers_of_a_stack_without_copying_their_codes(implementation, m):
    if implementation == "jax_triton" and importlib.util.find_spec("jax_triton") is None:
        pytest.skip("needs the optional jax-triton")
    shape, layers = (4096, 1024), 3
    each = [operands(m, shape[0] + i, shape[1], double=True) for i in range(layers)]  # other seeds, rows cut off
    groups = shape[0] * shape[1] // 64
    stacks = [
        np.stack([args[j][:cut] for args, _ in each]) for j, cut in ((1, groups), (2, groups), (3, groups // 256))
    ]
    weight = (*stacks, np.float32([args[4] for args, _ in each]))
    x = each[0][0][0]

    def run(x, *weight):
        f = lambda i: quantised_matmul(x, *weight, shape=shape, layer=i, implementation=implementation)  # noqa: E731
        return jax.lax.map(f, jnp.arange(layers))

    compiled = jax.jit(run).lower(*jax.device_put((x, *weight))).compile()
    # partial sums of 16 rows are as large as one layer's codes; a copy of those would come on top
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * groups * 32
    exact = np.stack([np.asarray(x, np.float64) @ np.asarray(w[: shape[0]], np.float64).T for _, w in each])
    y = np.asarray(compiled(*jax.device_put((x, *weight))), np.float64)
    assert np.linalg.norm(y - exact) / np.linalg.norm(exact) < 4e-3


@pytest.mark.parametrize("m", [1, 16])
def test_this_card_selects_the_kernel_and_keeps_no_decoded_weight(m):
    shape = (14336, 4096)
    args, _ = operands(m, *shape, double=True)
    compiled = jax.jit(lambda *a: quantised_matmul(*a, shape=shape)).lower(*jax.device_put(args)).compile()
    assert "__gpu$xla.gpu.triton" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < shape[0] * shape[1] // 4
