"""examples/train_lm.py on meshes and in several processes: the same training."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _lm_model  # noqa: E402
import _lm_parallel  # noqa: E402
import _lm_products  # noqa: E402
import _lm_training  # noqa: E402
import scaling_model  # noqa: E402
import train_lm  # noqa: E402

from tests.optimization import QUICK_FLAGS  # noqa: E402
from tests.programs import stated_dtypes, traffic  # noqa: E402

SLOW = pytest.mark.slow

# Heads and hidden units of whole blocks on two devices, windows of 128 tokens on each of two.
SIZE = _lm_training.Size(
    _lm_model.Model(layers=2, width=256, heads=2, feed_forward=512), 64, 4, 8, 8, 3e-3
)

FLIPS = (8 * 2.0**-9 * 2.0**-3) ** 0.5
"""Norm-wise distance of two trainings that sum in another order.

A bfloat16 activation of which the last bit changes (relative e <= 2**-9) is quantized to FP8, whose values are
d <= 2**-3 apart. It crosses a rounding threshold with probability e / d and then moves by d: root mean square
(e * d) ** 0.5. The eight quantized inputs of two layers add in quadrature.
"""


@pytest.fixture(autouse=True, scope="module")
def small_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_lm_training.SIZES, "tiny", SIZE)
        yield


def run_of(flags, fp8=True):
    settings, rest = train_lm.parse_arguments(["--tiny", *flags.split()])
    products = _lm_products.fp8_products(settings.recipe) if fp8 else _lm_products.bf16_products()
    run = _lm_training.Run("fp8", products, settings, rest["parallel"])
    text = np.random.default_rng(0).integers(0, 256, (4, 65)).astype(np.int32)
    return run, rest["parallel"].place(text)


def gradients(flags, fp8=True):
    run, windows = run_of(flags, fp8)
    lowered = jax.jit(run.gradients).lower(run.state[0], windows)
    step = lowered.compile()
    entropy, grads = step(run.state[0], windows)
    return float(entropy), jax.tree.map(np.asarray, grads), lowered, traffic(step.as_text())


def distance(got, want):
    """Norm-wise, over all parameters."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    assert all(np.isfinite(g).all() and g.shape == w.shape for g, w in pairs)
    squares = sum(float(np.square(g - w, dtype=np.float64).sum()) for g, w in pairs)
    return (squares / sum(float(np.square(w, dtype=np.float64).sum()) for _, w in pairs)) ** 0.5


# What moves in a step, apart from scalars, counts of tokens and sums of gradients (all-reduce f32): every mesh's own.
GATHERS = {("all-gather", "u8"), ("all-gather", "f32"), ("reduce-scatter", "f32")}  # f32: scales
TOKENS = {
    ("all-gather", "u8"),
    ("all-gather", "f32"),
    ("all-gather", "s32"),
    ("all-to-all", "f32"),
}  # f32: bf16, on a CPU
MESHES = {
    "--mesh data=2": set(),
    "--mesh data=2 --fsdp": GATHERS,
    "--mesh model=2": set(),
    "--mesh data=2,model=2": set(),
    "--mesh data=2,model=2 --fsdp": GATHERS,
    "--moe --mesh expert=2": TOKENS,
    "--moe --mesh expert=2,data=2 --fsdp": TOKENS | GATHERS,
    "--moe --mesh expert=2,model=2": TOKENS,
    "--moe --mesh model=2": set(),
    "--experts 8 --mesh data=2,expert=2,model=2 --fsdp": TOKENS | GATHERS,
}
OFTEN = ("--mesh data=2,model=2 --fsdp",)
_single = {}


def on_one_device(flags):
    """One device; experts see quantized tokens in the backward pass as well, as those that travel."""
    if flags not in _single:
        _single[flags] = gradients(flags)
    return _single[flags]


