"""Faults to plant in the kernels' PTX: what each changes, how it is found there, and what finds it.

    python -m tests.mutations        plants every fault, prints what finds it; fails if one is missed

ptx.py reads and changes a kernel; gemm.py, quantize.py, activation.py and moe.py hold the faults; runs.py runs them.

An edit describes its place by what the instructions do: which barrier a wait belongs to (told from
the addresses that `mbarrier.init` gets), what defines an operand, which instruction comes next to
which. Registers and labels may be renamed and blocks reordered; where an edit no longer finds
exactly what it describes, it raises NoMatch.

Left out, because they change nothing that a run could show:
  - `.satfinite` of the conversions to FP8: PTX requires it, and no scaled value is above the largest;
  - `setmaxnreg` of a tile with one math warpgroup: it has none;
  - zeros for the scales of rows past the operand's end: the copy engine makes the data of those
    rows zeros and nobody stores them. That the rows are not read is what counts, and is tested;
  - `__syncwarp`: warps run in step in the emulator.
"""

from tests.faults import activation, gemm, moe, quantize  # noqa: F401 (each adds to MUTATIONS)
from tests.faults.ptx import MUTATIONS

__all__ = ["MUTATIONS"]
