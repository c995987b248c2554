"""Bulk copies of tensor boxes and ranges, and non-bulk cp.async."""

from __future__ import annotations

import itertools
import re

import ml_dtypes
import numpy as np

from tests.emulator import TensorMap

from .program import Program, kernel, read_only, same_bits

MODULE = ".extern .shared .align 1024 .b8 memory[];\n.shared .align 8 .b64 full;\n"

# Thread 0 initialises the mbarrier `full` for one arrival.
INITIALIZE = """
    mov.u32 %r100, %tid.x;
    mov.u32 %r101, full;
    mov.u32 %r102, memory;
    setp.ne.u32 %p10, %r100, 0;
    @%p10 bra INITIALIZED;
    mbarrier.init.shared::cta.b64 [%r101], 1;
    fence.mbarrier_init.release.cluster;
INITIALIZED:
    bar.sync 0;
"""


def wait(parity: int | str = 0, barrier: str = "%r101", label: str = "WAIT") -> str:
    return f"""
{label}:
    mbarrier.try_wait.parity.shared::cta.b64 %p11, [{barrier}], {parity};
    @!%p11 bra {label};
"""


def to_global(
    nbytes: int,
    pointer: str,
    label: str = "COPY",
    *,
    threads: int = 32,
    thread: str = "%r100",
    base: str = "%r102",
    scratch: str = "%r11",
) -> str:
    """All threads copy shared memory from `base` to the array at `pointer`, a word at a time."""
    place, index, word = (f"{scratch}{i}" for i in range(3))
    return f"""
    mad.lo.u32 {place}, {thread}, 4, {base};
    mad.wide.u32 %d50, {thread}, 4, {pointer};
    mov.u32 {index}, {thread};
{label}:
    setp.ge.u32 %p12, {index}, {nbytes // 4};
    @%p12 bra {label}_END;
    ld.shared.u32 {word}, [{place}];
    st.global.u32 [%d50], {word};
    add.s32 {place}, {place}, {4 * threads};
    add.s64 %d50, %d50, {4 * threads};
    add.s32 {index}, {index}, {threads};
    bra {label};
{label}_END:
"""


def from_global(nbytes: int, pointer: str, label: str = "FILL", **registers) -> str:
    """The reverse."""
    text = to_global(nbytes, pointer, label, **registers)
    text = text.replace("ld.shared.u32", "LOAD").replace("st.global.u32", "STORE")
    load = re.search(r"LOAD (\S+), (\S+);", text)
    store = re.search(r"STORE (\S+), (\S+);", text)
    assert load and store
    text = text.replace(load[0], f"ld.global.u32 {load[1]}, {store[1]};")
    return text.replace(store[0], f"st.shared.u32 {load[2]}, {load[1]};")


def swizzled(box: np.ndarray, swizzle: int) -> np.ndarray:
    """The image of a box in shared memory, by the bits of each address (CUDA Programming Guide)."""
    flat = np.ascontiguousarray(box).view(np.uint8).reshape(-1)
    image = np.empty_like(flat)
    for start in range(0, flat.size, 16):
        row, chunk = start >> 7, start >> 4 & 7
        keep = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
        target = row << 7 | (chunk ^ row & keep) << 4
        image[target : target + 16] = flat[start : start + 16]
    return image


def boxed(array: np.ndarray, coordinates, box) -> np.ndarray:
    """The elements of a box (sizes and coordinates innermost first), zeros outside."""
    out = np.zeros(tuple(reversed(box)), array.dtype)
    for index in itertools.product(*(range(n) for n in reversed(box))):
        place = tuple(i + c for i, c in zip(index, reversed(coordinates), strict=True))
        if all(0 <= p < n for p, n in zip(place, array.shape, strict=True)):
            out[index] = array[place]
    return out


def tensor_map(array: np.ndarray, box, swizzle: int = 0) -> TensorMap:
    return TensorMap(array, array.shape[::-1], array.strides[-2::-1], box, swizzle)


def random(shape, dtype, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize).astype(np.uint8)
    return raw.view(dtype).reshape(shape)


def _load(shape, box, coordinates, dtype, swizzle=0, tail="", name="") -> Program:
    rank = len(shape)
    source = random(shape, dtype)
    nbytes = int(np.prod(box)) * source.itemsize
    hint = "L2::cache_hint" in tail
    text = kernel(
        "map u64",
        INITIALIZE
        + f"""
    ld.param.u64 %d2, [p1];
    mov.b64 %d1, p0;
    cvta.param.u64 %d1, %d1;
    prefetch.tensormap [%d1];
    createpolicy.fractional.L2::evict_first.b64 %d9, 1.0;
    @%p10 bra ISSUED;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r101], {nbytes};
    cp.async.bulk.tensor.{rank}d.shared::cluster.global{tail} [%r102], [%d1, {{{
            ", ".join(str(c) for c in coordinates)
        }}}], [%r101]{", %d9" if hint else ""};
ISSUED:
"""
        + wait()
        + to_global(nbytes, "%d2"),
        module=MODULE,
    )

    def check(map_, got):
        same_bits(got, swizzled(boxed(source, coordinates, box), swizzle), name)

    return Program(
        name,
        text,
        lambda: [tensor_map(read_only(source.copy()), box, swizzle), np.zeros(nbytes, np.uint8)],
        check,
        dynamic_smem=nbytes,
        seeds=(0, 1, 2, 3),
    )


