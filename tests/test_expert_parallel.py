"""Expert parallelism: every expert has the same rows on any number of devices, however they travel; what moves."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import oracle_quantize
from tests.programs import assert_same_bits, stated

FULL = pytest.mark.full
RNG = np.random.default_rng(0)
EXPERTS, TOKENS, WIDTH, HIDDEN, CHOICES = 8, 128, 128, 128, 2


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


X, DY = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH)
UP, DOWN = normal(EXPERTS, WIDTH, HIDDEN) / 12, normal(EXPERTS, HIDDEN, WIDTH) / 12
GATE = RNG.random((TOKENS, CHOICES)).astype(np.float32)


def route_of(kind):
    """Each token's experts: random, with an empty and a crowded expert; all to one device; some to none, or to all."""
    scores = RNG.standard_normal((TOKENS, EXPERTS))
    scores[:, 3], scores[:, 1] = -9, scores[:, 1] + 1
    if kind == "one device":
        scores[:, :2] += 20
    expert = np.argsort(scores)[:, -CHOICES:].astype(np.int32)
    if kind == "some to none":
        expert[::3, 0], expert[1::5] = -1, EXPERTS
        expert[2::7, 1] = expert[2::7, 0]  # one expert twice
    return np.full_like(expert, -1) if kind == "none" else expert


ROUTES = {kind: route_of(kind) for kind in ("uneven", "one device", "some to none", "none")}


def mesh_of(*shape, axis_type=AxisType.Auto, axes=("e", "d")):
    devices = jax.devices()[: int(np.prod(shape))]
    names = axes[: len(shape)]
    return jax.make_mesh(shape, names, devices=devices, axis_types=(axis_type,) * len(shape))


def layer(x, gate, up, down, expert, axis_name=None, **options):
    tokens, sizes, route = jaxfp8.dispatch(x, expert, EXPERTS, axis_name=axis_name, **options)
    hidden = jax.nn.silu(jaxfp8.ragged_dot(tokens, up, sizes, preferred_element_type=x.dtype))
    y = jaxfp8.ragged_dot(hidden, down, sizes, preferred_element_type=x.dtype)
    return jaxfp8.combine(y, gate, route)


def train(f):
    def run(x, gate, up, down, expert, dy):
        y, pull = jax.vjp(lambda *a: f(*a, expert), x, gate, up, down)
        return y, *pull(dy)

    return jax.jit(run)


def sharded(mesh, f=layer, **options):
    """f on every device of the mesh, over one axis "e", or over all of them as levels."""
    names = mesh.axis_names
    run = functools.partial(f, axis_name=names if len(names) > 1 else names[0], **options)
    return jax.shard_map(run, mesh=mesh, in_specs=P(names), out_specs=P(names))


@functools.cache
def on_one_device(kind):
    return train(layer)(X, GATE, UP, DOWN, ROUTES[kind], DY)


@functools.cache
def on_four_devices(kind):
    return train(sharded(mesh_of(4)))(X, GATE, UP, DOWN, ROUTES[kind], DY)


# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------


def assert_same_but_for_the_order_of_sums(got, want, magnitudes):
    """Bits of all that has one term a token and expert: gradients of gates and weights. y and dx are sums of terms.

    `magnitudes`: sums of the magnitudes of their terms, by token and column. k terms that are rounded once each, added
    in any order and rounded to float32 at each level, are within k + levels roundings of it on either side.
    """
    assert all(np.isfinite(np.asarray(v)).all() for v in got)
    assert_same_bits(got[2:], want[2:])
    for g, w, size in zip(got[:2], want[:2], magnitudes, strict=True):
        bound = 2 * (CHOICES + 2) * 2.0**-24 * np.asarray(size, np.float64)
        assert (np.abs(np.asarray(g, np.float64) - np.asarray(w, np.float64)) <= bound).all()


@functools.cache
def terms(kind):
    """Sums of magnitudes over a token's copies, of y and dx: each copy is a token of its own."""
    flat = [np.repeat(v, CHOICES, 0) for v in (X, DY)]
    gate, expert = (v.reshape(-1, 1) for v in (GATE, ROUTES[kind]))
    y, dx, *_ = train(layer)(flat[0], gate, UP, DOWN, expert, flat[1])
    return [np.abs(np.asarray(v)).reshape(TOKENS, CHOICES, -1).sum(1) for v in (y, dx)]


