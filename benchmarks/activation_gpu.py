"""Activation kernels on a Hopper GPU: equality with the NumPy oracle, and bandwidth.

    python benchmarks/activation_gpu.py [--results DIR] [--check-only | --time-only]

Launches the installed package's kernels as its planner says. On operands whose activation is exact in float32 every
output byte, and every guard byte around, must be as tests/oracle_activation.py says. Each is timed against the driver's
device-to-device copy of as many bytes in the same run; its bytes are its inputs and outputs, each once. Needs CuPy and
ml_dtypes. Writes activation-<device>-<date>.json into benchmarks/results.
"""

import argparse
import datetime
import itertools
import math
import pathlib
import sys

import cupy as cp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import quantize_gpu as quantizers  # noqa: E402

from jaxfp8 import _C, _ffi  # noqa: E402
from tests import oracle_activation as oracle  # noqa: E402

KINDS = ("rows", "both", "grad_both", "ragged_both", "ragged_grad_both")
TARGET_TYPES = {"e4m3": "f8e4m3fn", "e5m2": "f8e5m2"}
GUARD = quantizers.GUARD


class Activation:
    """One planned call: `shape` is that of x, `groups` the number of groups of a ragged one."""

    def __init__(
        self, modules, kind, source, target, shape, groups=0, activation="silu", pow2=False
    ):
        shapes = oracle.result_shapes(kind, shape, groups)
        self.inputs = {"x": (source, shape)}
        if "grad" in kind:
            self.inputs["dy"] = (source, (*shape[:-2], shape[-1]))
        if "ragged" in kind:
            self.inputs["group_sizes"] = ("s32", (groups,))
        names = ("data", "scale")
        if kind != "rows":
            names = ("row_data", "row_scale", "column_data", "column_scale")
        self.output_bytes = {
            name: math.prod(s) * (4 if "scale" in name else 1)
            for name, s in zip(names, shapes, strict=True)
        }
        self.plan = _C.plan(
            f"jaxfp8_activation_{kind}_v1",
            list(self.inputs.values()),
            [("f32" if i % 2 else TARGET_TYPES[target], s) for i, s in enumerate(shapes)],
            pow2=pow2,
            activation=oracle.ACTIVATIONS.index(activation),
            device_sms=cp.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"],
        )
        self.function = modules[self.plan.image].get_function(self.plan.kernel)
        if self.plan.dynamic_smem:
            self.function.max_dynamic_shared_size_bytes = self.plan.dynamic_smem

    @property
    def bytes(self):
        """What has to move, without group_sizes."""
        width = quantizers.INPUTS[self.inputs["x"][0]].itemsize
        read = sum(math.prod(s) * width for t, s in self.inputs.values() if t != "s32")
        return read + sum(self.output_bytes.values())

    def __call__(self, addresses):
        """`addresses`: of the inputs and outputs, by name."""
        args = []
        for i, arg in enumerate(self.plan.args):
            if isinstance(arg, str):
                args.append(np.uint64(0 if arg == "null" else addresses[arg]))
            else:  # sizes are int64; the two flags at the end int32
                args.append(np.int32(arg) if i >= len(self.plan.args) - 2 else np.int64(arg))
        grid, block = self.plan.grid, self.plan.block
        self.function(grid, block, tuple(args), shared_mem=self.plan.dynamic_smem)


def check(modules, kind, source, target, shape, sizes=None, activation="silu", pow2=False):
    """Raises SystemExit unless every output byte, and every guard byte around, is as expected."""
    dtype = quantizers.INPUTS[source]
    values = {"x": oracle.saturated(sum(shape), shape, dtype)}
    dy = None
    if "grad" in kind:
        dy = values["dy"] = oracle.cotangents(sum(shape), (*shape[:-2], shape[-1]), dtype)
    if sizes is not None:
        values["group_sizes"] = np.array(sizes, np.int32)
    call = Activation(modules, kind, source, target, shape, len(sizes or ()), activation, pow2)
    held = {name: cp.asarray(v.reshape(-1).view(np.uint8)) for name, v in values.items()}
    addresses = {name: array.data.ptr for name, array in held.items()}
    outputs = {
        n: cp.full(size + 2 * GUARD, 0xA5, cp.uint8) for n, size in call.output_bytes.items()
    }
    addresses |= {name: array.data.ptr + GUARD for name, array in outputs.items()}
    call(addresses)
    y = (
        oracle.activate(values["x"], activation)
        if dy is None
        else oracle.gradient(values["x"], dy, activation)
    )
    want = oracle.outputs(kind, y, dtype=quantizers.OUTPUTS[target], pow2=pow2, group_sizes=sizes)
    for (name, array), expected in zip(outputs.items(), want, strict=True):
        got = array.get()
        case = f"{call.plan.kernel} {shape} groups={sizes} {name}"
        if (got[:GUARD] != 0xA5).any() or (got[-GUARD:] != 0xA5).any():
            raise SystemExit(f"FAILED {case}: written outside")
        wrong = np.flatnonzero(got[GUARD:-GUARD] != expected.reshape(-1).view(np.uint8))
        if wrong.size:
            raise SystemExit(f"FAILED {case}: {wrong.size} bytes differ, first at {wrong[0]}")


