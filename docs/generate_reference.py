"""Writes the tables of `reference.md`, `expert_kernels.md` and `design.md` in `docs/` from the code that they describe.

    python -m docs.generate_reference

A page is its own template: a table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, and the text around
it is written by hand. `tests/unit/test_reference_docs.py` fails when a table is stale.
"""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

import sere_dist
from calibration_jobs.calibrate import CalibrationConfig
from calibration_jobs.tune import TuningConfig
from sere_dist.cli.commands import app
from sere_dist.config import CHANGEABLE, ReroutingConfig
from sere_dist.environment import VARIABLES
from sere_dist.method.counters import COUNTERS
from sere_dist.testing.expert_choice import CAPABILITIES, LAYOUTS, QUANTISATIONS, chosen, pretended_gpu, verdict
from sere_dist.vllm_plugin.expert_kernels import DISPATCHERS, EXPERTS, Takes
from serve_apps.control import ControlConfig
from serve_apps.metrics import DESCRIPTIONS, KL_DESCRIPTIONS, REQUEST_DESCRIPTIONS, SETTINGS, SHADOW_DESCRIPTIONS
from serve_apps.sere import AppConfig, Pool
from serve_apps.settings import Trial

PAGES = [Path(__file__).parent / name for name in ("reference.md", "expert_kernels.md", "design.md")]
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->\n)", re.DOTALL)
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {"object": "mapping", "boolean": "`true`, `false`"}


