"""Faults to plant in the GEMM kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.faults.ptx import WRONG_RESULT, NoMatch, Ptx, planted

# ---- Barriers of the ring of stages and of the mailbox

# Fields of GemmParams: csrc/kernels/gemm/args.h.
M, N, GROUPS, RHS_GROUP_ROWS = "m", "n", "groups", "rhs_group_rows"

EXPECT_TX = r"\bmbarrier\.arrive\.expect_tx\b"
CP_ASYNC = r"\bcp\.async\.ca\.shared\.global\b"
CP_ASYNC_ARRIVE = r"\bcp\.async\.mbarrier\.arrive\.noinc\b"
RELEASE = r"\bmbarrier\.arrive\.shared::cluster\.b64\b"
COPY = r"\bcp\.async\.bulk\.tensor\.2d\.shared::cluster\b"
MULTICAST = r"\.multicast::cluster\b"
TMA_STORE = r"\bcp\.async\.bulk\.tensor\.2d\.global\b"
BULK_WAIT_READ = r"\bcp\.async\.bulk\.wait_group\.read\b"
CLUSTER_ARRIVE = r"\bbarrier\.cluster\.arrive\.relaxed\b"
CLUSTER_WAIT = r"\bbarrier\.cluster\.wait\b"
WGMMA = r"\bwgmma\.mma_async\b"
COMMIT = r"\bwgmma\.commit_group\b"
WAIT_GROUP = r"\bwgmma\.wait_group\b"
WGMMA_FENCE = r"\bwgmma\.fence\b"
ELECT = r"\belect\.sync\b"
RECEIVED = r"\bredux\.sync\.or\.b32\b"
LABEL = r"^\$\w+:"
SKIP = r"^\s*@!?%\w+ bra\b"

BODIES = 7  # of a loop over blocks that is unrolled by four: its own, and those for what is left


@dataclass(frozen=True)
class Load:
    """A version of the operand warp's loop: its wait, and what it does in one lane."""

    wait: int
    skip: int  # the branch of the other lanes
    expect: int
    copies: dict[str, int]  # of the "lhs" and of the "rhs"


def load(ptx: Ptx, shared: str = "nothing") -> Load:
    """Of the version for clusters that share their "lhs", their "rhs" or "nothing"."""
    versions = {}
    for expect in ptx.all(EXPECT_TX, least=3):
        copies = {
            operand_of(ptx, i): i for i in ptx.all(COPY) if expect < i < ptx.after(expect, LABEL)
        }
        multicast = [name for name, i in copies.items() if re.search(MULTICAST, ptx.lines[i])]
        versions[" and ".join(multicast) or "nothing"] = Load(
            ptx.before(expect, r"\bmbarrier\.try_wait\b"),
            ptx.before(expect, SKIP),
            expect,
            copies,
        )
    if sorted(versions) != ["lhs", "nothing", "rhs"]:
        raise NoMatch(f"the operand warp multicasts {', '.join(versions)}")
    if sorted(versions[shared].copies) != ["lhs", "rhs"]:
        raise NoMatch(f"the operand warp copies {', '.join(versions[shared].copies)}")
    return versions[shared]


def operand_of(ptx: Ptx, copy: int) -> str:
    """Which operand a copy reads: its tensor map is the kernel's first parameter or its second."""
    place = ptx.definition(re.search(r"\[(%\w+), \{", ptx.lines[copy])[1], copy)
    place = ptx.definition(ptx.operands(ptx.check(place, r"\bcvta\.param\b"))[1], place)
    index = re.search(r"_param_([01]);", ptx.lines[ptx.check(place, r"_param_[01];")])[1]
    return ["lhs", "rhs"][int(index)]


def waits_for_a_free_stage(ptx: Ptx) -> dict[str, int]:
    """Of the operand warp of a CTA without a cluster, when it is done, and of the scale warp."""
    loads = {shared: load(ptx, shared).wait for shared in ("nothing", "lhs", "rhs")}
    scales = ptx.before(ptx.one(CP_ASYNC_ARRIVE), r"\bmbarrier\.try_wait\b")
    last = [i for i in ptx.waits("empty", 5) if i not in (*loads.values(), scales)]
    if len(last) != 1:
        raise NoMatch("a wait before expect_tx or the scales' arrival is not for a free stage")
    return {"operands": loads["nothing"], "last": last[0], "scales": scales}


def operand_wait(ptx: Ptx) -> int:
    return waits_for_a_free_stage(ptx)["operands"]


def scale_wait(ptx: Ptx) -> int:
    return waits_for_a_free_stage(ptx)["scales"]


@planted("tiles", "math warps do not wait for a stage", "Race")
def _(ptx):
    ptx.pass_at_once(*ptx.waits("full", BODIES))


@planted("tiles", "operand warp does not wait for a free stage", "Race")
def _(ptx):
    ptx.pass_at_once(operand_wait(ptx))


@planted("tiles", "scale warp does not wait for a free stage", "Race")
def _(ptx):
    ptx.pass_at_once(scale_wait(ptx))


@planted("tiles", "operand warp waits for the other phase", "Deadlock")
def _(ptx):
    place = operand_wait(ptx)
    flip = ptx.definition(ptx.operands_of_wait(place)[2], place)
    ptx.replace(flip, r"xor\.b32\s+(%\w+), (%\w+), 1", r"mov.b32 \1, \2")


@planted("tiles", "math warps' phase never turns", "Deadlock")
def _(ptx):
    laps = {ptx.operands_of_wait(i)[2] for i in ptx.waits("full", BODIES)}
    for place in ptx.all(rf"\bxor\.b32\s+%\w+, ({'|'.join(laps)}), %", least=BODIES):
        ptx.replace(place, r"xor\.b32(\s+%\w+, %\w+), %\w+;", r"mov.b32\1;")


@planted("tiles of two rows", "math warps do not wait for the mailbox", "UninitializedRead")
def _(ptx):
    wait = ptx.before(ptx.waits("full", BODIES)[0], r"\bmbarrier\.try_wait\b")
    if wait not in ptx.waits("mail full", 3):
        raise NoMatch("the wait before those for a stage is not for the mailbox")
    ptx.pass_at_once(wait)


