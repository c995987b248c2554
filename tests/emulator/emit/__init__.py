"""Straight-line PTX to NumPy source, one function an opcode.

Each emitter returns the Python lines of one instruction. `V[i]` is a view of a register, `C[i]` a
constant, `X` the executing unit; `$W` becomes `, where=<mask>` and `$M` the mask of executing
lanes, or nothing and None where all lanes run. A modifier that an emitter does not name is
refused: an instruction is executed as it is written, or not at all.
"""

from . import arithmetic, compare_and_move, memory, warp  # noqa: F401 (each registers its emitters)
from .operands import Operands, check_modifiers, emit

__all__ = ["Operands", "check_modifiers", "emit"]
