"""autocast replaces the products it should by our operations, and nothing else.

Where a product is replaced, the whole program equals the one that calls the operations by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxfp8
from jaxfp8 import AutocastPolicy, autocast
from tests.programs import assert_close, assert_same_bits, products, walk

SMALL = AutocastPolicy(min_m=1, min_n=1, min_k=1)
ROUNDING = 1e-5
"""Norm-wise, between two programs of the same products whose other operations XLA may fuse in other ways."""

FLIPS = 5e-3
"""The same where last bits of a deep model's activations and cotangents may flip FP8 roundings."""


def normal(seed, *shape, dtype=jnp.float32):
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(x / (shape[-2] ** 0.5 if len(shape) > 1 else 1), dtype)


def traced(fn, *args, **kwargs):
    return jax.make_jaxpr(functools.partial(fn, **kwargs))(*args)


def dots(jaxpr):
    """How many of XLA's own products the program has."""

    def outside(jaxpr):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if eqn.primitive.name.startswith("jaxfp8_"):
                continue
            yield eqn
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from outside(inner)

    return sum(e.primitive.name in ("dot_general", "ragged_dot_general") for e in outside(jaxpr))


def assert_equals_by_hand(loss, by_hand, *args, ours, policy=None, left=0, tolerance=ROUNDING):
    """`autocast(loss)` has the value and gradients of `by_hand`, `ours` products forward and `left` dots of XLA's."""
    cast = autocast(loss, policy=policy)
    jaxpr = traced(cast, *args)
    assert (products(jaxpr), dots(jaxpr)) == (ours, left)
    got = jax.jit(jax.value_and_grad(cast))(*args)
    assert_close(got, jax.jit(jax.value_and_grad(by_hand))(*args), tolerance)
    plain = jax.jit(jax.value_and_grad(loss))(*args)
    assert_close(got, plain, 0.3)  # it is the same model
    differing = [
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True)
    ]
    assert not all(differing)


# ------------------------------------------------------------------------------------------------
# One product
# ------------------------------------------------------------------------------------------------

X, W = normal(0, 160, 192), normal(1, 192, 136)


def test_a_product_is_the_operation():
    assert_same_bits(autocast(jnp.dot)(X, W), jaxfp8.dot_general(X, W, (((1,), (0,)), ((), ()))))


def test_a_weight_on_the_left_is_the_weight():
    x, w = normal(0, 192, 160), normal(1, 136, 192)
    got = autocast(lambda params, x: params["w"] @ x)({"w": w}, x)
    assert_same_bits(got, jaxfp8.linear(x.T, w.T).T)


@pytest.mark.parametrize("weight", ["lhs", "rhs"])
def test_the_weight_can_be_given(weight):
    got = autocast(jnp.dot, policy=AutocastPolicy(weight=weight))(X, W)
    want = jaxfp8.linear(X, W) if weight == "rhs" else jaxfp8.linear(W.T, X.T).T
    assert_same_bits(got, want)
    flipped = autocast(lambda w, x: w @ x, policy=AutocastPolicy(weight_argnums=(0,)))(X, W)
    assert_same_bits(flipped, jaxfp8.linear(W.T, X.T).T)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_dtypes_are_those_of_the_plain_product(dtype, preferred):
    x, w = X.astype(dtype), W.astype(dtype)
    f = functools.partial(jnp.dot, preferred_element_type=preferred)
    got = jax.vjp(autocast(f), x, w)
    want = jax.vjp(f, x, w)
    assert got[0].dtype == want[0].dtype
    cotangents = jnp.ones_like(want[0])
    assert [g.dtype for g in got[1](cotangents)] == [g.dtype for g in want[1](cotangents)]


def axes(rank):
    return st.permutations(range(rank))


@st.composite
def numbers(draw):
    """Shapes and dimension numbers of a product with any order of axes."""
    batch, contract = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    rows, columns = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    size = st.sampled_from([1, 3, 16])
    kinds = ["b"] * batch + ["k"] * contract
    sizes = {f"{c}{i}": draw(size) for i, c in enumerate(kinds)}
    left = [*sizes, *[f"m{i}" for i in range(rows)]]
    right = [*sizes, *[f"n{i}" for i in range(columns)]]
    sizes |= {d: draw(size) for d in left + right if d not in sizes}
    left, right = draw(st.permutations(left)), draw(st.permutations(right))
    shared = [draw(st.permutations([d for d in left if d[0] == c])) for c in "kb"]
    dims = tuple(tuple(tuple(side.index(d) for d in ds) for side in (left, right)) for ds in shared)
    return [tuple(sizes[d] for d in side) for side in (left, right)], dims


