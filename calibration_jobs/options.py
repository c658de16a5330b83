"""A command whose options are a job's settings, each of which may stand in a YAML file instead."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import torch
import typer
import yaml
from pydantic import ValidationError
from ray.exceptions import RayError
from rich.markup import escape

from calibration_jobs.job import JobConfig


def make_command(settings: type[JobConfig], run: Callable[[Any], None]) -> Callable[..., None]:
    """Returns a function for Typer, which calls `run` with the settings.

    What `run` raises about the user's input, the disk or the cluster ends the command with one line.
    """

    def main(config: Path | None, **flags: Any) -> None:
        given = {name: value for name, value in flags.items() if value is not None}
        try:
            from_file = yaml.safe_load(config.read_text()) if config else {}
            if not isinstance(from_file, dict):
                raise ValueError(f"{config} must hold a mapping of options to values")
            run(settings.model_validate({str(k): v for k, v in from_file.items()} | given))
        except ValidationError as error:
            problems = "; ".join(
                f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']}" if e["loc"] else e["msg"]
                for e in error.errors(include_url=False)
            )
            raise SystemExit(f"error: {problems}") from error
        except torch.OutOfMemoryError as error:
            raise SystemExit(
                f"error: a GPU ran out of memory; take fewer or shorter texts at a time: {error}"
            ) from error
        except (ValueError, OSError, MemoryError, yaml.YAMLError, RayError) as error:
            raise SystemExit(f"error: {error}") from error

    main.__doc__ = run.__doc__
    main.__signature__ = _signature(settings)  # ty: ignore[missing-attribute]  # which `inspect` looks for
    return main


def _signature(settings: type[JobConfig]) -> inspect.Signature:
    """Every setting is an option of the command: the settings are written down once."""
    config = typer.Option(help="YAML file with any of the other options, written with _ for -.")
    parameters: dict[str, Any] = {"config": Annotated[Path | None, config]}
    for name, field in settings.model_fields.items():
        is_flag = field.annotation is bool
        note = ""  # A required option may stand in the YAML file, so Typer does not know that it is required.
        if field.is_required():
            note = " [required]"
        elif field.default is not None and field.default is not False:
            note = f" [default: {field.default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=escape(f"{field.description}{note}"),
            metavar=None if is_flag else _metavar(field.annotation),
        )
        # The settings parse and check the texts that they are given.
        parameters[name] = Annotated[bool | None, option] if is_flag else Annotated[str | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in parameters.items()]
    )


def _metavar(annotation: Any) -> str:
    """Returns how Typer would write an option of this type: its choices, or the type's name."""
    if get_origin(annotation) is Literal:
        return f"<{'|'.join(get_args(annotation))}>"
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    names = ("path" if get_origin(kind) is list else kind.__name__.lower() for kind in kinds)  # lists stand in files
    return f"<{'|'.join(names)}>"
