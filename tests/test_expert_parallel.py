"""Expert parallelism: the same numbers on any number of devices, with half the bytes of bfloat16."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import oracle_quantize
from tests.programs import assert_same_bits, stated_dtypes, traffic

SLOW = pytest.mark.slow
RNG = np.random.default_rng(0)
EXPERTS, TOKENS, WIDTH, HIDDEN, CHOICES = 8, 128, 128, 128, 2


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


X, DY = normal(TOKENS, WIDTH), normal(TOKENS, WIDTH)
UP, DOWN = normal(EXPERTS, WIDTH, HIDDEN) / 12, normal(EXPERTS, HIDDEN, WIDTH) / 12
GATE = RNG.random((TOKENS, CHOICES)).astype(np.float32)


def route_of(kind):
    """Each token's experts: random, with an empty and a crowded expert; all to one device; some to none."""
    scores = RNG.standard_normal((TOKENS, EXPERTS))
    scores[:, 3], scores[:, 1] = -9, scores[:, 1] + 1
    if kind == "one device":
        scores[:, :2] += 20
    expert = np.argsort(scores)[:, -CHOICES:].astype(np.int32)
    if kind == "some to none":
        expert[::3, 0], expert[1::5] = -1, EXPERTS
    return expert


ROUTES = {kind: route_of(kind) for kind in ("uneven", "one device", "some to none")}


def mesh_of(*shape, axis_type=AxisType.Auto):
    axes = ("e", "d")[: len(shape)]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, axes, devices=devices, axis_types=(axis_type,) * len(shape))


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


def sharded(mesh, f=layer):
    return jax.shard_map(
        functools.partial(f, axis_name="e"), mesh=mesh, in_specs=P("e"), out_specs=P("e")
    )


@functools.cache
def on_one_device(kind):
    return train(layer)(X, GATE, UP, DOWN, ROUTES[kind], DY)


# ------------------------------------------------------------------------------------------------
# Values
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [k if k == "uneven" else pytest.param(k, marks=SLOW) for k in ROUTES]
)
@pytest.mark.parametrize("devices", [8, *[pytest.param(n, marks=SLOW) for n in (1, 2, 4)]])
def test_results_and_gradients_have_the_bits_of_one_device(devices, kind):
    """Of tokens, gates and experts: each expert multiplies the same rows in the same order."""
    got = train(sharded(mesh_of(devices)))(X, GATE, UP, DOWN, ROUTES[kind], DY)
    assert all(np.isfinite(np.asarray(v)).all() for v in got)
    assert_same_bits(got, on_one_device(kind))


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


