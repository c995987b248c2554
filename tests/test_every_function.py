"""What holds for every public operation: any integer dtype, x64, no tokens, symbolic tokens, partly manual meshes, and
that a second derivative is refused and never zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.optimization import OPTIMIZED
from tests.programs import assert_close, assert_same_bits, products, walk
from tests.public_functions import (
    DIFFERENTIABLE,
    FUNCTIONS,
    GROUPS,
    QUANTIZED,
    K,
    N,
    arrays_of,
    index_of,
    shapes_of,
)

TOKENS = 40
RARER = ("uint8", "int16", "uint32", "int64")
INDEXED = [name for name, f in FUNCTIONS.items() if f.index]


def call(name, tokens=TOKENS, index_dtype=np.int32):
    """(function of the arrays, the arrays)."""
    f = FUNCTIONS[name]
    index = index_of(f, tokens, index_dtype)
    return lambda *arrays: f.call(*arrays, index), arrays_of(f, tokens)


def gradient(f):
    def total(*arrays):
        return f(*arrays).astype(jnp.float32).sum()

    return lambda *arrays: jax.grad(total, tuple(range(len(arrays))))(*arrays)


@pytest.mark.parametrize("name", INDEXED)
@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint64", *(pytest.param(d, marks=pytest.mark.full) for d in RARER)],
)
def test_the_integer_dtype_of_indices_and_sizes_does_not_matter(name, dtype):
    f, arrays = call(name)
    expected = f(*arrays)
    with jax.enable_x64(True):
        g, _ = call(name, index_dtype=np.dtype(dtype))
        assert_same_bits(g(*arrays), expected)


def test_expert_ids_that_fill_their_dtype_are_not_wrapped():
    expert = np.arange(512)[:, None] % 256
    x = jnp.ones((512, 128))
    for dtype in (np.uint8, np.int16, np.int64):
        sizes = jaxfp8.dispatch(x, expert.astype(dtype), 256)[1]
        np.testing.assert_array_equal(sizes, np.full(256, 2))


def test_a_wide_index_out_of_range_does_not_become_one_in_range():
    with jax.enable_x64(True):
        expert = jnp.full((8, 1), 2**32, jnp.int64)
        sizes = jaxfp8.dispatch(jnp.ones((8, 128), jnp.float32), expert, 4)[1]
        np.testing.assert_array_equal(sizes, np.zeros(4))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_x64_changes_no_bit(name):
    f, arrays = call(name)
    expected = jax.jit(f)(*arrays)
    with jax.enable_x64(True):
        assert_same_bits(jax.jit(f)(*arrays), expected)
        jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.full
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_x64_changes_no_bit_of_a_gradient(name):
    f, arrays = call(name)
    expected = gradient(f)(*arrays)
    with jax.enable_x64(True):
        assert_same_bits(gradient(f)(*arrays), expected)
        jax.jit(gradient(f)).trace(*arrays).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_tokens_give_an_empty_result_and_zero_gradients_of_weights(name):
    f, arrays = call(name, tokens=0)
    y = f(*arrays)
    assert y.shape[0] == 0
    for array, got in zip(arrays, jax.jit(gradient(f))(*arrays), strict=True):
        np.testing.assert_array_equal(got, np.zeros(array.shape))


@pytest.mark.parametrize("name", QUANTIZED)
def test_no_rows_give_a_finite_result(name):
    f, arrays = call(name, tokens=0)
    assert np.isfinite(np.asarray(f(*arrays), np.float32)).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_number_of_tokens_may_be_symbolic(name):
    function = FUNCTIONS[name]
    (m,) = jax.export.symbolic_shape("m")
    types = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes_of(function, m)]
    index = index_of(function, TOKENS)
    if index is not None:
        shape = (m, *index.shape[1:]) if function.index == "expert" else index.shape
        types.append(jax.ShapeDtypeStruct(shape, jnp.int32))

    def f(*arrays):
        return function.call(*arrays, *([None] if index is None else []))

    checks = jaxfp8.export.disabled_checks()
    exported = jax.export.export(jax.jit(f), disabled_checks=checks)(*types)
    arrays = [*arrays_of(function, TOKENS), *([] if index is None else [index])]
    np.testing.assert_allclose(
        np.asarray(exported.call(*arrays), np.float32),
        np.asarray(f(*arrays), np.float32),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["ragged_dot", "ragged_mlp", "grouped_gemm"])
def test_the_number_of_groups_may_be_symbolic(name):
    f, arrays = call(name)
    function = FUNCTIONS[name]
    (g,) = jax.export.symbolic_shape("g")
    types = [
        jax.ShapeDtypeStruct((g, *a.shape[1:]) if a.shape[0] == GROUPS else a.shape, a.dtype)
        for a in arrays
    ]
    sizes = index_of(function, TOKENS)

    def both(*arguments):
        *arrays, sizes = arguments
        g = lambda *arrays: function.call(*arrays, sizes)  # noqa: E731
        return g(*arrays), *(gradient(g)(*arrays) if name in DIFFERENTIABLE else ())

    checks = jaxfp8.export.disabled_checks()
    export = jax.export.export(jax.jit(both), platforms=("cpu",), disabled_checks=checks)
    exported = export(*types, jax.ShapeDtypeStruct((g,), jnp.int32))
    assert_close(exported.call(*arrays, sizes), both(*arrays, sizes), 1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["linear", "einsum", "dot_general", "ragged_dot", "gemm", "grouped_gemm"]
)
def test_a_contraction_over_nothing_is_zero_and_no_columns_are_an_empty_result(name):
    function = FUNCTIONS[name]
    index = index_of(function, TOKENS)
    for without in (K, N):
        shapes = [tuple(0 if d == without else d for d in s) for s in shapes_of(function, TOKENS)]
        y = function.call(*(np.ones(s, np.float32) for s in shapes), index)
        assert y.shape == (TOKENS, N if without == K else 0)
        np.testing.assert_array_equal(np.asarray(y, np.float32), np.zeros(y.shape))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_mesh_may_be_manual_in_some_axes_and_automatic_in_others(name, check_vma):
    f, arrays = call(name)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda *xs: f(*xs),
        mesh=mesh,
        in_specs=tuple(P("data") if a.shape[0] == TOKENS else P() for a in arrays),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=check_vma,
    )
    assert_same_bits(jax.jit(mapped)(*arrays), jax.jit(f)(*arrays))


# --------------------------------------------------------------------------------------------------
# Gradients of some arguments
# --------------------------------------------------------------------------------------------------

# Products beyond the forward ones in the gradient of each argument alone: what leads to it, then itself.
OF_ONE = {
    "mlp": (2, 2, 1),
    "ragged_mlp": (2, 2, 1),
    "moe": (2, 1, 2, 1),
    "dispatch and combine": (0, 0),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full if n in OF_ONE else ()) for n in DIFFERENTIABLE],
)
def test_the_gradient_of_one_argument_costs_its_own_products_and_has_the_same_bits(name):
    f, arrays = call(name)
    total = lambda *a: f(*a).astype(jnp.float32).sum()  # noqa: E731
    together = jax.jit(gradient(f))(*arrays)
    forward = products(jax.make_jaxpr(f)(*arrays))
    for i, more in enumerate(OF_ONE.get(name, (1, 1))):
        alone = jax.jit(jax.grad(total, i))
        assert products(alone.trace(*arrays).jaxpr) == forward + more
        assert_same_bits(alone(*arrays), together[i])


@pytest.mark.parametrize("name", [n for n in DIFFERENTIABLE if n != "dispatch and combine"])
def test_a_frozen_weight_leaves_no_columns(name):
    """Only weight gradients contract tokens, so only they read columns of x or of the result's gradient."""
    f, arrays = call(name)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: f(*a).astype(jnp.float32).sum()))(*arrays)
    leaves = [e.primitive.name for e in walk(jaxpr) if e.primitive.name.endswith("_leaf")]
    # One kernel makes the gradient of an activation, rows and columns.
    written = [n for n in leaves if "columns" in n or "both" in n]
    assert [n for n in written if "grad_both" not in n] == []


