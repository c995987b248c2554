"""What orders accesses, by lane, scope and semantics: the fault is found, the right form is not."""

import dataclasses
import re

import numpy as np
import pytest

from tests.emulator import (
    DoubleWrite,
    ExitedCta,
    LaunchError,
    Memory,
    MissingFence,
    OutOfBounds,
    Race,
    Trap,
    UninitializedRead,
    launch,
)
from tests.emulator_programs import all_programs
from tests.emulator_programs.copies import INITIALIZE, MODULE, tensor_map, wait
from tests.emulator_programs.program import Program, kernel

pytestmark = pytest.mark.emulator

PROGRAMS = {p.name: p for p in all_programs()}


def _words(count: int):
    return lambda: [np.zeros(count, np.uint32)]


def _collect(program: Program, stop_at: str = "nothing"):
    return program.launch(program.arguments(), stop_at=stop_at)


# --- lanes ------------------------------------------------------------------------------------


def _bulk_wait_then(barrier: str) -> Program:
    """Lane 0 stores shared memory in bulk and waits; after the barrier, warp 1 overwrites it."""
    text = kernel(
        "u64",
        f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d1, [p0];
    and.b32 %r1, %r100, 31;
    mad.lo.u32 %r2, %r1, 4, %r102;
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra SECOND;
    st.shared.u32 [%r2], %r100;
    fence.proxy.async;
    bar.warp.sync -1;
    setp.ne.u32 %p2, %r100, 0;
    @%p2 bra SECOND;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r102], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
SECOND:
    {barrier}
    @!%p1 bra END;
    st.shared.u32 [%r2], 7;
END:""",
        module=MODULE,
    )

    def check(got):
        np.testing.assert_array_equal(got, np.arange(32))

    return Program("", text, _words(32), check, block=64, dynamic_smem=128)


@pytest.mark.parametrize(
    "barrier",
    [
        "bar.sync 0;",
        "bar.sync 1, 64;",
        "barrier.cluster.arrive.aligned;\n    barrier.cluster.wait.aligned;",
    ],
)
def test_a_barrier_carries_what_one_lane_waited_for(barrier):
    for seed in range(3):
        _bulk_wait_then(barrier).run(seed)
    with pytest.raises(Race):
        _bulk_wait_then("").run()


def _elected_arrival(sync: str, arriving: int = 1, fence: str = "") -> Program:
    """Lanes of warp 0 read; some of them arrive; warp 1 waits and overwrites."""
    text = kernel(
        "u64",
        INITIALIZE.replace("[%r101], 1;", f"[%r101], {arriving};")
        + f"""
    ld.param.u64 %d1, [p0];
    and.b32 %r1, %r100, 31;
    mad.lo.u32 %r2, %r1, 4, %r102;
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra OVERWRITE;
    st.shared.u32 [%r2], %r100;
    ld.shared.u32 %r3, [%r2];
    {sync}
    setp.ge.u32 %p2, %r100, {arriving};
    @%p2 bra END;
    {fence}
    mbarrier.arrive.shared::cta.b64 _, [%r101];
    bra END;
OVERWRITE:
{wait()}
    st.shared.u32 [%r2], %r100;
    ld.shared.u32 %r3, [%r2];
