"""Checks and times the GEMM kernels on a Hopper GPU, straight from their plans, beside torch's.

    python benchmarks/gemm_bench.py build DIR          cubins and the planner (needs nvcc and g++)
    python benchmarks/gemm_bench.py check DIR          every kind and configuration against float64
    python benchmarks/gemm_bench.py time DIR [--shapes dense,wgrad,...] [--json FILE]
    ncu ... python benchmarks/gemm_bench.py profile DIR --case 1d2d,4096,4096,7168,9

Kernels are launched through libcuda with the launch that csrc/host/gemm.cc plans, so what is
measured is device code and nothing else. `check` runs each group of cases in a process of its own
with a time limit: a kernel that hangs costs its group only.

Times: CUDA events around one launch, after a write of 8 GB that evicts L2 and lets the power budget
recover (`--flush`; 0.2 GB keeps the device near its power limit); normal random data, quantized by
blocks; the median of the repetitions, peers alternating with ours in the same process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ("gemm_1d2d_bf16", "gemm_1d2d_f32", "gemm_1d1d_bf16", "gemm_1d1d_f32")
KINDS = {"1d2d": 0, "1d1d": 1, "grouped": 2, "masked": 3, "grouped_wgrad": 4}


def build_planner(folder: Path):
    sources = [str(ROOT / "benchmarks/plan_abi.cc"), str(ROOT / "csrc/host/gemm.cc")]
    library = str(folder / "libplan.so")
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-o", library, *sources], check=True
    )


def use_installed(folder: Path):
    """The kernels that the package carries, and a planner from this checkout's sources."""
    import jaxfp8._ffi

    folder.mkdir(parents=True, exist_ok=True)
    for cubin in jaxfp8._ffi.image_directory().glob("*.cubin"):
        link = folder / cubin.name
        link.unlink(missing_ok=True)
        link.symlink_to(cubin)
    build_planner(folder)


def build(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    target = "-gencode=arch=compute_90a,code="

    def image(name: str):
        source = ROOT / "csrc/kernels/gemm" / f"{name}.cu"
        ptx, cubin = folder / f"{name}.ptx", folder / f"{name}.cubin"
        flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
        command = ["nvcc", *flags, "--ptx", target + "compute_90a", "-o", str(ptx), str(source)]
        subprocess.run(command, check=True)
        subprocess.run(
            ["nvcc", "-cubin", target + "sm_90a", "-o", str(cubin), str(ptx)], check=True
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(image, IMAGES))
    build_planner(folder)


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint32),
    ]


@dataclass
class Launch:
    """A planned launch, ready to go again and again."""

    driver: Driver
    function: ctypes.c_void_p
    config: _Config
    params: object
    keep: tuple
    plan: dict

    def __call__(self):
        self.driver.call(
            "cuLaunchKernelEx", ctypes.byref(self.config), self.function, self.params, None
        )


