"""The delta product on GPUs: two Triton kernels over the buffers of `slots.py`, each for few and for many rows of a delta.

`shrink` computes V^T x of every piece, `expand` adds U of it to the linear's output. Both load bits and values and put them in
place in registers, against contiguous inputs, so one form serves both sizes:
  few rows (decode)   tiles of 16 rows, inputs cut into parts that run side by side and are summed in order; fp32 products
  many rows (prefill) tiles of 64 rows; tensor cores for bf16 models, where V^T x and fp32 values are sums of two bf16 numbers
Grids depend on shapes alone. A program without work reads its tile's slot, -1, and ends.

Legend: t rows of a tile, o outputs (k: those of V^T, a piece's ranks), p positions along the inputs.
"""

import triton
import triton.language as tl

from compressors.kernels import forms, masked

FIELDS = tl.constexpr(masked.FIELDS)
OUT_OFFSET, OUT_FEATURES = tl.constexpr(masked.OUT_OFFSET), tl.constexpr(masked.OUT_FEATURES)
RANK, H_OFFSET = tl.constexpr(masked.RANK), tl.constexpr(masked.H_OFFSET)
KIND, ROLE, SCALE = tl.constexpr(masked.KIND), tl.constexpr(masked.ROLE), tl.constexpr(masked.SCALE)
U_MASKS, U_STARTS = tl.constexpr(masked.U_MASKS), tl.constexpr(masked.U_STARTS)
V_MASKS, V_STARTS = tl.constexpr(masked.V_MASKS), tl.constexpr(masked.V_STARTS)
U_VALUES, V_VALUES = tl.constexpr(masked.U_VALUES), tl.constexpr(masked.V_VALUES)
INT8, BF16, FP32 = tl.constexpr(forms.INT8), tl.constexpr(forms.BF16), tl.constexpr(forms.FP32)
ON_INPUT, ON_OUTPUT = tl.constexpr(masked.ON_INPUT), tl.constexpr(masked.ON_OUTPUT)


