"""Every product with every configuration that is compiled for it, through `jax.jit` and against float64.

The list is the planner's: a new configuration joins by itself, a new kind of product fails until it has cases. Shapes
have tails of the configuration's own tile and cluster in M, N and K. Each case runs under three schedules, which must
agree to the bit; the emulator poisons results beforehand and reports any race, any read of what nobody wrote and any
access beside a buffer. One small case a configuration runs by default, the others are slow.
"""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import _C, _ffi
from tests import custom_calls, emulator, kernel_launch, oracle
from tests import oracle_quantize as oq
from tests.emulated_platform import emulated_platform
from tests.emulator.driver import EmulatedDriver

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
E4M3, E5M2 = oq.E4M3, oq.E5M2
SHORT = {E4M3: "e4m3", E5M2: "e5m2", BF16: "bf16", F32: "f32"}
SCHEDULES = (0, 1, 2)
SMS = 2  # so that a CTA has several tiles

KINDS = ("gemm_1d2d", "gemm_1d1d", "grouped_gemm", "masked_grouped_gemm", "grouped_wgrad_gemm")
OUTER = ("gemm_1d1d", "grouped_wgrad_gemm")
BLOCK = tuple(kind for kind in KINDS if kind not in OUTER)
# Handlers that no operation of the library calls.
DIRECT = ("grouped_gemm_accum", "masked_grouped_gemm_accum")


def family_of(kind):
    """The products that run the same kernels."""
    return OUTER if kind in OUTER else BLOCK


def configs(kind):
    return _C.configs(f"jaxfp8_{kind}_v1") if _ffi.images() else ()


ALL = [(kind, config) for kind in KINDS for config in configs(kind)]
# Every configuration of every kernel once, the products that it serves in turn.
ONCE = [
    (family[i % len(family)], config)
    for family in (BLOCK, OUTER)
    for i, config in enumerate(configs(family[0]))
]


def tile_of(config):
    """Rows and columns of the output that a cluster computes, and how many CTAs it has."""
    m, n, side, cluster_m, cluster_n = re.fullmatch(
        r"m(\d+)n(\d+)(x2)? cluster (\d)x(\d)", config
    ).groups()
    columns = int(n) * (2 if side else 1)
    return int(m) * int(cluster_m), columns * int(cluster_n), int(cluster_m) * int(cluster_n)


# --- cases: what to multiply ----------------------------------------------------------------------

SMALL, CASES = "small", ("tails", "odd", "less than a tile", "whole tiles", "tails accumulate")
EDGES = [0, 1, 127, 128, 129, 0]  # 385 tokens


def shape_of(case, config):
    """M, N, K; of a weight gradient, N and K of the output and nothing else."""
    m, n, _ = tile_of(config)
    deep = 128 * (14 if m == 64 else 8)  # more blocks than stages
    return {
        SMALL: (33, 24, 144),
        "tails": (m + 24, n + 40, 272),
        "odd": (m - 3, n + 1, 400),
        "less than a tile": (33, 25, 130),
        "whole tiles": (m, n, deep),
        "tails accumulate": (m + 24, n + 40, 144),
    }[case]


def sizes_of(case, config):
    """Rows, and group sizes."""
    m, _, _ = tile_of(config)
    return {
        SMALL: (33, [0, 1, 20]),
        "tails": (400, EDGES),
        "odd": (100, [60, 60, 60]),
        "less than a tile": (130, [2, 3] * 13 + [0] * 37 + [65]),
        "whole tiles": (2 * m, [m, m]),
        "tails accumulate": (100, [-7, 20, 2**31 - 1, 5]),
    }[case]


def types_of(kind, case, config):
    """Types of lhs, rhs and output; `test_every_compiled_kernel_has_a_case` holds them to cover all."""
    pairs = [(E4M3, E4M3), (E5M2, E4M3)] + ([(E4M3, E5M2)] if kind in OUTER else [])
    if case == SMALL:
        return *pairs[0], BF16
    turn = CASES.index(case) + family_of(kind).index(kind) + configs(kind).index(config)
    out = F32 if case in ("odd", "whole tiles") else BF16
    return *pairs[turn % len(pairs)], out


def accumulates(kind, case):
    has = kind in ("gemm_1d2d", "gemm_1d1d", "grouped_wgrad_gemm")
    return has and case in ("less than a tile", "whole tiles", "tails accumulate")


def quantized(rng, shape, dtype, block=(1, 128)):
    x = rng.standard_normal(shape).astype(np.float32)
    data, scale = oq.quantize_blocks(x, block, dtype)
    return jaxfp8.QuantizedArray(data, scale, block)


def columns(rng, rows, sizes, width, dtype):
    """An operand of a ragged weight gradient."""
    x = rng.standard_normal((rows, width)).astype(np.float32)
    return jaxfp8.QuantizedArray(*oq.ragged_columns(x, sizes, dtype))


