"""The triton attention kernels, interpreted on a CPU: against the reference and transformers, and how they lower."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from fastft_jax.pallas_kernels.attention import attention, reference, select_implementation, triton
from fastft_jax.pallas_kernels.attention.cases import CASES
from fastft_jax.pallas_kernels.attention.ranges import BROKEN, visible_ranges
from fastft_jax.pallas_kernels.attention.tiles import Blocks

pytestmark = pytest.mark.usefixtures("quick_compilation")
# fp32 rounding of softmaxes over at most 70 keys, summed block by block in another order.
FP32 = dict(rtol=2e-5, atol=2e-5)
KERNELS = triton.Kernels(Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1))
# Interpreted kernels compile for seconds; without LLVM's optimisations it is a third of that.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Problem(NamedTuple):
    length: int
    heads: int
    kv_heads: int
    width: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    packed: bool = False


ALL = Problem(70, 4, 2, 24, window=9, softcap=2.0, sinks=True, packed=True)  # ragged in T and in H
CAPPED = Problem(64, 2, 2, 16, softcap=1.5)  # whole blocks only
PACKED = Problem(37, 3, 1, 16, packed=True)
SINKS = Problem(48, 6, 2, 8, window=20, sinks=True)


def draw(problem, seed):
    rng = np.random.default_rng(seed)
    heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    q, k, v, d_out = (
        rng.standard_normal((2, problem.length, n, problem.width)).astype(np.float32) * 1.5 for n in heads
    )
    return q, k, v, rng.standard_normal(problem.heads).astype(np.float32), d_out


@functools.cache
def compiled(problem, implementation):
    """(out, dq, dk, dv, dsinks) of (q, k, v, sinks, d_out, ids); one program for all values."""
    p = problem

    @functools.partial(
        jax.jit, compiler_options={"xla_backend_optimization_level": 0}
    )  # compiles in a third of the time
    def run(q, k, v, sinks, d_out, ids):
        def f(q, k, v, sinks):
            ids_, sinks_ = ids if p.packed else None, sinks if p.sinks else None
            options = dict(scale=0.3, window=p.window, softcap=p.softcap, sinks=sinks_)
            if implementation == "xla":
                return attention(q, k, v, q_segment_ids=ids_, kv_segment_ids=ids_, **options, implementation="xla")
            return triton.attention(q, k, v, segment_ids=ids_, **options, kernels=KERNELS)

        out, vjp = jax.vjp(f, q, k, v, sinks)
        return out, *vjp(d_out)

    return run


@st.composite
def segments(draw, length):
    """[2, length] rows of documents and padding anywhere, ids in any order."""
    rows = []
    for _ in range(2):
        pieces = draw(st.lists(st.tuples(st.integers(1, length), st.booleans()), min_size=1, max_size=5))
        names = draw(st.permutations(range(1, 7)))
        row = [0 if padding else name for (n, padding), name in zip(pieces, names, strict=False) for _ in range(n)]
        rows.append((row + [0] * length)[:length])
    return np.array(rows, np.int32)


def check(problem, seed, ids):
    operands = *draw(problem, seed), ids
    ours, theirs = (jax.device_get(compiled(problem, name)(*operands)) for name in ("triton", "xla"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **FP32)
    if problem.packed:
        assert not any(np.any(x[ids == 0]) for x in ours[:4])


@settings(max_examples=8, deadline=None)
@given(ids=segments(ALL.length), seed=st.integers(0, 9))
def test_everything_at_once_equals_the_reference_with_gradients(ids, seed):
    check(ALL, seed, ids)


@settings(max_examples=8, deadline=None)
@given(ids=segments(PACKED.length), seed=st.integers(0, 9))
def test_packed_rows_equal_the_reference_with_gradients(ids, seed):
    check(PACKED, seed, ids)


@pytest.mark.parametrize("problem", [CAPPED, SINKS])
def test_plain_rows_equal_the_reference_with_gradients(problem):
    check(problem, 0, np.zeros((2, problem.length), np.int32))


def eager(problem, q, k, v, sinks, d_out):
    """transformers' eager attention in float64: GPT-OSS's with sinks, Gemma 2's with a softcap; plain rows."""
    q, k, v, sinks = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v, sinks))
    groups = problem.heads // problem.kv_heads
    module = SimpleNamespace(num_key_value_groups=groups, training=False, head_dim=problem.width, sinks=sinks)
    distance = np.arange(problem.length)[:, None] - np.arange(problem.length)[None, :]
    seen = (distance >= 0) & (distance < (problem.window or problem.length))
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(torch.tensor(~seen), float("-inf"))[None, None]
    if problem.sinks:
        f, options = modeling_gpt_oss.eager_attention_forward, {}
    else:
        f, options = modeling_gemma2.eager_attention_forward, dict(softcap=problem.softcap)
    out, _ = f(module, *(x.transpose(1, 2) for x in (q, k, v)), bias, scaling=0.3, dropout=0.0, **options)
    out.backward(torch.tensor(d_out, dtype=torch.float64))
    grads = [np.zeros(x.shape) if x.grad is None else x.grad.numpy() for x in (q, k, v, sinks)]
    return out.detach().numpy(), *grads


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize("problem", [CAPPED, SINKS], ids=["gemma2", "gpt_oss"])
def test_softcap_and_sinks_with_gradients_equal_transformers_eager(problem, implementation):
    operands = draw(problem, 1)
    ours = compiled(problem, implementation)(*operands, np.zeros((2, problem.length), np.int32))
    for a, b in zip(ours, eager(problem, *operands), strict=True):
        np.testing.assert_allclose(a, b, **FP32)


