"""What the benchmarks measure and report, as far as it needs no GPU."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import counters  # noqa: E402
import heuristic_check  # noqa: E402
import readme  # noqa: E402
import speed  # noqa: E402


def test_the_readme_says_what_the_results_say():
    text = (ROOT / "README.md").read_text()
    assert readme.replaced(text) == text, "run python benchmarks/readme.py"


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
