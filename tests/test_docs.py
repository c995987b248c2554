"""The documentation: it builds without a warning, names all that is public and no file that is not there, and runs."""

import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxfp8

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), ROOT / "tests/README.md"])
PAGES = [page for page in PAGES if page.exists() and page.name != "CHANGELOG.md"]  # names what was


def prose(page):
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Without --quiet: mkdocs counts only warnings that it shows."""
    directory = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "JAXFP8_DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"}
    # nbconvert seeks its templates below sys.prefix, but it may be another environment's that this one is built on.
    spec = importlib.util.find_spec("nbconvert")
    environment["JUPYTER_PATH"] = str(pathlib.Path(spec.origin).parents[4] / "share/jupyter")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(directory)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return directory


@pytest.mark.full
def test_every_public_name_is_in_the_api_reference_once(site):
    anchors = re.findall(r'id="(jaxfp8[\w.]*)"', (site / "api" / "index.html").read_text())
    wanted = {
        f"jaxfp8.{name}" for name in {*jaxfp8.__all__, *jaxfp8._INTEGRATIONS} - {"__version__"}
    }
    for module in [m for m in sorted(wanted) if inspect.ismodule(getattr(jaxfp8, m.split(".")[1]))]:
        wanted |= {f"{module}.{name}" for name in public_names(importlib.import_module(module))}
    assert wanted - set(anchors) == set()
    assert {a for a in anchors if anchors.count(a) > 1} == set()


def public_names(module):
    """What a module offers: its `__all__`, else what it defines or re-exports by a public name."""
    if hasattr(module, "__all__"):
        return module.__all__
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "jaxfp8").startswith("jaxfp8")
    ]


@pytest.mark.full
def test_every_page_is_in_the_navigation_and_linked_from_the_readme(site):
    pages = {p.name for p in (ROOT / "docs").iterdir() if p.suffix in (".md", ".py")} - {"index.md"}
    linked = set(re.findall(r"\(docs/([\w.]+)", (ROOT / "README.md").read_text()))
    assert pages - linked == set()
    assert (site / "reliability" / "index.html").exists()  # mkdocs itself warns of a page outside


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_of_files_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page)):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_section_stands_twice(page):
    sections = re.findall(r"^#+ .*", prose(page), re.M)
    assert sorted(sections) == sorted(set(sections))


CODE = ("jaxfp8", "csrc", "tests", "tools", "benchmarks", "examples")
ROOTS = (
    "jaxfp8|csrc|tests|benchmarks|examples|docs|tools|cmake|build_backend|licenses|\\.ci|\\.github"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_is_named_is_there(page):
    text = page.read_text()
    for name in re.findall(rf"(?<![\w/.-])((?:{ROOTS})/[\w./*-]*)", text):
        name = name.rstrip(".")
        assert "NAME" in name or list(ROOT.glob(name)), name
    for name in re.findall(r"`([\w*]+\.(?:py|cc|cuh?|h|sh))`", text):  # its folder stands beside it
        assert any(any((ROOT / folder).rglob(name)) for folder in CODE), name


def test_the_code_map_names_every_folder():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    folders = {str(pathlib.PurePath(f).parent) for f in tracked.stdout.split()} - {"."}
    folders = {f for f in folders if not f.startswith("tests/artifacts/")}
    text = (ROOT / "docs/architecture.md").read_text()
    assert {f for f in folders if f"`{f}/`" not in text} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_name_of_ours_in_a_page_exists(page):
    names = re.findall(r"(?<!/)\bjaxfp8((?:\.[A-Za-z_]\w*)+)", page.read_text())
    for name in {n for n in names if not n.endswith(".json")}:  # tuned.json, jaxfp8.cdx.json
        functools.reduce(getattr, name[1:].split("."), jaxfp8)


def readme_space():
    """What the README's examples take for granted: a model, a loss, and the arrays of an expert-parallel device."""
    import equinox as eqx
    import flax.linen as nn
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(256, 256, rngs=rngs)
            self.head = nnx.Linear(256, 8, rngs=rngs)

    def loss(params, batch):
        return jnp.mean(jnp.square(jnp.tanh(batch @ params["up"]) @ params["down"]))

    return {
        "loss": loss,
        "params": {"up": jnp.full((128, 256), 0.01), "down": jnp.full((256, 128), 0.01)},
        "batch": jnp.ones((128, 128)),
        "nn": nn,
        "nnx_model": Model(nnx.Rngs(0)),
        "eqx_model": eqx.nn.MLP(128, 128, 128, 1, key=jax.random.key(0)),
        "num_experts": 8,
        "router": jnp.full((1024, 8), 0.01, jnp.bfloat16),
        "experts_up": jnp.full((8, 1024, 2, 128), 0.01),
        "experts_down": jnp.full((8, 128, 1024), 0.01),
    }


