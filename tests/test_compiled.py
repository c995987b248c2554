"""What XLA makes of our programs on one H200 and on many: compiled for them here, read, not run."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

pytest.importorskip("jax_plugins.xla_cuda13", reason="pip install -e '.[compiled]'")

import jaxfp8
from jaxfp8 import _ffi, checkpoint_policies
from tests import compiled, compiled_programs, fsdp_table

pytestmark = pytest.mark.compiled

POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "fp8": checkpoint_policies.save_fp8_residuals(),
    "dots and fp8": checkpoint_policies.save_dots_and_fp8_residuals(),
}


def assert_each_call_runs_once(function, args):
    """Under XLA's default flags, whatever is kept for the backward pass."""
    expected = compiled.expected_calls(function.trace(*args).jaxpr)
    program = compiled.compile_for(function, *args)
    assert program.calls() == expected
    assert expected
    return program


# ------------------------------------------------------------------------------------------------
# One GPU: no call twice
# ------------------------------------------------------------------------------------------------

FORMS = [
    *((products, "none", True) for products in ("linear", "mlp", "autocast")),
    *(("mlp", policy, True) for policy in POLICIES if policy != "none"),
    *((products, "full", True) for products in ("linear", "autocast")),
    ("mlp", "none", False),
]


@pytest.mark.parametrize("products, policy, scan", FORMS)
def test_a_training_step_runs_each_call_once(products, policy, scan):
    mesh = compiled.mesh({"data": 1})
    function, args = compiled_programs.replicated(
        products, mesh, policy=POLICIES[policy], scan=scan
    )
    assert_each_call_runs_once(function, args)


# ------------------------------------------------------------------------------------------------
# One GPU: an accumulator is the result's buffer
# ------------------------------------------------------------------------------------------------


def accumulate(lhs, rhs, accum):
    block = (1, 128)
    lhs, rhs = (jaxfp8.QuantizedArray(data, scale, block) for data, scale in (lhs, rhs))
    return jaxfp8.wgrad_gemm(lhs, rhs, accum=accum)


def carried(stack, lhs, rhs):
    return lax.scan(lambda c, data: (accumulate((data, lhs[1]), rhs, c), None), stack[0], lhs[0])[0]


def stacked(stack, lhs, rhs):
    return lax.scan(
        lambda _, a: (None, accumulate((a[1], lhs[1]), rhs, a[0])), None, (stack, lhs[0])
    )[1]


def set_in_place(stack, lhs, rhs):
    def step(stack, i):
        return stack.at[i].set(accumulate((lhs[0][i], lhs[1]), rhs, stack[i])), None

    return lax.scan(step, stack, jnp.arange(len(stack)))[0]


ACCUMULATORS = {
    "a slice": lambda stack, lhs, rhs: accumulate((lhs[0][1], lhs[1]), rhs, stack[2]),
    "the carry": carried,
    "a stack": stacked,
    "a stack, set in place": set_in_place,
}


@pytest.mark.parametrize("accumulators", ACCUMULATORS)
def test_no_fusion_takes_an_accumulating_call(accumulators):
    """In one, the call keeps its alias and the fusion has none: accum and out are different buffers."""
    where = jax.NamedSharding(compiled.mesh({"data": 1}), jax.P())
    shapes = {"stack": (4, 512, 512), "lhs": (4, 512, 1024), "rhs": (512, 1024), "scale": (512, 8)}
    fp8 = jnp.float8_e4m3fn
    array = lambda name, dtype: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=where)  # noqa: E731
    scale = array("scale", jnp.float32)
    args = array("stack", jnp.float32), (array("lhs", fp8), scale), (array("rhs", fp8), scale)
    for donated in ((), (0,)):
        function = jax.jit(ACCUMULATORS[accumulators], donate_argnums=donated)
        program = compiled.compile_for(function, *args)
        name = _ffi.target("gemm_1d1d_accum")
        scheduled = [i for _, _, body in program.scheduled() for i in body if name in i.attributes]
        everywhere = [
            i for body in program.computations.values() for i in body if name in i.attributes
        ]
        assert len(scheduled) == len(everywhere) > 0
        assert all("output_to_operand_aliasing={{}: (4, {})}" in i.attributes for i in scheduled)


