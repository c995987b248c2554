"""The machine code of every GEMM kernel keeps the bounds of benchmarks/gemm_sass.py."""

import functools

import pytest

from benchmarks import gemm_sass, sass_audit
from jaxfp8 import _ffi
from tests.emulator import module

IMAGES = [image for image in _ffi.images() if image.startswith("gemm_")]

pytestmark = pytest.mark.skipif(not IMAGES, reason="this build of jaxfp8 holds no kernels")


@functools.cache
def reports(image):
    """Of an image's kernels, disassembled once."""
    try:
        return gemm_sass.audit(_ffi.image_directory() / f"{image}.cubin", liveness=False)
    except sass_audit.AuditError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("image", IMAGES)
def test_every_gemm_kernel_keeps_its_rows(image):
    """One test an image, so that one process alone disassembles it. A row that misses is really missed."""
    assert len(reports(image)) >= 14
    assert gemm_sass.failures(reports(image)) == []
    family = image.rpartition("_")[0]  # gemm_1d2d of gemm_1d2d_bf16
    for (start, row), (own, _) in gemm_sass.MISSED.items():
        if start.startswith(family):
            kernels = [r for r in reports(image) if r.name.startswith(start)]
            assert sass_audit.check(kernels, [row]), f"{start} holds {row}: strike it from MISSED"
            assert not sass_audit.check(kernels, [own])


def test_every_row_is_of_a_kernel_that_exists():
    names = [
        kernel
        for image in IMAGES
        for kernel in module(_ffi.image_directory() / f"{image}.ptx").entries
    ]
    for start in [*gemm_sass.REQUIRED, *(start for start, _ in gemm_sass.MISSED)]:
        assert any(name.startswith(start) for name in names), start
    for start, row in gemm_sass.MISSED:
        assert row in (*gemm_sass.EVERY, *gemm_sass.REQUIRED.get(start, ()))