class Driver:
    """libcuda in torch's context, and the planner."""

    def __init__(self, folder: Path):
        import torch

        torch.cuda.init()
        torch.zeros(1, device="cuda")
        self.folder = folder
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.planner = ctypes.CDLL(str(folder / "libplan.so"))
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.modules: dict[str, ctypes.c_void_p] = {}

    def call(self, name: str, *args):
        code = getattr(self.cuda, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {text.value.decode() if text.value else code}")

    def configs(self, kind: str) -> list[str]:
        names = []
        for i in range(self.planner.num_configs(KINDS[kind])):
            buffer = ctypes.create_string_buffer(128)
            self.planner.config_name(KINDS[kind], i, buffer, 128)
            names.append(buffer.value.decode())
        return names

    def function(self, image: str, name: str, smem: int) -> ctypes.c_void_p:
        if image not in self.modules:
            module = ctypes.c_void_p()
            path = str(self.folder / f"{image}.cubin").encode()
            self.call("cuModuleLoad", ctypes.byref(module), path)
            self.modules[image] = module
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self.modules[image], name.encode())
        self.call("cuFuncSetAttribute", function, 8, smem)  # MAX_DYNAMIC_SHARED_SIZE_BYTES
        return function

    def tensor_map(self, spec: dict):
        rank = len(spec["dims"])
        raw = (ctypes.c_uint8 * 192)()
        address = (ctypes.addressof(raw) + 63) // 64 * 64
        u64, u32 = ctypes.c_uint64, ctypes.c_uint32
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(address),
            (0, 9, 7)[spec["type"]],  # UINT8, BFLOAT16, FLOAT32
            rank,
            ctypes.c_void_p(spec["base"]),
            (u64 * rank)(*spec["dims"]),
            (u64 * (rank - 1))(*spec["strides"]),
            (u32 * rank)(*spec["box"]),
            (u32 * rank)(*[1] * rank),
            0,
            spec["swizzle"],
            3,  # L2 promotion of 256 bytes, as csrc/driver/driver.cc
            0,
        )
        return raw, address

    def argument(self, arg):
        """A planned argument's memory, and its address."""
        if isinstance(arg, dict) and "bytes" in arg:
            cells = ctypes.c_uint64 * (len(arg["bytes"]) // 8)
            cell = cells.from_buffer_copy(bytes(arg["bytes"]))
        elif isinstance(arg, dict):
            return self.tensor_map(arg)
        else:
            width, value = arg
            cell = (ctypes.c_int32 if width == 4 else ctypes.c_int64)(value)
        return cell, ctypes.addressof(cell)

    def prepare(
        self, kind, m, n, k, groups, tensors, *, shared=False, accum=False, config=-1, num_sms=0
    ) -> Launch:
        """tensors: lhs, its scale, rhs, its scale, group_sizes or None, out."""
        import torch

        dtypes = {
            torch.float8_e4m3fn: 0,
            torch.float8_e5m2: 1,
            torch.bfloat16: 2,
            torch.float32: 4,
        }
        pointers = [t.data_ptr() if t is not None else 0 for t in tensors]
        buffer = ctypes.create_string_buffer(1 << 14)
        failed = self.planner.plan_gemm_json(
            KINDS[kind],
            (ctypes.c_int64 * 4)(m, n, k, groups),
            (ctypes.c_int * 3)(*(dtypes[tensors[i].dtype] for i in (0, 2, 5))),
            int(shared),
            int(accum),
            (ctypes.c_void_p * 6)(*pointers),
            config,
            num_sms,
            self.sms,
            buffer,
            len(buffer),
        )
        if failed:
            raise ValueError(buffer.value.decode())
        plan = json.loads(buffer.value)
        arguments = [self.argument(arg) for arg in plan["args"]]
        attribute = _Attribute(id=4)  # CLUSTER_DIMENSION
        attribute.value[0:3] = plan["cluster"], 1, 1
        config_ = _Config(
            grid=(plan["grid"], 1, 1),
            block=(plan["block"], 1, 1),
            smem=plan["smem"],
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=ctypes.pointer(attribute),
            count=1,
        )
        function = self.function(plan["image"], plan["kernel"], plan["smem"])
        params = (ctypes.c_void_p * len(arguments))(*(address for _, address in arguments))
        keep = (tensors, *(cell for cell, _ in arguments), attribute)
        return Launch(self, function, config_, params, keep, plan)


# ---- Operands


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def quantize_rows(x, dtype):
    """x (R, K) to data (R, K) and scale (KB, R): 1x128 blocks."""
    import torch

    rows, k = x.shape
    blocks = cdiv(k, 128)
    padded = torch.zeros(rows, blocks * 128, device=x.device)
    padded[:, :k] = x
    padded = padded.view(rows, blocks, 128)
    scale = (padded.abs().amax(2) / torch.finfo(dtype).max).clamp(min=2.0**-126)
    data = (padded / scale[:, :, None]).to(dtype).view(rows, -1)[:, :k].contiguous()
    return data, scale.t().contiguous()


def quantize_blocks(x, dtype):
    """x (G, N, K) to data (G, N, K) and scale (G, NB, KB): 128x128 blocks."""
    import torch

    groups, n, k = x.shape
    nb, kb = cdiv(n, 128), cdiv(k, 128)
    padded = torch.zeros(groups, nb * 128, kb * 128, device=x.device)
    padded[:, :n, :k] = x
    padded = padded.view(groups, nb, 128, kb, 128)
    scale = (padded.abs().amax((2, 4)) / torch.finfo(dtype).max).clamp(min=2.0**-126)
    data = (padded / scale[:, :, None, :, None]).to(dtype).view(groups, nb * 128, kb * 128)
    return data[:, :n, :k].contiguous(), scale.contiguous()


def dequantize_rows(data, scale):
    k = data.shape[1]
    return data.double() * scale.t().double().repeat_interleave(128, 1)[:, :k]


def dequantize_blocks(data, scale):
    _, n, k = data.shape
    full = scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    return data.double() * full[:, :n, :k]


@dataclass
class Problem:
    kind: str
    m: int
    n: int
    k: int
    groups: int = 1
    sizes: tuple[int, ...] | None = None
    lhs: str = "float8_e4m3fn"
    rhs: str = "float8_e4m3fn"
    out: str = "bfloat16"
    shared: bool = False
    accum: bool = False

    def operands(self, seed=0):
        import torch

        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, device="cuda", generator=generator)

        one = self.shared or self.kind in ("grouped", "grouped_wgrad")
        lhs_rows = self.m if one else self.groups * self.m
        lhs = quantize_rows(normal(lhs_rows, self.k), getattr(torch, self.lhs))
        rhs_dtype = getattr(torch, self.rhs)
        if self.kind == "1d1d":
            rhs = quantize_rows(normal(self.groups * self.n, self.k), rhs_dtype)
        elif self.kind == "grouped_wgrad":
            rhs = quantize_rows(normal(self.n, self.k), rhs_dtype)
        else:
            rhs = quantize_blocks(normal(self.groups, self.n, self.k), rhs_dtype)
        rows = self.m if self.kind == "grouped" else self.groups * self.m
        out = normal(rows, self.n).to(getattr(torch, self.out))
        if not self.accum:
            out.fill_(float("nan"))
        sizes = None
        if self.sizes is not None:
            sizes = torch.tensor(self.sizes, dtype=torch.int32, device="cuda")
        return [*lhs, *rhs, sizes, out]

    def reference(self, tensors):
        """float64, from the quantized operands."""
        import torch

        lhs_data, lhs_scale, rhs_data, rhs_scale, _, out = tensors
        m, n, k, groups = self.m, self.n, self.k, self.groups
        lhs = dequantize_rows(lhs_data, lhs_scale)
        if self.kind in ("1d1d", "grouped_wgrad"):
            rhs = dequantize_rows(rhs_data, rhs_scale)
        else:
            rhs = dequantize_blocks(rhs_data, rhs_scale).view(-1, k)
        ref = torch.zeros(out.shape, dtype=torch.float64, device="cuda")
        start = padded = 0
        for g in range(groups):
            size = max(0, self.sizes[g]) if self.sizes else 0
            if self.kind in ("1d2d", "1d1d"):
                a = lhs if self.shared else lhs[g * m : (g + 1) * m]
                ref[g * m : (g + 1) * m] = a @ rhs[g * n : (g + 1) * n].t()
            elif self.kind == "grouped":
                end = min(m, start + size)
                ref[start:end] = lhs[start:end] @ rhs[g * n : (g + 1) * n].t()
                start = end
            elif self.kind == "masked":
                end = g * m + min(m, size)
                ref[g * m : end] = lhs[g * m : end] @ rhs[g * n : (g + 1) * n].t()
            else:
                end = min(k - 128 * groups, start + size)
                width = cdiv(end - start, 128) * 128
                span = slice(padded, padded + width)
                ref[g * m : (g + 1) * m] = lhs[:, span] @ rhs[:, span].t()
                start, padded = end, padded + width
        return ref + out.double() if self.accum else ref

    def flops(self) -> float:
        """Useful floating-point operations."""
        tokens = sum(self.sizes) if self.sizes else None
        if self.kind in ("1d2d", "1d1d"):
            return 2.0 * self.groups * self.m * self.n * self.k
        if self.kind == "grouped_wgrad":
            return 2.0 * self.m * self.n * tokens
        return 2.0 * tokens * self.n * self.k


