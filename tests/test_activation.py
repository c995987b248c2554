"""mlp and ragged_mlp: results and gradients against float64, and how they compose with JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import _ffi
from tests import oracle, oracle_activation
from tests import oracle_gradients as og
from tests import oracle_quantize as oq
from tests.emulated_platform import emulated_platform
from tests.oracle_mlp import FLIPS, ragged_reference, reference, run, tokens, weights


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", oracle_activation.ACTIVATIONS)
@pytest.mark.representatives(cases=2)
def test_mlp_and_its_gradients_equal_float64(gated, activation):
    (x, dy), (w_up, w_down) = tokens(130, 96, 72), weights(96, 200, 72, gated)
    got = run(jaxfp8.mlp, x, w_up, w_down, dy, activation=activation)
    for a, b in zip(got, reference(x, w_up, w_down, dy, activation), strict=True):
        oracle.assert_close(a, b, FLIPS)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_ragged_mlp_is_an_mlp_for_each_group(gated):
    sizes = [50, 0, 70]
    (x, dy), (w_up, w_down) = tokens(130, 96, 72), weights(96, 128, 72, gated, (3,))

    def f(x, w_up, w_down):
        return jaxfp8.ragged_mlp(x, w_up, w_down, jnp.array(sizes), activation="gelu")

    got = run(f, x, w_up, w_down, dy)
    want = ragged_reference(x, w_up, w_down, dy, sizes, "gelu")
    for a, b in zip(got, want, strict=True):
        oracle.assert_close(a, b, FLIPS)
    (y, dx, dw_up, dw_down), end = got, sum(sizes)
    assert not y[end:].any() and not dx[end:].any()
    assert not dw_up[1].any() and not dw_down[1].any()


def test_vmap_with_shared_weights_is_one_mlp():
    (x, dy), (w_up, w_down) = tokens(256, 96, 72), weights(96, 128, 72, True)

    def vmapped(x, w_up, w_down):
        y = jax.vmap(lambda x: jaxfp8.mlp(x, w_up, w_down))(x.reshape(2, 128, 96))
        return y.reshape(256, 72)

    for a, b in zip(
        run(vmapped, x, w_up, w_down, dy), run(jaxfp8.mlp, x, w_up, w_down, dy), strict=True
    ):
        oracle.assert_close(a, b, 1e-6)


def test_scan_and_remat_change_nothing():
    (x, dy), (w_up, w_down) = tokens(128, 128, 128), weights(128, 128, 128, True)

    def layers(x, w_up, w_down, wrap=lambda f: f):
        def layer(x, _):
            return wrap(lambda x: jaxfp8.mlp(x, w_up, w_down))(x), None

        return jax.lax.scan(layer, x, None, length=2)[0]

    want = run(layers, x, w_up, w_down, dy)
    policy = jaxfp8.checkpoint_policies.save_fp8_residuals()
    for options in ({}, {"policy": policy}):
        got = run(layers, x, w_up, w_down, dy, wrap=lambda f, o=options: jax.checkpoint(f, **o))
        for a, b in zip(got, want, strict=True):
            oracle.assert_close(a, b, FLIPS)


@pytest.mark.parametrize(
    ("which", "gated"),
    [
        ("both", True),
        ("up", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("both", False), ("up", True), ("down", False), ("down", True)]
        ),
    ],
)
@pytest.mark.parametrize("groups", [(), (2,)], ids=["dense", "ragged"])
@pytest.mark.representatives()
def test_weights_quantized_ahead_have_the_bits_of_those_quantized_here(which, gated, groups):
    (x, dy), (w_up, w_down) = tokens(70, 96, 72), weights(96, 128, 72, gated, groups)

    def f(x, w_up, w_down, ahead):
        if ahead and which != "down":
            w_up = jaxfp8.prequantize(w_up.reshape(*groups, 96, -1))
        if ahead and which != "up":
            w_down = jaxfp8.prequantize(w_down)
        if groups:
            return jaxfp8.ragged_mlp(x, w_up, w_down, jnp.array([30, 40]))
        return jaxfp8.mlp(x, w_up, w_down)

    got, want = (run(f, x, w_up, w_down, dy, ahead=ahead) for ahead in (True, False))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_hidden_layer_is_bfloat16_if_the_tokens_are():
    (x, _), (w_up, w_down) = tokens(64, 96, 72), weights(96, 128, 72, True)
    for dtype in (jnp.bfloat16, jnp.float32):
        jaxpr = jax.make_jaxpr(lambda x: jax.vjp(jaxfp8.mlp, x, w_up, w_down))(x.astype(dtype))
        assert (dtype, (64, 2, 128)) in [(v.dtype, v.shape) for v in jaxpr.out_avals]
        assert jaxpr.out_avals[0].dtype == dtype  # the result is, too


UP, DOWN = np.zeros((96, 2, 128), np.float32), np.zeros((128, 72), np.float32)
BAD = {
    "activation": (
        lambda x: jaxfp8.mlp(x, UP, DOWN, activation="relu"),
        r"activation is 'relu'; allowed: 'silu', 'gelu' \(gelu by its tanh .* call jaxfp8.linear twice",
    ),
    "activation of experts": (
        lambda x: jaxfp8.ragged_mlp(x, UP[None], DOWN[None], np.array([4]), activation="erf"),
        "activation is 'erf'.* call jaxfp8.ragged_dot twice",
    ),
    "rank of w_up": (lambda x: jaxfp8.mlp(x, UP[0, 0], DOWN), "w_up has shape"),
    "halves": (lambda x: jaxfp8.mlp(x, UP[:, :1], DOWN), "w_up has shape"),
    "K": (lambda x: jaxfp8.mlp(x, UP[:5], DOWN), "w_up has K=5 but x has K=96"),
    "F": (lambda x: jaxfp8.mlp(x, UP, DOWN[:5]), "w_down has F=5 but w_up has F=128"),
    "x": (lambda x: jaxfp8.mlp(x[0, 0], UP, DOWN), r"x has shape \(\)"),
    "w_down": (lambda x: jaxfp8.mlp(x, UP, DOWN[0]), "w_down has shape"),
    "out_sharding": (
        lambda x: jaxfp8.mlp(x, UP, DOWN, out_sharding=jax.P(None, None, "d")),
        "mlp: out_sharding .* names 3 dimensions; the result has 2",
    ),
    "F of a quantized weight": (
        lambda x: jaxfp8.mlp(x, UP[..., :96], jaxfp8.prequantize(DOWN[:96])),
        "w_down has F=96; allowed beside a QuantizedWeight: a multiple of 128",
    ),
    "quantized weights that do not fit": (
        lambda x: jaxfp8.mlp(x, jaxfp8.prequantize(UP[:, 0, :100]), DOWN),
        "w_down has F=128 but w_up has F=100",
    ),
    "quantized weight of another rank": (
        lambda x: jaxfp8.mlp(x, jaxfp8.prequantize(UP), DOWN),
        r"w_up has shape \(96, 2, 128\)",
    ),
    "groups": (
        lambda x: jaxfp8.ragged_mlp(x, np.stack([UP] * 2), DOWN[None], np.array([1, 2])),
        "w_down has G=1 but w_up has G=2",
    ),
    "group sizes": (
        lambda x: jaxfp8.ragged_mlp(x, UP[None], DOWN[None], np.array([1, 2])),
        "group_sizes has G=2 but w_up has G=1",
    ),
}


BAD_TYPES = {
    "x": (lambda x: jaxfp8.mlp(x.astype(int), UP, DOWN), "mlp: x has dtype int32"),
    "w_up": (lambda x: jaxfp8.mlp(x, [1.0], DOWN), "mlp: w_up is a list"),
    "w_down": (lambda x: jaxfp8.mlp(x, UP, None), "mlp: w_down is a NoneType"),
    "recipe": (lambda x: jaxfp8.mlp(x, UP, DOWN, recipe={}), "mlp: recipe is {}"),
    "preferred_element_type": (
        lambda x: jaxfp8.mlp(x, UP, DOWN, preferred_element_type=jnp.int32),
        "mlp: preferred_element_type is int32",
    ),
    "out_sharding": (
        lambda x: jaxfp8.mlp(x, UP, DOWN, out_sharding="data"),
        "mlp: out_sharding is 'data'",
    ),
    "group_sizes": (
        lambda x: jaxfp8.ragged_mlp(x, UP[None], DOWN[None], np.zeros(1, np.float32)),
        "ragged_mlp: group_sizes has dtype float32",
    ),
}


@pytest.mark.parametrize("case", BAD_TYPES)
def test_a_wrong_type_is_refused_by_name(case):
    f, message = BAD_TYPES[case]
    with pytest.raises(TypeError, match=message):
        f(np.zeros((4, 96), np.float32))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    f, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        f(np.zeros((4, 96), np.float32))


def calls(f, *args):
    import re

    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo\.(dot|dot_general|exponential|logistic)\b", text)
    return sorted(re.findall(r"custom_call @jaxfp8_(\w+)_v1\(", text))


needs_kernels = pytest.mark.skipif(
    not _ffi.images(), reason="this build of jaxfp8 holds no kernels"
)


@needs_kernels
def test_a_train_step_reads_and_writes_the_activation_once():
    (x, dy), (w_up, w_down) = tokens(64, 256, 72), weights(256, 128, 72, True)

    def train(x, w_up, w_down, dy):
        y, pull = jax.vjp(jaxfp8.mlp, x, w_up, w_down)
        return y, *pull(dy)

    assert calls(jaxfp8.mlp, x, w_up, w_down) == sorted(
        ["quantize_rows", *["quantize_weight"] * 2, *["gemm_1d2d"] * 2, "activation_rows"]
    )
    assert calls(train, x, w_up, w_down, dy) == sorted(
        [*["quantize_both", "quantize_weight"] * 2, *["gemm_1d2d"] * 4, *["gemm_1d1d"] * 2]
        + ["activation_both", "activation_grad_both"]
    )


@needs_kernels
@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("groups", [None, [0, 1, 127, 2]], ids=["dense", "ragged"])
def test_emulated_kernels_train_as_the_portable_lowering(gated, groups):
    (x, dy) = tokens(131, 48, 40)
    w_up, w_down = weights(48, 136, 40, gated, (len(groups),) if groups else ())
    if groups:
        sizes = jnp.array(groups)
        f = lambda *arrays: jaxfp8.ragged_mlp(*arrays, sizes)  # noqa: E731
    else:
        f = jaxfp8.mlp
    want = run(f, x, w_up, w_down, dy)
    results = []
    with emulated_platform(num_sms=2) as driver:
        for driver.seed in (0, 1):
            results.append(run(f, x, w_up, w_down, dy))
    for a, b, c in zip(results[0], want, results[1], strict=True):
        np.testing.assert_array_equal(a, c)
        oracle.assert_close(a, b, FLIPS)


@needs_kernels
@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("grad_dtype", [oq.E4M3, oq.E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scale_format", ["float32", "pow2"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", oracle_activation.ACTIVATIONS)
@pytest.mark.parametrize("sizes", [None, [5, 0, 30, 1]], ids=["dense", "ragged"])
def test_emulated_kernels_equal_float64_in_every_mode(
    sizes, activation, gated, scale_format, grad_dtype
):
    x, dy = tokens(40, 48, 40)
    w_up, w_down = weights(48, 72, 40, gated, (len(sizes),) if sizes else ())
    recipe = jaxfp8.Recipe(scale_format=scale_format, grad_dtype=grad_dtype)
    pow2 = scale_format == "pow2"
    formats = og.Formats((oq.E4M3, pow2), (grad_dtype, pow2))
    options = {"activation": activation, "recipe": recipe}
    if sizes:
        f = lambda *arrays, **kw: jaxfp8.ragged_mlp(*arrays, jnp.array(sizes), **kw)  # noqa: E731
        want = ragged_reference(x, w_up, w_down, dy, sizes, activation, formats)
    else:
        f, want = jaxfp8.mlp, reference(x, w_up, w_down, dy, activation, formats)
    results = []
    with emulated_platform(num_sms=2) as driver:
        for driver.seed in (0, 1, 2):
            results.append(run(f, x, w_up, w_down, dy, **options))
    for i, b in enumerate(want):
        oracle.assert_close(results[0][i], b, FLIPS)
        for other in results[1:]:
            np.testing.assert_array_equal(results[0][i], other[i])
