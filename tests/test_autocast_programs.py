"""autocast chooses the products that belong in FP8, in every form of a program and of its parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxfp8
from jaxfp8._tools.explain import WOULD_RUN
from tests.autocast_programs import BATCH, PARAMS, PROGRAMS, D, normal


def scalar(program):
    return lambda p, b: (program(p, b).astype(jnp.float32) ** 2).sum()


def chosen(f, *args, gradient=False):
    """(name of the weight, role) of each product that autocast would run in FP8."""
    explained = jaxfp8.explain(f, *args, gradient=gradient)
    return sorted(
        (line.name.rpartition(".")[2] if "." in line.name else "", line.role)
        for line in explained.lines
        if line.reason == WOULD_RUN
    )


def forward(found):
    return sorted(name for name, role in found if role == "forward")


def expected(program):
    return sorted(PROGRAMS[program][1].split(" "))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.representatives(cases=12)
def test_the_loss(program):
    assert forward(chosen(PROGRAMS[program][0], PARAMS, BATCH)) == expected(program)


def test_the_table_is_long_enough():
    assert len(PROGRAMS) >= 60


def moving(p):
    """Parameters that have gradients, and the others."""
    floats = {k: v for k, v in p.items() if k not in ("codes", "mask")}
    return floats, {k: p[k] for k in ("codes", "mask")}


def gradient(program):
    def f(p, b):
        floats, rest = moving(p)
        return jax.value_and_grad(lambda q: scalar(PROGRAMS[program][0])({**q, **rest}, b))(floats)

    return f


def in_scan(program):
    return lambda p, bs: lax.scan(lambda c, b: (c, gradient(program)(p, b)), 0.0, bs)[1]


def adamw(p, g, s):
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, s["m"], g)
    v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, s["v"], g)
    return jax.tree.map(lambda p, m, v: p - 0.1 * (m / jnp.sqrt(v + 1) + p), p, m, v), {"m": m, "v": v}  # fmt: skip


def on_matrices(update):
    """An update of two-dimensional parameters; others take the gradient's step."""

    def f(p, g, s):
        m = jax.tree.map(lambda m, g: 0.9 * m + g, s["m"], g)
        new = jax.tree.map(
            lambda p, g, m, v: p - 0.1 * (update(g, m, v) if p.ndim == 2 else g), p, g, m, s["v"]
        )
        return new, {"m": m, "v": s["v"]}

    return f


def muon(g, m, v):
    for _ in range(2):
        m = m / jnp.linalg.norm(m)
        a = m @ m.T
        m = 3 * m + (2 * a + a @ a) @ m
    return m


def shampoo(g, m, v):
    """With stale roots: both sides of the gradient meet the state."""
    return (v @ v.T) @ g @ (v.T @ v) + (g @ g.T) @ v


def soap(g, m, v):
    left, right = v @ v.T, v.T @ v
    return left.T @ ((left @ g @ right) / jnp.sqrt((left @ m @ right) ** 2 + 1)) @ right.T


def adafactor(g, m, v):
    rows, columns = (g * g).mean(1, keepdims=True), (g * g).mean(0, keepdims=True)
    return g / jnp.sqrt(rows @ columns + 1)


OPTIMIZERS = {
    "AdamW": adamw,
    **{f.__name__: on_matrices(f) for f in (muon, shampoo, soap, adafactor)},
}


def step(program, optimizer):
    def f(state, b):
        loss, g = gradient(program)(state["params"], b)
        floats, rest = moving(state["params"])
        floats, moments = OPTIMIZERS[optimizer](floats, g, state["opt"])
        return {"params": {**floats, **rest}, "opt": moments, "step": state["step"] + 1}, loss

    return f


def state():
    floats, _ = moving(PARAMS)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return {"params": PARAMS, "opt": {"m": floats, "v": floats}, "step": step}


FORMS = {
    "gradient": lambda program: (gradient(program), PARAMS, BATCH),
    "scan": lambda program: (
        in_scan(program),
        PARAMS,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), BATCH),
    ),
    **{
        name: lambda program, name=name: (step(program, name), state(), BATCH)
        for name in OPTIMIZERS
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.representatives("form", cases=8)
def test_a_form_that_differentiates(program, form):
    found = chosen(*FORMS[form](program))
    wanted = expected(program)
    assert forward(found) == wanted
    roles = [role for _, role in found]
    assert roles.count("weight gradient") == len(wanted)
    assert {n for n, role in found if role == "input gradient"} <= set(wanted)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.representatives(cases=4)
def test_explain_says_the_same_of_the_function_and_of_its_cast(program):
    f = scalar(PROGRAMS[program][0])
    plain = jaxfp8.explain(f, PARAMS, BATCH, gradient=False)
    cast = jaxfp8.explain(jaxfp8.autocast(f), PARAMS, BATCH, gradient=False)
    chosen = sum(x.flops * x.repeats for x in plain.lines if x.reason == WOULD_RUN)
    assert chosen == sum(x.flops * x.repeats for x in cast.lines if x.fp8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    params: dict
    step: jax.Array


def two(w, v, x):
    return ((jnp.tanh(x @ w) @ v) ** 2).sum()


HELD = {
    "one level": (lambda w: {"w": w, "v": w}, lambda p: (p["w"], p["v"])),
    "three levels": (lambda w: {"a": {"b": {"w": w, "v": w}}}, lambda p: p["a"]["b"].values()),
    "list": (lambda w: [w, w], lambda p: p),
    "mixed depths": (lambda w: {"w": w, "a": [{"v": w}]}, lambda p: (p["w"], p["a"][0]["v"])),
    "TrainState": (
        lambda w: TrainState({"w": w, "v": w}, jnp.zeros((), jnp.int32)),
        lambda p: p.params.values(),
    ),
    "stacked": (lambda w: {"s": jax.ShapeDtypeStruct((2, D, D), w.dtype)}, lambda p: p["s"]),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("differentiates", [False, True])
def test_how_parameters_are_held_changes_nothing(held, differentiates):
    make, read = HELD[held]

    def loss(p, b):
        w, v = read(p)
        return two(w, v, b["x"])

    f = jax.value_and_grad(loss, allow_int=True) if differentiates else loss
    roles = [role for _, role in chosen(f, make(normal(D, D)), BATCH)]
    assert roles.count("forward") == 2
    assert not differentiates or roles.count("weight gradient") == 2


def test_modules_hold_parameters():
    eqx, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")
    x = jnp.ones((256, D))
    for model, loss in (
        (eqx.nn.Linear(D, D, key=jax.random.key(0)), lambda m, x: jax.vmap(m)(x).sum()),
        (nnx.Linear(D, D, rngs=nnx.Rngs(0)), lambda m, x: m(x).sum()),
    ):
        assert [role for _, role in chosen(loss, model, x)] == ["forward"]
