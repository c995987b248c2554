"""Writes the figures of README.md and docs/performance.md from benchmarks/results, so that they cannot disagree.

    python benchmarks/readme.py [--check]

What stands between the two `measured` comments of each file is replaced: in docs/performance.md by the tables of the
newest speed-, step-, moe-, heuristic- and correct-*.json of each device and of train-cpu-*.json, in README.md by their
ratios alone. `--check` only compares. The plot of a speed-*.json stands in docs/images as roofline-DEVICE-DATE.png.
"""

import argparse
import json
import math
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: python benchmarks/readme.py writes this -->", "<!-- /measured -->"


def newest(pattern):
    """Contents of the newest matching result of each device, by device, the last measured first."""
    found = {}
    for path in sorted((ROOT / "benchmarks/results").glob(pattern)):
        result = json.loads(path.read_text())
        if result["device"] not in found or result["date"] >= found[result["device"]]["date"]:
            found[result["device"]] = result
    return dict(sorted(found.items(), key=lambda item: item[1]["date"], reverse=True))


def rows_of(result, section):
    return result["sections"].get(section, {}).get("results") or []


def geomean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


PEERS = {"cublaslt block": "cuBLASLt, same scaling", "deepgemm": "DeepGEMM", "torch bf16": "bf16"}
FAMILIES = {
    "forward": "forward, 128x128 weight blocks, bf16 out",
    "dgrad": "input gradient",
    "wgrad": "weight gradient, float32 out",
    "wgrad, accumulated": "weight gradient, added to float32",
    "ragged": "ragged groups, forward",
    "ragged wgrad": "ragged groups, weight gradient",
    "masked": "masked groups (ours also writes the zeros past the masks)",
    "inference": "1 to 128 rows",
}


def products(result):
    kernels = rows_of(result, "kernels")
    rows = []
    for family, name in FAMILIES.items():
        some = [r for r in kernels if r["family"] == family]
        if not some:
            continue
        times = [r["microseconds"] for r in some]
        cells = [name, str(len(some)), f"{geomean(r['tflops']['ours'] for r in some):.0f}"]
        cells.append(f"{max(r['tflops']['ours'] for r in some):.0f}")
        for peer in PEERS:
            ratios = [t[peer] / t["ours"] for t in times if peer in t]
            cells.append(f"{geomean(ratios):.2f}x ({len(ratios)})" if ratios else "")
            # DeepGEMM's weight gradient adds to its output, so that storing is zeroing and adding.
            zeroed = [t[f"{peer} zeroed"] / t["ours"] for t in times if f"{peer} zeroed" in t]
            if zeroed:
                cells[-1] += f"; {geomean(zeroed):.2f}x with its zeroing"
        rows.append(cells)
    header = ["products", "shapes", "TFLOP/s, geometric mean", "best"]
    return table(header + [f"over {name}" for name in PEERS.values()], rows)


def layers(result):
    rows = []
    for row in rows_of(result, "layers"):
        if row["mode"] == "train":
            peers = [f"{t / row['ms']['fp8']:.2f}x {p}" for p, t in row["ms"].items() if p != "fp8"]
            rows.append([row["case"], f"{row['ms']['fp8']:.2f}", ", ".join(peers)])
    return table(["layer, forward and backward", "FP8, ms", "speedup over"], rows)


def quantizers(result):
    groups = {}
    for row in rows_of(result, "quantizers"):
        kind = re.match(r"(?:quantize_)?(.*?)_(?:bf16|f16|f32)", row["kernel"]).group(1)
        groups.setdefault(kind, []).append(row["of_copy"])
    spans = [
        f"{kind.replace('_', ' ')} {min(v):.2f} to {max(v):.2f}"
        if len(v) > 1
        else f"{kind.replace('_', ' ')} {v[0]:.2f}"
        for kind, v in groups.items()
    ]
    return "; ".join(spans)


