"""wgmma: every type, layout and operand form, against matrices in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .copies import from_global
from .program import Program, kernel, read_only, same_bits

_TYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
    "f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32,
}  # fmt: skip
_MODULE = ".extern .shared .align 1024 .b8 memory[];\n"
# Width of a swizzle atom in bytes, and the layout number of the descriptor.
_LAYOUTS = {0: (16, 0), 128: (128, 1), 64: (64, 2), 32: (32, 3)}


def _image(matrix: np.ndarray, swizzle: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """A matrix [rows, K] in shared memory for wgmma: (bytes, leading offset, stride offset).

    Canonical layouts of PTX ISA 9.7.15.5.1. K-major: groups of 8 rows, rows of one atom's width.
    MN-major: groups of 8 values of K, lines of one atom's width along the rows.
    """
    source = matrix.T if transposed else matrix  # lines x along
    raw = np.ascontiguousarray(source).view(np.uint8)
    lines, width = raw.shape
    atom = _LAYOUTS[swizzle][0]
    image = np.zeros(raw.size, np.uint8)
    if swizzle == 0:
        # Core matrices of 8 lines of 16 bytes, one after the other.
        chunks = width // 16
        for line in range(lines):
            for chunk in range(chunks):
                place = (line // 8 * chunks + chunk) * 128 + line % 8 * 16
                image[place : place + 16] = raw[line, 16 * chunk : 16 * chunk + 16]
        along, across = 128, chunks * 128
        return (image, across, along) if transposed else (image, along, across)
    # Blocks of `atom` bytes along, all lines of a block together.
    for block in range(-(-width // atom)):
        for line in range(lines):
            for byte in range(0, min(atom, width - block * atom), 16):
                place = block * lines * atom + line * atom + byte
                place ^= (place >> 7 & {32: 1, 64: 3, 128: 7}[swizzle]) << 4
                start = block * atom + byte
                image[place : place + 16] = raw[line, start : start + 16]
    return image, lines * atom, 8 * atom


def _descriptor(leading: int, stride: int, swizzle: int) -> int:
    return leading >> 4 << 16 | stride >> 4 << 32 | _LAYOUTS[swizzle][1] << 62


def _memory(a, b, swizzle: int) -> tuple[np.ndarray, int, tuple[int, int]]:
    """Two operands (matrix, transposed) in shared memory: its bytes, where the second begins, descriptors."""
    a_image, *a_offsets = _image(a[0], swizzle, a[1])
    b_image, *b_offsets = _image(b[0], swizzle, b[1])
    offset = -(-a_image.size // 1024) * 1024
    memory = np.zeros(-(-(offset + b_image.size) // 128) * 128, np.uint8)
    memory[: a_image.size] = a_image
    memory[offset : offset + b_image.size] = b_image
    return memory, offset, (_descriptor(*a_offsets, swizzle), _descriptor(*b_offsets, swizzle))


def _text(
    *,
    count: int,
    memory_size: int,
    descriptors: tuple[int, int],
    b_offset: int,
    opcode: str,
    registers: bool,
    flags: str,
) -> str:
    """One product of `count` registers a thread, from and to global memory."""
    names = [f"%r{i}" for i in range(count)]
    a_operand = "{%r150, %r151, %r152, %r153}" if registers else "%d1"
    loads = "\n".join(f"    ld.global.u32 {r}, [%d5+{4 * i}];" for i, r in enumerate(names))
    stores = "\n".join(f"    st.global.u32 [%d5+{4 * i}], {r};" for i, r in enumerate(names))
    fragments = "\n".join(f"    ld.global.u32 %r{150 + i}, [%d7+{4 * i}];" for i in range(4))
    return kernel(
        "u64 u64 u64",
        f"""
    mov.u32 %r130, %tid.x;
    ld.param.u64 %d10, [p0];
    ld.param.u64 %d4, [p1];
    ld.param.u64 %d6, [p2];
    mad.wide.u32 %d5, %r130, {4 * count}, %d4;
    mad.wide.u32 %d7, %r130, 16, %d6;
{fragments}
{loads}
    mov.u32 %r131, memory;
"""
        + from_global(
            memory_size, "%d10", threads=128, thread="%r130", base="%r131", scratch="%r14"
        )
        + f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    and.b32 %r142, %r131, 0x3ffff;
    shr.u32 %r142, %r142, 4;
    cvt.u64.u32 %d8, %r142;
    or.b64 %d1, %d8, {descriptors[0]};
    add.s64 %d9, %d8, {b_offset >> 4};
    or.b64 %d2, %d9, {descriptors[1]};
    setp.eq.u32 %p1, %r131, %r131;
    wgmma.fence.sync.aligned;
    {opcode} {{{", ".join(names)}}}, {a_operand}, %d2, {flags};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
{stores}""",
        module=_MODULE,
    )