def test_a_frozen_trunk_takes_no_more_memory_than_jaxs_own():
    def temporary(product):
        def loss(w, x):
            y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(product(x, w)), None), x, w)
            return y.astype(jnp.float32).sum()

        shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 512, 512), (4096, 512))]
        compiled = jax.jit(jax.grad(loss, argnums=1)).lower(*shapes).compile(OPTIMIZED)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(jaxfp8.linear) <= 1.02 * temporary(jnp.dot)


# --------------------------------------------------------------------------------------------------
# Second derivatives
# --------------------------------------------------------------------------------------------------


def loss_of(name):
    f, arrays = call(name)

    def loss(*arrays):
        return (jnp.tanh(f(*arrays).astype(jnp.float32)) ** 2).sum()

    return loss, arrays


def refusal(name):
    allowed = {
        "autocast": "linear",
        "dispatch and combine": "combine|dispatch",
    }.get(name, name.partition(",")[0])
    return rf"({allowed}).*first derivatives only"


SECOND = {
    "eager": lambda loss: jax.grad(lambda *a: sum(g.sum() for g in jax.grad(loss, (0, 1))(*a)), 1),
    "jit": lambda loss: jax.jit(jax.grad(lambda *a: jax.jit(jax.grad(loss, 1))(*a).sum(), 1)),
    "mixed": lambda loss: jax.grad(lambda *a: jax.grad(loss, 0)(*a).sum(), 1),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize(
    "how", ["jit", *(pytest.param(h, marks=pytest.mark.full) for h in ("eager", "mixed"))]
)
def test_a_second_derivative_is_refused_by_the_public_name(name, how):
    loss, arrays = loss_of(name)
    with pytest.raises(NotImplementedError, match=refusal(name)):
        SECOND[how](loss)(*arrays)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_hessian_vector_product_is_refused_by_the_public_name(name):
    loss, (x, w, *others) = loss_of(name)
    with pytest.raises(NotImplementedError, match=refusal(name)):
        jax.jvp(lambda w: jax.grad(loss, 1)(x, w, *others), (w,), (w,))
    with pytest.raises(NotImplementedError, match=refusal(name)):
        jax.hessian(lambda t: loss(x, t * w, *others))(1.0)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_stopped_first_gradient_may_be_part_of_a_loss(name):
    loss, (x, w, *others) = loss_of(name)

    def step(w):
        return loss(x, w - 0.1 * jax.lax.stop_gradient(jax.grad(loss, 1)(x, w, *others)), *others)

    moved = w - 0.1 * jax.grad(loss, 1)(x, w, *others)
    np.testing.assert_allclose(
        jax.grad(step)(w), jax.grad(loss, 1)(x, moved, *others), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_derivative_of_quantized_arrays_is_refused_by_the_public_name(name):
    f, arrays = call(name)
    public = name.partition(",")[0]
    names = rf"^({public}|{public} and [a-z_]+|[a-z_]+ and {public}): "
    with pytest.raises(NotImplementedError, match=names + ".*no derivative"):
        gradient(f)(*arrays)


def test_a_quantizer_has_no_derivative_but_may_be_passed_straight_through():
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    for q in (lambda x: jaxfp8.quantize(x), lambda x: jaxfp8.quantize_both(x)[0]):
        with pytest.raises(NotImplementedError, match="quantize.*no derivative"):
            jax.grad(lambda x, q=q: q(x).dequantize().sum())(x)
        straight = jax.grad(lambda x, q=q: (x + jax.lax.stop_gradient(q(x).dequantize() - x)).sum())
        np.testing.assert_array_equal(straight(x), np.ones_like(x))


# --------------------------------------------------------------------------------------------------
# Width of results
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "linear, prequantized", "mlp", "ragged_mlp"])
def test_activations_keep_their_dtype_beside_float32_weights(name):
    f, (x, *weights) = call(name)
    x = x.astype(jnp.bfloat16)
    y, pull = jax.vjp(f, x, *weights)
    assert y.dtype == jnp.bfloat16
    assert [g.dtype for g in pull(y)] == [jnp.bfloat16] + [jnp.float32] * len(weights)


@pytest.mark.parametrize("name", ["einsum", "dot_general", "ragged_dot"])
def test_products_with_jaxs_signatures_promote_as_jaxs(name):
    f, (x, *weights) = call(name)
    assert f(x.astype(jnp.bfloat16), *weights).dtype == jnp.float32
