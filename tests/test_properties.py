"""Properties of every public function, on random inputs: laws that hold whatever the numbers are.

Results are compared with one another or with float64, on the portable lowering. Sizes come from a few, which share
compiled programs; values, groups and routes are any.
"""

import functools
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from jaxfp8.testing import assert_fp8_close
from tests import oracle
from tests import oracle_quantize as oq
from tests.programs import assert_same_bits

F32 = 2e-6  # products in float32, norm-wise
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
HALF_STEP = {np.dtype(E4M3): 2.0**-4, np.dtype(E5M2): 2.0**-3}  # of a normal element, relative
SMALLEST = {np.dtype(E4M3): 2.0**-9, np.dtype(E5M2): 2.0**-16}  # subnormal of the format

COVERS: dict[str, list[str]] = {}
# What has a law of its own to keep, tested where it lives.
ELSEWHERE = {
    "checkpoint_policies.save_fp8_residuals": (
        "test_transformations.py",
        "test_the_shipped_policies_keep_the_fp8_copies_as_bytes",
    ),
    "checkpoint_policies.save_dots_and_fp8_residuals": (
        "test_transformations.py",
        "test_the_shipped_policies_keep_the_fp8_copies_as_bytes",
    ),
    "checkpoint_policies.offload_fp8_residuals": (
        "test_transformations.py",
        "test_offloaded_residuals_lie_in_host_memory",
    ),
    "moe": ("test_moe.py", "test_values_and_gradients_are_those_of_quantized_products"),
    "export.disabled_checks": (
        "test_export.py",
        "test_without_the_listed_checks_jax_refuses_and_with_them_others_stay",
    ),
}


def covers(*names):
    """Names the public functions whose property a test is."""

    def mark(test):
        for name in names:
            COVERS.setdefault(name, []).append(test.__name__)
        return test

    return mark


def examples(count):
    return settings(max_examples=count, deadline=None)


# --- random inputs --------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
# Shape, type, and options of a quantization: each a program to compile.
ARRAYS = st.sampled_from(
    [
        ((3, 200), np.float32, dict(dtype=E4M3, scale_format="float32")),
        ((130, 129), np.float32, dict(dtype=E5M2, scale_format="float32")),
        ((130, 129), ml_dtypes.bfloat16, dict(dtype=E4M3, scale_format="pow2")),
        ((1, 1), np.float16, dict(dtype=E5M2, scale_format="pow2")),
    ]
)
PRODUCTS = st.sampled_from([(5, 200, 72), (130, 16, 1)])  # tokens, K, N
SIGNS = st.sampled_from([1.0, -1.0, 2.0, 0.25])
GROUPS, ROWS, WIDTH, HIDDEN = 3, 40, 144, 24
SIZES = st.lists(st.integers(-3, ROWS + 5), min_size=GROUPS, max_size=GROUPS)
SPECIAL = [0.0, -0.0, 1e-39, -1e-45, 3e38, -3e38, 448.0, 2.0**-126]


def floats(seed, *shape, dtype=np.float32, special=False):
    """Rows of any magnitude; with `special`, values at the ends of the range among them."""
    r = np.random.default_rng([seed, *shape])
    x = r.standard_normal(shape) * 10.0 ** r.integers(-3, 4, (*shape[:-1], 1))
    if special:
        x = np.where(r.random(shape) < 0.2, r.choice(SPECIAL, shape), x)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32).astype(dtype)
    return np.where(np.isfinite(x.astype(np.float32)), x, np.asarray(1, dtype))


