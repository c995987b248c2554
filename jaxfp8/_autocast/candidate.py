"""A product that autocast may choose, what is known of it, and what rules it out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

Kind = Literal["dot_general", "ragged_dot"]
Side = Literal["lhs", "rhs"]
Role = Literal["forward", "input gradient", "weight gradient"]

FLOAT_DTYPES = tuple(np.dtype(d) for d in (jnp.float32, jnp.bfloat16, jnp.float16))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One product of a traced function, as a policy sees it.

    **Arguments:**

    - `kind`: the JAX operation.
    - `scope`: name scopes around it, joined by `/`; `transpose(jvp(...))` where the function itself differentiates.
    - `weight_path`: where the weight comes from in the function's arguments, such as `params['dense']['kernel']`;
      empty if it is computed, or unknown.
    - `role`: `"forward"`, or which gradient it computes where the function itself differentiates.
    - `batch`, `m`, `n`, `k`: sizes of the batch (for `ragged_dot`: groups), of the activation's rows (for `ragged_dot`:
      of all groups together), of the weight's columns and of the contraction.
    - `lhs_shape`, `rhs_shape`, `lhs_dtype`, `rhs_dtype`, `out_dtype`: of the JAX operation.
    - `weight`: the operand that is the weight; None if both vary with the batch.
    - `repeats`: how often it runs in one call: the product of the lengths of the scans around it. None inside a
      `while_loop`.
    - `reason`: why it does not run in FP8; empty if it does.
    """

    kind: Kind
    scope: str
    weight_path: str
    role: Role
    batch: int
    m: int
    n: int
    k: int
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype
    out_dtype: np.dtype
    weight: Side | None
    repeats: int | None = 1
    reason: str = ""

    @property
    def fp8(self) -> bool:
        """Whether it runs in FP8."""
        return not self.reason

    @property
    def flops(self) -> int:
        """Floating-point operations of one run: two for a multiply-add."""
        batch = 1 if self.kind == "ragged_dot" else self.batch
        return 2 * batch * self.m * self.n * self.k

    @property
    def names(self) -> tuple[str, ...]:
        """Components of the scope and of the weight's path, which a policy's patterns are matched with."""
        scope = re.split(r"[/()]+", self.scope)
        path = re.split(r"[.\[\]'\"/]+", self.weight_path)
        return tuple(n for n in (*scope, *path) if n and n not in ("jvp", "transpose", "vmap"))


class Dims(NamedTuple):
    """Axes of the operands of a product: contracting, batch and free ones."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]


def dimensions(eqn: Any) -> Dims:
    """Axes of a dot_general or ragged_dot_general."""
    numbers = eqn.params.get("dimension_numbers")
    if numbers is None:
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    contract, batch = (tuple(tuple(map(int, a)) for a in pair) for pair in numbers)
    free = tuple(
        tuple(a for a in range(len(v.aval.shape)) if a not in contract[i] + batch[i])
        for i, v in enumerate(eqn.invars[:2])
    )
    return Dims(contract, batch, free)  # type: ignore[arg-type]


RAGGED_ROWS = ((0,), (0,))
"""Ragged and group dimensions of a product of rows sorted by group."""


def ragged_role(eqn: Any, dims: Dims) -> Role | None:
    """What a ragged_dot_general computes, if it is a form of `jax.lax.ragged_dot` or one of its gradients."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ragged, group = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    if any(dims.batch) or eqn.params.get("group_offset") is not None or len(eqn.invars) != 3:
        return None
    lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
    if (ragged, group) == RAGGED_ROWS and (len(lhs), len(rhs)) == (2, 3):
        if dims.contract == ((1,), (1,)):
            return "forward"
        if dims.contract == ((1,), (2,)):
            return "input gradient"
    if (ragged, group, dims.contract) == ((0,), (), ((0,), (0,))) and (len(lhs), len(rhs)) == (
        2,
        2,
    ):
        return "weight gradient"
    return None


def default_precision(precision: Any) -> bool:
    """Whether a product asks for no more than the default precision."""
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(p is None or p == lax.Precision.DEFAULT for p in both)


def size_over(v, axes):
    return math.prod(v.aval.shape[a] for a in axes)


Judge = Callable[[Candidate, "Facts"], str]
"""Why a product that can run in FP8 does not; empty if it does."""


class Facts(NamedTuple):
    """What the rules for embeddings, heads and routers look at."""

    one_hot: bool
    table: bool  # the weight is also gathered from
    logits: bool  # the result is ranked or normalized across features
    of_excluded: bool  # a gradient of a product that was kept


def impossible(product: Candidate, eqn: Any, dims: Dims, tangent: bool) -> str:
    """Why no FP8 operation computes this product; empty if one does."""
    allowed = ", ".join(d.name for d in FLOAT_DTYPES)
    for name, dtype in (
        ("lhs", product.lhs_dtype),
        ("rhs", product.rhs_dtype),
        ("the result", product.out_dtype),
    ):
        if dtype not in FLOAT_DTYPES:
            return f"{name} is {dtype}, not {allowed}"
    if not default_precision(eqn.params.get("precision")):
        return "asks for a precision above the default"
    if product.kind == "dot_general" and not dims.contract[0]:
        return "contracts no axis"
    if tangent:
        return "a tangent of a custom_jvp rule"
    if 0 in product.lhs_shape + product.rhs_shape:
        return "empty"
    return ""


def judge_scope_names(product: Candidate, patterns: Sequence[str]) -> str | None:
    """The first name of a product that a pattern matches in full, or None."""
    for name in product.names:
        if any(re.fullmatch(p, name, re.IGNORECASE) for p in patterns):
            return name
    return None
