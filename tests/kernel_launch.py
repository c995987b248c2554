"""Executes a planned custom call in the emulator, without JAX and without a handler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from jaxfp8 import _ffi
from tests import emulator

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
NAMES = {
    BF16: "bf16",
    F16: "f16",
    F32: "f32",
    E4M3: "f8e4m3fn",
    E5M2: "f8e5m2",
    np.dtype(np.int32): "s32",
}
POISON = 0xFF  # NaN in every float type; no quantizer gives this byte


def plan(target, operands, results, **attributes):
    """Of a custom call on arrays, by name, to results, by name, of (dtype, shape)."""
    return _ffi._C.plan(
        f"jaxfp8_{target}_v1",
        [(NAMES[a.dtype], a.shape) for a in operands.values()],
        [(NAMES[np.dtype(dtype)], shape) for dtype, shape in results.values()],
        **attributes,
    )


def execute(
    plan,
    operands: Mapping[str, np.ndarray],
    results: Mapping[str, tuple[np.dtype, Sequence[int]]],
    *,
    accum: np.ndarray | None = None,
    text: str | None = None,
    offsets: Mapping[str, int] | None = None,
    seed: int = 0,
):
    """The results as they lie in memory, and the emulator's report.

    Each array ends where its buffer ends, so that a byte too far is out of bounds.

    Arguments:
        accum: what the result holds before; poison otherwise.
        text: PTX to execute in place of the image's own.
        offsets: bytes by which an array, by name, starts past a multiple of 256.
    """
    memory, offsets = emulator.Memory(), offsets or {}
    addresses, outputs = {"null": 0}, []

    def place(name, content: np.ndarray, writable: bool):
        offset = offsets.get(name, 0)
        buffer = np.empty(offset + content.size, np.uint8)
        buffer[offset:] = content
        buffer.flags.writeable = writable
        addresses[name] = memory.array(buffer, name=name).base + offset
        return buffer[offset:]

    for name, array in operands.items():
        place(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8), False)
    for name, (dtype, shape) in results.items():
        content = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, POISON, np.uint8)
        if accum is not None:
            content = np.ascontiguousarray(accum).reshape(-1).view(np.uint8)
        outputs.append((place(name, content, True), np.dtype(dtype), shape))

    ptx = text or _ffi.image_directory() / f"{plan.image}.ptx"
    parameters = emulator.kernel(ptx, plan.kernel).parameters
    args = []
    for arg, parameter in zip(plan.args, parameters, strict=True):
        if isinstance(arg, dict):
            arg = emulator.TensorMap(
                (memory, addresses[arg["base"]]),
                arg["dims"],
                arg["strides"],
                arg["box"],
                swizzle=int(arg["swizzle"].removesuffix("B")),
                dtype={"u8": "uint8", "bf16": "bfloat16", "f32": "float32"}[arg["type"]],
            )
        elif isinstance(arg, str):
            arg = np.uint64(addresses[arg])
        else:
            arg = {4: np.int32, 8: np.int64}[parameter.size](arg)
        args.append(arg)
    report = emulator.launch(
        ptx,
        plan.kernel,
        grid=plan.grid,
        block=plan.block,
        cluster=plan.cluster,
        dynamic_smem=plan.dynamic_smem,
        args=args,
        seed=seed,
        memory=memory,
    )
    arrays = [np.frombuffer(b.tobytes(), dtype).reshape(shape) for b, dtype, shape in outputs]
    return arrays, report