@pytest.mark.full
def test_the_mixture_of_the_guide_runs():
    code, several = code_blocks(ROOT / "docs/mixtures.md", "python")
    space = {"jax": jax, "jnp": jnp, "jaxfp8": jaxfp8, "functools": functools, "P": jax.P}
    exec(compile(code, "mixtures.md", "exec"), space)
    shapes = {
        "router": (128, 16),
        "up": (16, 128, 2, 128),
        "down": (16, 128, 128),
        "shared up": (128, 2, 128),
        "shared down": (128, 128),
    }
    params = {name: jnp.full(shape, 0.1) for name, shape in shapes.items()}
    y = space["layer"](jnp.ones((2, 8, 128), jnp.bfloat16), params)
    assert (y.shape, y.dtype) == ((2, 8, 128), jnp.bfloat16)

    space |= {
        "mesh": jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,)),
        "x": jnp.ones((16, 128)),
        "expert": jnp.arange(32).reshape(16, 2) % 16,
        "gate": jnp.ones((16, 2)),
        "up": params["up"],
        "down": params["down"],
    }
    exec(compile(several, "mixtures.md, several devices", "exec"), space)
    assert np.isfinite(space["y"]).all()


@pytest.mark.full
def test_the_examples_of_the_readme_run():
    blocks = code_blocks(ROOT / "README.md", "python")
    space = readme_space()
    for number, code in enumerate(blocks):
        exec(compile(code, f"README.md, block {number + 1}", "exec"), space)
    assert isinstance(space["eqx_model"].layers[0], jaxfp8.equinox.Linear)
    assert isinstance(space["nnx_model"].up.dot_general, jaxfp8.flax.DotGeneral)
    want = np.asarray(space["x"], np.float64) @ np.asarray(space["w"], np.float64)
    error = np.asarray(space["y"], np.float64) - want
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(want)
    assert np.isfinite(np.asarray(space["grad"](space["w"], space["x"]))).all()

    devices = jax.make_mesh((8,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("expert")
    layer = jax.shard_map(space["mixture"], mesh=devices, in_specs=spec, out_specs=spec)
    tokens, gate = jnp.ones((64, 1024), jnp.bfloat16), jnp.ones((64, 1))
    y = jax.jit(layer)(tokens, jnp.arange(64)[:, None] % 8, gate, space["experts"])
    sums = np.asarray(space["experts"], np.float64).sum(1)[np.arange(64) % 8]
    assert np.linalg.norm(np.asarray(y, np.float64) - sums) < 0.05 * np.linalg.norm(sums)


def test_readme_and_contributing_stay_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120


def test_hooks_are_linters_that_ci_runs_in_versions_that_the_project_pins():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    programs = {hook["entry"].split()[0] for hook in hooks} - {".venv/bin/python"}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    pinned = {r.split("==")[0].strip() for r in extras["test"] if "==" in r}
    package = {"lint-imports": "import-linter"}
    ci = (ROOT / ".ci/run").read_text()
    for program in programs:
        name = program.removeprefix(".venv/bin/")  # the environment's own: no version to disagree
        assert package.get(name, name) in pinned and program in ci, program
    assert {"ruff", "mypy", "clang-format", "lint-imports"} == {p.split("/")[-1] for p in programs}


@pytest.mark.slow
def test_the_essentials_run():
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "examples/essentials.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kept for the backward pass" in done.stdout
    assert "not timed on cpu" in done.stdout  # an imitation has no time worth printing
