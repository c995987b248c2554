"""Cases that every platform with kernels runs: the emulated one here, a Hopper GPU there.

A case is a function of no arguments that gives named arrays, deterministic in its seed. Run without kernels
it gives what the kernels must give: quantization to the bit, products to the platform's bound.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxfp8

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def normal(seed, *shape, dtype=np.float32):
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(x).astype(dtype)


def quantized(seed, *shape, block=(1, 128), dtype=E4M3):
    """Operands are quantized by the reference, so that a product's case tests the product alone."""
    return jaxfp8.quantize(normal(seed, *shape), block=block, dtype=dtype)


# --- dense ----------------------------------------------------------------------------------------

# Tails of every kind around 64, 128 and 256; K below, at and off a block; single rows and columns.
GEMM_SHAPES = [
    (1, 1, 1), (1, 8, 16), (1, 128, 128), (1, 136, 384), (2, 130, 129), (7, 24, 40),
    (8, 264, 896), (16, 64, 100), (17, 129, 256), (31, 256, 112), (33, 96, 640), (63, 65, 128),
    (64, 64, 128), (64, 256, 256), (65, 127, 250), (96, 112, 384), (100, 200, 300), (127, 128, 128),
    (128, 1, 128), (128, 127, 128), (128, 128, 1), (128, 128, 127), (128, 128, 128),
    (128, 129, 129), (128, 136, 512), (128, 192, 256), (129, 128, 256), (130, 144, 144),
    (131, 257, 272), (160, 384, 384), (192, 128, 640), (200, 72, 208), (255, 64, 128),
    (256, 128, 256), (256, 256, 128), (257, 130, 384), (260, 260, 130), (300, 40, 896),
    (320, 64, 256), (384, 130, 160), (512, 128, 128), (513, 24, 256),
]  # fmt: skip


def gemm(shape, *, square=True, out_dtype=jnp.bfloat16, dtypes=(E4M3, E4M3), accum=False):
    m, n, k = shape
    lhs = quantized(m, m, k, dtype=dtypes[0])
    rhs = quantized(n + 1, n, k, block=(128, 128) if square else (1, 128), dtype=dtypes[1])
    c = normal(k, m, n, dtype=out_dtype) * 10 if accum else None

    f = jax.jit(functools.partial(jaxfp8.gemm, out_dtype=out_dtype))
    return lambda: {"out": f(lhs, rhs, accum=c)}


def batched(groups, shape, *, shared=False, square=True, out_dtype=jnp.bfloat16):
    """(G, M, K) . (G, N, K), or one (M, K) with all of them."""
    m, n, k = shape
    rhs = quantized(1, groups, n, k, block=(128, 128) if square else (1, 128))
    lhs = quantized(0, m, k) if shared else quantized(0, groups, m, k)
    product = functools.partial(jaxfp8.gemm, out_dtype=out_dtype)
    f = jax.jit(jax.vmap(product, (None, 0)) if shared else product)
    return lambda: {"out": f(lhs, rhs)}


# --- groups ---------------------------------------------------------------------------------------

GROUPS = {
    "equal": (256, [64, 64, 64, 64]),
    "unequal": (300, [0, 1, 127, 128, 44, 0]),
    "aligned": (384, [128, 256]),
    "129 and 2": (131, [129, 2]),
    "exactly 128": (128, [0, 128, 0]),
    "128 tokens each": (389, [128, 0, 128, 5, 128]),
    "one": (257, [257]),
    "fewer than M": (300, [10, 100, 30]),
    "more than M": (100, [60, 60, 60]),
    "negative": (100, [-7, 60, -1, 20]),
    "none": (100, [0, 0]),
    "huge": (100, [2**31 - 1, 2**31 - 1]),
    "one row each": (5, [1, 1, 1, 1, 1]),
    "64 groups": (130, [2, 3] * 13 + [0] * 37 + [65]),
}


def grouped(groups, n=136, k=200, *, out_dtype=jnp.bfloat16):
    m, sizes = GROUPS[groups]
    lhs, rhs = quantized(0, m, k), quantized(1, len(sizes), n, k, block=(128, 128))
    sizes = jnp.asarray(sizes, jnp.int32)
    f = jax.jit(functools.partial(jaxfp8.grouped_gemm, out_dtype=out_dtype))
    return lambda: {"out": f(lhs, rhs, sizes)}


def masked(m, sizes, n=136, k=200, *, out_dtype=jnp.bfloat16):
    groups = len(sizes)
    lhs, rhs = quantized(0, groups, m, k), quantized(1, groups, n, k, block=(128, 128))
    sizes = jnp.asarray(sizes, jnp.int32)
    f = jax.jit(functools.partial(jaxfp8.masked_grouped_gemm, out_dtype=out_dtype))
    return lambda: {"out": f(lhs, rhs, sizes)}