def _multiply(
    n: int,
    d_type: str,
    a_type: str,
    b_type: str,
    *,
    swizzle: int = 128,
    a_transposed: bool = False,
    b_transposed: bool = False,
    registers: bool = False,
    signs: tuple[int, int] = (1, 1),
    accumulate: bool = True,
    seeds: tuple[int, ...] = (0,),
) -> Program:
    k = 32 if a_type.startswith("e") else 8 if a_type == "tf32" else 16
    # The atom is as wide as the swizzle: K covers a whole atom, of which one step is used.
    atom = max(_LAYOUTS[swizzle][0], 32)
    whole = atom * k // 32
    rng = np.random.default_rng(n)
    a = rng.standard_normal((64, whole)).astype(_TYPES[a_type])
    b = rng.standard_normal((n, whole)).astype(_TYPES[b_type])
    d = rng.standard_normal((64, n)).astype(np.float32 if d_type == "f32" else np.float16)
    a, b = a[:, : k if a_transposed else None], b[:, : k if b_transposed else None]
    memory, offset, descriptors = _memory((a, a_transposed), (b, b_transposed), swizzle)
    flags = [b_transposed] if registers else [a_transposed, b_transposed]
    transposes = "".join(f", {int(t)}" for t in flags) if k == 16 else ""  # 16-bit types alone
    text = _text(
        count=n // 2 // (1 if d_type == "f32" else 2),
        memory_size=memory.size,
        descriptors=descriptors,
        b_offset=offset,
        opcode=f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d_type}.{a_type}.{b_type}",
        registers=registers,
        flags=f"{'%p1' if accumulate else '0'}, {signs[0]}, {signs[1]}{transposes}",
    )
    exact = _exact(a[:, :k], a_type) @ _exact(b[:, :k], b_type).T * signs[0] * signs[1]
    want = (exact + (d.astype(np.float64) if accumulate else 0)).astype(d.dtype)

    def check(_, got, __):
        same_bits(_matrix(got, n, d_type), want)

    return Program(
        f"wgmma m64n{n}k{k}.{d_type}.{a_type}.{b_type} swizzle {swizzle}"
        + " A transposed" * a_transposed
        + " B transposed" * b_transposed
        + " A in registers" * registers
        + (f" signs {signs}" if signs != (1, 1) else "")
        + " overwriting" * (not accumulate),
        text,
        lambda: [
            read_only(memory.copy()),
            _per_thread(d, n, d_type),
            read_only(_fragment(a[:, :k])),
        ],
        check,
        block=128,
        dynamic_smem=memory.size,
        seeds=seeds,
    )


def _exact(matrix: np.ndarray, kind: str) -> np.ndarray:
    """The values that count: of TF32 the first ten bits of the fraction."""
    if kind == "tf32":
        matrix = (np.ascontiguousarray(matrix).view(np.uint32) >> 13 << 13).view(np.float32)
    return matrix.astype(np.float64)


