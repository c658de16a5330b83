"""Calibrate a Mixture-of-Experts model on a Ray cluster: one Ray task per MoE layer, and one artifact at the end.

    ray job submit --runtime-env calibration_jobs/runtime_env.yaml -- \\
        python -m calibration_jobs.calibrate --model Qwen/Qwen3-30B-A3B --output /data/qwen3-sere

Every option can also stand in a YAML file (`--config`), with `_` for `-`; options on the command line win. Outside a
cluster the same command starts Ray on this machine. `--dry-run` prints what it would take. A job that was stopped goes
on where it was when the same command runs again.

The driver plans, and gathers matrices [E, E]; it needs no GPU. A forward task runs all texts through one decoder layer;
the states that it leaves in the object store feed the next layer's forward task and, for a MoE layer, its scoring task.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import ray
import typer
from pydantic import Field, model_validator
from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from calibration_jobs.coverage import certainty_line, coverage_warnings, source_warnings
from calibration_jobs.finished_layers import FinishedLayers
from calibration_jobs.job import JobConfig, refuse_lost_output
from calibration_jobs.options import make_command
from calibration_jobs.resume import Fingerprint
from calibration_jobs.tables import plan_table, source_table
from calibration_jobs.transient import TransientError, transient_errors
from calibration_jobs.workers import Workers
from sere_dist import console
from sere_dist.artifact.folder import Artifact, check_output
from sere_dist.artifact.layer import MIN_TOKENS_PER_EXPERT
from sere_dist.artifact.schema import CONFIG_FILE, SCHEMA_VERSION, ArtifactConfig
from sere_dist.artifact.sources import services
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import (
    ExpertInputs,
    LayerResult,
    Texts,
    run_layer,
    score_layer,
    text_blocks,
)
from sere_dist.calibration.plan import Plan
from sere_dist.calibration.sensitivity import Sensitivities, layer_sensitivities, weigh_layers
from sere_dist.files import FilePath
from sere_dist.method.certainty import GROUPS
from sere_dist.method.cka import Kernel
from sere_dist.method.similarity import METHODS, MethodName
from sere_dist.method.sources import groups_per_source
from sere_dist.moe import MoeShape
from sere_dist.provenance import versions

RETRIES = 5  # of a task whose worker or node died


class CalibrationConfig(JobConfig):
    """Settings of a calibration. Unknown keys are refused."""

    output: FilePath = Field(description="Folder to write the artifact to.")
    overwrite: bool = Field(default=False, description="Replace the artifact that is already at --output.")
    restart: bool = Field(default=False, description="Discard the layers that a stopped job has finished.")
    dry_run: bool = Field(default=False, description="Print the plan and what it takes, and stop.")

    method: MethodName = Field(default="frobenius", description="Measure of the similarity of experts.")
    kernel: Kernel = Field(default="linear", description="Kernel of `--method cka`.")

    num_samples: int = Field(default=400, ge=1, description="Number of texts to use.")
    max_length: int = Field(default=128, ge=2, description="Tokens that each text is cut to.")
    min_length: int | None = Field(
        default=None, ge=1, description="Fewest tokens of a text; shorter texts are left out. By default, --max-length."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Largest number of tokens, over all texts.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the texts' order and of `--method random`.")
    min_tokens_per_expert: int = Field(
        default=MIN_TOKENS_PER_EXPERT, ge=0, description="Warn about experts that received fewer tokens than this."
    )
    min_substitute_kept: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="Warn about layers where a substitute chosen on half of the texts keeps less than this of what the "
        "best is worth on the other half; 1 is the best, 0 one at random. Warn also about sources of a mixture for "
        "which the choice of all sources keeps less than this of what their own choice keeps. Not of --method cka, "
        "weights and random.",
    )
    on_low_coverage: Literal["warn", "stop"] = Field(
        default="warn",
        description="What such a warning does: `stop` ends the job at the first layer that has one, before an artifact "
        "is written. Finished layers are kept.",
    )
    block_tokens: int | None = Field(default=None, ge=1, description="Tokens that a scoring task processes at a time.")
    sensitivity_samples: int = Field(
        default=64,
        ge=0,
        description="Texts on which to measure what an error of each layer costs, so that a price means the same in "
        "all of them; 0 leaves it out. Of --method projection.",
    )

    @model_validator(mode="after")
    def _lengths_fit(self) -> "CalibrationConfig":
        if self.min_length and self.min_length > self.max_length:
            raise ValueError(f"--min-length {self.min_length} is greater than --max-length {self.max_length}")
        if self.sensitivity_samples == 1:
            raise ValueError("--sensitivity-samples 1 says nothing of its error: give 2 or more, or 0")
        return self

    @property
    def sensitivity_texts(self) -> int:
        """Texts on which sensitivities are measured."""
        return self.sensitivity_samples if self.method == "projection" else 0


def calibrate(config: CalibrationConfig) -> Artifact | None:
    """Runs the calibration on the connected Ray cluster, or a local one, and saves the artifact; None for a dry run.

    Raises:
        ValueError: the model, the dataset or a setting can't be used; or coverage is low, and that is to stop the job.
        OSError: the output is already there, or can't be written, or the artifact may not be pushed; nothing was
            changed. Or pushing it failed at the end; it is at the output.
        MemoryError: a task does not fit in memory.
        RayError: tasks died again and again. Finished layers are kept; the same command goes on from them.
    """
    refuse_lost_output(config.output)
    before = finished_before(config)
    checkpoint = Checkpoint(config.model, config.revision)
    MoeShape.from_config(checkpoint.config)  # before any text is read
    if not config.dry_run:
        config.check_push()
    needs_texts = METHODS[config.method].needs_data and not config.dry_run
    texts, sources = tokenise_texts(config, checkpoint) if needs_texts else ([], [])
    if before is not None and not config.dry_run:
        artifact = again(before, fingerprint(config, checkpoint, texts, sources), config)
        config.push(config.output)
        return artifact
    num_tokens = sum(map(len, texts)) or config.num_samples * config.max_length
    workers = Workers.of_cluster(config, may_start=not config.dry_run)
    plan = Plan.of(
        checkpoint,
        config.method,
        config.kernel,
        min(num_tokens, config.max_tokens or num_tokens),
        config.max_length,
        workers.device,
        config.block_tokens,
    )
    console.tables().print(plan_table(plan, str(workers), config.sensitivity_texts))
    if config.dry_run:
        return None

    own = fingerprint(config, checkpoint, texts, sources)
    with FinishedLayers(config.output, own, config.restart) as finished:
        results = {result.statistics.layer: result for result in finished}
        if results:
            print(f"{len(results)} of {len(plan.layer_names)} layers are finished already", flush=True)
        for result in results.values():
            check_coverage(result, config, len(texts))
        remaining = sorted(plan.layer_names.keys() - results.keys())
        measuring = start_sensitivities(config, checkpoint, workers, texts) if finished.sensitivities is None else None
        blocks = blocks_by_source(texts, sources)
        with tqdm(
            total=len(plan.layer_names), initial=len(results), unit="layer", disable=not sys.stderr.isatty()
        ) as bar:
            for result in score_layers(config, checkpoint, plan, workers, blocks, remaining):
                finished.add(result)
                results[result.statistics.layer] = result
                bar.update()
                report_layer(result, len(results), plan, quiet=not bar.disable)
                check_coverage(result, config, len(texts))
        if line := certainty_line(result.statistics for result in results.values()):
            print(line, flush=True)
        report_sources(results, config)
        if measuring is not None:
            finished.sensitivities = wait_for_sensitivities(measuring, workers)
        nats_per_error = add_sensitivities(results, finished.sensitivities or {})

        artifact = made_artifact(config, checkpoint, plan, texts, results, nats_per_error, own)
        artifact.save(config.output, overwrite=config.overwrite)
        finished.discard()
    print(f"wrote {config.output}: similarity of {len(artifact.layers)} layers", flush=True)
    config.push(config.output)
    return artifact


def made_artifact(
    config: CalibrationConfig,
    checkpoint: Checkpoint,
    plan: Plan,
    texts: Sequence[Sequence[int]],
    results: dict[int, LayerResult],
    nats_per_error: float | None,
    own: Fingerprint,
) -> Artifact:
    """Returns the artifact of all layers' results, with what they were made from."""
    return Artifact(
        ArtifactConfig(
            schema_version=SCHEMA_VERSION,
            base_model=config.model,
            revision=checkpoint.revision,
            **vars(plan.shape),
            layer_names=plan.layer_names,
            method=config.method,
            kernel=config.kernel if plan.method.has_kernel else None,
            dataset=config.dataset_name if texts else None,
            num_tokens=sum(map(len, texts)),
            nats_per_error=nats_per_error,
            versions=versions("sere-dist", "torch", "transformers", "ray"),
            calibration_sha256=digest(own),
        ),
        layers={layer: results[layer] for layer in sorted(results)},
        settings=settings_of(config),
    )


