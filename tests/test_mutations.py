"""Planted faults in the kernels' PTX: each is found, and the unchanged kernel passes the same run.

A fault counts as found when the emulator names it, or when an output differs from the reference.
tests/mutations.py is the table.
"""

import functools
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from jaxfp8 import _ffi
from tests import emulator, oracle
from tests import oracle_quantize as quantizers
from tests.mutations import MUTATIONS, WRONG_RESULT, Ptx, kernel_text
from tests.test_quantize_kernels import NAMES_OF_ARRAYS, expected, matrices, result_types

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels"),
]

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
NAMES = {
    BF16: "bf16",
    F32: "f32",
    np.dtype(np.int32): "s32",
    quantizers.E4M3: "f8e4m3fn",
    quantizers.E5M2: "f8e5m2",
}


class Wrong(AssertionError):
    """An output differs from the reference."""


# ---- Runs: a custom call, its operands, and what its results must be


class Run:
    """One custom call. `check` raises Wrong unless its outputs' bytes are right."""

    def __init__(self, target, operands, results, check, accum=None, **attributes):
        self.operands, self.results, self.check, self.accum = operands, results, check, accum
        self.plan = _ffi._C.plan(
            f"jaxfp8_{target}_v1",
            [(NAMES[a.dtype], a.shape) for a in operands.values()]
            + ([] if accum is None else [(NAMES[accum.dtype], accum.shape)]),
            [(NAMES[dtype], shape) for dtype, shape in results.values()],
            **attributes,
        )
        ptx = (_ffi.image_directory() / f"{self.plan.image}.ptx").read_text()
        self.text = kernel_text(ptx, self.plan.kernel)

    def __call__(self, text):
        """Executes `text` in the kernel's place and checks its outputs."""
        memory = emulator.Memory()
        addresses, outputs = {"null": 0}, []
        for name, array in self.operands.items():
            array = np.ascontiguousarray(array).view(np.uint8)
            array.flags.writeable = False
            addresses[name] = memory.array(array, name=name).base
        for name, (dtype, shape) in self.results.items():
            output = np.full(int(np.prod(shape)) * dtype.itemsize, 0xFF, np.uint8)
            if self.accum is not None:
                output[:] = np.ascontiguousarray(self.accum).reshape(-1).view(np.uint8)
            outputs.append(output.view(dtype).reshape(shape))
            addresses[name] = memory.array(output, name=name).base
        parameters = emulator.kernel(text, self.plan.kernel).parameters
        args = []
        for arg, parameter in zip(self.plan.args, parameters, strict=True):
            if isinstance(arg, dict):
                args.append(
                    emulator.TensorMap(
                        (memory, addresses[arg["base"]]),
                        arg["dims"],
                        arg["strides"],
                        arg["box"],
                        swizzle=int(arg["swizzle"].removesuffix("B")),
                        dtype={"u8": "uint8", "bf16": "bfloat16", "f32": "float32"}[arg["type"]],
                    )
                )
            elif isinstance(arg, str):
                args.append(np.uint64(addresses[arg]))
            else:
                args.append({4: np.int32, 8: np.int64}[parameter.size](arg))
        plan = self.plan
        emulator.launch(
            text,
            plan.kernel,
            grid=plan.grid,
            block=plan.block,
            cluster=plan.cluster,
            dynamic_smem=plan.dynamic_smem,
            args=args,
            memory=memory,
        )
        self.check(*outputs)


