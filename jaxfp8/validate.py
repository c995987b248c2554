"""What FP8 does to arrays, and to a model's loss and gradients: which layer suffers.

print(jaxfp8.validate.quantization_report(params, block=(128, 128)))
comparison = jaxfp8.validate.compare(loss_fn, params, batch)
print(comparison);  comparison.plot("comparison.png")
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._arrays.blocks import SQUARE
from ._arrays.quantized_array import QuantizedArray
from ._arrays.recipe import Recipe
from ._primitives import operation as _operation
from ._primitives.call import Call
from ._primitives.operation import Operation
from .kernels.activation import TWO
from .kernels.gather import take_rows
from .kernels.quantize import quantize, weight_operation
from .ops._dot import dot_operation, weight_dims
from .ops._mlp_dense import mlp_operation
from .ops._mlp_ragged import ragged_mlp_operation
from .ops._moe import moe_operation
from .ops._routing import plan
from .ops.ragged_dot import ragged_operation

__all__ = [
    "Comparison",
    "GradientError",
    "LeafReport",
    "ProductError",
    "Report",
    "compare",
    "quantization_report",
]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in lines)


# --------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What quantization does to one array.

    **Arguments:**

    - `path`: where the array is in its tree; `shape`: its shape.
    - `snr_db`: signal to noise, `10 log10(sum x^2 / sum (x - dequantized)^2)`, in dB; infinite where nothing is lost.
    - `saturated`: share of elements at the FP8 type's largest value. Each block's maximum is there, so it is at least
      one in 128 (1x128) or in 16384 (128x128); much more means clipped or constant data.
    - `underflowed`: share of the elements that are not zero and become zero.
    - `non_finite`: elements that are NaN or infinite; their blocks are left out of the other figures.
    """

    path: str
    shape: tuple[int, ...]
    snr_db: float
    saturated: float
    underflowed: float
    non_finite: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Leaves in the order of the tree; prints as a table."""

    leaves: tuple[LeafReport, ...]

    @property
    def worst(self) -> LeafReport:
        """The leaf with the least signal to noise."""
        return min(self.leaves, key=lambda leaf: leaf.snr_db)

    def __str__(self) -> str:
        rows = [
            (
                leaf.path,
                "x".join(map(str, leaf.shape)),
                f"{leaf.snr_db:.1f}",
                f"{leaf.saturated:.2%}",
                f"{leaf.underflowed:.2%}",
                str(leaf.non_finite),
            )
            for leaf in self.leaves
        ]
        return _table(("array", "shape", "SNR dB", "saturated", "underflowed", "not finite"), rows)


def quantization_report(
    tree: Any, block: tuple[int, int] = (1, 128), *, recipe: Recipe | None = None
) -> Report:
    """Quantizes every floating-point array of a tree and says what is lost.

    **Arguments:**

    - `tree`: an array or a pytree: float32, bfloat16 or float16 `(..., M, K)`, blocks along the last axis. Other leaves
      are skipped, as are vectors and scalars that the block does not fit.
    - `block`: `(1, 128)` for activations and gradients, `(128, 128)` for weights.
    - `recipe`: a `jaxfp8.Recipe`; None is the one in force.

    **Returns:** a `Report`.

    **Raises:** ValueError if there is no array to report on.
    """
    least = 2 if tuple(block) == SQUARE else 1
    leaves = []
    empty = False
    for path, x in jax.tree.leaves_with_path(tree):
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < least:
            continue
        if not x.size:
            empty = True
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "array"
        leaves.append(_leaf_report(name, x, quantize(x, block, recipe=recipe)))
    if not leaves:
        what = f"floating-point array of {least} or more axes"
        raise ValueError(
            f"quantization_report: {f'each {what} of tree is empty' if empty else f'tree has no {what}'}"
        )
    return Report(tuple(leaves))


def _leaf_report(path: str, x: Any, q: QuantizedArray) -> LeafReport:
    value = np.asarray(x).astype(np.float64)
    data = np.asarray(q.data).astype(np.float64)
    got = np.asarray(q.dequantize()).astype(np.float64)
    finite = np.isfinite(got)
    value, data, got = (a[finite] for a in (value, data, got))
    signal, noise = float((value**2).sum()), float(((value - got) ** 2).sum())
    nonzero = int((value != 0).sum())
    return LeafReport(
        path=path,
        shape=tuple(x.shape),
        snr_db=10 * math.log10(signal / noise) if signal and noise else math.inf,
        saturated=float((np.abs(data) == float(jnp.finfo(q.dtype).max)).mean())
        if data.size
        else 0.0,
        underflowed=int(((data == 0) & (value != 0)).sum()) / nonzero if nonzero else 0.0,
        non_finite=int((~np.isfinite(np.asarray(x).astype(np.float64))).sum()),
    )


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


def _reference_dot(x, w, *quantized, call: Call):
    """The product in its operands' own type, accumulated in float32; of a weight quantized ahead, its value's."""
    letters = {d: chr(ord("a") + i) for i, d in enumerate(call.names)}
    left, right, out = ("".join(letters[d] for d in dims) for dims in (*call.ins[:2], call.outs[0]))
    dtype = jnp.result_type(x, w)
    y = jnp.einsum(
        f"{left},{right}->{out}",
        x.astype(dtype),
        w.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return [y.astype(call.get("out_dtype"))]


def _reference_ragged(x, w, sizes, *quantized, call: Call):
    dtype = jnp.result_type(x, w)
    product = functools.partial(lax.ragged_dot, preferred_element_type=jnp.float32)
    # JAX maps a ragged_dot over the first axes of all operands, or not at all.
    operands, dims_of = [x.astype(dtype), w.astype(dtype), sizes], call.ins[:3]
    mapped = [d for d in call.outs[0] if d[0] == "v"]
    shape = [call.sizes([x, w, sizes, *quantized])[d] for d in mapped]
    for i, (operand, dims) in enumerate(zip(operands, dims_of, strict=True)):
        missing = [at for at, d in enumerate(mapped) if d not in dims]
        core = operand.shape[len(mapped) - len(missing) :]
        operands[i] = jnp.broadcast_to(jnp.expand_dims(operand, missing), (*shape, *core))
    for _ in mapped:
        product = jax.vmap(product)
    return [product(*operands).astype(call.get("out_dtype"))]


_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
}


def _two_products(operation, arrays, call: Call):
    """mlp or ragged_mlp by the two products that it is made of, each of which is stood in for; gate and up are one."""
    (x, w_up, w_down), rest = arrays[:3], arrays[3:]
    x_dims, up_dims, (out,) = call.ins[0], call.ins[1], call.outs
    product = dot_operation
    sizes, dims = [], []
    if operation is ragged_mlp_operation:
        product, sizes, dims, rest = ragged_operation, [rest[0]], [call.ins[3]], rest[1:]
    gated, operands = TWO in up_dims, jnp.result_type(x, w_up, w_down)
    w_dims = tuple(d for d in up_dims if d not in (TWO, "f")) + ("n",)

    def merge(w, axis):
        return w.reshape(*w.shape[:axis], 2 * w.shape[axis + 1], *w.shape[axis + 2 :])

    up, copies, at = w_up, [*rest[:4]], w_up.ndim - 2
    if gated:
        at -= 1  # of the first axis of (2, F, K), and of (K, 2, F), after the groups
        up = merge(up, at + 1)
        copies = [merge(w, at + i // 2) for i, w in enumerate(copies)]

    def multiply(x, w, copies, dtype, operand):
        ins = x_dims, w_dims, *dims, *weight_dims(w_dims, copies)
        made_of = Call(ins, (out,), call.attributes, () if operand == "w_up" else call.wanted)
        made_of = made_of.with_attribute("out_dtype", dtype).with_attribute("operand", operand)
        return product(x, w, *sizes, *copies, call=made_of)

    (h,) = multiply(x, up, copies, call.get("hidden_dtype"), "w_up")
    activation = _ACTIVATIONS.get(name := call.get("activation"))
    if activation is None:
        raise NotImplementedError(
            f"compare: no reference for activation {name!r}; there is one for {', '.join(_ACTIVATIONS)}"
        )
    if gated:
        gate, h = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        a = activation(gate) * h
    else:
        a = activation(h.astype(jnp.float32))
    return multiply(a.astype(operands), w_down, rest[4:], call.get("out_dtype"), "w_down")


def _mixture(operation, arrays, call: Call):
    """moe by the two ragged products that it is made of, each of which is stood in for."""
    x, w_up, w_down, expert, gate, *copies = arrays
    _, up_dims, down_dims, _, _, *copy_dims = call.ins
    routing = plan(expert, call.get("experts"), call.get("max_rows"))
    ins = ("m", "k"), up_dims, down_dims, ("g",), *copy_dims
    of_rows = Call(ins, (("m", "n"),), call.attributes)
    (y,) = _two_products(
        ragged_mlp_operation,
        (take_rows(x, routing.source), w_up, w_down, routing.group_sizes, *copies),
        of_rows.with_attribute("out_dtype", call.get("hidden_dtype")),
    )
    terms = take_rows(y.astype(jnp.float32), routing.position) * gate[..., None]
    lost = (routing.position >= routing.source.size).any(1, keepdims=True)
    total = jnp.where(lost, jnp.nan, terms.sum(1))
    return [total.astype(call.get("out_dtype"))]


def _require_known(operation: Operation) -> None:
    """An operation without a reference would stay in FP8 in what it is compared with."""
    if operation not in _REFERENCES:
        name = operation.primitive.name.removeprefix("jaxfp8_")
        raise NotImplementedError(
            f"compare: loss_fn calls {name}; implemented: linear, dot_general, einsum, ragged_dot, mlp, ragged_mlp "
            "and moe (write it with these, or pass reference=)"
        )


def _differentiated(body):
    return lambda call, moving, *arrays: body(*arrays, call=call)


_REFERENCES: dict[Operation, Callable[..., list]] = {
    dot_operation: _reference_dot,
    ragged_operation: _reference_ragged,
}
_REFERENCE_OPERATIONS = {
    operation: Operation(
        f"{operation.primitive.name}_reference",
        body,
        together=operation.together,
        derivative=_differentiated(body),
    )
    for operation, body in _REFERENCES.items()
}


_MADE_OF_TWO: dict[Operation, Callable[..., list]] = {
    mlp_operation: _two_products,
    ragged_mlp_operation: _two_products,
    moe_operation: _mixture,
}


def _reference_stand_in(operation, arrays, call):
    if operation in _REFERENCE_OPERATIONS.values():
        return None
    if operation in _MADE_OF_TWO:
        return _MADE_OF_TWO[operation](operation, arrays, call)
    if operation is weight_operation:
        # Of a weight quantized ahead: its products read its value. What else reads the copies is seen to.
        types = operation.body.trace(*arrays, call=call).jaxpr.out_avals
        return [jnp.full(t.shape, jnp.nan, t.dtype) for t in types]
    _require_known(operation)
    return _REFERENCE_OPERATIONS[operation](*arrays, call=call)


class _Probe:
    """Stands in for each product: computes it both ways, passes the reference on, and collects the difference.

    What reaches a product is the reference's, so its error is its own and not that of layers before it.
    """

    def __init__(self) -> None:
        self.sites: list[tuple[str, tuple[int, int, int]]] = []
        self.sums: dict[tuple[int, str], np.ndarray] = {}

    def __call__(self, operation, arrays, call):
        if operation in _PROBED.values():  # vmap has folded a batch into a product that is known
            site = call.get("site")
            self.sites[site] = self.sites[site][0], _shape(call, call.sizes(arrays))
            return None
        if operation in _MADE_OF_TWO:
            return _MADE_OF_TWO[operation](operation, arrays, call)
        if operation not in _PROBED:  # its products count in the loss and the gradients alone
            return None
        operand = dict(call.attributes).get("operand")
        name = _caller() + (f", {operand}" if operand else "")
        self.sites.append((name, _shape(call, call.sizes(arrays))))
        call = call.with_attribute("probe", self).with_attribute("site", len(self.sites) - 1)
        return _PROBED[operation](*arrays, call=call)

    def record(self, site: int, which: str, got, want) -> None:
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        jax.debug.callback(
            functools.partial(self._add, site, which), jnp.sum((got - want) ** 2), jnp.sum(want**2)
        )

    def _add(self, site, which, noise, signal):
        sums = self.sums.setdefault((site, which), np.zeros(2))
        sums += (float(noise), float(signal))

    def errors(self, site: int) -> dict[str, float | None]:
        def error(which):
            if (site, which) not in self.sums:
                return None
            noise, signal = self.sums[site, which]
            return math.sqrt(noise / signal) if signal else (math.inf if noise else 0.0)

        return {which: error(which) for which in ("forward", "dgrad", "wgrad")}


def _shape(call: Call, sizes: dict[str, int]) -> tuple[int, int, int]:
    k, n = call.ins[1][-2:]
    return math.prod(sizes[d] for d in call.outs[0] if d != n), sizes[k], sizes[n]


def _caller() -> str:
    """The line of the user's program from which a product is called."""
    libraries = tuple(
        f"{name}." for name in ("jaxfp8", "jax", "flax", "equinox", "qwix", "tokamax")
    )
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = f"{frame.f_globals.get('__name__', '')}."
        inner = frame.f_code.co_filename.startswith("<")
        if not inner and not module.startswith((*libraries, "contextlib.", "functools.")):
            break
        frame = frame.f_back
    file = os.path.basename(frame.f_code.co_filename)
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