@settings(max_examples=12, deadline=None)
@given(numbers(), st.sampled_from(["lhs", "rhs"]))
def test_any_dimension_numbers(case, weight):
    (left, right), dims = case
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in (left, right))
    f = functools.partial(lax.dot_general, dimension_numbers=dims)
    policy = dataclasses.replace(SMALL, weight=weight)
    cast = autocast(f, policy=policy)
    assert dots(traced(cast, a, b)) == 0
    got, want = cast(a, b), f(a, b)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert_close(got, want, 0.2)


# ------------------------------------------------------------------------------------------------
# Frameworks and forms of a model
# ------------------------------------------------------------------------------------------------


class Config:
    tokens, vocabulary, width, heads, hidden, layers = (2, 64), 96, 64, 4, 128, 2


TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, Config.vocabulary, Config.tokens))


def cross_entropy(logits):
    return -jax.nn.log_softmax(logits)[..., 0].mean()


def nnx_transformer(dot_general):
    nnx = pytest.importorskip("flax.nnx")
    c, rngs = Config, nnx.Rngs(0)
    own = {} if dot_general is None else {"dot_general": dot_general}
    attention = {f"{k}_{n}": v for k in ("qkv", "out") for n, v in own.items()}

    class Layer(nnx.Module):
        def __init__(self):
            self.attend = nnx.MultiHeadAttention(
                c.heads, c.width, decode=False, use_bias=False, rngs=rngs, **attention
            )
            self.up = nnx.Linear(c.width, c.hidden, rngs=rngs, **own)
            self.down = nnx.Linear(c.hidden, c.width, rngs=rngs, **own)
            self.norm = nnx.LayerNorm(c.width, rngs=rngs)

        def __call__(self, x):
            x = x + self.attend(self.norm(x))
            return x + self.down(jax.nn.gelu(self.up(self.norm(x))))

    class Transformer(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(c.vocabulary, c.width, rngs=rngs)
            self.layers = nnx.List([Layer() for _ in range(c.layers)])
            self.lm_head = nnx.Linear(c.width, c.vocabulary, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(x)

    return Transformer()


@pytest.mark.full
def test_flax_nnx_transformer():
    nnx = pytest.importorskip("flax.nnx")
    model, by_hand = nnx_transformer(None), nnx_transformer(jaxfp8.dot_general)

    def loss(model):
        return cross_entropy(model(TOKENS))

    cast = autocast(loss, policy=SMALL)
    jaxpr = traced(cast, model)
    # q, k, v, out, up, down; the head and attention's two products stay.
    assert (products(jaxpr), dots(jaxpr)) == (6 * Config.layers, 1 + 2 * Config.layers)
    got, want = nnx.value_and_grad(cast)(model), nnx.value_and_grad(loss)(by_hand)
    assert_close(got[0], want[0], ROUNDING)
    assert_close(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), FLIPS)


def test_the_variables_of_an_nnx_module_get_their_new_values():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense = nnx.Linear(16, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.norm(self.dense(x)))

    model, cast, x = Model(), Model(), normal(3, 8, 16)
    want, got = model(x), autocast(cast)(x)
    assert_close(got, want, ROUNDING)
    assert_close(nnx.state(cast, nnx.BatchStat), nnx.state(model, nnx.BatchStat), ROUNDING)
    assert cast.drop.rngs.count[...] == model.drop.rngs.count[...] == 1


def test_linen_model_with_remat_and_scan():
    nn = pytest.importorskip("flax.linen")
    c = Config

    def make(dot_general):
        own = {} if dot_general is None else {"dot_general": dot_general}

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.Dense(c.hidden, **own)(nn.LayerNorm()(x))
                return x + nn.Dense(c.width, **own)(jax.nn.silu(h)), None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, tokens):
                x = nn.Embed(c.vocabulary, c.width)(tokens)
                blocks = nn.scan(
                    nn.remat(Block, prevent_cse=False),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    length=c.layers,
                )
                x, _ = blocks(name="blocks")(x, None)
                return nn.Dense(c.vocabulary, name="logits_dense")(x)

        return Model()

    model = make(None)
    params = model.init(jax.random.key(0), TOKENS)

    def loss(model):
        return lambda params: cross_entropy(model.apply(params, TOKENS))

    assert_equals_by_hand(
        loss(model),
        loss(make(jaxfp8.dot_general)),
        params,
        ours=2,
        left=1,
        policy=SMALL,
        tolerance=FLIPS,
    )