def wrap(text, width=120):
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def speed(result):
    ceiling = result["sections"].get("ceilings", {}).get("results") or {}
    text = f"## Speed on one {result['device']}"
    lines = [text, ""]
    lines += wrap(
        f"Driver {result['driver']}, CUDA {ceiling.get('cuda')}, jax {result['jax']}, torch {ceiling.get('torch')}, "
        f"{result['date']}, commit {result['commit']}; `python benchmarks/speed.py OUT`. Kernels: device time of "
        "single launches with a cold L2, clocks and power as found; peers in the same process on the same data; ratios "
        "are geometric means over the shapes that the peer takes. "
        f"Measured ceilings of this device: {ceiling.get('fp8_tflops', 0):.0f} TFLOP/s (cuBLASLt FP8, one scale a "
        f"tensor, 8192^3), {ceiling.get('bf16_tflops', 0):.0f} (bf16), "
        f"{ceiling.get('copy_gb_per_s', 0):.0f} GB/s (copy)."
    )
    lines += ["", *products(result), ""]
    plot = f"images/roofline-{result['device'].replace(' ', '-')}-{result['date']}.png"
    if (ROOT / "docs" / plot).exists():
        lines += [f"![Every product under the measured ceilings]({plot})", ""]
    if rows_of(result, "quantizers"):
        lines += wrap(f"Quantizers, of a device copy's bandwidth: {quantizers(result)}.") + [""]
    if rows_of(result, "layers"):
        text = "Layers through JAX, quantization included (tokens x in x out)"
        if any("tokamax tuned" in row["ms"] for row in rows_of(result, "layers")):
            text += "; tokamax tuned: its Mosaic kernels with the configurations of its table for an H100"
        lines += wrap(f"{text}:") + [""]
        lines += [*layers(result), ""]
    return lines


def over_bf16(name, results):
    """Speedup over the BF16 step of the same remat policy ("mlp, remat full": over "bf16, remat full")."""
    _, comma, policy = name.partition(",")
    return results[f"bf16{comma}{policy}"]["ms"] / results[name]["ms"]


def step(result):
    """benchmarks/step.py: variants of a training step, and remat policies."""
    model, results = result["model"], result["results"]
    lines = wrap(
        f"On one {result['device']} (jax {result['jax']}, {result['date']}, commit {result['commit']}; `python "
        f"benchmarks/step.py OUT.json`): {model['layers']} layers {model['width']} wide with {model['hidden']} hidden, "
        f"{model['batch']} x {model['sequence']} tokens, attention and head in bfloat16, AdamW with float32 masters. "
        "Peak: of XLA's plan."
    )
    header = ["step", "ms", "over BF16", "peak GiB"]
    rows = [
        [name, f"{r['ms']:.1f}", f"{over_bf16(name, results):.2f}x", f"{r['peak_gib']:.1f}"]
        for name, r in results.items()
    ]
    return [*lines, "", *table(header, rows), ""]


def blocks(result):
    """Mixture blocks, from the router's choice to the output, beside their products and the best BF16 peer."""
    lines = wrap(
        f"On one {result['device']} ({result['date']}), forward and backward, from the router's choice to the "
        "output, in ms: `moe` and the same block of `dispatch`, `ragged_mlp` and `combine` by wall time, in turns; the "
        "kernels of `moe` and its products alone by the profiler, in four steps of their own. BF16 is a block of "
        "sorted rows and the fastest peer that was installed."
    )
    header = [
        "mixture block",
        "moe",
        "pieces",
        "kernels of moe",
        "products",
        "kernels over products",
        "BF16",
    ]
    rows = [
        [
            r["name"],
            *(f"{r[key]:.2f}" for key in ("ms", "pieces_ms", "kernels_ms", "products_ms")),
            f"{r['kernels_ms'] / r['products_ms']:.2f}x",
            f"{r['bf16_ms']:.2f} ({r['bf16_side']})" if r["bf16_ms"] else "not in this run",
        ]
        for r in result["blocks"]
    ]
    return [*lines, "", *table(header, rows), ""]