END:
    mad.wide.u32 %d2, %r100, 4, %d1;
    st.global.u32 [%d2], %r3;""",
        module=MODULE,
    )

    def check(got):
        np.testing.assert_array_equal(got, np.arange(64))

    return Program("", text, _words(64), check, block=64, dynamic_smem=128)


@pytest.mark.parametrize(
    "sync",
    [
        "bar.warp.sync -1;",
        "shfl.sync.idx.b32 %r5, %r3, 0, 31, -1;",
        "wgmma.fence.sync.aligned;",
        "elect.sync _|%p5, -1;",
        "vote.sync.any.pred %p5, %p1, -1;",
    ],
)
def test_lanes_meet_at_every_sync_instruction(sync):
    for seed in range(3):
        _elected_arrival(sync).run(seed)


@pytest.mark.parametrize("arriving", [1, 2, 31])
def test_lanes_that_arrive_do_not_stand_for_those_that_do_not(arriving):
    with pytest.raises(Race):
        _elected_arrival("", arriving).run()
    _elected_arrival("", 32).run()
    _elected_arrival("bar.warp.sync -1;", arriving).run()


def _lane_zero_waits(sync: str) -> Program:
    """Warp 0 writes and arrives; of warp 1 lane 0 alone waits, and all lanes read."""
    text = kernel(
        "u64",
        INITIALIZE.replace("[%r101], 1;", "[%r101], 32;")
        + f"""
    ld.param.u64 %d1, [p0];
    and.b32 %r1, %r100, 31;
    mad.lo.u32 %r2, %r1, 4, %r102;
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra READ;
    st.shared.u32 [%r2], %r100;
    mbarrier.arrive.shared::cta.b64 _, [%r101];
    bra END;
READ:
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra WAITED;
{wait()}
WAITED:
    {sync}
    ld.shared.u32 %r3, [%r2];
    mad.wide.u32 %d2, %r1, 4, %d1;
    st.global.u32 [%d2], %r3;
END:""",
        module=MODULE,
    )

    def check(got):
        np.testing.assert_array_equal(got, np.arange(32))

    return Program("", text, _words(32), check, block=64, dynamic_smem=128)


def test_a_wait_by_one_lane_is_not_one_by_its_warp():
    for seed in range(3):
        _lane_zero_waits("bar.warp.sync -1;").run(seed)
    with pytest.raises((Race, UninitializedRead)):
        _lane_zero_waits("").run()


# --- scopes -----------------------------------------------------------------------------------

REMOTE = "mbarrier.arrive.release.cluster.shared::cluster.b64"


def test_an_arrival_at_another_cta_needs_cluster_scope():
    right = PROGRAMS["remote " + REMOTE]
    right.run()
    wrong = right.ptx.replace(REMOTE, REMOTE.replace("release.cluster", "release.cta"))
    with pytest.raises(Race):
        dataclasses.replace(right, ptx=wrong).run()


def test_a_wait_for_another_cta_needs_cluster_scope():
    right = PROGRAMS["remote " + REMOTE]
    named = "mbarrier.try_wait.parity.acquire.{}.shared::cta.b64"
    text = right.ptx.replace("mbarrier.try_wait.parity.shared::cta.b64", named)
    dataclasses.replace(right, ptx=text.replace("{}", "cluster")).run()
    with pytest.raises(Race):
        dataclasses.replace(right, ptx=text.replace("{}", "cta")).run()


# --- atomics and fences -----------------------------------------------------------------------

STORE = "st.global.u32 [%d4], %r3;"
LOAD = "ld.global.u32 %r6, [%d5];"


def _last_block(
    *,
    release: str = "fence.acq_rel.gpu;",
    ticket: str = "atom.global.add.u32",
    acquire: str = "fence.acq_rel.gpu;",
    sync: str = "bar.sync 0;",
    all_fence: str = "",
    volatile: str = "",
) -> Program:
    """Each CTA stores 64 partial values; the one with the last ticket adds those of all."""
    text = kernel(
        "u64 u64 u64",
        f"""
    .shared .align 4 .b32 last;
    mov.u32 %r100, %tid.x;
    mov.u32 %r1, %ctaid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    ld.param.u64 %d3, [p2];
    mad.lo.u32 %r3, %r1, 64, %r100;
    mad.wide.u32 %d4, %r3, 4, %d1;
    st{volatile}.global.u32 [%d4], %r3;
    {all_fence}
    {sync}
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra COUNTED;
    {release}
    {ticket} %r4, [%d2], 1;
    {acquire}
    st.shared.u32 [last], %r4;
