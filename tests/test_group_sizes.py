"""Group sizes that lie: no kernel reads or writes outside of its buffers, whatever they hold.

Between any two buffers lie 2^40 bytes that belong to nobody, more than any 32-bit row number times any row
reaches, so that an address computed from a size that was believed is in no buffer. The emulator checks each
access, operands are read only, results are poisoned and then compared with the oracle's, whose groups are
clipped to the rows that exist.
"""

import numpy as np
import pytest

from jaxfp8 import _C, _ffi
from tests import custom_calls
from tests.emulator.driver import EmulatedDriver
from tests.emulator.errors import OutOfBounds

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]

GUARD = 1 << 40
LEAST, MOST = -(2**31), 2**31 - 1
LIES = {
    "negative": [-1, LEAST, -128, -127],
    "negative between": [50, LEAST, 60, -1],
    "more than the rows": [70, 70, 70],
    "a sum of 2^31": [2**30, 2**30, 5],
    "a sum that wraps to 50": [MOST, MOST, 2, 50],
    "a sum that wraps to -2^31": [MOST, 1, 7],
    "a negative sum": [LEAST, 40, LEAST, 30],
    "the largest": [MOST] * 5,
    "blocks that wrap": [MOST - 126, 128] * 3,
    "more than a warp": [MOST, -1, 3] * 12,
    "after a warp of none": [0] * 33 + [MOST, MOST],
    "after a warp of negatives": [LEAST] * 32 + [9, MOST],
}


def run(target, sizes, *, seed=0, most=90, **options):
    """Draws a call with these sizes, runs it and checks its results."""
    rng = np.random.default_rng([seed, len(sizes)])
    call = custom_calls.DRAWS[target](rng, np.asarray(sizes, np.int32), most=most, **options)
    with EmulatedDriver(_ffi.image_directory(), num_sms=4, seed=seed, guard=GUARD) as driver:
        call.check(call.run())
        assert len(driver.launches) == 1


@pytest.mark.parametrize("target", custom_calls.GROUPED)
@pytest.mark.parametrize("sizes", ["negative between", "a sum that wraps to 50"])
@pytest.mark.representatives(cases=5)
def test_sizes_that_lie_stay_inside_the_buffers(target, sizes):
    run(target, LIES[sizes])


@pytest.mark.slow
@pytest.mark.parametrize("target", custom_calls.GROUPED)
@pytest.mark.parametrize("sizes", LIES)
def test_all_sizes_that_lie_stay_inside_the_buffers(target, sizes):
    run(target, LIES[sizes], seed=1, most=140)


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in custom_calls.GROUPED if "gemm" in t])
@pytest.mark.parametrize("config", range(max(len(_C.configs(t)) for t in _C.handlers("CUDA"))))
def test_no_configuration_believes_a_size(target, config):
    if config >= len(_C.configs(target)):
        pytest.skip("the target has fewer configurations")
    for sizes in ("negative between", "a sum that wraps to 50", "after a warp of negatives"):
        run(target, LIES[sizes], seed=2, most=140, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("target", custom_calls.GROUPED)
def test_random_sizes_stay_inside_the_buffers(target):
    rng = np.random.default_rng(3)
    for seed in range(10):
        sizes = rng.integers(LEAST, 2**31, int(rng.integers(1, 40))).astype(np.int32)
        run(target, sizes, seed=seed)


def test_a_size_that_is_believed_is_seen():
    """The ragged quantizer without its clipping, in its PTX, leaves the buffers."""
    directory = _ffi.image_directory()
    text = (directory / "quantize_columns.ptx").read_text()
    target, sizes = "jaxfp8_quantize_ragged_columns_v1", LIES["a sum that wraps to 50"]
    rng = np.random.default_rng(0)
    call = custom_calls.DRAWS[target](rng, np.asarray(sizes, np.int32), most=90)
    believed = text.replace("min.s64", "max.s64").replace("min.u32", "max.u32")
    believed = believed.replace("min.s32", "max.s32")
    assert believed != text
    options = {"ptx": {"quantize_columns": believed}, "guard": GUARD}
    with EmulatedDriver(directory, **options) as driver:
        with pytest.raises(RuntimeError):
            call.run()
        (error,) = driver.take_errors()
    assert isinstance(error, OutOfBounds)
