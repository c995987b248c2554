"""Every fault that the emulator knows is found in a program that has it, and not in its twin.

The twins are programs of `emulator_programs`, which pass (test_emulator_programs.py); here one line
of each is changed.
"""

import dataclasses
import re

import numpy as np
import pytest

from tests.emulator import (
    BarrierMisuse,
    Deadlock,
    DescriptorError,
    Divergence,
    DoubleWrite,
    EmulatorError,
    ExitedCta,
    LaunchError,
    Misaligned,
    MissingFence,
    OutOfBounds,
    PtxSyntaxError,
    Race,
    ReadOnlyWrite,
    RegisterBudget,
    RegisterInFlight,
    TransactionMismatch,
    Trap,
    UninitializedRead,
    UnknownInstruction,
    Unsupported,
)
from tests.emulator_programs import all_programs
from tests.emulator_programs.copies import INITIALIZE, MODULE, from_global, tensor_map, wait
from tests.emulator_programs.program import Program, kernel, read_only

pytestmark = pytest.mark.emulator

PROGRAMS = {p.name: p for p in all_programs()}
RING = "a ring with mbarrier.try_wait.parity.shared::cta.b64"
LOAD = "tensor load, swizzle 128, from (0, 0)"
STORE = "tensor store of float32, swizzle 128"
WGMMA = "wgmma m64n64k32.f32.e4m3.e4m3 swizzle 128"
FRAGMENT = "wgmma m64n8k32.f32.e4m3.e4m3 swizzle 128 A in registers"
EXCHANGE = "bar.sync 0;"
RANGES = "ranges in and out"
ARRIVE = "cp.async.mbarrier.arrive.noinc"