@pytest.mark.parametrize(
    "kind", [k if k == "uneven" else pytest.param(k, marks=FULL) for k in ROUTES]
)
@pytest.mark.parametrize("devices", [8, *[pytest.param(n, marks=FULL) for n in (1, 2, 4)]])
def test_gradients_of_weights_and_gates_have_the_bits_of_one_device(devices, kind):
    """Each expert multiplies the same rows in the same order. A token's sum over its experts has another order."""
    got = train(sharded(mesh_of(devices)))(X, GATE, UP, DOWN, ROUTES[kind], DY)
    got = [got[0], got[1], got[2], *got[3:]]
    assert_same_but_for_the_order_of_sums(got, on_one_device(kind), terms(kind))


@pytest.mark.parametrize("devices", [4, *[pytest.param(n, marks=FULL) for n in (1, 2, 8)]])
@pytest.mark.parametrize("strategy", ["gather", "all_to_all", "ragged"])
def test_every_expert_gets_the_rows_of_one_device_in_their_order(strategy, devices):
    def rows(x, expert, axis_name=None, **options):
        tokens, sizes, _ = jaxfp8.dispatch(x, expert, EXPERTS, axis_name=axis_name, **options)
        return tokens, sizes

    expert = ROUTES["some to none"]
    want, want_sizes = jax.jit(rows)(X, expert)
    got, sizes = jax.jit(sharded(mesh_of(devices), rows, strategy=strategy))(X, expert)
    assert_same_bits(sizes, want_sizes)
    per_device = sizes.reshape(devices, -1).sum(1)
    parts = np.split(np.asarray(got), devices)
    assert_same_bits(
        np.concatenate([p[:n] for p, n in zip(parts, per_device, strict=True)]),
        np.asarray(want)[: sizes.sum()],
    )
    assert all((p[n:] == 0).all() for p, n in zip(parts, per_device, strict=True))


STRATEGIES = {
    "gather": {"strategy": "gather"},
    "all_to_all": {"strategy": "all_to_all"},
    "ragged": {"strategy": "ragged"},
    "blocks": {"max_sent": 30},  # of 32 tokens of a device; none sends more to a peer
}


@pytest.mark.parametrize(
    "kind", ["some to none", *[pytest.param(k, marks=FULL) for k in ("uneven", "none")]]
)
@pytest.mark.parametrize(
    "options", [k if k == "blocks" else pytest.param(k, marks=FULL) for k in STRATEGIES]
)
def test_every_strategy_gives_the_same_bits(options, kind):
    f = train(sharded(mesh_of(4), **STRATEGIES[options]))
    assert_same_bits(f(X, GATE, UP, DOWN, ROUTES[kind], DY), on_four_devices(kind))


@pytest.mark.parametrize(
    "shape", [(2, 2), *[pytest.param(s, marks=FULL) for s in ((2, 4), (4, 2), (1, 4), (2, 2, 2))]]
)
@pytest.mark.parametrize(
    "options",
    ["blocks", *[pytest.param(k, marks=FULL) for k in ("gather", "all_to_all", "ragged")]],
)
def test_axes_of_two_levels_give_the_same_rows_to_every_expert(shape, options):
    mesh = mesh_of(*shape, axes=("node", "board", "gpu"))
    got = train(sharded(mesh, **STRATEGIES[options]))(X, GATE, UP, DOWN, ROUTES["uneven"], DY)
    assert_same_but_for_the_order_of_sums(got, on_one_device("uneven"), terms("uneven"))


@FULL
def test_no_tokens_at_all():
    none = X[:0], GATE[:0], UP, DOWN, ROUTES["uneven"][:0], DY[:0]
    for f in (layer, sharded(mesh_of(2)), sharded(mesh_of(2), strategy="all_to_all")):
        y, dx, dgate, dup, ddown = train(f)(*none)
        assert y.shape == dx.shape == (0, WIDTH) and dgate.shape == (0, CHOICES)
        assert (np.asarray(dup) == 0).all() and (np.asarray(ddown) == 0).all()


