"""Every sharding rule on many meshes: the bits of one device, and float32's bound where the order of a sum shows.

Integers of three bits in blocks with power-of-two scales are quantized exactly and their products summed exactly, in
any order: so every cut, every collective and every transformation must give the bits of one device and of NumPy. For
other numbers XLA:CPU chooses the order of a sum by the size of a shard.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.programs import assert_same_bits

SLOW = pytest.mark.slow
LAYERS, TOKENS, K, N = 2, 1024, 512, 512
RNG = np.random.default_rng(0)


def integers(*shape):
    return RNG.integers(-7, 8, shape).astype(np.float32)


X, W, DY = integers(TOKENS, K), integers(LAYERS, K, N), integers(LAYERS, TOKENS, N)

# (shape of the mesh: data, model; the devices that it has)
MESHES = [(8, 1), (4, 1), (4, 2), (2, 4), (1, 4), (2, 2), (1, 2), (2, 1)]
# x, w and y of one layer
CASES = {
    "data": (("d",), (), ("d",)),
    "column": ((), (None, "t"), (None, "t")),
    "row": ((None, "t"), ("t",), ()),
    "data+column": (("d",), (None, "t"), ("d", "t")),
    "data+row": (("d", "t"), ("t",), ("d",)),
    "fsdp": (("d",), (None, "d"), ("d",)),
    "sequence column": (("t",), (None, "t"), (None, "t")),
    "sequence row": ((None, "t"), ("t",), ("t",)),
}
OFTEN = [((4, 2), "data+row", AxisType.Auto)]
COMBINATIONS = [
    (shape, case, kind)
    for shape in MESHES
    for case in CASES
    for kind in (AxisType.Auto, AxisType.Explicit)
    # an axis of one device cuts nothing
    if ("t" not in str(CASES[case]) or shape[1] > 1)
    and ("d" not in str(CASES[case]) or shape[0] > 1)
    # blocks of 128 of every cut dimension on each device
    and not (case == "fsdp" and shape[0] == 8)
    and (kind == AxisType.Auto or shape in ((4, 2), (2, 4)))
]


def layers(x, w, out_sharding=None, per_example=False):
    """Products of x with each layer's weight, by scan, under remat."""

    def product(w):
        if per_example:
            return jax.vmap(lambda row: jaxfp8.linear(row, w))(x)
        return jaxfp8.linear(x, w, out_sharding=out_sharding)

    policy = jaxfp8.checkpoint_policies.save_fp8_residuals()
    one = jax.checkpoint(product, policy=policy)
    with jaxfp8.Recipe(scale_format="pow2"):
        return jax.lax.scan(lambda carry, w: (carry, one(w)), 0, w)[1]


def results(x, w, dy, **options):
    y, pull = jax.vjp(functools.partial(layers, **options), x, w)
    return y, *pull(dy)


@functools.cache
def exact():
    """In NumPy, in float64: sums of integers below 2**24."""
    x, w, dy = (v.astype(np.float64) for v in (X, W, DY))
    y, dx, dw = x @ w, (dy @ w.swapaxes(1, 2)).sum(0), x.T @ dy
    return [v.astype(np.float32) for v in (y, dx, dw)]


@pytest.mark.parametrize(
    ("shape", "case", "kind"),
    [c if c in OFTEN else pytest.param(*c, marks=SLOW) for c in COMBINATIONS],
)
def test_values_and_gradients_have_the_bits_of_one_device(shape, case, kind):
    """Under jit, grad, scan over layers and remat."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("d", "t"), devices=devices, axis_types=(kind, kind))
    x, w, y = CASES[case]
    specs = P(*x), P(None, *w), P(None, *y)
    shardings = [NamedSharding(mesh, s) for s in specs]
    arrays = [jax.device_put(v, s) for v, s in zip((X, W, DY), shardings, strict=True)]
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            got = jax.jit(functools.partial(results, out_sharding=P(*y)))(*arrays)
    else:
        out = shardings[2], shardings[0], shardings[1]
        got = jax.jit(results, out_shardings=out)(*arrays)
    for v, s in zip(got, (shardings[2], shardings[0], shardings[1]), strict=True):
        assert v.sharding.is_equivalent_to(s, v.ndim)
    assert_same_bits(got, exact())


@pytest.mark.parametrize("shape", [pytest.param(s, marks=SLOW) for s in MESHES])
def test_vmapped_examples_have_the_bits_of_one_device(shape):
    mesh = jax.make_mesh(
        shape,
        ("d", "t"),
        devices=jax.devices()[: shape[0] * shape[1]],
        axis_types=(AxisType.Auto,) * 2,
    )
    specs = P("d"), P(None, None, "t"), P(None, "d", "t")
    arrays = [
        jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((X, W, DY), specs, strict=True)
    ]
    assert_same_bits(jax.jit(functools.partial(results, per_example=True))(*arrays), exact())


@pytest.mark.parametrize("shape", [pytest.param(s, marks=SLOW) for s in MESHES])
def test_experts_under_vmap_have_the_bits_of_one_device(shape):
    """A weight for each batch, cut over data; columns over model."""
    mesh = jax.make_mesh(
        shape,
        ("d", "t"),
        devices=jax.devices()[: shape[0] * shape[1]],
        axis_types=(AxisType.Auto,) * 2,
    )
    x, w, dy = X.reshape(8, 128, K), integers(8, K, N), integers(8, 128, N)
    specs = P("d"), P("d", None, "t"), P("d", None, "t")

    def run(x, w, dy):
        with jaxfp8.Recipe(scale_format="pow2"):
            y, pull = jax.vjp(jax.vmap(jaxfp8.linear), x, w)
            return y, *pull(dy)

    placed = [
        jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((x, w, dy), specs, strict=True)
    ]
    want = x @ w, dy @ w.swapaxes(1, 2), x.swapaxes(1, 2) @ dy  # exact in float32
    assert_same_bits(jax.jit(run)(*placed), want)


@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW) for c in ("row", "data+row", "fsdp")])
def test_other_numbers_are_within_the_roundings_of_a_float32_sum(case):
    """n terms in any order: (n - 1) * 2**-24 of the sum of magnitudes, on each of the two sides that are compared."""
    x, w, dy = (RNG.standard_normal(v.shape, np.float32) for v in (X, W, DY))
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    specs = [P(*CASES[case][0]), P(None, *CASES[case][1]), P(None, *CASES[case][2])]
    arrays = [
        jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip((x, w, dy), specs, strict=True)
    ]
    got, want = jax.jit(results)(*arrays), jax.jit(results)(x, w, dy)
    ax, aw, ady = (np.abs(v).astype(np.float64) for v in (x, w, dy))
    magnitudes = ax @ aw, (ady @ aw.swapaxes(1, 2)).sum(0), ax.T @ ady
    terms = K, LAYERS * N, TOKENS
    for a, b, magnitude, n in zip(got, want, magnitudes, terms, strict=True):
        # Quantized magnitudes exceed the others by at most 1/16 each.
        bound = 2 * (n - 1) * 2.0**-24 * magnitude * (17 / 16) ** 2
        assert (np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) <= bound).all()
