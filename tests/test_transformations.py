"""Every operation under every transformation of JAX gives what the operation alone gives.

The reference is NumPy float64 on independently quantized operands (`oracle_quantize`); for the quantized kernels it is
the kernel itself, one example at a time.
"""

import functools
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jaxfp8
from jaxfp8._primitives.leaf import LEAVES
from tests import oracle_gradients
from tests import oracle_quantize as oq
from tests.oracle_gradients import Formats
from tests.programs import (
    assert_close,
    assert_same_bits,
    count,
    has_loop,
    largest,
    largest_in_hlo,
    products,
    rounded_to_fewer_bits,
    train,
    walk,
)

TOLERANCE = 2e-6
"""Norm-wise, float32 results of the portable lowering against float64 (DESIGN 3.5)."""

EXAMPLES = 3


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ------------------------------------------------------------------------------------------------
# The differentiable operations and their oracles
# ------------------------------------------------------------------------------------------------


def batched_oracle(x, w, dy):
    """x (T, B, K), w (B, N, K), dy (B, T, N)."""
    each = [oracle_gradients.dense(x[:, b], w[b].T, dy[b]) for b in range(len(w))]
    y, dx, dw = (np.stack([e[i] for e in each]) for i in range(3))
    return y, np.swapaxes(dx, 0, 1), np.swapaxes(dw, 1, 2)


def einsum_oracle(x, w, dy):
    """x (T, D), w (D, H, K), dy (T, H, K)."""
    y, dx, dw = oracle_gradients.dense(x, w.reshape(len(w), -1), dy.reshape(len(dy), -1))
    return y.reshape(dy.shape), dx, dw.reshape(w.shape)


SIZES = np.array([50, 0, 70, 20], np.int32)


class Case(NamedTuple):
    f: Callable  # (x, w) -> y
    oracle: Callable  # (x, w, dy) -> y, dx, dw
    x: tuple
    w: tuple
    y: tuple
    tokens: (
        tuple | None
    )  # the axes of x and y along which examples join; None: their gradients are summed

    def draw(self, seed=0):
        return normal(seed, *self.x), normal(seed + 100, *self.w) / 16, normal(seed + 200, *self.y)

    def examples(self, n=EXAMPLES):
        """n x and dy that differ in scale, and n weights."""
        each = [self.draw(i) for i in range(n)]
        return tuple(
            np.stack([e[i] * np.float32(1 + k) for k, e in enumerate(each)]) for i in range(3)
        )

    def joined(self, xs, w, dys):
        """The oracle of examples with a shared weight: its gradient is one product over the tokens of all."""
        each = [self.oracle(x, w, dy) for x, dy in zip(xs, dys, strict=True)]
        y, dx = (np.stack([e[i] for e in each]) for i in (0, 1))
        if self.tokens is None:
            return y, dx, sum(e[2] for e in each)
        a, b = self.tokens
        return y, dx, self.oracle(np.concatenate(xs, a), w, np.concatenate(dys, b))[2]


CASES = {
    "linear": Case(jaxfp8.linear, oracle_gradients.dense, (96, 256), (256, 384), (96, 384), (0, 0)),
    "dot_general": Case(
        lambda x, w: jaxfp8.dot_general(x, w, (((2,), (2,)), ((1,), (0,)))),
        batched_oracle,
        (96, 2, 256),
        (2, 128, 256),
        (2, 96, 128),
        (0, 1),
    ),
    "einsum": Case(
        lambda x, w: jaxfp8.einsum("td,dhk->thk", x, w),
        einsum_oracle,
        (96, 256),
        (256, 3, 64),
        (96, 3, 64),
        (0, 0),
    ),
    "ragged_dot": Case(
        lambda x, w: jaxfp8.ragged_dot(x, w, SIZES),
        functools.partial(oracle_gradients.ragged, group_sizes=SIZES),
        (160, 256),
        (4, 256, 128),
        (160, 128),
        None,
    ),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# einsum and dot_general share the operation of linear: their rarer combinations are slow.
each_operation = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=n, marks=[pytest.mark.slow] if n in ("dot_general", "einsum") else [])
        for n, c in CASES.items()
    ],
)


@each_case
def test_jit(case):
    x, w, dy = case.draw()
    assert_close(jax.jit(train(case.f))(x, w, dy), case.oracle(x, w, dy), TOLERANCE)


@each_operation
def test_eager(case):
    x, w, dy = case.draw()
    assert_close(train(case.f)(x, w, dy), case.oracle(x, w, dy), TOLERANCE)