# (program, what is wrong, regular expression, replacement, error, seeds)
MUTATIONS = [
    # mbarriers and the ring
    (RING, "the consumer does not wait", r"FULL:\n.*\n.*FULL;", "", (Race, UninitializedRead)),
    (RING, "the producer does not wait", r"EMPTY:\n.*\n.*EMPTY;", "", (Race, Deadlock)),
    (RING, "one poll without a loop", r"@!%p3 bra FULL;", "", (Race, UninitializedRead)),
    (
        RING,
        "the slot is released before it is read",
        r"(    ld\.shared\.u32 %r8, \[%r9\];\n)(.*\n)",
        r"\2\1",
        Race,
    ),
    (
        RING,
        "the producer starts in the wrong phase",
        r"xor.b32 %r5, %r4, 1",
        "mov.b32 %r5, %r4",
        Deadlock,
    ),
    (
        RING,
        "the consumer's phase never flips",
        r"and.b32 %r4, %r4, 1;\n    mad",
        "mov.b32 %r4, 0;\n    mad",
        (Race, Deadlock),
    ),
    (RING, "the barrier counts one arrival too many", r"\[%r102\], 32", "[%r102], 33", Deadlock),
    (
        RING,
        "the barrier counts one arrival too few",
        r"\[%r102\], 32",
        "[%r102], 31",
        BarrierMisuse,
    ),
    (
        RING,
        "no barrier after mbarrier.init",
        r"READY:\n    bar.sync 0;",
        "READY:",
        (Race, BarrierMisuse),
    ),
    (
        RING,
        "mbarrier.init is missing",
        r"mbarrier.init.shared::cta.b64 \[%r102\+8\], 32;",
        "",
        BarrierMisuse,
    ),
    (
        RING,
        "mbarrier.init twice",
        r"(mbarrier.init.shared::cta.b64 \[%r102\], 32;)",
        r"\1 \1",
        BarrierMisuse,
    ),
    (RING, "mbarrier.init with a count of zero", r"\[%r102\], 32", "[%r102], 0", BarrierMisuse),
    (
        RING,
        "an mbarrier is overwritten",
        r"READY:",
        "st.shared.u32 [%r102+4], %r100;\nREADY:",
        BarrierMisuse,
    ),
    (RING, "a misaligned mbarrier", r"\[%r102\+24\], 32", "[%r102+20], 32", Misaligned),
    (
        "mbarrier tokens and lives",
        "an arrival after inval",
        r"inval(.*)\n.*init.*\n",
        r"inval\1\n",
        BarrierMisuse,
    ),
    # bulk loads
    (LOAD, "nobody waits for the copy", r"WAIT:\n.*\n.*WAIT;", "", Race),
    (LOAD, "expect_tx too large", r"_, \[%r101\], 2048", "_, [%r101], 2176", Deadlock),
    (LOAD, "expect_tx too small", r"_, \[%r101\], 2048", "_, [%r101], 1024", Deadlock),
    (
        LOAD,
        "expect_tx is missing",
        r"arrive.expect_tx.shared::cta.b64 _, \[%r101\], 2048",
        "arrive.shared::cta.b64 _, [%r101]",
        (Race, TransactionMismatch),
    ),
    (
        LOAD,
        "fence.mbarrier_init is missing",
        r"fence.mbarrier_init.release.cluster;",
        "",
        MissingFence,
    ),
    (LOAD, "a misaligned target", r"\[%r102\], \[%d1", "[%r102+64], [%d1", Misaligned),
    (LOAD, "a target past shared memory", r"\[%r102\], \[%d1", "[%r102+1024], [%d1", OutOfBounds),
    (LOAD, "too few coordinates", r"2d(.*)\{0, 0\}", r"1d\1{0}", DescriptorError),
    (
        LOAD,
        "the shared memory is written while the copy flies",
        r"ISSUED:",
        "ISSUED:\n    st.shared.u32 [%r102], %r100;",
        Race,
    ),
    (
        LOAD,
        "the swizzle of the target is ignored by a second load",
        r"(    cp\.async\.bulk\.tensor.*\n)",
        r"\1\1",
        Race,
    ),
    (
        RANGES,
        "two copies, the bytes of one expected",
        r"\[%r101\], 512;",
        "[%r101], 256;",
        TransactionMismatch,
    ),
    (RANGES, "a range that is not a multiple of 16", r"\[%d1\], 256", "[%d1], 248", Misaligned),
    (RANGES, "a range past its buffer", r"\[%d1\+256\]", "[%d1+288]", OutOfBounds),
    (
        RANGES,
        "a store past its buffer",
        r"\[%d2\], \[%r102\], 512",
        "[%d2+16], [%r102], 512",
        OutOfBounds,
    ),
    ("multicast", "a CTA is left out", r"mov.u16 %h1, 3", "mov.u16 %h1, 1", Deadlock),
    ("multicast", "a CTA that does not exist", r"mov.u16 %h1, 3", "mov.u16 %h1, 7", OutOfBounds),
    (
        "multicast",
        "the peer's barrier may not be initialised",
        r"barrier.cluster.arrive.relaxed.aligned;\n    barrier.cluster.wait.aligned;",
        "",
        (Race, BarrierMisuse),
    ),
    (
        "multicast",
        "wait without arrive",
        r"barrier.cluster.arrive.relaxed.aligned;",
        "",
        BarrierMisuse,
    ),
    (
        "tensormap.replace",
        "no release",
        r"fence.proxy.tensormap::generic.release.gpu;",
        "",
        MissingFence,
    ),
    (
        "tensormap.replace",
        "no acquire",
        r"fence.proxy.tensormap::generic.acquire.gpu \[%d4\], 128;",
        "",
        MissingFence,
    ),
    (
        "tensormap.replace",
        "a map in shared memory",
        r"(    mbarrier\.arrive\.expect_tx.*\n)(.*)\[%d4, ",
        r"    cvt.u64.u32 %d20, %r102;\n    add.s64 %d20, %d20, 1024;\n    cvta.shared.u64 %d20, %d20;\n\1\2[%d20, ",
        DescriptorError,
    ),
    # bulk stores
    (STORE, "no proxy fence", r"fence.proxy.async.shared::cta;", "", MissingFence),
    (
        STORE,
        "the source is overwritten",
        r"(cp.async.bulk.commit_group;)",
        r"\1\n    st.shared.u32 [%r102], %r100;",
        Race,
    ),
    (
        STORE,
        "the CTA ends while the store reads",
        r"cp.async.bulk.wait_group.read 0;\n    cp.async.bulk.wait_group 0;",
        "",
        ExitedCta,
    ),
    (STORE, "the store is not in a group", r"cp.async.bulk.commit_group;", "", ExitedCta),
    (
        STORE,
        "the source is not initialised",
        r"\[%r102\];\n    cp.async.bulk.commit",
        "[%r102+1024];\n    cp.async.bulk.commit",
        (UninitializedRead, OutOfBounds),
    ),
    (STORE, "the tile is stored twice", r"(    cp\.async\.bulk\.tensor.*\n)", r"\1\1", DoubleWrite),
    # lanes of one warp
    (STORE, "lanes wrote the source, one lane stores it", r"bar.sync 0;", "", Race),
    ("stmatrix.x4", "lanes read what stmatrix wrote", r"bar.warp.sync -1;", "", Race),
    ("ldmatrix.x4", "ldmatrix reads what lanes wrote", r"bar.warp.sync -1;", "", Race),
    (
        "cp.async.ca.shared of 8 bytes",
        "lanes read what other lanes copied",
        r"bar.warp.sync -1;",
        "",
        Race,
    ),
    # cp.async
    ("cp.async groups", "nobody waits for the copy", r"cp.async.wait_group 1;", "", Race),
    (
        "cp.async groups",
        "one group too few is waited for",
        r"cp.async.wait_group 0;",
        "cp.async.wait_group 1;",
        Race,
    ),
    ("cp.async groups", "a misaligned source", r"\[%d3\], 4", "[%d3+2], 4", Misaligned),
    ("cp.async groups", "a source past its buffer", r"\[%d3\+128\]", "[%d3+160]", OutOfBounds),
    (ARRIVE, "an arrival without noinc", r"noinc.", "", (Deadlock, BarrierMisuse)),
    (
        ARRIVE,
        "a plain arrival in its place",
        r"cp.async.mbarrier.arrive.noinc.shared::cta.b64 ",
        "mbarrier.arrive.shared::cta.b64 _, ",
        Race,
    ),
    (
        ARRIVE,
        "the copies are issued after the arrival",
        r"(    cp\.async\.cg.*\n)(    cp\.async\.mbarrier.*\n)",
        r"\2\1",
        (Race, UninitializedRead),
    ),
    # wgmma
    (WGMMA, "wgmma.fence is missing", r"wgmma.fence.sync.aligned;", "", MissingFence),
    (
        WGMMA,
        "an accumulator is written after the fence",
        r"(wgmma.fence.sync.aligned;)",
        r"\1 mov.u32 %r3, %r3;",
        MissingFence,
    ),
    (WGMMA, "wait_group is missing", r"wgmma.wait_group.sync.aligned 0;", "", RegisterInFlight),
    (
        WGMMA,
        "wait_group 1",
        r"wait_group.sync.aligned 0;",
        "wait_group.sync.aligned 1;",
        RegisterInFlight,
    ),
    (WGMMA, "commit_group is missing", r"wgmma.commit_group.sync.aligned;", "", RegisterInFlight),
    (
        WGMMA,
        "an accumulator is read before the wait",
        r"(wgmma.commit_group.*)",
        r"\1 add.s32 %r150, %r5, 1;",
        RegisterInFlight,
    ),
    (
        FRAGMENT,
        "a fragment of A is overwritten in flight",
        r"(wgmma.commit_group.*)",
        r"\1 mov.u32 %r151, 0;",
        RegisterInFlight,
    ),
    (
        WGMMA,
        "the operands are overwritten in flight",
        r"(wgmma.commit_group.*)",
        r"\1 st.shared.u32 [%r131], %r131;",
        Race,
    ),
    (WGMMA, "no proxy fence", r"fence.proxy.async.shared::cta;", "", MissingFence),
    (WGMMA, "no barrier before the product", r"bar.sync 0;", "", (Race, UninitializedRead)),
    (
        WGMMA,
        "the descriptor differs between lanes",
        r"setp.eq.u32 %p1",
        "cvt.u64.u32 %d11, %r130; add.s64 %d2, %d2, %d11;\n setp.eq.u32 %p1",
        Divergence,
    ),
    (
        WGMMA,
        "the descriptor differs between warps",
        r"setp.eq.u32 %p1",
        "shr.u32 %r150, %r130, 5; cvt.u64.u32 %d11, %r150; add.s64 %d2, %d2, %d11;\n setp.eq.u32 %p1",
        Divergence,
    ),
    (
        WGMMA,
        "an operand past shared memory",
        r"add.s64 %d9, %d8, \d+;",
        "add.s64 %d9, %d8, 8192;",
        OutOfBounds,
    ),
    (
        WGMMA,
        "a base offset in the descriptor",
        r"setp.eq.u32 %p1",
        "or.b64 %d2, %d2, 562949953421312;\n setp.eq.u32 %p1",
        Unsupported,
    ),
    (WGMMA, "FP8 operands transposed", r"%p1, 1, 1;", "%p1, 1, 1, 0, 1;", DescriptorError),
    (WGMMA, "N that is no multiple of 8", "m64n64k32", "m64n60k32", UnknownInstruction),
    # barriers
    (EXCHANGE, "no barrier", r"bar.sync 0;", "", (Race, UninitializedRead)),
    (
        EXCHANGE,
        "a warp-wide barrier only",
        r"bar.sync 0;",
        "bar.warp.sync -1;",
        (Race, UninitializedRead),
    ),
    (
        EXCHANGE,
        "two warps are not counted",
        r"bar.sync 0;",
        "bar.sync 0, 64;",
        (Race, UninitializedRead),
    ),
    (EXCHANGE, "too many threads", r"bar.sync 0;", "bar.sync 0, 160;", BarrierMisuse),
    (EXCHANGE, "no multiple of a warp", r"bar.sync 0;", "bar.sync 0, 100;", BarrierMisuse),
    (EXCHANGE, "no such barrier", r"bar.sync 0;", "bar.sync 16;", BarrierMisuse),
    (
        EXCHANGE,
        "warps disagree about the count",
        r"bar.sync 0;",
        "and.b32 %r5, %r100, 96; add.s32 %r5, %r5, 32; bar.sync 0, %r5;",
        (BarrierMisuse, UninitializedRead, Race),
    ),
    (
        EXCHANGE,
        "a diverged warp",
        r"bar.sync 0;",
        "and.b32 %r5, %r100, 1; setp.eq.u32 %p1, %r5, 0; @%p1 bar.sync 0;",
        Divergence,
    ),
    (
        EXCHANGE,
        "a warp does not come",
        r"bar.sync 0;",
        "setp.lt.u32 %p1, %r100, 32; @%p1 bra A; bar.sync 0, 128; A:",
        (Deadlock, Race, UninitializedRead),
    ),
    ("bar.arrive", "bar.arrive is missing", r"bar.arrive 1, 64;", "", Deadlock),
    (
        "setmaxnreg",
        "nobody gives registers",
        r"setmaxnreg.dec.sync.aligned.u32 40;",
        "",
        RegisterBudget,
    ),
    ("setmaxnreg", "more than the register file has", r"u32 232", "u32 240", RegisterBudget),
    ("setmaxnreg", "no multiple of 8", r"u32 40", "u32 41", RegisterBudget),
    (
        "setmaxnreg",
        "dec above the current number",
        r"dec.sync.aligned.u32 40",
        "dec.sync.aligned.u32 176",
        RegisterBudget,
    ),
    # clusters
    (
        "shared memory of another CTA",
        "read before the peer wrote",
        r"barrier.cluster.arrive;\n    barrier.cluster.wait;",
        "",
        (Race, UninitializedRead),
    ),
    (
        "shared memory of another CTA",
        "a CTA that does not exist",
        r"xor.b32 %r2, %r1, 1",
        "add.s32 %r2, %r1, 1",
        OutOfBounds,
    ),
    (
        "shared memory of another CTA",
        "a remote address as shared::cta",
        r"ld.shared::cluster.u32",
        "ld.shared.u32",
        OutOfBounds,
    ),
    (
        "remote mbarrier.arrive.shared::cluster.b64",
        "the peer has ended",
        r"RECEIVE:\n\nWAIT:\n.*\n.*WAIT;\n[\s\S]*END:\n.*\n.*",
        "RECEIVE:\nEND:\n    add.s32 %r1, %r1, 1;\n",
        (ExitedCta,),
    ),
    # shared and global memory
    (EXCHANGE, "shared memory past its end", r"\[%r102\], %r1;", "[%r102+1024], %r1;", OutOfBounds),
    (EXCHANGE, "a misaligned shared access", r"\[%r103\];", "[%r103+2];", Misaligned),
    (EXCHANGE, "global memory past its end", r"\[%d4\], %r0;", "[%d4+512], %r0;", OutOfBounds),
    (EXCHANGE, "a misaligned global access", r"\[%d4\], %r0;", "[%d4+1], %r0;", Misaligned),
    (EXCHANGE, "a store to an input", r"\[%d4\], %r0;", "[%d3], %r0;", ReadOnlyWrite),
    (EXCHANGE, "a null pointer", r"\[%d4\], %r0;", "[0], %r0;", OutOfBounds),
    (
        "ld and st.local.u32",
        "local memory past its end",
        r"ld.local.u32 %r1, \[%d52\+32\]",
        "ld.local.u32 %r1, [%d52+64]",
        OutOfBounds,
    ),
    # warps
    (
        "vote.sync.ballot.b32",
        "a membermask without all lanes",
        r"%p1, -1;",
        "%p1, 0xffff;",
        Divergence,
    ),
    (
        "activemask.b32 and bar.warp.sync under divergence",
        "a membermask of lanes elsewhere",
        r"0xfff;",
        "0xffff;",
        Divergence,
    ),
    ("vote.sync.ballot.b32", "trap", r"vote.sync", "trap; vote.sync", Trap),
    # what the emulator does not know
    (
        EXCHANGE,
        "an unknown opcode",
        r"bar.sync 0;",
        "bar.sync 0; frobnicate.b32 %r0, %r1;",
        UnknownInstruction,
    ),
    (
        EXCHANGE,
        "an unknown modifier",
        r"bar.sync 0;",
        "bar.sync 0; add.cc.s32 %r5, %r1, %r1;",
        UnknownInstruction,
    ),
    (
        EXCHANGE,
        "an undeclared register",
        r"bar.sync 0;",
        "bar.sync 0; add.s32 %x5, %r1, %r1;",
        PtxSyntaxError,
    ),
    (EXCHANGE, "a branch to nowhere", r"bar.sync 0;", "bar.sync 0; bra NOWHERE;", PtxSyntaxError),
    (EXCHANGE, "a call", r"bar.sync 0;", "bar.sync 0; call.uni f;", UnknownInstruction),
]


