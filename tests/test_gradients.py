"""Differentiable operations equal a composition of NumPy quantization and float64 products, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxfp8
from tests import oracle
from tests import oracle_quantize as oq

F32 = 2e-6
BF16 = 4e-3
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def dequantized(x, block, dtype=E4M3, pow2=False):
    return oq.dequantize(*oq.quantize_blocks(x, block, dtype, pow2), block)


def composed(x, w, dy, *, dtype=E4M3, grad_dtype=E4M3, pow2=False, grad_pow2=None):
    """y, dx, dw of the recipe, from x (T, K), w (K, N), dy (T, N), in float64."""
    grad_pow2 = pow2 if grad_pow2 is None else grad_pow2
    rows, square = (1, 128), (128, 128)
    weight = dequantized(w, square, dtype, pow2)
    y = dequantized(x, rows, dtype, pow2) @ weight
    dx = dequantized(dy, rows, grad_dtype, grad_pow2) @ weight.T
    columns = dequantized(x.T, rows, dtype, pow2)
    dw = columns @ dequantized(dy.T, rows, grad_dtype, grad_pow2).T
    return y, dx, dw


def train(f):
    def run(x, w, dy):
        y, pull = jax.vjp(f, x, w)
        return y, *pull(dy)

    return jax.jit(run)


def assert_all_close(got, want, tolerance=F32):
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert oracle.error(a, b) <= tolerance, (name, oracle.error(a, b))


SHAPES = [(128, 128, 128), (1, 128, 128), (5, 200, 72), (300, 129, 257), (130, 1, 1), (0, 128, 40)]


@pytest.mark.parametrize("t, k, n", SHAPES)
@pytest.mark.representatives(cases=3)
def test_linear_equals_the_composition(t, k, n):
    x, w, dy = normal(0, t, k), normal(1, k, n), normal(2, t, n)
    assert_all_close(train(jaxfp8.linear)(x, w, dy), composed(x, w, dy))


@settings(max_examples=8, deadline=None)
@given(t=st.integers(1, 300), k=st.integers(1, 300), n=st.integers(1, 300))
def test_linear_of_any_size_equals_the_composition(t, k, n):
    x, w, dy = normal(0, t, k), normal(1, k, n), normal(2, t, n)
    assert_all_close(train(jaxfp8.linear)(x, w, dy), composed(x, w, dy))


RECIPES = [
    dict(scale_format="pow2"),
    dict(grad_dtype=E5M2),
    dict(dtype=E5M2, grad_dtype=E5M2),
    dict(grad_dtype=E5M2, scale_format="pow2"),
    dict(grad_scale_format="pow2"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.representatives(cases=2)
def test_linear_follows_its_recipe(recipe):
    x, w, dy = normal(0, 200, 136), normal(1, 136, 150), normal(2, 200, 150)
    numpy_recipe = dict(
        dtype=recipe.get("dtype", E4M3),
        grad_dtype=recipe.get("grad_dtype", E4M3),
        pow2=recipe.get("scale_format") == "pow2",
        grad_pow2=(recipe.get("grad_scale_format") or recipe.get("scale_format")) == "pow2",
    )
    recipe = jaxfp8.Recipe(**recipe)
    want = composed(x, w, dy, **numpy_recipe)
    assert_all_close(train(lambda x, w: jaxfp8.linear(x, w, recipe=recipe))(x, w, dy), want)
    with recipe:
        assert_all_close(train(jaxfp8.linear)(x, w, dy), want)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_linear_in_half_precision_equals_the_composition_to_one_rounding(dtype):
    x, w, dy = (
        v.astype(dtype) for v in (normal(0, 60, 200), normal(1, 200, 70), normal(2, 60, 70))
    )
    got = train(jaxfp8.linear)(x, w, dy)
    assert {v.dtype for v in got} == {np.dtype(dtype)}
    assert_all_close(got, composed(x, w, dy), BF16)
    y = jaxfp8.linear(x, w, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    assert oracle.error(y, composed(x, w, dy)[0]) <= F32


def test_mixed_operands_of_einsum_promote_and_gradients_keep_their_dtypes():
    x, w = normal(0, 60, 200).astype(ml_dtypes.bfloat16), normal(1, 200, 70)
    product = functools.partial(jaxfp8.einsum, "tk,kn->tn")
    y, dx, dw = train(product)(x, w, normal(2, 60, 70))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


def test_linear_adds_the_bias_in_high_precision():
    x, w, b = normal(0, 2, 30, 200), normal(1, 200, 70), normal(2, 70)
    y = jax.jit(jaxfp8.linear)(x, w, b)
    np.testing.assert_array_equal(y, jax.jit(jaxfp8.linear)(x, w) + b)
    db = jax.grad(lambda b: jaxfp8.linear(x, w, b).sum())(b)
    np.testing.assert_allclose(db, 60, rtol=1e-6)


def test_linear_of_a_vector():
    x, w = normal(0, 200), normal(1, 200, 70)
    np.testing.assert_array_equal(jaxfp8.linear(x, w), jaxfp8.linear(x[None], w)[0])
    dx = jax.grad(lambda x: jaxfp8.linear(x, w).sum())(x)
    assert dx.shape == (200,)


def test_only_one_gradient_is_asked_for():
    x, w, dy = normal(0, 60, 200), normal(1, 200, 70), normal(2, 60, 70)
    _, dx, dw = train(jaxfp8.linear)(x, w, dy)
    only_x = jax.jit(jax.grad(lambda x: (jaxfp8.linear(x, w) * dy).sum()))(x)
    only_w = jax.jit(jax.grad(lambda w: (jaxfp8.linear(x, w) * dy).sum()))(w)
    assert oracle.error(only_x, dx) <= F32 and oracle.error(only_w, dw) <= F32


# --- dot_general and einsum -----------------------------------------------------------------------

DIMENSIONS = {
    "matrix": ((60, 130), (130, 70), (((1,), (0,)), ((), ()))),
    "transposed weight": ((60, 130), (70, 130), (((1,), (1,)), ((), ()))),
    "first axis": ((130, 60), (130, 70), (((0,), (0,)), ((), ()))),
    "leading axes": ((2, 3, 40, 130), (130, 70), (((3,), (0,)), ((), ()))),
    "two contracted": ((20, 5, 40), (5, 40, 70), (((1, 2), (0, 1)), ((), ()))),
    "contracted in another order": ((20, 5, 40), (40, 5, 70), (((2, 1), (0, 1)), ((), ()))),
    "heads": ((2, 30, 130), (130, 4, 33), (((2,), (0,)), ((), ()))),
    "batch": ((3, 60, 130), (3, 130, 70), (((2,), (1,)), ((0,), (0,)))),
    "two batches": ((2, 3, 20, 130), (3, 2, 130, 7), (((3,), (2,)), ((0, 1), (1, 0)))),
    "batch last": ((60, 130, 3), (130, 70, 3), (((1,), (0,)), ((2,), (2,)))),
    "no rows": ((130,), (130, 70), (((0,), (0,)), ((), ()))),
    "no columns": ((60, 130), (130,), (((1,), (0,)), ((), ()))),
    "scalar": ((130,), (130,), (((0,), (0,)), ((), ()))),
}


def composed_dot_general(x, w, dims, dy):
    """The composition for each batch element, through the (T, K) . (K, N) form."""
    (lc, rc), (lb, rb) = dims
    rows = [a for a in range(x.ndim) if a not in lc + lb]
    columns = [a for a in range(w.ndim) if a not in rc + rb]
    x_order, w_order = [*lb, *rows, *lc], [*rb, *rc, *columns]
    xt, wt = x.transpose(x_order), w.transpose(w_order)
    b = int(np.prod([x.shape[a] for a in lb]))
    k = int(np.prod([x.shape[a] for a in lc]))
    n = int(np.prod([w.shape[a] for a in columns]))
    x3, w3 = xt.reshape(b, -1, k), wt.reshape(b, k, n)
    parts = [composed(*v) for v in zip(x3, w3, dy.reshape(b, -1, n), strict=True)]
    y, dx, dw = (np.stack(v) for v in zip(*parts, strict=True))
    dx = dx.reshape(xt.shape).transpose(np.argsort(x_order))
    dw = dw.reshape(wt.shape).transpose(np.argsort(w_order))
    return y.reshape(dy.shape), dx, dw


@pytest.mark.parametrize("case", DIMENSIONS)
@pytest.mark.representatives(cases=5)
def test_dot_general_equals_the_composition(case):
    x_shape, w_shape, dims = DIMENSIONS[case]
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    plain = jax.eval_shape(lambda x, w: jax.lax.dot_general(x, w, dims), x, w)
    dy = normal(2, *plain.shape)
    got = train(lambda x, w: jaxfp8.dot_general(x, w, dims))(x, w, dy)
    assert_all_close(got, composed_dot_general(x, w, dims, dy))
    # And the shape and the axes are those of jax.lax.dot_general.
    assert oracle.error(got[0], jax.lax.dot_general(x, w, dims)) < 0.12


def test_dot_general_honours_preferred_element_type_and_precision():
    x, w = (normal(i, 64, 64).astype(ml_dtypes.bfloat16) for i in (0, 1))
    dims = (((1,), (0,)), ((), ()))
    assert jaxfp8.dot_general(x, w, dims).dtype == jnp.bfloat16
    y = jaxfp8.dot_general(x, w, dims, "default", jnp.float32)
    assert y.dtype == jnp.float32
    for precision in ("highest", jax.lax.Precision.HIGH, ("default", "highest")):
        with pytest.raises(ValueError, match="precision"):
            jaxfp8.dot_general(x, w, dims, precision)


EINSUMS = {
    "ab,bc->ac": ((60, 130), (130, 70)),
    "ab,bc": ((60, 130), (130, 70)),
    "btd,dhk->bthk": ((2, 30, 130), (130, 4, 33)),
    "bthk,hkd->btd": ((2, 30, 4, 33), (4, 33, 70)),
    "becd,edf->becf": ((2, 3, 20, 130), (3, 130, 70)),
    "ebcm,emh->ebch": ((3, 2, 20, 130), (3, 130, 70)),
    "...d,df->...f": ((2, 3, 20, 130), (130, 70)),
    "...ij,...jk->...ik": ((2, 20, 130), (2, 130, 7)),
    "ab,bc->ca": ((60, 130), (130, 70)),
    "abx,bc->ac": ((60, 130, 3), (130, 70)),
    "aab,bc->ac": ((20, 20, 130), (130, 70)),
    "a b , b c -> a c": ((60, 130), (130, 70)),
}


@pytest.mark.parametrize("spec", EINSUMS)
@pytest.mark.representatives(cases=5)
def test_einsum_equals_jnp_einsum_to_the_error_of_fp8(spec):
    x_shape, w_shape = EINSUMS[spec]
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    want_y = jnp.einsum(spec, x, w)
    dy = normal(2, *want_y.shape)
    got = train(lambda x, w: jaxfp8.einsum(spec, x, w))(x, w, dy)
    want = train(lambda x, w: jnp.einsum(spec, x, w))(x, w, dy)
    assert_all_close(got, want, 0.07)
    assert oracle.error(got[0], want_y) > 1e-3  # it did quantize


@pytest.mark.parametrize("spec", ["btd,dhk->bthk", "becd,edf->becf", "ab,bc->ca"])
def test_the_second_operand_of_einsum_is_the_weight(spec):
    """jnp.einsum may swap the operands of its dot_general; the roles here go by position."""
    x_shape, w_shape = EINSUMS[spec]
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    # One large element: its whole 128x128 block loses precision if it is in the weight, one row if not.
    x[(0,) * x.ndim] = w[(0,) * w.ndim] = 1e4
    dims = {
        "btd,dhk->bthk": (((2,), (0,)), ((), ())),
        "becd,edf->becf": (((3,), (1,)), ((1,), (0,))),
        "ab,bc->ca": (((1,), (0,)), ((), ())),
    }[spec]
    order = {"btd,dhk->bthk": (0, 1, 2, 3), "becd,edf->becf": (1, 0, 2, 3), "ab,bc->ca": (1, 0)}[
        spec
    ]
    plain = np.asarray(jax.lax.dot_general(x, w, dims))
    want = composed_dot_general(x, w, dims, np.zeros_like(plain))[0].transpose(order)
    assert oracle.error(jax.jit(jaxfp8.einsum, static_argnums=0)(spec, x, w), want) <= F32


# --- ragged_dot -----------------------------------------------------------------------------------


def composed_ragged(x, w, sizes, dy):
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for g, (start, size) in enumerate(oq.clipped_groups(sizes, x.shape[0])):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[g] = composed(x[rows], w[g], dy[rows])
    return y, dx, dw


@pytest.mark.parametrize(
    "m, sizes",
    [
        (300, [100, 0, 72, 128]),
        (131, [1, 129, 1]),
        (300, [10, 127]),
        (100, [60, 60]),
        (64, [0, 0]),
        (0, [0, 0]),
    ],
    ids=str,
)
@pytest.mark.representatives(cases=2)
def test_ragged_dot_equals_the_composition_per_group(m, sizes):
    x, w, dy = normal(0, m, 200), normal(1, len(sizes), 200, 72), normal(2, m, 72)
    device_sizes = jnp.asarray(sizes, jnp.int32)
    got = train(lambda x, w: jaxfp8.ragged_dot(x, w, device_sizes))(x, w, dy)
    want = composed_ragged(x, w, sizes, dy)
    assert_all_close(got, want)
    oracle.assert_close(got[2], want[2], F32)  # each expert's weight gradient


def test_ragged_dot_rows_past_the_last_group_are_zero_and_add_nothing_to_gradients():
    x, w, dy = normal(0, 200, 128), normal(1, 2, 128, 64), normal(2, 200, 64)
    x[150:], dy[150:] = np.nan, np.nan
    sizes = jnp.array([70, 80])
    y, dx, dw = train(lambda x, w: jaxfp8.ragged_dot(x, w, sizes))(x, w, dy)
    assert not np.asarray(y[150:]).any() and not np.asarray(dx[150:]).any()
    assert_all_close((y[:150], dx[:150], dw), composed_ragged(x[:150], w, [70, 80], dy[:150]))


def test_empty_groups_have_zero_weight_gradients():
    x, w = normal(0, 100, 128), normal(1, 3, 128, 64)
    loss = lambda w: jaxfp8.ragged_dot(x, w, jnp.array([0, 100, 0])).sum()  # noqa: E731
    dw = np.asarray(jax.jit(jax.grad(loss))(w))
    assert not dw[0].any() and not dw[2].any() and dw[1].any()


def test_nonfinite_activations_reach_the_loss_and_the_gradients():
    x, w, dy = normal(0, 40, 256), normal(1, 256, 64), normal(2, 40, 64)
    x[3, 5] = np.inf
    y, dx, dw = train(jaxfp8.linear)(x, w, dy)
    assert not np.isfinite(np.asarray(y[3])).any()
    assert np.isfinite(np.delete(np.asarray(y), 3, 0)).all()
    assert not np.isfinite(np.asarray(dw[5])).any()
    assert np.isfinite(np.asarray(dx)).all()  # dx does not use x
