"""Warp-wide instructions, matrices, and control flow with divergence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .program import Program, kernel, read_only, same_bits

_LANE = np.arange(32)


def per_thread(
    name: str,
    body: str,
    expected: Callable[[np.ndarray], np.ndarray],
    *,
    threads: int = 32,
    given: np.ndarray | None = None,
    seeds: tuple[int, ...] = (0, 1),
    module: str = "",
) -> Program:
    """Each thread gets a 32-bit input in %r1 (its index in %r100), and stores %r0."""
    if given is None:
        given = np.random.default_rng(5).integers(0, 2**32, threads, np.uint64).astype(np.uint32)
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r100, 4, %d1;
    mad.wide.u32 %d4, %r100, 4, %d2;
    ld.global.u32 %r1, [%d3];
{body}
    st.global.u32 [%d4], %r0;""",
        module=module,
    )

    def check(source, got):
        same_bits(got, expected(source).astype(np.uint32), name)

    return Program(
        name,
        text,
        lambda: [read_only(given.copy()), np.zeros(threads, np.uint32)],
        check,
        block=threads,
        seeds=seeds,
    )


def _shuffle(mode: str, amount: int, width: int) -> Callable:
    def expected(x):
        lane = _LANE
        first = lane // width * width
        if mode == "idx":
            source = first + amount % width
        elif mode == "up":
            source = np.where(lane - amount < first, lane, lane - amount)
        elif mode == "down":
            source = np.where(lane + amount >= first + width, lane, lane + amount)
        else:
            source = np.where(lane ^ amount >= first + width, lane, lane ^ amount)
        return x[source]

    return expected


def programs() -> list[Program]:
    out: list[Program] = []
    for add_to in (
        _shuffles,
        _votes,
        _reductions,
        _masks,
        _control_flow,
        _special_registers,
        _matrices,
    ):
        add_to(out.append)
    return out


def _shuffles(add):
    for width in (32, 8):
        for mode, amount in (("idx", 5), ("up", 3), ("down", 2), ("bfly", 1), ("bfly", 4)):
            clamp = 0 if mode == "up" else 31
            c = ((32 - width) << 8) | clamp
            add(
                per_thread(
                    f"shfl.sync.{mode} {amount} of {width}",
                    f"    shfl.sync.{mode}.b32 %r0, %r1, {amount}, {c}, -1;",
                    _shuffle(mode, amount, width),
                )
            )
    add(
        per_thread(
            "shfl.sync.down with a predicate",
            "    shfl.sync.down.b32 %r2|%p1, %r1, 16, 31, -1;\n    selp.u32 %r0, 1, 0, %p1;",
            lambda x: (_LANE < 16).astype(np.uint32),
        )
    )


def _votes(add):
    odd = "    and.b32 %r2, %r1, 1;\n    setp.ne.u32 %p1, %r2, 0;\n"

    def is_odd(x):
        return x & 1 == 1

    add(
        per_thread(
            "vote.sync.ballot.b32",
            odd + "    vote.sync.ballot.b32 %r0, %p1, -1;",
            lambda x: np.full(32, (is_odd(x).astype(np.uint64) << _LANE.astype(np.uint64)).sum()),
        )
    )
    for mode, function in (
        ("any", lambda p: p.any()),
        ("all", lambda p: p.all()),
        ("uni", lambda p: p.all() or not p.any()),
    ):
        for given in (np.zeros(32), np.ones(32), _LANE == 3):
            add(
                per_thread(
                    f"vote.sync.{mode}.pred {int(given.sum())}",
                    odd + f"    vote.sync.{mode}.pred %p2, %p1, -1;\n    selp.u32 %r0, 1, 0, %p2;",
                    lambda x, f=function: np.full(32, int(f(is_odd(x)))),
                    given=given.astype(np.uint32),
                )
            )


def _reductions(add):
    reductions = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    for name, ufunc in reductions.items():
        kinds = ("b32",) if name in ("and", "or", "xor") else ("u32", "s32")
        for kind in kinds:
            add(
                per_thread(
                    f"redux.sync.{name}.{kind}",
                    f"    redux.sync.{name}.{kind} %r0, %r1, -1;",
                    lambda x, u=ufunc, k=kind: np.full(
                        32,
                        u.reduce(
                            x.view(np.int32 if k == "s32" else np.uint32),
                            dtype=np.int32 if k == "s32" else np.uint32,
                        ),
                    ).view(np.uint32),
                )
            )


