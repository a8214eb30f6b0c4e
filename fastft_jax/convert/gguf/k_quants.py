"""The k-quants: super-blocks of 256 elements whose sub-block scales are themselves quantised.

Each encoder takes x float32 [B, 256], and perhaps how much each element matters (from an importance matrix, float32
[B, 256]), and gives the stored bytes uint8 [B, bytes]. The formats are those of GGUF
(block_q2_K ... block_q6_K in ggml-common.h); the scales are found as llama.cpp's reference quantiser finds them
(`scale_search`). Per super-block:

    Q2_K   84 bytes: 16 x (4-bit scale, 4-bit floor), 2-bit codes, fp16 d and dmin     x = d s q - dmin m
    Q3_K  110 bytes: high bits, low 2 bits, 16 x 6-bit signed scale, fp16 d            x = d s q
    Q4_K  144 bytes: fp16 d and dmin, 8 x (6-bit scale, 6-bit floor), 4-bit codes      x = d s q - dmin m
    Q5_K  176 bytes: as Q4_K with a plane of fifth bits before the codes
    Q6_K  210 bytes: low 4 bits, high 2 bits, 16 x 8-bit signed scale, fp16 d          x = d s q
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

from fastft_jax.convert.gguf import scale_search

_F = np.float32
SUPER_BLOCK = 256
Importance = Float[np.ndarray, "B 256"] | None


def q4_k(x: Float[np.ndarray, "B 256"], importance: Importance = None) -> UInt8[np.ndarray, "B 144"]:
    codes, head = _affine_32(x, importance, nmax=15, start=-1.0, steps=20)
    return np.concatenate([head, _nibbles(codes)], axis=1)


def q5_k(x: Float[np.ndarray, "B 256"], importance: Importance = None) -> UInt8[np.ndarray, "B 176"]:
    codes, head = _affine_32(x, importance, nmax=31, start=-0.5, steps=15)
    fifth = (codes >> 4).reshape(-1, 8, 32)  # bit j of byte i: element 32 j + i
    plane = np.bitwise_or.reduce(fifth << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return np.concatenate([head, plane, _nibbles(codes & 15)], axis=1)


def q2_k(x: Float[np.ndarray, "B 256"], importance: Importance = None) -> UInt8[np.ndarray, "B 84"]:
    parts = _elements_first(x, 16)
    if importance is None:
        found = scale_search.affine(parts, np.abs(parts), 3, start=-0.5, steps=15, absolute=True)
        (d, s), (dmin, m) = _unsigned(found.scale.reshape(-1, 16), 15), _unsigned(found.floor.reshape(-1, 16), 15)
    else:
        found, d, s, dmin, m = _weighted_affine(parts, _weights(x, importance, 16, 1), 3, 15)
    codes = _affine_codes(parts, found, 3, d, s, dmin, m)
    packed = (s | (m << 4)).astype(np.uint8)
    return np.concatenate([packed, _quarters(codes), _bytes(d), _bytes(dmin)], axis=1)


def q3_k(x: Float[np.ndarray, "B 256"], importance: Importance = None) -> UInt8[np.ndarray, "B 110"]:
    parts = _elements_first(x, 16)
    if importance is None:
        scale, own = scale_search.coordinate_descent(parts, 4)
        d, s = _signed(scale.reshape(-1, 16), 32)
        s = np.minimum(s, 31)
    else:
        weights = _weights(x, importance, 16, 2)
        found = scale_search.symmetric(parts, 4, weights)
        own = _own_codes(parts, found, 4)
        scales = np.ascontiguousarray(found.scale.reshape(-1, 16).T)
        block = scale_search.symmetric(scales, 32, _sums(weights, 16))
        d = block.scale.astype(np.float16)[:, None]
        s = np.clip(np.rint(block.inverse * scales), -32, 31).T.astype(np.int32)
    codes = _symmetric_codes(parts, own, 4, d, s)
    high = (codes > 3).astype(np.uint8).reshape(-1, 8, 32)
    mask = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    u = (s + 32).astype(np.uint8)
    low = (u[:, :8] & 15) | ((u[:, 8:] & 15) << 4)
    top = (u >> 4).reshape(-1, 4, 4)  # bits 2k of byte i: scale 4 k + i
    upper = np.bitwise_or.reduce(top << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=1)
    empty = d[:, 0] == 0
    low[empty], upper[empty] = 0, 0
    return np.concatenate([mask, _quarters(codes & 3), low, upper, _bytes(d)], axis=1)


def q6_k(x: Float[np.ndarray, "B 256"], importance: Importance = None) -> UInt8[np.ndarray, "B 210"]:
    parts = _elements_first(x, 16)
    found = scale_search.symmetric(parts, 32, None if importance is None else _elements_first(importance, 16))
    d, s = _signed(found.scale.reshape(-1, 16), 128, least=1e-15)
    s = np.minimum(s, 127)
    codes = _symmetric_codes(parts, _own_codes(parts, found, 32), 32, d, s).reshape(-1, 2, 4, 32)
    low = codes & 15
    low = np.stack([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], axis=2)
    top = np.bitwise_or.reduce((codes >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2)
    out = [low.reshape(-1, 128), top.reshape(-1, 64), s.astype(np.int8).view(np.uint8), _bytes(d)]
    packed = np.concatenate(out, axis=1)
    packed[d[:, 0] == 0] = 0
    return packed


ENCODERS: dict[str, Callable[..., np.ndarray]] = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def _affine_32(x, importance: Importance, *, nmax: int, start: float, steps: int):
    """Codes [B, 256] and the common head of Q4_K and Q5_K: d, dmin and twelve bytes of 6-bit scales and floors."""
    parts = _elements_first(x, 32)
    if importance is None:
        weights = np.sqrt((parts * parts).sum(0) / _F(32)) + np.abs(parts)
        found = scale_search.affine(parts, weights, nmax, start=start, steps=steps)
        (d, s), (dmin, m) = _unsigned(found.scale.reshape(-1, 8), 63), _unsigned(found.floor.reshape(-1, 8), 63)
    else:
        found, d, s, dmin, m = _weighted_affine(parts, _weights(x, importance, 32, 2), nmax, 63)
    codes = _affine_codes(parts, found, nmax, d, s, dmin, m)
    s, m = s.astype(np.uint8), m.astype(np.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return codes, np.concatenate([_bytes(d), _bytes(dmin), first, second, third], axis=1)


def _weights(x, importance, n: int, factor: int):
    """importance sqrt(factor mean(x^2) + x^2), the mean over the super-block; in the layout of `scale_search`."""
    mean = _F(factor) * np.ascontiguousarray((x * x).T).sum(0) / _F(SUPER_BLOCK)  # summed in order
    return _elements_first(importance * np.sqrt(mean[:, None] + x * x), n)


def _sums(weights, count: int):
    """Of each sub-block, `count` a super-block: [count, B]."""
    return np.ascontiguousarray(weights.sum(0).reshape(-1, count).T)


def _weighted_affine(parts, weights, nmax: int, top: int):
    """The finer search of scales and floors that an importance matrix is worth: (found, d, s, dmin, m)."""
    found = scale_search.affine(parts, weights, nmax, start=-0.9, steps=36, step=0.05)
    count = SUPER_BLOCK // len(parts)
    sums, out = _sums(weights, count), []
    for values in (found.scale, found.floor):
        scale, codes = scale_search.positive(np.ascontiguousarray(values.reshape(-1, count).T), top, sums)
        out += [scale.astype(np.float16)[:, None], codes.T.astype(np.int32)]
    return found, *out


def _own_codes(parts, found: scale_search.Symmetric, nmax: int):
    """The search's codes; the reference leaves stored zeros where all is zero."""
    return np.where(found.scale == 0, _F(-nmax), np.clip(np.rint(parts * found.inverse), -nmax, nmax - 1))


