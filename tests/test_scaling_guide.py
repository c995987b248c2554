"""docs/scaling.md: its code runs and computes what one device does, its tables are what the script prints."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import scaling_model  # noqa: E402

import jaxfp8  # noqa: E402
from tests.programs import assert_same_bits, stated  # noqa: E402

GUIDE = (ROOT / "docs" / "scaling.md").read_text()
BLOCKS = re.findall(r"## ([^\n]+)\n|```python\n(.*?)```", GUIDE, re.DOTALL)

ORDER = (2.0**-24 * 2.0**-3) ** 0.5 * 2
"""Inputs that differ by a float32 rounding, quantized twice: the guide's (e/8)^(1/2), at most twice that."""


def blocks():
    """(section, code) of each block, the first one's section being ""."""
    section = ""
    for title, code in BLOCKS:
        section = title or section
        if code:
            yield section, code


def data():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    scores = rng.standard_normal((1024, 8))
    return {
        "params": {"up": normal(256, 1024) / 16, "down": normal(1024, 256) / 32},
        "x": normal(1024, 256),
        "target": normal(1024, 256),
        "expert": jnp.asarray(np.argsort(scores)[:, -2:].astype(np.int32)),
        "gate": jnp.asarray(rng.random((1024, 2), np.float32)),
        "experts": {"up": normal(8, 256, 128) / 16, "down": normal(8, 128, 256) / 12},
    }


@pytest.fixture(scope="module")
def guide():
    """What every block of the guide leaves behind, one after the other in one namespace."""
    space, results = data(), []
    for section, code in blocks():
        for name in ("value", "grads", "sums", "y"):
            space.pop(name, None)
        exec(compile(code, f"docs/scaling.md: {section}", "exec"), space)
        results.append((section, dict(space)))
    return results


def distance(got, want):
    got, want = (
        np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in jax.tree.leaves(tree)])
        for tree in (got, want)
    )
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_each_way_takes_at_most_fifteen_lines():
    sections = [s for s, _ in blocks()]
    for wanted in ("Data parallel", "FSDP", "Tensor and sequence parallel", "Expert parallel"):
        assert wanted in sections
    for section, code in blocks():
        assert len(code.strip().splitlines()) <= 15, section


@pytest.mark.full
def test_every_way_computes_the_loss_and_the_gradients_of_one_device(guide):
    start = guide[0][1]
    value, grads = start["step"](start["params"], start["x"], start["target"])
    checked = 0
    for section, space in guide[1:]:
        if "grads" in space:
            assert abs(space["value"] - value) < 1e-6 * value, section
            assert distance(space["grads"], grads) < ORDER, section
            assert len(space["grads"]["up"].sharding.device_set) == 8
            checked += 1
    assert checked == 5
    sums = next(space["sums"] for _, space in guide if "sums" in space)
    # Gradients of a mean over a quarter of the tokens each.
    assert distance(jax.tree.map(lambda g: g / 4, sums), grads) < ORDER


@pytest.mark.full
def test_the_mixture_computes_what_one_device_does(guide):
    space = next(space for section, space in guide if section == "Expert parallel")
    one = jax.make_mesh((1,), ("expert",), devices=jax.devices()[:1], axis_types=(AxisType.Auto,))
    spec = P("expert")
    whole = jax.jit(jax.shard_map(space["mixture"], mesh=one, in_specs=spec, out_specs=spec))
    names = "x", "expert", "gate", "experts"
    want = np.asarray(whole(*(jax.tree.map(np.asarray, space[n]) for n in names)))
    # Two terms a token, each rounded once, then added and rounded: on either side.
    assert distance(space["y"], want) < 4 * 2.0**-24


@pytest.mark.full
def test_chunks_change_no_bit_of_results_and_of_the_gradients_of_tokens_and_gates(guide):
    space = [space for section, space in guide if section == "Expert parallel"][-1]

    def whole(x, expert, gate, weights):
        tokens, sizes, route = jaxfp8.dispatch(x, expert, 8, axis_name="expert")
        y = jaxfp8.ragged_mlp(tokens, weights["up"], weights["down"], sizes)
        return jaxfp8.combine(y, gate, route)

    def train(f):
        spec = P("expert")
        f = jax.shard_map(f, mesh=space["expert_mesh"], in_specs=spec, out_specs=spec)

        def run(x, expert, gate, weights, dy):
            y, pull = jax.vjp(lambda x, gate, w: f(x, expert, gate, w), x, gate, weights)
            return y, *pull(dy)

        return jax.jit(run)(*(space[n] for n in ("x", "expert", "gate", "experts", "target")))

    *got, got_weights = train(space["chunked"])
    *want, want_weights = train(whole)
    assert_same_bits(got, want)
    # Blocks of weight gradients' operands run along the tokens, and end with a chunk.
    assert distance(got_weights, want_weights) < 0.05


