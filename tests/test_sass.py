"""The machine code of every GEMM kernel keeps the bounds of tools/gemm_sass.py."""

import functools

import pytest

from jaxfp8 import _ffi
from tests.emulator import module
from tools import gemm_sass
from tools.sass.disassembly import AuditError

IMAGES = [image for image in _ffi.images() if image.startswith("gemm_")]

pytestmark = pytest.mark.skipif(not IMAGES, reason="this build of jaxfp8 holds no kernels")


@functools.cache
def reports(image):
    """Of an image's kernels, disassembled once."""
    try:
        return gemm_sass.audit(_ffi.image_directory() / f"{image}.cubin", liveness=False)
    except AuditError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.representatives()
def test_every_gemm_kernel_keeps_its_rows(image):
    """One test an image, so that one process alone disassembles it."""
    assert len(reports(image)) >= 14
    assert gemm_sass.failures(reports(image)) == []


def test_every_row_is_of_a_kernel_that_exists():
    names = [
        kernel
        for image in IMAGES
        for kernel in module(_ffi.image_directory() / f"{image}.ptx").entries
    ]
    for kernel in gemm_sass.REQUIRED:
        assert any(name.startswith(kernel) for name in names), kernel