def _masks(add):
    add(
        per_thread(
            "elect.sync",
            "    elect.sync %r2|%p1, -1;\n    selp.u32 %r3, 64, 0, %p1;\n    or.b32 %r0, %r2, %r3;",
            lambda x: np.where(_LANE == 0, 64, 0),
        )
    )
    add(
        per_thread(
            "match.any.sync.b32",
            "    and.b32 %r2, %r1, 3;\n    match.any.sync.b32 %r0, %r2, -1;",
            lambda x: np.array(
                [sum(1 << int(j) for j in _LANE if (x[j] ^ x[i]) & 3 == 0) for i in _LANE]
            ),
        )
    )
    add(
        per_thread(
            "activemask.b32 and bar.warp.sync under divergence",
            """
    setp.lt.u32 %p1, %r100, 12;
    mov.u32 %r0, 0;
    @!%p1 bra OTHER;
    activemask.b32 %r0;
    bar.warp.sync 0xfff;
    bra.uni JOIN;
OTHER:
    activemask.b32 %r0;
JOIN:
    bar.warp.sync 0xffffffff;""",
            lambda x: np.where(_LANE < 12, 0xFFF, 0xFFFFF000),
        )
    )


def _control_flow(add):
    add(
        per_thread(
            "a loop that each lane leaves at its own time",
            """
    and.b32 %r2, %r1, 15;
    mov.u32 %r0, 0;
LOOP:
    setp.eq.u32 %p1, %r2, 0;
    @%p1 bra DONE;
    mad.lo.s32 %r0, %r2, %r2, %r0;
    sub.s32 %r2, %r2, 1;
    bra LOOP;
DONE:
    add.s32 %r0, %r0, 1;""",
            lambda x: np.array([sum(i * i for i in range(1, int(v & 15) + 1)) + 1 for v in x]),
            threads=64,
        )
    )
    add(
        per_thread(
            "nested divergence, an early exit of some lanes, and scoped names",
            """
    setp.gt.u32 %p1, %r100, 40;
    mov.u32 %r0, 7;
    st.global.u32 [%d4], %r0;
    @%p1 ret;
    { .reg .b32 x; .reg .pred P1;
      setp.lt.u32 P1, %r100, 10; mov.b32 x, 1;
      @P1 bra L; mov.b32 x, 2; L: mov.b32 %r0, x; }
    { .reg .b32 x; .reg .pred P1;
      setp.lt.u32 P1, %r100, 20; mov.b32 x, 10;
      @P1 bra L; mov.b32 x, 20; L: add.s32 %r0, %r0, x; }
    rem.u32 %r2, %r100, 3;
    setp.eq.u32 %p2, %r2, 0;
    @%p2 add.s32 %r0, %r0, 100;""",
            lambda x: np.array(
                [
                    7 if t > 40 else (1 if t < 10 else 2) + (10 if t < 20 else 20)
                    + (100 if t % 3 == 0 else 0)
                    for t in range(64)
                ]
            ),
            threads=64,
        )
    )  # fmt: skip


# Values by CTA and thread of the launch below.
_SPECIAL_REGISTERS = {
    "%tid.x": lambda g, t: t % 8,
    "%tid.y": lambda g, t: t // 8 % 2,
    "%tid.z": lambda g, t: t // 16,
    "%ntid.x": lambda g, t: 8,
    "%ntid.y": lambda g, t: 2,
    "%ntid.z": lambda g, t: 4,
    "%ctaid.x": lambda g, t: g % 4,
    "%ctaid.y": lambda g, t: g // 4 % 2,
    "%ctaid.z": lambda g, t: 0,
    "%nctaid.x": lambda g, t: 4,
    "%nctaid.y": lambda g, t: 2,
    "%nctaid.z": lambda g, t: 1,
    "%laneid": lambda g, t: t % 32,
    "%warpid": lambda g, t: t // 32,
    "%cluster_ctarank": lambda g, t: g % 2,
    "%cluster_nctarank": lambda g, t: 2,
    "%clusterid.x": lambda g, t: g % 4 // 2,
    "%nclusterid.x": lambda g, t: 2,
    "%cluster_ctaid.x": lambda g, t: g % 2,
    "%cluster_nctaid.x": lambda g, t: 2,
    "%lanemask_lt": lambda g, t: (1 << t % 32) - 1,
    "%lanemask_eq": lambda g, t: 1 << t % 32,
    "%lanemask_le": lambda g, t: (2 << t % 32) - 1,
}