def _store(shape, box, coordinates, dtype, swizzle=0, reduction="", tail="", name="") -> Program:
    rank = len(shape)
    before = random(shape, dtype, 5)
    new = random(tuple(reversed(box)), dtype, 6)
    if np.dtype(dtype).kind not in "ui":
        before = (np.arange(before.size).reshape(shape) % 7 - 3).astype(dtype)
        new = (np.arange(new.size).reshape(new.shape) % 5 - 2).astype(dtype)
    nbytes = new.nbytes
    prefix = "cp.reduce" if reduction else "cp"
    text = kernel(
        "map u64",
        """
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d2, [p1];
    mov.b64 %d1, p0;
    cvta.param.u64 %d1, %d1;
"""
        + from_global(nbytes, "%d2")
        + f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra END;
    {prefix}.async.bulk.tensor.{rank}d.global.shared::cta{reduction}{tail}.bulk_group [%d1, {{{
            ", ".join(str(c) for c in coordinates)
        }}}], [%r102];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    cp.async.bulk.wait_group 0;
END:
""",
        module=MODULE,
    )
    want = before.copy()
    for index in itertools.product(*(range(n) for n in new.shape)):
        place = tuple(i + c for i, c in zip(index, reversed(coordinates), strict=True))
        if all(0 <= p < n for p, n in zip(place, want.shape, strict=True)):
            old, x = want[place], new[index]
            want[place] = {
                "": x, ".add": old + x, ".min": min(old, x), ".max": max(old, x)
            }[reduction]  # fmt: skip
    targets = []

    def arguments():
        target = before.copy()
        targets.append(target)
        return [tensor_map(target, box, swizzle), read_only(swizzled(new, swizzle))]

    return Program(
        name,
        text,
        arguments,
        lambda *_: same_bits(targets.pop(), want, name),
        dynamic_smem=nbytes,
        seeds=(0, 1, 2, 3),
    )


def programs() -> list[Program]:
    out: list[Program] = []
    add = out.append
    bytes_ = ".mbarrier::complete_tx::bytes"
    for swizzle in (0, 32, 64, 128):
        for coordinates in ((0, 0), (-16, 3), (40, 60)):
            add(
                _load(
                    (64, 96 if swizzle != 128 else 160), (swizzle or 48, 16), coordinates,
                    np.uint8, swizzle, f".tile{bytes_}",
                    name=f"tensor load, swizzle {swizzle}, from {coordinates}",
                )
            )  # fmt: skip
    shapes = {
        1: ((100,), (64,), (50,)),
        2: ((9, 24), (8, 5), (20, -2)),
        3: ((4, 5, 16), (16, 2, 3), (-4, 4, 2)),
        4: ((2, 3, 4, 8), (8, 2, 2, 2), (0, 3, 2, 1)),
        5: ((2, 2, 3, 4, 8), (4, 2, 2, 2, 1), (4, 1, -1, 1, 1)),
    }
    dtypes = {1: np.float32, 2: ml_dtypes.bfloat16, 3: np.uint8, 4: np.float16, 5: np.int32}
    for rank, (shape, box, coordinates) in shapes.items():
        for tail in (bytes_, f"{bytes_}.L2::cache_hint", f".tile{bytes_}"):
            add(
                _load(shape, box, coordinates, dtypes[rank], tail=tail,
                      name=f"tensor load {rank}d{tail}")
            )  # fmt: skip
        for tail in ("", ".tile"):
            add(
                _store(shape, box, coordinates, dtypes[rank], tail=tail,
                       name=f"tensor store {rank}d{tail}")
            )  # fmt: skip
    for swizzle in (32, 64, 128):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            item = np.dtype(dtype).itemsize
            add(
                _store((20, 64), (swizzle // item, 16), (0, 8), dtype, swizzle, tail=".tile",
                       name=f"tensor store of {np.dtype(dtype).name}, swizzle {swizzle}")
            )  # fmt: skip
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint32):
        for reduction in (".add", ".min", ".max"):
            add(
                _store((20, 64), (32, 8), (40, 15), dtype, reduction=reduction, tail=".tile",
                       name=f"tensor reduction {reduction} of {np.dtype(dtype).name}")
            )  # fmt: skip
    add(_store((20, 64), (32, 8), (40, 15), np.float32, reduction=".add",
               name="tensor reduction .add without .tile"))  # fmt: skip
    add(_range())
    add(_range_reduction())
    add(_multicast(""))
    add(_multicast(".L2::cache_hint"))
    for cache, size in (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)):
        for state in ("shared", "shared::cta"):
            add(_copy_async(cache, size, state))
    add(_copy_arrive(".noinc"))
    add(_copy_arrive(""))
    add(_copy_groups())
    add(_tensor_map_edit())
    return out


def _range() -> Program:
    text = kernel(
        "u64 u64",
        INITIALIZE
        + """
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    @%p10 bra ISSUED;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r101], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r102], [%d1], 256, [%r101];
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r102+256], [%d1+256], 256, [%r101];
    mbarrier.arrive.shared::cta.b64 _, [%r101];
