"""Memory of the portable ragged products does not grow with groups times tokens."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxfp8
from tests.optimization import OPTIMIZED

M, K, N, G = 8192, 512, 512, 64

PEAK = f"""
import resource, jax, jax.numpy as jnp, numpy as np, jaxfp8
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x, w = np.ones(({M}, {K}), np.float32), np.ones(({G}, {K}, {N}), np.float32)
sizes = np.full({G}, {M} // {G}, np.int32)
x, w, sizes = jax.block_until_ready(jax.device_put((x, w, sizes)))
run = jax.jit(jaxfp8.ragged_dot).lower(x, w, sizes).compile()
before = rss()
jax.block_until_ready(run(x, w, sizes))
print(rss() - before)
"""


def test_ragged_dot_needs_at_most_three_times_its_inputs_and_outputs():
    """As XLA plans it: arguments, results and temporaries of the compiled program."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((M, K), (G, K, N))]
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
    lowered = jax.jit(jaxfp8.ragged_dot).lower(*shapes, sizes)
    memory = lowered.compile(OPTIMIZED).memory_analysis()
    ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert ends == 4 * (M * K + G * K * N + M * N + G)
    assert ends + memory.temp_size_in_bytes <= 3 * ends


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kibibytes on Linux only")
@pytest.mark.full
def test_ragged_dot_grows_the_process_by_at_most_twice_its_inputs_and_outputs():
    """As the operating system sees it: what the call adds to inputs that are there already."""
    grown = subprocess.run(
        [sys.executable, "-c", PEAK],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(grown.stdout) <= 2 * 4 * (M * K + G * K * N + M * N)


@pytest.mark.full
def test_the_gradient_stays_within_the_same_bound_per_product():
    """Three products and their residuals: no array of (groups, tokens, anything)."""

    def loss(x, w, sizes):
        return jaxfp8.ragged_dot(x, w, sizes).sum()

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((M, K), (G, K, N))]
    sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, sizes)
    memory = lowered.compile(OPTIMIZED).memory_analysis()
    ends = 4 * (M * K + G * K * N + M * N)
    assert memory.temp_size_in_bytes <= 3 * 2 * ends
