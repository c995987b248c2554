"""What is seldom done and must be right all the same: odd forms of programs, arguments and environments."""

import operator
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp8
from jaxfp8 import AutocastPolicy, autocast, explain
from jaxfp8._tools import tune as _tune
from jaxfp8._tools.explanation import engineering
from jaxfp8._tools.roofline import device
from tests.programs import assert_close, assert_same_bits, products

SMALL = AutocastPolicy(min_m=1, min_n=1, min_k=1)
F32 = 2e-6


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


# --- autocast and explain: which products are logits ----------------------------------------------

X, W = struct(128, 256), struct(256, 512)


def looped(x, w):
    """Logits that a while loop computes, as in speculative decoding."""

    def body(state):
        i, logits = state
        return i + 1, jnp.tanh(x @ w) + 0 * logits.sum()

    start = jnp.zeros((x.shape[0], w.shape[1]), x.dtype)
    return lax.while_loop(lambda state: state[0] < 3, body, (0, start))[1]


LOGITS = {
    "reshaped": lambda x, w: jax.nn.softmax((x @ w).reshape(4, 32, 512)),
    "squeezed": lambda x, w: jax.nn.softmax(jnp.squeeze(x[None] @ w, 0)),
    "sliced": lambda x, w: jnp.argmax((x @ w)[-1:], -1),
    "transposed": lambda x, w: jnp.argmax((x @ w).T, 0),
    "scaled": lambda x, w: lax.top_k((x @ w) / 0.7, 5)[0],
    "sorted": lambda x, w: lax.sort(x @ w, dimension=1),
    "masked": lambda x, w: jax.nn.softmax(jnp.where(jnp.arange(512) < 500, x @ w, -jnp.inf)),
    "scanned": lambda x, w: jax.nn.softmax(
        lax.scan(lambda c, row: (c, row[None] @ w), 0, x)[1][:, 0]
    ),
    "carried": lambda x, w: jax.nn.softmax(
        lax.scan(lambda c, _: (-(x @ w), None), jnp.zeros((128, 512), x.dtype), None, 2)[0]
    ),
    "looped": lambda x, w: jax.nn.softmax(looped(x, w)),
}


@pytest.mark.parametrize("form", LOGITS)
def test_logits_are_found_however_they_reach_what_ranks_them(form):
    (line,) = explain(autocast(LOGITS[form], policy=SMALL), X, W, gradient=False).lines
    assert line.reason.startswith("head or router: its result is ranked"), line


NOT_LOGITS = {
    "all are ranked": lambda x, w: jnp.max(x @ w),
    "tokens are ranked": lambda x, w: jnp.max(x @ w, 0),
    "their sums are ranked": lambda x, w: jnp.max((x @ w).reshape(128, 8, 64).sum(-1), -1),
    "a part is ranked": lambda x, w: jnp.max((x @ w).reshape(128, 8, 64), -1),
}


@pytest.mark.parametrize("form", NOT_LOGITS)
def test_what_is_not_ranked_across_its_features_is_no_logits(form):
    (line,) = explain(autocast(NOT_LOGITS[form], policy=SMALL), X, W, gradient=False).lines
    assert line.fp8, line.reason


def test_gradients_of_a_head_taken_inside_stay_with_their_head():
    def step(w, x):
        return jax.grad(lambda w: jax.nn.log_softmax(x @ w)[:, 0].mean())(w)

    found = explain(autocast(step, policy=SMALL), W, X, gradient=False).lines
    reasons = {line.role: line.reason for line in found}
    assert reasons["forward"].startswith("head or router")
    assert reasons["weight gradient"] == "a gradient of an embedding, head or router"


# --- autocast and explain: why not ----------------------------------------------------------------

