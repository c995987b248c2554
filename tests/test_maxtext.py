"""The quantization for MaxText through the bridge that calls it there, and on MaxText itself where it is installed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxfp8
from tests import programs
from tests.frameworks import assert_products, compare, normal

POW2 = jaxfp8.Recipe(scale_format="pow2")


class DenseGeneral(nnx.Module):
    """How MaxText's dense layer uses its `quant` (maxtext/layers/linears.py)."""

    def __init__(self, quant, shape, rngs):
        self.kernel = nnx.Param(normal(7, *shape))
        module = quant.dot_general_cls(mesh_axes=("embed", "mlp"))()
        assert isinstance(module, nn.Module)
        self.product = nnx.bridge.ToNNX(module, rngs=rngs)
        dimension_numbers = (((1,), (0,)), ((), ()))
        x = jnp.zeros((1, shape[0]), jnp.bfloat16)
        self.product.lazy_init(x, self.kernel[...], dimension_numbers, precision=None)
        if not quant.needs_apply_rngs:
            self.product.to_nnx__rngs = None

    def __call__(self, x):
        dimension_numbers = (((x.ndim - 1,), (0,)), ((), ()))
        return self.product(x, self.kernel[...], dimension_numbers, precision=None, mutable=["aqt"])


def test_a_dense_layer():
    layer = DenseGeneral(jaxfp8.maxtext.Fp8Quantization(), (136, 72), nnx.Rngs(0))
    graph, state = nnx.split(layer)
    assert len(jax.tree.leaves(state)) == 1  # the kernel: no variables, no random state
    x = normal(0, 2, 40, 136)

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    y, _ = compare(apply, lambda state, x: x @ state["kernel"][...], state, x, ours=1)
    programs.assert_same_bits(y, jaxfp8.linear(x, normal(7, 136, 72)))


def test_the_experts_with_and_without_a_capacity_factor():
    quant = jaxfp8.maxtext.Fp8Quantization(POW2)
    x, w = normal(0, 4, 24, 136), normal(1, 4, 136, 72)
    einsum = quant.einsum(mesh_axes=("exp", "embed", "mlp"))
    assert not isinstance(einsum, nn.Module)  # so MaxText calls it as it is
    y = einsum("ebcm,emh->ebch", x[:, None], w)
    programs.assert_same_bits(y, jaxfp8.einsum("ebcm,emh->ebch", x[:, None], w, recipe=POW2))
    assert quant.einsum(dtype=jnp.bfloat16) == einsum

    x, sizes = x.reshape(96, 136), jnp.array([40, 0, 53, 3])
    partial = normal(2, 96, 72)
    got = quant.ragged_dot(x, w, sizes, preferred_element_type=jnp.bfloat16, partial_sum=partial)
    want = jaxfp8.ragged_dot(x, w, sizes, recipe=POW2)
    programs.assert_same_bits(got, want + partial)
    with pytest.raises(NotImplementedError, match="group_offset"):
        quant.ragged_dot(x, w, sizes, group_offset=jnp.array([1]))


def test_it_compares_by_value():
    make = jaxfp8.maxtext.Fp8Quantization
    assert make(POW2) == make(jaxfp8.Recipe(scale_format="pow2")) != make()
    assert len({make(), make(None), make(POW2)}) == 2


def test_it_has_the_interface_of_maxtexts_base_class():
    base = pytest.importorskip("maxtext.layers.quantizations", reason="MaxText needs Python 3.12")
    quant = jaxfp8.maxtext.Fp8Quantization()
    names = {n for n in vars(base.Quantization) if not n.startswith("_")}
    assert {n for n in names if not hasattr(quant, n)} == set()
    assert not base.in_serve_mode(quant) and not base.in_convert_mode(quant)


def test_maxtexts_own_dense_layer():
    linears = pytest.importorskip("maxtext.layers.linears", reason="MaxText needs Python 3.12")

    def make(quant):
        return linears.DenseGeneral(
            in_features_shape=(4, 32),
            out_features_shape=136,
            axis=(-2, -1),
            dtype=jnp.bfloat16,
            quant=quant,
            rngs=nnx.Rngs(0),
        )

    def apply_of(layer):
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        return lambda params, x: nnx.merge(graph, params, rest)(x), params

    (apply, params), (plain, same) = (
        apply_of(make(jaxfp8.maxtext.Fp8Quantization())),
        apply_of(make(None)),
    )
    x = normal(0, 2, 40, 4, 32)
    assert_products(plain, (same, x), ours=0, others=1)
    compare(apply, plain, params, x, ours=1)
