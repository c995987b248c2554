"""Eight CPU devices and quick compilation for every test and the processes it starts, set before JAX starts."""

import gc
import os

import pytest

from tests.optimization import QUICK_FLAGS
from tests.representatives import mark_the_rest


def pytest_configure(config):
    if hasattr(config, "workerinput") and config.pluginmanager.hasplugin("hypothesispytest"):
        # Else its plugin imports it as a worker ends, whom execnet interrupts after 5 s, with a traceback.
        import hypothesis  # noqa: F401
    flags = "--xla_force_host_platform_device_count=8"
    if config.option.markexpr != "gpu":  # there XLA compiles as for a user
        flags += f" {QUICK_FLAGS}"
    os.environ.setdefault("XLA_FLAGS", flags)


def pytest_sessionfinish(session):
    """A worker has 5 s to end. pytest collects garbage twice then, which takes longer over all that JAX holds."""
    if hasattr(session.config, "workerinput"):
        gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items):
    """Cases that the default suite leaves out are marked; coverage pauses where kernels are executed.

    These are no Python, and a tracer doubles the emulator's time.
    """
    mark_the_rest(items)
    for item in items:
        if item.get_closest_marker("emulated") or item.get_closest_marker("emulator"):
            item.add_marker("no_cover")
