"""What executes a planted fault: custom calls by name, with operands and what their results must be."""

from __future__ import annotations

import contextlib
import functools
from types import SimpleNamespace

import numpy as np

from jaxfp8 import _ffi
from tests import emulator, kernel_launch, oracle, oracle_activation, oracle_moe, oracle_quantize
from tests.faults import MUTATIONS
from tests.faults.ptx import WRONG_RESULT, Ptx, kernel_text
from tests.kernel_launch import BF16, E4M3, E5M2, F16, F32


class Wrong(AssertionError):
    """An output differs from the reference."""


@contextlib.contextmanager
def wrong():
    """A failed comparison is a Wrong result."""
    try:
        yield
    except AssertionError as error:
        raise Wrong(str(error)) from error


class Run:
    """One custom call. `check` raises Wrong unless its outputs' bytes are right."""

    def __init__(self, plan, operands, results, check, accum=None):
        self.plan, self.operands, self.results = plan, operands, results
        self.check, self.accum = check, accum
        ptx = (_ffi.image_directory() / f"{self.plan.image}.ptx").read_text()
        self.text = kernel_text(ptx, self.plan.kernel)

    def __call__(self, text):
        """Executes `text` in the kernel's place and checks its outputs."""
        outputs, _ = kernel_launch.execute(
            self.plan, self.operands, self.results, accum=self.accum, text=text
        )
        self.check(*outputs)


def _expected(kind, lhs, rhs, sizes):
    """The product in float64."""
    if kind == "grouped_gemm":
        return oracle.grouped_gemm(lhs, rhs, sizes)
    if kind == "masked_grouped_gemm":
        return oracle.masked_grouped_gemm(lhs, rhs, sizes)
    if kind == "grouped_wgrad_gemm":
        return oracle.grouped_wgrad_gemm(lhs, rhs, sizes, lhs.data.shape[-1] - 128 * len(sizes))
    return oracle.gemm(lhs, rhs)


def product(
    kind, *, groups=1, m, n, k, config, sms=2, sizes=None, out=BF16, accum=False, lhs_type=E4M3
):
    """A product of random operands and scales, which differ from row to row and block to block."""
    rng = np.random.default_rng(m + n + k)

    def operand(*shape, dtype=E4M3):
        data = rng.standard_normal(shape).astype(np.float32).astype(dtype)
        scale = np.exp(rng.standard_normal((*shape[:-1], oracle_quantize.cdiv(shape[-1], 128))))
        return SimpleNamespace(data=data, scale=scale.astype(np.float32), block=(1, 128))

    wgrad = kind == "grouped_wgrad_gemm"
    lhs_batch = () if wgrad or kind == "grouped_gemm" else (groups,)
    lhs = operand(*lhs_batch, m, k, dtype=lhs_type)
    rhs = operand(*(() if wgrad else (groups,)), n, k)
    if wgrad:  # tokens between the groups are zeros
        at, covered = 0, np.zeros(k, bool)
        for _, size in oracle_quantize.clipped_groups(sizes, k - 128 * len(sizes)):
            covered[at : at + size] = True
            at += oracle_quantize.cdiv(size, 128) * 128
        lhs.data[:, ~covered], rhs.data[:, ~covered] = 0, 0
    rhs_scale = oracle_quantize.m_major(rhs.scale)
    if not (wgrad or kind == "gemm_1d1d"):
        rhs.block = (128, 128)
        rhs.scale = rhs_scale = np.ascontiguousarray(rhs.scale[:, ::128])
    lhs_scale = oracle_quantize.m_major(lhs.scale)
    operands = {"lhs": lhs.data, "lhs_scale": lhs_scale, "rhs": rhs.data, "rhs_scale": rhs_scale}
    if sizes is not None:
        operands["masked_m" if kind == "masked_grouped_gemm" else "group_sizes"] = np.array(
            sizes, np.int32
        )
    want = _expected(kind, lhs, rhs, sizes)
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
    names = _ffi.configs(target)
    results = {"out": (out, want.shape)}
    plan = kernel_launch.plan(
        target,
        operands if start is None else operands | {"accum": start},
        results,
        config=names.index(config),
        device_sms=sms,
    )
    return Run(plan, operands, results, check, start)


