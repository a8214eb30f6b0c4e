"""The attention op: its reference against transformers in float64, and cuDNN's wiring against stand-in kernels."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from fastft_jax.pallas_kernels import attention as op
from fastft_jax.pallas_kernels.attention import attention, cudnn, reference, select_implementation

pytestmark = pytest.mark.usefixtures("quick_compilation")
# fp32 rounding of a softmax over at most 64 keys; sums are in another order in torch.
FP32 = dict(rtol=1e-5, atol=1e-5)


def random_qkv(seed, batch, queries, keys, heads, kv_heads, width):
    rng = np.random.default_rng(seed)
    shapes = [(batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def visible(queries, keys, window=None, segments=None, offset=0):
    """The mask straight from its definition, query by query."""
    mask = np.zeros((queries, keys), bool)
    for t in range(queries):
        for s in range(keys):
            i = t + offset
            same = segments is None or (segments[0][t] == segments[1][s] and segments[0][t] != 0)
            mask[t, s] = s <= i and (window is None or i - s < window) and same
    return mask


def eager(q, k, v, mask, *, scale, softcap=None, cotangent=None):
    """transformers' eager attention in float64: output, and gradients of sum(out * cotangent) when one is given."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).transpose(1, 2).requires_grad_() for x in (q, k, v))
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, head_dim=q.shape[3])
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(torch.tensor(~mask), float("-inf"))[:, None]
    out, _ = eager_attention_forward(module, q, k, v, bias, dropout=0.0, scaling=scale, softcap=softcap)
    if cotangent is None:
        return out.detach().numpy()
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    return out.detach().numpy(), *(x.grad.transpose(1, 2).numpy() for x in (q, k, v))


def value_and_grads(f, q, k, v, cotangent):
    def run(q, k, v, cotangent):
        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(cotangent.astype(out.dtype))

    return [np.asarray(x) for x in jax.jit(run)(q, k, v, cotangent)]