@pytest.mark.parametrize(
    ("name", "what", "pattern", "replacement", "error"),
    MUTATIONS,
    ids=[f"{m[0][:24]}: {m[1]}" for m in MUTATIONS],
)
def test_fault_is_found(name, what, pattern, replacement, error):
    program = PROGRAMS[name]
    mutant, count = re.subn(pattern, replacement, program.ptx, count=1)
    assert count == 1 and mutant != program.ptx, "the mutation does not apply"
    with pytest.raises(EmulatorError) as raised:
        dataclasses.replace(program, ptx=mutant).run()
    assert isinstance(raised.value, error), raised.value
    # The message leads to the place.
    assert raised.value.line is not None and raised.value.instruction in mutant.replace(
        ";", ""
    ).replace("  ", " "), raised.value


def test_error_names_both_parties_the_line_and_the_offset():
    program = PROGRAMS[EXCHANGE]
    with pytest.raises(Race) as raised:
        _run_writers_of_one_word()
    error = raised.value
    assert error.actor == "cta0 warp1"
    assert error.other is not None and error.other.startswith("cta0 warp0, PTX line")
    assert error.offset == 0x400  # the first after the KiB of the system
    assert error.instruction == "st.shared.u32 [memory], %r100"
    assert program.run().instructions > 0


