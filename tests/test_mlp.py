"""mlp and ragged_mlp on meshes, under vmap and other transformations, and with nothing to compute."""

import collections
import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests.oracle_mlp import FLIPS, ragged_reference, reference, run, tokens, weights
from tests.programs import assert_close, compile_opaque, multiply_adds, products, traffic

SLOW = pytest.mark.slow
TOLERANCE = 1e-5
"""Shards sum in another order than one device."""


def train(f):
    """y, dx, dw_up and dw_down for a given dy."""

    def both(x, w_up, w_down, dy):
        y, pull = jax.vjp(f, x, w_up, w_down)
        return y, *pull(dy)

    return both


# --------------------------------------------------------------------------------------------------
# Meshes: 4 devices of data by 2 of the model
# --------------------------------------------------------------------------------------------------

TOKENS, K, F, N = 512, 512, 256, 512  # whole blocks of each on every device that cuts it

SCALES = TOKENS * K // 128 * 2
"""Elements of the largest array of scales, which do not count as traffic."""

MESHES = {
    "auto": jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto, AxisType.Auto)),
    "explicit": jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Explicit,) * 2),
}
each_mesh = pytest.mark.parametrize("mesh", MESHES)


class Case(NamedTuple):
    x: tuple
    w_up: tuple  # axes of K and of F
    w_down: tuple
    y: tuple
    devices: int  # that share the work
    moves: Callable  # (tokens . (K + N), both weights, hidden layer and its activation) -> elements by kind