def quantization(kind, x, *, sizes=None, pow2=False, dtype=E4M3):
    """A quantization of x, whose results must equal the oracle's bit for bit."""
    plan, operands, results = kernel_launch.quantizer_call(
        kind, x, dtype, pow2=pow2, group_sizes=sizes
    )
    want = oracle_quantize.outputs(kind, x, dtype=dtype, pow2=pow2, group_sizes=sizes)

    def check(*got):
        with wrong():
            kernel_launch.assert_same_bytes(got, want)

    return Run(plan, operands, results, check)


def activation(kind, x, *, name="gelu", sizes=None, pow2=False, exact=False):
    """An activation quantized to E4M3, or its gradient with `grad` in the kind.

    On saturated operands (`exact`) results must equal the oracle's bit for bit, else be within the
    activation's bound.
    """
    dy = None
    if "grad" in kind:
        seed = x.shape[-1]
        dy = oracle_activation.cotangents(seed, (*x.shape[:-2], x.shape[-1]), x.dtype)
        y = oracle_activation.gradient(x, dy, name)
    else:
        y = oracle_activation.activate(x, name)
    options = {"pow2": pow2, "group_sizes": sizes}
    want = oracle_activation.outputs(kind, y, **options)
    bound = oracle_activation.outputs(kind, oracle_activation.error_bounds(x, dy, name), **options)

    def check(*got):
        with wrong():
            if exact:
                kernel_launch.assert_same_bytes(got, want)
            else:
                oracle_activation.assert_within_a_step(got, want, bound)

    planned = kernel_launch.activation_call(
        kind, x, dy, E4M3, activation=name, pow2=pow2, group_sizes=sizes
    )
    return Run(*planned, check)


def gather(kind, x, index, *, sizes=None, band=None):
    """Rows gathered by index, whose results must equal the oracle's bit for bit; x is high precision, or FP8 rows."""
    if "_quantize" not in f"_{kind}":
        x = oracle_quantize.quantize_blocks(x)
    options = {} if sizes is None else {"group_sizes": sizes}
    plan, operands, results = kernel_launch.gather_call(kind, x, index, **options)
    if band is not None:
        plan = kernel_launch.with_band(plan, band)
    want = kernel_launch.gather_outputs(kind, x, index, **options)

    def check(*got):
        with wrong():
            kernel_launch.assert_same_bytes(got, want)

    return Run(plan, operands, results, check)


def sum_of_rows(rows, position, weight=None, *, out=F32):
    """A sum of rows in order; without weights also the signs of zeros are compared."""

    def check(got):
        with wrong():
            oracle_moe.assert_sum_of_rows(got, rows, position, weight)
            if weight is None:
                want = oracle_moe.sum_rows_in_order(rows, position)
                np.testing.assert_array_equal(
                    np.signbit(got[want == 0]), np.signbit(want[want == 0])
                )

    return Run(*kernel_launch.sum_call(rows, position, weight, out=out), check)


def weighted_activation(kind, m, f, *, sizes=None):
    """On saturated operands: equal to the oracle bit for bit, the weights' gradient within its bound."""
    x = oracle_activation.saturated(m + f, (m, 2, f), BF16)
    dy = oracle_activation.cotangents(m + f, (m, f), BF16) if "grad" in kind else None
    weight = kernel_launch.row_weights(m, m)
    scaled = weight.astype(np.float64)[:, None]
    if dy is None:
        y = oracle_activation.activate(x, "silu") * scaled
    else:
        y = oracle_activation.gradient(x, dy.astype(np.float64) * scaled, "silu")
    want = oracle_activation.outputs(kind.replace("weighted_", ""), y, group_sizes=sizes)

    def check(*got):
        with wrong():
            if dy is not None:
                *got, gradient = got
                oracle_activation.assert_weight_gradient(gradient, x, dy, "silu")
            kernel_launch.assert_same_bytes(got, want)

    return Run(
        *kernel_launch.weighted_call(
            kind, x, dy, weight, E4M3, activation="silu", group_sizes=sizes
        ),
        check,
    )


def positions():
    """Of eleven choices of six tokens: one of none, one that lost a row."""
    position = kernel_launch.indices(21, (6, 11), 9, lies=False)
    position[2], position[4, 3] = -1, 9
    return position


def gates(shape):
    """Pre-activations around zero, where neither the logistic function nor its slope is saturated."""
    return kernel_launch.ordinary(sum(shape), shape, BF16)


