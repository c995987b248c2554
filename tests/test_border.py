"""The border of the native side under load: random calls, failing drivers, threads, forks, exits.

On the recording driver (tests/native), which launches nothing; calls go to the CUDA platform's handlers.
"""

import ctypes
import os
import random
import resource
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from jaxfp8 import _C
from tests import ffi_frames, fuzz_border, hammer, instrumented, recording
from tests.ffi_frames import Buffer, Frame
from tests.recording import ENTRY_POINTS, ROOT, RecordingDriver

pytestmark = pytest.mark.skipif(not recording.compiler(), reason="needs a C++ compiler")

RESOURCE_EXHAUSTED = 8  # XLA_FFI_Error_Code
TARGET = "jaxfp8_gemm_1d2d_v1"


@pytest.fixture
def driver():
    with RecordingDriver(num_devices=2) as driver:
        yield driver
        assert not driver.complaints, driver.complaint


def gemm(driver, stream=1, *, k=256) -> Frame:
    """A product whose kernel has tensor maps and needs shared memory to be allowed."""
    f8, at = "f8e4m3fn", iter(range(1 << 50, 1 << 60, 1 << 44))
    operands = [
        Buffer(f8, next(at), (1, 256, k)),
        Buffer("f32", next(at), (1, 256, 2)),
        Buffer(f8, next(at), (1, 256, k)),
        Buffer("f32", next(at), (1, 2, 2)),
    ]
    attributes = {"config": ffi_frames.scalar("s32", -1), "num_sms": ffi_frames.scalar("s32", 0)}
    results = [Buffer("bf16", next(at), (1, 256, 256))]
    return Frame(operands, results, attributes, stream=stream, api=0)


def quantizer(stream=1) -> Frame:
    """A gated activation's gradient: it needs shared memory to be allowed, too."""
    at = iter(range(1 << 50, 1 << 60, 1 << 44))
    g, m, a, f = 1, 128, 2, 128
    operands = [Buffer("bf16", next(at), (g, m, a, f)), Buffer("bf16", next(at), (g, m, f))]
    results = [
        Buffer("f8e4m3fn", next(at), (g, m, a, f)),
        Buffer("f32", next(at), (g, m, a, 1)),
        Buffer("f8e4m3fn", next(at), (g, a, f, m)),
        Buffer("f32", next(at), (g, a, f, 1)),
    ]
    attributes = {
        "pow2": ffi_frames.scalar("pred", False),
        "activation": ffi_frames.scalar("s32", 0),
    }
    return Frame(operands, results, attributes, stream=stream, api=0)


def call(driver, stream=1):
    return gemm(driver, stream).call(TARGET, "CUDA")


# --- loading ---------------------------------------------------------------------------------------

LOADS = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelSetAttribute", "cuKernelGetFunction")


def test_the_initialize_stage_loads_what_the_execute_stage_launches(driver):
    frame = gemm(driver)
    frame.frame.stage = ffi_frames.INITIALIZE
    for _ in range(2):
        assert frame.call(TARGET, "CUDA") is None
        assert [driver.calls(name) for name in LOADS] == [1, 1, 1, 1]
    assert not driver.calls("cuLaunchKernelEx")
    assert call(driver) is None
    assert driver.calls("cuLaunchKernelEx") == 1
    assert [driver.calls(name) for name in LOADS] == [1, 1, 1, 1]


def test_another_device_and_another_context_are_made_ready_on_their_own(driver):
    for stream in (1, 2, 1):
        assert call(driver, stream) is None
    assert [driver.calls(name) for name in LOADS] == [1, 1, 2, 2]
    driver.renew_contexts()  # at the same addresses
    for stream in (1, 1):
        assert call(driver, stream) is None
    assert [driver.calls(name) for name in LOADS] == [1, 1, 3, 3]