@each_case
@pytest.mark.representatives(cases=2)
def test_grad_of_one_operand_or_both(case):
    x, w, dy = case.draw()
    y, dx, dw = case.oracle(x, w, dy)

    def loss(x, w):
        return (case.f(x, w) * dy).sum()

    @jax.jit
    def run(x, w):
        return (
            jax.grad(loss, 0)(x, w),
            jax.grad(loss, 1)(x, w),
            jax.value_and_grad(loss, (0, 1))(x, w),
        )

    dx_alone, dw_alone, (value, both) = run(x, w)
    assert_close((dx_alone, dw_alone, *both), (dx, dw, dx, dw), TOLERANCE)
    np.testing.assert_allclose(value, (y * dy).sum(), rtol=1e-4)


@each_case
@pytest.mark.representatives(cases=2)
def test_vmap(case):
    xs, ws, dys = case.examples()
    shared = np.stack([case.oracle(x, ws[0], dys[0])[0] for x in xs])
    ensemble = np.stack([case.oracle(xs[0], w, dys[0])[0] for w in ws])

    @jax.jit
    def run(xs, ws):
        moved = jax.vmap(case.f, (1, None), -1)(jnp.moveaxis(xs, 0, 1), ws[0])
        return (
            jax.vmap(case.f, (0, None))(xs, ws[0]),
            jnp.moveaxis(moved, -1, 0),
            jax.vmap(case.f, (None, 0))(xs[0], ws),
        )

    assert_close(run(xs, ws), (shared, shared, ensemble), TOLERANCE)


@each_case
@pytest.mark.representatives(cases=2)
def test_vmap_of_both_operands_and_their_gradients(case):
    xs, ws, dys = case.examples()
    each = [case.oracle(*e) for e in zip(xs, ws, dys, strict=True)]
    want = [np.stack([e[i] for e in each]) for i in range(3)]
    either = jax.jit(lambda *e: (train(jax.vmap(case.f))(*e), jax.vmap(train(case.f))(*e)))
    assert_close(either(xs, ws, dys), (want, want), TOLERANCE)


@each_case
@pytest.mark.representatives(cases=2)
def test_grad_of_vmap_sums_over_all_examples(case):
    xs, ws, dys = case.examples()
    run = train(lambda x, w: jax.vmap(lambda x: case.f(x, w))(x))
    assert_close(jax.jit(run)(xs, ws[0], dys), case.joined(xs, ws[0], dys), TOLERANCE)


@each_case
@pytest.mark.representatives(cases=2)
def test_vmap_of_grad_is_per_example(case):
    xs, ws, dys = case.examples()
    each = [case.oracle(x, ws[0], dy) for x, dy in zip(xs, dys, strict=True)]
    want = [np.stack([e[i] for e in each]) for i in range(3)]
    run = jax.vmap(train(case.f), (0, None, 0))
    assert_close(jax.jit(run)(xs, ws[0], dys), want, TOLERANCE)


@each_operation
@pytest.mark.representatives()
def test_nested_vmap(case):
    xs, ws, dys = case.examples(4)
    want = case.joined(xs, ws[0], dys)
    fold = [v.reshape(2, 2, *v.shape[1:]) for v in (xs, dys)]
    run = train(lambda x, w: jax.vmap(jax.vmap(lambda x: case.f(x, w)))(x))
    y, dx, dw = jax.jit(run)(fold[0], ws[0], fold[1])
    assert_close((y.reshape(want[0].shape), dx.reshape(want[1].shape), dw), want, TOLERANCE)


@each_case
@pytest.mark.representatives(cases=2)
def test_scan(case):
    xs, ws, dys = case.examples()
    each = [case.oracle(*e) for e in zip(xs, ws, dys, strict=True)]
    want = [np.stack([e[i] for e in each]) for i in range(3)]

    def layers(xs, ws):
        return lax.scan(lambda _, xw: (None, case.f(*xw)), None, (xs, ws))[1]

    assert_close(jax.jit(train(layers))(xs, ws, dys), want, TOLERANCE)


def test_bfloat16_gradients_have_their_primals_types():
    case = CASES["linear"]
    xs, ws, dys = (v.astype(ml_dtypes.bfloat16) for v in case.examples())
    run = train(lambda x, w: jax.vmap(lambda x: case.f(x, w))(x))
    got = jax.jit(run)(xs, ws[0], dys)
    assert {v.dtype.name for v in got} == {"bfloat16"}
    assert_close(got, case.joined(xs, ws[0], dys), 2.0**-8)


# ------------------------------------------------------------------------------------------------
# How many products, and how large, under vmap
# ------------------------------------------------------------------------------------------------

TOKENS, K, N = 256, 384, 256
X, W, DY = normal(1, TOKENS, K), normal(2, K, N) / 16, normal(3, TOKENS, N)
LARGEST = TOKENS * max(K, N)


def per_example(x, w):
    """How Equinox models call a layer."""
    return jax.vmap(lambda x: jaxfp8.linear(x, w))(x)


def through(wrap):
    return lambda x, w: jax.vmap(wrap(lambda x: jaxfp8.linear(x, w)))(x)


