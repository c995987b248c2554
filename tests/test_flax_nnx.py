"""Flax nnx's own layers with our products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import programs
from tests.frameworks import assert_products, compare, normal

OP, EINSUM = jaxfp8.flax.DotGeneral(), jaxfp8.flax.Einsum()
POW2 = jaxfp8.Recipe(scale_format="pow2")
BF16 = dict(dtype=jnp.bfloat16)


def apply_of(model):
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), state


def compare_modules(make, fields, x, **expected):
    """Outputs and gradients of a module made with and without `fields`, and its parameters."""
    apply, state = apply_of(make(**fields, rngs=nnx.Rngs(0)))
    plain, same = apply_of(make(rngs=nnx.Rngs(0)))
    programs.assert_same_bits(jax.tree.leaves(state), jax.tree.leaves(same))
    return compare(apply, plain, state, x, **expected), state


def test_linear():
    x = normal(0, 2, 72, 136)

    def make(**fields):
        return nnx.Linear(136, 200, **fields, **BF16)

    (y, _), state = compare_modules(make, dict(dot_general=OP), x, ours=1)
    kernel = state["kernel"][...].astype(jnp.bfloat16)
    programs.assert_same_bits(y, jaxfp8.linear(x, kernel))

    apply, state = apply_of(make(dot_general=jaxfp8.dot_general, rngs=nnx.Rngs(0)))
    assert_products(apply, (state, x), ours=1)


@pytest.mark.parametrize(
    "shape, args, field",
    [
        (
            (2, 40, 4, 32),
            dict(in_features=(4, 32), out_features=144, axis=(-2, -1)),
            dict(dot_general=OP),
        ),
        (
            (3, 40, 128),
            dict(in_features=128, out_features=(2, 72), batch_axis={0: 3}),
            dict(dot_general_cls=OP.cls),
        ),
    ],
    ids=["two contracting axes", "batch axis"],
)
def test_linear_general(shape, args, field):
    def make(**fields):
        return nnx.LinearGeneral(**args, **fields, **BF16)

    compare_modules(make, field, normal(0, *shape), ours=1)


@pytest.mark.parametrize(
    "spec, shape, kernel, bias",
    [
        ("btd,dhk->bthk", (2, 40, 128), (128, 4, 40), (4, 40)),
        ("bthk,hkd->btd", (2, 40, 4, 32), (4, 32, 136), None),
        (
            "becd,edf->becf",
            (2, 3, 40, 128),
            (3, 128, 72),
            None,
        ),  # jnp.einsum would swap the operands
    ],
)
def test_einsum(spec, shape, kernel, bias):
    def make(**fields):
        return nnx.Einsum(spec, kernel, bias, **fields, **BF16)

    x = normal(0, *shape)
    compare_modules(make, dict(einsum_op=EINSUM), x, ours=1)
    apply, state = apply_of(make(einsum_op=jaxfp8.einsum, rngs=nnx.Rngs(0)))
    assert_products(apply, (state, x), ours=1)


def test_the_projections_of_attention():
    def make(**fields):
        # Without biases: the gradient of a key's bias is zero but for rounding, so it has no relative error.
        return nnx.MultiHeadAttention(
            4, 136, 128, 144, use_bias=False, decode=False, **fields, **BF16
        )

    x = normal(0, 2, 40, 136)
    compare_modules(
        make, dict(qkv_dot_general=OP, out_dot_general=OP), x, ours=4, others=2, tolerance=0.12
    )

    cls = jaxfp8.flax.DotGeneral
    fp8 = make(qkv_dot_general_cls=cls, out_dot_general_cls=cls, rngs=nnx.Rngs(0))
    apply, state = apply_of(fp8)
    assert_products(apply, (state, x), ours=4, others=2)


def test_the_element_type_that_a_layer_prefers():
    layer = nnx.Linear(
        128, 128, dot_general=OP, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0), **BF16
    )
    assert layer(normal(0, 8, 128)).dtype == jnp.float32


def test_out_sharding_is_honoured():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        layer = nnx.Linear(256, 512, dot_general=OP, use_bias=False, rngs=nnx.Rngs(0), **BF16)
        layer.kernel = nnx.Param(jax.sharding.reshard(layer.kernel[...], P(None, "model")))
        x = jax.sharding.reshard(normal(0, 512, 256), P("data", None))

        @nnx.jit
        def run(layer, x):
            return layer(x, out_sharding=P("data", "model"))

        y = run(layer, x)
        assert jax.typeof(y).sharding.spec == P("data", "model")
        general = nnx.LinearGeneral(256, (4, 128), dot_general=OP, rngs=nnx.Rngs(0), **BF16)
        z = general(x, out_sharding=P("data", None, None))
        assert jax.typeof(z).sharding.spec == P("data", None, None)
    kernel = jnp.asarray(np.asarray(layer.kernel[...]), jnp.bfloat16)
    programs.assert_same_bits(np.asarray(y), jaxfp8.linear(normal(0, 512, 256), kernel))


def test_operations_with_equal_recipes_are_equal_and_compile_once():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(None)
        return model(x)

    def make(recipe):
        return nnx.Sequential(
            nnx.Linear(128, 128, dot_general=jaxfp8.flax.DotGeneral(recipe), rngs=nnx.Rngs(0)),
            nnx.Einsum(
                "td,df->tf", (128, 128), einsum_op=jaxfp8.flax.Einsum(recipe), rngs=nnx.Rngs(1)
            ),
            nnx.LinearGeneral(
                128, 128, dot_general_cls=jaxfp8.flax.DotGeneral(recipe).cls, rngs=nnx.Rngs(2)
            ),
        )

    x = normal(0, 8, 128)
    for _ in range(3):
        run(make(None), x)
    assert len(traces) == 1
    for _ in range(2):
        run(make(jaxfp8.Recipe(scale_format="pow2")), x)
    assert len(traces) == 2
    for op in (jaxfp8.flax.DotGeneral, jaxfp8.flax.Einsum):
        assert len({op(), op(None), op(POW2), op(jaxfp8.Recipe(scale_format="pow2"))}) == 2


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 128, use_bias=False, decode=False, rngs=rngs, **BF16
        )
        self.blocks = nnx.List([nnx.Linear(128, 128, rngs=rngs, **BF16) for _ in range(2)])
        self.mix = nnx.Einsum("btd,df->btf", (128, 128), rngs=rngs, **BF16)
        self.norm = nnx.RMSNorm(128, rngs=rngs, **BF16)
        self.head = nnx.Linear(128, 64, rngs=rngs, **BF16)

    def __call__(self, x):
        x = x + self.attention(x)
        for block in self.blocks:
            x = x + nnx.gelu(block(x))
        return self.head(self.norm(self.mix(x)))


def test_a_model_is_converted_in_one_line():
    x = normal(0, 2, 40, 128)
    paths = []

    def where(path, layer):
        paths.append(path)
        return path != "head"

    model = jaxfp8.flax.convert(Model(nnx.Rngs(0)), where)
    assert sorted(paths) == [
        *(f"attention.{p}" for p in ("key", "out", "query", "value")),
        *("blocks.0", "blocks.1", "head", "mix"),
    ]
    apply, state = apply_of(model)
    plain, same = apply_of(Model(nnx.Rngs(0)))
    programs.assert_same_bits(jax.tree.leaves(state), jax.tree.leaves(same))
    # The head's product and attention's own two are XLA's.
    compare(apply, plain, state, x, ours=7, others=3, tolerance=0.15)


def test_conversion_wins_over_a_class_that_is_there():
    layer = nnx.LinearGeneral(
        128, 128, dot_general_cls=lambda: jax.lax.dot_general, rngs=nnx.Rngs(0)
    )
    apply, state = apply_of(jaxfp8.flax.convert(layer, recipe=POW2))
    x = normal(0, 8, 128, dtype=jnp.float32)
    assert_products(apply, (state, x), ours=1)
    want = jaxfp8.linear(x, state["kernel"][...], recipe=POW2)
    programs.assert_same_bits(apply(state, x), want)


def test_conversion_of_nothing_raises():
    with pytest.raises(ValueError, match="no layer is chosen; the model has .*head"):
        jaxfp8.flax.convert(Model(nnx.Rngs(0)), lambda path, layer: False)
    with pytest.raises(TypeError, match="model is a dict"):
        jaxfp8.flax.convert({})


@pytest.mark.slow
def test_a_converted_model_trains():
    import optax

    model = jaxfp8.flax.convert(
        nnx.Sequential(
            nnx.Linear(128, 256, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(256, 128, rngs=nnx.Rngs(1))
        )
    )
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    x, y = normal(0, 256, 128, dtype=jnp.float32), normal(1, 256, 128, dtype=jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_kernels_take_one_byte_and_adapters_train_beside_them():
    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.base = nnx.Linear(256, 384, rngs=rngs)
            self.adapter = nnx.LoRA(256, 4, 384, rngs=rngs)

        def __call__(self, x):
            return self.base(x) + self.adapter(x)

    def make(frozen):
        model = Adapted(nnx.Rngs(0))
        return jaxfp8.flax.convert(model, lambda path, _: path == "base", frozen=frozen)

    wide, frozen = make(False), make(True)
    x = jax.random.normal(jax.random.key(1), (64, 256))

    @nnx.jit
    def run(model, x):
        loss = lambda model, x: jnp.sum(model(x) ** 2)  # noqa: E731
        return nnx.value_and_grad(loss, argnums=(nnx.DiffState(0, nnx.LoRAParam), 1))(model, x)

    got, want = run(frozen, x), run(wide, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = frozen.base.kernel
    assert isinstance(kernel, jaxfp8.flax.FrozenWeight) and not isinstance(kernel, nnx.Param)
    assert sum(v.nbytes for v in jax.tree.leaves(kernel[...])) <= 1.03 * 256 * 384
    jaxfp8.flax.convert(frozen, lambda path, _: path == "base", frozen=True)
    np.testing.assert_array_equal(run(frozen, x)[0], want[0])


def test_a_layer_whose_kernel_has_more_axes_is_not_frozen():
    layer = nnx.LinearGeneral(128, (4, 32), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="is a LinearGeneral; allowed: nnx.Linear"):
        jaxfp8.flax.convert(layer, frozen=True)
