"""Planted faults in the kernels' PTX: each is found, and the unchanged kernel passes the same run.

A fault counts as found when the emulator names it, or when an output differs from the reference.
tests/faults/ is the table. Half of the faults are slow, so that the default tests plant the other half.
"""

import collections

import pytest

from jaxfp8 import _ffi
from tests.faults import MUTATIONS
from tests.faults.runs import RUNS, found_by, run

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]


def subset():
    """Every second fault of each run, the others are slow; by default one of each detector in each file of faults."""
    count, seen = collections.Counter(), set()
    for mutation in MUTATIONS:
        kind = (mutation.edit.__module__, mutation.detector)
        marks = ()
        if count[mutation.run] % 2:
            marks = pytest.mark.slow
        elif kind in seen:
            marks = pytest.mark.full
        else:
            seen.add(kind)
        count[mutation.run] += 1
        yield pytest.param(mutation, marks=marks, id=f"{mutation.run}: {mutation.name}")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.representatives(cases=12)
def test_the_kernel_without_fault_passes(name):
    run(name)(run(name).text)


def test_every_kernel_file_has_faults():
    images = {run(mutation.run).plan.image for mutation in MUTATIONS}
    one_of_two = {"gemm_1d1d_bf16"}  # the float32 file holds the same kernels
    assert images | one_of_two == set(_ffi.images())
    assert {mutation.run for mutation in MUTATIONS} == set(RUNS)


@pytest.mark.parametrize("mutation", list(subset()))
def test_a_planted_fault_is_found(mutation):
    assert found_by(mutation) == mutation.detector