def product(kind, case, config):
    """The jitted product, its operands, and what it must give in float64."""
    rng = np.random.default_rng([KINDS.index(kind), len(case)])
    lhs_type, rhs_type, out = types_of(kind, case, config)
    (m, n, k), (rows, sizes) = shape_of(case, config), sizes_of(case, config)
    groups = np.asarray(sizes, np.int32)
    options = {"out_dtype": out, "config": config, "num_sms": SMS}
    if kind.startswith("gemm"):
        batch = {"odd": 2, "less than a tile": 3, "tails accumulate": 2}.get(case)
        lead = () if batch is None else (batch,)
        shared = case == "odd"
        lhs = quantized(rng, (m, k) if shared else (*lead, m, k), lhs_type)
        block = (1, 128) if kind in OUTER else (128, 128)
        rhs = quantized(rng, (*lead, n, k), rhs_type, block)
        function = functools.partial(jaxfp8.gemm, **options)
        operands, want = (lhs, rhs), oracle.gemm(lhs, rhs)
        if shared:
            function = jax.vmap(function, (None, 0))
    elif kind == "grouped_wgrad_gemm":
        lhs = columns(rng, rows, sizes, m, lhs_type)
        rhs = columns(rng, rows, sizes, n, rhs_type)
        function = functools.partial(jaxfp8.grouped_wgrad_gemm, **options)
        operands, want = (lhs, rhs, groups), oracle.grouped_wgrad_gemm(lhs, rhs, sizes, rows)
    else:
        masked = kind == "masked_grouped_gemm"
        if masked:
            rows = min(rows, 40 if len(sizes) > 6 else 150)
        else:
            k = min(k, 272)
        lhs = quantized(rng, (len(sizes), rows, k) if masked else (rows, k), lhs_type)
        rhs = quantized(rng, (len(sizes), n, k), rhs_type, (128, 128))
        function = functools.partial(getattr(jaxfp8, kind), **options)
        operands, want = (lhs, rhs, groups), getattr(oracle, kind)(lhs, rhs, sizes)
    keywords = {}
    if accumulates(kind, case):
        accum = (rng.standard_normal(want.shape) * 10).astype(np.float32).astype(out)
        keywords, want = {"accum": jnp.asarray(accum)}, want + accum.astype(np.float64)
    return jax.jit(function), jax.tree.map(jnp.asarray, operands), keywords, want, out


def check(kind, case, config, schedules):
    function, operands, keywords, want, out = product(kind, case, config)
    first = None
    with emulated_platform(num_sms=SMS) as driver:
        for driver.seed in schedules:
            got = np.asarray(function(*operands, **keywords))
            first = got if first is None else first
            np.testing.assert_array_equal(got.view(np.uint8), first.view(np.uint8))
        launches = driver.launches
    assert first.dtype == out
    oracle.assert_close(first, want, custom_calls.TOLERANCE[out])
    if not keywords and "grouped" in kind:
        assert not first[~want.any(-1)].any(), "a row that must be zero is not"
    # The configuration that was asked for is what ran.
    assert len(launches) == len(schedules)
    for launch in launches:
        assert launch.kernel == kernel_of(kind, case, config)
        assert np.prod(launch.cluster) == tile_of(config)[2]


def kernel_of(kind, case, config):
    family = "gemm_1d1d" if kind in OUTER else "gemm_1d2d"
    types = "_".join(SHORT[t] for t in types_of(kind, case, config))
    return f"{family}_{config.partition(' ')[0]}_{types}"


@pytest.mark.parametrize(("kind", "config"), ONCE)
@pytest.mark.representatives("kind", cases=8)
def test_a_small_product_equals_float64(kind, config):
    check(kind, SMALL, config, SCHEDULES[:1])


@pytest.mark.parametrize("config", configs("gemm_1d2d"))
@pytest.mark.representatives(cases=4)
def test_fewer_rows_than_a_tile_equal_float64(config):
    """No row past the lhs is copied: a stage's other rows are zeros from the start."""
    rng = np.random.default_rng(5)
    rhs = quantized(rng, (24, 400), E4M3, (128, 128))
    function = jax.jit(functools.partial(jaxfp8.gemm, out_dtype=F32, config=config, num_sms=SMS))
    for rows in (1, 8, 17, 50):
        lhs = quantized(rng, (rows, 400), E4M3)
        with emulated_platform(num_sms=SMS):
            got = np.asarray(function(lhs, rhs))
        oracle.assert_close(got, oracle.gemm(lhs, rhs), custom_calls.TOLERANCE[F32])
        arrays = (lhs.data, lhs.scale, rhs.data, rhs.scale)
        plan = kernel_launch.plan(
            "gemm_1d2d",
            {str(i): array[None] for i, array in enumerate(arrays)},
            {"out": (F32, (1, rows, 24))},
            config=configs("gemm_1d2d").index(config),
            device_sms=SMS,
        )
        assert plan.args[0]["box"][1] <= rows


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "config"), ALL)
def test_a_product_equals_float64(kind, config, case):
    check(kind, case, config, SCHEDULES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DIRECT)
