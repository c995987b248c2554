"""The programs that the compiled tests read: a training step of Llama blocks in every form, on every mesh."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8


class Size(NamedTuple):
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 4
    tokens: int = 8192  # of a device
    head: int = 128


LLAMA = Size()
"""Of Llama-3-8B (arXiv 2407.21783)."""

SHAPES = {  # (in, out) of each weight, and the axis of the model's width
    "q": (lambda s: (s.width, s.heads * s.head), 0),
    "k": (lambda s: (s.width, s.kv_heads * s.head), 0),
    "v": (lambda s: (s.width, s.kv_heads * s.head), 0),
    "o": (lambda s: (s.heads * s.head, s.width), 1),
    "up": (lambda s: (s.width, 2, s.hidden), 0),
    "down": (lambda s: (s.hidden, s.width), 1),
}


def parameters_of(size: Size) -> int:
    """Elements of one layer's weights."""
    total = 0
    for shape, _ in SHAPES.values():
        n = 1
        for d in shape(size):
            n *= d
        total += n
    return total


@jax.custom_vjp
def attention(q, k, v):
    """Stands for a fused kernel: it takes and keeps q, k and v as they are."""
    return _attention(q, k, v)[0]


def _attention(q, k, v):
    groups = q.shape[2] // k.shape[2]
    spread = jnp.repeat(jnp.tanh(k) * v, groups, axis=2)
    return q * spread, (q, k, v)


def _attention_grad(kept, dy):
    q, k, v = kept
    _, pull = jax.vjp(lambda q, k, v: _attention(q, k, v)[0], q, k, v)
    return pull(dy)


attention.defvjp(_attention, _attention_grad)


def norm(x):
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + 1e-5)).astype(x.dtype)


def bf16_dot(x, w):
    return jnp.dot(x, w.astype(x.dtype))


def swiglu(dot, x, up, down):
    up = up if up.ndim == 2 else up.reshape(up.shape[0], -1)
    gate, value = jnp.split(dot(x, up), 2, -1)
    return dot(jax.nn.silu(gate) * value, down)


linear = functools.partial(jaxfp8.linear, preferred_element_type=jnp.bfloat16)
PRODUCTS = {  # dot and mlp
    "bf16": (bf16_dot, functools.partial(swiglu, bf16_dot)),
    "linear": (linear, functools.partial(swiglu, linear)),
    "mlp": (linear, functools.partial(jaxfp8.mlp, preferred_element_type=jnp.bfloat16)),
    "autocast": (bf16_dot, functools.partial(swiglu, bf16_dot)),
}


def block(products: str, size: Size, x, w, constrain=lambda x: x):
    """(batch, sequence, width) -> the same."""
    dot, mlp = PRODUCTS[products]
    heads = functools.partial(jnp.reshape, shape=(*x.shape[:2], -1, size.head))
    h = norm(x)
    y = attention(*(heads(dot(h, w[n])) for n in "qkv"))
    x = constrain(x + dot(y.reshape(*x.shape[:2], -1), w["o"]))
    return constrain(x + mlp(norm(x), w["up"], w["down"]))


def loss(products, size, params, x, *, policy=None, scan=True, constrain=lambda x: x, gather=None):
    """Mean square of what the layers give. `gather`: what a layer does with its weights first."""

    def layer(x, w):
        w = w if gather is None else gather(w)
        return block(products, size, x, w, constrain), None

    if policy is not None:
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scan)
    if scan:
        x, _ = lax.scan(layer, x, params)
    else:
        for i in range(size.layers):
            x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], params))
    return jnp.mean(x.astype(jnp.float32) ** 2)


def training_step(run):
    """Plain gradient descent on float32 masters, which are donated."""

    def step(params, x):
        value, gradients = jax.value_and_grad(run)(params, x)
        return jax.tree.map(lambda w, g: w - 1e-3 * g, params, gradients), value

    return step


def abstract(mesh, size: Size, specs, batch_spec, tokens: int, dtype=jnp.float32):
    """Parameters, stacked by layer, and tokens in rows of 4096: abstract, where `specs` and `batch_spec` put them."""

    def array(shape, spec, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = {
        n: array((size.layers, *shape(size)), specs[n], dtype) for n, (shape, _) in SHAPES.items()
    }
    row = min(4096, size.tokens)
    return params, array((tokens // row, row, size.width), batch_spec, jnp.bfloat16)


def width_specs(axis: str) -> dict[str, P]:
    """Stacked weights cut on the model's width."""
    return {n: P(None, *[None] * at, axis) for n, (_, at) in SHAPES.items()}


def wrap(products: str, run):
    return jaxfp8.autocast(run) if products == "autocast" else run


def replicated(products: str, mesh, size: Size = LLAMA, **options: Any):
    """Data parallel over all of the mesh; of one device, no parallelism."""
    (axis,) = mesh.axis_names
    args = abstract(mesh, size, dict.fromkeys(SHAPES, P()), P(axis), size.tokens * mesh.size)
    where = NamedSharding(mesh, P(axis))
    constrain = functools.partial(lax.with_sharding_constraint, shardings=where)
    if mesh.size == 1:
        constrain = lambda x: x  # noqa: E731
    run = wrap(products, functools.partial(loss, products, size, constrain=constrain, **options))
    return jax.jit(training_step(run), donate_argnums=0), args


def fsdp(products: str, mesh, size: Size = LLAMA, **options: Any):
    """Weights cut on the model's width over the tokens' axis; automatic or explicit, as the mesh is."""
    (axis,) = mesh.axis_names
    specs = width_specs(axis)
    args = abstract(mesh, size, specs, P(axis), size.tokens * mesh.size)
    automatic = mesh.axis_types[0] == jax.sharding.AxisType.Auto
    where = NamedSharding(mesh, P(axis))
    constrain = functools.partial(lax.with_sharding_constraint, shardings=where)
    if not automatic:
        constrain = lambda x: x  # noqa: E731  (types say it)
    run = wrap(products, functools.partial(loss, products, size, constrain=constrain, **options))
    out = {n: NamedSharding(mesh, s) for n, s in specs.items()}
    return jax.jit(training_step(run), donate_argnums=0, out_shardings=(out, None)), args


def fsdp_shard_map(products: str, mesh, size: Size = LLAMA, **options: Any):
    """The same by hand: each layer gathers its weights, `jaxfp8.all_gather_weight` in FP8."""
    (axis,) = mesh.axis_names
    specs = width_specs(axis)
    params, x = abstract(mesh, size, specs, P(axis), size.tokens * mesh.size)

    def gather(w):
        def one(name, v):
            at = SHAPES[name][1]
            if products == "bf16":
                return lax.all_gather(v.astype(jnp.bfloat16), axis, axis=at, tiled=True)
            flat = v.reshape(v.shape[0], -1)  # a QuantizedWeight of gate and up is (K, 2 F)
            return jaxfp8.all_gather_weight(flat, axis, axis=at - 2)

        return {n: one(n, v) for n, v in w.items()}

    def run(params, x):
        return lax.pmean(loss(products, size, params, x, gather=gather, **options), axis)

    step = jax.shard_map(
        training_step(run), mesh=mesh, in_specs=(specs, P(axis)), out_specs=(specs, P())
    )
    return jax.jit(step, donate_argnums=0), (params, x)
