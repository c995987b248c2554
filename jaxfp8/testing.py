"""Assertions for tests of programs that compute in FP8."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

__all__ = ["assert_fp8_close"]

PRODUCT_ERROR = 0.06
"""Norm-wise error allowed of one FP8 product. E4M3 keeps 3 bits: a product of normal data is 3.7 % off."""


def assert_fp8_close(actual: Any, expected: Any, rtol: float = PRODUCT_ERROR) -> None:
    """Asserts that every leaf of a result is what FP8 can make of the expected one.

    Errors are norm-wise, `|actual - expected| / |expected|` over a leaf, in float64: an FP8 product has no bound for
    each element, since an element whose terms cancel has any relative error.

    **Arguments:**

    - `actual`: a pytree of arrays, such as outputs or gradients in FP8.
    - `expected`: the same in a higher precision: same structure, shapes.
    - `rtol`: largest error of a leaf. The default is for one product; products in a row add up (two 0.12, say).

    **Raises:** AssertionError that names the leaf, its error and where it is largest; for another structure or shape;
    for anything not finite in either.
    """
    got: Any = jax.tree.structure(actual)
    want: Any = jax.tree.structure(expected)
    assert got == want, f"structures differ: {got}, {want}"
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        name = jax.tree_util.keystr(path) or "the array"
        a, b = (np.asarray(x).astype(np.float64) for x in (a, b))
        assert a.shape == b.shape, f"{name} has shape {a.shape}, expected {b.shape}"
        for what, x in (("actual", a), ("expected", b)):
            bad = int((~np.isfinite(x)).sum())
            assert not bad, f"{name}: {bad} of {x.size} elements of {what} are not finite"
        norm = np.linalg.norm(b)
        error = np.linalg.norm(a - b) / norm if norm else np.linalg.norm(a)
        if error > rtol:
            where = np.unravel_index(np.argmax(np.abs(a - b)), a.shape)
            index = tuple(map(int, where))
            raise AssertionError(
                f"{name} is {error:.3g} off, norm-wise; allowed: {rtol:g}. Largest difference at {index}: "
                f"{a[where]:.6g}, expected {b[where]:.6g}"
            )
