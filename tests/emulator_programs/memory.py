"""Loads, stores and atomics in every state space."""

from __future__ import annotations

import numpy as np

from .program import Program, kernel, read_only, same_bits

_REGISTER = {"8": "%h", "16": "%h", "32": "%r", "64": "%d"}
_MODULE = ".extern .shared .align 128 .b8 memory[];\n"


def _copy(load: str, store: str, middle: str = "", *, name: str, extra: str = "") -> Program:
    """Each thread copies one element or vector with one load and one store opcode."""
    mods = load.split(".")
    kind = mods[-1]
    bits = kind[1:]
    vector = next((int(m[1]) for m in mods if m in ("v2", "v4")), 1)
    width = int(bits) // 8 * vector
    registers = [f"{_REGISTER[bits]}{i + 1}" for i in range(vector)]
    operand = registers[0] if vector == 1 else "{" + ", ".join(registers) + "}"
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d40, [p0];
    ld.param.u64 %d41, [p1];
    cvta.to.global.u64 %d40, %d40;
    cvta.to.global.u64 %d41, %d41;
    mad.wide.u32 %d42, %r100, {width}, %d40;
    mad.wide.u32 %d43, %r100, {width}, %d41;
    {load} {operand}, [%d42];
{middle}
    {store} [%d43], {operand};""",
        module=_MODULE,
    )
    given = np.random.default_rng(2).integers(0, 256, 64 * width).astype(np.uint8)
    return Program(
        name,
        text,
        lambda: [read_only(given.copy()), np.zeros(64 * width, np.uint8)],
        lambda source, got: same_bits(got, source, name),
        block=64,
        dynamic_smem=4096,
    )


def programs() -> list[Program]:
    out: list[Program] = []
    add = out.append
    kinds = ["u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "f32", "u64", "s64", "b64"]
    for kind in kinds:
        for vector in ("", ".v2", ".v4"):
            if vector == ".v4" and kind[1:] == "64":
                continue
            tail = f"{vector}.{kind}"
            add(_copy(f"ld.global{tail}", f"st.global{tail}", name=f"ld and st.global{tail}"))
            add(_copy(f"ld.global.nc{tail}", f"st.global{tail}", name=f"ld.global.nc{tail}"))
            add(_copy(f"ld{tail}", f"st{tail}", name=f"ld and st{tail} of generic addresses"))
            add(_through_shared(tail, "shared"))
    for tail in (".u32", ".v4.u32", ".u64"):
        add(_through_shared(tail, "shared::cta"))
        add(_through_shared(tail, "generic"))
    for kind in ("u16", "b16", "u32", "b32", "f32", "u64", "b64"):
        for vector in ("", ".v2", ".v4"):
            if vector == ".v4" and kind[1:] == "64":
                continue
            add(_through_local(f"{vector}.{kind}"))
    add(_copy("ld.relaxed.gpu.global.u32", "st.relaxed.gpu.global.u32", name="relaxed accesses"))
    add(_copy("ld.acquire.gpu.global.u32", "st.release.gpu.global.u32", name="ld.acquire"))
    add(_copy("ld.volatile.global.u32", "st.volatile.global.u32", name="volatile accesses"))
    add(
        _copy(
            "ld.global.nc.L1::no_allocate.L2::128B.v4.u32",
            "st.global.v4.u32",
            name="cache hints",
            middle="    fence.acq_rel.gpu;\n    membar.gl;\n    nanosleep.u32 20;",
        )
    )
    add(_widening())
    add(_parameters())
    add(_module_variables())
    add(_spaces())
    add(_distributed())
    for space in ("global", "shared"):
        for kind in ("u32", "s32", "u64", "s64"):
            for operation in ("add", "min", "max"):
                if space == "shared" and kind == "s64" and operation == "add":
                    continue
                if kind == "s64" and operation == "add":
                    continue
                add(_atomic(space, operation, kind))
        for operation in ("and", "or", "xor", "exch"):
            add(_atomic(space, operation, "b32"))
        for operation in ("inc", "dec"):
            add(_atomic(space, operation, "u32"))
        add(_atomic(space, "cas", "b32"))
    add(_atomic("global", "add", "f32"))
    for vector in (2, 4):
        for sem in ("", ".relaxed.gpu"):
            for base in ("red", "atom"):
                add(_vector_atomic(f"{base}{sem}.global.add.v{vector}.f32", vector))
    return out


def _through_shared(tail: str, space: str) -> Program:
    kind = tail.split(".")[-1]
    bits = int(kind[1:])
    vector = next((int(v[1]) for v in ("v2", "v4") if f".{v}." in f"{tail}."), 1)
    width = bits // 8 * vector
    registers = [f"{_REGISTER[str(bits)]}{i + 1}" for i in range(vector)]
    operand = registers[0] if vector == 1 else "{" + ", ".join(registers) + "}"
    generic = space == "generic"
    suffix = "" if generic else f".{space}"
    base = (
        "    mov.u64 %d50, memory;\n    cvta.shared.u64 %d50, %d50;\n"
        f"    mad.wide.u32 %d51, %r100, {width}, %d50;\n    mul.wide.u32 %d53, %r101, {width};\n"
        "    add.s64 %d52, %d50, %d53;"
        if generic
        else f"    mov.u32 %r110, memory;\n    mad.lo.u32 %r111, %r100, {width}, %r110;\n"
        f"    mad.lo.u32 %r112, %r101, {width}, %r110;"
    )
    here, there = ("%d51", "%d52") if generic else ("%r111", "%r112")
    # The value crosses to another warp and back.
    middle = f"""
    xor.b32 %r101, %r100, 33;
{base}
    st{suffix}{tail} [{here}], {operand};
    bar.sync 0;
    ld{suffix}{tail} {operand}, [{there}];
    bar.sync 0;
    st{suffix}{tail} [{there}], {operand};
    bar.sync 0;
    ld{suffix}{tail} {operand}, [{here}];"""
    load = f"ld.global{'.' + 'v' + str(vector) if vector > 1 else ''}.u{bits}"
    store = f"st.global{'.' + 'v' + str(vector) if vector > 1 else ''}.u{bits}"
    return _copy(load, store, middle, name=f"ld and st{suffix or ' generic shared'}{tail}")


def _through_local(tail: str) -> Program:
    kind = tail.split(".")[-1]
    vector = next((int(v[1]) for v in ("v2", "v4") if f".{v}." in tail), 1)
    registers = [f"{_REGISTER[kind[1:]]}{i + 1}" for i in range(vector)]
    operand = registers[0] if vector == 1 else "{" + ", ".join(registers) + "}"
    middle = f"""
    .local .align 16 .b8 depot[64];
    mov.u64 %d50, depot;
    cvta.local.u64 %d51, %d50;
    st.local{tail} [%d50+16], {operand};
    ld{tail} {operand}, [%d51+16];
    cvta.to.local.u64 %d52, %d51;
    st{tail} [%d51+32], {operand};
    ld.local{tail} {operand}, [%d52+32];"""
    return _copy(f"ld.global{tail}", f"st.global{tail}", middle, name=f"ld and st.local{tail}")


def _widening() -> Program:
    """A load of 8 or 16 bits extends to the register by its sign."""
    text = kernel(
        "u64 u64",
        """
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r100, 4, %d1;
    mad.wide.u32 %d4, %r100, 16, %d2;
    ld.global.s8 %r1, [%d3];
    ld.global.u8 %r2, [%d3];
    ld.global.s16 %r3, [%d3+2];
    ld.global.u16 %r4, [%d3+2];
    st.global.v4.u32 [%d4], {%r1, %r2, %r3, %r4};""",
    )
    given = np.random.default_rng(3).integers(0, 2**32, 32, np.uint64).astype(np.uint32)

    def check(source, got):
        bytes_, halves = source.view(np.uint8)[::4], source.view(np.uint16)[1::2]
        want = np.stack(
            [
                bytes_.view(np.int8).astype(np.int32).view(np.uint32),
                bytes_.astype(np.uint32),
                halves.view(np.int16).astype(np.int32).view(np.uint32),
                halves.astype(np.uint32),
            ],
            axis=1,
        )
        same_bits(got, np.ascontiguousarray(want))

    return Program(
        "loads widen by sign",
        text,
        lambda: [read_only(given.copy()), np.zeros((32, 4), np.uint32)],
        check,
    )


def _parameters() -> Program:
    """Parameters of every size at their offsets, also through a generic pointer."""
    text = kernel(
        "u8 u64 u16 f32 s64 map",
        """
    ld.param.u64 %d2, [p1];
    ld.param.u8 %r1, [p0];
    ld.param.u16 %r2, [p2];
    ld.param.f32 %f1, [p3];
    ld.param.s64 %d3, [p4];
    ld.param.v2.u32 {%r3, %r4}, [p5+8];
    ld.param.v4.u32 {%r5, %r6, %r7, %r8}, [p5+16];
    ld.param.b32 %r9, [p3];
    ld.param.u32 %r15, [p3];
    ld.param.v2.u64 {%d8, %d9}, [p5+32];
    mov.b64 %d4, p5;
    cvta.param.u64 %d5, %d4;
    ld.u32 %r10, [%d5+4];
    st.global.u32 [%d2], %r1;
    st.global.u32 [%d2+4], %r2;
    st.global.f32 [%d2+8], %f1;
    st.global.u32 [%d2+12], %r9;
    st.global.u64 [%d2+16], %d3;
    st.global.v2.u32 [%d2+24], {%r3, %r4};
    st.global.v4.u32 [%d2+32], {%r5, %r6, %r7, %r8};
    st.global.u32 [%d2+48], %r10;
    st.global.u32 [%d2+52], %r15;
    st.global.u64 [%d2+56], %d9;""",
    )
    blob = bytes(range(128))

    def check(a, got, b, c, d, e):
        words = np.frombuffer(blob, np.uint32)
        floats = np.array([2.5], np.float32).view(np.uint32)[0]
        low, high = np.array([-3], np.int64).view(np.uint32)
        want = [200, 60000, floats, floats, low, high, words[2], words[3], *words[4:8], words[1],
                floats, words[10], words[11]]  # fmt: skip
        same_bits(got, np.array(want, np.uint32))

    return Program(
        "ld.param of every size",
        text,
        lambda: [
            np.uint8(200), np.zeros(16, np.uint32), np.uint16(60000), np.float32(2.5),
            np.int64(-3), blob,
        ],
        check,
    )  # fmt: skip


def _module_variables() -> Program:
    text = kernel(
        "u64",
        """
    .shared .align 4 .b32 counter;
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    mad.wide.u32 %d2, %r100, 4, %d1;
    and.b32 %r1, %r100, 3;
    mov.u64 %d3, table;
    mad.wide.u32 %d4, %r1, 4, %d3;
    ld.global.u32 %r2, [%d4];
    ld.const.u32 %r3, [limits+4];
    add.s32 %r4, %r2, %r3;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra SKIP;
    st.shared.u32 [counter], 1000;