BATCHED_RAGGED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((2,), (2,)), ((0,), (0,))),
    lhs_ragged_dimensions=[1],
    rhs_group_dimensions=[1],
)
REASONS = {
    "contracts no axis": (
        lambda x, w: lax.dot_general(x, w, (((), ()), ((), ()))),
        (struct(128), struct(256)),
    ),
    "empty": (lambda x, w: x @ w, (struct(0, 256), W)),
    "a ragged product of a form without a kernel": (
        lambda x, w, sizes: lax.ragged_dot_general(x, w, sizes, BATCHED_RAGGED),
        (struct(2, 128, 256), struct(2, 4, 256, 512), struct(2, 4, dtype=jnp.int32)),
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_a_product_is_left_alone(reason):
    f, arguments = REASONS[reason]
    (line,) = explain(autocast(f, policy=SMALL), *arguments, gradient=False).lines
    assert line.reason == reason


def test_a_function_without_products_explains_itself():
    found = explain(jnp.tanh, X)
    assert not found.lines and found.flops == found.fp8_share == 0
    assert "0 of 0 products in FP8: 0.0% of 0 FLOP" in str(found)
    assert engineering(999) == "999 " and engineering(2.5e15) == "2.5 P"


def test_products_that_autocast_does_not_enter_are_listed_as_such():
    @jax.custom_batching.custom_vmap
    def f(x, w):
        return x @ w

    @f.def_vmap
    def _(size, batched, x, w):
        return x @ w, batched[0]

    (line,) = explain(autocast(f, policy=SMALL), X, W, gradient=False).lines
    assert line.reason == "inside an operation that autocast does not enter"


def test_a_model_whose_variant_has_no_table_is_refused_by_name():
    with pytest.raises(ValueError, match="device is 'NVIDIA H20 NVL'; allowed: h100"):
        device("explain", "NVIDIA H20 NVL")


# --- autocast: what a function may be -------------------------------------------------------------


class Owner(eqx.Module):
    w: jax.Array

    def project(self, x):
        return x @ self.w


def test_a_bound_method_has_the_parameters_of_its_owner():
    owner, x = Owner(normal(0, 192, 64)), normal(1, 130, 192)
    f = autocast(owner.project, policy=SMALL)
    assert products(jax.make_jaxpr(f)(x)) == 1
    assert_same_bits(f(x), jaxfp8.linear(x, owner.w))


def test_a_callable_without_a_signature():
    x, w = normal(0, 130, 192), normal(1, 192, 64)
    f = autocast(operator.methodcaller("dot", w), policy=SMALL)
    assert_same_bits(f(x), jaxfp8.linear(x, w))


def test_a_function_that_changes_the_structure_of_its_arguments_is_refused():
    def f(cache, x):
        cache.append(x)
        return x

    with pytest.raises(ValueError, match="autocast: the function changes the structure"):
        autocast(f)([], normal(0, 8, 8))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("columns", [128, 512], ids=["cut blocks", "whole blocks"])
def test_on_an_explicit_mesh_a_product_keeps_its_type(side, columns):
    """A product whose columns would be cut inside a weight's block runs whole, and its result is cut as it was."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    x, w = normal(0, 160, 192), normal(1, 192, columns)
    policy = AutocastPolicy(min_m=1, min_n=1, min_k=1, weight_argnums=(1,))

    def right(x, w):
        return x @ w

    def left(x, w):
        return jnp.einsum("kn,mk->nm", w, x, out_sharding=P("m", "d"))

    f, spec = (left, P("m", "d")) if side == "left" else (right, P("d", "m"))
    with jax.set_mesh(mesh):
        placed = jax.reshard(x, P("d", None)), jax.reshard(w, P(None, "m"))
        got = jax.jit(autocast(f, policy=policy))(*placed)
        assert jax.typeof(got).sharding.spec == spec == jax.typeof(f(*placed)).sharding.spec
    want = jaxfp8.linear(x, w)
    assert_close(got, want.T if side == "left" else want, F32)


# --- operations -----------------------------------------------------------------------------------


def test_without_jit_every_operation_computes_the_same():
    x, w = normal(0, 5, 200), normal(1, 200, 72)
    want = jax.vjp(jaxfp8.linear, x, w)
    with jax.disable_jit():
        got = jax.vjp(jaxfp8.linear, x, w)
        assert_close(got[0], want[0], F32)
        assert_close(got[1](got[0]), want[1](want[0]), F32)


@pytest.mark.parametrize("axes", [10, 11])
def test_an_ellipsis_of_einsum_holds_ten_axes(axes):
    x, w = normal(0, *[1] * axes, 3, 40), normal(1, 40, 24)
    if axes > 10:
        with pytest.raises(ValueError, match="an ellipsis of 11 axes; allowed: 10"):
            jaxfp8.einsum("...tk,kn->...tn", x, w)
    else:
        y = jaxfp8.einsum("...tk,kn->...tn", x, w)
        assert_close(y.reshape(3, 24), jaxfp8.linear(x.reshape(3, 40), w), F32)


def test_einsum_in_another_order_has_the_sharding_asked_for():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    x, w = normal(0, 64, 128), normal(1, 128, 32)
    with jax.set_mesh(mesh):
        f = jax.jit(lambda x, w: jaxfp8.einsum("tk,kn->nt", x, w, out_sharding=P("d", None)))
        y = f(jax.reshard(x, P("d", None)), w)
        assert jax.typeof(y).sharding.spec == P("d", None)
    assert_close(y, jaxfp8.linear(x, w).T, F32)


def test_an_mlp_of_one_vector_and_of_another_result_type():
    x, up, down = normal(0, 3, 128), normal(1, 128, 2, 128) / 11, normal(2, 128, 64) / 11
    y = jaxfp8.mlp(x, up, down)
    vector = jaxfp8.mlp(x[1], up, down)
    assert vector.shape == (64,)
    assert_close(vector, y[1], F32)
    bf16 = jaxfp8.mlp(x, up, down, preferred_element_type=jnp.bfloat16)
    assert bf16.dtype == jnp.bfloat16
    assert_close(bf16, y, 0.03)  # the hidden layer is bfloat16 too
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        f = jax.jit(lambda x: jaxfp8.mlp(x, up, down, out_sharding=P("d")))
        assert jax.typeof(f(x[1])).sharding.spec == P("d")


@pytest.mark.parametrize("groups", [None, 2])
def test_an_mlp_without_tokens_is_empty_and_has_gradients_of_zero(groups):
    lead = () if groups is None else (groups,)
    x, up, down = jnp.zeros((0, 128)), normal(0, *lead, 128, 2, 128), normal(1, *lead, 128, 64)
    sizes = () if groups is None else (jnp.zeros(groups, jnp.int32),)
    f = jaxfp8.mlp if groups is None else jaxfp8.ragged_mlp

    def run(x, up, down):
        y, pull = jax.vjp(lambda *a: f(*a, *sizes), x, up, down)
        return y, *pull(y)

    y, dx, dup, ddown = jax.jit(run)(x, up, down)
    assert (y.shape, dx.shape) == ((0, 64), (0, 128))
    assert not dup.any() and not ddown.any()
    # The program for a GPU has no call of a kernel: nothing is launched on nothing.
    text = jax.jit(run).trace(x, up, down).lower(lowering_platforms=("cuda",)).as_text()
    assert "jaxfp8_activation" not in text and "jaxfp8_quantize_both" not in text


def test_a_weight_quantized_before_is_gathered_and_wrong_axes_are_named():
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    w = normal(0, 256, 72)

    def gather(axis):
        def run(w):
            return jaxfp8.all_gather_weight(jaxfp8.prequantize(w), "d", axis=axis)

        spec = P("d", None)
        return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False)

    assert_same_bits(jax.jit(gather(-2))(w), jaxfp8.prequantize(w))
    with pytest.raises(ValueError, match="all_gather_weight: axis is 2; allowed: -2 to 1"):
        gather(2)(w)


def test_what_the_arrays_say_of_themselves():
    q, w = jaxfp8.quantize(normal(0, 3, 200)), jaxfp8.prequantize(normal(1, 256, 72))
    assert (q.shape, q.ndim, q.size) == ((3, 200), 2, 600)
    assert repr(w) == "QuantizedWeight([256,72], float8_e4m3fn)"
    assert "QuantizedWeight" in repr(jax.tree.map(lambda _: None, w))


# --- tuning ---------------------------------------------------------------------------------------

PRODUCTS = [
    jaxfp8.Product("gemm_1d2d", 8, 24, 32, accum=True),
    jaxfp8.Product("gemm_1d1d", 8, 24, 32, lhs_dtype="float8_e5m2"),
    jaxfp8.Product("masked_grouped_gemm", 8, 24, 32, groups=2),
    jaxfp8.Product("grouped_gemm", 30, 24, 32, groups=4),
    jaxfp8.Product("grouped_wgrad_gemm", 8, 24, 128 * 3, groups=2, out_dtype="float32"),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.kind)
@pytest.mark.representatives(cases=2)
def test_measuring_times_each_configuration_asked_for(product, monkeypatch):
    monkeypatch.setattr(_tune, "_COLD_BYTES", 0)  # a few launches are enough
    two = product.configs[:2]
    seconds = _tune.measure(product, two, device=jax.devices()[1], repeats=3)
    assert tuple(seconds) == two and all(map(np.isfinite, seconds.values()))
    heuristic = _tune.heuristic_config(product, 132)
    assert heuristic in product.configs


def test_a_product_that_may_use_one_multiprocessor_is_given_no_cluster():
    product = jaxfp8.Product("gemm_1d2d", 4096, 4096, 4096, num_sms=1)
    assert _tune.heuristic_config(product, 132).endswith("cluster 1x1")


# --- frameworks -----------------------------------------------------------------------------------


def test_a_linear_layer_without_bias():
    layer = eqx.nn.Linear(192, 64, use_bias=False, key=jax.random.key(0))
    x = normal(0, 192)
    y = jaxfp8.equinox.convert(layer)(x)
    assert_close(y, jaxfp8.linear(x, layer.weight.T), F32)


def test_a_factory_of_flaxs_einsum_makes_that_einsum():
    einsum = jaxfp8.flax.Einsum(jaxfp8.Recipe(scale_format="pow2"))
    assert einsum.cls() == einsum


def test_a_ragged_product_without_a_rule_stays_jaxs():
    class Experts(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(normal(1, 2, 128, 64))

        def __call__(self, x):
            return lax.ragged_dot(x, self.w[...], jnp.array([30, 40]))

    x, model = normal(0, 70, 128), Experts()
    same = qwix.quantize_model(model, jaxfp8.qwix.Fp8Provider([]), x)
    assert_same_bits(same(x), model(x))


def test_arrays_of_qwix_that_no_kernel_takes_are_refused():
    x = normal(0, 256, 256)
    fp8 = qwix.quantize(x, jnp.float8_e4m3fn, channelwise_axes=(0,), tiled_axes={1: 128})
    with pytest.raises(TypeError, match="array is a .*; allowed: a qwix.QArray"):
        jaxfp8.qwix.from_qarray(x)
    with pytest.raises(
        ValueError, match="block is \\(1, 64\\); allowed: \\(1, 128\\), \\(128, 128\\)"
    ):
        jaxfp8.qwix.from_qarray(fp8, (1, 64))
    vector = qwix.quantize(x[0], jnp.float8_e4m3fn, tiled_axes={0: 128})
    with pytest.raises(ValueError, match="array has shape \\(256,\\)"):
        jaxfp8.qwix.from_qarray(vector, (128, 128))
    assert_close(jaxfp8.qwix.from_qarray(vector).dequantize(), qwix.dequantize(vector), 0)


# --- comparison -----------------------------------------------------------------------------------


def test_a_comparison_with_a_reference_of_ones_own_and_a_picture_that_is_not_saved():
    params, x = {"w": normal(0, 128, 64), "unused": jnp.zeros(3)}, normal(1, 40, 128)

    def loss(params, x):
        return jnp.sum(jaxfp8.linear(x, params["w"]) ** 2) + params["unused"].sum() * 0

    def reference(params, x):
        return jnp.sum((x @ params["w"]) ** 2)

    found = jaxfp8.validate.compare(loss, params, x, reference=reference)
    np.testing.assert_allclose(found.reference_loss, reference(params, x), rtol=1e-6)
    unused = {g.path: g for g in found.gradients}["unused"]
    assert unused.error == 0
    assert len(found.plot().axes) == 2


# --- the environment ------------------------------------------------------------------------------


def test_an_extension_that_cannot_be_loaded_is_said_with_what_to_do():
    program = "import sys\nsys.modules['jaxfp8._C'] = None\nimport jaxfp8"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: jaxfp8's extension module cannot be loaded")
    assert "install the package with pip install ." in last
