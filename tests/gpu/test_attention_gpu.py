"""cuDNN attention on a real card against the fp32 reference: values, gradients, masks, padding, and kernel counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from fastft_jax.pallas_kernels.attention import attention, select_implementation
from fastft_jax.pallas_kernels.pallas import current_device

pytestmark = pytest.mark.gpu

BATCH, LENGTH = 2, 512


@pytest.fixture(scope="module", autouse=True)
def capability():
    platform, capability = current_device()
    if platform != "gpu" or capability is None or capability < (8, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0 or later")
    return capability


def pack(rows):
    ids = np.zeros((len(rows), LENGTH), np.int32)
    for b, lengths in enumerate(rows):
        start = 0
        for m, n in enumerate(lengths):
            ids[b, start : start + n] = m + 1
            start += n
    return ids


PACKED = pack([[100, 7, 300, 50], [512]])  # padding in the first row, fewer documents than promised in both
MANY = pack([[16, 60, 9, 33] * 4, [5] * 20])
SINGLE = pack([[512], [301]])


def compare(ids, max_segments, longest, window, heads, kv_heads, width, dtype=jnp.bfloat16):
    """Relative errors (in norm) of out, dq, dk, dv against the reference on the same inputs in fp32."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(BATCH, LENGTH, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, cotangent = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    ids = None if ids is None else jnp.asarray(ids)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(implementation, dtype, ids, q, k, v, cotangent):
        f = functools.partial(
            attention,
            scale=width**-0.5,
            window=window,
            q_segment_ids=ids,
            kv_segment_ids=ids,
            max_segments=max_segments,
            max_document_length=longest,
            implementation=implementation,
        )
        out, vjp = jax.vjp(f, *(x.astype(dtype) for x in (q, k, v)))
        return out, *vjp(cotangent.astype(dtype))

    exact = run("xla", jnp.float32, ids, q, k, v, cotangent)
    fast = [np.asarray(x, np.float32) for x in run("cudnn", dtype, ids, q, k, v, cotangent)]
    if ids is not None:
        assert not any(np.any(x[np.asarray(ids) == 0]) for x in fast), "padding is not zero"
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(fast, exact, strict=True)]


@pytest.mark.parametrize(
    "ids, max_segments, longest, window, heads, kv_heads, width",
    [
        pytest.param(None, None, None, None, 8, 2, 128, id="causal"),
        pytest.param(None, None, None, None, 4, 4, 64, id="causal-mha-64"),
        pytest.param(None, None, None, 100, 8, 2, 128, id="window"),
        pytest.param(SINGLE, 1, None, None, 8, 2, 128, id="one-document-and-padding"),
        pytest.param(PACKED, 5, None, None, 8, 2, 128, id="packed"),
        pytest.param(PACKED, 4, None, None, 4, 4, 64, id="packed-mha-64"),
        pytest.param(PACKED, 5, None, 100, 8, 2, 128, id="packed-window"),
        pytest.param(MANY, 32, None, None, 8, 2, 64, id="many"),
        pytest.param(MANY, 32, 60, None, 8, 2, 128, id="many-folded"),
        pytest.param(MANY, 32, 60, 10, 4, 4, 64, id="many-folded-window"),
        pytest.param(None, None, None, None, 4, 2, 256, id="causal-256"),
    ],
)
def test_cudnn_equals_the_fp32_reference(capability, ids, max_segments, longest, window, heads, kv_heads, width):
    if capability < (9, 0) and (width > 128 or (max_segments or 1) > 1):
        pytest.skip("head_dim above 128 and packed rows need Hopper")
    # bf16 rounding of inputs to both GEMMs, of probabilities and of results: 2e-3 to 3e-3 measured on an H200.
    assert max(compare(ids, max_segments, longest, window, heads, kv_heads, width)) < 1e-2


def test_float16_equals_the_fp32_reference():
    assert max(compare(None, None, None, 100, 8, 2, 64, dtype=jnp.float16)) < 2e-3  # fp16 has 3 bits more than bf16


def test_folding_rows_shrinks_the_backward_workspace_of_many_documents(capability):
    if capability < (9, 0):
        pytest.skip("packed rows need Hopper")
    shapes = [jax.ShapeDtypeStruct((2, 4096, n, 128), jnp.bfloat16) for n in (8, 2, 2)]
    ids = jax.ShapeDtypeStruct((2, 4096), jnp.int32)

    def temp(longest):
        def loss(q, k, v, ids):
            kwargs = dict(q_segment_ids=ids, kv_segment_ids=ids, max_segments=32, max_document_length=longest)
            return jnp.sum(attention(q, k, v, scale=0.1, **kwargs).astype(jnp.float32))

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes

    whole, folded = temp(None), temp(512)  # 8 rows of 512 for one of 4096
    print(
        f"packed backward, 2 x 4096, 8 heads of 128, 32 documents: {whole / 1e6:.0f} MB, folded {folded / 1e6:.0f} MB"
    )
    assert folded < whole / 2


def test_this_card_selects_cudnn_for_bf16_and_the_reference_for_fp32(capability):
    shapes = dict(q_shape=(2, 512, 8, 128), kv_shape=(2, 512, 2, 128), platform="gpu", compute_capability=capability)
    assert select_implementation(**shapes, dtype=jnp.bfloat16).name == "cudnn"
    assert select_implementation(**shapes, dtype=jnp.float32).name == "xla"
    q, k, v = (jnp.zeros((2, 512, n, 128), jnp.bfloat16) for n in (8, 2, 2))
    text = jax.jit(functools.partial(attention, scale=1.0)).lower(q, k, v).as_text()
    assert "__cudnn$fmhaSoftmax" in text


def named(name, value):
    """A `keep` for jax.checkpoint's policies."""
    return checkpoint_name(value, name)


@pytest.mark.parametrize("saved, forwards", [(("attn_out", "attn_lse"), 1), ((), 2)])
def test_saving_both_names_compiles_to_one_forward_kernel_a_layer(capability, saved, forwards):
    ids = jnp.asarray(PACKED) if capability >= (9, 0) else None

    def layer(h, w):
        q = h * w
        out = attention(q, q, q, scale=0.1, q_segment_ids=ids, kv_segment_ids=ids, max_segments=4, keep=named)
        return h + out, None

    def loss(weights, h):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        h, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), h, weights)
        return jnp.sum(h.astype(jnp.float32))

    h = jax.ShapeDtypeStruct((BATCH, LENGTH, 4, 64), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((3, 64), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).lower(weights, h).compile().as_text()
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == forwards
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 1
