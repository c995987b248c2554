"""Rows gathered into FP8, summed and weighted, as JAX operations: against NumPy, to the bit where no order is free."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp8._arrays.recipe import Format
from jaxfp8.kernels import activation as act
from jaxfp8.kernels import gather, named
from jaxfp8.kernels.sum_rows import sum_rows
from tests import oracle, oracle_activation, oracle_moe
from tests import oracle_quantize as oq

BF16 = ml_dtypes.bfloat16
S, M, K, G = 37, 90, 200, 3
SIZES = np.array([40, 0, 33], np.int32)
FORMATS = [Format(np.dtype(d), p) for d in (oq.E4M3, oq.E5M2) for p in (False, True)]


def values(seed, *shape, dtype=np.float32):
    r = np.random.default_rng(seed)
    return (r.standard_normal(shape) * np.exp(r.standard_normal((*shape[:-1], 1)))).astype(dtype)


def sources(seed=0, m=M, s=S):
    """Rows in any order, some of them twice, some none."""
    return np.random.default_rng(seed).integers(-3, s + 3, m).astype(np.int32)


SOURCE = sources()


def arrays(*named):
    return [a for n in named for a in (n.array.data, n.array.scale)]


def gathered(x, source, sizes, fmt, kind="both"):
    x_dims, ends = ("s", "k"), (source, ("m",), sizes, ("g",))
    if kind == "rows":
        return arrays(gather.rows(x, x_dims, source, ("m",), fmt))
    return arrays(*gather.rows_and_columns(x, x_dims, *ends, fmt))


def gathered_fp8(data, scale, source, sizes, pow2, kind="both"):
    q, ends = named.named(data, scale, ("s", "k")), (source, ("m",), sizes, ("g",))
    if kind == "rows":
        return arrays(gather.fp8_rows(q, source, ("m",)))
    return arrays(*gather.fp8_rows_and_columns(q, *ends, pow2))


def assert_same_bits(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype, i
        np.testing.assert_array_equal(a.view(f"u{a.itemsize}"), b.view(f"u{b.itemsize}"), str(i))


@pytest.mark.parametrize("kind", ["rows", "both"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_gathered_rows_are_quantized_as_a_copy_of_them_would_be(kind, fmt, dtype):
    x = values(1, S, K, dtype=dtype)
    x[5, 7], x[6, 150] = np.nan, np.inf
    run = jax.jit(functools.partial(gathered, fmt=fmt, kind=kind))
    want = oracle_moe.quantized(kind, x, SOURCE, SIZES, fmt.dtype, fmt.pow2)
    assert_same_bits(run(x, SOURCE, SIZES), want)


@pytest.mark.parametrize("kind", ["rows", "both"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("k", [K, 130])
def test_fp8_rows_keep_their_bytes_and_columns_are_quantized_from_their_values(kind, fmt, k):
    x = values(2, S, k)
    x[5, 7] = np.nan
    q = oq.quantize_blocks(x, dtype=fmt.dtype, pow2=fmt.pow2)
    run = jax.jit(functools.partial(gathered_fp8, pow2=fmt.pow2, kind=kind))
    assert_same_bits(run(*q, SOURCE, SIZES), oracle_moe.moved(kind, *q, SOURCE, SIZES, fmt.pow2))


@pytest.mark.parametrize("dtype, kept", [(oq.E4M3, 2.0**-13), (oq.E5M2, 2.0**-28)])
def test_columns_of_rows_with_power_of_two_scales_keep_every_bit(dtype, kept):
    """Of values that are not tiny beside their block's largest; tiny ones are rounded once, to its subnormals."""
    x = values(3, S, 256) * np.exp2(np.arange(S) % 7 * 3.0)[:, None].astype(np.float32)
    x[:, ::5] *= 2.0**-12 if dtype == oq.E4M3 else 2.0**-26
    data, scale = oq.quantize_blocks(x, dtype=dtype, pow2=True)
    source, sizes = np.arange(S, dtype=np.int32), np.array([S], np.int32)
    columns = gathered_fp8(data, scale, source, sizes, True)[2:]
    rows = oq.dequantize(data, scale).T
    got = oq.dequantize(*map(np.asarray, columns))[:, :S]
    large = np.abs(rows) >= kept * np.abs(rows).max(1, keepdims=True)
    assert 0.5 < large.mean() < 1
    np.testing.assert_array_equal(got[large], rows[large])
    smallest = np.asarray(columns[1])[:, :1] * float(ml_dtypes.finfo(dtype).smallest_subnormal)
    assert (np.abs(got - rows) <= smallest / 2).all()