def settings_of(config: CalibrationConfig) -> dict[str, Any]:
    """Returns the settings that an artifact keeps."""
    return config.model_dump(mode="json", exclude={"overwrite", "restart", "dry_run", "push_to_hub"})


def finished_before(config: CalibrationConfig) -> Artifact | None:
    """Returns the artifact at --output if the same settings made it, which an earlier attempt may have done.

    Raises:
        OSError: the output is already there, or can't be written.
    """
    try:
        check_output(config.output, config.overwrite)
    except FileExistsError:
        if not (config.output / CONFIG_FILE).is_file():
            raise
        artifact = Artifact.load(config.output)
        if artifact.settings != settings_of(config):
            raise
        return artifact
    return None


def again(before: Artifact, own: Fingerprint, config: CalibrationConfig) -> Artifact:
    """Returns what an earlier attempt of the same calibration wrote, and removes the layers that it left.

    Raises:
        FileExistsError: weights, texts or versions are others by now.
    """
    if before.config.calibration_sha256 != digest(own):
        raise FileExistsError(
            f"{config.output} is already there, from other weights, texts or versions: --overwrite to replace it, or "
            "another --output"
        )
    with FinishedLayers(config.output, own, restart=True) as finished:
        finished.discard()
    print(f"{config.output} is there already: this calibration has finished before", flush=True)
    return before


