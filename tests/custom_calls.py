"""Random valid calls of every custom-call target, with the results that they must give.

For what calls the handlers without JAX: the soak, the schedules, the group sizes that lie. A draw
takes a NumPy generator, and for what it should not draw: `sizes` of groups, a product's `config`, `dims` (rows and
columns; of a product rows, columns and contraction, of a ragged weight gradient tokens, rows and columns), else
sizes up to `most`. The oracles share no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxfp8 import _C
from tests import ffi_frames, oracle, oracle_activation, oracle_moe
from tests import oracle_quantize as oq
from tests.contract import CONTRACT, pads_tokens

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
E4M3, E5M2 = oq.E4M3, oq.E5M2
NAMES = {
    BF16: "bf16", F16: "f16", F32: "f32", E4M3: "f8e4m3fn", E5M2: "f8e5m2",
    np.dtype(np.int32): "s32",
}  # fmt: skip
# float32 results against float64, norm-wise; bfloat16: neighbours on both sides of a rounding.
TOLERANCE = {F32: 1e-6, BF16: 2**-8}


class Quantized(NamedTuple):
    """An operand of a product: data (..., M, K), scale per `block`."""

    data: np.ndarray
    scale: np.ndarray
    block: tuple[int, int]


@dataclass
class Array:
    """An array of a call: its logical sizes, and its bytes as they lie in memory."""

    memory: np.ndarray
    dims: tuple[int, ...]

    def buffer(self) -> ffi_frames.Buffer:
        return ffi_frames.Buffer(NAMES[self.memory.dtype], self.memory.ctypes.data, self.dims)


@dataclass
class Call:
    """A valid call. `check(results)` compares the results, as they lie in memory, with the oracle's."""

    target: str
    operands: list[Array]
    results: list[tuple[np.dtype, tuple[int, ...]]]
    attributes: dict[str, bool | int]
    check: Callable[[list[np.ndarray]], None]
    accum: np.ndarray | None = None
    text: str = ""
    _keep: list[np.ndarray] = field(default_factory=list)

    def __str__(self):
        shapes = [f"{NAMES[a.memory.dtype]}{list(a.dims)}" for a in self.operands]
        return f"{self.target}({', '.join(shapes)}, {self.attributes}) {self.text}"

    def run(self, stream: int = 0, *, beside: bool = False) -> list[np.ndarray]:
        """The results that the emulated platform gives, as they lie in memory.

        A stream's calls go to the CUDA platform's handlers, those of none to the CPU platform's. `beside`: the
        accumulator is another buffer than the result's, and stays as it is.

        Raises:
            RuntimeError: the handler's error.
        """
        results = [Array(aligned(np.zeros(dims, dtype)), dims) for dtype, dims in self.results]
        operands = list(self.operands)
        if self.accum is not None and beside:
            operands.append(Array(aligned(self.accum), results[0].dims))
        elif self.accum is not None:
            results[0].memory[...] = self.accum
            operands.append(results[0])
        attributes = {
            name: ffi_frames.scalar("pred" if isinstance(value, bool) else "s32", value)
            for name, value in self.attributes.items()
        }
        frame = ffi_frames.Frame(
            [a.buffer() for a in operands],
            [a.buffer() for a in results],
            attributes,
            stream=stream,
        )
        error = frame.call(self.target, "CUDA" if stream else "cpu")
        if error is not None:
            raise RuntimeError(f"{self}: {error.message}")
        if beside:
            np.testing.assert_array_equal(operands[-1].memory, self.accum)
        return [a.memory for a in results]


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 128 bytes, as XLA and CUDA allocate."""
    space = np.empty(array.nbytes + 128, np.uint8)
    start = -space.ctypes.data % 128
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _array(values: np.ndarray, dims=None) -> Array:
    return Array(aligned(np.ascontiguousarray(values)), dims or values.shape)


def _row_scale(scale: np.ndarray) -> Array:
    return Array(aligned(oq.m_major(scale)), scale.shape)


def _cdiv(a, b):
    return -(-a // b)


# --- random pieces --------------------------------------------------------------------------------


def size(rng, most: int) -> int:
    """1 to `most`, often around a multiple of a block."""
    if rng.random() < 0.5:
        return int(rng.integers(1, most + 1))
    edge = int(rng.choice([16, 32, 64, 128, 192, 256, 384])) + int(rng.integers(-1, 2))
    return min(edge, most)


def group_sizes(rng, groups: int, rows: int) -> np.ndarray:
    """Sizes that fit, that do not, that are negative, that overflow."""
    kind = rng.integers(0, 5)
    if kind == 0:
        return rng.multinomial(rows, rng.dirichlet(np.full(groups, 0.5))).astype(np.int32)
    if kind == 1:
        return rng.integers(0, max(2, 2 * rows // groups), groups, dtype=np.int32)
    if kind == 2:
        return rng.integers(-rows - 1, rows + 1, groups, dtype=np.int32)
    if kind == 3:
        return rng.integers(-(2**31), 2**31, groups).astype(np.int32)
    edges = [-(2**31), 2**31 - 1, 2**30, -1, 0, 1, 127, 128, 129, rows, rows + 1, 2**31 - 128]
    return rng.choice(edges, groups).astype(np.int32)


def _floats(rng, shape, dtype) -> np.ndarray:
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-12, 4, (*shape[:-1], 1))
    x = np.where(rng.random(shape) < 0.05, rng.choice([0.0, -0.0, 1e-39], shape), x)
    if rng.random() < 0.3:
        bad = rng.random(shape) < 2 / x.size
        x = np.where(bad, rng.choice([np.nan, np.inf, -np.inf], shape), x)
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


def _quantized(rng, shape, block=(1, 128), dtype=E4M3) -> Quantized:
    x = rng.standard_normal(shape).astype(np.float32)
    return Quantized(*oq.quantize_blocks(x, block, dtype), block)


def _assert_same_bytes(results, want):
    for i, arrays in enumerate(zip(results, want, strict=True)):
        got, array = (v.reshape(-1).view(np.uint8) for v in arrays)
        wrong = np.flatnonzero(got != array)
        assert not wrong.size, f"result {i}: {wrong.size} bytes, the first {wrong[0]}"


def _types(rng, outer: bool):
    lhs = E5M2 if rng.random() < 0.3 else E4M3
    rhs = E5M2 if outer and lhs == E4M3 and rng.random() < 0.3 else E4M3
    return lhs, rhs, (BF16, F32)[rng.integers(2)]


# --- quantizers -----------------------------------------------------------------------------------


def _quantize(kind: str) -> Callable:
    ragged = kind.startswith("ragged")
    target = f"jaxfp8_quantize_{kind}_v1"

    def draw(rng, sizes=None, most=300, dims=None) -> Call:
        source, dtype = (BF16, F16, F32)[rng.integers(3)], (E4M3, E5M2)[rng.integers(2)]
        pow2 = bool(rng.integers(2))
        g, (m, k) = int(rng.integers(1, 4)), dims or (size(rng, most), size(rng, most))
        x = _floats(rng, (m, k) if ragged or kind == "rows" else (g, m, k), source)
        operands = [_array(x)]
        if ragged:
            if sizes is None:
                sizes = group_sizes(rng, int(rng.integers(1, 40)), m)
            operands.append(_array(sizes))
        # data and scale as they lie in memory, with the logical sizes
        want: list[tuple[np.ndarray, tuple[int, ...]]] = []
        if kind in ("blocks", "weight"):
            outputs = oq.quantize_weight(x, dtype, pow2)[: 3 if kind == "weight" else 2]
            want += [(a, a.shape) for a in outputs]
        if kind in ("rows", "both", "ragged_both"):
            data, scale = oq.quantize_blocks(x, (1, 128), dtype, pow2)
            want += [(data, data.shape), (oq.m_major(scale), scale.shape)]
        if kind in ("columns", "both"):
            data, scale = oq.quantize_columns(x, dtype, pow2)
            want += [(data, data.shape), (oq.m_major(scale), scale.shape)]
        if ragged:
            data, scale = oq.ragged_columns(x, sizes, dtype, pow2)
            want += [(data, data.shape), (oq.m_major(scale), scale.shape)]

        return Call(
            target,
            operands,
            [(a.dtype, dims) for a, dims in want],
            {"pow2": pow2},
            lambda results: _assert_same_bytes(results, [array for array, _ in want]),
            text=f"group sizes {sizes.tolist()}" if ragged else "",
        )

    return draw


# --- activations ----------------------------------------------------------------------------------


def _activation(kind: str) -> Callable:
    """On operands whose activation is exact: results are known to the bit, but for a sum's order."""
    ragged, gradient, weighted = "ragged" in kind, "grad" in kind, "weighted" in kind
    plain, names = kind.replace("weighted_", ""), oracle_activation.ACTIVATIONS

    def draw(rng, sizes=None, most=300, dims=None) -> Call:
        sources = (BF16, F32) if weighted else (BF16, F16, F32)
        source, dtype = sources[rng.integers(len(sources))], (E4M3, E5M2)[rng.integers(2)]
        pow2, name = bool(rng.integers(2)), names[rng.integers(len(names))]
        g, (m, f) = int(rng.integers(1, 3)), dims or (size(rng, most), size(rng, most))
        a = rng.integers(1, 3)
        batch = () if ragged or plain == "rows" else (g,)
        seed = int(rng.integers(2**31))
        x = oracle_activation.saturated(seed, (*batch, m, int(a), f), source)
        dy = oracle_activation.cotangents(seed, (*batch, m, f), source) if gradient else None
        operands = [_array(x)] + ([_array(dy)] if gradient else [])
        weight = np.exp2(rng.integers(-6, 3, m if weighted else ())).astype(np.float32)
        if weighted:
            operands.append(_array(weight))
        else:
            weight = np.ones((), np.float32)
        if ragged:
            if sizes is None:
                sizes = group_sizes(rng, int(rng.integers(1, 40)), m)
            operands.append(_array(sizes))
        if gradient:
            y = oracle_activation.gradient(x, dy * weight[..., None].astype(np.float64), name)
        else:
            y = oracle_activation.activate(x, name) * weight[..., None]
        want = oracle_activation.outputs(plain, y, dtype=dtype, pow2=pow2, group_sizes=sizes)
        shapes = oracle_activation.result_shapes(plain, x.shape, len(sizes) if ragged else 0)
        results = [(v.dtype, dims) for v, dims in zip(want, shapes, strict=True)]
        if weighted and gradient:
            results.append((F32, (m, _cdiv(f, 128))))

        def check(results):
            if weighted and gradient:
                *results, weight_grad = results
                oracle_activation.assert_weight_gradient(weight_grad, x, dy, name)
            _assert_same_bytes(results, want)

        return Call(
            f"jaxfp8_activation_{kind}_v1",
            operands,
            results,
            {"pow2": pow2, "activation": names.index(name)},
            check,
            text=f"group sizes {sizes.tolist()}" if ragged else "",
        )

    return draw