def grouped_wgrad(groups, n=136, k=72, *, out_dtype=jnp.float32, accum=False):
    m, sizes = GROUPS[groups]
    sizes = jnp.asarray(sizes, jnp.int32)
    columns = [
        jaxfp8.quantize_both(normal(i, m, width), group_sizes=sizes)[1]
        for i, width in enumerate((n, k))
    ]
    c = normal(2, len(sizes), n, k, dtype=out_dtype) * 10 if accum else None
    f = jax.jit(functools.partial(jaxfp8.grouped_wgrad_gemm, out_dtype=out_dtype))
    return lambda: {"out": f(*columns, sizes, accum=c)}


# --- quantizers -----------------------------------------------------------------------------------

QUANTIZE_SHAPES = [
    (1, 1), (1, 128), (2, 130), (5, 16), (64, 128), (70, 257), (127, 384), (128, 128), (129, 129),
    (130, 520), (256, 256), (300, 72),
]  # fmt: skip


def awkward(seed, *shape, dtype=np.float32):
    """Normal values with zeros, subnormals, a NaN, infinities and many magnitudes among them."""
    r = np.random.default_rng(seed)
    x = r.standard_normal(shape) * 10.0 ** r.integers(-20, 20, (*shape[:-1], 1))
    x = np.where(r.random(shape) < 0.05, 0, x)
    x = np.where(r.random(shape) < 0.02, 1e-39, x)
    x = np.where(r.random(shape) < 0.002, r.choice([np.nan, np.inf, -np.inf], shape), x)
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(np.float32)).astype(dtype)


def _arrays(*quantized_arrays):
    named = {}
    for i, q in enumerate(quantized_arrays):
        named |= {f"data{i}": jax.lax.bitcast_convert_type(q.data, jnp.uint8)}
        named |= {f"scale{i}": jax.lax.bitcast_convert_type(q.scale, jnp.uint32)}
    return named


def quantizer(kind, shape, *, input_dtype=np.float32, dtype=E4M3, scale_format="float32"):
    x = awkward(sum(shape), *shape, dtype=input_dtype)
    recipe = jaxfp8.Recipe(dtype=dtype, scale_format=scale_format)
    functions = {
        "rows": lambda x: (jaxfp8.quantize(x, recipe=recipe),),
        "blocks": lambda x: (jaxfp8.quantize(x, (128, 128), recipe=recipe),),
        "both": lambda x: jaxfp8.quantize_both(x, recipe=recipe),
        "weight": lambda x: jaxfp8.quantize_weight(x, recipe=recipe),
    }
    f = jax.jit(lambda x: _arrays(*functions[kind](x)))
    return lambda: f(x)


def ragged_quantizer(
    groups, k=200, *, input_dtype=jnp.bfloat16, dtype=E4M3, scale_format="float32"
):
    m, sizes = GROUPS[groups]
    x, sizes = awkward(m, m, k, dtype=input_dtype), jnp.asarray(sizes, jnp.int32)
    recipe = jaxfp8.Recipe(dtype=dtype, scale_format=scale_format)
    f = jax.jit(
        lambda x, sizes: _arrays(*jaxfp8.quantize_both(x, group_sizes=sizes, recipe=recipe))
    )
    return lambda: f(x, sizes)


# --- whole operations -----------------------------------------------------------------------------


def train_linear(shape, recipe=None, dtype=np.float32):
    t, k, n = shape
    x, w, dy = (
        normal(0, t, k, dtype=dtype),
        normal(1, k, n, dtype=dtype),
        normal(2, t, n, dtype=dtype),
    )

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: jaxfp8.linear(x, w, recipe=recipe), x, w)
        dx, dw = pull(dy)
        return {"y": y, "dx": dx, "dw": dw}

    return lambda: run(x, w, dy)


def train_ragged_dot(groups, k=200, n=136, dtype=np.float32):
    m, sizes = GROUPS[groups]
    sizes = jnp.asarray(sizes, jnp.int32)
    x, w, dy = normal(0, m, k), normal(1, len(sizes), k, n), normal(2, m, n)

    @jax.jit
    def run(x, w, dy):
        y, pull = jax.vjp(lambda x, w: jaxfp8.ragged_dot(x, w, sizes), x, w)
        dx, dw = pull(dy)
        return {"y": y, "dx": dx, "dw": dw}

    return lambda: run(*(v.astype(dtype) for v in (x, w, dy)))


# --- activations ----------------------------------------------------------------------------------


def activation(
    kind, shape, name="silu", *, input_dtype=jnp.bfloat16, dtype=E4M3, sizes=None, pow2=False
):
    """An activation kernel on operands whose activation is exact: results must agree to the bit (but zeros' signs)."""
    from jaxfp8.kernels import activation as act
    from tests import oracle_activation

    source = np.dtype(input_dtype)
    x = oracle_activation.saturated(sum(shape), shape, source)
    arrays = [jnp.asarray(x)]
    if "grad" in kind:
        dy = oracle_activation.cotangents(sum(shape), (*shape[:-2], shape[-1]), source)
        arrays.append(jnp.asarray(dy))
    if sizes is not None:
        arrays.append(jnp.asarray(sizes, jnp.int32))
    leaf = getattr(act, f"activation_{kind}_leaf")
    f = jax.jit(lambda *xs: leaf(*xs, activation=name, dtype=np.dtype(dtype), pow2=pow2))
    return lambda: {f"result{i}": v.astype(jnp.float32) for i, v in enumerate(f(*arrays))}