def test_equinox_mlp_under_vmap_is_one_product_a_layer():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(64, 32, 128, 2, key=jax.random.key(0))
    x = normal(3, 96, 64)
    arrays, rest = eqx.partition(model, eqx.is_array)

    def loss(arrays, x):
        return jnp.square(jax.vmap(eqx.combine(arrays, rest))(x)).sum()

    def by_hand(arrays, x):
        *hidden, last = arrays.layers
        for layer in hidden:
            x = jax.nn.relu(jaxfp8.linear(x, layer.weight.T, layer.bias))
        return jnp.square(jaxfp8.linear(x, last.weight.T, last.bias)).sum()

    assert_equals_by_hand(loss, by_hand, arrays, x, ours=3, policy=SMALL)
    jaxpr = traced(jax.grad(autocast(loss, policy=SMALL)), arrays, x)
    assert products(jaxpr) == 3 * 3 - 1  # nobody asks for x's gradient
    assert_close(
        autocast(jax.vmap(model), policy=SMALL)(x), jax.vmap(model)(x), 0.1
    )  # a module with functions among its leaves


def test_mixture_of_experts_with_ragged_dot():
    tokens, width, hidden, experts = 160, 64, 96, 4
    params = {
        "router": normal(1, width, experts),
        "up": normal(2, experts, width, hidden),
        "down": normal(3, experts, hidden, width),
    }
    x = normal(4, tokens, width)

    def model(ragged_dot, params, x):
        scores = jax.nn.softmax(x @ params["router"])
        expert = jnp.argmax(scores, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=experts).astype(jnp.int32)
        h = jax.nn.silu(ragged_dot(x[order], params["up"], sizes))
        y = ragged_dot(h, params["down"], sizes)
        return jnp.square(y * jnp.max(scores, -1)[order, None]).sum()

    assert_equals_by_hand(
        functools.partial(model, lax.ragged_dot),
        functools.partial(model, jaxfp8.ragged_dot),
        params,
        x,
        ours=2,
        left=1,  # the router
        policy=SMALL,
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_model_inside_shard_map(check_vma):
    mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    params = {"up": normal(1, 64, 128), "down": normal(2, 128, 64)}
    x = normal(3, 256, 64)

    def model(dot, params, x):
        def shard(params, x):
            y = dot(jax.nn.silu(dot(x, params["up"])), params["down"])
            return lax.psum(jnp.square(y).sum(), "d")

        return jax.shard_map(
            shard, mesh=mesh, in_specs=(P(), P("d")), out_specs=P(), check_vma=check_vma
        )(params, x)

    dot = functools.partial(model, jnp.dot)
    by_hand = functools.partial(model, jaxfp8.linear)
    assert_equals_by_hand(dot, by_hand, params, x, ours=2, policy=SMALL)


def test_model_on_an_explicit_mesh():
    mesh = jax.make_mesh(
        (2, 2),
        ("d", "t"),
        axis_types=(jax.sharding.AxisType.Explicit,) * 2,
        devices=jax.devices()[:4],
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(normal(0, 256, 128), P("d", None))
        w = jax.device_put(normal(1, 128, 256), P(None, "t"))
        out = P("d", "t")
        got = jax.jit(autocast(functools.partial(jnp.dot, out_sharding=out)))(x, w)
        want = jax.jit(functools.partial(jaxfp8.linear, out_sharding=out))(x, w)
    assert_same_bits(got, want)
    assert got.sharding.spec == want.sharding.spec


# ------------------------------------------------------------------------------------------------
# Jaxprs inside
# ------------------------------------------------------------------------------------------------


def tanh_layer(dot, w, x):
    return jnp.tanh(dot(x, w))


INSIDE = {
    "jit": lambda dot, w, x: jax.jit(functools.partial(tanh_layer, dot))(w, x),
    "nested jit": lambda dot, w, x: jax.jit(jax.jit(functools.partial(tanh_layer, dot)))(w, x),
    "remat": lambda dot, w, x: jax.checkpoint(functools.partial(tanh_layer, dot))(w, x),
    "scan over weights": lambda dot, w, x: lax.scan(
        lambda x, w: (tanh_layer(dot, w, x), None), x, jnp.stack([w, 2 * w])
    )[0],
    "scan over tokens": lambda dot, w, x: lax.scan(
        lambda c, x: (c, tanh_layer(dot, w, x)), 0.0, x.reshape(2, 32, 64)
    )[1].reshape(64, 64),
    "fori_loop": lambda dot, w, x: lax.fori_loop(0, 3, lambda i, x: tanh_layer(dot, w, x), x),
    "cond": lambda dot, w, x: lax.cond(
        x[0, 0] > -100, functools.partial(tanh_layer, dot), lambda w, x: x, w, x
    ),
    "switch": lambda dot, w, x: lax.switch(
        1, [lambda w, x: x, functools.partial(tanh_layer, dot), lambda w, x: -x], w, x
    ),
    "vmap": lambda dot, w, x: jax.vmap(functools.partial(tanh_layer, dot), (None, 0))(
        w, x.reshape(2, 32, 64)
    ).reshape(64, 64),
    "named_call": lambda dot, w, x: jax.named_call(functools.partial(tanh_layer, dot), name="a")(
        w, x
    ),
    "custom_jvp": lambda dot, w, x: _jvp_function(dot)(w, x),
    "custom_vjp": lambda dot, w, x: _vjp_function(dot)(w, x),
}


def _jvp_function(dot):
    """tanh of a product, whose rule has the derivative of tanh only."""
    f = jax.custom_jvp(functools.partial(tanh_layer, dot))

    @f.defjvp
    def rule(primals, tangents):
        (w, x), (dw, dx) = primals, tangents
        y = tanh_layer(dot, w, x)
        return y, 3.0 * (1 - y**2) * (jnp.dot(dx, w) + jnp.dot(x, dw))

    return f


def _vjp_function(dot):
    """tanh of a product, whose cotangents are tripled and clipped."""
    f = jax.custom_vjp(functools.partial(tanh_layer, dot))

    def forward(w, x):
        y = tanh_layer(dot, w, x)
        return y, (w, x, y)

    def backward(residuals, dy):
        w, x, y = residuals
        _, pull = jax.vjp(functools.partial(dot), x, w)
        dx, dw = pull(jnp.clip(3.0 * dy * (1 - y**2), -0.5, 0.5))
        return dw, dx

    f.defvjp(forward, backward)
    return f


@pytest.mark.parametrize("form", INSIDE)
@pytest.mark.representatives(cases=5)
def test_products_inside(form):
    w, x, dy = normal(0, 64, 64), normal(1, 64, 64), normal(2, 64, 64)

    def loss(dot, w, x):
        return (INSIDE[form](dot, w, x) * dy).sum()

    cast = autocast(functools.partial(loss, jnp.dot), policy=SMALL)
    by_hand = functools.partial(loss, jaxfp8.linear)
    jaxpr = traced(cast, w, x)
    assert (products(jaxpr), dots(jaxpr)) == (1, 0)
    if form == "fori_loop":  # a while: reverse mode refuses it, with or without us
        assert_close(cast(w, x), by_hand(w, x), ROUNDING)
        return
    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(w, x) for f in (cast, by_hand))
    assert_close(got, want, 1e-4)


def test_the_rule_of_a_custom_vjp_is_ours_and_keeps_its_meaning():
    w, x = normal(0, 64, 64), normal(1, 64, 64)
    cast = autocast(lambda w, x: _vjp_function(jnp.dot)(w, x).sum(), policy=SMALL)
    jaxpr = traced(jax.grad(cast, (0, 1)), w, x)
    assert (products(jaxpr), dots(jaxpr)) == (4, 0)  # the rule computes the product anew


def test_the_rule_of_a_custom_jvp_keeps_its_linear_products():
    """JAX transposes what depends on a tangent; our operations have no transpose."""
    w, x = normal(0, 64, 64), normal(1, 64, 64)
    cast = autocast(lambda w, x: _jvp_function(jnp.dot)(w, x).sum(), policy=SMALL)
    jaxpr = traced(jax.grad(cast), w, x)
    assert products(jaxpr) == 1 and dots(jaxpr) >= 1
    assert_close(
        jax.grad(cast)(w, x), jax.grad(lambda w: _jvp_function(jnp.dot)(w, x).sum())(w), 0.1
    )


def test_a_custom_vjp_with_integer_arguments():
    f = jax.custom_vjp(lambda x, i, w: jnp.dot(x, w)[i])
    f.defvjp(
        lambda x, i, w: (f(x, i, w), (x, i, w)), lambda r, d: (0 * r[0] + d.sum(), None, 2 * r[2])
    )
    x, w, i = normal(0, 64, 64), normal(1, 64, 64), jnp.arange(4)
    cast = autocast(lambda x, w: f(x, i, w).sum(), policy=SMALL)
    assert products(traced(cast, x, w)) == 1
    assert_close(
        jax.grad(cast, (0, 1))(x, w), jax.grad(lambda x, w: f(x, i, w).sum(), (0, 1))(x, w), 0.1
    )


def test_equal_layers_share_one_jaxpr():
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    w, x = normal(0, 64, 64), normal(1, 64, 64)
    jaxpr = traced(autocast(lambda w, x: layer(w, layer(w, layer(w, x))), policy=SMALL), w, x)
    inner = {id(e.params["jaxpr"]) for e in jaxpr.eqns if e.primitive.name == "jit"}
    assert len(inner) == 1


def test_remat_policies_take_our_products_for_dots():
    w, x = normal(0, 64, 64), normal(1, 64, 64)

    for policy in (None, "dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"):
        policy = policy and getattr(jax.checkpoint_policies, policy)

        def f(w, x, policy=policy):
            layers = jax.checkpoint(lambda w, x: jnp.sin(x @ w) @ w, policy=policy)
            return jnp.sin(layers(w, x)).sum()

        jaxpr = traced(jax.grad(autocast(f, policy=SMALL), (0, 1)), w, x)
        assert products(jaxpr) == dots(traced(jax.grad(f, (0, 1)), w, x))
        assert dots(jaxpr) == 0


# ------------------------------------------------------------------------------------------------
# A function that differentiates by itself
# ------------------------------------------------------------------------------------------------


def mlp(dot, params, x):
    for w in params["hidden"]:
        x = jax.nn.silu(dot(x, w))
    return cross_entropy(jnp.dot(x, params["out"]))


MLP = {"hidden": [normal(i, 64, 64) for i in range(2)], "out": normal(5, 64, 32)}


@pytest.mark.parametrize(
    "recipe", [None, jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2, scale_format="pow2")]
)
def test_gradients_taken_inside_are_the_gradients_taken_outside(recipe):
    x = normal(9, 96, 64)
    policy = dataclasses.replace(SMALL, recipe=recipe)
    inside = autocast(jax.value_and_grad(functools.partial(mlp, jnp.dot)), policy=policy)
    outside = jax.value_and_grad(autocast(functools.partial(mlp, jnp.dot), policy=policy))
    jaxpr = traced(inside, MLP, x)
    assert products(jaxpr) == 5  # x needs no gradient
    assert dots(jaxpr) == 3  # the head, forward and backward
    assert_close(jax.jit(inside)(MLP, x), jax.jit(outside)(MLP, x), 1e-4)


