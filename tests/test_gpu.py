"""On a Hopper GPU: everything the emulated platform checks, and sizes that only a GPU can run.

`tests/gpu_check.sh` builds the package and runs this file there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfp8
from jaxfp8.kernels import gemm
from tests import kernel_cases as cases
from tests import oracle, oracle_activation
from tests import oracle_quantize as oq
from tests.emulated_platform import emulated_platform
from tests.emulator.tensor_core import hopper_arithmetic

pytestmark = pytest.mark.gpu

# The tensor core keeps 14 bits of a sum inside a block of 128 and cuts the rest off (tests/emulator/tensor_core.py).
# benchmarks/gpu_errors.py, on an H100: 1.3e-4 norm-wise for zero-mean products, 6.6e-4 where all products of a sum have
# one sign, whatever K.
F32 = 1e-3
BF16 = 5e-3
BOTH = [jnp.bfloat16, jnp.float32]


@pytest.fixture(scope="module")
def cpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU that JAX can use")
    return jax.devices("cpu")[0]


def on_both(cpu, build):
    """What a case gives on the GPU, and on the portable lowering with the same operands."""
    with jax.default_device(cpu):
        run = build()
        want = {name: np.asarray(v) for name, v in run().items()}
    first, second = ({name: np.asarray(v) for name, v in run().items()} for _ in range(2))
    for name, v in first.items():  # deterministic
        np.testing.assert_array_equal(v.view(np.uint8), second[name].view(np.uint8))
    return first, want


def bound_of(got, want):
    assert got.dtype == want.dtype
    return F32 if want.dtype == np.float32 else BF16


def assert_products_agree(cpu, build):
    got, want = on_both(cpu, build)
    for name, v in want.items():
        oracle.assert_close(got[name], v, bound_of(got[name], v))


def assert_bits_agree(cpu, build):
    got, want = on_both(cpu, build)
    for name, v in want.items():
        np.testing.assert_array_equal(got[name], v, err_msg=name)


@pytest.mark.parametrize("shape", cases.GEMM_SHAPES, ids=str)
@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
def test_gemm_of_any_shape(cpu, shape, square):
    for out_dtype in BOTH:
        assert_products_agree(
            cpu, lambda out=out_dtype: cases.gemm(shape, square=square, out_dtype=out)
        )


@pytest.mark.parametrize(
    "shape",
    [
        (4096, 2112, 7168),
        (128, 24576, 1536),
        (64, 7168, 16384),
        (4097, 4104, 2056),
        (1, 7168, 2048),
    ],
    ids=str,
)
@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
def test_large_gemm(cpu, shape, square):
    assert_products_agree(cpu, lambda: cases.gemm(shape, square=square, out_dtype=jnp.float32))


@pytest.mark.parametrize("dtypes", [(cases.E5M2, cases.E4M3), (cases.E4M3, cases.E5M2)], ids=str)
@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
def test_gemm_of_mixed_types(cpu, dtypes, square):
    if square and dtypes[1] == cases.E5M2:
        pytest.skip("weights are E4M3 in every default recipe; see test_linear_trains")
    assert_products_agree(cpu, lambda: cases.gemm((130, 136, 272), square=square, dtypes=dtypes))


@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
@pytest.mark.parametrize("out_dtype", BOTH, ids=["bf16", "f32"])
def test_gemm_accumulates(cpu, square, out_dtype):
    for shape in [(130, 136, 272), (131, 137, 272)]:
        assert_products_agree(
            cpu, lambda s=shape: cases.gemm(s, square=square, out_dtype=out_dtype, accum=True)
        )


@pytest.mark.parametrize("square", [True, False], ids=["128x128", "1x128"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "batched"])
def test_batched_gemm(cpu, square, shared):
    assert_products_agree(
        cpu,
        lambda: cases.batched(
            3, (70, 136, 200), shared=shared, square=square, out_dtype=jnp.float32
        ),
    )


@pytest.mark.parametrize("groups", cases.GROUPS)
@pytest.mark.parametrize("out_dtype", BOTH, ids=["bf16", "f32"])
def test_grouped_gemm(cpu, groups, out_dtype):
    assert_products_agree(cpu, lambda: cases.grouped(groups, out_dtype=out_dtype))


@pytest.mark.parametrize("sizes", [[0, 1, 127], [128, 129, 130], [500, -3, 64]], ids=str)
@pytest.mark.parametrize("out_dtype", BOTH, ids=["bf16", "f32"])
def test_masked_grouped_gemm(cpu, sizes, out_dtype):
    assert_products_agree(cpu, lambda: cases.masked(130, sizes, out_dtype=out_dtype))


@pytest.mark.parametrize("groups", cases.GROUPS)
@pytest.mark.parametrize("accum", [False, True], ids=["store", "accumulate"])
@pytest.mark.parametrize("out_dtype", BOTH, ids=["bf16", "f32"])
def test_grouped_wgrad_gemm(cpu, groups, accum, out_dtype):
    assert_products_agree(
        cpu, lambda: cases.grouped_wgrad(groups, accum=accum, out_dtype=out_dtype)
    )


@pytest.mark.parametrize("kind", ["rows", "blocks", "both", "weight"])
@pytest.mark.parametrize("shape", [*cases.QUANTIZE_SHAPES, (1000, 3000), (513, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [cases.E4M3, cases.E5M2], ids=["e4m3", "e5m2"])
def test_quantizers_agree_to_the_bit(cpu, kind, shape, dtype):
    for input_dtype in (np.float32, jnp.bfloat16, np.float16):
        for scale_format in ("float32", "pow2"):
            options = dict(input_dtype=input_dtype, dtype=dtype, scale_format=scale_format)
            assert_bits_agree(cpu, lambda o=options: cases.quantizer(kind, shape, **o))


@pytest.mark.parametrize("groups", cases.GROUPS)
def test_ragged_quantizers_agree_to_the_bit(cpu, groups):
    for input_dtype in (np.float32, jnp.bfloat16, np.float16):
        assert_bits_agree(cpu, lambda d=input_dtype: cases.ragged_quantizer(groups, input_dtype=d))


@pytest.mark.parametrize(
    "recipe",
    [
        jaxfp8.Recipe(),
        jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2, scale_format="pow2"),
        jaxfp8.Recipe(num_sms=7),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_linear_trains(cpu, recipe, dtype):
    for shape in [(130, 200, 136), (1024, 512, 768), (1000, 513, 257)]:
        assert_products_agree(cpu, lambda s=shape: cases.train_linear(s, recipe, dtype))


@pytest.mark.parametrize("groups", cases.GROUPS)
def test_ragged_dot_trains(cpu, groups):
    assert_products_agree(cpu, lambda: cases.train_ragged_dot(groups))


# The activation's last float32 bits differ between platforms, so that a few FP8 values fall on the other side of a
# rounding, 2^-4 away: of one in a hundred, 0.6 % of the norm.
MLP = 1e-2


@pytest.mark.parametrize("activation", oracle_activation.ACTIVATIONS)
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "plain"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_mlp_of_any_shape_trains(cpu, activation, gate, dtype):
    for t, k, f in [(130, 136, 200), (1024, 512, 768), (100, 257, 130)]:
        got, want = on_both(
            cpu,
            lambda s=(t, k, f, k): cases.train_mlp(s, activation, gated=gate, dtype=dtype),
        )
        for name, v in want.items():
            assert got[name].dtype == v.dtype
            assert oracle.error(got[name], v) < MLP, name


@pytest.mark.parametrize("groups", cases.GROUPS)
def test_ragged_mlp_of_any_groups_trains(cpu, groups):
    rows, sizes = cases.GROUPS[groups]
    got, want = on_both(
        cpu,
        lambda: cases.train_mlp((rows, 136, 200, 136), groups=sizes, dtype=jnp.bfloat16),
    )
    for name, v in want.items():
        assert oracle.error(got[name], v) < MLP, name


@pytest.mark.parametrize(
    "build",
    [
        lambda: cases.gemm((130, 136, 272), out_dtype=jnp.float32),
        lambda: cases.gemm((257, 130, 384)),
        lambda: cases.gemm((65, 127, 250), square=False, out_dtype=jnp.float32),
        lambda: cases.gemm((130, 136, 272), dtypes=(cases.E5M2, cases.E4M3), out_dtype=jnp.float32),
        lambda: cases.gemm((131, 137, 272), square=False, out_dtype=jnp.float32, accum=True),
        lambda: cases.grouped("unequal", out_dtype=jnp.float32),
        lambda: cases.masked(130, [128, 129, 130], out_dtype=jnp.float32),
        lambda: cases.grouped_wgrad("unequal", accum=True),
        lambda: cases.train_linear((130, 200, 136)),
        lambda: cases.train_ragged_dot("fewer than M"),
    ],
)
def test_products_equal_the_emulator_to_the_bit(cpu, build):
    """Of one program: the GPU, and the kernels' PTX under the tensor core's arithmetic."""
    with jax.default_device(cpu):
        run = build()
    got = {name: np.asarray(v) for name, v in run().items()}
    with jax.default_device(cpu), hopper_arithmetic(), emulated_platform():
        want = {name: np.asarray(v) for name, v in run().items()}
    for name, v in want.items():
        np.testing.assert_array_equal(got[name].view(np.uint8), v.view(np.uint8), err_msg=name)


def test_nonfinite_blocks_stay_visible(cpu):
    x, w = np.ones((130, 300), np.float32), np.ones((300, 260), np.float32)
    x[2, 5], w[290, 130] = np.inf, np.nan
    got = np.asarray(jax.jit(jaxfp8.linear)(x, w))
    bad = np.zeros((130, 260), bool)
    bad[2], bad[:, 128:256] = True, True
    np.testing.assert_array_equal(~np.isfinite(got), bad)


def rows_of(x, w, rows):
    """Some rows of linear(x, w), in float64 from the oracle's quantization."""
    weight = oq.dequantize(*oq.quantize_blocks(np.asarray(w), (128, 128)), (128, 128))
    return oq.dequantize(*oq.quantize_blocks(np.asarray(x)[rows], (1, 128))) @ weight


