"""Triton kernels that reduce a group of rows of many features to its moments.

Letters in names: N observations of the group, D features. Four kernels, each of which reads what those before wrote:

    columns    rows that are not finite; per part of the rows and feature: sum, smallest and largest value
    centres    per feature: mean, centre, power of two that scales it
    products   per split of the rows: the upper tiles of Σ(z − c)(z − c)ᵀ, scaled, in float32
    merge      the splits summed, scaled back, moved from the centre to the mean, and merged into the float64 sums

A group has a number, its epoch: flags of earlier groups then need not be cleared.
"""

from __future__ import annotations

import triton
import triton.language as tl

from delve_ray.cuda.arithmetic import (
    FLOAT32_MAX,
    INFINITY,
    centre_of,
    extremes_of,
    feature_offset_of,
    offset_of,
    power_of_two,
    product_of,
    tile_of,
)

# Kernels are not compiled anew for another value of these.
_COLUMNS_SIZES = ["epoch", "inner", "stride_outer"]
_CENTRES_SIZES = ["epoch", "parts", "n", "features", "inner", "stride_outer"]
_PRODUCTS_SIZES = ["epoch", "inner", "stride_outer"]
_MERGE_SIZES = ["old", "new", "tiles", "splits", "features", "height"]


@triton.jit(do_not_specialize=_COLUMNS_SIZES)
def columns(
    source,
    keep,
    bad,
    dirty,
    epoch,
    sums,
    lows,
    highs,
    counts,
    n,
    features,
    inner,
    stride_outer,
    stride_n,
    stride_d,
    rows_each,
    MASKED: tl.constexpr,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per part of `rows_each` rows: how many are to be kept, and their sums, smallest and largest values, (parts, D).

    As if all rows were finite. Those that are not get the group's number, `epoch`, in `bad` (N), and `dirty` gets it.
    """
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_column = (column < features)[None, :]
    first = tl.multiple_of(part * rows_each, 32)
    last = tl.minimum(first + rows_each, n)
    kept_count = 0
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
    low = tl.full([BLOCK_N, BLOCK_D], INFINITY, tl.float32)
    high = tl.full([BLOCK_N, BLOCK_D], -INFINITY, tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < last
        places = (
            offset_of(rows, inner, stride_outer, stride_n, MAP, ALIGN)[:, None]
            + feature_offset_of(column, stride_d, MAP, ALIGN)[None, :]
        )
        x = tl.load(source + places, mask=inside[:, None] & in_column, other=0.0).to(tl.float32)
        kept = inside
        if MASKED:
            kept = kept & (tl.load(keep + rows, mask=inside, other=0) != 0)
            kept_count += tl.sum(kept.to(tl.int32))
        spoilt = (tl.abs(x) <= FLOAT32_MAX) == 0
        if tl.max(spoilt.to(tl.int32)) != 0:
            row_bad = tl.max(spoilt.to(tl.int32), axis=1) != 0
            tl.store(bad + rows, tl.zeros([BLOCK_N], tl.int32) + epoch, mask=row_bad)
            tl.store(dirty, epoch)
        total += tl.where(kept[:, None], x, 0.0).to(tl.float64)
        low, high = extremes_of(low, high, x, kept[:, None])
    out = part * features + column
    tl.store(sums + out, tl.sum(total, axis=0), mask=column < features)
    tl.store(lows + out, tl.min(low, axis=0), mask=column < features)
    tl.store(highs + out, tl.max(high, axis=0), mask=column < features)
    if tl.program_id(1) == 0:
        if MASKED:
            tl.store(counts + part, kept_count)
        else:
            tl.store(counts + part, tl.maximum(last - first, 0))


@triton.jit(do_not_specialize=_CENTRES_SIZES)
def centres(
    source,
    keep,
    bad,
    dirty,
    epoch,
    sums,
    lows,
    highs,
    counts,
    means,
    residuals,
    centre,
    exponents,
    group_count,
    row_count,
    dropped_count,
    parts,
    n,
    features,
    inner,
    stride_outer,
    stride_n,
    stride_d,
    MASKED: tl.constexpr,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Per feature: its mean, the scaled centre, mean − centre, and the exponent by which it is scaled down.

    In a group with rows that are not finite the statistics are taken again, without these.
    """
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < features
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float64)
    low = tl.full([BLOCK_P, BLOCK_D], INFINITY, tl.float32)
    high = tl.full([BLOCK_P, BLOCK_D], -INFINITY, tl.float32)
    good = tl.zeros([BLOCK_P], tl.int32)
    kept = tl.zeros([BLOCK_P], tl.int32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        mask = (part < parts)[:, None] & inside[None, :]
        places = part[:, None] * features + column[None, :]
        total += tl.load(sums + places, mask=mask, other=0.0)
        low = tl.minimum(low, tl.load(lows + places, mask=mask, other=INFINITY))
        high = tl.maximum(high, tl.load(highs + places, mask=mask, other=-INFINITY))
        kept += tl.load(counts + part, mask=part < parts, other=0)
    good = kept
    if tl.load(dirty) == epoch:
        total = tl.zeros([BLOCK_P, BLOCK_D], tl.float64)
        low = tl.full([BLOCK_P, BLOCK_D], INFINITY, tl.float32)
        high = tl.full([BLOCK_P, BLOCK_D], -INFINITY, tl.float32)
        good = tl.zeros([BLOCK_P], tl.int32)
        for start in range(0, n, BLOCK_P):
            rows = start + tl.arange(0, BLOCK_P)
            fine = (rows < n) & (tl.load(bad + rows, mask=rows < n, other=0) != epoch)
            if MASKED:
                fine = fine & (tl.load(keep + rows, mask=rows < n, other=0) != 0)
            good += fine.to(tl.int32)
            places = (
                offset_of(rows, inner, stride_outer, stride_n, MAP, ALIGN)[:, None]
                + feature_offset_of(column, stride_d, MAP, ALIGN)[None, :]
            )
            x = tl.load(source + places, mask=fine[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += x.to(tl.float64)
            low, high = extremes_of(low, high, x, fine[:, None])
    n_good = tl.sum(good)
    mean = tl.sum(total, axis=0) / tl.maximum(n_good, 1).to(tl.float64)
    exponent, scaled = centre_of(mean, tl.min(low, axis=0), tl.max(high, axis=0), n_good > 0, HALF)
    tl.store(centre + column, scaled, mask=inside)
    tl.store(exponents + column, exponent, mask=inside)
    tl.store(means + column, mean, mask=inside)
    tl.store(residuals + column, mean - scaled.to(tl.float64) * power_of_two(exponent), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(group_count, n_good.to(tl.float64))
        tl.store(row_count, tl.load(row_count) + n_good)
        tl.store(dropped_count, tl.load(dropped_count) + (tl.sum(kept) - n_good))


@triton.jit(do_not_specialize=_PRODUCTS_SIZES)
def products(
    source,
    keep,
    bad,
    dirty,
    epoch,
    centre,
    exponents,
    partial,
    n,
    features,
    inner,
    stride_outer,
    stride_n,
    stride_d,
    rows_each,
    zero,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
    MASKED: tl.constexpr,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The tile of this program's number, of this split of the rows; into `partial`, (splits, tiles, BLOCK, BLOCK)."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    i, j = tile_of(tile)
    first = tl.multiple_of(split * rows_each, 32)
    last = tl.minimum(first + rows_each, n)
    left = i * BLOCK + tl.arange(0, BLOCK)
    right = j * BLOCK + tl.arange(0, BLOCK)
    in_left = (left < features)[:, None]
    in_right = (right < features)[None, :]
    exponent_left = tl.load(exponents + left, mask=left < features, other=0)
    exponent_right = tl.load(exponents + right, mask=right < features, other=0)
    centre_left = tl.load(centre + left, mask=left < features, other=0.0)
    centre_right = tl.load(centre + right, mask=right < features, other=0.0)
    clean = tl.load(dirty) != epoch
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    plain = False
    if HALF:
        moved = tl.max(tl.abs(centre_left)) + tl.max(tl.abs(centre_right)) > 0
        scaled = tl.max(tl.abs(exponent_left)) + tl.max(tl.abs(exponent_right)) > 0
        plain = ((moved | scaled) == 0) & clean
    if plain:
        for start in range(first, last, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            inside = rows < last
            if MASKED:
                inside = inside & (tl.load(keep + rows, mask=inside, other=0) != 0)
            places = offset_of(rows, inner, stride_outer, stride_n, MAP, ALIGN)
            a = tl.load(
                source + feature_offset_of(left, stride_d, MAP, ALIGN)[:, None] + places[None, :],
                mask=in_left & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                source + places[:, None] + feature_offset_of(right, stride_d, MAP, ALIGN)[None, :],
                mask=in_right & inside[:, None],
                other=0.0,
            )
            # Starts from a zero that the compiler does not know, or it would sum everything on the tensor cores.
            total += tl.dot(a, b, tl.full([BLOCK, BLOCK], zero, tl.float32))
    else:
        scale_left = power_of_two(-exponent_left).to(tl.float32)[:, None]
        scale_right = power_of_two(-exponent_right).to(tl.float32)[None, :]
        for start in range(first, last, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            inside = rows < last
            fine = inside & (tl.load(bad + rows, mask=inside, other=0) != epoch)
            if MASKED:
                fine = fine & (tl.load(keep + rows, mask=inside, other=0) != 0)
            places = offset_of(rows, inner, stride_outer, stride_n, MAP, ALIGN)
            a = tl.load(
                source + feature_offset_of(left, stride_d, MAP, ALIGN)[:, None] + places[None, :],
                mask=in_left & inside[None, :],
                other=0.0,
            )
            b = tl.load(
                source + places[:, None] + feature_offset_of(right, stride_d, MAP, ALIGN)[None, :],
                mask=in_right & inside[:, None],
                other=0.0,
            )
            a = tl.where(fine[None, :], a.to(tl.float32) * scale_left - centre_left[:, None], 0.0)
            b = tl.where(fine[:, None], b.to(tl.float32) * scale_right - centre_right[None, :], 0.0)
            total += product_of(a, b, zero, PRECISION, BLOCK)
    places = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partial + (split * tl.num_programs(0) + tile).to(tl.int64) * BLOCK * BLOCK + places, total)


@triton.jit(do_not_specialize=_MERGE_SIZES)
def merge(
    partial,
    exponents,
    group_means,
    residuals,
    group_count,
    weight,
    sums,
    counts,
    means,
    old,
    new,
    tiles,
    splits,
    features,
    height,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add a group to the moments whose count and mean are in row `old`; `new` gets those of both together.

    Two rows, as programs that read the old mean run beside those that write the new one.
    """
    cuts: tl.constexpr = BLOCK // BLOCK_M
    tile = tl.program_id(0) // (cuts * cuts)
    cut = tl.program_id(0) % (cuts * cuts)
    i, j = tile_of(tile)
    above = (cut // cuts) * BLOCK_M + tl.arange(0, BLOCK_M)
    beside = (cut % cuts) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = i * BLOCK + above
    columns = j * BLOCK + beside
    count = tl.load(group_count)
    factor = tl.load(weight)
    added = count * factor
    before = tl.load(counts + old)
    after = before + added
    share = tl.where(after > 0, added / tl.where(after > 0, after, 1.0), 0.0)
    in_rows = rows < features
    in_columns = columns < features
    if i * BLOCK + (cut // cuts) * BLOCK_M <= j * BLOCK + (cut % cuts) * BLOCK_M:
        parts = tl.zeros([BLOCK_S, BLOCK_M, BLOCK_M], tl.float64)
        for start in range(0, splits, BLOCK_S):
            split = (start + tl.arange(0, BLOCK_S))[:, None, None]
            places = (split * tiles + tile).to(tl.int64) * BLOCK * BLOCK
            places += above[None, :, None] * BLOCK + beside[None, None, :]
            parts += tl.load(partial + places, mask=split < splits, other=0.0).to(tl.float64)
        total = tl.sum(parts, axis=0)
        up_rows = tl.load(exponents + rows, mask=in_rows, other=0)
        up_columns = tl.load(exponents + columns, mask=in_columns, other=0)
        total *= power_of_two(up_rows)[:, None] * power_of_two(up_columns)[None, :]
        rest_rows = tl.load(residuals + rows, mask=in_rows, other=0.0)
        rest_columns = tl.load(residuals + columns, mask=in_columns, other=0.0)
        total -= count * rest_rows[:, None] * rest_columns[None, :]
        old_rows = tl.load(means + old * features + rows, mask=in_rows, other=0.0)
        old_columns = tl.load(means + old * features + columns, mask=in_columns, other=0.0)
        step_rows = tl.load(group_means + rows, mask=in_rows, other=0.0) - old_rows
        step_columns = tl.load(group_means + columns, mask=in_columns, other=0.0) - old_columns
        total = total * factor + before * share * step_rows[:, None] * step_columns[None, :]
        block = rows // height
        top = block * height
        start = height * (block * features - height * (block * (block - 1) // 2))
        start += (rows - top) * (features - top) - top
        places = sums + start[:, None] + columns[None, :]
        upper = (rows[:, None] <= columns[None, :]) & in_columns[None, :]
        tl.store(places, tl.load(places, mask=upper, other=0.0) + total, mask=upper)
        if (i == j) & (cut % (cuts + 1) == 0):
            tl.store(means + new * features + rows, old_rows + share * step_rows, mask=in_rows)
    if tl.program_id(0) == 0:
        tl.store(counts + new, after)