def test_ragged_gradients_taken_inside():
    x, w = normal(0, 96, 64), normal(1, 3, 64, 32)
    sizes = jnp.array([40, 0, 50], jnp.int32)

    def loss(dot, w, x):
        return jnp.square(dot(x, w, sizes)).sum()

    inside = autocast(jax.grad(functools.partial(loss, lax.ragged_dot), (0, 1)), policy=SMALL)
    assert (products(traced(inside, w, x)), dots(traced(inside, w, x))) == (3, 0)
    want = jax.grad(functools.partial(loss, jaxfp8.ragged_dot), (0, 1))(w, x)
    assert_close(inside(w, x), want, ROUNDING)


def test_a_train_step_leaves_its_optimizer_alone():
    x = normal(9, 96, 64)

    def step(params, x):
        loss, grads = jax.value_and_grad(functools.partial(mlp, jnp.dot))(params, x)

        def orthogonal(g):  # a step of Newton-Schulz, as Muon takes it: products of gradients
            g = g / jnp.linalg.norm(g)
            return 1.5 * g - 0.5 * (g @ g.T) @ g

        return loss, jax.tree.map(lambda p, g: p - 0.1 * orthogonal(g), params, grads)

    jaxpr = traced(autocast(step, policy=SMALL), MLP, x)
    assert (products(jaxpr), dots(jaxpr)) == (5, 3 + 2 * 3)


