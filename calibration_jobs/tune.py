"""Find the setting of every layer that fits a budget best, and write it into the artifact as its recommended policy.

    ray job submit --runtime-env calibration_jobs/runtime_env.yaml -- \\
        sere-dist tune --model Qwen/Qwen3-30B-A3B --artifact /data/qwen3-sere --batch 16 --max-kl 0.02

Every option can also stand in a YAML file (`--config`), with `_` for `-`; options on the command line win. Outside a
cluster the same command starts Ray on this machine. A job that was stopped goes on where it was when the same command
runs again, and with another budget it uses what was measured.

Workers hold the model, and decode the texts in lockstep batches (`sere_dist.evaluation.lockstep`). The driver asks them
for every setting of every layer alone, then for combinations along the trade-off that follows
(`sere_dist.evaluation.tuning`). What is chosen is measured once more on other texts, which had no say.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
import torch
import typer
from pydantic import BaseModel, Field, model_validator
from ray.actor import ActorHandle
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from calibration_jobs.job import JobConfig, Workers, command, refuse_lost_output
from calibration_jobs.measurements import Measurements
from sere_dist.artifact.folder import Artifact, check_output, write_recommendation
from sere_dist.artifact.recommendation import LayerSetting, Outcome, Recommendation
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.tuning import (
    Budget,
    Combination,
    Cost,
    bracket,
    candidates,
    combinations,
    evenly_spaced,
    losses_of_steps,
    rerouter_of,
)
from sere_dist.method.records import LayerTables
from sere_dist.moe import MoeShape, load_model

DEATHS = 5  # of workers at one measurement, before the job gives up
FAILURES = 3  # of workers to start, one after the other
PATIENCE_SECONDS = 60.0  # without any worker, before the job says what it waits for
COMBINATIONS = 10  # measured first, along the whole trade-off
REFINED, ROUNDS = 6, 2  # then so many of those between the two that the budget lies between, so many times
BATCHES = (1, 4, 16, 64)  # that the recommended policy is measured at, beside the one it is tuned for


class TuningConfig(JobConfig):
    """Settings of a tuning. Unknown keys are refused."""

    artifact: Path = Field(description="Folder of the model's artifact; the recommended policy is written into it.")
    batch: int = Field(ge=1, description="Requests that decode together.")
    max_kl: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Budget: KL from the model as it is, nats a token."
    )
    max_perplexity_rise: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Budget: share by which perplexity may rise; 0.01 is 1%."
    )
    active_experts: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Budget: experts that a layer runs in a step."
    )
    restart: bool = Field(default=False, description="Throw away what a stopped job has measured.")

    num_samples: int = Field(
        default=64, ge=2, description="Texts to tune on, and as many others to report on; at least as many as --batch."
    )
    length: int = Field(default=128, ge=3, description="Tokens that a text is cut to; shorter ones are left out.")
    prompt_length: int = Field(default=32, ge=1, description="Of these, tokens that are not decoded.")
    seed: int = Field(default=0, ge=0, description="Shuffle the texts.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the weights; auto: the checkpoint's own on GPUs, float32 on CPUs."
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
        return self

    @property
    def budget(self) -> Budget:
        if self.max_kl is not None:
            return Budget("kl", self.max_kl)
        if self.max_perplexity_rise is not None:
            return Budget("loss_rise", float(f"{math.log1p(self.max_perplexity_rise):.4g}"))
        return Budget("active_experts", self.active_experts)


class Run(BaseModel, frozen=True):
    """Something to measure: all texts of a set, in batches, with each layer's setting; layers without one are off."""

    texts: Literal["tuning", "report"]
    batch: int
    layers: dict[int, LayerSetting] = {}

    @property
    def key(self) -> str:
        return self.model_dump_json()


class Place(NamedTuple):
    """How a worker runs the model."""

    model: str
    revision: str | None
    device: Literal["cpu", "cuda"]
    dtype: str


def policy_for(artifact: Artifact) -> Literal["sere", "projection"]:
    """Returns the policy that is tuned: projection where the artifact has the tables for it."""
    return "projection" if artifact.is_projection else "sere"


