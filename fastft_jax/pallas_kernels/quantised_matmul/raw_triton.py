"""The two kernels in raw Triton. Imports triton.

Up to 4 rows it is `few_rows`, line by line. Above, the table is in a warp's registers and a look-up one shuffle: lane l
of every warp holds value l mod 16 of the NF4 table, so `shfl.sync.idx` by the low bits of a word returns the value of
its low code, for of the index a shuffle reads only five bits, of which the table ignores the fifth.
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
def _half_blocks(row, first, N: tl.constexpr, K: tl.constexpr, BLOCKS: tl.constexpr):
    """[rows, 2 BLOCKS] numbers of blocks in the matrix, each twice; outside it, those of some others."""
    block = first + tl.arange(0, BLOCKS * 2) // 2
    group = row[:, None] * (K // 64) + block[None, :]
    if N % row.shape[0] != 0 or K // 64 % BLOCKS != 0:
        group = tl.where((row < N)[:, None] & (block < K // 64)[None, :], group, 0)
    return group


@triton.jit
def vector_kernel(
    look_up_ptr, planes_ptr, step_ptr, layer_ptr, codes_ptr, absmax_ptr, map_ptr, scale_ptr, offset_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, DOUBLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, MULTIPLY: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum over half blocks of absmax times x's step times the integer sum; x as `few_rows.quantise_x`'s."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCKS * 2)
    t0, t1 = tl.load(look_up_ptr + lane)[None, :], tl.load(look_up_ptr + BLOCKS * 2 + lane)[None, :]
    t2, t3 = tl.load(look_up_ptr + BLOCKS * 4 + lane)[None, :], tl.load(look_up_ptr + BLOCKS * 6 + lane)[None, :]
    layer = tl.load(layer_ptr).to(tl.int64)
    sums = (tl.zeros([ROWS, BLOCKS * 2], tl.float32),) * M
    for first in tl.range(0, K // 64, BLOCKS, num_stages=1):
        words = _words(codes_ptr, layer, row, first, N, K, BLOCKS).reshape([ROWS, BLOCKS * 2, 2, 2])
        w02, w13 = tl.split(words)
        w0, w2 = tl.split(w02)
        w1, w3 = tl.split(w13)
        group = _half_blocks(row, first, N, K, BLOCKS)
        absmax = tl.load(absmax_ptr + layer * (N * (K // 64)) + group)
        tl.debug_barrier()  # or the assembler delays half of the loads, to save registers
        if DOUBLE:
            scale = tl.load(scale_ptr + layer * ((N * (K // 64) + 255) // 256) + (group >> 8))
            absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr + layer)
        half = first * 2 + lane
        inside = half < K // 32
        more = ()
        for m in tl.static_range(M):
            x = ()
            for p in tl.static_range(17):
                x = x + (tl.load(planes_ptr + (m * 17 + p) * (K // 32) + half, mask=inside, other=0)[None, :],)
            total = tl.inline_asm_elementwise(
                MULTIPLY, CONSTRAINTS,
                [w0, w1, w2, w3, x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12],
                 x[13], x[14], x[15], x[16], t0, t1, t2, t3],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
            step = tl.load(step_ptr + m * (K // 32) + half, mask=inside, other=0.0)[None, :]
            more = more + (sums[m] + total.to(tl.float32) * step * absmax,)
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
