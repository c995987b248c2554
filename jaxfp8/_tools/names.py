"""What a product is called: the path of its weight, else the scopes that it is in, else the line that makes it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from typing import Any

from .._autocast.jaxprs import open_jaxpr
from .._autocast.plan import AutocastPlan, Nested, Written
from .._autocast.rewriter import FP8_SCOPE, KEPT_SCOPE, weight_name

_WEIGHT_SCOPE = "jaxfp8.weight"
GATED_SCOPE = "jaxfp8.gated"
"""Tells the first product of an MLP from the second."""


def with_names(jaxpr: Any, plan: AutocastPlan) -> Any:
    """A jaxpr whose FP8 operations are in name scopes with the paths of their weights, which gradients inherit.

    **Arguments:** `jaxpr`, open or closed; `plan`: what the planner found in it.
    """
    opened, _ = open_jaxpr(jaxpr)
    eqns = list(opened.eqns)
    for item in plan.items:
        eqn = eqns[item.index]
        if isinstance(item, Written) and any(item.paths):
            line = line_of(eqn.source_info.traceback)
            paths = ";".join(weight_name(p) or _clean(line) for p in item.paths)
            stack = eqn.source_info.name_stack.extend(f"{_WEIGHT_SCOPE}[{paths}]")
            eqns[item.index] = eqn.replace(source_info=eqn.source_info.replace(name_stack=stack))
        elif isinstance(item, Nested):
            params = dict(eqn.params)
            for (key, position), inner in item.bodies:
                if isinstance(params[key], tuple):
                    branches = list(params[key])
                    branches[position] = with_names(branches[position], inner)
                    params[key] = tuple(branches)
                else:
                    params[key] = with_names(params[key], inner)
            eqns[item.index] = eqn.replace(params=params)
    named = opened.replace(eqns=eqns)
    return jaxpr.replace(jaxpr=named) if hasattr(jaxpr, "consts") else named


def product_name(scope: str, traceback: Any, weight_path: str = "") -> str:
    """Of a product in name scopes that a traceback leads to, whose weight's path may be known."""
    return weight_in(scope) or _own_scopes(scope) or weight_name(weight_path) or line_of(traceback)


def weight_in(scope: str) -> str:
    """The path of the weight that autocast or `with_names` wrote into name scopes; empty if neither did."""
    for kind in (FP8_SCOPE, _WEIGHT_SCOPE):
        if found := re.findall(rf"{re.escape(kind)}\[([^\]]*)\]", scope):
            first, *second = found[-1].split(";")
            return second[0] if second and GATED_SCOPE not in scope else first
    return ""


def _own_scopes(scope: str) -> str:
    scope = re.sub(rf"{re.escape(KEPT_SCOPE)}\[[^\]]*\]", "", scope)
    names = re.split(r"[/()]+", scope)
    hidden = ("jvp", "transpose", "vmap", "checkpoint", "rematted_computation")
    return "/".join(n for n in names if n and n not in hidden and not n.startswith("jaxfp8."))


def _clean(text: str) -> str:
    """Without what separates name scopes."""
    return re.sub(r"[/()\[\];]+", " ", text).strip()


@functools.cache
def _libraries() -> tuple[str, ...]:
    """Files and folders whose lines are nobody's own program."""
    names = ("jax", "jaxlib", "jaxfp8", "flax", "equinox", "qwix", "tokamax")
    specs = (importlib.util.find_spec(name) for name in names)
    folders = [os.path.dirname(s.origin) + os.sep for s in specs if s is not None and s.origin]
    return (*folders, functools.__file__, contextlib.__file__, "<frozen ")


def line_of(traceback: Any) -> str:
    """The line of the user's program in a traceback of JAX's: `train.py:12 loss`; empty if there is none."""
    frames = traceback.frames if traceback is not None else ()
    own = [f for f in frames if not f.file_name.startswith(_libraries())]
    if not own:
        return ""
    files = (f for f in own if not f.file_name.startswith("<"))  # <string>: code that was made up
    frame = next(files, own[0])
    function = frame.function_name.rpartition(".")[2]
    return f"{os.path.basename(frame.file_name)}:{frame.line_num} {function}"