@pytest.mark.parametrize("entry_point", LOADS)
def test_a_launch_that_is_ready_waits_for_no_load(driver, entry_point):
    """Of another kernel on another device, at whatever call of the driver that load is."""
    assert call(driver, 2) is None
    driver.hold(entry_point)
    other = quantizer()
    before = driver.calls(entry_point)
    loading = threading.Thread(target=other.call, args=("jaxfp8_activation_grad_both_v1", "CUDA"))
    loading.start()
    deadline = time.monotonic() + 60
    while driver.calls(entry_point) == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    try:
        for stage in (ffi_frames.INITIALIZE, ffi_frames.EXECUTE):  # else it would never return
            frame = gemm(driver, 2)
            frame.frame.stage = stage
            assert frame.call(TARGET, "CUDA") is None
        assert loading.is_alive()
    finally:
        driver.hold("")
        loading.join()


def test_threads_that_need_the_same_kernel_wait_for_one_load(driver):
    driver.jitter(200)
    made = [(TARGET, gemm(driver, 1 + i % 2)) for i in range(8)]
    for _, frame in made:
        frame.frame.api = driver.api
    failed, message = driver.hammer(made, threads=8, rounds=4)
    assert not failed, message
    assert [driver.calls(name) for name in LOADS] == [1, 1, 2, 2]


# --- random calls ---------------------------------------------------------------------------------


def test_random_calls_are_launched_or_refused_by_name():
    counts = fuzz_border.run(seed=0, calls=20_000)
    assert set(counts["calls_by_target"]) == set(fuzz_border.TARGETS) == set(_C.handlers("CUDA"))
    assert min(counts["outcomes"].values()) > 0.1 * counts["calls"]
    assert set(counts["outcomes"]) == {"launched", "refused"}


def test_the_judge_of_random_calls_sees_each_kind_of_mistake(driver):
    """A handler that did the opposite of what it should, or that named something else."""
    good = next(
        c
        for n in range(100)
        if not fuzz_border.faults(c := fuzz_border.draw(1, n)) and "gemm" in c.target
    )
    bad = fuzz_border.draw(1, 0)
    bad.operands[0].dtype = "c64"
    assert fuzz_border.judge(good, driver, 1) == "launched"
    assert fuzz_border.judge(bad, driver, 1) == "refused"
    driver.fail("cuLaunchKernelEx", 1)
    with pytest.raises(AssertionError):
        fuzz_border.judge(good, driver, 1)
    driver.fail("cuLaunchKernelEx", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_border, "faults", lambda call: set())
        with pytest.raises(AssertionError, match="refused, but valid"):
            fuzz_border.judge(bad, driver, 1)
        patch.setattr(fuzz_border, "faults", lambda call: {"another"})
        with pytest.raises(AssertionError, match="is at fault"):
            fuzz_border.judge(good, driver, 1)
        with pytest.raises(AssertionError, match="is at fault, not"):
            fuzz_border.judge(bad, driver, 1)


def test_refused_calls_leak_nothing(driver):
    rng = random.Random(0)
    refused = []
    while len(refused) < 200:
        wrong = fuzz_border.valid_call(rng)
        fuzz_border.mutate(rng, wrong)
        if fuzz_border.faults(wrong):
            refused.append((wrong.target, wrong.frame(1, api=driver.api)))
    driver.hammer(refused, threads=1, rounds=20)  # what is made once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failed, _ = driver.hammer(refused, threads=1, rounds=500)
    assert failed == 100_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("address", ["-m", "tests.fuzz_border", "--calls", "100000", "--seed", "2"]),
        ("address", ["-m", "tests.hammer", "--seconds", "20"]),
        ("thread", ["-m", "tests.hammer", "--seconds", "30"]),
    ],
    ids=lambda v: v if isinstance(v, str) else v[1],
)
def test_sanitizers_find_nothing(kind, arguments):
    assert instrumented.main([kind, *arguments]) == 0


@pytest.mark.slow
def test_host_code_is_covered():
    pytest.importorskip("gcovr", reason="needs the extra `coverage`")
    assert instrumented.main(["coverage"]) == 0


# --- a driver that fails --------------------------------------------------------------------------


# Calls that restore what was before. Nothing is left to do where they fail: no error of their own.
WAYS_BACK = ("cuCtxPopCurrent_v2", "cuThreadExchangeStreamCaptureMode")