@ray.remote
class Evaluator:
    """A worker with the model and the texts."""

    def __init__(self, place: Place, artifact: Artifact, texts: dict[str, torch.Tensor], prompt_length: int):
        transformers_logging.disable_progress_bar()
        dtype = place.dtype if place.dtype == "auto" else getattr(torch, place.dtype)
        model = load_model(place.model, place.device, dtype, place.revision)
        self.held_out = {name: HeldOut(model, ids_NL, prompt_length) for name, ids_NL in texts.items()}
        self.tables = {
            layer: LayerTables(*(None if table is None else table.to(place.device) for table in tables))
            for layer, tables in artifact.tables.items()
        }
        self.top_k = artifact.config.num_experts_per_token
        self.policy = policy_for(artifact)

    def candidates(self, batch: int) -> list[tuple[int, list[dict[str, Any]]]]:
        """Returns each layer and the settings to try in it."""
        is_projection = self.policy == "projection"
        losses = losses_of_steps(self.held_out["tuning"], batch, self.tables) if is_projection else {}
        found = []
        for layer, tables in self.tables.items():
            settings = candidates(self.policy, self.top_k, tables.similarity_EE.cpu(), losses.get(layer))
            found.append((layer, [setting.model_dump() for setting in settings]))
        return found

    def run(self, run: Run) -> dict[str, Any]:
        """Returns the fields of a LockstepResult."""
        rerouter = rerouter_of(self.tables, self.policy, run.layers)
        return asdict(self.held_out[run.texts].run(rerouter, run.batch))