@pytest.mark.parametrize(
    "f",
    [
        per_example,
        through(jax.jit),
        through(jax.checkpoint),
        through(lambda f: jax.named_call(f, name="layer")),
        jax.jit(per_example),
    ],
    ids=["vmap", "jit inside", "checkpoint inside", "named_call inside", "jit outside"],
)
@pytest.mark.representatives(cases=2)
def test_grad_of_vmap_has_no_array_of_tokens_in_out(f):
    run = train(f)
    jaxpr = jax.make_jaxpr(run)(X, W, DY)
    assert products(jaxpr) == 3
    assert largest(jaxpr) <= LARGEST
    compiled = jax.jit(run).lower(X, W, DY).compile()
    assert largest_in_hlo(compiled.as_text()) <= LARGEST
    assert_close(compiled(X, W, DY), oracle_gradients.dense(X, W, DY), TOLERANCE)


def test_grad_of_a_scalar_loss_over_vmap():
    def loss(w):
        return jax.vmap(lambda x: jaxfp8.linear(x, w))(X).sum()

    assert largest(jax.make_jaxpr(jax.grad(loss))(W)) <= LARGEST
    want = oracle_gradients.dense(X, W, np.ones_like(DY))[2]
    assert_close(jax.grad(loss)(W), want, TOLERANCE)
    assert_close(jax.jit(jax.grad(loss))(W), want, TOLERANCE)


def test_vmap_along_a_later_axis_is_still_one_product():
    x, dy = X.reshape(2, 128, K), DY.reshape(2, 128, N)
    axis1 = jax.vmap(jax.vmap(lambda x, w: jaxfp8.linear(x, w), (0, None)), (1, None), 1)
    jaxpr = jax.make_jaxpr(train(axis1))(x, W, dy)
    assert products(jaxpr) == 3 and largest(jaxpr) <= LARGEST
    y, dx, dw = jax.jit(train(axis1))(x, W, dy)
    # The tokens come in the order in which vmap maps them.
    order = np.arange(TOKENS).reshape(2, 128).T.reshape(-1)
    want = oracle_gradients.dense(X[order], W, DY[order])
    back = np.argsort(order)
    assert_close(
        (y.reshape(DY.shape), dx.reshape(X.shape)), (want[0][back], want[1][back]), TOLERANCE
    )
    assert_close(dw, want[2], TOLERANCE)


@pytest.mark.parametrize("name", ["linear", "dot_general", "einsum"])
def test_mapped_weights_are_one_batched_product(name):
    case = CASES[name]
    arguments = case.examples()
    for run in train(jax.vmap(case.f)), jax.vmap(train(case.f)):
        jaxpr = jax.make_jaxpr(run)(*arguments)
        assert products(jaxpr) == 3 and not has_loop(jaxpr)


def test_per_example_gradients_are_one_batched_product():
    case = CASES["linear"]
    xs, ws, dys = case.examples()
    jaxpr = jax.make_jaxpr(jax.vmap(train(case.f), (0, None, 0)))(xs, ws[0], dys)
    assert products(jaxpr) == 3 and not has_loop(jaxpr)


def test_an_ensemble_reads_its_input_once():
    ws = np.stack([W, 2 * W, -W])
    run = train(jax.vmap(jaxfp8.linear, (None, 0)))
    dys = np.stack([DY] * 3)
    jaxpr = jax.make_jaxpr(run)(X, ws, dys)
    assert products(jaxpr) == 3 and not has_loop(jaxpr)
    quantizers = [
        v.primitive for n, v in LEAVES.items() if re.match("jaxfp8_quantize_(rows|columns|both)", n)
    ]
    read = [e.invars[0].aval.shape for e in walk(jaxpr) if e.primitive in quantizers]
    assert [s[-2:] for s in read].count((TOKENS, K)) == 1
    y, dx, dw = jax.jit(run)(X, ws, dys)
    each = [oracle_gradients.dense(X, w, DY) for w in ws]
    assert_close((y, dw), tuple(np.stack([e[i] for e in each]) for i in (0, 2)), TOLERANCE)
    assert_close(dx, sum(e[1] for e in each), TOLERANCE)


def test_an_ensemble_of_per_example_calls():
    """vmap over weights of vmap over tokens, in both orders of nesting."""
    ws, x, dy = np.stack([W, 2 * W]), X.reshape(2, 128, K), DY.reshape(2, 128, N)
    weights_outside = train(jax.vmap(per_example))
    weights_inside = train(lambda x, w: jax.vmap(jax.vmap(jaxfp8.linear), (1, None), 1)(x, w))
    each = [oracle_gradients.dense(*e) for e in zip(x, ws, dy, strict=True)]
    want = [np.stack([e[i] for e in each]) for i in range(3)]
    for run in weights_outside, weights_inside:
        assert products(jax.make_jaxpr(run)(x, ws, dy)) == 3
        assert_close(jax.jit(run)(x, ws, dy), want, TOLERANCE)