@pytest.mark.parametrize("dtype, unit", [(oq.E4M3, 2.0**-4), (oq.E5M2, 2.0**-3)])
def test_columns_of_rows_with_float32_scales_lose_what_is_stated(dtype, unit):
    x = values(4, 128, 512)
    source, sizes = np.arange(128, dtype=np.int32), np.array([128], np.int32)
    q = oq.quantize_blocks(x, dtype=dtype)
    twice = oq.dequantize(*map(np.asarray, gathered_fp8(*q, source, sizes, False)[2:]))
    once = oq.dequantize(*oq.quantize_columns(x, dtype))
    twice, once = twice[:, :128] - x.T, once - x.T
    normal = np.abs(x.T) > 2.0**-5 * np.abs(x.T).max(1, keepdims=True)
    assert (np.abs(twice) <= (2.02 * unit + unit**2) * np.abs(x.T))[normal].all()
    ratio = np.sqrt((twice[normal] ** 2).mean() / (once[normal] ** 2).mean())
    assert 1.2 < ratio < 1.6


def test_a_group_past_the_rows_and_no_rows_at_all():
    x = values(5, S, K)
    for source, sizes in ((SOURCE, [200, 7]), (SOURCE, [-4, 50]), (SOURCE[:0], [3, 4])):
        sizes = np.array(sizes, np.int32)
        want = oracle_moe.quantized("both", x, source, sizes)
        assert_same_bits(gathered(x, source, sizes, FORMATS[0]), want)
    nothing = gathered(x[:0], SOURCE, SIZES, FORMATS[0])
    assert not any(np.asarray(v.astype(jnp.float32)).any() for v in nothing[::2])


def positions(seed, tokens=S, rows=M, choices=4):
    r = np.random.default_rng(seed)
    position = r.permutation(tokens * choices).reshape(tokens, choices).astype(np.int32)
    return np.where(position < rows, position, -1)


