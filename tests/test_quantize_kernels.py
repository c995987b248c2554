"""The quantizer kernels' PTX, planned by the library and executed by the emulator, bit for bit.

Every launch checks besides: no race, no read of uninitialised shared memory, no access outside the
buffers or misaligned, no byte of an output left unwritten.
"""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import kernel_bytes
from jaxfp8 import _ffi
from tests import kernel_launch
from tests import oracle_quantize as oracle
from tests.kernel_launch import (
    BF16,
    DENSE_QUANTIZERS,
    F16,
    F32,
    FORMATS,
    GROUPS,
    NAMES,
    QUANTIZER_RESULTS,
    RAGGED_QUANTIZERS,
    matrices,
    quantizer_call,
    quantizer_shape,
)

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


def assert_exact(kind, x, dtype, *, pow2=False, group_sizes=None, sms=2, offsets=None, seed=0):
    """Runs one quantization and compares every output with the oracle's, byte for byte."""
    planned = quantizer_call(kind, x, dtype, pow2=pow2, group_sizes=group_sizes, sms=sms)
    outputs, report = kernel_launch.execute(*planned, offsets=offsets, seed=seed)
    want = oracle.outputs(kind, x, dtype=dtype, pow2=pow2, group_sizes=group_sizes)
    kernel_launch.assert_same_bytes(outputs, want)
    return report


@pytest.mark.parametrize("kind", DENSE_QUANTIZERS)
@pytest.mark.parametrize("pow2", [False, True], ids=["float32", "pow2"])
@pytest.mark.parametrize(("source", "target"), FORMATS, ids=lambda d: NAMES[d])
@pytest.mark.representatives("kind", "source", "target", "pow2")
def test_every_format_equals_the_oracle(kind, source, target, pow2):
    x = matrices(1, quantizer_shape(kind, 1, 40, 72), source)
    assert_exact(kind, x, target, pow2=pow2)


@pytest.mark.parametrize("kind", DENSE_QUANTIZERS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 1, 5), (1, 128, 128), (1, 129, 8), (2, 7, 130), (1, 130, 257), (1, 16, 264)],
    ids=str,
)
@pytest.mark.representatives("kind", "shape")
def test_every_shape_equals_the_oracle(kind, shape):
    source = F32 if kind in ("rows", "weight") and shape[1] % 2 else BF16
    assert_exact(kind, matrices(2, quantizer_shape(kind, *shape), source), oracle.E4M3)


@pytest.mark.parametrize("kind", DENSE_QUANTIZERS + RAGGED_QUANTIZERS)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.representatives("kind", "source")
def test_buffers_aligned_to_their_elements_only(kind, source):
    offsets = {"x": source.itemsize, "w": source.itemsize, "group_sizes": 4}
    offsets |= {name: 3 if "data" in name else 4 for name in QUANTIZER_RESULTS[kind]}
    x = matrices(3, (20, 24), source)
    x = x if kind == "rows" or kind in RAGGED_QUANTIZERS else x[None]
    group_sizes = [15] if kind in RAGGED_QUANTIZERS else None
    assert_exact(kind, x, oracle.E4M3, group_sizes=group_sizes, offsets=offsets)


def test_rows_of_a_small_matrix_spread_over_the_multiprocessors():
    x = matrices(4, (64, 512), BF16)
    for sms in (1, 4, 132):
        assert_exact("rows", x, oracle.E4M3, sms=sms)


@pytest.mark.parametrize("kind", RAGGED_QUANTIZERS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.representatives("kind", cases=4)
def test_ragged_groups_equal_the_oracle(kind, groups):
    group_sizes, rows = GROUPS[groups]
    x = matrices(5, (rows, 16), BF16)
    assert_exact(kind, x, oracle.E4M3, group_sizes=group_sizes)


@pytest.mark.parametrize("kind", RAGGED_QUANTIZERS)
@pytest.mark.parametrize(("source", "target"), FORMATS, ids=lambda d: NAMES[d])
@pytest.mark.representatives("kind", "source", "target")
def test_ragged_formats_equal_the_oracle(kind, source, target):
    x = matrices(6, (20, 130), source)
    assert_exact(kind, x, target, pow2=True, group_sizes=[9, 8])


@pytest.mark.parametrize("kind", DENSE_QUANTIZERS + RAGGED_QUANTIZERS)
@pytest.mark.parametrize("source", [BF16, F16, F32], ids=NAMES.get)
@pytest.mark.representatives("kind", "source")
def test_nan_and_inf_stay_visible_in_their_block_only(kind, source):
    x = matrices(7, (40, 136), source)
    x[3, 5], x[17, 130], x[30, 20] = np.nan, np.inf, -np.inf
    ragged = kind in RAGGED_QUANTIZERS
    x = x if ragged or kind == "rows" else x[None]
    assert_exact(kind, x, oracle.E4M3, group_sizes=[20, 15] if ragged else None)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks"])
def test_extreme_magnitudes_equal_the_oracle(kind):
    """Subnormal and smallest scales, the largest floats, ties, and powers of two."""
    rng = np.random.default_rng(8)
    exponents = np.linspace(-149, 127, 96)[:, None]
    x = np.ldexp(1 + rng.integers(0, 64, (96, 24)) / 64, exponents.astype(int))
    x = np.minimum(x, np.finfo(np.float32).max).astype(np.float32)
    x[:, 0] = np.ldexp(np.float32(1.75), exponents.astype(int)[:, 0])  # 448 after scaling
    x = x.T.copy() if kind == "columns" else x
    for pow2 in (False, True):
        for target in (oracle.E4M3, oracle.E5M2):
            assert_exact(kind, x if kind == "rows" else x[None], target, pow2=pow2)


def test_every_bfloat16_quantizes_like_the_oracle():
    """All 65536 bit patterns, grouped by magnitude so that finite ones share blocks."""
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[np.argsort(bits & 0x7FFF, kind="stable")]
    assert_exact("rows", bits.view(BF16).reshape(64, 1024), oracle.E4M3)


@pytest.mark.parametrize("kind", DENSE_QUANTIZERS + RAGGED_QUANTIZERS)
@pytest.mark.representatives(cases=3)
def test_schedules_do_not_matter(kind):
    ragged = kind in RAGGED_QUANTIZERS
    x = matrices(9, (130, 40), BF16)
    x = x if ragged or kind == "rows" else x[None]
    for seed in (1, 2, 3):
        assert_exact(kind, x, oracle.E4M3, group_sizes=[129] if ragged else None, seed=seed)


@pytest.mark.parametrize("kind", DENSE_QUANTIZERS + RAGGED_QUANTIZERS)
@pytest.mark.parametrize("source", [BF16, F32], ids=NAMES.get)
@pytest.mark.representatives("kind", "source")
def test_every_byte_moves_once(kind, source):
    kernel_bytes.assert_least(kernel_bytes.quantizer(kind, source))


@pytest.mark.parametrize("image", [i for i in _ffi.images() if not i.startswith("gemm_")])
def test_no_quantizing_kernel_spills(image):
    text = (_ffi.image_directory() / f"{image}.ptxas.txt").read_text()
    kernels = text.count("Compiling entry")
    assert kernels and text.count("0 bytes spill stores, 0 bytes spill loads") == kernels


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_more_blocks_than_a_grid_holds_are_refused(kind):
    shape = quantizer_shape(kind, 1, 2**30, 2**30)
    with pytest.raises(ValueError, match=r"more blocks than a grid holds, 2\^31 - 1"):
        quantizer_call(kind, SimpleNamespace(dtype=BF16, shape=shape), oracle.E4M3)
