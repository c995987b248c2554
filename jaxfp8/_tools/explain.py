"""explain: every product of a function and of its gradient, what runs it, and what that costs at best."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from .. import _ffi
from .._autocast import jaxprs
from .._autocast import planner as prods
from .._autocast.candidate import dimensions
from .._autocast.jaxprs import computes_cotangents, join_scopes, open_jaxpr
from .._autocast.plan import AutocastPlan
from .._autocast.policy import AutocastPolicy
from .._autocast.rewriter import FP8_SCOPE, KEPT_SCOPE, fp8_scope
from .._autocast.traced import Traced
from ..kernels.configurations import config_index, product_of_call
from ..ops._traffic import EXPLAINED
from .explanation import Explanation, Line
from .roofline import Device, device, here, nbytes

WOULD_RUN = "jaxfp8.autocast would run it in FP8"


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _launch(
    name: str, operands: tuple, results: tuple, config: int, num_sms: int, sms: int
) -> tuple:
    """Kernel, configuration and grid of a custom call on a GPU with `sms` multiprocessors."""
    plan = _ffi.plan(name, operands, results, config=config, num_sms=num_sms, device_sms=sms)
    return plan.kernel, _ffi.configs(name)[plan.config], plan.grid


OPAQUE = {"pallas_call": "a Pallas kernel", "ffi_call": "a custom call"}

MIXTURE = (
    "a mixture by hand: autocast does not see through the order of its rows, which are gathered in high precision and "
    "quantized afterwards; jaxfp8.moe is the layer as one operation"
)
_EXPLAINED = re.compile(rf"{re.escape(EXPLAINED)}\[([^\]]*)\]")


class _Walk:
    """Collects the products of a jaxpr and of those inside it."""

    def __init__(self, target: Device):
        self.device = target
        self.lines: list[Line] = []
        self.quantizations, self.quantization_bytes = 0, 0
        self.quantization_seconds = 0.0
        self.notes: dict[str, None] = {}
        self.gathers_rows = self.autocasts_ragged = False

    def jaxpr(self, jaxpr: Any, plan: AutocastPlan, scope: str, repeats: int | None) -> None:
        jaxpr, _ = open_jaxpr(jaxpr)
        items = {item.index: item for item in plan.items}
        for i, eqn in enumerate(jaxpr.eqns):
            name, item = eqn.primitive.name, items.get(i)
            here = join_scopes(scope, str(eqn.source_info.name_stack))
            self.notes |= dict.fromkeys(_EXPLAINED.findall(here))
            ours = name == "jaxfp8_grouped_gemm_leaf" and FP8_SCOPE in here
            self.autocasts_ragged |= ours or name == "ragged_dot_general"
            rows = eqn.outvars[0].aval if name == "gather" else None
            self.gathers_rows |= rows is not None and rows.ndim > 1 and _floating(rows)
            if name.startswith("jaxfp8_") and name.endswith("_leaf"):
                self.leaf(eqn, name.removeprefix("jaxfp8_").removesuffix("_leaf"), here, repeats)
            elif name in ("dot_general", "ragged_dot_general"):
                self.plain(eqn, item, here, repeats)
            elif name == "conv_general_dilated":
                self.convolution(eqn, here, repeats)
            elif name in OPAQUE:
                self.opaque(eqn, here, repeats)
            else:
                self.inside(eqn, item, here, repeats)

    def inside(self, eqn, item, scope, repeats):
        nothing = AutocastPlan(())
        bodies = jaxprs.bodies(eqn)
        plans = dict(item.bodies) if item else {}
        if not bodies:
            for inner in jaxprs_in_params(eqn.params):
                self.jaxpr(inner, nothing, scope, repeats)
        for body in bodies:
            times = None if repeats is None or body.repeats is None else repeats * body.repeats
            self.jaxpr(body.jaxpr, plans.get(body.key, nothing), scope, times)
        if len(bodies) > 1 and eqn.primitive.name == "cond" and plans:
            self.notes["every branch of a cond is counted"] = None

    # ---- kinds of products -----------------------------------------------------------------------

    def leaf(self, eqn, name, scope, repeats):
        operands = [(v.aval.shape, np.dtype(v.aval.dtype)) for v in eqn.invars]
        results = [(v.aval.shape, np.dtype(v.aval.dtype)) for v in eqn.outvars]
        size = sum(nbytes(*x) for x in operands + results)
        if "gemm" not in name:
            times = repeats or 1
            self.quantizations += times
            self.quantization_bytes += size * times
            self.quantization_seconds += times * self.device.seconds(0, size, "fp8")
            return
        groups, m, n, k = _product_sizes(name, operands, results)
        flops = 2 * m * n * k * (1 if "grouped" in name and "masked" not in name else groups)
        wide = (nbytes(*operands[0]) + nbytes(*operands[2])) * 2 + nbytes(*results[0])
        kernel, configuration, grid = self.launch(eqn, name, operands, results)
        backward = computes_cotangents(scope)
        role = "weight gradient" if "wgrad" in name or "1d1d" in name else "input gradient"
        if not backward and role == "input gradient":
            role = "recomputed" if "rematted_computation" in scope else "forward"
        what = (
            _display(scope),
            role,
            name,
            groups,
            m,
            n,
            k,
            "fp8",
            "",
            kernel,
            configuration,
            grid,
        )
        seconds = self.device.seconds(flops, size, "fp8"), self.device.seconds(flops, wide, "bf16")
        self.lines.append(Line(*what, repeats, flops, size, *seconds))

    def launch(self, eqn, name, operands, results):
        if any(0 in shape for shape, _ in operands + results):
            return "none", "empty", ()
        accum = len(operands) > 4 and operands[-1] == results[0]
        target, sms = f"{name}_accum" if accum else name, int(eqn.params["num_sms"])
        config = self.config(eqn, name)
        try:
            return _launch(target, tuple(operands), tuple(results), config, sms, self.device.sms)
        except ValueError as error:
            self.notes[f"refused on a Hopper GPU: {error}"] = None
            return "none", "refused on a Hopper GPU", ()

    def config(self, eqn, name) -> int:
        """The configuration that the program names, or that was tuned on the GPU at hand; -1: the heuristic's."""
        named, at_hand = eqn.params["config"], here()
        if named is None and (at_hand is None or device("explain", at_hand) != self.device):
            return -1
        avals = [v.aval for v in eqn.invars]
        product = product_of_call(name, avals, eqn.params["out_dtype"], eqn.params["num_sms"])
        return config_index(product, name, named)

    def plain(self, eqn, item, scope, repeats):
        product = item.product if item else None
        kept = re.search(rf"{re.escape(KEPT_SCOPE)}\[([^\]]*)\]", scope)
        reason = "inside an operation that autocast does not enter"
        if kept:
            reason = kept[1]
        elif product is not None:
            reason = product.reason or WOULD_RUN
        if product is None:
            batch, m, n, k = prods.sizes(eqn, dimensions(eqn), 1).values()
            flops = 2 * m * n * k * (1 if eqn.primitive.name == "ragged_dot_general" else batch)
        else:
            batch, m, n, k, flops = (getattr(product, a) for a in ("batch", *"mnk", "flops"))
        role = product.role if product else "forward"
        if role == "forward" and "rematted_computation" in scope:
            role = "recomputed"
        name = _display(scope)
        if product is not None and (not name or (not product.reason and product.weight_path)):
            name = _display(fp8_scope(product.weight_path))
        self.xla(eqn, name, role, (batch, m, n, k), flops, reason, repeats)

    def convolution(self, eqn, scope, repeats):
        out, kernel = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
        spec = eqn.params["dimension_numbers"]
        n = out[spec.out_spec[1]]
        k = math.prod(kernel) // kernel[spec.rhs_spec[0]]
        m = math.prod(out) // n
        flops, name = 2 * m * n * k, _display(scope)
        self.xla(eqn, name, "forward", (1, m, n, k), flops, "a convolution", repeats)

    def opaque(self, eqn, scope, repeats):
        cost, mapping = eqn.params.get("cost_estimate"), eqn.params.get("grid_mapping")
        runs = math.prod(g for g in mapping.grid if isinstance(g, int)) if mapping else 1
        flops = cost.flops if cost else runs * _flops_inside(eqn.params)
        reason = f"opaque: {OPAQUE[eqn.primitive.name]}, which autocast does not enter"
        self.xla(eqn, _display(scope), "forward", (1, 0, 0, 0), flops, reason, repeats)

    def xla(self, eqn, name, role, sizes, flops, reason, repeats):
        arrays = [*eqn.invars[:2], *eqn.outvars[:1]]
        size = sum(nbytes(v.aval.shape, v.aval.dtype) for v in arrays)
        dtype = np.dtype(eqn.invars[0].aval.dtype)
        seconds = self.device.seconds(flops, size, "bf16" if dtype.itemsize <= 2 else "tf32")
        groups, m, n, k = sizes
        what = (name, role, eqn.primitive.name, groups, m, n, k, dtype.name, reason, "", "", ())
        self.lines.append(Line(*what, repeats, flops, size, seconds, seconds))