COUNTED:
    bar.sync 0;
    ld.shared.u32 %r4, [last];
    setp.ne.u32 %p2, %r4, 2;
    @%p2 bra END;
    mov.u32 %r7, 0;
    mov.u32 %r8, 0;
    mad.wide.u32 %d5, %r100, 4, %d1;
ADD:
    ld{volatile}.global.u32 %r6, [%d5];
    add.u32 %r7, %r7, %r6;
    add.u64 %d5, %d5, 256;
    add.u32 %r8, %r8, 1;
    setp.lt.u32 %p3, %r8, 3;
    @%p3 bra ADD;
    mad.wide.u32 %d6, %r100, 4, %d3;
    st.global.u32 [%d6], %r7;
END:""",
    )

    def check(_, __, total):
        np.testing.assert_array_equal(total, np.arange(192).reshape(3, 64).sum(0))

    def arguments():
        return [np.zeros(192, np.uint32), np.zeros(1, np.uint32), np.zeros(64, np.uint32)]

    return Program("", text, arguments, check, block=64, grid=3)


ORDERED = {
    "fences on both sides": {},
    "an atomic of both semantics": {
        "ticket": "atom.acq_rel.gpu.global.add.u32", "release": "", "acquire": "",
    },
    "released by a fence, acquired by the atomic": {
        "ticket": "atom.acquire.gpu.global.add.u32", "acquire": "",
    },
    "a fence by every thread before the barrier": {
        "all_fence": "fence.sc.gpu;", "release": "",
    },
    "system scope": {"ticket": "atom.acq_rel.sys.global.add.u32", "release": "", "acquire": ""},
}  # fmt: skip

UNORDERED = {
    "no fence before the ticket": {"release": ""},
    "no fence after the ticket": {"acquire": ""},
    "no fence at all: the result of the atomic is used": {"release": "", "acquire": ""},
    "the atomic only acquires": {
        "ticket": "atom.acquire.gpu.global.add.u32", "release": "", "acquire": "",
    },
    "the atomic only releases": {
        "ticket": "atom.release.gpu.global.add.u32", "release": "", "acquire": "",
    },
    "the scope of the atomic is the CTA": {
        "ticket": "atom.acq_rel.cta.global.add.u32", "release": "", "acquire": "",
    },
    "the scope of the fence is the CTA": {"release": "fence.acq_rel.cta;"},
    "no barrier before the fence": {"sync": ""},
    "volatile, and no fence before the ticket": {"volatile": ".volatile", "release": ""},
}  # fmt: skip


@pytest.mark.parametrize("how", ORDERED)
def test_a_sum_by_the_last_block_passes(how):
    for seed in range(3):
        _last_block(**ORDERED[how]).run(seed)


@pytest.mark.parametrize("how", UNORDERED)
def test_a_sum_by_the_last_block_without_its_order_is_a_race(how):
    for seed in range(3):
        with pytest.raises(Race) as raised:
            _last_block(**UNORDERED[how]).run(seed)
    assert raised.value.section.startswith("Memory Consistency Model")


def test_volatile_reads_that_see_a_ticket_need_an_acquire_by_the_letter_only():
    """The form that the CUDA guide prints: a warning."""
    program = _last_block(volatile=".volatile", acquire="")
    report = _collect(program, "error")
    assert {(type(f), f.severity) for f in report.findings} == {(Race, "warning")}


def _flag(write: str, read: str) -> Program:
    """CTA 0 stores a value, then a flag; CTA 1 reads the flag, then the value."""
    text = kernel(
        "u64 u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r1, %ctaid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    ld.param.u64 %d3, [p2];
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra END;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra READ;
    st.global.u32 [%d1], 5;
    mov.u32 %r3, 1;
    {write} [%d2], %r3;
    bra END;
READ:
    {read} %r2, [%d2];
    setp.eq.u32 %p3, %r2, 0;
    @%p3 bra READ;
    ld.global.u32 %r4, [%d1];
    st.global.u32 [%d3], %r4;
END:""",
    )

    def check(_, __, got):
        assert got == 5

    def arguments():
        return [np.zeros(1, np.uint32) for _ in range(3)]

    return Program("", text, arguments, check, grid=2)