ISSUED:
"""
        + wait()
        + """
    bar.sync 0;
    @%p10 bra END;
    fence.proxy.async;
    cp.async.bulk.global.shared::cta.bulk_group [%d2], [%r102], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
END:
""",
        module=MODULE,
    )
    source = random((512,), np.uint8)
    return Program(
        "ranges in and out",
        text,
        lambda: [read_only(source.copy()), np.zeros(512, np.uint8)],
        lambda _, got: same_bits(got, source),
        dynamic_smem=512,
        seeds=(0, 1, 2, 3),
    )


def _range_reduction() -> Program:
    text = kernel(
        "u64 u64",
        """
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
"""
        + from_global(256, "%d1")
        + """
    fence.proxy.async;
    bar.warp.sync -1;
    setp.ne.u32 %p1, %r100, 0;
    @%p1 bra END;
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%d2], [%r102], 256;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:
""",
        module=MODULE,
    )
    x = np.arange(64, dtype=np.float32)
    return Program(
        "a range added",
        text,
        lambda: [read_only(x.copy()), np.full(64, 0.5, np.float32)],
        lambda _, got: same_bits(got, x + np.float32(0.5)),
        dynamic_smem=256,
    )


def _multicast(hint: str) -> Program:
    """CTA 0 loads one box into both CTAs of its cluster, each onto its own barrier."""
    text = kernel(
        "map u64",
        INITIALIZE
        + f"""
    ld.param.u64 %d2, [p1];
    mov.b64 %d1, p0;
    cvta.param.u64 %d1, %d1;
    createpolicy.fractional.L2::evict_last.b64 %d9, 1.0;
    mov.u32 %r1, %cluster_ctarank;
    mov.u16 %h1, 3;
    mov.u32 %r5, 256;
    @%p10 bra ARMED;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r101], %r5;
ARMED:
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.aligned;
    or.b32 %r2, %r1, %r100;
    setp.ne.u32 %p1, %r2, 0;
    @%p1 bra ISSUED;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster{
            hint
        } [%r102], [%d1, {{0, 4}}], [%r101], %h1{", %d9" if hint else ""};
ISSUED:
"""
        + wait()
        + """
    mad.wide.u32 %d2, %r1, 256, %d2;
"""
        + to_global(256, "%d2")
        + """
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
""",
        module=MODULE,
    )
    source = random((16, 64), np.uint8)

    def check(map_, got):
        want = boxed(source, (0, 4), (64, 4)).reshape(-1)
        same_bits(got, np.stack([want, want]))

    return Program(
        f"multicast{hint}",
        text,
        lambda: [tensor_map(read_only(source.copy()), (64, 4)), np.zeros((2, 256), np.uint8)],
        check,
        grid=2,
        cluster=2,
        dynamic_smem=256,
        seeds=(0, 1, 2, 3, 4),
    )


def _copy_async(cache: str, size: int, state: str) -> Program:
    """Lane i copies `size` bytes; lanes past 20 only some of them, the rest is zero."""
    text = kernel(
        "u64 u64",
        f"""
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r100, {size}, %d1;
    mad.lo.u32 %r1, %r100, {size}, %r102;
    setp.lt.u32 %p1, %r100, 20;
    selp.u32 %r2, {size}, 2, %p1;
    setp.lt.u32 %p2, %r100, 30;
    selp.u32 %r2, %r2, 0, %p2;
    cp.async.{cache}.{state}.global [%r1], [%d3], {size}, %r2;
    cp.async.{cache}.{state}.global.L2::128B [%r1+{32 * size}], [%d3], {size};
    cp.async.wait_all;
    bar.warp.sync -1;