@pytest.mark.parametrize(
    "heads, kv_heads, window, softcap",
    [(4, 2, None, None), (4, 4, 5, None), (6, 1, 1, None), (4, 2, None, 3.0), (4, 2, 7, 2.0)],
)
def test_reference_and_gradients_equal_transformers_eager(heads, kv_heads, window, softcap):
    q, k, v = random_qkv(0, 2, 17, 17, heads, kv_heads, 8)
    cotangent = np.random.default_rng(1).standard_normal(q.shape)
    mask = np.broadcast_to(visible(17, 17, window), (2, 17, 17))
    f = functools.partial(attention, scale=0.4, window=window, softcap=softcap)
    for ours, theirs in zip(
        value_and_grads(f, q, k, v, cotangent),
        eager(q, k, v, mask, scale=0.4, softcap=softcap, cotangent=cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, **FP32)


documents = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def pack(rows, length):
    ids = np.zeros((len(rows), length), np.int32)
    for b, lengths in enumerate(rows):
        ends = np.cumsum(lengths)
        for m, (end, n) in enumerate(zip(ends, lengths, strict=True)):
            ids[b, end - n : end] = m + 1
    return ids


@functools.cache
def compiled(window, packed):
    """One program for all layouts: packed rows by their ids, or rows without any."""

    @jax.jit
    def run(q, k, v, ids, cotangent):
        ids = ids if packed else None
        f = functools.partial(attention, scale=0.5, window=window, q_segment_ids=ids, kv_segment_ids=ids)
        out, vjp = jax.vjp(f, q, k, v)
        return out, *vjp(cotangent)

    return run


@settings(max_examples=15, deadline=None)
@given(rows=st.tuples(documents, documents), window=st.sampled_from([None, 3]), seed=st.integers(0, 9))
def test_packed_row_equals_each_document_alone_with_gradients(rows, window, seed):
    length = 28
    ids = pack(rows, length)
    q, k, v = random_qkv(seed, 2, length, length, 4, 2, 4)
    cotangent = np.random.default_rng(seed + 1).standard_normal(q.shape).astype(np.float32)
    packed = jax.device_get(compiled(window, True)(q, k, v, ids, cotangent))
    for m in range(max(map(len, rows))):
        # Document m of each row alone, moved to the row's start; what follows it is later than all its queries, and
        # has no cotangent.
        where = [np.flatnonzero(row == m + 1) for row in ids]
        alone = [np.zeros_like(x) for x in (q, k, v, cotangent)]
        for x, y in zip(alone, (q, k, v, cotangent), strict=True):
            for b, at in enumerate(where):
                x[b, : len(at)] = y[b, at]
        single = jax.device_get(compiled(window, False)(*alone[:3], ids, alone[3]))
        for one, all_ in zip(single, packed, strict=True):
            for b, at in enumerate(where):
                # The same fp32 sums, plus exact zeros of the masked keys, maybe in another order.
                np.testing.assert_allclose(all_[b, at], one[b, : len(at)], rtol=1e-6, atol=2e-6)
    assert not any(np.any(np.asarray(x)[ids == 0]) for x in packed)


@functools.cache
def compiled_decode(window):
    return jax.jit(lambda q, k, v, offset: attention(q, k, v, scale=0.5, window=window, q_offset=offset))


@settings(max_examples=15, deadline=None)
@given(cached=st.integers(0, 13), new=st.sampled_from([1, 3]), window=st.sampled_from([None, 5]))
def test_decoding_with_a_cache_equals_the_same_rows_of_the_whole(cached, new, window):
    q, k, v = random_qkv(3, 2, 16, 16, 4, 2, 4)
    whole = np.asarray(compiled_decode(window)(q, k, v, 0))
    rows = slice(cached, cached + new)
    written = (np.arange(16) < cached + new)[None, :, None, None]
    k, v = (np.where(written, x, 1e3).astype(np.float32) for x in (k, v))  # what the cache does not hold yet
    some = compiled_decode(window)(q[:, rows], k, v, cached)
    np.testing.assert_allclose(some, whole[:, rows], rtol=1e-6, atol=1e-6)


def test_the_offset_may_be_static_or_one_for_each_row():
    q, k, v = random_qkv(4, 2, 9, 9, 2, 2, 4)
    whole = np.asarray(compiled_decode(None)(q, k, v, 0))
    static = jax.jit(functools.partial(attention, scale=0.5, q_offset=6))(q[:, 6:], k, v)
    np.testing.assert_allclose(static, whole[:, 6:], rtol=1e-6, atol=1e-6)
    one = np.stack([q[0, 3], q[1, 7]])[:, None]
    decoded = np.asarray(compiled_decode(None)(one, k, v, np.array([3, 7], np.int32)))
    np.testing.assert_allclose(decoded[:, 0], np.stack([whole[0, 3], whole[1, 7]]), rtol=1e-6, atol=1e-6)


def test_query_that_sees_nothing_gives_zeros_and_finite_gradients():
    q, k, v = random_qkv(5, 1, 6, 6, 2, 2, 4)
    ids_q, ids_k = np.array([[1, 1, 7, 0, 2, 2]], np.int32), np.array([[1, 1, 2, 0, 2, 2]], np.int32)
    f = functools.partial(attention, scale=1.0, q_segment_ids=ids_q, kv_segment_ids=ids_k)
    out, *grads = value_and_grads(f, q, k, v, np.ones_like(q))
    assert not np.any(out[:, 2:4]) and np.all(np.any(out[:, [0, 1, 4, 5]], axis=(0, 2, 3)))
    assert all(np.all(np.isfinite(g)) for g in grads) and not np.any(grads[0][:, 2:4])


@pytest.mark.parametrize("window, packed", [(None, False), (5, True)])
def test_long_rows_in_blocks_equal_the_whole_at_once(monkeypatch, window, packed):
    q, k, v = random_qkv(6, 2, 40, 40, 4, 2, 4)
    cotangent = np.random.default_rng(7).standard_normal(q.shape)
    ids = pack([[13, 20], [40]], 40) if packed else None
    f = functools.partial(attention, scale=0.5, window=window, q_segment_ids=ids, kv_segment_ids=ids)
    whole = value_and_grads(f, q, k, v, cotangent)
    monkeypatch.setattr(reference, "LONG_ROW", 32)
    monkeypatch.setattr(reference, "BLOCK_LOGITS", 1)  # blocks of 16: 40 queries are two and a half
    for blocked, once in zip(value_and_grads(f, q, k, v, cotangent), whole, strict=True):
        np.testing.assert_allclose(blocked, once, rtol=1e-6, atol=2e-6)


def test_a_row_of_16384_tokens_needs_no_quadratic_memory():
    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, scale=0.1, implementation="xla"))

    shapes = [jax.ShapeDtypeStruct((1, 16384, n, 16), jnp.float32) for n in (32, 8, 8)]
    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis()
    # All logits at once are 32 GiB; a block's are 1 GiB and its backward pass holds a few of them.
    assert memory.temp_size_in_bytes < 6 << 30


