"""What the build made: cubins, the PTX beside them, ptxas' reports, and plans that fit them."""

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxfp8 import _C, _ffi
from tests import emulator
from tests.test_ffi_errors import ALLOWED, SIZES, TARGETS, CustomCall

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "csrc" / "kernels").glob("*/*.cu"))
IMAGES = _ffi.images()
needs_kernels = pytest.mark.skipif(not IMAGES, reason="this build holds no kernels")
each_image = pytest.mark.parametrize("image", IMAGES)

REGISTER_FILE = 65536  # 32-bit registers of an SM (CUDA programming guide, compute capability 9.0)
MAX_SHARED = 227 * 1024  # bytes a CTA may ask for (likewise)


def artifact(image, suffix):
    return _ffi.image_directory() / f"{image}{suffix}"


# --- the files ------------------------------------------------------------------------------------


def test_every_kernel_file_is_compiled():
    if not _C.build_info()["nvcc"]:
        pytest.skip("this build was made without nvcc")
    assert list(IMAGES) == [source.stem for source in KERNELS]


def test_handlers_are_built_for_the_oldest_ffi():
    """Built against newer headers, the package could not be loaded by every JAX it supports."""
    assert _C.build_info()["ffi"] == (0, 3)


@each_image
def test_the_cubin_holds_the_kernels_of_its_ptx(image):
    code = artifact(image, ".cubin").read_bytes()
    assert code[:4] == b"\x7fELF"
    entries = emulator.module(artifact(image, ".ptx")).entries
    assert entries
    assert all(f".text.{name}\0".encode() in code for name in entries)


@each_image
def test_the_ptx_is_for_sm_90a(image):
    assert re.search(r"^\.target sm_90a$", artifact(image, ".ptx").read_text(), re.M)


def kernels_in_report(image):
    """(kernel, registers, spilled bytes) of what ptxas reports."""
    report = artifact(image, ".ptxas.txt").read_text()
    return [
        (name, int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers",
            report,
            re.S,
        )
    ]


@each_image
def test_ptxas_reports_every_kernel(image):
    reported = {name for name, _, _ in kernels_in_report(image)}
    assert reported == set(emulator.module(artifact(image, ".ptx")).entries)


@each_image
def test_ptxas_did_not_serialize_wgmma(image):
    """It says so with C75xx notes alone: no warning, and no status."""
    assert not re.findall(r".*C75\d\d.*", artifact(image, ".ptxas.txt").read_text())


@each_image
def test_registers_fit_the_launch_bounds(image):
    module = emulator.module(artifact(image, ".ptx"))
    for name, registers, _ in kernels_in_report(image):
        directives = module.header(name).directives
        threads = max(directives.get("maxntid") or directives["reqntid"])
        ctas = directives.get("minnctapersm", (1,))[0]
        assert registers * threads * ctas <= REGISTER_FILE, name


@pytest.mark.parametrize("image", [i for i in IMAGES if not i.startswith("gemm")])
def test_quantizers_do_not_spill(image):
    assert not [(name, spilled) for name, _, spilled in kernels_in_report(image) if spilled]


# --- machine code ---------------------------------------------------------------------------------


def _nvdisasm():
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(location).glob("cu*/bin/nvdisasm"):
            return str(path)
    return shutil.which("nvdisasm")


