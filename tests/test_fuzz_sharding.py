"""Random shardings of every operation give one device's numbers; and what the fuzzer found, as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp8
from tests import fuzz_sharding
from tests.programs import assert_close, assert_same_bits


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_any_sharding_gives_the_numbers_of_one_device(part):
    counts = fuzz_sharding.run(seed=1, cases=12, first=100 * part)
    assert counts["cases"] == 12


def test_the_fuzzer_finds_a_wrong_number_and_a_stranger_s_error(monkeypatch):
    case = next(c for c in (fuzz_sharding.draw(0, n) for n in range(100)) if c.operation == "gemm")
    devices = jax.devices()

    def program(replaced):
        monkeypatch.setattr(fuzz_sharding, "program", lambda case, mesh=None: replaced)

    want = fuzz_sharding.expected(case.sizes, case.operation, case.dtype)
    program(lambda *arrays: [2 * want[0]])
    with pytest.raises(AssertionError, match="result 0 is off"):
        fuzz_sharding.judge(case, devices, compiled=False)

    def refused(message):
        def run(*arrays):
            raise ValueError(message)

        return run

    program(refused("no such axis"))
    with pytest.raises(AssertionError, match="a stranger's error: ValueError: no such axis"):
        fuzz_sharding.judge(case, devices, compiled=False)
    program(refused("gemm: lhs is wrong"))
    assert fuzz_sharding.judge(case, devices, compiled=False) == "refused"


EXPLICIT = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


def put(x, *axes):
    return jax.device_put(x, NamedSharding(EXPLICIT, P(*axes)))


@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_what_explicit_axes_cut_is_dequantized_where_it_is(block):
    """Scales cut with the data, and, of the last 72 columns' part of a block, not."""
    for shape in ((512, 512), (512, 200)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        f = jax.jit(lambda x: jaxfp8.quantize(x, block=block).dequantize())
        got = f(put(x, "a", "b"))
        assert_same_bits(got, f(x))
        assert got.sharding.is_equivalent_to(put(x, "a", "b").sharding, 2)


def test_dispatch_and_combine_take_tokens_that_explicit_axes_cut():
    rng = np.random.default_rng(0)
    x, gate = (rng.standard_normal(s).astype(np.float32) for s in ((64, 256), (64, 2)))
    expert = (np.arange(128).reshape(64, 2) * 5 % 6).astype(np.int32)

    @jax.jit
    def run(x, gate, expert):
        def exchange(x, gate):
            rows, _, route = jaxfp8.dispatch(x, expert, 6)
            return jaxfp8.combine(rows, gate, route)

        y, pull = jax.vjp(exchange, x, gate)
        return y, *pull(jnp.cos(y))

    got = run(put(x, ("a", "b")), put(gate, "a"), put(expert, "b"))
    assert_close(got, run(x, gate, expert), 1e-5)
    assert got[1].sharding.is_equivalent_to(put(x, ("a", "b")).sharding, 2)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_custom_calls_lower_where_one_axis_is_manual_and_another_explicit(name, monkeypatch):
    """JAX 0.12 refused the types of the calls' results."""
    monkeypatch.setattr("jaxfp8._ffi.require_cuda_kernels", lambda operation: None)  # never run
    shapes = {"linear": ((256, 128), (128, 128)), "mlp": ((256, 128), (128, 2, 128), (128, 128))}
    run = getattr(jaxfp8, name)
    specs = (P("a"), *(P() for _ in shapes[name][1:]))
    f = jax.shard_map(run, mesh=EXPLICIT, in_specs=specs, out_specs=P("a"), axis_names={"a"})

    def gradients(*arrays):
        y, pull = jax.vjp(f, *arrays)
        return pull(y)

    arrays = [put(jnp.ones(s), *(("a", "b") if i == 0 else ())) for i, s in enumerate(shapes[name])]
    with jax.set_mesh(EXPLICIT):
        traced = jax.jit(gradients).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "jaxfp8_gemm_1d1d_v1" in text


@pytest.mark.parametrize("w_spec", [("a",), (None, "a"), ("b", "a")], ids=str)
def test_examples_and_a_shared_weight_may_be_cut_by_one_explicit_axis(w_spec):
    """FSDP of a layer that is called per example."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((512, 256), (256, 512)))

    @jax.jit
    def run(x, w):
        y, pull = jax.vjp(lambda x, w: jax.vmap(lambda row: jaxfp8.linear(row, w))(x), x, w)
        return y, *pull(y)

    got = run(put(x, "a"), put(w, *w_spec))
    assert_close(got, run(x, w), 1e-5)
    for result, spec in zip(got[1:], (("a",), w_spec), strict=True):
        assert result.sharding.is_equivalent_to(NamedSharding(EXPLICIT, P(*spec)), 2)