def _probed(operation: Operation) -> Operation:
    reference = _REFERENCES[operation]

    def both(call, *arrays):
        probe, site = call.get("probe"), call.get("site")
        (want,) = reference(*arrays, call=call)
        (got,) = operation.body(*arrays, call=_plain(call))
        probe.record(site, "forward", got, want)
        return [want]

    derivative: Any = operation.derivative
    probed: Any = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(both)

    def fwd(call, *arrays):
        return both(call, *arrays), arrays

    def bwd(call, arrays, cotangents):
        probe, site = call.get("probe"), call.get("site")
        operands, rest = arrays[:2], arrays[2:]

        def pull(f):
            _, transpose = jax.vjp(lambda *xs: f(*xs, *rest), *operands)
            return transpose(cotangents)

        want = pull(lambda *xs: reference(*xs, call=call))
        got = pull(lambda *xs: derivative(_plain(call), (0, 1), *xs))
        for which, a, b in zip(("dgrad", "wgrad"), got, want, strict=True):
            probe.record(site, which, a, b)
        return (*want, *(None for _ in rest))

    probed.defvjp(fwd, bwd)
    return Operation(
        f"{operation.primitive.name}_probed",
        lambda *arrays, call: both(call, *arrays),
        together=operation.together,
        derivative=lambda call, moving, *arrays: probed(call, *arrays),
    )


