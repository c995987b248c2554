"""The activation kernels' PTX, planned by the library and executed by the emulator.

Where the logistic function is saturated, at 0 or 1, the float32 activation is known exactly: then every result must
equal the oracle's bit for bit. Elsewhere the activation is held to float64 within its stated bound. Every launch
checks besides: no race, no read of uninitialised shared memory, no access outside the buffers or misaligned, no byte
of an output left unwritten.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import kernel_bytes
from jaxfp8 import _ffi
from tests import kernel_launch
from tests import oracle_activation as oracle
from tests import oracle_quantize as oq
from tests.kernel_launch import (
    BF16,
    DENSE_ACTIVATIONS,
    F32,
    FORMATS,
    GROUPS,
    NAMES,
    RAGGED_ACTIVATIONS,
    activation_call,
    activation_operands,
    activation_shape,
    ordinary,
)

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


def assert_exact(
    kind,
    x,
    dy,
    dtype,
    *,
    activation="silu",
    pow2=False,
    group_sizes=None,
    sms=2,
    offsets=None,
    seed=0,
):
    """Executes one call on saturated operands and compares every output with the oracle's, byte for byte."""
    planned = activation_call(
        kind, x, dy, dtype, activation=activation, pow2=pow2, group_sizes=group_sizes, sms=sms
    )
    outputs, report = kernel_launch.execute(*planned, offsets=offsets, seed=seed)
    y = oracle.activate(x, activation) if dy is None else oracle.gradient(x, dy, activation)
    want = oracle.outputs(kind, y, dtype=dtype, pow2=pow2, group_sizes=group_sizes)
    kernel_launch.assert_same_bytes(outputs, want)
    return report


KINDS = DENSE_ACTIVATIONS + RAGGED_ACTIVATIONS


