"""What XLA makes of our programs on one H200 and on many: compiled for them here, read, not run."""

import jax
import pytest

pytest.importorskip("jax_plugins.xla_cuda13", reason="pip install -e '.[compiled]'")

from jaxfp8 import checkpoint_policies
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