def train_mlp(shape, activation="silu", *, gated=True, groups=None, dtype=np.float32):
    t, k, f, n = shape
    lead = () if groups is None else (len(groups),)
    up = normal(1, *lead, k, *((2,) if gated else ()), f) / np.sqrt(k)
    down, x, dy = normal(2, *lead, f, n) / np.sqrt(f), normal(0, t, k), normal(3, t, n)

    def mlp(x, up, down):
        if groups is None:
            return jaxfp8.mlp(x, up, down, activation=activation)
        sizes = jnp.asarray(groups, jnp.int32)
        return jaxfp8.ragged_mlp(x, up, down, sizes, activation=activation)

    @jax.jit
    def run(x, up, down, dy):
        y, pull = jax.vjp(mlp, x, up, down)
        dx, dup, ddown = pull(dy)
        return {"y": y, "dx": dx, "dw_up": dup, "dw_down": ddown}

    return lambda: run(*(v.astype(dtype) for v in (x, up, down, dy)))


# --- mixtures of experts --------------------------------------------------------------------------


def _numbers(results):
    return {f"result{i}": v.astype(jnp.float32) for i, v in enumerate(results)}


def gather(kind, shape, sizes, *, input_dtype=jnp.bfloat16, dtype=E4M3, pow2=False):
    """Rows of x (S, K) gathered to M rows, some of which it does not have: to the bit."""
    from jaxfp8.kernels import gather as kernels

    s, m, k = shape
    x, dtype = awkward(s + k, s, k, dtype=input_dtype), np.dtype(dtype)
    arrays, options = (x,), {"dtype": dtype, "pow2": pow2}
    if not kind.startswith("quantize"):
        q = jaxfp8.quantize(x, dtype=dtype)
        arrays, options = (q.data, q.scale), {} if kind == "rows" else {"pow2": pow2}
    arrays += (jnp.asarray(np.random.default_rng(m).integers(-2, s + 2, m), jnp.int32),)
    if kind.endswith("both"):
        arrays += (jnp.asarray(sizes, jnp.int32),)
    f = jax.jit(functools.partial(getattr(kernels, f"gather_{kind}_leaf"), **options))
    return lambda: _numbers(f(*arrays))


def sum_of_rows(shape, *, weighted=False, input_dtype=jnp.bfloat16, out_dtype=jnp.bfloat16):
    """Sums of rows in order; with weights that are powers of two, so that one rounding or two are the same."""
    from jaxfp8.kernels.sum_rows import sum_rows_leaf

    s, j, m, k = shape
    r = np.random.default_rng(m)
    arrays = [normal(m, m, k, dtype=input_dtype)]
    arrays.append(jnp.asarray(r.integers(-2, m, (s, j)), jnp.int32).at[s // 2, 0].set(m))
    if weighted:
        arrays.append(jnp.asarray(np.exp2(r.integers(-9, 2, (s, j))), jnp.float32))
    f = jax.jit(functools.partial(sum_rows_leaf, out_dtype=np.dtype(out_dtype)))
    return lambda: _numbers(f(*arrays))


def weighted_activation(kind, shape, name="silu", *, input_dtype=jnp.bfloat16, sizes=None):
    """As `activation`, each row times a power of two; without the weights' gradient, a sum in another order."""
    from jaxfp8.kernels import activation as act
    from tests import oracle_activation

    source, m = np.dtype(input_dtype), shape[0]
    arrays = [oracle_activation.saturated(sum(shape), shape, source)]
    if "grad" in kind:
        arrays.append(oracle_activation.cotangents(sum(shape), (m, shape[-1]), source))
    arrays.append(np.exp2(np.random.default_rng(m).integers(-6, 3, m)).astype(np.float32))
    if sizes is not None:
        arrays.append(np.asarray(sizes, np.int32))
    arrays = [jnp.asarray(v) for v in arrays]
    leaf = getattr(act, f"activation_{kind}_leaf")
    f = jax.jit(lambda *xs: leaf(*xs, activation=name, dtype=np.dtype(E4M3), pow2=False)[:4])
    return lambda: _numbers(f(*arrays))


def train_moe(tokens, choices, experts, shape, *, dtype=np.float32):
    """A mixture of experts, some choices of none, and its gradients."""
    from tests.oracle_mixture import mixture

    m = mixture(tokens, choices, experts, *shape)
    arrays = [jnp.asarray(v).astype(dtype) for v in (m.x, m.gate, m.w_up, m.w_down, m.dy)]

    @jax.jit
    def run(x, gate, up, down, dy):
        f = lambda x, gate, up, down: jaxfp8.moe(x, m.expert, gate, up, down)  # noqa: E731
        y, pull = jax.vjp(f, x, gate, up, down)
        return dict(zip(("y", "dx", "dgate", "dw_up", "dw_down"), (y, *pull(dy)), strict=True))

    return lambda: run(*arrays)