def test_the_gates_gradient_is_the_product_of_results_and_quantized_gradients():
    """Against NumPy in float64, of results that JAX's own operations make."""

    def square(x, gate, expert):
        tokens, _, route = jaxfp8.dispatch(x, expert, EXPERTS, quantized=True)
        return jaxfp8.combine(tokens * jnp.abs(tokens), gate, route)

    _, pull = jax.vjp(lambda gate: square(X, gate, ROUTES["some to none"]), GATE)
    (got,) = pull(DY)
    rows, dy = _rows(X).astype(np.float64), _rows(DY)
    want = (rows * np.abs(rows) * dy).sum(1, keepdims=True)
    want = np.where((ROUTES["some to none"] >= 0) & (ROUTES["some to none"] < EXPERTS), want, 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_one_device_is_the_gated_sum_of_its_experts():
    """Against NumPy in float64 on quantized tokens and weights; the hidden rows are quantized in between."""
    y = on_one_device("some to none")[0]
    up, down = (np.stack([_weight(w) for w in ws]) for ws in (UP, DOWN))
    want = np.zeros((TOKENS, WIDTH))
    x = _rows(X)
    for t, (experts, gates) in enumerate(zip(ROUTES["some to none"], GATE, strict=True)):
        for e, g in zip(experts, gates, strict=True):
            if 0 <= e < EXPERTS:
                h = x[t] @ up[e]
                h = _rows((h / (1 + np.exp(-h))).astype(np.float32)[None])[0]
                want[t] += float(g) * (h @ down[e])
    # h has float32's error; where that flips the rounding of one of its FP8 values, that value moves by 1/8 at most.
    error = np.linalg.norm(np.asarray(y) - want) / np.linalg.norm(want)
    assert error < 1e-3
    assert (np.asarray(y)[1::15] == 0).all()  # sent nowhere


def _rows(x):
    return oracle_quantize.dequantize(*oracle_quantize.quantize_blocks(x), (1, 128))


def _weight(w):
    return oracle_quantize.dequantize(*oracle_quantize.quantize_blocks(w, (128, 128)), (128, 128))


@FULL
@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (2, 2)])
def test_data_parallel_beside_expert_parallel(shape):
    """Tokens over both axes, experts over e. A weight gradient is the sum of those of d's groups of devices."""
    mesh = mesh_of(*shape)
    both = P(("d", "e"))
    f = jax.shard_map(
        lambda x, gate, up, down, expert: layer(x, gate, up, down, expert, axis_name="e"),
        mesh=mesh,
        in_specs=(both, both, P("e"), P("e"), both),
        out_specs=both,
    )
    got = train(f)(X, GATE, UP, DOWN, ROUTES["uneven"], DY)
    one = train(sharded(mesh_of(shape[0])))
    parts = [
        one(x, gate, UP, DOWN, expert, dy)
        for x, gate, expert, dy in zip(
            *(np.split(v, shape[1]) for v in (X, GATE, ROUTES["uneven"], DY)), strict=True
        )
    ]
    rows = [np.concatenate([p[i] for p in parts]) for i in range(3)]
    assert_same_bits(got[:3], rows)
    for i in (3, 4):
        terms = np.stack([np.asarray(p[i], np.float64) for p in parts])
        # Of n float32 terms, any order of summation is within n - 1 roundings of the sum of magnitudes.
        bound = (len(terms) - 1) * 2.0**-24 * np.abs(terms).sum(0) + 1e-30
        assert (np.abs(np.asarray(got[i], np.float64) - terms.sum(0)) <= bound).all()


@pytest.mark.parametrize("recipe", [{"scale_format": "pow2"}, {}])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.representatives()
def test_quantizing_dispatched_tokens_again_changes_nothing(recipe, dtype):
    x = jnp.asarray(normal(64, 256) * np.exp(3 * normal(64, 1)), dtype)
    with jaxfp8.Recipe(**recipe):
        want = jaxfp8.quantize(x)
        tokens, _, _ = jaxfp8.dispatch(x, np.zeros((64, 1), np.int32), 1)
        got = jaxfp8.quantize(tokens)
    if (
        recipe
    ):  # where the largest value was rounded to 224, data and scale may trade a factor of two
        assert_same_bits(got.dequantize(), want.dequantize())
    else:
        assert_same_bits(got.data, want.data)
        np.testing.assert_allclose(got.scale, want.scale, rtol=2 * float(jnp.finfo(dtype).eps))


