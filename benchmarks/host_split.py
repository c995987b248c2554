"""Where the host time of a custom call goes, on a GPU: python -m benchmarks.host_split

A call's time is the slope of a program's over its number of calls, outside of command buffers. Stamps at the entry and
exit of the handler, and of the driver's entry points that it calls, say what is the driver's, what is ours, and what is
left to XLA. Beside it, what XLA needs for a fusion of its own. Kernels are small, so that the host is waited for.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp8 import _C, _ffi

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY, REPEATS, ROUNDS = 8, 72, 40, 7


def build() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "host_split.so")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{jax.ffi.include_dir()}"]
        source = str(ROOT / "benchmarks" / "host_split.cc")
        command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", *includes, source]
        subprocess.run([*command, "-ldl", "-o", str(library)], check=True)
        stamps = ctypes.CDLL(str(library))
    stamps.entry_name.restype = ctypes.c_char_p
    stamps.open_entry.restype = ctypes.c_void_p
    stamps.set_handlers.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    for name in ("entry_nanoseconds", "stage_nanoseconds", "stage_calls"):
        getattr(stamps, name).restype = ctypes.c_int64
    return stamps


def address(capsule) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return pointer(capsule, None)


def calls() -> dict[str, tuple]:
    """target -> results, operands, attributes"""
    f8, f32 = jnp.float8_e4m3fn, jnp.float32
    sds, ones = jax.ShapeDtypeStruct, jnp.ones
    product = (ones((1, 128, 256), f8), ones((1, 128, 2), f32), ones((1, 128, 256), f8))
    product += (ones((1, 1, 2), f32),)
    pow2, chosen = {"pow2": np.bool_(False)}, {"config": np.int32(-1), "num_sms": np.int32(0)}
    rows = [sds((128, 256), f8), sds((128, 2), f32)]
    return {
        "quantize_rows": (rows, (ones((128, 256), jnp.bfloat16),), pow2),
        "gemm_1d2d": ([sds((1, 128, 128), jnp.bfloat16)], product, chosen),
    }


def program(call, operands, count: int):
    """`count` calls, each on arrays of its own and in turn: barriers keep XLA from merging what it could."""
    lists = [tuple(jnp.array(v) for v in operands) for _ in range(count)]

    def run(lists):
        results = []
        for arrays in lists:
            (arrays, results) = jax.lax.optimization_barrier((arrays, results))
            results = [*results, call(*arrays)]
        return results

    compiled = jax.jit(run).lower(lists)
    compiled = compiled.compile(compiler_options={"xla_gpu_enable_command_buffer": ""})
    return lambda: compiled(lists)


def seconds(run) -> float:
    """Of one execution, the least of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = run()
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / REPEATS)
    return best


def slope(call, operands) -> tuple[float, object]:
    """Microseconds a call, and the larger program."""
    few, many = (program(call, operands, n) for n in (FEW, MANY))
    jax.block_until_ready((few(), many()))
    return 1e6 * (seconds(many) - seconds(few)) / (MANY - FEW), many


def measure(stamps, wrappers, name: str, results, operands, attributes) -> None:
    target = _ffi.target(name)

    def call(target):
        made = jax.ffi.ffi_call(target, results)
        return lambda *xs: made(*xs, **attributes)

    _C._uninstall_driver()
    plain, _ = slope(call(target), operands)
    _C._install_driver(wrappers)
    stamps.set_handlers(
        address(_C.handlers("CUDA", "initialize")[target]), address(_C.handlers("CUDA")[target])
    )
    stamped, many = slope(call("jaxfp8_stamped"), operands)
    jax.block_until_ready(many())
    stamps.reset()
    for _ in range(REPEATS):
        jax.block_until_ready(many())
    count = stamps.stage_calls(1)
    assert count == REPEATS * MANY, count
    each = lambda ns: ns / count / 1e3  # noqa: E731
    driver = {
        stamps.entry_name(i).decode(): each(stamps.entry_nanoseconds(i))
        for i in range(stamps.num_entries())
    }
    execute, initialize = (each(stamps.stage_nanoseconds(i)) for i in (1, 0))
    spent, ours = sum(driver.values()), initialize + execute - sum(driver.values())
    print(f"{name}: {plain:.2f} us a call; with stamps {stamped:.2f}, of which")
    print(
        f"  initialize {initialize:.2f} and execute {execute:.2f}, in both the driver {spent:.2f} and we {ours:.2f};"
    )
    print(f"  XLA {stamped - initialize - execute:.2f}")
    print("  " + ", ".join(f"{k} {v:.2f}" for k, v in driver.items() if v >= 0.005))


def main() -> None:
    if jax.default_backend() != "gpu":
        raise SystemExit("host_split needs a GPU that JAX can use")
    stamps = build()
    wrappers = {
        stamps.entry_name(i).decode(): stamps.open_entry(i) for i in range(stamps.num_entries())
    }
    pycapsule = jax.ffi.pycapsule
    stages = {
        "initialize": pycapsule(stamps.stamped_initialize),
        "execute": pycapsule(stamps.stamped_execute),
    }
    # XLA asks for a handler's traits when it is registered.
    target = _ffi.target("quantize_rows")
    stamps.set_handlers(
        address(_C.handlers("CUDA", "initialize")[target]), address(_C.handlers("CUDA")[target])
    )
    jax.ffi.register_ffi_target("jaxfp8_stamped", stages, platform="CUDA")
    own, _ = slope(lambda x: x + 1, (jnp.ones((128, 256)),))
    print(f"a fusion of XLA's own: {own:.2f} us a call")
    for name, call in calls().items():
        measure(stamps, {k: v for k, v in wrappers.items() if v}, name, *call)
    _C._uninstall_driver()


if __name__ == "__main__":
    main()