def test_sinks_reach_the_blocks_of_a_long_row(monkeypatch):
    operands = draw(SINKS, 2)
    ids = np.zeros((2, SINKS.length), np.int32)
    whole = compiled(SINKS, "xla")(*operands, ids)
    monkeypatch.setattr(reference, "LONG_ROW", 32)
    monkeypatch.setattr(reference, "BLOCK_LOGITS", 1)
    for a, b in zip(compiled.__wrapped__(SINKS, "xla")(*operands, ids), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=5e-6)


def test_bfloat16_is_near_float32_and_public_call_runs_without_a_gpu():
    q, k, v, *_ = draw(PACKED, 3)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    f = functools.partial(attention, scale=0.25)
    exact = f(*(x.astype(jnp.float32) for x in halves), implementation="xla")
    ours = quick_jit(functools.partial(f, implementation="triton"))(*halves)
    assert ours.dtype == jnp.bfloat16
    # bf16 probabilities and output carry 2**-9 relative rounding each.
    assert np.linalg.norm(np.asarray(ours, np.float32) - exact) < 6e-3 * np.linalg.norm(exact)


def test_a_document_that_does_not_stand_together_becomes_nan():
    q, k, v, sinks, d_out = draw(PACKED, 4)
    ids = np.array([[1] * 10 + [2] * 10 + [1] * 10 + [0] * 7, [2] * 9 + [0] * 9 + [5] * 19], np.int32)
    out = np.asarray(compiled(PACKED, "triton")(q, k, v, sinks, d_out, ids)[0])
    assert np.all(np.isnan(out[0, 20:30])) and np.all(np.isfinite(out[0, :20])) and np.all(np.isfinite(out[1]))


# Ranges


ranges = jax.jit(visible_ranges, static_argnums=(1, 2, 3))