def normal(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def quantized(seed, *shape, block=(1, 128), dtype=E4M3):
    return jaxfp8.quantize(normal(seed, *shape), block, dtype=dtype)


def value(q):
    return oracle.dequantize(q)


# --- the list -------------------------------------------------------------------------------------


def public_functions():
    for name in jaxfp8.__all__:
        found = getattr(jaxfp8, name)
        if inspect.ismodule(found):
            inner = getattr(found, "__all__", None) or [n for n in dir(found) if n[0] != "_"]
            for n in inner:
                f = getattr(found, n)
                if inspect.isroutine(f) and f.__module__.startswith("jaxfp8"):
                    yield f"{name}.{n}"
        elif inspect.isroutine(found):
            yield name


def test_every_public_function_has_a_property():
    public = set(public_functions())
    assert {"linear", "quantize", "dispatch", "validate.compare"} <= public
    assert not set(COVERS) & set(ELSEWHERE)
    assert public == set(COVERS) | set(ELSEWHERE)
    for name, (file, test) in ELSEWHERE.items():
        text = Path(__file__).with_name(file).read_text()
        assert re.search(rf"^def {test}\(", text, re.M), f"{name}: {test} is not in {file}"


# --- quantization ---------------------------------------------------------------------------------


@covers("quantize", "dequantize")
@examples(30)
@given(array=ARRAYS, seed=SEEDS, block=st.sampled_from([(1, 128), (128, 128)]))
def test_no_element_is_off_by_more_than_half_a_step(array, seed, block):
    shape, source, options = array
    x = floats(seed, *shape, dtype=source, special=True)
    q = jaxfp8.quantize(x, block, **options)
    scale = np.repeat(np.repeat(np.asarray(q.scale, np.float64), block[0], 0), 128, 1)
    dtype, exact = np.dtype(options["dtype"]), x.astype(np.float64)
    # 1/scale and the product are rounded in float32 first; float32 subnormals count as zero.
    half_smallest = scale[: shape[0], : shape[1]] * SMALLEST[dtype] / 2
    bound = np.maximum(np.abs(exact) * HALF_STEP[dtype], half_smallest)
    assert (np.abs(value(q) - exact) <= bound * (1 + 2**-20) + 2.0**-126).all()
    got = np.asarray(jaxfp8.dequantize(q)).astype(np.float64)
    np.testing.assert_allclose(got, value(q), rtol=2**-24, atol=2.0**-126)


@covers("quantize")
@examples(20)
@given(array=ARRAYS, seed=SEEDS, exponent=st.integers(-40, 40))
def test_quantization_commutes_with_powers_of_two_signs_and_order_of_rows(array, seed, exponent):
    shape, _, options = array
    x = normal(seed, *shape)
    q = jaxfp8.quantize(x, **options)
    scaled = jaxfp8.quantize(x * np.float32(2.0**exponent), **options)
    assert_same_bits(scaled.data, q.data)
    assert_same_bits(scaled.scale, q.scale * np.float32(2.0**exponent))
    order = np.random.default_rng(seed).permutation(shape[0])
    mixed = jaxfp8.quantize(-x[order], **options)
    assert_same_bits(mixed.scale, np.asarray(q.scale)[order])
    np.testing.assert_array_equal(value(mixed), -value(q)[order])


@covers("quantize")
@examples(20)
@given(seed=SEEDS, block=st.sampled_from([(1, 128), (128, 128)]))
def test_quantizing_what_was_quantized_changes_no_value(seed, block):
    """With power-of-two scales, whose values are exact in float32; the scale itself may shrink."""
    q = jaxfp8.quantize(floats(seed, 130, 129), block, scale_format="pow2")
    again = jaxfp8.quantize(jaxfp8.dequantize(q), block, scale_format="pow2")
    np.testing.assert_array_equal(value(again), value(q))


@covers("quantize_both", "quantize_weight")
@examples(20)
@given(array=ARRAYS, seed=SEEDS)
def test_both_orientations_are_those_of_one_quantization_each(array, seed):
    shape, source, options = array
    x = floats(seed, *shape, dtype=source, special=True)
    rows, columns = jaxfp8.quantize_both(x, **options)
    assert_same_bits(rows, jaxfp8.quantize(x, **options))
    assert_same_bits(columns, jaxfp8.quantize(x.T, **options))
    nt, nn = jaxfp8.quantize_weight(x, **options)
    assert_same_bits(nn, jaxfp8.quantize(x, (128, 128), **options))
    assert_same_bits(nt, jaxfp8.quantize(x.T, (128, 128), **options))


@covers("quantize_both")
@examples(15)
@given(sizes=SIZES, seed=SEEDS, dtype=st.sampled_from([E4M3, E5M2]))
def test_a_groups_columns_depend_on_its_own_rows_only(sizes, seed, dtype):
    x = floats(seed, ROWS, WIDTH)
    options = dict(group_sizes=np.int32(sizes), dtype=dtype)
    _, columns = jaxfp8.quantize_both(x, **options)
    start, size = oq.clipped_groups(sizes, ROWS)[1]
    other = floats(seed + 1, ROWS, WIDTH)
    other[start : start + size] = x[start : start + size]
    _, changed = jaxfp8.quantize_both(other, **options)
    at = sum(oq.cdiv(n, 128) * 128 for _, n in oq.clipped_groups(sizes, ROWS)[:1])
    for a, b, step in ((columns.data, changed.data, 1), (columns.scale, changed.scale, 128)):
        part = slice(at // step, at // step + oq.cdiv(size, step))
        assert_same_bits(np.asarray(a)[:, part], np.asarray(b)[:, part])


# --- products -------------------------------------------------------------------------------------


@covers("gemm", "wgrad_gemm")
@examples(20)
@given(
    shape=PRODUCTS,
    seed=SEEDS,
    factor=SIGNS,
    square=st.booleans(),
    dtype=st.sampled_from([E4M3, E5M2]),
)
def test_products_equal_float64_and_are_homogeneous(shape, seed, factor, square, dtype):
    m, k, n = shape
    lhs = quantized(seed, m, k, dtype=dtype)
    rhs = quantized(seed + 1, n, k, block=(128, 128) if square else (1, 128))
    product = jaxfp8.gemm if square else jaxfp8.wgrad_gemm
    y = product(lhs, rhs, out_dtype=jnp.float32)
    oracle.assert_close(y, value(lhs) @ value(rhs).T, F32)
    scaled = jaxfp8.QuantizedArray(lhs.data, lhs.scale * np.float32(factor), lhs.block)
    np.testing.assert_array_equal(
        product(scaled, rhs, out_dtype=jnp.float32), y * np.float32(factor)
    )
    accum = normal(seed + 2, m, n)
    oracle.assert_close(product(lhs, rhs, accum=accum), accum + np.asarray(y, np.float64), F32)


@covers("grouped_gemm", "masked_grouped_gemm")
@examples(15)
@given(sizes=SIZES, seed=SEEDS)
def test_ragged_products_are_each_groups_own_and_zero_beyond(sizes, seed):
    rhs = quantized(seed, GROUPS, HIDDEN, WIDTH, block=(128, 128))
    lhs, sizes = quantized(seed + 1, ROWS, WIDTH), np.int32(sizes)
    y = np.asarray(jaxfp8.grouped_gemm(lhs, rhs, sizes, out_dtype=jnp.float32))
    oracle.assert_close(y, oracle.grouped_gemm(lhs, rhs, sizes), F32)
    assert not y[sum(n for _, n in oq.clipped_groups(sizes, ROWS)) :].any()
    lhs = quantized(seed + 2, GROUPS, ROWS, WIDTH)
    y = np.asarray(jaxfp8.masked_grouped_gemm(lhs, rhs, sizes, out_dtype=jnp.float32))
    oracle.assert_close(y, oracle.masked_grouped_gemm(lhs, rhs, sizes), F32)
    assert all(not y[g, max(0, n) :].any() for g, n in enumerate(sizes))


@covers("grouped_wgrad_gemm")
@examples(15)
@given(sizes=SIZES, seed=SEEDS)
def test_group_gradients_add_to_what_is_there_and_empty_groups_add_nothing(sizes, seed):
    sizes = np.int32(sizes)
    _, lhs = jaxfp8.quantize_both(normal(seed, ROWS, HIDDEN), group_sizes=sizes)
    _, rhs = jaxfp8.quantize_both(normal(seed + 1, ROWS, WIDTH), group_sizes=sizes)
    got = np.asarray(jaxfp8.grouped_wgrad_gemm(lhs, rhs, sizes, out_dtype=jnp.float32))
    oracle.assert_close(got, oracle.grouped_wgrad_gemm(lhs, rhs, sizes, ROWS), F32)
    accum = normal(seed + 2, GROUPS, HIDDEN, WIDTH)
    more = np.asarray(jaxfp8.grouped_wgrad_gemm(lhs, rhs, sizes, accum=accum))
    oracle.assert_close(more, accum + got.astype(np.float64), F32)
    for g, (_, size) in enumerate(oq.clipped_groups(sizes, ROWS)):
        if not size:
            np.testing.assert_array_equal(more[g], accum[g])


# --- differentiable operations --------------------------------------------------------------------


def pulled(f, x, w, dy):
    y, pull = jax.vjp(f, x, w)
    return y, *pull(dy)


LINEAR = {
    "linear": jax.jit(lambda x, w, dy: pulled(jaxfp8.linear, x, w, dy)),
    "dot_general": jax.jit(
        lambda x, w, dy: pulled(
            lambda x, w: jaxfp8.dot_general(x, w, (((1,), (0,)), ((), ()))), x, w, dy
        )
    ),
    "einsum": jax.jit(
        lambda x, w, dy: pulled(lambda x, w: jaxfp8.einsum("tk,kn->tn", x, w), x, w, dy)
    ),
    "ragged_dot": jax.jit(
        lambda x, w, dy: pulled(
            lambda x, w: jaxfp8.ragged_dot(x, w[None], jnp.array([x.shape[0]])), x, w, dy
        )
    ),
    "prequantize": jax.jit(
        lambda x, w, dy: pulled(lambda x, w: jaxfp8.linear(x, jaxfp8.prequantize(w)), x, w, dy)
    ),
}


@covers("linear", "dot_general", "einsum", "ragged_dot", "prequantize")
@examples(12)
@given(shape=PRODUCTS, seed=SEEDS)
@pytest.mark.full
def test_all_ways_to_write_a_product_give_the_same_value_and_gradients(shape, seed):
    m, k, n = shape
    x, w, dy = floats(seed, m, k), normal(seed + 1, k, n), floats(seed + 2, m, n)
    want = LINEAR["linear"](x, w, dy)
    for name, f in LINEAR.items():
        for a, b in zip(f(x, w, dy), want, strict=True):
            assert oracle.error(a, b) <= F32, name


@covers("linear")
@examples(15)
@given(shape=PRODUCTS, seed=SEEDS, exponents=st.tuples(*[st.integers(-20, 20)] * 3))
def test_a_product_and_its_gradients_scale_exactly_with_powers_of_two(shape, seed, exponents):
    """Why loss scaling changes nothing: no magnitude is lost, whatever the scale."""
    m, k, n = shape
    x, w, dy = normal(seed, m, k), normal(seed + 1, k, n), normal(seed + 2, m, n)
    a, b, c = (np.float32(2.0**e) for e in exponents)
    y, dx, dw = LINEAR["linear"](x, w, dy)
    scaled = LINEAR["linear"](a * x, b * w, c * dy)
    assert_same_bits(scaled, (a * b * y, b * c * dx, a * c * dw))


@covers("linear", "ragged_dot")
@examples(15)
@given(
    seed=SEEDS,
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    where=st.sampled_from(["x", "w", "dy"]),
    ragged=st.booleans(),
)
def test_what_is_not_finite_reaches_every_result_that_uses_it(seed, bad, where, ragged):
    arrays = {
        "x": normal(seed, 5, 200),
        "w": normal(seed + 1, 200, 72),
        "dy": normal(seed + 2, 5, 72),
    }
    r = np.random.default_rng(seed)
    array = arrays[where]
    row, column = (int(r.integers(n)) for n in array.shape)
    array[row, column] = bad
    y, dx, dw = map(np.asarray, LINEAR["ragged_dot" if ragged else "linear"](**arrays))
    if where == "x":
        assert not np.isfinite(y[row]).any() and not np.isfinite(dw[column]).any()
        assert np.isfinite(np.delete(y, row, 0)).all() and np.isfinite(dx).all()
    elif where == "w":
        assert not np.isfinite(y[:, column]).any() and not np.isfinite(dx[:, row]).any()
        assert np.isfinite(dw).all()
    else:
        assert not np.isfinite(dx[row]).any() and not np.isfinite(dw[:, column]).any()
        assert np.isfinite(np.delete(dx, row, 0)).all() and np.isfinite(y).all()


RAGGED = jax.jit(
    lambda x, w, dy, sizes: pulled(lambda x, w: jaxfp8.ragged_dot(x, w, sizes), x, w, dy)
)


@covers("ragged_dot")
@examples(15)
@given(sizes=SIZES, seed=SEEDS)
def test_no_group_sees_another_groups_rows(sizes, seed):
    x, dy = floats(seed, ROWS, WIDTH), floats(seed + 1, ROWS, HIDDEN)
    w, sizes = normal(seed + 2, GROUPS, WIDTH, HIDDEN), np.int32(sizes)
    y, dx, dw = RAGGED(x, w, dy, sizes)
    start, size = oq.clipped_groups(sizes, ROWS)[1]
    inside = np.zeros((ROWS, 1), bool)
    inside[start : start + size] = True
    x2, dy2 = (np.where(inside, a, np.float32(np.nan)) for a in (x, dy))
    y2, dx2, dw2 = RAGGED(x2, w, dy2, sizes)
    rows = inside[:, 0]
    assert_same_bits((y2[rows], dx2[rows], dw2[1]), (y[rows], dx[rows], dw[1]))
    outside = np.arange(ROWS) >= sum(n for _, n in oq.clipped_groups(sizes, ROWS))
    assert not np.asarray(y)[outside].any() and not np.asarray(dx)[outside].any()


def _mlp(f, activation):
    def run(x, up, down, dy, *sizes):
        return pulled(lambda x, up: f(x, up, down, *sizes, activation=activation), x, up, dy)

    return jax.jit(run)


MLP = {a: _mlp(jaxfp8.mlp, a) for a in ("silu", "gelu")}
RAGGED_MLP = {a: _mlp(jaxfp8.ragged_mlp, a) for a in ("silu", "gelu")}


@covers("mlp", "ragged_mlp")
@examples(8)
@given(kind=st.sampled_from([("silu", True), ("gelu", False)]), seed=SEEDS)
@pytest.mark.full
def test_an_mlp_is_its_products_and_activation_and_a_ragged_one_of_one_group(kind, seed):
    activation, gated = kind
    x, dy = normal(seed, ROWS, WIDTH), normal(seed + 1, ROWS, WIDTH)
    up = normal(seed + 2, WIDTH, *((2,) if gated else ()), 128) / 12
    down = normal(seed + 3, 128, WIDTH) / 12
    got = MLP[activation](x, up, down, dy)
    h = oracle_mlp_hidden(x, up, activation)
    oracle.assert_close(got[0], jaxfp8.linear(h, down), 2e-3)  # a step of FP8 taken otherwise
    ragged = RAGGED_MLP[activation](x, up[None], down[None], dy, np.int32([ROWS]))
    for a, b in zip(ragged, got, strict=True):
        assert oracle.error(np.asarray(a).reshape(b.shape), b) <= 2e-3


def oracle_mlp_hidden(x, up, activation):
    function = jax.nn.silu if activation == "silu" else jax.nn.gelu
    h = jaxfp8.linear(x, up.reshape(up.shape[0], -1)).reshape(len(x), -1, up.shape[-1])
    return function(h[:, 0]) * h[:, 1] if h.shape[1] == 2 else function(h[:, 0])


# --- experts and weights on several devices -------------------------------------------------------

DEVICES, EXPERTS, TOKENS, CHOICES = 4, 8, 16, 2


def mesh_of(devices, name):
    return jax.make_mesh(
        (devices,), (name,), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )


def _round_trip(axis_name):
    def run(x, gate, expert):
        tokens, sizes, route = jaxfp8.dispatch(
            x, expert, EXPERTS, axis_name=axis_name, quantized=False
        )
        return jaxfp8.combine(tokens, gate, route), sizes

    return run


ALONE = jax.jit(_round_trip(None))


@functools.cache
def together():
    mesh = mesh_of(DEVICES, "e")
    return jax.jit(
        jax.shard_map(_round_trip("e"), mesh=mesh, in_specs=P("e"), out_specs=(P("e"), P("e")))
    )


@covers("dispatch", "combine")
@examples(10)
@given(seed=SEEDS, outside=st.floats(0, 1))
def test_tokens_come_back_weighted_by_their_gates_from_any_route(seed, outside):
    r = np.random.default_rng(seed)
    x, gate = floats(seed, TOKENS, 128), r.random((TOKENS, CHOICES), np.float32)
    expert = r.integers(0, EXPERTS, (TOKENS, CHOICES)).astype(np.int32)
    expert = np.where(r.random(expert.shape) < outside, r.choice([-1, EXPERTS]), expert)
    valid = (expert >= 0) & (expert < EXPERTS)
    want = x * (gate * valid).sum(1, keepdims=True)
    for run in (ALONE, together()):
        y, sizes = run(x, gate, expert)
        np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-30)
        np.testing.assert_array_equal(sizes, np.bincount(expert[valid], minlength=EXPERTS))


@covers("all_gather_weight")
@examples(6)
@given(
    seed=SEEDS,
    axis=st.sampled_from([-2, -1]),
    fmt=st.sampled_from(["float32", "pow2"]),
    cut=st.sampled_from([256, 128, 384, 200]),
)
def test_a_gathered_weight_is_the_whole_one_quantized(seed, axis, fmt, cut):
    recipe = jaxfp8.Recipe(scale_format=fmt)
    w = floats(seed, *((cut, 72) if axis == -2 else (72, cut)))
    spec = P("d", None) if axis == -2 else P(None, "d")
    gather = jax.shard_map(
        lambda w: jaxfp8.all_gather_weight(w, "d", axis=axis, recipe=recipe),
        mesh=mesh_of(2, "d"), in_specs=spec, out_specs=P(), check_vma=False,
    )  # fmt: skip
    assert_same_bits(jax.jit(gather)(w), jaxfp8.prequantize(w, recipe=recipe))


# --- programs -------------------------------------------------------------------------------------

SHAPES = st.tuples(*[st.integers(1, 300)] * 3)


@covers("autocast", "explain", "products_of")
@examples(15)
@given(shape=SHAPES, least=st.integers(0, 300), seed=SEEDS)
def test_what_autocast_takes_is_what_explain_and_products_of_list(shape, least, seed):
    m, k, n = shape
    policy = jaxfp8.AutocastPolicy(min_m=least, min_n=least, min_k=least, weight_argnums=(1,))
    f = jaxfp8.autocast(lambda x, w: jnp.tanh(x @ w), policy=policy)
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((m, k), (k, n)))
    (line,) = jaxfp8.explain(f, x, w, gradient=False).lines
    assert (line.m, line.n, line.k, line.flops) == (m, n, k, 2 * m * n * k)
    assert line.fp8 == (min(shape) >= least) == (not line.reason)
    products = jaxfp8.products_of(f, x, w)
    assert [(p.m, p.n, p.k) for p in products] == [(m, n, k)] * line.fp8


