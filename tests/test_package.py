"""The package as a program meets it: import, names, version."""

import subprocess
import sys
from importlib import metadata

import pytest

import jaxfp8


def run(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_public_name_loads():
    for name in jaxfp8.__all__:
        assert getattr(jaxfp8, name) is not None, name
    assert set(jaxfp8.__all__) == set(dir(jaxfp8))
    with pytest.raises(AttributeError, match="nothing"):
        _ = jaxfp8.nothing


def test_the_version_is_the_distributions():
    assert jaxfp8.__version__ == metadata.version("jaxfp8")


def test_import_starts_no_backend_and_loads_neither_cuda_nor_the_operations():
    program = (
        "import sys, jaxfp8\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "assert not any('libcuda' in line for line in open('/proc/self/maps'))\n"
        "print([m for m in sys.modules if m.startswith('jaxfp8.')])"
    )
    assert "jaxfp8.kernels" not in run(program)


@pytest.mark.full
def test_import_star_gives_the_public_names():
    assert run("from jaxfp8 import *; print(linear.__name__, Recipe())") == "linear Recipe()\n"