def test_flags_order_by_their_semantics():
    store, load = "st.release.gpu.global.u32", "ld.acquire.gpu.global.u32"
    _flag(store, load).run()
    _flag("fence.acq_rel.gpu;\n    st.relaxed.gpu.global.u32", load).run()
    for write, read in (
        ("st.relaxed.gpu.global.u32", load),
        (store, "ld.relaxed.gpu.global.u32"),
        ("st.volatile.global.u32", "ld.volatile.global.u32"),
        ("st.release.cta.global.u32", load),
        (store, "ld.acquire.cta.global.u32"),
        ("st.global.u32", "ld.global.u32"),
    ):
        with pytest.raises(Race):
            _flag(write, read).run()


def test_an_atomic_in_shared_memory_orders_by_its_semantics():
    def program(write: str, read: str) -> Program:
        text = kernel(
            "u64",
            f"""
    .shared .align 4 .b32 flag;
    .shared .align 4 .b32 cell;
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    setp.eq.u32 %p1, %r100, 0;
    @%p1 st.shared.u32 [flag], 0;
    bar.sync 0;
    and.b32 %r1, %r100, 31;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra END;
    setp.ne.u32 %p3, %r100, 0;
    @%p3 bra READ;
    st.shared.u32 [cell], 5;
    {write}.shared.add.u32 %r2, [flag], 1;
    bra END;
READ:
    {read}.shared.add.u32 %r2, [flag], 0;
    setp.eq.u32 %p4, %r2, 0;
    @%p4 bra READ;
    ld.shared.u32 %r4, [cell];
    st.global.u32 [%d1], %r4;
END:""",
        )

        def check(got):
            assert got == 5

        return Program("", text, _words(1), check, block=64)

    program("atom.release.cta", "atom.acquire.cta").run()
    program("fence.acq_rel.cta;\n    atom.relaxed.cta", "atom.acquire.cta").run()
    for write, read in (
        ("atom.relaxed.cta", "atom.acquire.cta"),
        ("atom.release.cta", "atom.relaxed.cta"),
    ):
        with pytest.raises((Race, UninitializedRead)):
            program(write, read).run()


# --- findings ---------------------------------------------------------------------------------

_EXCHANGE = """
    .shared .align 4 .b8 cells[512];
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, cells;
    ld.param.u64 %d1, [p0];
    mad.lo.u32 %r1, %r100, 4, %r102;
    mad.wide.u32 %d2, %r100, 4, %d1;
    {body}"""


def _exchange(body: str) -> Program:
    text = kernel("u64", _EXCHANGE.format(body=body))
    return Program("", text, _words(64), lambda *_: None, block=64)


def test_a_run_that_collects_goes_on_after_each_finding():
    race = """
    st.shared.u32 [%r1], %r100;
    xor.b32 %r2, %r1, 128;
    ld.shared.u32 %r3, [%r2];
    bar.sync 0;
    ld.shared.u32 %r4, [%r1+256];
    st.global.u32 [%d2], %r4;
    st.shared.u32 [%r2], %r3;
    ld.shared.u32 %r5, [%r1];"""
    report = _collect(_exchange(race))
    assert report.finished
    kinds = [type(f) for f in report.findings]
    assert kinds.count(Race) >= 2 and kinds.count(UninitializedRead) == 1
    assert all(f.section and f.line and f.severity == "error" for f in report.findings)
    assert "PTX ISA" in str(report.findings[0])


