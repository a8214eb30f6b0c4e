"""The triton attention kernels on a real card against the fp32 reference: values, gradients, kernel counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from fastft_jax.pallas_kernels.attention import attention, select_implementation
from fastft_jax.pallas_kernels.pallas import current_device

pytestmark = pytest.mark.gpu

BATCH = 2


@pytest.fixture(scope="module", autouse=True)
def capability():
    platform, capability = current_device()
    if platform != "gpu" or capability is None or capability < (8, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0 or later")
    return capability


def pack(length):
    """Rows of documents in no order of ids, with padding between and after them; and a row of one document."""
    ids = np.zeros((BATCH, length), np.int32)
    at = 0
    for name, n in ((3, 100), (0, 9), (1, 7), (7, 200), (2, 60)):
        ids[0, at : at + n] = name
        at += n
    ids[1] = 1
    return jnp.asarray(ids)


def compare(dtype, length, heads, kv_heads, width, *, packed=False, sinks=False, **options):
    """Relative errors (in norm) of out, dq, dk, dv and d_sinks against the reference on the same inputs in fp32."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(BATCH, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, d_out = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    sink = jax.random.normal(keys[4], (heads,), jnp.float32)
    ids = pack(length) if packed else None

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(implementation, dtype, ids, q, k, v, sink, d_out):
        def f(q, k, v, sink):
            segments = dict(q_segment_ids=ids, kv_segment_ids=ids, sinks=sink if sinks else None)
            return attention(q, k, v, scale=width**-0.5, **segments, **options, implementation=implementation)

        out, vjp = jax.vjp(f, *(x.astype(dtype) for x in (q, k, v)), sink)
        return out, *vjp(d_out.astype(dtype))

    exact = run("xla", jnp.float32, ids, q, k, v, sink, d_out)
    ours = [np.asarray(x, np.float32) for x in run("triton", dtype, ids, q, k, v, sink, d_out)]
    if packed:
        assert not any(np.any(x[np.asarray(ids) == 0]) for x in ours[:4]), "padding is not zero"
    if not sinks:
        assert not np.any(ours.pop())
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, exact, strict=False)]


PROBLEMS = [
    pytest.param((512, 8, 2, 128), {}, id="causal"),
    pytest.param((500, 8, 2, 128), dict(packed=True), id="packed-ragged"),
    pytest.param((512, 8, 2, 128), dict(packed=True, window=100), id="packed-window"),
    pytest.param((512, 4, 4, 64), dict(softcap=3.0), id="softcap-64"),
    pytest.param((512, 16, 2, 64), dict(sinks=True, window=128), id="sinks-window-64"),
    pytest.param((512, 4, 2, 256), dict(packed=True, softcap=3.0, window=200), id="packed-softcap-256"),
    pytest.param((401, 6, 3, 80), dict(packed=True, softcap=3.0, sinks=True, window=77), id="all-80"),
    pytest.param((512, 4, 4, 96), {}, id="causal-96"),
]


@pytest.mark.parametrize("shape, options", PROBLEMS)
def test_bfloat16_equals_the_fp32_reference(shape, options):
    # bf16 rounding of probabilities, their gradients and results: as for cuDNN's kernels.
    assert max(compare(jnp.bfloat16, *shape, **options)) < 1e-2


@pytest.mark.parametrize("shape, options", PROBLEMS)
def test_float32_equals_the_fp32_reference(shape, options):
    # Products are exact in fp32 in both; what is left is the order of sums and exp2's last bits.
    assert max(compare(jnp.float32, *shape, **options)) < 1e-5


def test_float16_equals_the_fp32_reference():
    assert max(compare(jnp.float16, 512, 8, 2, 64, softcap=3.0, packed=True)) < 2e-3


def test_results_are_the_same_to_the_bit_from_run_to_run():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (2, 777, n, 128), jnp.bfloat16) for key, n in zip(keys, (8, 2, 2), strict=True))

    @jax.jit
    def run(q, k, v):
        out, vjp = jax.vjp(functools.partial(attention, scale=0.1, implementation="triton"), q, k, v)
        return out, *vjp(out)

    for a, b in zip(run(q, k, v), run(q, k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_this_card_selects_triton_where_cudnn_has_no_kernel(capability):
    shapes = dict(q_shape=(2, 512, 8, 128), kv_shape=(2, 512, 2, 128), platform="gpu", compute_capability=capability)
    assert select_implementation(**shapes, dtype=jnp.bfloat16, softcap=50.0).name == "triton"
    q, k, v = (jnp.zeros((2, 512, n, 128), jnp.bfloat16) for n in (8, 2, 2))
    text = jax.jit(functools.partial(attention, scale=1.0, softcap=50.0)).lower(q, k, v).as_text()
    assert "attention_forward" in text


def named(name, value):
    """A `keep` for jax.checkpoint's policies."""
    return checkpoint_name(value, name)


@pytest.mark.parametrize("saved, forwards", [(("attn_out", "attn_lse"), 1), ((), 2)])
def test_saving_both_names_compiles_to_one_forward_kernel_a_layer(saved, forwards):
    ids = pack(512)

    def layer(h, w):
        q = h * w
        options = dict(q_segment_ids=ids, kv_segment_ids=ids, softcap=30.0, keep=named)
        return h + attention(q, q, q, scale=0.1, **options, implementation="triton"), None

    def loss(weights, h):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        h, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), h, weights)
        return jnp.sum(h.astype(jnp.float32))

    h = jax.ShapeDtypeStruct((BATCH, 512, 4, 64), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).lower(weights, h).compile().as_text()
    calls = [line for line in text.splitlines() if "custom_call_target" in line and "triton" in line]
    assert sum("attention_forward" in line for line in calls) == forwards
    assert sum("attention_backward_kv" in line for line in calls) == 1
