"""explain lists each product of a function and of its gradient, by what runs it, and adds up."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxfp8
from jaxfp8 import _C, AutocastPolicy, autocast, explain

D, F, E, T, LAYERS = 256, 512, 4, 1024, 3


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


PARAMS = {
    "embed": struct(1024, D),
    "layers": {"q": struct(LAYERS, D, D), "up": struct(LAYERS, D, F), "down": struct(LAYERS, F, D)},
    "router": struct(D, E),
    "experts": struct(E, D, D),
    "lm_head": struct(D, 1024),
}
TOKENS = struct(2, T // 2, dtype=jnp.int32)


def loss(params, tokens):
    x = params["embed"][tokens].reshape(T, D)

    def layer(x, p):
        q = x @ p["q"]
        x = x + jax.nn.softmax(q @ q.T) @ q
        return x + jax.nn.silu(x @ p["up"]) @ p["down"], None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    expert = jnp.argmax(x @ params["router"], -1)
    sizes = jnp.bincount(expert, length=E).astype(jnp.int32)
    x = lax.ragged_dot(x[jnp.argsort(expert)], params["experts"], sizes)
    return -jax.nn.log_softmax(x @ params["lm_head"]).mean()


@pytest.fixture(scope="module")
def explained():
    return explain(autocast(loss), PARAMS, TOKENS, device_kind="h100")


def lines(explanation, **wanted):
    return [
        line for line in explanation.lines if all(getattr(line, k) == v for k, v in wanted.items())
    ]


def test_every_product_of_the_function_and_its_gradient_is_listed(explained):
    def roles(name):
        return sorted(line.role for line in lines(explained, name=name))

    gradients = ["input gradient", "weight gradient"]
    assert roles("params.layers.up") == ["forward", *gradients[:1], "recomputed", gradients[1]]
    assert roles("params.layers.down") == ["forward", *gradients]  # no one needs it recomputed
    assert roles("params.experts") == ["forward", *gradients]
    assert roles("params.lm_head") == [
        "forward",
        "input gradient",
    ]  # of the third, no operand is a weight
    assert {line.repeats for line in lines(explained, name="params.layers.q")} == {LAYERS}


def test_sizes_and_flops(explained):
    (up,) = lines(explained, name="params.layers.up", role="forward")
    assert (up.groups, up.m, up.n, up.k) == (1, T, F, D)
    assert up.flops == 2 * T * F * D
    assert up.bytes == T * D + 4 * T * 2 + D * F + 4 * 2 * 4 + 2 * T * F  # data, scales, result
    (expert,) = lines(explained, name="params.experts", role="forward")
    assert (expert.groups, expert.m, expert.n, expert.k) == (E, T, D, D)
    assert expert.flops == 2 * T * D * D
    (dw,) = lines(explained, name="params.experts", role="weight gradient")
    assert (dw.groups, dw.m, dw.n, dw.k, dw.flops) == (E, D, D, T, 2 * T * D * D)
    (dense,) = lines(explained, name="params.layers.up", role="weight gradient")
    assert (dense.m, dense.n, dense.k) in ((D, F, T), (F, D, T))


def test_kernels_are_those_that_a_launch_would_take(explained):
    for line in explained.lines:
        assert bool(line.kernel) == line.fp8
        if line.fp8:
            assert line.configuration in _C.configs(f"jaxfp8_{line.operation}_v1")
            assert line.configuration.split()[0] in line.kernel
            assert math.prod(line.grid) <= 132
    (up,) = lines(explained, name="params.layers.up", role="forward")
    (dw,) = lines(explained, name="params.layers.up", role="weight gradient")
    assert up.kernel.startswith("gemm_1d2d") and dw.kernel.startswith("gemm_1d1d")


def test_a_configuration_asked_for_is_the_one_shown():
    x, w = (jax.eval_shape(jaxfp8.quantize, struct(T, D)) for _ in range(2))
    for config in ("m128n128 cluster 2x1", "m64n64 cluster 1x1"):
        (line,) = explain(
            lambda x, w, c=config: jaxfp8.gemm(x, w, config=c), x, w, gradient=False
        ).lines
        assert line.configuration == config and config.split()[0] in line.kernel


def test_why_not(explained):
    def reason(**wanted):
        return {line.reason for line in lines(explained, **wanted)}

    assert reason(name="params.lm_head") == {
        "head or router: its result is ranked or normalized across features"
    }
    others = {line.reason for line in explained.lines if not line.fp8}
    assert "both operands vary with the batch" in others
    assert all(line.reason for line in explained.lines if not line.fp8)


def test_totals_add_up(explained):
    total = sum(line.flops * line.repeats for line in explained.lines)
    ours = sum(line.flops * line.repeats for line in explained.lines if line.fp8)
    assert explained.flops == total
    assert explained.fp8_share == ours / total
    assert 0.3 < explained.fp8_share < 1
    products = sum(line.seconds * line.repeats for line in explained.lines)
    assert explained.seconds == pytest.approx(products + explained.quantization_seconds)
    assert explained.quantizations > 0


def test_times_are_the_rooflines(explained):
    for line in lines(explained, operation="gemm_1d2d"):
        assert line.seconds == max(line.flops / 1979e12, line.bytes / 3.35e12)
    other = explain(autocast(loss), PARAMS, TOKENS, device_kind="NVIDIA H20")
    assert other.device.sms == 78 and other.seconds > explained.seconds


def test_a_function_without_autocast_shows_what_it_would_change():
    plain = explain(loss, PARAMS, TOKENS, gradient=False, device_kind="h100")
    assert plain.fp8_share == 0
    (up,) = lines(plain, name="params.layers.up")
    assert up.reason == "jaxfp8.autocast would run it in FP8" and up.dtype == "bfloat16"
    assert {line.role for line in plain.lines} == {"forward"}


def test_the_operations_are_found_where_they_are_called_by_hand():
    def f(w, x):
        return jaxfp8.linear(x, w).astype(jnp.float32).sum()

    found = explain(f, struct(D, F), struct(T, D), gradient=0)
    assert [line.operation for line in found.lines] == ["gemm_1d2d", "gemm_1d1d"]
    assert found.fp8_share == 1
    both = explain(f, struct(D, F), struct(T, D), gradient=(0, 1))
    assert len(both.lines) == 3


def mlp_loss(ragged):
    def f(up, down, x):
        if ragged:
            sizes = jnp.full(E, T // E, jnp.int32)
            return jaxfp8.ragged_mlp(x, up, down, sizes).astype(jnp.float32).sum()
        return jaxfp8.mlp(x, up, down).astype(jnp.float32).sum()

    groups = (E,) if ragged else ()
    return f, (struct(*groups, D, 2, F), struct(*groups, F, D), struct(T, D))


@pytest.mark.parametrize("ragged", [False, True], ids=["mlp", "ragged_mlp"])
def test_an_mlp_is_six_products_of_its_sizes(ragged):
    """Gate and up are one product; what it reads and writes is its operands, their scales and its result."""
    f, arguments = mlp_loss(ragged)
    found = explain(f, *arguments, gradient=(0, 1, 2), device_kind="h100")
    groups = E if ragged else 1
    columns = T + 128 * E if ragged else T  # the group-padded token axis

    def row_bytes(rows, k):
        return rows * k + rows * k // 128 * 4

    def product(role, m, n, k):  # 1x128 . 128x128
        weight = groups * (n * k + n * k // 128**2 * 4)
        size = row_bytes(m, k) + weight + (4 * E if ragged else 0) + 2 * m * n
        return role, m, n, k, size

    def wgrad(m, n):  # 1x128 . 1x128
        size = row_bytes(m, columns) + row_bytes(n, columns) + 2 * groups * m * n
        return "weight gradient", m, n, T, size + (4 * E if ragged else 0)

    expected = [
        product("forward", T, 2 * F, D),
        product("forward", T, D, F),
        wgrad(F, D),
        product("input gradient", T, F, D),
        product("input gradient", T, D, 2 * F),
        wgrad(D, 2 * F),
    ]
    assert [(x.role, x.m, x.n, x.k, x.bytes) for x in found.lines] == expected
    for line in found.lines:
        assert line.flops == 2 * line.m * line.n * line.k and line.groups == groups
        assert line.configuration in _C.configs(f"jaxfp8_{line.operation}_v1")
        assert line.configuration.split()[0] in line.kernel
        kind = "1d1d" if line.role == "weight gradient" else "1d2d"
        assert line.kernel.startswith(f"gemm_{kind}")
    assert found.fp8_share == 1 and not found.notes


@pytest.mark.parametrize("ragged", [False, True], ids=["mlp", "ragged_mlp"])
def test_an_mlp_passes_over_its_activation_once_each_way(ragged):
    f, arguments = mlp_loss(ragged)
    found = explain(f, *arguments, gradient=(0, 1, 2), device_kind="h100")
    groups = E if ragged else 1
    columns = T + 128 * E if ragged else T

    def both(width):  # rows and columns, with their scales
        return (T + columns) * width * 33 // 32 + (4 * E if ragged else 0)

    def weight(k, n):  # reads bfloat16, writes both orientations, of which the scales are the same
        return groups * (2 * k * n + 2 * k * n + k * n // 128**2 * 4)

    x, dy = 2 * T * D + both(D), 2 * T * D + both(D)
    activation = 2 * T * 2 * F + both(F)
    gradient = 2 * T * 2 * F + 2 * T * F + both(2 * F)
    assert found.quantizations == 6
    weights = weight(D, 2 * F) + weight(F, D)
    assert found.quantization_bytes == x + dy + activation + gradient + weights
    forward = explain(f, *arguments, gradient=False, device_kind="h100")
    assert len(forward.lines) == 2 and forward.quantizations == 4
    rows = 2 * T * D + T * D * 33 // 32 + 2 * T * 2 * F + T * F * 33 // 32
    assert forward.quantization_bytes == rows + weights


def test_a_function_that_differentiates_itself_is_listed_once():
    step = jax.value_and_grad(autocast(loss))
    inside, outside = explain(step, PARAMS, TOKENS), explain(autocast(loss), PARAMS, TOKENS)
    assert sorted(line.flops for line in lines(inside, dtype="fp8")) == sorted(
        line.flops for line in lines(outside, dtype="fp8")
    )


def test_what_has_no_gradient_is_said():
    def search(x, w):
        return lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ w, x)

    square = struct(D, D)
    found = explain(autocast(search), square, square)
    assert len(found.lines) == 1 and found.lines[0].repeats is None
    assert any(n.startswith("no gradient: ") for n in found.notes)
    with pytest.raises(ValueError):
        explain(autocast(search), square, square, gradient=True)
    assert "no floating result" in explain(lambda x: x.sum().astype(int), square).notes[0]


def test_types_without_a_kernel_are_said_to_be_refused():
    recipe = jaxfp8.Recipe(dtype=jnp.float8_e5m2)
    found = explain(
        lambda x, w: jaxfp8.linear(x, w, recipe=recipe), struct(T, D), struct(D, F), gradient=False
    )
    assert found.lines[0].configuration == "refused on a Hopper GPU"
    assert any("refused" in n for n in found.notes)


def test_policy_of_the_function_is_the_one_that_judges():
    policy = AutocastPolicy(exclude=("up",))
    (up,) = lines(
        explain(autocast(loss, policy=policy), PARAMS, TOKENS, gradient=False), m=T, n=F, k=D
    )
    assert up.reason == "excluded by name: up"


def test_convolutions_are_listed():
    def f(x, w):
        return lax.conv(x, w, (1, 1), "SAME")

    (line,) = explain(f, struct(2, 8, 16, 16), struct(32, 8, 3, 3), gradient=False).lines
    assert (line.reason, line.m, line.n, line.k) == ("a convolution", 2 * 16 * 16, 32, 8 * 9)


def test_printed_forms(explained):
    text = str(explained)
    assert "params.layers.up" in text and "products in FP8" in text
    assert explained._repr_html_().count("<tr>") == len(text.splitlines()) - 2 - len(
        explained.totals()
    )
    assert explained.to_dicts()[0]["flops"] == explained.lines[0].flops
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(explained)
    assert "params.layers.up" in console.export_text()


def test_refuses():
    x = struct(D, D)
    with pytest.raises(ValueError, match="device is 'b200'; allowed: h100"):
        explain(jnp.dot, x, x, device_kind="b200")
    with pytest.raises(ValueError, match="gradient is 2; allowed: True, False, None, or positions"):
        explain(jnp.dot, x, x, gradient=2)


def by_hand(x, expert, gate, w):
    order = jnp.argsort(expert.reshape(-1))
    sizes = jnp.bincount(expert.reshape(-1), length=w.shape[0])
    y = jax.lax.ragged_dot(x[order // 2], w, sizes.astype(jnp.int32))
    return jnp.sum(y[jnp.argsort(order)].reshape(*expert.shape, -1) * gate[..., None], 1)


def test_a_mixture_by_hand_is_told_of_moe():
    """With and without autocast; not rows that come in order, and not moe itself."""
    x, w = jnp.ones((256, 128), jnp.bfloat16), jnp.ones((4, 128, 128), jnp.bfloat16)
    expert, gate = jnp.zeros((256, 2), jnp.int32), jnp.ones((256, 2), jnp.bfloat16)

    def told(f, *arguments):
        notes = jaxfp8.explain(f, *arguments).notes
        return any("jaxfp8.moe" in note for note in notes)

    assert told(by_hand, x, expert, gate, w)
    assert told(jaxfp8.autocast(by_hand), x, expert, gate, w)
    assert not told(jaxfp8.autocast(jax.lax.ragged_dot), x, w, jnp.full(4, 64))
    up = jnp.ones((4, 128, 2, 128), jnp.bfloat16)
    assert not told(lambda x, gate, up, w: jaxfp8.moe(x, expert, gate, up, w), x, gate, up, w)


def test_a_pallas_kernel_is_a_row_with_its_share():
    pl = pytest.importorskip("jax.experimental.pallas")

    def kernel(a, b, o):
        o[...] = jnp.dot(a[...], b[...])

    def f(p, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x @ p["w"], p["v"])

    p = {"w": struct(D, D), "v": struct(D, D)}
    first, opaque = explain(autocast(f), p, struct(T, D), gradient=False).lines
    assert first.fp8 and not opaque.fp8 and "opaque: a Pallas kernel" in opaque.reason
    assert opaque.flops == first.flops


@pytest.mark.parametrize("held", [False, True])
def test_explain_differentiates_a_function_and_its_cast_alike(held):
    def loss(p, x):
        w = p["w"] if held else p
        return (jnp.tanh(x @ w) ** 2).sum()

    w, x = struct(D, D), struct(T, D)
    args = ({"w": w}, x) if held else (w, x)
    roles = [sorted(line.role for line in explain(f, *args).lines) for f in (loss, autocast(loss))]
    assert roles == [["forward", "weight gradient"]] * 2
