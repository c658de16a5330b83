"""Find the setting of every layer that fits a budget best, and add it to the artifact as its recommended settings.

    ray job submit --runtime-env calibration_jobs/runtime_env.yaml -- \\
        python -m calibration_jobs.tune --model Qwen/Qwen3-30B-A3B --artifact /data/qwen3-sere --batch 16 --max-kl 0.02

Every option can also stand in a YAML file (`--config`), with `_` for `-`; options on the command line win. Outside a
cluster the same command starts Ray on this machine. A job that was stopped goes on where it was when the same command
runs again, and with another budget it uses what was measured.

Workers decode the texts in lockstep batches (`sere_dist.evaluation.lockstep`). Each holds the model, or with
`--by-layers` one decoder layer at a time. The driver asks them for every setting of every layer alone, then for
combinations along the trade-off that follows (`sere_dist.evaluation.tuning`). What is chosen is measured once more on
held-out texts. `--dry-run` prints what it would take.
"""

import hashlib
import math
from typing import Any, Literal

import torch
import typer
from pydantic import Field, field_validator, model_validator

from calibration_jobs.job import JobConfig, refuse_lost_output
from calibration_jobs.measurements import Measurements
from calibration_jobs.options import make_command
from calibration_jobs.pool import ActorPool
from calibration_jobs.resume import Fingerprint
from calibration_jobs.search import measure_on_held_out, most_trials, search
from calibration_jobs.tables import tuning_plan_table, tuning_tables
from calibration_jobs.trials import Evaluator, ModelSource, TrialRunner, policy_for
from calibration_jobs.workers import Workers
from sere_dist import console
from sere_dist.artifact.folder import Artifact, check_output, write_recommendation
from sere_dist.artifact.recommendation import LayerSetting, Recommendation
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.plan import Sizes
from sere_dist.evaluation.plan import TuningPlan
from sere_dist.evaluation.tuning import Budget, most_candidates
from sere_dist.files import FilePath, HubName
from sere_dist.moe import MoeShape
from sere_dist.provenance import versions

BATCHES = (1, 4, 16, 64)  # that the recommended settings are measured at, beside the one that they are tuned for
PACKAGES = ("sere-dist", "torch", "transformers")  # whose versions may change what is measured


class TuningConfig(JobConfig):
    """Settings of a tuning. Unknown keys are refused."""

    artifact: FilePath = Field(description="Folder of the model's artifact, to which recommended settings are added.")
    batch: int = Field(ge=1, description="Number of requests that decode together.")
    max_kl: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Budget: highest KL divergence from the baseline, in nats per token.",
    )
    max_perplexity_rise: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Budget: highest relative rise of the perplexity; 0.01 is 1%.",
    )
    active_experts: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Budget: largest mean number of experts per layer and step.",
    )
    restart: bool = Field(default=False, description="Discard what a stopped job has measured.")
    dry_run: bool = Field(default=False, description="Print the plan and what it takes, and stop.")
    by_layers: bool = Field(
        default=False,
        description="Hold one decoder layer at a time, in float32, instead of the model: for one that no worker holds.",
    )

    num_samples: int = Field(
        default=64,
        ge=2,
        description="Number of texts to tune on, and of held-out texts to report on; at least --batch.",
    )
    length: int = Field(default=128, ge=3, description="Tokens that each text is cut to; shorter texts are left out.")
    prompt_length: int = Field(
        default=32, ge=1, description="Tokens of each text that are its prompt and are not decoded."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the texts' order.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Data type of the weights; auto takes the checkpoint's own on GPUs, float32 on CPUs.",
    )

    @field_validator("artifact", mode="before")
    @classmethod
    def _is_on_disk(cls, value: Any) -> Any:
        if (on_hub := HubName.parse(value)) is None:
            return value
        revision = f" --revision {on_hub.revision}" if on_hub.revision else ""
        name = on_hub.repository.rpartition("/")[2]
        raise ValueError(
            f"{value} is on the Hub, and a tuning writes into the artifact. Download it, and give the folder: "
            f"hf download {on_hub.repository}{revision} --local-dir {name}. --push-to-hub brings the tuned one back"
        )

    @model_validator(mode="after")
    def _fits_together(self) -> "TuningConfig":
        given = [self.max_kl, self.max_perplexity_rise, self.active_experts]
        if sum(number is not None for number in given) != 1:
            raise ValueError("give one budget: --max-kl, --max-perplexity-rise or --active-experts")
        if self.num_samples < self.batch:
            raise ValueError(f"--num-samples {self.num_samples} do not fill a --batch of {self.batch}")
        if self.prompt_length > self.length - 2:
            raise ValueError(f"--prompt-length {self.prompt_length} leaves no decode step of --length {self.length}")
        if self.by_layers and self.dtype not in ("auto", "float32"):
            raise ValueError(f"--by-layers runs in float32, as a calibration does: leave out --dtype {self.dtype}")
        return self

    @property
    def held_out_batches(self) -> list[int]:
        """The batches that are measured on held-out texts."""
        return sorted({each for each in (*BATCHES, self.batch) if each <= self.num_samples})

    @property
    def budget(self) -> Budget:
        if self.max_kl is not None:
            return Budget("kl", self.max_kl)
        if self.max_perplexity_rise is not None:
            return Budget("loss_rise", float(f"{math.log1p(self.max_perplexity_rise):.4g}"))
        assert self.active_experts is not None  # one of the three is given
        return Budget("active_experts", self.active_experts)