def test_a_run_that_collects_ends_at_what_it_cannot_go_on_from():
    body = "add.u64 %d3, %d2, 65536;\n    ld.global.u32 %r3, [%d3];\n    st.global.u32 [%d2], %r3;"
    report = _collect(_exchange(body))
    assert not report.finished
    assert [type(f) for f in report.findings] == [OutOfBounds]


def test_a_finding_is_counted_once_for_its_place():
    body = """
    mov.u32 %r8, 0;
L:
    ld.shared.u32 %r3, [%r1];
    add.u32 %r8, %r8, 1;
    setp.lt.u32 %p1, %r8, 5;
    @%p1 bra L;"""
    (finding,) = _collect(_exchange(body)).findings
    assert finding.count == 5


def test_what_nothing_wrote_is_an_error_only_where_its_value_is_used():
    read = "ld.shared.u32 %r3, [%r1];\n    {}\n    st.global.u32 [%d2], %r4;"
    used = _exchange(read.format("add.u32 %r4, %r3, 1;"))
    unused = _exchange(read.format("and.b32 %r4, %r3, 0;"))
    (finding,) = _collect(unused).findings
    assert (type(finding), finding.severity) == (UninitializedRead, "warning")
    (finding,) = _collect(used).findings
    assert (type(finding), finding.severity) == (UninitializedRead, "error")
    with pytest.raises(UninitializedRead):
        _collect(used, "error")
    with pytest.raises(UninitializedRead):
        unused.run()


@pytest.mark.parametrize("sync", ["", "bar.sync 0;"])
def test_a_racing_read_is_an_error_only_where_its_value_is_used(sync):
    """Each warp reads what the other writes."""
    body = f"""st.shared.u32 [%r1], %r100;
    xor.b32 %r2, %r1, 128;
    {sync}
    ld.shared.u32 %r3, [%r2];
    {{}}
    st.global.u32 [%d2], %r4;"""
    for use, severity in (("mov.b32 %r4, %r3;", "error"), ("and.b32 %r4, %r3, 0;", "warning")):
        program = _exchange(body.format(use))
        found = [(f.severity, f.of_a_value) for f in _collect(program).findings if f.of_a_value]
        assert found == ([] if sync else [(severity, True)]), use


def test_a_read_that_a_write_overtakes_is_an_error_only_where_its_value_is_used():
    """Warp 0 reads a cell, and nothing holds warp 1 from writing it."""
    body = """st.shared.u32 [%r1], %r100;
    bar.sync 0;
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra WRITE;
    ld.shared.u32 %r3, [%r1];
    {}
    st.global.u32 [%d2], %r4;
    bra END;
WRITE:
    st.shared.u32 [%r1+-128], 7;
END:"""
    for use, severity in (("mov.b32 %r4, %r3;", "error"), ("and.b32 %r4, %r3, 0;", "warning")):
        (finding,) = _collect(_exchange(body.format(use))).findings
        assert (type(finding), finding.severity) == (Race, severity)


def test_rows_of_a_wgmma_that_nobody_stores_need_no_value():
    """Rows 32 and up of A are not written; they are those of warps 2 and 3."""
    program = PROGRAMS["wgmma m64n64k32.f32.e4m3.e4m3 swizzle 128"]
    store = re.search(r"( +)(st\.shared\.u32 \[(%r\d+)\], %r\d+;)", program.ptx)
    assert store
    skip = f"""
    sub.u32 %r120, {store[3]}, %r131;
    sub.u32 %r120, %r120, 4096;
    setp.lt.u32 %p9, %r120, 4096;
    @!%p9 {store[2]}"""
    used = program.ptx.replace(store[0], skip)
    first = re.search(r" +st\.global\.u32", used)
    assert first
    leave = "    setp.ge.u32 %p9, %r130, 64;\n    @%p9 ret;\n"
    unused = used[: first.start()] + leave + used[first.start() :]
    for text, severity in ((used, "error"), (unused, "warning")):
        report = _collect(dataclasses.replace(program, ptx=text))
        found = {(type(f), f.severity) for f in report.findings}
        assert found == {(UninitializedRead, severity)}


