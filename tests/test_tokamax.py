"""tokamax's own ragged_dot, and tokamax's own tests of it, with our implementation."""

import functools
import unittest.mock

import absl.flags
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tokamax
from tokamax._src import quantization
from tokamax._src.ops.ragged_dot import base, test_base

import jaxfp8
from tests import oracle, programs
from tests.frameworks import FP8, compare, normal

absl.flags.FLAGS.mark_as_parsed()  # tokamax would read pytest's command line as its own

OP = jaxfp8.tokamax.RaggedDot()
POW2 = jaxfp8.Recipe(scale_format="pow2")
E4M3 = jnp.float8_e4m3fn
SIZES = jnp.array([40, 0, 57, 3])


def ours(*args, **kwargs):
    return tokamax.ragged_dot(*args, implementation=kwargs.pop("op", OP), **kwargs)


def operands(dtype=jnp.bfloat16):
    return normal(0, 120, 136, dtype=dtype), normal(1, 4, 136, 72, dtype=dtype)


@pytest.mark.parametrize("activation", [None, jax.nn.tanh], ids=["plain", "tanh"])
def test_ragged_dot(activation):
    x, w = operands()

    def apply(implementation, w, x):
        return tokamax.ragged_dot(x, w, SIZES, activation=activation, implementation=implementation)

    # tanh of inputs far from zero is flat: what is left of the gradient is sensitive.
    tolerance = FP8 if activation is None else 0.2
    w = w * 0.1
    fp8, xla = (functools.partial(apply, i) for i in (OP, "xla"))
    y, _ = compare(fp8, xla, w, x, ours=1, tolerance=tolerance)
    if activation is None:
        programs.assert_same_bits(y, jaxfp8.ragged_dot(x, w, SIZES))


def test_the_activation_acts_in_float32_and_the_result_is_rounded_once():
    x, w = operands()
    y = ours(x, w, SIZES, activation=jnp.exp2, preferred_element_type=jnp.bfloat16)
    exact = jaxfp8.ragged_dot(x, w, SIZES, preferred_element_type=jnp.float32)
    programs.assert_same_bits(y, jnp.exp2(exact).astype(jnp.bfloat16))


def test_recipes():
    x, w = operands()
    want = jaxfp8.ragged_dot(x, w, SIZES, recipe=POW2)
    programs.assert_same_bits(ours(x, w, SIZES, op=jaxfp8.tokamax.RaggedDot(POW2)), want)
    with POW2:
        programs.assert_same_bits(ours(x, w, SIZES), want)
    assert jaxfp8.tokamax.RaggedDot(POW2) == jaxfp8.tokamax.RaggedDot(
        jaxfp8.Recipe(scale_format="pow2")
    )


def test_the_input_gradients_dimension_numbers():
    x, w = operands()
    y = tokamax.ragged_dot_general(
        x, w.mT, SIZES, base.TRANS_RHS_RAGGED_DOT_DIM_NUMS, implementation=OP
    )
    programs.assert_same_bits(y, jaxfp8.ragged_dot(x, w, SIZES))


def test_the_weight_gradients_dimension_numbers():
    x, dy = normal(0, 120, 136), normal(2, 120, 72)

    def apply(dy, x):
        return tokamax.ragged_dot_general(
            x,
            dy,
            SIZES,
            base.RAGGED_CONTRACTING_DOT_DIM_NUMS,
            preferred_element_type=jnp.float32,
            implementation=OP,
        )

    def reference(dy, x):  # JAX has no gradient of its own for this mode
        ends = np.cumsum(np.asarray(SIZES)).tolist()
        groups = [slice(a, b) for a, b in zip([0, *ends], ends)]  # noqa: B905 (one start too many)
        return jnp.stack([(x[g].T @ dy[g]).astype(jnp.float32) for g in groups])

    got, _ = compare(apply, reference, dy, x, ours=1)
    w = jnp.zeros((4, 136, 72))
    (want,) = jax.vjp(lambda w: jaxfp8.ragged_dot(x, w, SIZES), w)[1](dy.astype(jnp.float32))
    programs.assert_same_bits(got, want)