def host_time(rows):
    """Of a call, from chains of 200 in step_profile.py's rows."""
    cpu = {
        (r["program"], r["mode"]): 1e3 * r["cpu_ms"] / 200 for r in rows if "200" in r["program"]
    }
    ours, xla = "chain of 200 products", "chain of 200 XLA fusions"
    return (
        f"Host time of a product in a jitted chain of 200: {cpu[ours, 'launches']:.1f} us as single launches, where "
        f"a fusion of XLA's own takes {cpu[xla, 'launches']:.1f}; {cpu[ours, 'command buffers']:.1f} us in a command "
        "buffer, which is XLA's default."
    )


def correctness(result):
    errors = result["errors"]
    by_input = {
        kind: max(r["norm_wise"] for r in errors if r["inputs"] == kind)
        for kind in ("normal", "positive", "outliers")
    }
    element = max(r["element"]["max"] for r in errors)
    tests = [
        f"{name} ({step['result'].split(' in ')[0]})"
        for name, step in result["steps"].items()
        if re.search(r"\d+ passed", step["result"])
    ]
    clean = [n for n, step in result["steps"].items() if n.endswith("check") and not step["exit"]]
    lines = wrap(
        f"On one {result['device']} (driver {result['driver']}, jax {result['jax']}, {result['date']}, commit "
        f"{result['commit']}; `tests/gpu_check.sh OUT`): at most {by_input['normal']:.1e} for zero-mean data, "
        f"{by_input['positive']:.1e} where all products have one sign, {by_input['outliers']:.1e} with outliers; any "
        f"one element within {element:.1e} of sum |lhs| |rhs|. GPU tests: {', '.join(tests)}. Clean under "
        f"compute-sanitizer: {', '.join(sorted(clean))}."
    )
    lines += ["", *wrap(host_time(result["step"]["rows"]))]
    if notes := result.get("notes"):
        lines += ["", *wrap(" ".join(notes))]
    for kind, summary in result["train"].items():
        name = "mixture of experts" if "moe" in kind else "dense"
        bf16, fp8 = (summary[n]["mean_validation_loss"] for n in ("bf16", "fp8"))
        lines += [""] * (kind == "train") + wrap(
            f"`examples/train_lm.py --size {summary['settings']['size']}`, {name}, {summary['parameters'] / 1e6:.0f} M "
            f"parameters, {summary['settings']['steps']} steps on the GPU: validation loss {bf16:.4f} "
            f"in BF16, {fp8:.4f} in FP8, relative error {100 * summary['relative_loss_error']:.2f} %."
        )
    return [*lines, ""]


def training(result):
    cells = {}
    for run in result["runs"]:
        cells.setdefault(run["model"], []).append(f"{100 * run['signed_relative_loss_error']:+.2f}")
    parts = [
        f"{model} {', '.join(v)} % (mean of the absolute errors "
        f"{100 * result['mean_relative_loss_error'][model]:.2f} %)"
        for model, v in cells.items()
    ]
    return [
        *wrap(
            "Default models of `examples/train_lm.py` on a CPU, seeds 0, 1 and 2, validation loss of FP8 against BF16 "
            f"(mean of the last quarter of the evaluations): {'; '.join(parts)}."
        ),
        "",
    ]


def measured():
    lines = []
    for result in newest("speed-NVIDIA-*.json").values():
        lines += speed(result)
    for title, section, *patterns in (
        ("A training step", step, "step-NVIDIA-*.json", "step-remat-NVIDIA-*.json"),
        ("Mixture blocks", blocks, "moe-NVIDIA-*.json"),
    ):
        found = [result for pattern in patterns for result in newest(pattern).values()]
        lines += [f"## {title}", ""] if found else []
        for result in found:
            lines += section(result)
    for result in newest("heuristic-NVIDIA-*.json").values():
        lines += wrap(
            f"The heuristic's configuration on one {result['device']}: within 5 % of the best of all on "
            f"{100 * result['within_5_percent']:.1f} % of {len(result['rows'])} training shapes "
            "(`benchmarks/heuristic_check.py`); the package's table of configurations holds the others."
        ) + [""]
    lines += ["## Accuracy", ""]
    lines += wrap(
        "Quantization has the same bits on every platform. The error of products is given norm-wise, against float64 "
        "on the dequantized inputs, K = 32 to 16384. The tensor core keeps 14 bits inside a block of 128; the emulator "
        "of the tests has that arithmetic to the bit. The portable lowering is within 2e-6."
    ) + [""]
    for result in newest("correct-NVIDIA-*.json").values():
        lines += correctness(result)
    for result in newest("train-cpu-*.json").values():
        lines += training(result)
    return "\n".join(lines).strip()


