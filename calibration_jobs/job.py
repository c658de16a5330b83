"""What the Ray jobs have in common: options that are settings, texts, and the workers that a cluster has for them."""

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import ray
import torch
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray.exceptions import RayError
from rich.markup import escape
from transformers import AutoTokenizer

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.texts import read_texts, tokenise

# Ray unpacks the --working-dir of a job below such a folder, and deletes it afterwards.
RAY_WORKING_DIR = "working_dir_files"
FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"


class JobConfig(BaseModel):
    """Settings of any job. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(description="Checkpoint folder or Hugging Face id of the model.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of the Hugging Face model.")

    dataset: str = Field(
        default=FINEWEB, description="Parquet, JSON Lines or text file, a folder of such files, or a Hub dataset."
    )
    subset: str | None = Field(
        default=None, description=f"Subset of a Hub dataset; {FINEWEB_SUBSET} of the default dataset."
    )
    split: str = Field(default="train", description="Split of a Hub dataset.")
    column: str = Field(default="text", description="Column that holds the texts.")

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where tasks run; auto takes GPUs if the cluster has any."
    )
    cpus_per_task: int = Field(default=1, ge=1, description="CPUs that Ray reserves per task, where tasks run on CPUs.")
    gpus_per_task: float | None = Field(
        default=None, gt=0, description="GPUs that Ray reserves per task, such as 0.5. On GPUs, the default is 1."
    )
    accelerator_type: str | None = Field(
        default=None, min_length=1, description="Ray's name of the GPU to run on, such as H100."
    )
    memory_per_task: float | None = Field(default=None, gt=0, description="Memory in GiB that Ray reserves per task.")

    @model_validator(mode="after")
    def _default_subset(self) -> "JobConfig":
        if self.dataset == FINEWEB and self.subset is None:
            self.subset = FINEWEB_SUBSET
        return self

    def token_ids(self, checkpoint: Checkpoint, seed: int | None, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Returns the token ids of the dataset's texts; arguments after the seed as in `texts.tokenise`."""
        texts = read_texts(self.dataset, subset=self.subset, split=self.split, column=self.column, seed=seed)
        tokenizer = AutoTokenizer.from_pretrained(self.model, revision=checkpoint.revision)
        return tokenise(texts, tokenizer, *args, **kwargs)


@dataclass(frozen=True)
class Workers:
    """What the cluster has for the tasks of a calibration."""

    device: Literal["cpu", "cuda"]
    options: dict[str, Any]  # Ray's, of each task

    @classmethod
    def of_cluster(cls, config: JobConfig, may_start: bool = True) -> "Workers":
        """Connects to the cluster, or starts Ray here if it may."""
        with contextlib.suppress(ConnectionError):  # no cluster is up, and none may be started
            ray.init(address=None if may_start else "auto", ignore_reinit_error=True, log_to_driver=False)
        has_gpus = any(resources.get("GPU") for resources in nodes())
        device = ("cuda" if has_gpus else "cpu") if config.device == "auto" else config.device
        options: dict[str, Any] = {"num_cpus": config.cpus_per_task if device == "cpu" else 1}
        if gpus := config.gpus_per_task or (1 if device == "cuda" else None):
            options["num_gpus"] = gpus
        if config.accelerator_type:
            options["accelerator_type"] = config.accelerator_type
        if config.memory_per_task:
            options["memory"] = int(config.memory_per_task * 2**30)
        return cls(device, options)

    @property
    def count(self) -> int:
        """Tasks at a time. It changes: nodes come when tasks wait for them, and are lost."""
        each = {"CPU": self.options["num_cpus"]}
        if "num_gpus" in self.options:
            each["GPU"] = self.options["num_gpus"]
        if "accelerator_type" in self.options:
            each[f"accelerator_type:{self.options['accelerator_type']}"] = 0.001  # what Ray reserves of it
        fit = (min(int(resources.get(kind, 0) / amount) for kind, amount in each.items()) for resources in nodes())
        return max(1, sum(fit))

    def __str__(self) -> str:
        gpus, kind = self.options.get("num_gpus"), self.options.get("accelerator_type", "GPU")
        each = f"{gpus:g} {kind}" if gpus else f"{self.options['num_cpus']} CPU"
        where = f"{len(nodes())} nodes" if ray.is_initialized() else "no cluster"
        return f"{self.count} at a time, {each} each ({where})"


def nodes() -> list[dict[str, float]]:
    """Returns the resources of each living node; of none without a cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []


def refuse_lost_output(output: Path, option: str = "--output") -> None:
    """Raises ValueError where a relative output would be written into a job's temporary working directory."""
    if not output.is_absolute() and RAY_WORKING_DIR in Path.cwd().parts:
        raise ValueError(
            f"{option} {output} is relative to the job's working directory, which Ray deletes after the job: "
            "give an absolute path on storage that outlives it"
        )


def changed_keys(there: dict[str, Any], job: dict[str, Any]) -> list[str]:
    """Returns the names of what two jobs don't have in common."""
    return sorted(name for name in {*there, *job} if there.get(name) != job.get(name))


def command(settings: type[JobConfig], run: Callable[[Any], None]) -> Callable[..., None]:
    """Returns a command for Typer whose options are the settings, each of which may stand in a YAML file instead.

    What `run` raises about the user's input, the disk or the cluster ends it with one line.
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
    main.__signature__ = _signature(settings)
    return main


def _signature(settings: type[JobConfig]) -> inspect.Signature:
    """Every setting is an option of the command: the settings are written down once."""
    config = typer.Option(help="YAML file with any of the other options, written with _ for -.")
    parameters = {"config": Annotated[Path | None, config]}
    for name, field in settings.model_fields.items():
        kind = bool if field.annotation is bool else str  # the settings parse and check what they are given
        note = ""  # A required option may stand in the YAML file, so Typer does not know that it is required.
        if field.is_required():
            note = " [required]"
        elif field.default is not None and field.default is not False:
            note = f" [default: {field.default}]"
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=escape(f"{field.description}{note}"),
            metavar=None if kind is bool else _metavar(field.annotation),
        )
        parameters[name] = Annotated[kind | None, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [inspect.Parameter(name, keyword, default=None, annotation=kind) for name, kind in parameters.items()]
    )


def _metavar(annotation: Any) -> str:
    """Returns how Typer would write an option of this type: its choices, or the type's name."""
    if get_origin(annotation) is Literal:
        return f"<{'|'.join(get_args(annotation))}>"
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    return f"<{'|'.join(kind.__name__.lower() for kind in kinds)}>"