def test_vmap_of_ragged_dot_over_tokens_and_their_group_sizes():
    case = CASES["ragged_dot"]
    xs, ws, dys = case.examples(2)
    sizes = np.stack([SIZES, np.array([0, 160, 0, 7], np.int32)])

    def each_example(xs, w):
        return jax.vmap(lambda x, s: jaxfp8.ragged_dot(x, w, s))(xs, sizes)

    each = [
        oracle_gradients.ragged(x, ws[0], dy, s) for x, dy, s in zip(xs, dys, sizes, strict=True)
    ]
    y, dx = (np.stack([e[i] for e in each]) for i in (0, 1))
    want = y, dx, each[0][2] + each[1][2]
    assert_close(jax.jit(train(each_example))(xs, ws[0], dys), want, TOLERANCE)
    per = jax.vmap(lambda x, s, dy: train(lambda x, w: jaxfp8.ragged_dot(x, w, s))(x, ws[0], dy)[2])
    assert_close(jax.jit(per)(xs, sizes, dys), np.stack([e[2] for e in each]), TOLERANCE)


def test_equal_calls_share_one_trace():
    jaxpr = jax.make_jaxpr(lambda x, w: jaxfp8.linear(jaxfp8.linear(x, w), w))(X[:, :256], W[:256])
    a, b = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name == "jaxfp8_dot"]
    assert a is b


# ------------------------------------------------------------------------------------------------
# Rematerialization
# ------------------------------------------------------------------------------------------------

POLICIES = {
    "nothing": None,
    "fp8": jaxfp8.checkpoint_policies.save_fp8_residuals(),
    "dots and fp8": jaxfp8.checkpoint_policies.save_dots_and_fp8_residuals(),
    "offload fp8": jaxfp8.checkpoint_policies.offload_fp8_residuals(),
    "everything": jax.checkpoint_policies.everything_saveable,
}


@pytest.mark.parametrize(
    "name, policy",
    [("linear", p) for p in POLICIES]
    + [(n, "fp8") for n in ("per example", "dot_general", "einsum", "ragged_dot")]
    + [pytest.param("ragged_dot", p, marks=pytest.mark.slow) for p in POLICIES if p != "fp8"],
)
@pytest.mark.representatives("name", "policy")
def test_remat_in_scan_gives_the_same_gradients(name, policy):
    case = CASES["linear" if name == "per example" else name]
    f = per_example if name == "per example" else case.f
    xs, ws, _ = case.examples(2)

    if name not in _plain_gradients:
        _plain_gradients[name] = _scanned_gradients(f, xs, ws, lambda layer: layer)
    got = _scanned_gradients(
        f, xs, ws, lambda layer: jax.checkpoint(layer, policy=POLICIES[policy])
    )
    assert_close(got, _plain_gradients[name], 1e-6)


_plain_gradients: dict[str, Any] = {}


def _scanned_gradients(f, xs, ws, wrap):
    # The backward pass needs y again, but only its sign: a last bit of y that differs would
    # otherwise reach dy and could round to another FP8 value.
    layer = wrap(lambda x, w: jax.nn.relu(f(x, w)))

    def loss(xs, ws):
        def step(total, xw):
            y = layer(*xw)
            return total + (
                y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            ).sum(), None

        return lax.scan(step, jnp.float32(0), (xs, ws))[0]

    return jax.jit(jax.grad(loss, (0, 1)))(xs, ws)


@each_case
@pytest.mark.parametrize("policy", ["fp8", "dots and fp8", "offload fp8"])
@pytest.mark.representatives("case", "policy")
def test_the_shipped_policies_keep_the_fp8_copies_as_bytes(case, policy):
    """uint8: of float residuals JAX drops bits, and every block's largest value, 448, would become NaN."""
    x, w, dy = case.draw()

    def layer(x, w):
        return 2 * case.f(3 * x, w)

    def run(policy):
        return train(jax.checkpoint(layer, policy=policy))

    saved = jax.eval_shape(
        lambda *a: jax.vjp(jax.checkpoint(layer, policy=POLICIES[policy]), *a)[1], x, w
    )
    kept = [v for v in jax.tree.leaves(saved) if v.dtype.itemsize == 1]
    assert [v.dtype.name for v in kept] == ["uint8", "uint8"]
    assert sorted(v.size >= n for v, n in zip(kept, (w.size, x.size), strict=True))[0]

    jaxpr, again = (jax.make_jaxpr(run(p))(x, w, dy) for p in (POLICIES[policy], None))
    quantizers = [
        n.removeprefix("jaxfp8_").removesuffix("_leaf") for n in LEAVES if "_quantize_" in n
    ]
    weights = [n for n in quantizers if "weight" in n]
    assert count(jaxpr, *weights) == 1 and count(again, *weights) == 2
    assert count(jaxpr, *quantizers) < count(again, *quantizers)
    assert products(jaxpr) == 3  # the forward product is not repeated


