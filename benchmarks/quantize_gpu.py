"""Quantizer kernels on a Hopper GPU: bit equality with the NumPy oracle, and bandwidth.

    python benchmarks/quantize_gpu.py [--cubins DIR] [--results DIR] [--check-only | --time-only]

Builds the cubins with nvcc (or takes them from DIR), compares every kernel with
tests/oracle_quantize.py bit for bit, and times each against the driver's device-to-device copy of
as many bytes in the same run. A kernel's bytes are the minimum: its inputs and outputs, each once.
Buffers rotate through more memory than the L2 cache holds. Needs CuPy and ml_dtypes. Writes
benchmarks/results/quantize-<device>-<date>.json.
"""

import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import cupy as cp
import ml_dtypes
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import oracle_quantize as oracle  # noqa: E402

IMAGES = ("quantize_rows", "quantize_columns", "quantize_weight")
INPUTS = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}
OUTPUTS = {"e4m3": oracle.E4M3, "e5m2": oracle.E5M2}
IMAGE_OF = {
    "rows": "quantize_rows",
    "columns": "quantize_columns",
    "both": "quantize_columns",
    "ragged_columns": "quantize_columns",
    "ragged_both": "quantize_columns",
    "blocks": "quantize_weight",
    "weight": "quantize_weight",
}
SMS = 132
GUARD = 256  # bytes around every output that must stay as they were


