"""Programs on eight devices: what each device computes, what moves between them, and the values.

Work and traffic are read from programs in which every kernel is an opaque custom call, as on a GPU.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from jaxfp8._primitives.leaf import LEAVES
from tests import oracle, oracle_gradients
from tests.programs import (
    assert_close,
    assert_same_bits,
    collectives,
    compile_opaque,
    largest,
    multiply_adds,
    train,
)

TOLERANCE = 1e-5
"""Norm-wise against float64; shards sum in another order than one device."""

TOKENS, K, N = 1024, 512, 512  # 128 tokens, and whole blocks of k and n, on each device
SCALES = TOKENS * K // 128 * 2
"""Elements of the largest array of scales, which do not count as traffic."""

AUTO = Mesh(np.array(jax.devices()).reshape(4, 2), ("d", "t"))
EXPLICIT = jax.make_mesh((4, 2), ("d", "t"))
MESHES = {"auto": AUTO, "explicit": EXPLICIT}
each_mesh = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


X, W, DY = normal(0, TOKENS, K), normal(1, K, N) / 16, normal(2, TOKENS, N)


@functools.cache
def expected():
    return oracle_gradients.dense(X, W, DY)


def per_example(x, w):
    """How Equinox models call a layer."""
    return jax.vmap(lambda x: jaxfp8.linear(x, w))(x)


FORMS = {"whole": jaxfp8.linear, "per example": per_example}
each_form = pytest.mark.parametrize("form", FORMS)


def ambient(mesh):
    return jax.set_mesh(mesh) if mesh is EXPLICIT else contextlib.nullcontext()


def opaque(f, mesh, shapes, shardings, out_shardings=None):
    """Compiled with opaque kernels; results are pinned on the automatic mesh, whose types say nothing."""
    return compile_opaque(
        f,
        *zip(shapes, shardings, strict=True),
        mesh=mesh if mesh is EXPLICIT else None,
        out_shardings=out_shardings if mesh is AUTO else None,
    )


def moves(compiled):
    return collectives(compiled.as_text(), SCALES)


def placed(mesh, specs, arrays=(X, W, DY)):
    return [
        jax.device_put(v, NamedSharding(mesh, P(*s))) for v, s in zip(arrays, specs, strict=True)
    ]


# ------------------------------------------------------------------------------------------------
# linear: x, w, y; devices that share the work; what moves in forward, dgrad and wgrad
# ------------------------------------------------------------------------------------------------

CASES = {
    "data": ((("d", None), (None, None), ("d", None)), 4, {"all-reduce f32": 1}),
    "column": (((None, None), (None, "t"), (None, "t")), 2, {"all-reduce f32": 1}),
    "row": (((None, "t"), ("t", None), (None, None)), 2, {"all-reduce f32": 1}),
    "data+column": ((("d", None), (None, "t"), ("d", "t")), 8, {"all-reduce f32": 2}),
    "data+row": ((("d", "t"), ("t", None), ("d", None)), 8, {"all-reduce f32": 2}),
    "fsdp out": (
        (("d", None), (None, "d"), ("d", None)),
        4,
        {"all-gather fp8": 2, "reduce-scatter f32": 1},
    ),
    "fsdp in": (
        (("d", None), ("d", None), ("d", None)),
        4,
        {"all-gather fp8": 2, "reduce-scatter f32": 1},
    ),
    "fsdp+column": (
        (("d", None), ("d", "t"), ("d", "t")),
        8,
        {"all-gather fp8": 2, "reduce-scatter f32": 1, "all-reduce f32": 1},
    ),
    "hybrid fsdp": (
        ((("d", "t"), None), ("t", None), (("d", "t"), None)),
        8,
        {"all-gather fp8": 2, "reduce-scatter f32": 1, "all-reduce f32": 1},
    ),
    "sequence row": (
        ((None, "t"), ("t", None), ("t", None)),
        2,
        {"all-gather fp8": 2, "reduce-scatter f32": 1},
    ),
}


def combinations(*, often):
    """(mesh, case, form); the per-example form of cases other than `often` is slow."""
    for mesh in MESHES:
        for case in CASES:
            for form in FORMS:
                # The type of a mapped product has no place for the axis that cuts its result.
                if (mesh, form) == ("explicit", "per example") and "sequence" in case:
                    continue
                slow = [pytest.mark.slow] if form == "per example" and case not in often else []
                yield pytest.param(mesh, case, form, marks=slow, id=f"{mesh}-{case}-{form}")


def case_of(mesh, case, form):
    """The mesh, the shardings of x, w and y, and the function, told its result's sharding if by type."""
    mesh = MESHES[mesh]
    shardings = [NamedSharding(mesh, P(*s)) for s in CASES[case][0]]
    f = FORMS[form]
    if mesh is EXPLICIT and form == "whole":
        f = functools.partial(jaxfp8.linear, out_sharding=shardings[2].spec)
    return mesh, shardings, train(f)