def test_offloaded_residuals_lie_in_host_memory():
    x, w, dy = (jnp.asarray(v) for v in CASES["linear"].draw())
    y, pull = jax.vjp(jax.checkpoint(jaxfp8.linear, policy=POLICIES["offload fp8"]), x, w)
    kept = [v for v in jax.tree.leaves(pull) if v.dtype == jnp.uint8]
    assert [v.sharding.memory_kind for v in kept] == ["pinned_host"] * 2
    assert_close((y, *pull(dy)), oracle_gradients.dense(*map(np.asarray, (x, w, dy))), TOLERANCE)


@each_case
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.representatives("case", "policy")
def test_no_policy_rounds_fp8_residuals(case, policy):
    x, w, _ = case.draw()
    f = jax.checkpoint(lambda x, w: jnp.sin(case.f(jnp.cos(x), w)).sum(), policy=POLICIES[policy])
    jaxpr = jax.make_jaxpr(jax.grad(f, (0, 1)))(x, w)
    assert not {t for t in rounded_to_fewer_bits(jaxpr) if "float8" in t}


# ------------------------------------------------------------------------------------------------
# Quantizers and products of quantized arrays
# ------------------------------------------------------------------------------------------------


def q(seed, *shape, block=(1, 128)):
    return jaxfp8.quantize(normal(seed, *shape), block=block)


def ragged_columns(seed, sizes):
    return tuple(
        jaxfp8.quantize_both(normal(seed + i, 160, d), group_sizes=sizes)[1]
        for i, d in enumerate((72, 128))
    )


SQUARE = (128, 128)
F32 = {"out_dtype": jnp.float32}

KERNELS = {
    "quantize": (jaxfp8.quantize, lambda s: (normal(s, 96, 200),)),
    "quantize blocks": (lambda x: jaxfp8.quantize(x, SQUARE), lambda s: (normal(s, 160, 200),)),
    "quantize_both": (jaxfp8.quantize_both, lambda s: (normal(s, 160, 200),)),
    "quantize_both ragged": (
        lambda x, sizes: jaxfp8.quantize_both(x, group_sizes=sizes),
        lambda s: (normal(s, 160, 72), np.roll(SIZES, s)),
    ),
    "quantize_weight": (jaxfp8.quantize_weight, lambda s: (normal(s, 160, 200),)),
    "dequantize": (jaxfp8.dequantize, lambda s: (q(s, 96, 200),)),
    "gemm": (
        lambda a, b: jaxfp8.gemm(a, b, **F32),
        lambda s: (q(s, 96, 256), q(s + 9, 72, 256, block=SQUARE)),
    ),
    "gemm 1d1d": (
        lambda a, b: jaxfp8.gemm(a, b, **F32),
        lambda s: (q(s, 96, 256), q(s + 9, 72, 256)),
    ),
    "gemm groups": (
        lambda a, b: jaxfp8.gemm(a, b, **F32),
        lambda s: (q(s, 2, 96, 256), q(s + 9, 2, 72, 256, block=SQUARE)),
    ),
    "gemm accum": (
        lambda a, b, c: jaxfp8.gemm(a, b, accum=c),
        lambda s: (q(s, 96, 256), q(s + 9, 72, 256), normal(s, 96, 72)),
    ),
    "wgrad_gemm": (jaxfp8.wgrad_gemm, lambda s: (q(s, 72, 300), q(s + 9, 128, 300))),
    "wgrad_gemm accum": (
        lambda a, b, c: jaxfp8.wgrad_gemm(a, b, accum=c),
        lambda s: (q(s, 72, 300), q(s + 9, 128, 300), normal(s, 72, 128)),
    ),
    "grouped_gemm": (
        lambda a, b, sizes: jaxfp8.grouped_gemm(a, b, sizes, **F32),
        lambda s: (q(s, 160, 256), q(s + 9, 4, 72, 256, block=SQUARE), np.roll(SIZES, s)),
    ),
    "masked_grouped_gemm": (
        lambda a, b, sizes: jaxfp8.masked_grouped_gemm(a, b, sizes, **F32),
        lambda s: (q(s, 4, 80, 256), q(s + 9, 4, 72, 256, block=SQUARE), np.roll(SIZES, s)),
    ),
    "grouped_wgrad_gemm": (
        jaxfp8.grouped_wgrad_gemm,
        lambda s: (*ragged_columns(s, np.roll(SIZES, s)), np.roll(SIZES, s)),
    ),
    "grouped_wgrad_gemm accum": (
        lambda a, b, sizes, c: jaxfp8.grouped_wgrad_gemm(a, b, sizes, accum=c),
        lambda s: (*ragged_columns(s, np.roll(SIZES, s)), np.roll(SIZES, s), normal(s, 4, 72, 128)),
    ),
}

