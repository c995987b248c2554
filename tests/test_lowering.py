"""What the operations lower to for cuda, read on a machine without a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
import jaxfp8.export
from jaxfp8 import _ffi

pytestmark = pytest.mark.skipif(
    not _ffi.images(), reason="this build of jaxfp8 holds no CUDA kernels"
)

X, W = np.zeros((64, 256), np.float32), np.zeros((256, 384), np.float32)
EXPERTS = np.zeros((3, 256, 384), np.float32)
SIZES = np.array([10, 0, 30], np.int32)


def cuda_text(f, *args, **kwargs):
    return jax.jit(f, **kwargs).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """Names of the custom calls, shortened, in order."""
    return re.findall(r"custom_call @jaxfp8_(\w+)_v1\(", text)


def the_call(text, name):
    (line,) = [x for x in text.splitlines() if f"@jaxfp8_{name}_v1(" in x]
    return line


def assert_only_custom_calls(text, expected):
    assert sorted(calls(text)) == sorted(expected)
    assert not re.search(r"stablehlo\.(dot|dot_general)\b", text)
    assert not re.search(r"stablehlo\.convert .*-> tensor<[\dx]*f8E", text)


PRODUCTS = {
    "gemm": (lambda q: jaxfp8.gemm(q["rows"], q["square"]), "gemm_1d2d"),
    "gemm 1x128": (lambda q: jaxfp8.gemm(q["rows"], q["rows"]), "gemm_1d1d"),
    "batched": (lambda q: jaxfp8.gemm(q["batch"], q["experts"]), "gemm_1d2d"),
    "wgrad": (lambda q: jaxfp8.wgrad_gemm(q["rows"], q["rows"]), "gemm_1d1d"),
    "grouped": (lambda q: jaxfp8.grouped_gemm(q["rows"], q["experts"], SIZES), "grouped_gemm"),
    "masked": (
        lambda q: jaxfp8.masked_grouped_gemm(q["batch"], q["experts"], SIZES),
        "masked_grouped_gemm",
    ),
    "grouped wgrad": (
        lambda q: jaxfp8.grouped_wgrad_gemm(q["columns"], q["columns"], SIZES),
        "grouped_wgrad_gemm",
    ),
}


@pytest.fixture(scope="module")
def quantized():
    return {
        "rows": jaxfp8.quantize(X),
        "square": jaxfp8.quantize_weight(W)[0],
        "batch": jaxfp8.quantize(np.zeros((3, 64, 256), np.float32)),
        "experts": jaxfp8.quantize_weight(EXPERTS)[0],
        "columns": jaxfp8.quantize_both(X, group_sizes=SIZES)[1],
    }


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_is_one_custom_call(case, quantized):
    f, name = PRODUCTS[case]
    text = cuda_text(f, quantized)
    assert_only_custom_calls(text, [name])
    line = the_call(text, name)
    assert "config = -1 : i32" in line and "num_sms = 0 : i32" in line


QUANTIZERS = {
    "rows": (lambda: (jaxfp8.quantize, X), "quantize_rows"),
    "blocks": (lambda: (lambda x: jaxfp8.quantize(x, (128, 128)), X), "quantize_blocks"),
    "both": (lambda: (jaxfp8.quantize_both, X), "quantize_both"),
    "weight": (lambda: (jaxfp8.quantize_weight, W), "quantize_weight"),
    "experts": (lambda: (jaxfp8.quantize_weight, EXPERTS), "quantize_weight"),
    "ragged": (
        lambda: (lambda x: jaxfp8.quantize_both(x, group_sizes=SIZES), X),
        "quantize_ragged_both",
    ),
}


@pytest.mark.parametrize("case", QUANTIZERS)
@pytest.mark.parametrize("scale_format", ["float32", "pow2"])
def test_a_quantization_is_one_custom_call(case, scale_format):
    f, x = QUANTIZERS[case][0]()
    with jaxfp8.Recipe(scale_format=scale_format):
        text = cuda_text(f, x)
    assert_only_custom_calls(text, [QUANTIZERS[case][1]])
    assert f"pow2 = {'true' if scale_format == 'pow2' else 'false'}" in text


def test_row_scales_are_m_major(quantized):
    line = the_call(cuda_text(PRODUCTS["gemm"][0], quantized), "gemm_1d2d")

    layouts = re.findall(r"dense<\[([\d, ]+)\]>", line)
    assert layouts[:4] == ["2, 1, 0", "1, 0, 2", "2, 1, 0", "2, 1, 0"], layouts
    line = the_call(cuda_text(jaxfp8.quantize, X), "quantize_rows")
    assert re.findall(r"dense<\[([\d, ]+)\]>", line) == ["1, 0", "1, 0", "0, 1"]


def test_accum_is_aliased_and_donation_reaches_it():
    q = jaxfp8.quantize(X)
    accum = np.zeros((64, 64), np.float32)
    f = lambda lhs, rhs, accum: jaxfp8.wgrad_gemm(lhs, rhs, accum=accum)  # noqa: E731
    text = cuda_text(f, q, q, accum, donate_argnums=2)
    assert_only_custom_calls(text, ["gemm_1d1d_accum"])
    line = the_call(text, "gemm_1d1d_accum")
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 4" in line
    assert "tf.aliasing_output" in text


def test_an_accumulating_call_stands_between_barriers():
    """So that XLA takes it into no fusion with a slice of its operands or a stack of its results."""
    q = jaxfp8.quantize(X)
    stack = np.zeros((3, 64, 64), np.float32)
    text = cuda_text(lambda a, b, acc: jaxfp8.wgrad_gemm(a, b, accum=acc[1]), q, q, stack)
    before, call, after = re.split(
        r"(stablehlo\.custom_call @jaxfp8_gemm_1d1d_accum_v1\([^\n]*)", text
    )
    operands = set(re.findall(r"%\w+", call.partition("(")[2].partition(")")[0]))
    barrier = [line for line in before.splitlines() if "stablehlo.optimization_barrier" in line][-1]
    assert {o.partition("#")[0] for o in operands} == {re.match(r"\s*(%\w+)", barrier)[1]}
    (result,) = re.findall(r"(%\w+) = $", before.splitlines()[-1])
    assert re.search(rf"stablehlo\.optimization_barrier {result}\b", after)


def test_num_sms_of_the_recipe_reaches_the_call(quantized):
    with jaxfp8.Recipe(num_sms=100):
        text = cuda_text(PRODUCTS["gemm"][0], quantized)
    assert "num_sms = 100 : i32" in text


def train(f):
    def run(x, w, dy):
        y, pull = jax.vjp(f, x, w)
        return y, *pull(dy)

    return run


FORWARD = ["quantize_rows", "quantize_weight", "gemm_1d2d"]
TRAIN = ["quantize_both", "quantize_weight", "gemm_1d2d", "quantize_both", "gemm_1d2d", "gemm_1d1d"]
SPELLINGS = {
    "linear": jaxfp8.linear,
    "dot_general": lambda x, w: jaxfp8.dot_general(x, w, (((1,), (0,)), ((), ()))),
    "einsum": lambda x, w: jaxfp8.einsum("mk,kn->mn", x, w),
    "vmap": lambda x, w: jax.vmap(lambda x: jaxfp8.linear(x, w))(x),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_linear_layer_is_three_products(spelling):
    f, dy = SPELLINGS[spelling], np.zeros((64, 384), np.float32)
    assert_only_custom_calls(cuda_text(f, X, W), FORWARD)
    assert_only_custom_calls(cuda_text(train(f), X, W, dy), TRAIN)


def test_ragged_dot_is_three_products():
    f = lambda x, w: jaxfp8.ragged_dot(x, w, SIZES)  # noqa: E731
    dy = np.zeros((64, 384), np.float32)
    assert_only_custom_calls(
        cuda_text(f, X, EXPERTS), ["quantize_rows", "quantize_weight", "grouped_gemm"]
    )
    assert_only_custom_calls(
        cuda_text(train(f), X, EXPERTS, dy),
        [
            "quantize_ragged_both",
            "quantize_weight",
            "grouped_gemm",
            "quantize_ragged_both",
            "grouped_gemm",
            "grouped_wgrad_gemm",
        ],
    )


UP, UPS = np.zeros((256, 2, 128), np.float32), np.zeros((3, 256, 2, 128), np.float32)
DOWN, DOWNS = np.zeros((128, 72), np.float32), np.zeros((3, 128, 72), np.float32)
MLPS = {
    "mlp": (jaxfp8.mlp, UP, DOWN, ""),
    "ragged_mlp": (lambda *arrays: jaxfp8.ragged_mlp(*arrays, SIZES), UPS, DOWNS, "ragged_"),
}


def mlp_calls(ragged, ahead):
    """Calls of a forward pass, and of a train step, of two weights of which some are quantized ahead."""
    weights = ["quantize_weight"] * (2 - ahead)
    gemm, wgrad = ("grouped_gemm", "grouped_wgrad_gemm") if ragged else ("gemm_1d2d", "gemm_1d1d")
    forward = ["quantize_rows", *weights, gemm, "activation_rows", gemm]
    step = [f"quantize_{ragged}both"] * 2 + [gemm] * 4 + [wgrad] * 2 + weights
    return forward, step + [f"activation_{ragged}both", f"activation_{ragged}grad_both"]


@pytest.mark.parametrize(
    "ahead", ["none", "both", *(pytest.param(w, marks=pytest.mark.slow) for w in ("up", "down"))]
)
@pytest.mark.parametrize("name", MLPS)
def test_an_mlp_is_six_products_and_an_activation_is_read_once(name, ahead):
    """The products of a weight that was quantized ahead read its copies: nothing quantizes it again."""
    f, up, down, ragged = MLPS[name]
    flat = up.reshape(*up.shape[:-2], -1)
    dy = np.zeros((64, 72), np.float32)

    def weights(values, copies):
        return [w if q is None else q.with_value(w) for w, q in zip(values, copies, strict=True)]

    copies = [
        jaxfp8.prequantize(w) if ahead in (which, "both") else None
        for which, w in (("up", flat), ("down", down))
    ]
    values = [up if copies[0] is None else flat, down]

    def step(x, values, copies, dy):
        y, pull = jax.vjp(lambda x, values: f(x, *weights(values, copies)), x, values)
        return y, pull(dy)

    forward, train = mlp_calls(ragged, {"none": 0, "both": 2}.get(ahead, 1))
    assert_only_custom_calls(
        cuda_text(lambda x, v, c: f(x, *weights(v, c)), X, values, copies), forward
    )
    text = cuda_text(step, X, values, copies, dy)
    assert_only_custom_calls(text, train)
    assert not re.search(r"stablehlo\.(exponential|logistic|tanh)\b", text)


def test_products_of_weights_quantized_ahead_quantize_tokens_alone():
    w, experts = jaxfp8.prequantize(W), jaxfp8.prequantize(EXPERTS)
    dy = np.zeros((64, 384), np.float32)
    ragged = lambda x, w: jaxfp8.ragged_dot(x, w, SIZES)  # noqa: E731

    def step(f):
        return lambda x, value, w, dy: train(lambda x, v: f(x, w.with_value(v)))(x, value, dy)

    assert_only_custom_calls(cuda_text(jaxfp8.linear, X, w), ["quantize_rows", "gemm_1d2d"])
    assert_only_custom_calls(cuda_text(ragged, X, experts), ["quantize_rows", "grouped_gemm"])
    assert_only_custom_calls(
        cuda_text(step(jaxfp8.linear), X, W, w, dy),
        [*["quantize_both"] * 2, *["gemm_1d2d"] * 2, "gemm_1d1d"],
    )
    assert_only_custom_calls(
        cuda_text(step(ragged), X, EXPERTS, experts, dy),
        [*["quantize_ragged_both"] * 2, *["grouped_gemm"] * 2, "grouped_wgrad_gemm"],
    )
    assert_only_custom_calls(cuda_text(jaxfp8.prequantize, W), ["quantize_weight"])


@pytest.mark.parametrize("k", [1, 129, 250])
def test_data_is_padded_to_the_copy_engines_stride(k):
    lhs = jaxfp8.quantize(np.zeros((5, k), np.float32))
    rhs = jaxfp8.quantize(np.zeros((7, k), np.float32), block=(128, 128))
    text = cuda_text(jaxfp8.gemm, lhs, rhs)
    assert_only_custom_calls(text, ["gemm_1d2d"])
    padded = -(-k // 16) * 16
    assert f"tensor<1x5x{padded}xf8E4M3FN>" in the_call(text, "gemm_1d2d")


def test_empty_products_need_no_call():
    lhs = jaxfp8.quantize(np.zeros((5, 0), np.float32))
    text = cuda_text(lambda q: jaxfp8.gemm(q, q, accum=jnp.ones((5, 5))), lhs)
    assert_only_custom_calls(text, [])


def test_a_build_without_kernels_says_so(monkeypatch):
    monkeypatch.setattr(_ffi, "images", tuple)
    jax.clear_caches()
    with pytest.raises(NotImplementedError, match="no CUDA kernels"):
        cuda_text(jaxfp8.linear, X + 1, W)
    jaxfp8.linear(X, W)  # the portable lowering needs none


def test_the_portable_lowering_has_no_custom_call():
    text = jax.jit(train(jaxfp8.linear)).lower(X, W, np.zeros((64, 384), np.float32)).as_text()
    assert "jaxfp8_" not in re.sub(r"call @\w+|func private @\w+", "", text)


# ------------------------------------------------------------------------------------------------
# What XLA's scheduler is told
# ------------------------------------------------------------------------------------------------


def told(text):
    """Nanoseconds of each custom call; None where nothing is said."""
    lines = [x for x in text.splitlines() if "custom_call @jaxfp8_" in x]
    found = [re.search(r'latency_metadata = "(\d+)"', x) for x in lines]
    return dict(zip(calls(text), (f and int(f[1]) for f in found), strict=True))


def test_every_call_says_about_how_long_it_runs():
    """Products by their operations at 1.2 PFLOP/s, all by their bytes at 3.3 TB/s: the larger."""
    m, k, n = 4096, 2048, 8192
    x, w = jnp.zeros((m, k), jnp.bfloat16), jnp.zeros((k, n), jnp.bfloat16)
    step = jax.grad(lambda x, w: jaxfp8.linear(x, w).astype(jnp.float32).sum(), (0, 1))
    found = told(cuda_text(step, x, w))
    product = 2 * m * k * n / 1.2e15 * 1e9
    assert found["gemm_1d2d"] == found["gemm_1d1d"] == pytest.approx(product, rel=1e-3)
    quantizer = (2 + 2 * (1 + 4 / 128)) * m * n / 3.3e12 * 1e9  # of dy, the last one
    assert found["quantize_both"] == pytest.approx(quantizer, rel=1e-3)
    assert all(found.values())


def test_every_call_of_a_mixture_says_about_how_long_it_runs():
    def loss(x, gate, up, down):
        return jaxfp8.moe(x, expert, gate, up, down).astype(jnp.float32).sum()

    x, gate = jnp.zeros((64, 256), jnp.bfloat16), jnp.ones((64, 2))
    expert, up, down = jnp.zeros((64, 2), jnp.int32), EXPERTS, jnp.zeros((3, 384, 256))
    found = told(cuda_text(jax.grad(loss, (0, 1, 2, 3)), x, gate, up, down))
    assert {"sum_rows", "grouped_gemm", "grouped_wgrad_gemm"} <= set(found)
    assert all(found.values())


def test_a_call_of_any_number_of_rows_says_nothing_of_its_time():
    (rows,) = jax.export.symbolic_shape("m")
    x = jax.ShapeDtypeStruct((rows, 256), jnp.float32)
    exported = jax.export.export(
        jax.jit(jaxfp8.linear),
        platforms=["cuda"],
        disabled_checks=jaxfp8.export.disabled_checks(),
    )(x, jnp.zeros((256, 384)))
    found = told(exported.mlir_module())
    assert found["gemm_1d2d"] is None and found["quantize_weight"] > 0
