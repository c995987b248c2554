"""Every public operation at a small size, as one table: what holds for all of them is tested over it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxfp8

GROUPS = 3
SIZES = {"m": 40, "k": 128, "n": 64, "f": 128, "g": GROUPS, "c": 2, "b": 2, "2": 2}
"""Of each dimension: tokens, contraction, columns, hidden, groups, choices of a token, batch."""


INDEX = {"sizes": "g", "expert": "mc"}
"""Dimensions of an index."""


class Function(NamedTuple):
    """`call(*arrays, index)`: `arrays` and the result have the dimensions named ("?": of any size).

    `index` is what `index_of` makes: "sizes" of groups of rows, "expert" ids of tokens, or None.
    """

    call: Any
    dimensions: str
    index: str | None = None

    @property
    def letters(self) -> str:
        """Every dimension, once."""
        named = self.dimensions + INDEX.get(self.index, "")
        return "".join(d for d in SIZES if d.isalpha() and d in named)

    @property
    def arrays(self) -> list[str]:
        """The dimensions of each array."""
        return self.dimensions.partition("->")[0].split(",")

    @property
    def result(self) -> str:
        return self.dimensions.partition("->")[2]


def _exchange(x, gate, expert):
    rows, _, route = jaxfp8.dispatch(x, expert, GROUPS)
    return jaxfp8.combine(rows, gate, route)


def _prequantized(x, w, _):
    return jaxfp8.linear(x, jaxfp8.prequantize(w))


DIFFERENTIABLE = {
    "linear": Function(lambda x, w, _: jaxfp8.linear(x, w), "mk,kn->mn"),
    "linear, prequantized": Function(_prequantized, "mk,kn->mn"),
    "einsum": Function(lambda x, w, _: jaxfp8.einsum("mk,kn->mn", x, w), "mk,kn->mn"),
    "einsum, batch": Function(lambda x, w, _: jaxfp8.einsum("bmk,bkn->bmn", x, w), "bmk,bkn->bmn"),
    "dot_general": Function(
        lambda x, w, _: jaxfp8.dot_general(x, w, (((1,), (0,)), ((), ()))), "mk,kn->mn"
    ),
    "mlp": Function(lambda x, up, down, _: jaxfp8.mlp(x, up, down), "mk,k2f,fn->mn"),
    "ragged_dot": Function(jaxfp8.ragged_dot, "mk,gkn->mn", "sizes"),
    "ragged_mlp": Function(jaxfp8.ragged_mlp, "mk,gk2f,gfn->mn", "sizes"),
    "dispatch and combine": Function(_exchange, "mk,mc->mk", "expert"),
    "moe": Function(
        lambda x, gate, up, down, expert: jaxfp8.moe(x, expert, gate, up, down),
        "mk,mc,gk2f,gfn->mn",
        "expert",
    ),
    "autocast": Function(
        lambda x, w, _: jaxfp8.autocast(
            lambda w, x: jnp.tanh(x @ w), policy=jaxfp8.AutocastPolicy(min_m=1, min_n=1, min_k=1)
        )(w, x),
        "mk,kn->mn",
    ),
}


def _grouped(x, w, sizes):
    return jaxfp8.grouped_gemm(jaxfp8.quantize(x), jaxfp8.quantize_weight(w)[0], sizes)


def _masked(x, w, sizes):
    lhs = jaxfp8.quantize(jnp.broadcast_to(x, (w.shape[0], *x.shape)))
    return jaxfp8.masked_grouped_gemm(lhs, jaxfp8.quantize_weight(w)[0], sizes)


def _grouped_wgrad(x, y, sizes):
    columns = [jaxfp8.quantize_both(v, group_sizes=sizes)[1] for v in (x, y)]
    return jaxfp8.grouped_wgrad_gemm(*columns, sizes)


QUANTIZED = {
    "quantize": Function(lambda x, _: jaxfp8.quantize(x).dequantize(), "mk->mk"),
    "quantize_both": Function(lambda x, _: jaxfp8.quantize_both(x)[1].dequantize(), "mk->km"),
    "quantize_both, groups": Function(
        lambda x, sizes: jaxfp8.quantize_both(x, group_sizes=sizes)[1].dequantize(),
        "mk->k?",
        "sizes",
    ),
    "quantize_weight": Function(lambda x, _: jaxfp8.quantize_weight(x)[0].dequantize(), "mk->km"),
    "gemm": Function(
        lambda x, w, _: jaxfp8.gemm(jaxfp8.quantize(x), jaxfp8.quantize_weight(w)[0]),
        "mk,kn->mn",
    ),
    "wgrad_gemm": Function(
        lambda x, y, _: jaxfp8.wgrad_gemm(*(jaxfp8.quantize_both(v)[1] for v in (x, y))),
        "mk,mn->kn",
    ),
    "grouped_gemm": Function(_grouped, "mk,gkn->mn", "sizes"),
    "masked_grouped_gemm": Function(_masked, "mk,gkn->gmn", "sizes"),
    "grouped_wgrad_gemm": Function(_grouped_wgrad, "mk,mn->gkn", "sizes"),
}

FUNCTIONS = DIFFERENTIABLE | QUANTIZED


def shapes_of(function: Function, **sizes) -> list[tuple]:
    return [tuple((SIZES | sizes)[d] for d in dimensions) for dimensions in function.arrays]


def arrays_of(function: Function, **sizes) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes_of(function, **sizes)]


def index_of(function: Function, dtype=np.int32, **sizes):
    tokens, groups, choices = ((SIZES | sizes)[d] for d in "mgc")
    if function.index == "sizes":  # a group without rows among them
        return np.array([tokens // 2, *[0] * (groups - 2), tokens - tokens // 2][:groups], dtype)
    if function.index == "expert":
        return (np.arange(tokens * choices).reshape(tokens, choices) % GROUPS).astype(dtype)
    return None