# ---- check

E5M2 = "float8_e5m2"


def check_groups(folder: Path) -> dict[str, list[tuple[Problem, int]]]:
    """Named groups of (problem, configuration), of those that the folder's planner has."""
    planner = ctypes.CDLL(str(folder / "libplan.so"))
    wide, narrow = (range(planner.num_configs(KINDS[kind])) for kind in ("1d2d", "1d1d"))
    p = Problem
    odd = [
        (1, 16, 16),
        (1, 7, 48),
        (63, 129, 144),
        (129, 127, 272),
        (257, 321, 1040),
        (300, 200, 400),
    ]
    groups = {}
    for c in wide:
        out = ("bfloat16", "float32")[c % 2]
        groups[f"1d2d config {c}"] = [(p("1d2d", *s, out=out), c) for s in odd] + [
            (p("1d2d", 1000, 1544, 2048, out="float32"), c),
            (p("1d2d", 1000, 1544, 2048), c),
            (p("1d2d", 200, 264, 400, 3), c),
            (p("1d2d", 200, 264, 400, 3, shared=True, out="float32"), c),
            (p("1d2d", 200, 264, 400, accum=True), c),
            (p("1d2d", 200, 261, 400, accum=True, out="float32"), c),
            (p("1d2d", 200, 264, 400, accum=True, out="float32"), c),
            (p("1d2d", 200, 264, 400, lhs=E5M2), c),
            (p("1d2d", 4096, 4096, 4096), c),
        ]
        g8 = (0, 1, 127, 128, 129, 300, 0, 77)
        groups[f"grouped config {c}"] = [
            (p("grouped", 762, 264, 400, 8, g8, out=out), c),
            (p("grouped", 1000, 264, 400, 8, g8), c),
            (p("grouped", 700, 261, 400, 8, g8), c),
            (p("grouped", 500, 264, 272, 3, (200, -5, 900)), c),
            (p("grouped", 500, 264, 272, 3, (200, 0, 100), accum=True), c),
            (p("grouped", 3000, 264, 272, 300, (7, 0, 13) * 100), c),
            (p("masked", 300, 264, 400, 8, g8, out=out), c),
            (p("masked", 300, 264, 400, 3, (-1, 999, 31), accum=True), c),
        ]
    for c in narrow:
        out = ("bfloat16", "float32")[c % 2]
        groups[f"1d1d config {c}"] = [(p("1d1d", *s, out=out), c) for s in odd] + [
            (p("1d1d", 1000, 1544, 2048, out="float32"), c),
            (p("1d1d", 200, 264, 400, 3), c),
            (p("1d1d", 200, 264, 400, accum=True), c),
            (p("1d1d", 200, 264, 400, accum=True, out="float32"), c),
            (p("1d1d", 200, 264, 400, lhs=E5M2), c),
            (p("1d1d", 200, 264, 400, rhs=E5M2, out="float32"), c),
            (p("1d1d", 4096, 4096, 4096, out="float32"), c),
        ]
        tokens = 1024 + 128 * 8
        g8 = (0, 1, 127, 128, 129, 300, 0, 77)
        groups[f"grouped_wgrad config {c}"] = [
            (p("grouped_wgrad", 264, 392, tokens, 8, g8, out=out), c),
            (p("grouped_wgrad", 264, 392, tokens, 8, g8, out="float32", accum=True), c),
            (p("grouped_wgrad", 264, 391, tokens, 8, g8, accum=True), c),
            (p("grouped_wgrad", 264, 392, 512 + 128 * 3, 3, (128, 999, 5), out="float32"), c),
            (p("grouped_wgrad", 129, 127, 1024 + 128 * 64, 64, (13, -1, 19, 0) * 16), c),
        ]
    return groups


