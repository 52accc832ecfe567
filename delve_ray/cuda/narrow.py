"""Triton kernels for rows of up to 128 features, which one program can see whole. Letters: N observations, D features.

    reduce   per split of the rows: which count, their means and centres, and Σ(z − c)(z − c)ᵀ, scaled
    merge    the splits moved to their common mean, summed, and merged into the float64 sums

`reduce` reads rows once and tries the centres and scales that the group before had, at first none. What that gives is
right where every feature is finite, near enough to its centre and of a size that float32 squares well; where it is
not, the program takes its own centres and starts again. Rows may lie in a feature map, N = outer·inner: this kernel
also reads a layer's output where it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from delve_ray.cuda.arithmetic import (
    EXACT,
    FLOAT32_MAX,
    INFINITY,
    centre_of,
    extremes_of,
    feature_offset_of,
    offset_of,
    power_of_two,
    product_of,
)

# Kernels are not compiled anew for another value of these.
_REDUCE_SIZES = ["inner", "stride_outer"]
_MERGE_SIZES = ["old", "new", "splits", "features", "height"]


@triton.jit
def _is_sound(total, peak, product, n, BLOCK: tl.constexpr):
    """Whether all features of a sum about tried centres are finite, near their centre and neither huge nor tiny."""
    index = tl.arange(0, BLOCK)
    square = tl.sum(tl.where(index[:, None] == index[None, :], product, 0.0), axis=1)
    offset = total / tl.maximum(n, 1).to(tl.float32)
    near = offset * offset <= 0.5 * square / tl.maximum(n, 1).to(tl.float32)
    sized = (peak == 0) | ((peak > 1e-12) & (peak < 1.1e15))
    return tl.min((near & sized & (square <= FLOAT32_MAX)).to(tl.int32)) != 0


@triton.jit
def _pass(
    source,
    keep,
    good,
    centre,
    exponent,
    plain,
    CHECKED: tl.constexpr,
    first,
    last,
    features,
    inner,
    stride_outer,
    stride_n,
    stride_d,
    zero,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
    MASKED: tl.constexpr,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Products about these centres, the sums and the largest sizes of the centred values, and the number of rows.

    All rows to be kept count; CHECKED: those that are `good`. `plain`: without centre and scale, products as they are.
    """
    column = tl.arange(0, BLOCK)
    in_column = (column < features)[:, None]
    scale = power_of_two(-exponent).to(tl.float32)[:, None]
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    across = tl.zeros([BLOCK, BLOCK], tl.float32)
    totals = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    peaks = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    counts = tl.zeros([BLOCK_N], tl.int32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        fine = rows < last
        places = offset_of(rows, inner, stride_outer, stride_n, MAP, ALIGN)
        x = tl.load(
            source + feature_offset_of(column, stride_d, MAP, ALIGN)[:, None] + places[None, :],
            mask=in_column & fine[None, :],
            other=0.0,
        )
        if CHECKED:
            fine = tl.load(good + rows, mask=fine, other=0) != 0
        elif MASKED:
            fine = fine & (tl.load(keep + rows, mask=fine, other=0) != 0)
        counts += fine.to(tl.int32)
        a = tl.where(fine[None, :], x.to(tl.float32) * scale - centre[:, None], 0.0)
        totals += a
        peaks = tl.maximum(peaks, tl.abs(a))
        if HALF and plain:
            if MASKED:
                x = tl.where(fine[None, :], x, 0.0)
            # Starts from a zero that the compiler does not know, or it would sum everything on the tensor cores.
            product += tl.dot(x, tl.trans(x), tl.full([BLOCK, BLOCK], zero, tl.float32))
        elif PRECISION == EXACT:
            # As `product_of`; of a square the products that are small come in pairs, and one of each is enough.
            high = a.to(tl.bfloat16)
            rest = a - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            across = tl.dot((rest - middle.to(tl.float32)).to(tl.bfloat16), tl.trans(high), across)
            across = tl.dot(middle, tl.trans(high), across)
            part = tl.dot(middle, tl.trans(middle))
            product += tl.dot(high, tl.trans(high), part)
        else:
            product += product_of(a, tl.trans(a), zero, PRECISION, BLOCK)
    if PRECISION == EXACT:
        product += across + tl.trans(across)
    return product, tl.sum(totals, axis=1), tl.max(peaks, axis=1), tl.sum(counts)


@triton.jit(do_not_specialize=_REDUCE_SIZES)
def reduce(
    source,
    keep,
    good,
    partial,
    counts,
    means,
    residuals,
    exponents,
    hint_centres,
    hint_exponents,
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
    """One split: `partial` is (splits, BLOCK, BLOCK), `counts` (splits, 2) of good rows and of others to be kept.

    Means, residuals (mean − centre) and exponents are (splits, D).
    """
    split = tl.program_id(0)
    first = tl.multiple_of(split * rows_each, 32)
    last = tl.minimum(first + rows_each, n)
    column = tl.arange(0, BLOCK)
    in_column = (column < features)[:, None]
    exponent = tl.load(hint_exponents + column, mask=column < features, other=0)
    centre = tl.load(hint_centres + column, mask=column < features, other=0.0)
    plain = False
    if HALF:
        plain = tl.max(tl.abs(centre)) + tl.max(tl.abs(exponent)).to(tl.float32) == 0
    product, total, peak, kept_count = _pass(
        source,
        keep,
        good,
        centre,
        exponent,
        plain,
        False,
        first,
        last,
        features,
        inner,
        stride_outer,
        stride_n,
        stride_d,
        zero,
        PRECISION,
        HALF,
        MASKED,
        MAP,
        ALIGN,
        BLOCK,
        BLOCK_N,
    )
    good_count = kept_count
    mean = (total.to(tl.float64) / tl.maximum(kept_count, 1).to(tl.float64) + centre.to(tl.float64)) * power_of_two(
        exponent
    )
    if _is_sound(total, peak, product, kept_count, BLOCK) == 0:
        sums = tl.zeros([BLOCK, BLOCK_N], tl.float64)
        low = tl.full([BLOCK, BLOCK_N], INFINITY, tl.float32)
        high = tl.full([BLOCK, BLOCK_N], -INFINITY, tl.float32)
        good_count = 0
        for start in range(first, last, BLOCK_N):
            rows = start + tl.arange(0, BLOCK_N)
            inside = rows < last
            places = offset_of(rows, inner, stride_outer, stride_n, MAP, ALIGN)
            x = tl.load(
                source + feature_offset_of(column, stride_d, MAP, ALIGN)[:, None] + places[None, :],
                mask=in_column & inside[None, :],
                other=0.0,
            )
            x = x.to(tl.float32)
            fine = inside & (tl.max((tl.abs(x) <= FLOAT32_MAX).to(tl.int32) ^ 1, axis=0) == 0)
            if MASKED:
                fine = fine & (tl.load(keep + rows, mask=inside, other=0) != 0)
            good_count += tl.sum(fine.to(tl.int32))
            tl.store(good + rows, fine.to(tl.int8), mask=inside)
            sums += tl.where(fine[None, :], x, 0.0).to(tl.float64)
            low, high = extremes_of(low, high, x, fine[None, :])
        mean = tl.sum(sums, axis=1) / tl.maximum(good_count, 1).to(tl.float64)
        exponent, centre = centre_of(mean, tl.min(low, axis=1), tl.max(high, axis=1), good_count > 0, HALF)
        tl.debug_barrier()  # `good` is read by other threads than wrote it
        product, total, peak, _ = _pass(
            source,
            keep,
            good,
            centre,
            exponent,
            False,
            True,
            first,
            last,
            features,
            inner,
            stride_outer,
            stride_n,
            stride_d,
            zero,
            PRECISION,
            HALF,
            MASKED,
            MAP,
            ALIGN,
            BLOCK,
            BLOCK_N,
        )
    out = split * features + column
    tl.store(means + out, mean, mask=column < features)
    tl.store(residuals + out, mean - centre.to(tl.float64) * power_of_two(exponent), mask=column < features)
    tl.store(exponents + out, exponent, mask=column < features)
    tl.store(counts + 2 * split, good_count)
    tl.store(counts + 2 * split + 1, kept_count - good_count)
    tl.store(partial + split * BLOCK * BLOCK + column[:, None] * BLOCK + column[None, :], product)


@triton.jit(do_not_specialize=_MERGE_SIZES)
def merge(
    partial,
    counts,
    group_means,
    residuals,
    exponents,
    weight,
    hint_centres,
    hint_exponents,
    row_count,
    dropped_count,
    sums,
    totals,
    means,
    old,
    new,
    splits,
    features,
    height,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add the splits to the moments whose count and mean are in row `old`; `new` gets those of both together.

    Two rows, as programs that read the old mean run beside those that write the new one.
    """
    cuts: tl.constexpr = BLOCK // BLOCK_M
    i = tl.program_id(0) // cuts
    j = tl.program_id(0) % cuts
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = j * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < features
    in_columns = columns < features
    if (i <= j) & (j * BLOCK_M < features):
        count = tl.zeros([BLOCK_S], tl.int32)
        dropped = tl.zeros([BLOCK_S], tl.int32)
        mean_rows = tl.zeros([BLOCK_S, BLOCK_M], tl.float64)
        mean_columns = tl.zeros([BLOCK_S, BLOCK_M], tl.float64)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            there = split < splits
            n = tl.load(counts + 2 * split, mask=there, other=0)
            count += n
            dropped += tl.load(counts + 2 * split + 1, mask=there, other=0)
            base = (split * features)[:, None]
            part = tl.load(group_means + base + rows[None, :], mask=there[:, None] & in_rows[None, :], other=0.0)
            mean_rows += n.to(tl.float64)[:, None] * part
            part = tl.load(group_means + base + columns[None, :], mask=there[:, None] & in_columns[None, :], other=0.0)
            mean_columns += n.to(tl.float64)[:, None] * part
        group = tl.sum(count).to(tl.float64)
        mean_row = tl.sum(mean_rows, axis=0) / tl.maximum(group, 1.0)
        mean_column = tl.sum(mean_columns, axis=0) / tl.maximum(group, 1.0)
        total = tl.zeros([BLOCK_S, BLOCK_M, BLOCK_M], tl.float64)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)
            there = split < splits
            n = tl.load(counts + 2 * split, mask=there, other=0).to(tl.float64)[:, None]
            base = (split * features)[:, None]
            mask_rows = there[:, None] & in_rows[None, :]
            mask_columns = there[:, None] & in_columns[None, :]
            places = split[:, None, None] * BLOCK * BLOCK
            places += rows[None, :, None] * BLOCK + columns[None, None, :]
            part = tl.load(partial + places, mask=there[:, None, None], other=0.0).to(tl.float64)
            up_rows = power_of_two(tl.load(exponents + base + rows[None, :], mask=mask_rows, other=0))
            up_columns = power_of_two(tl.load(exponents + base + columns[None, :], mask=mask_columns, other=0))
            part = part * up_rows[:, :, None] * up_columns[:, None, :]
            rest_rows = tl.load(residuals + base + rows[None, :], mask=mask_rows, other=0.0)
            rest_columns = tl.load(residuals + base + columns[None, :], mask=mask_columns, other=0.0)
            part -= (n * rest_rows)[:, :, None] * rest_columns[:, None, :]
            step_rows = tl.load(group_means + base + rows[None, :], mask=mask_rows, other=0.0) - mean_row[None, :]
            step_columns = tl.load(group_means + base + columns[None, :], mask=mask_columns, other=0.0)
            step_columns -= mean_column[None, :]
            total += part + (n * step_rows)[:, :, None] * step_columns[:, None, :]
        factor = tl.load(weight)
        added = group * factor
        before = tl.load(totals + old)
        after = before + added
        share = tl.where(after > 0, added / tl.where(after > 0, after, 1.0), 0.0)
        old_rows = tl.load(means + old * features + rows, mask=in_rows, other=0.0)
        old_columns = tl.load(means + old * features + columns, mask=in_columns, other=0.0)
        step_row = mean_row - old_rows
        step_column = mean_column - old_columns
        scatter = tl.sum(total, axis=0) * factor + (before * share * step_row)[:, None] * step_column[None, :]
        block = rows // height
        top = block * height
        start = height * (block * features - height * (block * (block - 1) // 2))
        start += (rows - top) * (features - top) - top
        places = sums + start[:, None] + columns[None, :]
        upper = (rows[:, None] <= columns[None, :]) & in_columns[None, :]
        tl.store(places, tl.load(places, mask=upper, other=0.0) + scatter, mask=upper)
        if i == j:
            # What the next group tries first: what the first split of this one had.
            exponent = tl.load(exponents + rows, mask=in_rows, other=0)
            centre = tl.load(group_means + rows, mask=in_rows, other=0.0)
            centre -= tl.load(residuals + rows, mask=in_rows, other=0.0)
            tl.store(hint_exponents + rows, exponent, mask=in_rows)
            tl.store(hint_centres + rows, (centre * power_of_two(-exponent)).to(tl.float32), mask=in_rows)
            tl.store(means + new * features + rows, old_rows + share * step_row, mask=in_rows)
            if tl.program_id(0) == 0:
                tl.store(totals + new, after)
                tl.store(row_count, tl.load(row_count) + tl.sum(count).to(tl.int64))
                tl.store(dropped_count, tl.load(dropped_count) + tl.sum(dropped).to(tl.int64))
