"""Eight CPU devices and quick compilation for every test and the processes it starts, set before JAX starts."""

import os

from tests.optimization import QUICK_FLAGS


def pytest_configure(config):
    flags = "--xla_force_host_platform_device_count=8"
    if config.option.markexpr != "gpu":  # there XLA compiles as for a user
        flags += f" {QUICK_FLAGS}"
    os.environ.setdefault("XLA_FLAGS", flags)


def pytest_collection_modifyitems(items):
    """Coverage pauses where kernels are executed: they are no Python, and a tracer doubles the emulator's time."""
    for item in items:
        if item.get_closest_marker("emulated") or item.get_closest_marker("emulator"):
            item.add_marker("no_cover")