"""
        + to_global(64 * size, "%d2"),
        module=MODULE,
    )
    source = random((32 * size,), np.uint8, size)

    def check(_, got):
        rows = source.reshape(32, size).copy()
        rows[20:30, 2:] = 0
        rows[30:] = 0
        same_bits(got[: 32 * size], rows.reshape(-1))
        same_bits(got[32 * size :], source)

    return Program(
        f"cp.async.{cache}.{state} of {size} bytes",
        text,
        lambda: [read_only(source.copy()), np.zeros(64 * size, np.uint8)],
        check,
        dynamic_smem=64 * size,
        seeds=(0, 1, 2, 3),
    )


def _copy_arrive(increment: str) -> Program:
    """Warp 0 copies, and the copies' completion is what warp 1 waits for."""
    count = 32 if increment else 1
    text = kernel(
        "u64 u64",
        INITIALIZE.replace("[%r101], 1", f"[%r101], {count}")
        + f"""
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    setp.ge.u32 %p1, %r100, 32;
    @%p1 bra CONSUME;
    mad.wide.u32 %d3, %r100, 16, %d1;
    mad.lo.u32 %r1, %r100, 16, %r102;
    cp.async.cg.shared.global [%r1], [%d3], 16;
    cp.async.mbarrier.arrive{increment}.shared::cta.b64 [%r101];
    {"" if increment else "@!%p10 mbarrier.arrive.shared::cta.b64 %d9, [%r101];"}
    bra END;
CONSUME:
    sub.s32 %r100, %r100, 32;
"""
        + wait()
        + to_global(512, "%d2")
        + "END:\n",
        module=MODULE,
    )
    source = random((512,), np.uint8, 4)
    return Program(
        f"cp.async.mbarrier.arrive{increment}",
        text,
        lambda: [read_only(source.copy()), np.zeros(512, np.uint8)],
        lambda _, got: same_bits(got, source),
        block=64,
        dynamic_smem=512,
        seeds=(0, 1, 2, 3, 4),
    )


def _copy_groups() -> Program:
    """Two groups; the first is read after wait_group 1, the second after wait_group 0."""
    text = kernel(
        "u64 u64",
        """
    mov.u32 %r100, %tid.x;
    mov.u32 %r102, memory;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    mad.wide.u32 %d3, %r100, 4, %d1;
    mad.wide.u32 %d4, %r100, 4, %d2;
    mad.lo.u32 %r1, %r100, 4, %r102;
    cp.async.ca.shared.global [%r1], [%d3], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r1+128], [%d3+128], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.u32 %r2, [%r1];
    st.global.u32 [%d4], %r2;
    cp.async.wait_group 0;
    ld.shared.u32 %r3, [%r1+128];
    st.global.u32 [%d4+128], %r3;""",
        module=MODULE,
    )
    source = random((256,), np.uint8, 4)
    return Program(
        "cp.async groups",
        text,
        lambda: [read_only(source.copy()), np.zeros(256, np.uint8)],
        lambda _, got: same_bits(got, source),
        dynamic_smem=256,
        seeds=(0, 1, 2, 3),
    )


def _tensor_map_edit() -> Program:
    """A map is copied to shared memory, edited, stored to global memory, fenced and used."""
    text = kernel(
        "map u64 u64 u64",
        INITIALIZE
        + """
    ld.param.u64 %d2, [p1];
    ld.param.u64 %d3, [p2];
    ld.param.u64 %d4, [p3];
    mad.lo.u32 %r1, %r100, 4, %r102;
    mov.b64 %d5, p0;
    cvta.param.u64 %d5, %d5;
    cvt.u64.u32 %d6, %r100;
    shl.b64 %d6, %d6, 2;
    add.s64 %d7, %d5, %d6;
    ld.u32 %r2, [%d7];
    st.shared.u32 [%r1+1024], %r2;
    bar.warp.sync -1;
    @%p10 bra EDITED;
    tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r102+1024], %d3;
    tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r102+1024], 1, 3;
    tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r102+1024], 0, 128;
EDITED:
    bar.warp.sync -1;
    ld.shared.u32 %r2, [%r1+1024];
    add.s64 %d8, %d4, %d6;
    st.global.u32 [%d8], %r2;
    bar.warp.sync -1;
    @%p10 bra ISSUED;
    fence.proxy.tensormap::generic.release.gpu;
    fence.proxy.tensormap::generic.acquire.gpu [%d4], 128;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r101], 256;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r102], [%d4, {0, 0}], [%r101];
ISSUED:
"""
        + wait()
        + to_global(256, "%d2"),
        module=MODULE,
    )
    first, second = random((8, 64), np.uint8, 1), random((8, 128), np.uint8, 2)

    def check(map_, got, *_):
        want = second[:4, :64].copy()
        want[3] = 0
        same_bits(got, want.reshape(-1))

    return Program(
        "tensormap.replace",
        text,
        lambda: [
            tensor_map(read_only(first.copy()), (64, 4)), np.zeros(256, np.uint8),
            read_only(second.copy()), np.zeros(128, np.uint8),
        ],
        check,
        dynamic_smem=2048,
    )  # fmt: skip