each_kernel = pytest.mark.parametrize("name", KERNELS)


def same(name, got, want):
    """Quantizers to the bit; products up to the order of a sum in float32."""
    if "quantize" in name:
        assert_same_bits(got, want)
    else:
        assert_close(got, want, 1e-6)


def stack(trees):
    return jax.tree.map(lambda *v: np.stack([np.asarray(x) for x in v]), *trees)


def first(trees):
    return jax.tree.map(lambda v: v[0], trees)


def moved(trees, source, target):
    return jax.tree.map(lambda v: jnp.moveaxis(v, source, target), trees)


def reshaped(trees, *lead, drop):
    return jax.tree.map(lambda v: v.reshape(*lead, *v.shape[drop:]), trees)


# Each maps a stack of four examples to the stack of their results, or of the first one's.
TRANSFORMATIONS = {
    "jit": lambda f: lambda *a: reshaped(f(*first(a)), 1, drop=0),
    "checkpoint": lambda f: lambda *a: reshaped(jax.checkpoint(f)(*first(a)), 1, drop=0),
    "scan": lambda f: lambda *a: lax.map(lambda e: f(*e), a),
    "vmap": jax.vmap,
    "vmap along the last axis": lambda f: (
        lambda *a: moved(jax.vmap(f, -1, -1)(*moved(a, 0, -1)), -1, 0)
    ),
    "nested vmap": lambda f: (
        lambda *a: reshaped(jax.vmap(jax.vmap(f))(*reshaped(a, 2, 2, drop=1)), 4, drop=2)
    ),
}


@each_kernel
@pytest.mark.representatives(cases=6)
def test_kernels_under_jit_checkpoint_scan_and_vmap(name):
    f, make = KERNELS[name]
    each = [make(s) for s in range(4)]
    alone = stack([f(*e) for e in each])
    results = jax.jit(lambda *a: {k: t(f)(*a) for k, t in TRANSFORMATIONS.items()})(*stack(each))
    for got in results.values():
        n = len(jax.tree.leaves(got)[0])
        same(name, got, jax.tree.map(lambda v, n=n: v[:n], alone))


@pytest.mark.parametrize("name", [n for n in KERNELS if "gemm" in n or "ragged" in n])
@pytest.mark.representatives(cases=5)
def test_kernels_under_vmap_of_one_argument(name):
    f, make = KERNELS[name]
    each = [make(s) for s in range(2)]
    arity = len(each[0])
    # Columns in a group-padded axis belong to their group sizes.
    together = "ragged" in name or "grouped_wgrad" in name
    alone = [arity - 1] if together and "accum" in name else [] if together else range(arity)

    def mixed(i, k):
        return [each[k if j == i else 0][j] for j in range(arity)]

    def run(i):
        axes = [0 if j == i else None for j in range(arity)]
        arguments = [stack([e[j] for e in each]) if j == i else each[0][j] for j in range(arity)]
        return jax.vmap(f, axes)(*arguments)

    got = jax.jit(lambda: {i: run(i) for i in alone})()
    same(name, got, {i: stack([f(*mixed(i, k)) for k in range(2)]) for i in alone})


def test_vmap_over_data_and_shared_scales():
    a, b = q(0, 96, 256), q(1, 72, 256, block=SQUARE)
    flipped = [a, jaxfp8.QuantizedArray(a.data[::-1], a.scale, a.block)]
    both = jnp.stack([v.data for v in flipped])
    f = jax.vmap(lambda data: jaxfp8.gemm(jaxfp8.QuantizedArray(data, a.scale), b, **F32))
    assert_close(jax.jit(f)(both), np.stack([jaxfp8.gemm(v, b, **F32) for v in flipped]), 1e-6)


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "dequantize"])
def test_kernels_have_no_silent_zero_gradient(name):
    """They are not differentiable; asking raises, and nothing is quietly left out."""
    f, make = KERNELS[name]
    arguments = make(0)

    def loss(moving):
        outs = f(
            *jax.tree.map(lambda v, m: v if m is None else m, arguments, moving, is_leaf=is_none)
        )
        return sum(v.astype(jnp.float32).sum() for v in jax.tree.leaves(outs))

    def is_none(v):
        return v is None

    moving = jax.tree.map(lambda v: jnp.asarray(v) if v.dtype == np.float32 else None, arguments)
    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(loss)(moving)


# ------------------------------------------------------------------------------------------------
# Donation
# ------------------------------------------------------------------------------------------------

