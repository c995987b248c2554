"""Jaxprs inside of equations: which an equation runs, how often, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Body(NamedTuple):
    """A jaxpr inside an equation.

    **Arguments:**

    - `key`: the parameter, and for cond the position of the branch.
    - `jaxpr`: open or closed.
    - `ins`: for each input of the jaxpr, the operand of the equation.
    - `repeats`: how often it runs; None: unknown.
    """

    key: tuple[str, int]
    jaxpr: Any
    ins: tuple[int, ...]
    repeats: int | None


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many constants and carried values a scan takes, before what it scans over."""
    params = eqn.params
    if "num_consts" in params:  # jax < 0.12
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


_DIRECT = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}
"""Equations whose jaxpr takes the operands and gives the results, as they are."""

ENTERED = frozenset({*_DIRECT, "scan", "while", "cond"})


def bodies(eqn: Any) -> list[Body]:
    """The jaxprs of an equation that is entered."""
    name, params = eqn.primitive.name, eqn.params
    count = len(eqn.invars)
    if name in _DIRECT:
        key = _DIRECT[name]
        return [Body((key, 0), params[key], tuple(range(count)), 1)]
    if name == "scan":
        return [Body(("jaxpr", 0), params["jaxpr"], tuple(range(count)), params["length"])]
    if name == "while":
        a, b = params["cond_nconsts"], params["body_nconsts"]
        carry = tuple(range(a + b, count))
        return [
            Body(("cond_jaxpr", 0), params["cond_jaxpr"], (*range(a), *carry), None),
            Body(("body_jaxpr", 0), params["body_jaxpr"], (*range(a, a + b), *carry), None),
        ]
    if name == "cond":
        return [
            Body(("branches", i), b, tuple(range(1, count)), 1)
            for i, b in enumerate(params["branches"])
        ]
    return []


def computes_cotangents(scope: str) -> bool:
    """Whether JAX's names say that an equation belongs to a backward pass, and not to what is recomputed in one."""
    head, found, tail = scope.rpartition("transpose(")
    return bool(found) and "rematted_computation" not in tail


def join_scopes(outer: str, inner: str) -> str:
    """The name scopes of an equation, given those of the equation that its jaxpr is in."""
    return f"{outer}/{inner}" if outer and inner else outer or inner