def check_all(modules, few=False):
    """Returns the number of cases that passed; stops at the first failure."""
    groups = {(400, 200): [0, 127, 128, 129, 1], (60, 130): [-5, 50, 2**31 - 1, 7]}
    dense = [(2, 130, 136), (1, 37, 257), (1, 1, 5)]
    sources = ("bf16",) if few else tuple(quantizers.INPUTS)
    targets = ("e4m3",) if few else tuple(quantizers.OUTPUTS)
    count = 0
    for kind, source, target, halves in itertools.product(KINDS, sources, targets, (1, 2)):
        for i, activation in enumerate(oracle.ACTIVATIONS):
            cases = []
            if "ragged" in kind:
                cases = [((m, halves, f), s) for (m, f), s in groups.items()]
            else:
                cases = [((g, m, halves, f), None) for g, m, f in dense]
            for shape, sizes in cases[: 1 if few else None]:
                if kind == "rows":
                    shape = (shape[0] * shape[1], *shape[2:])
                check(modules, kind, source, target, shape, sizes, activation, bool(i))
                count += 1
    cp.cuda.runtime.deviceSynchronize()
    return count


TIMED = [
    (kind, "bf16", (m, 2, f), groups)
    for kind, groups in (("rows", 0), ("ragged_both", 32), ("ragged_grad_both", 32))
    for m, f in ((4096, 7168), (16384, 4096), (15872, 16384))
] + [
    (kind, source, (1, m, halves, f), 0)
    for kind in ("both", "grad_both")
    for source, halves, m, f in (
        ("bf16", 2, 4096, 7168),
        ("bf16", 2, 16384, 4096),
        ("bf16", 2, 15872, 16384),
        ("bf16", 1, 16384, 4096),
        ("f32", 2, 16384, 4096),
    )
]


def time_kernel(modules, kind, source, shape, groups, copies):
    """One row of the table: bytes, time, bandwidth and its ratio to the copy's."""
    call = Activation(modules, kind, source, "e4m3", shape, groups)
    width = quantizers.INPUTS[source].itemsize
    rotation = max(2, 600_000_000 // call.bytes)
    tokens = shape[-3]
    shares = np.random.default_rng(0).uniform(0.7, 1.3, groups)
    sizes = cp.asarray(np.floor(shares / max(shares.sum(), 1) * tokens).astype(np.int32))
    sets = []
    for _ in range(rotation):
        arrays = {}
        for name, (kind_of, s) in call.inputs.items():
            if kind_of == "s32":
                continue
            hashed = cp.arange(math.prod(s) * width // 2, dtype=cp.uint32) * cp.uint32(2654435761)
            # Below 2 in every format, of either sign.
            arrays[name] = (hashed >> 16).astype(cp.uint16) & cp.uint16(0xBFFF)
        arrays |= {name: cp.empty(n, cp.uint8) for name, n in call.output_bytes.items()}
        arrays["group_sizes"] = sizes
        sets.append(arrays)
    addresses = [{name: a.data.ptr for name, a in arrays.items()} for arrays in sets]
    elapsed = quantizers.seconds(lambda i: call(addresses[i]), rotation)
    rounded = 2 ** round(np.log2(call.bytes))
    if rounded not in copies:
        copies[rounded] = quantizers.copy_bandwidth(rounded)
    return {
        "kernel": call.plan.kernel,
        "kind": kind,
        "shape": list(shape),
        "groups": groups,
        "bytes": call.bytes,
        "microseconds": round(elapsed * 1e6, 2),
        "gb_per_s": round(call.bytes / elapsed * 1e-9, 1),
        "copy_gb_per_s": round(copies[rounded] * 1e-9, 1),
        "of_copy": round(call.bytes / elapsed / copies[rounded], 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", default=ROOT / "benchmarks/results", help="folder to write to")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--time-only", action="store_true")
    arguments = parser.parse_args()
    modules = quantizers.load(_ffi.image_directory())
    device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    report = {"device": device, "date": datetime.date.today().isoformat()}
    if not arguments.time_only:
        report["exact_cases"] = check_all(modules)
        print(f"{report['exact_cases']} cases equal the oracle bit for bit")
    if not arguments.check_only:
        copies, report["timings"] = {}, []
        for case in TIMED:
            report["timings"].append(time_kernel(modules, *case, copies))
            quantizers.print_row(report["timings"][-1])
    quantizers.write(report, "activation", arguments.results)


if __name__ == "__main__":
    main()