def test_the_second_run_leaves_the_results_of_the_first():
    body = "ld.shared.u32 %r3, [%r1];\n    st.global.u32 [%d2], %r3;"
    array = np.arange(64, dtype=np.uint32)
    report = launch(_exchange(body).ptx, "test", grid=1, block=64, args=[array], stop_at="nothing")
    assert len(report.findings) == 1
    np.testing.assert_array_equal(array, np.full(64, 2**32 - 1, np.uint32))


def test_a_bulk_store_that_outlives_its_warp_is_a_warning():
    text = _bulk_wait_then("").ptx.replace("cp.async.bulk.wait_group.read 0;", "")
    text = text.replace("st.shared.u32 [%r2], 7;", "")
    program = dataclasses.replace(_bulk_wait_then(""), ptx=text)
    report = _collect(program, "error")
    assert [(type(f), f.severity) for f in report.findings] == [(ExitedCta, "warning")]
    with pytest.raises(ExitedCta):
        program.run()


def test_an_unfenced_mbarrier_of_a_copy_is_a_warning():
    program = PROGRAMS["ranges in and out"]
    text = program.ptx.replace("fence.mbarrier_init.release.cluster;", "")
    report = _collect(dataclasses.replace(program, ptx=text), "error")
    assert {(type(f), f.severity) for f in report.findings} == {(MissingFence, "warning")}


def test_elements_of_a_store_outside_of_the_tensor_need_no_value():
    """A box of four rows, of which `rows` are in the tensor; two are written."""

    def program(rows: int) -> Program:
        text = kernel(
            "map",
            """
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    mov.b64 %d1, p0;
    cvta.param.u64 %d1, %d1;
    mad.lo.u32 %r1, %r100, 4, %r102;
    st.shared.u32 [%r1], %r100;
    st.shared.u32 [%r1+128], %r100;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra END;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {0, 0}], [%r102];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
END:""",
            module=MODULE,
        )
        array = np.zeros((rows, 32), np.uint32)
        return Program("", text, lambda: [tensor_map(array, (32, 4))], lambda _: None,
                       dynamic_smem=512)  # fmt: skip

    program(2).run()
    with pytest.raises(UninitializedRead):
        program(3).run()


def test_stop_at_has_three_values():
    with pytest.raises(LaunchError, match="stop_at is 'all'"):
        _collect(_exchange(""), "all")


# --- launches that overlap --------------------------------------------------------------------

WAIT = "griddepcontrol.wait;"
TRIGGER = "griddepcontrol.launch_dependents;"


