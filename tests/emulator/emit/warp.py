"""Instructions of a whole warp."""

from __future__ import annotations

import re

from ..errors import PtxSyntaxError, UnknownInstruction
from .operands import Operands, emits, need


@emits("elect")
def _elect(o: Operands) -> list[str]:
    o.allow("sync")
    names = [n.strip() for n in o.text(0).split("|")]
    leader = o.dst(names[0], "u32") if names[0] != "_" else "None"
    return [f"X.elect({leader}, {o.dst(names[1], 'pred')}, {o.src(1, 'u32')}, $M)"]


@emits("shfl")
def _shfl(o: Operands) -> list[str]:
    mods = o.instruction.mods
    if len(mods) != 4 or mods[1] != "sync" or mods[2] not in ("up", "down", "bfly", "idx"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    need(o, mods[3], "b32")
    names = [n.strip() for n in o.text(0).split("|")]
    ok = o.dst(names[1], "pred") if len(names) > 1 else "None"
    arguments = ", ".join(o.src(i, "u32") for i in (1, 2, 3, 4))
    return [f'X.shfl("{mods[2]}", {o.dst(names[0], "u32")}, {ok}, {arguments}, $M)']


@emits("vote")
def _vote(o: Operands) -> list[str]:
    mods = o.instruction.mods
    if len(mods) != 4 or mods[1] != "sync" or mods[2] not in ("any", "all", "uni", "ballot"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    d = o.dst(0, "u32" if mods[2] == "ballot" else "pred")
    return [f'X.vote("{mods[2]}", {d}, {o.src(1, "pred")}, {o.src(2, "u32")}, $M)']


@emits("match")
def _match(o: Operands) -> list[str]:
    mods = o.instruction.mods
    if mods[1:3] != ["any", "sync"] or mods[3] not in ("b32", "b64"):
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    return [f"X.match_any({o.dst(0, 'u32')}, {o.src(1, mods[3])}, {o.src(2, 'u32')}, $M)"]


@emits("activemask")
def _activemask(o: Operands) -> list[str]:
    o.allow("b32")
    return [f"X.activemask({o.dst(0, 'u32')}, $M)"]


@emits("movmatrix")
def _movmatrix(o: Operands) -> list[str]:
    """movmatrix: an 8x8 matrix of 16-bit elements, transposed from register to register."""
    if o.instruction.opcode != "movmatrix.sync.aligned.m8n8.trans.b16":
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    return [f"X.move_matrix({o.dst(0, 'u32')}, {o.src(1, 'u32')}, $M)"]


@emits("mma")
def _mma(o: Operands) -> list[str]:
    """mma.sync.m16n8k{8,16} of bfloat16 or float16 into float32."""
    match = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16|f16)\.\2\.f32",
        o.instruction.opcode,
    )
    if not match:
        raise UnknownInstruction(f"{o.instruction.opcode} is not known")
    count = int(match[1]) // 4
    if [len(o.parts(i)) for i in range(4)] != [4, count, count // 2, 4]:
        raise PtxSyntaxError("the operands have not the lengths of the opcode")
    lists = [f"({''.join(o.src(p, 'u32') + ', ' for p in o.parts(i))})" for i in (1, 2)]
    c = "".join(o.src(p, "f32") + ", " for p in o.parts(3))
    d = "".join(o.dst(p, "f32") + ", " for p in o.parts(0))
    return [f'X.multiply_fragments("{match[2]}", ({d}), {lists[0]}, {lists[1]}, ({c}), $M)']


@emits("redux")
def _redux(o: Operands) -> list[str]:
    mods, kind = o.instruction.mods, o.instruction.mods[-1]
    need(o, kind, "u32", "s32", "b32")
    o.allow("sync", "add", "min", "max", "and", "or", "xor", kind)
    return [f'X.redux("{mods[2]}", {o.dst(0, kind)}, {o.src(1, kind)}, {o.src(2, "u32")}, $M)']


@emits("bar")
def _warp_barrier(o: Operands) -> list[str]:
    """bar.warp.sync; the barriers of a CTA are not straight-line code (barriers.py)."""
    o.allow("warp", "sync")
    return [f"X.warp_sync({o.src(0, 'u32')}, $M)"]