def check_case(driver: Driver, problem: Problem, config: int) -> tuple[bool, float]:
    """Whether every element is right and a second run gives the same bits; the error's norm."""
    import torch

    tensors = problem.operands(seed=config)
    reference = problem.reference(tensors)
    before = tensors[5].clone()
    launch = driver.prepare(
        problem.kind,
        problem.m,
        problem.n,
        problem.k,
        problem.groups,
        tensors,
        shared=problem.shared,
        accum=problem.accum,
        config=config,
    )
    launch()
    torch.cuda.synchronize()
    first = tensors[5].clone()
    tensors[5].copy_(before)
    launch()
    torch.cuda.synchronize()
    same = torch.equal(first, tensors[5])
    got = first.double()
    norm = reference.norm().clamp(min=1e-30)
    error = float((got - reference).norm() / norm)
    # bfloat16 rounds once. In a block the tensor core keeps about 14 bits.
    tolerance = 2.5e-3 if problem.out == "bfloat16" else 1e-3
    worst = float((got - reference).abs().max() / reference.abs().max().clamp(min=1e-30))
    good = bool(torch.isfinite(got).all()) and error < tolerance and worst < 1e-2 and same
    return good, error


def check(folder: Path, only: str | None, limit: float) -> int:
    groups = check_groups(folder)
    if only is not None:
        driver = Driver(folder)
        bad = 0
        worst = {"bfloat16": 0.0, "float32": 0.0}
        for problem, config in groups[only]:
            good, error = check_case(driver, problem, config)
            worst[problem.out] = max(worst[problem.out], error)
            if not good:
                bad += 1
                print(f"  WRONG {problem} config {config}: error {error:.2e}", flush=True)
        print(
            f"{'ok   ' if not bad else 'WRONG'} {only}: {len(groups[only])} cases, largest error "
            f"{worst['bfloat16']:.1e} bf16, {worst['float32']:.1e} f32",
            flush=True,
        )
        return bad

    def run(name: str) -> tuple[int, str]:
        command = [sys.executable, __file__, "check", str(folder), "--only", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as timeout:
            return 1, f"HANG  {name}: over {limit} s\n{(timeout.stdout or b'').decode()}"
        tail = done.stderr.strip().splitlines()[-3:] if done.returncode > 1 else []
        return done.returncode, done.stdout + "\n".join(tail)

    failed = 0
    with ThreadPoolExecutor(12) as pool:
        for code, text in pool.map(run, groups):
            failed += code != 0
            print(text.rstrip(), flush=True)
    print(f"check: {failed} of {len(groups)} groups failed")
    return failed


# ---- time

DENSE = [
    (4096, 2112, 7168),
    (4096, 24576, 1536),
    (4096, 32768, 512),
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (8192, 8192, 8192),
]
SMALL = [
    (m, n, k) for m in (1, 16, 64, 128) for n, k in ((4096, 7168), (7168, 2048), (24576, 1536))
]
WGRAD = [  # (N, K of the layer, tokens)
    (7168, 2112, 4096),
    (24576, 1536, 4096),
    (7168, 16384, 4096),
    (4096, 7168, 8192),
    (7168, 2048, 8192),
    (8192, 8192, 8192),
]


def _ragged(groups: int, mean: int, seed=1) -> tuple[int, ...]:
    """U(0.7, 1.3) of the mean."""
    import random

    generator = random.Random(seed)
    return tuple(int(mean * generator.uniform(0.7, 1.3)) for _ in range(groups))


def _zipf(groups: int, total: int) -> tuple[int, ...]:
    weights = [1 / (i + 1) for i in range(groups)]
    return tuple(int(total * w / sum(weights)) for w in weights)


def time_problems() -> dict[str, list[Problem]]:
    p = Problem
    grouped, wgrad = [], []
    for groups, mean, n, k in ((4, 8192, 4096, 7168), (8, 4096, 7168, 2048), (8, 4096, 4096, 7168)):
        for sizes in (
            (mean,) * groups,
            _ragged(groups, mean),
            _zipf(groups, groups * mean),
        ):
            grouped.append(p("grouped", sum(sizes), n, k, groups, sizes))
            tokens = cdiv(sum(sizes), 128) * 128 + 128 * groups
            wgrad.append(p("grouped_wgrad", n, k, tokens, groups, sizes, out="float32"))
    masked = [
        p("masked", 4096, n, k, groups, _ragged(groups, mean))
        for groups, mean in ((6, 1024), (32, 192), (32, 20))
        for n, k in ((4096, 7168), (7168, 2048))
    ]
    return {
        "dense": [p("1d2d", *s) for s in DENSE],
        "small": [p("1d2d", *s) for s in SMALL],
        "wgrad": [p("1d1d", *s, out="float32") for s in WGRAD],
        "accum": [p("1d1d", *s, out="float32", accum=True) for s in WGRAD],
        "grouped": grouped,
        "grouped_wgrad": wgrad,
        "masked": masked,
    }


class Timer:
    def __init__(self, flush_gigabytes: float):
        import torch

        self.torch = torch
        size = int(flush_gigabytes * 1e9)
        self.flush = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self, calls: dict[str, object], repeats=15) -> dict[str, float]:
        """Median microseconds of each call."""
        cuda = self.torch.cuda
        for call in calls.values():
            call()
        events = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                self.flush.zero_()
                start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                events[name].append((start, end))
        cuda.synchronize()
        return {
            name: 1e3 * statistics.median(s.elapsed_time(e) for s, e in pairs)
            for name, pairs in events.items()
        }