def product(kind, *, groups=1, m, n, k, config, sms=2, sizes=None, out=BF16, accum=False):
    """A product of random operands and scales, which differ from row to row and block to block."""
    rng = np.random.default_rng(m + n + k)

    def operand(*shape):
        data = rng.standard_normal(shape).astype(np.float32).astype(quantizers.E4M3)
        scale = np.exp(rng.standard_normal((*shape[:-1], quantizers.cdiv(shape[-1], 128))))
        return SimpleNamespace(data=data, scale=scale.astype(np.float32), block=(1, 128))

    wgrad = kind == "grouped_wgrad_gemm"
    lhs_batch = () if wgrad or kind == "grouped_gemm" else (groups,)
    lhs = operand(*lhs_batch, m, k)
    rhs = operand(*(() if wgrad else (groups,)), n, k)
    if wgrad:  # tokens between the groups are zeros
        at, covered = 0, np.zeros(k, bool)
        for _, size in quantizers.clipped_groups(sizes, k - 128 * len(sizes)):
            covered[at : at + size] = True
            at += quantizers.cdiv(size, 128) * 128
        lhs.data[:, ~covered], rhs.data[:, ~covered] = 0, 0
    rhs_scale = quantizers.m_major(rhs.scale)
    if not (wgrad or kind == "gemm_1d1d"):
        rhs.block = (128, 128)
        rhs.scale = rhs_scale = np.ascontiguousarray(rhs.scale[:, ::128])
    lhs_scale = quantizers.m_major(lhs.scale)
    operands = {"lhs": lhs.data, "lhs_scale": lhs_scale, "rhs": rhs.data, "rhs_scale": rhs_scale}
    if sizes is not None:
        operands["masked_m" if kind == "masked_grouped_gemm" else "group_sizes"] = np.array(
            sizes, np.int32
        )
    if kind == "grouped_gemm":
        want = oracle.grouped_gemm(lhs, rhs, sizes)
    elif kind == "masked_grouped_gemm":
        want = oracle.masked_grouped_gemm(lhs, rhs, sizes)
    elif wgrad:
        want = oracle.grouped_wgrad_gemm(lhs, rhs, sizes, k - 128 * len(sizes))
    else:
        want = oracle.gemm(lhs, rhs)
    start = rng.standard_normal(want.shape).astype(out) if accum else None
    if accum:
        want = want + start.astype(np.float64)
    tolerance = np.abs(want) * 2.0 ** (-8 if out == BF16 else -20) + 1e-5 * np.abs(want).max()

    def check(got):
        gap = np.abs(got.astype(np.float64) - want)
        wrong = int(np.count_nonzero(~(gap <= tolerance)))
        if wrong:
            raise Wrong(f"{wrong} of {gap.size} elements")

    logical = {"lhs_scale": lhs.scale.shape, "rhs_scale": rhs.scale.shape}
    operands = {name: a.reshape(logical.get(name, a.shape)) for name, a in operands.items()}
    target = kind + ("_accum" if accum else "")
    names = _ffi._C.configs(f"jaxfp8_{target}_v1")
    return Run(
        target,
        operands,
        {"out": (out, want.shape)},
        check,
        accum=start,
        config=names.index(config),
        device_sms=sms,
    )


def quantization(kind, x, *, sizes=None, pow2=False):
    """A quantization of x to E4M3, whose results must equal the oracle's bit for bit."""
    names = list(NAMES_OF_ARRAYS[kind])
    operands = {names.pop(0): x}
    if sizes is not None:
        operands[names.pop(0)] = np.array(sizes, np.int32)
    types = result_types(kind, x.shape, quantizers.E4M3, len(sizes or ()))
    results = {
        name: (F32 if dtype == "f32" else dtype, shape)
        for name, (dtype, shape) in zip(names, types, strict=True)
    }
    want = expected(kind, x, quantizers.E4M3, pow2, sizes)

    def check(*got):
        for name, a, b in zip(names, got, want, strict=True):
            a, b = (v.reshape(-1).view(np.uint8) for v in (a, b))
            if (a != b).any():
                raise Wrong(f"{np.count_nonzero(a != b)} of {a.size} bytes of {name}")

    return Run(f"quantize_{kind}", operands, results, check, pow2=pow2)


def rows_of_every_kind():
    """Rows of normal numbers; one of zeros, one of tiny numbers, one that is negative."""
    x = matrices(1, (13, 264), BF16)
    x[2], x[3], x[11] = 0, (x[3].astype(np.float32) * 2.0**-125).astype(BF16), -abs(x[11])
    return x


def with_nan(x):
    x[1, 5], x[4, -3] = np.nan, -np.inf
    return x


def ties():
    """Multiples of 3 and a scale of about 3: quotients next to the middle of two FP8 numbers."""
    x = np.arange(-64, 64, dtype=np.float32)[None] * 3 * np.arange(1, 9)[:, None]
    x[:, 0] = 448 * np.arange(3, 11)
    return x.astype(F32)


