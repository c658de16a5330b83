"""Our commands in the test's own process, where nothing is imported twice."""

from collections.abc import Callable

import typer
from typer.testing import CliRunner, Result


def invoke(main: Callable | typer.Typer, *options: str) -> Result:
    """Runs a command as a shell does. What it raises, other than its exit with a message, is raised here."""
    app = main
    if not isinstance(app, typer.Typer):
        app = typer.Typer()
        app.command()(main)
    return CliRunner().invoke(app, options, catch_exceptions=False)