def _run_writers_of_one_word():
    body = """
    mov.u32 %r100, %tid.x;
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra SECOND;
    st.shared.u32 [memory], %r101;
    bra END;
SECOND:
    st.shared.u32 [memory], %r100;
END:"""
    text = kernel("", body, module=MODULE)
    Program("", text, lambda: [], lambda: None, block=64, dynamic_smem=64).run()


def test_source_lines_are_named_where_the_ptx_has_them():
    body = '.file 1 "somewhere/kernel.cu"\n.loc 1 42 3\ntrap;'
    text = kernel("", body).replace('.file 1 "somewhere/kernel.cu"\n', "")
    text += '.file 1 "somewhere/kernel.cu"\n'
    with pytest.raises(Trap, match=r"kernel\.cu:42"):
        Program("", text, lambda: [], lambda: None).run()


# --- several CTAs on global memory ------------------------------------------------------------


def _grid(body: str, arguments, grid=2) -> Program:
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r1, %ctaid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.lo.u32 %r2, %r1, 32, %r100;
    mad.wide.u32 %d3, %r2, 4, %d1;
    mad.wide.u32 %d4, %r100, 4, %d1;
    mad.wide.u32 %d5, %r2, 4, %d2;
{body}""",
    )
    return Program("", text, arguments, lambda *_: None, grid=grid)


def _two_arrays():
    return [np.zeros(64, np.uint32), np.zeros(64, np.uint32)]


def test_two_ctas_that_store_the_same_bytes_are_found():
    _grid("st.global.u32 [%d3], %r2;", _two_arrays).run()
    with pytest.raises(DoubleWrite) as raised:
        _grid("st.global.u32 [%d4], %r2;", _two_arrays).run()
    assert "block (0, 0, 0)" in raised.value.other


def test_one_cta_may_store_the_same_bytes_again():
    _grid("st.global.u32 [%d3], %r2;\nst.global.u32 [%d3], %r1;", _two_arrays).run()


def test_a_launch_may_store_what_an_earlier_launch_stored():
    arrays = _two_arrays()
    program = _grid("st.global.u32 [%d3], %r2;", lambda: arrays)
    program.run()
    program.run()


def test_a_read_of_what_another_cta_stored_is_a_race():
    body = "st.global.u32 [%d3], %r2;\nld.global.u32 %r5, [%d4+{}];\nst.global.u32 [%d5], %r5;"
    with pytest.raises(Race):
        # Block 1 reads what block 0 stored.
        _grid(body.format(0), _two_arrays).run()
    with pytest.raises(Race):
        # A fence alone orders nothing: the reader must have seen something of the writer.
        fenced = body.format(0).replace("ld.global", "fence.acq_rel.gpu;\nld.global")
        _grid(fenced, _two_arrays).run()


def test_a_bulk_load_of_what_another_cta_stored_is_a_race():
    body = (
        INITIALIZE
        + """
    ld.param.u64 %d1, [p0];
    mov.u32 %r1, %ctaid.x;
    setp.ne.u32 %p1, %r1, {};
    @%p1 bra NOT_MINE;
    mad.wide.u32 %d3, %r100, 4, %d1;
    st.global.u32 [%d3], %r100;