def digest(fingerprint: Fingerprint) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def tokenise_texts(config: CalibrationConfig, checkpoint: Checkpoint) -> tuple[list[list[int]], list[str]]:
    """Returns the token ids of the texts to calibrate on, and the name of each text's source."""
    kept, sources = config.read_token_ids(
        checkpoint,
        config.seed,
        config.num_samples,
        config.max_length,
        min_length=config.min_length,
        max_tokens=config.max_tokens,
    )
    if len(kept) < config.num_samples:
        print(f"{len(kept)} texts are used of the {config.num_samples} wanted: there are no more that fit", flush=True)
    return kept, sources


def blocks_by_source(texts: Sequence[Sequence[int]], sources: Sequence[str]) -> list[Texts]:
    """Returns the texts in blocks of a group and a source each. Where there are too many sources, all count as one."""
    count = len(set(sources))
    groups = groups_per_source(max(1, count))
    if not groups:
        print(f"{count} sources are too many to say how well each is served", flush=True)
        return text_blocks(texts, groups=GROUPS)
    return text_blocks(texts, groups=groups, sources=sources)


def fingerprint(
    config: CalibrationConfig, checkpoint: Checkpoint, texts: list[list[int]], sources: list[str]
) -> Fingerprint:
    """Returns everything that the results depend on, by the name that a user knows it by."""
    method = METHODS[config.method]
    seen = (texts, sources) if len(set(sources)) > 1 else texts
    return {
        "model": config.model,
        "weights": checkpoint.fingerprint if method.needs_weights else None,
        "method": config.method,
        "kernel": config.kernel if method.has_kernel else None,
        "seed": config.seed if config.sensitivity_texts or not method.needs_weights else None,
        "texts": hashlib.sha256(repr(seen).encode()).hexdigest(),
        "sensitivity_samples": config.sensitivity_texts,
        "versions": versions("sere-dist", "torch", "transformers"),
    }


