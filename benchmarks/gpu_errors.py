"""Errors of the products on a GPU against float64 on the dequantized inputs, by contraction length.

    python benchmarks/gpu_errors.py OUT.json [--dump OUT.npz]

Norm-wise relative error; and per element, over sum |lhs| |rhs|, the distribution of the error and of the difference
from the portable lowering, which is what the tensor core's accumulation inside a block of 128 leaves: the portable
lowering adds the same exact products in float32. `--dump` keeps operands and results of small products, from which
that accumulation can be worked out.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jaxfp8  # noqa: E402
from tests import oracle  # noqa: E402

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}


def distribution(gap):
    return {name: float(np.quantile(np.abs(gap), q)) for name, q in QUANTILES.items()}


def measure(k, square, inputs, rows=192, columns=160):
    r = np.random.default_rng(k)
    x, w = (r.standard_normal((n, k), np.float32) for n in (rows, columns))
    if inputs == "positive":
        x, w = abs(x), abs(w)
    elif inputs == "outliers":  # one in a thousand is a thousand times as large
        x, w = (v * np.where(r.random(v.shape) < 1e-3, 1e3, 1).astype(np.float32) for v in (x, w))
    lhs = jaxfp8.quantize(x)
    rhs = jaxfp8.quantize(w, block=(128, 128) if square else (1, 128))
    got = np.asarray(jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32), np.float64)
    with jax.default_device(jax.devices("cpu")[0]):
        operands = jax.tree.map(np.asarray, (lhs, rhs))
        portable = np.asarray(jaxfp8.gemm(*operands, out_dtype=jnp.float32), np.float64)
    a, b = oracle.dequantize(lhs), oracle.dequantize(rhs)
    want, condition = a @ b.T, np.abs(a) @ np.abs(b).T
    return {
        "k": k,
        "rhs": "128x128" if square else "1x128",
        "inputs": inputs,
        "norm_wise": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "portable_norm_wise": float(np.linalg.norm(portable - want) / np.linalg.norm(want)),
        "worst_row": float(
            (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).max()
        ),
        "bias": float(((got - want) / condition).mean()),
        "element": distribution((got - want) / condition),
        "from_portable": distribution((got - portable) / condition),
        "equal_to_portable": float((got == portable).mean()),
    }


def dump(path):
    """FP8 operands (M, K) and (N, K), scales of one, and the float32 products the device gives."""
    arrays = {}
    for k in (16, 32, 64, 96, 128):
        for kind in ("normal", "positive", "wide"):
            r = np.random.default_rng([k, len(kind)])
            x, w = (r.standard_normal((64, k), np.float32) for _ in range(2))
            if kind == "positive":
                x, w = abs(x), abs(w)
            elif kind == "wide":
                x, w = (v * np.exp2(r.integers(-8, 8, v.shape)).astype(np.float32) for v in (x, w))
            data = [jnp.asarray(np.clip(v, -448, 448)).astype(jnp.float8_e4m3fn) for v in (x, w)]
            one = [jnp.ones((64, 1), jnp.float32), jnp.ones((1, 1), jnp.float32)]
            lhs = jaxfp8.QuantizedArray(data[0], one[0])
            rhs = jaxfp8.QuantizedArray(data[1], one[1], (128, 128))
            out = jaxfp8.gemm(lhs, rhs, out_dtype=jnp.float32)
            name = f"{kind}_{k}"
            arrays[name + "_lhs"], arrays[name + "_rhs"] = (
                np.asarray(v).view(np.uint8) for v in data
            )
            arrays[name + "_out"] = np.asarray(out)
    np.savez_compressed(path, **arrays)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--dump", type=pathlib.Path)
    arguments = parser.parse_args()
    rows = [
        measure(k, square, inputs)
        for k in (32, 128, 256, 1024, 4096, 16384)
        for square in (True, False)
        for inputs in ("normal", "positive", "outliers")
    ]
    for row in rows:
        print(
            f"K {row['k']:6} {row['rhs']:8} {row['inputs']:9} norm-wise {row['norm_wise']:.2e} "
            f"(portable {row['portable_norm_wise']:.1e})  element p50 {row['element']['p50']:.1e} "
            f"max {row['element']['max']:.1e}  bias {row['bias']:+.1e}"
        )
    worst = max(row["norm_wise"] for row in rows)
    print(f"largest norm-wise error {worst:.2e} over {len(rows)} products")
    result = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "errors": rows}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.dump:
        dump(arguments.dump)


if __name__ == "__main__":
    main()