def _flops_inside(params: Any) -> int:
    """Of the products in the jaxprs of an equation, each of which runs once."""
    total = 0
    for jaxpr in jaxprs_in_params(params):
        for eqn in open_jaxpr(jaxpr)[0].eqns:
            if eqn.primitive.name == "dot_general":
                lhs, contract = eqn.invars[0].aval.shape, dimensions(eqn).contract[0]
                k = math.prod(lhs[a] for a in contract)
                total += 2 * k * math.prod(eqn.outvars[0].aval.shape)
            total += _flops_inside(eqn.params)
    return total


def _product_sizes(name, operands, results):
    lhs, rhs, out = operands[0][0], operands[2][0], results[0][0]
    if name == "grouped_wgrad_gemm":  # (N, T) . (K, T): tokens without the padding of groups
        groups, n, k = out
        return groups, n, k, lhs[1] - groups * 128
    if name == "grouped_gemm":
        return rhs[0], lhs[0], rhs[1], lhs[1]
    return out[0], out[1], out[2], lhs[-1]


def _display(scope: str) -> str:
    """The path of the weight that autocast wrote into a scope, else the scope's own names."""
    if found := re.search(rf"{re.escape(FP8_SCOPE)}\[([^\]]*)\]", scope):
        return found[1]
    scope = re.sub(rf"{re.escape(KEPT_SCOPE)}\[[^\]]*\]", "", scope)
    names = re.split(r"[/()]+", scope)
    hidden = ("jvp", "transpose", "vmap", "checkpoint", "rematted_computation")
    return "/".join(n for n in names if n and n not in hidden and not n.startswith("jaxfp8."))