def _plain(call: Call) -> Call:
    return call._replace(
        attributes=tuple(a for a in call.attributes if a[0] not in ("probe", "site", "operand"))
    )


_PROBED = {operation: _probed(operation) for operation in _REFERENCES}


@dataclasses.dataclass(frozen=True)
class ProductError:
    """The norm-wise relative error that one product adds, given exact inputs.

    **Arguments:**

    - `name`: its place in the order of calls, and the line that calls it.
    - `shape`: (M, K, N): rows in all, contraction, columns.
    - `forward`, `dgrad`, `wgrad`: errors of the result and of both gradients, over every time that it ran (the steps of
      a scan are one product); None for what did not run.
    """

    name: str
    shape: tuple[int, int, int]
    forward: float | None
    dgrad: float | None
    wgrad: float | None

    @property
    def largest(self) -> float:
        """The largest of the three."""
        return max(
            (e for e in (self.forward, self.dgrad, self.wgrad) if e is not None), default=0.0
        )


@dataclasses.dataclass(frozen=True)
class GradientError:
    """How far the gradient of one parameter is from the reference's, all errors of all layers included.

    **Arguments:**

    - `path`: where the parameter is in its tree.
    - `norm`, `reference_norm`: of the gradient in FP8 and of the reference's.
    - `error`: `|gradient - reference| / |reference|`.
    - `cosine`: of the angle between them.
    """

    path: str
    norm: float
    reference_norm: float
    error: float
    cosine: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Loss and gradients in FP8 and in the operands' own type; prints as tables."""

    loss: float
    reference_loss: float
    products: tuple[ProductError, ...]
    gradients: tuple[GradientError, ...]

    @property
    def relative_loss_difference(self) -> float:
        """`(loss - reference) / |reference|`."""
        difference = self.loss - self.reference_loss
        return difference / abs(self.reference_loss) if self.reference_loss else difference

    @property
    def worst_product(self) -> ProductError:
        """The product that adds the largest error: where to look first."""
        return max(self.products, key=lambda p: p.largest)

    @property
    def worst_gradient(self) -> GradientError:
        """The parameter whose gradient is furthest off."""
        return max(self.gradients, key=lambda g: g.error)

    def __str__(self) -> str:
        def share(e):
            return "-" if e is None else f"{e:.2%}"

        products = [
            (p.name, "x".join(map(str, p.shape)), share(p.forward), share(p.dgrad), share(p.wgrad))
            for p in self.products
        ]
        gradients = [
            (g.path, f"{g.reference_norm:.3g}", f"{g.norm:.3g}", share(g.error), f"{g.cosine:.4f}")
            for g in self.gradients
        ]
        return "\n\n".join(
            (
                f"loss {self.loss:.6g}, reference {self.reference_loss:.6g}, {self.relative_loss_difference:+.3%}",
                _table(("product", "M x K x N", "forward", "dgrad", "wgrad"), products),
                _table(("gradient of", "norm", "in FP8", "error", "cosine"), gradients),
            )
        )

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Bars of every product's errors and of every gradient's, as a matplotlib figure; saved if there is a path."""
        from matplotlib.figure import Figure

        rows = len(self.products), len(self.gradients)
        figure = Figure((10, 2.2 + 0.34 * sum(rows)), layout="constrained")
        left, right = figure.subplots(2, 1, gridspec_kw=dict(height_ratios=[r + 2 for r in rows]))
        for i, which in enumerate(("forward", "dgrad", "wgrad")):
            values = [100 * (getattr(p, which) or 0) for p in self.products]
            at = [y + 0.27 * (i - 1) for y in range(rows[0])]
            left.barh(at, values, 0.25, label=which)
        left.set_yticks(range(rows[0]), [p.name for p in self.products])
        left.set_title("error that a product adds", loc="left")
        left.legend()
        right.barh(range(rows[1]), [100 * g.error for g in self.gradients], 0.6, color="0.5")
        right.set_yticks(range(rows[1]), [g.path for g in self.gradients])
        right.set_title(
            f"error of a gradient, all layers' included; loss {self.relative_loss_difference:+.3%}",
            loc="left",
        )
        for axes in (left, right):
            axes.invert_yaxis()
            axes.set_xlabel("relative error, norm-wise, %")
            axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def compare(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    reference: Callable[..., Any] | None = None,
) -> Comparison:
    """Compares a model's loss and gradients in FP8 with the same model's without FP8, and finds the layer that suffers.

    The reference is `loss_fn` itself with every product of `jaxfp8.linear`, `dot_general`, `einsum`, `ragged_dot`,
    `mlp`, `ragged_mlp` and `moe` (so those of `autocast` and of the framework integrations) computed in its operands'
    type, bfloat16 or float32, and accumulated in float32. A third run computes each product both ways from the
    reference's inputs: what it adds. An MLP is two products, by `w_up` and by `w_down`; so is a mixture.

    **Arguments:**

    - `loss_fn`: `(params, *args) -> scalar`. Runs three times under `jax.jit`; may use jit, vmap, scan and remat.
    - `params`: a pytree of floating-point arrays, which is differentiated.
    - `args`: what else it takes: arrays or pytrees of them.
    - `reference`: another function to compare with, of the same arguments; None is `loss_fn` without FP8.

    **Returns:** a `Comparison`.

    **Raises:** ValueError if `loss_fn` has no FP8 product of these; NotImplementedError if it has others and no
    reference is given.
    """

    def run(f, stand_in):
        with _operation.stand_in(stand_in):
            result = jax.jit(lambda *xs: jax.value_and_grad(f)(*xs))(params, *args)
            return jax.block_until_ready(result)

    probe = _Probe()
    run(loss_fn, probe)
    jax.effects_barrier()
    products = tuple(
        ProductError(f"{number}: {caller}", shape, **errors)
        for number, (caller, shape, errors) in enumerate(
            (caller, shape, probe.errors(site))
            for site, (caller, shape) in enumerate(probe.sites)
            if (site, "forward") in probe.sums  # others were traced and thrown away
        )
    )
    if not products:
        raise ValueError("compare: loss_fn has no FP8 product")
    loss, grads = run(loss_fn, None)
    if reference is None:
        want_loss, want = run(loss_fn, _reference_stand_in)
    else:
        want_loss, want = run(reference, None)
    gradients = tuple(
        _gradient_error(jax.tree_util.keystr(path, simple=True, separator=".") or "params", a, b)
        for (path, a), b in zip(
            jax.tree.leaves_with_path(grads), jax.tree.leaves(want), strict=True
        )
    )
    return Comparison(float(loss), float(want_loss), products, gradients)


def _gradient_error(path: str, got: Any, want: Any) -> GradientError:
    got, want = (np.asarray(x).astype(np.float64).ravel() for x in (got, want))
    norm, reference_norm = float(np.linalg.norm(got)), float(np.linalg.norm(want))
    gap = float(np.linalg.norm(got - want))
    both = norm * reference_norm
    return GradientError(
        path=path,
        norm=norm,
        reference_norm=reference_norm,
        error=gap / reference_norm if reference_norm else (math.inf if gap else 0.0),
        cosine=float(got @ want) / both if both else math.nan,
    )