def test_bfloat16_result_has_qs_dtype_and_is_near_float32():
    q, k, v = random_qkv(8, 1, 33, 33, 4, 2, 16)
    f = jax.jit(functools.partial(attention, scale=0.25))
    exact = f(q, k, v)
    half = f(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
    assert half.dtype == jnp.bfloat16
    # bf16 inputs, probabilities and output carry 2**-9 relative rounding each.
    assert np.linalg.norm(np.asarray(half, np.float32) - exact) < 1e-2 * np.linalg.norm(exact)


# Which implementation runs


def select(capability=(9, 0), platform="gpu", dtype=jnp.bfloat16, width=128, length=4096, keys=4096, batch=2, **kwargs):
    return select_implementation(
        q_shape=(batch, length, 32, width),
        kv_shape=(batch, keys, 8, width),
        dtype=dtype,
        platform=platform,
        compute_capability=capability,
        **kwargs,
    )


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(capability=(8, 0)),
        dict(width=256),
        dict(dtype=jnp.float16, width=64),
        dict(packed=True, max_segments=16),
        dict(packed=True, max_segments=1, capability=(8, 6)),
        dict(capability=(12, 0), packed=True, max_segments=4),
    ],
)
def test_cudnn_is_selected_where_it_can_run(case):
    assert select(**case) == ("cudnn", ())


@pytest.mark.parametrize(
    "case, reason",
    [
        (dict(platform="cpu", capability=None), "NVIDIA GPU"),
        (dict(platform="gpu", capability=None), "NVIDIA GPU"),
        (dict(capability=(7, 5)), "8.0"),
        (dict(dtype=jnp.float32), "float32"),
        (dict(width=100), "head_dim 100"),
        (dict(width=512), "head_dim 512"),
        (dict(length=1), "cache"),
        (dict(q_offset=3), "cache"),
    ],
)
def test_xla_is_selected_with_the_reason_why_not_cudnn(case, reason):
    name, reasons = select(**case)
    assert name == "xla" and any(reason in r for r in reasons)


def test_wrong_arguments_are_named():
    q, k, v = random_qkv(0, 1, 4, 4, 4, 2, 8)
    ids = np.ones((1, 4), np.int32)
    for kwargs, words in [
        (dict(implementation="mosaic"), "implementation"),
        (dict(window=0), "window"),
        (dict(q_segment_ids=ids), "together"),
        (dict(q_segment_ids=ids[:, :3], kv_segment_ids=ids), "q_segment_ids"),
        (dict(max_segments=0), "max_segments"),
        (dict(max_document_length=0), "max_document_length"),
        (dict(implementation="cudnn"), "float32"),
    ]:
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, scale=1.0, **kwargs)
    with pytest.raises(ValueError, match="multiple"):
        attention(q[:, :, :3], k, v, scale=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[..., :4], k, v, scale=1.0)
    with pytest.raises(ValueError, match="dtype"):
        attention(q, k.astype(np.float16), v, scale=1.0)


# cuDNN without a GPU: what is asked of it, and all that surrounds it


def lower_for_h200(f, *args):
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "window, segments, expected",
    [
        (None, None, ("CAUSAL", 0, 1)),
        (100, None, ("CAUSAL", 100, 1)),  # cuDNN counts a window as Hugging Face does, the query's own key included
        (4096, None, ("CAUSAL", 0, 1)),  # as wide as the row: none
        (None, 3, ("PADDING_CAUSAL", 0, 3)),
        (100, 3, ("PADDING_CAUSAL", 100, 3)),
        (None, 1, ("CAUSAL", 0, 1)),
    ],
)
def test_forward_and_backward_lower_to_cudnn_calls_with_the_right_mask(window, segments, expected):
    q, k, v = (jax.ShapeDtypeStruct((2, 256, n, 64), jnp.bfloat16) for n in (4, 2, 2))
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q, k, v, ids):
        ids = None if segments is None else ids
        out = attention(
            q,
            k,
            v,
            scale=0.125,
            window=window,
            q_segment_ids=ids,
            kv_segment_ids=ids,
            max_segments=segments,
            implementation="cudnn",
        )
        return jnp.sum(out.astype(jnp.float32))

    text = lower_for_h200(jax.grad(loss, (0, 1, 2)), q, k, v, ids).replace("\\22", '"')
    assert text.count("@__cudnn$fmhaSoftmax(") == 1 and text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    mask, length, most = expected
    assert text.count(f'"mask_type": "{mask}"') == 2
    assert text.count(f'"sliding_window_length": {length},') == 2
    assert text.count(f'"max_seg_per_batch": {most},') == 2