ACCUMULATING = {n: KERNELS[n] for n in KERNELS if "accum" in n}
each_accumulating = pytest.mark.parametrize("name", ACCUMULATING)


@each_accumulating
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_donated_accumulator_becomes_the_result(name, dtype):
    f, make = ACCUMULATING[name]
    *operands, before = make(0)
    before = np.asarray(before.astype(dtype))
    step = jax.jit(lambda c, *operands: f(*operands, c), donate_argnums=0)
    lowered = step.lower(before, *operands)
    main = next(line for line in lowered.as_text().splitlines() if "@main" in line)
    assert re.search(r"%arg0: [^%]*tf\.aliasing_output = 0", main)
    assert main.count("tf.aliasing_output") == 1
    compiled = lowered.compile()
    assert re.search(r"input_output_alias=\{ \{\}: \(0, \{\}, \w+-alias\) \}", compiled.as_text())

    accum = jnp.array(before)
    where = accum.unsafe_buffer_pointer()
    got = compiled(accum, *operands)
    assert accum.is_deleted() and got.unsafe_buffer_pointer() == where
    product = np.asarray(f(*operands, jnp.zeros(before.shape, jnp.float32)))
    assert got.dtype == dtype
    assert_close(
        got, before.astype(np.float64) + product, 1e-6 if dtype == jnp.float32 else 2.0**-8
    )


@each_accumulating
def test_an_accumulator_that_is_not_donated_is_preserved(name):
    f, make = ACCUMULATING[name]
    *operands, before = make(0)
    accum = jnp.array(before)
    got = jax.jit(f)(*operands, accum), f(*operands, accum)
    assert not accum.is_deleted()
    assert_same_bits(accum, before)
    product = np.asarray(f(*operands, jnp.zeros(before.shape, jnp.float32)))
    for v in got:
        assert_close(v, before.astype(np.float64) + product, 1e-6)


@each_accumulating
def test_the_cuda_call_writes_into_its_accumulator(name, monkeypatch):
    monkeypatch.setattr(
        "jaxfp8._ffi.require_cuda_kernels", lambda operation: None
    )  # only lowered here
    f, make = ACCUMULATING[name]
    *operands, accum = make(0)
    step = jax.jit(lambda c, *operands: f(*operands, c), donate_argnums=0)
    text = step.trace(accum, *operands).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [
        line for line in text.splitlines() if re.search(r"custom_call @jaxfp8_\w+_accum_v1", line)
    ]
    last = len(re.search(r"\((%[^)]*)\)", call)[1].split(",")) - 1
    alias = rf"output_tuple_indices = \[\], operand_index = {last}, operand_tuple_indices = \[\]"
    assert re.search(alias, call)


def test_microbatches_accumulate_in_a_scan():
    """Gradient accumulation: a carry that every step adds to, as wide as one gradient."""
    xs, dys = normal(1, 4, 128, 128), normal(2, 4, 128, 72)

    def step(accum, batch):
        x, dy = (jaxfp8.quantize_both(v)[1] for v in batch)
        return jaxfp8.wgrad_gemm(x, dy, accum=accum), None

    got = jax.jit(lambda c: lax.scan(step, c, (xs, dys))[0], donate_argnums=0)(jnp.ones((128, 72)))
    columns = oracle_gradients.columns
    want = 1 + sum(columns(x) @ columns(dy).T for x, dy in zip(xs, dys, strict=True))
    assert_close(got, want, TOLERANCE)


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------

E5M2_GRADIENTS = jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2)
POW2 = jaxfp8.Recipe(scale_format="pow2")
MIXED = jaxfp8.Recipe(dtype=jnp.float8_e5m2, scale_format="pow2", grad_scale_format="float32")

FORMATS: dict[Any, Formats] = {
    None: Formats(),
    E5M2_GRADIENTS: Formats(gradient=(oq.E5M2, False)),
    POW2: Formats((oq.E4M3, True), (oq.E4M3, True)),
    MIXED: Formats((oq.E5M2, True), (oq.E4M3, False)),
}
ORACLES = {recipe: oracle_gradients.dense(X, W, DY, formats) for recipe, formats in FORMATS.items()}


def recipe_of(got):
    """The only recipe whose oracle is what was computed."""
    fits = []
    for recipe, want in ORACLES.items():
        try:
            assert_close(got, want, TOLERANCE)
            fits.append(recipe)
        except AssertionError:
            continue
    assert len(fits) == 1, f"{len(fits)} recipes fit"
    return fits[0]


@pytest.mark.parametrize("recipe", FORMATS, ids=str)
@pytest.mark.representatives(cases=2)
def test_a_recipe_as_argument(recipe):
    run = train(lambda x, w: jaxfp8.linear(x, w, recipe=recipe))
    assert recipe_of(run(X, W, DY)) == recipe


