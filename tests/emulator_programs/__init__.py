"""Small PTX programs, one or more for every instruction form that the emulator knows."""

from __future__ import annotations

import functools

import numpy as np

from . import arithmetic, conversions, copies, matmul, memory, synchronization, warps
from .program import Program


@functools.cache
def all_programs() -> tuple[Program, ...]:
    modules = (arithmetic, conversions, warps, memory, copies, synchronization, matmul)
    with np.errstate(all="ignore"):
        found = tuple(p for module in modules for p in module.programs())
    names = [p.name for p in found]
    assert len(set(names)) == len(names), [n for n in names if names.count(n) > 1]
    return found