def tune(config: TuningConfig) -> Recommendation | None:
    """Tunes on the connected Ray cluster, or a local one, and writes what it found into the artifact; None if dry.

    Raises:
        ValueError: the model, the artifact, the texts or a setting can't be used, nothing fits the budget, or a worker
            has less memory than it takes.
        MemoryError: not even one trial fits in memory, or one layer.
        OSError: the artifact can't be written, or may not be pushed. Or pushing it failed at the end; the artifact on
            disk is tuned.
        RayError: workers died again and again. What was measured is kept; the same command goes on from there.
    """
    refuse_lost_output(config.artifact, "--artifact")
    artifact = Artifact.load(config.artifact)
    check_output(config.artifact.resolve(), overwrite=True)
    checkpoint = Checkpoint(config.model, config.revision)
    artifact.check_serves(MoeShape.from_config(checkpoint.config), config.model, checkpoint.revision)
    if not config.dry_run:
        config.check_push()
    texts = {} if config.dry_run else split_texts(config, checkpoint)
    workers = Workers.of_cluster(config, may_start=not config.dry_run)
    whole_dtype = config.dtype if config.dtype != "auto" or workers.device == "cuda" else "float32"
    dtype = "float32" if config.by_layers else whole_dtype
    plan = plan_of(config, checkpoint, artifact, whole_dtype)
    console.tables().print(tuning_plan_table(plan, str(workers)))
    if config.dry_run:
        return None
    plan.check()
    if config.dataset_name == artifact.config.dataset:
        print(f"{config.dataset_name} is what the artifact was calibrated on: texts that it saw flatter it", flush=True)
    measurements = Measurements(
        config.artifact, fingerprint(config, checkpoint, artifact, texts, workers.device, dtype), config.restart
    )
    print(f"texts: {len(texts['tuning'])} to tune on, {len(texts['report'])} others", flush=True)

    source = ModelSource(checkpoint.place, checkpoint.revision, workers.device, dtype, config.by_layers)
    with ActorPool(Evaluator, workers, source, artifact, texts, config.prompt_length) as pool:
        recommended = find_recommendation(config, artifact, TrialRunner(pool, measurements, plan.trials_a_pass))
    for table in tuning_tables(recommended, config.budget):
        console.tables().print(table)
    write_recommendation(config.artifact, recommended)
    number = getattr(recommended.at(recommended.recommended), config.budget.kind)
    verdict = "within" if number <= config.budget.most else "NOT within"
    print(f"wrote {config.artifact}: {recommended}")
    print(f"On held-out texts, that is {verdict} the budget. Serve it with policy: recommended", flush=True)
    config.push(config.artifact)
    return recommended


