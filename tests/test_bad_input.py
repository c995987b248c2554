"""Bad input raises TypeError or ValueError that names the argument, what it was and what is allowed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import QuantizedArray


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def rows(*shape, dtype=None):
    return jaxfp8.quantize(zeros(*shape), dtype=dtype)


def square(*shape):
    return jaxfp8.quantize(zeros(*shape), block=(128, 128))


X, W = zeros(4, 256), zeros(256, 130)
LHS, RHS = rows(4, 256), square(130, 256)
EXPERTS, SIZES = square(3, 130, 256), jnp.array([1, 2, 1])
COLUMNS = jaxfp8.quantize_both(zeros(4, 8), group_sizes=SIZES)[1]
MATRIX = (((1,), (0,)), ((), ()))


def broken(q, **changes):
    return dataclasses.replace(q, **changes)


# (call, error, words of the message)
CASES = {
    # quantize
    "quantize list": (lambda: jaxfp8.quantize([1.0]), TypeError, "x is a list"),
    "quantize None": (lambda: jaxfp8.quantize(None), TypeError, "x is a NoneType"),
    "quantize int": (lambda: jaxfp8.quantize(zeros(4, 4, dtype=int)), TypeError, "x has dtype int32; allowed: float32, bfloat16, float16"),
    "quantize fp8": (lambda: jaxfp8.quantize(LHS.data), TypeError, "x has dtype float8_e4m3fn"),
    "quantize quantized": (lambda: jaxfp8.quantize(LHS), TypeError, "x is a QuantizedArray"),
    "quantize scalar": (lambda: jaxfp8.quantize(np.float32(1)), ValueError, r"x has shape \(\); allowed: \(..., K\)"),
    "quantize vector in squares": (lambda: jaxfp8.quantize(zeros(4), (128, 128)), ValueError, r"x has shape \(4,\); allowed: \(..., M, K\)"),
    "quantize block": (lambda: jaxfp8.quantize(X, (128, 1)), ValueError, r"block is \(128, 1\); allowed: \(1, 128\), \(128, 128\)"),
    "quantize block int": (lambda: jaxfp8.quantize(X, 128), ValueError, "block is 128"),
    "quantize dtype": (lambda: jaxfp8.quantize(X, dtype=jnp.int8), TypeError, "dtype is .*int8.*; allowed: float8_e4m3fn, float8_e5m2"),
    "quantize dtype fnuz": (lambda: jaxfp8.quantize(X, dtype=jnp.float8_e4m3fnuz), TypeError, "dtype is .*e4m3fnuz"),
    "quantize dtype nonsense": (lambda: jaxfp8.quantize(X, dtype="fp8"), TypeError, "dtype is 'fp8'"),
    "quantize dtype class": (lambda: jaxfp8.quantize(np.float32), TypeError, "quantize: x is a type; allowed: an array"),
    "quantize dtype list": (lambda: jaxfp8.quantize(X, dtype="ab,bc->ac"), TypeError, "dtype is 'ab,bc->ac'"),
    "quantize dtype array": (lambda: jaxfp8.quantize(X, dtype=zeros(2)), TypeError, "quantize: dtype is array"),
    "quantize scale_format array": (lambda: jaxfp8.quantize(X, scale_format=zeros(2)), ValueError, "quantize: scale_format is array"),
    "quantize recipe broken": (lambda: jaxfp8.quantize(X, recipe=broken(LHS, block=128)), TypeError, "block=128"),
    "dequantize dtype list": (lambda: jaxfp8.dequantize(LHS, ":,"), TypeError, "dequantize: dtype is ':,'"),
    "group sizes class": (lambda: jaxfp8.grouped_gemm(LHS, EXPERTS, np.int32), TypeError, "group_sizes is a type"),
    "quantize scale_format": (lambda: jaxfp8.quantize(X, scale_format="e8m0"), ValueError, "scale_format is 'e8m0'; allowed: 'float32', 'pow2'"),
    "quantize recipe": (lambda: jaxfp8.quantize(X, recipe="deepseek"), TypeError, "recipe is 'deepseek'"),
    "quantize_both vector": (lambda: jaxfp8.quantize_both(zeros(4)), ValueError, "x has shape"),
    "quantize_both ragged rank": (lambda: jaxfp8.quantize_both(zeros(2, 4, 8), group_sizes=SIZES), ValueError, r"x has shape \(2, 4, 8\); allowed: \(M, K\)"),
    "quantize_both sizes float": (lambda: jaxfp8.quantize_both(X, group_sizes=zeros(3)), TypeError, "group_sizes has dtype float32"),
    "quantize_both sizes none": (lambda: jaxfp8.quantize_both(X, group_sizes=zeros(0, dtype=int)), ValueError, "group_sizes has no entries"),
    "quantize_weight vector": (lambda: jaxfp8.quantize_weight(zeros(4)), ValueError, r"w has shape \(4,\); allowed: \(..., K, N\)"),
    "quantize_weight dtype": (lambda: jaxfp8.quantize_weight(zeros(4, 4, dtype=np.int8)), TypeError, "w has dtype int8"),
    "dequantize array": (lambda: jaxfp8.dequantize(X), TypeError, "q is a ndarray; allowed: a QuantizedArray"),
    "dequantize dtype": (lambda: LHS.dequantize(jnp.int32), TypeError, "dtype is int32"),
    "dequantize scale": (lambda: broken(LHS, scale=LHS.scale[:2]).dequantize(), ValueError, r"q.scale has shape \(2, 2\); allowed: \(4, 2\)"),
    # recipe
    "recipe dtype": (lambda: jaxfp8.Recipe(dtype=jnp.bfloat16), TypeError, "Recipe: dtype"),
    "recipe grad_dtype": (lambda: jaxfp8.Recipe(grad_dtype="float16"), TypeError, "Recipe: grad_dtype"),
    "recipe scale_format": (lambda: jaxfp8.Recipe(scale_format="mx"), ValueError, "Recipe: scale_format is 'mx'"),
    "recipe grad_scale_format": (lambda: jaxfp8.Recipe(grad_scale_format=2), ValueError, "Recipe: grad_scale_format is 2"),
    "recipe num_sms": (lambda: jaxfp8.Recipe(num_sms=0), ValueError, "num_sms is 0; allowed: a positive int"),
    "recipe num_sms type": (lambda: jaxfp8.Recipe(num_sms=1.5), TypeError, "num_sms is 1.5"),
    # gemm
    "gemm array": (lambda: jaxfp8.gemm(X, RHS), TypeError, "lhs is a ndarray; allowed: a QuantizedArray"),
    "gemm K": (lambda: jaxfp8.gemm(rows(4, 512), RHS), ValueError, "rhs has K=256 but lhs has K=512; they must match"),
    "gemm lhs block": (lambda: jaxfp8.gemm(square(4, 256), RHS), ValueError, "lhs has blocks of 128x128; allowed: 1x128"),
    "gemm block": (lambda: jaxfp8.gemm(LHS, broken(RHS, block=(64, 128))), ValueError, "rhs has blocks of 64x128; allowed: 1x128 or 128x128"),
    "gemm block type": (lambda: jaxfp8.gemm(LHS, broken(RHS, block=128)), ValueError, "rhs has blocks of 128;"),
    "gemm scale shape": (lambda: jaxfp8.gemm(LHS, broken(RHS, scale=zeros(130, 2))), ValueError, r"rhs.scale has shape \(130, 2\); allowed: \(2, 2\)"),
    "gemm scale dtype": (lambda: jaxfp8.gemm(LHS, broken(RHS, scale=zeros(2, 2, dtype=np.float16))), TypeError, "rhs.scale has dtype float16; allowed: float32"),
    "gemm data dtype": (lambda: jaxfp8.gemm(broken(LHS, data=X), RHS), TypeError, "lhs.data has dtype float32; allowed: float8_e4m3fn, float8_e5m2"),
    "gemm rank": (lambda: jaxfp8.gemm(rows(256), RHS), ValueError, "lhs.data has shape"),
    "gemm rhs rank": (lambda: jaxfp8.gemm(rows(2, 2, 4, 256), square(2, 2, 130, 256)), ValueError, r"rhs has shape .*; allowed: \(N, K\) or \(G, N, K\)"),
    "gemm lhs without groups": (lambda: jaxfp8.gemm(LHS, EXPERTS), ValueError, r"lhs has shape \(4, 256\); allowed: \(G, M, K\)"),
    "gemm groups": (lambda: jaxfp8.gemm(rows(2, 4, 256), EXPERTS), ValueError, "rhs has G=3 but lhs has G=2"),
    "gemm out_dtype": (lambda: jaxfp8.gemm(LHS, RHS, out_dtype=jnp.float16), TypeError, "out_dtype is float16; allowed: bfloat16, float32"),
    "gemm accum shape": (lambda: jaxfp8.gemm(LHS, RHS, accum=zeros(4, 131)), ValueError, r"accum has shape \(4, 131\); allowed: \(4, 130\)"),
    "gemm accum dtype": (lambda: jaxfp8.gemm(LHS, RHS, accum=zeros(4, 130), out_dtype=jnp.bfloat16), TypeError, "accum has dtype float32; allowed: bfloat16"),
    "gemm num_sms": (lambda: jaxfp8.gemm(LHS, RHS, num_sms=-1), ValueError, "num_sms is -1"),
    "wgrad block": (lambda: jaxfp8.wgrad_gemm(LHS, RHS), ValueError, "rhs has blocks of 128x128; allowed: 1x128"),
    "wgrad T": (lambda: jaxfp8.wgrad_gemm(LHS, rows(5, 300)), ValueError, "rhs has T=300 but lhs has T=256"),
    # grouped
    "grouped sizes float": (lambda: jaxfp8.grouped_gemm(LHS, EXPERTS, zeros(3)), TypeError, "group_sizes has dtype float32; allowed: integers"),
    "grouped sizes list": (lambda: jaxfp8.grouped_gemm(LHS, EXPERTS, [1, 2, 1]), TypeError, "group_sizes is a list"),
    "grouped sizes rank": (lambda: jaxfp8.grouped_gemm(LHS, EXPERTS, SIZES[None]), ValueError, r"group_sizes has shape \(1, 3\); allowed: \(G,\)"),
    "grouped sizes count": (lambda: jaxfp8.grouped_gemm(LHS, EXPERTS, SIZES[:2]), ValueError, "group_sizes has 2 entries but rhs has 3 groups"),
    "grouped rhs rank": (lambda: jaxfp8.grouped_gemm(LHS, RHS, SIZES), ValueError, "rhs.data has shape"),
    "grouped rhs block": (lambda: jaxfp8.grouped_gemm(LHS, rows(3, 130, 256), SIZES), ValueError, "rhs has blocks of 1x128; allowed: 128x128"),
    "masked lhs rank": (lambda: jaxfp8.masked_grouped_gemm(LHS, EXPERTS, SIZES), ValueError, "lhs.data has shape"),
    "masked name": (lambda: jaxfp8.masked_grouped_gemm(rows(3, 4, 256), EXPERTS, zeros(3)), TypeError, "masked_m has dtype float32"),
    "grouped wgrad T": (lambda: jaxfp8.grouped_wgrad_gemm(LHS, rows(5, 200), SIZES), ValueError, "rhs has T=200 but lhs has T=256"),
    "grouped wgrad padding": (lambda: jaxfp8.grouped_wgrad_gemm(LHS, rows(5, 256), SIZES), ValueError, r"lhs has T=256; allowed: 128 \* \(ceil"),
    "grouped wgrad accum": (lambda: jaxfp8.grouped_wgrad_gemm(COLUMNS, COLUMNS, SIZES, accum=zeros(3, 8, 9)), ValueError, r"accum has shape \(3, 8, 9\); allowed: \(3, 8, 8\)"),
    # differentiable operations
    "linear K": (lambda: jaxfp8.linear(X, zeros(255, 130)), ValueError, "w has K=255 but x has K=256"),
    "linear w rank": (lambda: jaxfp8.linear(X, zeros(2, 256, 130)), ValueError, r"w has shape \(2, 256, 130\); allowed: \(K, N\)"),
    "linear x scalar": (lambda: jaxfp8.linear(np.float32(1), W), ValueError, r"x has shape \(\)"),
    "linear x int": (lambda: jaxfp8.linear(zeros(4, 256, dtype=int), W), TypeError, "x has dtype int32"),
    "linear b": (lambda: jaxfp8.linear(X, W, zeros(131)), ValueError, "b has N=131 but w has N=130"),
    "linear b rank": (lambda: jaxfp8.linear(X, W, zeros(1, 130)), ValueError, r"b has shape \(1, 130\); allowed: \(N,\)"),
    "linear preferred": (lambda: jaxfp8.linear(X, W, preferred_element_type=jnp.int32), TypeError, "preferred_element_type is int32"),
    "linear recipe": (lambda: jaxfp8.linear(X, W, recipe={}), TypeError, "recipe is {}"),
    "linear out_sharding": (lambda: jaxfp8.linear(X, W, out_sharding="data"), TypeError, "out_sharding is 'data'"),
    "linear out_sharding rank": (lambda: jaxfp8.linear(X, W, out_sharding=jax.P(None, None, "x")), ValueError, "out_sharding .* names 3 dimensions; the result has 2"),
    "dot_general axis": (lambda: jaxfp8.dot_general(X, W, (((2,), (0,)), ((), ()))), ValueError, "lhs_contracting has axis 2; allowed: 0 to 1"),
    "dot_general negative axis": (lambda: jaxfp8.dot_general(X, W, (((-1,), (0,)), ((), ()))), ValueError, "lhs_contracting has axis -1"),
    "dot_general sizes": (lambda: jaxfp8.dot_general(X, W, (((0,), (0,)), ((), ()))), ValueError, r"contracting axes of lhs have sizes \(4,\) but those of rhs \(256,\)"),
    "dot_general none": (lambda: jaxfp8.dot_general(X, W, (((), ()), ((), ()))), ValueError, "contract no axis"),
    "dot_general both": (lambda: jaxfp8.dot_general(X, W, (((1,), (0,)), ((1,), (0,)))), ValueError, "contracting and batch axes at once"),
    "dot_general twice": (lambda: jaxfp8.dot_general(X, X, (((1, 1), (1, 1)), ((), ()))), ValueError, "each axis may occur once"),
    "dot_general numbers": (lambda: jaxfp8.dot_general(X, W, ((1,), (0,))), TypeError, "dimension_numbers is"),
    "dot_general float axis": (lambda: jaxfp8.dot_general(X, W, (((1.0,), (0,)), ((), ()))), TypeError, "lhs_contracting is"),
    "dot_general precision": (lambda: jaxfp8.dot_general(X, W, MATRIX, "highest"), ValueError, "precision is 'highest'; allowed: None or DEFAULT"),
    "dot_general precision nonsense": (lambda: jaxfp8.dot_general(X, W, MATRIX, "best"), ValueError, "precision is 'best'"),
    "einsum outer": (lambda: jaxfp8.einsum("ab,cd->abcd", X, W), ValueError, "contract no label"),
    "einsum three": (lambda: jaxfp8.einsum("ab,bc,cd->ad", X, W), ValueError, "has 3 operands; allowed: two"),
    "einsum rank": (lambda: jaxfp8.einsum("abc,bc->ac", X, W), ValueError, "gives lhs the term 'abc'"),
    "einsum sizes": (lambda: jaxfp8.einsum("ab,cb->ac", X, W), ValueError, "rhs has 130 along 'b', the other operand 256"),
    "einsum output": (lambda: jaxfp8.einsum("ab,bc->ad", X, W), ValueError, r"the output has \['d'\]"),
    "einsum repeated output": (lambda: jaxfp8.einsum("ab,bc->aac", X, W), ValueError, "output repeats a label"),
    "einsum letters": (lambda: jaxfp8.einsum("a1,1c->ac", X, W), ValueError, "the term 'a1'; allowed: letters"),
    "einsum type": (lambda: jaxfp8.einsum(X, X, W), TypeError, "subscripts is a ndarray"),
    "ragged_dot rank": (lambda: jaxfp8.ragged_dot(X, W, SIZES), ValueError, r"rhs has shape \(256, 130\); allowed: \(G, K, N\)"),
    "ragged_dot sizes float": (lambda: jaxfp8.ragged_dot(X, zeros(3, 256, 8), zeros(3)), TypeError, "group_sizes has dtype float32"),
    "ragged_dot sizes count": (lambda: jaxfp8.ragged_dot(X, zeros(4, 256, 8), SIZES), ValueError, "group_sizes has 3 entries but rhs has 4 groups"),
    "ragged_dot K": (lambda: jaxfp8.ragged_dot(X, zeros(3, 255, 8), SIZES), ValueError, "rhs has K=255 but lhs has K=256"),
    "ragged_dot offset": (lambda: jaxfp8.ragged_dot(X, zeros(3, 256, 8), SIZES, group_offset=SIZES[:1]), NotImplementedError, "group_offset"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_by_name(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_bad_input_is_refused_while_tracing():
    with pytest.raises(ValueError, match="w has K=255 but x has K=256"):
        jax.jit(jaxfp8.linear).trace(X, zeros(255, 130))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
def test_group_sizes_may_be_any_integer(dtype):
    lhs, rhs = zeros(300, 128), zeros(2, 128, 8)
    got = jaxfp8.ragged_dot(lhs + 1, rhs + 1, jnp.asarray([100, 150], dtype))
    assert (np.asarray(got[:250]) > 0).all() and not np.asarray(got[250:]).any()


def test_a_quantized_array_of_anything_can_be_built():
    """A pytree holds whatever JAX puts into it; operations check what they are given."""
    assert QuantizedArray(None, None).block == (1, 128)
