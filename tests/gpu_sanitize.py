"""Launches every kernel family and GEMM configuration once, on small awkward shapes, and checks the results.

    compute-sanitizer --tool racecheck python tests/gpu_sanitize.py [--few | --operations]

For compute-sanitizer on a Hopper GPU: kernels go straight to the driver, so that little else is instrumented.
`--operations` runs MLPs through JAX instead.
"""

import argparse
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import activation_gpu as activations  # noqa: E402
import cupy  # noqa: E402
import gemm_bench as gemm  # noqa: E402
import numpy as np  # noqa: E402
import quantize_gpu as quantizers  # noqa: E402

import jaxfp8._ffi  # noqa: E402

GROUPS = (0, 1, 127, 128, 129, 0, 77)
TOKENS = 512 + 128 * len(GROUPS)


def problems(few):
    """Two K blocks and a tail; more tiles than one in M and N, with tails. One with few rows."""
    p = gemm.Problem
    cases = [
        p("1d2d", 300, 264, 272),
        p("1d2d", 20, 136, 144),
        p("1d1d", 300, 264, 272, out="float32"),
        p("grouped", 462, 264, 272, len(GROUPS), GROUPS),
        p("grouped_wgrad", 264, 272, TOKENS, len(GROUPS), GROUPS, out="float32", accum=True),
    ]
    if not few:
        cases += [
            p("1d2d", 257, 261, 400, accum=True, out="float32"),
            p("1d2d", 130, 136, 144, 2, lhs=gemm.E5M2),
            p("1d1d", 257, 264, 400, accum=True),
            p("masked", 300, 264, 272, len(GROUPS), GROUPS),
            p("grouped_wgrad", 264, 272, TOKENS, len(GROUPS), GROUPS),
        ]
    return cases


def check_products(few):
    count = bad = 0
    with tempfile.TemporaryDirectory() as folder:
        gemm.use_installed(pathlib.Path(folder))
        driver = gemm.Driver(pathlib.Path(folder))
        for problem in problems(few):
            for config, name in enumerate(driver.configs(problem.kind)):
                good, error = gemm.check_case(driver, problem, config)
                count += 1
                bad += not good
                if not good:
                    print(f"WRONG {problem} {name}: error {error:.2e}")
    return count, bad


def check_quantizers(few):
    """Raises SystemExit at the first byte that differs from the oracle."""
    modules = quantizers.load(jaxfp8._ffi.image_directory())
    rng = np.random.default_rng(0)
    count = 0
    for source in ("bf16",) if few else ("bf16", "f32", "f16"):
        for kind in ("rows", "columns", "both", "blocks", "weight"):
            for shape in ((2, 130, 72),) if few else ((2, 130, 72), (1, 37, 257), (1, 129, 520)):
                quantizers.check(modules, kind, source, "e4m3", shape, 0, None, 0, rng)
                count += 1
        for kind in ("ragged_columns", "ragged_both"):
            shape = (len(GROUPS), 462, 130)
            quantizers.check(modules, kind, source, "e4m3", shape, 1, list(GROUPS), 0, rng)
            count += 1
    cupy.cuda.runtime.deviceSynchronize()
    return count


def check_operations():
    import jax

    from tests import kernel_cases as cases

    bf16 = {"dtype": jax.numpy.bfloat16}
    runs = [
        cases.train_mlp((130, 136, 200, 136), **bf16),
        cases.train_mlp((70, 129, 65, 129), "gelu", gated=False, **bf16),
        cases.train_mlp((300, 136, 200, 136), groups=[0, 1, 127, 128, 44, 0], **bf16),
        cases.train_mlp((100, 136, 200, 136), "gelu", groups=[-7, 60, -1, 20], **bf16),
        cases.train_moe(200, 3, 5, (136, 200, 136), **bf16),
    ]
    for run in runs:
        assert all(
            np.isfinite(np.asarray(v, np.float32)).all() for v in jax.device_get(run()).values()
        )
    print(
        f"{len(runs)} products, 0 wrong; forward and backward passes of MLPs and a mixture, finite"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="for slow tools: one case a family")
    parser.add_argument("--operations", action="store_true")
    arguments = parser.parse_args()
    if arguments.operations:
        check_operations()
        return
    few = arguments.few
    quantized = check_quantizers(few)
    activated = activations.check_all(quantizers.load(jaxfp8._ffi.image_directory()), few)
    products, bad = check_products(few)
    print(
        f"{products} products, {bad} wrong; {quantized} quantizations and {activated} activations, equal to the bit"
    )
    sys.exit(bad != 0)


if __name__ == "__main__":
    main()
