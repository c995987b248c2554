"""Barriers of a CTA and of a cluster, mbarriers, register budgets, and what is a no-op here."""

from __future__ import annotations

import numpy as np

from .copies import INITIALIZE, MODULE, wait
from .program import Program, kernel, read_only, same_bits
from .warps import per_thread

_EXCHANGE = """
    mov.u32 %r101, memory;
    mad.lo.u32 %r102, %r100, 4, %r101;
    xor.b32 %r103, %r102, 256;
    st.shared.u32 [%r102], %r1;
    {sync}
    ld.shared.u32 %r0, [%r103];"""


def programs() -> list[Program]:
    out: list[Program] = []
    add = out.append
    shared = ".shared .align 1024 .b8 memory[1024];\n"
    lanes = np.arange(128)
    for sync in (
        "bar.sync 0;", "bar.sync 3, 128;", "barrier.sync 1;", "barrier.sync.aligned 2, 128;",
        "barrier.cta.sync 4;", "bar.cta.sync 5;",
    ):  # fmt: skip
        add(
            per_thread(
                sync,
                _EXCHANGE.format(sync=sync),
                lambda x: x[lanes ^ 64],
                threads=128,
                module=shared,
                seeds=(0, 1, 2, 3),
            )
        )
    for mode, function in (
        ("popc.u32", lambda odd: int(odd.sum())),
        ("and.pred", lambda odd: int(odd.all())),
        ("or.pred", lambda odd: int(odd.any())),
    ):
        count = mode.startswith("popc")
        add(
            per_thread(
                f"bar.red.{mode}",
                "    and.b32 %r2, %r1, 1;\n    setp.ne.u32 %p1, %r2, 0;\n"
                + (
                    f"    bar.red.{mode} %r0, 0, %p1;"
                    if count
                    else f"    bar.red.{mode} %p2, 0, %p1;\n    selp.u32 %r0, 1, 0, %p2;"
                ),
                lambda x, f=function: np.full(128, f(x & 1 == 1)),
                threads=128,
            )
        )
    add(_arrive())
    add(_pipeline("mbarrier.try_wait.parity.shared::cta.b64", ""))
    add(_pipeline("mbarrier.test_wait.parity.shared::cta.b64", ""))
    add(_pipeline("mbarrier.try_wait.parity.acquire.cta.shared::cta.b64", ", 1000"))
    add(_tokens())
    add(_remote_arrive("mbarrier.arrive.shared::cluster.b64"))
    add(_remote_arrive("mbarrier.arrive.release.cluster.shared::cluster.b64"))
    add(_transactions())
    add(_registers())
    add(
        per_thread(
            "griddepcontrol and nanosleep",
            "    griddepcontrol.wait;\n    griddepcontrol.launch_dependents;\n"
            "    nanosleep.u32 100;\n    fence.proxy.async.global;\n    fence.proxy.async;\n"
            "    fence.acq_rel.cta;\n    fence.sc.cluster;\n    membar.cta;\n"
            "    mov.u32 %r2, %clock;\n    mov.u64 %d9, %globaltimer;\n    mov.b32 %r0, %r1;",
            lambda x: x,
        )
    )
    return out


def _arrive() -> Program:
    """bar.arrive does not block; bar.sync of the other warp waits for it."""
    text = kernel(
        "u64",
        """
    .shared .align 4 .b32 cell;
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra CONSUMER;
    setp.eq.u32 %p2, %r100, 0;
    @%p2 st.shared.u32 [cell], 55;
    bar.warp.sync -1;
    bar.arrive 1, 64;
    bra END;
CONSUMER:
    bar.sync 1, 64;
    ld.shared.u32 %r1, [cell];
    mad.wide.u32 %d2, %r100, 4, %d1;
    st.global.u32 [%d2+-128], %r1;
END:""",
    )
    return Program(
        "bar.arrive",
        text,
        lambda: [np.zeros(32, np.uint32)],
        lambda got: same_bits(got, np.full(32, 55, np.uint32)),
        block=64,
        seeds=(0, 1, 2, 3),
    )