@pytest.mark.parametrize("recipe", [E5M2_GRADIENTS, POW2, MIXED], ids=str)
@pytest.mark.representatives()
def test_a_recipe_as_context(recipe):
    with recipe:
        assert recipe_of(train(jaxfp8.linear)(X, W, DY)) == recipe
    assert recipe_of(train(jaxfp8.linear)(X, W, DY)) is None


def test_an_argument_wins_over_a_context():
    with POW2:
        run = train(lambda x, w: jaxfp8.linear(x, w, recipe=MIXED))
        assert recipe_of(run(X, W, DY)) == MIXED


def test_contexts_nest_and_end_with_an_exception():
    run = train(jaxfp8.linear)
    with POW2:
        with E5M2_GRADIENTS:
            assert recipe_of(run(X, W, DY)) == E5M2_GRADIENTS
            with POW2:  # the same object again
                assert recipe_of(run(X, W, DY)) == POW2
            assert recipe_of(run(X, W, DY)) == E5M2_GRADIENTS
        with pytest.raises(ZeroDivisionError), MIXED:
            raise ZeroDivisionError
        assert recipe_of(run(X, W, DY)) == POW2
    assert recipe_of(run(X, W, DY)) is None


def test_a_jitted_function_is_traced_anew_under_another_context_and_only_then():
    traces = []

    @jax.jit
    def run(x, w, dy):
        traces.append(1)
        return train(jaxfp8.linear)(x, w, dy)

    assert recipe_of(run(X, W, DY)) is None and len(traces) == 1
    with POW2:
        assert recipe_of(run(X, W, DY)) == POW2 and len(traces) == 2
    with jaxfp8.Recipe(scale_format="pow2"):  # an equal recipe
        assert recipe_of(run(X, W, DY)) == POW2 and len(traces) == 2
    assert recipe_of(run(X, W, DY)) is None and len(traces) == 2


def test_a_context_inside_a_jitted_function():
    @jax.jit
    def run(x, w, dy):
        with POW2:
            return train(jaxfp8.linear)(x, w, dy)

    assert recipe_of(run(X, W, DY)) == POW2


def test_the_backward_pass_has_its_forwards_recipe():
    with MIXED:
        y, pull = jax.vjp(jaxfp8.linear, X, W)
    assert recipe_of((y, *pull(DY))) == MIXED
    with POW2:
        assert recipe_of((y, *pull(DY))) == MIXED


def in_scan(f):
    return lambda x, w: lax.scan(lambda c, w: (c, f(x, w)), 0, w[None])[1][0]


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, in_scan, lambda f: jax.vmap(f, (0, None))],
    ids=["jit", "checkpoint", "scan", "vmap"],
)
def test_a_context_reaches_through_transformations(wrap):
    with MIXED:
        jaxpr = jax.make_jaxpr(train(wrap(jaxfp8.linear)))(X, W, DY)
    assert formats(jaxpr) == {("float8_e5m2", True), ("float8_e4m3fn", False)}


def formats(jaxpr):
    """What the program's quantizers write."""
    quantizers = [leaf.primitive for name, leaf in LEAVES.items() if "_quantize_" in name]
    return {
        (e.params["dtype"].name, e.params["pow2"]) for e in walk(jaxpr) if e.primitive in quantizers
    }


def test_threads_have_their_own_context():
    """Two threads inside different recipes (one object shared), a third in none, all at the same time."""
    ready, results = threading.Barrier(4), {}
    run = jax.jit(train(jaxfp8.linear))

    def work(name, recipe):
        if recipe is None:
            ready.wait()
            results[name] = run(X, W, DY)
            return
        with recipe:
            ready.wait()
            results[name] = run(X, W, DY)
            ready.wait()  # leave together

    def last():
        ready.wait()
        results["none"] = run(X, W, DY)
        ready.wait()

    jobs = [("a", POW2), ("b", POW2), ("c", MIXED)]
    threads = [threading.Thread(target=work, args=j) for j in jobs] + [
        threading.Thread(target=last)
    ]
    with E5M2_GRADIENTS:  # is not inherited
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert recipe_of(run(X, W, DY)) == E5M2_GRADIENTS
    got = {name: recipe_of(v) for name, v in results.items()}
    assert got == {"a": POW2, "b": POW2, "c": MIXED, "none": None}


def test_quantizers_follow_the_recipe_in_force():
    x = normal(5, 96, 200)
    with jaxfp8.Recipe(dtype=jnp.float8_e5m2, scale_format="pow2"):
        got = jax.jit(jaxfp8.quantize)(x)
        explicit = jaxfp8.quantize(x, dtype=jnp.float8_e4m3fn, scale_format="float32")
    assert_same_bits(got, oq.quantize_blocks(x, (1, 128), oq.E5M2, True))
    assert_same_bits(explicit, oq.quantize_blocks(x, (1, 128)))