@pytest.mark.parametrize(
    "flags", [f if f in OFTEN else pytest.param(f, marks=SLOW) for f in MESHES]
)
@pytest.mark.full
def test_a_mesh_computes_the_gradients_of_one_device_and_moves_only_what_it_must(flags):
    loss, grads, lowered, moved = gradients(flags)
    one = flags.split("--mesh")[0].strip()
    want_loss, want, *_ = on_one_device(one)
    assert abs(loss - want_loss) < FLIPS / 10 * want_loss
    # A token whose two best experts are nearly equal may change its mind.
    assert distance(grads, want) < (FLIPS if not one else 2 * FLIPS)

    if "expert" in flags.split("--mesh")[1]:
        # Tokens and gradients of results in FP8; sums in bfloat16, and gradients of gates.
        assert "ui8" in stated_dtypes(lowered, "all_gather")
        assert stated_dtypes(lowered, "all_to_all") == {"bf16", "f32"}
    kinds = {(m.kind, m.dtype) for m in moved}
    assert kinds - {("all-reduce", "f32")} == MESHES[flags]
    width, block = SIZE.model.width, 128
    for m in moved:
        if (m.kind, m.dtype) == ("all-gather", "f32"):  # a scale for 128 x 128, or of tokens; gates
            weights = 4 * (width // block) * (3 * width // block) * 8
            assert m.bytes <= max(weights, 4 * 4 * 64 * (width // block))
        if (m.kind, m.dtype) == ("all-gather", "s32"):  # the numbers of a token's two experts
            assert m.bytes <= 4 * 2 * 4 * 64

    if flags == "--mesh data=2,model=2 --fsdp":  # a layer's, as docs/scaling.md counts them
        model = SIZE.model
        paper = scaling_model.Model("", 2, width, model.heads, model.heads, model.feed_forward)
        layout, machine = scaling_model.Layout(4, tensor=2), scaling_model.Machine()
        one = scaling_model.layer(paper, layout, machine, tokens=256)
        gathered = sum(m.bytes for m in moved if m.kind == "all-gather") / 2  # half is one's own
        scattered = sum(m.bytes for m in moved if m.kind == "reduce-scatter")  # of two halves one
        assert (gathered, scattered) == (one.gather, one.scatter)


@SLOW
def test_fsdp_gathers_half_the_bytes_of_bf16():
    fp8, bf16 = (
        [m for m in gradients("--mesh data=2 --fsdp", fp8)[3] if m.kind == "all-gather"]
        for fp8 in (True, False)
    )
    assert {m.dtype for m in fp8} == {"u8", "f32"}
    assert sum(m.bytes for m in fp8) <= 0.55 * sum(2 * m.elements for m in bf16)


def test_meshes_that_cannot_be_are_refused(capsys):
    for flags, message in {
        "--mesh data=0": "'data=0' in 'data=0'; allowed: data=N, expert=N and model=N",
        "--mesh pipe=2": "'pipe=2' in 'pipe=2'; allowed",
        "--mesh data=2,data=2": "allowed: data=N, expert=N and model=N, each at most once",
        "--mesh expert=2": "--mesh: expert needs --moe or --experts",
        "--fsdp": "--fsdp needs --mesh data=N",
        "--experts 1": "--experts is 1; allowed: at least two",
        "--coordinator localhost:1": "--coordinator HOST:PORT, --processes and --process need",
    }.items():
        with pytest.raises(SystemExit) as error:
            train_lm.main(["--tiny", *flags.split()])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    for flags, message in {
        "--mesh data=16": "wants 16 devices; there are 8",
        "--mesh data=8": "data times expert is 8; it must divide --batch which is 4",
        "--mesh model=4": "model is 4; it must divide the number of heads, which is 2",
        "--mesh data=4 --fsdp": "128 times data is 512; it must divide the model's width, which is 256",
        "--experts 3 --mesh expert=2": "expert is 2; it must divide --experts which is 3",
    }.items():
        settings, rest = train_lm.parse_arguments(["--tiny", *flags.split()])
        with pytest.raises(_lm_parallel.InputError, match=message):
            rest["parallel"].check(settings.model, settings.batch, 16)


# ------------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------------

SHORT = ["--tiny", "--steps=6", "--evaluations=2", "--validation-windows=8"]


def curves(out):
    return json.loads((out / "curves.json").read_text())


def assert_same_curves(got, want, tolerance):
    for name in ("bf16", "fp8"):
        for curve in ("train_loss", "validation_loss"):
            np.testing.assert_allclose(got[name][curve], want[name][curve], rtol=tolerance)


@SLOW
@pytest.mark.parametrize(
    ("before", "after", "experts"),
    [
        ("--mesh data=2,model=2", "--mesh data=2 --fsdp", ""),
        ("--mesh data=4", "", ""),
        ("--mesh expert=2", "--mesh expert=4", "--moe"),
    ],
)
def test_a_run_resumed_on_another_mesh_continues_the_same_curve(before, after, experts, tmp_path):
    common = [*SHORT, *experts.split(), "--checkpoint", str(tmp_path / "checkpoint")]
    train_lm.main([*common, *before.split(), "--out", str(tmp_path / "out"), "--stop-after=3"])
    train_lm.main([*common, *after.split(), "--out", str(tmp_path / "out"), "--resume"])
    flags = [*SHORT, *experts.split(), *before.split()]
    train_lm.main([*flags, "--out", str(tmp_path / "whole")])
    got, want = curves(tmp_path / "out"), curves(tmp_path / "whole")
    assert got["fp8"]["train_loss"][:3] == want["fp8"]["train_loss"][:3]
    assert_same_curves(got, want, FLIPS / 10)


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------


def start(flags, processes, out, devices=8):
    """The example in `processes` processes of `devices / processes` CPU devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "XLA_FLAGS": QUICK_FLAGS,
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "JAX_PLATFORMS": "cpu",
    }
    running = []
    for i in range(processes):
        command = [sys.executable, str(EXAMPLES / "train_lm.py"), *flags, "--out", str(out)]
        if processes > 1:
            command += [f"--coordinator=localhost:{port}", f"--processes={processes}"]
            command += [f"--process={i}"]
        log = (out.parent / f"{out.name}.{i}.log").open("w")
        running.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return running


def finish(running, out, limit=1500):
    try:
        codes = [p.wait(limit) for p in running]
    finally:
        for p in running:
            p.kill()
    logs = [f.read_text()[-2000:] for f in sorted(out.parent.glob(f"{out.name}.*.log"))]
    assert codes == [0] * len(codes), logs


MESH = ["--tiny", "--steps=4", "--evaluations=2", "--validation-windows=8", "--mesh=data=4,model=2"]


@SLOW
def test_four_processes_train_as_one(tmp_path):
    """The same program on the same mesh: only what carries the sums over devices differs."""
    for processes in (1, 4):
        out = tmp_path / str(processes)
        finish(start(MESH, processes, out), out)
    assert_same_curves(curves(tmp_path / "4"), curves(tmp_path / "1"), 1e-6)


@SLOW
def test_when_a_process_dies_the_others_end_with_an_error_within_a_minute(tmp_path):
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    flags = [*MESH, "--steps=100000", "--evaluations=50000", f"--checkpoint={checkpoint}"]
    running = start(flags, 4, out)
    try:
        deadline = time.monotonic() + 1200
        while not any(checkpoint.glob("[0-9]*")):  # trains
            assert all(p.poll() is None for p in running), (tmp_path / "out.0.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        running[2].send_signal(signal.SIGKILL)
        died = time.monotonic()
        codes = [p.wait(max(1, died + 60 - time.monotonic())) for p in running]
    finally:
        for p in running:
            p.kill()
    assert all(code != 0 for code in codes), codes