SKIP:
    bar.sync 0;
    ld.shared.u32 %r5, [counter];
    add.s32 %r4, %r4, %r5;
    mov.u64 %d5, scratch;
    mad.wide.u32 %d6, %r100, 4, %d5;
    st.global.u32 [%d6], %r4;
    ld.global.u32 %r6, [%d6];
    st.global.u32 [%d2], %r6;""",
        module=(
            ".global .align 4 .b32 table[4] = {1, 2, 0x30, 4};\n"
            ".const .align 4 .b32 limits[2] = {7, 70};\n.global .align 4 .b8 scratch[256];\n"
        ),
    )

    def check(got):
        table = np.array([1, 2, 0x30, 4])
        same_bits(got, (table[np.arange(64) % 4] + 70 + 1000).astype(np.uint32))

    return Program(
        "variables at module scope", text, lambda: [np.zeros(64, np.uint32)], check, block=64
    )


def _spaces() -> Program:
    text = kernel(
        "u64",
        """
    .local .align 8 .b8 depot[16];
    ld.param.u64 %d1, [p0];
    mov.u64 %d2, memory;
    cvta.shared.u64 %d2, %d2;
    mov.u64 %d3, depot;
    cvta.local.u64 %d3, %d3;
    isspacep.shared %p1, %d2;
    isspacep.shared %p2, %d1;
    isspacep.local %p3, %d3;
    isspacep.global %p4, %d1;
    isspacep.global %p5, %d2;
    selp.u32 %r1, 1, 0, %p1;
    selp.u32 %r2, 1, 0, %p2;
    selp.u32 %r3, 1, 0, %p3;
    selp.u32 %r4, 1, 0, %p4;
    selp.u32 %r5, 1, 0, %p5;
    st.global.v4.u32 [%d1], {%r1, %r2, %r3, %r4};
    st.global.u32 [%d1+16], %r5;""",
        module=_MODULE,
    )
    return Program(
        "isspacep",
        text,
        lambda: [np.zeros(5, np.uint32)],
        lambda got: same_bits(got, np.array([1, 0, 1, 1, 0], np.uint32)),
        dynamic_smem=64,
    )


def _distributed() -> Program:
    """Each CTA of a cluster reads and writes the other's shared memory."""
    text = kernel(
        "u64",
        """
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    mov.u32 %r1, %cluster_ctarank;
    xor.b32 %r2, %r1, 1;
    mov.u32 %r3, memory;
    mad.lo.u32 %r4, %r100, 4, %r3;
    mapa.shared::cluster.u32 %r5, %r4, %r2;
    getctarank.shared::cluster.u32 %r6, %r5;
    mad.lo.u32 %r7, %r1, 1000, %r100;
    st.shared.u32 [%r4], %r7;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    ld.shared::cluster.u32 %r8, [%r5];
    st.shared::cluster.u32 [%r5+256], %r8;
    cvt.u64.u32 %d6, %r4;
    cvta.shared.u64 %d7, %d6;
    mapa.u64 %d8, %d7, %r2;
    ld.u32 %r12, [%d8];
    red.shared::cluster.add.u32 [%r5+512], 0;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    ld.shared.u32 %r9, [%r4+256];
    mad.lo.u32 %r10, %r1, 32, %r100;
    mad.wide.u32 %d2, %r10, 16, %d1;
    st.global.v4.u32 [%d2], {%r8, %r9, %r6, %r12};""".replace(
            "    red.shared::cluster.add.u32 [%r5+512], 0;\n", ""
        ),
        module=_MODULE,
    )

    def check(got):
        lane = np.arange(32)
        for rank in (0, 1):
            other = 1 - rank
            same_bits(got[rank, :, 0], (1000 * other + lane).astype(np.uint32))
            same_bits(got[rank, :, 1], (1000 * rank + lane).astype(np.uint32))
            same_bits(got[rank, :, 2], np.full(32, other, np.uint32))
            same_bits(got[rank, :, 3], (1000 * other + lane).astype(np.uint32))

    return Program(
        "shared memory of another CTA",
        text,
        lambda: [np.zeros((2, 32, 4), np.uint32)],
        check,
        grid=2,
        cluster=2,
        dynamic_smem=1024,
        seeds=(0, 1, 2, 3),
    )