def start_sensitivities(
    config: CalibrationConfig, checkpoint: Checkpoint, workers: Workers, texts: Sequence[Sequence[int]]
) -> ray.ObjectRef | None:
    """Starts the task that measures sensitivities while layers are scored; None if there is nothing to measure."""
    chosen = texts[: config.sensitivity_texts]
    if len(chosen) < 2:
        return None
    task = sensitivity_task.options(max_retries=RETRIES, retry_exceptions=[TransientError], **workers.options)
    return task.remote(checkpoint.place, checkpoint.revision, chosen, workers.device, config.seed or 0)


def wait_for_sensitivities(measuring: ray.ObjectRef, workers: Workers) -> Sensitivities:
    try:
        return ray.get(workers.wait([measuring]))
    except RayTaskError as error:
        raise error.cause from error


def add_sensitivities(results: dict[int, LayerResult], found: Sensitivities) -> float | None:
    """Gives the layers their sensitivities, says how far they differ, and returns what they are relative to."""
    nats_per_error = weigh_layers(results, found)
    if nats_per_error is not None:
        sensitivities = {layer: results[layer].statistics.sensitivity or 0.0 for layer in found}
        least, most = (pick(sensitivities, key=sensitivities.__getitem__) for pick in (min, max))
        print(
            f"what an error costs: {sensitivities[least]:.2f} of the mean in layer {least}, {sensitivities[most]:.2f} "
            f"in layer {most}",
            flush=True,
        )
    return nats_per_error


