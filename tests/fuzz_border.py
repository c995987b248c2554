"""A fuzzer of the FFI border: calls of every handler with random and adversarial buffers and attributes.

    python -m tests.fuzz_border --calls 100000 --seed 0

Calls go straight to the CUDA handlers, on addresses behind which nothing lies, with the recording
driver below: planning, tensor maps and the launch are the library's own, and host code that read an
array would crash. Each call is judged by `faults`, which reads docs/architecture.md's contract once
more: a call without a fault must launch; any other must be refused with an error that names an
argument at fault, and must not reach the driver's launch. A call is given again by `--seed` and its
number (`--only`). `python -m tests.instrumented address -m tests.fuzz_border` runs it under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import re
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from jaxfp8 import _C
from tests import ffi_frames
from tests.contract import ALLOWED, CONTRACT, pads_tokens, quantizes
from tests.ffi_frames import DTYPES, Buffer, Frame
from tests.recording import RecordingDriver

BLOCK = 128
MAX_SIZE = 2**31 - 1 - BLOCK  # of an axis
MAX_ROWS = 2**31 - 1 - 1024  # of all groups of a product's array; tiles too
MAX_GRID = 2**31 - 1
NUM_SMS = 132


def _targets() -> dict[str, tuple[dict, dict]]:
    """target -> (operands, results); accumulating twins too."""
    found = {}
    for name, (operands, results) in CONTRACT.items():
        found[f"jaxfp8_{name}_v1"] = (operands, results)
        if "gemm" in name:
            found[f"jaxfp8_{name}_accum_v1"] = ({**operands, "accum": results["out"]}, results)
    return found


TARGETS = _targets()
ATTRIBUTES = {"pow2": "pred", "activation": "s32", "config": "s32", "num_sms": "s32"}


@dataclass
class Array:
    dtype: str
    dims: list[int]
    address: int


@dataclass
class Call:
    target: str
    operands: list[Array]
    results: list[Array]
    # name -> (kind, value): a scalar of a type, or "string", "array", "dictionary"
    attributes: dict[str, tuple[str, Any]]
    mutations: list[str] = field(default_factory=list)

    def frame(self, stream: int, **options) -> Frame:
        buffers = [
            [Buffer(a.dtype, a.address, a.dims) for a in arrays]
            for arrays in (self.operands, self.results)
        ]
        made = {}
        for name, (kind, value) in self.attributes.items():
            if kind == "string":
                made[name] = ffi_frames.string(value)
            elif kind == "array":
                made[name] = ffi_frames.array("s32", value)
            elif kind == "dictionary":
                made[name] = ffi_frames.dictionary()
            else:
                made[name] = ffi_frames.scalar(kind, value)
        return Frame(*buffers, made, stream=stream, **options)


# --- the judge ------------------------------------------------------------------------------------


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _bytes(array: Array) -> int:
    return math.prod(array.dims) * {"f32": 4, "bf16": 2}.get(array.dtype, 1)


def _overlap_in_part(a: Array, b: Array) -> bool:
    apart = a.address + _bytes(a) <= b.address or b.address + _bytes(b) <= a.address
    return a.address != b.address and not apart


def faults(call: Call) -> set[str]:
    """Everything that may be named in the refusal of a call; empty: the call is valid."""
    operands, results = TARGETS[call.target]
    found = set()
    attributes = ["config", "num_sms"] if "gemm" in call.target else []
    if quantizes(_name(call.target)):
        attributes.append("pow2")
    if "activation" in call.target:
        attributes.append("activation")
    for name in attributes:
        if call.attributes.get(name, ("", 0))[0] != ATTRIBUTES[name]:
            found.add(f"attribute {name}")
    if len(call.operands) != len(operands):
        found.add("operands")
    if len(call.results) != len(results):
        found.add("results")
    if found:  # these come before all others
        return found

    spec = {**operands, **results}
    arrays = dict(zip(spec, call.operands + call.results, strict=True))
    for name, (types, axes) in spec.items():
        array = arrays[name]
        if array.dtype not in ALLOWED[types] or len(array.dims) != len(axes.split()):
            found.add(name)
        if any(not 1 <= size <= MAX_SIZE for size in array.dims):
            found.add(name)
        if array.address == 0 or array.address % 16:
            found.add(name)
    if found:
        # Sizes are compared in the order of the arrays: one before may be named for its sizes.
        return found | _size_faults(call.target, spec, arrays)
    found = _size_faults(call.target, spec, arrays)
    return found or _value_faults(call, arrays)


def _axes(target: str, spec: dict, name: str) -> list[str]:
    axes = spec[name][1].split()
    if "gemm_1d" in target and name.startswith("lhs"):
        axes[0] = "1|G"
    return axes


def _size_faults(target: str, spec: dict, arrays: dict[str, Array]) -> set[str]:
    """Arrays that share a symbol on whose size they do not agree."""
    sizes: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for name in spec:
        axes = _axes(target, spec, name)
        if len(axes) == len(arrays[name].dims):
            for axis, size in zip(axes, arrays[name].dims, strict=True):
                sizes[axis][name] = size
    found = set()
    for symbol in list(sizes):
        by_name = sizes[symbol]
        base = symbol[0]
        others = set(by_name)
        if len(set(by_name.values())) > 1:
            found |= others
        ragged = "gemm" not in target and pads_tokens(_name(target))
        for name, size in by_name.items():
            if symbol in ("MB", "NB", "KB", "FB") and base in sizes:
                for owner, whole in sizes[base].items():
                    if size != _cdiv(whole, BLOCK):
                        found |= {name, owner}
            if symbol == "TB":
                for owner, whole in sizes["T"].items():
                    if size != whole // BLOCK:
                        found |= {name, owner}
            if symbol == "T" and ragged:
                for m_name, m in sizes["M"].items():
                    for g_name, g in sizes["G"].items():
                        if size != _cdiv(m, BLOCK) * BLOCK + BLOCK * g:
                            # TB follows from M and G too, and may be met first.
                            found |= {name, m_name, g_name, *sizes["TB"]}
            if symbol == "1|G" and size != 1:
                for owner, groups in sizes["G"].items():
                    if size != groups:
                        found |= {name, owner, "lhs"}
    return found


def _value_faults(call: Call, arrays: dict[str, Array]) -> set[str]:
    """What a call whose every array has an allowed type, shape and address may still have."""
    target = call.target
    found = set()
    if "gemm" not in target:
        eight_bit = [n for n, a in arrays.items() if a.dtype.startswith("f8")]
        if len({arrays[n].dtype for n in eight_bit}) > 1:
            found |= set(eight_bit)
        first, dims = next((n, a.dims) for n, a in arrays.items())  # x, w, or the rows of a sum
        if _quantizer_grid(target, arrays, dims) > MAX_GRID:
            moved = "gather" in target or "sum" in target
            found.add(next(iter(TARGETS[target][1])) if moved else first)
        if "activation" in target:
            if dims[-2] > 2:
                found.add("x")
            if "dy" in arrays and arrays["dy"].dtype != arrays["x"].dtype:
                found.add("dy")
            if not 0 <= call.attributes["activation"][1] <= 1:
                found.add("activation")
        return found

    def value(name):
        return call.attributes[name][1]

    lhs, rhs, out = arrays["lhs"], arrays["rhs"], arrays["out"]
    wgrad = "wgrad" in target
    contraction = lhs.dims[-1]
    if contraction % (BLOCK if wgrad else 16):
        found |= {"lhs", "rhs"}
    if "accum" in arrays:
        if arrays["accum"].dtype != out.dtype or _overlap_in_part(arrays["accum"], out):
            found |= {"accum"}
    if rhs.dtype == "f8e5m2" and ("1d1d" not in target and not wgrad or lhs.dtype == "f8e5m2"):
        found |= {"lhs", "rhs"}
    groups = rhs.dims[0] if not wgrad else out.dims[0]
    if wgrad and contraction // BLOCK < groups:
        found |= {"lhs", "rhs", "group_sizes"}
    rows = out.dims[0] * out.dims[1] if len(out.dims) == 3 else out.dims[0]
    for name, count in {
        "out": rows,
        "lhs": lhs.dims[0] * lhs.dims[1] if len(lhs.dims) == 3 else lhs.dims[0],
        "rhs": rhs.dims[0] * rhs.dims[1] if len(rhs.dims) == 3 else rhs.dims[0],
    }.items():
        if count > MAX_ROWS:
            found.add(name)
    num_sms, config = value("num_sms"), value("config")
    if num_sms < 0:
        found.add("num_sms")
    names = _C.configs(target)
    if not -1 <= config < len(names):
        found.add("config")
    elif config >= 0 and num_sms:
        a, b = re.search(r"cluster (\d)x(\d)", names[config]).groups()
        if int(a) * int(b) > min(num_sms, NUM_SMS):
            found |= {"config", "num_sms"}
    if _tiles_overflow(target, names, call, arrays):
        found.add("out")
    return found


def _quantizer_grid(target: str, arrays: dict[str, Array], dims: list[int]) -> int:
    """CTAs of a quantization, before rows are gathered in CTAs of several warps."""
    *lead, m, k = dims[:-2] + dims[-1:] if "activation" in target else dims
    name = _name(target)
    if "gather" in name:
        m = arrays["source"].dims[0]
    size = {"f32": 4, "f8e4m3fn": 1, "f8e5m2": 1}.get(next(iter(arrays.values())).dtype, 2)
    if "sum" in name:
        return arrays["position"].dims[0] * _cdiv(k, 512 // size)
    if name.endswith("rows"):
        return _cdiv(m, 8) * _cdiv(k, 512 // size)
    groups = lead[0] if lead else 1
    if pads_tokens(name):
        return (_cdiv(m, BLOCK) + arrays["group_sizes"].dims[0]) * _cdiv(k, BLOCK)
    return groups * _cdiv(m, BLOCK) * _cdiv(k, BLOCK)


def _tiles_overflow(target: str, names: list[str], call: Call, arrays: dict[str, Array]) -> bool:
    """Whether the call's configuration has more tiles than the walk counts; of the heuristic's, every one."""
    out = arrays["out"].dims
    m, n = out[-2:]
    groups = arrays["rhs"].dims[0] if len(arrays["rhs"].dims) == 3 else out[0]
    config = call.attributes["config"][1]
    chosen = names if config == -1 else names[config : config + 1]
    for name in chosen:
        block_m, block_n, pair, a, b = re.fullmatch(
            r"m(\d+)n(\d+)(x2)? cluster (\d)x(\d)", name
        ).groups()
        rows = int(block_m) * int(a)
        columns = _cdiv(n, int(block_n) * (2 if pair else 1) * int(b))
        if "masked" in target:
            tiles = groups * (m // rows + 2)
        elif "wgrad" not in target and "grouped" in target:
            tiles = m // rows + groups + 1
        else:
            tiles = groups * _cdiv(m, rows)
        if tiles * columns <= MAX_ROWS:
            return False
    return bool(chosen)


# --- the generator --------------------------------------------------------------------------------

_EDGES = (0, -1, 1, 127, 128, 2**31 - 129, 2**31 - 128, 2**31 - 1, 2**31, 2**32, 2**40, 2**62)
_EDGES += (2**63 - 1, -(2**63), -(2**31), 2**31 - 1025, 2**31 - 1024)
_VALUES = (-1, 0, 1, 2, 3, 131, 132, 133, 12, 13, 10, 11, 2**31 - 1, -(2**31))


def _size(rng: random.Random, large: bool) -> int:
    """Log-uniform, up to the largest axis if `large`."""
    return min(int(2 ** rng.uniform(0, 31 if large else 11)), MAX_SIZE)


def _name(target: str) -> str:
    return target.removeprefix("jaxfp8_").removesuffix("_v1")


def valid_call(rng: random.Random) -> Call:
    """A call with the contract's shapes, types and attributes; its sizes may still be too large."""
    target = rng.choice(list(TARGETS))
    operands, results = TARGETS[target]
    large = rng.random() < 0.2
    sizes = {s: _size(rng, large) for s in "GMNKFSJ"}
    sizes["A"] = rng.randint(1, 2)
    if not large:
        sizes["G"] = rng.randint(1, 70)
    if "gemm" in target:
        sizes["K"] = sizes["K"] // 16 * 16 or 16
    if "gemm" not in target and pads_tokens(_name(target)):
        sizes["T"] = _cdiv(sizes["M"], BLOCK) * BLOCK + BLOCK * sizes["G"]
    else:
        sizes["T"] = BLOCK * (sizes["G"] + _size(rng, False))
    for symbol in "MNKF":
        sizes[f"{symbol}B"] = _cdiv(sizes[symbol], BLOCK)
    sizes["TB"] = sizes["T"] // BLOCK
    if "gemm_1d" in target:
        sizes["1|G"] = 1 if rng.random() < 0.3 else sizes["G"]
    spec = {**operands, **results}
    eight, product = rng.choice(("f8e4m3fn", "f8e5m2")), rng.choice(("bf16", "f32"))
    source = rng.choice(sorted(ALLOWED["float"]))
    arrays = {}
    for i, (name, (types, _)) in enumerate(spec.items()):
        dtype = rng.choice(sorted(ALLOWED[types]))
        if types == "fp8":
            dtype = "f8e4m3fn" if "gemm" in target else eight
            if name == "lhs" and rng.random() < 0.3:
                dtype = "f8e5m2"
        elif types == "out":
            dtype = product
        elif types == "float":
            dtype = source
        dims = [sizes[axis] for axis in _axes(target, spec, name)]
        # Mapped nowhere: 2^44 bytes apart, above what user space may have.
        address = (1 << 56) + (i << 44) + 16 * rng.randrange(1 << 20)
        arrays[name] = Array(dtype, dims, address)
    if "accum" in arrays:
        if rng.randrange(4):  # else beside it, as where XLA forgot that they are one
            arrays["accum"].address = arrays["out"].address
    attributes: dict[str, tuple[str, Any]]
    if "gemm" in target:
        config = rng.randrange(-1, len(_C.configs(target)))
        attributes = {
            "config": ("s32", config),
            "num_sms": ("s32", rng.choice((0, 0, NUM_SMS, rng.randint(4, NUM_SMS)))),
        }
    else:
        attributes = {"pow2": ("pred", rng.random() < 0.5)} if quantizes(_name(target)) else {}
        if "activation" in target:
            attributes["activation"] = ("s32", rng.randint(0, 1))
    return Call(target, [arrays[n] for n in operands], [arrays[n] for n in results], attributes)