@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
def test_any_failure_of_any_driver_call_is_named_and_the_next_call_works(driver, later):
    """Every entry point, at each time that a first or a later call uses it."""
    injected = 0
    for entry_point in ENTRY_POINTS:
        for skip in range(100):
            driver.reset()
            driver.install()
            if later:
                assert call(driver, 2) is None
            before = driver.calls(entry_point)
            driver.fail(entry_point, 719, skip=skip)
            error = call(driver, 2)
            if driver.calls(entry_point) - before <= skip:
                assert error is None
                break
            injected += 1
            where = f"{entry_point}, the call after {skip}"
            launches = driver.calls("cuLaunchKernelEx") - later
            if error is None:
                assert entry_point in WAYS_BACK, where
                assert launches == 1
            else:
                assert error.code == ffi_frames.INTERNAL
                assert error.message.startswith(f"{TARGET}: {entry_point.removesuffix('_v2')}")
                assert error.message.endswith("restart the process")
                assert launches == (entry_point == "cuLaunchKernelEx"), where
            driver.fail(entry_point, 0)
            if entry_point in WAYS_BACK:
                continue
            assert (driver.depth, driver.capture_mode) == (0, 0), where
            assert call(driver, 2) is None, where
    assert injected == (10 if later else 19)


# CUresult: what the message says after the driver's own text.
ADVICE = {
    2: "lower XLA_PYTHON_CLIENT_MEM_FRACTION",
    3: "start workers with the spawn method",
    4: "start workers with the spawn method",
    100: "see nvidia-smi and CUDA_VISIBLE_DEVICES",
    200: "reinstall the package if the file is damaged, else update the driver",
    209: "reinstall the package if the file is damaged, else update the driver",
    214: "restart the process",
    700: "restart the process",
    719: "restart the process",
    803: "reboot after an update of the driver",
}


@pytest.mark.parametrize("code", ADVICE)
@pytest.mark.parametrize("entry_point", ["cuStreamGetCtx", "cuLibraryLoadData", "cuLaunchKernelEx"])
def test_an_error_says_what_to_do(driver, entry_point, code):
    driver.fail(entry_point, code)
    error = call(driver)
    assert error.message.startswith(f"{TARGET}: {entry_point}")
    assert ADVICE[code] in error.message
    assert error.code == (RESOURCE_EXHAUSTED if code == 2 else ffi_frames.INTERNAL)
    driver.fail(entry_point, 0)
    assert call(driver) is None


def test_an_error_that_nobody_knows_is_passed_on(driver):
    driver.fail("cuLaunchKernelEx", 912)
    assert call(driver).message.endswith("CUDA driver error 912")
    driver.fail("cuGetErrorString", 1)
    driver.fail("cuLaunchKernelEx", 719)
    assert "CUDA_ERROR_LAUNCH_FAILED" in call(driver).message


@pytest.mark.parametrize("capability", [(7, 0), (8, 9), (9, 1), (10, 0), (12, 1)])
def test_another_gpu_is_refused_and_its_neighbour_is_not(capability):
    with RecordingDriver(num_devices=2, capability=capability) as driver:
        error = call(driver)
        assert error.code == ffi_frames.UNAVAILABLE
        assert "device 0 has compute capability {}.{}".format(*capability) in error.message
        assert "the kernels are for Hopper (9.0)" in error.message
        assert driver.depth == 0
        driver._devices = (2, 9, 0, 132, 13000)
        driver.reset()
        assert call(driver, 2) is None


def no_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return False


def run_python(code, *options, check=True, **env):
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=check,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
    )


@pytest.mark.skipif(not no_driver(), reason="this machine has a CUDA driver")
def test_a_missing_driver_is_named_with_what_to_do():
    _C._uninstall_driver()
    error = gemm(None).call(TARGET, "CUDA")
    assert error.code == ffi_frames.UNAVAILABLE
    assert "there is no CUDA driver: libcuda.so.1" in error.message
    assert error.message.endswith("install NVIDIA's driver, or run where there is a GPU")


