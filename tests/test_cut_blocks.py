"""Shards of any width: devices that share a block of 128 agree on its scale, and FP8 is what moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.programs import assert_close, assert_same_bits, collectives

QUANTIZERS = {
    "rows": jaxfp8.quantize,
    "square": functools.partial(jaxfp8.quantize, block=(128, 128)),
    "both": jaxfp8.quantize_both,
    "weight": jaxfp8.quantize_weight,
    "pow2 E5M2": functools.partial(
        jaxfp8.quantize_weight, dtype=jnp.float8_e5m2, scale_format="pow2"
    ),
}
CUTS = {
    "half a block": ((256, 384), P("a")),
    "both dimensions": ((256, 384), P("a", "b")),
    "a block and a half": ((768, 128), P("a")),
    "two axes": ((128, 264), P(None, ("a", "b"))),
    "minor axis first": ((1000, 136), P(("b", "a"))),
    "a short last block": ((328, 200), P("a", "b")),
}


def mesh_of(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)


def example(shape, dtype=jnp.float32):
    """Values of many magnitudes, a subnormal and, in one block, a NaN."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 3, shape)
    x[0, 0], x[-1, -1] = 1e-42, np.nan
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.representatives("axis_type", "cut", "name")
def test_blocks_that_devices_share_have_the_bits_of_the_whole(name, cut, axis_type):
    shape, spec = CUTS[cut]
    x, f = example(shape), jax.jit(QUANTIZERS[name])
    placed = jax.device_put(x, NamedSharding(mesh_of(axis_type), spec))
    assert_same_bits(f(placed), f(x))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_only_maxima_move(name):
    """An integer a block, in an all-reduce; no element."""
    x = example((256, 384), jnp.bfloat16)
    placed = jax.device_put(x, NamedSharding(mesh_of(AxisType.Auto), P("a", "b")))
    moved = collectives(jax.jit(QUANTIZERS[name]).lower(placed).compile().as_text())
    assert set(moved) == {"all-reduce s32"}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_an_fsdp_weight_of_half_blocks_gives_the_numbers_of_one_device(axis_type):
    """Eight devices with 64 rows each, forward and backward."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1024, 512), (512, 256)))

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(jaxfp8.linear, x, w)
        return y, pull(y)

    put = lambda v: jax.device_put(v, NamedSharding(mesh, P("data")))  # noqa: E731
    (y, (dx, dw)), (want_y, (want_dx, want_dw)) = run(put(x), put(w)), run(x, w)
    assert_same_bits((y, dx), (want_y, want_dx))
    assert_close(dw, want_dw, 2e-6)
