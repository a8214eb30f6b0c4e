"""The two kernels in raw Triton, with the table in a warp's registers: a lookup is one shuffle. Imports triton.

Lane l of every warp holds value l mod 16 of the NF4 table, so `shfl.sync.idx` by the low bits of a word returns the
value of its low code: of the index a shuffle reads only five bits, of which the table ignores the fifth, so a weight
costs a shift, a shuffle and a multiply-add. By NVIDIA's table a multiprocessor shuffles 32 lanes a clock: at 1.7 GHz
an H200 could look up 3.6 TB/s of codes, not far below what its memory delivers.
"""

import triton
import triton.language as tl

_LOOK_UP = tl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;")
_TABLE_OF_LANE = tl.constexpr(
    """{
    .reg .b32 lane;
    .reg .b64 address;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 address, lane, 4, $1;
    ld.global.nc.b32 $0, [address];
    }"""
)


@triton.jit
def _table_of_lane(table_ptr):
    """A scalar that differs from lane to lane, which only `_look_up` may use."""
    address = table_ptr.to(tl.int64)
    return tl.inline_asm_elementwise(_TABLE_OF_LANE, "=r,l", [address], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _look_up(table, words):
    return tl.inline_asm_elementwise(_LOOK_UP, "=r,r,r", [table, words], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _words(codes_ptr, layer, row, first, N: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr):
    """[rows, 8 BLOCKS] words of eight codes, zero outside the matrix."""
    word = first * 8 + tl.arange(0, BLOCKS * 8)
    matrix = codes_ptr.to(tl.pointer_type(tl.int32)) + layer * (N * (K // 8))
    at = matrix + row[:, None] * (K // 8) + word[None, :]
    return tl.load(at, mask=(row < N)[:, None] & (word < K // 8)[None, :], other=0)


@triton.jit
def _absmax(absmax_ptr, map_ptr, scale_ptr, offset_ptr, layer, row, first, N: tl.constexpr, K: tl.constexpr,
            BLOCKS: tl.constexpr, DOUBLE: tl.constexpr):  # fmt: skip
    """[rows, BLOCKS] absmax in float32; what it is outside the matrix is multiplied with zeros."""
    block = first + tl.arange(0, BLOCKS)
    inside = (row < N)[:, None] & (block < K // 64)[None, :]
    group = row[:, None] * (K // 64) + block[None, :]
    absmax = tl.load(absmax_ptr + layer * (N * (K // 64)) + group, mask=inside, other=0)
    if DOUBLE:
        scales: tl.constexpr = (N * (K // 64) + 255) // 256
        scale = tl.load(scale_ptr + layer * scales + group // 256, mask=inside, other=0.0)
        absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr + layer)
    return absmax


@triton.jit
def vector_kernel(
    x_ptr, table_ptr, layer_ptr, codes_ptr, absmax_ptr, map_ptr, scale_ptr, offset_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, DOUBLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over blocks of absmax times the block's sum of x[m] times its codes, in float32; x as planes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    table = _table_of_lane(table_ptr)
    layer = tl.load(layer_ptr).to(tl.int64)
    sums = (tl.zeros([ROWS, BLOCKS], tl.float32),) * M
    for first in tl.range(0, K // 64, BLOCKS, num_stages=1):
        words = _words(codes_ptr, layer, row, first, N, K, BLOCKS)
        absmax = _absmax(absmax_ptr, map_ptr, scale_ptr, offset_ptr, layer, row, first, N, K, BLOCKS, DOUBLE)
        word = first * 8 + tl.arange(0, BLOCKS * 8)
        partial = (tl.zeros([ROWS, BLOCKS * 8], tl.float32),) * M
        for p in tl.static_range(8):
            value = _look_up(table, words >> (4 + 8 * (p % 4) - 4 * (p // 4)))
            more = ()
            for m in tl.static_range(M):
                x = tl.load(x_ptr + (p * M + m) * (K // 8) + word, mask=word < K // 8, other=0.0)
                more = more + (partial[m] + value * x.to(tl.float32)[None, :],)
            partial = more
        more = ()
        for m in tl.static_range(M):
            more = more + (sums[m] + tl.sum(partial[m].reshape([ROWS, BLOCKS, 8]), axis=2) * absmax,)
        sums = more
    for m in tl.static_range(M):
        tl.store(out_ptr + m * N + row, tl.sum(sums[m], axis=1).to(out_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def _decode_four(table, words, absmax, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Codes p, p + 4, p + 2, p + 6 of every word, as the two inner of three binary axes (`SHIFT` is code p's)."""
    w0 = (_look_up(table, words >> SHIFT) * absmax).to(dtype)
    w4 = (_look_up(table, words >> (SHIFT - 4)) * absmax).to(dtype)
    w2 = (_look_up(table, words >> (SHIFT + 16)) * absmax).to(dtype)
    w6 = (_look_up(table, words >> (SHIFT + 12)) * absmax).to(dtype)
    return tl.join(tl.join(w0, w4), tl.join(w2, w6))


@triton.jit
def dot_kernel(
    x_ptr, table_ptr, layer_ptr, codes_ptr, absmax_ptr, map_ptr, scale_ptr, offset_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, DOUBLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, PADDED_M: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[s, m, n]: float32 sum over part s of K of x times W rounded to x's type; x interleaved like the codes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, PADDED_M)
    table = _table_of_lane(table_ptr)
    layer = tl.load(layer_ptr).to(tl.int64)
    begin = tl.program_id(1) * STEPS * BLOCKS
    total = tl.zeros([ROWS, PADDED_M], tl.float32)
    for first in tl.range(begin, begin + STEPS * BLOCKS, BLOCKS, num_stages=STAGES):
        words = _words(codes_ptr, layer, row, first, N, K, BLOCKS)
        k = first * 64 + tl.arange(0, BLOCKS * 64)
        x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        absmax = _absmax(absmax_ptr, map_ptr, scale_ptr, offset_ptr, layer, row, first, N, K, BLOCKS, DOUBLE)
        absmax = tl.broadcast_to(absmax[:, :, None], [ROWS, BLOCKS, 8]).reshape([ROWS, BLOCKS * 8])
        even = _decode_four(table, words, absmax, 4, x_ptr.dtype.element_ty)
        odd = _decode_four(table, words, absmax, 12, x_ptr.dtype.element_ty)
        total = tl.dot(tl.join(even, odd).reshape([ROWS, BLOCKS * 64]), x, total)
    out = out_ptr + tl.program_id(1) * M * N + m[None, :] * N + row[:, None]
    tl.store(out, total, mask=(row < N)[:, None] & (m < M)[None, :])
