"""The heuristic's configuration against the best of all of them, over 200 training shapes.

    python benchmarks/heuristic_check.py OUT.json [--shapes N] [--table TUNED.json]

Forward and input-gradient products, weight gradients and ragged products of the layers of eight models at four sizes of
batch. Prints how often the pick is within 5 % of the best; the JSON has every time. `--table` adds the configurations
that beat the heuristic's by more than 2 % to a table that jaxfp8.load_tuned reads, or begins one. Between launches
0.5 GB are written, which evicts L2.
"""

import argparse
import json
import pathlib
import random
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gemm_bench import Driver, Problem, Timer, cdiv, describe_device, use_installed  # noqa: E402
from speed import spread  # noqa: E402

from jaxfp8.kernels.configurations import Product, read_table, write_table  # noqa: E402

# (in, out) of the linear layers.
LAYERS = {
    "Llama-3 8B": [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)],
    "Llama-3 70B": [(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)],
    "Qwen-2.5 7B": [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)],
    "Gemma-2 9B": [(3584, 8192), (4096, 3584), (3584, 28672), (14336, 3584)],
    "GPT-3 13B": [(5120, 15360), (5120, 5120), (5120, 20480), (20480, 5120)],
    "DeepSeek-V3": [(7168, 2112), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168)],
    "OLMo 1B": [(2048, 6144), (2048, 2048), (2048, 16384), (8192, 2048)],
}  # fmt: skip
EXPERTS = {  # groups, in, out
    "Mixtral 8x7B": [(8, 4096, 28672), (8, 14336, 4096)],
    "DeepSeek-V3": [(8, 7168, 4096), (8, 2048, 7168), (32, 7168, 4096), (32, 2048, 7168)],
    "Qwen-3 30B": [(16, 2048, 1536), (16, 768, 2048), (128, 2048, 1536), (128, 768, 2048)],
}
TOKENS = (2048, 4096, 8192, 16384)


def problems(count):
    """The same `count` of them each time."""
    dense = [
        p
        for layers in LAYERS.values()
        for k, n in layers
        for m in TOKENS
        for p in (
            Problem("1d2d", m, n, k),
            Problem("1d2d", m, k, n),
            Problem("1d1d", k, n, m, out="float32"),
        )
    ]
    ragged = []
    for layers in EXPERTS.values():
        for groups, k, n in layers:
            for m in TOKENS[1:]:
                sizes = spread(groups, m // groups)
                tokens = cdiv(sum(sizes), 128) * 128 + 128 * groups
                ragged += [
                    Problem("grouped", sum(sizes), n, k, groups, sizes),
                    Problem("grouped", sum(sizes), k, n, groups, sizes),
                    Problem("grouped_wgrad", k, n, tokens, groups, sizes, out="float32"),
                ]
    distinct = {(p.kind, p.m, p.n, p.k, p.groups): p for p in dense + ragged}
    small = [p for p in distinct.values() if p.flops() < 3e12]
    return random.Random(0).sample(small, min(count, len(small)))


def prepare(driver, problem, tensors, config):
    sizes = (problem.m, problem.n, problem.k, problem.groups)
    return driver.prepare(problem.kind, *sizes, tensors, config=config)


def measure(driver, timer, problem):
    tensors = problem.operands()
    launches = {}
    for i, name in enumerate(driver.configs(problem.kind)):
        try:
            launches[name] = prepare(driver, problem, tensors, i)
        except ValueError:  # the configuration does not take this problem
            continue
    chosen = prepare(driver, problem, tensors, -1).plan
    picked = next(name for name, launch in launches.items() if launch.plan == chosen)
    times = timer(launches, 3)
    likely = [name for name, t in times.items() if t < 1.15 * min(times.values())]
    times |= timer({name: launches[name] for name in {*likely, picked}}, 9)
    best = min(times, key=times.get)
    return {
        **{f: getattr(problem, f) for f in ("kind", "m", "n", "k", "groups", "sizes")},
        "picked": picked,
        "best": best,
        "ratio": times[picked] / times[best],
        "microseconds": times,
    }


TABLE_KINDS = {
    "1d2d": "gemm_1d2d",
    "1d1d": "gemm_1d1d",
    "grouped": "grouped_gemm",
    "grouped_wgrad": "grouped_wgrad_gemm",
}


def add_to_table(path, device, rows):
    """Entries of every row where another configuration is more than 2 % faster than the heuristic's."""

    table = read_table(path) if path.exists() else {}
    products = table.setdefault(device, {})
    for row in rows:
        if row["ratio"] > 1.02:
            product = Product(
                TABLE_KINDS[row["kind"]],
                *(row[f] for f in ("m", "n", "k", "groups")),
                out_dtype="float32" if row["kind"] in ("1d1d", "grouped_wgrad") else "bfloat16",
            )
            products[product] = row["best"], row["microseconds"][row["best"]]
    write_table(path, table)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--table", type=pathlib.Path)
    arguments = parser.parse_args()
    import torch

    folder = pathlib.Path(tempfile.mkdtemp())
    use_installed(folder)
    driver, timer = Driver(folder), Timer(0.5)
    result = {"before": describe_device(), "rows": []}
    for problem in problems(arguments.shapes):
        row = measure(driver, timer, problem)
        result["rows"].append(row)
        if row["ratio"] > 1.05:
            print(
                f"{row['kind']} {row['m']}x{row['n']}x{row['k']} G{row['groups']}: picked {row['picked']}, "
                f"best {row['best']}, {row['ratio']:.3f}",
                flush=True,
            )
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(result) + "\n")
    ratios = sorted(row["ratio"] for row in result["rows"])
    within = sum(r <= 1.05 for r in ratios) / len(ratios)
    result |= {"after": describe_device(), "within_5_percent": within}
    arguments.out.write_text(json.dumps(result) + "\n")
    if arguments.table:
        add_to_table(arguments.table, torch.cuda.get_device_name(0), result["rows"])
    print(
        f"{len(ratios)} shapes: the pick is within 5 % of the best on {100 * within:.1f} %, "
        f"within 2 % on {100 * sum(r <= 1.02 for r in ratios) / len(ratios):.1f} %; worst {ratios[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
