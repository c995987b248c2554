"""The command line: what it prints, what it refuses, and that it says what its figures are worth."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import jaxfp8
from jaxfp8 import _ffi
from jaxfp8._cli import bench, doctor, main
from jaxfp8._cli.models import MODELS
from jaxfp8._roofline import DEVICES, device, memory


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


# ------------------------------------------------------------------------------------------------
# roofline and memory
# ------------------------------------------------------------------------------------------------


def test_roofline():
    text = run("roofline", "4096", "4096", "7168", "--device", "h100")
    assert "122 us" in text and "gemm_1d1d" in text  # 2 * 4096 * 4096 * 7168 / 1979e12 s
    assert "memory" in run("roofline", "16", "4096", "4096", "--device", "h200")
    assert "grouped" not in run("roofline", "128", "256", "256", "--groups", "4")
    assert "4 groups" in run("roofline", "1024", "256", "256", "--groups", "4", "--ragged")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("roofline", "0", "1", "1"), "0 is not in the range x>=1"),
        (("roofline", "1", "1"), "Missing argument 'K'"),
        (("roofline", "1", "1", "1", "--device", "b200"), "device is 'b200'; allowed: h100"),
        (("memory", "1", "1", "x"), "'x' is not a valid integer"),
        (("bench", "12x12"), "'12x12' is no shape; allowed: MxNxK"),
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