def by_turns(kinds, cases):
    """(kind, case, halves): with or without a gate, by turns; the other is slow."""
    found = []
    for k, kind in enumerate(kinds):
        for i, case in enumerate(cases):
            for halves in (1, 2):
                name = "-".join(NAMES.get(v, str(v)) for v in case)
                marks = pytest.mark.slow if (k + i + i // 2 + halves) % 2 else ()
                found.append(
                    pytest.param(kind, case, halves, id=f"{name}-{halves}-{kind}", marks=marks)
                )
    return found


@pytest.mark.parametrize("kind, types, halves", by_turns(KINDS, FORMATS))
@pytest.mark.representatives("kind", "types")
def test_every_format_equals_the_oracle(kind, types, halves):
    source, target = types
    x, dy = activation_operands(kind, activation_shape(kind, 1, 20, halves, 40), 1, source)
    i = FORMATS.index(types) + halves
    assert_exact(
        kind,
        x,
        dy,
        target,
        pow2=bool(i % 2),
        activation=oracle.ACTIVATIONS[i // 2 % len(oracle.ACTIVATIONS)],
        group_sizes=[9, 8] if kind in RAGGED_ACTIVATIONS else None,
    )


SHAPES = [(1, 1, 1), (3, 1, 5), (1, 128, 128), (1, 129, 8), (2, 7, 130), (1, 130, 257)]


@pytest.mark.parametrize("kind, shape, halves", by_turns(DENSE_ACTIVATIONS, SHAPES))
@pytest.mark.representatives("kind", "shape")
def test_every_shape_equals_the_oracle(kind, shape, halves):
    g, m, f = shape
    source = F32 if m % 2 and halves == 1 else BF16
    x, dy = activation_operands(kind, activation_shape(kind, g, m, halves, f), 2, source)
    assert_exact(
        kind, x, dy, oq.E4M3, activation=oracle.ACTIVATIONS[(m + halves) % len(oracle.ACTIVATIONS)]
    )


@pytest.mark.parametrize("kind", ["grad_both", "ragged_grad_both"])
@pytest.mark.parametrize("source, f", [(BF16, 132), (F32, 130)], ids=["bf16", "f32"])
def test_a_half_that_ends_inside_a_vector_keeps_out_of_the_other(kind, source, f):
    """The pitch of both halves is aligned to more bytes than a half."""
    x, dy = activation_operands(kind, activation_shape(kind, 1, 5, 2, f), 9, source)
    assert_exact(kind, x, dy, oq.E4M3, group_sizes=[4] if kind in RAGGED_ACTIVATIONS else None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.representatives("kind", "source")
def test_buffers_aligned_to_their_elements_only(kind, source):
    x, dy = activation_operands(kind, activation_shape(kind, 1, 20, 2, 24), 3, source)
    offsets = {"x": source.itemsize, "dy": source.itemsize, "group_sizes": 4}
    offsets |= {name: 3 for name in ("data", "row_data", "column_data")}
    offsets |= {name: 4 for name in ("scale", "row_scale", "column_scale")}
    assert_exact(
        kind,
        x,
        dy,
        oq.E4M3,
        group_sizes=[15] if kind in RAGGED_ACTIVATIONS else None,
        offsets=offsets,
    )


def test_rows_of_a_small_matrix_spread_over_the_multiprocessors():
    x, _ = activation_operands("rows", (64, 2, 512), 4, BF16)
    for sms in (1, 132):
        assert_exact("rows", x, None, oq.E4M3, sms=sms)


@pytest.mark.parametrize("kind", RAGGED_ACTIVATIONS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.representatives("kind", cases=4)
def test_ragged_groups_equal_the_oracle(kind, groups):
    group_sizes, rows = GROUPS[groups]
    x, dy = activation_operands(kind, (rows, 1 + len(group_sizes) % 2, 16), 5, BF16)
    assert_exact(kind, x, dy, oq.E4M3, group_sizes=group_sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay_visible_in_their_block_only(kind):
    x, dy = activation_operands(kind, activation_shape(kind, 1, 40, 2, 136), 6, BF16)
    flat = x.reshape(40, 2, 136)
    flat[3, 0, 5], flat[17, 1, 130], flat[30, 0, 20], flat[33, 0, 7] = (
        np.nan,
        np.inf,
        -np.inf,
        np.inf,
    )
    if dy is not None:
        dy.reshape(40, 136)[8, 9] = np.nan
    y = oracle.activate(x, "silu") if dy is None else oracle.gradient(x, dy, "silu")
    assert np.count_nonzero(~np.isfinite(y)) >= 4
    assert_exact(kind, x, dy, oq.E4M3, group_sizes=[20, 15] if kind in RAGGED_ACTIVATIONS else None)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("kind", ["rows", "grad_both"])
@pytest.mark.representatives("kind", "activation")
def test_no_finite_pre_activation_becomes_nan(kind, activation):
    magnitudes = np.ldexp(1.0, np.arange(-149, 128, 4))
    gate = np.concatenate([magnitudes, -magnitudes]).astype(np.float32)
    x = np.stack([gate, np.ones_like(gate)])[None]
    dy = np.ones((1, 1, gate.size), np.float32) if kind == "grad_both" else None
    x = x[None] if kind == "grad_both" else x
    outputs, _ = kernel_launch.execute(
        *activation_call(kind, x, dy, oq.E5M2, activation=activation)
    )
    assert np.isfinite(outputs[1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.representatives(cases=2)
def test_schedules_do_not_matter(kind):
    x, dy = activation_operands(kind, activation_shape(kind, 1, 130, 2, 40), 7, BF16)
    for seed in (1, 2, 3):
        assert_exact(
            kind,
            x,
            dy,
            oq.E4M3,
            group_sizes=[129] if kind in RAGGED_ACTIVATIONS else None,
            seed=seed,
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.representatives("kind", "activation", "halves")
def test_an_activation_is_within_its_bound(kind, activation, halves):
    source = (BF16, F32)[halves % 2]
    x, dy = activation_operands(
        kind, activation_shape(kind, 1, 70, halves, 136), 8, source, ordinary
    )
    group_sizes = [30, 40] if kind in RAGGED_ACTIVATIONS else None
    outputs, _ = kernel_launch.execute(
        *activation_call(kind, x, dy, oq.E4M3, activation=activation, group_sizes=group_sizes)
    )
    y = oracle.activate(x, activation) if dy is None else oracle.gradient(x, dy, activation)
    error = oracle.error_bounds(x, dy, activation)
    assert np.isfinite(error).all()
    want = oracle.outputs(kind, y, group_sizes=group_sizes)
    bound = oracle.outputs(kind, error, group_sizes=group_sizes)
    oracle.assert_within_a_step(outputs, want, bound)


def test_more_blocks_than_a_grid_holds_are_refused():
    shape = (1, 2**30, 2, 2**30)
    with pytest.raises(ValueError, match=r"x has more blocks than a grid holds, 2\^31 - 1"):
        activation_call("both", SimpleNamespace(dtype=BF16, shape=shape), None, oq.E4M3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.representatives("kind", "source")
def test_every_byte_moves_once(kind, source):
    kernel_bytes.assert_least(kernel_bytes.activation(kind, source))
