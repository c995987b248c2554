"""Equinox's own models with our products."""

import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from tests import programs
from tests.frameworks import compare, normal

POW2 = jaxfp8.Recipe(scale_format="pow2")
KEY = jax.random.key(0)


def mlp():
    # A smooth activation: where relu's input changes its sign, a gradient is another one.
    return eqx.nn.MLP(128, 72, 256, 2, jax.nn.gelu, dtype=jnp.bfloat16, key=KEY)


def apply_of(model, map_axes=1):
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        f = eqx.combine(params, static)
        for _ in range(map_axes):
            f = jax.vmap(f)
        return f(x)

    return apply, params


def compare_models(fp8, bf16, x, *, map_axes=1, **expected):
    """Outputs and gradients of two models with the same parameters, mapped over leading axes."""
    (apply, params), (plain, same) = apply_of(fp8, map_axes), apply_of(bf16, map_axes)
    leaves, structure = jax.tree.flatten(params)
    reference = jax.tree.structure(same)
    return compare(
        lambda leaves, x: apply(jax.tree.unflatten(structure, leaves), x),
        lambda leaves, x: plain(jax.tree.unflatten(reference, leaves), x),
        leaves,
        x,
        tolerance=0.15,
        **expected,
    )


@pytest.mark.parametrize("shape", [(72, 128), (2, 3, 24, 128)], ids=["one vmap", "three vmaps"])
@pytest.mark.representatives()
def test_a_model_of_one_example_under_vmap_is_one_product_a_layer(shape):
    model = mlp()
    fp8 = jaxfp8.equinox.convert(model)
    compare_models(fp8, model, normal(0, *shape), map_axes=len(shape) - 1, ours=3)

    apply, params = apply_of(fp8, len(shape) - 1)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p, x: apply(p, x).astype(jnp.float32).sum()))(
        params, normal(0, *shape)
    )
    assert not programs.has_loop(jaxpr)
    # No weight gradient an example: (72, 256, 128) elements would be 18 times the largest array that is due.
    assert programs.largest(jaxpr) <= 2 * 256 * 256


def test_a_layer_equals_the_explicit_operation():
    x = normal(0, 72, 128)
    layer = eqx.nn.Linear(128, 200, dtype=jnp.bfloat16, key=KEY)
    y = jax.vmap(jaxfp8.equinox.convert(layer))(x)
    programs.assert_same_bits(y, jaxfp8.linear(x, layer.weight.T, layer.bias))
    y = jax.vmap(jaxfp8.equinox.convert(layer, recipe=POW2))(x)
    programs.assert_same_bits(y, jaxfp8.linear(x, layer.weight.T, layer.bias, recipe=POW2))


@pytest.mark.slow
def test_attention_inside_two_vmaps():
    attention = eqx.nn.MultiheadAttention(4, 128, dtype=jnp.bfloat16, key=KEY)
    fp8 = jaxfp8.equinox.convert(attention)

    class Self(eqx.Module):
        attention: eqx.Module

        def __call__(self, x):
            return self.attention(x, x, x)

    compare_models(Self(fp8), Self(attention), normal(0, 2, 40, 128), ours=4, others=2)


def test_layers_are_chosen_by_path_and_layer():
    model = {"body": mlp(), "head": eqx.nn.Linear(72, 8, key=KEY)}
    paths = []

    def where(path, linear):
        paths.append(path)
        return "head" not in path and linear.out_features >= 128

    fp8 = jaxfp8.equinox.convert(model, where)
    assert paths == ["body.layers.0", "body.layers.1", "body.layers.2", "head"]
    kinds = [type(m) for m in (*fp8["body"].layers, fp8["head"])]
    assert kinds == [jaxfp8.equinox.Linear] * 2 + [eqx.nn.Linear] * 2
    with pytest.raises(ValueError, match="no layer is chosen; the model has .*head"):
        jaxfp8.equinox.convert(model, lambda path, linear: False)
    with pytest.raises(ValueError, match=r"no eqx\.nn\.Linear"):
        jaxfp8.equinox.convert([1, 2])


def test_a_converted_model_keeps_its_leaves_and_files():
    model = mlp()
    fp8 = jaxfp8.equinox.convert(model)
    programs.assert_same_bits(
        jax.tree.leaves(eqx.filter(fp8, eqx.is_array)),
        jax.tree.leaves(eqx.filter(model, eqx.is_array)),
    )
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, model)
    file.seek(0)
    like = jaxfp8.equinox.convert(
        eqx.nn.MLP(128, 72, 256, 2, dtype=jnp.bfloat16, key=jax.random.key(1))
    )
    loaded = eqx.tree_deserialise_leaves(file, like)
    assert isinstance(loaded.layers[0], jaxfp8.equinox.Linear)
    programs.assert_same_bits(loaded.layers[1].weight, model.layers[1].weight)


def test_a_layer_of_ones_own_and_scalars():
    layer = jaxfp8.equinox.Linear(128, "scalar", recipe=POW2, key=KEY)
    x = normal(0, 24, 128, dtype=jnp.float32)
    assert jax.vmap(layer)(x).shape == (24,)
    assert jax.vmap(jaxfp8.equinox.Linear("scalar", 8, key=KEY))(x[:, 0]).shape == (24, 8)
    assert jaxfp8.equinox.convert(layer).recipe is None
    with pytest.raises(ValueError, match=r"x has shape \(24, 128\); allowed: \(128,\)"):
        layer(x)


def test_a_subclass_computes_what_it_computes():
    class Doubled(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x)

    model = [Doubled(128, 128, key=KEY), eqx.nn.Linear(128, 128, key=KEY)]
    assert [type(m) for m in jaxfp8.equinox.convert(model)] == [Doubled, jaxfp8.equinox.Linear]


def test_models_with_equal_recipes_compile_once():
    traces = []

    @eqx.filter_jit
    def run(model, x):
        traces.append(None)
        return jax.vmap(model)(x)

    for recipe in (POW2, jaxfp8.Recipe(scale_format="pow2")):
        run(jaxfp8.equinox.convert(mlp(), recipe=recipe), normal(0, 8, 128))
    assert len(traces) == 1


def test_frozen_weights_take_one_byte_and_the_input_has_its_gradient():
    model = eqx.nn.MLP(256, 128, 256, 2, key=jax.random.key(0))
    frozen = jaxfp8.equinox.convert(model, frozen=True)
    layers = frozen.layers
    assert all(isinstance(layer.weight, jaxfp8.QuantizedArray) for layer in layers)
    assert all(
        f.weight.nbytes <= 1.03 * w.weight.size for f, w in zip(layers, model.layers, strict=True)
    )
    x = jax.random.normal(jax.random.key(1), (64, 256))

    def loss(x, model):
        return jnp.sum(jax.vmap(model)(x) ** 2)

    wide = jaxfp8.equinox.convert(model)
    got, want = (eqx.filter_jit(jax.value_and_grad(loss))(x, m) for m in (frozen, wide))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert jaxfp8.equinox.convert(frozen, frozen=True).layers[0].weight is layers[0].weight
