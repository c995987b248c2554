"""Executes a planned custom call in the emulator, without JAX and without a handler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import ml_dtypes
import numpy as np

from jaxfp8 import _C, _ffi
from tests import emulator, oracle_activation, oracle_moe, oracle_quantize
from tests.contract import CONTRACT

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
    return _C.plan(
        f"jaxfp8_{target}_v1",
        [(NAMES[a.dtype], a.shape) for a in operands.values()],
        [(NAMES[np.dtype(dtype)], shape) for dtype, shape in results.values()],
        **attributes,
    )


def _arguments(plan, ptx, memory, addresses: Mapping[str, int]) -> list:
    """The kernel's arguments, with arrays by their addresses."""
    args = []
    parameters = emulator.kernel(ptx, plan.kernel).parameters
    for arg, parameter in zip(plan.args, parameters, strict=True):
        if isinstance(arg, dict) and "bytes" in arg:
            block = bytearray(arg["bytes"])
            for at, name in arg["addresses"].items():
                block[at : at + 8] = addresses[name].to_bytes(8, "little")
            arg = bytes(block)
        elif isinstance(arg, dict):
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
    return args


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
    report = emulator.launch(
        ptx,
        plan.kernel,
        grid=plan.grid,
        block=plan.block,
        cluster=plan.cluster,
        dynamic_smem=plan.dynamic_smem,
        args=_arguments(plan, ptx, memory, addresses),
        seed=seed,
        memory=memory,
    )
    arrays = [np.frombuffer(b.tobytes(), dtype).reshape(shape) for b, dtype, shape in outputs]
    return arrays, report


def assert_same_bytes(got: Sequence[np.ndarray], want: Sequence[np.ndarray]):
    """Every output equals what is wanted, byte for byte."""
    for i, arrays in enumerate(zip(got, want, strict=True)):
        a, b = (v.reshape(-1).view(np.uint8) for v in arrays)
        wrong = np.flatnonzero(a != b)
        assert not wrong.size, f"output {i}: {wrong.size} of {a.size} bytes, first {wrong[0]}"


FORMATS = [(source, target) for source in (BF16, F16, F32) for target in (E4M3, E5M2)]
"""Of the quantizing kernels: input and result."""

# Sizes of groups, and rows of the array that they are of.
GROUPS = {
    "one block": ([128], 128),
    "around a block": ([0, 127, 128, 129, 1], 400),
    "one group": ([60], 60),
    "all empty": ([0, 0], 30),
    "fewer than the rows": ([10, 0, 20], 300),
    "more than the rows": ([70, 70, 70], 100),
    "negative and huge": ([-5, 50, 2**31 - 1, 7], 100),
    "all huge": ([2**31 - 1] * 34, 20),
    "more than lanes": ([3, 0] * 17, 60),
}


# ---- Quantizations

DENSE_QUANTIZERS = ("rows", "columns", "both", "blocks", "weight")
RAGGED_QUANTIZERS = ("ragged_columns", "ragged_both")
QUANTIZER_RESULTS = {
    "rows": ("data", "scale"),
    "columns": ("data", "scale"),
    "both": ("row_data", "row_scale", "column_data", "column_scale"),
    "blocks": ("data", "scale"),
    "weight": ("data_nn", "scale", "data_nt"),
    "ragged_columns": ("data", "scale"),
    "ragged_both": ("row_data", "row_scale", "column_data", "column_scale"),
}