# A ring of two slots: {poll} waits for a phase, {limit} is its time limit.
_PIPELINE = """
    mov.u32 %r100, %tid.x;
    mov.u32 %r101, ring;
    mov.u32 %r102, barriers;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r102], 32;
    mbarrier.init.shared::cta.b64 [%r102+8], 32;
    mbarrier.init.shared::cta.b64 [%r102+16], 32;
    mbarrier.init.shared::cta.b64 [%r102+24], 32;
READY:
    bar.sync 0;
    and.b32 %r1, %r100, 31;
    mov.u32 %r2, 0;
    setp.ge.u32 %p2, %r100, 32;
    @%p2 bra CONSUMER;
PRODUCER:
    and.b32 %r3, %r2, 1;
    shr.u32 %r4, %r2, 1;
    and.b32 %r4, %r4, 1;
    xor.b32 %r5, %r4, 1;
    mad.lo.u32 %r6, %r3, 8, %r102;
EMPTY:
    {poll} %p3, [%r6+16], %r5{limit};
    @!%p3 bra EMPTY;
    mad.lo.u32 %r7, %r2, 32, %r1;
    mad.wide.u32 %d3, %r7, 4, %d1;
    ld.global.u32 %r8, [%d3];
    mad.lo.u32 %r9, %r3, 32, %r1;
    mad.lo.u32 %r9, %r9, 4, %r101;
    st.shared.u32 [%r9], %r8;
    mbarrier.arrive.shared::cta.b64 _, [%r6];
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p4, %r2, 8;
    @%p4 bra PRODUCER;
    bra END;
CONSUMER:
    and.b32 %r3, %r2, 1;
    shr.u32 %r4, %r2, 1;
    and.b32 %r4, %r4, 1;
    mad.lo.u32 %r6, %r3, 8, %r102;
FULL:
    {poll} %p3, [%r6], %r4{limit};
    @!%p3 bra FULL;
    xor.b32 %r10, %r1, 5;
    mad.lo.u32 %r9, %r3, 32, %r10;
    mad.lo.u32 %r9, %r9, 4, %r101;
    ld.shared.u32 %r8, [%r9];
    mbarrier.arrive.release.cta.shared::cta.b64 %d9, [%r6+16];
    mad.lo.u32 %r7, %r2, 32, %r10;
    mad.wide.u32 %d3, %r7, 4, %d2;
    st.global.u32 [%d3], %r8;
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p4, %r2, 8;
    @%p4 bra CONSUMER;
END:"""


def _pipeline(poll: str, limit: str) -> Program:
    """A producer and a consumer warp share a ring of two slots for eight values."""
    text = kernel(
        "u64 u64",
        _PIPELINE.format(poll=poll, limit=limit),
        module=".shared .align 128 .b8 ring[256];\n.shared .align 8 .b64 barriers[4];\n",
    )
    source = np.random.default_rng(0).integers(0, 2**32, 256, np.uint64).astype(np.uint32)
    return Program(
        f"a ring with {poll}{limit}",
        text,
        lambda: [read_only(source.copy()), np.zeros(256, np.uint32)],
        lambda _, got: same_bits(got, source),
        block=64,
        seeds=tuple(range(8)),
    )


def _tokens() -> Program:
    """The state that an arrival returns, waited for; inval, and a second life of the barrier."""
    text = kernel(
        "u64",
        INITIALIZE
        + """
    ld.param.u64 %d1, [p0];
    mov.u64 %d5, 0;
    @%p10 bra SKIP;
    mbarrier.arrive.shared::cta.b64 %d5, [%r101];
SKIP:
LOOP:
    mbarrier.try_wait.shared::cta.b64 %p1, [%r101], %d5;
    @!%p1 bra LOOP;
    mbarrier.test_wait.shared::cta.b64 %p2, [%r101], %d5;
    selp.u32 %r1, 1, 0, %p2;
    bar.warp.sync -1;
    @%p10 bra AGAIN;
    mbarrier.inval.shared::cta.b64 [%r101];
    mbarrier.init.shared::cta.b64 [%r101], 2;
    mbarrier.arrive_drop.shared::cta.b64 _, [%r101];
    mbarrier.arrive.shared::cta.b64 _, [%r101], 1;
AGAIN:
    bar.warp.sync -1;
"""
        + wait(0, label="SECOND")
        + """
    @!%p10 mbarrier.arrive.shared::cta.b64 _, [%r101];
"""
        + wait(1, label="THIRD")
        + """
    mad.wide.u32 %d2, %r100, 4, %d1;
    st.global.u32 [%d2], %r1;""",
        module=MODULE,
    )
    return Program(
        "mbarrier tokens and lives",
        text,
        lambda: [np.zeros(32, np.uint32)],
        lambda got: same_bits(got, np.ones(32, np.uint32)),
        seeds=(0, 1, 2),
    )


