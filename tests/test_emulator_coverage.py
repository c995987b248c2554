"""Every instruction form of jaxfp8's kernels is executed by one of the emulator's own programs."""

import importlib.util
from pathlib import Path

import pytest

from tests.emulator import coverage, module

pytestmark = pytest.mark.emulator


def built_ptx() -> list[Path]:
    """The PTX files of the installed package, found without importing it."""
    spec = importlib.util.find_spec("jaxfp8")
    folders = spec.submodule_search_locations if spec else None
    return sorted(p for f in folders or () for p in (Path(f) / "_cuda").glob("*.ptx"))


@pytest.fixture(scope="module")
def covered() -> set[str]:
    return coverage.covered_forms()


@pytest.mark.full
def test_own_programs_execute_every_form_of_the_built_kernels(covered):
    files = built_ptx()
    if not files:
        pytest.skip("jaxfp8 is not installed with its kernels (no jaxfp8/_cuda/*.ptx)")
    used = {form: path.name for path in files for form in coverage.forms(path)}
    missing = {form: name for form, name in used.items() if form not in covered}
    assert not missing, f"no program in tests/emulator_programs executes: {missing}"


def test_a_form_without_a_program_is_missed(covered):
    text = (
        ".version 8.7\n.target sm_90a\n.address_size 64\n.entry k() {\n.reg .b32 %r<3>;\n"
        "vote.sync.frob.b32 %r1, 1, -1;\nadd.s32 %r1, %r1, %r2;\nret;\n}\n"
    )
    assert coverage.forms(text) - covered == {"vote.sync.frob.b32"}


def test_forms_are_normalized():
    text = """.version 8.7
.target sm_90a
.address_size 64
.entry k() {
.reg .b32 %r<9>; .reg .b64 %d<4>; .reg .pred %p<2>;
mov.b64 %d1, {%r1, %r2};
mov.b64 {%r1, %r2}, %d1;
mov.b64 %d2, %d1;
shl.b32 %r1, %r2, 3;
shl.b32 %r1, %r2, %r3;
ld.global.nc.L1::no_allocate.L2::128B.u32 %r1, [%d1];
cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint \
[%r1], [%d1, {%r2}], [%r3], %d2;
wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r1, %r2, %r3, %r4}, %d1, %d2, %p1, 1, 1;
wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7, %r8}, \
%d2, %p1, 1, 1;
}
"""
    assert module(text).entries == ["k"]
    assert coverage.forms(text) == {
        "mov.b64 packs",
        "mov.b64 unpacks",
        "mov.b64",
        "shl.b32 by a number",
        "shl.b32 by a register",
        "ld.global.nc.u32",
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".L2::cache_hint",
        "wgmma.mma_async.sync.aligned.m64nNk32.f32.e4m3.e4m3",
        "wgmma.mma_async.sync.aligned.m64nNk32.f32.e4m3.e4m3 A in registers",
    }
