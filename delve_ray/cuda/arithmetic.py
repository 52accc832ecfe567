"""What the Triton kernels have in common: powers of two, centres, and products on tensor cores.

**Products.** A scaled and centred float32 value is split into three bfloat16 values, whose products tensor cores form
exactly. Of the nine products of two such values the six that reach 2^-24 of the whole are summed, smallest first, so
that what is small is summed while the sum is small.

Tensor cores truncate when they add, 2^-24 of the sum at each step on average: the products of a few rows are summed
there, and then added by ordinary float32 additions, which round.

Values of half precision that need no centre are multiplied as they are: such products are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
EXACT, TF32, BFLOAT16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def exponent_of(x):
    """⌊log2 x⌋ of a positive normal float64."""
    return (((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023).to(tl.int32)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float64."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def tile_of(index):
    """Row and column, row ≤ column, of the tile of an upper triangle that has this number, column by column."""
    column = ((tl.sqrt((8 * index + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > index, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= index, column + 1, column)
    return index - column * (column + 1) // 2, column


@triton.jit
def round_tf32(x):
    """The nearest value of 11 bits, of two the even one; tensor cores would cut the rest off."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def centre_of(mean, low, high, some, HALF: tl.constexpr):
    """The exponent by which features of these means and extremes are scaled down, and their centres, scaled.

    A centre has few digits: values of few digits, as half precision has far from zero, then differ from it by few
    digits, too, and sums of their products are exact, where an arbitrary one makes them round alike at every step. A
    feature that does not vary is its own centre, so that its variance is 0.
    """
    least = tl.where(some, low, 0.0).to(tl.float64)
    most = tl.where(some, high, 0.0).to(tl.float64)
    largest = tl.maximum(tl.abs(least), tl.abs(most))
    spread = most - least
    grid = power_of_two(tl.maximum(exponent_of(spread), -900) - 6)
    centre = tl.where(spread > 0, tl.floor(mean / grid + 0.5) * grid, least)
    exponent = tl.where(largest > 0, exponent_of(largest) + 1, 0)
    exponent = tl.minimum(tl.maximum(exponent, -100), 126)
    if HALF:  # near enough to zero, and neither too large nor too small to be squared
        plain = (tl.abs(mean) * 12 <= spread) & (largest < 1.1e15) & ((largest > 1e-12) | (largest == 0))
        centre = tl.where(plain, 0.0, centre)
        exponent = tl.where(plain, 0, exponent)
    return exponent, (centre * power_of_two(-exponent)).to(tl.float32)


@triton.jit
def product_of(a, b, zero, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """a·b of scaled and centred float32 values, summed over few rows."""
    if PRECISION == EXACT:
        a_hi = a.to(tl.bfloat16)
        b_hi = b.to(tl.bfloat16)
        a_rest = a - a_hi.to(tl.float32)
        b_rest = b - b_hi.to(tl.float32)
        a_mid = a_rest.to(tl.bfloat16)
        b_mid = b_rest.to(tl.bfloat16)
        part = tl.dot((a_rest - a_mid.to(tl.float32)).to(tl.bfloat16), b_hi)
        part = tl.dot(a_hi, (b_rest - b_mid.to(tl.float32)).to(tl.bfloat16), part)
        part = tl.dot(a_mid, b_mid, part)
        part = tl.dot(a_mid, b_hi, part)
        part = tl.dot(a_hi, b_mid, part)
        part = tl.dot(a_hi, b_hi, part)
    elif PRECISION == TF32:
        # Starts from a zero that the compiler does not know, or it would sum everything on the tensor cores.
        known = tl.full([BLOCK, BLOCK], zero, tl.float32)
        part = tl.dot(round_tf32(a), round_tf32(b), known, input_precision="tf32")
    else:
        known = tl.full([BLOCK, BLOCK], zero, tl.float32)
        part = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), known)
    return part


@triton.jit
def offset_of(rows, inner, stride_outer, stride_n, MAP: tl.constexpr, ALIGN: tl.constexpr):
    """Where rows begin: in a feature map, N = outer·inner, or one after another."""
    if MAP:
        places = (rows // inner) * stride_outer + (rows % inner) * stride_n
        # So many rows that follow each other lie side by side.
        return tl.max_contiguous(tl.multiple_of(places, ALIGN), ALIGN)
    return rows * stride_n


@triton.jit
def feature_offset_of(columns, stride_d, MAP: tl.constexpr, ALIGN: tl.constexpr):
    """Where features begin."""
    if MAP:
        return tl.multiple_of(columns * stride_d, ALIGN)
    return columns * stride_d


@triton.jit
def extremes_of(low, high, x, fine):
    """Element by element the smaller and the larger of what there was and of x, where it counts."""
    return tl.minimum(low, tl.where(fine, x, INFINITY)), tl.maximum(high, tl.where(fine, x, -INFINITY))