@pytest.mark.parametrize("out", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_of_rows_is_in_order_and_rounded_once(dtype, out, weighted):
    rows, position = values(6, M, K, dtype=dtype), positions(7)
    position[3] = -1
    position[4, 2] = M  # found no place
    weight = values(8, *position.shape) if weighted else None

    def run(rows, position, weight):
        return sum_rows(rows, ("m", "k"), position, ("s", "j"), jnp.dtype(out), weight)

    got = np.asarray(jax.jit(run)(rows, position, weight))
    assert got.dtype == out
    assert np.isnan(got[4].astype(np.float32)).all() and not got[3].any()
    if weighted:
        want = oracle_moe.sum_rows(rows, position, weight)
        keep = np.arange(S) != 4
        tolerance = 1e-6 if out == np.float32 else float(ml_dtypes.finfo(out).eps)
        oracle.assert_close(got[keep], want[keep], tolerance)
    else:
        want = oracle_moe.sum_rows_in_order(rows, position).astype(out)
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("activation", act.ACTIVATIONS)
def test_a_weighted_activation_and_its_gradients_equal_float64(halves, activation):
    """On saturated gates every value is known: results are exact, but for the order of a sum."""
    x = oracle_activation.saturated(9, (M, halves, K), BF16)
    dy = oracle_activation.cotangents(9, (M, K), BF16)
    weight = np.exp2(np.random.default_rng(10).integers(-6, 2, M)).astype(np.float32)
    dims = ("m", act.TWO, "f") if halves == 2 else ("m", "f")
    weights, groups, fmt = (weight, ("m",)), (SIZES, ("g",)), FORMATS[0]
    given = x if halves == 2 else x[:, 0]

    y = oracle_activation.activate(x, activation)
    want = oracle_activation.outputs(
        "ragged_both", (y * weight[:, None]).astype(np.float32), group_sizes=SIZES
    )
    want[1] = want[1].T
    want[3] = want[3].T
    run = jax.jit(
        lambda x: arrays(
            *act.ragged_weighted_activation(x, dims, *weights, *groups, fmt, activation)
        )
    )
    assert_same_bits(run(given), want)
    run = jax.jit(
        lambda x: arrays(act.weighted_activation_rows(x, dims, *weights, fmt, activation))
    )
    assert_same_bits(run(given), want[:2])

    @jax.jit
    def gradients(x, dy):
        *named, dweight = act.ragged_weighted_activation_grad(
            x, dims, dy, ("m", "f"), *weights, *groups, fmt, activation
        )
        return arrays(*named), dweight

    got, dweight = gradients(given, dy)
    scaled = dy.astype(np.float64) * weight[:, None]
    dx = oracle_activation.gradient(x, scaled, activation)
    want = oracle_activation.outputs("ragged_grad_both", dx, group_sizes=SIZES)
    kb = oq.cdiv(K, oq.BLOCK)
    want[1] = np.moveaxis(want[1], -1, 0)
    want[3] = np.moveaxis(want[3].reshape(-1, halves, K), 0, -1)
    want[2] = want[2].reshape(halves, K, -1)
    if halves == 1:
        want = [np.squeeze(v, a) for v, a in zip(want, (1, 1, 0, 0), strict=True)]
    assert want[1].shape[-1] == kb
    assert_same_bits(got, want)
    terms = dy.astype(np.float64) * y
    assert (np.abs(dweight - terms.sum(1)) <= 1e-6 * np.abs(terms).sum(1)).all()


def test_vmap_is_a_loop_over_examples():
    x, source = values(11, 3, S, K), np.stack([sources(i) for i in range(3)])
    sizes = np.stack([SIZES, SIZES[::-1], [90, 1, 0]]).astype(np.int32)
    fmt = FORMATS[0]
    got = jax.jit(jax.vmap(lambda *a: gathered(*a, fmt)))(x, source, sizes)
    shared = jax.jit(jax.vmap(lambda s: gathered(x[0], s, SIZES, fmt)))(source)
    summed = jax.vmap(
        lambda r: sum_rows(r, ("m", "k"), positions(1, S, S), ("s", "j"), jnp.float32)
    )(x)
    for i in range(3):
        want = gathered(x[i], source[i], sizes[i], fmt)
        assert_same_bits([v[i] for v in got], want)
        assert_same_bits([v[i] for v in shared], gathered(x[0], source[i], SIZES, fmt))
        np.testing.assert_array_equal(
            summed[i], oracle_moe.sum_rows_in_order(x[i], positions(1, S, S))
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_that_cuts_the_features_gives_the_same_bits(kind):
    mesh = jax.make_mesh((4, 2), ("d", "t"), (kind, kind))
    k, m, fmt = 512, 96, FORMATS[1]
    x, rows, weight = values(12, 64, k), values(13, m, k, dtype=BF16), values(14, 64, 4)
    hidden = oracle_activation.saturated(15, (m, 2, k), BF16)
    dy, factor = oracle_activation.cotangents(15, (m, k), BF16), np.ones(m, np.float32) / 2
    position, source = positions(2, 64, m), sources(3, m, 64)
    dims = ("m", act.TWO, "f")

    def run(x, rows, hidden, dy):
        row, column = gather.rows_and_columns(x, ("s", "k"), source, ("m",), SIZES, ("g",), fmt)
        both = gather.fp8_rows_and_columns(
            row._replace(dims=("s", "k")),
            source,
            ("m",),
            SIZES,
            ("g",),
            fmt.pow2,
        )
        total = sum_rows(rows, ("m", "k"), position, ("s", "j"), jnp.float32, weight)
        *grads, dweight = act.ragged_weighted_activation_grad(
            hidden, dims, dy, ("m", "f"), factor, ("m",), SIZES, ("g",), fmt, "silu"
        )
        return [*arrays(row, column, *both, *grads), total], dweight

    want, want_weight = jax.jit(run)(x, rows, hidden, dy)
    with jax.set_mesh(mesh):
        specs = P("d", "t"), P("d", "t"), P("d", None, "t"), P(None, ("d", "t"))
        placed = [
            jax.device_put(v, NamedSharding(mesh, s))
            for v, s in zip((x, rows, hidden, dy), specs, strict=True)
        ]
        got, dweight = jax.jit(run)(*placed)
    assert_same_bits(got, want)
    np.testing.assert_allclose(dweight, want_weight, rtol=1e-4)


def test_a_gather_moves_words_not_bytes():
    """XLA's gathers of bytes are half as fast on a GPU."""
    q = oq.quantize_blocks(values(16, S, K))
    text = str(jax.make_jaxpr(lambda d, s: gathered_fp8(d, s, SOURCE, SIZES, False, "rows"))(*q))
    leaf = gather.gather_rows_leaf
    text = str(jax.make_jaxpr(lambda d, s: leaf.reference(d, s, SOURCE))(*q))
    gathers = [line for line in text.splitlines() if " gather[" in line]
    assert gathers and all("i32[" in line or "f32[" in line for line in gathers)
