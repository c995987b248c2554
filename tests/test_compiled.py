"""What XLA makes of our programs on one H200 and on many: compiled for them here, read, not run."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

pytest.importorskip("jax_plugins.xla_cuda13", reason="pip install -e '.[compiled]'")

import jaxfp8
from jaxfp8 import _ffi, checkpoint_policies
from tests import compiled, compiled_programs

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