def mutate(rng: random.Random, call: Call):
    """Changes one thing of a call, mostly for the worse."""
    arrays = call.operands + call.results
    kind = rng.choice(
        ("dtype", "rank", "size", "size", "edge", "address", "attribute", "count", "swap", "alias")
    )
    call.mutations.append(kind)
    array = rng.choice(arrays)
    if kind == "dtype":
        array.dtype = rng.choice(list(DTYPES))
    elif kind == "rank":
        change = rng.randrange(4)
        if change == 0:
            array.dims.insert(rng.randint(0, len(array.dims)), rng.choice((1, 2, 128)))
        elif change == 1 and array.dims:
            array.dims.pop(rng.randrange(len(array.dims)))
        elif change == 2:
            array.dims.clear()
        else:
            array.dims[:] = [1] * rng.choice((4, 5, 8, 64))
    elif kind in ("size", "edge") and array.dims:
        i = rng.randrange(len(array.dims))
        size = array.dims[i]
        changed = (size - 1, size + 1, size + 128, size * 2, size * 128, -size, size // 2)
        array.dims[i] = rng.choice(changed if kind == "size" else _EDGES)
        array.dims[i] = max(min(array.dims[i], 2**63 - 1), -(2**63))
    elif kind == "address":
        array.address = rng.choice(
            (0, 1, 16, array.address + rng.choice((1, 2, 4, 8, 15)), 2**64 - 16, 2**63)
        )
    elif kind == "attribute":
        _mutate_attribute(rng, call)
    elif kind == "count":
        which = rng.choice((call.operands, call.results))
        change = rng.randrange(4)
        if change == 0 and which:
            which.pop(rng.randrange(len(which)))
        elif change == 1:
            which.insert(rng.randint(0, len(which)), Array("f32", [1], 1 << 40))
        elif change == 2:
            which.clear()
        else:
            which.extend([array] * rng.choice((1, 20)))
    elif kind == "swap":
        other = rng.choice(arrays)
        array.dtype, other.dtype = other.dtype, array.dtype
        array.dims, other.dims = other.dims, array.dims
    else:
        step = rng.choice((0, 0, 16, -16, 4096, -4096))
        array.address = (rng.choice(arrays).address + step) % 2**64


def _mutate_attribute(rng: random.Random, call: Call):
    name = rng.choice(list(call.attributes) or [""])
    change = rng.randrange(5) if call.attributes else 2
    if change == 0:
        del call.attributes[name]
    elif change == 1:
        kind = rng.choice(
            (
                "string",
                "array",
                "dictionary",
                "pred",
                "s32",
                "s64",
                "f32",
                "f64",
                "s8",
                "u32",
                "s16",
            )
        )
        value = {"string": "0", "array": [0, 1], "dictionary": None, "f32": 0.5, "f64": -1.0}
        call.attributes[name] = (kind, value.get(kind, rng.choice((0, 1))))
    elif change == 2:
        call.attributes[rng.choice(("", "a", "zz", "num_sm", "config2"))] = ("s32", 7)
    elif name in ("activation", "config", "num_sms"):
        call.attributes[name] = ("s32", rng.choice(_VALUES))


# --- the run --------------------------------------------------------------------------------------


def draw(seed: int, number: int) -> Call:
    """Call `number` of a seed."""
    rng = random.Random(f"{seed}:{number}")
    call = valid_call(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if call.operands + call.results:
            mutate(rng, call)
    return call


_NAMED = re.compile(
    r"(?P<attribute>attribute \w+) is |(?P<array>\w+) (?:is|has|and rhs both have) |\d+ (?P<count>operands|results);"
)


def judge(call: Call, driver: RecordingDriver, stream: int, *, initialize: bool = False) -> str:
    """Makes a call and holds what happened to the contract; "launched" or "refused".

    `initialize`: as XLA does, in its earlier stage too, which is to load what the call needs.

    Raises:
        AssertionError: the handler was wrong.
    """
    wrong = faults(call)
    counted = ("cuLaunchKernelEx", "cuMemcpyDtoDAsync_v2", "cuKernelGetFunction")
    before = [driver.calls(name) for name in counted]
    initialized = initialize and call.frame(stream, stage=ffi_frames.INITIALIZE).call(
        call.target, "CUDA"
    )
    loads = driver.calls("cuKernelGetFunction")
    error = call.frame(stream).call(call.target, "CUDA")
    launched, copied, _ = (driver.calls(n) - b for n, b in zip(counted, before, strict=True))
    if initialize:
        assert initialized is None or error is not None, f"refused, then launched: {initialized}"
        assert driver.calls("cuKernelGetFunction") == loads, "loaded when it was executed"
    assert not driver.complaints, driver.complaint
    assert not driver.depth, "a context was left on the stack"
    assert not driver.capture_mode, "the thread's capture mode was changed"
    if error is None:
        assert not wrong, f"accepted, but {sorted(wrong)} is at fault"
        assert launched == 1
        accum, out = call.operands[-1], call.results[0]
        apart = "accum" in call.target and accum.address != out.address
        assert copied == apart
        if apart:
            assert driver.last_copy == (out.address, accum.address, _bytes(out))
        launch = driver.last_launch
        assert launch.device == stream - 1
        return "launched"
    assert not launched and not copied, "refused after a launch"
    assert error.code == ffi_frames.INVALID_ARGUMENT, error
    assert wrong, f"refused, but valid: {error.message}"
    head, _, message = error.message.partition(": ")
    assert head == call.target, error.message
    match = _NAMED.match(message)
    assert match, f"names no argument: {error.message}"
    named = match["attribute"] or match["array"] or match["count"]
    assert named in wrong, f"{sorted(wrong)} is at fault, not {named}: {error.message}"
    return "refused"


def run(seed: int, calls: int, *, first: int = 0, seconds: float = float("inf")) -> dict[str, Any]:
    """Makes calls `first` to `first + calls`; counts by outcome, target and mutation.

    Raises:
        AssertionError: a handler was wrong; names the call.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    targets: collections.Counter[str] = collections.Counter()
    mutations: collections.Counter[str] = collections.Counter()
    start = time.monotonic()
    with RecordingDriver(num_devices=2, num_sms=NUM_SMS) as driver:
        for number in range(first, first + calls):
            call = draw(seed, number)
            if number % 500 == 499:
                driver.renew_contexts()
            try:
                stream, initialize = 1 + number % 2, number % 3 == 0
                outcomes[judge(call, driver, stream, initialize=initialize)] += 1
            except AssertionError as error:
                raise AssertionError(f"{seed}:{number}: {error}\n{call}") from error
            targets[call.target] += 1
            mutations.update(set(call.mutations))
            if number % 1000 == 0 and time.monotonic() - start > seconds:
                break
    return {
        "seed": seed,
        "calls": sum(outcomes.values()),
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(outcomes),
        "calls_by_target": dict(sorted(targets.items())),
        "calls_by_mutation": dict(sorted(mutations.items())),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="SEED:NUMBER", help="make one call again")
    args = parser.parse_args(argv)
    if args.only:
        seed, number = map(int, args.only.split(":"))
        run(seed, 1, first=number)
        print(draw(seed, number))
        return 0
    print(json.dumps(run(args.seed, args.calls), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
