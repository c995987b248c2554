"""Buffers, guard zones, mapped host memory, tensor map rules, parsing and reports."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import (
    DescriptorError,
    LaunchError,
    Memory,
    OutOfBounds,
    PtxSyntaxError,
    ReadOnlyWrite,
    TensorMap,
    Unsupported,
    kernel,
    launch,
    module,
)
from tests.emulator_programs import all_programs, program

pytestmark = pytest.mark.emulator

# Thread t copies word t + p2 of p0 to word t of p1.
COPY = program.kernel(
    "u64 u64 s32",
    """
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    ld.param.s32 %r1, [p2];
    add.s32 %r2, %r100, %r1;
    mad.wide.s32 %d3, %r2, 4, %d1;
    mad.wide.u32 %d4, %r100, 4, %d2;
    ld.global.u32 %r3, [%d3];
    st.global.u32 [%d4], %r3;""",
)


def copy(source, target, shift=0, **options):
    return launch(COPY, "test", grid=1, block=32, args=[source, target, np.int32(shift)], **options)


def words(n: int = 32) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


def test_arrays_are_written_in_place():
    target = np.zeros(32, np.uint32)
    copy(words(), target)
    np.testing.assert_array_equal(target, words())


def test_every_byte_around_a_buffer_is_out_of_bounds():
    for shift in (-1, 1):
        with pytest.raises(OutOfBounds) as raised:
            copy(words(), np.zeros(32, np.uint32), shift)
        assert raised.value.line is not None and "0x" in str(raised.value)


def test_one_array_as_two_arguments_is_one_buffer():
    array = words(64)
    copy(array, array, 0)
    np.testing.assert_array_equal(array, words(64))


def test_a_buffer_that_is_written_keeps_its_other_bytes():
    target = np.full(64, 7, np.uint32)
    copy(words(), target)
    np.testing.assert_array_equal(target[32:], 7)


def test_an_odd_number_of_bytes_can_be_read_to_the_end():
    text = program.kernel(
        "u64 u64",
        """
    mov.u32 %r100, %tid.x;
    ld.param.u64 %d1, [p0];
    ld.param.u64 %d2, [p1];
    cvt.u64.u32 %d3, %r100;
    add.s64 %d4, %d1, %d3;
    add.s64 %d5, %d2, %d3;
    ld.global.u16 %h1, [%d1];
    ld.global.u8 %r1, [%d4];
    st.global.u8 [%d5], %r1;""",
    )
    source, target = np.arange(33, dtype=np.uint8)[1:], np.zeros(32, np.uint8)
    launch(text, "test", grid=1, block=32, args=[source, target])
    np.testing.assert_array_equal(target, source)


def test_read_only_arrays_are_refused_as_targets():
    target = np.zeros(32, np.uint32)
    target.flags.writeable = False
    with pytest.raises(ReadOnlyWrite):
        copy(words(), target)


def test_mapped_host_memory_is_used_at_its_own_address():
    source, target = words(40), np.zeros(32, np.uint32)
    memory = Memory()
    memory.map(source.ctypes.data, source.nbytes, writable=False)
    memory.map(target.ctypes.data, target.nbytes)
    pointers = [np.uint64(a.ctypes.data) for a in (source, target)]
    copy(*pointers, 8, memory=memory)
    np.testing.assert_array_equal(target, words(40)[8:])
    with pytest.raises(ReadOnlyWrite):
        copy(pointers[1], pointers[0], memory=memory)
    with pytest.raises(OutOfBounds):
        copy(*pointers, 9, memory=memory)
    memory.unmap(source.ctypes.data)
    with pytest.raises(OutOfBounds):
        copy(*pointers, memory=memory)
    with pytest.raises(LaunchError):
        memory.unmap(source.ctypes.data)


def test_a_buffer_can_be_mapped_twice_but_not_overlapped():
    host = ctypes.create_string_buffer(256)
    address = ctypes.addressof(host)
    memory = Memory()
    first = memory.map(address, 128, writable=False)
    assert memory.map(address, 128, writable=True) is first and first.writable
    memory.map(address + 128, 128)
    for start, size in ((address + 64, 16), (address + 120, 16), (address, 256)):
        with pytest.raises(LaunchError, match="overlaps"):
            memory.map(start, size)


def test_an_empty_buffer_can_be_passed_but_not_read():
    with pytest.raises(OutOfBounds):
        copy(np.zeros(0, np.uint32), np.zeros(32, np.uint32))


# --- tensor maps ------------------------------------------------------------------------------

ARRAY = np.zeros((32, 256), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dims=[]), "rank 0"),
        (dict(dims=[1] * 6), "rank 6"),
        (dict(strides=[]), "0 strides for rank 2"),
        (dict(box=[16]), "1 box sizes for rank 2"),
        (dict(dims=[256, 0]), "dimension 0"),
        (dict(dims=[256, 2**33]), "dimension 8589934592"),
        (dict(strides=[0]), "stride 0"),
        (dict(strides=[2**40]), "stride 1099511627776"),
        (dict(strides=[24]), "stride 24 is not a multiple of 16"),
        (dict(box=[0, 1]), "box size 0"),
        (dict(box=[16, 257]), "box size 257"),
        (dict(box=[24, 1]), "inner box of 24 bytes"),
        (dict(swizzle=48), "swizzle 48"),
        (dict(box=[128, 1], swizzle=64), "exceeds the 64-byte swizzle"),
        (dict(dtype="complex64"), "no data type 'complex64'"),
    ],
)
def test_tensor_map_rules_of_the_driver(arguments, message):
    given = dict(dims=[256, 32], strides=[256], box=[128, 8], swizzle=128) | arguments
    with pytest.raises(DescriptorError, match=message):
        TensorMap(ARRAY, **given)


def test_tensor_map_of_a_raw_address_needs_its_alignment_and_type():
    memory = Memory()
    with pytest.raises(DescriptorError, match="multiple of 16"):
        TensorMap((memory, 8), [16], [], [16], 0, "uint8")
    with pytest.raises(DescriptorError, match="dtype is missing"):
        TensorMap((memory, 16), [16], [], [16])


def test_fp8_arrays_travel_as_bytes():
    array = np.zeros((8, 128), ml_dtypes.float8_e4m3fn)
    blob = TensorMap(array, [128, 8], [128], [128, 8], 128).encode(Memory())
    assert len(blob) == 128


def test_a_tensor_map_past_its_buffer_is_out_of_bounds():
    load = next(p for p in all_programs() if p.name == "tensor load, swizzle 128, from (0, 0)")
    arguments = load.arguments()
    map_, got = arguments
    for grow in ((0, 1), (16, 0)):
        dims = [d + g for d, g in zip(map_.dims, grow, strict=True)]
        larger = TensorMap(map_.array, dims, map_.strides, map_.box, map_.swizzle)
        with pytest.raises(OutOfBounds, match="tensor map describes"):
            launch(
                load.ptx, "test", grid=1, block=32, dynamic_smem=load.dynamic_smem,
                args=[larger, got],
            )  # fmt: skip


def test_an_inner_box_smaller_than_the_swizzle_is_not_guessed():
    load = next(p for p in all_programs() if p.name == "tensor load, swizzle 128, from (0, 0)")
    map_, got = load.arguments()
    smaller = TensorMap(map_.array, map_.dims, map_.strides, (64, 16), 128)
    with pytest.raises(Unsupported, match="not documented"):
        launch(load.ptx, "test", grid=1, block=32, dynamic_smem=2048, args=[smaller, got])


def test_bytes_that_are_no_tensor_map_are_refused():
    load = next(p for p in all_programs() if p.name == "tensor load, swizzle 128, from (0, 0)")
    _, got = load.arguments()
    with pytest.raises(DescriptorError, match="not a tensor map"):
        launch(load.ptx, "test", grid=1, block=32, dynamic_smem=2048, args=[bytes(128), got])


# --- parsing and reports ----------------------------------------------------------------------


def test_parameters_have_the_offsets_of_the_abi():
    text = program.kernel("u8 u64 u16 map u32", "")
    parameters = kernel(text, "test").parameters
    assert [(p.offset, p.size) for p in parameters] == [
        (0, 1), (8, 8), (16, 2), (128, 128), (256, 4)
    ]  # fmt: skip


def test_a_module_lists_its_entries_and_parses_them_apart():
    text = program.kernel("", "trap;", name="first")
    text += program.kernel("u64", "frobnicate;", name="second").replace(program.HEADER, "")
    assert module(text).entries == ["first", "second"]
    # The unknown instruction of the other entry does not matter.
    launch(text.replace("trap;", ""), "first", grid=1, block=32, args=[])


@pytest.mark.parametrize(
    "body",
    [".weird 5;", ".reg b32 %r1;", "5;", "{ add.s32 %r1, %r1, %r1;"],
)
def test_text_that_is_not_ptx_is_refused(body):
    with pytest.raises(PtxSyntaxError):
        launch(program.kernel("", body), "test", grid=1, block=32, args=[])


def test_comments_and_statements_need_no_lines_of_their_own():
    text = program.kernel(
        "u64",
        "/* two\nlines */ ld.param.u64 %d1, [p0]; // %r9\n mov.u32 %r1,\n 5; st.global.u32\n[%d1],"
        " %r1;",
    )
    got = np.zeros(1, np.uint32)
    launch(text, "test", grid=1, block=32, args=[got])
    assert got[0] == 5


def test_report_counts_what_a_launch_did():
    report = copy(words(), np.zeros(32, np.uint32))
    assert report.instructions == 10
    assert report.generic_bytes_loaded == report.generic_bytes_stored == 128
    assert report.bytes_read == report.bytes_written == 128
    assert report.tma_bytes_loaded == report.tma_bytes_stored == report.wgmma == 0
    assert report.covered_lines == report.lines


def test_report_tells_executed_lines_from_others():
    text = program.kernel("", "bra OVER;\nmov.u32 %r1, 1;\nmov.u32 %r1, 2;\nOVER:")
    report = launch(text, "test", grid=1, block=32, args=[])
    assert len(report.lines - report.covered_lines) == 2


def test_report_counts_copies_and_products():
    by_name = {p.name: p for p in all_programs()}
    report = by_name["wgmma m64n64k32.f32.e4m3.e4m3 swizzle 128"].run()
    assert report.wgmma == 1
    assert report.shared_bytes == 64 * 128 + 64 * 128
    loaded = by_name["tensor load, swizzle 128, from (0, 0)"].run()
    assert loaded.tma_bytes_loaded == 2048


def test_schedules_are_reproducible_and_differ():
    ring = next(p for p in all_programs() if p.name.startswith("a ring"))
    counts = [ring.run(seed).instructions for seed in range(6)]
    assert counts == [ring.run(seed).instructions for seed in range(6)]
    assert len(set(counts)) > 1
