"""What the benchmarks measure and report, as far as it needs no GPU."""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import counters  # noqa: E402
import heuristic_check  # noqa: E402
import moe  # noqa: E402
import multi_gpu  # noqa: E402
import multi_gpu_common  # noqa: E402
import multi_gpu_step  # noqa: E402
import multi_gpu_train_lm  # noqa: E402
import readme  # noqa: E402
import speed  # noqa: E402
import step  # noqa: E402

from tests import gpu_report  # noqa: E402


def test_readme_and_performance_page_say_what_the_results_say():
    for path, text in readme.written().items():
        assert path.read_text() == text, "run python benchmarks/readme.py"


def test_steps_and_mixture_blocks_become_rows_of_ratios():
    model = {"layers": 4, "width": 4096, "hidden": 14336, "batch": 4, "sequence": 4096}
    result = {"device": "a GPU", "date": "today", "jax": "1", "commit": "c0ffee", "model": model}
    ms = {"bf16": 210.0, "mlp": 150.0, "bf16, remat full": 230.0, "mlp, remat full": 184.0}
    results = {name: {"ms": t, "peak_gib": 30.04} for name, t in ms.items()}
    rows = readme.step(result | {"results": results})
    assert "| mlp | 150.0 | 1.40x | 30.0 |" in rows
    assert "| mlp, remat full | 184.0 | 1.25x | 30.0 |" in rows  # over BF16 under the same policy
    assert readme.step_gain({"results": results}) == "1.40 to 1.40x"  # without remat
    block = {
        "name": "32 experts",
        "ms": 22.0,
        "pieces_ms": 23.0,
        "kernels_ms": 20.0,
        "products_ms": 16.0,
    }
    for peer, text in (((55.0, "tokamax"), "55.00 (tokamax)"), ((None, None), "not in this run")):
        bf16 = dict(zip(("bf16_ms", "bf16_side"), peer, strict=True))
        rows = readme.blocks(result | {"blocks": [block | bf16]})
        assert f"| 32 experts | 22.00 | 23.00 | 20.00 | 16.00 | 1.25x | {text} |" in rows


def test_every_shape_of_deepgemms_lists_is_measured():
    problems = speed.kernel_problems()
    for m, family in ((4096, "forward"), (128, "inference"), (1, "inference")):
        assert {(p.n, p.k) for p in problems[family] if p.m == m} >= set(speed.DEEPSEEK)
    for family, groups in (("ragged", {4, 8}), ("masked", {6, 32})):
        measured = {(p.groups, p.n, p.k) for p in problems[family]}
        assert measured >= {(g, n, k) for g in groups for n, k in speed.GROUPED}
    assert {p.groups for p in problems["ragged wgrad"]} == {4, 8, 16}


def test_bytes_are_each_operand_and_the_result_once():
    from gemm_bench import Problem

    dense = Problem("1d2d", 256, 384, 512)
    scales = 4 * (256 * 4 + 3 * 4)
    assert speed.problem_bytes(dense) == 256 * 512 + 384 * 512 + scales + 2 * 256 * 384
    sizes = (100, 0, 28)
    ragged = Problem("grouped", 200, 384, 512, 3, sizes)  # rows past the groups, an empty group
    scales = 4 * (128 * 4 + 2 * 3 * 4)
    assert speed.problem_bytes(ragged) == 128 * 512 + 2 * 384 * 512 + scales + 2 * 128 * 384


def test_a_ragged_ratio_is_against_the_aligned_twin_of_the_same_shape():
    rows = [
        {"family": "ragged", "sizes": s, "tflops": {"ours": t}, "microseconds": {"ours": 1.0}}
        for s, t in (((8, 8), 100), ((7, 9), 98), ((12, 4), 90), ((6, 6), 200), ((5, 7), 190), ((8, 4), 150))
    ]  # fmt: skip
    result = {"sections": {"kernels": {"results": rows}}}
    found = {row["what"]: row["ratio"] for row in speed.targets(result)}
    assert found["ragged, U(0.7, 1.3) groups, 2 shapes"] == pytest.approx((0.98 * 0.95) ** 0.5)
    assert found["ragged, Zipf groups, 2 shapes"] == pytest.approx((0.9 * 0.75) ** 0.5)