def matrices(seed, shape, dtype):
    """Values over many orders of magnitude, among them zeros of both signs and subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    kind = rng.integers(0, 12, shape)
    x = np.select([kind == 0, kind == 1, kind == 2], [-0.0, -1e-39, 2e-7], x)
    return x.astype(np.float32).astype(dtype)


def quantizer_shape(kind, g, m, k):
    return (g * m, k) if kind == "rows" else (g, m, k)


def _quantizer_results(kind, shape, dtype, groups):
    """(dtype, shape) of the custom call's results, by name."""
    *lead, m, k = shape
    mb, kb = oracle_quantize.cdiv(m, 128), oracle_quantize.cdiv(k, 128)
    rows = [(dtype, (*lead, m, k)), (F32, (*lead, m, kb))]
    columns = [(dtype, (*lead, k, m)), (F32, (*lead, k, mb))]
    blocks = [(dtype, (*lead, m, k)), (F32, (*lead, mb, kb))]
    t = oracle_quantize.padded_tokens(m, groups)
    ragged = [(dtype, (k, t)), (F32, (k, t // 128))]
    types = {
        "rows": rows,
        "columns": columns,
        "both": rows + columns,
        "blocks": blocks,
        "weight": [*blocks, (dtype, (*lead, k, m))],
        "ragged_columns": ragged,
        "ragged_both": rows + ragged,
    }[kind]
    return dict(zip(QUANTIZER_RESULTS[kind], types, strict=True))


def quantizer_call(kind, x, dtype, *, pow2=False, group_sizes=None, sms=2):
    """The plan of a quantization, its operands and its results."""
    operands = {"w" if kind == "weight" else "x": x}
    if group_sizes is not None:
        operands["group_sizes"] = np.array(group_sizes, np.int32)
    results = _quantizer_results(kind, x.shape, dtype, len(group_sizes or ()))
    planned = plan(f"quantize_{kind}", operands, results, pow2=pow2, device_sms=sms)
    return planned, operands, results


# ---- Gated activations

DENSE_ACTIVATIONS = ("rows", "both", "grad_both")
RAGGED_ACTIVATIONS = ("ragged_both", "ragged_grad_both")


def ordinary(seed, shape, dtype):
    x = np.random.default_rng(seed).standard_normal(shape) * 3
    x[..., -3:] *= 12  # where the exponential is very large or very small
    return x.astype(dtype)


def activation_shape(kind, g, m, a, f):
    return (
        (m, a, f)
        if kind in RAGGED_ACTIVATIONS
        else (g * m, a, f)
        if kind == "rows"
        else (g, m, a, f)
    )


def _activation_results(kind, shape, dtype, groups):
    """(dtype, shape) of the custom call's results, by name, for x of `shape`."""
    names = ("row_data", "row_scale", "column_data", "column_scale")
    if kind == "rows":
        names = ("data", "scale")
    shapes = oracle_activation.result_shapes(kind, shape, groups)
    return {
        name: (F32 if "scale" in name else dtype, s) for name, s in zip(names, shapes, strict=True)
    }


def activation_call(kind, x, dy, dtype, *, activation="silu", pow2=False, group_sizes=None, sms=2):
    """The plan of an activation, its operands and its results."""
    inputs = {"x": x}
    if dy is not None:
        inputs["dy"] = dy
    if group_sizes is not None:
        inputs["group_sizes"] = np.array(group_sizes, np.int32)
    results = _activation_results(kind, x.shape, dtype, len(group_sizes or ()))
    planned = plan(
        f"activation_{kind}",
        inputs,
        results,
        pow2=pow2,
        activation=oracle_activation.ACTIVATIONS.index(activation),
        device_sms=sms,
    )
    return planned, inputs, results


def activation_operands(kind, shape, seed, source, generate=oracle_activation.saturated):
    """x (G, M, A, F), or (M, A, F) of the kinds without a batch, and dy of a gradient."""
    x = generate(seed, shape, source)
    dy = (
        oracle_activation.cotangents(seed, (*shape[:-2], shape[-1]), source)
        if "grad" in kind
        else None
    )
    return x, dy


# ---- Mixtures: rows gathered and summed by index, activations times a weight

GATHERS = ("quantize_rows", "quantize_both", "rows", "requantize_both")
WEIGHTED_ACTIVATIONS = ("weighted_rows", "ragged_weighted_both", "ragged_weighted_grad_both")


def _named_results(target, types):
    """Results of (dtype, shape) under the contract's names."""
    return dict(zip(CONTRACT[target][1], types, strict=True))


def gather_call(kind, x, source, dtype=E4M3, *, pow2=False, group_sizes=None, sms=2):
    """The plan of a gather, its operands and its results; x is an array, or FP8 data with its scales."""
    data, *scale = x if isinstance(x, tuple) else (x,)
    operands = {"x": data, "x_scale": scale[0]} if scale else {"x": data}
    operands["source"] = source
    (m,), (_, k) = source.shape, data.shape
    dtype, kb = data.dtype if scale else dtype, oracle_quantize.cdiv(k, 128)
    types = [(dtype, (m, k)), (F32, (m, kb))]
    if kind.endswith("both"):
        operands["group_sizes"] = np.array(group_sizes, np.int32)
        t = oracle_quantize.padded_tokens(m, len(group_sizes))
        types += [(dtype, (k, t)), (F32, (k, t // 128))]
    results = _named_results(f"gather_{kind}", types)
    attributes = {} if kind == "rows" else {"pow2": pow2}
    planned = plan(f"gather_{kind}", operands, results, device_sms=sms, **attributes)
    if scale:  # as it lies in memory; the plan has its logical shape
        operands["x_scale"] = oracle_quantize.m_major(scale[0])
    return planned, operands, results


def with_band(plan, band):
    """The plan of a gather into columns, with the grid going through bands of `band` blocks of columns."""
    args = [*plan.args]
    args[-2] = band
    names = ("image", "kernel", "grid", "block", "cluster", "dynamic_smem")
    return SimpleNamespace(**{name: getattr(plan, name) for name in names}, args=args)


def gather_outputs(kind, x, source, dtype=E4M3, *, pow2=False, group_sizes=None):
    """What a gather must give, as it lies in memory."""
    what = kind.rpartition("_")[2]
    if isinstance(x, tuple):
        results = oracle_moe.moved(what, *x, source, group_sizes, pow2)
    else:
        results = oracle_moe.quantized(what, x, source, group_sizes, dtype, pow2)
    return [oracle_quantize.m_major(v) if i % 2 else v for i, v in enumerate(results)]


def sum_call(rows, position, weight=None, *, out=F32, sms=2):
    """The plan of a sum of rows, its operands and its results."""
    operands = {"rows": rows, "position": position}
    if weight is not None:
        operands["weight"] = weight
    target = "sum_rows" if weight is None else "sum_weighted_rows"
    results = {"out": (out, (len(position), rows.shape[1]))}
    return plan(target, operands, results, device_sms=sms), operands, results


def weighted_call(kind, x, dy, weight, dtype, *, activation, pow2=False, group_sizes=None, sms=2):
    """The plan of a weighted activation, its operands and its results."""
    operands = {"x": x} | ({} if dy is None else {"dy": dy}) | {"weight": weight}
    if group_sizes is not None:
        operands["group_sizes"] = np.array(group_sizes, np.int32)
    plain = kind.replace("weighted_", "")
    types = list(_activation_results(plain, x.shape, dtype, len(group_sizes or ())).values())
    if dy is not None:
        types.append((F32, (len(x), oracle_quantize.cdiv(x.shape[-1], 128))))
    target = f"activation_{kind}"
    results = _named_results(target, types)
    index = oracle_activation.ACTIVATIONS.index(activation)
    return (
        plan(target, operands, results, pow2=pow2, activation=index, device_sms=sms),
        operands,
        results,
    )


def indices(seed, shape, rows, lies=True):
    """Indices of rows, some of them twice, some none; with lies also ones far from any row."""
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, rows, shape)
    if lies:
        index.flat[:: 1 + index.size // 5] = [-(2**31), 2**31 - 1, rows, -2, rows - 1][
            : len(index.flat[:: 1 + index.size // 5])
        ]
    return index.astype(np.int32)


def row_weights(seed, m):
    """Powers of two of both signs, and a zero: products with them are exact."""
    rng = np.random.default_rng(seed)
    weight = np.exp2(rng.integers(-6, 3, m)) * rng.choice([-1, 1, 1], m)
    weight[m // 2] = 0
    return weight.astype(np.float32)