NOT_MINE:
    setp.ne.u32 %p2, %r1, 1;
    or.pred %p3, %p2, %p10;
    @%p3 bra END;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r101], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r102], [%d1], 128, [%r101];
"""
        + wait()
        + "END:\n"
    )
    for writer, error in ((0, Race), (5, None)):
        text = kernel("u64", body.replace("{}", str(writer)), module=MODULE)
        program = Program(
            "", text, lambda: [np.zeros(32, np.uint32)], lambda _: None, grid=2, dynamic_smem=128
        )
        if error:
            with pytest.raises(error):
                program.run()
        else:
            program.run()


def test_a_tile_stored_by_two_ctas_is_found():
    def program(coordinate: str) -> Program:
        text = kernel(
            "map u64",
            f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, 0;
    ld.param.u64 %d2, [p1];
    mov.b64 %d1, p0;
    cvta.param.u64 %d1, %d1;
{from_global(128, "%d2")}
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra END;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {{0, {coordinate}}}], [%r102];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:""",
            module=MODULE,
        )
        return Program(
            "",
            text,
            lambda: [tensor_map(np.zeros((2, 32), np.int32), (32, 1)), np.zeros(32, np.int32)],
            lambda *_: None,
            grid=2,
            dynamic_smem=128,
        )

    program("%r1").run()
    with pytest.raises(DoubleWrite):
        program("%r2").run()