# --- gathers and sums of rows -----------------------------------------------------------------------


def _index(rng, shape, rows: int) -> np.ndarray:
    """Rows of an array, among them some that it does not have."""
    index = rng.integers(-1, rows, shape)
    if rng.random() < 0.3:
        lies = rng.choice([-(2**31), -2, rows, rows + 1, 2**31 - 1], shape)
        index = np.where(rng.random(shape) < 0.1, lies, index)
    return index.astype(np.int32)


def _gather(kind: str) -> Callable:
    of_fp8, columns = not kind.startswith("quantize"), kind.endswith("both")
    what = kind.rpartition("_")[2]

    def draw(rng, sizes=None, most=300, dims=None) -> Call:
        source, dtype = (BF16, F16, F32)[rng.integers(3)], (E4M3, E5M2)[rng.integers(2)]
        pow2 = bool(rng.integers(2))
        m, k = dims or (size(rng, most), size(rng, most))
        s = int(rng.integers(1, m + 2))
        x, index = _floats(rng, (s, k), source), _index(rng, (m,), s)
        if columns and sizes is None:
            sizes = group_sizes(rng, int(rng.integers(1, 40)), m)
        if of_fp8:
            data, scale = oq.quantize_blocks(x, (1, 128), dtype, bool(rng.integers(2)))
            operands = [_array(data), _row_scale(scale), _array(index)]
            want = oracle_moe.moved(what, data, scale, index, sizes, pow2)
        else:
            operands = [_array(x), _array(index)]
            want = oracle_moe.quantized(what, x, index, sizes, dtype, pow2)
        if columns:
            operands.append(_array(sizes))
        return Call(
            f"jaxfp8_gather_{kind}_v1",
            operands,
            [(v.dtype, v.shape) for v in want],
            {} if kind == "rows" else {"pow2": pow2},
            lambda results: _assert_same_bytes(
                results, [oq.m_major(v) if i % 2 else v for i, v in enumerate(want)]
            ),
            text=f"group sizes {sizes.tolist()}" if columns else "",
        )

    return draw


