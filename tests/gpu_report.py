"""The table and the JSON at the end of tests/gpu_check.sh, from what its steps left behind."""

import datetime
import json
import pathlib
import platform
import re
import subprocess
import sys


def load(path):
    return json.loads(path.read_text()) if path.exists() else None


def version(command, pattern):
    text = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    found = re.search(pattern, text)
    return found.group(1) if found else None


def machine():
    query = "nvidia-smi --query-gpu=name,driver_version --format=csv,noheader"
    jax_version = "python3 -c 'import jax; print(jax.__version__)'"
    return {
        "device": version(query, "(.*?),"),
        "driver": version(query, ", *(.*)"),
        "cuda": version("nvcc --version", r"release ([\d.]+)"),
        "jax": version(jax_version, r"([\d.]+)"),
        "python": platform.python_version(),
        "commit": version("git describe --always --dirty || cat COMMIT", "(.+)"),
        "date": datetime.date.today().isoformat(),
    }


def last_line(path):
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""


NO_SUMMARY = 125  # as an exit code: a tool that lost its program has been seen to end with 0


def result_of(name, code, log):
    """The exit code of a step, and what its log says of its result."""
    if not name.endswith("check"):
        return code, last_line(log)
    text = log.read_text(errors="replace")
    found = re.findall(r"=========\s+((?:ERROR|RACECHECK) SUMMARY.*)", text)
    checked = re.findall(r"\d+ products, .*", text)
    line = "; ".join(found[-1:] + checked[-1:]) or last_line(log)
    return code or (0 if found and checked else NO_SUMMARY), line


def main():
    out = pathlib.Path(sys.argv[1])
    steps = {}
    for status in sorted(out.glob("*.status"), key=lambda p: p.stat().st_mtime):
        name, code, seconds = status.read_text().split()
        code, line = result_of(name, int(code), out / f"{name}.log")
        line = line.replace(f"{out}/", "")
        steps[name] = {"exit": code, "seconds": int(seconds), "result": line}
    result = machine() | {"steps": steps, "train": {}}
    for kind in ("train", "train_moe"):
        if summary := load(out / kind / "summary.json"):
            result["train"][kind] = summary
    if errors := load(out / "errors.json"):
        result["errors"] = errors["errors"]
        result["largest_norm_wise_error"] = max(row["norm_wise"] for row in errors["errors"])
    if step := load(out / "step.json"):
        result["step"] = step
    name = f"correct-{(result['device'] or 'none').replace(' ', '-')}-{result['date']}.json"
    (out / name).write_text(json.dumps(result, indent=1) + "\n")

    print(", ".join(f"{k} {v}" for k, v in result.items() if isinstance(v, str)))
    for name, step in steps.items():
        state = "ok" if step["exit"] == 0 else f"FAILED {step['exit']}"
        print(f"{name:10} {state:11} {step['seconds']:4} s   {step['result'][:110]}")
    for kind, summary in result["train"].items():
        print(f"{kind:10} relative loss error {100 * summary['relative_loss_error']:+.3f} %")
    sys.exit(any(step["exit"] for step in steps.values()))


if __name__ == "__main__":
    main()