@pytest.mark.full
def test_the_driver_is_found_as_libcuda(tmp_path):
    """The way of a machine with a GPU: libcuda.so.1 by the loader, streams of XLA."""
    recording.build(tmp_path)
    recording.write_images(tmp_path)
    code = f"""
        from tests.test_border import TARGET, gemm
        from jaxfp8 import _C
        _C.set_image_directory({str(tmp_path)!r}, built=False)
        print(gemm(None).call(TARGET, "CUDA"))
        print(gemm(None, stream=0).call(TARGET, "cpu").message)
        print(gemm(None, stream=9).call(TARGET, "CUDA").message)
        print(gemm(None).call(TARGET, "CUDA"))
    """
    first, no_stream, bad_stream, last = run_python(
        code, LD_LIBRARY_PATH=str(tmp_path)
    ).stdout.splitlines()
    assert first == last == "None"
    assert "on a CPU the custom calls run only under emulation" in no_stream
    assert "cuStreamGetCtx: CUDA_ERROR_INVALID_CONTEXT" in bad_stream


# --- threads and processes ------------------------------------------------------------------------


def test_sixteen_threads_make_the_first_calls_on_four_devices():
    with RecordingDriver(num_devices=hammer.DEVICES) as driver:
        for seed in range(3):
            hammer.first_use(driver, hammer.calls(driver, seed))


def test_calls_go_on_while_drivers_come_and_go(capfd):
    assert hammer.main(["--seconds", "2"]) == 0
    assert '"failed_calls"' in capfd.readouterr().out


@pytest.mark.full
def test_a_fork_after_import_is_safe():
    """Before the first call, and after one; the child and the parent both call on."""
    code = """
        import os, sys
        import jaxfp8
        from tests.recording import RecordingDriver
        from tests.test_border import call
        with RecordingDriver() as driver:
            for _ in range(2):
                child = os.fork()
                ok = call(driver) is None
                if child == 0:
                    os._exit(0 if ok else 1)
                assert ok and os.waitpid(child, 0)[1] == 0
        print("done")
    """
    assert run_python(code).stdout.split() == ["done"]


@pytest.mark.full
def test_a_child_forked_during_a_first_load_loads_for_itself():
    """What the parent's other thread was loading at the fork would never be loaded in the child."""
    code = """
        import os, signal, threading, time
        import jaxfp8
        from tests.recording import RecordingDriver
        from tests.test_border import call
        with RecordingDriver() as driver:
            for name in ("cuLibraryLoadData", "cuKernelGetFunction"):
                driver.install()
                driver.reset()
                driver.hold(name)
                loading = threading.Thread(target=call, args=(driver,))
                loading.start()
                while not driver.calls(name):
                    time.sleep(0.001)
                child = os.fork()
                if child == 0:
                    signal.alarm(60)
                    driver.hold("")
                    os._exit(0 if call(driver) is None else 1)
                status = os.waitpid(child, 0)[1]
                driver.hold("")
                loading.join()
                print(status)
    """
    assert run_python(code).stdout.split() == ["0", "0"]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "calling"])
@pytest.mark.representatives()
def test_the_interpreter_ends_cleanly(busy):
    """With a driver installed, and with a thread still inside of calls."""
    code = f"""
        import sys, threading
        import jax.numpy as jnp
        import jaxfp8
        from tests import hammer
        from tests.recording import RecordingDriver
        jaxfp8.linear(jnp.ones((8, 128)), jnp.ones((128, 16))).block_until_ready()
        driver = RecordingDriver(num_devices=hammer.DEVICES)
        driver.__enter__()
        made = hammer.calls(driver, 0)
        ready = threading.Event()
        def work():
            driver.hammer(made, threads=2, rounds=1)
            ready.set()
            driver.hammer(made, threads=2, rounds=100000)
        if {busy}:
            threading.Thread(target=work, daemon=True).start()
            ready.wait()
        print(len(made))
    """
    out = run_python(code, "-X", "dev", "-W", "ignore")
    assert int(out.stdout) == len(fuzz_border.TARGETS) * hammer.DEVICES
    assert out.stderr == ""