def test_an_elected_lane_releases_only_what_the_warp_has_synchronized():
    """Lanes of warp 0 read; lane 0 arrives; warp 1 overwrites. All need a bar.warp.sync."""

    def program(sync: str) -> Program:
        text = kernel(
            "u64",
            INITIALIZE
            + f"""
    ld.param.u64 %d1, [p0];
    and.b32 %r1, %r100, 31;
    mad.lo.u32 %r2, %r1, 4, %r102;
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra OVERWRITE;
    st.shared.u32 [%r2], %r100;
    ld.shared.u32 %r3, [%r2];
    {sync}
    @!%p10 mbarrier.arrive.shared::cta.b64 _, [%r101];
    bra END;
OVERWRITE:
"""
            + wait()
            + """
    st.shared.u32 [%r2], %r100;
    ld.shared.u32 %r3, [%r2];
END:
    mad.wide.u32 %d2, %r100, 4, %d1;
    st.global.u32 [%d2], %r3;""",
            module=MODULE,
        )

        def check(got):
            np.testing.assert_array_equal(got, np.arange(64))

        return Program(
            "", text, lambda: [np.zeros(64, np.uint32)], check, block=64, dynamic_smem=128
        )

    for sync in ("bar.warp.sync -1;", "shfl.sync.idx.b32 %r5, %r3, 0, 31, -1;"):
        for seed in range(4):
            program(sync).run(seed)
    with pytest.raises(Race):
        program("").run()