class StandIn:
    """cuDNN's two kernels in numpy, by their own rules for packed rows: documents are found by offsets into memory,
    each has a row of log-sum-exps of its own, and NaN stands wherever the real kernels write nothing."""

    def __init__(self):
        self.forwards = self.backwards = 0

    def documents(self, q, lengths, offsets):
        """(row of lse, its tokens among all [B * T]) of each document."""
        batch, length, heads, width = q.shape
        if offsets.ndim != 2:
            return [(b, np.s_[b * length : (b + 1) * length]) for b in range(batch)]
        assert offsets.shape == (batch, lengths.shape[1] + 1)
        starts = offsets.reshape(-1) // (heads * width)
        return [(i, np.s_[starts[i] : starts[i] + n]) for i, n in enumerate(lengths.reshape(-1)) if n > 0]

    def flat(self, *arrays):
        return [np.array(x, np.float64).reshape(-1, *x.shape[2:]) for x in arrays]

    def logits(self, q, k, n, at, parameters):
        length = len(q[at])
        mask = visible(length, length, parameters["sliding_window_length"])
        return np.where(mask, q[at, n] @ k[at, n * k.shape[1] // q.shape[1]].T * parameters["scale"], -np.inf)

    def forward(self, parameters, q, k, v, _b, lengths, _kv, offsets, *_):
        self.forwards += 1
        shape, rows = q.shape, q.shape[0] * (offsets.shape[1] - 1 if offsets.ndim == 2 else 1)
        documents = self.documents(q, lengths, offsets)
        q, k, v = self.flat(q, k, v)
        out, lse = np.full(q.shape, np.nan), np.full((rows, shape[2], shape[1]), np.nan)
        for row, at in documents:
            for n in range(shape[2]):
                z = self.logits(q, k, n, at, parameters)
                lse[row, n, : len(z)] = np.logaddexp.reduce(z, axis=1)
                out[at, n] = np.exp(z - lse[row, n, : len(z), None]) @ v[at, n * k.shape[1] // q.shape[1]]
        return out.reshape(shape).astype(np.float16), lse.astype(np.float32)

    def backward(self, parameters, q, k, v, _b, lengths, _kv, offsets, _ko, _pk, _pv, lse, out, d_out):
        self.backwards += 1
        shapes = [x.shape for x in (q, k, v)]
        documents = self.documents(q, lengths, offsets)
        q, k, v, out, d_out = self.flat(q, k, v, out, d_out)
        dq, dk, dv = (np.full(x.shape, np.nan) for x in (q, k, v))
        for row, at in documents:
            dk[at], dv[at] = 0, 0
            for n in range(q.shape[1]):
                g = n * k.shape[1] // q.shape[1]
                z = self.logits(q, k, n, at, parameters)
                p = np.exp(z - np.asarray(lse)[row, n, : len(z), None])
                do, o = d_out[at, n], out[at, n]
                ds = p * (do @ v[at, g].T - np.sum(do * o, axis=1, keepdims=True)) * parameters["scale"]
                dq[at, n] = ds @ k[at, g]
                dk[at, g] += ds.T @ q[at, n]
                dv[at, g] += p.T @ do
        return tuple(x.reshape(shape).astype(np.float16) for x, shape in zip((dq, dk, dv), shapes, strict=True))


@pytest.fixture
def stand_in(monkeypatch):
    kernels = StandIn()

    def forward(*operands, is_training, **parameters):
        q, q_offsets = operands[0], operands[6]
        rows = q.shape[0] * (q_offsets.shape[1] - 1 if q_offsets.ndim == 2 else 1)
        lse = jax.ShapeDtypeStruct((rows, q.shape[2], q.shape[1]), jnp.float32)
        results = jax.pure_callback(functools.partial(kernels.forward, parameters), (q, lse), *operands)
        return list(results) if is_training else [results[0]]

    def backward(*operands, **parameters):
        return list(jax.pure_callback(functools.partial(kernels.backward, parameters), operands[:3], *operands))

    fused = SimpleNamespace(
        MaskType=cudnn.fused.MaskType,
        AttentionLayout=cudnn.fused.AttentionLayout,
        _dot_product_attention_fwd_p_wrapper=SimpleNamespace(bind=forward),
        _dot_product_attention_bwd_p_wrapper=SimpleNamespace(bind=backward),
        _dot_product_attention_fwd_p=SimpleNamespace(bind=forward),
        _dot_product_attention_bwd_p=SimpleNamespace(bind=backward),
    )
    monkeypatch.setattr(cudnn, "fused", fused)
    return kernels


@pytest.mark.parametrize(
    "rows, most, longest, window",
    [
        (None, None, None, 4),
        ([[5, 9, 3], [24]], 4, None, None),  # padding in one row, fewer documents than promised in both
        ([[64], [1, 1, 1, 1]], 4, None, 4),
        ([[24], [7]], 1, None, None),
        ([[50, 60, 70, 3, 33], [64] * 4], 8, 70, 20),  # folded by 2: documents lie across the folds
    ],
)
def test_cudnn_wiring_gives_the_references_values_and_gradients(stand_in, rows, most, longest, window):
    length = 256 if longest else 64
    assert longest is None or cudnn.fold(length, most, longest) == 2
    q, k, v = (x.astype(np.float16) for x in random_qkv(9, 2, length, length, 4, 2, 8))
    cotangent = np.random.default_rng(10).standard_normal(q.shape).astype(np.float16)
    ids = None if rows is None else pack(rows, length)
    kwargs = dict(scale=0.35, window=window, q_segment_ids=ids, kv_segment_ids=ids)
    packed = dict(max_segments=most, max_document_length=longest)
    fast = functools.partial(attention, **kwargs, **packed, implementation="cudnn")
    exact = functools.partial(attention, **kwargs, implementation="xla")
    ours = value_and_grads(fast, q, k, v, cotangent)
    theirs = value_and_grads(exact, *(x.astype(np.float32) for x in (q, k, v)), cotangent)
    for a, b in zip(ours, theirs, strict=True):
        # fp16 storage of outputs and gradients: 2**-11 relative; what is masked must be exactly zero.
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=4e-3, atol=4e-3)
        if ids is not None:
            assert not np.any(np.asarray(a)[ids == 0])
    np.testing.assert_array_equal(fast(q, k, v), ours[0])  # the undifferentiated call


@pytest.mark.parametrize(
    "most, longest, rows", [(2, None, [[5, 9, 3], [24]]), (1, None, [[24], [3, 4]]), (4, 60, [[65], [60]])]
)
def test_more_or_longer_documents_than_promised_become_nan_not_wrong_numbers(stand_in, most, longest, rows):
    length = 128 if longest else 24
    q, k, v = (x.astype(np.float16) for x in random_qkv(9, 2, length, length, 4, 2, 8))
    ids = pack(rows, length)
    broken = ids > most if longest is None else (ids == 1) & (np.arange(2) == 0)[:, None]
    kwargs = dict(q_segment_ids=ids, kv_segment_ids=ids, max_segments=most, max_document_length=longest)
    out = np.asarray(attention(q, k, v, scale=0.3, **kwargs, implementation="cudnn"))
    assert np.all(np.isnan(out[broken])) and np.all(np.isfinite(out[~broken]))


def named(name, value):
    """A `keep` for jax.checkpoint's policies."""
    return checkpoint_name(value, name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("saved, forwards", [(("attn_out", "attn_lse"), 1), ((), 2)])
def test_saving_both_names_runs_one_cudnn_forward_a_layer(stand_in, packed, saved, forwards):
    layers = 3
    x = jnp.asarray(random_qkv(11, 2, 8, 8, 2, 2, 8)[0], jnp.float16)
    weights = jnp.ones((layers, 1), jnp.float16)
    ids = pack([[5, 3], [4, 2]], 8) if packed else None

    def layer(h, w):
        q = h * w
        options = dict(q_segment_ids=ids, kv_segment_ids=ids, max_segments=2, keep=named)
        return h + attention(q, q, q, scale=0.3, **options, implementation="cudnn"), None

    @jax.jit
    @jax.grad
    def gradient(weights):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        h, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, weights)
        return jnp.sum(h.astype(jnp.float32))

    jax.block_until_ready(gradient(weights))
    assert (stand_in.forwards, stand_in.backwards) == (forwards * layers, layers)


def test_documents_are_listed_over_the_whole_batch():
    found = cudnn.find_segments(jnp.asarray(pack([[3, 1], [2, 2, 2]], 6)), 4, 1)
    np.testing.assert_array_equal(found.lengths, [3, 1, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(found.starts, [0, 3, 6, 8, 10, 12, 12, 12])


@pytest.mark.parametrize(
    "length, most, longest, folded",
    [(4096, 32, None, 1), (4096, 32, 512, 8), (4096, 32, 600, 4), (4096, 4, 100, 2), (4096, 3, 9, 1), (4000, 32, 9, 1)],
)
def test_rows_are_folded_no_shorter_than_a_document(length, most, longest, folded):
    assert cudnn.fold(length, most, longest) == folded


def test_this_machine_selects_what_it_has():
    platform, capability = op.current_device()
    assert platform == jax.default_backend() and (capability is None) == (platform != "gpu")
