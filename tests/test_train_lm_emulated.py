"""examples/train_lm.py with the kernels: its train step on the emulated platform against the portable lowering."""

import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxfp8 import _ffi
from tests.emulated_platform import emulated_platform

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import _lm_products  # noqa: E402
import _lm_training  # noqa: E402
import train_lm  # noqa: E402

STEPS = 3
# Bytes enough for their mean loss to hold still: on the portable lowering alone, weights that differ by 3e-7 change
# that of 128 bytes by 4e-5 after three steps (root mean square of six texts), that of 32 by 1e-4.
BATCH = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


def losses(flags):
    """Of each of three steps on the same windows, and after the last."""
    settings, _ = train_lm.parse_arguments(["--tiny", "--batch", str(BATCH), *flags])
    run = _lm_training.Run("fp8", _lm_products.fp8_products(settings.recipe), settings)
    shape = BATCH, settings.sequence + 1
    windows = np.random.default_rng(0).integers(0, 256, shape, np.int32)
    step, state, found = jax.jit(run._step), run.state, []
    for _ in range(STEPS):
        state, entropy = step(state, windows)
        found.append(float(entropy))
    return [*found, float(jax.jit(run._evaluate)(state, windows[None]))]


@pytest.mark.parametrize("flags", [[], ["--moe"]], ids=["dense", "mixture"])
def test_the_tiny_models_train_on_the_kernels_as_on_the_portable_lowering(flags):
    portable = losses(flags)
    with emulated_platform(num_sms=2) as driver:
        emulated = losses(flags)
    kernels = {launch.kernel.split("_")[0] for launch in driver.launches}
    assert kernels == {"quantize", "gemm", "activation"}
    np.testing.assert_allclose(emulated, portable, rtol=1e-4)
    assert portable[-1] < portable[0] - 0.1  # it learns: the states differ from step to step
