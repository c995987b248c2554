"""The documentation: it builds without a warning, names every public function, and its examples run."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import jaxfp8

ROOT = pathlib.Path(__file__).parents[1]


def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    # `strict: true` in mkdocs.yml makes a broken link, anchor or API name an error.
    environment = {**os.environ, "JAXFP8_DOCS_EXECUTE": "false", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="jaxfp8.ragged_dot"' in (tmp_path / "api" / "index.html").read_text()


def test_every_public_name_is_in_the_api_reference():
    named = set(re.findall(r"^::: jaxfp8\.(\w+)", (ROOT / "docs/api.md").read_text(), re.M))
    assert set(jaxfp8.__all__) - {"__version__"} - named == set()


@pytest.mark.slow
def test_the_essentials_run():
    environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    command = [sys.executable, "examples/essentials.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kept for the backward pass" in done.stdout
