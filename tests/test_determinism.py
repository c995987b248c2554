"""Every kernel gives the same bits under every schedule of its warps and CTAs.

Each call's first result is compared with the oracle's, the others with the first. A schedule is a seed of
the emulator: another order of CTAs, of warps, of asynchronous copies and of tensor core products. The
emulator reports any race on the way.
"""

import numpy as np
import pytest

from jaxfp8 import _C, _ffi
from tests import custom_calls
from tests.contract import CONTRACT
from tests.emulator.driver import EmulatedDriver

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


def test_every_target_has_random_calls():
    """Soak, schedules and group sizes draw from them: a new target must join."""
    assert set(custom_calls.DRAWS) == set(_C.handlers("CUDA"))
    takes_sizes = {
        f"jaxfp8_{name}{suffix}_v1"
        for name, (operands, _) in CONTRACT.items()
        for suffix in ("", "_accum" if "gemm" in name else "")
        if {"group_sizes", "masked_m"} & set(operands)
    }
    assert set(custom_calls.GROUPED) == takes_sizes


# Two tiles of rows and of columns with tails, on four multiprocessors: a CTA runs its pipeline from tile to tile, over
# more blocks than it has stages. The last block is a tail; groups are empty, negative, of one row, cut by the end.
PRODUCT, WGRAD, MATRIX = (132, 136, 272), (330, 140, 72), (130, 40)
SIZES = {"masked": np.int32([3, 129]), "ragged": np.int32([70, -1, 1, 0, 300])}


def schedules(target, count, seed, **options):
    dims = MATRIX
    if "gemm" in target:
        dims = WGRAD if "wgrad" in target else PRODUCT
    if target in custom_calls.GROUPED:
        options["sizes"] = SIZES["masked" if "masked" in target else "ragged"]
    call = custom_calls.DRAWS[target](np.random.default_rng(seed), dims=dims, **options)
    first = None
    with EmulatedDriver(_ffi.image_directory(), num_sms=4) as driver:
        for driver.seed in range(count):
            results = call.run()
            if first is None:
                first = results
                call.check(results)
            for a, b in zip(first, results, strict=True):
                same = np.array_equal(a.view(np.uint8), b.view(np.uint8))
                assert same, f"{call}: schedule {driver.seed} gives other bits"
        assert len(driver.launches) == count


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in custom_calls.DRAWS if "gemm" not in t])
def test_fifty_schedules_of_a_quantizer_give_the_same_bits(target):
    schedules(target, 50, seed=4)


# Products that add have the loops of those that store: they differ after the last block.
CLUSTERS = [
    (target, cluster)
    for target in custom_calls.DRAWS
    if "gemm" in target
    for cluster in ("1x1", "2x1", "1x2")
    if not ("accum" in target and cluster == "1x1")
]


@pytest.mark.slow
@pytest.mark.parametrize("target, cluster", CLUSTERS)
def test_fifty_schedules_of_a_product_give_the_same_bits_in_every_cluster(target, cluster):
    config = _C.configs(target).index(f"m128n128 cluster {cluster}")
    schedules(target, 50, seed=4, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["jaxfp8_gemm_1d2d_v1", "jaxfp8_grouped_wgrad_gemm_accum_v1"])
def test_every_configuration_gives_the_same_bits_under_ten_schedules(target):
    for config in range(len(_C.configs(target))):
        schedules(target, 10, seed=5, config=config)