def build(directory):
    """Compiles the kernels to <directory>/<image>.cubin, all at once."""
    compilers = [
        subprocess.Popen(
            ["nvcc", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", "-O3", "-std=c++20"]
            + [str(ROOT / f"csrc/kernels/quantize/{image}.cu"), "-o", f"{directory}/{image}.cubin"]
        )
        for image in IMAGES
    ]
    if any([compiler.wait() for compiler in compilers]):
        raise SystemExit("nvcc failed")


class Quantizer:
    """One kernel: allocates nothing, launches as csrc/host/quantize.cc plans it."""

    def __init__(self, modules, kind, source, target):
        self.kind, self.source = kind, source
        self.function = modules[IMAGE_OF[kind]].get_function(f"quantize_{kind}_{source}_{target}")

    def sizes(self, g, m, k):
        """Bytes of each output: row data, row scale, column data, column scale."""
        mb, kb = oracle.cdiv(m, 128), oracle.cdiv(k, 128)
        if self.kind.startswith("ragged"):
            t = oracle.padded_tokens(m, g)
            rows = (m * k, m * kb * 4) if self.kind == "ragged_both" else (0, 0)
            return (*rows, k * t, k * t // 128 * 4)
        data, row_scale, column_scale = g * m * k, g * m * kb * 4, g * k * mb * 4
        return {
            "rows": (data, row_scale, 0, 0),
            "columns": (0, 0, data, column_scale),
            "both": (data, row_scale, data, column_scale),
            "blocks": (data, g * mb * kb * 4, 0, 0),
            "weight": (data, g * mb * kb * 4, data, 0),
        }[self.kind]

    def __call__(self, x, group_sizes, outputs, g, m, k, pow2):
        """Launches on addresses; ``outputs`` in the order of ``sizes``, None where it is 0."""
        pointer = np.uint64
        args = [pointer(x)]
        if self.kind == "rows":
            vectors = 16 // INPUTS[self.source].itemsize
            tiles = oracle.cdiv(g * m, 8) * oracle.cdiv(k, 32 * vectors)
            warps = 8
            while warps > 1 and tiles < warps * 2 * SMS:
                warps //= 2
            grid, block = oracle.cdiv(tiles, warps), 32 * warps
            sizes = [np.int64(g * m), np.int64(k)]
        else:
            tokens = oracle.padded_tokens(m, g) if group_sizes is not None else m
            matrices = 1 if group_sizes is not None else g
            grid, block = matrices * oracle.cdiv(tokens, 128) * oracle.cdiv(k, 128), 256
            sizes = [np.int64(m), np.int64(k)]
            if IMAGE_OF[self.kind] == "quantize_columns":
                sizes.insert(0, np.int64(g))
        if group_sizes is not None:
            args.append(pointer(group_sizes))
        args += [pointer(address) for address in outputs if address is not None]
        self.function((grid,), (block,), (*args, *sizes, np.int32(pow2)))


def random_input(rng, shape, dtype):
    """Values of many magnitudes, with zeros, subnormals, NaN, Inf and whole quiet blocks."""
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(shape))
    flat = x.reshape(-1)
    for value, one_in in ((np.nan, 4000), (-np.inf, 4000), (-0.0, 50), (-1e-39, 50), (1e-5, 50)):
        flat[rng.integers(0, flat.size, max(1, flat.size // one_in))] = value
    x[..., 1:4, :] *= 1e-36
    x[..., 4:6, :] = np.where(rng.random(x[..., 4:6, :].shape) < 0.5, -1e-39, 0)
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


def expected(kind, x, group_sizes, dtype, pow2):
    """The oracle's arrays as they lie in memory, in the order of ``Quantizer.sizes``."""
    if kind in ("blocks", "weight"):
        data, scale, transposed = oracle.quantize_weight(x, dtype, pow2)
        return [data, scale, transposed if kind == "weight" else None, None]
    result = [None] * 4
    if kind in ("rows", "both", "ragged_both"):
        data, scale = oracle.quantize_blocks(x, (1, 128), dtype, pow2)
        result[:2] = data, oracle.m_major(scale)
    if kind in ("columns", "both"):
        data, scale = oracle.quantize_columns(x, dtype, pow2)
        result[2:] = data, oracle.m_major(scale)
    if kind.startswith("ragged"):
        data, scale = oracle.ragged_columns(x[0], group_sizes, dtype, pow2)
        result[2:] = data, oracle.m_major(scale)
    return result


def check(modules, kind, source, target, shape, pow2, group_sizes, offset, rng):
    """Raises unless every output byte, and every guard byte around, is as expected."""
    g, m, k = shape
    x = random_input(rng, (1 if group_sizes else g, m, k), INPUTS[source])
    quantizer = Quantizer(modules, kind, source, target)
    raw = cp.zeros(x.nbytes + 16, cp.uint8)
    raw[offset : offset + x.nbytes] = cp.asarray(x.view(np.uint8).reshape(-1))
    sizes = cp.asarray(np.array(group_sizes, np.int32)) if group_sizes else None
    buffers = [
        cp.full(n + 2 * GUARD, 0xA5, cp.uint8) if n else None for n in quantizer.sizes(*shape)
    ]
    quantizer(
        raw.data.ptr + offset,
        sizes.data.ptr if group_sizes else None,
        [None if b is None else b.data.ptr + GUARD for b in buffers],
        *shape,
        pow2,
    )
    for i, want in enumerate(expected(kind, x, group_sizes, OUTPUTS[target], pow2)):
        if want is None:
            continue
        got = buffers[i].get()
        case = f"{kind} {source} {target} {shape} pow2={pow2} groups={group_sizes} output {i}"
        if (got[:GUARD] != 0xA5).any() or (got[-GUARD:] != 0xA5).any():
            raise SystemExit(f"FAILED {case}: written outside")
        wrong = np.flatnonzero(got[GUARD:-GUARD] != want.view(np.uint8).reshape(-1))
        if wrong.size:
            raise SystemExit(f"FAILED {case}: {wrong.size} bytes differ, first at {wrong[0]}")


def check_all(modules):
    """Returns the number of cases that passed; stops at the first failure."""
    rng = np.random.default_rng(0)
    dense = [(1, 1, 1), (1, 8, 128), (2, 130, 72), (1, 37, 257), (3, 200, 20), (1, 64, 1040)]
    dense += [(5, 129, 132), (1, 1000, 514)]
    ragged = [([128], 128), ([0, 127, 128, 129, 1], 400), ([-5, 50, 2**31 - 1, 7], 100)]
    ragged += [([3] * 40, 150), ([0], 5), (rng.integers(0, 20, 512).tolist(), 3000)]
    count = 0
    for source in INPUTS:
        for target in OUTPUTS:
            for pow2 in (0, 1):
                for kind in ("rows", "columns", "both", "blocks", "weight"):
                    for i, shape in enumerate(dense):
                        offset = i % 3 * INPUTS[source].itemsize if i > 3 else 0
                        check(modules, kind, source, target, shape, pow2, None, offset, rng)
                        count += 1
                for kind in ("ragged_columns", "ragged_both"):
                    for sizes, m in ragged:
                        shape = (len(sizes), m, int(rng.choice([8, 130, 256])))
                        check(modules, kind, source, target, shape, pow2, sizes, 0, rng)
                        count += 1
    for kind in ("rows", "both", "weight"):
        check(modules, kind, "bf16", "e4m3", (1, 2048, 7168), 0, None, 0, rng)
        count += 1
    return count


def seconds(launch, rotation, repeats=5, calls=24):
    """Median over ``repeats`` of the mean time of ``calls`` launches; launch(i) uses set i."""
    times = []
    for _ in range(repeats + 1):
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record()
        for i in range(calls):
            launch(i % rotation)
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(begin, end) / calls * 1e-3)
    return statistics.median(times[1:])


def copy_bandwidth(nbytes):
    """Bytes read and written per second by the driver's device-to-device copy."""
    half = nbytes // 2 // 16 * 16
    rotation = max(2, 600_000_000 // nbytes)
    pairs = [
        (cp.zeros(half // 4, cp.float32), cp.zeros(half // 4, cp.float32)) for _ in range(rotation)
    ]
    runtime = cp.cuda.runtime

    def copy(i):
        target, source = pairs[i]
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, half, runtime.memcpyDeviceToDevice, 0)

    return 2 * half / seconds(copy, rotation)


TIMED = [
    ("rows", "bf16", (1, 4096, 7168)),
    ("rows", "bf16", (1, 16384, 4096)),
    ("rows", "bf16", (1, 8192, 16384)),
    ("rows", "f32", (1, 8192, 8192)),
    ("columns", "bf16", (1, 8192, 8192)),
    ("both", "bf16", (1, 4096, 7168)),
    ("both", "bf16", (1, 16384, 4096)),
    ("both", "bf16", (1, 8192, 16384)),
    ("both", "f32", (1, 8192, 8192)),
    ("blocks", "bf16", (1, 16384, 4096)),
    ("weight", "bf16", (1, 16384, 4096)),
    ("weight", "f32", (1, 16384, 4096)),
    ("weight", "bf16", (32, 2048, 2048)),
    ("ragged_columns", "bf16", (64, 16384, 4096)),
    ("ragged_both", "bf16", (8, 16384, 4096)),
    ("ragged_both", "bf16", (64, 16384, 4096)),
    ("ragged_both", "bf16", (256, 16384, 4096)),
]


def time_kernel(modules, kind, source, shape, copies):
    """One row of the table: bytes, time, bandwidth and its ratio to the copy's."""
    g, m, k = shape
    ragged = kind.startswith("ragged")
    quantizer = Quantizer(modules, kind, source, "e4m3")
    input_bytes = (1 if ragged else g) * m * k * INPUTS[source].itemsize
    sizes = quantizer.sizes(*shape)
    nbytes = input_bytes + sum(sizes)
    rotation = max(2, 600_000_000 // nbytes)
    sets = []
    for _ in range(rotation):
        hashed = cp.arange(input_bytes // 2, dtype=cp.uint32) * cp.uint32(2654435761)
        bits = (hashed >> 16).astype(cp.uint16) & cp.uint16(0xBFFF)  # below 2 in every format
        sets.append((bits, [cp.empty(n, cp.uint8) if n else None for n in sizes]))
    shares = np.random.default_rng(0).uniform(0.7, 1.3, g)
    group_sizes = np.floor(shares / shares.sum() * m).astype(np.int32)
    device_sizes = cp.asarray(group_sizes)

    def launch(i):
        x, outputs = sets[i]
        quantizer(
            x.data.ptr,
            device_sizes.data.ptr if ragged else None,
            [None if o is None else o.data.ptr for o in outputs],
            *shape,
            0,
        )

    elapsed = seconds(launch, rotation)
    rounded = 2 ** round(np.log2(nbytes))
    if rounded not in copies:
        copies[rounded] = copy_bandwidth(rounded)
    return {
        "kernel": f"quantize_{kind}_{source}_e4m3",
        "shape": list(shape),
        "bytes": nbytes,
        "microseconds": round(elapsed * 1e6, 2),
        "gb_per_s": round(nbytes / elapsed * 1e-9, 1),
        "copy_gb_per_s": round(copies[rounded] * 1e-9, 1),
        "of_copy": round(nbytes / elapsed / copies[rounded], 3),
    }


def load(directory):
    """The compiled images by name."""
    return {
        path.stem: cp.RawModule(path=str(path)) for path in pathlib.Path(directory).glob("*.cubin")
    }


def print_row(row):
    print(
        f"{row['kernel']:34} {str(tuple(row['shape'])):22} {row['microseconds']:9.1f} us "
        f"{row['gb_per_s']:7.0f} GB/s   copy {row['copy_gb_per_s']:7.0f}   {row['of_copy']:.3f}",
        flush=True,
    )


def write(report, what, directory):
    """The report as a file of results, named by what was measured, where and when."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{what}-{report['device'].replace(' ', '-')}-{report['date']}.json"
    (directory / name).write_text(json.dumps(report, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cubins", help="folder of compiled kernels; built when missing")
    parser.add_argument("--results", default=ROOT / "benchmarks/results", help="folder to write to")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--time-only", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.cubins is None:
            build(temporary)
        modules = load(arguments.cubins or temporary)
        device = cp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        report = {"device": device, "date": datetime.date.today().isoformat()}
        report["command"] = " ".join(["python", *sys.argv])
        copies = {}
        if not arguments.check_only:
            report["timings"] = []
            for case in TIMED:
                report["timings"].append(time_kernel(modules, *case, copies))
                print_row(report["timings"][-1])
        if not arguments.time_only:
            report["bit_equal_cases"] = check_all(modules)
            print(f"{report['bit_equal_cases']} cases equal the oracle bit for bit")
    write(report, "quantize", arguments.results)


if __name__ == "__main__":
    main()