class Evaluators:
    """As many workers as the cluster has room for: more as nodes come, fewer as they are lost."""

    def __init__(self, workers: Workers, *arguments: Any):
        self.workers = workers
        self.make = Evaluator.options(max_restarts=0, **workers.options).remote
        self.arguments = [ray.put(argument) for argument in arguments]
        self.idle: list[ActorHandle] = []
        self.starting: dict[ray.ObjectRef, ActorHandle] = {}
        self.failures = 0  # to start, one after the other

    def __enter__(self) -> "Evaluators":
        return self

    def __exit__(self, *_exception: object) -> None:
        for evaluator in [*self.idle, *self.starting.values()]:
            ray.kill(evaluator)

    def work(self, calls: dict[str, tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yields (key, value) as they come, for calls {key: (method, argument)}.

        What a worker was doing when it died is done again by another.

        Raises:
            RayActorError: workers died again and again.
        """
        waiting, deaths, told = list(calls), dict.fromkeys(calls, 0), False
        since = time.monotonic()
        running: dict[ray.ObjectRef, tuple[str, ActorHandle]] = {}
        try:
            while waiting or running:
                # One more than there is room for asks an autoscaler for it.
                most = min(self.workers.count + 1, len(waiting) + len(running))
                while len(self.idle) + len(self.starting) + len(running) < most:
                    evaluator = self.make(*self.arguments)
                    self.starting[evaluator.__ray_ready__.remote()] = evaluator
                while waiting and self.idle:
                    key, evaluator = waiting.pop(0), self.idle.pop()
                    method, argument = calls[key]
                    running[getattr(evaluator, method).remote(argument)] = key, evaluator
                done, _ = ray.wait([*running, *self.starting], timeout=10)
                if not running and not self.idle and not told and time.monotonic() - since > PATIENCE_SECONDS:
                    told = True
                    print(f"still waiting for a first worker with {self.workers.options} to start", flush=True)
                for reference in done:
                    if reference in self.starting:
                        self._started(reference)
                        continue
                    key, evaluator = running.pop(reference)
                    try:
                        value = ray.get(reference)
                    except RayTaskError as error:  # the call's own error: it would fail again
                        raise error.cause from error
                    except (RayActorError, OutOfMemoryError) as error:
                        deaths[key] += 1
                        if deaths[key] >= DEATHS:
                            raise
                        print(f"lost a worker ({type(error).__name__}); what it did is done again", flush=True)
                        waiting.insert(0, key)
                        self._forget_the_dead()  # of the same node, say
                        continue
                    self.idle.append(evaluator)
                    yield key, value
        finally:
            self.idle += [evaluator for _key, evaluator in running.values()]

    def _started(self, reference: ray.ObjectRef) -> None:
        evaluator = self.starting.pop(reference)
        try:
            ray.get(reference)
        except (RayActorError, OutOfMemoryError) as error:
            # A node that is lost takes several with it, and another may come; what fails by itself will fail again.
            self.failures += isinstance(error, OutOfMemoryError) or getattr(error, "actor_init_failed", False)
            if self.failures >= FAILURES:
                raise
            print(f"a worker died while it loaded the model ({type(error).__name__}); another is started", flush=True)
            return
        self.failures = 0
        self.idle.append(evaluator)

    def _forget_the_dead(self) -> None:
        asked = {evaluator.__ray_ready__.remote(): evaluator for evaluator in self.idle}
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=10) if asked else ([], [])
        self.idle = []
        for reference in answered:
            with contextlib.suppress(RayActorError, OutOfMemoryError):
                ray.get(reference)
                self.idle.append(asked[reference])


def tune(config: TuningConfig) -> Recommendation:
    """Tunes on the connected Ray cluster, or a local one, and writes what it found into the artifact.

    Raises:
        ValueError: the model, the artifact, the texts or a setting can't be used, or nothing fits the budget.
        OSError: the artifact can't be written.
        RayError: workers died again and again. What was measured is kept; the same command goes on from there.
    """
    refuse_lost_output(config.artifact, "--artifact")
    artifact = Artifact.load(config.artifact)
    check_output(config.artifact.resolve(), overwrite=True)
    checkpoint = Checkpoint(config.model, config.revision)
    artifact.check_serves(MoeShape.from_config(checkpoint.config), config.model, checkpoint.revision)
    texts = split_texts(config, checkpoint)
    if config.dataset == artifact.config.dataset:
        print(f"{config.dataset} is what the artifact was calibrated on: texts that it saw flatter it", flush=True)
    workers = Workers.of_cluster(config)
    dtype = config.dtype if config.dtype != "auto" or workers.device == "cuda" else "float32"
    measurements = Measurements(
        config.artifact, fingerprint(config, checkpoint, artifact, texts, workers.device, dtype), config.restart
    )
    print(f"workers: {workers}; texts: {len(texts['tuning'])} to tune on, {len(texts['report'])} others", flush=True)

    place = Place(config.model, checkpoint.revision, workers.device, dtype)
    with Evaluators(workers, place, artifact, texts, config.prompt_length) as evaluators:
        recommended = search(config, artifact, Bench(evaluators, measurements))
    write_recommendation(config.artifact, recommended)
    return recommended


def split_texts(config: TuningConfig, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Returns token ids [N, L] of the texts to tune on, and of others to report on."""
    wanted = 2 * config.num_samples
    ids = config.token_ids(checkpoint, config.seed, wanted, config.length, distinct=True)
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
) -> dict[str, Any]:
    """Returns everything that the measurements depend on, by the name that a user knows it by."""
    return {
        "model": config.model,
        "weights": checkpoint.fingerprint,
        "artifact": artifact.config.tensors_sha256,
        "texts": hashlib.sha256(repr([ids_NL.tolist() for ids_NL in texts.values()]).encode()).hexdigest(),
        "prompt_length": config.prompt_length,
        "device": device,
        "dtype": dtype,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("sere-dist", "torch", "transformers")}


@dataclass
class Bench:
    """Measures with all workers, nothing twice, and says how far it is."""

    evaluators: Evaluators
    measurements: Measurements

    def candidates(self, batch: int) -> dict[int, list[LayerSetting]]:
        """Returns the settings to try in each layer."""
        key = json.dumps({"candidates": batch})
        found = self._values("settings to try", {key: ("candidates", batch)})[key]
        return {layer: [LayerSetting(**setting) for setting in settings] for layer, settings in found}

    def results(self, what: str, runs: Sequence[Run]) -> list[LockstepResult]:
        values = self._values(what, {run.key: ("run", run) for run in runs})
        return [LockstepResult(**values[run.key]) for run in runs]

    def _values(self, what: str, calls: dict[str, tuple[str, Any]]) -> dict[str, Any]:
        values = self.measurements.values
        missing = {key: call for key, call in calls.items() if key not in values}
        with tqdm(
            total=len(calls), initial=len(calls) - len(missing), desc=what, disable=not sys.stderr.isatty()
        ) as bar:
            for count, (key, value) in enumerate(self.evaluators.work(missing), len(calls) - len(missing) + 1):
                self.measurements.add(key, value)
                bar.update()
                if bar.disable and (10 * count // len(calls) > 10 * (count - 1) // len(calls)):
                    print(f"{what}: {count} of {len(calls)}", flush=True)
        return {key: values[key] for key in calls}


def search(config: TuningConfig, artifact: Artifact, bench: Bench) -> Recommendation:
    """Finds the setting of every layer; prints what was weighed, and what it costs on the texts that had no say.

    Raises:
        ValueError: nothing fits the budget.
    """
    layers = sorted(artifact.layers)
    (off,) = bench.results("the model as it is", [Run(texts="tuning", batch=config.batch)])
    path = combinations(measure_single_layers(config.batch, layers, off, bench), Cost(off.active_experts, 0.0))
    if not path:
        raise ValueError(f"no setting of any layer saves an expert at batch {config.batch}: there is nothing to choose")
    outcomes, chosen = measure_combinations(path, off, config, bench)
    top_k = artifact.config.num_experts_per_token
    recommended = Recommendation(
        tensors_sha256=artifact.config.tensors_sha256,
        policy=policy_for(artifact),
        layers={layer: path[chosen].get(layer, LayerSetting(select_top_k=top_k)) for layer in layers},
        batch=config.batch,
        budget=str(config.budget),
        texts=f"{config.num_samples} texts of {config.length} tokens of {config.dataset}, {config.prompt_length} of "
        f"them the prompt, to tune on, and {config.num_samples} others, less what does not fill a batch",
        curve=[outcomes[place] for place in sorted(outcomes)],
        tuned=outcomes[chosen],
        **measure_on_held_out(path[chosen], layers, top_k, config, bench),
        versions=versions(),
    )
    for table in tables(recommended, config.budget):
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    return recommended


def measure_single_layers(
    batch: int, layers: Sequence[int], off: LockstepResult, bench: Bench
) -> dict[int, dict[LayerSetting, Cost]]:
    """Returns what each setting of each layer costs, the other layers as they are."""
    settings = bench.candidates(batch)
    singles = [(layer, setting) for layer in layers for setting in settings[layer]]
    runs = [Run(texts="tuning", batch=batch, layers={layer: setting}) for layer, setting in singles]
    costs: dict[int, dict[LayerSetting, Cost]] = {layer: {} for layer in layers}
    for (layer, setting), result in zip(singles, bench.results("single layers", runs), strict=True):
        # A result has the mean over layers, of which one has changed.
        saved = (off.active_experts - result.active_experts) * len(layers)
        costs[layer][setting] = Cost(off.active_experts - saved, result.divergence)
    return costs


def measure_combinations(
    path: Sequence[Combination], off: LockstepResult, config: TuningConfig, bench: Bench
) -> tuple[dict[int, Outcome], int]:
    """Returns what combinations along the path came to, by their places on it, and the place of the one to choose.

    Raises:
        ValueError: none is within the budget.
    """
    outcomes: dict[int, Outcome] = {}
    ends, count = (0, len(path) - 1), COMBINATIONS
    for _ in range(1 + ROUNDS):
        places = [place for place in evenly_spaced(*ends, count) if place not in outcomes]
        runs = [Run(texts="tuning", batch=config.batch, layers=path[place]) for place in places]
        for place, result in zip(places, bench.results("combinations", runs), strict=True):
            outcomes[place] = outcome_of(result, off, config.batch)
        within, outside = bracket(outcomes, config.budget)
        if within is None:
            raise ValueError(over_budget_message(config.budget, outcomes))
        if outside is None:
            break
        ends, count = (min(within, outside), max(within, outside)), REFINED + 2
    return outcomes, within


def measure_on_held_out(
    chosen: Combination, layers: Sequence[int], top_k: int, config: TuningConfig, bench: Bench
) -> dict[str, Any]:
    """Returns the fields of a Recommendation that say what it costs on the texts that had no say."""
    batches = sorted({each for each in (*BATCHES, config.batch) if each <= config.num_samples})
    same_in_all = {keep: dict.fromkeys(layers, LayerSetting(select_top_k=keep)) for keep in range(1, top_k)}
    off_runs, our_runs = ([Run(texts="report", batch=each, layers=own) for each in batches] for own in ({}, chosen))
    uniform_runs = [Run(texts="report", batch=config.batch, layers=own) for own in same_in_all.values()]
    results = iter(bench.results("on other texts", [*off_runs, *our_runs, *uniform_runs]))
    off, ours = ({each: next(results) for each in batches} for _ in range(2))
    return {
        "off": [outcome_of(off[each], off[each], each) for each in batches],
        "recommended": [outcome_of(ours[each], off[each], each) for each in batches],
        "uniform": {
            keep: outcome_of(result, off[config.batch], config.batch)
            for keep, result in zip(same_in_all, results, strict=True)
        },
    }


def over_budget_message(budget: Budget, outcomes: dict[int, Outcome]) -> str:
    if budget.kind == "active_experts":
        fewest = min(outcome.active_experts for outcome in outcomes.values())
        return f"nothing fits the budget, {budget}: the fewest that were reached are {fewest:.1f}"
    mildest = outcomes[min(outcomes)]
    number, error = getattr(mildest, budget.kind), getattr(mildest, f"{budget.kind}_error")
    return (
        f"nothing fits the budget, {budget}: the mildest setting came to {number:.2g} +- {error:.2g} at "
        f"{mildest.active_experts:.1f} active experts, and two standard errors count as spent. Raise the budget, or "
        "use more texts (--num-samples)"
    )


def tables(recommended: Recommendation, budget: Budget) -> list[Table]:
    """Returns the trade-off, what was found for each layer, and what it costs, for people."""

    def row(outcome: Outcome, off: Outcome | None = None) -> list[str]:
        active = f"{outcome.active_experts:.1f}" + (f" of {off.active_experts:.1f}" if off else "")
        kl = f"{outcome.kl:.4f} ±{outcome.kl_error:.4f}"
        rise = f"{outcome.loss_rise:+.4f} ±{outcome.loss_rise_error:.4f}"
        return [active, kl, rise, f"{outcome.perplexity:.2f}", f"{outcome.top1:.1%} ±{outcome.top1_error:.1%}"]

    headings = ("active experts", "KL", "loss", "perplexity", "likeliest token kept")
    settings = {"title_justify": "left", "box": box.SIMPLE}
    curve = Table("", *headings, title=f"trade-off on the texts to tune on, batch {recommended.batch}", **settings)
    for outcome in recommended.curve:
        mark = "->" if outcome == recommended.tuned else "" if budget.holds(outcome) else "over budget"
        curve.add_row(mark, *row(outcome))
    layers = Table("layer", "setting", title=f"recommended, policy {recommended.policy}", **settings)
    for layer, setting in recommended.layers.items():
        layers.add_row(str(layer), str(setting))
    there = Table("", *headings, title="on other texts, which had no say", **settings)
    for off, ours in zip(recommended.off, recommended.recommended, strict=True):
        there.add_row(f"recommended, batch {ours.batch}", *row(ours, off))
    for keep, outcome in recommended.uniform.items():
        there.add_row(f"S = {keep}, batch {outcome.batch}", *row(outcome, recommended.at(recommended.off)))
    return [curve, layers, there]


def run(config: TuningConfig) -> None:
    """Find the settings that fit a budget best, and write them into an artifact as its recommended policy."""
    recommended = tune(config)
    ours = recommended.at(recommended.recommended)
    number = getattr(ours, config.budget.kind)
    verdict = "within" if number <= config.budget.most else "NOT within"
    print(f"wrote {config.artifact}: {recommended}")
    print(f"on texts that had no say that is {verdict} the budget. Serve it with policy: recommended", flush=True)


main = command(TuningConfig, run)

if __name__ == "__main__":
    typer.run(main)