CASES = {
    "data": Case(("d",), (None, None), (), ("d",), 4, lambda x, w, h: {"all-reduce f32": w}),
    "tensor": Case((), (None, "t"), ("t",), (), 2, lambda x, w, h: {"all-reduce f32": x}),
    "data+tensor": Case(
        ("d",),
        (None, "t"),
        ("t",),
        ("d",),
        8,
        lambda x, w, h: {"all-reduce f32": x // 4 + w // 2},
    ),
    "fsdp": Case(
        ("d",),
        ("d", None),
        (None, "d"),
        ("d",),
        4,
        lambda x, w, h: {"all-gather fp8": 2 * w, "reduce-scatter f32": w // 4},
    ),
    "fsdp+tensor": Case(
        ("d",),
        ("d", "t"),
        ("t", "d"),
        ("d",),
        8,
        lambda x, w, h: {
            "all-gather fp8": w,
            "reduce-scatter f32": w // 8,
            "all-reduce f32": x // 4,
        },
    ),
    "one axis for tokens and hidden units": Case(
        ("t",),
        (None, "t"),
        ("t",),
        ("t",),
        2,
        lambda x, w, h: {"all-gather fp8": 2 * w, "reduce-scatter f32": w // 2},
    ),
    "contractions": Case(
        (None, "t"),
        ("t", None),
        (None, "t"),
        (None, "t"),
        2,
        lambda x, w, h: {"all-reduce f32": h},
    ),
}


def ambient(mesh):
    return jax.set_mesh(mesh) if AxisType.Explicit in mesh.axis_types else contextlib.nullcontext()


def shardings(mesh, case, gated):
    x, (k, f), down, y = CASES[case][:4]
    specs = P(*x), P(k, *([None] if gated else []), f), P(*down), P(*y)
    return [NamedSharding(mesh, s) for s in specs]


@functools.cache
def one_device(gated):
    (x, dy), (w_up, w_down) = tokens(TOKENS, K, N), weights(K, F, N, gated)
    arrays = x, w_up, w_down, dy
    return arrays, run(jaxfp8.mlp, *arrays)


def cases(often):
    """(mesh, case, gated); all but those that run `often` are slow."""
    found = []
    for mesh in MESHES:
        for case in CASES:
            for gated in (True, False):
                marks = [] if (mesh, case, gated) in often else [SLOW]
                name = f"{mesh}-{case}-{'gated' if gated else 'plain'}"
                found.append(pytest.param(mesh, case, gated, marks=marks, id=name))
    return found


def placed_train(mesh, y):
    """The jitted function; its result's sharding is told by type, or to jit."""
    if AxisType.Explicit in mesh.axis_types:
        return train(functools.partial(jaxfp8.mlp, out_sharding=y.spec))
    return train(jaxfp8.mlp)


@pytest.mark.parametrize(
    ("mesh", "case", "gated"),
    cases([("explicit", "fsdp+tensor", True)]),
)
def test_shards_of_an_mlp_have_the_values_and_gradients_of_one_device(mesh, case, gated):
    mesh, (arrays, want) = MESHES[mesh], one_device(gated)
    *ins, y = shardings(mesh, case, gated)
    out = {} if AxisType.Explicit in mesh.axis_types else {"out_shardings": (y, *ins)}
    with ambient(mesh):
        got = jax.jit(placed_train(mesh, y), **out)(*map(jax.device_put, arrays, (*ins, y)))
    for v, sharding in zip(got, (y, *ins), strict=True):
        assert v.sharding.is_equivalent_to(sharding, v.ndim)
    # Where the hidden layer is a sum over devices, a last bit of it may be a step of FP8.
    assert_close(got, want, FLIPS if case == "contractions" else TOLERANCE)


def moved(compiled):
    """Elements that arrive at a device, by kind and dtype; scales aside."""
    found = collections.Counter()
    for kind, dtype, elements in traffic(compiled.as_text()):
        if elements > SCALES:
            found[f"{kind} {'fp8' if dtype == 'f16' else dtype}"] += elements
    return dict(found)


@pytest.mark.parametrize(
    ("mesh", "case", "gated"), cases([("explicit", "data+tensor", True), ("auto", "fsdp", True)])
)
def test_devices_share_the_work_of_an_mlp_and_only_this_moves(mesh, case, gated):
    mesh = MESHES[mesh]
    *ins, y = shardings(mesh, case, gated)
    halves = (2,) if gated else ()
    shapes = (TOKENS, K), (K, *halves, F), (F, N), (TOKENS, N)
    explicit = AxisType.Explicit in mesh.axis_types
    compiled = compile_opaque(
        placed_train(mesh, y),
        *zip(shapes, (*ins, y), strict=True),
        mesh=mesh if explicit else None,
        out_shardings=None if explicit else (y, *ins),
    )
    both_weights = K * F * (1 + gated) + F * N
    assert multiply_adds(compiled.as_text()) * CASES[case].devices == 3 * TOKENS * both_weights
    hidden = TOKENS * F * (1 + gated) + TOKENS * F
    assert moved(compiled) == CASES[case].moves(TOKENS * (K + N), both_weights, hidden)


@pytest.mark.slow
@each_mesh
@pytest.mark.parametrize("f", [200, 128], ids=["no whole blocks", "one block"])
def test_shards_that_cut_a_block_of_an_mlp_are_gathered(mesh, f):
    """Tokens of two examples on each device, and hidden units of which a device has a part of a block."""
    mesh = MESHES[mesh]
    (x, dy), (w_up, w_down) = tokens(40, 96, 72), weights(96, f, 72, True)
    arrays = x, w_up, w_down, dy
    specs = P("d", "t"), P("t"), P("t", "d"), P("d")
    with ambient(mesh):
        placed = [
            jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(arrays, specs, strict=True)
        ]
        got = jax.jit(train(jaxfp8.mlp))(*placed)
    assert_close(got, run(jaxfp8.mlp, *arrays), TOLERANCE)


# --------------------------------------------------------------------------------------------------
# shard_map
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize("mesh", ["auto", pytest.param("explicit", marks=SLOW)])
def test_an_mlp_in_shard_map_has_the_values_and_gradients_of_one_device(mesh, check_vma):
    """Tokens and hidden units on each device; what the devices of the model have is summed by the program."""
    mesh, (arrays, want) = MESHES[mesh], one_device(True)
    f = jax.shard_map(
        lambda *shards: jax.lax.psum(jaxfp8.mlp(*shards), "t"),
        mesh=mesh,
        in_specs=(P("d"), P(None, None, "t"), P("t")),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    with ambient(mesh):
        if AxisType.Explicit in mesh.axis_types:
            specs = (P("d"), P(None, None, "t"), P("t"), P("d"))
            arrays = [
                jax.device_put(v, NamedSharding(mesh, s))
                for v, s in zip(arrays, specs, strict=True)
            ]
        got = jax.jit(train(f))(*arrays)
    assert_close(got, want, TOLERANCE)


@pytest.mark.slow
@each_mesh
def test_gradients_inside_shard_map_sum_over_the_devices_that_share_a_weight(mesh):
    mesh, (arrays, want) = MESHES[mesh], one_device(True)
    specs = P("d"), P(), P(), P("d")
    out = P("d"), P("d"), P(), P()
    f = jax.shard_map(train(jaxfp8.mlp), mesh=mesh, in_specs=specs, out_specs=out)
    with ambient(mesh):
        placed = [
            jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(arrays, specs, strict=True)
        ]
        assert_close(jax.jit(f)(*placed), want, TOLERANCE)


@pytest.mark.slow
@each_mesh
def test_an_mlp_in_a_partly_manual_mesh(mesh):
    """Manual over tokens; the hidden units are left to the compiler, or to the types."""
    mesh, (arrays, want) = MESHES[mesh], one_device(True)
    f = jax.shard_map(
        train(jaxfp8.mlp),
        mesh=mesh,
        in_specs=(P("d"), P(), P(), P("d")),
        out_specs=(P("d"), P("d"), P(), P()),
        axis_names={"d"},
    )
    specs = P("d"), P(None, None, "t"), P("t"), P("d")
    with ambient(mesh):
        placed = [
            jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(arrays, specs, strict=True)
        ]
        assert_close(jax.jit(f)(*placed), want, TOLERANCE)


# --------------------------------------------------------------------------------------------------
# Experts on meshes
# --------------------------------------------------------------------------------------------------

SIZES = np.array([10, 0, 40, 7], np.int32)


@functools.cache
def experts_on_one_device():
    (x, dy), (w_up, w_down) = tokens(64, 256, 256), weights(256, 256, 256, True, (4,))
    arrays = x, w_up, w_down, dy
    return arrays, run(experts, *arrays)


def experts(x, w_up, w_down):
    return jaxfp8.ragged_mlp(x, w_up, w_down, SIZES)


EXPERTS = {
    "tensor": (P(), P(None, None, None, "t"), P(None, "t"), P()),
    "data": (P("d"), P(), P(), P("d")),
    "fsdp": (P(), P(None, "t"), P(None, None, "t"), P()),
    "contractions": (P(None, "t"), P(None, "t"), P(None, None, "t"), P(None, "t")),
    "experts": (P(), P("d"), P("d"), P()),
}


@pytest.mark.slow
@each_mesh
@pytest.mark.parametrize("case", EXPERTS)
def test_sharded_experts_have_the_values_and_gradients_of_one_device(mesh, case):
    mesh, (arrays, want) = MESHES[mesh], experts_on_one_device()
    *ins, y = (NamedSharding(mesh, s) for s in EXPERTS[case])
    explicit = AxisType.Explicit in mesh.axis_types

    def f(x, w_up, w_down):
        spec = {"out_sharding": y.spec} if explicit else {}
        return jaxfp8.ragged_mlp(x, w_up, w_down, SIZES, **spec)

    with ambient(mesh):
        placed = map(jax.device_put, arrays, (*ins, y))
        got = jax.jit(train(f), **({} if explicit else {"out_shardings": (y, *ins)}))(*placed)
    for v, sharding in zip(got, (y, *ins), strict=True):
        assert v.sharding.is_equivalent_to(sharding, v.ndim)
    # As above; experts' weights that are cut alone (FSDP) cut the contraction, since groups of tokens are not.
    assert_close(got, want, FLIPS if case in ("fsdp", "contractions") else TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_experts_in_shard_map_have_the_rows_of_their_device(check_vma):
    """Each device of the data has rows and group sizes of its own; hidden units are cut over the model."""
    sizes = np.array([[5, 0, 4, 3], [0, 16, 0, 0], [1, 1, 20, 5], [0, 0, 0, 0]], np.int32)
    (x, w_up, w_down, dy), _ = experts_on_one_device()
    f = jax.shard_map(
        lambda x, up, down, s: jax.lax.psum(jaxfp8.ragged_mlp(x, up, down, s[0]), "t"),
        mesh=MESHES["auto"],
        in_specs=(P("d"), P(None, None, None, "t"), P(None, "t"), P("d")),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    got = jax.jit(train(lambda x, up, down: f(x, up, down, sizes)))(x, w_up, w_down, dy)
    shards = zip(x.reshape(4, 16, -1), dy.reshape(4, 16, -1), sizes, strict=True)
    parts = [ragged_reference(rows, w_up, w_down, d, s, "silu") for rows, d, s in shards]
    want = [np.concatenate([p[i] for p in parts]) for i in (0, 1)]
    want += [sum(p[i] for p in parts) for i in (2, 3)]
    assert_close(got, want, FLIPS)


# --------------------------------------------------------------------------------------------------
# vmap
# --------------------------------------------------------------------------------------------------


def examples(f, groups=()):
    """Two of x, w_up, w_down and dy, which differ."""
    (x, dy), (w_up, w_down) = tokens(140, 96, 72), weights(96, f, 72, True, groups)
    stacked = [np.stack([v, 2 * v[::-1]]) for v in (x, w_up, w_down, dy)]
    return stacked, [[v[i] for v in stacked] for i in range(2)]


DENSE = (jaxfp8.mlp, lambda *arrays: reference(*arrays, "silu"), ())
RAGGED = (
    lambda *arrays: jaxfp8.ragged_mlp(*arrays, np.array([50, 0, 70], np.int32)),
    lambda *arrays: ragged_reference(*arrays, [50, 0, 70], "silu"),
    (3,),
)
each_kind = pytest.mark.parametrize(
    "kind", [DENSE, pytest.param(RAGGED, marks=SLOW)], ids=["dense", "ragged"]
)


@each_kind
def test_vmap_over_everything_is_an_mlp_for_each(kind):
    f, want, groups = kind
    stacked, each = examples(128, groups)
    want = [np.stack(v) for v in zip(*(want(*e) for e in each), strict=True)]
    assert products(jax.make_jaxpr(train(jax.vmap(f)))(*stacked)) == 6
    both = jax.jit(lambda *arrays: (train(jax.vmap(f))(*arrays), jax.vmap(train(f))(*arrays)))
    assert_close(both(*stacked), (want, want), FLIPS)


@each_kind
@pytest.mark.slow
@pytest.mark.parametrize(
    "mapped",
    [(None, 0, 0), (None, 0, None), (None, None, 0), (0, 0, None), (0, None, 0)],
    ids=lambda m: "-".join(n for n, a in zip(("x", "up", "down"), m, strict=True) if a == 0),
)
def test_vmap_over_weights_sums_the_gradients_of_what_is_shared(kind, mapped):
    f, want, groups = kind
    stacked, each = examples(128, groups)
    given = [v if m == 0 else v[0] for v, m in zip(stacked, mapped, strict=False)]
    each = [[*(e[i] if m == 0 else each[0][i] for i, m in enumerate(mapped)), e[3]] for e in each]
    results = [want(*e) for e in each]
    got = jax.jit(train(jax.vmap(f, mapped)))(*given, stacked[3])
    for i, m in enumerate((0, *mapped)):
        parts = [r[i] for r in results]
        if m == 0:
            assert_close(got[i], np.stack(parts), FLIPS)
        else:  # quantized in blocks over the tokens of all, or after the sum: FP8's error from the sum of both
            assert_close(got[i], sum(parts), 0.05)


@pytest.mark.slow
def test_vmap_over_group_sizes():
    (x, dy), (w_up, w_down) = tokens(130, 96, 72), weights(96, 128, 72, True, (3,))
    sizes = np.array([[50, 0, 70], [0, 130, 5]], np.int32)

    def f(x, w_up, w_down):
        return jax.vmap(lambda s: jaxfp8.ragged_mlp(x, w_up, w_down, s))(sizes)

    dys = np.stack([dy, 2 * dy])
    each = [
        ragged_reference(x, w_up, w_down, d, s, "silu") for d, s in zip(dys, sizes, strict=True)
    ]
    y, *gradients = zip(*each, strict=True)
    assert_close(
        jax.jit(train(f))(x, w_up, w_down, dys), [np.stack(y), *map(sum, gradients)], FLIPS
    )


# --------------------------------------------------------------------------------------------------
# Forward mode, and nothing to compute
# --------------------------------------------------------------------------------------------------


FORWARD = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](x),
    "jacfwd": jax.jacfwd,
}


@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize("kind", [DENSE, RAGGED], ids=["dense", "ragged"])
def test_forward_mode_is_refused_as_of_linear(kind, transform):
    f, _, groups = kind
    _, ((x, w_up, w_down, _), _) = examples(128, groups)

    def refusal(f):
        with pytest.raises(TypeError) as error:
            jax.jit(FORWARD[transform](f)).lower(x)
        return str(error.value)

    of_linear = refusal(lambda x: jaxfp8.linear(x, np.ones((96, 72), np.float32)))
    assert "can't apply forward-mode autodiff (jvp) to a custom_vjp function" in of_linear
    assert refusal(lambda x: f(x, w_up, w_down)) == of_linear


@pytest.mark.parametrize("gated", [pytest.param(False, marks=SLOW), True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    "empty", ["tokens", "F", *(pytest.param(d, marks=SLOW) for d in ("K", "N"))]
)
def test_an_mlp_of_nothing_is_zero(empty, gated):
    size = dict(tokens=70, K=96, F=128, N=72) | {empty: 0}
    m, k, f, n = size.values()
    halves = (2,) if gated else ()
    arrays = np.ones((m, k)), np.ones((k, *halves, f)), np.ones((f, n)), np.ones((m, n))
    arrays = [v.astype(np.float32) for v in arrays]
    got = run(jaxfp8.mlp, *arrays)
    for v, like in zip(got, (arrays[3], *arrays[:3]), strict=True):
        assert v.shape == like.shape and v.dtype == np.float32
        assert not v.any()


@pytest.mark.parametrize(
    ("m", "sizes"),
    [
        pytest.param(40, [0, 0, 0], id="empty groups", marks=SLOW),
        pytest.param(0, [0, 5], id="no tokens"),
    ],
)
def test_experts_without_tokens_are_zero(m, sizes):
    (x, dy), (w_up, w_down) = tokens(m, 96, 72), weights(96, 128, 72, True, (len(sizes),))
    x, dy = x + 1, dy + 1

    def f(x, w_up, w_down):
        return jaxfp8.ragged_mlp(x, w_up, w_down, np.array(sizes, np.int32))

    got = run(f, x, w_up, w_down, dy)
    for v, like in zip(got, (dy, x, w_up, w_down), strict=True):
        assert v.shape == like.shape and not v.any()


@pytest.mark.slow
def test_exact_gelu_runs_unfused_as_the_documentation_says():
    """What is fused is the tanh approximation."""
    (x, _), (w_up, w_down) = tokens(40, 96, 72), weights(96, 128, 72, False)

    def unfused(approximate):
        h = jaxfp8.linear(x, w_up)
        return jaxfp8.linear(jax.nn.gelu(h, approximate=approximate), w_down)

    fused, approximate, exact = jax.jit(
        lambda: (jaxfp8.mlp(x, w_up, w_down, activation="gelu"), unfused(True), unfused(False))
    )()
    assert_close(fused, approximate, FLIPS)
    assert not np.array_equal(exact, approximate)
    assert_close(exact, approximate, 0.02)