# ------------------------------------------------------------------------------------------------
# The README: ratios alone
# ------------------------------------------------------------------------------------------------


def layer_gain(result, peer, mixtures):
    """Least and largest ratio to `peer` of the layers that are (or are not) mixtures, forward and backward."""
    ratios = [
        row["ms"][peer] / row["ms"]["fp8"]
        for row in rows_of(result, "layers")
        if row["mode"] == "train" and peer in row["ms"] and mixtures == ("experts" in row["case"])
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}x" if ratios else "not measured"


def product_gain(result, peer):
    ratios = []
    for family in ("forward", "wgrad"):
        times = [r["microseconds"] for r in rows_of(result, "kernels") if r["family"] == family]
        ratios.append(f"{geomean(t[peer] / t['ours'] for t in times if peer in t):.2f}x")
    return ", ".join(ratios)


def loss_gain(result):
    """The loss after trainings in FP8 against BF16, and of BF16 against a twin that differs by chance."""
    return "; ".join(
        f"{'mixture' if 'moe' in kind else 'dense'} {100 * summary['relative_loss_difference']:+.2f} % "
        f"(two BF16 runs {100 * summary['relative_loss_noise']:.2f} %)"
        for kind, summary in (result or {}).get("train", {}).items()
    )


def step_gain(result):
    """Ratios to BF16 of a training step's FP8 variants without remat."""
    results = result["results"] if result else {}
    ratios = [over_bf16(name, results) for name in results if "," not in name and name != "bf16"]
    return f"{min(ratios):.2f} to {max(ratios):.2f}x" if ratios else "not measured"


def gains():
    """The README's table: a column a device, a row what a user asks first."""
    speeds = newest("speed-NVIDIA-*.json")
    steps, trained = newest("step-NVIDIA-*.json"), newest("correct-NVIDIA-*.json")
    rows = {
        "training step of Llama-3-8B's width over BF16": [step_gain(steps.get(d)) for d in speeds],
        "linear and SwiGLU layers over XLA's BF16": [
            layer_gain(r, "XLA bf16", False) for r in speeds.values()
        ],
        "mixtures of experts over tokamax's tuned BF16": [
            layer_gain(r, "tokamax tuned", True) for r in speeds.values()
        ],
        "products alone over DeepGEMM: forward, weight gradient": [
            product_gain(r, "deepgemm") for r in speeds.values()
        ],
        "over cuBLASLt, same scaling: forward, weight gradient": [
            product_gain(r, "cublaslt block") for r in speeds.values()
        ],
        "validation loss, FP8 to BF16": [
            loss_gain(trained.get(d)) or "not measured" for d in speeds
        ],
    }
    header = ["", *(device.removeprefix("NVIDIA ") for device in speeds)]
    some = [[name, *cells] for name, cells in rows.items() if set(cells) != {"not measured"}]
    return "\n".join(table(header, some))


WRITTEN = {"README.md": gains, "docs/performance.md": measured}


def written():
    """Each file that holds figures: its path, and its text with the figures that the results say."""
    texts = {}
    for name, figures in WRITTEN.items():
        text = (ROOT / name).read_text()
        begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
        texts[ROOT / name] = f"{text[:begin]}\n{figures()}\n{text[end:]}"
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in written().items():
        if not check:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(
                f"{path.name} differs from benchmarks/results: run python benchmarks/readme.py"
            )


if __name__ == "__main__":
    main()
