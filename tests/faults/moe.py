"""Faults to plant in the kernels of a mixture: rows gathered, moved, summed, weighted.

Loops over rows are unrolled: where a fault of the source is many instructions, an edit changes each of them.
"""

from __future__ import annotations

import re

from tests.faults.ptx import WRONG_RESULT, NoMatch, Ptx, planted
from tests.faults.quantize import INFINITY

BARRIER = r"\bbar\.sync\b"
INDEX = r"\bld\.global\.nc\.s32\b"
FACTOR = r"\bld\.global\.nc\.f32\b"  # a weight, or the scale of a row that moves
FROM_LANE = r"\bshfl\.sync\.idx\.b32\b"
ACROSS = r"\bshfl\.sync\.bfly\.b32\b"
GATHERS = ("gathered rows", "gathered groups", "moved rows", "moved groups")
OF_GROUPS = ("gathered groups", "moved groups")


def each(runs, name, detector):
    """Plants the same fault in several kernels."""

    def add(edit):
        for run in runs:
            planted(run, name, detector)(edit)
        return edit

    return add


def never(ptx: Ptx, place: int):
    """The comparison gives false."""
    predicate = re.search(r"setp\S*\s+(%p\d+)", ptx.lines[place])[1]
    ptx.lines[place] = f"setp.ne.u32 {predicate}, 0, 0;"


def guard_of(ptx: Ptx, place: int) -> int:
    """The comparison that decides about the branch around an instruction, the nearest of several."""
    branch = ptx.before(place, r"^\s*@%\w+ bra")
    return ptx.definition(re.search(r"@(%p\d+)", ptx.lines[branch])[1], branch)


def unguarded(ptx: Ptx, place: int):
    """The branch around an instruction is never taken."""
    ptx.drop(ptx.before(place, r"^\s*@%\w+ bra"))


def followed_by_a_sign(ptx: Ptx) -> list[int]:
    """The shuffles that tell a row its index."""
    found = []
    for place in ptx.all(FROM_LANE, least=8):
        result = ptx.operands(place)[0]
        if re.search(
            rf"setp\.lt\.s32\s+%p\d+, {result}, 0;", "\n".join(ptx.lines[place : place + 3])
        ):
            found.append(place)
    if len(found) < 8:
        raise NoMatch(f"{len(found)} rows with an index")
    return found


def barriers(ptx: Ptx, count: int) -> list[int]:
    found = ptx.all(BARRIER)
    if len(found) != count:
        raise NoMatch(f"{len(found)} barriers, expected {count}")
    return found


# ---- Indices (gather.cuh)


@each((*GATHERS, "summed rows"), "an index past the rows is followed", "OutOfBounds")
def _(ptx):
    place = ptx.after(ptx.first(INDEX), r"\bsetp\.ge\.s64\b")
    never(ptx, place)


@each(("gathered groups", "moved rows"), "a row without an index is loaded", "OutOfBounds")
def _(ptx):
    for place in followed_by_a_sign(ptx):
        never(ptx, ptx.after(place, r"\bsetp\.lt\.s32\b"))


@each((*GATHERS, "summed rows"), "indices past the last row are read", "OutOfBounds")
def _(ptx):
    unguarded(ptx, ptx.first(INDEX))


@each(
    ("gathered groups", "moved rows", "summed rows"),
    "a row takes the index of its neighbour",
    WRONG_RESULT,
)
def _(ptx):
    for place in followed_by_a_sign(ptx):
        lane = ptx.operands(place)[3]
        ptx.replace(place, rf"(shfl\S+\s+\S+ %\w+), {lane},", r"\1, 0,")


@each(("gathered rows", "moved rows"), "every warp takes the first one's indices", WRONG_RESULT)
def _(ptx):
    address = ptx.definition(
        re.search(r"\[(%\w+)\]", ptx.lines[ptx.first(INDEX)])[1], ptx.first(INDEX)
    )
    offset = ptx.definition(ptx.operands(address)[-1], address)
    element = ptx.definition(ptx.operands(offset)[1], offset)
    ptx.replace(element, r"(?:add\.s64|or\.b64 )(\s+%\w+), %\w+, (%\w+);", r"mov.b64\1, \2;")


# ---- Tiles of the token axis, and their bands


@each(OF_GROUPS, "the token block is read before it is found", "Race")
def _(ptx):
    ptx.drop(barriers(ptx, 4)[0])