def test_the_heuristic_is_held_to_200_distinct_shapes():
    problems = heuristic_check.problems(200)
    assert len({(p.kind, p.m, p.n, p.k, p.groups) for p in problems}) == 200
    assert problems == heuristic_check.problems(200)
    assert {p.kind for p in problems} == {"1d2d", "1d1d", "grouped", "grouped_wgrad"}


def test_a_counter_report_is_read_in_the_order_of_the_launches():
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = ["ID", "Kernel Name", *counters.COUNTERS.values(), stall.format("barrier")]
    names.append(stall.format("wait"))
    lines = [names, [""] * len(names)]
    for i, kernel in enumerate(("gemm_1d2d_x", "quantize_rows_y")):
        lines.append([str(i), kernel, *[f"1,00{i}.5"] * len(counters.COUNTERS), "0.5", "2"])
    text = "==PROF==\n" + "\n".join(",".join(f'"{v}"' for v in line) for line in lines)
    first, second = counters.read(text, [{"case": "a"}, {"case": "b"}])
    assert (first["case"], first["kernel"]) == ("a", "gemm_1d2d_x")
    assert second["tensor_pipe_percent"] == 1001.5
    assert list(second["stalls"].items()) == [("wait", 2.0), ("barrier", 0.5)]


def test_several_gpus_are_compared_with_one_and_what_does_not_fit_is_left_out(monkeypatch, capsys):
    """Not an error of the measurement, which fails the whole run; what was not compared says no figure."""

    def run(command, **_):
        options = " ".join(command)
        done = subprocess.CompletedProcess(command, 0, "", "")
        if "--fsdp" in options:
            done.returncode = 1
            done.stderr = "train_lm: 128 times data is 256; it must divide the model's width"
        elif "model=2" in options:
            done.returncode, done.stderr = 1, "out of memory"
        else:
            out = pathlib.Path(command[command.index("--out") + 1])
            devices = 2 if "--mesh" in options else 1
            loss = 2.0 if devices == 1 else 2.02
            side = {"mean_validation_loss": loss, "tokens_per_second": 90.0 * devices}
            summary = {"device": "d", "jax": "j", "relative_loss_error": 0.0}
            (out / "summary.json").write_text(json.dumps(summary | {"bf16": side, "fp8": side}))
        return done

    monkeypatch.setattr(subprocess, "run", run)
    settings = argparse.Namespace(size="tiny", steps=4, batch=8, devices=[1, 2], limit=9)
    rows = multi_gpu_train_lm.measure(settings)
    by = {(r["devices"], r["parallelism"], r["scaling"]): r for r in rows}
    assert "must divide" in by[2, "FSDP", "strong"]["left_out"]
    assert by[2, "tensor", "strong"]["error"] == "exit status 1: out of memory"
    strong, weak = by[2, "data", "strong"], by[2, "data", "weak"]
    assert strong["fp8"]["efficiency"] == weak["fp8"]["efficiency"] == 1
    assert strong["fp8"]["loss_against_one"] == pytest.approx(0.01)
    assert "loss_against_one" not in weak["fp8"] and weak["batch"] == 16
    capsys.readouterr()
    multi_gpu_train_lm.measure(argparse.Namespace(**vars(settings) | {"devices": [2]}))
    text = capsys.readouterr().out
    assert (
        "efficiency" not in text
        and "LEFT OUT" in text
        and "FAILED exit status 1: out of memory" in text
    )


def test_exposed_is_what_no_other_kernel_runs_beside():
    ours, others = [(0, 10), (20, 30), (25, 40)], [(5, 22), (50, 60)]
    assert multi_gpu_common.covered(ours) == 30
    exposed = multi_gpu_common.covered(ours + others) - multi_gpu_common.covered(others)
    assert exposed == 5 + 18  # 0 to 5, 22 to 40


def test_what_does_not_fit_the_time_is_left_out_and_said(capsys):
    budget = multi_gpu.Budget(100)
    assert budget.allows(50, "this") and not budget.allows(200, "that")
    assert capsys.readouterr().out == "LEFT OUT that: it may take 200 s\n"


