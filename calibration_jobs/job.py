"""What the Ray jobs have in common: settings, and the texts that they name."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sere_dist.artifact.hub import check_may_push, push
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.texts import load_tokenizer, read_texts, tokenise
from sere_dist.files import is_repository

# Ray unpacks the --working-dir of a job below such a folder, and deletes it afterwards.
RAY_WORKING_DIR = "working_dir_files"
FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"


class Source(BaseModel):
    """One dataset of a mixture. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    dataset: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # of its number of texts among all


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
    column: str = Field(
        default="text", description="Column that holds the texts, or conversations for the model's chat template."
    )
    mixture: list[Source] | None = Field(
        default=None,
        min_length=1,
        description="YAML file with a list of datasets to use together. Each has a dataset, and may have a subset, "
        "split, column and weight: its share of the texts.",
    )

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

    push_to_hub: str | None = Field(
        default=None,
        description="Repository of the Hugging Face Hub, ORG/NAME, to push the artifact to at the end. One that is "
        "missing is made, a private one.",
    )

    @field_validator("push_to_hub")
    @classmethod
    def _is_repository(cls, value: str | None) -> str | None:
        if value is not None and not is_repository(value):
            raise ValueError(f"{value} is no repository of the Hub: write ORG/NAME")
        return value

    @field_validator("mixture", mode="before")
    @classmethod
    def _read_mixture(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        try:
            return yaml.safe_load(Path(value).expanduser().read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{value} can't be read as YAML: {error}") from error

    @model_validator(mode="after")
    def _one_dataset_or_a_mixture(self) -> "JobConfig":
        alone = {"dataset", "subset", "split", "column"} & self.model_fields_set
        if self.mixture and alone:
            raise ValueError(f"--mixture says which texts to use: leave out --{' and --'.join(sorted(alone))}")
        if self.dataset == FINEWEB and self.subset is None:
            self.subset = FINEWEB_SUBSET
        return self

    @property
    def sources(self) -> list[Source]:
        """Where the texts come from."""
        own = Source(dataset=self.dataset, subset=self.subset, split=self.split, column=self.column)
        return self.mixture or [own]

    @property
    def source_names(self) -> list[str]:
        """What to call each source: its dataset, and what tells it from another source of the same dataset."""
        datasets = [source.dataset for source in self.sources]
        return [
            source.dataset
            if datasets.count(source.dataset) == 1
            else " ".join(filter(None, (source.dataset, source.subset, source.split, source.column)))
            for source in self.sources
        ]

    @property
    def dataset_name(self) -> str:
        """What an artifact says of its texts."""
        if not self.mixture:
            return self.dataset
        whole = sum(source.weight for source in self.mixture)
        return ", ".join(f"{source.dataset} ({source.weight / whole:.0%})" for source in self.mixture)

    def check_push(self) -> None:
        """Raises OSError if the artifact may not be pushed: before hours of work, not after."""
        if self.push_to_hub is not None:
            check_may_push(self.push_to_hub)

    def push(self, artifact: Path) -> None:
        """Pushes the artifact that the job has written, if it shall.

        Raises:
            OSError: it can't be pushed. It is on disk, and the message says how to push it later.
        """
        if self.push_to_hub is None:
            return
        try:
            push(artifact, self.push_to_hub)
        except OSError as error:
            raise OSError(
                f"{error}. Nothing is lost: the artifact is at {artifact}. Push it with "
                f"`sere-dist push {artifact} {self.push_to_hub}`"
            ) from error

    def read_token_ids(
        self,
        checkpoint: Checkpoint,
        seed: int | None,
        num_samples: int,
        max_length: int,
        *,
        min_length: int | None = None,
        max_tokens: int | None = None,
        distinct: bool = False,
    ) -> tuple[list[list[int]], list[str]]:
        """Returns the token ids of the texts, and the name of each text's source; see `sere_dist.calibration.texts`.

        Each dataset of a mixture gives its share of `num_samples`, and of `max_tokens`. Texts of all datasets
        alternate, two at a time, so that batches have all of them, and so has every second text.

        Raises:
            ValueError: a dataset can't be read, or has no text that is long enough.
        """
        tokenizer = load_tokenizer(self.model, checkpoint.revision)
        weights, placed = [source.weight for source in self.sources], []
        counts = in_shares(num_samples, weights)
        budgets = in_shares(max_tokens, weights) if max_tokens else [None] * len(counts)
        for source, name, count, budget in zip(self.sources, self.source_names, counts, budgets, strict=True):
            if not count:
                raise ValueError(f"--num-samples {num_samples} leaves no text for {source.dataset}; take more")
            where = source.model_dump(exclude={"weight"})
            ids = tokenise(
                read_texts(**where, seed=seed),
                tokenizer,
                count,
                max_length,
                min_length=min_length,
                max_tokens=budget,
                distinct=distinct,
            )
            placed += [((place // 2 + 0.5) / len(ids), of_text, name) for place, of_text in enumerate(ids)]
        placed.sort(key=lambda each: each[0])
        return [of_text for _, of_text, _ in placed], [name for _, _, name in placed]


def in_shares(number: int, weights: Sequence[float]) -> list[int]:
    """Parts a whole number in proportion to the weights: what rounding down leaves goes to the largest remainders."""
    exact = [number * weight / math.fsum(weights) for weight in weights]
    parts = [int(part) for part in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: number - sum(parts)]:
        parts[i] += 1
    return parts


def refuse_lost_output(output: Path, option: str = "--output") -> None:
    """Raises ValueError where a relative output would be written into a job's temporary working directory."""
    if not output.is_absolute() and RAY_WORKING_DIR in Path.cwd().parts:
        raise ValueError(
            f"{option} {output} is relative to the job's working directory, which Ray deletes after the job: "
            "give an absolute path on storage that outlives it"
        )