def saturated_with(shape, *values):
    """Pre-activations whose activation is exact, but for these gates, one in every third row."""
    x = oracle_activation.saturated(sum(shape), shape, BF16)
    for row, value in enumerate(values):
        x[..., 3 * row + 1, 0, 5] = value
    return x


def rows_of_every_kind():
    """Rows of normal numbers; one of zeros, one of tiny numbers, one that is negative."""
    x = kernel_launch.matrices(1, (13, 264), BF16)
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
    # The same, and no rows to clear before the first tile.
    "tiles of two rows": lambda: product(
        "gemm_1d2d", m=72, n=88, k=304, config="m64n32 cluster 1x1", sms=1
    ),
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
    # More blocks than stages, rows for one warpgroup of two.
    "idle warpgroup": lambda: product(
        "gemm_1d2d", m=64, n=40, k=128 * 9, config="m128n128 cluster 1x1"
    ),
    # Two rows for each CTA to copy: the second one's lie past the operand, in the middle of a tile.
    "two rows in a cluster": lambda: product(
        "gemm_1d2d", m=2, n=136, k=144, config="m64n64 cluster 1x2"
    ),
    # Whole strips and clipped ones; more tiles than one for a CTA, and one past the last column.
    "16 columns": lambda: product(
        "gemm_1d2d", m=24, n=40, k=144, config="m64n16 cluster 1x2"
    ),
    # More blocks than stages, a block more than a multiple of four.
    "blocks by fours": lambda: product(
        "gemm_1d2d", m=24, n=24, k=128 * 16 + 16, config="m64n32 cluster 1x1"
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
    "batch": lambda: product(
        "gemm_1d2d", groups=3, m=24, n=40, k=144, config="m64n32 cluster 1x1"
    ),
    "masked sizes that lie": lambda: product(
        "masked_grouped_gemm", groups=3, m=40, n=24, k=144, sizes=[-3, 70, 5], config="m64n32 cluster 1x1"
    ),
    "groups accumulate": lambda: product(
        "grouped_gemm", groups=3, m=90, n=45, k=144, sizes=[20, 0, 50], accum=True,
        config="m64n32 cluster 1x1",
    ),
    "wgrad groups accumulate": lambda: product(
        "grouped_wgrad_gemm", m=24, n=40, k=128 * 5, sizes=[20, 0, 200], out=F32, accum=True,
        config="m64n64 cluster 1x1",
    ),
    "odd columns in float32": lambda: product(
        "gemm_1d2d", m=24, n=45, k=16, config="m64n64 cluster 1x1", out=F32
    ),
    # Two rows of tiles, five columns in bands of three and two.
    "bands": lambda: product(
        "gemm_1d2d", m=72, n=136, k=16, config="m64n32 cluster 1x1", sms=4
    ),
    "upper and lower rows": lambda: product(
        "gemm_1d2d", m=200, n=40, k=144, config="m256n128 cluster 1x1"
    ),
    "three segments": lambda: product(
        "gemm_1d2d", m=24, n=192, k=144, config="m128n192 cluster 1x1"
    ),
    "side by side": lambda: product(
        "gemm_1d1d", m=72, n=184, k=144, config="m128n96x2 cluster 1x1", out=F32
    ),
    "E5M2": lambda: product(
        "gemm_1d2d", m=24, n=40, k=144, config="m64n32 cluster 1x1", lhs_type=E5M2
    ),
    "rows": lambda: quantization("rows", rows_of_every_kind()),
    "rows with NaN": lambda: quantization("rows", with_nan(kernel_launch.matrices(2, (9, 264), BF16))),
    "rows to powers of two": lambda: quantization("rows", kernel_launch.matrices(3, (8, 128), BF16), pow2=True),
    "ties": lambda: quantization("rows", ties()),
    "columns": lambda: quantization("columns", kernel_launch.matrices(4, (1, 136, 40), BF16)),
    "weight": lambda: quantization("weight", kernel_launch.matrices(5, (1, 40, 72), BF16)),
    "rows of float32": lambda: quantization("rows", kernel_launch.matrices(7, (8, 136), F32)),
    "rows of float16": lambda: quantization("rows", kernel_launch.matrices(8, (8, 136), F16)),
    "rows to E5M2": lambda: quantization("rows", kernel_launch.matrices(9, (8, 136), BF16), dtype=E5M2),
    "batch of columns": lambda: quantization("both", kernel_launch.matrices(10, (2, 24, 40), BF16)),
    "batch of weights": lambda: quantization("weight", kernel_launch.matrices(11, (2, 24, 40), BF16)),
    "ragged columns": lambda: quantization(
        "ragged_columns", kernel_launch.matrices(12, (60, 40), BF16), sizes=[3, 0, 20]
    ),
    "ragged groups": lambda: quantization(
        "ragged_both", with_nan(kernel_launch.matrices(6, (110, 40), BF16)), sizes=[3, -2, 100]
    ),
    "activation rows": lambda: activation(
        "rows", np.concatenate([gates((6, 2, 264)), saturated_with((4, 2, 264))])
    ),
    "activation rows with NaN": lambda: activation(
        "rows", saturated_with((9, 2, 264), np.nan, np.inf, 2.0**70), name="silu", exact=True
    ),
    "activation both": lambda: activation("both", gates((1, 40, 2, 40))),
    "activation to powers of two": lambda: activation(
        "both", saturated_with((1, 20, 2, 136)), pow2=True, exact=True
    ),
    "activation grad": lambda: activation("grad_both", gates((1, 24, 2, 40))),
    "activation ragged": lambda: activation(
        "ragged_grad_both", saturated_with((60, 2, 40), np.nan, np.inf),
        sizes=[3, -2, 40], exact=True,
    ),
    "gathered rows": lambda: gather(
        "quantize_rows", kernel_launch.matrices(13, (11, 264), BF16), kernel_launch.indices(13, 21, 11)
    ),
    "gathered groups": lambda: gather(
        "quantize_both", with_nan(kernel_launch.matrices(14, (11, 40), BF16)),
        kernel_launch.indices(14, 110, 11), sizes=[3, -2, 100],
    ),
    # Three blocks of columns in bands of two.
    "gathered bands": lambda: gather(
        "quantize_both", kernel_launch.matrices(15, (11, 272), BF16),
        kernel_launch.indices(15, 20, 11), sizes=[20], band=2,
    ),
    "moved rows": lambda: gather(
        "rows", kernel_launch.matrices(16, (11, 272), BF16), kernel_launch.indices(16, 21, 11)
    ),
    "moved groups": lambda: gather(
        "requantize_both", with_nan(kernel_launch.matrices(17, (11, 40), BF16)),
        kernel_launch.indices(17, 110, 11), sizes=[3, -2, 100],
    ),
    "summed rows": lambda: sum_of_rows(kernel_launch.matrices(18, (9, 45), BF16), positions()),
    "summed rows with weights": lambda: sum_of_rows(
        kernel_launch.matrices(19, (9, 40), BF16), positions(),
        np.random.default_rng(19).standard_normal((6, 11)).astype(F32), out=BF16,
    ),
    "weighted rows": lambda: weighted_activation("weighted_rows", 13, 264),
    "weighted groups": lambda: weighted_activation("ragged_weighted_both", 60, 40, sizes=[3, -2, 50]),
    "weighted gradient": lambda: weighted_activation(
        "ragged_weighted_grad_both", 60, 40, sizes=[3, -2, 50]
    ),
}  # fmt: skip


@functools.cache
def run(name):
    return RUNS[name]()


def detected(execute, text):
    try:
        execute(text)
    except emulator.EmulatorError as error:
        return type(error).__name__
    except Wrong:
        return WRONG_RESULT
    return None


def found_by(mutation):
    """What finds a planted fault: the emulator's error by name, WRONG_RESULT, or None."""
    execute = run(mutation.run)
    ptx = Ptx(execute.text)
    mutation.edit(ptx)
    assert ptx.text != Ptx(execute.text).text
    return detected(execute, ptx.text)


def main() -> int:
    """Plants every fault and prints what finds it; 1 if what should find one does not."""
    names = [f"{mutation.run}: {mutation.name}" for mutation in MUTATIONS]
    kernels = [run(mutation.run).plan.kernel for mutation in MUTATIONS]
    widths = max(map(len, names)), max(map(len, kernels))
    missed = 0
    for mutation, name, kernel in zip(MUTATIONS, names, kernels, strict=True):
        detector = found_by(mutation)
        missed += detector != mutation.detector
        print(name.ljust(widths[0]), kernel.ljust(widths[1]), detector or "NOTHING", flush=True)
    print(f"{len(MUTATIONS)} faults, {missed} not found by what should find them")
    return 1 if missed else 0
