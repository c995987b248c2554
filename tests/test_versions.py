"""What the installed package does beside any supported JAX and Python: every operation once, checked.

Short, so that one wheel can be tried in many environments: `.ci/versions` runs this file, and only
this file, beside each release of JAX that the package supports.
"""

import importlib.metadata
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement

import jaxfp8
from jaxfp8 import _C, _ffi
from tests import kernel_cases as cases
from tests import oracle, oracle_gradients
from tests.emulated_platform import emulated_platform

F32, EMULATED = 2e-6, 1e-6
SIZES = [0, 70, 1, 59]


def test_this_jax_and_python_are_in_the_supported_range():
    distribution = importlib.metadata.distribution("jaxfp8")
    requirements = [Requirement(r) for r in distribution.requires]
    # Extras name jax again, with the GPU's libraries.
    (supported,) = [r.specifier for r in requirements if r.name == "jax" and not r.extras]
    assert supported.contains(jax.__version__)
    assert sys.version_info >= (3, 11)
    assert importlib.metadata.version("jaxfp8") == jaxfp8.__version__


def test_the_extension_uses_the_stable_abi_where_that_has_what_it_needs():
    suffix = ".abi3.so" if sys.version_info >= (3, 12) else f".cpython-{sys.version_info[0]}"
    assert suffix in _C.__file__
    assert _C.build_info()["ffi"] == (0, 3)


def test_linear_and_its_gradients():
    x, w, dy = (cases.normal(i, *s) for i, s in enumerate([(70, 200), (200, 136), (70, 136)]))
    got = cases.train_linear((70, 200, 136))()
    want = oracle_gradients.dense(*map(np.asarray, (x, w, dy)))
    for name, expected in zip(("y", "dx", "dw"), want, strict=True):
        assert oracle.error(got[name], expected) <= F32, name


def test_ragged_dot_and_its_gradients():
    x, w, dy = (cases.normal(i, *s) for i, s in enumerate([(130, 200), (4, 200, 72), (130, 72)]))
    sizes = jnp.array(SIZES, jnp.int32)
    y, pull = jax.jit(lambda x, w: jax.vjp(lambda x, w: jaxfp8.ragged_dot(x, w, sizes), x, w))(x, w)
    want = oracle_gradients.ragged(*map(np.asarray, (x, w, dy)), SIZES)
    for got, expected in zip((y, *pull(dy)), want, strict=True):
        assert oracle.error(got, expected) <= F32


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f, (0, None)),
        lambda f: jax.checkpoint(f, policy=jaxfp8.checkpoint_policies.save_fp8_residuals()),
        lambda f: lambda x, w: jax.lax.map(lambda row: f(row, w), x),
    ],
    ids=["vmap", "checkpoint", "scan"],
)
def test_transformations_keep_the_gradients(transform):
    x, w = cases.normal(0, 4, 40, 128), cases.normal(1, 128, 64)

    def loss(f):
        return jax.jit(jax.grad(lambda x, w: (f(x, w) ** 2).sum()))

    plain = loss(lambda x, w: jaxfp8.linear(x, w))(x, w)
    assert oracle.error(loss(transform(jaxfp8.linear))(x, w), np.asarray(plain)) <= F32


def test_a_mesh_of_devices_computes_the_same():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    place = lambda v, *axes: jax.device_put(  # noqa: E731
        v, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    )
    x, w = cases.normal(0, 256, 512), cases.normal(1, 512, 128)
    f = jax.jit(jax.value_and_grad(lambda x, w: (jaxfp8.linear(x, w) ** 2).sum(), (0, 1)))
    want = f(x, w)
    got = f(place(x, "data", "model"), place(w, "model", None))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert oracle.error(a, np.asarray(b)) <= 1e-5


def test_an_exported_program_runs():
    x, w = cases.normal(0, 70, 200), cases.normal(1, 200, 136)
    exported = jax.export.export(jax.jit(jaxfp8.linear))(x, w)
    again = jax.export.deserialize(exported.serialize())
    assert oracle.error(again.call(x, w), np.asarray(jax.jit(jaxfp8.linear)(x, w))) <= F32


def test_a_quantized_array_pickles():
    q = jaxfp8.quantize(cases.normal(0, 3, 200))
    again = pickle.loads(pickle.dumps(q))
    assert again.block == q.block
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())


KERNELS = {
    "gemm": lambda: cases.gemm((70, 136, 200), out_dtype=jnp.float32),
    "gemm 1x128": lambda: cases.gemm((70, 136, 200), square=False, accum=True),
    "grouped": lambda: cases.grouped("129 and 2", 72, 136),
    "masked": lambda: cases.masked(70, [0, 1, 70], 72, 136),
    "grouped wgrad": lambda: cases.grouped_wgrad("129 and 2"),
    "rows": lambda: cases.quantizer("rows", (70, 257)),
    "both": lambda: cases.quantizer("both", (70, 257)),
    "weight": lambda: cases.quantizer("weight", (130, 257)),
    "ragged": lambda: cases.ragged_quantizer("129 and 2"),
    "linear": lambda: cases.train_linear((64, 128, 128)),
}


@pytest.mark.emulated
@pytest.mark.skipif(not _ffi.images(), reason="this build of jaxfp8 holds no kernels")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.representatives(cases=3)
def test_kernels_called_by_this_runtime_give_what_the_portable_lowering_gives(kernel):
    run = KERNELS[kernel]()
    want = {name: np.asarray(v) for name, v in run().items()}
    with emulated_platform(num_sms=2):
        got = {name: np.asarray(v) for name, v in run().items()}
    for name, v in want.items():
        if v.dtype in (np.uint8, np.uint32):
            np.testing.assert_array_equal(got[name], v)
        else:
            tolerance = EMULATED if v.dtype == np.float32 else 2**-8
            oracle.assert_close(got[name], v, tolerance)