def test_a_loop_over_train_steps_keeps_its_weights_weights():
    xs = normal(9, 4, 96, 64)

    def train(params, xs):
        def step(params, x):
            loss, grads = jax.value_and_grad(functools.partial(mlp, jnp.dot))(params, x)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

        return lax.scan(step, params, xs)

    assert products(traced(autocast(train, policy=SMALL), MLP, xs)) == 5


# ------------------------------------------------------------------------------------------------
# What is left alone
# ------------------------------------------------------------------------------------------------


def one_hot_embedding(params, tokens):
    return jax.nn.one_hot(tokens, 64) @ params["w"]


def tied_head(params, tokens):
    return jnp.tanh(params["w"][tokens]) @ params["w"].T


def head(params, x):
    return jax.nn.softmax((x @ params["w"] + jnp.ones(64)) * 2.0).sum()


def head_inside_jit(params, x):
    return jax.jit(lambda z: jax.nn.logsumexp(z, -1))(jax.jit(jnp.dot)(x, params["w"])).sum()


def router(params, x):
    return lax.top_k(jax.nn.sigmoid(x @ params["w"]), 2)


def chosen_token(params, x):
    return jnp.argmax(x @ params["w"], -1)


def attention(params, x):
    return jax.nn.softmax(jnp.sin(x) @ jnp.cos(x).T) @ x


