"""Eight CPU devices for every test, set before JAX starts."""

import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


def pytest_collection_modifyitems(items):
    """Coverage pauses where kernels are executed: they are no Python, and a tracer doubles the emulator's time."""
    for item in items:
        if item.get_closest_marker("emulated") or item.get_closest_marker("emulator"):
            item.add_marker("no_cover")


@pytest.fixture(scope="module")
def quick_compilation():
    """For many small programs: spend less in LLVM. XLA's own passes stay on."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