def peers(problem: Problem, tensors) -> dict[str, object]:
    """torch's kernels for the same product, by name."""
    import torch

    if problem.kind not in ("1d2d", "1d1d") or problem.groups != 1:
        return {}
    lhs, lhs_scale, rhs, rhs_scale = tensors[:4]
    a, b = lhs.to(torch.bfloat16), rhs.view(problem.n, problem.k).to(torch.bfloat16)
    result = {"torch bf16": lambda: a @ b.t()}
    kb = cdiv(problem.k, 128)
    if problem.kind == "1d2d":
        pitch = cdiv(kb, 4) * 4  # cuBLASLt's layout of 128x128 scales
        padded = torch.zeros(cdiv(problem.n, 128), pitch, device="cuda")
        padded[:, :kb] = rhs_scale[0]
        scale_b = padded[:, :kb].t()
        out_dtype = torch.bfloat16
    else:
        scale_b = rhs_scale
        out_dtype = torch.float32

    def block_wise():
        return torch._scaled_mm(
            lhs,
            rhs.view(problem.n, problem.k).t(),
            scale_a=lhs_scale.t(),
            scale_b=scale_b,
            out_dtype=out_dtype,
        )

    one = torch.ones((), device="cuda")

    def per_tensor():
        return torch._scaled_mm(
            lhs,
            rhs.view(problem.n, problem.k).t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    for name, call in (("cublaslt block", block_wise), ("cublaslt tensor", per_tensor)):
        try:
            call()
            torch.cuda.synchronize()
            result[name] = call
        except Exception as error:  # a peer that this torch lacks is named, and left out
            print(f"  no {name}: {str(error).splitlines()[0][:150]}")
    return result


def describe_device() -> dict:
    import torch

    query = "name,driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {"device": torch.cuda.get_device_name(0), "smi": smi, "torch": torch.__version__}


def measure(folder: Path, shapes: list[str], path: Path | None, repeats: int, flush: float):
    driver, timer = Driver(folder), Timer(flush)
    results = {"before": describe_device(), "rows": []}
    print(results["before"])
    for name in shapes:
        for problem in time_problems()[name]:
            tensors = problem.operands()

            def prepare(config, p=problem, t=tensors):
                return driver.prepare(
                    p.kind,
                    p.m,
                    p.n,
                    p.k,
                    p.groups,
                    t,
                    shared=p.shared,
                    accum=p.accum,
                    config=config,
                )

            calls = {}
            for i, config in enumerate(driver.configs(problem.kind)):
                if problem.m > 512 and config.startswith("m64"):
                    continue
                calls[config] = prepare(i)
            chosen = prepare(-1).plan
            picked = next((c for c, call in calls.items() if call.plan == chosen), chosen["kernel"])
            ours = set(calls)
            calls.update(peers(problem, tensors))
            times = timer(calls, repeats)
            tera = {c: problem.flops() / t / 1e6 for c, t in times.items()}
            best = max(ours, key=tera.get)
            sizes = (
                problem.sizes and f" G{problem.groups} {min(problem.sizes)}..{max(problem.sizes)}"
            )
            print(
                f"{name} {problem.m}x{problem.n}x{problem.k}{sizes or ''}: best {best} "
                f"{times[best]:.1f} us {tera[best]:.0f} TF; picked {picked} "
                f"{tera.get(picked, 0):.0f} | "
                + ", ".join(f"{c.replace(' cluster ', '/')} {v:.0f}" for c, v in tera.items()),
                flush=True,
            )
            results["rows"].append(
                {
                    "family": name,
                    **{f: getattr(problem, f) for f in ("kind", "m", "n", "k", "groups", "sizes")},
                    "out": problem.out,
                    "accum": problem.accum,
                    "picked": picked,
                    "microseconds": times,
                    "tflops": tera,
                }
            )
            del tensors, calls
    results["after"] = describe_device()
    print(results["after"])
    if path is not None:
        path.write_text(json.dumps(results, indent=1))


def profile(folder: Path, case: str):
    """Launches one case twice, for a profiler."""
    import torch

    kind, *numbers = case.split(",")
    m, n, k, config = map(int, numbers)
    out = "float32" if kind == "1d1d" else "bfloat16"
    problem, driver = Problem(kind, m, n, k, out=out), Driver(folder)
    launch = driver.prepare(kind, m, n, k, 1, problem.operands(), config=config)
    launch()
    launch()
    torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("build", "check", "time", "profile"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", help="check: one group, in this process")
    parser.add_argument("--limit", type=float, default=60, help="check: seconds a group")
    parser.add_argument("--shapes", default="dense,small,wgrad,accum,grouped,grouped_wgrad,masked")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--flush", type=float, default=8.0, help="time: gigabytes written between")
    parser.add_argument("--json", type=Path, help="time: write every figure here")
    parser.add_argument("--case", help="profile: kind,m,n,k,config")
    args = parser.parse_args()
    if args.command == "build":
        build(args.folder)
    elif args.command == "profile":
        profile(args.folder, args.case)
    elif args.command == "check":
        sys.exit(1 if check(args.folder, args.only, args.limit) else 0)
    else:
        measure(args.folder, args.shapes.split(","), args.json, args.repeats, args.flush)


if __name__ == "__main__":
    main()
