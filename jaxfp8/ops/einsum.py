"""einsum with the signature of jnp.einsum, for two operands."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._arrays import checks
from .._arrays.quantized_weight import frozen_weight
from .._arrays.recipe import Recipe, current_recipe
from ._arguments import check_precision, out_spec
from .dot_general import dot_general


def _expand(function, spec, lhs, rhs):
    """Labels of lhs, rhs and the output, ellipses written out as digits."""
    if not isinstance(spec, str):
        raise TypeError(
            f"{function}: subscripts is a {type(spec).__name__}; allowed: a str, 'ab,bc->ac'"
        )
    text = spec.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(f"{function}: subscripts {spec!r} has {len(terms)} operands; allowed: two")
    for term in [*terms, output]:
        rest = term.replace("...", "", 1)
        if rest and not rest.isalpha():
            raise ValueError(
                f"{function}: subscripts {spec!r} has the term {term!r}; allowed: letters and one ellipsis"
            )
    spread = []
    for name, term, x in (("lhs", terms[0], lhs), ("rhs", terms[1], rhs)):
        free = x.ndim - len(term.replace("...", ""))
        if free < 0 or (free > 0 and "..." not in term):
            raise ValueError(
                f"{function}: subscripts {spec!r} gives {name} the term {term!r}, but {name} has shape {x.shape}"
            )
        spread.append(free)
    digits = "".join(chr(ord("0") + i) for i in range(max(spread)))
    if len(digits) > 10:
        raise ValueError(
            f"{function}: subscripts {spec!r}: an ellipsis of {len(digits)} axes; allowed: 10"
        )

    def write(term, free):
        return term.replace("...", digits[len(digits) - free :])

    left, right = write(terms[0], spread[0]), write(terms[1], spread[1])
    if arrow:
        output = write(output, len(digits))
    else:  # NumPy's implicit output: the ellipsis, then the labels that occur once, sorted
        both = left + right
        output = digits + "".join(sorted(c for c in both if c.isalpha() and both.count(c) == 1))
    if len(set(output)) != len(output):
        raise ValueError(f"{function}: subscripts {spec!r}: the output repeats a label")
    if unknown := set(output) - set(left + right):
        raise ValueError(
            f"{function}: subscripts {spec!r}: the output has {sorted(unknown)}, which no operand has"
        )
    return left, right, output


def einsum(
    subscripts: str,
    lhs: Any,
    rhs: Any,
    /,
    *,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    recipe: Recipe | None = None,
) -> jax.Array:
    """`jnp.einsum` of two operands with an FP8 product, forward and backward.

    The second operand is the weight (128x128 blocks), whichever way the product is carried out.

    **Arguments:**

    - `subscripts`: such as `"btd,dhk->bthk"`; ellipses and an implicit output are allowed. At least one label must be
      contracted. Labels of one operand alone that the output lacks are summed first, in the operand's dtype.
    - `lhs`: the activation, float32, bfloat16 or float16.
    - `rhs`: the weight, likewise; or FP8 alone, as `jaxfp8.dot_general` takes it.
    - `precision`, `preferred_element_type`, `out_sharding`, `recipe`: as `jaxfp8.dot_general`.

    **Returns:** the array that the output labels describe.

    **Raises:** TypeError or ValueError for subscripts or operands that do not fit.
    """
    function = "einsum"
    recipe = current_recipe(function, recipe)
    lhs = checks.array(function, "lhs", lhs, "(...)")
    frozen = frozen_weight(function, "rhs", rhs, "(..., N, K)") is not None
    rhs = rhs if frozen else checks.array(function, "rhs", rhs, "(...)")
    check_precision(function, precision)
    left, right, output = _expand(function, subscripts, lhs, rhs)
    spec = out_spec(function, out_sharding, len(output))

    lhs, left = _reduce_alone(lhs, left, right + output)
    rhs, right = (_refuse_alone if frozen else _reduce_alone)(rhs, right, left + output)
    sizes: dict[str, int] = {}
    for name, term, x in (("lhs", left, lhs), ("rhs", right, rhs)):
        for label, size in zip(term, x.shape, strict=True):
            if sizes.setdefault(label, size) != size:
                raise ValueError(
                    f"{function}: subscripts {subscripts!r}: {name} has {size} along {label!r}, "
                    f"the other operand {sizes[label]}; they must match"
                )
    shared = [c for c in left if c in right]
    batch = [c for c in shared if c in output]
    contracted = [c for c in shared if c not in output]
    if not contracted:
        raise ValueError(
            f"{function}: subscripts {subscripts!r} contract no label; allowed: at least one"
        )
    dims = tuple(
        (tuple(left.index(c) for c in cs), tuple(right.index(c) for c in cs))
        for cs in (contracted, batch)
    )
    free = [c for c in left + right if c not in shared]
    got = batch + free
    in_order = got == list(output)
    y = dot_general(
        lhs,
        rhs,
        dims,
        precision,
        preferred_element_type,
        out_sharding=out_sharding if in_order else None,
        recipe=recipe,
    )
    if not in_order:
        y = jnp.transpose(y, [got.index(c) for c in output])
        if spec is not None:
            y = jax.sharding.reshard(y, out_sharding)
    return y


def _refuse_alone(x, term, others):
    """A weight that is FP8 alone, no label of which can be summed first."""
    if len(set(term)) != len(term) or not set(term) <= set(others):
        raise ValueError(
            f"einsum: subscripts sum over labels of rhs alone or repeat one in {term!r}; allowed of a weight that is "
            "FP8 alone: each label once, in lhs or the output"
        )
    return x, term


def _reduce_alone(x, term, others):
    """x with repeated labels taken as a diagonal and labels that nobody else has summed."""
    kept = "".join(dict.fromkeys(c for c in term if c in others))
    if kept == term:
        return x, term
    letters = {c: chr(ord("a") + i) for i, c in enumerate(dict.fromkeys(term))}

    def spell(labels):
        return "".join(letters[c] for c in labels)

    return jnp.einsum(f"{spell(term)}->{spell(kept)}", x), kept
