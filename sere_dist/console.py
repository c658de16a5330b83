"""Where tables and progress bars go: the terminal, or a log of fixed width."""

import sys

from rich.console import Console

LOG_WIDTH = 120  # columns, where standard output is no terminal


def tables() -> Console:
    """Returns a console for tables on standard output."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH)


def progress() -> Console:
    """Returns a console for progress on standard error."""
    return Console(stderr=True)