# What the faults of one `run` execute: shapes are as small as shows each of them.
RUNS = {
    # Six tiles of three k-blocks: more k-blocks than stages, more tiles than mailbox slots, tails.
    "tiles": lambda: product("gemm_1d2d", m=40, n=184, k=304, config="m64n32 cluster 1x1", sms=1),
    "two CTAs": lambda: product("gemm_1d2d", m=40, n=184, k=16, config="m64n32 cluster 1x1"),
    # Rows of the output that the copy engine does not accept: plain stores, element by element.
    "odd columns": lambda: product("gemm_1d2d", m=40, n=45, k=16, config="m64n32 cluster 1x1"),
    "accumulate": lambda: product(
        "gemm_1d2d", m=40, n=40, k=144, config="m64n32 cluster 1x1", accum=True
    ),
    # Blocks: more than stages, an even number.
    "two sets": lambda: product(
        "gemm_1d2d", m=72, n=40, k=128 * 7 + 16, config="m128n128 cluster 1x1"
    ),
    "two waves": lambda: product(
        "gemm_1d2d", m=72, n=104, k=128 * 5 + 16, config="m128n96x2 cluster 1x1"
    ),
    "column cluster": lambda: product(
        "gemm_1d2d", m=136, n=72, k=128 * 9, config="m128n128 cluster 2x1"
    ),
    "row cluster": lambda: product("gemm_1d2d", m=40, n=136, k=144, config="m128n128 cluster 1x2"),
    "outer": lambda: product(
        "gemm_1d1d", m=70, n=72, k=400, config="m64n64 cluster 1x1", out=F32, sms=1
    ),
    "accumulate in float32": lambda: product(
        "gemm_1d1d", m=24, n=40, k=144, config="m64n64 cluster 1x1", out=F32, accum=True
    ),
    "groups": lambda: product(
        "grouped_gemm", groups=4, m=90, n=40, k=144, sizes=[20, -3, 0, 50], config="m64n32 cluster 1x1"
    ),
    "as many groups as lanes": lambda: product(
        "grouped_gemm", groups=32, m=40, n=16, k=16, sizes=[1] * 32, config="m64n32 cluster 1x1"
    ),
    "masked groups": lambda: product(
        "masked_grouped_gemm", groups=2, m=70, n=40, k=144, sizes=[20, 70], config="m64n32 cluster 1x1"
    ),
    "wgrad groups": lambda: product(
        "grouped_wgrad_gemm", m=40, n=72, k=128 * 5, sizes=[20, 0, 200], out=F32,
        config="m64n64 cluster 1x1",
    ),
    "rows": lambda: quantization("rows", rows_of_every_kind()),
    "rows with NaN": lambda: quantization("rows", with_nan(matrices(2, (9, 264), BF16))),
    "rows to powers of two": lambda: quantization("rows", matrices(3, (8, 128), BF16), pow2=True),
    "ties": lambda: quantization("rows", ties()),
    "columns": lambda: quantization("columns", matrices(4, (1, 136, 40), BF16)),
    "weight": lambda: quantization("weight", matrices(5, (1, 40, 72), BF16)),
    "ragged groups": lambda: quantization(
        "ragged_both", with_nan(matrices(6, (110, 40), BF16)), sizes=[3, -2, 100]
    ),
}  # fmt: skip


@functools.cache
def run(name):
    return RUNS[name]()


def detected(execute, text):
    """The emulator's error by name, WRONG_RESULT, or None."""
    try:
        execute(text)
    except emulator.EmulatorError as error:
        return type(error).__name__
    except Wrong:
        return WRONG_RESULT
    return None


@pytest.mark.parametrize("name", RUNS)
def test_the_kernel_without_fault_passes(name):
    run(name)(run(name).text)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.run}: {m.name}")
def test_a_planted_fault_is_found(mutation):
    execute = run(mutation.run)
    ptx = Ptx(execute.text)
    mutation.edit(ptx)
    assert ptx.text != Ptx(execute.text).text
    assert detected(execute, ptx.text) == mutation.detector