def test_a_nan_stays_with_its_token():
    x = X.copy()
    x[5, 7] = np.nan
    y = np.asarray(jax.jit(layer)(x, GATE, UP, DOWN, ROUTES["uneven"]))
    assert np.isnan(y[5]).all()
    assert np.isfinite(np.delete(y, 5, axis=0)).all()


# ------------------------------------------------------------------------------------------------
# Fewer rows, and tokens a peer, than always suffice
# ------------------------------------------------------------------------------------------------


def counted(x, gate, up, down, expert, axis_name=None, **options):
    """The layer, and how many copies found no place."""
    tokens, sizes, route = jaxfp8.dispatch(x, expert, EXPERTS, axis_name=axis_name, **options)
    hidden = jax.nn.silu(jaxfp8.ragged_dot(tokens, up, sizes))
    y = jaxfp8.combine(jaxfp8.ragged_dot(hidden, down, sizes), gate, route)
    return y, route.overflow[None]


def assert_lost(got, want, overflow, lost):
    """`lost`: copies (T, k) without a place. Their tokens are NaN, all others are as they were."""
    tokens = lost.any(1)
    assert 0 < tokens.sum() < TOKENS
    assert np.sum(overflow) == lost.sum()
    assert np.isnan(np.asarray(got)[tokens]).all()
    assert_same_bits(np.asarray(got)[~tokens], np.asarray(want)[~tokens])