def plan_of(config: TuningConfig, checkpoint: Checkpoint, artifact: Artifact, dtype: str) -> TuningPlan:
    """Returns what the tuning takes; `dtype` is that of a model that workers hold whole."""
    top_k, layers = artifact.config.num_experts_per_token, len(artifact.layers)
    candidates = most_candidates(policy_for(artifact), top_k)
    return TuningPlan(
        **vars(Sizes.of_checkpoint(checkpoint)),
        num_texts=config.num_samples,
        length=config.length,
        trials=most_trials(layers, candidates, len(config.held_out_batches), top_k),
        by_layers=config.by_layers,
        dtype=dtype,
        memory=None if config.memory_per_task is None else int(config.memory_per_task * 2**30),
    )


def split_texts(config: TuningConfig, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Returns token ids [N, L] of the texts to tune on, and of others to report on."""
    wanted = 2 * config.num_samples
    ids, _ = config.read_token_ids(checkpoint, config.seed, wanted, config.length, distinct=True)
    if len(ids) < wanted:
        raise ValueError(
            f"{wanted} different texts of {config.length} tokens are needed, {config.num_samples} to tune on and as "
            f"many others; there are {len(ids)}: use another --dataset, or a smaller --num-samples or --length"
        )
    return {"tuning": torch.tensor(ids[0::2]), "report": torch.tensor(ids[1::2])}


def fingerprint(
    config: TuningConfig,
    checkpoint: Checkpoint,
    artifact: Artifact,
    texts: dict[str, torch.Tensor],
    device: str,
    dtype: str,
) -> Fingerprint:
    """Returns everything that the measurements depend on, by the name that a user knows it by."""
    return {
        "model": config.model,
        "weights": checkpoint.fingerprint,
        "artifact": artifact.config.tensors_sha256,
        # They are not among the tensors, but weigh sizes: with others a price means something else.
        "sensitivities": [layer.statistics.sensitivity for layer in artifact.layers.values()],
        "texts": hashlib.sha256(repr([ids_NL.tolist() for ids_NL in texts.values()]).encode()).hexdigest(),
        "prompt_length": config.prompt_length,
        "device": device,
        "dtype": dtype,
        "by_layers": config.by_layers,
        "versions": versions(*PACKAGES),
    }


def find_recommendation(config: TuningConfig, artifact: Artifact, runner: TrialRunner) -> Recommendation:
    """Finds the setting of every layer, and what all of them cost on held-out texts.

    Raises:
        ValueError: nothing fits the budget.
    """
    layers, top_k = sorted(artifact.layers), artifact.config.num_experts_per_token
    found = search(layers, config.batch, config.budget, runner)
    held_out = measure_on_held_out(found.chosen, layers, top_k, config.batch, config.held_out_batches, runner)
    return Recommendation(
        tensors_sha256=artifact.config.tensors_sha256,
        policy=policy_for(artifact),
        layers={layer: found.chosen.get(layer, LayerSetting(select_top_k=top_k)) for layer in layers},
        batch=config.batch,
        budget=str(config.budget),
        texts=f"{config.num_samples} texts of {config.length} tokens of {config.dataset_name}, {config.prompt_length} "
        f"of them the prompt, to tune on, and {config.num_samples} others, less what does not fill a batch",
        curve=found.curve,
        tuned=found.tuned,
        off=held_out.off,
        recommended=held_out.recommended,
        uniform=held_out.uniform,
        versions=versions(*PACKAGES),
    )


def run(config: TuningConfig) -> None:
    """Find the settings that fit a budget best, and add them to an artifact as its recommended settings."""
    tune(config)


main = make_command(TuningConfig, run)

if __name__ == "__main__":
    typer.run(main)
