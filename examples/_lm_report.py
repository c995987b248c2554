"""What train_lm shows and writes: products, progress, the comparison, curves and summary."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxfp8

console = Console(highlight=False, soft_wrap=True)


def environment() -> dict[str, str]:
    """What every summary says of where its figures were made."""
    return {
        "jax": jax.__version__,
        "jaxfp8": jaxfp8.__version__,
        "device": jax.devices()[0].device_kind,
    }


# ------------------------------------------------------------------------------------------------
# Which products run in which precision: read in the traced training step, not promised
# ------------------------------------------------------------------------------------------------


def list_products(step, names: tuple[str, ...], *args) -> list[dict[str, Any]]:
    """The products in the trace of `step(*args)`, by the `jax.named_scope` that made them.

    **Arguments:**

    - `step`: a function that computes a loss and its gradients.
    - `names`: the scopes to look for.

    **Returns:** for each name in the order of appearance: dtypes of the operands of its products
    `forward` and `backward`, `count` of its products in one step, `flops` of those forward.
    """
    found: dict[str, dict[str, Any]] = {}

    def visit(jaxpr, stack: str, times: int) -> None:
        for eqn in jaxpr.eqns:
            inner = f"{stack}/{eqn.source_info.name_stack}"
            if (depth := _contraction(eqn)) is not None:
                backward = "transpose(" in inner
                name = next((n for n in names if n in inner.replace("(", "/").split("/")), None)
                name = name or next((n for n in names if f"({n})" in inner), "other")
                entry = found.setdefault(
                    name, {"name": name, "forward": [], "backward": [], "count": 0, "flops": 0}
                )
                arrays = [v.aval for v in eqn.invars if v.aval.dtype != np.int32]
                # A quantized operand is followed by its scales.
                lhs, rhs = (arrays[0], arrays[2]) if len(arrays) > 2 else arrays
                operands = f"{_short(lhs.dtype)} x {_short(rhs.dtype)}"
                kind = entry["backward" if backward else "forward"]
                if operands not in kind:
                    kind.append(operands)
                entry["count"] += times
                if not backward:
                    entry["flops"] += 2 * times * depth * math.prod(eqn.outvars[0].aval.shape)
            elif not eqn.primitive.name.startswith("jaxfp8"):
                repeat = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
                for sub in _subjaxprs(eqn.params.values()):
                    visit(sub, inner, repeat)

    visit(jax.make_jaxpr(step)(*args).jaxpr, "", 1)
    return list(found.values())


def _contraction(eqn) -> int | None:
    """Length of the contraction of a product; None if the equation is no product."""
    name, lhs = eqn.primitive.name, eqn.invars[0].aval if eqn.invars else None
    if name == "dot_general":
        (axes, _), _ = eqn.params["dimension_numbers"]
        return math.prod(lhs.shape[i] for i in axes)
    if name == "ragged_dot_general":
        (axes, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        return math.prod(lhs.shape[i] for i in axes)
    if name.startswith("jaxfp8") and "gemm" in name:
        return lhs.shape[-1]
    return None


def _subjaxprs(params):
    for value in params:
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr"):
                yield item.jaxpr


_SHORT = {
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
}


def _short(dtype) -> str:
    return _SHORT.get(str(dtype), str(dtype))


def is_fp8(product: dict[str, Any]) -> bool:
    pairs = (operands.split(" x ") for operands in product["forward"] + product["backward"])
    return all(dtype in ("e4m3", "e5m2") for pair in pairs for dtype in pair)


def product_table(products: list[dict[str, Any]]) -> Table:
    table = Table(title="Products of one FP8 training step")
    for heading, justify in [
        ("product", "left"),
        ("in FP8", "left"),
        ("forward", "left"),
        ("backward", "left"),
        ("count", "right"),
        ("forward FLOPs", "right"),
    ]:
        table.add_column(heading, justify=justify)
    total = sum(p["flops"] for p in products)
    for p in products:
        table.add_row(
            p["name"],
            "yes" if is_fp8(p) else "-",
            "\n".join(p["forward"]),
            "\n".join(p["backward"]),
            str(p["count"]),
            f"{p['flops'] / total:.1%}",
        )
    return table


# ------------------------------------------------------------------------------------------------
# Progress
# ------------------------------------------------------------------------------------------------


def progress_bar() -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
    )


def progress_text(histories: dict[str, History]) -> str:
    return "  ".join(
        f"[bold]{name}[/] loss {h.train_loss[-1]:.3f} {h.tokens_per_second:,.0f} tokens/s"
        for name, h in histories.items()
    )


def print_evaluation(step: int, histories: dict[str, History]) -> None:
    losses = {name: history.validation_loss[-1] for name, history in histories.items()}
    bf16 = losses.pop("bf16")
    others = (f"{name} {loss:.4f}  ({loss / bf16 - 1:+.3%})" for name, loss in losses.items())
    console.print(f"step {step:5d}  validation loss  bf16 {bf16:.4f}", *others, sep="  ")


class History:
    """Losses and time of one training run, as plain data that a checkpoint can hold."""

    def __init__(self, saved: dict[str, Any] | None = None):
        saved = saved or {}
        self.train_loss: list[float] = saved.get("train_loss", [])
        self.validation_loss: list[float] = saved.get("validation_loss", [])
        self.seconds: float = saved.get("seconds", 0.0)
        self.tokens: int = saved.get("tokens", 0)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan


# ------------------------------------------------------------------------------------------------
# The comparison
# ------------------------------------------------------------------------------------------------


TWIN = "bf16_twin"


def relative_difference(histories: dict[str, History], name: str) -> np.ndarray:
    """Of a run's validation losses and BF16's."""
    bf16, other = (np.array(histories[n].validation_loss) for n in ("bf16", name))
    return (other - bf16) / bf16


def compare(
    steps: list[int], histories: dict[str, History], unigram: float, products: list[dict]
) -> dict[str, Any]:
    """The summary: losses in nats a byte, means over the last quarter of the evaluations.

    `relative_loss_error` is the mean of |FP8 - BF16| / BF16; `relative_loss_difference` keeps the
    sign. With a BF16 twin, `relative_loss_noise` is its error.
    """
    last = max(1, len(steps) // 4)
    difference = relative_difference(histories, "fp8")[-last:]
    summary: dict[str, Any] = {
        "relative_loss_error": float(np.mean(np.abs(difference))),
        "relative_loss_difference": float(np.mean(difference)),
        "evaluations": len(steps),
        "evaluations_in_mean": last,
        "unigram_loss": unigram,
    }
    if TWIN in histories:
        noise = relative_difference(histories, TWIN)[-last:]
        summary["relative_loss_noise"] = float(np.mean(np.abs(noise)))
    for name, history in histories.items():
        summary[name] = {
            "first_validation_loss": history.validation_loss[0],
            "final_validation_loss": history.validation_loss[-1],
            "mean_validation_loss": float(np.mean(history.validation_loss[-last:])),
            "final_bits_per_byte": history.validation_loss[-1] / math.log(2),
            "tokens_per_second": history.tokens_per_second,
            "train_seconds": history.seconds,
        }
    summary["fp8_products"] = [p["name"] for p in products if is_fp8(p)]
    summary["high_precision_products"] = [p["name"] for p in products if not is_fp8(p)]
    summary["products"] = products
    return summary


def comparison_table(summary: dict[str, Any]) -> Table:
    table = Table(title="Validation loss, nats a byte")
    table.add_column("")
    table.add_column("BF16", justify="right")
    table.add_column("FP8", justify="right")
    bf16, fp8 = summary["bf16"], summary["fp8"]
    last = summary["evaluations_in_mean"]
    for label, key, form in [
        ("final", "final_validation_loss", ".4f"),
        (f"mean of the last {last} evaluations", "mean_validation_loss", ".4f"),
        ("final, bits a byte", "final_bits_per_byte", ".4f"),
        ("training tokens a second", "tokens_per_second", ",.0f"),
    ]:
        table.add_row(label, f"{bf16[key]:{form}}", f"{fp8[key]:{form}}")
    table.add_section()
    table.add_row("byte frequencies alone (unigram)", f"{summary['unigram_loss']:.4f}", "")
    table.add_row(
        f"[bold]relative loss error[/], mean of the last {last}",
        "",
        f"[bold]{summary['relative_loss_error']:.3%}[/]",
    )
    if "relative_loss_noise" in summary:
        noise = f"{summary['relative_loss_noise']:.3%}"
        table.add_row("that of a BF16 twin: chance", noise, "")
    return table


def write(
    out: pathlib.Path,
    steps: list[int],
    histories: dict[str, History],
    summary: dict[str, Any],
    sample: str,
) -> None:
    """loss.png, curves.json, summary.json and sample.txt into the directory `out`."""
    curves = {"evaluation_steps": steps, **{n: h.to_json() for n, h in histories.items()}}
    (out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (out / "sample.txt").write_text(sample, encoding="utf-8")
    _plot(steps, histories, summary).savefig(out / "loss.png", dpi=120)


def _plot(steps: list[int], histories: dict[str, History], summary: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    loss, error = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    styles = {"bf16": ("tab:blue", "-"), "fp8": ("tab:orange", "--"), TWIN: ("tab:gray", ":")}
    for name, history in histories.items():
        color, line = styles[name]
        loss.plot(
            range(1, len(history.train_loss) + 1), history.train_loss, color=color, alpha=0.25
        )
        loss.plot(
            steps,
            history.validation_loss,
            line,
            color=color,
            marker="o",
            label=f"{name.upper()}, validation",
        )
    loss.axhline(summary["unigram_loss"], color="gray", linestyle=":", label="unigram")
    loss.set_ylabel("loss (nats a byte)")
    loss.legend()
    for name in histories.keys() - {"bf16"}:
        color, line = styles[name]
        error.plot(steps, 100 * relative_difference(histories, name), line, color=color, marker="o")
    error.axhspan(-0.25, 0.25, color="gray", alpha=0.2, label="within 0.25 %")
    error.legend()
    error.xaxis.set_major_locator(MaxNLocator(integer=True))
    error.set_ylabel("against BF16 (%)")
    error.set_xlabel("step")
    return figure


def sample_text(rows) -> str:
    """Generated rows of bytes as text; control and non-ASCII bytes are escaped."""
    texts = ["".join(map(_printable, row)) for row in rows]
    return "\n\n----\n\n".join(texts) + "\n"


def _printable(byte: int) -> str:
    character = chr(byte)
    return character if character in "\n\t" or 32 <= byte < 127 else f"\\x{byte:02x}"
