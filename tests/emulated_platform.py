"""The emulated platform: `jax.jit` on the CPU runs the handlers, the plans and the kernels' PTX.

`emulated_driver` serves custom calls that a test makes itself; `emulated` makes jaxfp8's own
operations lower to them.
"""

import contextlib

import pytest

from jaxfp8 import _ffi
from tests.emulator.driver import EmulatedDriver
from tests.leaf_lowering import leaves_lower_to


@contextlib.contextmanager
def emulated_platform(**options):
    """An installed `EmulatedDriver(**options)`, to which jaxfp8's operations lower on the CPU.

    An error of a kernel that the block did not take (`driver.take_errors`) is raised at its end:
    XLA may have reported it to nobody.
    """
    _ffi.register_cpu_targets()
    driver = EmulatedDriver(_ffi.image_directory(), **options)
    with driver, leaves_lower_to(lambda name, leaf: leaf.lower_custom_call):
        yield driver
    for error in driver.take_errors():
        raise error


def _skip_without_ptx():
    if not any(_ffi.image_directory().glob("*.ptx")):
        pytest.skip("this jaxfp8 has no kernels, or not their PTX: pip install -e .")


@pytest.fixture
def emulated_driver():
    """An EmulatedDriver for custom calls that the test makes itself."""
    _skip_without_ptx()
    _ffi.register_cpu_targets()
    with EmulatedDriver(_ffi.image_directory()) as driver:
        yield driver
    for error in driver.take_errors():
        raise error


@pytest.fixture
def emulated():
    """The platform, with two multiprocessors; yields its EmulatedDriver."""
    _skip_without_ptx()
    with emulated_platform() as driver:
        yield driver
