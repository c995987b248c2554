"""qwix's own quantize_model and QArray with our provider."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import jaxfp8
from tests import oracle, programs
from tests.frameworks import assert_products, compare, normal

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*")

E4M3 = jnp.float8_e4m3fn
FP8 = dict(weight_qtype=E4M3, act_qtype=E4M3)
POW2 = jaxfp8.Recipe(scale_format="pow2")
BF16 = dict(dtype=jnp.bfloat16)


def provider(*paths, **kwargs):
    """FP8 where a module's path matches one of the patterns."""
    return jaxfp8.qwix.Fp8Provider(
        [qwix.QuantizationRule(module_path=p, **FP8) for p in paths], **kwargs
    )


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(256, name="up", **BF16)(x)
        x = nn.Einsum((256, 2, 72), "btf,fhk->bthk", name="mix", use_bias=False, **BF16)(nn.gelu(x))
        x = nn.DenseGeneral(128, axis=(-2, -1), name="down", **BF16)(x)
        return nn.Dense(64, name="head", **BF16)(x)


def test_rules_choose_the_layers_of_a_linen_model():
    x = normal(0, 2, 40, 128)
    model = Linen()
    params = model.init(jax.random.key(0), x)
    rules = [
        qwix.QuantizationRule(module_path="head"),
        qwix.QuantizationRule(module_path=".*", **FP8),
    ]
    fp8 = qwix.quantize_model(model, jaxfp8.qwix.Fp8Provider(rules))
    compare(fp8.apply, model.apply, params, x, ours=3, others=1, tolerance=0.12)
    assert_products(model.apply, (params, x), ours=0, others=4)  # the model itself is as it was


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 128, use_bias=False, decode=False, rngs=rngs, **BF16
        )
        self.router = nnx.Linear(128, 4, rngs=rngs, **BF16)
        self.experts = nnx.Param(normal(3, 4, 128, 72) * 0.1)

    def __call__(self, x):
        x = (x + self.attention(x)).reshape(-1, 128)
        y = jax.lax.ragged_dot(x, self.experts[...], jnp.array([30, 0, 45, 5]))
        return y * nnx.sigmoid(self.router(x)).sum(-1, keepdims=True)


@pytest.mark.full
def test_rules_choose_the_layers_of_an_nnx_model():
    x = normal(0, 2, 40, 128)
    model = Nnx(nnx.Rngs(0))
    # "" is the model itself, whose ragged_dot it is; attention's einsums are its own module's, so they stay.
    fp8 = qwix.quantize_model(model, provider("attention/.+", ""), x)

    def apply_of(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return lambda params, x: nnx.merge(graph, params, rest)(x), params

    (apply, params), (plain, same) = apply_of(fp8), apply_of(model)
    programs.assert_same_bits(jax.tree.leaves(params), jax.tree.leaves(same))
    compare(apply, plain, params, x, ours=5, others=3, tolerance=0.15)


def test_an_operand_that_is_a_parameter_is_the_weight_wherever_it_stands():
    class First(nn.Module):
        how: str

        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (128, 200))
            if self.how == "einsum":
                return jnp.einsum("kn,btk->nbt", w, x)
            return jax.lax.dot_general(w, x, (((0,), (2,)), ((), ())))

    x = normal(0, 2, 72, 128, dtype=jnp.float32)
    for how in ("einsum", "dot_general"):
        fp8 = qwix.quantize_model(First(how), provider(".*"))
        params = fp8.init(jax.random.key(0), x)
        want = jaxfp8.linear(x, params["params"]["w"]).transpose(2, 0, 1)
        programs.assert_same_bits(fp8.apply(params, x), want)


def test_recipes_come_from_the_rule_and_the_provider():
    x = normal(0, 72, 128, dtype=jnp.float32)
    model = nn.Dense(128, use_bias=False)
    params = model.init(jax.random.key(0), x)
    rule = qwix.QtRule(**FP8, bwd_qtype=jnp.float8_e5m2, tile_size=128)
    fp8 = qwix.quantize_model(model, jaxfp8.qwix.Fp8Provider([rule], recipe=POW2))
    recipe = jaxfp8.Recipe(scale_format="pow2", grad_dtype=jnp.float8_e5m2)

    def loss(f):
        return jax.grad(lambda p: (f(p) ** 2).sum())

    got = loss(lambda p: fp8.apply(p, x))(params)
    want = loss(lambda p: jaxfp8.linear(x, p["params"]["kernel"], recipe=recipe))(params)
    programs.assert_same_bits(got, want)


