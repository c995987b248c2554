"""Programs with the weights of the forward products that belong in FP8: the specification of autocast's rule.

Each program is a loss of (parameters, batch). A weight that several arrays make has no name: "".
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

D, N = 128, 256


def normal(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    "e": normal(N, D), "w": normal(D, D), "v": normal(D, D), "u": normal(D, D), "out": normal(D, 2 * D),
    "a": normal(D, 16), "b": normal(16, D), "gain": normal(D), "deep": {"mlp": {"gating_einsum": normal(D, D)}},
    "experts": normal(4, D, D), "codes": jax.ShapeDtypeStruct((D, D), jnp.int8),
    "mask": jax.ShapeDtypeStruct((D, D), jnp.bool_),
}  # fmt: skip
BATCH = {
    "t": jax.ShapeDtypeStruct((N,), jnp.int32), "x": normal(N, D), "y": normal(N, D), "adj": normal(N, N),
    "k": normal(N, D), "i": jax.ShapeDtypeStruct((), jnp.int32), "z": normal(N, 2 * D),
}  # fmt: skip

tanh, softmax = jnp.tanh, jax.nn.softmax


def straight_through(w):
    return w + lax.stop_gradient(jnp.sign(w) - w)


def body(p, b):
    return tanh(p["e"][b["t"]] @ p["w"])


def logits(p, b):
    return body(p, b) @ p["out"]


def top(z):
    return lax.top_k(z, 2)[0]


def key():
    return jax.random.key(0)


def attend(q, k, v):
    return softmax(q @ k.T) @ v


def norm(x):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1)


def scanned(p, b):
    stack = jnp.stack([p["w"], p["v"]])
    return lax.scan(lambda x, w: (tanh(x @ w), None), b["x"], stack)[0]


def indexed(p, b):
    return tanh(b["x"] @ lax.dynamic_index_in_dim(p["experts"], b["i"], keepdims=False))


def looped(p, b):
    stack = p["experts"]
    return lax.scan(lambda x, i: (tanh(x @ stack[i]), None), b["x"], jnp.arange(4))[0]


def grouped(p, b):
    groups = softmax(logits(p, b)).reshape(N, 8, -1)
    best = lax.top_k(groups.max(-1), 2)[1]
    kept = jax.nn.one_hot(best, 8).sum(-2)[..., None] > 0
    return top(jnp.where(kept, groups, 0).reshape(N, -1))


def ragged(p, b):
    sizes = jnp.bincount(b["t"] % 4, length=4).astype(jnp.int32)
    return tanh(lax.ragged_dot(b["x"], p["experts"], sizes))


def two_rounds(p, b):
    h = tanh(b["x"] @ p["w"])
    h = tanh(h[b["t"]] @ p["v"])
    return tanh(h[b["t"]] @ p["v"])


def labels_first(p, b):
    z = logits(p, b)
    return jnp.take_along_axis(z, b["t"][:, None] % D, 1)[:, 0] - jax.nn.logsumexp(z, -1)


def recurrent(p, b):
    def cell(h, x):
        h = tanh(x @ p["w"] + h @ p["v"])
        return h, h

    return lax.scan(cell, jnp.zeros((N, D)), jnp.stack([b["x"], b["y"]]))[1]


def on_devices(p, b):
    """A head whose contraction is sharded: a psum, then a softmax."""
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec

    def head(x, w):
        return softmax(lax.psum(x @ w, "d"))

    head = jax.shard_map(
        head, mesh=mesh, in_specs=(spec(None, "d"), spec("d", None)), out_specs=spec()
    )
    return head(jnp.concatenate([body(p, b)] * 2, 1), jnp.concatenate([p["out"]] * 2, 0))


FOURIER = np.cos(np.outer(np.arange(D), np.arange(D))).astype(np.float32)

PROGRAMS = {
    "embedding and layer": (body, "w"),
    "float input": (lambda p, b: tanh(b["x"] @ p["w"]), "w"),
    "weight on the left": (lambda p, b: tanh(p["w"] @ b["x"].T), "w"),
    "two layers": (lambda p, b: tanh(body(p, b) @ p["v"]), "v w"),
    "residual": (lambda p, b: b["x"] + tanh(norm(b["x"]) @ p["w"]) @ p["v"], "v w"),
    "gated": (lambda p, b: (jax.nn.silu(b["x"] @ p["w"]) * (b["x"] @ p["v"])) @ p["u"], "u v w"),
    "bias and gain": (lambda p, b: tanh((b["x"] * p["gain"]) @ p["w"] + p["gain"]), "w"),
    "cast": (lambda p, b: b["x"].astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), "w"),
    "transposed": (lambda p, b: tanh(b["x"] @ p["w"].T), "w"),
    "sliced": (lambda p, b: tanh(b["x"] @ p["out"][:, :D]), "out"),
    "fused, then split": (lambda p, b: sum(jnp.split(tanh(b["x"] @ p["out"]), 2, -1)), "out"),
    "normalized weight": (lambda p, b: b["x"] @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), "w"),
    "scaled weight": (lambda p, b: tanh(b["x"] @ (p["gain"] * p["w"])), ""),
    "binarized": (lambda p, b: tanh(b["x"] @ straight_through(p["w"])), "w"),
    "dequantized": (lambda p, b: b["x"] @ (p["codes"].astype(jnp.float32) * p["gain"]), ""),
    "masked weight": (lambda p, b: b["x"] @ (p["w"] * p["mask"]), ""),
    "mixed weights": (lambda p, b: b["x"] @ (0.5 * p["w"] + 0.5 * p["v"]), ""),
    "by an index": (indexed, "experts"),
    "by a loop's index": (looped, "experts"),
    "scanned weights": (scanned, ""),
    "checkpointed": (lambda p, b: jax.checkpoint(lambda x: tanh(tanh(x @ p["w"]) @ p["v"]))(b["x"]), "v w"),
    "jitted": (lambda p, b: jax.jit(lambda w, x: tanh(x @ w))(p["w"], b["x"]), "w"),
    "vmapped": (lambda p, b: jax.vmap(lambda x: tanh(x @ p["w"]))(b["x"]), "w"),
    "ragged experts": (ragged, "experts"),
    "stacked experts": (lambda p, b: tanh(jnp.einsum("td,edf->etf", b["x"], p["experts"])), "experts"),
    "recurrent": (recurrent, "v w"),
    "convolution stem": (lambda p, b: attend(tanh(b["z"][:, ::2] @ p["w"]), b["k"], b["k"]), "w"),
    "low rank, small": (lambda p, b: b["x"] @ p["w"] + (b["x"] @ p["a"]) @ p["b"], "w"),
    "merged adapter": (lambda p, b: b["x"] @ (p["w"] + p["a"] @ p["b"]), ""),
    "factorised": (lambda p, b: b["x"] @ (p["w"] @ p["v"]), ""),
    "factorised embedding": (lambda p, b: tanh((p["e"] @ p["v"])[b["t"]]) @ p["w"], "w"),
    "penalty of a weight": (lambda p, b: body(p, b).sum() + ((p["w"].T @ p["w"]) ** 2).sum(), "w"),
    "penalty": (lambda p, b: body(p, b).sum() + ((p["v"].T @ p["v"] - jnp.eye(D)) ** 2).sum(), "w"),
    "attention": (lambda p, b: attend(b["x"] @ p["w"], b["x"] @ p["v"], b["x"] @ p["u"]), "u v w"),
    "cached keys": (lambda p, b: attend(b["x"] @ p["w"], b["k"], b["y"]), "w"),
    "second stream": (lambda p, b: attend(b["x"] @ p["w"], b["y"] @ p["v"], b["y"]), "v w"),
    "two towers": (lambda p, b: tanh((b["x"] @ p["w"]) @ (b["y"] @ p["v"]).T), "v w"),
    "adjacency": (lambda p, b: tanh(b["adj"] @ (b["x"] @ p["w"])), "w"),
    "linear attention": (lambda p, b: (b["x"] @ p["w"]) @ (b["k"].T @ b["y"]), "w"),
    "gram of activations": (lambda p, b: body(p, b).T @ body(p, b), "w w"),
    "message passing": (two_rounds, "v v w"),
    "cumulative sum": (lambda p, b: jnp.exp(jnp.tril(jnp.ones((N, N))) @ body(p, b)), "w"),
    "cosine transform": (lambda p, b: body(p, b) @ jnp.cos(jnp.outer(jnp.arange(D), jnp.arange(D))), "w"),
    "Fourier transform of NumPy": (lambda p, b: body(p, b) @ FOURIER, "w"),
    "tied head": (lambda p, b: softmax(body(p, b) @ p["e"].T), "w"),
    "one-hot embedding": (lambda p, b: tanh(jax.nn.one_hot(b["t"], N) @ p["e"]) @ p["w"], "w"),
    "softmax": (lambda p, b: softmax(logits(p, b)), "w"),
    "labels": (lambda p, b: -jnp.take_along_axis(jax.nn.log_softmax(logits(p, b)), b["t"][:, None] % D, 1), "w"),
    "labels first": (labels_first, "w"),
    "top_k": (lambda p, b: top(jax.nn.sigmoid(logits(p, b))), "w"),
    "noise": (lambda p, b: top(logits(p, b) + jax.random.normal(key(), (N, 2 * D))), "w"),
    "gumbel": (lambda p, b: softmax(logits(p, b) + jax.random.gumbel(key(), (N, 2 * D))), "w"),
    "full mask": (lambda p, b: softmax(logits(p, b) - jax.nn.one_hot(b["t"], 2 * D)), "w"),
    "where": (lambda p, b: softmax(jnp.where(b["z"] > 0, logits(p, b), -1e9)), "w"),
    "at set": (lambda p, b: softmax(logits(p, b).at[:, 0].set(-1e9)), "w"),
    "concatenated": (lambda p, b: softmax(jnp.concatenate([logits(p, b), jnp.zeros((N, 1))], 1)), "w"),
    "split": (lambda p, b: softmax(jnp.split(logits(p, b), 2, 1)[1]), "w"),
    "clamped": (lambda p, b: softmax(jnp.clip(logits(p, b), -5, 5)), "w"),
    "soft cap": (lambda p, b: softmax(30 * tanh(logits(p, b) / 30)), "w"),
    "pooled": (lambda p, b: softmax(logits(p, b).mean(0)), "w"),
    "summed over devices": (on_devices, "w"),
    "grouped top_k": (grouped, "w"),
    "top_k over tokens": (lambda p, b: top(logits(p, b).T), "w"),
    "exp over sum": (lambda p, b: (e := jnp.exp(logits(p, b))) / e.sum(-1, keepdims=True), "w"),
    "a maximum is no softmax": (lambda p, b: jnp.max(b["x"] + tanh(b["x"]) @ p["w"], -1), "w"),
    "Gemma's name": (lambda p, b: b["x"] @ p["deep"]["mlp"]["gating_einsum"], "gating_einsum"),
}  # fmt: skip
"""name: (program, the weights of its products in FP8 with repetitions)"""
