"""The help of the Ray jobs, which is made from their settings."""

import re

import pytest
import typer
from typer.testing import CliRunner

from calibration_jobs import calibrate, tune


@pytest.mark.parametrize("job", [calibrate, tune])
def test_help_names_types_defaults_and_what_is_required(job):
    app = typer.Typer(add_completion=False)
    app.command()(job.main)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "240"}).output
    lines = {found[1]: found[0] for found in re.finditer(r"│ --([a-z-]+) .*", shown)}
    required = {"model", "artifact", "batch"} if job is tune else {"model", "output"}
    assert {name for name, line in lines.items() if "[required]" in line} == required
    for name, kind, default in (
        ("num-samples", "<int>", "64" if job is tune else "400"),
        ("gpus-per-task", "<float>", None),
        ("device", "<auto|cpu|cuda>", "auto"),
        ("artifact" if job is tune else "output", "<path>", None),
        ("seed", "<int>", "0" if job is tune else None),
    ):
        assert f" {kind} " in lines[name]
        assert (f"[default: {default}]" in lines[name]) if default else ("[default" not in lines[name])