@covers("autocast")
@examples(6)
@given(shape=PRODUCTS, seed=SEEDS)
def test_autocast_computes_what_linear_computes(shape, seed):
    m, k, n = shape
    policy = jaxfp8.AutocastPolicy(min_m=0, min_n=0, min_k=0, weight_argnums=(1,))
    x, w, dy = normal(seed, m, k), normal(seed + 1, k, n), normal(seed + 2, m, n)
    f = jaxfp8.autocast(lambda x, w: x @ w, policy=policy)
    got = jax.jit(lambda x, w, dy: pulled(f, x, w, dy))(x, w, dy)
    for a, b in zip(got, LINEAR["linear"](x, w, dy), strict=True):
        assert oracle.error(a, b) <= F32


@covers("tune", "load_tuned")
@examples(10)
@given(seed=SEEDS, count=st.integers(1, 4))
def test_tune_keeps_the_fastest_and_its_file_says_the_same(seed, count, tmp_path_factory):
    r = np.random.default_rng(seed)
    products = [
        jaxfp8.Product("gemm_1d2d", *(int(v) for v in r.integers(1, 5000, 3))) for _ in range(count)
    ]
    times = {}

    def measure(product, configs, **options):
        order = r.permutation(len(configs)) + 1
        times[product] = {c: float(t) for c, t in zip(configs, order, strict=True)}
        return times[product]

    # A kind of device that does not exist: what this process chooses stays as it is.
    device = SimpleNamespace(device_kind=f"of seed {seed}", core_count=132)
    path = tmp_path_factory.mktemp("tuned") / "tuned.json"
    chosen = jaxfp8.tune(products, path=path, device=device, measure=measure)
    assert chosen == {p: min(t, key=t.get) for p, t in times.items()}
    assert set(chosen) == set(products)
    assert jaxfp8.load_tuned(path) == len(chosen)
    for p, config in chosen.items():
        assert f'"m": {p.m}, "n": {p.n}, "k": {p.k}, "config": "{config}"' in path.read_text()