@planted("gathered groups", "maxima are read before they are written", "Race")
@planted("moved groups", "maxima are read before they are written", "UninitializedRead")
def _(ptx):
    ptx.drop(barriers(ptx, 4)[1])


@each(OF_GROUPS, "inverses are read before they are written", "UninitializedRead")
def _(ptx):
    ptx.drop(barriers(ptx, 4)[2])


@each(OF_GROUPS, "the transposed tile is read before it is written", "UninitializedRead")
def _(ptx):
    ptx.drop(barriers(ptx, 4)[3])


@each(OF_GROUPS, "a negative group size is taken as it is", "DoubleWrite")
def _(ptx):
    for place in ptx.all(r"\bmax\.s32\s+%\w+, %\w+, 0;", least=2):
        if place < ptx.first(BARRIER):
            ptx.replace(place, r"max\.s32(\s+%\w+, %\w+), 0;", r"mov.b32\1;")


@each(OF_GROUPS, "rows past the groups give their block a scale", WRONG_RESULT)
def _(ptx):
    tests = [
        i for i in ptx.all(rf"\bsetp\.gt\.u32\b.*, {INFINITY - 1};") if i > barriers(ptx, 4)[1]
    ]
    place = ptx.definition(ptx.operands(tests[0])[1], tests[0])
    ptx.replace(place, r"selp\.b32(\s+%\w+), 0, (%\w+), %\w+;", r"mov.b32\1, \2;")


@planted("gathered bands", "the second band starts where the first does", "OutOfBounds")
def _(ptx):
    band = ptx.first(r"\bdiv\.u32\b")
    ptx.set(band, 0)


@planted("gathered bands", "the last band is as wide as the others", "DoubleWrite")
def _(ptx):
    place = ptx.after(ptx.first(r"\bdiv\.u32\b"), r"\bmin\.u32\b")
    ptx.replace(place, r"min\.u32(\s+%\w+, %\w+), %\w+;", r"mov.b32\1;")


# ---- FP8 rows as they are (gather_rows.cu, gather_requantize_both.cu)


@each(("moved rows", "moved groups"), "a row of zeros has no scale", WRONG_RESULT)
def _(ptx):
    scale = ptx.operands(ptx.first(FACTOR))[0]
    ptx.replace(ptx.one(rf"\bmov\.f32\s+{scale}, 0f3F800000;"), "0f3F800000", "0f00000000")


@planted("moved rows", "scales of a block column lie over those of the first", WRONG_RESULT)
def _(ptx):
    store = ptx.one(r"\bst\.global\.f32\b")
    ptx.set(ptx.before(store, r"\bmul\.lo\.s64\b"), 0)


@planted("moved rows", "scales of rows past the end are stored", "OutOfBounds")
def _(ptx):
    unguarded(ptx, ptx.one(r"\bst\.global\.f32\b"))


@planted("moved rows", "words are moved by one byte", "Misaligned")
def _(ptx):
    for place in ptx.all(r"\bld\.global\.nc\.v4\.u32\b", least=8):
        ptx.replace(place, r"\[(%\w+)\]", r"[\1+1]")


@planted("moved rows", "a row is stored over the one before it", WRONG_RESULT)
def _(ptx):
    stores = ptx.all(r"\bst\.global\.v4\.u32\b", least=8)
    address = re.search(r"\[(%\w+)\]", ptx.lines[stores[0]])[1]
    ptx.replace(stores[1], r"\[%\w+\]", f"[{address}]")


