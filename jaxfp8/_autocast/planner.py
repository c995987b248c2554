"""Finds the products of a traced program and decides which of them run in FP8.

The program is walked once, forwards, through every jaxpr whose body autocast can rewrite. For each value it is known
what it is (parameter, data, gradient, constant) and on which leaves of the function's inputs it depends; from that
follows which operand of a product is the weight. A walk backwards finds the values that are ranked or normalized across
features: logits.

Only public JAX modules; equations are recognized by their primitives' names, which all supported versions share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax.extend.core import Literal as JaxprLiteral

from .candidate import (
    Candidate,
    Dims,
    Facts,
    Judge,
    Role,
    Side,
    dimensions,
    impossible,
    ragged_role,
    size_over,
)
from .jaxprs import ENTERED, bodies, computes_cotangents, join_scopes, open_jaxpr, scan_counts
from .logits import NONE, Axes, Logits
from .origins import NOWHERE, SAME_NUMBERS, Knowledge, Origin, merge, says_nothing
from .plan import AutocastPlan, Found, Nested


class Planner:
    """Walks a program and judges its products.

    **Arguments:**

    - `knowledge`: of the leaves; grows.
    - `judge`: the policy.
    - `weight`: which operand is the weight; `"infer"` finds out.
    - `backward`: whether the program computes cotangents, as a custom_vjp's second rule does.
    """

    def __init__(
        self, knowledge: Knowledge, judge: Judge, weight: Side | Literal["infer"], *, backward=False
    ):
        self.knowledge, self.judge, self.weight, self.backward = knowledge, judge, weight, backward
        self.logits = Logits()

    def plan(self, jaxpr: Any, ins: Sequence[Origin]) -> tuple[AutocastPlan, list[Origin]]:
        """The plan of a jaxpr, open or closed, and where its results come from."""
        outs = [NONE] * len(open_jaxpr(jaxpr)[0].outvars)
        return self._plan(jaxpr, ins, outs, "", 1)

    def _plan(self, jaxpr, ins, out_axes, scope, repeats):
        jaxpr, consts = open_jaxpr(jaxpr)
        axes, _ = self.logits.inside(jaxpr, out_axes)
        origins: dict[Any, Origin] = {}

        def read(atom):
            return NOWHERE if isinstance(atom, JaxprLiteral) else origins[atom]

        values = consts or [v.aval for v in jaxpr.constvars]
        origins.update(zip(jaxpr.constvars, map(self.knowledge.add, values), strict=True))
        origins.update(zip(jaxpr.invars, ins, strict=True))

        items: list[Found | Nested] = []
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            here = join_scopes(scope, str(eqn.source_info.name_stack))
            if name in ("dot_general", "ragged_dot_general"):
                product, out = self._product(eqn, operands, axes, here, repeats)
                items.append(Found(i, product))
                outs = [out]
            elif name in ENTERED:
                found, outs = self._enter(eqn, operands, axes, here, repeats)
                if any(plan.items for _, plan in found):
                    items.append(Nested(i, tuple(found), tuple(operands)))
            else:
                outs = self._other(eqn, operands, self.backward or computes_cotangents(here))
            origins.update(zip(eqn.outvars, outs, strict=True))
        return AutocastPlan(tuple(items)), [read(v) for v in jaxpr.outvars]

    def _other(self, eqn, operands, backward):
        name = eqn.primitive.name
        if eqn.outvars and not says_nothing(eqn.outvars[0].aval):
            pairs = zip(eqn.invars, operands, strict=True)
            operands = [NOWHERE if says_nothing(v.aval) else o for v, o in pairs]
        out = merge(operands, backward=backward)
        if name == "gather" and operands[0].kind in ("parameter", "either"):
            if operands[1].kind == "data":  # rows are looked up
                self.knowledge.tables |= operands[0].leaves
                out = out._replace(kind="data", leaves=frozenset())
        elif name in SAME_NUMBERS:
            is_bool = bool(eqn.invars) and eqn.invars[0].aval.dtype == jnp.bool_
            hot = operands[0].one_hot or (is_bool and name == "convert_element_type")
            out = out._replace(one_hot=hot, token=operands[0].token or out.token)
        elif name.startswith("random_"):
            out = out._replace(kind="data", leaves=frozenset())
        return [out] * len(eqn.outvars)

    def _enter(self, eqn, operands, axes, scope, repeats):
        name = eqn.primitive.name
        out_axes = [axes.get(v, NONE) for v in eqn.outvars]
        found, results = [], []
        for body in bodies(eqn):
            times = None if repeats is None or body.repeats is None else repeats * body.repeats
            jaxpr, _ = open_jaxpr(body.jaxpr)
            ins = [operands[i] for i in body.ins]
            inner_axes = out_axes
            if name == "scan":
                _, carry = scan_counts(eqn)
                inner_axes = [
                    *out_axes[:carry],
                    *(Axes(a - 1 for a in o if a > 0) for o in out_axes[carry:]),
                ]
            if len(inner_axes) != len(jaxpr.outvars):
                inner_axes = [NONE] * len(jaxpr.outvars)
            if name == "scan":
                first, count = scan_counts(eqn)
                ins = self._settle(jaxpr, ins, inner_axes, range(first, first + count))
            elif name == "while":
                first = len(ins) - len(eqn.outvars)
                if body.key[0] == "body_jaxpr":
                    ins = self._settle(jaxpr, ins, inner_axes, range(first, len(ins)))
            plan, outs = self._plan(body.jaxpr, ins, inner_axes, scope, times)
            found.append((body.key, plan))
            if len(outs) == len(eqn.outvars) and body.key[0] != "cond_jaxpr":
                results.append(outs)
        outs = [
            each[0] if len(each) == 1 else merge(each)._replace(one_hot=each[0].one_hot)
            for each in zip(*results, strict=True)
        ]
        return found, outs or [merge(operands)] * len(eqn.outvars)

    def _settle(self, jaxpr, ins, out_axes, carried):
        """Origins of a loop's inputs once what is carried around is all that it ever will be."""
        start = carried.start
        while True:
            trial = Planner(
                self.knowledge.copy(), lambda *_: "", self.weight, backward=self.backward
            )
            trial.logits = self.logits
            _, outs = trial._plan(jaxpr, ins, out_axes, "", None)
            settled = list(ins)
            for i in carried:
                new = merge([ins[i], outs[i - start]])
                if new.kind != ins[i].kind:
                    settled[i] = new
            if settled == ins:
                return settled
            ins = settled

    # ---- one product -----------------------------------------------------------------------------

    def _product(self, eqn, operands, axes, scope, repeats) -> tuple[Candidate, Origin]:
        lhs, rhs = eqn.invars[:2]
        out = eqn.outvars[0]
        dims = dimensions(eqn)
        ragged = eqn.primitive.name == "ragged_dot_general"
        backward = self.backward or computes_cotangents(scope)
        known = self.knowledge
        pair = [known.settled(o) for o in operands[:2]]
        weight, role, reason = self._roles(eqn, pair, dims, backward)

        w = 0 if weight == "lhs" else 1
        size = sizes(eqn, dims, w)
        if ragged and role != "weight gradient" and not reason:
            size["n"] = rhs.aval.shape[3 - dims.contract[1][0]]
        product = Candidate(
            kind="ragged_dot" if ragged else "dot_general",
            scope=scope,
            weight_path="" if weight is None else known.path(pair[w]),
            role=role,
            lhs_shape=lhs.aval.shape,
            rhs_shape=rhs.aval.shape,
            lhs_dtype=lhs.aval.dtype,
            rhs_dtype=rhs.aval.dtype,
            out_dtype=out.aval.dtype,
            weight=weight,
            repeats=repeats,
            **size,
        )
        # What a weight meets carries the batch, and so does the result.
        result = merge(pair, backward=backward)
        if role == "weight gradient" or backward:
            result = result._replace(kind="gradient", leaves=frozenset())
        elif weight is not None:
            result = result._replace(kind="data", leaves=frozenset())
        reason = impossible(product, eqn, dims, any(o.tangent for o in pair)) or reason
        if reason:
            return dataclasses.replace(product, reason=reason), result

        columns = size_over(lhs, dims.free[0]) if role == "weight gradient" else size["n"]
        of_excluded = backward and (
            known.met.get((pair[1].token, columns), False)
            if weight is None
            else not pair[w].leaves.isdisjoint(known.excluded)
        )
        facts = Facts(
            one_hot=pair[0].one_hot or pair[1].one_hot,
            table=weight is not None and not pair[w].leaves.isdisjoint(known.tables),
            logits=weight is not None and bool(axes.get(out, NONE)),
            of_excluded=of_excluded,
        )
        reason = self.judge(product, facts)
        if weight is not None and not backward:
            special = facts.one_hot or facts.table or facts.logits or "by name" in reason
            excluded = bool(reason) and special
            known.excluded |= pair[w].leaves if excluded else frozenset()
            known.met[(pair[1 - w].token, size["n"])] = excluded
            known.multiplied.add((pair[w].leaves, size["m"]))
            known.weights |= pair[w].leaves
            known.data |= pair[1 - w].leaves - pair[w].leaves
        return dataclasses.replace(product, reason=reason), result

    def _roles(self, eqn, pair, dims, backward) -> tuple[Side | None, Role, str]:
        """Which operand of a product is the weight, what the product computes, and why it has no weight."""
        role: Role = "input gradient" if backward else "forward"
        if eqn.primitive.name == "ragged_dot_general":
            found = ragged_role(eqn, dims)
            reason = "" if found else "a ragged product of a form without a kernel"
            return (None if found == "weight gradient" else "rhs"), found or role, reason
        kinds = [o.kind for o in pair]
        columns = size_over(eqn.invars[0], dims.free[0])
        if backward and "parameter" not in kinds:
            if not any(dims.batch) and (pair[1].token, columns) in self.knowledge.met:
                return None, "weight gradient", ""
            return None, role, "both operands vary with the batch"
        if self.weight != "infer" and not backward:
            return self.weight, role, ""
        if backward and sorted(kinds) == ["gradient", "parameter"]:
            w = kinds.index("parameter")
            rows = size_over(eqn.invars[1 - w], dims.free[1 - w])
            if (pair[w].leaves, rows) in self.knowledge.multiplied:
                return ("rhs" if w else "lhs"), role, ""
        if "gradient" in kinds:
            return None, role, "a product of gradients that differentiates no product"
        if "constant" in kinds:
            return None, role, "an operand is a constant"
        if kinds == ["parameter"] * 2:
            return None, role, "both operands are parameters"
        if kinds == ["data"] * 2 or pair[0].leaves & pair[1].leaves:
            return None, role, "both operands vary with the batch"
        order = ("data", "either", "parameter")
        left, right = (order.index(k) for k in kinds)
        return ("lhs" if left > right else "rhs"), role, ""


def sizes(eqn, dims: Dims, w: int) -> dict[str, Any]:
    """Batch (or groups), m, n and k of a product whose weight is operand `w`."""
    sides = lhs, _ = eqn.invars[:2]
    ragged = eqn.primitive.name == "ragged_dot_general"
    return {
        "batch": eqn.invars[2].aval.shape[-1] if ragged else size_over(lhs, dims.batch[0]),
        "m": size_over(sides[1 - w], dims.free[1 - w]),
        "n": size_over(sides[w], dims.free[w]),
        "k": size_over(lhs, dims.contract[0]),
    }