@functools.cache
def machine_code(image):
    """Kernel -> its lines, labels included."""
    disassembler = _nvdisasm()
    if disassembler is None:
        pytest.skip("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run(
        [disassembler, "-c", artifact(image, ".cubin")], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^\.text\.(\w+):$", text, flags=re.M)
    return dict(zip(parts[1::2], (p.splitlines() for p in parts[2::2]), strict=True))


def innermost_loops(lines, opcode):
    """The smallest natural loops that hold `opcode`, each as its lines.

    A natural loop is what reaches a back edge without passing its header, where that leads nowhere
    else (Aho et al., "Compilers", 9.6.6). Code order would not do: the retry of a wait lies far
    from its loop.
    """
    # Basic blocks begin at labels and after branches.
    code = [re.sub(r"^\s*/\*\w+\*/\s*", "", line) for line in lines]
    starts = [0]
    for i, text in enumerate(code):
        if re.fullmatch(r"\.L_x_\d+:", text):
            starts.append(i)
        if re.search(r"\bBRA\b", text) or re.match(r"EXIT\b", text):
            starts.append(i + 1)
    starts = sorted({i for i in starts if i < len(lines)})
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    labels = {code[block[0]][:-1]: i for i, block in enumerate(blocks)}
    predecessors = [[] for _ in blocks]
    branches = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        target = re.match(r"(@!?U?P\w+\s+)?BRA\b.*`\((\.L_x_\d+)\)", last)
        if target:
            branches.append((i, labels[target[2]]))
            predecessors[labels[target[2]]].append(i)
        if not re.match(r"(BRA|EXIT)\b", last) and i + 1 < len(blocks):
            predecessors[i + 1].append(i)

    def body(end, header):
        seen, todo = {header}, [end]
        while todo:
            block = todo.pop()
            if block not in seen:
                seen.add(block)
                todo += predecessors[block]
        return seen

    holds = {i for i, block in enumerate(blocks) if any(opcode in lines[j] for j in block)}
    bodies = [body(end, header) for end, header in branches]
    loops = [b for b in bodies if 0 not in b and b & holds]
    return [
        [lines[j] for i in sorted(b) for j in blocks[i]]
        for b in loops
        if not any(other < b for other in loops)
    ]


@pytest.mark.parametrize("image", [i for i in IMAGES if i.startswith("gemm")])
@pytest.mark.representatives()
def test_gemm_loops_multiply_in_the_fp8_tensor_cores_and_never_spill(image):
    for kernel, lines in machine_code(image).items():
        loops = innermost_loops(lines, "QGMMA")
        assert loops, kernel
        for loop in loops:
            spills = [line for line in loop if re.search(r"\b(LDL|STL)\b", line)]
            assert not spills, f"{kernel}: {spills}"


# --- plans and kernels agree ----------------------------------------------------------------------


def plans(target):
    """The plan of a call for every combination of types, every configuration, and with and without a gate."""
    for gate in (1, 2) if "activation" in target else (2,):
        yield from plans_of(CustomCall(target, sizes={**SIZES, "A": gate}))


def plans_of(call):
    spec = {a: t for a, (t, _) in call.spec.items() if a != "accum"}
    configs = range(-1, len(_C.configs(call.target)))
    free = [a for a, types in spec.items() if len(ALLOWED[types]) > 1]
    for dtypes, config in itertools.product(
        itertools.product(*(sorted(ALLOWED[spec[a]]) for a in free)), configs
    ):
        call.dtypes.update(zip(free, dtypes, strict=True))
        if "accum" in call.dtypes:
            call.dtypes["accum"] = call.dtypes["out"]
        if "config" in call.attributes:
            call.attributes["config"] = type(call.attributes["config"])(config)
        try:
            yield call.plan()
        except ValueError as error:
            # Allowed by the contract, but not compiled: two types that differ, or E5M2 twice.
            assert re.search(r"allowed (is|are)|must be|f8e5m2", str(error)), error


@needs_kernels
@pytest.mark.parametrize("target", TARGETS)
def test_every_plan_names_a_kernel_and_fits_it(target):
    seen = set()
    for plan in plans(target):
        seen.add(plan.kernel)
        module = emulator.module(artifact(plan.image, ".ptx"))
        assert plan.kernel in module.entries
        kernel = module.header(plan.kernel)
        threads = kernel.directives.get("reqntid") or kernel.directives["maxntid"]
        assert plan.block[0] * plan.block[1] * plan.block[2] <= threads[0]
        assert plan.dynamic_smem <= MAX_SHARED
        assert all(g % c == 0 for g, c in zip(plan.grid, plan.cluster, strict=True))
        sizes = [
            len(a.get("bytes", bytes(128)))
            if isinstance(a, dict)
            else 8
            if isinstance(a, str)
            else None
            for a in plan.args
        ]
        assert len(sizes) == len(kernel.parameters)
        for size, parameter in zip(sizes, kernel.parameters, strict=True):
            assert size in (parameter.size, None) and (size or parameter.size in (4, 8))
    assert seen


@needs_kernels
def test_every_compiled_kernel_is_reached_by_a_plan():
    planned = {(plan.image, plan.kernel) for target in TARGETS for plan in plans(target)}
    compiled = {
        (image, name)
        for image in IMAGES
        for name in emulator.module(artifact(image, ".ptx")).entries
    }
    assert compiled - planned == set()


def test_a_plan_prints_what_a_launch_is():
    text = str(CustomCall("gemm_1d2d").plan())
    first, second, *arguments = text.splitlines()
    assert re.fullmatch(r"gemm_1d2d_f32: gemm_1d2d_\w+", first)
    assert re.fullmatch(
        r"  grid \d+x1x1, block \d+x1x1, cluster \dx\dx1, \d+ bytes of dynamic shared memory",
        second,
    )
    assert [a.split(":")[0].strip() for a in arguments] == [str(i) for i in range(len(arguments))]
    assert any("tensor map of lhs, u8 (" in a and "swizzle 128B" in a for a in arguments)


# --- the build itself -----------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    """The in-tree build backend, on a machine without any nvcc."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    backend = importlib.import_module("jaxfp8_build")
    for variable in ("CUDA_HOME", "CUDA_PATH", "JAXFP8_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backend, "_has_nvcc", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    monkeypatch.chdir(ROOT)
    return backend


def cuda_requirements(backend):
    found = [backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()]
    assert all("jaxlib==0.10.2" in requirements for requirements in found)
    wheel, editable = ({r for r in f if r.startswith("nvidia-")} for f in found)
    assert wheel == editable
    return wheel


def test_without_nvcc_the_build_asks_for_its_wheels_all_pinned(backend):
    requirements = cuda_requirements(backend)
    assert len(requirements) == 5
    assert all(re.fullmatch(r"nvidia-[a-z-]+==13\.0\.\d+", r) for r in requirements)


def test_the_wheels_are_not_asked_for_where_they_are_not_needed(backend, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_has_nvcc", lambda: True)
        assert not cuda_requirements(backend)
    with monkeypatch.context() as patch:
        patch.setenv("JAXFP8_CUDA", "off")
        assert not cuda_requirements(backend)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert not cuda_requirements(backend)
    with monkeypatch.context() as patch:
        patch.setattr(backend.platform, "machine", lambda: "aarch64")
        assert not cuda_requirements(backend)


def test_nvcc_is_found_on_path_and_in_cuda_home(tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    script = ROOT / "cmake" / "find_nvcc.py"

    def found(**environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        out = subprocess.run(
            [sys.executable, "-S", script],
            env={**clean, "PATH": "", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return out.stdout.strip()

    assert found(PATH=str(nvcc.parent)) == str(nvcc)
    assert found(CUDA_HOME=str(tmp_path)) == str(nvcc)
    assert found(CUDA_PATH=str(tmp_path)) == str(nvcc)


def _cmake():
    """A CMake that can configure the project here, and its generator's program."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None or importlib.util.find_spec("nanobind") is None:
        return None
    version = re.search(r"(\d+)\.(\d+)", subprocess.check_output([cmake, "--version"], text=True))
    return cmake if tuple(map(int, version.groups())) >= (3, 26) else None


@pytest.mark.skipif(_cmake() is None, reason="needs CMake 3.26 and nanobind")
@pytest.mark.skipif(not (shutil.which("make") and shutil.which("c++")), reason="needs a compiler")
@pytest.mark.parametrize("cuda", ["off", "on", "auto", "maybe"])
@pytest.mark.representatives()
def test_a_build_without_kernels_says_so_or_fails(tmp_path, cuda):
    (tmp_path / "cmake").symlink_to(ROOT / "cmake")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    (tmp_path / "CMakeLists.txt").write_text((ROOT / "CMakeLists.txt").read_text())
    (tmp_path / "bin").mkdir()
    for tool in ("make", "c++", "cc", "as", "ld", "ar", "ranlib", "uname"):
        if path := shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(path)
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho release 12.2, V12.2.140\n")
    nvcc.chmod(0o755)

    def configure(**environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        return subprocess.run(
            [
                _cmake(),
                "-G",
                "Unix Makefiles",
                f"-DPython_EXECUTABLE={sys.executable}",
                "-S",
                tmp_path,
                "-B",
                tmp_path / "build",
            ],
            env={**clean, "PATH": str(tmp_path / "bin"), "JAXFP8_CUDA": cuda, **environment},
            capture_output=True,
            text=True,
        )

    old = configure(CUDA_HOME=str(tmp_path / "toolkit"))
    if cuda == "off":
        assert "no kernels, because JAXFP8_CUDA=OFF" in old.stdout
        assert old.returncode == 0
    elif cuda == "maybe":
        assert "JAXFP8_CUDA is MAYBE; allowed are ON, OFF and AUTO" in old.stderr
    else:
        assert old.returncode != 0
        assert "nvcc 12.2.140 at" in old.stderr
        assert "the kernels need 12.3" in " ".join(old.stderr.split())


# --- supply chain ---------------------------------------------------------------------------------


def test_every_requirement_is_locked():
    """Else CI, whose pip sees the locked archives alone, cannot install: run .ci/lock."""
    script = ROOT / ".ci" / "lock"
    result = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_locked_package_has_a_version_and_a_hash():
    for path in sorted((ROOT / ".ci" / "locked").glob("*.txt")):
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for line in text.splitlines()[1:]:
            assert re.fullmatch(r"\S+==\S+( ; \S+ == \S+)?( ?--hash=sha256:[0-9a-f]{64})+", line), (
                line
            )


def test_the_licences_of_what_is_compiled_in_are_those_of_the_packages():
    nanobind = pytest.importorskip("nanobind")
    licence = importlib.metadata.distribution("nanobind").read_text("licenses/LICENSE")
    assert (ROOT / "licenses" / "nanobind.txt").read_text() == licence
    header = Path(nanobind.include_dir()).parent / "ext/robin_map/include/tsl/robin_map.h"
    comment = header.read_text().split("*/")[0].removeprefix("/**\n")
    lines = [line.removeprefix(" *").removeprefix(" ") for line in comment.splitlines()]
    want = (ROOT / "licenses" / "robin-map.txt").read_text()
    assert "\n".join(lines).strip() == want.strip()
