"""What holds for every public operation: any integer dtype, x64, each dimension zero or symbolic, each axis of a mesh
manual or automatic, and that a second derivative is refused and never zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.optimization import OPTIMIZED
from tests.programs import assert_close, assert_same_bits, products, walk
from tests.public_functions import (
    DIFFERENTIABLE,
    FUNCTIONS,
    INDEX,
    QUANTIZED,
    SIZES,
    arrays_of,
    index_of,
    shapes_of,
)

RARER = ("uint8", "int16", "uint32", "int64")
INDEXED = [name for name, f in FUNCTIONS.items() if f.index]


def call(name, index_dtype=np.int32, **sizes):
    """(function of the arrays, the arrays)."""
    f = FUNCTIONS[name]
    index = index_of(f, index_dtype, **sizes)
    return lambda *arrays: f.call(*arrays, index), arrays_of(f, **sizes)


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


# --------------------------------------------------------------------------------------------------
# Dimensions: zero, symbolic
# --------------------------------------------------------------------------------------------------

DIMENSIONS = [(name, d) for name, f in FUNCTIONS.items() for d in f.letters]
AT_LEAST_ONE = {"g": "at least one group", "c": "k at least 1"}


def assert_zeros(result, dimensions, sizes):
    expected = [
        (SIZES | sizes).get(d, size) for d, size in zip(dimensions, result.shape, strict=True)
    ]
    np.testing.assert_array_equal(np.asarray(result, np.float32), np.zeros(expected))


@pytest.mark.representatives("name", "dimension")
@pytest.mark.parametrize("name, dimension", DIMENSIONS)
def test_without_a_dimension_a_result_is_empty_or_zero_and_so_are_gradients(name, dimension):
    function, sizes = FUNCTIONS[name], {dimension: 0}
    f, arrays = call(name, **sizes)
    if dimension in AT_LEAST_ONE:
        with pytest.raises(ValueError, match=rf"^[a-z_]+: .*{AT_LEAST_ONE[dimension]}"):
            f(*arrays)
        return
    assert_zeros(f(*arrays), function.result, sizes)
    if name in DIFFERENTIABLE:
        for dimensions, got in zip(function.arrays, jax.jit(gradient(f))(*arrays), strict=True):
            assert_zeros(got, dimensions, sizes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_batch_of_nothing_is_nothing(name):
    f, arrays = call(name)
    batch = [np.zeros((0, *a.shape), np.float32) for a in arrays]
    assert jax.vmap(f)(*batch).shape == (0, *jax.eval_shape(f, *arrays).shape)
    if name in DIFFERENTIABLE:
        for how in (gradient(jax.vmap(f)), jax.vmap(gradient(f))):
            assert [g.shape for g in how(*batch)] == [a.shape for a in batch]


@pytest.mark.parametrize("ahead", ["up", "down"])
def test_without_a_contraction_a_weight_may_be_quantized_ahead(ahead):
    f, (x, up, down) = call("mlp", k=0)
    up = jaxfp8.prequantize(up.reshape(0, 2 * SIZES["f"])) if ahead == "up" else up
    down = jaxfp8.prequantize(down) if ahead == "down" else down
    y, pull = jax.vjp(lambda x: f(x, up, down), x)
    assert_zeros(y, "mn", {})
    assert pull(y)[0].shape == x.shape


def assert_same_exported(name, symbols, batch=False):
    """Values and gradients with symbolic sizes, lowered for a GPU too, are those of the sizes' values."""
    function = FUNCTIONS[name]
    count = len(function.arrays)
    f, arrays = call(name)
    index = index_of(function)
    types = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes_of(function, **symbols)]
    if batch:
        types = [jax.ShapeDtypeStruct((symbols["v"], *t.shape), t.dtype) for t in types]
        arrays = [np.stack([a, -a, 2 * a]) for a in arrays]
    if index is not None:
        shape = tuple((SIZES | symbols)[d] for d in INDEX[function.index])
        types.append(jax.ShapeDtypeStruct(shape, index.dtype))
        arrays.append(index)

    def both(*arguments):
        f = lambda *arrays: function.call(*arrays, *(arguments[count:] or [None]))  # noqa: E731
        f = jax.vmap(f) if batch else f
        arrays = arguments[:count]
        return f(*arrays), *(gradient(f)(*arrays) if name in DIFFERENTIABLE else ())

    checks = jaxfp8.export.disabled_checks()
    export = jax.export.export(jax.jit(both), platforms=("cpu", "cuda"), disabled_checks=checks)
    assert_close(export(*types).call(*arrays), jax.jit(both)(*arrays), 1e-5)


@pytest.mark.representatives("name", "dimension")
@pytest.mark.parametrize("name, dimension", DIMENSIONS)
def test_a_dimension_may_be_symbolic(name, dimension):
    (size,) = jax.export.symbolic_shape(dimension)
    assert_same_exported(name, {dimension: size})


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_dimensions_may_be_symbolic(name):
    letters = FUNCTIONS[name].letters
    sizes = jax.export.symbolic_shape(",".join(letters))
    assert_same_exported(name, dict(zip(letters, sizes, strict=True)))


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mapped_dimension_may_be_symbolic(name):
    (size,) = jax.export.symbolic_shape("v")
    assert_same_exported(name, {"v": size}, batch=True)


# --------------------------------------------------------------------------------------------------
# Meshes
# --------------------------------------------------------------------------------------------------


MANUAL = {"neither": (), "data": ("data",), "model": ("model",), "both": ("data", "model")}
CUT = {"m": "data", "n": "model", "f": "model"}


@pytest.mark.representatives("name", "manual")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("manual", MANUAL)
@pytest.mark.parametrize(
    "check_vma, gradients",
    [(True, False), *(pytest.param(c, c, marks=pytest.mark.full) for c in (True, False))],
)
def test_each_axis_of_a_mesh_may_be_manual_or_automatic(name, manual, check_vma, gradients):
    """Each device of the manual axes has arrays of its own, cut over the automatic axes."""
    function, axes = FUNCTIONS[name], MANUAL[manual]
    f, arrays = call(name)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    devices = 2 ** len(axes)

    def both(*arrays):
        more = gradients and name in DIFFERENTIABLE
        return f(*arrays), *(gradient(f)(*arrays) if more else ())

    mapped = (
        jax.vmap(both)
        if not axes
        else jax.shard_map(
            lambda *xs: jax.tree.map(lambda y: y[None], both(*(x[0] for x in xs))),
            mesh=mesh,
            in_specs=P(axes),
            out_specs=P(axes),
            axis_names=set(axes),
            check_vma=check_vma,
        )
    )

    def placed(array, dimensions):
        cut = [None if CUT.get(d) in axes else CUT.get(d) for d in dimensions]
        cut = [None if axis in cut[:i] else axis for i, axis in enumerate(cut)]
        stacked = np.stack([array * 2**i for i in range(devices)])
        return jax.device_put(stacked, NamedSharding(mesh, P(axes or None, *cut)))

    got = jax.jit(mapped)(*map(placed, arrays, function.arrays))
    for i in range(devices):
        expected = jax.jit(both)(*(array * 2**i for array in arrays))
        assert_close([g[i] for g in got], expected, 1e-4)


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