def named(params, x):
    with jax.named_scope("embedder"):
        return x @ params["w"]


def named_by_its_path(params, x):
    return x @ params["lm_head"]["w"]


def exact(params, x):
    return jnp.dot(x, params["w"], precision="highest")


def integers(params, x):
    return jnp.dot(x.astype(jnp.int8), params["w"].astype(jnp.int8))


SQUARE_W = normal(0, 64, 64)
ALONE = {
    one_hot_embedding: "one-hot",
    tied_head: "also gathered",
    head: "ranked or normalized",
    head_inside_jit: "ranked or normalized",
    router: "ranked or normalized",
    chosen_token: "ranked or normalized",
    attention: "both operands vary",
    named: "embedding by name: embedder",
    named_by_its_path: "head by name: lm_head",
    exact: "precision",
    integers: "int8",
}


def reasons(jaxpr):
    return {
        part.removeprefix("jaxfp8.kept[").removesuffix("]")
        for e in walk(jaxpr)
        for part in str(e.source_info.name_stack).split("/")
        if part.startswith("jaxfp8.kept[")
    }


@pytest.mark.parametrize("f", ALONE, ids=lambda f: f.__name__)
@pytest.mark.representatives(cases=5)
def test_left_alone(f):
    params = {"w": SQUARE_W, "lm_head": {"w": SQUARE_W}}
    x = TOKENS[0] % 64 if "token" in f.__code__.co_varnames[1] else normal(1, 64, 64)
    policy = dataclasses.replace(SMALL, weight_argnums=(0,))
    for p in (SMALL, policy):
        jaxpr = traced(autocast(f, policy=p), params, x)
        assert products(jaxpr) == 0
        assert any(ALONE[f] in r for r in reasons(jaxpr)) or f is head_inside_jit
    assert_same_bits(autocast(f)(params, x), f(params, x))


def test_embeddings_and_heads_can_be_asked_for():
    policy = dataclasses.replace(SMALL, embeddings=True, heads=True)
    params, x = {"w": SQUARE_W, "lm_head": {"w": SQUARE_W}}, normal(1, 64, 64)
    tokens = TOKENS[0] % 64
    for f in (one_hot_embedding, tied_head, head, router, named, named_by_its_path):
        args = tokens if "token" in f.__code__.co_varnames[1] else x
        assert products(traced(autocast(f, policy=policy), params, args)) == 1


def test_a_residual_stream_is_no_logits():
    """Pooling or logging a maximum does not make heads of the layers before it."""

    def f(w, x):
        return jnp.max(x + jnp.tanh(x) @ w, axis=-1)

    assert products(traced(autocast(f, policy=SMALL), SQUARE_W, normal(1, 64, 64))) == 1