def _atomic_result(operation: str, start: int, times: int) -> float:
    """What 64 threads leave in the cell, each with its number as operand, `times` times."""
    if operation in ("inc", "dec"):
        state = start
        for _ in range(128):
            if operation == "inc":
                state = 0 if state >= 10 else state + 1
            else:
                state = 9 if state == 0 or state > 9 else state - 1
        return state
    return {
        "add": times * sum(range(64)), "min": 0, "max": 63, "and": 0, "or": 63,
        "xor": 0, "exch": 77, "cas": 9,
    }[operation]  # fmt: skip


def _atomic(space: str, operation: str, kind: str) -> Program:
    """All threads of two warps act on one cell; thread 0 stores what it holds at the end."""
    bits = int(kind[1:])
    register = "%f" if kind == "f32" else _REGISTER[str(bits)]
    start = {"min": 40, "and": 0xFFFF, "dec": 3, "cas": 5}.get(operation, 0)
    convert = {
        "f32": "cvt.rn.f32.u32 %f5, %r100;",
    }.get(kind, "mov.u32 %r5, %r100;" if bits == 32 else "cvt.u64.u32 %d5, %r100;")
    value = f"{register}5"
    if operation == "exch":
        convert = "mov.u32 %r5, 77;"
    if operation == "inc":
        convert = "mov.u32 %r5, 10;"
    if operation == "dec":
        convert = "mov.u32 %r5, 9;"
    cell = "%d2" if space == "global" else "%r20"
    extra = f", {register}6" if operation == "cas" else ""
    if operation == "cas":
        convert = "mov.u32 %r5, 5;\n    mov.u32 %r6, 9;"
    opcode = f"atom.{space}.{operation}.{kind}"
    reduce = f"red.{space}.{operation}.{kind}"
    second = "" if operation in ("exch", "cas") else f"    {reduce} [{cell}], {value};\n"
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mov.u32 %r20, memory;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra READY;
    st.shared.u{bits} [%r20], {start};
