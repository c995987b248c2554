"""Speed on a Hopper GPU, of kernels and of layers, beside peers in the same run on the same data.

    python benchmarks/speed.py OUT [--sections ceilings,kernels,quantizers,layers,steps] [--peer FILE]...

Prints one table, and writes OUT/speed-DEVICE-DATE.json and OUT/roofline.png. `benchmarks/readme.py` writes the
figures of README.md and docs/performance.md from the JSON.

Each section runs in a process of its own. Kernels: device time by CUDA events around one launch, after a write of 8 GB
that evicts L2 and lets the power budget recover (`--flush`); normal random data; medians; peers alternate with ours.
Layers: wall time of queued calls. Clocks, power and temperature are read before and after each section.

A `--peer` file is Python with any of these functions, each giving callables by name:

    calls(problem, tensors)     the same product on torch tensors; see gemm_bench.Problem
    linears()                   f(x, w) on JAX arrays, differentiable
    ragged_dots()               f(x, w, group_sizes) on JAX arrays, differentiable
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SECTIONS = ("ceilings", "kernels", "quantizers", "layers", "steps")
FP8_PEAK = 1979  # TFLOP/s, data sheet of H100 and H200 SXM, dense


def machine_state():
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    text = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return dict(zip(query.split(","), [v.strip() for v in text.split(",")], strict=False))


def load_peers(files):
    modules = []
    for file in files:
        spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules


# ---- Shapes

# (N, K) of DeepGEMM's own tests: DeepSeek-V3's layers.
DEEPSEEK = [
    (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
]  # fmt: skip
GROUPED = [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)]
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
LLAMA_70B = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)]


def spread(groups, mean, seed=1):
    """Group sizes from U(0.7, 1.3) of the mean."""
    import random

    generator = random.Random(seed)
    return tuple(int(mean * generator.uniform(0.7, 1.3)) for _ in range(groups))


def zipf(groups, total):
    weights = [1 / (i + 1) for i in range(groups)]
    return tuple(int(total * w / sum(weights)) for w in weights)


def kernel_problems():
    """Family to problems. A ragged one is followed by its aligned, and by its dense, twin of equal work."""
    from gemm_bench import Problem, cdiv

    def dense(shapes, **options):
        return [Problem("1d2d", m, n, k, **options) for m, n, k in shapes]

    def ragged(n, k, groups, mean):
        variants = [(mean,) * groups, spread(groups, mean), zipf(groups, groups * mean)]
        return [Problem("grouped", sum(s), n, k, groups, s) for s in variants]

    def ragged_wgrad(m, n, groups, mean):
        variants = [(mean,) * groups, spread(groups, mean), zipf(groups, groups * mean)]
        tokens = [cdiv(sum(s), 128) * 128 + 128 * groups for s in variants]
        twin = Problem("1d1d", m, n, mean, groups, out="float32")
        problems = [
            Problem("grouped_wgrad", m, n, t, groups, s, out="float32")
            for t, s in zip(tokens, variants, strict=True)
        ]
        return [twin, *problems]

    wgrad = [(n, 4096, k) for n, k in DEEPSEEK]
    wgrad += [(7168, 2112, 4096), (24576, 1536, 4096), (7168, 16384, 4096)]
    wgrad += [(4096, 7168, 8192), (7168, 2048, 8192), (8192, 8192, 8192), (4096, 16384, 15872)]
    return {
        "forward": dense([(4096, n, k) for n, k in DEEPSEEK] + [(8192, 8192, 8192)]),
        "dgrad": dense([(4096, k, n) for n, k in DEEPSEEK]),
        "wgrad": [Problem("1d1d", *s, out="float32") for s in wgrad],
        "wgrad, accumulated": [
            Problem("1d1d", *s, out="float32", accum=True) for s in wgrad if s[2] >= 4096
        ],
        "layer": dense([(15872, 16384, 4096), (15872, 4096, 16384)]),
        "llama": dense([(8192, n, k) for n, k in LLAMA_8B] + [(4096, n, k) for n, k in LLAMA_70B]),
        "inference": dense(
            [(m, n, k) for n, k in DEEPSEEK + LLAMA_8B[:1] + LLAMA_8B[2:] for m in (1, 8, 16, 32, 64, 128)]
        ),
        "ragged": [p for n, k in GROUPED for g, mean in ((4, 8192), (8, 4096)) for p in ragged(n, k, g, mean)]
        + ragged(4096, 7168, 32, 1024),
        "ragged wgrad": [
            p
            for g, mean in ((4, 8192), (8, 4096), (16, 2048))
            for m, n in ((4096, 7168), (7168, 2048))
            for p in ragged_wgrad(m, n, g, mean)
        ],
        "masked": [
            Problem("masked", 4096, n, k, g, spread(g, mean))
            for g, mean in ((32, 192), (6, 1024), (32, 20), (6, 20))
            for n, k in GROUPED
        ],
    }  # fmt: skip


def problem_bytes(p):
    """Each operand, its scales and the output once; of groups, what they use."""
    tokens = sum(p.sizes) if p.sizes else None
    out = 4 if p.out == "float32" else 2
    m, n, k, g = p.m, p.n, p.k, p.groups
    if p.kind == "grouped_wgrad":
        return tokens * (m + n) * (1 + 4 / 128) + g * m * n * out * (2 if p.accum else 1)
    rows = tokens if tokens is not None else g * m
    rhs_scale = 4 / 128 if p.kind == "1d1d" else 4 / 128**2
    used = sum(s > 0 for s in p.sizes) if p.sizes else g
    total = rows * k * (1 + 4 / 128) + used * n * k * (1 + rhs_scale)
    return total + rows * n * out * (2 if p.accum else 1)


# ---- Sections, each in a child process


def ceilings(arguments, peers):
    import torch
    from gemm_bench import Timer

    timer = Timer(arguments.flush)
    n = 8192
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    a16, b16 = a.bfloat16(), b.bfloat16()
    one = torch.ones((), device="cuda")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)

    def fp8():
        return torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    times = timer(
        {"fp8": fp8, "bf16": lambda: a16 @ b16.t(), "copy": lambda: target.copy_(source)}, 15
    )
    return {
        "fp8_tflops": 2 * n**3 / times["fp8"] / 1e6,
        "bf16_tflops": 2 * n**3 / times["bf16"] / 1e6,
        "copy_gb_per_s": 2 * source.numel() / times["copy"] / 1e3,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def row_wise(problem, tensors):
    """cuBLASLt with one scale a row and a column: another recipe, a further ceiling."""
    import torch

    if problem.kind != "1d2d" or problem.groups != 1:
        return {}
    lhs, _, rhs = tensors[:3]
    b = rhs.view(problem.n, problem.k).t()
    a_scale = torch.ones(problem.m, 1, device="cuda")
    b_scale = torch.ones(1, problem.n, device="cuda")

    def run():
        return torch._scaled_mm(
            lhs, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    try:
        run()
    except RuntimeError as error:
        print(f"  no cublaslt row: {str(error).splitlines()[0][:120]}")
        return {}
    return {"cublaslt row": run}


def kernels(arguments, peers):
    import torch
    from gemm_bench import Driver, Timer, use_installed
    from gemm_bench import peers as torch_peers

    folder = pathlib.Path(tempfile.mkdtemp())
    use_installed(folder)
    driver, timer = Driver(folder), Timer(arguments.flush)
    rows = []
    for family, problems in kernel_problems().items():
        if arguments.family and family not in arguments.family.split(","):
            continue
        for problem in problems:
            tensors = problem.operands()
            options = dict(shared=problem.shared, accum=problem.accum)
            sizes = (problem.m, problem.n, problem.k, problem.groups)
            launch = driver.prepare(problem.kind, *sizes, tensors, **options)
            calls = {"ours": launch} | torch_peers(problem, tensors) | row_wise(problem, tensors)
            for module in peers:
                if hasattr(module, "calls"):
                    calls |= module.calls(problem, tensors)
            times = timer(calls, arguments.repeats)
            row = {
                "family": family,
                **{f: getattr(problem, f) for f in ("kind", "m", "n", "k", "groups", "sizes")},
                "out": problem.out,
                "accum": problem.accum,
                "kernel": launch.plan["kernel"],
                "cluster": launch.plan["cluster"],
                "flops": problem.flops(),
                "bytes": problem_bytes(problem),
                "microseconds": times,
                "tflops": {c: problem.flops() / t / 1e6 for c, t in times.items()},
                "gb_per_s": problem_bytes(problem) / times["ours"] / 1e3,
            }
            rows.append(row)
            print_kernel(row)
            del tensors, calls, launch
            torch.cuda.empty_cache()
        arguments.json.write_text(json.dumps(rows))
    return rows


def shape_text(row):
    text = f"{row['m']}x{row['n']}x{row['k']}"
    if row["sizes"]:
        text += f" G{row['groups']} {min(row['sizes'])}..{max(row['sizes'])}"
    elif row["groups"] > 1:
        text += f" G{row['groups']}"
    return text


def print_kernel(row):
    peers = ", ".join(f"{c} {v:.0f}" for c, v in row["tflops"].items() if c != "ours")
    print(
        f"{row['family']:18} {shape_text(row):34} {row['microseconds']['ours']:9.1f} us "
        f"{row['tflops']['ours']:6.0f} TF/s {row['gb_per_s']:6.0f} GB/s  {row['kernel'][5:22]:17} | {peers}",
        flush=True,
    )


def quantizers(arguments, peers):
    import quantize_gpu

    import jaxfp8._ffi

    modules = quantize_gpu.load(jaxfp8._ffi.image_directory())
    rows, copies = [], {}
    for case in quantize_gpu.TIMED:
        rows.append(quantize_gpu.time_kernel(modules, *case, copies))
        quantize_gpu.print_row(rows[-1])
    return rows


def layers(arguments, peers):
    import layer_bench

    def found(name):
        result = {}
        for module in peers:
            if hasattr(module, name):
                result |= getattr(module, name)()
        return result

    def keep(rows):
        arguments.json.write_text(json.dumps(rows))

    return layer_bench.measure(found("linears"), found("ragged_dots"), arguments.layers, keep)


def steps(arguments, peers):
    path = pathlib.Path(tempfile.mkdtemp()) / "steps.json"
    command = [sys.executable, str(ROOT / "benchmarks/step_profile.py"), str(path)]
    command += ["--traces", str(arguments.traces)] if arguments.traces else []
    subprocess.run(command, check=True)
    return json.loads(path.read_text())["rows"]


# ---- All of it


def run_section(name, arguments):
    path = pathlib.Path(tempfile.mkdtemp()) / f"{name}.json"
    command = [sys.executable, __file__, str(arguments.out), "--child", name, "--json", str(path)]
    command += ["--flush", str(arguments.flush), "--repeats", str(arguments.repeats)]
    command += [f"--peer={p}" for p in arguments.peer]
    command += [f"--family={arguments.family}"] if arguments.family else []
    command += [f"--layers={arguments.layers}"]
    command += [f"--traces={arguments.traces}"] if arguments.traces else []
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    before = machine_state()
    try:
        code = subprocess.run(command, env=environment, timeout=arguments.limit).returncode
    except subprocess.TimeoutExpired:
        code = "timeout"  # what it had measured by then counts
    result = {"before": before, "after": machine_state(), "exit": code}
    if path.exists():
        result["results"] = json.loads(path.read_text())
    if code:
        print(f"{name} ended with {code}", flush=True)
    return result


def geomean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def ratio(row, peer):
    return row["microseconds"][peer] / row["microseconds"]["ours"]


def target_row(what, figure, peer, value, target):
    return {"what": what, "figure": figure, "peer": peer, "ratio": value, "target": target}


def dense_targets(of):
    """Products against every peer that was measured, and the best one against the data sheet."""
    six = [r for r in of("forward") if r["m"] == 4096 and r["n"] != 576]
    # DeepGEMM's weight gradient adds to its output: "zeroed" stores, as ours does.
    for peer in ("deepgemm", "deepgemm zeroed", "cublaslt block"):
        for family, some in (("forward", six), ("dgrad", of("dgrad")), ("wgrad", of("wgrad"))):
            some = [r for r in some if peer in r["microseconds"]]
            if some:
                yield target_row(
                    f"{family}, {len(some)} shapes, geometric mean, TFLOP/s",
                    geomean(r["tflops"]["ours"] for r in some),
                    f"{peer} {geomean(r['tflops'][peer] for r in some):.0f}",
                    geomean(ratio(r, peer) for r in some),
                    1.2 if family == "wgrad" else 1.05,
                )
    best = max((r["tflops"]["ours"] for r in of("forward")), default=None)
    if best:
        sheet, value = f"data sheet {FP8_PEAK}", best / FP8_PEAK
        yield target_row("forward, best shape, TFLOP/s", best, sheet, value, 1500 / FP8_PEAK)


def unequal_group_targets(of):
    """Groups of other sizes against equal ones of the same work."""
    for family, target in (("ragged", 0.97), ("ragged wgrad", 0.95)):
        base = None
        shares = {"U(0.7, 1.3)": [], "Zipf": []}
        count = 0
        for r in of(family):
            same = len(set(r["sizes"] or (0,))) == 1
            if same and (family == "ragged" or r["sizes"] is None):
                base, count = r["tflops"]["ours"], 0
            elif not same:
                shares["U(0.7, 1.3)" if count == 0 else "Zipf"].append(r["tflops"]["ours"] / base)
                count += 1
        twin = "own aligned groups" if family == "ragged" else "own dense, equal work"
        for kind, values in shares.items():
            if values:
                what, mean = f"{family}, {kind} groups, {len(values)} shapes", geomean(values)
                yield target_row(what, mean, twin, mean, target)


def grouped_targets(of):
    """Grouped and small products against every peer that was measured."""
    for family in ("ragged", "ragged wgrad", "masked", "inference"):
        for peer in ("deepgemm", "cublaslt block"):
            some = [r for r in of(family) if peer in r["microseconds"]]
            if some:
                figure = geomean(r["tflops"]["ours"] for r in some)
                value = geomean(ratio(r, peer) for r in some)
                yield target_row(f"{family}, {len(some)} shapes", figure, peer, value, 1.0)


def quantizer_targets(rows):
    """Quantizers against a copy."""
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        yield target_row(
            f"{row['kernel']} {shape}, GB/s",
            row["gb_per_s"],
            f"copy {row['copy_gb_per_s']:.0f}",
            row["of_copy"],
            0.9 if "_rows_" in row["kernel"] else 0.85,
        )


def layer_targets(rows):
    """Layers in FP8 against the others, forward and backward."""
    for row in rows:
        if row["mode"] != "train":
            continue
        for peer, milliseconds in row["ms"].items():
            if not peer.startswith("fp8"):
                yield target_row(
                    f"{row['case']}, forward and backward, ms",
                    row["ms"]["fp8"],
                    f"{peer} {milliseconds:.3f}",
                    milliseconds / row["ms"]["fp8"],
                    1.8 if "moe" in row["case"] else 1.75,
                )


def targets(result):
    """The rows of what is aimed at: figure, the peer's figure, ratio."""

    def section(name):
        return result["sections"].get(name, {}).get("results") or []

    def of(family):
        return [r for r in section("kernels") if r["family"] == family]

    return [
        *dense_targets(of),
        *unequal_group_targets(of),
        *grouped_targets(of),
        *quantizer_targets(section("quantizers")),
        *layer_targets(section("layers")),
    ]