def test_fsdp_cuts_the_models_width_and_tensor_parallelism_heads_and_hidden_units():
    model = multi_gpu_step.step.TINY
    params = jax.eval_shape(functools.partial(multi_gpu_step.step.init, model), jax.random.key(0))
    for cut, size in ((multi_gpu_step.WIDTH_CUT, model.width), (multi_gpu_step.HIDDEN_CUT, None)):
        specs = multi_gpu_step.specs_of({"moments": params}, cut)["moments"]
        flat = {**specs, **specs["layers"]}
        shapes = {**params, **params["layers"]}
        for name, axis in cut.items():
            assert flat[name] == P(
                *[multi_gpu_step.AXIS if i == axis else None for i in range(shapes[name].ndim)]
            )
            assert size in (None, shapes[name].shape[axis])
        assert all(set(flat[n]) <= {None} for n in ("norm", "norm_mlp", "norm_attention"))


@pytest.mark.full
def test_the_rates_of_two_devices_are_measured_and_written(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/multi_gpu.py"), str(tmp_path / "out.json")]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command += ["--sections", "rates", "--tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["sections"]["rates"]
    by = {row["what"]: row for row in rows}
    # 256 tokens of 256 bytes, and 8 of scales; a sum is 512 bytes.
    assert by["dispatch gather"]["megabytes"] == 256 * 264 / 1e6
    assert (
        by["combine gather"]["megabytes"]
        == by["psum_scatter bfloat16"]["megabytes"]
        == 256 * 512 / 1e6
    )


@pytest.mark.parametrize(
    ("code", "log", "expected"),
    [
        (0, "========= ERROR SUMMARY: 0 errors\n4 products, 0 wrong\n", 0),
        (9, "========= ERROR SUMMARY: 2 errors\n4 products, 0 wrong\n", 9),
        (0, "========= Target application terminated before first instrumented API call\n", 125),
        (0, "========= ERROR SUMMARY: 0 errors\n", 125),  # the program did not come to its end
    ],
)
def test_a_sanitizer_that_sums_nothing_up_has_not_passed(tmp_path, code, log, expected):
    path = tmp_path / "memcheck.log"
    path.write_text(log)
    assert gpu_report.result_of("memcheck", code, path)[0] == expected


@pytest.mark.full
def test_a_step_trains_one_model_with_every_variant(tmp_path):
    out = tmp_path / "step.json"
    arguments = ["--tiny", "--rounds", "1", "--calls", "1", "--remat", "none,full", str(out)]
    step.main(arguments)
    results = json.loads(out.read_text())["results"]
    assert len(results) == 2 * len(step.VARIANTS)
    losses = [row["loss"] for row in results.values()]
    assert losses == sorted(losses, reverse=True)  # each one goes on where the last one stopped
    for name, row in results.items():
        assert row["speedup_over_bf16"] == pytest.approx(results["bf16"]["ms"] / row["ms"]), name
    full, kept = results["bf16, remat full"], results["bf16"]
    assert full["peak_gib"] < kept["peak_gib"]


@pytest.mark.full
def test_blocks_of_mixtures_are_measured_side_by_side(tmp_path):
    moe.main([str(tmp_path), "--tiny"])
    (path,) = tmp_path.iterdir()
    (row,) = json.loads(path.read_text())["blocks"]
    assert set(row["all_ms"]["train"]) == {"moe", "pieces", "bf16"}
    assert row["bf16_ms"] == row["all_ms"]["train"]["bf16"] > 0
    assert row["ms"] > 0 and row["products_ms"] is None  # no kernel ran


@pytest.mark.full
def test_every_side_of_a_mixture_computes_the_same():
    block = next(iter(moe.TINY.values()))
    arrays = moe.operands(block)
    exact = np.asarray(moe.by_sort(jax.lax.ragged_dot, *arrays), np.float32)
    for side in (moe.moe, moe.pieces):
        error = np.linalg.norm(np.asarray(side(*arrays), np.float32) - exact)
        assert error < 0.08 * np.linalg.norm(exact)  # FP8
