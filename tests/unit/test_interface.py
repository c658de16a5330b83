"""The names that others may import, and what importing them does not load."""

import ast
import importlib
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import sere_dist
from examples.application import ROOT

ROOMS = ("benchmarks", "calibration_jobs", "deploy", "examples", "serve_apps", "studies")

IMPORTS = """
import sys
from sere_dist import Artifact, ReroutingConfig, expert_projection, expert_similarity, reroute, reroute_projection
import torch
loaded = [name for name in ("vllm", "ray", "cuda.core") if name in sys.modules]
assert not loaded, loaded
assert not torch.cuda.is_initialized()
"""
METHOD = """
import sys
import sere_dist.method.cka, sere_dist.method.counters, sere_dist.method.placement, sere_dist.method.projection
import sere_dist.method.rerouting, sere_dist.method.similarity
others = {name.split(".")[0] for name in sys.modules} & {"pydantic", "transformers", "safetensors", "ray", "vllm"}
assert not others, others
"""
NOTHING = "import sys, sere_dist, sere_dist.config; assert 'torch' not in sys.modules"


@pytest.mark.long
@pytest.mark.parametrize("program", [IMPORTS, METHOD, NOTHING], ids=["interface", "method", "settings"])
def test_what_an_import_loads(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names():
    assert all(callable(getattr(sere_dist, name)) for name in sere_dist.__all__)
    with pytest.raises(AttributeError, match="module 'sere_dist' has no attribute 'rerout'"):
        sere_dist.rerout  # noqa: B018


def rooms_imported(file: Path) -> set[str]:
    """Returns the rooms of this project that a module imports: folders of sere_dist, modules beside them, jobs."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.ImportFrom) and node.module):
            continue
        package, *inside = node.module.split(".")
        if package == "sere_dist":
            found |= {inside[0]} if inside else {alias.name for alias in node.names}
        elif package in (*ROOMS, "tests"):
            found.add(package)
    return found


def test_rooms_import_one_way():
    """No room of the package imports one that imports it, nor anything outside the package."""
    imports = defaultdict(set)
    package = Path(sere_dist.__file__).parent
    for file in package.glob("*/*.py"):
        imports[file.parent.name] |= rooms_imported(file) - {file.parent.name}
    for file in set(package.glob("*.py")) - {package / "__init__.py"}:
        imports[file.stem] |= rooms_imported(file)
    assert len(imports) > 12
    assert set().union(*imports.values()) <= imports.keys()
    TopologicalSorter(imports).prepare()  # raises CycleError, with the circle


def commands() -> list[str]:
    """Returns the modules that are commands: those whose last line runs their `main`."""
    files = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if file.read_text().endswith("typer.run(main)\n")
    ]


@pytest.mark.parametrize("module", commands())
def test_a_command_says_what_it_takes(module):
    """Typer refuses some types of options, and says so only when a command runs."""
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    said = CliRunner().invoke(app, ["--help"])
    assert said.exit_code == 0 and "Usage" in said.output, said.exception