def _sum(weighted: bool) -> Callable:
    def draw(rng, most=300, dims=None) -> Call:
        source, out = (BF16, F32)[rng.integers(2)], (BF16, F32)[rng.integers(2)]
        m, k = dims or (size(rng, most), size(rng, most))
        s, j = int(rng.integers(1, m + 2)), int(rng.integers(1, 20))
        rows, position = _floats(rng, (m, k), source), _index(rng, (s, j), m)
        weight = rng.standard_normal((s, j)).astype(np.float32) if weighted else None

        def check(results):
            oracle_moe.assert_sum_of_rows(results[0], rows, position, weight)

        return Call(
            f"jaxfp8_sum_{'weighted_' if weighted else ''}rows_v1",
            [_array(rows), _array(position)] + ([_array(weight)] if weighted else []),
            [(out, (s, k))],
            {},
            check,
        )

    return draw


# --- products -------------------------------------------------------------------------------------


def _finish(rng, name, operands, out, dims, want, accumulate, config, text="") -> Call:
    target = f"jaxfp8_{name}{'_accum' if accumulate else ''}_v1"
    accum = None
    if accumulate:
        accum = (rng.standard_normal(dims) * 10).astype(np.float32).astype(out)
        want = want + accum.astype(np.float64)
    configs = _C.configs(target)
    if config is None:
        config = int(rng.integers(-1, len(configs)))

    def check(results):
        (got,) = results
        oracle.assert_close(got, want, TOLERANCE[out])
        assert not got[~want.any(-1)].any(), "a row that must be zero is not"

    return Call(
        target, operands, [(out, dims)], {"config": config, "num_sms": 0}, check, accum, text
    )


