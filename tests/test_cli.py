"""The command line: what it prints, what it refuses, and that it says what its figures are worth."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from click import ClickException
from click.testing import CliRunner

import jaxfp8
from jaxfp8 import _ffi
from jaxfp8._cli import bench, doctor, main
from jaxfp8._cli.models import MODELS
from jaxfp8._cli.shapes import parse_shapes
from jaxfp8._tools.roofline import DEVICES, device, memory


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["--width", "200", *arguments])
    assert result.exit_code == status, result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_as_a_module():
    command = [sys.executable, "-m", "jaxfp8", "memory", "256", "256", "256"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "workspace" in result.stdout, result.stderr


def test_without_its_libraries_it_says_what_to_install():
    program = (
        "import sys, runpy, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'click' else find(n, *a)\n"
        "sys.argv = ['jaxfp8']\n"
        "runpy.run_module('jaxfp8', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "python -m jaxfp8 needs click: pip install 'jaxfp8[cli]'\n"


def test_help_lists_the_commands_without_loading_jax_further():
    text = run("--help")
    for command in ("bench", "doctor", "memory", "roofline", "tune"):
        assert command in text
        assert "--help" in run(command, "-h")
    assert "No such command 'docter'" in run("docter", status=2)


# ------------------------------------------------------------------------------------------------
# doctor
# ------------------------------------------------------------------------------------------------


def test_doctor_reports_versions_devices_and_kernels_and_runs_products():
    text = run("doctor")
    for found in (jax.__version__, jaxfp8.__version__, np.__version__, "8 x cpu", "gemm_1d2d"):
        assert found in text
    assert text.count("error against float64") == 3
    assert "Products run as XLA operations" in text and "problem" not in text


def test_doctor_finds_a_wrong_product(monkeypatch):
    gemm = jaxfp8.gemm
    monkeypatch.setattr(jaxfp8, "gemm", lambda *a, **k: gemm(*a, **k) * 1.01)
    text = run("doctor", status=1)
    assert "1 problem: gemm" in text and "allowed is 1e-05" in text


def test_doctor_finds_a_product_that_is_not_a_number(monkeypatch):
    monkeypatch.setattr(jaxfp8, "wgrad_gemm", lambda a, b: jax.numpy.full((256, 384), np.nan))
    assert "1 problem: wgrad_gemm" in run("doctor", status=1)


def test_doctor_finds_missing_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "images", lambda: ("no_such_image",))
    text = run("doctor", status=1)
    assert "not there: no_such_image.cubin" in text and "error against" not in text
    monkeypatch.setattr(_ffi, "images", lambda: ())
    assert "there was no nvcc when this package was built" in run("doctor", "--no-run")


def test_doctor_finds_an_unsupported_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 13, 0))
    assert "supported is 0.10.2 <= jax < 0.13" in run("doctor", "--no-run", status=1)


def test_doctor_says_that_jax_cannot_use_the_driver(monkeypatch):
    class Driver:
        def cuDriverGetVersion(self, version):
            version._obj.value = 13000
            return 0

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [])
    text = run("doctor", "--no-run")
    assert "for CUDA 13.0" in text and "pip install 'jax[cuda13]'" in text


@pytest.mark.parametrize(
    "status, plugins, found",
    [
        (999, [], "cuDriverGetVersion fails with 999"),
        (0, ["jax-cuda13-plugin", "jax_cuda13_pjrt"], "jax-cuda13-plugin 1.0, jax_cuda13_pjrt 1.0"),
    ],
)
def test_doctor_asks_the_driver_and_lists_plugins(monkeypatch, status, plugins, found):
    class Driver:
        def cuDriverGetVersion(self, version):
            version._obj.value = 12080
            return status

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: Driver())
    packages = [SimpleNamespace(name=n, version="1.0") for n in plugins]
    monkeypatch.setattr(doctor.metadata, "distributions", lambda: packages)
    text = run("doctor", "--no-run", status=int(status != 0))
    assert found in text and ("1 problem: CUDA driver" in text) == (status != 0)
    assert ("for CUDA 12.8" in text) == (status == 0)


def test_doctor_goes_on_where_jax_finds_no_device(monkeypatch):
    def devices(*_):
        raise RuntimeError("Unable to initialize backend 'cuda'\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    findings = list(doctor.devices())
    assert [(f.verdict, f.found) for f in findings] == [
        ("problem", "Unable to initialize backend 'cuda'")
    ]


def test_doctors_last_line_says_what_runs(monkeypatch):
    monkeypatch.setattr(doctor, "runs_kernels", lambda: True)
    assert doctor.verdict_line([]) == "Products run as this package's kernels."


# ------------------------------------------------------------------------------------------------
# roofline and memory
# ------------------------------------------------------------------------------------------------


def test_roofline():
    text = run("roofline", "4096", "4096", "7168", "--device", "h100")
    assert "122 us" in text and "gemm_1d1d" in text  # 2 * 4096 * 4096 * 7168 / 1979e12 s
    assert "memory" in run("roofline", "16", "4096", "4096", "--device", "h200")
    assert "grouped" not in run("roofline", "128", "256", "256", "--groups", "4")
    assert "4 groups" in run("roofline", "1024", "256", "256", "--groups", "4", "--ragged")


@pytest.mark.parametrize("command", ["roofline", "memory"])
def test_a_shape_is_spelled_with_spaces_or_with_x(command):
    """Of ragged groups too, as by the options."""
    assert run(command, "512x256x384") == run(command, "512", "256", "384")
    by_option = run(command, "512x256x384", "--groups", "4", "--ragged")
    assert run(command, "512x256x384/4") == by_option


def test_bench_and_tune_take_every_spelling():
    by_word, by_x = (
        parse_shapes(words) for words in (("1", "2", "3", "4x5x6/7"), ("1x2x3", "4x5x6/7"))
    )
    assert by_word == by_x
    assert [s[1:] for s in by_x] == [(1, 2, 3, 0), (4, 5, 6, 7)]


def test_the_roofline_fits_80_columns():
    """No cell is cut or empty: names, kernels and figures are all there."""
    for size in (("64", "128", "256"), ("65536", "28672", "16384")):
        text = run("--width", "80", "roofline", *size, "--device", "h100")
        assert max(map(len, text.splitlines())) <= 80 and "…" not in text
        for whole in ("weight gradient", "gemm_1d1d", "cluster", "bound by", "ratio"):
            assert whole in text, whole


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("roofline", "0", "1", "1"), "'0x1x1' is no shape; allowed: M N K, MxNxK"),
        (("roofline", "1", "1"), "'1x1' is no shape; allowed: M N K, MxNxK"),
        (("roofline", "1", "1", "1", "--device", "b200"), "device is 'b200'; allowed: h100"),
        (("memory", "1", "1", "x"), "'1x1xx' is no shape"),
        (("bench", "12x12"), "'12x12' is no shape; allowed: M N K, MxNxK"),
        (("roofline", "1x1x1", "2x2x2"), "2 shapes are given; allowed: one"),
        (("memory", "8x1x1/4", "--groups", "2"), "--groups is 2, but the shape is 8x1x1/4"),
        (("bench", "0x1x1"), "'0x1x1' is no shape"),
        (("bench", "1x1x1", "--model", "llama-3-8b"), "give SHAPES or --model, not both"),
        (("bench", "--tokens", "4"), "--tokens goes with --model"),
        (("bench", "--model", "gpt-9"), "'gpt-9' is not one of"),
    ],
)
def test_refuses(arguments, message):
    assert message in run(*arguments, status=2)


def test_memory_is_that_of_the_arrays():
    m, n, k, groups = 300, 200, 520, 4

    def size(*trees):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))

    x, w = jax.numpy.ones((m, k)), jax.numpy.ones((groups, k, n))
    rows, columns = jax.eval_shape(jaxfp8.quantize_both, x)
    nt, nn = jax.eval_shape(jaxfp8.quantize_weight, w[0])

    def total(found, prefix=""):
        return sum(
            v for a, v in found.fp8.items() if prefix in a and ("kept" in prefix or "kept" not in a)
        )

    kept = "kept for the backward pass"
    dense = memory(m, n, k)
    assert total(dense) == size(rows, nt) + m * n * 2
    assert total(dense, kept) == size(columns, nn)
    sizes = jax.numpy.ones(groups, jax.numpy.int32)
    rows, columns = jax.eval_shape(lambda x: jaxfp8.quantize_both(x, group_sizes=sizes), x)
    nt, nn = jax.eval_shape(jaxfp8.quantize_weight, w)
    ragged = memory(m, n, k, groups, ragged=True)
    assert total(ragged) == size(rows, nt) + m * n * 2
    assert total(ragged, kept) == size(columns, nn)
    assert "0.5" in run("memory", "4096", "4096", "4096")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA H20", "H20"),
        ("h800", "H800 SXM"),
    ],
)
def test_device_kinds(kind, name):
    assert device("f", kind).name == name


def test_every_device_has_ratios_of_its_peaks():
    """Tensor cores do twice as much in FP8 as in BF16, and four times as much as in TF32."""
    for d in DEVICES.values():
        assert d.fp8 / d.bf16 == pytest.approx(2, rel=2e-3)
        assert d.fp8 / d.tf32 == pytest.approx(4, rel=2e-3)


# ------------------------------------------------------------------------------------------------
# bench
# ------------------------------------------------------------------------------------------------


def test_bench_on_a_cpu_says_that_it_says_nothing_about_a_gpu(tmp_path):
    arguments = ("--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path))
    text = run("bench", "128x128x128", "128x64x128/3", *arguments)
    assert "these figures say nothing about a GPU" in text.replace("\n", " ")
    record = json.loads((tmp_path / "bench.json").read_text())
    dense, ragged = record["results"]
    assert dense["flops"] == 3 * 2 * 128**3 and dense["fp8"] > 0 < dense["bf16"]
    assert ragged["shape"]["groups"] == 3 and "ragged_dot" in text
    assert record["doubts"] and (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def measured(fp8=1e-3, bf16=2e-3, spread=0.01, flops=10**12):
    return bench.Measured(bench.DEFAULT_SHAPES[0], fp8, bf16, spread, flops)


class Hopper:
    platform, device_kind, compute_capability = "gpu", "NVIDIA H100 80GB HBM3", "9.0"


GOOD = bench.GpuState(1900.0, 1980.0, "0x0000000000000000", 1)


@pytest.mark.parametrize(
    "figures, before, after, doubt",
    [
        (measured(), GOOD, GOOD, None),
        (measured(spread=0.3), GOOD, GOOD, "rounds differ by up to 30%"),
        (measured(), GOOD, GOOD._replace(clock=1200.0), "the SM clock is 1200 of 1980 MHz"),
        (measured(), GOOD._replace(processes=3), GOOD, "3 processes use this GPU"),
        (
            measured(),
            GOOD,
            GOOD._replace(throttled="0x0000000000000040"),
            "held down: hardware thermal",
        ),
        (measured(), None, None, "nvidia-smi does not answer"),
        (measured(flops=10**13), GOOD, GOOD, "above the GPU's peak"),
        (measured(fp8=1e-5, flops=10**9), GOOD, GOOD, "the host may be what is timed"),
    ],
)
def test_bench_doubts(monkeypatch, figures, before, after, doubt):
    monkeypatch.setattr(jax, "devices", lambda: [Hopper()])
    doubts = bench.doubtful([figures], before, after, "train")
    assert (doubts == []) if doubt is None else (len(doubts) == 1 and doubt in doubts[0])


def test_bench_of_a_gpu_without_kernels_says_so(monkeypatch):
    class Blackwell(Hopper):
        device_kind, compute_capability = "NVIDIA B200", "10.0"

    monkeypatch.setattr(jax, "devices", lambda: [Blackwell()])
    (doubt,) = bench.doubtful([measured()], GOOD, GOOD, "train")
    assert "no kernels of this package" in doubt


def test_bench_of_one_forward_product_has_a_table_without_a_sum_and_writes_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = run("bench", "64x128x128", "--mode", "forward", "--rounds", "2", "--seconds", "0.001")
    assert not os.listdir(tmp_path)
    assert "forward on cpu" in text and "sum" not in text.split("doubtful")[0]


def test_bench_of_a_model_has_its_layer_at_the_tokens_asked_for(monkeypatch):
    asked = []

    def measure(shape, mode, rounds, seconds, advance):
        asked.append(shape)
        return bench.Measured(shape, 1e-3, 2e-3, 0.0, 2 * shape.m * shape.n * shape.k)

    monkeypatch.setattr(bench, "measure", measure)
    assert "llama-3-8b, train" in run("bench", "--model", "llama-3-8b", "--tokens", "16")
    assert asked == MODELS["llama-3-8b"].shapes(16)
    asked.clear()
    run("bench", "--model", "llama-3-8b")
    assert {s.m for s in asked} == {128}  # on a CPU
    asked.clear()
    run("bench")
    assert asked == bench.SMALL_SHAPES


def smi(directory, monkeypatch, clocks, users, status=0):
    """An nvidia-smi of these answers, first on PATH."""
    path = directory / "nvidia-smi"
    path.write_text(
        f"#!/bin/sh\ncase \"$3\" in\n--query-gpu*) echo '{clocks}';;\n*) printf '{users}';;\nesac\nexit {status}\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def test_bench_reads_clocks_and_other_users_of_the_gpu(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "1755, 1980, 0x0000000000000004", "812\n900\n")
    assert bench.gpu_state() == bench.GpuState(1755.0, 1980.0, "0x0000000000000004", 2)
    smi(tmp_path, monkeypatch, "[N/A], 1980, Not Active", "")
    unknown = bench.gpu_state()
    assert unknown == bench.GpuState(0.0, 1980.0, "Not Active", 0)
    monkeypatch.setattr(jax, "devices", lambda: [Hopper()])
    assert bench.doubtful([measured()], unknown, unknown, "train") == []
    smi(tmp_path, monkeypatch, "", "", status=9)
    assert bench.gpu_state() is None

    def hangs(*_, timeout, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(bench.subprocess, "run", hangs)
    assert bench.gpu_state() is None


def test_bench_draws_what_is_not_in_doubt_and_says_what_drawing_needs(tmp_path, monkeypatch):
    bench.plot("title", [measured()], [], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ClickException, match="pip install 'jaxfp8\\[cli\\]'"):
        bench.plot("title", [measured()], [], tmp_path / "b.png")


def test_tune_measures_the_products_of_a_layer(tmp_path, monkeypatch):
    asked = []

    def tune(products, *, path, repeats, report):
        asked.extend(products)
        for product in products:
            report(
                product,
                product.configs[1],
                {c: 1e-6 * (2 + i) for i, c in enumerate(product.configs)},
            )

    monkeypatch.setattr(jaxfp8, "tune", tune)
    out = tmp_path / "tuned.json"
    text = run("tune", "1024x256x512", "512x256x384/4", "--out", str(out))
    kinds = [p.kind for p in asked]
    assert sorted(set(kinds)) == ["gemm_1d1d", "gemm_1d2d", "grouped_gemm", "grouped_wgrad_gemm"]
    assert (
        kinds.count("gemm_1d2d") == 2 and kinds.count("grouped_gemm") == 2
    )  # forward, input gradient
    assert "3 us" in text and "load_tuned" in text


def test_tune_without_a_gpu_says_so():
    assert "Error: tune: " in run("tune", "256x256x256", status=1)
    assert "give either SHAPES or --model" in run("tune", status=2)


def test_models_have_the_shapes_of_their_configurations():
    for model in MODELS.values():
        for shape in model.shapes(64):
            assert shape.k % 64 == shape.n % 64 == 0 and shape.m >= 64
    parameters = sum(s.n * s.k for s in MODELS["llama-3-8b"].shapes(1))
    assert 32 * parameters == pytest.approx(8.03e9 - 2 * 128256 * 4096, rel=0.01)
    experts = sum(s.n * s.k * max(s.groups, 1) for s in MODELS["mixtral-8x7b"].shapes(1))
    assert 32 * experts == pytest.approx(46.7e9 - 2 * 32000 * 4096, rel=0.01)


def test_a_picture_of_what_is_printed(tmp_path):
    run("--svg", str(tmp_path / "a" / "memory.svg"), "memory", "256", "256", "256")
    assert "workspace" in (tmp_path / "a" / "memory.svg").read_text()
