"""Errors of the products on a GPU against float64 on the dequantized inputs, by contraction length.

    python benchmarks/gpu_errors.py OUT.json

Norm-wise relative error and the largest element error over sum |lhs||rhs|; the difference from the portable lowering is
what the tensor core's accumulation inside a block of 128 leaves.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jaxfp8  # noqa: E402
from tests import oracle  # noqa: E402


def measure(k, square, positive):
    r = np.random.default_rng(k)
    x, w = (r.standard_normal((n, k), np.float32) for n in (192, 160))
    if positive:
        x, w = abs(x), abs(w)
    lhs = jaxfp8.quantize(x)
    rhs = jaxfp8.quantize(w, block=(128, 128) if square else (1, 128))
    got = np.asarray(jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32), np.float64)
    a, b = oracle.dequantize(lhs), oracle.dequantize(rhs)
    want, condition = a @ b.T, np.abs(a) @ np.abs(b).T
    return {
        "k": k,
        "rhs": "128x128" if square else "1x128",
        "inputs": "positive" if positive else "normal",
        "norm_wise": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "worst_element": float((np.abs(got - want) / condition).max()),
        "bias": float(((got - want) / condition).mean()),
    }


def main():
    device = jax.devices()[0]
    rows = [
        measure(k, square, positive)
        for k in (32, 128, 256, 1024, 4096, 16384)
        for square in (True, False)
        for positive in (False, True)
    ]
    for row in rows:
        print({k: f"{v:.2e}" if isinstance(v, float) else v for k, v in row.items()})
    result = {"device": device.device_kind, "jax": jax.__version__, "errors": rows}
    pathlib.Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
