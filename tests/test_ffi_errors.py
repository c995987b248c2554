"""The border of the native side: every call that breaks the contract is refused, by name.

The contract is docs/architecture.md, written down once more in `contract.py`. Each rule of each array
of each target is broken alone; test_border_fuzz.py breaks them at random.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp8 import _C, _ffi
from tests import oracle_activation
from tests.contract import ALLOWED, CONTRACT, F32, FLOAT, FP8, OUT, S32, quantizes
from tests.emulator.driver import EmulatedDriver

DTYPES = {
    "f8e4m3fn": jnp.float8_e4m3fn,
    "f8e5m2": jnp.float8_e5m2,
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f32": jnp.float32,
    "s32": jnp.int32,
    "u8": jnp.uint8,
}

PRODUCTS = [name for name in CONTRACT if "gemm" in name]
SIZES = {"G": 3, "M": 144, "N": 160, "K": 272, "MB": 2, "NB": 2, "KB": 3, "T": 640, "TB": 5}
SIZES |= {"A": 2, "F": 176, "FB": 2, "S": 100, "J": 6}
M_MAJOR = {"lhs_scale", "row_scale", "column_scale"}


class CustomCall:
    """A valid call of a target, of which a test changes one thing."""

    def __init__(self, target, sizes=SIZES):
        name, _, accum = target.partition("+")
        operands, results = CONTRACT[name]
        self.spec = {**operands, **results}
        self.target = f"jaxfp8_{name}_v1"
        self.operands, self.results = list(operands), list(results)
        if accum:
            self.target = f"jaxfp8_{name}_accum_v1"
            self.spec["accum"] = results["out"]
            self.operands.append("accum")
        default = {FP8: "f8e4m3fn", FLOAT: "bf16", F32: "f32", S32: "s32", OUT: "f32"}
        self.dtypes = {array: default[types] for array, (types, _) in self.spec.items()}
        self.shapes = {
            array: tuple(sizes[axis] for axis in axes.split())
            for array, (_, axes) in self.spec.items()
        }
        if "gemm" in name:
            self.attributes = {"config": np.int32(-1), "num_sms": np.int32(0)}
        else:
            self.attributes = {"pow2": np.bool_(False)} if quantizes(name) else {}
            if "activation" in name:
                self.attributes["activation"] = np.int32(0)
        self.aliased = bool(accum)

    def types(self, arrays):
        return [(self.dtypes[a], self.shapes[a]) for a in arrays]

    def plan(self, **options):
        attributes = {name: value.item() for name, value in self.attributes.items()}
        return _C.plan(
            self.target,
            self.types(self.operands),
            self.types(self.results),
            **attributes,
            **options,
        )

    def run(self):
        """The handler itself, called by XLA."""
        results = [
            jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for dtype, shape in self.types(self.results)
        ]
        call = jax.ffi.ffi_call(
            self.target,
            results,
            input_output_aliases={len(self.operands) - 1: 0} if self.aliased else {},
        )
        arrays = [jnp.zeros(shape, DTYPES[d]) for d, shape in self.types(self.operands)]
        return jax.block_until_ready(jax.jit(lambda *xs: call(*xs, **self.attributes))(*arrays))

    def refusal(self, **options):
        """The message with which planning refuses the call."""
        with pytest.raises(ValueError) as caught:
            self.plan(**options)
        return self._message(caught.value)

    def refusal_of_handler(self):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as caught:
            self.run()
        message = str(caught.value).partition("\n")[0]
        assert message.startswith("INVALID_ARGUMENT: ")
        return self._message(message.removeprefix("INVALID_ARGUMENT: "))

    def _message(self, error):
        message = str(error)
        assert message.startswith(self.target + ": "), message
        return message.removeprefix(self.target + ": ")

    def related(self, array):
        """The arrays that share a symbol with one: a size that disagrees is met at one of them."""
        own = self.symbols(array)
        return {other for other in self.spec if own & self.symbols(other)}

    def is_free(self, array, axis):
        """Whether nothing but this axis tells a size, such as how many rows there are to gather from."""
        symbol = self.spec[array][1].split()[axis]
        told = [s for _, dims in self.spec.values() for s in dims.split()]
        may_be = ("S", "J") if "T" in told else ("S", "J", "M")
        return symbol in may_be and told.count(symbol) == 1

    def symbols(self, array):
        symbols = {axis[0] for axis in self.spec[array][1].split()}
        return symbols | {"M", "G"} if "T" in symbols else symbols  # T follows from M and G


TARGETS = [*CONTRACT, *(f"{name}+accum" for name in PRODUCTS)]
ARRAYS = [(target, array) for target in TARGETS for array in CustomCall(target).spec]
each_target = pytest.mark.parametrize("target", TARGETS)
each_array = pytest.mark.parametrize(("target", "array"), ARRAYS)


@pytest.fixture
def handlers():
    _ffi.register_cpu_targets()
    with EmulatedDriver(_ffi.image_directory(), launch=lambda *_, **launch: None) as driver:
        yield driver


def test_the_contract_lists_every_target():
    targets = {CustomCall(target).target for target in TARGETS}
    assert targets == set(_C.handlers("CUDA")) == set(_C.handlers("cpu"))


@each_target
def test_the_valid_call_is_planned(target):
    plan = CustomCall(target).plan()
    assert plan.image in plan.kernel or plan.kernel.startswith(("gemm", "quantize", "activation"))
    assert str(plan).startswith(f"{plan.image}: {plan.kernel}\n  grid ")
    used = re.findall(r"[a-z_]+", str(plan.args))
    assert set(CustomCall(target).spec) - {"accum"} <= set(used)


@each_array
def test_another_type_is_refused(target, array):
    call = CustomCall(target)
    allowed = ALLOWED[call.spec[array][0]]
    for dtype in sorted(set(DTYPES) - allowed):
        call.dtypes[array] = dtype
        shape = ",".join(map(str, call.shapes[array]))
        message = call.refusal()
        assert message.startswith(f"{array} is {dtype}[{shape}]; allowed is ")
        assert all(name in message.partition("; allowed is ")[2] for name in allowed)


@each_array
def test_another_rank_is_refused(target, array):
    for change in (lambda shape: (1, *shape), lambda shape: shape[:-1]):
        call = CustomCall(target)
        call.shapes[array] = change(call.shapes[array])
        shape = ",".join(map(str, call.shapes[array]))
        assert call.refusal().startswith(f"{array} is {call.dtypes[array]}[{shape}]; allowed is ")


@each_array
def test_a_size_that_disagrees_is_refused(target, array):
    for axis in range(len(CustomCall(target).shapes[array])):
        for step in (-1, 1, 128):
            call = CustomCall(target)
            shape = list(call.shapes[array])
            shape[axis] += step
            call.shapes[array] = tuple(shape)
            if target == "quantize_ragged_columns" and array == "x" and axis == 0 and step != 128:
                call.plan()  # T tells how many blocks of rows there are, not how many rows
                continue
            if call.is_free(array, axis):
                call.plan()
                continue
            halves = call.spec[array][1].split()[axis] == "A"
            if halves and step == -1 and "grad" not in target:
                call.plan()  # one half, and the results do not tell
                continue
            message = call.refusal()
            named = re.match(r"(\w+) is ", message)[1]
            assert named in call.related(array), message


@each_array
@pytest.mark.parametrize("size", [0, -1, 2**31, 2**40])
def test_an_empty_or_enormous_axis_is_refused(target, array, size):
    call = CustomCall(target)
    shape = (*call.shapes[array][:-1], size)
    call.shapes[array] = shape
    message = call.refusal()
    assert message.startswith(f"{array} is {call.dtypes[array]}[{','.join(map(str, shape))}]")


@each_array
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_a_misaligned_address_is_refused(target, array, offset):
    call = CustomCall(target)
    assert call.refusal(offsets={array: offset}).startswith(f"{array} is at address ")


@pytest.mark.parametrize("target", [t for t in TARGETS if "both" in t or "quantize_weight" in t])
def test_both_copies_have_one_element_type(target):
    call = CustomCall(target)
    (second,) = [a for a in call.results if a in ("column_data", "data_nt")]
    call.dtypes[second] = "f8e5m2"
    assert call.refusal().startswith(f"{second} is f8e5m2[")


@pytest.mark.parametrize("target", [t for t in TARGETS if "gemm_1d" in t])
@pytest.mark.parametrize("groups", [2, 4])
def test_lhs_is_shared_or_has_every_group(target, groups):
    call = CustomCall(target)
    for array in ("lhs", "lhs_scale"):
        call.shapes[array] = (groups, *call.shapes[array][1:])
    assert call.refusal().startswith(f"lhs is f8e4m3fn[{groups},144,272]; its first axis")
    for array in ("lhs", "lhs_scale"):
        call.shapes[array] = (1, *call.shapes[array][1:])
    call.plan()


@pytest.mark.parametrize("target", [t for t in TARGETS if "gemm" in t and "wgrad" not in t])
def test_the_contraction_is_a_multiple_of_16(target):
    call = CustomCall(target)
    for array in ("lhs", "rhs"):
        call.shapes[array] = (*call.shapes[array][:-1], 264)
    assert re.match(r"lhs is .*264\]; its contraction K must be a multiple of 16", call.refusal())


@pytest.mark.parametrize("target", [t for t in TARGETS if "wgrad" in t])
def test_the_padded_token_axis_has_whole_blocks(target):
    call = CustomCall(target)
    for array in ("lhs", "rhs"):
        call.shapes[array] = (call.shapes[array][0], 656)
    assert re.match(r"lhs is .*656\]; its contraction T must be a multiple of 128", call.refusal())


@pytest.mark.parametrize("target", [t for t in TARGETS if "accum" in t])
def test_accum_has_the_type_of_out(target):
    call = CustomCall(target)
    call.dtypes["accum"] = "bf16"
    assert call.refusal().startswith("accum is bf16[")


@pytest.mark.parametrize("target", [t for t in TARGETS if "gemm" in t])
def test_num_sms_is_not_negative(target):
    call = CustomCall(target)
    call.attributes["num_sms"] = np.int32(-1)
    assert call.refusal() == "num_sms is -1; allowed is 0 (all) or more"


@pytest.mark.parametrize("target", [t for t in TARGETS if "gemm" in t])
def test_more_multiprocessors_than_the_device_has_are_all_of_them(target):
    """A program exported with `num_sms=100` runs on a device of 78."""
    call = CustomCall(target)
    call.attributes["num_sms"] = np.int32(100)
    more = str(call.plan(device_sms=78))
    call.attributes["num_sms"] = np.int32(0)
    assert more == str(call.plan(device_sms=78))


SEGMENTS = {  # of the walk over tiles, csrc/kernels/gemm/schedule.cuh
    "gemm": lambda groups: groups,
    "grouped_gemm": lambda groups: groups + 1,
    "masked_grouped_gemm": lambda groups: 2 * groups,
    "grouped_wgrad_gemm": lambda groups: groups,
}


@pytest.mark.parametrize("target", [t for t in TARGETS if "gemm" in t])
def test_the_walk_over_the_most_groups_ends(target):
    """It counts segments in 32 bits, 32 at a time: past the largest plan there is room for a step."""
    kind = re.fullmatch(r"(?:jaxfp8_)?(\w+?)(?:_1d[12]d)?(?:_v1)?(?:\+accum)?", target)[1]
    one = {**SIZES, "M": 1, "N": 1, "K": 16, "MB": 1, "NB": 1, "KB": 1}
    edges = {2**30 + d for d in range(-600, 2)} | {
        2**31 - 1 - d for d in (1, 128, *range(1020, 1030))
    }
    if kind == "grouped_wgrad_gemm":
        edges = {2**24 + d for d in range(-20, 2)}
    accepted = []
    for groups in sorted(edges):
        sizes = {**one, "G": groups, "T": 128 * groups, "TB": groups}
        call = CustomCall(target, sizes=sizes)
        try:
            call.plan()
        except ValueError as error:
            assert "out has" in str(error) or "every axis has" in str(error) or "rows" in str(error)
        else:
            accepted.append(groups)
    assert accepted and SEGMENTS[kind](max(accepted)) + 1024 <= 2**31 - 1


@pytest.mark.parametrize("target", [t for t in TARGETS if "gemm" in t])
def test_config_is_one_of_the_list(target):
    call = CustomCall(target)
    names = _C.configs(call.target)
    assert len(names) == len(set(names)) > 0
    for config in (-2, len(names)):
        call.attributes["config"] = np.int32(config)
        with pytest.raises(ValueError, match=f"config is {config}; allowed"):
            call.plan()
    for config in range(-1, len(names)):
        call.attributes["config"] = np.int32(config)
        call.plan()


@each_target
@pytest.mark.parametrize("change", ["missing", "extra"])
def test_another_number_of_arrays_is_refused(target, change):
    call = CustomCall(target)
    operands, results = call.types(call.operands), call.types(call.results)
    extra = [("f32", (1,))] if change == "extra" else []
    cut = -1 if change == "missing" else None
    for wrong in ((operands[:cut] + extra, results), (operands, results[:cut] + extra)):
        with pytest.raises(ValueError, match=r"\d (operands|results); allowed are \d"):
            _C.plan(call.target, *wrong)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="there is no target gemm; known are jaxfp8_quantize_rows"):
        _C.plan("gemm", [], [])
    with pytest.raises(ValueError, match="there is no target gemm"):
        _C.configs("gemm")
    with pytest.raises(ValueError, match="platform is tpu; allowed are CUDA and cpu"):
        _C.handlers("tpu")


# --- the same border, reached through XLA ---------------------------------------------------------


@pytest.mark.emulated
@each_target
@pytest.mark.representatives(cases=8)
def test_handlers_launch_a_valid_call(handlers, target):
    if not _ffi.images():
        pytest.skip("this build holds no kernels")
    call = CustomCall(target)
    call.run()
    (launch,) = handlers.launches
    plan = call.plan(device_sms=handlers.num_sms)
    assert (launch.target, launch.kernel) == (call.target, plan.kernel)
    assert (launch.grid, launch.cluster) == (plan.grid, plan.cluster)


@pytest.mark.emulated
@each_array
@pytest.mark.representatives("target")
def test_handlers_refuse_another_type(handlers, target, array):
    call = CustomCall(target)
    call.dtypes[array] = "u8"
    call.aliased = call.aliased and array not in ("accum", "out")
    assert call.refusal_of_handler().startswith(f"{array} is u8[")
    assert not handlers.launches


@pytest.mark.emulated
@each_array
@pytest.mark.representatives("target")
def test_handlers_refuse_a_size_that_disagrees(handlers, target, array):
    call = CustomCall(target)
    shape = list(call.shapes[array])
    axis = next(i for i in reversed(range(len(shape))) if not call.is_free(array, i))
    shape[axis] += 128
    call.shapes[array] = tuple(shape)
    call.aliased = call.aliased and array not in ("accum", "out")
    assert re.match(r"(\w+) is ", call.refusal_of_handler())[1] in call.related(array)
    assert not handlers.launches


@pytest.mark.emulated
@pytest.mark.parametrize("target", [t for t in TARGETS if "accum" in t])
def test_an_accumulator_beside_the_output_is_copied_there_first(handlers, target):
    call = CustomCall(target)
    call.aliased = False
    call.run()
    (launch,) = handlers.launches
    assert launch.target == call.target
    assert handlers.calls.count("cuMemcpyDtoDAsync_v2") == 1


@pytest.mark.parametrize("target", [t for t in TARGETS if "accum" in t])
def test_an_accumulator_that_overlaps_the_output_in_part_is_refused(target):
    call = CustomCall(target)
    for offset in (16, 4096):
        message = call.refusal(offsets={"accum": offset})
        assert message.startswith(
            "accum is in part the buffer of out; allowed is all of it, or one"
        )
    beside = str(call.plan(offsets={"accum": 1 << 40}))
    assert re.search(r"before: \d+ bytes of out\+1099511627776 are copied to out$", beside)
    assert "before: " not in str(call.plan())


@pytest.mark.emulated
@each_target
@pytest.mark.representatives("target")
def test_handlers_refuse_attributes_of_another_type(handlers, target):
    call = CustomCall(target)
    for name, value in call.attributes.items():
        kind = "i1" if value.dtype == bool else "i32"
        wrong = CustomCall(target)
        wrong.attributes[name] = np.float32(0)
        message = wrong.refusal_of_handler()
        assert message == f"attribute {name} is of another type; it must be {kind}"
        missing = CustomCall(target)
        del missing.attributes[name]
        message = missing.refusal_of_handler()
        assert message == f"attribute {name} is missing; it must be {kind}"
    assert not handlers.launches


@pytest.mark.emulated
@pytest.mark.parametrize("target", PRODUCTS)
def test_handlers_refuse_attributes_out_of_range(handlers, target):
    for name, value in {"num_sms": -1, "config": 1000}.items():
        call = CustomCall(target)
        call.attributes[name] = np.int32(value)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=f"{name} is {value}"):
            call.run()


# --- the version of XLA's FFI ---------------------------------------------------------------------

HEADER = "#define XLA_FFI_API_MAJOR {}\n#define XLA_FFI_API_MINOR {}\n"


@pytest.mark.parametrize("version", [(0, 3), (0, 5)])
def test_a_jax_of_the_same_or_a_newer_ffi_is_accepted(version):
    _ffi._check_version((0, 3), HEADER.format(*version))


@pytest.mark.parametrize("version", [(0, 2), (1, 3)])
def test_a_jax_of_an_older_or_incompatible_ffi_is_refused(version):
    with pytest.raises(
        ImportError, match=r"built for XLA FFI 0\.3, but jax .* has {}\.{}".format(*version)
    ):
        _ffi._check_version((0, 3), HEADER.format(*version))


def test_a_jax_whose_ffi_cannot_be_read_is_refused():
    with pytest.raises(ImportError, match="cannot tell which XLA FFI version"):
        _ffi._check_version((0, 3), "")


ACTIVATIONS = [t for t in TARGETS if "activation" in t]


@pytest.mark.parametrize("target", ACTIVATIONS)
def test_an_unknown_activation_is_refused(target):
    for index in (-1, len(oracle_activation.ACTIVATIONS), 2**31 - 1):
        call = CustomCall(target)
        call.attributes["activation"] = np.int32(index)
        assert call.refusal() == f"activation is {index}; allowed is 0 (silu) or 1 (gelu)"


@pytest.mark.parametrize("target", [t for t in ACTIVATIONS if "grad" in t])
def test_a_cotangent_of_another_type_is_refused(target):
    call = CustomCall(target)
    of_x = call.dtypes["x"]
    call.dtypes["dy"] = "f32" if of_x == "bf16" else "bf16"
    assert call.refusal().endswith(f"; allowed is the element type of x, {of_x}")