@pytest.mark.parametrize("devices", [pytest.param(1, marks=FULL), 4])
def test_copies_past_max_rows_are_nan_and_counted_and_all_others_are_as_before(devices):
    expert = ROUTES["one device"]
    max_rows = 200  # of 256 copies, all for one device
    mesh, arrays = mesh_of(devices), (X, GATE, UP, DOWN, expert)
    got, overflow = jax.jit(sharded(mesh, counted, max_rows=max_rows))(*arrays)
    want = jax.jit(sharded(mesh))(*arrays)
    flat, per_device = expert.reshape(-1), EXPERTS // devices
    lost = np.zeros(flat.size, bool)
    for device in range(devices):  # places go by expert, then source, then token
        mine = np.flatnonzero(flat // per_device == device)
        lost[mine[np.lexsort((mine, flat[mine]))][max_rows:]] = True
    assert_lost(got, want, overflow, lost.reshape(expert.shape))


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_tokens_past_max_sent_are_nan_and_counted_and_all_others_are_as_before(shape):
    expert, block = ROUTES["some to none"], 12
    mesh, arrays = mesh_of(*shape), (X, GATE, UP, DOWN, expert)
    got, overflow = jax.jit(sharded(mesh, counted, max_sent=block))(*arrays)
    want = jax.jit(sharded(mesh))(*arrays)
    valid = (expert >= 0) & (expert < EXPERTS)
    peer = np.where(valid, expert // (EXPERTS // shape[0]), -1)
    lost = np.zeros(expert.shape, bool)
    for own in np.split(np.arange(TOKENS), 4):
        for p in range(shape[0]):  # a token takes one place with a peer, whatever it wants there
            late = own[np.flatnonzero((peer[own] == p).any(1))[block:]]
            lost[late] |= peer[late] == p
    assert_lost(got, want, overflow, lost)


@FULL
def test_a_lost_token_has_no_gradient():
    expert = ROUTES["one device"]
    for options in ({"max_rows": 200}, {"max_sent": 12}):
        f = train(sharded(mesh_of(4), **options))
        y, dx, dgate, *_ = map(np.asarray, f(X, GATE, UP, DOWN, expert, DY))
        lost = np.isnan(y).all(1)
        assert 0 < lost.sum() < TOKENS
        assert np.isfinite(dx).all() and np.isfinite(dgate).all()
        assert (dgate[lost] == 0).any(1).all() and (dgate[~lost] != 0).any(1).all()


@FULL
def test_rows_that_suffice_change_nothing():
    expert = ROUTES["uneven"]
    most = max(np.bincount(expert.reshape(-1) // 2, minlength=4))
    got = train(sharded(mesh_of(4), max_rows=int(most)))(X, GATE, UP, DOWN, expert, DY)
    assert_same_bits(got, on_four_devices("uneven"))


# ------------------------------------------------------------------------------------------------
# Transformations
# ------------------------------------------------------------------------------------------------


@FULL
@pytest.mark.parametrize("remat", [True, False])
def test_scan_over_layers(remat):
    """Two layers that route differently, beside the same written out."""
    up, down = np.stack([UP, UP[::-1]]), np.stack([DOWN, DOWN[::-1]])
    gate, expert = np.stack([GATE, GATE[::-1]]), np.stack([ROUTES["uneven"], ROUTES["one device"]])

    def forward(x, gate, up, down, expert, axis_name, scan):
        def one(x, p):
            return x + layer(x, *p, axis_name), None

        policy = jaxfp8.checkpoint_policies.save_fp8_residuals()
        one = jax.checkpoint(one, policy=policy) if remat and scan else one
        layers = gate, up, down, expert
        if scan:
            return jax.lax.scan(one, x, layers)[0]
        for i in range(2):
            x, _ = one(x, [a[i] for a in layers])
        return x

    spec = P(None, "e")

    def run(scan):
        f = jax.shard_map(
            functools.partial(forward, axis_name="e", scan=scan),
            mesh=mesh_of(4),
            in_specs=(P("e"), spec, spec, spec, spec),
            out_specs=P("e"),
        )
        return train(f)(X, gate, up, down, expert, DY)

    assert_same_bits(run(True), run(False))


@FULL
def test_vmap_over_batches():
    def run(x, gate, expert):
        return jax.vmap(lambda *a: layer(a[0], a[1], UP, DOWN, a[2]))(x, gate, expert)

    batches = [np.stack(np.split(v, 2)) for v in (X, GATE, ROUTES["uneven"])]
    one = jax.jit(layer)
    want = [one(x, g, UP, DOWN, e) for x, g, e in zip(*batches, strict=True)]
    assert_same_bits(jax.jit(run)(*batches), np.stack(want))


@FULL
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("options", STRATEGIES)
def test_any_shard_map(axis_type, check_vma, options):
    mesh = mesh_of(4, axis_type=axis_type)
    f = jax.shard_map(
        functools.partial(layer, axis_name="e", **STRATEGIES[options]),
        mesh=mesh,
        in_specs=P("e"),
        out_specs=P("e"),
        check_vma=check_vma,
    )
    arrays = X, GATE, UP, DOWN, ROUTES["uneven"], DY
    with jax.set_mesh(mesh):
        got = train(f)(*jax.device_put(arrays, jax.sharding.NamedSharding(mesh, P("e"))))
    assert_same_bits(got, on_four_devices("uneven"))


# ------------------------------------------------------------------------------------------------
# What moves
# ------------------------------------------------------------------------------------------------


def step_in_bfloat16(mesh, **options):
    """The lowered step of a layer of which tokens, results and weights are bfloat16."""
    arrays = [jnp.asarray(v, jnp.bfloat16) for v in (X, UP, DOWN, DY)]
    x, up, down, dy = arrays
    return train(sharded(mesh, **options)).lower(x, GATE, up, down, ROUTES["uneven"], dy)


ROW_THERE, ROW_BACK, SMALL = WIDTH + 4, 2 * WIDTH, 4 * CHOICES
"""Bytes of a token: FP8 data and a scale; a sum in bfloat16; its experts' numbers, its gates, or their gradient."""


@pytest.mark.parametrize("shape", [(8,), (4, 2), pytest.param((2,), marks=FULL)])
@pytest.mark.parametrize("blocks", [False, True])
def test_bytes_are_those_of_the_formula(shape, blocks):
    """Forward and backward: x and dy to the experts in FP8, y and dx back in bfloat16, all once a token and level."""
    devices = math.prod(shape)
    tokens = TOKENS // devices
    block = tokens // 2 if blocks else tokens
    options = {"max_sent": block} if blocks else {}
    copies = (shape[0] - 1 + (math.prod(shape[1:]) - 1) * shape[0]) * block
    moved = stated(step_in_bfloat16(mesh_of(*shape), **options))
    there = [m for m in moved if m.dtype == "ui8"]
    back = [m for m in moved if m.dtype == "bf16"]
    small = [m for m in moved if m.dtype in ("f32", "i32")]
    scales = copies * 2 * 4
    assert sum(m.received for m in there) + scales == copies * 2 * ROW_THERE
    assert sum(m.received for m in back) == copies * 2 * ROW_BACK
    # Numbers of experts and gates there, the gates' gradients back; nothing else moves.
    assert sum(m.received for m in small) == copies * 3 * SMALL + scales
    kinds = {"gather": {"all_gather"}, "blocks": {"all_to_all"}}["blocks" if blocks else "gather"]
    kinds = kinds | ({"all_gather"} if len(shape) > 1 else set())
    assert {m.kind for m in there} == kinds
    assert {m.kind for m in back} == {"all_to_all"}


def test_no_exchange_is_ragged_unless_asked_for(monkeypatch):
    monkeypatch.setattr("jaxfp8._ffi.require_cuda_kernels", lambda operation: None)  # never run
    arrays = X, GATE, UP, DOWN, ROUTES["uneven"], DY
    for options, ragged in (({}, 0), ({"max_sent": 20}, 0), ({"strategy": "ragged"}, 9)):
        traced = train(sharded(mesh_of(4), **options)).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@ragged_all_to_all") == ragged


def test_fp8_sends_half_the_bytes_of_bfloat16():
    quantized, wide = (
        stated(step_in_bfloat16(mesh_of(4), quantized=quantized)) for quantized in (True, False)
    )
    assert {m.dtype for m in wide if m.elements > TOKENS * CHOICES} == {"bf16"}
    there = [
        sum(m.received for m in moved if m.kind == "all_gather") for moved in (quantized, wide)
    ]
    assert there[0] <= 0.6 * there[1]  # of 128 values a scale is 3 %, numbers and gates another 6 %


def test_the_strategy_with_the_fewest_bytes_is_chosen():
    for options, kinds in (
        ({}, {"all_gather"}),
        ({"max_sent": 31}, {"all_to_all"}),
        ({"max_sent": 32}, {"all_gather"}),  # as many as all
        ({"max_sent": 31, "strategy": "all_to_all"}, {"all_to_all"}),
    ):
        moved = stated(step_in_bfloat16(mesh_of(4), **options))
        assert {m.kind for m in moved if m.dtype == "ui8"} == kinds


def test_explain_says_how_tokens_travel_and_what_their_rows_take():
    def notes(**options):
        return str(
            jaxfp8.explain(sharded(mesh_of(4), **options), X, GATE, UP, DOWN, ROUTES["uneven"])
        )

    text = notes()
    # 3 others' 32 tokens: 128 bytes, a scale and two numbers of experts each; 512 bytes of a sum.
    assert "dispatch: gather" in text and "over e (4 devices)" in text
    assert (
        f"{3 * 32 * (132 + 8) / 1e3:.1f} kB received there, {3 * 32 * 512 / 1e3:.1f} kB back"
        in text
    )
    assert f"room for 256 rows, {256 * 512 / 1e3:.1f} kB, so that any routing fits" in text
    text = notes(max_sent=20, max_rows=64)
    assert "dispatch: all_to_all: blocks of 20 tokens a peer" in text
    assert f"{3 * 20 * (132 + 8) / 1e3:.1f} kB received there" in text
    assert "room for 64 rows, 32.8 kB" in text and "any routing fits" not in text


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What jax.lax.ragged_all_to_all does by its documentation; XLA:CPU has none. Wrong sizes give NaN or 255."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = (
        jax.lax.all_gather(v, axis_name)
        for v in (operand, input_offsets, send_sizes, output_offsets)
    )
    row = jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        within = row - places[source, me]
        inside = (within >= 0) & (within < sizes[source, me])
        rows = operands[source].at[starts[source, me] + within].get(mode="fill")
        output = jnp.where(inside[:, None], rows, output)
    wrong = (recv_sizes != sizes[:, me]).any()
    return jnp.where(wrong, jnp.full_like(output, 255), output)


@pytest.mark.parametrize("max_rows", [40, pytest.param(None, marks=FULL)])
def test_rows_of_a_ragged_exchange_are_those_of_the_padded_one(max_rows, monkeypatch):
    """The offsets and sizes that a GPU's all-to-all gets, held to its documentation; both ways, and their gradients."""

    def layer(x, gate, expert, axis_name):
        tokens, _, route = jaxfp8.dispatch(
            x, expert, EXPERTS, axis_name=axis_name, max_rows=max_rows, strategy="ragged"
        )
        return jaxfp8.combine(tokens * jnp.abs(tokens), gate, route)

    def run(x, gate, expert, dy):
        y, pull = jax.vjp(lambda x, gate: sharded(mesh_of(4), layer)(x, gate, expert), x, gate)
        return y, *pull(dy)

    arrays = X, GATE, ROUTES["some to none"], DY
    padded = jax.jit(run)(*arrays)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    branch = lambda *operands, cuda, **others: cuda(*operands)  # noqa: E731
    monkeypatch.setattr(jax.lax, "platform_dependent", branch)
    assert_same_bits(jax.jit(lambda *a: run(*a))(*arrays), padded)


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert": np.zeros((TOKENS, 2), np.float32)}, TypeError, "expert has dtype float32; allowed: integers"),
        ({"expert": np.zeros((3, 2), np.int32)}, ValueError, r"expert has shape \(3, 2\); allowed: \(128, k\)"),
        ({"num_experts": 0}, ValueError, "num_experts is 0; allowed: a positive multiple"),
        ({"axis_name": "e"}, ValueError, "axis_name is 'e'; allowed: a mesh axis of the shard_map"),
        ({"axis_name": ("e", "e")}, ValueError, r"axis_name is \('e', 'e'\); allowed: each axis once"),
        ({"max_rows": 0}, ValueError, "max_rows is 0; allowed: a positive int"),
        ({"max_sent": 0}, ValueError, "max_sent is 0; allowed: a positive int"),
        ({"max_sent": 9, "strategy": "gather"}, ValueError, "max_sent is 9 with strategy 'gather'; allowed: None"),
        ({"strategy": "ring"}, ValueError, "strategy is 'ring'; allowed: 'gather', 'all_to_all', 'ragged', or None"),
        ({"x": np.zeros((TOKENS, 2), np.int32)}, TypeError, "x has dtype int32"),
    ],
)  # fmt: skip
def test_dispatch_names_what_does_not_fit(change, error, message):
    arguments = {"x": X, "expert": ROUTES["uneven"], "num_experts": EXPERTS, **change}
    with pytest.raises(error, match=f"dispatch: {message}"):
        jaxfp8.dispatch(**arguments)


def test_experts_that_do_not_divide_and_results_of_other_rows_are_refused():
    tokens, _, route = jaxfp8.dispatch(X, ROUTES["uneven"], EXPERTS)
    with pytest.raises(
        ValueError, match="combine: y has rows=3 but dispatch's result has rows=256"
    ):
        jaxfp8.combine(tokens[:3], GATE, route)
    with pytest.raises(
        ValueError, match=r"combine: gate has shape \(128, 1\); allowed: \(128, 2\)"
    ):
        jaxfp8.combine(tokens, GATE[:, :1], route)
    with pytest.raises(TypeError, match="combine: route is a int; allowed: what dispatch returned"):
        jaxfp8.combine(tokens, GATE, 3)
    f = jax.shard_map(
        lambda x, e: jaxfp8.dispatch(x, e, 7, axis_name="e")[0],
        mesh=mesh_of(2),
        in_specs=P("e"),
        out_specs=P("e"),
    )
    with pytest.raises(ValueError, match="num_experts is 7; allowed: a positive multiple of the 2"):
        f(X, ROUTES["uneven"])