@planted("tiles", "scheduler does not wait for a free mailbox slot", "Deadlock")
def _(ptx):
    ptx.pass_at_once(*ptx.waits("mail empty", 3))


def expect(ptx: Ptx, more: int):
    """expect_tx counts so many bytes more."""
    place = load(ptx).expect
    size = ptx.operands(place)[-1]
    ptx.replace(
        place, rf"\s*(.*), {size};", rf"{{ .reg .b32 t; add.s32 t, {size}, {more}; \1, t; }}"
    )


@planted("tiles", "expect_tx counts 128 bytes too many", "Deadlock")
def _(ptx):
    expect(ptx, 128)


@planted("tiles", "expect_tx counts 128 bytes too few", "Deadlock")
def _(ptx):
    expect(ptx, -128)


@planted("tiles", "expect_tx forgets its bytes", "Deadlock")
def _(ptx):
    ptx.replace(load(ptx).expect, r"\.expect_tx(.*), %\w+;", r"\1;")


def recount(ptx: Ptx, kind: str, operation: str, operand: int):
    """The barriers of a kind count so many arrivals more ("add.u32"), less, ..."""
    name = kind.removeprefix("mail ")
    select = ptx.rings()["stages" if name == kind else "mail"].select
    count = ptx.operands(select)[1:][["full", "empty"].index(name)]
    ptx.replace(
        select,
        rf"(.*), {count}\b(.*)",
        rf"{{ .reg .b32 t; {operation} t, {count}, {operand}; \1, t\2 }}",
    )


@planted("tiles", "a stage's barrier counts one lane of scales less", "BarrierMisuse")
def _(ptx):
    recount(ptx, "full", "sub.u32", 1)


@planted("tiles", "a free stage counts one math warp less", "Race")
def _(ptx):
    recount(ptx, "empty", "sub.u32", 1)


@planted("tiles", "a free stage counts one math warp more", "Deadlock")
def _(ptx):
    recount(ptx, "empty", "add.u32", 1)


@planted("tiles of two rows", "a mailbox slot counts one reading warp less", "Race")
def _(ptx):
    recount(ptx, "mail empty", "sub.u32", 1)


@planted("tiles", "math warps do not hand back a mailbox slot", "Deadlock")
def _(ptx):
    reads = ptx.barrier("mail empty", r"\bmbarrier\.arrive\.shared::cta\.b64\b", 3)
    wait = ptx.waits("full", BODIES)[0]
    ptx.drop(next(i for i in reversed(reads) if i < wait))


@planted("tiles", "the end of the tiles is not announced", "Deadlock")
def _(ptx):
    ptx.drop(sends(ptx)["end"])


FIELDS = ("lhs_row", "rhs_row", "out_row", "col", "rows", "k_block", "k_blocks", "group")


def fields(ptx: Ptx, send: int) -> dict[str, str]:
    """Registers of the Work that is stored before an arrival at the mailbox."""
    second = ptx.before(send, r"\bst\.shared\.v4\.b32\b")
    first = ptx.before(second, r"\bst\.shared\.v4\.b32\b")
    registers = [*ptx.operands(first)[1:], *ptx.operands(second)[1:]]
    return dict(zip(FIELDS, registers, strict=True))


def sends(ptx: Ptx) -> dict[str, int]:
    """Where the scheduler hands over a "dense" product's tile, a "listed" segment's, the "end"."""
    found = {}
    for place in ptx.barrier("mail full", r"\bmbarrier\.arrive\.shared::cta\.b64\b", 3):
        work = fields(ptx, place)
        blocks, group = (
            ptx.lines[ptx.definition(work[name], place)] for name in ("k_blocks", "group")
        )
        if re.search(r"\bmov\.[ub]32\s+%\w+, -1;", blocks):
            found["end"] = place
        else:  # the lane that holds a segment of the list tells the others
            found["listed" if "shfl.sync" in group else "dense"] = place
    if len(found) != 3:
        raise NoMatch(f"the scheduler sends {', '.join(found)}")
    return found


def sent(ptx: Ptx, path: str, field: str) -> int:
    """Where a field of a "dense" or a "listed" tile's Work is computed."""
    place = sends(ptx)[path]
    return ptx.definition(fields(ptx, place)[field], place)


@planted("tiles", "arrival of the scales removed", "Deadlock")
def _(ptx):
    ptx.drop(ptx.one(CP_ASYNC_ARRIVE))


@planted("tiles", "arrival of the scales does not wait for their copies", "Race")
def _(ptx):
    ptx.replace(
        ptx.one(CP_ASYNC_ARRIVE),
        r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64 ",
        "mbarrier.arrive.shared::cta.b64 _, ",
    )


@planted("tiles", "release of the stages removed", "Deadlock")
def _(ptx):
    ptx.drop(*ptx.all(RELEASE, least=BODIES))


@planted("tiles", "stage released before its products are done", "Race")
def _(ptx):
    for wait in ptx.all(WAIT_GROUP, least=BODIES):
        ptx.move(range(wait, wait + 1), ptx.after(ptx.after(wait, RELEASE), LABEL) + 1)


@planted("outer", "stage released before its scales are read", "Race")
def _(ptx):
    release = ptx.one(RELEASE)
    begin, end = ptx.before(release, r"bar\.warp\.sync"), ptx.after(release, LABEL)
    ptx.move(range(begin, end + 1), ptx.after(ptx.one(WAIT_GROUP), r"\bld\.shared\.v4\.f32\b"))


@planted("tiles", "all stages' operands land in the first", "Race")
def _(ptx):
    copy = load(ptx).copies["lhs"]
    target = ptx.definition(re.search(r"\[(%\w+)\]", ptx.lines[copy])[1], copy)
    offset = ptx.definition(ptx.operands(target)[1], target)
    ptx.replace(offset, r"shl\.b32\s+(%\w+), .*;", r"mov.b32 \1, 0;")


@planted("tiles", "barriers are not fenced after their initialization", "Race")
def _(ptx):
    ptx.drop(ptx.one(r"\bfence\.mbarrier_init\b"))


