"""Flax linen's own layers with our products."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxfp8
from tests import programs
from tests.frameworks import (
    QUICK,
    assert_near,
    assert_products,
    compare,
    normal,
    output_and_gradients,
)

OP = jaxfp8.flax.DotGeneral()
POW2 = jaxfp8.Recipe(scale_format="pow2")


def compare_modules(fp8, bf16, x, **expected):
    """Outputs and gradients of two modules with the same parameters."""
    return compare(fp8.apply, bf16.apply, bf16.init(jax.random.key(0), x), x, **expected)


def test_dense():
    x = normal(0, 2, 72, 136)
    layer = nn.Dense(200, dtype=jnp.bfloat16)
    y, _ = compare_modules(layer.copy(dot_general=OP), layer, x, ours=1)
    kernel = layer.init(jax.random.key(0), x)["params"]["kernel"].astype(jnp.bfloat16)
    programs.assert_same_bits(y, jaxfp8.linear(x, kernel))


@pytest.mark.parametrize(
    "field",
    [
        dict(dot_general=jaxfp8.dot_general),
        dict(dot_general_cls=jaxfp8.flax.DotGeneral),
        dict(dot_general_cls=OP.cls),
    ],
    ids=["function", "class", "factory"],
)
def test_every_way_to_give_dense_the_operation(field):
    x = normal(0, 2, 72, 136)
    layer = nn.Dense(200, **field)
    assert_products(layer.apply, (layer.init(jax.random.key(0), x), x), ours=1)


@pytest.mark.parametrize(
    "shape, fields",
    [
        ((2, 40, 4, 32), dict(features=144, axis=(-2, -1))),  # an attention's output projection
        pytest.param((40, 128), dict(features=(4, 40)), marks=pytest.mark.slow),
        ((3, 40, 128), dict(features=(2, 72), axis=(2, 1))),
        ((3, 40, 128), dict(features=136, batch_dims=(0,))),
    ],
    ids=["two contracting axes", "two features", "axes in disorder", "batch axis"],
)
def test_dense_general(shape, fields):
    layer = nn.DenseGeneral(**fields, dtype=jnp.bfloat16)
    compare_modules(layer.copy(dot_general=OP), layer, normal(0, *shape), ours=1)


def attention(**fields):
    # Without biases: the gradient of a key's bias is zero but for rounding, so it has no relative error.
    return nn.MultiHeadDotProductAttention(
        num_heads=4,
        qkv_features=128,
        out_features=144,
        use_bias=False,
        dtype=jnp.bfloat16,
        **fields,
    )


def test_the_projections_of_attention():
    fp8 = attention(qkv_dot_general=OP, out_dot_general=OP)
    x = normal(0, 2, 40, 136)
    compare_modules(fp8, attention(), x, ours=4, others=2, tolerance=0.12)

    cls = jaxfp8.flax.DotGeneral
    fp8 = attention(qkv_dot_general_cls=cls, out_dot_general_cls=cls)
    assert_products(fp8.apply, (fp8.init(jax.random.key(0), x), x), ours=4, others=2)


@pytest.mark.slow
def test_attentions_own_products():
    cls = jaxfp8.flax.Einsum
    fp8 = attention(qk_attn_weights_einsum_cls=cls, attn_weights_value_einsum_cls=cls)
    compare_modules(fp8, attention(), normal(0, 2, 40, 136), ours=2, others=4)


def test_the_products_of_dot_product_attention():
    query = normal(0, 2, 72, 4, 64)
    attend = nn.dot_product_attention
    assert_products(lambda q: attend(q, q, q, einsum_dot_general=OP), (query,), ours=2)
    assert_near(attend(query, query, query, einsum_dot_general=OP), attend(query, query, query))


def test_a_recipe_of_a_layer_and_one_in_force():
    x = normal(0, 72, 136)
    plain = nn.Dense(200, dot_general=OP)
    params = plain.init(jax.random.key(0), x)
    want = jaxfp8.linear(x.astype(jnp.float32), params["params"]["kernel"], recipe=POW2)
    for field in (
        dict(dot_general=jaxfp8.flax.DotGeneral(POW2)),
        dict(dot_general=None, dot_general_cls=jaxfp8.flax.DotGeneral(POW2).cls),
    ):
        programs.assert_same_bits(plain.copy(**field).apply(params, x), want)
    with POW2:
        programs.assert_same_bits(plain.apply(params, x), want)


def test_a_precision_that_fp8_cannot_give_is_refused():
    layer = nn.Dense(128, dot_general=OP, precision="highest")
    with pytest.raises(ValueError, match="precision"):
        layer.init(jax.random.key(0), jnp.ones((8, 128)))


class Block(nn.Module):
    dot_general: object = None

    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(256, dtype=jnp.bfloat16, dot_general=self.dot_general)(x))
        return x + nn.Dense(128, dtype=jnp.bfloat16, dot_general=self.dot_general)(h), None


class Stack(nn.Module):
    dot_general: object = None

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, policy=jaxfp8.checkpoint_policies.save_fp8_residuals())
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(self.dot_general)(x, None)[0]


def test_layers_under_remat_and_scan():
    x = normal(0, 72, 128)
    params = Stack().init(jax.random.key(0), x)
    run, reference = (output_and_gradients(m.apply) for m in (Stack(OP), Stack()))
    traced = jax.jit(run).trace(params, x)
    # Both forward, their four gradients, and again the first, whose result gelu's derivative needs; the second's
    # residuals are kept.
    assert programs.products(traced.jaxpr) == 7
    got = traced.lower().compile(QUICK)(params, x)
    assert_near(got, jax.jit(reference, compiler_options=QUICK)(params, x), 0.12)
