"""The driver table: first use, every failure of every entry point, several threads."""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8 import _C, _ffi
from tests import custom_calls
from tests.emulator import driver as emulator
from tests.emulator.driver import ENTRY_POINTS, EmulatedDriver

pytestmark = pytest.mark.emulated
needs_kernels = pytest.mark.skipif(not _ffi.images(), reason="this build holds no kernels")


@pytest.fixture
def recording():
    """A driver that records launches and executes nothing."""
    _ffi.register_cpu_targets()
    with EmulatedDriver(_ffi.image_directory(), launch=lambda *_, **launch: launch) as driver:
        yield driver


def quantize_rows(x):
    m, k = x.shape
    results = [
        jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((m, -(-k // 128)), jnp.float32),
    ]
    call = jax.ffi.ffi_call("jaxfp8_quantize_rows_v1", results, output_layouts=[(1, 0), (0, 1)])
    return call(x, pow2=np.bool_(False))


def gemm(out_dtype=jnp.float32, config=-1):
    """A custom call with tensor maps, on arrays of zeros."""
    m, n, k = 128, 128, 128
    f8 = jnp.float8_e4m3fn
    call = jax.ffi.ffi_call(
        "jaxfp8_gemm_1d2d_v1",
        [jax.ShapeDtypeStruct((1, m, n), out_dtype)],
        input_layouts=[(0, 1, 2), (2, 0, 1), (0, 1, 2), (0, 1, 2)],
    )
    return jax.jit(
        lambda: call(
            jnp.zeros((1, m, k), f8),
            jnp.ones((1, m, 1)),
            jnp.zeros((1, n, k), f8),
            jnp.ones((1, 1, 1)),
            config=np.int32(config),
            num_sms=np.int32(0),
        )
    )


def run(function=None):
    """Runs a call to its end."""
    if function is None:
        x = jnp.ones((8, 128), jnp.bfloat16)
        return jax.block_until_ready(jax.jit(quantize_rows)(x))
    return jax.block_until_ready(function())


def error_of(function=None):
    # A ValueError where XLA ran the call inside of the dispatch, a JaxRuntimeError after it.
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught:
        run(function)
    return str(caught.value)


@needs_kernels
def test_a_call_plans_and_launches(recording):
    run()
    (launch,) = recording.launches
    assert launch.target == "jaxfp8_quantize_rows_v1"
    assert launch.kernel == "quantize_rows_bf16_e4m3"
    plan = _C.plan(
        launch.target, [("bf16", (8, 128))], [("f8e4m3fn", (8, 128)), ("f32", (8, 1))], device_sms=2
    )
    assert (launch.grid, launch.block) == (plan.grid, plan.block)
    assert (launch.cluster, launch.dynamic_smem) == (plan.cluster, plan.dynamic_smem)


@needs_kernels
def test_a_kernel_is_loaded_once(recording):
    run(), run()
    assert len(recording.launches) == 2
    loads = ("cuInit", "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction")
    assert [recording.calls.count(name) for name in loads] == [1, 1, 1, 1]


def test_a_call_with_no_libcuda_says_so():
    _ffi.register_cpu_targets()
    _C._uninstall_driver()
    message = error_of()
    assert "UNAVAILABLE" in message
    assert "jaxfp8_quantize_rows_v1" in message
    assert "there is no CUDA driver: libcuda.so.1" in message or "no stream" in message


def test_importing_the_package_touches_no_driver():
    code = """
        import sys, ctypes
        import jaxfp8
        print("libcuda" in open("/proc/self/maps").read())
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["False"]


@pytest.mark.parametrize("missing", ENTRY_POINTS)
def test_a_missing_entry_point_is_named(missing):
    driver = EmulatedDriver(_ffi.image_directory())
    entry_points = driver.entry_points()
    del entry_points[missing]
    with pytest.raises(RuntimeError, match=f"has no {missing}; .* CUDA 12.0"):
        _C._install_driver(entry_points)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("fault", ["missing", "init"])
@pytest.mark.representatives()
def test_a_broken_libcuda_is_named_and_tried_again(tmp_path, fault):
    symbols = [s for s in ENTRY_POINTS if s != "cuLaunchKernelEx" or fault != "missing"]
    source = tmp_path / "cuda.c"
    source.write_text(
        "int calls; int cuInit(unsigned f) { ++calls; return 100; }\n"
        'int cuGetErrorName(int e, const char** s) { *s = "CUDA_ERROR_NO_DEVICE"; return 0; }\n'
        'int cuGetErrorString(int e, const char** s) { *s = "no device, call 0"; '
        "static char text[32]; extern int sprintf(char*, const char*, ...); "
        'sprintf(text, "no device, call %d", calls); *s = text; return 0; }\n'
        + "".join(
            f"int {s}() {{ return 1; }}\n"
            for s in symbols
            if s not in ("cuInit", "cuGetErrorName", "cuGetErrorString")
        )
    )
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    code = """
        import jax, jax.numpy as jnp
        from jaxfp8 import _ffi
        from tests.test_driver import quantize_rows
        _ffi.register_cpu_targets()
        for _ in range(2):
            try:
                jax.block_until_ready(jax.jit(quantize_rows)(jnp.ones((8, 128), jnp.bfloat16)))
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                print(error)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    )
    first, second = out.stdout.splitlines()
    if fault == "missing":
        assert "libcuda.so.1 has no cuLaunchKernelEx" in first
        assert first == second
    else:
        assert "cuInit: CUDA_ERROR_NO_DEVICE: no device, call 1" in first
        assert "cuInit: CUDA_ERROR_NO_DEVICE: no device, call 2" in second


def test_a_cpu_call_never_reaches_a_real_driver(tmp_path):
    """The CPU handlers hand out host addresses: only an installed driver may get them."""
    _ffi.register_cpu_targets()
    _C._uninstall_driver()
    assert "UNAVAILABLE" in error_of()


@needs_kernels
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_another_architecture_is_refused(recording, capability):
    recording.compute_capability = capability
    message = error_of()
    assert "UNAVAILABLE" in message
    assert "compute capability {}.{}".format(*capability) in message
    assert "Hopper (9.0)" in message
    assert not recording.launches


# Where each entry point's failure shows: the call that is named, and what else the error says.
_FAILURES = {
    "cuDeviceGetAttribute": "cuDeviceGetAttribute(COMPUTE_CAPABILITY_MAJOR, device 0)",
    "cuCtxGetDevice": "cuCtxGetDevice",
    "cuThreadExchangeStreamCaptureMode": "cuThreadExchangeStreamCaptureMode(relaxed)",
    "cuLibraryLoadData": "driver of CUDA 13.0",
    "cuLibraryGetKernel": "cuLibraryGetKernel(quantize_rows_bf16_e4m3 of quantize_rows.cubin)",
    "cuKernelGetFunction": "cuKernelGetFunction(quantize_rows_bf16_e4m3)",
    "cuLaunchKernelEx": "cuLaunchKernelEx(quantize_rows_bf16_e4m3, grid 1x1x1, block 32x1x1",
}


@needs_kernels
@pytest.mark.parametrize("entry_point", _FAILURES)
def test_a_failure_names_the_call_and_the_next_call_works(recording, entry_point):
    recording.failures[entry_point] = emulator.INVALID_VALUE
    message = error_of()
    assert "INTERNAL: jaxfp8_quantize_rows_v1: " in message
    assert _FAILURES[entry_point] in message
    assert message.endswith("CUDA_ERROR_INVALID_VALUE: invalid argument")
    recording.failures.clear()
    run()
    assert len(recording.launches) == 1


@needs_kernels
def test_an_error_without_a_name_keeps_its_number(recording):
    recording.failures["cuLaunchKernelEx"] = 987
    assert "CUDA driver error 987" in error_of()


@needs_kernels
def test_a_failing_tensor_map_names_its_argument(recording):
    recording.failures["cuTensorMapEncodeTiled"] = emulator.INVALID_VALUE
    message = error_of(gemm())
    assert "cuTensorMapEncodeTiled(argument 0 of kernel gemm_1d2d" in message
    assert "dims (128, 128" in message
    assert "box (" in message
    recording.failures.clear()
    run(gemm())
    assert len(recording.launches) == 1


@needs_kernels
def test_shared_memory_that_is_refused_names_the_size(recording):
    recording.failures["cuKernelSetAttribute"] = emulator.INVALID_VALUE
    message = error_of(gemm())
    assert "cuKernelSetAttribute(gemm_1d2d" in message
    assert "dynamic shared memory of " in message
    recording.failures.clear()
    run(gemm())


ELF = b"\x7fELF\x02" + bytes(59)  # whole, with nothing in it


def with_image(directory, content):
    """The message of a call whose kernels are a file with `content`."""
    if content is not None:
        (directory / "quantize_rows.cubin").write_bytes(content)
    _C.set_image_directory(directory, built=False)
    try:
        return error_of()
    finally:
        _C.set_image_directory(str(_ffi.image_directory()))


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_image_is_named(recording, tmp_path, content):
    message = with_image(tmp_path, content)
    assert "UNAVAILABLE" in message
    assert f"quantize_rows.cubin are not in {tmp_path}" in message
    assert not recording.take_errors()


def damaged():
    """Images that the driver, which is told no size, would read past their ends."""
    yield from (b"\x7fEL", b"not a cubin, but long enough to hold one" * 3, ELF[:-1])
    past = (1 << 40).to_bytes(8, "little")
    for at in (32, 40):  # offsets of the program and section headers; then one of each
        yield ELF[:at] + past + ELF[at + 8 : 54] + b"\x38\0\1\0\x40\0\1\0\0\0"
    yield ELF[:58] + b"\x08\0\1\0\0\0"  # section headers too short to be any
    if _ffi.images():
        whole = (_ffi.image_directory() / "quantize_rows.cubin").read_bytes()
        yield from (whole[: len(whole) // 2], whole[:-1], whole[:100])


@pytest.mark.parametrize("content", list(damaged()), ids=lambda content: f"{len(content)} bytes")
def test_a_damaged_image_never_reaches_the_driver(recording, tmp_path, content):
    message = with_image(tmp_path, content)
    assert "UNAVAILABLE" in message
    assert f"{tmp_path}/quantize_rows.cubin are damaged, {len(content)} bytes" in message
    assert message.endswith("reinstall the package")
    assert "cuLibraryLoadData" not in recording.calls
    if _ffi.images():
        run()


@needs_kernels
@pytest.mark.parametrize("change", ["of other code", "of another length"])
def test_an_image_of_another_build_never_reaches_the_driver(recording, tmp_path, change):
    """An upgrade under a running process: plans of the old extension, kernels of the new package."""
    code = bytearray((_ffi.image_directory() / "quantize_rows.cubin").read_bytes())
    if change == "of other code":
        code[len(code) // 2] ^= 1
    else:
        code += bytes(64)
    (tmp_path / "quantize_rows.cubin").write_bytes(code)
    _C.set_image_directory(tmp_path)
    try:
        message = error_of()
    finally:
        _C.set_image_directory(_ffi.image_directory())
    assert "UNAVAILABLE" in message
    assert "are not those that this process's jaxfp8 was built with" in message
    assert "restart the process" in message
    assert "cuLibraryLoadData" not in recording.calls
    run()


@needs_kernels
def test_a_folder_whose_name_is_not_utf8(recording, tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(folder)
    source = _ffi.image_directory() / "quantize_rows.cubin"
    with open(folder + b"/quantize_rows.cubin", "wb") as copy:
        copy.write(source.read_bytes())
    try:
        for path in (folder, os.fsdecode(folder)):
            _C.set_image_directory(path)
            run()
    finally:
        _C.set_image_directory(_ffi.image_directory())
    with pytest.raises(TypeError):
        _C.set_image_directory(3)


def test_an_image_that_the_driver_refuses_is_named(recording, tmp_path):
    message = with_image(tmp_path, ELF)
    assert f"cuLibraryLoadData({tmp_path}/quantize_rows.cubin" in message
    assert "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid" in message
    assert "reinstall the package" in message
    if _ffi.images():
        run()


@needs_kernels
def test_an_exception_in_the_emulator_is_an_error_of_the_call(recording):
    def launch(*_, **options):
        raise ValueError("a race between two warps")

    recording.launch = launch
    assert "ValueError: a race between two warps" in error_of()
    (error,) = recording.take_errors()
    assert isinstance(error, ValueError)


@needs_kernels
def test_many_threads_may_make_the_first_call(recording):
    threads = 16
    ready = threading.Barrier(threads)
    arrays = [jnp.full((8, 128), i + 1, jnp.bfloat16) for i in range(threads)]
    compiled = jax.jit(quantize_rows).lower(arrays[0]).compile()

    def call(x):
        ready.wait()
        jax.block_until_ready(compiled(x))

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(call, arrays))
    assert len(recording.launches) == threads
    assert recording.calls.count("cuLibraryLoadData") == 1
    assert recording.calls.count("cuLibraryGetKernel") == 1


@needs_kernels
def test_calls_in_flight_finish_with_the_driver_that_they_started_with(recording):
    inside, leave = threading.Event(), threading.Event()

    def launch(*_, **options):
        inside.set()
        assert leave.wait(60)

    recording.launch = launch
    x = jnp.ones((8, 128), jnp.bfloat16)
    compiled = jax.jit(quantize_rows).lower(x).compile()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(lambda: jax.block_until_ready(compiled(x)))
        assert inside.wait(60)
        with EmulatedDriver(_ffi.image_directory(), launch=lambda *_, **launch: None) as other:
            run()
            leave.set()
            call.result(60)
    assert len(recording.launches) == len(other.launches) == 1


# --- streams, contexts and devices: what only the CUDA platform has --------------------------------


@pytest.fixture
def two_devices():
    """Two devices, on which plans are recorded; stream 1 is of device 0, stream 2 of device 1."""
    with EmulatedDriver(
        _ffi.image_directory(), num_sms=132, num_devices=2, launch=lambda *_, **launch: None
    ) as driver:
        yield driver
    assert not driver.take_errors()


def gemm_plan():
    f8 = "f8e4m3fn"
    operands = [(f8, (1, 256, 256)), ("f32", (1, 256, 2)), (f8, (1, 256, 256)), ("f32", (1, 2, 2))]
    return _C.plan("jaxfp8_gemm_1d2d_v1", operands, [("bf16", (1, 256, 256))])


@needs_kernels
def test_devices_share_the_code_and_are_prepared_one_by_one(two_devices):
    plan = gemm_plan()
    assert plan.dynamic_smem > 48 * 1024
    for stream in (1, 2, 1, 2):
        _C._launch(plan, stream)
    assert [launch.device for launch in two_devices.launches] == [0, 1, 0, 1]
    once, twice = ("cuLibraryLoadData", "cuLibraryGetKernel"), ("cuKernelSetAttribute",)
    assert [two_devices.calls.count(name) for name in once] == [1, 1]
    assert [two_devices.calls.count(name) for name in twice] == [2]


@needs_kernels
def test_four_devices_compute_at_once():
    """Each thread calls on a stream of its own device; kernels run, results are checked."""
    targets = ("jaxfp8_quantize_both_v1", "jaxfp8_grouped_gemm_v1")
    ready = threading.Barrier(4)

    def work(device):
        rng = np.random.default_rng(device)
        calls = [custom_calls.DRAWS[target](rng, most=40) for target in targets]
        ready.wait()
        for call in calls:
            call.check(call.run(stream=device + 1))

    with EmulatedDriver(_ffi.image_directory(), num_devices=4) as driver:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    devices = [launch.device for launch in driver.launches]
    assert [devices.count(d) for d in range(4)] == [len(targets)] * 4
    assert not driver.take_errors()


@needs_kernels
@pytest.mark.emulated
@pytest.mark.parametrize("target", [t for t in custom_calls.DRAWS if "accum" in t])
def test_an_accumulator_beside_the_result_gives_the_same_sum(target):
    call = custom_calls.DRAWS[target](np.random.default_rng(3), most=60)
    with EmulatedDriver(_ffi.image_directory()) as driver:
        results = call.run(stream=1, beside=True)
    call.check(results)
    assert driver.calls.count("cuMemcpyDtoDAsync_v2") == 1


@needs_kernels
def test_the_context_of_the_stream_is_current_during_a_launch_alone(two_devices):
    stack = two_devices.contexts[threading.get_ident()]
    two_devices.launch = lambda *_, **launch: list(stack)
    _C._launch(gemm_plan(), 2)
    stack.append(1)  # the caller's
    _C._launch(gemm_plan(), 2)
    _C._launch(gemm_plan(), 1)
    assert [launch.report for launch in two_devices.launches] == [[2], [1, 2], [1]]
    assert stack == [1]


@needs_kernels
@pytest.mark.parametrize(
    "entry_point",
    [
        "cuStreamGetCtx",
        "cuCtxGetCurrent",
        "cuCtxPushCurrent_v2",
        *_FAILURES,
        "cuKernelSetAttribute",
    ],
)
def test_a_failure_leaves_the_callers_context(two_devices, entry_point):
    two_devices.failures[entry_point] = emulator.INVALID_VALUE
    with pytest.raises(RuntimeError, match=entry_point.removesuffix("_v2")) as caught:
        _C._launch(gemm_plan(), 2)
    assert str(caught.value).endswith("CUDA_ERROR_INVALID_VALUE: invalid argument")
    assert not two_devices.contexts[threading.get_ident()]
    two_devices.failures.clear()
    _C._launch(gemm_plan(), 2)
    assert len(two_devices.launches) == 1


def test_a_plan_with_made_up_addresses_needs_an_installed_driver():
    _C._uninstall_driver()
    with pytest.raises(RuntimeError, match="no CUDA driver|no stream|no driver is installed"):
        _C._launch(gemm_plan(), 0)