# What `expert_choice.verdict` says, in the words of docs/expert_kernels.md.
FORMS = {"merged": "merged slots", "repeats": "repeated slots"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; a bar inside a cell is escaped."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def code(value: Any) -> str:
    return f"`{value}`"


def values_of(schema: dict[str, Any]) -> str:
    """Returns what a field accepts, in words, from its JSON schema."""
    (schema,) = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    if "enum" in schema:
        return ", ".join(map(code, schema["enum"]))
    kind = schema.get("type", "object")
    kind = schema.get("format") or KINDS.get(kind, kind)
    bounds = (f"{sign} {schema[bound]}" for bound, sign in BOUNDS.items() if bound in schema)
    return ", ".join([kind, *bounds])


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yields the name, the accepted values, the default and the description of each setting."""
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()):
            default = "required"
        elif (value := field.get("default")) is None:
            default = ""
        else:
            default = code(str(value).lower() if isinstance(value, bool) else value)
        yield name, values_of(field), default, field["description"]


def rerouting() -> str:
    rows = [
        (code(name), values, default, "yes" if name in CHANGEABLE else "", description)
        for name, values, default, description in fields(ReroutingConfig)
    ]
    return table(("setting", "values", "default", "may change while serving", "meaning"), rows)


def application() -> str:
    rows = [(code(name), *rest) for name, *rest in fields(AppConfig) if name not in Pool.model_fields]
    return table(("argument", "values", "default", "meaning"), rows)


def pool() -> str:
    return table(("argument", "values", "default", "meaning"), [(code(name), *rest) for name, *rest in fields(Pool)])


def fields_of(model: type[BaseModel]) -> str:
    return table(("field", "values", "default", "meaning"), [(code(name), *rest) for name, *rest in fields(model)])


def options(model: type[BaseModel]) -> str:
    rows = [
        (code(f"--{name.replace('_', '-')}"), values.replace(KINDS["boolean"], "flag"), default, description)
        for name, values, default, description in fields(model)
    ]
    return table(("option", "values", "default", "meaning"), rows)


def commands() -> str:
    """Returns a section for each command of `sere-dist`."""
    sections = []
    for path, command in leaves(typer.main.get_command(app), "sere-dist"):
        rows = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            is_option = parameter.param_type_name == "option"
            name = max(parameter.opts, key=len) if is_option else parameter.metavar or parameter.name.upper()
            has_default = parameter.default is not None and parameter.default is not False
            default = "required" if parameter.required else code(parameter.default) if has_default else ""
            rows.append((code(name), default, parameter.help or ""))
        sections.append(f"### `{path}`\n\n{' '.join(command.help.split())}\n")
        if rows:
            sections.append(table(("argument or option", "default", "meaning"), rows))
    return "\n".join(sections)


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the path and the command of every command that has none below it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from leaves(below, f"{path} {name}")


def metrics() -> str:
    rows = [
        (code(f"ray_sere_{name}_total"), "rank, drafts" + ", when" * (f"{name}_before" in COUNTERS), description)
        for name, description in DESCRIPTIONS.items()
    ]
    rows += [(code(f"ray_sere_{name}_total"), "rank", description) for name, description in SHADOW_DESCRIPTIONS.items()]
    rows += [(code(f"ray_sere_{name}_total"), "opted_out_by", about) for name, about in REQUEST_DESCRIPTIONS.items()]
    meanings = {name: description for name, _, _, description in fields(ReroutingConfig)}
    rows += [(code(f"ray_sere_{name}"), "", meanings[name]) for name in SETTINGS]
    for name, description in KL_DESCRIPTIONS.items():
        rows.append((code(f"ray_sere_{name}"), "bound" * (name == "estimated_kl"), description))
    return table(("metric", "labels", "meaning"), rows)


def counters() -> str:
    rows = []
    for name in COUNTERS:
        base = name.removesuffix("_before").removesuffix("_after")
        when = "" if base == name else f" {name.rpartition('_')[2].capitalize()} re-routing."
        rows.append((code(name), DESCRIPTIONS[base] + when))
    return table(("counter", "meaning"), rows)


def environment() -> str:
    return table(("variable", "meaning"), [(code(name), meaning) for name, meaning in VARIABLES.items()])


def interface() -> str:
    rows = []
    for name in sere_dist.__all__:
        summary, *_ = (inspect.getdoc(getattr(sere_dist, name)) or "").split("\n\n")
        rows.append((code(f"sere_dist.{name}"), " ".join(summary.split())))
    return table(("name", "what it is"), rows)


def expert_kernels() -> str:
    """Returns a section for each GPU: what vLLM picks there, and what the kernel gets."""
    sections = []
    for gpu, capability in CAPABILITIES.items():
        rows: dict[tuple[str, ...], list[str]] = {}
        with pretended_gpu(capability):
            for quantisation, layout in itertools.product(QUANTISATIONS, LAYOUTS):
                try:
                    experts = chosen(quantisation, layout)
                except (NotImplementedError, ValueError):
                    row = (quantisation, "none", "vLLM has no kernel for this")
                else:
                    try:
                        what = FORMS[verdict(experts, layout)]
                    except ValueError as refusal:
                        what = "refused: set " + code(re.findall(r'set (\w+="\w+")', str(refusal))[-1])
                    row = (quantisation, code(experts.__name__), what)
                rows.setdefault(row, []).append(layout.name)
        lines = [(quantisation, "; ".join(names), *rest) for (quantisation, *rest), names in rows.items()]
        header = ("experts", "layout", "vLLM's kernel", "it gets")
        sections.append(f"### {gpu} (sm_{capability})\n\n{table(header, lines)}")
    return "\n".join(sections)


def expert_classes() -> str:
    return classes(EXPERTS)


def dispatcher_classes() -> str:
    return classes(DISPATCHERS)


def classes(takes: dict[str, Takes]) -> str:
    rows = [(code(name), "yes" if each.repeats else "no", each.empty, each.because) for name, each in takes.items()]
    return table(("class", "repeated experts", "empty slots", "because it"), rows)


def families() -> str:
    """Returns what `python -m tests.families` found, family by family."""
    found = json.loads((Path(__file__).parents[1] / "tests" / "families.json").read_text())["families"]
    rows = []
    for family in found.values():
        served = family["served"] if family["served"] != "yes" else family["rerouted"]
        outcomes = (family["calibrated"], served)
        rows.append((family["models"], code(family["architecture"]), *(shortened(each) for each in outcomes)))
    return table(("models", "architecture", "calibrated", "served and re-routed on a CPU"), rows)


def shortened(outcome: str, most: int = 140) -> str:
    return outcome if outcome == "yes" else f"no: {outcome[:most]}{'...' if len(outcome) > most else ''}"


TABLES: dict[str, Callable[[], str]] = {
    "rerouting": rerouting,
    "application": application,
    "pool": pool,
    "trial": lambda: fields_of(Trial),
    "control": lambda: fields_of(ControlConfig),
    "commands": commands,
    "calibration": lambda: options(CalibrationConfig),
    "tuning": lambda: options(TuningConfig),
    "metrics": metrics,
    "counters": counters,
    "environment": environment,
    "interface": interface,
    "expert_kernels": expert_kernels,
    "expert_classes": expert_classes,
    "dispatcher_classes": dispatcher_classes,
    "families": families,
}


def generated(page: str) -> str:
    """Returns the page with every table made anew.

    Raises:
        KeyError: the page names a table that is not one of `TABLES`.
    """
    return BLOCK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(generated(path.read_text()))