# ------------------------------------------------------------------------------------------------
# On paper
# ------------------------------------------------------------------------------------------------


def test_the_guide_has_the_tables_that_the_script_prints():
    assert scaling_model.tables() in GUIDE


def test_the_models_have_the_parameters_in_their_names():
    assert 15.5e9 < scaling_model.MOE_16B.parameters < 16.5e9
    assert 2e9 < scaling_model.MOE_16B.active_parameters < 3e9
    assert 70e9 < scaling_model.DENSE_70B.parameters < 71e9


def test_one_gpu_moves_nothing_and_computes_six_operations_a_parameter_and_token():
    model = scaling_model.Model("small", 1, 1024, 8, 8, 4096, vocabulary=0, sequence=0)
    one = scaling_model.layer(model, scaling_model.Layout(1), scaling_model.Machine(), 4096)
    assert one.gather == one.scatter == one.tensor == one.experts == one.exposed_seconds == 0
    assert one.flops == 6 * model.parameters * 4096
    assert one.compute_seconds == one.flops / scaling_model.Machine().fp8_flops


def test_fp8_gathers_half_the_bytes():
    for fp8, bytes_ in ((True, 1 + 4 / 128**2), (False, 2)):
        layout = scaling_model.Layout(8, fp8=fp8)
        one = scaling_model.layer(scaling_model.DENSE_70B, layout, scaling_model.Machine(), 8)
        weights = scaling_model.DENSE_70B.dense_weights
        assert one.gather == pytest.approx(2 * bytes_ * weights * 7 / 8)
        assert one.scatter == 4 * weights * 7 / 8


def test_the_papers_experts_receive_what_the_program_states():
    """A small mixture: bytes of tokens, sums, numbers, gates, there and back, forward and backward."""
    model = scaling_model.Model("", 1, 256, 2, 2, 256, experts=8, choices=4, expert_hidden=128)
    blocks = scaling_model.BLOCK_SLACK * 128 * (1 - (7 / 8) ** 4)
    for devices, options in ((2, {}), (8, {"max_sent": round(blocks)})):
        tokens = 128
        mesh = jax.make_mesh(
            (devices,), ("e",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
        )

        def layer(x, expert, gate, options=options):
            rows, _, route = jaxfp8.dispatch(x, expert, 8, axis_name="e", **options)
            return jaxfp8.combine(rows, gate, route)

        def step(x, expert, gate, layer=layer, mesh=mesh):
            f = jax.shard_map(layer, mesh=mesh, in_specs=P("e"), out_specs=P("e"))
            y, pull = jax.vjp(lambda x, gate: f(x, expert, gate), x, gate)
            return pull(y)

        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((devices * tokens, 256)), jnp.bfloat16)
        expert = rng.integers(0, 8, (devices * tokens, 4)).astype(np.int32)
        moved = stated(jax.jit(step).lower(x, expert, np.ones(expert.shape, np.float32)))
        layout, machine = scaling_model.Layout(devices, expert=devices), scaling_model.Machine()
        paper = scaling_model.layer(model, layout, machine, devices * tokens).experts
        if options:
            paper *= round(blocks) / blocks
        assert sum(m.received for m in moved) == pytest.approx(paper)


def test_the_script_takes_a_model_of_ones_own(capsys):
    sizes = ["--layers=2", "--width=1024", "--heads=8", "--hidden=4096", "--gpus=16"]
    scaling_model.main([*sizes, "--tensor=4"])
    assert "| 16 | data 4, tensor 4 |" in capsys.readouterr().out
    for bad, message in {
        "--tensor=3": "tensor is 3; it must divide gpus, which is 16",
        "--width=0": "sizes and rates must be positive",
    }.items():
        with pytest.raises(SystemExit):
            scaling_model.main([*sizes, bad])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scaling_model.main(["--layers=2"])
    assert "needs --gpus, --width, --heads, --hidden as well" in capsys.readouterr().err