# ------------------------------------------------------------------------------------------------
# Public function
# ------------------------------------------------------------------------------------------------


def explain(
    fn: Any,
    *args: Any,
    gradient: bool | int | Sequence[int] | None = None,
    device_kind: str | Device | None = None,
    **kwargs: Any,
) -> Explanation:
    """Every product of `fn(*args, **kwargs)` and of its gradient: in FP8 by which kernel, or why not; and its cost.

    Nothing runs: the function is traced, and kernels are planned for a device kind without the device.

        print(jaxfp8.explain(jaxfp8.autocast(loss), params, batch))

    **Arguments:**

    - `fn`: any JAX function, with or without `jaxfp8.autocast`; a callable pytree of arrays.
    - `args`, `kwargs`: its arguments; `jax.ShapeDtypeStruct`s will do for arrays.
    - `gradient`: False leaves the gradient out; True takes it with respect to all floating arrays that are not data,
      an int or ints with respect to those arguments. None is True unless the function has a gradient in it, or JAX has
      none of it (a note says so).
    - `device_kind`: `"h100"`, `"h100-pcie"`, `"h100-nvl"`, `"h200"`, `"h200-nvl"`, `"h800"`, `"h20"`, `"gh200"`, or
      what JAX calls the device. None is the GPU at hand if it is a Hopper, else `"h100"`.

    **Returns:** an `Explanation`, which prints as a table and holds its lines as data. Times are the roofline's: the
    longer of FLOPs over the tensor cores' peak and bytes over the memory's; no kernel is faster. Float32 products of
    XLA's count at the rate of TF32.

    **Raises:** ValueError for an unknown device kind, or a `gradient` that no argument fits; what `fn` raises.
    """
    target = device("explain", device_kind)
    source, policy = getattr(fn, "autocast", (fn, AutocastPolicy()))
    traced = Traced(fn, args, kwargs, policy, abstract=True)
    learnt = traced if source is fn else Traced(source, args, kwargs, policy, abstract=True)
    planner = prods.Planner(learnt.knowledge, policy.judge, policy.weight)
    planner.plan(learnt.jaxpr, learnt.origins())
    closed, knowledge, origins = traced.jaxpr, traced.knowledge, traced.origins()
    walk = _Walk(target)

    wanted = _differentiated(gradient, closed, traced, learnt.knowledge)
    if isinstance(wanted, str):
        walk.notes[wanted] = None
    elif wanted:
        try:
            closed = _with_gradient(closed, wanted)
        except (TypeError, ValueError, NotImplementedError) as error:
            if gradient is not None:
                raise
            walk.notes[f"no gradient: {str(error).splitlines()[0]}"] = None
    jaxpr, constants = _without_dead_code(closed)
    origins = [*map(knowledge.add, constants), *origins]
    plan, _ = prods.Planner(knowledge, policy.judge, policy.weight).plan(jaxpr, origins)
    walk.jaxpr(jaxpr, plan, "", 1)
    if walk.gathers_rows and walk.autocasts_ragged:
        walk.notes[MIXTURE] = None
    return Explanation(
        lines=tuple(walk.lines),
        device=target,
        quantizations=walk.quantizations,
        quantization_bytes=walk.quantization_bytes,
        quantization_seconds=walk.quantization_seconds,
        notes=tuple(walk.notes),
    )


