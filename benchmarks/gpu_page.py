"""The page for people that `benchmarks.gpu` writes, in Markdown."""

from typing import Any

from benchmarks.common import ranged
from benchmarks.steps import FAILED, PASSED, TIMED_OUT


def page(steps: dict[str, dict[str, Any]]) -> str:
    """Returns the page about steps that were run: by name, what `gpu.json` holds."""
    lines = ["# On a GPU", "", "`python -m benchmarks.gpu` wrote this; `gpu.json` and `gpu-logs/` hold the rest.", ""]
    for about in ("machine", "versions"):
        lines += dict.fromkeys(f"- {listed(step[about])}" for step in steps.values())
    lines += ["", "| step | question | outcome | seconds | limit |", "|---|---|---|---|---|"]
    for name, step in steps.items():
        took = f"{step['seconds']:g}" if "seconds" in step else ""
        lines.append(f"| {name} | {step['answers']} | {step['status']} | {took} | {step['limit_seconds']:g} |")
    not_done = [f"- {name}: {it['status']}, {it['reason']}" for name, it in steps.items() if it["status"] != PASSED]
    lines += ["", "## What could not be done, and why", "", *(not_done or ["All of it was done."])]
    for name, step in steps.items():
        lines += section(name, step)
    return "\n".join(lines) + "\n"


def listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def section(name: str, step: dict[str, Any]) -> list[str]:
    """Returns a step's numbers and, if it went wrong, its last words."""
    result, went_wrong = step.get("result"), step["status"] in (FAILED, TIMED_OUT)
    if not result and not went_wrong:
        return []
    lines = ["", f"## {name}", "", f"`{step['command']}`", "", *numbers_of(result or {})]
    if went_wrong:
        lines += ["", "```", *step["last_lines"]["out"], *step["last_lines"]["err"], "```"]
    return lines


def numbers_of(result: dict[str, Any]) -> list[str]:
    """Returns a table for each list of rows in what a benchmark printed as JSON, and an item for all else."""
    lines = []
    for name, value in result.items():
        if name in ("command", "machine", "versions"):
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            columns = list(dict.fromkeys(column for row in value for column in row))
            lines += ["", f"| {' | '.join(map(cell, columns))} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(cell(row.get(column, '')) for column in columns)} |" for row in value] + [""]
        elif isinstance(value, dict):
            lines += numbers_of(value)
        else:
            lines.append(f"- {name.replace('_', ' ')}: {cell(value)}")
    return lines


def cell(value: Any) -> str:
    is_spread = isinstance(value, dict) and "median" in value
    return ranged(value) if is_spread else str(value).replace("\n", " ").replace("|", "\\|")
