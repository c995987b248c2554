"""The machine code of every GEMM kernel keeps the bounds of benchmarks/gemm_sass.py."""

import pytest

from benchmarks import gemm_sass, sass_audit
from jaxfp8 import _ffi

pytestmark = [
    pytest.mark.slow,  # disassembles every kernel: minutes
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


@pytest.fixture(scope="module")
def reports():
    try:
        return gemm_sass.audit(_ffi.image_directory())
    except sass_audit.AuditError as error:
        pytest.skip(str(error))


def test_every_gemm_kernel_keeps_its_rows(reports):
    assert len(reports) > 50
    assert gemm_sass.failures(reports) == []


def test_every_row_is_of_a_kernel_that_exists(reports):
    for start in gemm_sass.REQUIRED:
        assert any(r.name.startswith(start) for r in reports), start
    for start, row in gemm_sass.MISSED:
        assert row in gemm_sass.REQUIRED[start]


def test_a_missed_row_is_really_missed(reports):
    for (start, row), (own, _) in gemm_sass.MISSED.items():
        kernels = [r for r in reports if r.name.startswith(start)]
        assert sass_audit.check(kernels, [row]), f"{start} holds {row}: strike it from MISSED"
        assert not sass_audit.check(kernels, [own])