@planted("tiles", "no barrier after the barriers' initialization", "BarrierMisuse")
def _(ptx):
    ptx.drop(ptx.one(CLUSTER_ARRIVE), *ptx.all(CLUSTER_WAIT, least=4))


@planted("tiles", "scheduler does not wait for the other warps' barriers", "BarrierMisuse")
def _(ptx):
    ptx.drop(ptx.before(sends(ptx)["dense"], CLUSTER_WAIT))


@planted("tiles", "a warp makes no barriers of the stages", "BarrierMisuse")
def _(ptx):
    skip = ptx.before(ptx.rings()["stages"].init, SKIP)
    test = ptx.definition(re.search(r"@(%\w+)", ptx.lines[skip])[1], skip)
    ptx.replace(test, r"\bsetp\.gt\.s32(\s+%\w+, %\w+), \d+;", r"setp.eq.s32\1, 1;")


@planted("tiles", "every lane makes the barriers", "BarrierMisuse")
def _(ptx):
    ptx.drop(ptx.after(ptx.first(ELECT), SKIP))


def exchange_counts(ptx: Ptx, ring: str):
    """Full barriers count the arrivals of empty ones, and these count those."""
    ptx.replace(
        ptx.rings()[ring].select, r"(\bselp\.b32\s+%\w+), (%?\w+), (%?\w+),", r"\1, \3, \2,"
    )


@planted("tiles", "full and empty stages exchange their counts", "BarrierMisuse")
def _(ptx):
    exchange_counts(ptx, "stages")


@planted("tiles", "full and empty mailbox slots exchange their counts", "Deadlock")
def _(ptx):
    exchange_counts(ptx, "mail")


@planted("tiles", "every lane loads the operands", "Race")
def _(ptx):
    ptx.drop(load(ptx).skip)


# ---- Wgmma


@planted("tiles", "wgmma.fence removed", "MissingFence")
def _(ptx):
    ptx.drop(*ptx.all(WGMMA_FENCE, least=BODIES))


@planted("tiles", "wgmma.commit_group removed", "RegisterInFlight")
def _(ptx):
    ptx.drop(*ptx.all(COMMIT, least=BODIES))


@planted("tiles", "wgmma.wait_group removed", "RegisterInFlight")
def _(ptx):
    ptx.drop(*ptx.all(WAIT_GROUP, least=BODIES))


@planted("tiles", "wgmma.wait_group leaves one group in flight", "RegisterInFlight")
def _(ptx):
    for place in ptx.all(WAIT_GROUP, least=BODIES):
        ptx.replace(place, r" 0;", " 1;")


def descriptors(ptx: Ptx, product: int) -> list[str]:
    """Registers of the lhs and rhs descriptors."""
    return re.findall(r"\}, (%\w+), (%\w+),", ptx.lines[product])[0]


def descriptor_constant(ptx: Ptx) -> list[int]:
    """Where the descriptors get their constant bits."""
    return ptx.all(rf"\bor\.b64\b.*, {(1 << 62) | (1024 >> 4) << 32};", least=2)


def change_descriptors(ptx: Ptx, swizzle: int, stride: int):
    for place in descriptor_constant(ptx):
        ptx.replace(place, r"\d+;$", f"{swizzle << 62 | (stride >> 4) << 32};")


@planted("tiles", "descriptors name the 64-byte swizzle", WRONG_RESULT)
def _(ptx):
    change_descriptors(ptx, 2, 1024)


@planted("tiles", "descriptors name a stride of 512 bytes", WRONG_RESULT)
def _(ptx):
    change_descriptors(ptx, 1, 512)


FENCE = r"\bfence\.proxy\.async\b"


def clearing(ptx: Ptx) -> list[int]:
    """The stores of zeros to rows past the lhs: between them and the fence after is no arrival."""
    zeros = ptx.all(r"\bst\.shared\.v4\.b32\b.*\{(%\w+), \1, \1, \1\}")
    for fence in ptx.all(FENCE):
        arrival = ptx.before(fence, r"\.arrive\b")
        if places := [i for i in zeros if arrival < i < fence]:
            return places
    raise NoMatch("no stores of zeros before a fence")


def row_in_part(ptx: Ptx) -> int:
    """The remainder that says which row of a CTA's part a row is that may have to be cleared."""
    return ptx.before(clearing(ptx)[0], r"\brem\.s32\b")


def is_copied(ptx: Ptx) -> tuple[int, str]:
    """The test whether a row of a part is copied, and how many are."""
    row = ptx.operands(row_in_part(ptx))[0]
    test = ptx.after(row_in_part(ptx), rf"\bsetp\.(lt|ge)\.s32\s+%\w+, {row}, ")
    return test, ptx.operands(test)[-1]


@planted("tiles", "rows past the lhs are not cleared", "UninitializedRead")
def _(ptx):
    ptx.drop(*clearing(ptx))


@planted("tiles", "zeros in rows past the lhs are not fenced", "MissingFence")
def _(ptx):
    ptx.drop(ptx.after(clearing(ptx)[-1], FENCE))


@planted("tiles", "no barrier after the rows past the lhs are cleared", "Race")
def _(ptx):
    ptx.drop(ptx.one(r"\bbar\.sync\b"))


@planted("tiles", "rows of the lhs are cleared", "Race")
def _(ptx):
    test, rows = is_copied(ptx)
    ptx.replace(test, rf", {rows};", ", 8;")


@planted("two rows in a cluster", "rows that the second CTA copies are cleared", "Race")
@planted("16 columns", "rows that the second CTA copies are cleared", "Race")
def _(ptx):
    ptx.replace(row_in_part(ptx), r"rem\.s32(\s+%\w+, %\w+), %\w+;", r"mov.b32\1;")


@planted(
    "two rows in a cluster", "rows between the CTAs' copies are not cleared", "UninitializedRead"
)
def _(ptx):
    test, rows = is_copied(ptx)
    ptx.replace(test, rf", {rows};", f", {ptx.operands(row_in_part(ptx))[-1]};")


@planted(
    "two rows in a cluster", "rows past the last CTA's copy are not cleared", "UninitializedRead"
)
def _(ptx):
    ptx.drop(ptx.before(row_in_part(ptx), SKIP))


