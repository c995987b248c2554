"""Every public operation at a small size, as one table: what holds for all of them is tested over it."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jaxfp8

K, N, F, GROUPS, CHOICES = 128, 64, 128, 3, 2


class Function(NamedTuple):
    """`call(*arrays, index)`: `arrays` have the shapes (tokens is "m") and are differentiable; `index` has `index_of`.

    index: "sizes" (GROUPS,) of groups of rows, "expert" (m, CHOICES) of ids, or None.
    """

    call: Any
    shapes: tuple
    index: str | None = None


def _exchange(x, gate, expert):
    rows, _, route = jaxfp8.dispatch(x, expert, GROUPS)
    return jaxfp8.combine(rows, gate, route)


def _prequantized(x, w, _):
    return jaxfp8.linear(x, jaxfp8.prequantize(w))


DIFFERENTIABLE = {
    "linear": Function(lambda x, w, _: jaxfp8.linear(x, w), (("m", K), (K, N))),
    "linear, prequantized": Function(_prequantized, (("m", K), (K, N))),
    "einsum": Function(lambda x, w, _: jaxfp8.einsum("mk,kn->mn", x, w), (("m", K), (K, N))),
    "dot_general": Function(
        lambda x, w, _: jaxfp8.dot_general(x, w, (((1,), (0,)), ((), ()))), (("m", K), (K, N))
    ),
    "mlp": Function(lambda x, up, down, _: jaxfp8.mlp(x, up, down), (("m", K), (K, 2, F), (F, N))),
    "ragged_dot": Function(jaxfp8.ragged_dot, (("m", K), (GROUPS, K, N)), "sizes"),
    "ragged_mlp": Function(
        jaxfp8.ragged_mlp, (("m", K), (GROUPS, K, 2, F), (GROUPS, F, N)), "sizes"
    ),
    "dispatch and combine": Function(_exchange, (("m", K), ("m", CHOICES)), "expert"),
    "moe": Function(
        lambda x, gate, up, down, expert: jaxfp8.moe(x, expert, gate, up, down),
        (("m", K), ("m", CHOICES), (GROUPS, K, 2, F), (GROUPS, F, N)),
        "expert",
    ),
    "autocast": Function(
        lambda x, w, _: jaxfp8.autocast(
            lambda w, x: jnp.tanh(x @ w), policy=jaxfp8.AutocastPolicy(min_m=1, min_n=1)
        )(w, x),
        (("m", K), (K, N)),
    ),
}


def _grouped(x, w, sizes):
    return jaxfp8.grouped_gemm(jaxfp8.quantize(x), jaxfp8.quantize_weight(w)[0], sizes)


def _masked(x, w, sizes):
    lhs = jaxfp8.quantize(jnp.stack([x] * GROUPS))
    return jaxfp8.masked_grouped_gemm(lhs, jaxfp8.quantize_weight(w)[0], sizes)


def _grouped_wgrad(x, y, sizes):
    columns = [jaxfp8.quantize_both(v, group_sizes=sizes)[1] for v in (x, y)]
    return jaxfp8.grouped_wgrad_gemm(*columns, sizes)


QUANTIZED = {
    "quantize": Function(lambda x, _: jaxfp8.quantize(x).dequantize(), (("m", K),)),
    "quantize_both": Function(lambda x, _: jaxfp8.quantize_both(x)[1].dequantize(), (("m", K),)),
    "quantize_both, groups": Function(
        lambda x, sizes: jaxfp8.quantize_both(x, group_sizes=sizes)[1].dequantize(),
        (("m", K),),
        "sizes",
    ),
    "quantize_weight": Function(
        lambda x, _: jaxfp8.quantize_weight(x)[0].dequantize(), (("m", K),)
    ),
    "gemm": Function(
        lambda x, w, _: jaxfp8.gemm(jaxfp8.quantize(x), jaxfp8.quantize_weight(w)[0]),
        (("m", K), (K, N)),
    ),
    "wgrad_gemm": Function(
        lambda x, y, _: jaxfp8.wgrad_gemm(*(jaxfp8.quantize_both(v)[1] for v in (x, y))),
        (("m", K), ("m", N)),
    ),
    "grouped_gemm": Function(_grouped, (("m", K), (GROUPS, K, N)), "sizes"),
    "masked_grouped_gemm": Function(_masked, (("m", K), (GROUPS, K, N)), "sizes"),
    "grouped_wgrad_gemm": Function(_grouped_wgrad, (("m", K), ("m", N)), "sizes"),
}

FUNCTIONS = DIFFERENTIABLE | QUANTIZED


def shapes_of(function: Function, tokens) -> list[tuple]:
    return [tuple(tokens if d == "m" else d for d in shape) for shape in function.shapes]


def arrays_of(function: Function, tokens: int, dtype=np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(dtype) for s in shapes_of(function, tokens)]


def index_of(function: Function, tokens: int, dtype=np.int32):
    if function.index == "sizes":
        return np.array([tokens // 2, 0, tokens - tokens // 2], dtype)
    if function.index == "expert":
        return (np.arange(tokens * CHOICES).reshape(tokens, CHOICES) % GROUPS).astype(dtype)
    return None