@pytest.mark.parametrize(
    "rule, message",
    [
        (dict(weight_qtype=E4M3), "act_qtype None; allowed: float8_e4m3fn, float8_e5m2"),
        (dict(weight_qtype="int8", act_qtype="int8"), "weight_qtype 'int8'; allowed: float8"),
        (dict(weight_qtype="mxfp8", act_qtype="mxfp8"), "weight_qtype 'mxfp8'; allowed: float8"),
        (
            dict(weight_qtype=E4M3, act_qtype="float8_e5m2"),
            "act_qtype 'float8_e5m2'; allowed: float8_e4m3fn",
        ),
        (dict(FP8, tile_size=32), "tile_size 32; allowed: 128 or None"),
        (dict(FP8, bwd_qtype="int8"), "bwd_qtype 'int8'; allowed: float8"),
        (
            dict(FP8, weight_calibration_method="rms,7"),
            "weight_calibration_method 'rms,7'; allowed: 'absmax'",
        ),
        (dict(FP8, act_static_scale=True), "act_static_scale True; allowed: False"),
        (
            dict(FP8, bwd_stochastic_rounding="uniform"),
            "bwd_stochastic_rounding 'uniform'; allowed: None",
        ),
    ],
)
def test_a_rule_for_what_block_scaled_fp8_is_not_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        jaxfp8.qwix.Fp8Provider([qwix.QtRule(module_path="mlp", **rule)])


def test_an_einsum_of_three_operands_is_refused():
    class Three(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.einsum("ab,bc,cd->ad", x, x, x)

    fp8 = qwix.quantize_model(Three(), provider(".*"))
    with pytest.raises(ValueError, match="3 operands; allowed where a rule asks for FP8"):
        fp8.init(jax.random.key(0), jnp.ones((8, 8)))


# --------------------------------------------------------------------------------------------------
# QArray
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(72, 256), (2, 256, 384), (40, 72)])
def test_arrays_go_to_qwix_and_back(shape):
    x = normal(0, *shape, dtype=jnp.float32)
    for block in ((1, 128), (128, 128)):
        if block[0] == 1 or shape[-2] % 128 == 0 or shape[-2] < 128:
            q = jaxfp8.quantize(x, block)
            array = jaxfp8.qwix.to_qarray(q)
            programs.assert_same_bits(qwix.dequantize(array), q.dequantize())
            programs.assert_same_bits(jaxfp8.qwix.from_qarray(array, block), q)


@pytest.mark.parametrize(
    "tiles, channels, block",
    [
        ({1: 128}, (0,), (1, 128)),
        ({1: 256}, (0,), (1, 128)),
        ({0: 128, 1: 128}, (), (128, 128)),
        ({}, (0,), (1, 128)),  # a scale a row
        ({}, (), (128, 128)),  # one scale
        ({}, (), (1, 128)),
    ],
    ids=str,
)
def test_what_qwix_quantized_is_taken_without_another_rounding(tiles, channels, block):
    x = normal(0, 256, 512, dtype=jnp.float32)
    array = qwix.quantize(x, E4M3, channelwise_axes=channels, tiled_axes=tiles)
    q = jaxfp8.qwix.from_qarray(array, block)
    programs.assert_same_bits(q.data, array.qvalue)
    programs.assert_same_bits(q.dequantize(), qwix.dequantize(array))


def test_dot_of_a_weight_that_qwix_quantized():
    x, w = normal(0, 72, 256), normal(1, 256, 128, dtype=jnp.float32)
    weight = qwix.quantize(w, E4M3, tiled_axes={0: 128, 1: 128})
    left = jaxfp8.quantize(x)
    want = oracle.dequantize(left) @ np.asarray(qwix.dequantize(weight), np.float64)
    got = jaxfp8.qwix.dot(x, weight, preferred_element_type=jnp.float32)
    oracle.assert_close(got, want, 2e-6)
    got = jaxfp8.qwix.dot(jaxfp8.qwix.to_qarray(left), weight, preferred_element_type=jnp.float32)
    oracle.assert_close(got, want, 2e-6)


def test_arrays_that_do_not_fit_are_refused():
    x = normal(0, 256, 320, dtype=jnp.float32)
    with pytest.raises(ValueError, match="q has K=320, a short last block"):
        jaxfp8.qwix.to_qarray(jaxfp8.quantize(x))
    with pytest.raises(TypeError, match="q is a Array"):
        jaxfp8.qwix.to_qarray(x)
    fine = qwix.quantize(x, E4M3, tiled_axes={1: 32}, channelwise_axes=(0,))
    with pytest.raises(ValueError, match="tiles of 32 along axis 1; allowed: multiples of 128"):
        jaxfp8.qwix.from_qarray(fine)
    rows = qwix.quantize(x, E4M3, channelwise_axes=(0,))
    with pytest.raises(ValueError, match="tiles of 1 along axis 0; allowed: multiples of 128"):
        jaxfp8.qwix.from_qarray(rows, (128, 128))
    with pytest.raises(TypeError, match="int8"):
        jaxfp8.qwix.from_qarray(qwix.quantize(x, jnp.int8))
    with pytest.raises(TypeError, match="rhs is a Array"):
        jaxfp8.qwix.dot(x, x)