@planted("tiles", "rhs advances 64 bytes for 32 of the contraction", WRONG_RESULT)
def _(ptx):
    for product in ptx.all(WGMMA, least=4 * BODIES)[1::4]:
        ptx.replace(ptx.definition(descriptors(ptx, product)[1], product), r", 2;", ", 4;")


@planted("tiles", "lhs does not advance along the contraction", WRONG_RESULT)
def _(ptx):
    products = ptx.all(WGMMA, least=4 * BODIES)
    for i, step in ((1, 2), (2, 4), (3, 6)):
        for product in products[i::4]:
            place = ptx.definition(descriptors(ptx, product)[0], product)
            ptx.replace(place, rf", {step};", ", 0;")


@planted("tiles", "first product of a block keeps the last block's sum", WRONG_RESULT)
def _(ptx):
    for product in ptx.all(WGMMA, least=4 * BODIES)[::4]:
        test = ptx.before(product, r"\bsetp\.ne\.b32\b")
        ptx.replace(test, r"setp\.ne(\.b32 p, (%\w+)), 0;", r"setp.eq\1, \2;")


# ---- Loops over blocks that are unrolled by four


def of_four(ptx: Ptx, places: list[int]) -> list[int]:
    """Those places that lie in the loop of four blocks, one for each."""
    for branch in ptx.all(r"\bbra(\.uni)?\s+\$"):
        label = re.search(r"\$\w+", ptx.lines[branch])[0]
        loop = range(ptx.one(rf"^{re.escape(label)}:"), branch)
        if sum(i in loop for i in ptx.all(COMMIT)) == 4:
            found = [i for i in places if i in loop]
            if len(found) != 4:
                raise NoMatch(f"{len(found)} places in a loop of four blocks")
            return found
    raise NoMatch("no loop of four blocks")


@planted("blocks by fours", "second block does not wait for its stage", "Race")
def _(ptx):
    ptx.pass_at_once(of_four(ptx, ptx.waits("full"))[1])


@planted("blocks by fours", "fourth block keeps its stage", "Deadlock")
def _(ptx):
    ptx.drop(of_four(ptx, ptx.all(RELEASE))[3])


@planted("blocks by fours", "third block takes the scales of the second", "Race")
def _(ptx):
    _, second, third, _ = of_four(ptx, scale_reads(ptx))
    ptx.replace(third, r"\[%\w+\]", re.search(r"\[%\w+\]", ptx.lines[second])[0])


# ---- Two accumulator sets, two math warpgroups


def skipping(ptx: Ptx, stages: int) -> tuple[int, int]:
    """Wait and release of a warpgroup that lets stages go by; `stages` more waits are of products."""
    waits = ptx.waits("full", stages + 1)
    release = next(r for r in ptx.all(RELEASE) for w in waits if 0 < r - w < 30)
    return max(wait for wait in waits if wait < release), release


def of_products(ptx: Ptx, pattern: str, count: int) -> list[int]:
    """Waits for full stages or releases (RELEASE), but for the skipping warpgroup's."""
    found = ptx.waits("full") if pattern == "full" else ptx.all(pattern)
    found = [i for i in found if i not in skipping(ptx, len(ptx.waits("full")) - 1)]
    if len(found) != count:
        raise NoMatch(f"{pattern}: {len(found)}, expected {count}")
    return found


@planted("idle warpgroup", "a warpgroup without rows does not wait for the stages", "Race")
def _(ptx):
    ptx.pass_at_once(skipping(ptx, 4)[0])


@planted("idle warpgroup", "a warpgroup without rows keeps the stages", "Deadlock")
def _(ptx):
    ptx.drop(skipping(ptx, 4)[1])


@planted("two sets", "second turn does not wait for its stage", "Race")
def _(ptx):
    ptx.pass_at_once(of_products(ptx, "full", 4)[2])


@planted("two sets", "second turn promotes without wait_group", "Race")
def _(ptx):
    ptx.drop(ptx.all(WAIT_GROUP, least=4)[2])


@planted("two sets", "second turn without wgmma.fence", "MissingFence")
def _(ptx):
    ptx.drop(ptx.all(WGMMA_FENCE, least=4)[2])


@planted("two sets", "first turn without commit_group", "Race")
def _(ptx):
    ptx.drop(ptx.all(COMMIT, least=4)[1])


@planted("two sets", "first turn's products go to the set that is promoted", "RegisterInFlight")
def _(ptx):
    products = ptx.all(WGMMA, least=16)
    registers = [re.search(r"\{(.*?)\}", ptx.lines[products[i]])[1] for i in (0, 4)]
    for product in products[4:8]:
        ptx.replace(product, re.escape(registers[1]), registers[0])


@planted("two sets", "first turn's stage released before its products are done", "Race")
def _(ptx):
    release, wait = of_products(ptx, RELEASE, 4)[1], ptx.all(WAIT_GROUP, least=4)[1]
    begin, end = ptx.before(release, r"bar\.warp\.sync"), ptx.after(release, LABEL)
    if not wait < begin:
        raise NoMatch("the release does not follow the wait")
    ptx.move(range(wait, wait + 1), end + 1)


@planted("two waves", "later blocks do not wait for their stage", "Race")
def _(ptx):
    ptx.pass_at_once(of_products(ptx, "full", 2)[1])


@planted("two waves", "upper wave is promoted before its products are done", "RegisterInFlight")
def _(ptx):
    ptx.drop(ptx.all(WAIT_GROUP, least=3)[0])


@planted("two waves", "stage released before the lower wave's products are done", "Race")
def _(ptx):
    release = of_products(ptx, RELEASE, 1)[0]
    begin, end = ptx.before(release, r"bar\.warp\.sync"), ptx.after(release, LABEL)
    ptx.move(range(begin, end + 1), ptx.before(release, WAIT_GROUP))


@planted("two sets", "producers keep their registers", "RegisterBudget")
def _(ptx):
    ptx.drop(ptx.one(r"\bsetmaxnreg\.dec\b"))


# ---- Scales


def scale_reads(ptx: Ptx) -> list[int]:
    """The math warps' reads of two row scales, one for each block's products."""
    return [ptx.after(i, r"\bld\.shared\.v2\.f32\b") for i in ptx.all(COMMIT, least=BODIES)]