def _special_registers(add):
    for name, expected in _SPECIAL_REGISTERS.items():
        text = kernel(
            "u64",
            f"""
    ld.param.u64 %d1, [p0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %tid.y;
    mov.u32 %r3, %tid.z;
    mov.u32 %r4, %ctaid.x;
    mov.u32 %r5, %ctaid.y;
    mad.lo.u32 %r2, %r3, 2, %r2;
    mad.lo.u32 %r1, %r2, 8, %r1;
    mad.lo.u32 %r4, %r5, 4, %r4;
    mad.lo.u32 %r1, %r4, 64, %r1;
    mad.wide.u32 %d2, %r1, 4, %d1;
    mov.u32 %r6, {name};
    st.global.u32 [%d2], %r6;""",
        )

        def check(got, expected=expected, name=name):
            want = [[expected(g, t) for t in range(64)] for g in range(8)]
            same_bits(got, np.array(want, np.uint32), name)

        add(
            Program(
                name,
                text,
                lambda: [np.zeros((8, 64), np.uint32)],
                check,
                block=(8, 2, 4),
                grid=(4, 2),
                cluster=2,
                seeds=(0, 3),
            )
        )


def _matrices(add):
    """stmatrix and ldmatrix: thread t holds row t/4, columns 2*(t%4) and the next."""
    for count in (1, 2, 4):
        for transposed in ("", ".trans"):
            for store in (True, False):
                add(_matrix_program(count, transposed, store))
    add(
        per_thread(
            "movmatrix",
            "    movmatrix.sync.aligned.m8n8.trans.b16 %r0, %r1;",
            lambda x: (
                np.ascontiguousarray(x.view(np.uint16).reshape(8, 8).T)
                .view(np.uint32)[:, :4]
                .reshape(32)
            ),
        )
    )
    add(
        per_thread(
            "call.uni of an assert that holds",
            """    setp.ne.u32 %p1, %r1, %r1;
    @!%p1 bra HOLDS;
    { .param .b64 param0; .param .b32 param1; .param .b32 retval0;
    st.param.b64 [param0+0], %d1;
    st.param.b32 [param1], 5;
    call.uni __assertfail, (param0, param1);
    call.uni (retval0), vprintf, (param0, param1);
    ld.param.b32 %r2, [retval0+0];
    }
HOLDS:
    mov.b32 %r0, %r1;""",
            lambda x: x,
        )
    )


def _matrix_program(count: int, transposed: str, store: bool) -> Program:
    registers = ", ".join(f"%r{i + 1}" for i in range(count))
    # Rows of 16 bytes, matrix after matrix, in dynamic shared memory.
    loads = "\n".join(f"    ld.global.u32 %r{i + 1}, [%d3+{128 * i}];" for i in range(count))
    stores = "\n".join(f"    st.global.u32 [%d4+{128 * i}], %r{i + 1};" for i in range(count))
    lines = range(count)
    write = "\n".join(f"    st.shared.u32 [%r11+{128 * i}], %r{i + 1};" for i in lines)
    read = "\n".join(f"    ld.shared.u32 %r{i + 1}, [%r11+{128 * i}];" for i in lines)
    shape = f"sync.aligned.m8n8.x{count}{transposed}.shared.b16"
    middle = (
        f"    stmatrix.{shape} [%r12], {{{registers}}};\n    bar.warp.sync -1;\n{read}"
        if store
        else f"{write}\n    bar.warp.sync -1;\n    ldmatrix.{shape} {{{registers}}}, [%r12];"
    )
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r100, 4, %d1;
    mad.wide.u32 %d4, %r100, 4, %d2;
{loads}
    mov.u32 %r10, memory;
    mad.lo.u32 %r11, %r100, 4, %r10;
    and.b32 %r13, %r100, {8 * count - 1};
    mad.lo.u32 %r12, %r13, 16, %r10;
{middle}
{stores}""",
        module=".extern .shared .align 128 .b8 memory[];\n",
    )

    def check(source, got):
        tiles = source.view(np.uint16).reshape(count, 8, 8)
        want = tiles.transpose(0, 2, 1) if transposed else tiles
        same_bits(got.view(np.uint16).reshape(count, 8, 8), np.ascontiguousarray(want))

    given = np.random.default_rng(count).integers(0, 2**32, 32 * count, np.uint64)
    name = f"{'st' if store else 'ld'}matrix.x{count}{transposed}"
    return Program(
        name,
        text,
        lambda: [read_only(given.astype(np.uint32)), np.zeros(32 * count, np.uint32)],
        check,
        dynamic_smem=512,
    )