def score_layers(
    config: CalibrationConfig,
    checkpoint: Checkpoint,
    plan: Plan,
    workers: Workers,
    blocks: list[Texts],
    remaining: Sequence[int],
) -> Iterator[LayerResult]:
    """Yields the results of the remaining layers as they land.

    Forward tasks run ahead of scoring by no more layers than there are workers, so that the object store holds the
    states of few layers. Ray retries forward tasks, and runs them again when a lost node held what they left. Scoring
    tasks are retried here: what is right to do depends on why one died.
    """
    where = (checkpoint.place, checkpoint.revision)
    texts = ray.put(blocks)
    score = score_task.options(max_retries=0, **workers.options)
    forward = forward_task.options(
        max_retries=RETRIES, retry_exceptions=[TransientError], num_returns=2 * len(blocks), **workers.options
    )
    inputs_of: dict[int, list[ray.ObjectRef]] = {}
    block_of = dict.fromkeys(remaining, config.block_tokens)
    deaths = dict.fromkeys(remaining, 0)
    running: dict[ray.ObjectRef, int] = {}

    def start(layer: int) -> None:
        arguments = (*where, layer, config.method, config.kernel, config.seed or 0, block_of[layer], workers.device)
        running[score.remote(*arguments, *inputs_of[layer])] = layer

    def finish_one() -> Iterator[LayerResult]:
        done = workers.wait(list(running))
        layer = running.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError as error:
            deaths[layer] += 1
            if not isinstance(error.cause, TransientError) or deaths[layer] > RETRIES:  # else it would fail again
                raise error.cause from error
            print(f"layer {layer}: {error.cause}; again", flush=True)
            start(layer)
            return
        except (RaySystemError, OutOfDiskError, ObjectStoreFullError, RuntimeEnvSetupError):  # no try would end better
            raise
        except RayError as error:
            deaths[layer] += 1
            if deaths[layer] > RETRIES:
                raise
            what = f"layer {layer}: lost its worker ({type(error).__name__}); again"
            if isinstance(error, OutOfMemoryError) or deaths[layer] > 1:  # the kernel, too, kills what takes too much
                block_of[layer] = max(1, (block_of[layer] or plan.block_tokens) // 2)
                what += f", {block_of[layer]} tokens at a time"
            print(what, flush=True)
            start(layer)
            return
        del inputs_of[layer]
        yield result

    hidden: list[ray.ObjectRef] = []
    if plan.method.needs_data:
        wanted = set(remaining)
        for layer in range(max(remaining, default=-1) + 1):
            # A list, since the task has several results.
            left = cast(list[ray.ObjectRef], forward.remote(*where, layer, texts, workers.device, *hidden))
            hidden, inputs = left[0::2], left[1::2]
            if layer in wanted:
                inputs_of[layer] = inputs
                start(layer)
            del left, inputs
            while len(running) > workers.count:
                yield from finish_one()
    else:
        for layer in remaining:
            inputs_of[layer] = []
            start(layer)
    del hidden
    while running:
        yield from finish_one()


@ray.remote
def forward_task(
    model: str, revision: str | None, layer: int, blocks: list[Texts], device: str, *hidden_states: Any
) -> Iterator[Any]:
    """Yields, for each block of texts, its states [B, L, H] after the layer and the ExpertInputs of the layer."""
    transformers_logging.disable_progress_bar()
    with transient_errors():
        for states, inputs in run_layer(Checkpoint(model, revision), layer, blocks, hidden_states or None, device):
            yield states
            yield inputs


@ray.remote
def sensitivity_task(
    model: str, revision: str | None, texts: Sequence[Sequence[int]], device: str, seed: int
) -> Sensitivities:
    transformers_logging.disable_progress_bar()
    with transient_errors():
        return layer_sensitivities(Checkpoint(model, revision), texts, device, seed)


@ray.remote
def score_task(
    model: str,
    revision: str | None,
    layer: int,
    method: MethodName,
    kernel: Kernel,
    seed: int,
    block_tokens: int | None,
    device: str,
    *inputs: ExpertInputs,
) -> LayerResult:
    transformers_logging.disable_progress_bar()
    with transient_errors():
        return score_layer(Checkpoint(model, revision), layer, inputs, method, kernel, seed, block_tokens, device)


def report_layer(result: LayerResult, done: int, plan: Plan, quiet: bool) -> None:
    """Prints a line about a finished layer unless `quiet`, and in any case whether its memory ran out."""
    row, total = result.statistics, len(plan.layer_names)
    if not quiet:
        line = (
            f"layer {row.layer} scored ({done}/{total}) in {row.seconds:.1f} s: similarity {row.similarity_mean:.3f} "
            f"mean, {row.similarity_min:.3f} to {row.similarity_max:.3f}"
        )
        if row.similarity_error is not None:
            line += f", standard error {row.similarity_error:.4f}"
        if result.tokens_E is not None:
            line += f"; tokens per expert: {row.tokens_per_expert_min} fewest, {row.tokens_per_expert_median:g} median"
        write_line(line)
    if result.halved:
        write_line(f"layer {row.layer}: memory ran out; went on with {result.block_tokens} tokens at a time")


def check_coverage(result: LayerResult, config: CalibrationConfig, num_texts: int) -> None:
    """Prints what a layer's experts were seen too little of.

    Raises:
        ValueError: there is something, and it is to stop the job.
    """
    warnings = coverage_warnings(result, num_texts, config.min_tokens_per_expert, config.min_substitute_kept)
    if warnings and config.on_low_coverage == "stop":
        raise ValueError(
            f"{'; '.join(warnings)}. Stopped, as --on-low-coverage says. Other texts need --restart; "
            "--on-low-coverage warn goes on with these, from the layers that are finished"
        )
    for line in warnings:
        write_line(line)


def report_sources(results: dict[int, LayerResult], config: CalibrationConfig) -> None:
    """Prints how well each source of the texts is served, if there are several, and which are served badly."""
    served = services(row for layer in sorted(results) for row in results[layer].sources)
    if not served:
        return
    console.tables().print(source_table(served))
    for line in source_warnings(served, config.min_substitute_kept):
        print(line, flush=True)


def write_line(line: str) -> None:
    """Prints a line above the bar of progress, at once."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def run(config: CalibrationConfig) -> None:
    """Calibrate a Mixture-of-Experts model on a Ray cluster, one task per MoE layer, and write the artifact."""
    calibrate(config)


main = make_command(CalibrationConfig, run)

if __name__ == "__main__":
    typer.run(main)
