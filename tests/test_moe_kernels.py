"""The kernels of mixtures in the emulator, planned by the library: rows gathered, summed, weighted, against NumPy.

Gathers must equal the oracle byte for byte, weighted activations too where the logistic function is saturated; a sum
of rows is in order, so that without weights it is known to the bit. Every launch checks besides: no race, no access
outside the buffers or misaligned, no byte of an output left unwritten.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import kernel_bytes
from jaxfp8 import _ffi
from tests import kernel_launch, oracle_activation, oracle_moe
from tests import oracle_quantize as oq
from tests.kernel_launch import (
    BF16,
    E4M3,
    E5M2,
    F16,
    F32,
    FORMATS,
    GATHERS,
    GROUPS,
    NAMES,
    WEIGHTED_ACTIVATIONS,
    gather_call,
    gather_outputs,
    indices,
    matrices,
    sum_call,
    weighted_call,
)

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


def rows_of(kind, s, k, source=BF16, dtype=E4M3, seed=0, nan=()):
    """x (S, K), in FP8 with its scales for the gathers that move such."""
    x = matrices(seed, (s, k), source)
    for at in nan:
        x[at] = np.nan
    return x if "_quantize" in f"_{kind}" else oq.quantize_blocks(x, dtype=dtype)


def assert_gathered(kind, x, index, dtype=E4M3, *, offsets=None, seed=0, sms=2, **options):
    planned = gather_call(kind, x, index, dtype, sms=sms, **options)
    outputs, report = kernel_launch.execute(*planned, offsets=offsets, seed=seed)
    kernel_launch.assert_same_bytes(outputs, gather_outputs(kind, x, index, dtype, **options))
    return planned[0], report


def sizes_of(kind, sizes):
    return {"group_sizes": sizes} if kind.endswith("both") else {}


@pytest.mark.parametrize("types", FORMATS, ids=lambda t: f"{NAMES[t[0]]}-{NAMES[t[1]]}")
@pytest.mark.parametrize("kind", GATHERS)
@pytest.mark.representatives("kind", "types")
def test_every_format_equals_the_oracle(kind, types):
    source, dtype = types
    x = rows_of(kind, 17, 40, source, dtype, nan=[(3, 5)])
    pow2 = {} if kind == "rows" else {"pow2": bool(FORMATS.index(types) % 2)}
    assert_gathered(kind, x, indices(1, 30, 17), dtype, **pow2, **sizes_of(kind, [9, 0, 15]))


SHAPES = [
    (1, 1, 1),
    (3, 1, 5),
    (1, 128, 128),
    (40, 129, 8),
    (7, 20, 130),
    (130, 65, 528),
    (9, 8, 1042),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", GATHERS)
@pytest.mark.representatives("kind", "shape")
def test_every_shape_equals_the_oracle(kind, shape):
    s, m, k = shape
    source = (BF16, F32, F16)[(s + k) % 3]
    x = rows_of(kind, s, k, source, (E4M3, E5M2)[m % 2])
    sizes = sizes_of(kind, [m // 2, m - m // 2])
    assert_gathered(kind, x, indices(2, m, s, lies=m > 5), (E4M3, E5M2)[m % 2], **sizes)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["quantize_both", "requantize_both"])
@pytest.mark.representatives("kind", cases=4)
def test_groups_of_any_size_equal_the_oracle(kind, groups):
    sizes, m = GROUPS[groups]
    assert_gathered(kind, rows_of(kind, 50, 24), indices(3, m, 50), group_sizes=sizes)


@pytest.mark.parametrize("kind", GATHERS)
@pytest.mark.parametrize("k", [24, 36, 40])
@pytest.mark.representatives("kind", "k")
def test_buffers_aligned_to_their_elements_only(kind, k):
    x = rows_of(kind, 17, k)
    data = x[0] if isinstance(x, tuple) else x
    for offset in (data.itemsize, 4, 8):
        offsets = {"x": offset, "x_scale": 4, "source": 4, "group_sizes": 4}
        offsets |= dict.fromkeys(
            ("data", "row_data", "column_data"), offset + 1 if k == 24 else offset
        )
        offsets |= dict.fromkeys(("scale", "row_scale", "column_scale"), 4)
        assert_gathered(kind, x, indices(4, 30, 17), **sizes_of(kind, [20]), offsets=offsets)


@pytest.mark.parametrize("kind", ["quantize_both", "requantize_both"])
def test_tiles_in_bands_are_all_of_them(kind):
    """Where rows come again the grid goes through bands of columns that L2 holds."""
    s, m, k = 16384, 2 * 16384, 300
    plan = gather_call(
        kind,
        SimpleNamespace(dtype=BF16, shape=(s, k))
        if kind == "quantize_both"
        else (SimpleNamespace(dtype=E4M3, shape=(s, k)), np.zeros((s, 3), F32)),
        SimpleNamespace(dtype=np.dtype(np.int32), shape=(m,)),
        group_sizes=[m],
    )[0]
    band = plan.args[-2]
    assert band == (2 if kind == "quantize_both" else 3)
    x = rows_of(kind, 5, k)
    small, operands, results = gather_call(kind, x, indices(5, 200, 5), group_sizes=[90, 110])
    assert small.args[-2] == 3
    want = gather_outputs(kind, x, indices(5, 200, 5), group_sizes=[90, 110])
    for band in (1, 2, 3):
        planned = kernel_launch.with_band(small, band)
        outputs, _ = kernel_launch.execute(planned, operands, results)
        kernel_launch.assert_same_bytes(outputs, want)


@pytest.mark.parametrize("kind", GATHERS)
def test_nan_stays_in_its_row_and_in_its_columns_block(kind):
    x = rows_of(kind, 30, 140, nan=[(3, 5), (17, 130)])
    assert_gathered(kind, x, np.arange(30, dtype=np.int32)[::-1].copy(), **sizes_of(kind, [20, 8]))


@pytest.mark.parametrize("kind", ["quantize_rows", "rows"])
def test_rows_of_a_small_matrix_spread_over_the_multiprocessors(kind):
    x, index = rows_of(kind, 40, 520), indices(6, 64, 40)
    grids = [assert_gathered(kind, x, index, sms=sms)[0].grid[0] for sms in (1, 132)]
    assert grids[0] < grids[1]


# ---- Sums


def assert_sum(rows, position, weight=None, out=F32, offsets=None, seed=0):
    planned = sum_call(rows, position, weight, out=out)
    (got,), report = kernel_launch.execute(*planned, offsets=offsets, seed=seed)
    oracle_moe.assert_sum_of_rows(got, rows, position, weight)
    return report


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("out", [BF16, F32], ids=NAMES.get)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.representatives("source", "out", "weighted")
def test_a_sum_of_rows_is_in_order_and_rounded_once(source, out, weighted):
    """More choices than are loaded at once; a token of none, one of a row that has no place."""
    for k, choices in ((40, 6), (520, 11), (3, 1)):
        rows = matrices(7, (50, k), source)
        position = indices(8, (20, choices), 50, lies=False)
        position[2], position[5, 0] = -1, 50
        weight = np.random.default_rng(9).standard_normal(position.shape).astype(F32)
        assert_sum(rows, position, weight if weighted else None, out)


@pytest.mark.parametrize("out", [BF16, F32], ids=NAMES.get)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
def test_sums_of_buffers_aligned_to_their_elements_only(source, out):
    for k in (24, 36, 45):
        rows, position = matrices(10, (9, k), source), indices(11, (8, 3), 9)
        for name, width in (("rows", source.itemsize), ("out", out.itemsize)):
            for offset in (width, 4, 8):
                assert_sum(rows, position, None, out, offsets={name: offset, "position": 4})


def test_a_sum_shows_what_is_not_finite_and_what_is_lost():
    rows = matrices(12, (6, 40), BF16)
    rows[1, 3], rows[2, 4], rows[3, 4] = np.nan, np.inf, -np.inf
    position = np.array([[1, 0], [2, 3], [2, 0], [4, 6], [-1, -5], [5, 2**31 - 1]], np.int32)
    (got,), _ = kernel_launch.execute(*sum_call(rows, position))
    lost = np.isnan(got)
    assert lost[3].all() and lost[5].all() and lost[0, 3] and lost[1, 4] and lost.sum() == 82
    assert np.isposinf(got[2, 4]) and not got[4].any() and not np.signbit(got[4]).any()


# ---- Activations times a weight


def weighted_operands(kind, shape, seed, source, generate=oracle_activation.saturated):
    x = generate(seed, shape, source)
    dy = None
    if "grad" in kind:
        dy = oracle_activation.cotangents(seed, (shape[0], shape[-1]), source)
    return x, dy, kernel_launch.row_weights(seed, shape[0])


def value_of(x, dy, weight, activation):
    """The float64 values that are quantized."""
    weight = weight.astype(np.float64)[:, None]
    if dy is None:
        return oracle_activation.activate(x, activation) * weight
    return oracle_activation.gradient(x, dy.astype(np.float64) * weight, activation)


def assert_weighted(
    kind, x, dy, weight, dtype=E4M3, *, activation="silu", offsets=None, seed=0, **options
):
    """Executes one call on saturated operands: bytes as the oracle has them, the weights' gradient within its bound."""
    planned = weighted_call(kind, x, dy, weight, dtype, activation=activation, **options)
    outputs, report = kernel_launch.execute(*planned, offsets=offsets, seed=seed)
    if dy is not None:
        *outputs, weight_gradient = outputs
        oracle_activation.assert_weight_gradient(weight_gradient, x, dy, activation)
    y = value_of(x, dy, weight, activation)
    plain = kind.replace("weighted_", "")
    want = oracle_activation.outputs(plain, y, dtype=dtype, **options)
    kernel_launch.assert_same_bytes(outputs, want)
    return report