def _remote_arrive(opcode: str) -> Program:
    """CTA 1 writes into the shared memory of CTA 0 and arrives at its barrier."""
    text = kernel(
        "u64",
        INITIALIZE.replace("[%r101], 1", "[%r101], 32")
        + f"""
    ld.param.u64 %d1, [p0];
    mov.u32 %r1, %cluster_ctarank;
    barrier.cluster.arrive.relaxed;
    barrier.cluster.wait;
    mad.lo.u32 %r2, %r100, 4, %r102;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra RECEIVE;
    mapa.shared::cluster.u32 %r3, %r101, 0;
    mapa.shared::cluster.u32 %r4, %r2, 0;
    mad.lo.u32 %r5, %r100, 3, 1;
    st.shared::cluster.u32 [%r4], %r5;
    {opcode} _, [%r3];
    bra END;
RECEIVE:
"""
        + wait()
        + """
    ld.shared.u32 %r6, [%r2];
    mad.wide.u32 %d2, %r100, 4, %d1;
    st.global.u32 [%d2], %r6;
END:
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;""",
        module=MODULE,
    )
    return Program(
        f"remote {opcode}",
        text,
        lambda: [np.zeros(32, np.uint32)],
        lambda got: same_bits(got, (np.arange(32) * 3 + 1).astype(np.uint32)),
        grid=2,
        cluster=2,
        dynamic_smem=128,
        seeds=(0, 1, 2, 3, 4),
    )


def _transactions() -> Program:
    """complete_tx by hand, before and after its expect_tx."""
    text = kernel(
        "u64",
        INITIALIZE
        + """
    ld.param.u64 %d1, [p0];
    @%p10 bra SKIP;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r101], 100;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r101], 160;
    mbarrier.arrive.shared::cta.b64 _, [%r101];
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r101], 0;
    selp.u32 %r1, 1, 0, %p1;
    mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r101], 60;
    mbarrier.test_wait.parity.shared::cta.b64 %p2, [%r101], 0;
    selp.u32 %r2, 1, 0, %p2;
    st.global.u32 [%d1], %r1;
    st.global.u32 [%d1+4], %r2;
SKIP:""",
        module=MODULE,
    )
    return Program(
        "mbarrier.complete_tx",
        text,
        lambda: [np.full(2, 9, np.uint32)],
        lambda got: same_bits(got, np.array([0, 1], np.uint32)),
    )


def _registers() -> Program:
    """384 threads: the producer warpgroup gives registers, two others wait for them."""
    text = kernel(
        "u64",
        """
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    mad.wide.u32 %d2, %r100, 4, %d1;
    setp.lt.u32 %p1, %r100, 128;
    @%p1 bra PRODUCER;
    setmaxnreg.inc.sync.aligned.u32 232;
    st.global.u32 [%d2], 232;
    bra END;
PRODUCER:
    setmaxnreg.dec.sync.aligned.u32 40;
    st.global.u32 [%d2], 40;
END:""",
        directives=".maxntid 384, 1, 1",
    )
    return Program(
        "setmaxnreg",
        text,
        lambda: [np.zeros(384, np.uint32)],
        lambda got: same_bits(got, np.repeat([40, 232, 232], 128).astype(np.uint32)),
        block=384,
        seeds=(0, 1, 2, 3),
    )
