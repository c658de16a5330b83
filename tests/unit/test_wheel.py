"""A wheel that is built from the tree, in an environment that has little else."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("sere_dist", "calibration_jobs", "serve_apps")
OF_HELP = ("typer", "pyyaml")  # what `sere-dist --help` needs


def with_requirements(names: tuple[str, ...]) -> dict[str, Distribution]:
    """Returns the distributions of these names and of everything that they require."""
    found, waiting = {}, list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            needed = map(Requirement, found[name].requires or [])
            waiting += [each.name for each in needed if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the wheel and what `--help` needs, linked from this environment."""
    source, wheels, environment = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "environment"))
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (wheel,) = wheels.glob("sere_dist-*.whl")
    python = str(environment / "bin" / "python")
    subprocess.run([*pip, "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    for needed in with_requirements(OF_HELP).values():
        for top in {file.parts[0] for file in needed.files if file.parts[0] != ".."}:
            link = site_packages(environment) / top
            if not link.exists():
                link.symlink_to(needed.locate_file(top))
    return environment


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def run(environment: Path, *command: str) -> str:
    """Returns what a command of the environment prints. It runs where the tree can't be imported."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = (str(environment / "bin" / command[0]), *command[1:])
    done = subprocess.run(command, cwd=environment, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files_of(folder: Path) -> set[str]:
    paths = (path for name in PACKAGES for path in (folder / name).rglob("*"))
    return {str(path.relative_to(folder)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.long
def test_every_file_of_the_packages_is_in_it(environment):
    expected = files_of(ROOT)
    assert files_of(site_packages(environment)) == expected
    assert {
        "sere_dist/kernels/reroute.cu",
        "sere_dist/cli/report.html.jinja",
        "sere_dist/evaluation/tasks/paper.yaml",
        "calibration_jobs/runtime_env.yaml",
        "serve_apps/tiny_moe.yaml",
    } <= expected


@pytest.mark.long
def test_its_entry_points(environment):
    (metadata,) = site_packages(environment).glob("sere_dist-*.dist-info")
    entries = {(entry.group, entry.name, entry.value) for entry in Distribution.at(metadata).entry_points}
    assert entries == {
        ("console_scripts", "sere-dist", "sere_dist.cli.commands:app"),
        ("vllm.general_plugins", "sere_dist", "sere_dist.vllm_plugin:register"),
    }


@pytest.mark.long
def test_help_runs_from_it(environment):
    place = run(environment, "python", "-c", "import sere_dist; print(sere_dist.__file__)")
    assert Path(place).is_relative_to(site_packages(environment))
    commands = run(environment, "sere-dist", "--help")
    assert all(name in commands for name in ("inspect", "report", "place", "accuracy", "settings", "doctor"))
    assert "--suite" in run(environment, "sere-dist", "accuracy", "--help")
