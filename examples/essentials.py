# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Essentials: FP8 matrix products in JAX
#
# From one line around a loss to the pieces that it is made of. It runs as it is, `python examples/essentials.py`: on a
# Hopper GPU with our kernels, anywhere else with the same numerics as XLA operations. Every claim is checked by an
# `assert`. Readers of a DeepGEMM tutorial find its steps in a table
# [at the end](#appendix-from-a-deepgemm-tutorial).

# %%
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxfp8

device = jax.devices()[0]
on_hopper = getattr(device, "compute_capability", None) == "9.0"
print(f"{device.device_kind}: products are {'kernels' if on_hopper else 'XLA operations'}")


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def relative_error(got, want):
    """Norm-wise, in float64: one figure for the whole result."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# %% [markdown]
# ## 1. A model that exists: autocast
#
# A small language model in plain JAX, which knows nothing of FP8.


# %%
def model(params, tokens):
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        gate, up = jnp.split(h @ layer["gate_up"], 2, axis=-1)
        x = x + (jax.nn.silu(gate) * up) @ layer["down"]
    return x @ params["head"]


def loss(params, tokens):
    logits = jax.nn.log_softmax(model(params, tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


def parameters(width, hidden, vocabulary=256):
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def weight(rows, columns):
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    layers = [
        {"gate_up": weight(width, 2 * hidden), "down": weight(hidden, width)} for _ in range(2)
    ]
    embedding = weight(width, vocabulary).T
    return {"embedding": embedding, "layers": layers, "head": weight(width, vocabulary)}


params = parameters(256, 512)
tokens = jnp.arange(8 * 65).reshape(8, 65) * 7 % 251  # a pattern that can be learned

# %% [markdown]
# One line puts its large products into FP8, and those of its gradient. The embedding and the head stay as they are.
# `explain` says of each product what a Hopper GPU would run, or why it is left alone; it needs neither a GPU nor
# arrays, so let it look at the width of an 8B model. (`print(explanation)` is the whole table.)

# %%
fp8_loss = jaxfp8.autocast(loss)

wide = jax.eval_shape(lambda: parameters(4096, 14336))
explanation = jaxfp8.explain(fp8_loss, wide, jax.ShapeDtypeStruct((4, 4097), jnp.int32))
for line in explanation.lines:
    shape = f"{line.m} x {line.n} x {line.k}"
    print(f"{line.role:16} {shape:21} {line.configuration or line.reason.split(':')[0]}")
print(f"{explanation.fp8_share:.1%} of {explanation.flops / 1e12:.1f} TFLOP in FP8")
fp8_bound, bf16_bound = explanation.seconds, explanation.bf16_seconds
bounds = f"{1e3 * fp8_bound:.1f} ms in FP8, {1e3 * bf16_bound:.1f} in bfloat16"
print(f"{explanation.device.name}: at least {bounds}")
assert explanation.fp8_share > 0.9 and fp8_bound < bf16_bound

# %% [markdown]
# Then train as ever. The same model, from the same parameters, in float32 and in FP8:


# %%
def train(loss, params, steps=30):
    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value

    values = []
    for _ in range(steps):
        params, value = step(params)
        values.append(float(value))
    return values


wide_losses, fp8_losses = train(loss, params), train(fp8_loss, params)
plt.figure(figsize=(6, 3))
plt.plot(wide_losses, label="float32")
plt.plot(fp8_losses, "--", label="FP8")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.tight_layout()
ends = f"{wide_losses[-1]:.3f} in float32, {fp8_losses[-1]:.3f} in FP8"
print(f"loss {wide_losses[0]:.3f} -> {ends}")
assert wide_losses[-1] < 0.5 * wide_losses[0]
assert abs(fp8_losses[-1] - wide_losses[-1]) < 0.05 * wide_losses[0]

# %% [markdown]
# ## 2. Product by product
#
# The same by hand: `linear` is `x @ w` in FP8, forward and backward; `dot_general` and `einsum` have the signatures of
# JAX's own. Nothing is allocated, padded or laid out, and sizes need not be multiples of anything.

# %%
m, n, k = 128, 256, 512
x, w = normal(0, m, k), normal(1, k, n)

y = jaxfp8.linear(x, w)
exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
print(f"{x.shape} @ {w.shape} -> {y.shape} {y.dtype}, {100 * relative_error(y, exact):.1f} % off")
assert relative_error(y, exact) < 0.05

heads = jaxfp8.einsum("btd,dhk->bthk", x.reshape(2, 64, k), w.reshape(k, 4, 64))
np.testing.assert_array_equal(np.asarray(heads.reshape(m, n)), np.asarray(y))

dy = normal(2, m, n)
dx, dw = jax.vjp(jaxfp8.linear, x, w)[1](dy)
assert relative_error(dw, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)) < 0.05

# %% [markdown]
# 3 or 4 % is what eight bits cost: E4M3 has three bits of mantissa, so that every operand is rounded by up to 1/16 of
# itself. The errors are independent, which is why training averages them out.
#
# An MLP as one operation: the two halves of the hidden layer, their activation and its quantization are one kernel
# that reads the hidden layer once.

# %%
w_up, w_down = normal(3, k, 2, 512) / np.sqrt(k), normal(4, 512, k) / np.sqrt(512)
y = jaxfp8.mlp(x, w_up, w_down)
gate, up = (np.asarray(x, np.float64) @ np.asarray(w_up[:, i], np.float64) for i in range(2))
want = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(w_down, np.float64)
print(f"mlp: {100 * relative_error(y, want):.1f} % off")
assert relative_error(y, want) < 0.08

# %% [markdown]
# ## 3. A mixture of experts
#
# Tokens sorted by expert, and how many each expert has: that is all. No alignment to 128, no padding, no capacity, no
# index for each row, and the sizes stay on the device.

# %%
tokens_per_expert = jnp.array([128, 0, 112, 144])
experts = normal(5, 4, k, n)
rows = normal(6, int(tokens_per_expert.sum()), k)

y = jaxfp8.ragged_dot(rows, experts, tokens_per_expert)
parts = np.split(np.asarray(rows, np.float64), np.cumsum(tokens_per_expert)[:-1])
want = np.concatenate(
    [part @ np.asarray(expert, np.float64) for part, expert in zip(parts, experts, strict=True)]
)
print(f"{y.shape}, {100 * relative_error(y, want):.1f} % off")
assert relative_error(y, want) < 0.05

# Rows past the last group are zero; an expert without tokens costs nothing, and its gradient is zero.
y = jaxfp8.ragged_dot(rows, experts, jnp.array([100, 0, 50, 1]))
assert not np.asarray(y[151:], np.float32).any()

# %% [markdown]
# ## 4. What is kept for the backward pass
#
# FP8 copies, one byte an element, in place of bfloat16 arrays. Under `jax.checkpoint` a policy of ours keeps them (or
# moves them to the host), where JAX's own policies see no product to keep.


# %%
def kept(f, *args):
    _, pull = jax.vjp(f, *args)
    return sum(a.nbytes for a in jax.tree.leaves(pull))


fp8_kept, bf16_kept = kept(jaxfp8.linear, x, w), kept(jnp.matmul, x, w)
print(f"kept for the backward pass: FP8 {fp8_kept} bytes, bfloat16 {bf16_kept}")
assert fp8_kept < 0.55 * bf16_kept

policy = jaxfp8.checkpoint_policies.save_fp8_residuals()
layer = jax.checkpoint(lambda x, w: jnp.tanh(jaxfp8.linear(x, w)), policy=policy)
dw = jax.grad(lambda w: layer(x, w).astype(jnp.float32).sum())(w)
assert dw.shape == w.shape

# %% [markdown]
# A weight can be quantized once for many microbatches; its gradient still goes to the weight itself:

# %%
quantized = jaxfp8.prequantize(w)
dw = jax.grad(lambda w: jnp.sum(jaxfp8.linear(x, quantized.with_value(w)) * dy))(w)
assert relative_error(dw, np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)) < 0.05

# %% [markdown]
# ## 5. Recipes
#
# What a product may vary in is a `Recipe`: an argument, or in force inside a block. `num_sms` leaves multiprocessors to
# communication that runs at the same time, and never changes a result.

# %%
some = jaxfp8.linear(x, w, recipe=jaxfp8.Recipe(num_sms=64))
np.testing.assert_array_equal(np.asarray(some), np.asarray(jaxfp8.linear(x, w)))

with jaxfp8.Recipe(scale_format="pow2"):
    assert relative_error(jaxfp8.linear(x, w), exact) < 0.05

# %% [markdown]
# ## 6. What FP8 does to a model
#
# Before a run that costs money: how far are loss and gradients off, and which product adds how much?

# %%
comparison = jaxfp8.validate.compare(fp8_loss, params, tokens)
print(comparison)
assert abs(comparison.relative_loss_difference) < 0.02

# %% [markdown]
# A NaN stays one, and stays in its row, so that a step's check for finite values sees it:

# %%
broken = np.asarray(jaxfp8.linear(x.at[3, 5].set(jnp.nan), w), np.float32)
assert np.isnan(broken[3]).all() and np.isfinite(np.delete(broken, 3, axis=0)).all()

# %% [markdown]
# ## 7. Under it: quantized arrays
#
# An FP8 array has one byte an element, and one float32 scale for each block of 1x128 (activations, gradients) or
# 128x128 (weights). Its value is `data * scale`.

# %%
q = jaxfp8.quantize(x)
bf16_bytes, fp8_bytes = x.nbytes, q.data.nbytes + q.scale.nbytes
print(q)
print(f"bf16 {bf16_bytes} bytes, fp8 {fp8_bytes}: {fp8_bytes / bf16_bytes:.3f} of it")
assert fp8_bytes == m * k + 4 * m * k // 128
assert relative_error(q.dequantize(), x) < 2**-4  # half a step of three bits of mantissa

# %% [markdown]
# E4M3 reaches from 2^-9 to 448. A scale for each block moves the block's largest element to 448, so that an outlier
# spoils 127 neighbours, not the whole tensor:

# %%
outlier = x.at[0, 0].set(1e5)
largest = jnp.max(jnp.abs(outlier))
one_scale = (outlier / (largest / 448)).astype(jnp.float8_e4m3fn).astype(jnp.float32)
one_scale = one_scale * (largest / 448)
others = np.s_[1:, :]
by_block = relative_error(jaxfp8.quantize(outlier).dequantize()[others], outlier[others])
by_tensor = relative_error(one_scale[others], outlier[others])
print(f"error of the other tokens: 1x128 {by_block:.3f}, one scale {by_tensor:.3f}")
assert by_block < 0.03 < by_tensor

# %% [markdown]
# There is no absolute floor under a scale. Recipes that clamp a block's maximum at 1e-4 round every gradient block
# below it coarsely, and below 1e-4 / 448 / 512 to zero. Ours keeps the relative error whatever the magnitude:

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
# ## 8. Products of quantized arrays, and their verification
#
# A weight is quantized in both orientations from one read, with the same scales: for the forward product and for the
# input gradient. Scales travel to the kernels in the layout that they want, because the custom call asks XLA for it.
#
# Two questions, kept apart. Is the *product* right? Against float64 on the dequantized operands: to float32 rounding
# (on Hopper to about 1e-3, the tensor cores' own accumulation). How much did *quantization* cost? Against the operands
# before it.

# %%
w_nt, w_nn = jaxfp8.quantize_weight(w)
np.testing.assert_array_equal(w_nt.dequantize(), w_nn.dequantize().T)

y = jaxfp8.gemm(q, w_nt, out_dtype=jnp.float32)
lhs, rhs = (np.asarray(operand.dequantize(), np.float64) for operand in (q, w_nt))
product, quantization = relative_error(y, lhs @ rhs.T), relative_error(y, exact)
print(f"product {product:.1e}, quantization {quantization:.1e}")
assert product < 1e-3 < quantization

odd_lhs, odd_rhs = normal(3, 5, 77), normal(4, 3, 77)
odd = jaxfp8.gemm(jaxfp8.quantize(odd_lhs), jaxfp8.quantize(odd_rhs, block=(128, 128)))
assert odd.shape == (5, 3)

# %% [markdown]
# Experts likewise, for those who keep FP8 rows from an exchange:

# %%
expert_nt, _ = jaxfp8.quantize_weight(experts)
pieces = jaxfp8.grouped_gemm(jaxfp8.quantize(rows), expert_nt, tokens_per_expert)
whole = jaxfp8.ragged_dot(rows, experts, tokens_per_expert)
np.testing.assert_array_equal(np.asarray(pieces), np.asarray(whole))

# %% [markdown]
# ## 9. Weight gradients, accumulated in float32
#
# `dw = x^T dy` contracts over the tokens, so both operands must be quantized *along the tokens*: 128 tokens share a
# scale. `quantize_both` gives both orientations from one read: rows for the forward product, columns for this one. In a
# model nobody calls this by hand: `jax.grad` of `linear` does it.

# %%
x_row, x_column = jaxfp8.quantize_both(x)
dy_row, dy_column = jaxfp8.quantize_both(dy)
print(f"x {x.shape} -> columns {x_column.data.shape}, scales {x_column.scale.shape}")

accumulate = jax.jit(
    lambda accum, x, dy: jaxfp8.wgrad_gemm(x, dy, accum=accum),
    donate_argnums=0,  # updated in place
)
accumulator = normal(9, k, n, dtype=jnp.float32)
want = np.asarray(accumulator, np.float64)
want = want + np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
dw = accumulate(accumulator, x_column, dy_column)
print(f"{dw.shape} {dw.dtype}, {100 * relative_error(dw, want):.1f} % off")
assert dw.dtype == jnp.float32 and relative_error(dw, want) < 0.05

# %% [markdown]
# ## 10. What limits a product
#
# The operations over the rate of the tensor cores, and the bytes over the memory bandwidth, each give a time: the
# larger one is the floor. Figures of an H100 SXM from its data sheet; `python -m jaxfp8 roofline M N K` prints them for
# any Hopper GPU, `python -m jaxfp8 memory M N K` the bytes.

# %%
PEAK_FLOPS, BANDWIDTH = 1979e12, 3.35e12


def gemm_bytes(m, n, k, out_bytes=2):
    scales = 4 * (m * -(-k // 128) + -(-n // 128) * -(-k // 128))
    return m * k + n * k + scales + m * n * out_bytes


def roofline(m, n, k):
    return 2 * m * n * k / PEAK_FLOPS, gemm_bytes(m, n, k) / BANDWIDTH


for shape in [(128, 256, 512), (64, 7168, 2048), (4096, 7168, 2048), (4096, 7168, 16384)]:
    compute, memory = roofline(*shape)
    limit = "tensor cores" if compute > memory else "memory"
    times = f"products {1e6 * compute:6.2f} us, memory {1e6 * memory:6.2f} us"
    print(f"{shape!s:20} {times}: {limit}")
assert roofline(64, 7168, 2048)[0] < roofline(64, 7168, 2048)[1]
assert roofline(4096, 7168, 2048)[0] > roofline(4096, 7168, 2048)[1]
assert gemm_bytes(m, n, k) == q.nbytes + w_nt.nbytes + jaxfp8.gemm(q, w_nt).nbytes

# %% [markdown]
# Timing, on a Hopper GPU only: elsewhere FP8 is imitated by XLA operations, and a time would say nothing. JAX runs
# asynchronously: warm up, then wait for the last result. `python -m jaxfp8 bench` measures any shapes properly.


# %%
def seconds(f, *args, calls=20):
    jax.block_until_ready(f(*args))
    start = time.perf_counter()
    for _ in range(calls):
        out = f(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


if on_hopper:
    large, weight = normal(7, 8192, 4096), normal(8, 4096, 4096)
    fp8_time, bf16_time = (seconds(jax.jit(f), large, weight) for f in (jaxfp8.linear, jnp.dot))
    print(f"8192x4096x4096: FP8 {1e6 * fp8_time:.0f} us, bf16 {1e6 * bf16_time:.0f} us")
else:
    print(f"not timed on {device.device_kind}: FP8 is imitated here")

# %% [markdown]
# ## 11. A challenge: eight experts
#
# Eight experts of width 2048 with 64, 128, 96, 112, 88, 144, 72 and 104 tokens, forward and backward, against the same
# layer in standard JAX.

# %%
hidden, sizes = 2048, jnp.array([64, 128, 96, 112, 88, 144, 72, 104])
rows = normal(15, int(sizes.sum()), hidden)
experts = normal(16, 8, hidden, hidden) / np.sqrt(hidden).astype(jnp.bfloat16)


def gradients(ragged_dot):
    def objective(rows, experts):
        return jnp.sum(ragged_dot(rows, experts, sizes).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(objective, argnums=(0, 1)))


fp8, bf16 = gradients(jaxfp8.ragged_dot), gradients(jax.lax.ragged_dot)
both = zip(("rows", "experts"), fp8(rows, experts), bf16(rows, experts), strict=True)
for name, got, want in both:
    print(f"gradient of {name}: {100 * relative_error(got, want):.1f} % off")
    assert relative_error(got, want) < 0.06
if on_hopper:
    times = [1e3 * seconds(f, rows, experts) for f in (fp8, bf16)]
    print(f"FP8 {times[0]:.2f} ms, standard JAX {times[1]:.2f} ms")

# %% [markdown]
# Where to go on: several devices in [Scaling](scaling.md), a framework's layers in [Frameworks](frameworks.md), an
# error's meaning in [Troubleshooting](troubleshooting.md).
#
# ## Appendix: from a DeepGEMM tutorial
#
# | step of the tutorial | here |
# |---|---|
# | a first FP8 product; memory; outputs allocated by hand | 2, 7: nothing is allocated by hand |
# | per-token and per-block casts | 7: `quantize`, with no floor of 1e-4 under a block's maximum |
# | layouts, TMA-aligned scales | 8: nothing to prepare |
# | verification with an absolute threshold | 8: norm-wise; an absolute 1e-2 depends on the data's magnitude |
# | timing, TFLOP/s, roofline | 10 |
# | contiguous grouped GEMM, each expert padded to 128 rows, an index for each row | 3, 8: sizes as they are |
# | masked grouped GEMM | `masked_grouped_gemm`: rows past the mask are zero |
# | weight gradients, operands quantized along the channels | 9: along the tokens; the others scale the wrong axis |
# | number of multiprocessors, process-wide | 5: part of the recipe (fewer of them save no power) |
# | memory planning | 10: `gemm_bytes`; no workspace |
# | a training layer | 1 |
# | the challenge | 11 |