def _stage(first: str, last: str, read: str = "ld.global.u32 %r3, [%d3];") -> str:
    """Adds one to each word, from p0 to p1, each CTA 32 of them."""
    return kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r1, %ctaid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.lo.u32 %r2, %r1, 32, %r100;
    mad.wide.u32 %d3, %r2, 4, %d1;
    mad.wide.u32 %d4, %r2, 4, %d2;
    {first}
    {read}
    add.u32 %r4, %r3, 1;
    st.global.u32 [%d4], %r4;
    {last}""",
    )


def _chain(*stages: str, arrays: int | None = None):
    """Runs stages that may overlap, each from one array to the next; with `arrays`, round a ring."""
    memory = Memory()
    count = arrays or len(stages) + 1
    held = [np.zeros(64, np.uint32) for _ in range(count)]
    for number, text in enumerate(stages):
        args = [held[number % count], held[(number + 1) % count]]
        launch(text, "test", grid=2, block=32, args=args, memory=memory, programmatic=number > 0)
    return held


def test_overlapping_launches_are_ordered_by_the_wait():
    *_, last = _chain(_stage("", TRIGGER), _stage(WAIT, ""))
    assert (last == 2).all()
    _chain(_stage(TRIGGER, ""), _stage(WAIT, ""))
    _chain(_stage("", ""), _stage(WAIT, ""))
    barrier = "setp.ne.u32 %p1, %r100, 0;\n    @!%p1 griddepcontrol.wait;\n    bar.sync 0;"
    _chain(_stage("", TRIGGER), _stage(barrier, ""))


@pytest.mark.parametrize("first", ["", TRIGGER])
def test_a_read_of_an_overlapping_launch_without_a_wait_is_a_race(first):
    with pytest.raises(Race, match="griddepcontrol.wait is missing") as raised:
        _chain(_stage(first, TRIGGER), _stage("", WAIT))
    assert "griddepcontrol" in raised.value.section
    with pytest.raises(Race):
        _chain(_stage("", ""), _stage("", ""))


def test_launches_one_after_another_need_no_wait():
    memory, x, y = Memory(), np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    for args in ([x, y], [y, x]):
        launch(_stage("", TRIGGER), "test", grid=2, block=32, args=args, memory=memory)
    assert (x == 2).all()


def test_a_store_over_what_an_overlapping_launch_reads_needs_the_wait():
    """The second stage stores into the first's input, and reads nothing of it."""
    blind = "mov.u32 %r3, 7;"
    with pytest.raises(Race, match="may still read"):
        _chain(_stage("", TRIGGER), _stage("", "", blind), arrays=2)
    _chain(_stage("", TRIGGER), _stage(WAIT, "", blind), arrays=2)
    # Without launch_dependents the second cannot start before the first has read.
    _chain(_stage("", ""), _stage("", "", blind), arrays=2)


def test_a_wait_covers_the_launch_before_the_last_only_if_that_waited():
    """The third stage stores where the first stored."""
    blind = "mov.u32 %r3, 7;"
    first, third = _stage("", TRIGGER, blind), _stage(WAIT, "", blind)

    def run(second: str):
        memory, x, y, z = Memory(), *(np.zeros(64, np.uint32) for _ in range(3))
        for number, (text, args) in enumerate(((first, [z, x]), (second, [z, y]), (third, [z, x]))):
            launch(
                text, "test", grid=2, block=32, args=args, memory=memory, programmatic=number > 0
            )

    run(_stage(WAIT, TRIGGER, blind))
    with pytest.raises(DoubleWrite, match="griddepcontrol.wait"):
        run(_stage("", TRIGGER, blind))


# --- device asserts ---------------------------------------------------------------------------


def test_a_failed_assert_is_a_trap():
    program = PROGRAMS["call.uni of an assert that holds"]
    text = program.ptx.replace("@!%p1 bra HOLDS;", "")
    with pytest.raises(Trap, match="assert"):
        dataclasses.replace(program, ptx=text).run()


# --- the module -------------------------------------------------------------------------------


def test_shared_memory_of_other_kernels_does_not_count():
    """A module holds more static shared memory than a CTA has, of which the kernel names little."""
    own = ".shared .align 16 .b8 mine[128];\n"
    body = """
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, mine;
    mad.lo.u32 %r1, %r100, 4, %r102;
    st.shared.u32 [%r1], %r100;
    ld.shared.u32 %r2, [%r1];
    ld.param.u64 %d1, [p0];
    mad.wide.u32 %d2, %r100, 4, %d1;
    st.global.u32 [%d2], %r2;"""
    others = ".shared .align 16 .b8 theirs[200000];\n.shared .align 16 .b8 more[200000];\n"

    def check(got):
        np.testing.assert_array_equal(got, np.arange(32))

    text = kernel("u64", body, module=others + own)
    Program("", text, _words(32), check).run()
    named = kernel("u64", body + "\n    mov.u32 %r3, theirs;\n    mov.u32 %r4, more;",
                   module=others + own)  # fmt: skip
    with pytest.raises(LaunchError, match="exceed"):
        Program("", named, _words(32), check).run()
