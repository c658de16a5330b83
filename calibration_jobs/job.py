"""What the Ray jobs have in common: settings, and the texts that they name."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.texts import load_tokenizer, read_texts, tokenise

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
    ) -> list[list[int]]:
        """Returns the token ids of the dataset's texts; see `sere_dist.calibration.texts`.

        Raises:
            ValueError: the dataset can't be read, or has no text that is long enough.
        """
        texts = read_texts(self.dataset, subset=self.subset, split=self.split, column=self.column, seed=seed)
        tokenizer = load_tokenizer(self.model, checkpoint.revision)
        return tokenise(
            texts, tokenizer, num_samples, max_length, min_length=min_length, max_tokens=max_tokens, distinct=distinct
        )


def refuse_lost_output(output: Path, option: str = "--output") -> None:
    """Raises ValueError where a relative output would be written into a job's temporary working directory."""
    if not output.is_absolute() and RAY_WORKING_DIR in Path.cwd().parts:
        raise ValueError(
            f"{option} {output} is relative to the job's working directory, which Ray deletes after the job: "
            "give an absolute path on storage that outlives it"
        )