@pytest.mark.parametrize("mesh, case, form", [*combinations(often=("data", "data+row", "fsdp in"))])
@pytest.mark.representatives("mesh", "form", cases=6)
def test_work_divides_and_only_this_moves(mesh, case, form):
    mesh, (x, w, dy), run = case_of(mesh, case, form)
    _, devices, want = CASES[case]
    compiled = opaque(run, mesh, [(TOKENS, K), (K, N), (TOKENS, N)], (x, w, dy), (dy, x, w))
    assert multiply_adds(compiled.as_text()) * devices == 3 * TOKENS * K * N
    if (case, form) == ("sequence row", "per example"):
        # Shardy reshards dy before it is quantized, in float32 (0.10.2 by an all-to-all).
        assert set(moves(compiled)) <= {*want, "all-gather f32", "all-to-all f32"}
    else:
        assert moves(compiled) == want


@pytest.mark.parametrize("mesh, case, form", [*combinations(often=("data+row",))])
@pytest.mark.representatives("mesh", "form", cases=4)
def test_values_and_shardings(mesh, case, form):
    mesh, (x, w, dy), run = case_of(mesh, case, form)
    out = {"out_shardings": (dy, x, w)} if mesh is AUTO else {}
    with ambient(mesh):
        got = jax.jit(run, **out)(*placed(mesh, CASES[case][0]))
    for v, sharding in zip(got, (dy, x, w), strict=True):
        assert v.sharding.is_equivalent_to(sharding, 2)
    assert_close(got, expected(), TOLERANCE)


MIXED = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Explicit, AxisType.Auto))
CONTEXTS = {
    "set_mesh": (AUTO, AUTO, per_example),
    "spmd_axis_name": (
        AUTO,
        None,
        lambda x, w: jax.vmap(lambda x: jaxfp8.linear(x, w), spmd_axis_name="d")(x),
    ),
    "explicit types only": (EXPLICIT, None, per_example),
    "mixed axis types": (MIXED, MIXED, per_example),
}