def test_a_normalized_weight_is_a_weight():
    def f(params, x):
        h = jnp.tanh(x @ params["first"])
        v = params["v"]
        return h @ (params["g"] * v / jnp.linalg.norm(v, axis=0))

    params = {"first": SQUARE_W, "v": SQUARE_W, "g": jnp.ones(64)}
    assert products(traced(autocast(f, policy=SMALL), params, normal(1, 64, 64))) == 2


# ------------------------------------------------------------------------------------------------
# Policies
# ------------------------------------------------------------------------------------------------


def two_layers(params, x):
    with jax.named_scope("first"):
        x = jnp.tanh(x @ params["a"])
    with jax.named_scope("second"):
        return x @ params["b"]["kernel"]


TWO = {"a": normal(0, 64, 96), "b": {"kernel": normal(1, 96, 48)}}


@pytest.mark.parametrize(
    "changes, ours",
    [
        ({}, 2),
        ({"exclude": ("first",)}, 1),
        ({"exclude": "FIRST|SECOND"}, 0),
        ({"exclude": ("fir",)}, 2),  # a whole component
        ({"exclude": ("kernel",)}, 1),  # of the weight's path
        ({"include": ("second",)}, 1),
        ({"include": (".*",), "exclude": ("b",)}, 1),
        ({"min_k": 80}, 1),
        ({"min_n": 80}, 1),
        ({"min_m": 65}, 0),
        ({"predicate": lambda p: p.n == 48}, 1),
        ({"predicate": lambda p: True if p.k == 96 else None, "min_k": 1000}, 1),
        ({"predicate": lambda p: p.weight_path == "params['a']"}, 1),
        ({"predicate": lambda p: p.flops > 2 * 64 * 64 * 80}, 1),
    ],
)
def test_policy(changes, ours):
    policy = dataclasses.replace(SMALL, **changes)
    assert products(traced(autocast(two_layers, policy=policy), TWO, normal(2, 64, 64))) == ours


def test_the_default_leaves_products_below_one_block_alone():
    x, w = normal(0, 128, 128), normal(1, 128, 128)
    assert products(traced(autocast(jnp.dot), x, w)) == 1
    for a, b in ((x[:127], w), (x[:, :127], w[:127]), (x, w[:, :127])):
        assert products(traced(autocast(jnp.dot), a, b)) == 0


def test_recipe_of_the_policy_and_of_the_block():
    recipe = jaxfp8.Recipe(scale_format="pow2")
    want = jaxfp8.linear(X, W, recipe=recipe)
    assert_same_bits(autocast(jnp.dot, policy=AutocastPolicy(recipe=recipe))(X, W), want)
    with recipe:
        assert_same_bits(autocast(jnp.dot)(X, W), want)


def test_a_policy_shows_what_it_changes_and_is_a_key():
    policy = AutocastPolicy(min_k=256, exclude=["mlp"])
    assert repr(policy) == "AutocastPolicy(min_k=256, exclude=('mlp',))"
    assert hash(policy) == hash(AutocastPolicy(min_k=256, exclude=("mlp",)))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"recipe": "e4m3"}, TypeError, "recipe is 'e4m3'; allowed: a jaxfp8.Recipe, or None"),
        ({"min_m": 1.5}, TypeError, "min_m is 1.5; allowed: a non-negative int"),
        ({"min_n": True}, TypeError, "min_n is True"),
        ({"min_k": -1}, ValueError, "min_k is -1; allowed: a non-negative int"),
        ({"exclude": ("(",)}, ValueError, "exclude has '('; allowed: regular expressions"),
        ({"include": (1,)}, ValueError, "include has 1"),
        ({"heads": "no"}, TypeError, "heads is 'no'; allowed: True or False"),
        ({"predicate": 3}, TypeError, "predicate is 3; allowed: a function"),
        ({"weight": "left"}, ValueError, "weight is 'left'; allowed: 'infer', 'lhs', 'rhs'"),
        ({"weight_argnums": ("x",)}, TypeError, "weight_argnums is 'x'"),
    ],
)
def test_policy_refuses(arguments, error, message):
    with pytest.raises(error) as caught:
        AutocastPolicy(**arguments)
    assert message in str(caught.value)


