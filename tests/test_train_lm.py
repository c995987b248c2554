"""examples/train_lm.py: the main job, at a size that trains in seconds."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import jaxfp8
from jaxfp8 import _ffi

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _lm_data as data  # noqa: E402
import _lm_model  # noqa: E402
import _lm_products  # noqa: E402
import _lm_report as report  # noqa: E402
import _lm_training  # noqa: E402
import train_lm  # noqa: E402

TINY = ["--tiny", "--steps=8", "--evaluations=4", "--validation-windows=8"]


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Most of the time is XLA's: a resumed run finds its programs."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks for a cache once, at its first compilation
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def corpus():
    return data.standard_library()


@pytest.fixture(scope="module", autouse=True)
def corpus_read_once(corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "standard_library", lambda: corpus)
        yield


def read(out: pathlib.Path, name: str):
    return json.loads((out / name).read_text())


def finish(out: pathlib.Path, flags: list[str]) -> tuple[pathlib.Path, list[str]]:
    """The output directory of a whole run, and its flags."""
    train_lm.main([*flags, "--out", str(out)])
    return out, flags


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("dense"), TINY)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("moe"), [*TINY, "--moe"])


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.full) for name in ("dense", "moe")])
def finished(request):
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------------
# The job
# ------------------------------------------------------------------------------------------------


def test_a_run_writes_plot_curves_summary_and_sample(finished):
    out, _ = finished
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("import ")
    curves = read(out, "curves.json")
    assert curves["evaluation_steps"] == [2, 4, 6, 8]
    for name in ("bf16", "fp8"):
        assert len(curves[name]["train_loss"]) == 8
        assert len(curves[name]["validation_loss"]) == 4
        assert np.isfinite(curves[name]["train_loss"] + curves[name]["validation_loss"]).all()
        assert curves[name]["tokens"] == 8 * 4 * 64


def test_the_loss_falls_in_both_precisions(finished):
    curves = read(finished[0], "curves.json")
    for name in ("bf16", "fp8"):
        uniform = np.log(256)
        assert abs(curves[name]["train_loss"][0] - uniform) < 0.5
        assert curves[name]["validation_loss"][-1] < 0.8 * uniform


def test_both_precisions_start_alike_and_fp8_is_really_another_computation(finished):
    curves = read(finished[0], "curves.json")
    bf16, fp8 = curves["bf16"]["train_loss"], curves["fp8"]["train_loss"]
    assert bf16[0] != fp8[0]
    assert abs(bf16[0] - fp8[0]) < 2e-3 * bf16[0]


def test_the_summary_follows_from_the_curves(finished):
    summary, curves = read(finished[0], "summary.json"), read(finished[0], "curves.json")
    bf16, fp8 = curves["bf16"]["validation_loss"], curves["fp8"]["validation_loss"]
    # Four evaluations: the last quarter is the last one.
    assert summary["relative_loss_error"] == pytest.approx(abs(fp8[-1] - bf16[-1]) / bf16[-1])
    assert summary["fp8"]["final_validation_loss"] == fp8[-1]
    assert summary["bf16"]["mean_validation_loss"] == bf16[-1]
    assert summary["settings"]["seed"] == 0


def test_the_layers_products_run_in_fp8_and_the_others_in_high_precision(finished):
    out, flags = finished
    summary = read(out, "summary.json")
    router = ["router"] if "--moe" in flags else []
    assert sorted(summary["fp8_products"]) == ["feed_forward", "out", "qkv"]
    assert sorted(summary["high_precision_products"]) == sorted(["attention", "head", *router])
    for product in summary["products"]:
        if product["name"] in summary["fp8_products"]:
            assert product["forward"] == product["backward"] == ["e4m3 x e4m3"]
            matrices = 2 if product["name"] == "feed_forward" else 1
            assert product["count"] == 2 * 3 * matrices  # layers x (forward, dgrad, wgrad)


def check_resuming(out: pathlib.Path, flags: list[str], tmp_path: pathlib.Path) -> None:
    """A run that stops between evaluations and resumes has the curves and the text of `out`."""
    flags = [*flags, "--out", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "checkpoint")]
    train_lm.main([*flags, "--stop-after=5"])
    assert not (tmp_path / "out" / "summary.json").exists()

    with pytest.raises(SystemExit, match="already has a checkpoint of step 5.*--resume"):
        train_lm.main(flags)
    with pytest.raises(SystemExit, match=r"other settings: seed was 0 and is 1"):
        train_lm.main([*flags, "--resume", "--seed=1"])

    train_lm.main([*flags, "--resume"])
    whole, resumed = read(out, "curves.json"), read(tmp_path / "out", "curves.json")
    for name in ("bf16", "fp8"):
        assert resumed[name]["train_loss"] == whole[name]["train_loss"]
        assert resumed[name]["validation_loss"] == whole[name]["validation_loss"]
    assert (tmp_path / "out" / "sample.txt").read_text() == (out / "sample.txt").read_text()


@pytest.mark.full
def test_a_resumed_run_continues_the_identical_curve(dense, tmp_path):
    check_resuming(*dense, tmp_path)


@pytest.mark.slow
def test_a_resumed_mixture_of_experts_continues_the_identical_curve(moe, tmp_path):
    check_resuming(*moe, tmp_path)


def test_resuming_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(SystemExit, match="has no checkpoint to resume"):
        train_lm.main([*TINY, "--out", str(tmp_path), "--checkpoint", str(tmp_path), "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--moe"]], ids=["dense", "moe"])
def test_the_default_run_stays_within_a_quarter_percent(flags, tmp_path):
    command = [sys.executable, EXAMPLES / "train_lm.py", *flags, "--out", tmp_path]
    subprocess.run(command, check=True)
    summary = read(tmp_path, "summary.json")
    assert summary["relative_loss_error"] < 0.0025
    assert summary["fp8"]["final_validation_loss"] < 0.85 * summary["unigram_loss"]


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_script_explains_itself():
    command = [sys.executable, EXAMPLES / "train_lm.py", "--help"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for flag in ("--moe", "--size", "--steps", "--seed", "--scale-format", "--out", "--resume"):
        assert flag in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=0"], "--steps: 0 is not positive"),
        (["--steps=many"], "--steps: invalid positive int value: 'many'"),
        (["--learning-rate=nan"], "--learning-rate: nan is not positive"),
        (["--size=huge"], "--size: invalid choice: 'huge'"),
        (["--scale-format=e8m0"], "--scale-format: invalid choice: 'e8m0'"),
        (["--grad-dtype=fp16"], "--grad-dtype: invalid choice: 'fp16'"),
        (["--seed=-1"], "--seed is -1; allowed: zero or a positive int"),
        (["--steps=3", "--evaluations=4"], "--evaluations is 4; allowed: at most --steps, 3"),
        (["--resume"], "--resume needs --checkpoint DIR"),
        (["--stop-after=3"], "--stop-after needs --checkpoint DIR"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        train_lm.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_recipe_flags_reach_every_fp8_product():
    settings, _ = train_lm.parse_arguments(["--tiny", "--scale-format=pow2", "--grad-dtype=e5m2"])
    assert settings.recipe == jaxfp8.Recipe(scale_format="pow2", grad_dtype=jnp.float8_e5m2)
    run = _lm_training.Run("fp8", _lm_products.fp8_products(settings.recipe), settings)
    windows = np.zeros((settings.batch, settings.sequence + 1), np.int32)
    products = report.list_products(
        run.gradients, _lm_training.PRODUCT_NAMES, run.state[0], windows
    )
    for product in filter(report.is_fp8, products):
        assert product["forward"] == ["e4m3 x e4m3"]
        assert sorted(product["backward"]) == ["e4m3 x e5m2", "e5m2 x e4m3"]  # wgrad, dgrad


def test_the_bf16_model_has_no_fp8_product_and_rounds_operands_to_bfloat16():
    for moe in ([], ["--moe"]):
        settings, _ = train_lm.parse_arguments(["--tiny", *moe])
        run = _lm_training.Run("bf16", _lm_products.bf16_products(), settings)
        windows = np.zeros((settings.batch, settings.sequence + 1), np.int32)
        products = report.list_products(
            run.gradients, _lm_training.PRODUCT_NAMES, run.state[0], windows
        )
        assert not any(map(report.is_fp8, products))
        for product in products:
            if product["name"] in ("qkv", "out", "feed_forward"):
                assert product["forward"] == product["backward"] == ["bf16 x bf16"]


# In each of the two layers: qkv, out, and the SwiGLU.
STEP_CALLS = {
    "dense": {
        "quantize_both": 6,  # inputs and cotangents of qkv, out and the SwiGLU
        "quantize_weight": 4,
        "gemm_1d2d": 8,  # forward and dgrad
        "gemm_1d1d": 4,  # wgrad
        "activation_both": 1,
        "activation_grad_both": 1,
    },
    "moe": {
        "quantize_both": 4,
        "quantize_weight": 4,
        "gemm_1d2d": 4,
        "gemm_1d1d": 2,
        "gather_quantize_both": 2,  # of tokens and dy
        "activation_ragged_weighted_both": 1,
        "activation_ragged_weighted_grad_both": 1,
        "sum_rows": 2,  # of the result, of dx
        "grouped_gemm": 4,
        "grouped_wgrad_gemm": 2,
    },
}


@pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no CUDA kernels")
@pytest.mark.parametrize("kind", STEP_CALLS)
@pytest.mark.representatives(cases=1)
def test_a_train_step_for_cuda_has_these_kernels_and_no_other_product_of_a_layers_matrices(kind):
    settings, _ = train_lm.parse_arguments(["--tiny", *(["--moe"] if kind == "moe" else [])])
    run = _lm_training.Run("fp8", _lm_products.fp8_products(settings.recipe), settings)
    windows = np.zeros((settings.batch, settings.sequence + 1), np.int32)
    traced = jax.jit(run._step).trace(run.state, windows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Both layers are one body of a loop, forward and backward.
    calls = collections.Counter(re.findall(r"custom_call @jaxfp8_(\w+)_v1\(", text))
    assert calls == STEP_CALLS[kind]
    assert "ragged_dot" not in text

    products = collections.Counter()
    for line in text.splitlines():
        if re.search(r"stablehlo\.dot(_general)?\b", line):
            operands = re.findall(r"tensor<([\dx]+)x\w+>", line.rsplit(" : ", 1)[1])
            sizes = frozenset(math.prod(map(int, x.split("x"))) for x in operands)
            products["attention" if "batching_dims" in line else sizes] += 1
    tokens, width = settings.batch * settings.sequence, settings.model.width
    kept = {"attention": 6, frozenset({tokens * width, width * 256, tokens * 256}): 3}  # head
    if kind == "moe":
        kept[frozenset({tokens * width, width * 4, tokens * 4})] = 3  # router
    assert products == kept


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.full)])
def test_the_fused_swiglu_trains_as_the_explicit_operations(kind):
    key = jax.random.split(jax.random.key(0), 4)
    groups = (3,) if kind == "moe" else ()
    x = jax.random.normal(key[0], (160, 128)).astype(jnp.bfloat16)
    dy = jax.random.normal(key[1], (160, 128)).astype(jnp.bfloat16)
    gate_up = jax.random.normal(key[2], (*groups, 128, 2, 256)) / 128**0.5
    down = jax.random.normal(key[3], (*groups, 256, 128)) / 16
    products = _lm_products.fp8_products(jaxfp8.Recipe())
    sizes = jnp.array([50, 0, 110])

    def fused(x, gate_up, down):
        if groups:
            return jaxfp8.ragged_mlp(x, gate_up, down, sizes, preferred_element_type=x.dtype)
        return products.mlp(x, gate_up, down)

    def explicit(x, gate_up, down):
        def product(x, w, dtype):
            if groups:
                return jaxfp8.ragged_dot(x, w, sizes, preferred_element_type=dtype)
            return products.linear(x, w, dtype)

        hidden = product(x, gate_up.reshape(*groups, 128, -1), jnp.bfloat16).astype(jnp.float32)
        return product(_lm_products.swiglu(hidden), down, jnp.bfloat16)

    def results(f):
        y, pull = jax.vjp(f, x, gate_up, down)
        return [np.asarray(v, np.float64) for v in (y, *pull(dy))]

    # y differs where two exponentials round to two FP8 numbers. The gradient of the activation is bfloat16 when fused:
    # a value that moves by 2**-9 crosses to the next FP8 number, 2**-3 away, in one case of 2**6, as does its block's
    # largest, which decides the scale of all.
    flips = (2 * 2.0**-9 * 2.0**-3) ** 0.5
    bounds = (2e-3, flips, flips, 2e-3)
    results = [results(jax.jit(f)) for f in (fused, explicit)]
    for got, want, bound in zip(*results, bounds, strict=True):
        assert np.isfinite(got).all()
        assert np.linalg.norm(got - want) < bound * np.linalg.norm(want)


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------


READ_CORPUS = data.standard_library


def test_the_corpus_is_deterministic_and_its_sides_share_no_file(corpus):
    first, second = corpus, READ_CORPUS()
    assert first.checksum == second.checksum
    train, validation = (
        set(side.tobytes().split(data.SEPARATOR)[1:]) for side in (first.train, first.validation)
    )
    assert (len(train) > 100) and (len(validation) > 10)
    assert not {text for text in train & validation if len(text) > 200}
    assert 0.05 < first.validation.size / first.train.size < 0.2


def test_a_directory_gives_its_text_files_and_nothing_else(tmp_path):
    (tmp_path / "deep").mkdir()
    for i in range(40):
        (tmp_path / "deep" / f"{i}.md").write_text(f"{i} words of text\n" * 2000)
    (tmp_path / "picture.txt").write_bytes(b"\0" * 100_000)
    (tmp_path / "table.csv").write_text("1,2\n" * 100_000)
    corpus = data.directory(tmp_path)
    sides = [x.tobytes().split(data.SEPARATOR)[1:] for x in (corpus.train, corpus.validation)]
    assert tuple(map(len, sides)) == corpus.files and sum(corpus.files) == 40
    assert all(b" words of text\n" in text for side in sides for text in side)
    with pytest.raises(data.InputError, match="0 bytes of text to train on"):
        data.directory(tmp_path / "nowhere")


def test_every_window_is_read_once_an_epoch_in_an_order_of_the_seed():
    text = np.arange(101, dtype=np.uint8)
    windows = data.Windows(text, 10, seed=0)
    epochs = windows.batch(0, 20)
    assert epochs.shape == (20, 11) and windows.count == 10
    for epoch in (epochs[:10], epochs[10:]):
        assert sorted(epoch[:, 0]) == list(range(0, 100, 10))
        np.testing.assert_array_equal(np.diff(epoch, axis=1), 1)
    assert (epochs[:10] != epochs[10:]).any()
    assert (epochs != data.Windows(text, 10, seed=1).batch(0, 20)).any()
    # A batch across the end of an epoch depends on its position alone.
    np.testing.assert_array_equal(data.Windows(text, 10, seed=0).batch(7, 6), epochs[7:13])


# ------------------------------------------------------------------------------------------------
# Model
# ------------------------------------------------------------------------------------------------

MODEL = _lm_model.Model(layers=2, width=128, heads=2, feed_forward=256)


@pytest.mark.parametrize("experts", [0, 4])
def test_no_byte_sees_a_later_one(experts):
    model = dataclasses.replace(MODEL, experts=experts)
    products = _lm_products.fp8_products(jaxfp8.Recipe())
    params = _lm_model.init(model, jax.random.key(0))
    text = np.random.default_rng(0).integers(0, 256, (1, 32))
    changed = text.copy()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    forward = jax.jit(lambda inputs: _lm_model.forward(params, inputs, model, products)[0])
    before, after = np.asarray(forward(text)), np.asarray(forward(changed))
    np.testing.assert_array_equal(before[0, :20], after[0, :20])
    assert (before[0, 20:] != after[0, 20:]).any(axis=-1).all()


@pytest.mark.full
def test_a_mixture_of_experts_is_the_gated_sum_of_its_two_best_experts():
    model = dataclasses.replace(MODEL, experts=4)
    params = _lm_model.init(model, jax.random.key(1))["layers"]
    p = {name: value[0] for name, value in params.items()}
    x = jax.random.normal(jax.random.key(2), (2, 16, model.width)).astype(jnp.bfloat16)
    y, balance = _lm_model.mixture_of_experts(x, p, model, _lm_products.bf16_products())

    f64 = {name: np.asarray(value, np.float64) for name, value in p.items()}
    expected, routed = np.zeros((32, model.width)), np.zeros((32, 4))
    tokens = np.asarray(x, np.float64).reshape(32, model.width)
    logits = tokens @ f64["router"]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for t, token in enumerate(tokens):
        best = np.argsort(probability[t])[-2:]
        routed[t, best] = 0.5
        for e in best:
            gate, up = np.einsum("k,kgn->gn", token, f64["gate_up"][e])
            out = (gate / (1 + np.exp(-gate)) * up) @ f64["down"][e]
            expected[t] += out * probability[t, e] / probability[t, best].sum()
    error = np.linalg.norm(np.asarray(y, np.float64).reshape(32, -1) - expected)
    assert error < 1e-2 * np.linalg.norm(expected)
    assert float(balance) == pytest.approx(4 * routed.mean(0) @ probability.mean(0), rel=1e-5)


# ------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------


def test_the_relative_loss_error_is_the_mean_over_the_last_quarter():
    bf16, fp8 = report.History(), report.History()
    bf16.validation_loss = [9.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0]
    fp8.validation_loss = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.2, 1.9]
    histories = {"bf16": bf16, "fp8": fp8}
    summary = report.compare(list(range(1, 9)), histories, unigram=3.0, products=[])
    assert summary["relative_loss_error"] == pytest.approx((0.1 + 0.05) / 2)
    assert summary["relative_loss_difference"] == pytest.approx((0.1 - 0.05) / 2)
    assert summary["fp8"]["mean_validation_loss"] == pytest.approx(2.05)
    assert summary["fp8"]["final_bits_per_byte"] == pytest.approx(1.9 / np.log(2))


def test_a_twin_is_compared_as_fp8_is():
    losses = {"bf16": [4.0, 2.0], "fp8": [4.0, 2.1], report.TWIN: [4.0, 1.9]}
    histories = {name: report.History({"validation_loss": v}) for name, v in losses.items()}
    summary = report.compare([1, 2], histories, unigram=3.0, products=[])
    assert summary["relative_loss_error"] == pytest.approx(0.05)
    assert summary["relative_loss_noise"] == pytest.approx(0.05)
    del histories[report.TWIN]
    assert "relative_loss_noise" not in report.compare([1, 2], histories, unigram=3.0, products=[])


def test_a_twin_starts_a_thousandth_away():
    params = _lm_model.init(MODEL, jax.random.key(3))
    twin = _lm_model.init_nearby(MODEL, jax.random.key(3))
    shifts = jax.tree.map(lambda p, q: np.std(np.array(q) / np.array(p) - 1), params, twin)
    np.testing.assert_allclose(jax.tree.leaves(shifts), 1e-3, rtol=0.3)


def test_a_diverged_run_ends_with_an_error(monkeypatch):
    settings, _ = train_lm.parse_arguments(["--tiny"])
    run = _lm_training.Run("fp8", _lm_products.fp8_products(settings.recipe), settings)
    run._compiled_evaluate = lambda state, batches: jnp.float32(jnp.nan)
    with pytest.raises(FloatingPointError, match="fp8 run diverged.*--learning-rate"):
        run.evaluate(None)