def _operands(lhs: Quantized, rhs: Quantized) -> list[Array]:
    rhs_scale = _row_scale if rhs.block[0] == 1 else _array
    return [_array(lhs.data), _row_scale(lhs.scale), _array(rhs.data), rhs_scale(rhs.scale)]


def _dims(rng, most):
    """Rows, columns and contraction of a product whose operands lie along the contraction."""
    return size(rng, most), size(rng, most), 16 * _cdiv(size(rng, most), 16)


def _dense(name: str, accumulate: bool) -> Callable:
    outer = name == "gemm_1d1d"

    def draw(rng, config=None, most=300, dims=None) -> Call:
        lhs_type, rhs_type, out = _types(rng, outer)
        (m, n, k), g = dims or _dims(rng, most), int(rng.integers(1, 4))
        lhs = _quantized(rng, (1 if rng.integers(2) else g, m, k), dtype=lhs_type)
        rhs = _quantized(rng, (g, n, k), (1, 128) if outer else (128, 128), rhs_type)
        want = oracle.gemm(lhs, rhs)
        return _finish(rng, name, _operands(lhs, rhs), out, (g, m, n), want, accumulate, config)

    return draw


def _grouped(name: str, accumulate: bool) -> Callable:
    masked = name == "masked_grouped_gemm"

    def draw(rng, sizes=None, config=None, most=300, dims=None) -> Call:
        lhs_type, rhs_type, out = _types(rng, False)
        m, n, k = dims or _dims(rng, most)
        if sizes is None:
            g = int(rng.integers(1, 4 if masked else 40))
            sizes = group_sizes(rng, g, m)
        g = len(sizes)
        n, k = (min(n, 140), min(k, 256)) if g > 4 else (n, k)
        lhs = _quantized(rng, (g, m, k) if masked else (m, k), dtype=lhs_type)
        rhs = _quantized(rng, (g, n, k), (128, 128), rhs_type)
        product = oracle.masked_grouped_gemm if masked else oracle.grouped_gemm
        want = product(lhs, rhs, sizes)
        operands = [*_operands(lhs, rhs), _array(sizes)]
        text = f"group sizes {sizes.tolist()}"
        return _finish(rng, name, operands, out, want.shape, want, accumulate, config, text)

    return draw