@SLOW
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
    parts = [
        train(layer)(x, gate, UP, DOWN, expert, dy)
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
# Fewer rows than always suffice
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [pytest.param(1, marks=SLOW), 4])
def test_tokens_that_find_no_place_are_nan_and_all_others_are_as_before(devices):
    expert = ROUTES["one device"]
    max_rows = 200 if devices == 1 else 100  # of 256 copies, nearly all for one device
    f = functools.partial(layer, max_rows=max_rows)
    got = np.asarray(jax.jit(sharded(mesh_of(devices), f))(X, GATE, UP, DOWN, expert))
    want = np.asarray(jax.jit(layer)(X, GATE, UP, DOWN, expert))
    per_device = EXPERTS // devices
    flat = expert.reshape(-1)
    source = np.repeat(np.arange(devices), flat.size // devices)
    lost = np.zeros(flat.size, bool)
    for device in range(devices):  # places go by source, then expert, then token
        mine = np.flatnonzero(flat // per_device == device)
        order = mine[np.lexsort((mine, flat[mine], source[mine]))]
        lost[order[max_rows:]] = True
    lost = lost.reshape(expert.shape).any(1)
    assert 0 < lost.sum() < TOKENS
    assert np.isnan(got[lost]).all()
    assert_same_bits(got[~lost], want[~lost])


@SLOW
def test_rows_that_suffice_change_nothing():
    expert = ROUTES["uneven"]
    most = max(np.bincount(expert.reshape(-1) // 2, minlength=4))
    got = train(sharded(mesh_of(4), functools.partial(layer, max_rows=int(most))))(
        X, GATE, UP, DOWN, expert, DY
    )
    assert_same_bits(got, on_one_device("uneven"))


# ------------------------------------------------------------------------------------------------
# Transformations
# ------------------------------------------------------------------------------------------------


@SLOW
@pytest.mark.parametrize("remat", [True, False])
def test_scan_over_layers(remat):
    """Two layers that route differently."""
    up, down = np.stack([UP, UP[::-1]]), np.stack([DOWN, DOWN[::-1]])
    gate, expert = np.stack([GATE, GATE[::-1]]), np.stack([ROUTES["uneven"], ROUTES["one device"]])

    def forward(x, gate, up, down, expert, axis_name=None):
        def one(x, p):
            return x + layer(x, *p, axis_name), None

        policy = jaxfp8.checkpoint_policies.save_fp8_residuals()
        one = jax.checkpoint(one, policy=policy) if remat else one
        return jax.lax.scan(one, x, (gate, up, down, expert))[0]

    spec = P(None, "e")
    f = jax.shard_map(
        functools.partial(forward, axis_name="e"),
        mesh=mesh_of(4),
        in_specs=(P("e"), spec, spec, spec, spec),
        out_specs=P("e"),
    )
    arrays = X, gate, up, down, expert, DY
    assert_same_bits(train(f)(*arrays), train(forward)(*arrays))


@SLOW
def test_vmap_over_batches():
    def run(x, gate, expert):
        return jax.vmap(lambda *a: layer(a[0], a[1], UP, DOWN, a[2]))(x, gate, expert)

    batches = [np.stack(np.split(v, 2)) for v in (X, GATE, ROUTES["uneven"])]
    one = jax.jit(layer)
    want = [one(x, g, UP, DOWN, e) for x, g, e in zip(*batches, strict=True)]
    assert_same_bits(jax.jit(run)(*batches), np.stack(want))


@SLOW
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_any_shard_map(axis_type, check_vma):
    mesh = mesh_of(4, axis_type=axis_type)
    f = jax.shard_map(
        functools.partial(layer, axis_name="e"),
        mesh=mesh,
        in_specs=P("e"),
        out_specs=P("e"),
        check_vma=check_vma,
    )
    arrays = X, GATE, UP, DOWN, ROUTES["uneven"]
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, P("e")))
        got = jax.jit(f)(*placed)
    assert_same_bits(got, jax.jit(layer)(*arrays))


# ------------------------------------------------------------------------------------------------
# What moves
# ------------------------------------------------------------------------------------------------


def test_rows_move_once_each_way_and_to_the_experts_in_half_the_bytes():
    """Forward and backward: tokens and gradients of results in one byte an element and scales, the rest in bfloat16."""
    mesh = mesh_of(4)

    def compiled(quantized):
        def run(x, *rest, axis_name):
            y = layer(x.astype(jnp.bfloat16), *rest, axis_name, quantized=quantized)
            return y.astype(jnp.bfloat16)

        step = train(sharded(mesh, run))
        dy = jnp.asarray(DY, jnp.bfloat16)
        lowered = step.lower(X, GATE, UP, DOWN, ROUTES["uneven"], dy)
        return lowered, traffic(lowered.compile().as_text())

    lowered, moved = compiled(True)
    assert stated_dtypes(lowered, "all_to_all") == {"ui8", "bf16"}
    rows = [m for m in moved if m.kind == "all-to-all"]
    there, back = ([m for m in rows if (m.dtype == "u8") == fp8] for fp8 in (True, False))
    assert len(there) == len(back) == 2
    # Everyone's counts, 4 bytes for a device and expert; nothing else moves.
    counts = [m for m in moved if m not in rows]
    assert {(m.kind, m.dtype) for m in counts} == {("all-gather", "s32")}
    assert sum(m.bytes for m in counts) <= 2 * 4 * 4 * EXPERTS

    lowered, moved = compiled(False)
    assert stated_dtypes(lowered, "all_to_all") == {"bf16"}
    both = sum(2 * m.elements for m in moved if m.kind == "all-to-all")
    bf16 = both - sum(2 * m.elements for m in back)  # combine is the same in both
    assert bf16 == both / 2
    assert sum(m.bytes for m in there) <= 0.55 * bf16


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


@pytest.mark.parametrize("max_rows", [None, 40])
@pytest.mark.representatives()
def test_rows_of_a_ragged_exchange_are_those_of_the_padded_one(max_rows, monkeypatch):
    """The offsets and sizes that a GPU's all-to-all gets, held to its documentation; both ways, and their gradients."""

    def layer(x, gate, expert, axis_name):
        tokens, _, route = jaxfp8.dispatch(
            x, expert, EXPERTS, axis_name=axis_name, max_rows=max_rows
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


def test_a_gpu_sends_only_the_rows_that_exist(monkeypatch):
    monkeypatch.setattr("jaxfp8._ffi.require_cuda_kernels", lambda operation: None)  # never run
    arrays = X, GATE, UP, DOWN, ROUTES["uneven"], DY
    traced = train(sharded(mesh_of(4))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 4
    assert "stablehlo.all_to_all" not in text


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert": np.zeros((TOKENS, 2), np.float32)}, TypeError, "expert is float32; allowed: integers"),
        ({"expert": np.zeros((3, 2), np.int32)}, ValueError, r"expert has shape \(3, 2\); allowed: \(128, k\)"),
        ({"num_experts": 0}, ValueError, "num_experts is 0; allowed: a positive multiple"),
        ({"axis_name": "e"}, ValueError, "axis_name is 'e'; allowed: a mesh axis of the shard_map"),
        ({"max_rows": 0}, ValueError, "max_rows is 0; allowed: a positive int"),
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