def sizes_with(kind, sizes):
    return {"group_sizes": sizes} if "ragged" in kind else {}


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=NAMES.get)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.parametrize("kind", WEIGHTED_ACTIVATIONS)
@pytest.mark.representatives("kind", "source", "halves")
def test_every_format_of_a_weighted_activation_equals_the_oracle(kind, source, dtype, halves):
    operands = weighted_operands(kind, (20, halves, 40), 1, source)
    i = halves + (source == F32) + (dtype == E5M2)
    options = {"pow2": bool(i % 2), "activation": oracle_activation.ACTIVATIONS[i // 2 % 2]}
    assert_weighted(kind, *operands, dtype, **options, **sizes_with(kind, [9, 8]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 2, 130), (129, 1, 8), (65, 2, 257)], ids=str)
@pytest.mark.parametrize("kind", WEIGHTED_ACTIVATIONS)
@pytest.mark.representatives("kind", "shape")
def test_every_shape_of_a_weighted_activation_equals_the_oracle(kind, shape):
    operands = weighted_operands(kind, shape, 2, (BF16, F32)[shape[0] % 2])
    assert_weighted(kind, *operands, **sizes_with(kind, [shape[0] // 2, 2, shape[0]]))


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", WEIGHTED_ACTIVATIONS[1:])
@pytest.mark.representatives("kind", cases=4)
def test_groups_of_a_weighted_activation_equal_the_oracle(kind, groups):
    sizes, m = GROUPS[groups]
    operands = weighted_operands(kind, (m, 1 + len(sizes) % 2, 16), 3, BF16)
    assert_weighted(kind, *operands, group_sizes=sizes)


@pytest.mark.parametrize("kind", WEIGHTED_ACTIVATIONS)
def test_weighted_buffers_aligned_to_their_elements_only(kind):
    operands = weighted_operands(kind, (20, 2, 24), 4, BF16)
    offsets = {"x": 2, "dy": 2, "weight": 4, "group_sizes": 4, "weight_grad": 4}
    offsets |= dict.fromkeys(("data", "row_data", "column_data"), 3)
    offsets |= dict.fromkeys(("scale", "row_scale", "column_scale"), 4)
    assert_weighted(kind, *operands, offsets=offsets, **sizes_with(kind, [15]))


@pytest.mark.parametrize("kind", WEIGHTED_ACTIVATIONS)
def test_nan_of_a_weight_or_a_gate_stays_visible_in_its_block_only(kind):
    x, dy, weight = weighted_operands(kind, (40, 2, 136), 6, BF16)
    x[3, 0, 5], x[17, 1, 130], x[30, 0, 20] = np.nan, np.inf, np.inf
    weight[[8, 33]] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        assert_weighted(kind, x, dy, weight, **sizes_with(kind, [20, 15]))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("activation", oracle_activation.ACTIVATIONS)
@pytest.mark.parametrize("kind", WEIGHTED_ACTIVATIONS)
@pytest.mark.representatives("kind", "activation", "halves")
def test_a_weighted_activation_is_within_its_bound(kind, activation, halves):
    x, dy, weight = weighted_operands(
        kind, (70, halves, 136), 8, (BF16, F32)[halves % 2], kernel_launch.ordinary
    )
    sizes = sizes_with(kind, [30, 40])
    planned = weighted_call(kind, x, dy, weight, E4M3, activation=activation, **sizes)
    outputs, _ = kernel_launch.execute(*planned)
    plain = kind.replace("weighted_", "")
    error = oracle_activation.error_bounds(x, dy, activation)
    error = error * np.abs(weight).reshape(-1, *[1] * (error.ndim - 1))
    want = oracle_activation.outputs(plain, value_of(x, dy, weight, activation), **sizes)
    bound = oracle_activation.outputs(plain, error, **sizes)
    if dy is not None:
        *outputs, got = outputs
        exact, magnitude = oracle_activation.weight_gradient(x, dy, activation)
        terms = np.abs(dy.astype(np.float64)) * oracle_activation.error_bounds(x, None, activation)
        slack = oracle_activation.block_sums(terms) + 130 * 2.0**-24 * magnitude
        assert (np.abs(got.reshape(exact.shape[::-1]).T - exact) <= slack).all()
    oracle_activation.assert_within_a_step(outputs, want, bound)


# ---- All of them


def test_schedules_do_not_matter():
    for seed in (1, 2, 3):
        for kind in ("quantize_both", "requantize_both"):
            x, index = rows_of(kind, 40, 40), indices(13, 130, 40)
            assert_gathered(kind, x, index, group_sizes=[129], seed=seed)
        kind = "ragged_weighted_grad_both"
        operands = weighted_operands(kind, (130, 2, 40), 7, BF16)
        assert_weighted(kind, *operands, group_sizes=[129], seed=seed)


def test_more_blocks_than_a_grid_holds_are_refused():
    index = SimpleNamespace(dtype=np.dtype(np.int32), shape=(2**30,))
    wide = SimpleNamespace(dtype=BF16, shape=(2, 2**30))
    with pytest.raises(ValueError, match=r"data has more blocks than a grid holds, 2\^31 - 1"):
        gather_call("quantize_rows", wide, index)
    with pytest.raises(ValueError, match=r"row_data has more blocks than a grid holds, 2\^31 - 1"):
        gather_call("quantize_both", wide, index, group_sizes=[1])


@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.parametrize("kind", kernel_bytes.MIXTURES)
@pytest.mark.representatives("kind", "source")
def test_every_byte_moves_once(kind, source):
    kernel_bytes.assert_least(kernel_bytes.mixture(kind, source))
