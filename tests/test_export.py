"""Programs and arrays that outlive the process: exported, cached, compiled ahead, pickled, checkpointed."""

import copy
import functools
import importlib.util
import io
import pickle
import pickletools
import re
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp8
from jaxfp8 import _ffi
from tests import oracle
from tests.artifacts import DIRECTORY, programs
from tests.emulated_platform import emulated_platform

F32 = 2e-6
needs_kernels = pytest.mark.skipif(not _ffi.images(), reason="this build holds no kernels")


def assert_same(got, want):
    """Bits of integers and FP8 data; products to float32 rounding."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == np.float32:
            assert oracle.error(a, b) <= F32
        else:
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@functools.partial(jax.jit, static_argnums=0)
def now(f, *arguments):
    """What this build computes."""
    return f(*arguments)


def step(x, w, dy):
    """Forward and backward of one product."""
    y, pull = jax.vjp(jaxfp8.linear, x, w)
    return y, *pull(dy)


def step_arguments():
    x, w, _, dy = programs.train_arguments()
    return x, w, dy


def targets(exported):
    return set(re.findall(r"custom_call @(jaxfp8_\w+)\(", exported.mlir_module()))


# --- jax.export -----------------------------------------------------------------------------------


def export(f, *arguments, **options):
    exported = jax.export.export(jax.jit(f), **options)(*arguments)
    return jax.export.deserialize(exported.serialize())


def test_an_exported_training_step_computes_the_same():
    arguments = step_arguments()
    assert_same(export(step, *arguments).call(*arguments), now(step, *arguments))


@needs_kernels
def test_export_for_cuda_from_a_machine_without_a_gpu():
    arguments = programs.train_arguments()
    checks = jaxfp8.export.disabled_checks()
    exported = export(programs.train, *arguments, platforms=["cuda"], disabled_checks=checks)
    assert exported.platforms == ("cuda",)
    assert targets(exported) <= set(_ffi.targets())
    kinds = "gemm_1d2d gemm_1d1d grouped_gemm grouped_wgrad_gemm quantize_both quantize_weight"
    assert {_ffi.target(k) for k in kinds.split()} <= targets(exported)
    with pytest.raises(ValueError, match="cuda"):
        exported.call(*arguments)


@needs_kernels
def test_one_export_serves_both_platforms():
    arguments = step_arguments()
    checks = jaxfp8.export.disabled_checks()
    both = export(step, *arguments, platforms=["cpu", "cuda"], disabled_checks=checks)
    assert targets(both)
    assert_same(both.call(*arguments), now(step, *arguments))


@needs_kernels
def test_without_the_listed_checks_jax_refuses_and_with_them_others_stay():
    x, w, *_ = programs.train_arguments()
    with pytest.raises(ValueError, match="jaxfp8_"):
        export(jaxfp8.linear, x, w, platforms=["cuda"])

    def stranger(x, w):
        shape = jax.ShapeDtypeStruct((70, 72), np.float32)
        return jax.ffi.ffi_call("not_ours", shape)(jaxfp8.linear(x, w))

    with pytest.raises(ValueError, match="not_ours"):
        checks = jaxfp8.export.disabled_checks()
        export(stranger, x, w, platforms=["cuda"], disabled_checks=checks)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=needs_kernels)])
def test_the_number_of_tokens_may_be_symbolic(platform):
    x, w, *_ = programs.train_arguments()
    (tokens,) = jax.export.symbolic_shape("tokens")
    shape = jax.ShapeDtypeStruct((tokens, x.shape[1]), x.dtype)
    checks = jaxfp8.export.disabled_checks()
    exported = export(jaxfp8.linear, shape, w, platforms=[platform], disabled_checks=checks)
    if platform == "cpu":
        for rows in (1, 70):
            assert_same(exported.call(x[:rows], w), now(jaxfp8.linear, x[:rows], w))


def test_an_exported_function_keeps_its_gradient():
    x, w, _, dy = programs.train_arguments()
    exported = jax.export.export(jax.jit(jaxfp8.linear))(x, w).serialize(vjp_order=1)
    again = jax.export.deserialize(exported)
    _, pull = jax.vjp(again.call, x, w)
    _, want = jax.vjp(jaxfp8.linear, x, w)
    assert_same(pull(dy), want(dy))


# --- artifacts of earlier builds ------------------------------------------------------------------

EXPORTS = {
    "train_portable_v1": (programs.train, programs.train_arguments),
    "train_calls_v1": (programs.train, programs.train_arguments),
    "every_target_v1": (programs.every_target, programs.every_target_arguments),
}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.representatives()
def test_a_program_exported_by_an_earlier_build_computes_the_same(name):
    f, arguments = EXPORTS[name]
    exported = jax.export.deserialize((DIRECTORY / f"{name}.jaxexport").read_bytes())
    want = now(f, *arguments())
    if not targets(exported):
        assert_same(exported.call(*arguments()), want)
    elif not _ffi.images():
        pytest.skip("this build holds no kernels")
    else:
        with emulated_platform():
            assert_same(exported.call(*arguments()), want)


def test_the_artifacts_hold_every_target_of_version_1_that_programs_call():
    found = set()
    for name in EXPORTS:
        exported = jax.export.deserialize((DIRECTORY / f"{name}.jaxexport").read_bytes())
        found |= targets(exported)
    assert len(found) == 15
    assert found <= set(_ffi.targets()), "a target that old programs call is gone"


def assert_quantized(arrays):
    for name, want in programs.quantized_array().items():
        got = arrays[name]
        assert isinstance(got, jaxfp8.QuantizedArray) and got.block == want.block
        assert_same(got, want)
        assert_same(got.dequantize(), want.dequantize())


def test_a_quantized_array_pickled_by_an_earlier_build_loads():
    assert_quantized(pickle.loads((DIRECTORY / "quantized_array_v1.pickle").read_bytes()))


def test_a_quantized_array_checkpointed_by_an_earlier_build_loads(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    archive = (DIRECTORY / "quantized_array_orbax_v1.zip").read_bytes()
    zipfile.ZipFile(io.BytesIO(archive)).extractall(tmp_path / "saved")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        programs.quantized_array(),
    )
    with orbax.StandardCheckpointer() as checkpointer:
        assert_quantized(checkpointer.restore(tmp_path / "saved", like))


# --- pickles and checkpoints of this build --------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_quantized_arrays_and_recipes_pickle(protocol):
    recipe = jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2, scale_format="pow2", num_sms=8)
    arrays, again = pickle.loads(pickle.dumps((programs.quantized_array(), recipe), protocol))
    assert_quantized(arrays)
    assert again == recipe and hash(again) == hash(recipe)
    assert copy.deepcopy(recipe) == recipe
    assert_quantized(copy.deepcopy(programs.quantized_array()))


def test_pickles_name_public_modules():
    """A pickle outlives where its class lies: it may name `jaxfp8`, and no file under it."""
    weight = jaxfp8.prequantize(jnp.ones((128, 128)))
    for value in (programs.quantized_array(), weight, jaxfp8.Recipe(grad_dtype=jnp.float8_e5m2)):
        named = [
            arg for _, arg, _ in pickletools.genops(pickle.dumps(value)) if isinstance(arg, str)
        ]
        ours = {name for name in named if name.startswith("jaxfp8")}
        assert ours == {"jaxfp8"}, ours


def test_a_quantized_array_passes_through_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    arrays = programs.quantized_array()
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", arrays)
        checkpointer.wait_until_finished()
        assert_quantized(checkpointer.restore(tmp_path / "saved", arrays))


# --- compiled ahead of time -----------------------------------------------------------------------


def test_a_program_compiled_ahead_checks_its_arguments_and_computes_the_same():
    arguments = step_arguments()
    compiled = jax.jit(step).lower(*arguments).compile()
    assert_same(compiled(*arguments), now(step, *arguments))
    with pytest.raises(TypeError):
        compiled(arguments[0][:-1], *arguments[1:])


def test_a_compiled_program_is_serialized_and_loaded():
    from jax.experimental import serialize_executable

    arguments = step_arguments()
    jax.clear_caches()  # XLA:CPU refuses to serialize some programs that have run
    compiled = jax.jit(step).lower(*arguments).compile()
    again = serialize_executable.deserialize_and_load(
        *serialize_executable.serialize(compiled), execution_devices=jax.devices()[:1]
    )
    assert_same(again(*arguments), now(step, *arguments))


@needs_kernels
@pytest.mark.full
def test_a_program_of_custom_calls_compiled_ahead_runs_in_its_process():
    arguments = step_arguments()
    want = now(step, *arguments)
    with emulated_platform():
        compiled = jax.jit(step).lower(*arguments).compile()
        assert_same(compiled(*arguments), want)


PROGRAM = """
import jax, sys
from tests.test_export import step, step_arguments
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
arguments = step_arguments()
_, _, dw = jax.jit(step)(*arguments)
print(sum(e.endswith("/cache_hits") for e in events), sum(e.endswith("/cache_misses") for e in events))
print(jax.device_get(dw).tobytes().hex())
"""


@pytest.mark.full
def test_the_persistent_compilation_cache_serves_a_second_process(tmp_path):
    def run():
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        counts, data = result.stdout.split("\n")[:2]
        return *map(int, counts.split()), data

    first_hits, first_misses, first = run()
    hits, misses, second = run()
    assert first_hits == 0 and first_misses > 0
    assert hits == first_misses and misses == 0
    assert first == second


def test_serialization_of_exports_has_what_it_needs():
    """jax.export writes with flatbuffers, which JAX does not require."""
    assert importlib.util.find_spec("flatbuffers")