def _places(n: int):
    """(thread, element, row, column) of every element of D, by the figure of the PTX ISA."""
    for thread in range(128):
        warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
        for element in range(n // 2):
            row = 16 * warp + group + (8 if element % 4 >= 2 else 0)
            yield thread, element, row, element // 4 * 8 + lane * 2 + element % 2


def _per_thread(d: np.ndarray, n: int, d_type: str) -> np.ndarray:
    out = np.zeros((128, n // 2), d.dtype)
    for thread, element, row, column in _places(n):
        out[thread, element] = d[row, column]
    return out


def _matrix(held: np.ndarray, n: int, d_type: str) -> np.ndarray:
    out = np.zeros((64, n), held.dtype)
    for thread, element, row, column in _places(n):
        out[row, column] = held[thread, element]
    return out


def _fragment(a: np.ndarray) -> np.ndarray:
    """A in registers: [thread, 16 bytes], by the figure of the PTX ISA."""
    raw = np.ascontiguousarray(a).view(np.uint8)
    out = np.zeros((128, 16), np.uint8)
    for thread in range(128):
        warp, group, lane = thread // 32, thread % 32 // 4, thread % 4
        for byte in range(16):
            register, part = byte // 4, byte % 4
            row = 16 * warp + group + (8 if register % 2 else 0)
            out[thread, byte] = raw[row, lane * 4 + part + (16 if register >= 2 else 0)]
    return out


def programs() -> list[Program]:
    out: list[Program] = []
    add = out.append
    for a_type in ("e4m3", "e5m2"):
        for b_type in ("e4m3", "e5m2"):
            add(_multiply(64, "f32", a_type, b_type, seeds=(0, 1, 2, 3)))
            add(_multiply(8, "f32", a_type, b_type, registers=True))
            add(_multiply(16, "f16", a_type, b_type))
    for n in (8, 24, 128, 192, 256):
        add(_multiply(n, "f32", "e4m3", "e4m3"))
    for swizzle in (0, 32, 64):
        add(_multiply(32, "f32", "e4m3", "e4m3", swizzle=swizzle))
    add(_multiply(16, "f32", "e4m3", "e4m3", signs=(-1, 1)))
    add(_multiply(16, "f32", "e4m3", "e4m3", signs=(-1, -1)))
    add(_multiply(16, "f32", "e4m3", "e4m3", accumulate=False))
    for kind in ("f16", "bf16"):
        add(_multiply(40, "f32", kind, kind))
        add(_multiply(16, "f32", kind, kind, registers=True))
        for swizzle in (0, 32, 64, 128):
            add(
                _multiply(
                    64, "f32", kind, kind, swizzle=swizzle, a_transposed=True, b_transposed=True
                )
            )
    add(_multiply(16, "f16", "f16", "f16"))
    for swizzle in (0, 32, 128):
        add(_multiply(24, "f32", "tf32", "tf32", swizzle=swizzle))
    add(_multiply(16, "f32", "tf32", "tf32", registers=True))
    for kind in ("bf16", "f16"):
        for k in (8, 16):
            add(_warp_multiply(kind, k))
    return out


def _warp_multiply(kind: str, k: int) -> Program:
    """mma.sync.m16n8k{8,16}: A, B and C in the registers of a warp, by the figures of the PTX ISA."""
    rng = np.random.default_rng(k)
    a = rng.standard_normal((16, k)).astype(_TYPES[kind])
    b = rng.standard_normal((k, 8)).astype(_TYPES[kind])
    c = rng.standard_normal((16, 8)).astype(np.float32)
    count = k // 4
    a_held = np.zeros((32, count, 2), a.dtype)
    b_held = np.zeros((32, count // 2, 2), b.dtype)
    c_held = np.zeros((32, 4), np.float32)
    places = np.zeros((32, 4, 2), int)
    for lane in range(32):
        group, inner = lane // 4, lane % 4
        for register in range(count):
            for element in range(2):
                column = 8 * (register // 2) + 2 * inner + element
                a_held[lane, register, element] = a[group + 8 * (register % 2), column]
                if register < count // 2:
                    b_held[lane, register, element] = b[8 * register + 2 * inner + element, group]
        for element in range(4):
            places[lane, element] = group + 8 * (element // 2), 2 * inner + element % 2
            c_held[lane, element] = c[tuple(places[lane, element])]
    left = [f"%r{i}" for i in range(count)]
    right = [f"%r{10 + i}" for i in range(count // 2)]
    text = kernel(
        "u64 u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    ld.param.u64 %d3, [p2];
    mad.wide.u32 %d4, %r100, {4 * count}, %d1;
    mad.wide.u32 %d5, %r100, {2 * count}, %d2;
    mad.wide.u32 %d6, %r100, 16, %d3;
"""
        + "".join(f"    ld.global.u32 {r}, [%d4+{4 * i}];\n" for i, r in enumerate(left))
        + "".join(f"    ld.global.u32 {r}, [%d5+{4 * i}];\n" for i, r in enumerate(right))
        + "".join(f"    ld.global.f32 %f{i}, [%d6+{4 * i}];\n" for i in range(4))
        + f"    mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%f4, %f5, %f6, %f7}}, "
        f"{{{', '.join(left)}}}, {{{', '.join(right)}}}, {{%f0, %f1, %f2, %f3}};\n"
        + "".join(f"    st.global.f32 [%d6+{4 * i}], %f{4 + i};\n" for i in range(4)),
    )
    want = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float32)

    def check(_, __, got):
        same_bits(got, want[places[..., 0], places[..., 1]])

    return Program(
        f"mma.sync m16n8k{k} of {kind}",
        text,
        lambda: [
            read_only(a_held.view(np.uint32)),
            read_only(b_held.view(np.uint32)),
            c_held.copy(),
        ],
        check,
    )
