"""What devices sum, and in which dtype: `Recipe.wgrad_dtype` and `Recipe.reduce_dtype`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import oracle
from tests.programs import assert_close, assert_same_bits

BF16 = jnp.bfloat16
ROUNDING = 2.0**-8
"""Of bfloat16, relative."""


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def train(f, recipe):
    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(functools.partial(f, recipe=recipe), x, w)
        return y, *pull(y)

    return run


def put(mesh, x, *axes):
    return jax.device_put(x, NamedSharding(mesh, P(*axes)))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return jax.make_mesh((4,), ("d",), axis_types=(request.param,))


def test_weight_gradients_are_made_in_bfloat16():
    """One device: the float32 gradient, rounded once."""
    x, w = arrays((256, 128), (128, 256))
    y, dx, dw = train(jaxfp8.linear, jaxfp8.Recipe(wgrad_dtype=BF16))(x, w)
    want_y, want_dx, want_dw = train(jaxfp8.linear, jaxfp8.Recipe())(x, w)
    assert_same_bits((y, dx, dw), (want_y, want_dx, want_dw.astype(BF16).astype(jnp.float32)))


@pytest.mark.parametrize("operation", ["mlp", "ragged_dot", "ragged_mlp"])
def test_every_weight_gradient_is_made_in_bfloat16(operation):
    x, up, down = arrays((256, 128), (2, 128, 128), (2, 128, 128))
    sizes = jnp.array([200, 56], jnp.int32)
    run = {
        "mlp": lambda x, w, recipe: jaxfp8.mlp(x, w[0], w[1], recipe=recipe),
        "ragged_dot": lambda x, w, recipe: jaxfp8.ragged_dot(x, w, sizes, recipe=recipe),
        "ragged_mlp": lambda x, w, recipe: jaxfp8.ragged_mlp(x, w, down, sizes, recipe=recipe),
    }[operation]
    found = train(run, jaxfp8.Recipe(wgrad_dtype=BF16))(x, up)
    *same, want = train(run, jaxfp8.Recipe())(x, up)
    assert_same_bits(found, (*same, want.astype(BF16).astype(jnp.float32)))


@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=["float32", "bfloat16"])
def test_partial_weight_gradients_are_summed_in_the_recipes_dtype(mesh, dtype):
    """FSDP. (What moves is in tests/test_compiled.py: XLA:CPU has no sums in bfloat16.)"""
    x, w = arrays((512, 256), (256, 128))
    recipe = jaxfp8.Recipe(wgrad_dtype=dtype)
    run = train(jaxfp8.linear, recipe)
    placed = put(mesh, x, "d"), put(mesh, w, None, "d")
    *_, dw = run(*placed)
    *_, want = train(jaxfp8.linear, jaxfp8.Recipe())(x, w)
    bound = 4 * ROUNDING if dtype == BF16 else 1e-6
    error = oracle.error(dw, want)
    assert error <= bound
    assert (error > 1e-4) == (dtype == BF16)  # the roundings are there


@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=["float32", "bfloat16"])
def test_partial_results_are_summed_in_the_recipes_dtype(mesh, dtype):
    """A weight cut by rows, as the second of tensor parallelism."""
    x, w = arrays((128, 512), (512, 128))
    run = train(jaxfp8.linear, jaxfp8.Recipe(reduce_dtype=dtype))
    y, *_ = run(put(mesh, x, None, "d"), put(mesh, w, "d"))
    want, *_ = train(jaxfp8.linear, jaxfp8.Recipe())(x, w)
    error = oracle.error(y, want)
    assert error <= (4 * ROUNDING if dtype == BF16 else 1e-6)
    assert (error > 1e-4) == (dtype == BF16)


def test_a_gathered_weights_gradient_is_scattered_in_bfloat16():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    x, w = arrays((512, 256), (256, 128))

    def step(x, w):
        recipe = jaxfp8.Recipe(wgrad_dtype=BF16)
        gather = functools.partial(jaxfp8.all_gather_weight, axis_name="d", axis=-2, recipe=recipe)
        return jax.grad(lambda w: jnp.sum(jaxfp8.linear(x, gather(w), recipe=recipe)))(w)

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    lowered = run.lower(x, w).as_text()
    types = re.findall(r"reduce_scatter.*?}\) : \((.*?)\)", lowered, re.S)
    assert types == ["tensor<256x128xbf16>"]
    want = jax.grad(lambda w: jnp.sum(jaxfp8.linear(x, w)))(w)
    assert_close(run(x, w), want, 4 * ROUNDING)


@pytest.mark.parametrize("field", ["wgrad_dtype", "reduce_dtype"])
@pytest.mark.parametrize("value", [jnp.float16, jnp.float8_e4m3fn, "int8", 3])
def test_other_dtypes_are_refused(field, value):
    with pytest.raises(TypeError, match=f"Recipe: {field} is .*; allowed: float32, bfloat16"):
        jaxfp8.Recipe(**{field: value})