@pytest.mark.parametrize("wrapped", [False, True], ids=["QArray", "AsQArray"])
@pytest.mark.parametrize("which", ["lhs", "rhs", "both"])
def test_operands_that_are_fp8_already_are_used_as_they_are(which, wrapped):
    x, w = normal(0, 120, 256), normal(1, 4, 256, 128)
    make = quantization.AsQArray if wrapped else qwix.quantize
    # qwix quantizes to its own rounding of scales: what counts is that its data is used.
    q_x = make(x, E4M3, tiled_axes={0: 1, 1: 128})
    q_w = make(w, E4M3, tiled_axes={0: 1, 1: 128, 2: 128})
    lhs, rhs = q_x if which != "rhs" else x, q_w if which != "lhs" else w
    got = ours(lhs, rhs, SIZES, preferred_element_type=jnp.float32)

    def value(q, plain, block):
        if q is plain:
            return np.asarray(jaxfp8.quantize(plain, block).dequantize(), np.float64)
        return np.asarray(quantization.as_array(q), np.float64)

    # A scale in bfloat16 makes qwix dequantize in bfloat16, which rounds.
    tolerance = 4e-3
    want, at = np.zeros((120, 128)), 0
    for matrix, size in zip(value(rhs, w, (128, 128)), SIZES, strict=True):
        want[at : at + size] = value(lhs, x, (1, 128))[at : at + size] @ matrix
        at += int(size)
    oracle.assert_close(got, want, tolerance)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(precision=jax.lax.Precision.HIGHEST), "precision is"),
        (dict(precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32), "precision is"),
        (dict(lhs=dict(qtype="int8", tiled_axes={0: 1, 1: 128})), "lhs is a QArray of int8"),
        (dict(lhs=dict(qtype=E4M3, tiled_axes={0: 1, 1: 32})), "lhs: .* tiles of 32 along axis 1"),
        (
            dict(rhs=dict(qtype=E4M3, tiled_axes={0: 1, 1: 128, 2: 1})),
            "rhs: .* tiles of 1 along axis",
        ),
    ],
)
def test_what_is_not_ours_goes_to_the_next_implementation(change, message):
    args = dict(lhs=normal(0, 120, 256), rhs=normal(1, 4, 256, 128), precision=None)
    for name, value in change.items():
        args[name] = qwix.quantize(args[name], **value) if isinstance(value, dict) else value
    with pytest.raises(NotImplementedError, match=message):
        ours(**args, group_sizes=SIZES)
    if args["precision"] is None:
        y = tokamax.ragged_dot(**args, group_sizes=SIZES, implementation=(OP, "xla"))
        programs.assert_same_bits(
            y, tokamax.ragged_dot(**args, group_sizes=SIZES, implementation="xla")
        )


def test_other_dimensions_are_not_implemented():
    numbers = jax.lax.RaggedDotDimensionNumbers((([2], [1]), ([0], [0])), [1], [])
    with pytest.raises(NotImplementedError, match="ragged_dot_dimension_numbers"):
        tokamax.ragged_dot_general(
            normal(0, 2, 8, 8), normal(1, 2, 8, 8), SIZES, numbers, implementation=OP
        )


# --------------------------------------------------------------------------------------------------
# tokamax's tests
# --------------------------------------------------------------------------------------------------


def without_precision(*args, precision=None, **kwargs):
    """tokamax's tests ask for HIGHEST or BF16_BF16_F32, to compare in float32; FP8 has no such thing."""
    return ours(*args, **kwargs)


@pytest.mark.slow
class TestOfTokamax(test_base.RaggedDotTestBase):
    """Its cases on our implementation, compared norm-wise within FP8 tolerance instead of to float32 rounding.

    Not in our scope: `test_quantized` (int8 and int4 operands; FP8 ones are in the tests above),
    `test_invalid_group_sizes` (a checkify option of tokamax's own class: our sizes are clipped), `test_bench` (sizes
    for accelerators).
    """

    tolerance = FP8

    def __init__(self, *args):
        super().__init__(*args, dot_fn=without_precision)

    def setUp(self):
        super().setUp()

        def near(got, want, **_):
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                error = oracle.error(a, b)
                assert error <= self.tolerance, error

        self.enter_context(unittest.mock.patch.object(chex, "assert_trees_all_close", near))

    def _test_vjp(self, num_groups, m, k, n, activation=None):
        if (
            activation is test_base.relu
        ):  # where its input changes sign, the gradient is another one
            self.tolerance = 0.25
        super()._test_vjp(num_groups, m, k, n, activation)

    def _test_quantized(self, a_dtype, *args, **kwargs):
        with pytest.raises(NotImplementedError, match=f"QArray of {a_dtype}"):
            super()._test_quantized(a_dtype, *args, **kwargs)
        self.skipTest(f"{a_dtype} operands are not in our scope")

    def _test_bench(self, spec):
        self.skipTest("sizes for accelerators")
