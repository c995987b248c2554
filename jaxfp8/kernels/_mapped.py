"""A batch dimension for kernels that have none of their own."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax


def mapped(local):
    """`local`, applied to one index of each vmapped dimension (a name that starts with "v") at a time."""

    def run(*arrays, call):
        new = next((d for dims in call.outs for d in dims if d[0] == "v"), None)
        if new is None:
            return local(*arrays, call=call)
        axes = [dims.index(new) if new in dims else None for dims in call.ins]
        ins = tuple(tuple(d for d in dims if d != new) for dims in call.ins)
        outs = tuple(tuple(d for d in dims if d != new) for dims in call.outs)
        moved = [
            x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(arrays, axes, strict=True)
        ]

        def one(xs):
            it = iter(xs)
            inner = [x if a is None else next(it) for x, a in zip(moved, axes, strict=True)]
            return run(*inner, call=call._replace(ins=ins, outs=outs))

        ys = lax.map(one, [x for x, a in zip(moved, axes, strict=True) if a is not None])
        return [jnp.moveaxis(y, 0, dims.index(new)) for y, dims in zip(ys, call.outs, strict=True)]

    return run