@planted("tiles", "neighbouring rows exchange their scales", WRONG_RESULT)
def _(ptx):
    for place in scale_reads(ptx):
        address = re.search(r"\[(%\w+)\]", ptx.lines[place])[1]
        exchange = f"xor.b32 {address}, {address}, 8;"
        ptx.insert(place, exchange)
        ptx.insert(place + 1, exchange)


@planted("tiles", "the two rows of a lane exchange their scales", WRONG_RESULT)
def _(ptx):
    for place in scale_reads(ptx):
        ptx.replace(place, r"\{(%\w+), (%\w+)\}", r"{\2, \1}")


@planted("tiles", "row scales come from the first stage", "Race")
def _(ptx):
    for place in scale_reads(ptx):
        address = re.search(r"\[(%\w+)\]", ptx.lines[place])[1]
        stage = ptx.before(place, r"\bmul\.lo\.s32\b.*, 272;")  # bytes of a stage's scales
        ptx.insert(place, f"sub.u32 {address}, {address}, {ptx.operands(stage)[0]};")


@planted("outer", "columns take the scales of their neighbours", WRONG_RESULT)
def _(ptx):
    ptx.replace(ptx.first(r"\bld\.shared\.v4\.f32\b"), r"\{(%\w+), (%\w+),", r"{\2, \1,")


@planted("tiles", "every block takes the first one's row scales", WRONG_RESULT)
def _(ptx):
    keep_source(ptx, 0)


@planted("tiles", "every block takes the first one's column scales", WRONG_RESULT)
def _(ptx):
    keep_source(ptx, -1)


def keep_source(ptx: Ptx, copy: int):
    """The source of a copy of scales does not advance from block to block."""
    source = re.search(r"\], \[(%\w+)\]", ptx.lines[ptx.all(CP_ASYNC, least=3)[copy]])[1]
    ptx.drop(ptx.one(rf"\badd\.s64\s+{source}, {source},"))


@planted("tiles", "scales of rows past the operand are read", "OutOfBounds")
def _(ptx):
    copy = ptx.all(CP_ASYNC, least=3)[1]
    ptx.set(ptx.definition(ptx.operands(copy)[-1], copy), 4)


@planted("tiles", "scales are skipped, not zero-filled, past the operand", "UninitializedRead")
def _(ptx):
    for copy in ptx.all(CP_ASYNC, least=3)[:2]:
        size = ptx.operands(copy)[-1]
        ptx.lines[copy] = (
            f"{{ .reg .pred q; setp.ne.u32 q, {size}, 0; @q {ptx.lines[copy].strip()} }}"
        )


@planted("tiles", "copies of the rhs scales removed", "UninitializedRead")
def _(ptx):
    ptx.drop(ptx.all(CP_ASYNC, least=3)[2])


# ---- Tiles and segments


def in_clusters(ptx: Ptx, special: str) -> int:
    """Where the scheduler divides a special register by the cluster's size."""
    count = ptx.operands(ptx.one(rf"mov\.u32\s+%\w+, {special};"))[0]
    return ptx.one(rf"\bshr\.[us]32\s+%\w+, {count},")


def stride(ptx: Ptx) -> int:
    return in_clusters(ptx, r"%nctaid\.x")


@planted("two CTAs", "tiles of a CTA lie one too close", "DoubleWrite")
def _(ptx):
    ptx.set(stride(ptx), 1)


@planted("two CTAs", "tiles of a CTA lie one too far", WRONG_RESULT)
def _(ptx):
    ptx.set(stride(ptx), 3)


@planted("two CTAs", "a CTA starts one tile too late", WRONG_RESULT)
def _(ptx):
    place = in_clusters(ptx, r"%ctaid\.x")
    tile = ptx.operands(place)[0]
    ptx.insert(place + 1, f"add.u32 {tile}, {tile}, 1;")


@planted("tiles", "coordinates of the lhs copy exchanged", WRONG_RESULT)
def _(ptx):
    ptx.replace(load(ptx).copies["lhs"], r"\{(%\w+), (%\w+)\}", r"{\2, \1}")


@planted("odd columns", "columns past the output are stored", "DoubleWrite")
def _(ptx):
    ptx.set(
        ptx.after(ptx.all(WAIT_GROUP)[-1], rf"\bsub\.s32\s+%\w+, {ptx.parameter(N)}, %\w+;"),
        1 << 20,
    )


def rows_to_store(ptx: Ptx, path: str) -> int:
    """The scheduler's minimum of the rows that are left and those of a tile."""
    return ptx.check(sent(ptx, path, "rows"), r"\bmin\.s32\s+%\w+, %\w+, 64;")


@planted("odd columns", "rows past the output are stored", "OutOfBounds")
def _(ptx):
    ptx.set(rows_to_store(ptx, "dense"), 64)


@planted("groups", "rows past a group are stored", "DoubleWrite")
def _(ptx):
    ptx.set(rows_to_store(ptx, "listed"), 64)


@planted("groups", "rows past the groups are not zeroed", WRONG_RESULT)
def _(ptx):
    groups = ptx.parameter(GROUPS)
    ptx.replace(ptx.one(rf"\bsetp\.eq\.s32\s+%\w+, %\w+, {groups};"), rf"{groups};", "-1;")


@planted("as many groups as lanes", "the rows past the groups are no segment", WRONG_RESULT)
def _(ptx):
    ptx.replace(ptx.one(rf"\badd\.s32\s+%\w+, {ptx.parameter(GROUPS)}, 1;"), ", 1;", ", 0;")


def first_entry(ptx: Ptx, path: str, field: str, parameter: str):
    """Rows of every group or batch entry begin where the first one's do."""
    rows = ptx.parameter(parameter)
    ptx.replace(sent(ptx, path, field), rf"(\bmad\.lo\.s32\s+%\w+, %\w+), {rows},", r"\1, 0,")


@planted("groups", "all groups take the first one's rhs", WRONG_RESULT)
def _(ptx):
    first_entry(ptx, "listed", "rhs_row", RHS_GROUP_ROWS)