# ------------------------------------------------------------------------------------------------
# Experts over many GPUs: what moves, and beside what
# ------------------------------------------------------------------------------------------------


def mixture_step(mesh, tokens, *, experts, width=1024, hidden=512, chunks=1, **options):
    """Loss and all gradients of a mixture of `experts` a device, top 8, of `tokens` a device."""
    axes = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
    choices = 8

    def send(x, expert):
        return jaxfp8.dispatch(x, expert, experts * mesh.size, axis_name=axes, **options)

    def layer(x, expert, gate, up, down):
        xs, choices, gates = (jnp.split(v, chunks) for v in (x, expert, gate))
        there, back, sums = send(xs[0], choices[0]), None, []
        for i in range(chunks):
            rows, sizes, route = there
            there = send(xs[i + 1], choices[i + 1]) if i + 1 < chunks else None
            y = jaxfp8.ragged_mlp(rows, up, down, sizes)
            total = jaxfp8.combine(*back) if back else None
            if chunks > 1:
                there, y, total = lax.optimization_barrier((there, y, total))
            sums, back = [*sums, total], (y, gates[i], route)
        return jnp.concatenate([*sums[1:], jaxfp8.combine(*back)])

    spec = P(mesh.axis_names)
    f = jax.shard_map(layer, mesh=mesh, in_specs=spec, out_specs=spec)

    def run(x, expert, gate, up, down):
        def loss(x, gate, up, down):
            return jnp.square(f(x, expert, gate, up, down).astype(jnp.float32)).sum()

        return jax.value_and_grad(loss, (0, 1, 2, 3))(x, gate, up, down)

    def of(dtype, rows, *shape):
        where = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct((rows * mesh.size, *shape), dtype, sharding=where)

    args = (
        of(jnp.bfloat16, tokens, width),
        of(jnp.int32, tokens, choices),
        of(jnp.float32, tokens, choices),
        of(jnp.bfloat16, experts, width, 2, hidden),
        of(jnp.bfloat16, experts, hidden, width),
    )
    return jax.jit(run), args


EXCHANGES = {  # mesh, hosts, options, tokens that a device receives of T = 256 a device; in one pass
    "2": ({"gpu": 2}, 1, {}, 256),
    "8": ({"gpu": 8}, 1, {}, 7 * 256),
    "8, blocks": ({"gpu": 8}, 1, {"max_sent": 128}, 7 * 128),
    "8x8": ({"node": 8, "gpu": 8}, 8, {"max_rows": 4096}, (7 + 7 * 8) * 256),
    "8x8, blocks": ({"node": 8, "gpu": 8}, 8, {"max_sent": 128, "max_rows": 4096}, (7 + 7 * 8) * 128),
}  # fmt: skip