@pytest.mark.parametrize("draw", range(3))
def test_accumulating_handlers_equal_float64_with_every_configuration(kind, draw):
    target = f"jaxfp8_{kind}_v1"
    for config, name in enumerate(_C.configs(target)):
        sizes = np.asarray(sizes_of(CASES[(config + draw) % len(CASES)], name)[1], np.int32)
        rng = np.random.default_rng([draw, config])
        call = custom_calls.DRAWS[target](rng, sizes, config=config, most=150)
        first = None
        with EmulatedDriver(_ffi.image_directory(), num_sms=SMS) as driver:
            for driver.seed in SCHEDULES:
                results = call.run()
                first = results if first is None else first
                for a, b in zip(first, results, strict=True):
                    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
        call.check(first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grouped_gemm", "masked_grouped_gemm", "grouped_wgrad_gemm"])
def test_512_groups(kind):
    rng = np.random.default_rng(512)
    sizes = rng.integers(0, 3, 512).tolist()
    sizes[7], sizes[500] = 129, 128
    groups = np.asarray(sizes, np.int32)
    rows = sum(sizes) + 5
    if kind == "grouped_wgrad_gemm":
        operands = columns(rng, rows, sizes, 24, E4M3), columns(rng, rows, sizes, 16, E4M3)
        want = oracle.grouped_wgrad_gemm(*operands, sizes, rows)
    else:
        lead = (512, 16) if kind.startswith("masked") else (rows,)
        operands = (
            quantized(rng, (*lead, 16), E4M3),
            quantized(rng, (512, 24, 16), E4M3, (128, 128)),
        )
        want = getattr(oracle, kind)(*operands, sizes)
    function = jax.jit(functools.partial(getattr(jaxfp8, kind), out_dtype=F32))
    results = []
    with emulated_platform(num_sms=4) as driver:
        for driver.seed in SCHEDULES:
            results.append(np.asarray(function(*operands, groups)))
    oracle.assert_close(results[0], want, custom_calls.TOLERANCE[F32])
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


# --- nothing is left out --------------------------------------------------------------------------


def test_every_target_with_configurations_has_cases():
    with_configs = {t for t in _ffi.targets() if _C.configs(t)}
    covered = {*KINDS, *DIRECT, *(f"{k}_accum" for k in KINDS if accumulates(k, "whole tiles"))}
    assert with_configs == {f"jaxfp8_{kind}_v1" for kind in covered}


def test_every_compiled_kernel_has_a_case():
    compiled = {
        kernel
        for image in _ffi.images()
        if image.startswith("gemm")
        for kernel in emulator.module(_ffi.image_directory() / f"{image}.ptx").entries
    }
    assert compiled == {kernel_of(kind, case, config) for kind, config in ALL for case in CASES}


def test_cases_have_tails_of_every_configurations_tile():
    for kind, config in ALL:
        m, n, _ = tile_of(config)
        shapes = [shape_of(case, config) for case in CASES]
        assert any(shape[0] > m and shape[0] % m for shape in shapes)
        assert any(shape[1] > n and shape[1] % n for shape in shapes)
        assert any(shape[2] % 128 for shape in shapes)
        outputs = {(types_of(kind, c, config)[2], accumulates(kind, c)) for c in CASES}
        for accumulate in {False, accumulates(kind, "whole tiles")}:
            assert {(BF16, accumulate), (F32, accumulate)} <= outputs


def test_configurations_keep_their_indices():
    """Exported programs hold them; new ones are appended here and in csrc/host/gemm.cc."""
    block = (
        "m64n32 1x1", "m64n64 1x1", "m64n128 1x1", "m128n128 1x1", "m128n128 2x1", "m128n128 1x2",
        "m128n192 1x1", "m128n192 2x1", "m128n96x2 1x1", "m128n96x2 2x1", "m256n128 1x1",
        "m256n128 1x2", "m256n128 2x1", "m64n64 1x2", "m64n64 2x1", "m64n128 1x2", "m64n128 2x1",
        "m64n16 1x1", "m64n16 1x2",
    )  # fmt: skip
    outer = (
        "m64n64 1x1", "m128n128 1x1", "m128n128 2x1", "m128n128 1x2", "m128n192 1x1",
        "m128n192 2x1", "m128n96x2 1x1", "m128n96x2 2x1", "m256n128 1x1", "m256n128 1x2",
        "m256n128 2x1",
    )  # fmt: skip
    assert configs("gemm_1d2d") == [name.replace(" ", " cluster ") for name in block]
    assert configs("gemm_1d1d") == [name.replace(" ", " cluster ") for name in outer]


def test_products_of_a_family_have_the_same_configurations():
    for family in (BLOCK, OUTER):
        assert len({tuple(configs(kind)) for kind in family}) == 1