def test_other_lanes_learn_of_a_bulk_wait_by_bar_warp_sync():
    def program(sync: str) -> Program:
        text = kernel(
            "u64 u64",
            f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d1, [p0];
    mad.lo.u32 %r1, %r100, 4, %r102;
    st.shared.u32 [%r1], %r100;
    fence.proxy.async;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra REUSE;
    cp.async.bulk.global.shared::cta.bulk_group [%d1], [%r102], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    st.shared.u32 [%r102], 9;
REUSE:
    {sync}
    st.shared.u32 [%r1], %r1;""",
            module=MODULE,
        )

        def check(got, _):
            np.testing.assert_array_equal(got, np.arange(32))

        arrays = [np.zeros(32, np.uint32), np.zeros(1, np.uint32)]
        return Program("", text, lambda: arrays, check, dynamic_smem=128)

    program("bar.warp.sync -1;").run()
    with pytest.raises(Race):
        program("").run()


def test_cp_async_needs_a_proxy_fence_before_the_asynchronous_proxy_reads():
    def program(fence: str) -> Program:
        text = kernel(
            "u64 u64",
            f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r100, 4, %d1;
    mad.lo.u32 %r1, %r100, 4, %r102;
    cp.async.ca.shared.global [%r1], [%d3], 4;
    cp.async.wait_all;
    {fence}
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r102], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
END:""",
            module=MODULE,
        )
        source = read_only(np.arange(32, dtype=np.uint32))

        def check(given, got):
            assert (given == got).all()

        return Program("", text, lambda: [source, np.zeros(32, np.uint32)], check, dynamic_smem=128)

    program("fence.proxy.async;").run()
    with pytest.raises(MissingFence):
        program("").run()


