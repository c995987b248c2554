"""Hardware counters of each kernel family on one large problem: how far from its limit, and what stalls.

    python benchmarks/counters.py OUT.json [--peer FILE]...

Runs itself under Nsight Compute, without touching the clocks. Needs ncu and permission to read counters.
"""

import argparse
import csv
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "MemoryWorkloadAnalysis")
KERNELS = "regex:^(gemm_1d|quantize_|.*activation|.*silu|.*gelu|sm90_fp8|.*sm90_fp8)"


def cases():
    from gemm_bench import Problem, cdiv
    from speed import spread

    sizes = spread(8, 4096)
    tokens = cdiv(sum(sizes), 128) * 128 + 128 * 8
    return {
        "forward 4096x7168x16384": Problem("1d2d", 4096, 7168, 16384),
        "forward 4096x24576x1536": Problem("1d2d", 4096, 24576, 1536),
        "forward 64x7168x16384": Problem("1d2d", 64, 7168, 16384),
        "forward 64x2112x7168": Problem("1d2d", 64, 2112, 7168),
        "weight gradient 4096x16384x15872": Problem("1d1d", 4096, 16384, 15872, out="float32"),
        "ragged 8 x 4096x7168": Problem("grouped", sum(sizes), 4096, 7168, 8, sizes),
        "ragged weight gradient": Problem(
            "grouped_wgrad", 4096, 7168, tokens, 8, sizes, out="float32"
        ),
        "masked 32 x 192": Problem("masked", 4096, 4096, 7168, 32, spread(32, 192)),
    }


def launch(arguments, peers):
    """Under ncu: one launch of each; prints a label for each kernel that it profiles."""
    import cupy
    import gemm_bench
    import numpy as np
    import quantize_gpu
    import torch

    import jaxfp8._ffi

    folder = pathlib.Path(tempfile.mkdtemp())
    gemm_bench.use_installed(folder)
    driver, labels = gemm_bench.Driver(folder), []
    for name, problem in cases().items():
        tensors = problem.operands()
        sizes = (problem.m, problem.n, problem.k, problem.groups)
        calls = {"ours": driver.prepare(problem.kind, *sizes, tensors)}
        for module in peers:
            if hasattr(module, "calls"):
                calls |= {k: v for k, v in module.calls(problem, tensors).items() if " " not in k}
        torch.cuda.synchronize()
        for side, call in calls.items():
            call()
            torch.cuda.synchronize()
            labels.append({"case": name, "side": side, "flops": problem.flops()})
        del tensors, calls
        torch.cuda.empty_cache()
    modules = quantize_gpu.load(jaxfp8._ffi.image_directory())
    for kind, source, shape in quantize_gpu.TIMED:
        g, m, k = shape
        ragged = kind.startswith("ragged")
        quantizer = quantize_gpu.Quantizer(modules, kind, source, "e4m3")
        width = quantize_gpu.INPUTS[source].itemsize
        x = cupy.random.randint(0, 0x3F00, (1 if ragged else g) * m * k * width // 2, np.uint16)
        outputs = [cupy.empty(n, cupy.uint8) if n else None for n in quantizer.sizes(*shape)]
        groups = cupy.full(g, m // g, np.int32)
        addresses = [None if o is None else o.data.ptr for o in outputs]
        quantizer(x.data.ptr, groups.data.ptr if ragged else None, addresses, *shape, 0)
        cupy.cuda.runtime.deviceSynchronize()
        labels.append({"case": f"quantize {kind} {source} {shape}", "side": "ours"})
        del x, outputs
    pathlib.Path(arguments.labels).write_text(json.dumps(labels))


COUNTERS = {
    "nanoseconds": "gpu__time_duration.sum",
    "sm_hz": "gpc__cycles_elapsed.avg.per_second",
    "cycles": "gpc__cycles_elapsed.max",
    "tensor_pipe_percent": "sm__pipe_tensor_type_hmma_hgmma_qgmma_imma_igmma_bmma_bgmma_cycles_active"
    ".avg.pct_of_peak_sustained_elapsed",
    "issue_slots_percent": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes_per_second": "dram__bytes.sum.per_second",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1_and_shared_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
}


def number(text):
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def read(text, labels):
    """Rows of the report, in order, with the counters that say most; stalls are warps per issue slot."""
    lines = text[text.index('"ID"') :].splitlines()
    table = list(csv.DictReader(lines))[1:]  # the first row holds units
    rows = []
    for label, line in zip(labels, table, strict=True):
        stalls = {}
        for name, value in line.items():
            found = re.search(
                r"average_warps_issue_stalled_(\w+)_per_issue_active\.ratio$", name or ""
            )
            if found and number(value) is not None and "not_issued" not in name:
                stalls[found.group(1)] = number(value)
        worst = sorted(stalls.items(), key=lambda s: -s[1])[:6]
        counters = {name: number(line.get(metric)) for name, metric in COUNTERS.items()}
        rows.append({**label, "kernel": line["Kernel Name"], **counters, "stalls": dict(worst)})
    return rows


def print_rows(rows):
    for row in rows:
        stalls = ", ".join(f"{k} {v:.1f}" for k, v in list(row["stalls"].items())[:4])
        print(
            f"{row['case'][:36]:36} {row['side']:9} {row['nanoseconds'] / 1e3:8.1f} us, {row['sm_hz'] / 1e9:.2f} GHz, "
            f"{row['cycles']:9.0f} cycles  tensor {row['tensor_pipe_percent'] or 0:5.1f} %  issue "
            f"{row['issue_slots_percent']:4.1f} %  dram {row['dram_percent']:4.1f} %  L2 {row['l2_percent']:4.1f} %  "
            f"L1 {row['l1_and_shared_percent']:4.1f} %  | {stalls}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--labels", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.labels:
        from speed import load_peers

        launch(arguments, load_peers(arguments.peer))
        return
    labels = arguments.out.with_suffix(".labels")
    command = ["ncu", "--clock-control", "none", "-k", KERNELS, "--csv", "--page", "raw"]
    command += [f"--section={s}" for s in SECTIONS]
    command += [sys.executable, __file__, str(arguments.out), "--labels", str(labels)]
    command += [f"--peer={p}" for p in arguments.peer]
    done = subprocess.run(command, capture_output=True, text=True)
    arguments.out.with_suffix(".csv").write_text(done.stdout)
    if done.returncode:
        sys.exit(f"ncu: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = read(done.stdout, json.loads(labels.read_text()))
    arguments.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print_rows(rows)


if __name__ == "__main__":
    main()