@pytest.mark.parametrize("context", [*CONTEXTS, pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.representatives(cases=2)
def test_other_contexts(context):
    mesh, ambient_mesh, f = CONTEXTS.get(context, (AUTO, None, per_example))
    run = train(f) if context == "eager" else jax.jit(train(f))
    with contextlib.nullcontext() if ambient_mesh is None else jax.set_mesh(ambient_mesh):
        assert_close(run(*placed(mesh, (("d",), (), ("d",)))), expected(), TOLERANCE)


@each_mesh
def test_batch_and_sequence_stay_apart(mesh):
    """Batch over d, sequence over t: blocks do not straddle shards, so nothing but dw moves."""
    specs = ("d", "t", None), (None, None), ("d", "t", None)
    x, w, dy = (NamedSharding(mesh, P(*s)) for s in specs)
    shapes = (4, 256, K), (K, N), (4, 256, N)
    compiled = opaque(train(jaxfp8.linear), mesh, shapes, (x, w, dy), (dy, x, w))
    assert multiply_adds(compiled.as_text()) * 8 == 3 * 1024 * K * N
    assert moves(compiled) == {"all-reduce f32": 1}


@each_mesh
def test_one_expert_a_device_moves_nothing(mesh):
    """vmap over weights."""
    s = NamedSharding(mesh, P("d", None, None))
    shapes = (4, 512, K), (4, K, N), (4, 512, N)
    compiled = opaque(train(jax.vmap(jaxfp8.linear)), mesh, shapes, (s, s, s), (s, s, s))
    assert multiply_adds(compiled.as_text()) * 4 == 3 * 4 * 512 * K * N
    assert moves(compiled) == {}


@each_mesh
@pytest.mark.parametrize("k, n", [(384, 384), (128, 128), (200, 72)])
@pytest.mark.representatives("mesh")
def test_shards_that_cut_a_block_are_gathered(mesh, k, n):
    """Three blocks over two devices, one block over two, no whole block at all."""
    arrays = X[:256, :k], W[:k, :n], DY[:256, :n]
    with ambient(mesh):
        got = jax.jit(train(jaxfp8.linear))(*placed(mesh, (("d", "t"), ("t",), ("d",)), arrays))
    assert_close(got, oracle_gradients.dense(*arrays), TOLERANCE)


# ------------------------------------------------------------------------------------------------
# dot_general and einsum: the same product under other dimension numbers
# ------------------------------------------------------------------------------------------------


@each_mesh
def test_einsum_of_attention_heads_over_devices(mesh):
    """Batch over d, heads over t: forward and dgrad as data+column, one head's columns a device."""
    specs = ("d", None, None), (None, "t", None), ("d", None, "t", None)
    x, w, dy = normal(3, 4, 128, 256), normal(4, 256, 2, 128) / 16, normal(5, 4, 128, 2, 128)

    def f(x, w):
        return jaxfp8.einsum("btd,dhk->bthk", x, w)

    with ambient(mesh):
        got = jax.jit(train(f))(*placed(mesh, specs, (x, w, dy)))
    y, dx, dw = oracle_gradients.dense(
        x.reshape(512, 256), w.reshape(256, 256), dy.reshape(512, 256)
    )
    want = y.reshape(dy.shape), dx.reshape(x.shape), dw.reshape(w.shape)
    assert_close(got, want, TOLERANCE)


@each_mesh
def test_dot_general_keeps_its_batch_where_it_lives(mesh):
    s = NamedSharding(mesh, P("d"))

    def f(x, w):
        return jaxfp8.dot_general(x, w, (((2,), (1,)), ((0,), (0,))))

    shapes = (4, 256, K), (4, K, N), (4, 256, N)
    compiled = opaque(train(f), mesh, shapes, (s, s, s), (s, s, s))
    assert multiply_adds(compiled.as_text()) * 4 == 3 * 4 * 256 * K * N
    assert moves(compiled) == {}


# ------------------------------------------------------------------------------------------------
# Quantizers and accumulators
# ------------------------------------------------------------------------------------------------

QUANTIZERS = {
    "quantize": (jaxfp8.quantize, [("d", "t")]),
    "quantize blocks": (functools.partial(jaxfp8.quantize, block=(128, 128)), [("d", "t")]),
    "quantize_both": (jaxfp8.quantize_both, [("d", "t"), ("t", "d")]),
    "quantize_weight": (jaxfp8.quantize_weight, [("t", "d"), ("d", "t")]),
}
each_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@each_mesh
@each_quantizer
@pytest.mark.representatives("mesh", "name")
def test_quantizers_keep_shards_of_whole_blocks(mesh, name):
    f, specs = QUANTIZERS[name]
    shape = (
        1024,
        1024,
    )  # blocks for all devices: else square blocks' scales, a 4096th, are everywhere
    compiled = opaque(f, mesh, [shape], [NamedSharding(mesh, P("d", "t"))])
    assert collectives(compiled.as_text()) == {}
    want = [NamedSharding(mesh, P(*s)) for s in specs for _ in ("data", "scale")]
    for sharding, w in zip(jax.tree.leaves(compiled.output_shardings), want, strict=True):
        assert sharding.is_equivalent_to(w, 2)


@each_mesh
@each_quantizer
@pytest.mark.representatives("mesh", "name")
def test_quantizers_of_shards_have_the_bits_of_the_whole(mesh, name):
    """Shards of whole blocks, and shards that cut them."""
    f, _ = QUANTIZERS[name]
    arrays = X[:512, :256], X[:96, :200]
    want = [f(v) for v in arrays]
    with ambient(mesh):
        got = jax.jit(lambda a, b: (f(a), f(b)))(*placed(mesh, [("d", "t")] * 2, arrays))
    assert_same_bits(got, want)


def test_a_sharded_weight_wanted_whole_moves_as_fp8():
    s = NamedSharding(AUTO, P("d"))
    whole = NamedSharding(AUTO, P())
    compiled = opaque(lambda w: jaxfp8.quantize_weight(w)[0].data, AUTO, [(K, N)], [s], whole)
    assert moves(compiled) == {"all-gather fp8": 1}


ACCUMULATORS = {
    "replicated": (),
    "over rows": ("t", None),
    "over columns": (None, "t"),
    "over the contraction's axis": ("d", None),
}


@each_mesh
@pytest.mark.parametrize("spec", ACCUMULATORS.values(), ids=ACCUMULATORS)
@pytest.mark.parametrize("name", ["gemm", "wgrad_gemm"])
@pytest.mark.representatives("mesh", "spec", "name")
def test_a_sharded_contraction_adds_its_accumulator_once(mesh, spec, name):
    f = getattr(jaxfp8, name)
    lhs = jaxfp8.quantize(normal(6, 256, 512))
    rhs = jaxfp8.quantize(normal(7, 128, 512))
    accum = 100 * normal(8, 256, 128)
    cut = NamedSharding(mesh, P(None, "d"))
    sharding = NamedSharding(mesh, P(*spec))
    with ambient(mesh):
        operands = jax.device_put((lhs, rhs), cut)
        step = jax.jit(
            lambda c, lhs, rhs: f(lhs, rhs, accum=c),
            donate_argnums=0,
            **({"out_shardings": sharding} if mesh is AUTO else {}),
        )
        got = step(jax.device_put(accum, sharding), *operands)
    assert_close(got, accum + oracle.gemm(lhs, rhs), TOLERANCE)


@each_mesh
@pytest.mark.parametrize("mapped", [True, False], ids=["an accumulator each", "one for all"])
@pytest.mark.representatives("mesh", "mapped")
def test_a_sharded_contraction_under_vmap_adds_its_accumulator_once(mesh, mapped):
    lhs = jaxfp8.quantize(normal(6, 2, 256, 512))
    rhs = jaxfp8.quantize(normal(7, 128, 512))
    accum = 100 * normal(8, *((2,) if mapped else ()), 256, 128)
    f = jax.vmap(lambda a, b, c: jaxfp8.wgrad_gemm(a, b, accum=c), (0, None, 0 if mapped else None))
    with ambient(mesh):
        a = jax.device_put(lhs, NamedSharding(mesh, P(None, None, "d")))
        b = jax.device_put(rhs, NamedSharding(mesh, P(None, "d")))
        got = jax.jit(f)(a, b, jax.device_put(accum, NamedSharding(mesh, P())))
    assert_close(got, accum + oracle.gemm(lhs, rhs), TOLERANCE)


# ------------------------------------------------------------------------------------------------
# shard_map
# ------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("check_vma", [True, False])
@each_mesh
@pytest.mark.representatives("mesh", "check_vma", "form")
def test_shard_map(mesh, check_vma, form):
    """Data and columns; the gradient of what does not vary is summed."""
    f = jax.shard_map(
        FORMS[form],
        mesh=mesh,
        in_specs=(P("d"), P(None, "t")),
        out_specs=P("d", "t"),
        check_vma=check_vma,
    )
    with ambient(mesh):
        arrays = placed(mesh, (("d",), (None, "t"), ("d", "t")))
        assert largest(jax.make_jaxpr(train(f))(*arrays)) <= 4 * TOKENS * max(
            K, N
        )  # residuals: each device's
        assert_close(jax.jit(train(f))(*arrays), expected(), TOLERANCE)


@each_form
@each_mesh
@pytest.mark.representatives("mesh", "form")
def test_grad_inside_shard_map(mesh, form):
    """w does not vary: its gradient is summed by the type system."""
    out = P("d"), P("d"), P()
    f = jax.shard_map(train(FORMS[form]), mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=out)
    with ambient(mesh):
        assert_close(jax.jit(f)(*placed(mesh, (("d",), (), ("d",)))), expected(), TOLERANCE)


@each_form
@each_mesh
@pytest.mark.representatives("mesh", "form")
def test_partially_manual(mesh, form):
    """Manual over d; t is left to the compiler, which replicates, or to the types, which divide."""
    f = jax.shard_map(
        train(FORMS[form]),
        mesh=mesh,
        in_specs=(P("d"), P(), P("d")),
        out_specs=(P("d"), P("d"), P()),
        axis_names={"d"},
    )
    specs = ("d", None), (None, "t"), ("d", "t")
    with ambient(mesh):
        assert_close(jax.jit(f)(*placed(mesh, specs)), expected(), TOLERANCE)
    shardings = [NamedSharding(mesh, P(*s)) for s in specs]
    compiled = opaque(f, mesh, [(TOKENS, K), (K, N), (TOKENS, N)], shardings)
    devices = 8 if mesh is EXPLICIT else 4
    assert multiply_adds(compiled.as_text()) * devices == 3 * TOKENS * K * N


# ------------------------------------------------------------------------------------------------
# ragged_dot
# ------------------------------------------------------------------------------------------------

SIZES = np.array([60, 0, 130, 40], np.int32)
ROWS, EXPERTS, DROWS = normal(9, 256, 512), normal(10, 4, 512, 256) / 16, normal(11, 256, 256)

RAGGED = {
    "column": ((None, None), (None, None, "t"), (None, "t")),
    "row": ((None, "t"), (None, "t", None), (None, None)),
    "data (gathered)": (("d", None), (None, None, None), ("d", None)),
    "fsdp": ((None, None), (None, "d", None), (None, None)),
}


def experts(x, w):
    return jaxfp8.ragged_dot(x, w, SIZES)


@each_mesh
@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.representatives("mesh")
def test_ragged_dot_values(case, mesh):
    x, w, dy = RAGGED[case]
    if mesh is EXPLICIT and case == "data (gathered)":
        dy = (None, None)  # the type of the result
    with ambient(mesh):
        got = jax.jit(train(experts))(*placed(mesh, (x, w, dy), (ROWS, EXPERTS, DROWS)))
    assert_close(got, oracle_gradients.ragged(ROWS, EXPERTS, DROWS, SIZES), TOLERANCE)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.representatives()
def test_ragged_dot_in_shard_map(check_vma):
    """Data-parallel experts: each shard has its own rows and group sizes, the experts are shared."""
    sizes = np.array([[20, 10, 15, 14], [0, 64, 0, 0], [5, 5, 5, 5], [1, 2, 3, 4]], np.int32)
    f = jax.shard_map(
        lambda x, w, s: jaxfp8.ragged_dot(x, w, s[0]),
        mesh=AUTO,
        in_specs=(P("d"), P(), P("d")),
        out_specs=P("d"),
        check_vma=check_vma,
    )
    got = jax.jit(train(lambda x, w: f(x, w, sizes)))(ROWS, EXPERTS, DROWS)
    shards = zip(ROWS.reshape(4, 64, 512), DROWS.reshape(4, 64, 256), sizes, strict=True)
    parts = [oracle_gradients.ragged(x, EXPERTS, dy, s) for x, dy, s in shards]
    want = [np.concatenate([p[i] for p in parts]) for i in (0, 1)] + [sum(p[2] for p in parts)]
    assert_close(got, want, TOLERANCE)


# ------------------------------------------------------------------------------------------------
# Export and the persistent cache
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["explicit", "shard_map", "auto"])
def test_export_for_eight_gpus(kind, monkeypatch):
    """From a machine without one. Automatic partitioning is JAX's limit: it holds a Python callback."""
    monkeypatch.setattr("jaxfp8._ffi.require_cuda_kernels", lambda operation: None)  # never run
    mesh = EXPLICIT if kind == "explicit" else AUTO
    f = train(jaxfp8.linear)
    if kind == "shard_map":
        out = P("d"), P("d"), P()
        f = jax.shard_map(f, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=out)
    names = {n.removesuffix("_leaf") + "_v1" for n in LEAVES}
    checks = [export.DisabledSafetyCheck.custom_call(n) for n in names]
    with ambient(mesh):
        arguments = [
            jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, P(*p)))
            for s, p in (((TOKENS, K), ("d",)), ((K, N), ()), ((TOKENS, N), ("d",)))
        ]
        exporter = export.export(jax.jit(f), platforms=["cuda"], disabled_checks=checks)
        if kind == "auto":
            with pytest.raises(Exception, match="(?i)custom_partitioning|custom.?call|serializ"):
                exporter(*arguments).serialize()
            return
        exported = exporter(*arguments)
    assert exported.nr_devices == 8
    calls = re.findall(r"custom_call @(jaxfp8_\w+)", exported.mlir_module())
    assert sum("gemm" in c for c in calls) == 3


CACHED = """
import sys
import jax, jaxfp8, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit('/', 1)[-1]))
kind = sys.argv[1]
types = (AxisType.Auto if kind in ('auto', 'shard_map') else AxisType.Explicit,)
mesh = jax.make_mesh((8,), ('d',), axis_types=types)
f = lambda x, w: jax.grad(lambda w: (jaxfp8.linear(x, w) ** 2).mean())(w)
if kind == 'shard_map':
    f = jax.shard_map(f, mesh=mesh, in_specs=(P('d'), P()), out_specs=P())
x, w = np.ones((1024, 128), np.float32), np.ones((128, 128), np.float32)
if kind != 'one':
    jax.set_mesh(mesh)
    x = jax.device_put(x, NamedSharding(mesh, P('d')))
    w = jax.device_put(w, NamedSharding(mesh, P()))
events.clear()
jax.jit(f)(x, w)
print('hits', events.count('cache_hits'))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, hit", [("one", True), ("explicit", True), ("shard_map", True), ("auto", False)]
)
def test_persistent_cache(kind, hit, tmp_path):
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", CACHED, kind]
    for _ in range(2):
        out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr[-2000:]
    assert ("hits 1" in out.stdout) == hit, out.stdout
