"""What every integration has to show: its products are ours, and its results are the framework's own in FP8."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import oracle, programs

FP8 = 0.06
"""Norm-wise distance of an FP8 result from the bfloat16 one: E4M3 keeps 3 bits, so a product of normal data is 3.7 %
off, and layers in a row add up."""

QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options of programs that run once: half the time to compile."""


def plain_products(jaxpr):
    """How many products the program leaves to XLA."""
    return sum(
        eqn.primitive.name in ("dot_general", "ragged_dot", "ragged_dot_general")
        for eqn in programs.walk(jaxpr)
    )


def assert_products(f, args, *, ours, others=0):
    """f(*args) has exactly `ours` FP8 products, and `others` in XLA."""
    _assert_products(jax.make_jaxpr(f)(*args), ours, others)


def _assert_products(jaxpr, ours, others):
    assert programs.products(jaxpr) == ours
    assert plain_products(jaxpr) == others


def assert_near(got, want, tolerance=FP8):
    """Every leaf is within FP8 tolerance of the reference's, and not equal to it: a product that never was FP8 is."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    errors = [oracle.error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= tolerance, f"relative errors {errors}; allowed: {tolerance}"
    assert max(errors) > 1e-3, f"relative errors {errors}: no product was in FP8"


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def output_and_gradients(apply, seed=9):
    """(params, x) -> apply's output, and the gradients of both for a random cotangent."""

    def run(params, x):
        y, pull = jax.vjp(apply, params, x)
        return y, pull(normal(seed, *y.shape).astype(y.dtype))

    return run


def compare(apply, reference, params, x, *, ours, others=0, tolerance=FP8):
    """Both functions' outputs and gradients, near each other; the first's are `ours` FP8 products, each with its two
    gradient products, and `others` of XLA's. Returns the first's."""
    traced = jax.jit(output_and_gradients(apply)).trace(params, x)
    _assert_products(traced.jaxpr, 3 * ours, 3 * others)
    got = traced.lower().compile(QUICK)(params, x)
    want = jax.jit(output_and_gradients(reference), compiler_options=QUICK)(params, x)
    assert_near(got, want, tolerance)
    return got