@triton.jit
def _weights(masks, values, kind, start, o, o_live, p, inputs):
    """A dense tile [o, p] in fp32, and where the values of each output go on. `start` [o]: its first value in this tile."""
    byte = tl.load(
        masks.to(tl.pointer_type(tl.uint8)) + o.to(tl.int64)[:, None] * ((inputs + 7) // 8) + (p // 8)[None, :],
        mask=o_live[:, None] & (p < inputs)[None, :],
        other=0,
    )
    bit = (byte.to(tl.int32) >> (p % 8)[None, :]) & 1
    at = start[:, None] + tl.cumsum(bit, axis=1) - bit
    if kind == INT8:
        w = tl.load(values.to(tl.pointer_type(tl.int8)) + at, mask=bit != 0, other=0).to(tl.float32)
    elif kind == BF16:
        w = tl.load(values.to(tl.pointer_type(tl.bfloat16)) + at, mask=bit != 0, other=0.0).to(tl.float32)
    else:
        w = tl.load(values.to(tl.pointer_type(tl.float32)) + at, mask=bit != 0, other=0.0)
    return w, start + tl.sum(bit, axis=1)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b of bf16 numbers."""
    # Interpreted, bits of bf16 would be multiplied as integers.
    wide = tl.float32 if INTERPRETED else tl.bfloat16
    return tl.dot(a.to(wide), b.to(wide), acc, input_precision="ieee")


@triton.jit
def _add_product(acc, z, w, kind, FAST: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc [t, o] + z [t, p] w [o, p]^T. FAST: what is not bf16 as it is, as the sum of two bf16 numbers, on tensor cores."""
    if FAST:
        high, wt = z.to(tl.bfloat16), tl.trans(w)
        wt_high = wt.to(tl.bfloat16)
        acc = _dot(high, wt_high, acc, INTERPRETED)
        if z.dtype != tl.bfloat16:
            acc = _dot((z - high.to(tl.float32)).to(tl.bfloat16), wt_high, acc, INTERPRETED)
        if kind == FP32:
            acc = _dot(high, (wt - wt_high.to(tl.float32)).to(tl.bfloat16), acc, INTERPRETED)
    else:
        acc = tl.dot(z, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _rows_of_tile(tiles, rows, BLOCK_T: tl.constexpr):
    """(places in this program's tile, which of them are taken, their rows of x and y)."""
    t = tl.arange(0, BLOCK_T)
    live = t < tl.load(tiles + 3 * tl.program_id(0) + 2)
    row = tl.load(rows + tl.load(tiles + 3 * tl.program_id(0) + 1) + t, mask=live, other=0).to(tl.int64)
    return t, live, row


@triton.jit
def shrink(
    x, x_stride, h, h_rows, max_rank, inputs, part_width, num_parts, fields, weights, counts, rows, tiles,
    PIECES: tl.constexpr, PROGRAMS: tl.constexpr, FAST: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """h [part, tile's row, k] = coef_k V_k^T x over one part of the inputs. Grid: (tiles, parts, programs along the ranks)."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    if slot < 0:
        return
    t, live, row = _rows_of_tile(tiles, rows, BLOCK_T)
    part = tl.program_id(1)
    h_row = (part * h_rows + tl.program_id(0) * BLOCK_T + t).to(tl.int64)
    end = tl.minimum((part + 1) * part_width, inputs)
    for i in range(tl.load(counts + slot)):
        piece = fields + (slot * PIECES + i) * FIELDS
        rank = tl.load(piece + RANK).to(tl.int32)
        masks, values = tl.load(piece + V_MASKS), tl.load(piece + V_VALUES)
        starts = tl.load(piece + V_STARTS).to(tl.pointer_type(tl.int32))
        coef = tl.load(piece + SCALE).to(tl.pointer_type(tl.float32))
        h_offset = tl.load(piece + H_OFFSET)
        kind = tl.load(piece + KIND)
        for block in range(tl.program_id(2), tl.cdiv(rank, BLOCK_O), PROGRAMS):
            k = block * BLOCK_O + tl.arange(0, BLOCK_O)
            start = tl.load(starts + k * num_parts + part, mask=k < rank, other=0)
            acc = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
            for p0 in range(part * part_width, end, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                w, start = _weights(masks, values, kind, start, k, k < rank, p, inputs)
                at = row[:, None] * x_stride + p[None, :]
                z = tl.load(x + at, mask=live[:, None] & (p < inputs)[None, :], other=0.0)
                acc = _add_product(acc, z if FAST else z.to(tl.float32), w, kind, FAST, INTERPRETED)
            acc *= tl.load(coef + k, mask=k < rank, other=0.0)[None, :]
            at = h_row[:, None] * max_rank + (h_offset + k)[None, :]
            tl.store(h + at, acc, mask=live[:, None] & (k < rank)[None, :])


@triton.jit
def expand(
    y, y_stride, x, x_stride, h, h_rows, max_rank, inputs, num_parts, fields, weights, counts, rows, tiles,
    PIECES: tl.constexpr, FAST: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y += every piece's U h, or its matrix times x, for the rows of a tile. Grid: (tiles, blocks of the linear's outputs)."""
    slot = tl.load(tiles + 3 * tl.program_id(0))
    if slot < 0:
        return
    t, live, row = _rows_of_tile(tiles, rows, BLOCK_T)
    h_row = (tl.program_id(0) * BLOCK_T + t).to(tl.int64)
    first = tl.program_id(1) * BLOCK_O
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    touched = tl.zeros((BLOCK_O,), dtype=tl.int32)
    for i in range(tl.load(counts + slot)):
        piece = fields + (slot * PIECES + i) * FIELDS
        offset, size = tl.load(piece + OUT_OFFSET).to(tl.int32), tl.load(piece + OUT_FEATURES).to(tl.int32)
        if (first < offset + size) & (first + BLOCK_O > offset):
            o = first + tl.arange(0, BLOCK_O) - offset
            o_live = (o >= 0) & (o < size)
            if tl.load(piece + RANK) > 0:
                acc = _from_h(h, h_row, h_rows, live, max_rank, num_parts, piece, o, o_live, FAST, INTERPRETED, BLOCK_P)
            else:
                acc = _from_x(x, row * x_stride, live, inputs, piece, o, o_live, FAST, INTERPRETED, BLOCK_P)
            total += acc * tl.load(weights + slot * PIECES + i)
            touched += o_live.to(tl.int32)
    at = row[:, None] * y_stride + (first + tl.arange(0, BLOCK_O))[None, :]
    mine = live[:, None] & (touched > 0)[None, :]
    tl.store(y + at, tl.load(y + at, mask=mine, other=0.0).to(tl.float32) + total, mask=mine)


@triton.jit
def _from_h(
    h, h_row, h_rows, live, max_rank, num_parts, piece, o, o_live,
    FAST: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """U h [t, o] of one piece; the parts of h are summed in order."""
    acc = tl.zeros((h_row.shape[0], o.shape[0]), dtype=tl.float32)
    rank = tl.load(piece + RANK).to(tl.int32)
    h_offset = tl.load(piece + H_OFFSET)
    masks, values, kind = tl.load(piece + U_MASKS), tl.load(piece + U_VALUES), tl.load(piece + KIND)
    start = tl.load(tl.load(piece + U_STARTS).to(tl.pointer_type(tl.int32)) + o, mask=o_live, other=0)
    for p0 in range(0, rank, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        w, start = _weights(masks, values, kind, start, o, o_live, p, rank)
        z = tl.zeros((h_row.shape[0], BLOCK_P), dtype=tl.float32)
        for part in range(num_parts):
            at = (h_row + part * h_rows)[:, None] * max_rank + (h_offset + p)[None, :]
            z += tl.load(h + at, mask=live[:, None] & (p < rank)[None, :], other=0.0)
        acc = _add_product(acc, z, w, kind, FAST, INTERPRETED)
    return acc


@triton.jit
def _from_x(
    x, x_at, live, inputs, piece, o, o_live,
    FAST: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The product [t, o] of x with a piece that is one matrix, scaled along its inputs or its outputs."""
    acc = tl.zeros((x_at.shape[0], o.shape[0]), dtype=tl.float32)
    masks, values, kind = tl.load(piece + U_MASKS), tl.load(piece + U_VALUES), tl.load(piece + KIND)
    scale, role = tl.load(piece + SCALE).to(tl.pointer_type(tl.float32)), tl.load(piece + ROLE)
    start = tl.load(tl.load(piece + U_STARTS).to(tl.pointer_type(tl.int32)) + o, mask=o_live, other=0)
    for p0 in range(0, inputs, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        w, start = _weights(masks, values, kind, start, o, o_live, p, inputs)
        z = tl.load(x + x_at[:, None] + p[None, :], mask=live[:, None] & (p < inputs)[None, :], other=0.0)
        z = z.to(tl.float32)
        if role == ON_INPUT:
            z *= tl.load(scale + p, mask=p < inputs, other=0.0)[None, :]
        acc = _add_product(acc, z, w, kind, FAST, INTERPRETED)
    if role == ON_OUTPUT:
        acc *= tl.load(scale + o, mask=o_live, other=0.0)[None, :]
    return acc
