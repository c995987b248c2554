"""The library's operations on the emulated GPU: handlers, plans and kernels under jax.jit, no GPU.

Each case also runs on the portable lowering. Quantization must agree to the bit, products to float32
rounding; every schedule must agree with every other to the bit; the emulator reports any race.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import _ffi
from tests import kernel_cases as cases
from tests import oracle
from tests.emulated_platform import emulated_platform
from tests.oracle_mixture import mixture, reference
from tests.oracle_mlp import FLIPS

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]

SEEDS = (0, 1, 2)
F32 = 1e-6
BF16 = 2**-8  # neighbours on both sides of a rounding
BOTH = [jnp.bfloat16, jnp.float32]


def under_schedules(cases, seeds=SEEDS, every=5):
    """(case, seeds): every fifth case under all schedules; the others under one, by turns, and slowly under all."""
    found = []
    for i, case in enumerate(cases):
        every_one = pytest.param(case, seeds, id=f"{case}-all schedules", marks=pytest.mark.slow)
        if i % every == 0:
            found.append(pytest.param(case, seeds, id=str(case)))
        else:
            found += [pytest.param(case, seeds[i % len(seeds) :][:1], id=str(case)), every_one]
    return found


def emulate(run, seeds=SEEDS, num_sms=2):
    """What `run` gives on the emulated platform, the same bits under every schedule."""
    results = []
    with emulated_platform(num_sms=num_sms) as driver:
        for driver.seed in seeds:
            results.append({name: np.asarray(v) for name, v in run().items()})
    for other in results[1:]:
        for name, v in results[0].items():
            np.testing.assert_array_equal(v.view(np.uint8), other[name].view(np.uint8))
    return results[0]


def tolerance(dtype):
    return F32 if np.dtype(dtype) == np.float32 else BF16


def assert_products_agree(run, **options):
    want = {name: np.asarray(v) for name, v in run().items()}
    got = emulate(run, **options)
    for name, v in want.items():
        assert got[name].dtype == v.dtype
        oracle.assert_close(got[name], v, tolerance(v.dtype))


def assert_bits_agree(run, **options):
    want = run()
    got = emulate(run, **options)
    for name, v in want.items():
        np.testing.assert_array_equal(got[name], np.asarray(v), err_msg=name)


@pytest.mark.parametrize("shape, seeds", under_schedules(cases.GEMM_SHAPES))
@pytest.mark.representatives(cases=6)
def test_gemm_of_any_shape(shape, seeds):
    assert_products_agree(cases.gemm(shape, out_dtype=BOTH[sum(shape) % 2]), seeds=seeds)


@pytest.mark.parametrize("shape, seeds", under_schedules(cases.GEMM_SHAPES[::3], (0, 1)))
@pytest.mark.representatives(cases=3)
def test_gemm_of_two_1x128_operands(shape, seeds):
    run = cases.gemm(shape, square=False, out_dtype=BOTH[sum(shape) % 2])
    assert_products_agree(run, seeds=seeds)


@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
@pytest.mark.parametrize("out_dtype", BOTH, ids=["bf16", "f32"])
@pytest.mark.representatives("square", "out_dtype")
def test_gemm_accumulates(square, out_dtype):
    run = cases.gemm((130, 136, 272), square=square, out_dtype=out_dtype, accum=True)
    assert_products_agree(run, seeds=(0, 1))


@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
@pytest.mark.representatives("square", "shared")
def test_batched_gemm(square, shared):
    run = cases.batched(3, (70, 136, 200), shared=shared, square=square, out_dtype=jnp.float32)
    assert_products_agree(run, seeds=(0, 1))


def test_gemm_shows_nonfinite_blocks():
    x, w = np.ones((130, 300), np.float32), np.ones((300, 260), np.float32)
    x[2, 5], w[290, 130] = np.inf, np.nan
    lhs, (rhs, _) = jaxfp8.quantize(x), jaxfp8.quantize_weight(w)
    with emulated_platform():
        got = np.asarray(jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32))
    bad = np.zeros((130, 260), bool)
    bad[2], bad[:, 128:256] = True, True
    np.testing.assert_array_equal(~np.isfinite(got), bad)


@pytest.mark.parametrize("groups, seeds", under_schedules(cases.GROUPS))
@pytest.mark.representatives(cases=3)
def test_grouped_gemm(groups, seeds):
    assert_products_agree(cases.grouped(groups, out_dtype=jnp.float32), seeds=seeds)


def test_grouped_gemm_in_bfloat16():
    assert_products_agree(cases.grouped("unequal"), seeds=(0, 1))


@pytest.mark.parametrize("sizes", [[0, 1, 127], [128, 129, 130], [500, -3, 64]], ids=str)
@pytest.mark.representatives()
def test_masked_grouped_gemm(sizes):
    assert_products_agree(cases.masked(130, sizes, out_dtype=jnp.float32), seeds=(0, 1))


@pytest.mark.parametrize("groups", cases.GROUPS)
@pytest.mark.parametrize("accum", [False, True], ids=["store", "accumulate"])
@pytest.mark.representatives("accum", cases=3)
def test_grouped_wgrad_gemm(groups, accum):
    seeds = SEEDS if groups in ("unequal", "exactly 128") else (0,)
    assert_products_agree(cases.grouped_wgrad(groups, accum=accum), seeds=seeds)


def test_groups_of_exactly_128_tokens_have_the_right_weight_gradients():
    """DeepGEMM's grouped weight gradient differed from run to run there (its pull requests 343 and 365)."""
    run = cases.grouped_wgrad("128 tokens each")
    assert_products_agree(run)