def test_a_load_that_arrives_after_its_cta_has_ended_is_found():
    text = kernel(
        "u64",
        INITIALIZE
        + """
    ld.param.u64 %d1, [p0];
    @%p10 bra END;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r102], [%d1], 128, [%r101];
END:""",
        module=MODULE,
    )
    with pytest.raises(ExitedCta):
        Program("", text, lambda: [np.zeros(32, np.uint32)], lambda _: None, dynamic_smem=128).run()


def test_an_endless_loop_is_a_deadlock(monkeypatch):
    monkeypatch.setattr("tests.emulator.scheduler._MAX_STEPS", 1000)
    with pytest.raises(Deadlock, match="1000 steps"):
        Program("", kernel("", "L: bra L;"), lambda: [], lambda: None).run()


def test_wgmma_in_flight_at_the_end_is_found():
    mutant = PROGRAMS[WGMMA].ptx.replace("wgmma.wait_group.sync.aligned 0;", "ret;")
    with pytest.raises(BarrierMisuse, match="wait_group"):
        dataclasses.replace(PROGRAMS[WGMMA], ptx=mutant).run()


def test_races_are_not_looked_for_when_not_asked():
    from tests.emulator import launch

    program = PROGRAMS[RING]
    mutant = re.sub(r"(    ld\.shared\.u32 %r8, \[%r9\];\n)(.*\n)", r"\2\1", program.ptx)
    launch(mutant, "test", grid=1, block=64, args=program.arguments(), check_races=False)


# --- the launch itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 33}, "33 threads"),
        ({"block": 2048}, "2048 threads"),
        ({"grid": 0}, "positive"),
        ({"grid": 3, "cluster": 2}, "multiple of cluster"),
        ({"grid": 32, "cluster": 32}, "at most 16"),
        ({"dynamic_smem": 240 * 1024}, "exceed 232448"),
        ({"arguments": lambda: [np.zeros(1)]}, "1 arguments for 2 parameters"),
        ({"arguments": lambda: [np.zeros(128), 5]}, "argument 1 is a int"),
        ({"arguments": lambda: [np.zeros(128), np.int32(5)]}, "has 4 bytes"),
        ({"arguments": lambda: [np.zeros((4, 4)).T[:2], np.zeros(4)]}, "not C-contiguous"),
    ],
)
def test_impossible_launch_is_refused(change, message):
    with pytest.raises(LaunchError, match=message):
        dataclasses.replace(PROGRAMS[EXCHANGE], **change).run()


def test_unknown_entry_is_refused():
    with pytest.raises(PtxSyntaxError, match="no entry named 'other'"):
        dataclasses.replace(PROGRAMS[EXCHANGE], entry="other").run()


def test_launch_bounds_are_enforced():
    with pytest.raises(LaunchError, match="maxntid"):
        dataclasses.replace(PROGRAMS["setmaxnreg"], block=512).run()