def test_autocast_refuses():
    with pytest.raises(TypeError, match="policy is 'all'; allowed: a jaxfp8.AutocastPolicy"):
        autocast(jnp.dot, policy="all")
    with pytest.raises(TypeError, match="fn is a int; allowed: a function"):
        autocast(3)
    with pytest.raises(
        ValueError, match="weight_argnums is .2,., but the function is called with 2"
    ):
        autocast(jnp.dot, policy=AutocastPolicy(weight_argnums=(2,)))(X, W)


# ------------------------------------------------------------------------------------------------
# Calls
# ------------------------------------------------------------------------------------------------


def test_arguments_and_results_that_are_no_arrays():
    @autocast(policy=SMALL)
    def f(x, w, activation, *, train, name="f"):
        """Docs."""
        return {
            "y": activation(x @ w) if train else None,
            "train": train,
            "f": activation,
            "n": name,
        }

    out = f(X, W, jnp.tanh, train=True)
    assert (out["train"], out["f"], out["n"]) == (True, jnp.tanh, "f")
    assert_same_bits(out["y"], jnp.tanh(jaxfp8.linear(X, W)))
    assert (f.__name__, f.__doc__) == ("f", "Docs.")


def test_a_method_can_be_decorated():
    class Model:
        w = W

        @autocast
        def __call__(self, x):
            return x @ self.w

    assert_same_bits(Model()(X), jaxfp8.linear(X, W))


def test_under_jit_grad_and_vmap():
    cast = autocast(lambda w, x: (x @ w).sum(), policy=SMALL)
    w, x = normal(0, 64, 64), normal(1, 3, 64, 64)
    want = jnp.stack([jax.grad(lambda w, x: jaxfp8.linear(x, w).sum())(w, v) for v in x])
    assert_close(jax.jit(jax.vmap(jax.grad(cast), (None, 0)))(w, x), want, ROUNDING)
    assert_close(jax.grad(lambda w: jax.vmap(cast, (None, 0))(w, x).sum())(w), want.sum(0), 0.05)


def test_weights_closed_over_are_differentiated():
    def loss(w):
        return autocast(lambda x: jnp.tanh(x @ w).sum(), policy=SMALL)(X)

    def by_hand(w):
        return jnp.tanh(jaxfp8.linear(X, w)).sum()

    assert_close(jax.grad(loss)(W), jax.grad(by_hand)(W), ROUNDING)


def test_an_argument_changed_in_place_is_refused():
    @jax.tree_util.register_pytree_node_class
    @dataclasses.dataclass
    class Box:
        value: jax.Array

        def tree_flatten(self):
            return (self.value,), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    def f(box, w):
        box.value = box.value @ w
        return box.value

    with pytest.raises(ValueError, match=r"the function changes box.* in place"):
        autocast(f)(Box(X), W)


def test_a_jitted_function_is_compiled_once():
    compiled = []

    def listener(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    cast = autocast(jax.jit(lambda w, x: jnp.tanh(x @ w)), policy=SMALL)
    w, x = normal(0, 64, 64), normal(1, 64, 64)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        first = cast(w, x)
        assert compiled
        compiled.clear()
        assert_same_bits(cast(w, x), first)
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_a_symbolic_size_is_decided_by_the_policy_or_a_bound():
    def ours(policy=None, constraints=()):
        (m,) = jax.export.symbolic_shape("m", constraints=constraints)
        args = {"w": normal(0, 128, 128)}, jax.ShapeDtypeStruct((m, 128), jnp.float32)
        return products(jax.make_jaxpr(autocast(lambda p, x: x @ p["w"], policy=policy))(*args))

    with pytest.raises(ValueError, match="M=m is symbolic.*allowed: AutocastPolicy.min_m=1., or a"):
        ours()
    assert ours(AutocastPolicy(min_m=1)) == 1
    assert ours(constraints=["m >= 128"]) == 1
    assert ours(constraints=["m <= 127"]) == 0


def test_a_second_derivative_says_what_to_do():
    x, p = normal(0, 64, 64), {"w": normal(1, 64, 64)}
    inside = autocast(jax.grad(lambda p, x: (jnp.tanh(x @ p["w"]) ** 2).sum()), policy=SMALL)
    with pytest.raises(NotImplementedError, match="autocast: .* Put autocast inside"):
        jax.grad(lambda p: inside(p, x)["w"].sum())(p)