@pytest.mark.parametrize(
    "m, k, n", [(32768, 1024, 2048), (8192, 16384, 256), (150_000, 128, 16384)]
)
def test_huge_linear(cpu, m, k, n):
    """The last has an output of more than 2**31 elements."""
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (k, n), jnp.bfloat16)
    rows = np.array([0, 1, m // 2, m - 129, m - 1])
    y = jax.jit(lambda x, w: jaxfp8.linear(x, w))(x, w)
    got = np.asarray(y[rows]).astype(np.float32)
    assert oracle.error(got, rows_of(x, w, rows)) < BF16


def test_a_train_step_in_a_command_buffer_equals_one_outside():
    """The handlers only launch kernels on the given stream, so XLA may capture them."""
    x = jax.random.normal(jax.random.key(0), (512, 1024), jnp.bfloat16)
    ws = jax.random.normal(jax.random.key(1), (6, 1024, 1024), jnp.float32) / 32

    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(jaxfp8.linear(x, w))
        return (x.astype(jnp.float32) ** 2).mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(ws, x)
    results = []
    for flag in ("", "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN"):
        options = {"xla_gpu_enable_command_buffer": flag, "xla_gpu_graph_min_graph_size": 1}
        step = lowered.compile(compiler_options=options)
        for _ in range(3):  # replayed, with other buffers
            results.append(jax.tree.map(np.asarray, step(ws, x)))
    for value, grad in results[1:]:
        assert value == results[0][0]
        np.testing.assert_array_equal(grad, results[0][1])


def test_a_donated_accumulator_is_updated_in_place():
    q = jaxfp8.quantize(jax.random.normal(jax.random.key(0), (256, 512)))
    step = jax.jit(lambda q, c: jaxfp8.wgrad_gemm(q, q, accum=c), donate_argnums=1)
    accum = jnp.zeros((256, 256))
    address = accum.unsafe_buffer_pointer()
    accum = step(q, accum)
    once = np.asarray(accum)
    again = step(q, accum)
    assert again.unsafe_buffer_pointer() == address
    assert oracle.error(again, 2 * once) < 1e-6


@pytest.mark.parametrize("fused", [False, True], ids=["barriers", "as exported before"])
def test_stacked_accumulators(monkeypatch, fused):
    """Slices of a stack, and a scan over it; without the barriers XLA forgets that accum is the result's buffer."""
    if fused:
        monkeypatch.setattr(gemm.lax, "optimization_barrier", lambda x: x)
        monkeypatch.setattr(gemm, "once", lambda x: x)
    block = (1, 128)
    lhs = [jaxfp8.quantize(jax.random.normal(jax.random.key(i), (256, 512))) for i in range(4)]
    rhs = jaxfp8.quantize(jax.random.normal(jax.random.key(9), (384, 512)))
    data, scale = jnp.stack([q.data for q in lhs]), jnp.stack([q.scale for q in lhs])
    stack = jax.random.normal(jax.random.key(7), (4, 256, 384))

    def product(data, scale, accum):
        return jaxfp8.wgrad_gemm(jaxfp8.QuantizedArray(data, scale, block), rhs, accum=accum)

    def scan(data, scale, stack):
        return lax.scan(lambda _, x: (None, product(*x)), None, (data, scale, stack))[1]

    def carry(data, scale, stack):
        return lax.scan(lambda c, x: (product(*x, c), None), stack[0], (data, scale))[0]

    def one(data, scale, stack):
        return product(data[1], scale[1], stack[2])

    products = [np.asarray(jaxfp8.wgrad_gemm(q, rhs)) for q in lhs]
    before = np.asarray(stack)
    for function, want in (
        (scan, before + np.stack(products)),
        (carry, before[0] + sum(products)),
        (one, before[2] + products[1]),
    ):
        got = jax.jit(lambda *args, function=function: function(*args))(data, scale, stack)
        assert oracle.error(got, want) < 1e-6
        np.testing.assert_array_equal(np.asarray(stack), before)  # not donated


def test_grouped_products_in_a_scan_with_sizes_from_the_device():
    """Group sizes that change between steps, never seen by the host."""
    x = jax.random.normal(jax.random.key(0), (1024, 256), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (8, 256, 128), jnp.float32)

    def step(_, key):
        sizes = jnp.bincount(jax.random.randint(key, (1024,), 0, 8), length=8)
        y = jaxfp8.ragged_dot(x, w, sizes)
        want = jax.lax.ragged_dot(x.astype(jnp.float32), w, sizes)
        return None, (y.astype(jnp.float32), want)

    _, (got, want) = jax.jit(lambda k: jax.lax.scan(step, None, k))(
        jax.random.split(jax.random.key(2), 4)
    )
    assert oracle.error(got, want) < 0.06


ACTIVATIONS = {
    "rows": ((300, 2, 520), None),
    "both": ((2, 300, 2, 520), None),
    "both plain": ((2, 129, 1, 257), None),
    "grad_both": ((2, 300, 2, 520), None),
    "grad_both plain": ((1, 129, 1, 257), None),
    "ragged_both": ((300, 2, 200), [0, 1, 127, 128, 44, 0]),
    "ragged_grad_both": ((400, 2, 200), [0, 127, 128, 129, 1]),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
@pytest.mark.parametrize("activation", oracle_activation.ACTIVATIONS)
def test_activation_kernels_are_exact_where_the_logistic_is(cpu, case, activation):
    shape, sizes = ACTIVATIONS[case]
    for input_dtype in (jnp.bfloat16, np.float16, np.float32):
        for dtype in (cases.E4M3, cases.E5M2):
            options = dict(input_dtype=input_dtype, dtype=dtype, sizes=sizes)
            kind = case.split()[0]
            assert_bits_agree(
                cpu, lambda k=kind, o=options: cases.activation(k, shape, activation, **o)
            )


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("groups", [None, [100, 0, 129, 200]], ids=["dense", "ragged"])
@pytest.mark.parametrize("activation", oracle_activation.ACTIVATIONS)
def test_mlp_trains(cpu, gated, groups, activation):
    for dtype in (np.float32, jnp.bfloat16):
        build = lambda d=dtype: cases.train_mlp(  # noqa: E731
            (500, 264, 392, 136), activation, gated=gated, groups=groups, dtype=d
        )
        got, want = on_both(cpu, build)
        for name, v in want.items():
            # Products of products: an FP8 rounding in between flips where the first sums differ in their last bits.
            # Of the whole array, since a row or an expert holds few flips: 5.2e-3 of the worst row was measured.
            assert oracle.error(got[name], v) <= 4 * bound_of(got[name], v), name


@pytest.mark.parametrize("kind", ["quantize_rows", "quantize_both", "rows", "requantize_both"])
def test_rows_of_a_mixture_are_gathered_to_the_bit(cpu, kind):
    """Wide enough for several bands, at every alignment of a row."""
    sizes = [0, 1, 127, 128, 129, 0, 500]
    for shape in ((301, 1024, 1040), (50, 900, 264), (20, 130, 257), (700, 400, 130)):
        for i, input_dtype in enumerate((jnp.bfloat16, np.float16, np.float32)):
            options = dict(input_dtype=input_dtype, dtype=(cases.E4M3, cases.E5M2)[i % 2])
            options["pow2"] = bool(i % 2)
            assert_bits_agree(cpu, lambda s=shape, o=options: cases.gather(kind, s, sizes, **o))


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_a_token_are_summed_to_the_bit(cpu, weighted):
    for shape in ((200, 8, 900, 1040), (37, 11, 50, 257), (64, 2, 64, 132)):
        for input_dtype in BOTH:
            for out_dtype in BOTH:
                options = dict(weighted=weighted, input_dtype=input_dtype, out_dtype=out_dtype)
                assert_bits_agree(cpu, lambda s=shape, o=options: cases.sum_of_rows(s, **o))


WEIGHTED = {
    "weighted_rows": None,
    "ragged_weighted_both": [0, 1, 127, 128, 44],
    "ragged_weighted_grad_both": [0, 127, 129, 1],
}


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weighted_activations_are_exact_where_the_logistic_is(cpu, kind):
    for shape in ((400, 2, 200), (300, 2, 132), (129, 1, 257)):
        for input_dtype in BOTH:
            options = dict(input_dtype=input_dtype, sizes=WEIGHTED[kind])
            assert_bits_agree(
                cpu, lambda s=shape, o=options: cases.weighted_activation(kind, s, **o)
            )


def test_a_mixture_of_experts_trains(cpu):
    for dtype in (np.float32, jnp.bfloat16):
        got, want = on_both(
            cpu, lambda d=dtype: cases.train_moe(700, 3, 5, (264, 392, 136), dtype=d)
        )
        for name, v in want.items():
            # As of `mlp`: an FP8 rounding in between flips where the first sums differ in their last bits.
            assert oracle.error(got[name], v) <= 4 * bound_of(got[name], v), name
