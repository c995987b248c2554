# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Essentials: FP8 matrix products in JAX
#
# From the first FP8 product to a training layer with experts, in the order in which a well-known DeepGEMM tutorial
# goes, so that a reader of that one finds every step again. It runs as it is: `python examples/essentials.py`, on a
# Hopper GPU with our kernels, anywhere else with the same numerics as XLA operations. Every claim is checked by an
# `assert`.

# %%
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxfp8

print(jax.devices()[0].device_kind)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def relative_error(got, want):
    """Norm-wise, in float64: one figure for the whole result that no single small element decides."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# %% [markdown]
# ## 1. The first product
#
# `linear` is `x @ w` in FP8. Nothing is allocated, padded or laid out by hand, and the result is differentiable.

# %%
m, n, k = 128, 256, 512
x, w = normal(0, m, k), normal(1, k, n)

y = jaxfp8.linear(x, w)
exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
print(f"{x.shape} @ {w.shape} -> {y.shape} {y.dtype}, {100 * relative_error(y, exact):.1f} % off")
assert relative_error(y, exact) < 0.05

# %% [markdown]
# 3 or 4 % is what eight bits cost: E4M3 has three bits of mantissa, so that every operand is rounded by up to 1/16 of
# itself. The errors are independent, which is why training averages them out.

# %% [markdown]
# ## 2. Memory
#
# An FP8 array has one byte an element and one float32 scale for each block of 128 (activations) or 128x128 (weights).

# %%
q = jaxfp8.quantize(x)
bf16_bytes, fp8_bytes = x.nbytes, q.data.nbytes + q.scale.nbytes
print(q)
print(f"bf16 {bf16_bytes} bytes, fp8 {fp8_bytes}: {fp8_bytes / bf16_bytes:.3f} of it")
assert fp8_bytes == m * k + 4 * m * k // 128

# %% [markdown]
# ## 3. A scale for each token and 128 channels
#
# E4M3 reaches from 2^-9 to 448. A scale for each 1x128 block moves the block's largest element to 448, so an outlier
# spoils 127 neighbours, not the whole tensor.

# %%
outlier = x.at[0, 0].set(1e5)
blocks = jaxfp8.quantize(outlier)
whole = outlier / (jnp.max(jnp.abs(outlier)) / 448)  # one scale for all
whole = whole.astype(jnp.float8_e4m3fn).astype(jnp.float32) * (jnp.max(outlier) / 448)
rest = np.s_[1:, :]
print(
    f"error of the other tokens: 1x128 {relative_error(blocks.dequantize()[rest], outlier[rest]):.3f}"
)
print(f"                    one scale {relative_error(whole[rest], outlier[rest]):.3f}")
assert (
    relative_error(blocks.dequantize()[rest], outlier[rest])
    < 0.03
    < relative_error(whole[rest], outlier[rest])
)

# %% [markdown]
# There is no absolute floor under a scale. Recipes that clamp a block's maximum at 1e-4 (the tutorial's does) round
# every gradient block below it coarsely, and below 1e-4 / 448 / 512 to zero. Ours keeps the relative error whatever the
# magnitude:

# %%
magnitudes = 10.0 ** np.arange(-12, 1)
block = normal(2, 64, 128, dtype=jnp.float32)


def with_floor(x):
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), 1e-4) / 448
    return (x / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale


ours = [relative_error(jaxfp8.quantize(block * s).dequantize(), block * s) for s in magnitudes]
floor = [relative_error(with_floor(block * s), block * s) for s in magnitudes]
plt.figure(figsize=(6, 3))
plt.loglog(magnitudes, ours, "o-", label="jaxfp8")
plt.loglog(magnitudes, floor, "s--", label="with a floor of 1e-4")
plt.xlabel("magnitude of a gradient")
plt.ylabel("relative error")
plt.legend()
plt.tight_layout()
assert max(ours) < 1.01 * min(ours) < 0.05 and floor[0] == 1

# %% [markdown]
# ## 4. A scale for each 128x128 of a weight
#
# Coarser, since weights have fewer outliers, and because the same scales then serve the transposed weight:
# `quantize_weight` gives what the forward product reads and what the input gradient reads, from one read of `w`.

# %%
w_nt, w_nn = jaxfp8.quantize_weight(w)
print(w_nt, w_nn, sep="\n")
np.testing.assert_array_equal(w_nt.scale, w_nn.scale.T)
np.testing.assert_array_equal(w_nt.dequantize(), w_nn.dequantize().T)

# %% [markdown]
# ## 5. Layouts
#
# Nothing to prepare. Scales travel to the kernels in the layout that they want because the custom call asks XLA for it;
# sizes need not be multiples of anything.

# %%
odd = jaxfp8.gemm(
    jaxfp8.quantize(normal(3, 5, 77)), jaxfp8.quantize(normal(4, 3, 77), block=(128, 128))
)
assert odd.shape == (5, 3)

# %% [markdown]
# ## 6. The product of quantized operands, and its verification
#
# Two questions, kept apart. Is the *product* right? Against float64 on the dequantized operands: to float32 rounding
# (on Hopper to about 1e-3, the tensor cores' own accumulation). How much did *quantization* cost? Against the operands
# before it.

# %%
y = jaxfp8.gemm(q, w_nt, out_dtype=jnp.float32)
of_dequantized = (
    np.asarray(q.dequantize(), np.float64) @ np.asarray(w_nt.dequantize(), np.float64).T
)
print(
    f"product {relative_error(y, of_dequantized):.1e}, quantization {relative_error(y, exact):.1e}"
)
assert relative_error(y, of_dequantized) < 1e-3

# %% [markdown]
# ## 7. Timing
#
# JAX runs asynchronously: warm up, then wait for the last result. On a Hopper GPU an FP8 product takes about half of
# bfloat16's time; elsewhere the operations imitate FP8 and are slower than bfloat16, so these figures say nothing
# about a GPU unless this ran on one. `python -m jaxfp8 bench` measures any shapes properly.


# %%
def seconds(f, *args, calls=5):
    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    for _ in range(calls):
        out = f(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


fp8_time = seconds(jax.jit(jaxfp8.linear), x, w)
bf16_time = seconds(jax.jit(jnp.dot), x, w)
flops = 2 * m * n * k
print(
    f"FP8 {fp8_time * 1e6:.0f} us, bf16 {bf16_time * 1e6:.0f} us ({flops / bf16_time / 1e9:.1f} GFLOP/s)"
)

# %% [markdown]
# ## 8 to 11. Experts
#
# Tokens sorted by expert, and how many each expert has: that is all. No alignment to 128, no padding rows, no index for
# each row, and the sizes stay on the device. (The tutorial pads each expert to 128 rows and then compares the padding
# rows too, with an index that its loop overwrites: with sizes as they are there is nothing to mask.)

# %%
tokens_per_expert = jnp.array([128, 96, 112, 144])
experts = normal(5, 4, k, n)
tokens = normal(6, int(tokens_per_expert.sum()), k)

y = jaxfp8.ragged_dot(tokens, experts, tokens_per_expert)
want = np.concatenate(
    [
        np.asarray(part, np.float64) @ np.asarray(expert, np.float64)
        for part, expert in zip(
            np.split(tokens, np.cumsum(tokens_per_expert)[:-1]), experts, strict=True
        )
    ]
)
print(f"{y.shape}, {100 * relative_error(y, want):.1f} % off")
assert relative_error(y, want) < 0.05

# The quantized pieces under it, for those who keep FP8 tokens from an all-to-all:
expert_nt, _ = jaxfp8.quantize_weight(experts)
pieces = jaxfp8.grouped_gemm(jaxfp8.quantize(tokens), expert_nt, tokens_per_expert)
np.testing.assert_array_equal(np.asarray(pieces, np.float32), np.asarray(y, np.float32))

# Rows past the last group are zero, an empty expert costs nothing:
y = jaxfp8.ragged_dot(tokens, experts, jnp.array([100, 0, 50, 1]))
assert not np.asarray(y[151:], np.float32).any()

# %% [markdown]
# ## 12 and 13. Weight gradients, accumulated in float32
#
# `dw = x^T dy` contracts over the tokens, so both operands must be quantized *along the tokens*: 128 tokens share a
# scale. (Quantized along the channels, as the tutorial has it, the scales would belong to the wrong axis.)
# `quantize_both` gives both orientations from one read: rows for the forward product, columns for this one.

# %%
activations, dy = normal(7, 256, 1024), normal(8, 256, 512)
x_row, x_column = jaxfp8.quantize_both(activations)
dy_row, dy_column = jaxfp8.quantize_both(dy)
print(f"x {activations.shape} -> columns {x_column.data.shape}, scales {x_column.scale.shape}")

accumulator = normal(9, 1024, 512, dtype=jnp.float32)
accumulate = jax.jit(
    lambda accum, x, dy: jaxfp8.wgrad_gemm(x, dy, accum=accum), donate_argnums=0
)  # donated: updated in place
want = np.asarray(accumulator, np.float64) + np.asarray(activations, np.float64).T @ np.asarray(
    dy, np.float64
)
dw = accumulate(accumulator, x_column, dy_column)
print(f"{dw.shape} {dw.dtype}, {100 * relative_error(dw, want):.1f} % off")
assert dw.dtype == jnp.float32 and relative_error(dw, want) < 0.05

# %% [markdown]
# In a model nobody calls this by hand: `jax.grad` of `linear` does it.

# %%
dw = jax.grad(lambda w: jnp.sum(jaxfp8.linear(activations, w) * dy))(normal(10, 1024, 512))
want = np.asarray(activations, np.float64).T @ np.asarray(dy, np.float64)
assert relative_error(dw, want) < 0.05

# %% [markdown]
# ## 14. What limits a product: the roofline
#
# The operations over the rate of the tensor cores, and the bytes over the memory bandwidth, each give a time: the
# larger one is the floor. Figures of an H100 SXM from its data sheet; `python -m jaxfp8 roofline M N K` prints them.

# %%
PEAK_FLOPS, BANDWIDTH = 1979e12, 3.35e12


def roofline(m, n, k, out_bytes=2):
    compute = 2 * m * n * k / PEAK_FLOPS
    scales = 4 * (m * -(-k // 128) + -(-n // 128) * -(-k // 128))
    memory = (m * k + n * k + m * n * out_bytes + scales) / BANDWIDTH
    return compute, memory


for shape in [(128, 256, 512), (64, 7168, 2048), (4096, 7168, 2048), (4096, 7168, 16384)]:
    compute, memory = roofline(*shape)
    limit = "tensor cores" if compute > memory else "memory"
    print(
        f"{shape!s:20} {1e6 * compute:8.2f} us of products, {1e6 * memory:6.2f} us of memory: {limit}"
    )
assert roofline(64, 7168, 2048)[0] < roofline(64, 7168, 2048)[1]
assert roofline(4096, 7168, 2048)[0] > roofline(4096, 7168, 2048)[1]

# %% [markdown]
# ## 15. Multiprocessors
#
# `num_sms` leaves multiprocessors to communication that runs at the same time. It is part of the recipe, not a
# process-wide setting, and never changes a result. (Fewer of them save no power: the same work takes longer.)

# %%
y_some = jaxfp8.linear(x, w, recipe=jaxfp8.Recipe(num_sms=64))
np.testing.assert_array_equal(
    np.asarray(y_some, np.float32), np.asarray(jaxfp8.linear(x, w), np.float32)
)

# %% [markdown]
# ## 16. Validation
#
# The error of a quantization is relative to each block. An absolute threshold such as 1e-2 passes or fails with the
# magnitude of the data. A NaN stays one:

# %%
error = relative_error(q.dequantize(), x)
print(f"quantization error {100 * error:.2f} %")
assert error < 2**-4  # half a step of three bits of mantissa

broken = jaxfp8.linear(x.at[3, 5].set(jnp.nan), w)
assert (
    np.isnan(np.asarray(broken[3], np.float32)).all()
    and np.isfinite(np.asarray(broken[4], np.float32)).all()
)


# %% [markdown]
# ## 17. Planning memory
#
# No workspace. `python -m jaxfp8 memory M N K` prints the same for the whole of forward and backward.


# %%
def gemm_bytes(m, n, k, out_bytes=2):
    scales = 4 * (m * -(-k // 128) + -(-n // 128) * -(-k // 128))
    return m * k + n * k + scales + m * n * out_bytes


plan = gemm_bytes(1024, 2048, 4096)
shapes = jax.eval_shape(
    lambda x, w: (jaxfp8.quantize(x), jaxfp8.quantize_weight(w)[0]),
    jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16),
    jax.ShapeDtypeStruct((4096, 2048), jnp.bfloat16),
)
actual = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes)) + 1024 * 2048 * 2
print(f"{plan / 2**20:.2f} MiB")
assert plan == actual

# %% [markdown]
# ## 18. A training layer
#
# Parameters stay float32; quantization, the two gradients and their FP8 residuals are inside `linear`.


# %%
def loss(params, x, target):
    hidden = jax.nn.silu(jaxfp8.linear(x, params["up"]))
    return jnp.mean((jaxfp8.linear(hidden, params["down"]) - target).astype(jnp.float32) ** 2)


@jax.jit
def step(params, x, target):
    value, grads = jax.value_and_grad(loss)(params, x, target)
    return jax.tree.map(lambda p, g: p - 2.0 * g, params, grads), value


params = {
    "up": normal(11, 256, 512, dtype=jnp.float32) / 16,
    "down": normal(12, 512, 256, dtype=jnp.float32) / 23,
}
data, target = normal(13, 512, 256), normal(14, 512, 256) / 4
losses = []
for _ in range(20):
    params, value = step(params, data, target)
    losses.append(float(value))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
assert losses[-1] < 0.8 * losses[0]

# %% [markdown]
# ## The challenge: eight experts
#
# Eight experts of width 2048 with 64, 128, 96, 112, 88, 144, 72 and 104 tokens, forward and backward, against the same
# layer in standard JAX.

# %%
hidden, sizes = 2048, jnp.array([64, 128, 96, 112, 88, 144, 72, 104])
tokens = normal(15, int(sizes.sum()), hidden)
experts = normal(16, 8, hidden, hidden) / np.sqrt(hidden).astype(jnp.bfloat16)


def train(ragged_dot):
    def objective(tokens, experts):
        return jnp.sum(ragged_dot(tokens, experts, sizes).astype(jnp.float32) ** 2)

    return jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))


def compiled(ragged_dot):
    program = train(ragged_dot).lower(tokens, experts).compile()
    memory = program.memory_analysis()
    return program, memory.temp_size_in_bytes / 2**20


(fp8, fp8_memory), (bf16, bf16_memory) = compiled(jaxfp8.ragged_dot), compiled(jax.lax.ragged_dot)
(_, fp8_grads), (_, bf16_grads) = fp8(tokens, experts), bf16(tokens, experts)
print(f"temporary memory: FP8 {fp8_memory:.0f} MiB, standard {bf16_memory:.0f} MiB")
times = [seconds(f, tokens, experts, calls=1) for f in (fp8, bf16)]
print(f"time: FP8 {times[0]:.2f} s, standard {times[1]:.2f} s")
for name, got, want in zip(("tokens", "experts"), fp8_grads, bf16_grads, strict=True):
    print(f"gradient of {name}: {100 * relative_error(got, want):.1f} % off")
    assert relative_error(got, want) < 0.06

# What is kept between forward and backward for this layer: FP8 copies instead of bfloat16 arrays.
_, pull = jax.vjp(functools.partial(jaxfp8.ragged_dot, group_sizes=sizes), tokens, experts)
kept = sum(a.nbytes for a in jax.tree.leaves(pull) if a.size > 8)
standard = tokens.nbytes + experts.nbytes
print(
    f"kept for the backward pass: FP8 {kept / 2**20:.0f} MiB, standard {standard / 2**20:.0f} MiB"
)
assert kept < 0.6 * standard