def _floating(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _differentiated(gradient, closed, traced, knowledge) -> list[int] | str:
    """The inputs to differentiate with respect to; none; or why not."""
    if gradient is False:
        return []
    floats = [i for i, v in enumerate(closed.jaxpr.invars) if _floating(v.aval)]
    if gradient is None or gradient is True:
        if gradient is None and _differentiates(closed.jaxpr):
            return []
        if not any(_floating(v.aval) for v in closed.jaxpr.outvars):
            return "no gradient: the function has no floating result"
        return [
            i for i in floats if knowledge.kinds[i] == "parameter" or i in knowledge.weights
        ] or floats
    nums = gradient if isinstance(gradient, Sequence) else (gradient,)
    chosen = [i for i in floats if traced.argument(i) in nums]
    if not chosen:
        raise ValueError(
            f"explain: gradient is {gradient!r}; allowed: True, False, None, or positions of arguments with floating "
            "arrays"
        )
    return chosen


def _differentiates(jaxpr: Any) -> bool:
    """Whether a program computes cotangents itself."""
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if "transpose(" in str(eqn.source_info.name_stack):
            return True
        if any(_differentiates(body.jaxpr) for body in jaxprs.bodies(eqn)):
            return True
    return False


def _with_gradient(closed: Any, wanted: Sequence[int]) -> Any:
    """The program that also computes the cotangents of some inputs."""
    results = [i for i, v in enumerate(closed.jaxpr.outvars) if _floating(v.aval)]

    def run(*arrays):
        def f(*moving):
            filled = list(arrays)
            for i, x in zip(wanted, moving, strict=True):
                filled[i] = x
            out = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *filled)
            return [out[i] for i in results], out

        ys, pull, out = jax.vjp(f, *(arrays[i] for i in wanted), has_aux=True)
        return out, pull([jnp.ones_like(y) for y in ys])

    return jax.make_jaxpr(run)(*(v.aval for v in closed.jaxpr.invars))


def _without_dead_code(closed: Any) -> tuple[Any, Sequence[Any]]:
    """The program without what no result needs; constants come before its inputs."""
    jaxpr = closed.jaxpr
    opened = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    live, _ = partial_eval.dce_jaxpr(opened, [True] * len(jaxpr.outvars), instantiate=True)
    return live, closed.consts
