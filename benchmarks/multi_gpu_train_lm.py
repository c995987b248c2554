"""train_lm on meshes of several GPUs: the loss of one device, step time and scaling, FP8 beside BF16.

    python benchmarks/multi_gpu_train_lm.py OUT.json [--size medium] [--steps 100] [--devices 1,2,4,8]

Each run is `examples/train_lm.py --mesh ...` in a process of its own; FP8 and BF16 train side by side in it, on one
mesh. Strong scaling keeps the batch, and must keep the loss of one device; weak scaling (data) grows it with the
devices. On a CPU, JAX_NUM_CPU_DEVICES=8 makes the devices.

A mesh that cannot cut the model is left out, with its reason: FSDP wants 128 columns of the model's width on each
device (medium: 4 devices, large: 8), tensor parallelism a head (small: 4, medium: 8). Larger sizes have those meshes.
"""

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


MIXTURE = ["--moe", "--experts", "8"]


def meshes(n):
    """Parallelism to train_lm's options, on n devices."""
    found = {
        "data": ["--mesh", f"data={n}"],
        "FSDP": ["--mesh", f"data={n}", "--fsdp"],
        "tensor": ["--mesh", f"model={n}"],
        "expert": ["--mesh", f"expert={n}", *MIXTURE],
    }
    if n >= 4:
        found["FSDP and tensor"] = ["--mesh", f"data={n // 2},model=2", "--fsdp"]
    return found


def train(options, limit):
    """The summary of one run, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples/train_lm.py"), "--out", folder, *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"error": f"over {limit} s"}
        path = pathlib.Path(folder, "summary.json")
        if done.returncode or not path.exists():
            message = (done.stderr or done.stdout).strip()
            refused = message.startswith("train_lm: ") and "must divide" in message
            if refused:
                return {"left_out": message}
            return {"error": f"exit status {done.returncode}: {message[-400:]}"}  # -9: killed
        summary = json.loads(path.read_text())
    return {
        "device": summary["device"],
        "jax": summary["jax"],
        "relative_loss_error": summary["relative_loss_error"],
        **{
            side: {
                "loss": summary[side]["mean_validation_loss"],
                "tokens_per_second": summary[side]["tokens_per_second"],
            }
            for side in ("bf16", "fp8")
        },
    }


def measure(arguments):
    common = ["--size", arguments.size, "--steps", str(arguments.steps), "--evaluations", "4"]
    batch = arguments.batch
    rows, one = [], {}
    for n in arguments.devices:
        kinds = {"one": [], "one, mixture": MIXTURE} if n == 1 else meshes(n)
        for kind, options in kinds.items():
            for scaling in ("strong", "weak") if kind == "data" else ("strong",):
                size = batch * n if scaling == "weak" else batch
                result = train([*common, "--batch", str(size), *options], arguments.limit)
                row = {
                    "devices": n,
                    "parallelism": kind,
                    "scaling": scaling,
                    "batch": size,
                    **result,
                }
                if "device" in row:
                    base = (
                        one.setdefault("--moe" in options, row)
                        if n == 1
                        else one.get("--moe" in options)
                    )
                    if base is not None:
                        compare(row, base, n)
                rows.append(row)
                print_row(row)
    return rows


def compare(row, base, n):
    """Loss against one device's, and tokens a second against n times its."""
    for side in ("bf16", "fp8"):
        row[side]["efficiency"] = row[side]["tokens_per_second"] / (
            n * base[side]["tokens_per_second"]
        )
        if row["scaling"] == "strong":
            row[side]["loss_against_one"] = row[side]["loss"] / base[side]["loss"] - 1
    row["speedup_of_fp8"] = row["fp8"]["tokens_per_second"] / row["bf16"]["tokens_per_second"]


def print_row(row):
    name = f"{row['devices']} x {row['parallelism']}, {row['scaling']}"
    for outcome, text in (("left_out", "LEFT OUT"), ("error", "FAILED")):
        if outcome in row:
            print(f"{name:34} {text} {row[outcome]}", flush=True)
            return
    cells = []
    for side in ("fp8", "bf16"):
        result = row[side]
        cell = f"{side} {result['tokens_per_second']:,.0f} tokens/s, loss {result['loss']:.4f}"
        if "loss_against_one" in result:
            cell += f" ({100 * result['loss_against_one']:+.3f} %)"
        if "efficiency" in result:
            cell += f", efficiency {result['efficiency']:.2f}"
        cells.append(cell)
    print(f"{name:34} {'; '.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--size", default="medium")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="windows a step, of one device")
    parser.add_argument("--devices", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2])
    parser.add_argument("--limit", type=float, default=200, help="seconds a run may take")
    arguments = parser.parse_args()
    rows = measure(arguments)
    device = next((r["device"] for r in rows if "device" in r), None)
    result = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