def test_a_masked_groups_last_tile_does_not_overrun_into_the_next_group():
    """DeepGEMM's did where the capacity is no multiple of the tile (its issue 268)."""
    assert_products_agree(cases.masked(70, [70, 1, 70], out_dtype=jnp.float32))


@pytest.mark.parametrize("kind", ["rows", "blocks", "both", "weight"])
@pytest.mark.parametrize("shape, seeds", under_schedules(cases.QUANTIZE_SHAPES, (0, 1)))
@pytest.mark.representatives("kind", cases=6)
def test_quantizers_agree_to_the_bit(kind, shape, seeds):
    i = sum(shape)
    run = cases.quantizer(
        kind,
        shape,
        input_dtype=(np.float32, jnp.bfloat16, np.float16)[i % 3],
        dtype=(cases.E4M3, cases.E5M2)[i // 3 % 2],
        scale_format=("float32", "pow2")[i // 2 % 2],
    )
    assert_bits_agree(run, seeds=seeds)


def every_format(test):
    """Of input, result and scale."""
    for name, values in (
        ("scale_format", ["float32", "pow2"]),
        ("dtype", [cases.E4M3, cases.E5M2]),
        ("input_dtype", [np.float32, jnp.bfloat16, np.float16]),
    ):
        ids = [v if isinstance(v, str) else np.dtype(v).name for v in values]
        test = pytest.mark.parametrize(name, values, ids=ids)(test)
    return pytest.mark.slow(test)


@every_format
@pytest.mark.parametrize("kind", ["rows", "blocks", "both", "weight", "ragged"])
def test_every_format_of_the_quantizers_agrees_to_the_bit(kind, input_dtype, dtype, scale_format):
    options = {"input_dtype": input_dtype, "dtype": dtype, "scale_format": scale_format}
    if kind == "ragged":
        run = cases.ragged_quantizer("129 and 2", 72, **options)
    else:
        run = cases.quantizer(kind, (70, 136), **options)
    assert_bits_agree(run)


@every_format
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("kind", ["rows", "both", "grad_both", "ragged_both", "ragged_grad_both"])
def test_every_format_of_the_activations_agrees_to_the_bit(
    kind, halves, input_dtype, dtype, scale_format
):
    ragged = "ragged" in kind
    run = cases.activation(
        kind,
        (40, halves, 72) if ragged or kind == "rows" else (1, 40, halves, 72),
        ("silu", "gelu")[halves % 2],
        input_dtype=input_dtype,
        dtype=dtype,
        sizes=[5, 0, 30] if ragged else None,
        pow2=scale_format == "pow2",
    )
    assert_bits_agree(run)


@pytest.mark.parametrize("groups, seeds", under_schedules(cases.GROUPS, (0, 1)))
@pytest.mark.representatives(cases=3)
def test_ragged_quantizers_agree_to_the_bit(groups, seeds):
    assert_bits_agree(cases.ragged_quantizer(groups), seeds=seeds)


RECIPES = [
    jaxfp8.Recipe(),
    jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2, scale_format="pow2"),
    jaxfp8.Recipe(num_sms=1),
]


@pytest.mark.parametrize("recipe, seeds", under_schedules(RECIPES, (0, 1)))
@pytest.mark.representatives()
def test_linear_trains(recipe, seeds):
    assert_products_agree(cases.train_linear((130, 200, 136), recipe), seeds=seeds)


@pytest.mark.parametrize(
    "groups, seeds", under_schedules(["negative", "fewer than M", "unequal"], (0, 1))
)
@pytest.mark.representatives()
def test_ragged_dot_trains(groups, seeds):
    assert_products_agree(cases.train_ragged_dot(groups), seeds=seeds)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["quantize_rows", "quantize_both", "rows", "requantize_both"])
def test_rows_of_a_mixture_are_gathered_to_the_bit(kind):
    for shape in ((20, 150, 40), (30, 40, 130)):
        assert_bits_agree(cases.gather(kind, shape, [9, 0, 129]), seeds=(0, 1))


@pytest.mark.full
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_a_token_are_summed_to_the_bit(weighted):
    for out_dtype in BOTH:
        run = cases.sum_of_rows((20, 11, 50, 72), weighted=weighted, out_dtype=out_dtype)
        assert_bits_agree(run, seeds=(0, 1))


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["weighted_rows", "ragged_weighted_both", "ragged_weighted_grad_both"]
)
def test_weighted_activations_agree_to_the_bit(kind):
    sizes = [5, 0, 30] if "ragged" in kind else None
    for shape in ((40, 2, 72), (40, 2, 132)):
        assert_bits_agree(cases.weighted_activation(kind, shape, sizes=sizes), seeds=(0, 1))


@pytest.mark.full
def test_mixture_of_experts_and_its_gradients():
    """An expert without tokens, choices of none, an expert chosen twice."""
    m = mixture(40, 2, 3, 128, 128, 128)
    expert = np.where(m.expert == 1, 2, m.expert)

    def run():
        def f(x, gate, up, down):
            return jaxfp8.moe(x, expert, gate, up, down)

        @jax.jit
        def train(x, gate, up, down, dy):
            y, pull = jax.vjp(f, x, gate, up, down)
            return y, *pull(dy)

        results = train(m.x, m.gate, m.w_up, m.w_down, m.dy)
        return dict(zip(("y", "dx", "dgate", "dw_up", "dw_down"), results, strict=True))

    want = reference(m._replace(expert=expert))
    got = emulate(run, seeds=(0, 1))
    for (name, value), exact in zip(got.items(), want, strict=True):
        oracle.assert_close(value, exact, FLIPS)
        np.testing.assert_array_equal(value[exact == 0], 0, err_msg=name)
