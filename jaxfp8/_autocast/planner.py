"""Finds the products of a traced program and decides which of them run in FP8.

The program is walked once, forwards, through every jaxpr whose body autocast can rewrite. For each value it is known
which leaves of the function's inputs it depends on; from that follows which operand of a product varies with the batch
(the activation) and which does not (the weight). A walk backwards finds the values that are ranked or normalized across
features: logits.

Only public JAX modules; equations are recognized by their primitives' names, which all supported versions share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

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
from .origins import ELEMENTWISE_OR_SHAPE, NOWHERE, Input, Knowledge, Origin, merge
from .plan import AutocastPlan, Found, Nested


class Planner:
    """Walks a program and judges its products.

    **Arguments:**

    - `knowledge`: of the leaves; grows.
    - `judge`: the policy.
    - `weight`: which operand is the weight; `"infer"` finds out.
    - `backward`: whether the program computes cotangents, as a custom_vjp's second rule does.
    """

    def __init__(self, knowledge: Knowledge, judge: Judge, weight: str, *, backward: bool = False):
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

        for v in jaxpr.constvars:
            origins[v] = Origin(frozenset({self.knowledge.add(Input("", constant=True))}))
            if not jnp.issubdtype(v.aval.dtype, jnp.inexact):  # tokens, labels
                self.knowledge.varying |= origins[v].leaves
        origins.update(zip(jaxpr.invars, ins, strict=True))

        items: list[Found | Nested] = []
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [read(v) for v in eqn.invars]
            name = eqn.primitive.name
            here = join_scopes(scope, str(eqn.source_info.name_stack))
            if name in ("dot_general", "ragged_dot_general"):
                product = self._product(eqn, operands, axes, here, repeats, jaxpr, read)
                items.append(Found(i, product))
                outs = [merge(operands)._replace(computed=True)] * len(eqn.outvars)
            elif name in ENTERED:
                found, outs = self._enter(eqn, operands, axes, here, repeats)
                if any(plan.items for _, plan in found):
                    items.append(Nested(i, tuple(found), tuple(operands)))
            else:
                outs = self._other(eqn, operands)
            origins.update(zip(eqn.outvars, outs, strict=True))
        return AutocastPlan(tuple(items)), [read(v) for v in jaxpr.outvars]

    def _other(self, eqn, operands):
        name = eqn.primitive.name
        out = merge(operands)
        if name == "gather":
            self.knowledge.tables |= operands[0].leaves - operands[1].leaves
        elif name in ELEMENTWISE_OR_SHAPE:
            is_bool = bool(eqn.invars) and eqn.invars[0].aval.dtype == jnp.bool_
            hot = operands[0].one_hot or (is_bool and name == "convert_element_type")
            out = out._replace(one_hot=hot)
        elif name.startswith("jaxfp8_"):
            out = out._replace(computed=True)
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
            merge(each)._replace(one_hot=each[0].one_hot) for each in zip(*results, strict=True)
        ]
        if name == "cond":
            outs = [merge([o, operands[0]]) for o in outs]
        return found, outs or [merge(operands)] * len(eqn.outvars)

    def _settle(self, jaxpr, ins, out_axes, carried):
        """Origins of a loop's inputs once what is carried around depends on all that it ever will.

        Only what is carried in, and what is known to vary, spreads: else every activation of a scan over layers would
        depend on the weights of all of them.
        """
        start = carried.start
        carried = [i for i in carried if not self._is_parameter(ins[i])]
        spreading = frozenset().union(*(ins[i].leaves for i in carried))
        while True:
            trial = Planner(
                self.knowledge.copy(), lambda *_: "", self.weight, backward=self.backward
            )
            trial.logits = self.logits
            _, outs = trial._plan(jaxpr, ins, out_axes, "", None)
            settled = list(ins)
            for i in carried:
                out = outs[i - start]
                leaves = out.leaves & (spreading | self.knowledge.varying)
                settled[i] = merge([ins[i], out._replace(leaves=leaves)])
            if settled == ins:
                return settled
            ins = settled

    def _is_parameter(self, origin: Origin) -> bool:
        """Whether a value carried around a loop is a parameter that the loop updates: it stays a weight."""
        known = self.knowledge
        if len(origin.leaves) != 1 or origin.computed or known.varies(origin):
            return False
        return origin.leaves <= known.weights or known.given or max(known.depths(origin)) > 0

    # ---- one product -----------------------------------------------------------------------------

    def _product(self, eqn, operands, axes, scope, repeats, jaxpr, read) -> Candidate:
        lhs, rhs = eqn.invars[:2]
        out = eqn.outvars[0]
        dims = dimensions(eqn)
        ragged = eqn.primitive.name == "ragged_dot_general"
        backward = self.backward or computes_cotangents(scope)
        known = self.knowledge
        varies = [known.varies(o) for o in operands[:2]]

        reason = ""
        role: Role = "input gradient" if backward else "forward"
        weight: Side | None
        if ragged:
            found = ragged_role(eqn, dims)
            role = found or role
            weight = None if role == "weight gradient" else "rhs"
            if found is None:
                reason = "a ragged product of a form without a kernel"
        else:
            weight = self._weight(operands[:2], varies, dims, backward)
            if weight is None and backward and not any(dims.batch):
                role = "weight gradient"

        w = 0 if weight == "lhs" else 1
        sizes = _sizes(eqn, dims, w)
        if ragged and role != "weight gradient" and found is not None:
            sizes["n"] = rhs.aval.shape[3 - dims.contract[1][0]]
        product = Candidate(
            kind="ragged_dot" if ragged else "dot_general",
            scope=scope,
            weight_path="" if weight is None else known.path(operands[w]),
            role=role,
            lhs_shape=lhs.aval.shape,
            rhs_shape=rhs.aval.shape,
            lhs_dtype=lhs.aval.dtype,
            rhs_dtype=rhs.aval.dtype,
            out_dtype=out.aval.dtype,
            weight=weight,
            repeats=repeats,
            **sizes,
        )
        reason = reason or impossible(product, eqn, dims, any(o.tangent for o in operands[:2]))
        if reason:
            return dataclasses.replace(product, reason=reason)

        facts = Facts(
            one_hot=operands[0].one_hot or operands[1].one_hot,
            table=weight is not None and not operands[w].leaves.isdisjoint(known.tables),
            logits=weight is not None and self._is_logits(dims, w, axes.get(out, NONE)),
            of_excluded=self._of_excluded(eqn, operands, weight, w, backward, jaxpr, read),
        )
        reason = self.judge(product, facts)
        if weight is not None:
            self._learn(operands[1 - w], operands[w], facts, reason, any(varies))
        return dataclasses.replace(product, reason=reason)

    def _learn(self, activation, weight, facts: Facts, reason: str, varies: bool) -> None:
        """Keeps what a judged product says of its operands' origins."""
        known = self.knowledge
        if reason and (facts.one_hot or facts.table or facts.logits or facts.of_excluded):
            known.excluded |= weight.leaves - known.varying
        if not known.given and not varies and not reason.startswith("size"):
            known.learn(activation, weight)
        known.weights |= weight.leaves

    def _weight(self, origins, varies, dims, backward) -> Side | None:
        if self.weight != "infer" and not (backward and all(varies)):
            return self.weight  # type: ignore[return-value]
        if all(varies):
            return None
        if any(varies):
            return "rhs" if varies[0] else "lhs"
        known = self.knowledge
        left, right = (o.leaves for o in origins)
        if left and left == right or min(len(left), len(right)) > 1 and left & right:
            return None  # computed from the same activations
        # Neither is known to carry the batch. The more telling signs come first.
        signs = (
            lambda i: origins[i].computed,
            lambda i: len(origins[i].leaves) > 1,
            lambda i: not known.constant(origins[i]),
            lambda i: -max(known.depths(origins[i])),
            lambda i: len(dims.free[i]),
        )
        for sign in signs:
            if sign(0) != sign(1):
                return "rhs" if sign(0) > sign(1) else "lhs"
        return "rhs"

    @staticmethod
    def _is_logits(dims: Dims, w: int, ranked: Axes) -> bool:
        """Whether the result is ranked along the weight's columns."""
        batch, rows = len(dims.batch[0]), len(dims.free[0])
        first = batch + (rows if w == 1 else 0)
        return any(first <= axis < first + len(dims.free[w]) for axis in ranked)

    def _of_excluded(self, eqn, operands, weight, w, backward, jaxpr, read) -> bool:
        excluded = self.knowledge.excluded
        if not excluded or not backward:
            return False
        if weight is not None:
            return not operands[w].leaves.isdisjoint(excluded)
        # A weight gradient shares its cotangent with an input gradient, whose weight is known.
        ours = {v for v in eqn.invars[:2] if not isinstance(v, JaxprLiteral)}
        for other in jaxpr.eqns:
            if other is eqn or other.primitive is not eqn.primitive:
                continue
            for v, partner in (other.invars[:2], other.invars[1::-1]):
                if isinstance(v, JaxprLiteral) or v not in ours:
                    continue
                try:
                    leaves = read(partner).leaves
                except KeyError:  # computed later, so no weight
                    continue
                if not leaves.isdisjoint(excluded) and leaves <= self.knowledge.weights:
                    return True
        return False


def _sizes(eqn, dims: Dims, w: int) -> dict[str, Any]:
    """Batch (or groups), m, n and k of a product whose weight is operand `w`."""
    sides = lhs, _ = eqn.invars[:2]
    ragged = eqn.primitive.name == "ragged_dot_general"
    return {
        "batch": eqn.invars[2].aval.shape[-1] if ragged else size_over(lhs, dims.batch[0]),
        "m": size_over(sides[1 - w], dims.free[1 - w]),
        "n": size_over(sides[w], dims.free[w]),
        "k": size_over(lhs, dims.contract[0]),
    }
