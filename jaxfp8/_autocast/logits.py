"""Which values are logits: ranked or normalized across features further down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal as JaxprLiteral

from .jaxprs import bodies, open_jaxpr, scan_counts

Axes = frozenset
NONE: Axes = frozenset()

_RANKS = {"argmax": "axes", "argmin": "axes", "reduce_max": "axes"}
_KEEPING = frozenset(
    """neg exp exp2 log log1p expm1 tanh logistic erf abs sign sqrt rsqrt integer_pow square convert_element_type copy
    copy_p stop_gradient name reduce_precision sharding_constraint reshard pvary pcast add sub mul div max min pow
    add_any select_n clamp concatenate split pad rev slice dynamic_slice dynamic_update_slice cumsum cumlogsumexp cummax
    psum psum2 psum_invariant pmax pmin ppermute all_gather optimization_barrier nextafter""".split()
)
"""Each operand of the result's rank has the result's axes."""

_REDUCING = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin".split())

_BROADCAST = frozenset(
    "broadcast_in_dim stop_gradient reshape max squeeze copy convert_element_type".split()
)


class Logits:
    """Which axes of which values are ranked or normalized across: by top_k, argmax, sort or a softmax's maximum."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[Axes, ...]], tuple[dict[Any, Axes], list[Axes]]] = {}
        self._alive: list[Any] = []  # ids stay unique while their jaxprs live

    def inside(self, jaxpr: Any, outs: Sequence[Axes]) -> tuple[dict[Any, Axes], list[Axes]]:
        """(axes of each variable, axes of each input), given what happens to the results."""
        jaxpr, _ = open_jaxpr(jaxpr)
        key = (id(jaxpr), tuple(outs))
        if key not in self._kept:
            self._alive.append(jaxpr)
            self._kept[key] = self._walk(jaxpr, outs)
        return self._kept[key]

    def _walk(self, jaxpr, outs):
        axes: dict[Any, Axes] = {}
        made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        subtracted = self._subtracted(jaxpr, made)

        def put(atom, found):
            if found and not isinstance(atom, JaxprLiteral):
                axes[atom] = axes.get(atom, NONE) | found

        for atom, found in zip(jaxpr.outvars, outs, strict=True):
            put(atom, found)
        for eqn in reversed(jaxpr.eqns):
            self._step(eqn, [axes.get(v, NONE) for v in eqn.outvars], put, made, subtracted)
        return axes, [axes.get(v, NONE) for v in jaxpr.invars]

    @staticmethod
    def _subtracted(jaxpr, made):
        """Results of equations that are subtracted from something: of a maximum, the one of a softmax."""
        found = set()
        for eqn in jaxpr.eqns:
            v = eqn.invars[1] if eqn.primitive.name == "sub" else None
            while v is not None and not isinstance(v, JaxprLiteral) and v not in found:
                found.add(v)
                before = made.get(v)
                through = before is not None and before.primitive.name in _BROADCAST
                v = before.invars[-1] if through else None
        return found

    def _step(self, eqn, outs, put, made, subtracted):
        name, params = eqn.primitive.name, eqn.params
        x: Any = eqn.invars[0] if eqn.invars else None
        before = None if x is None or isinstance(x, JaxprLiteral) else made.get(x)
        if name in _RANKS:
            if len(params["axes"]) == 1 and (name != "reduce_max" or eqn.outvars[0] in subtracted):
                put(x, Axes(params["axes"]))
        elif name == "reduce_sum" and before is not None and before.primitive.name == "exp":
            put(x, Axes(params["axes"]))
        elif name == "top_k":
            put(x, Axes({params.get("axis", -1) % len(x.aval.shape)}))
        elif name == "sort":
            put(x, Axes({params["dimension"]}))
        if not any(outs):
            for body in bodies(eqn):  # a softmax inside
                _, ins = self.inside(body.jaxpr, [NONE] * len(open_jaxpr(body.jaxpr)[0].outvars))
                self._put_ins(eqn, body, ins, put)
            return
        out = NONE.union(*outs)
        if name in _KEEPING:
            for v in eqn.invars:
                if len(v.aval.shape) == len(eqn.outvars[0].aval.shape):
                    put(v, out)
        elif name.startswith("scatter"):
            put(x, out)
        elif name in _REDUCING:
            kept = [i for i in range(len(x.aval.shape)) if i not in params["axes"]]
            put(x, Axes(kept[a] for a in out))
        elif name == "transpose":
            put(x, Axes(params["permutation"][a] for a in out))
        elif name == "broadcast_in_dim":
            dims = tuple(params["broadcast_dimensions"])
            put(x, Axes(dims.index(a) for a in out if a in dims))
        elif name == "reshape":
            put(x, Axes(_before_reshape(x.aval.shape, eqn.outvars[0].aval.shape, out)))
        elif name == "squeeze":
            kept = [i for i in range(len(x.aval.shape)) if i not in params["dimensions"]]
            put(x, Axes(kept[a] for a in out))
        else:
            self._enter(eqn, outs, put)

    def _enter(self, eqn, outs, put):
        name = eqn.primitive.name
        for body in bodies(eqn):
            jaxpr, _ = open_jaxpr(body.jaxpr)
            if name == "scan":
                _, carry = scan_counts(eqn)
                inner = [*outs[:carry], *(Axes(a - 1 for a in o if a > 0) for o in outs[carry:])]
            elif len(outs) == len(jaxpr.outvars):
                inner = list(outs)
            else:  # the condition of a while loop
                inner = [NONE] * len(jaxpr.outvars)
            _, ins = self.inside(jaxpr, inner)
            self._put_ins(eqn, body, ins, put)

    @staticmethod
    def _put_ins(eqn, body, ins, put):
        first_x = len(eqn.invars)
        if eqn.primitive.name == "scan":
            first_x = sum(scan_counts(eqn))
        for position, found in zip(body.ins, ins, strict=True):
            stacked = position >= first_x
            put(eqn.invars[position], Axes(a + 1 for a in found) if stacked else found)


def _before_reshape(old, new, axes):
    """Axes of the old shape that share elements' order with these axes of the new one: split and merged ones too."""
    for a in axes:
        start, stop = math.prod(new[a + 1 :]), math.prod(new[a:])
        for b in range(len(old)):
            low, high = math.prod(old[b + 1 :]), math.prod(old[b:])
            if low < stop and start < high and old[b] > 1:
                yield b