# --- checks ---------------------------------------------------------------------------------------


@covers("validate.quantization_report")
@examples(15)
@given(seed=SEEDS, bad=st.integers(0, 3))
def test_a_report_counts_what_quantization_loses(seed, bad):
    x = floats(seed, 3, 200, special=True)
    x[0, :bad] = np.nan
    (leaf,) = jaxfp8.validate.quantization_report({"a": x}).leaves
    got = value(jaxfp8.quantize(x))
    kept = np.isfinite(got)
    lost = (got[kept] == 0)[x[kept] != 0]
    assert (leaf.path, leaf.shape, leaf.non_finite) == ("a", (3, 200), bad)
    assert leaf.underflowed == pytest.approx(lost.mean())
    assert 1 / 128 <= leaf.saturated < 1


@covers("validate.compare")
@examples(2)
@given(seed=SEEDS, factor=SIGNS)
@pytest.mark.full
def test_a_comparison_does_not_depend_on_the_scale_of_the_loss(seed, factor):
    x, params = normal(seed, 16, 128), {"w": normal(seed + 1, 128, 64)}

    def loss(params, x):
        return jnp.mean(jnp.tanh(jaxfp8.linear(x, params["w"])) ** 2)

    one = jaxfp8.validate.compare(loss, params, x)
    scaled = jaxfp8.validate.compare(lambda p, x: factor * loss(p, x), params, x)
    assert 0.01 < one.products[0].forward < 0.06
    assert one.products[0].forward == pytest.approx(scaled.products[0].forward, rel=1e-5)
    assert one.worst_gradient.error == pytest.approx(scaled.worst_gradient.error, rel=1e-5)


@covers("testing.assert_fp8_close")
@examples(15)
@given(seed=SEEDS, error=st.floats(0.001, 0.5), factor=st.floats(1e-9, 1e9))
def test_an_assertion_holds_up_to_its_error_at_any_magnitude(seed, error, factor):
    want = normal(seed, 3, 200).astype(np.float64) * factor
    noise = normal(seed + 1, 3, 200).astype(np.float64)
    got = want + noise * (error * np.linalg.norm(want) / np.linalg.norm(noise))
    assert_fp8_close(got, want, rtol=1.01 * error)
    with pytest.raises(AssertionError, match="norm-wise"):
        assert_fp8_close(got, want, rtol=0.99 * error)