@planted("groups", "a negative group size is taken as it is", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bmax\.s32\s+%\w+, %\w+, 0;", least=3):
        ptx.replace(place, r"max\.s32\s+(%\w+), (%\w+), 0", r"mov.b32 \1, \2")


@planted("masked groups", "rows past a group's valid ones keep what they held", WRONG_RESULT)
def _(ptx):
    ptx.set(ptx.one(rf"\bsub\.s32\s+(%\w+), {ptx.parameter(M)}, \1;"), 0)


@planted("wgrad groups", "a group's last, short block of tokens is left out", WRONG_RESULT)
def _(ptx):
    ptx.replace(ptx.one(r"\badd\.s32\s+%\w+, %\w+, 127;"), "127;", "0;")


@planted("wgrad groups", "each group starts a block of tokens too late", WRONG_RESULT)
def _(ptx):
    blocks = ptx.operands(ptx.one(r"\bshr\.[su]32\s+%\w+, %\w+, 7;"))[0]
    first = ptx.one(rf"\bsub\.s32\s+%\w+, %\w+, {blocks};")
    register = ptx.operands(first)[0]
    ptx.insert(first + 1, f"add.s32 {register}, {register}, 1;")


# ---- Epilogue


@planted("odd columns", "a clipped strip is read as if it were not swizzled", WRONG_RESULT)
def _(ptx):
    place = ptx.one(r"\bld\.shared\.b16\b")
    address = re.search(r"\[(%\w+)\]", ptx.lines[place])[1]
    ptx.insert(place, f"xor.b32 {address}, {address}, 16;")


@planted("odd columns", "lanes read a clipped strip that others still write", "Race")
def _(ptx):
    ptx.drop(ptx.before(ptx.one(r"\bld\.shared\.b16\b"), r"\bbar\.warp\.sync\b"))


@planted(
    "odd columns", "lanes take every second of their accesses to a clipped strip", WRONG_RESULT
)
def _(ptx):
    step = ptx.after(ptx.one(r"\bld\.shared\.b16\b"), r"\badd\.s32\s+(%\w+), \1, 32;")
    ptx.replace(step, "32;", "64;")


@planted("tiles", "the scaled product overwrites the sum", WRONG_RESULT)
def _(ptx):
    for wait in ptx.all(WAIT_GROUP, least=BODIES):
        place = ptx.after(wait, r"\bfma\.rn\.f32\b")
        ptx.replace(place, r"fma\.rn\.f32(\s+%\w+, %\w+, %\w+), %\w+;", r"mul.f32\1;")


@planted("accumulate", "old values are not added", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bld\.global\.u32\b", least=8):
        ptx.set(place, 0)


@planted("accumulate in float32", "sums are stored, not added", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bred\.relaxed\.gpu\.global\.add\.v2\.f32\b"):
        ptx.replace(place, r"red\.\S+", "st.global.v2.f32")


@planted("accumulate in float32", "a strip is stored, not added", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bcp\.reduce\.async\.bulk\.tensor\.2d\b"):
        ptx.replace(place, r"cp\.reduce(\.async\.bulk\.tensor\.2d\S*)\.add\.tile", r"cp\1.tile")


@planted("tiles", "a warp does not wait until its strip has been read", "Race")
def _(ptx):
    ptx.drop(ptx.first(BULK_WAIT_READ))


@planted("outer", "lanes do not wait for the one that waits for their strip", "Race")
def _(ptx):  # of a float32 kernel: stmatrix, which others use, waits for all lanes itself
    for wait in ptx.all(BULK_WAIT_READ, least=2)[:-1]:
        ptx.drop(ptx.after(wait, r"\bbar\.warp\.sync\b"))


@planted("tiles", "stores of a strip are not committed", "Race")
def _(ptx):
    ptx.drop(ptx.one(r"\bcp\.async\.bulk\.commit_group\b"))


@planted("tiles", "a strip is not fenced before the copy engine reads it", "MissingFence")
def _(ptx):
    ptx.drop(ptx.before(ptx.one(TMA_STORE), FENCE))


@planted("tiles", "the copy engine reads a strip that lanes still write", "Race")
def _(ptx):
    ptx.drop(ptx.before(ptx.one(TMA_STORE), r"\bbar\.warp\.sync\b"))


@planted("tiles", "a strip is not swizzled", WRONG_RESULT)
@planted("16 columns", "a strip is not swizzled", WRONG_RESULT)
def _(ptx):
    place = ptx.first(r"\bstmatrix\b")
    address = re.search(r"\[(%\w+)\]", ptx.lines[place])[1]
    ptx.insert(place, f"xor.b32 {address}, {address}, 16;")
    ptx.insert(place + 1, f"xor.b32 {address}, {address}, 16;")


@planted("tiles", "strips go to the columns of the tile's first", "DoubleWrite")
def _(ptx):
    ptx.replace(ptx.one(TMA_STORE), r"\{%\w+, (%\w+)\}", r"{0, \1}")


@planted("tiles", "a CTA leaves before the copy engine has read its strips", "ExitedCta")
def _(ptx):
    ptx.drop(ptx.all(BULK_WAIT_READ, least=2)[-1])


@planted("tiles", "lanes still read a stage that their warp releases", "Race")
def _(ptx):
    # wgmma's own .sync instructions bring the lanes together before the barrier: the last read of a
    # stage goes behind it.
    for release in ptx.all(RELEASE, least=BODIES):
        barrier = ptx.before(release, r"\bbar\.warp\.sync\b")
        read = ptx.lines[ptx.before(barrier, r"\bld\.shared\b")]
        ptx.lines[barrier] += read


# ---- Clusters


@planted("column cluster", "the column's multicast misses the peer", "Deadlock")
def _(ptx):
    ptx.replace(load(ptx, "rhs").copies["rhs"], r", %\w+;", ", 1;")


@planted("row cluster", "the row's multicast misses the peer", "Deadlock")
def _(ptx):
    ptx.replace(load(ptx, "lhs").copies["lhs"], r", %\w+;", ", 1;")


@planted("row cluster", "a part of the lhs is copied to its own CTA only", "Deadlock")
def _(ptx):
    copy = load(ptx, "lhs").copies["lhs"]
    ptx.replace(copy, rf"{MULTICAST}(.*), %\w+;", r"\1;")


@planted("column cluster", "both CTAs multicast the lhs, too", "Race")
def _(ptx):
    copies = load(ptx, "rhs").copies
    cluster = re.search(r"(%\w+);", ptx.lines[copies["rhs"]])[1]
    ptx.replace(copies["lhs"], r"(::bytes)( .*);", rf"\1.multicast::cluster\2, {cluster};")


@planted("column cluster", "the operand warp takes the loop for a shared lhs", "Race")
def _(ptx):
    no_blocks = ptx.before(load(ptx, "lhs").wait, r"\bsetp\.lt\.s32\b.*, 1;")
    begin = ptx.lines[ptx.before(no_blocks, LABEL)]  # that test begins a version
    branch = ptx.one(rf"^\s*@%\w+ bra\s+{re.escape(begin.strip()[:-1])};")
    ptx.replace(branch, r"@%\w+ ", "")


@planted("column cluster", "the peer is not told that a stage is free", "Deadlock")
def _(ptx):
    skips = {ptx.before(release, SKIP) for release in ptx.all(RELEASE, least=5)}
    for test in {ptx.definition(re.search(r"@(%\w+)", ptx.lines[skip])[1], skip) for skip in skips}:
        size = [r for r in ptx.operands(test)[1:] if "mul.lo" in ptx.lines[ptx.definition(r)]]
        if len(size) != 1:
            raise NoMatch("a release does not depend on the cluster's size")
        ptx.replace(test, rf"{size[0]}\b", "1")


@planted("column cluster", "both arrivals go to the CTA itself", "Race")
def _(ptx):
    place = ptx.one(r"\bmapa\b")
    ptx.insert(place + 1, f"mov.b32 {ptx.operands(place)[0]}, {ptx.operands(place)[1]};")


@planted("column cluster", "a free stage counts this CTA's warps only", "Race")
def _(ptx):
    recount(ptx, "empty", "shr.u32", 1)


@planted("column cluster", "a CTA leaves before its peer is done", "ExitedCta")
def _(ptx):
    ptx.pass_at_once(waits_for_a_free_stage(ptx)["last"])


@planted("column cluster", "CTAs do not wait for each other's barriers", "Race")
def _(ptx):
    ptx.lines[ptx.one(CLUSTER_ARRIVE)] = "bar.sync 0;"
    ptx.drop(*ptx.all(CLUSTER_WAIT, least=4))


def same_part(ptx: Ptx, operand: str):
    """Each CTA of a cluster loads the first one's part of the operand that they share."""
    copy = load(ptx, operand).copies[operand]
    row = re.search(r"\{%\w+, (%\w+)\}", ptx.lines[copy])[1]
    work = {ptx.operands(i)[0] for i in ptx.all(RECEIVED)}
    terms = [t for t in ptx.operands(ptx.definition(row, copy))[1:] if t not in work]
    if len(terms) != 1:
        raise NoMatch(f"the row of the {operand} copy is not the tile's plus a part")
    ptx.set(ptx.check(ptx.definition(terms[0], copy), r"\b(mul\.lo|selp)\b"), 0)


@planted("column cluster", "both CTAs load the same part of the rhs block", "Race")
def _(ptx):
    same_part(ptx, "rhs")


# ---- Batches, accumulation, bands, the larger tiles

LHS_GROUP_ROWS, CLUSTER_M, CLUSTER_N = "lhs_group_rows", "cluster_m", "cluster_n"
BAND = "band"


def received(ptx: Ptx, warp: str, field: str) -> int:
    """Where the "operands" or the "scales" warp reads a field of its Work."""
    places = ptx.all(RECEIVED, least=24)
    reads = [places[i : i + 8] for i in range(0, 24, 8)]
    copy = load(ptx).copies["lhs"]
    row = ptx.definition(re.search(r"\{%\w+, (%\w+)\}", ptx.lines[copy])[1], copy)
    operands = next((r for r in reads if ptx.operands(r[0])[0] in ptx.operands(row)), None)
    math = max(r for r in reads if r[-1] < ptx.waits("full")[0])
    scales = next((r for r in reads if r not in (operands, math)), None)
    if len(places) != 24 or operands in (None, math) or scales is None:
        raise NoMatch("three warps do not read their Work")
    return {"operands": operands, "scales": scales}[warp][FIELDS.index(field)]


def flag(ptx: Ptx, bit: int) -> list[int]:
    """Where a flag of the arguments is tested."""
    registers = ptx.parameters("flags")
    return ptx.all(rf"\band\.b32\s+%\w+, ({'|'.join(registers)}), {bit};")


@planted("batch", "every entry takes the first one's lhs", WRONG_RESULT)
def _(ptx):
    first_entry(ptx, "dense", "lhs_row", LHS_GROUP_ROWS)


@planted("batch", "every entry takes the first one's rhs", WRONG_RESULT)
def _(ptx):
    first_entry(ptx, "dense", "rhs_row", RHS_GROUP_ROWS)


def entry_of_tile(ptx: Ptx) -> int:
    """Where a dense product's tile is divided by the tiles of a batch entry."""
    group = fields(ptx, sends(ptx)["dense"])["group"]
    return ptx.check(ptx.definition(group, sends(ptx)["dense"]), r"\bdiv\.u32\b")


@planted("batch", "every tile is of the first entry", "OutOfBounds")
def _(ptx):
    ptx.set(entry_of_tile(ptx), 0)


@planted("batch", "tiles are not counted from the first one of their entry", "OutOfBounds")
def _(ptx):
    entry = entry_of_tile(ptx)
    group, tile, tiles = ptx.operands(entry)
    first = ptx.operands(ptx.after(entry, rf"\bmul\.lo\.s32\s+%\w+, {group}, {tiles};"))[0]
    place = ptx.after(entry, rf"\bsub\.s32\s+%\w+, {tile}, {first};")
    ptx.set(place, tile)


@planted("batch", "every entry is stored in the first one's place", "DoubleWrite")
def _(ptx):
    first_entry(ptx, "dense", "out_row", M)


@planted("batch", "every entry takes the first one's rhs scales", WRONG_RESULT)
def _(ptx):
    ptx.set(received(ptx, "scales", "group"), 0)


@planted("masked sizes that lie", "a size above the rows is taken as it is", "DoubleWrite")
def _(ptx):
    for place in ptx.all(rf"\bmin\.u32\s+%\w+, %\w+, {ptx.parameter(M)};", least=2):
        ptx.replace(place, r"min\.u32\s+(%\w+), (%\w+), %\w+;", r"mov.b32 \1, \2;")


@planted("masked sizes that lie", "a negative size is taken as it is", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bmax\.s32\s+%\w+, %\w+, 0;", least=3):
        ptx.replace(place, r"max\.s32\s+(%\w+), (%\w+), 0", r"mov.b32 \1, \2")


@planted("groups accumulate", "the old values of odd columns are not added", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bld\.global\.u16\b", least=8)[1::2]:
        ptx.replace(place, r"ld\.global\.u16\s+(%\w+), .*;", r"mov.b32 \1, 0;")


@planted("groups accumulate", "rows past a group are added to, too", WRONG_RESULT)
def _(ptx):
    ptx.set(rows_to_store(ptx, "listed"), 64)


@planted("wgrad groups accumulate", "sums are stored, not added", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(r"\bcp\.reduce\.async\.bulk\.tensor\.2d\b"):
        ptx.replace(place, r"cp\.reduce(\.async\.bulk\.tensor\.2d\S*)\.add\.tile", r"cp\1.tile")


@planted("wgrad groups", "groups without tokens keep what they held", WRONG_RESULT)
def _(ptx):
    for place in flag(ptx, 1):
        ptx.set(place, 1)


@planted("wgrad groups", "every group's scales are those of the first tokens", WRONG_RESULT)
def _(ptx):
    ptx.set(received(ptx, "scales", "k_block"), 0)


@planted("wgrad groups", "every group multiplies the first tokens", WRONG_RESULT)
def _(ptx):
    ptx.set(received(ptx, "operands", "k_block"), 0)


@planted(
    "odd columns in float32", "pairs are stored where rows are not aligned to them", "Misaligned"
)
def _(ptx):
    for place in flag(ptx, 4):
        ptx.set(place, 4)


@planted("bands", "the last band is as wide as the others", WRONG_RESULT)
def _(ptx):
    band = ptx.parameter(BAND)
    for place in ptx.all(rf"\bmin\.u32\s+%\w+, (?:%\w+, {band}|{band}, %\w+);", least=2):
        ptx.set(place, band)


@planted("groups", "the scheduling warp's lanes disagree about the first tile", "OutOfBounds")
def _(ptx):
    place = ptx.one(r"\bvote\.sync\.ballot\.b32\b")
    ptx.insert(place + 1, f"and.b32 {ptx.operands(place)[0]}, {ptx.operands(place)[0]}, -2;")


@planted("row cluster", "both CTAs load the same part of the lhs block", "Race")
def _(ptx):
    same_part(ptx, "lhs")


def rank_of_scheduler(ptx: Ptx) -> str:
    place = ptx.before(ptx.one(r"mov\.u32\s+%\w+, %ctaid\.x;"), r"%cluster_ctarank\b")
    return ptx.operands(place)[0]


@planted("row cluster", "both CTAs compute the same columns", "DoubleWrite")
def _(ptx):
    ptx.set(ptx.one(rf"\band\.b32\s+%\w+, {rank_of_scheduler(ptx)}, "), 0)


@planted("column cluster", "both CTAs compute the same rows", "DoubleWrite")
def _(ptx):
    ptx.set(ptx.one(rf"\bshr\.s32\s+%\w+, {rank_of_scheduler(ptx)}, "), 0)


@planted(
    "upper and lower rows",
    "the lower rows' products are promoted before they are done",
    "RegisterInFlight",
)
def _(ptx):
    ptx.drop(*ptx.all(WAIT_GROUP, least=2)[1::2])  # of every copy of the loop's body


@planted("upper and lower rows", "the lower rows are multiplied as the upper ones", WRONG_RESULT)
def _(ptx):
    products = ptx.all(WGMMA, least=8)
    for first, second in zip(products[::8], products[4::8], strict=True):
        upper, lower = (descriptors(ptx, i)[0] for i in (first, second))
        ptx.insert(second, f"mov.b64 {lower}, {upper};")


@planted("upper and lower rows", "the lower rows take the upper ones' scales", WRONG_RESULT)
def _(ptx):
    reads = ptx.all(r"\bld\.shared\.v2\.f32\b", least=2)
    for upper, lower in zip(reads[::2], reads[1::2], strict=True):
        ptx.replace(lower, r"\[%\w+\]", re.search(r"\[%\w+\]", ptx.lines[upper])[0])


@planted("three segments", "the first and the last 64 columns exchange their scales", WRONG_RESULT)
def _(ptx):
    reads = ptx.all(r"\bld\.shared\.v2\.f32\b", least=2)  # of rows and of columns by turns
    for place in reads[1::2]:
        ptx.replace(place, r"\{(%\w+), (%\w+)\}", r"{\2, \1}")


@planted("three segments", "the middle 64 columns take the scale of the other block", WRONG_RESULT)
def _(ptx):
    reads = ptx.all(r"\bld\.shared\.v2\.f32\b", least=2)
    for place in {ptx.after(read, r"\bsetp\.lt\.s32.*, 64;") for read in reads[1::2]}:
        ptx.replace(place, r"setp\.lt", "setp.ge")


@planted("side by side", "both warpgroups take the scales of the left columns", WRONG_RESULT)
def _(ptx):
    place = ptx.before(ptx.first(r"\bld\.shared\.v4\.f32\b"), r"\bmad\.lo\.s32\b")
    ptx.replace(place, ", 384,", ", 0,")  # bytes of 96 scales


@planted("E5M2", "the lhs is multiplied as E4M3", WRONG_RESULT)
def _(ptx):
    for place in ptx.all(WGMMA, least=4):
        ptx.replace(place, r"\.e5m2\.e4m3", ".e4m3.e4m3")