@planted("moved rows", "the words of a row are exchanged", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bst\.global\.v4\.u32\b", least=8):
        ptx.replace(place, r"\{(%\w+), *(%\w+),", r"{\2,\1,")


@planted("moved groups", "values are not scaled", WRONG_RESULT)
def _(ptx):
    first = ptx.first(r"cvt\.rn\.f16x2")
    for place in [i for i in ptx.all(r"\bmul\.rn\.f32\b", least=64) if i > first][:64]:
        ptx.replace(place, r"mul\.rn\.f32(\s+%\w+, %\w+), %\w+;", r"mov.f32\1;")


@planted("moved groups", "a row's values take another row's scale", WRONG_RESULT)
def _(ptx):
    first = ptx.first(r"cvt\.rn\.f16x2")
    place = [i for i in ptx.all(FROM_LANE) if i > first][1]
    ptx.replace(place, rf", {ptx.operands(place)[3]}, ", ", 0, ")


@planted("moved groups", "E4M3 is read as E5M2", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"cvt\.rn\.f16x2\.e4m3x2", least=32):
        ptx.replace(place, "e4m3x2", "e5m2x2")


@planted("moved groups", "the first value of a pair is taken twice", WRONG_RESULT)
def _(ptx):
    first = ptx.first(r"cvt\.rn\.f16x2")
    for place in [i for i in ptx.all(r"\bshr\.u32\s+%\w+, %\w+, 16;", least=8) if i > first]:
        ptx.replace(place, ", 16;", ", 0;")


# ---- Sums (sum_rows.cu)


@planted("summed rows", "a row that found no place is left out", WRONG_RESULT)
def _(ptx):
    vote = ptx.one(r"\bvote\.sync\.any\.pred\b")
    predicate = re.search(r"(%p\d+),", ptx.lines[vote])[1]
    ptx.lines[vote] = f"setp.ne.u32 {predicate}, 0, 0;"


@planted("summed rows", "only the last choices can be lost", WRONG_RESULT)
def _(ptx):
    vote = ptx.one(r"\bvote\.sync\.any\.pred\b")
    lost = ptx.operands(vote)[1] if ptx.operands(vote)[1].startswith("%p") else None
    lost = lost or re.search(r"%p\d+, (%p\d+),", ptx.lines[vote])[1]
    place = ptx.before(vote, rf"\bsetp\.ne\.s32\s+{lost},")
    carried = ptx.definition(ptx.operands(place)[1], place)
    ptx.replace(carried, r"or\.b32(\s+%\w+), %\w+, (%\w+);", r"mov.b32\1, \2;")


@planted("summed rows", "choices past the first eight are left out", WRONG_RESULT)
def _(ptx):
    step = ptx.one(r"\badd\.s64\s+(%\w+), \1, 8;")
    ptx.drop(ptx.after(step, r"^\s*@%\w+ bra"))


@planted("summed rows", "the sum starts from -0", WRONG_RESULT)
def _(ptx):
    first = ptx.first(r"\bmov\.f32\s+%\w+, 0f00000000;")
    for place in ptx.all(r"\bmov\.f32\s+%\w+, 0f00000000;"):
        ptx.replace(place, "0f00000000", "0f80000000")
    assert first < ptx.first(FROM_LANE)


@planted("summed rows", "rows are subtracted", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\badd\.rn\.f32\b", least=64):
        ptx.replace(place, r"add\.rn\.f32", "sub.rn.f32")


@planted("summed rows", "a sum is stored one element too far", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bst\.global\.(v4\.)?f32\b", least=3):
        ptx.replace(place, r"\[(%\w+)(\+\d+)?\]", r"[\1+4]")


@planted("summed rows", "columns past the last are stored", "DoubleWrite")
def _(ptx):
    for place in ptx.all(r"\bst\.global\.f32\b", least=8):
        unguarded(ptx, place)


@planted("summed rows with weights", "rows are added without their weights", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bfma\.rn\.f32\b", least=64):
        ptx.replace(
            place, r"fma\.rn\.f32(\s+%\w+), %\w+, (%\w+), (%\w+);", r"add.rn.f32\1, \2, \3;"
        )


@planted("summed rows with weights", "a choice takes the weight of the first", WRONG_RESULT)
def _(ptx):
    shuffled = ptx.definition(ptx.operands(ptx.first(r"\bfma\.rn\.f32\b"))[1])
    own = ptx.operands(ptx.definition(ptx.operands(shuffled)[1], shuffled))[2]
    for place in ptx.all(rf"\bshfl\.sync\.idx\.b32\s+\S+ {own},", least=8):
        lane = ptx.operands(place)[3]
        ptx.replace(place, rf"{own}, {lane},", f"{own}, 0,")


@planted("summed rows with weights", "every token takes the weights of the first", WRONG_RESULT)
def _(ptx):
    place = ptx.first(FACTOR)
    address = ptx.definition(re.search(r"\[(%\w+)\]", ptx.lines[place])[1], place)
    offset = ptx.definition(ptx.operands(address)[-1], address)
    element = ptx.definition(ptx.operands(offset)[1], offset)
    ptx.replace(element, r"add\.s64(\s+%\w+), %\w+, (%\w+);", r"mov.b64\1, \2;")


@planted(
    "summed rows with weights", "weights of choices that are not there are read", "OutOfBounds"
)
def _(ptx):
    unguarded(ptx, ptx.first(FACTOR))


@planted("summed rows with weights", "the two sums of a word are exchanged", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bcvt\.rn\.bf16x2\.f32\b", least=4):
        ptx.replace(place, r"(cvt\S+\s+%\w+), *(%\w+), *(%\w+);", r"\1, \3, \2;")


# ---- Activations with weights (activation.cuh)

WEIGHTED = ("weighted rows", "weighted groups", "weighted gradient")


@each(WEIGHTED, "weights past the last row are read", "OutOfBounds")
def _(ptx):
    unguarded(ptx, ptx.first(FACTOR))


@each(WEIGHTED, "every row takes the weight of the first of its thread", WRONG_RESULT)
def _(ptx):
    own = weight_register(ptx)
    for place in ptx.all(rf"\bshfl\.sync\.idx\.b32\s+\S+ {own},", least=8):
        lane = ptx.operands(place)[3]
        ptx.replace(place, rf"{own}, {lane},", f"{own}, 0,")


def weight_register(ptx: Ptx) -> str:
    """The bits of the weight that a lane holds for others."""
    for place in ptx.all(FROM_LANE, least=8):
        own = ptx.operands(place)[2]
        if len(ptx.all(rf"\bshfl\.sync\.idx\.b32\s+\S+ {own},")) >= 8:
            return own
    raise NoMatch("no weight that rows ask for")


def leave_weight_out(ptx: Ptx) -> None:
    """What is multiplied by its row's weight is taken as it is."""
    own = weight_register(ptx)
    for place in ptx.all(rf"\bshfl\.sync\.idx\.b32\s+\S+ {own},", least=8):
        result = ptx.operands(place)[0]
        (weight,) = [
            re.search(r"mov\.b32\s+(%f\d+)", ptx.lines[i])[1]
            for i in ptx.all(rf"\bmov\.b32\s+%f\d+, {result};")
        ]
        for use in ptx.all(rf"\bmul\.rn\.f32\s+%f\d+, %f\d+, {weight};", least=8):
            ptx.replace(use, r"mul\.rn\.f32(\s+%f\d+, %f\d+), %f\d+;", r"mov.f32\1;")


@each(
    ("weighted rows", "weighted groups"),
    "the activation is not multiplied by its weight",
    WRONG_RESULT,
)
def _(ptx):
    leave_weight_out(ptx)


def sums(ptx: Ptx) -> tuple[list[int], list[int]]:
    """The stores of the weights' gradients, and the shuffles of each one's sum."""
    stores, first = [], ptx.first(FACTOR)
    shuffles = [i for i in ptx.all(ACROSS, least=16) if i > first]
    for place in ptx.all(r"\bst\.global\.f32\b"):
        before = [i for i in shuffles if i < place]
        if len(before) >= 4 and place - before[-1] < 40:
            stores.append(place)
    if len(stores) < 4:
        raise NoMatch(f"{len(stores)} stores of the weights' gradients")
    return stores, [i for i in shuffles if i < stores[-1]]


@planted("weighted gradient", "a sum misses half of its lanes", WRONG_RESULT)
def _(ptx):
    stores, shuffles = sums(ptx)
    last = [i for i in shuffles if i < stores[0]][-1]
    ptx.replace(last, rf", {ptx.operands(last)[3]}, ", ", 0, ")


@planted("weighted gradient", "each half of the lanes sends the row that it keeps", WRONG_RESULT)
def _(ptx):
    stores, shuffles = sums(ptx)
    first = [i for i in shuffles if i < stores[0]][0]
    place = ptx.before(first, r"\bselp\.f32\b")
    ptx.replace(place, r"(selp\.f32\s+%f\d+), (%f\d+), (%f\d+),", r"\1, \3, \2,")


@planted("weighted gradient", "gradients of weights are stored one row too far", "OutOfBounds")
def _(ptx):
    for place in sums(ptx)[0]:
        ptx.replace(place, r"\[(%\w+)(\+\d+)?\]", r"[\1+60]")


@planted("weighted gradient", "dy is not multiplied by its row's weight", WRONG_RESULT)
def _(ptx):
    leave_weight_out(ptx)