@settings(max_examples=40, deadline=None)
@given(ids=segments(23), window=st.sampled_from([None, 1, 5, 40]))
def test_ranges_are_the_masks_definition_both_ways(ids, window):
    start, end = (np.asarray(x)[:, :, None] for x in ranges(ids, 2, 23, window))
    t, s = np.arange(23)[:, None], np.arange(23)[None, :]
    expected = (s <= t) & (t - s < (window or 23)) & (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
    np.testing.assert_array_equal((s <= t) & (s >= start), expected)
    np.testing.assert_array_equal((s <= t) & (t < end.swapaxes(1, 2)), expected)


def test_ranges_name_the_tokens_of_a_document_seen_before():
    start, _ = ranges(jnp.asarray([[1, 1, 0, 2, 1, 2], [3, 0, 0, 1, 1, 0]]), 2, 6, 3)
    np.testing.assert_array_equal(start == BROKEN, [[0, 0, 0, 0, 1, 1], [0] * 6])


# Lowering


def lower_for_h200(f, *args):
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_tiles_follow_the_card_and_the_width():
    choose = triton.choose_kernels
    assert choose(64, jnp.bfloat16, (9, 0)) == triton.HOPPER[64]
    assert choose(80, jnp.bfloat16, (9, 0)) == triton.HOPPER[128]
    assert choose(192, jnp.float16, (9, 0)) == triton.HOPPER[256]
    for width in (64, 80, 192):
        any_card = choose(width, jnp.bfloat16)
        assert choose(width, jnp.bfloat16, (8, 9)) == any_card != choose(width, jnp.bfloat16, (9, 0))
        assert choose(width, jnp.float32, (9, 0)) == choose(width, jnp.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_lower_for_cuda_without_a_gpu(case):
    text = lower_for_h200(functools.partial(case.run, interpret=False), *case.args)
    names = ["attention_forward"]
    if "/train/" in case.name:
        names += ["attention_backward_q", "attention_backward_kv"]
    assert text.count("__gpu$xla.gpu.triton") == len(names)
    assert all(f"name = \\22{name}\\22" in text or f'name = "{name}"' in text for name in names)
    expected = jax.tree.leaves(jax.eval_shape(case.reference, *case.args))
    ours = jax.tree.leaves(jax.eval_shape(functools.partial(case.run, interpret=False), *case.args))
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in expected]


def named(name, value):
    """A `keep` for jax.checkpoint's policies."""
    return checkpoint_name(value, name)


@pytest.mark.parametrize("saved, forwards", [(("attn_out", "attn_lse"), 1), (("attn_out",), 2), ((), 2)])
def test_saving_both_names_runs_one_forward_kernel_a_layer(monkeypatch, saved, forwards):
    calls = []

    def stand_in(name, *results):
        def kernel(*operands, **_):
            def record(*_):
                calls.append(name)
                return tuple(np.zeros(r.shape, r.dtype) for r in results)

            return jax.pure_callback(record, results, *operands)

        monkeypatch.setattr(triton, name, kernel)

    x, lse = jax.ShapeDtypeStruct((2, 8, 16), jnp.float32), jax.ShapeDtypeStruct((2, 2, 8), jnp.float32)
    stand_in("forward_kernel", x, lse)
    stand_in("backward_kv", x, x)
    monkeypatch.setattr(triton, "backward_q", lambda q, *_, **__: q)
    layers = 3

    def layer(h, w):
        q = h * w
        return h + triton.attention(q, q, q, scale=0.3, keep=named), None

    @jax.jit
    @jax.grad
    def gradient(weights):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        h, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), jnp.ones((2, 8, 2, 8)), weights)
        return jnp.sum(h)

    jax.block_until_ready(gradient(jnp.ones((layers, 1))))
    assert (calls.count("forward_kernel"), calls.count("backward_kv")) == (forwards * layers, layers)


# Selection and refusals


def select(capability=(9, 0), platform="gpu", dtype=jnp.bfloat16, width=128, keys=4096, batch=2, **options):
    return select_implementation(
        q_shape=(batch, 4096, 32, width),
        kv_shape=(batch, keys, 8, width),
        dtype=dtype,
        platform=platform,
        compute_capability=capability,
        **options,
    )


@pytest.mark.parametrize(
    "case, reason",
    [
        (dict(softcap=50.0), "softcap"),
        (dict(sinks=True, dtype=jnp.float16, width=64), "sinks"),
        (dict(packed=True), "max_segments"),
        (dict(packed=True, max_segments=2, batch=128), "int32"),
        (dict(packed=True, max_segments=4, capability=(8, 9)), "Hopper"),
        (dict(width=256, capability=(8, 0)), "above 128"),
        (dict(softcap=50.0, width=80, capability=(12, 0)), "softcap"),
    ],
)
def test_triton_is_selected_for_what_cudnn_lacks(case, reason):
    name, reasons = select(**case)
    assert name == "triton" and any(reason in r for r in reasons)


@pytest.mark.parametrize(
    "case, reason",
    [
        (dict(softcap=50.0, capability=(7, 5)), "compute capability 8.0"),
        (dict(softcap=50.0, platform="cpu", capability=None), "triton kernels need an NVIDIA GPU"),
        (dict(dtype=jnp.float32), "triton only by name"),
        (dict(width=512), "triton kernels take a head_dim"),
        (dict(keys=8192), "not for the triton kernels"),
    ],
)
def test_xla_is_selected_with_the_reason_why_not_triton(case, reason):
    name, reasons = select(**case)
    assert name == "xla" and len(reasons) > 1 and any(reason in r for r in reasons)


def test_wrong_arguments_are_named():
    q = jnp.zeros((1, 4, 2, 8))
    for options, words in [
        (dict(q_offset=2), "cache"),
        (dict(scale=-1.0), "positive scale"),
        (dict(softcap=0.0), "positive scale"),
        (dict(sinks=jnp.zeros(3)), "one a query head"),
    ]:
        with pytest.raises(ValueError, match=words):
            attention(q, q, q, **{"scale": 1.0, **options}, implementation="triton")
    odd = jnp.zeros((1, 4, 2, 12))
    with pytest.raises(ValueError, match="head_dim"):
        attention(odd, odd, odd, scale=1.0, implementation="triton")
    with pytest.raises(ValueError, match="sinks"):
        half = q.astype(jnp.bfloat16)
        attention(half, half, half, scale=1.0, sinks=jnp.zeros(2), implementation="cudnn")