def _grouped_wgrad(accumulate: bool) -> Callable:
    def draw(rng, sizes=None, config=None, most=300, dims=None) -> Call:
        lhs_type, rhs_type, out = _types(rng, True)
        m, n, k = dims or (size(rng, most), size(rng, most), size(rng, most))
        if sizes is None:
            sizes = group_sizes(rng, int(rng.integers(1, 9)), m)
        operands = []
        for width, dtype in ((n, lhs_type), (k, rhs_type)):
            x = rng.standard_normal((m, width)).astype(np.float32)
            operands.append(Quantized(*oq.ragged_columns(x, sizes, dtype), (1, 128)))
        want = oracle.grouped_wgrad_gemm(*operands, sizes, m)
        arrays = [*_operands(*operands), _array(sizes)]
        text = f"{m} tokens, group sizes {sizes.tolist()}"
        return _finish(
            rng, "grouped_wgrad_gemm", arrays, out, want.shape, want, accumulate, config, text
        )

    return draw


QUANTIZERS = (
    "rows", "columns", "both", "blocks", "weight", "ragged_columns", "ragged_both",
)  # fmt: skip
ACTIVATIONS = (
    "rows", "both", "grad_both", "ragged_both", "ragged_grad_both",
    "weighted_rows", "ragged_weighted_both", "ragged_weighted_grad_both",
)  # fmt: skip
GATHERS = (
    "quantize_rows", "quantize_both", "rows", "requantize_both",
)  # fmt: skip
# target -> draw(rng)
DRAWS: dict[str, Callable[..., Call]] = {
    f"jaxfp8_quantize_{kind}_v1": _quantize(kind) for kind in QUANTIZERS
}
DRAWS |= {f"jaxfp8_activation_{kind}_v1": _activation(kind) for kind in ACTIVATIONS}
DRAWS |= {f"jaxfp8_gather_{kind}_v1": _gather(kind) for kind in GATHERS}
DRAWS |= {"jaxfp8_sum_rows_v1": _sum(False), "jaxfp8_sum_weighted_rows_v1": _sum(True)}
for _accumulate, _suffix in ((False, "_v1"), (True, "_accum_v1")):
    for _name in ("gemm_1d2d", "gemm_1d1d"):
        DRAWS[f"jaxfp8_{_name}{_suffix}"] = _dense(_name, _accumulate)
    for _name in ("grouped_gemm", "masked_grouped_gemm"):
        DRAWS[f"jaxfp8_{_name}{_suffix}"] = _grouped(_name, _accumulate)
    DRAWS[f"jaxfp8_grouped_wgrad_gemm{_suffix}"] = _grouped_wgrad(_accumulate)
# Those that take group sizes, as draw(rng, sizes=...)
GROUPED = tuple(
    f"jaxfp8_{name}_v1" for name in CONTRACT if "gemm" not in name and pads_tokens(name)
)
GROUPED += tuple(name for name in DRAWS if "grouped" in name)