def _elements_first(x, n: int):
    """[B, 256] -> [n, B * 256 / n], the layout of `scale_search`."""
    return np.ascontiguousarray(x.reshape(-1, n).T)


def _in_order(codes, n: int):
    """The inverse, as uint8 [B, 256]."""
    return np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, SUPER_BLOCK)


def _unsigned(values, top: int):
    """(d fp16 [B, 1], integers 0..top [B, S]) with values ~ d * integers; the largest value gets `top`."""
    largest = np.maximum(values.max(1, keepdims=True), 0)
    inverse = np.divide(_F(top), largest, out=np.zeros_like(largest), where=largest > 0)
    return (largest / _F(top)).astype(np.float16), np.clip(np.rint(inverse * values), 0, top).astype(np.int32)


def _signed(values, top: int, least: float = 0.0):
    """(d fp16 [B, 1], integers -top..top [B, S]); the value of largest magnitude gets -top."""
    at = np.abs(values).argmax(1)[:, None]
    extreme = np.take_along_axis(values, at, axis=1)
    some = np.abs(extreme) > least
    inverse = np.divide(_F(-top), extreme, out=np.zeros_like(extreme), where=some)
    d = np.divide(_F(1), inverse, out=np.zeros_like(extreme), where=some)
    return d.astype(np.float16), np.maximum(np.rint(inverse * values), -top).astype(np.int32)


def _affine_codes(parts, found: scale_search.Affine, nmax: int, d, s, dmin, m):
    """Codes for the scales as stored; where the stored scale is 0 any code is right, and the search's stays."""
    n = len(parts)
    step = (d.astype(_F) * s.astype(_F)).reshape(-1)
    floor = (dmin.astype(_F) * m.astype(_F)).reshape(-1)
    none = step == 0
    codes = (parts + floor) / np.where(none, _F(1), step)
    if none.any():
        codes[:, none] = (parts[:, none] - found.low[none]) * found.inverse[none]
    return _in_order(np.clip(np.rint(codes), 0, nmax), n)


def _symmetric_codes(parts, own, nmax: int, d, s):
    """Codes + nmax for the stored scales, uint8 [B, 256]; `own` where the stored scale is 0."""
    step = (d.astype(_F) * s.astype(_F)).reshape(-1)
    none = step == 0
    codes = np.clip(np.rint(parts / np.where(none, _F(1), step)), -nmax, nmax - 1)
    return _in_order(np.where(none, own, codes) + nmax, len(parts))


def _nibbles(codes):
    """Element j of 64 in the low half of byte j, element j + 32 in its high half."""
    pairs = codes.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)


def _quarters(codes):
    """Element 32 k + j of 128 in bits 2 k of byte j."""
    parts = codes.reshape(-1, 2, 4, 32)
    return np.bitwise_or.reduce(parts << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=2).reshape(-1, 64)


def _bytes(d):
    return d.view(np.uint8)
