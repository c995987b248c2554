"""Rows of a mixture in NumPy: gathered, quantized, requantized, summed. Shares no code with the library."""

import numpy as np

from tests import oracle_quantize as oq


def take(x, source, fill=0):
    """x[source]; rows of `fill` where the index is below 0 or past the end."""
    source = np.asarray(source)
    inside = (source >= 0) & (source < len(x))
    rows = x[np.where(inside, source, 0)]
    rows[~inside] = np.asarray(fill).astype(x.dtype)
    return rows


def quantized(kind, x, source, group_sizes, dtype=oq.E4M3, pow2=False):
    """The results of a gather of x (S, K) into FP8: data and scale of rows, or of rows and columns."""
    rows = take(x, source)
    results = [*oq.quantize_blocks(rows, dtype=dtype, pow2=pow2)]
    if kind != "rows":
        results += oq.ragged_columns(rows, group_sizes, dtype, pow2)
    return results


def moved(kind, data, scale, source, group_sizes, pow2=False):
    """The results of a gather of FP8 rows (S, K): their bytes, and columns quantized from float32 `data * scale`."""
    rows, row_scale = take(data.view(np.uint8), source).view(data.dtype), take(scale, source, 1)
    results = [rows, row_scale]
    if kind != "rows":
        spread = np.repeat(row_scale, oq.BLOCK, axis=1)[:, : data.shape[1]]
        with np.errstate(over="ignore", invalid="ignore"):
            values = rows.astype(np.float32) * spread
        results += oq.ragged_columns(values, group_sizes, data.dtype, pow2)
    return results


def sum_rows(rows, position, weight=None):
    """float64 (S, K): `weight[s, j] * rows[position[s, j]]` summed over j; nothing for an index below 0, NaN past M."""
    rows = rows.astype(np.float64)
    total = np.zeros((len(position), rows.shape[1]))
    for s, choices in enumerate(np.asarray(position)):
        for j, index in enumerate(choices):
            if index >= len(rows):
                total[s] = np.nan
            elif index >= 0:
                total[s] += rows[index] * (1 if weight is None else np.float64(weight[s, j]))
    return total


def sum_rows_in_order(rows, position):
    """float32 (S, K): the unweighted sum, rounded after every addition, from +0 on."""
    rows = rows.astype(np.float32)
    total = np.zeros((len(position), rows.shape[1]), np.float32)
    for s, choices in enumerate(np.asarray(position)):
        for index in choices:
            if index >= len(rows):
                total[s] = np.nan
            elif index >= 0:
                total[s] += rows[index]
    return total


def assert_sum_of_rows(got, rows, position, weight=None):
    """Without weights the float32 sum in order, to the bit; with weights within its error in any order."""
    with np.errstate(over="ignore", invalid="ignore"):
        if weight is None:
            want = sum_rows_in_order(rows, position).astype(got.dtype)
            np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
            return
        want = sum_rows(rows, position, weight)
        magnitude = sum_rows(np.abs(rows), position, np.abs(weight))
        rounded = np.abs(want) * (2.0**-8 if got.dtype.itemsize == 2 else 0)
        gap = np.abs(got.astype(np.float64) - want)
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), np.isnan(want))
    np.testing.assert_array_equal(got.astype(np.float64)[np.isinf(want)], want[np.isinf(want)])
    finite = np.isfinite(want)
    smallest = 2.0**-133 if got.dtype.itemsize == 2 else 2.0**-140
    bound = (position.shape[1] + 1) * 2.0**-24 * magnitude * 1.01 + rounded + smallest
    assert (gap[finite] <= bound[finite]).all()