@pytest.mark.parametrize("case", EXCHANGES)
def test_an_exchange_moves_what_the_guide_says_and_by_no_ragged_collective(case):
    """docs/scaling.md: K + K/32 + 4k bytes there and 2K back, in each pass; gates there, and their gradient back."""
    shape, hosts, options, received = EXCHANGES[case]
    mesh = compiled.mesh(shape, hosts)
    function, args = mixture_step(mesh, 256, experts=2, **options)
    moved = compiled.compile_for(function, *args).collectives()
    kinds = {c.kind for c in moved if c.moved > 1024}  # but for the loss, and counts
    assert kinds == {"all-to-all"} | ({"all-gather"} if case != "8, blocks" else set())
    width, choices = 1024, 8
    by_dtype = collections.Counter()
    for c in moved:
        for a in c.arrays if c.kind in kinds else ():
            by_dtype[a.dtype] += a.bytes * (c.devices - 1) // c.devices
    assert by_dtype.pop("u8") == received * 2 * width
    assert by_dtype.pop("bf16") == received * 2 * 2 * width
    assert by_dtype.total() == received * (2 * 4 * width // 128 + 3 * 4 * choices)


def test_an_axis_of_one_device_moves_nothing():
    function, args = mixture_step(compiled.mesh({"gpu": 1}), 256, experts=8)
    assert compiled.compile_for(function, *args).collectives() == []


def test_in_chunks_every_exchange_but_the_first_and_last_stands_beside_a_product():
    """docs/scaling.md's pattern, forward and backward: FP8 rows there and bfloat16 sums back."""
    mesh = compiled.mesh({"gpu": 8})
    function, args = mixture_step(
        mesh, 8192, experts=4, width=4096, hidden=2048, chunks=4, max_rows=20480
    )
    moved = compiled.compile_for(function, *args).collectives()
    exchanged = [c for c in moved if c.arrays[0].dtype in ("u8", "bf16")]
    assert len(exchanged) == 16
    for forward in (exchanged[:8], exchanged[8:]):
        assert all(c.products for c in forward[1:-1]), [
            (str(c.arrays[0]), c.beside) for c in forward
        ]


# ------------------------------------------------------------------------------------------------
# Many GPUs: what moves, and how wide
# ------------------------------------------------------------------------------------------------

A_PARAMETER = {"automatic": 4, "explicit": 4, "shard_map": 3}
"""Bytes: by hand without remat a weight is gathered once, and kept."""


@functools.cache
def fsdp_program(products, form, devices):
    with fsdp_table.recipe():
        function, args = fsdp_table.fsdp_step(products, form, devices)
        expected = compiled.expected_calls(function.trace(*args).jaxpr)
        return compiled.compile_for(function, *args), expected


@pytest.mark.parametrize("devices", fsdp_table.MESHES)
@pytest.mark.parametrize("form", fsdp_table.FORMS)
@pytest.mark.parametrize("products", ["linear", "mlp"])
def test_fsdp_gathers_weights_in_fp8_and_sums_gradients_in_bfloat16(products, form, devices):
    """Two gathers of a byte and a sum of two: 4 bytes a parameter, where BF16 moves 6. Each call runs once."""
    program, expected = fsdp_program(products, form, devices)
    for c in program.collectives():
        for a in c.arrays:
            small = a.bytes < 1 << 20  # scales, their maxima, the loss
            wide = c.kind == "all-gather" and a.dtype not in ("f8e4m3fn", "u8", "s8")
            assert small or not wide, (c.kind, str(a))
            assert small or c.kind != "reduce-scatter" or a.dtype == "bf16", str(a)
    assert fsdp_table.bytes_a_parameter(program) == pytest.approx(A_PARAMETER[form], abs=0.05)
    if devices == "64":  # half blocks: quantized by XLA's operations
        expected.pop(_ffi.target("quantize_weight"), None)
    assert program.calls() == expected


def test_what_is_gathered_wider_than_fp8_is_named():
    """Part of a weight (D, 2F) that is cut on its columns, in bfloat16, for `mlp`'s (D, 2, F); nothing if cut on D."""
    mesh = compiled.mesh({"data": 8})

    def array(spec, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))

    def run(x, up, down):
        return jaxfp8.mlp(x, up.reshape(1024, 2, 1024), down)

    def wide(up):
        args = array(P("data"), 8192, 1024), up, array(P("data"), 1024, 1024)
        out = jax.NamedSharding(mesh, P("data"))
        return compiled.compile_for(jax.jit(run, out_shardings=out), *args).wide_gathers()

    assert wide(array(P("data"), 1024, 2048)) == []
    found = wide(array(P(None, "data"), 1024, 2048))
    assert [(a.dtype, scope) for a, scope in found] == [("bf16", "jit(run)/reshape")]


def test_bf16_moves_six_bytes_a_parameter():
    program, _ = fsdp_program("bf16", "automatic", "64")
    assert fsdp_table.bytes_a_parameter(program) == pytest.approx(6, abs=0.05)


def test_four_fifths_of_the_bytes_in_loops_hide_across_hosts_with_options():
    """benchmarks/NOTES.md: which options, and what each road gave."""
    with fsdp_table.recipe():
        function, args = fsdp_table.fsdp_step("mlp", "automatic", "64")
        program = compiled.compile_for(function, *args, **fsdp_table.HIDING)
    assert fsdp_table.hidden_share(program) >= 0.8
    assert fsdp_table.bytes_a_parameter(program) == pytest.approx(4, abs=0.05)