def print_targets(rows):
    print(f"\n{'what':66} {'figure':>9}  {'peer':30} {'ratio':>6}  target")
    for row in rows:
        mark = "holds" if row["ratio"] >= row["target"] else "below"
        print(
            f"{row['what'][:66]:66} {row['figure']:9.4g}  {row['peer'][:30]:30} "
            f"{row['ratio']:6.3f}  {row['target']:.3f} {mark}"
        )


def plot(result, path):
    """Every kernel's measured point under the device's measured ceilings."""
    from matplotlib.figure import Figure

    ceiling = (result["sections"].get("ceilings") or {}).get("results")
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    markers = iter("osv^D<>pP*XhH8d")
    kernel = result["sections"].get("kernels", {}).get("results") or []
    for family in dict.fromkeys(r["family"] for r in kernel):
        rows = [r for r in kernel if r["family"] == family]
        x = [r["flops"] / r["bytes"] for r in rows]
        axes.plot(x, [r["tflops"]["ours"] for r in rows], next(markers), alpha=0.7, label=family)
    if ceiling:
        xs = [2**i for i in range(-1, 15)]
        slope = ceiling["copy_gb_per_s"] / 1e3
        axes.plot(
            xs,
            [min(x * slope, FP8_PEAK) for x in xs],
            color="gray",
            label="copy bandwidth, data sheet's FP8 peak",
        )
        axes.axhline(
            ceiling["fp8_tflops"], color="gray", linestyle="--", label="cuBLASLt per tensor, 8192^3"
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte of operands and results",
        ylabel="TFLOP/s",
        title=f"Products on {result['device']}, {result['date']}",
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--peer", action="append", default=[], help="a plug-in file")
    parser.add_argument("--family", help="kernels: only these families")
    parser.add_argument("--limit", type=float, help="seconds a section may take")
    parser.add_argument("--layers", default="", help="layers: only cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--flush", type=float, default=8.0, help="gigabytes written between launches"
    )
    parser.add_argument(
        "--traces", type=pathlib.Path, help="steps: keep the profiler's traces here"
    )
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        value = globals()[arguments.child](arguments, load_peers(arguments.peer))
        arguments.json.write_text(json.dumps(value))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    import importlib.metadata

    state = machine_state()
    commit = subprocess.run(
        "git describe --always --dirty || cat COMMIT",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    result = {
        "device": state.get("name"),
        "driver": state.get("driver_version"),
        "jax": importlib.metadata.version("jax"),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "sections": {},
    }
    name = f"speed-{str(result['device']).replace(' ', '-')}-{result['date']}.json"
    for section in arguments.sections.split(","):
        print(f"== {section}", flush=True)
        result["sections"][section] = run_section(section, arguments)
        result["targets"] = targets(result)
        (arguments.out / name).write_text(json.dumps(result, indent=1) + "\n")
    plot(result, arguments.out / "roofline.png")
    print_targets(result["targets"])


if __name__ == "__main__":
    main()