READY:
    bar.sync 0;
    {convert}
    {opcode} {register}7, [{cell}], {value}{extra};
{second}    bar.sync 0;
    @%p1 bra END;
    ld.{space}.u{bits} {register if register != "%f" else "%r"}8, [{cell}];
    st.global.u{bits} [%d1], {register if register != "%f" else "%r"}8;
END:""",
        module=_MODULE,
    )
    dtype = np.uint64 if bits == 64 else np.uint32
    times = 1 if not second else 2

    def check(got, cell_array):
        want = _atomic_result(operation, start, times)
        expected = np.array([want], np.float32).view(np.uint32) if kind == "f32" else [want]
        same_bits(got, np.array(expected, dtype), opcode)

    def arguments():
        first = np.float32(start).view(np.uint32) if kind == "f32" else start
        return [np.zeros(1, dtype), np.array([first], dtype)]

    return Program(opcode, text, arguments, check, block=64, dynamic_smem=64, seeds=(0, 2))


def _vector_atomic(opcode: str, vector: int) -> Program:
    """Two warps add vectors of floats to the same places."""
    names = [f"%f{i + 1}" for i in range(vector)]
    tail = f".v{vector}"
    group = "{" + ", ".join(names) + "}"
    olds = "{" + ", ".join(f"%f{i + 11}" for i in range(vector)) + "}, "
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    and.b32 %r1, %r100, 31;
    mad.wide.u32 %d3, %r100, {4 * vector}, %d1;
    mad.wide.u32 %d4, %r1, {4 * vector}, %d2;
    ld.global{tail}.f32 {group}, [%d3];
    {opcode} {olds if opcode.startswith("atom") else ""}[%d4], {group};""",
    )
    source = np.arange(64 * vector, dtype=np.float32).reshape(2, -1)

    def check(_, got):
        same_bits(got, source[0] + source[1] + np.float32(1))

    return Program(
        opcode,
        text,
        lambda: [read_only(source.copy()), np.ones(32 * vector, np.float32)],
        check,
        block=64,
        seeds=(0, 1),
    )
