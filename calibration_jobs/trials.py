"""What a tuning measures, and the workers that measure it.

A trial decodes texts in lockstep batches (`sere_dist.evaluation.lockstep`) with a setting for each layer. Workers hold
the texts, and the model or one of its layers; the driver hands them trials, and keeps every result.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, Literal, NamedTuple

import ray
import torch
from pydantic import BaseModel
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from calibration_jobs.measurements import Measurements
from calibration_jobs.pool import ActorPool
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.memory import with_halving
from sere_dist.evaluation.layered import LayeredHeldOut
from sere_dist.evaluation.lockstep import Decoding, HeldOut, LockstepResult
from sere_dist.evaluation.rerouters import Estimating
from sere_dist.evaluation.tuning import candidates, losses_of_steps, rerouter_of
from sere_dist.moe import load_model


class Trial(BaseModel, frozen=True):
    """All texts of a set, in batches, with each layer's setting; layers without one are off."""

    texts: Literal["tuning", "report"]
    batch: int
    layers: dict[int, LayerSetting] = {}

    @property
    def key(self) -> str:
        return self.model_dump_json()


class ModelSource(NamedTuple):
    """Which model a worker loads, and how."""

    name: str
    revision: str | None
    device: Literal["cpu", "cuda"]
    dtype: str  # a name of torch's, or `auto`: the checkpoint's own
    by_layers: bool  # one decoder layer at a time, in float32

    def hold(self, texts: dict[str, torch.Tensor], prompt_length: int) -> dict[str, HeldOut | LayeredHeldOut]:
        """Returns what decodes each set of texts [N, L]."""
        if self.by_layers:
            checkpoint = Checkpoint(self.name, self.revision)
            return {
                name: LayeredHeldOut(checkpoint, ids_NL, prompt_length, self.device) for name, ids_NL in texts.items()
            }
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model = load_model(self.name, self.device, dtype, self.revision)
        return {name: HeldOut(model, ids_NL, prompt_length) for name, ids_NL in texts.items()}


def policy_for(artifact: Artifact) -> Literal["sere", "projection"]:
    """Returns the policy that is tuned: projection where the artifact has the tables for it."""
    return "projection" if artifact.is_projection else "sere"


@ray.remote
class Evaluator:
    """A worker with the texts, and the model or one layer of it at a time."""

    def __init__(self, source: ModelSource, artifact: Artifact, texts: dict[str, torch.Tensor], prompt_length: int):
        transformers_logging.disable_progress_bar()
        self.held_out = source.hold(texts, prompt_length)
        self.tables = {layer: tables.to(source.device) for layer, tables in artifact.tables.items()}
        self.top_k = artifact.config.num_experts_per_token
        self.num_layers = artifact.config.num_layers
        self.policy = policy_for(artifact)

    def find_candidates(self, batch: int) -> list[tuple[int, list[dict[str, Any]]]]:
        """Returns each layer and the settings to try in it."""
        is_projection = self.policy == "projection"
        losses = losses_of_steps(self.held_out["tuning"], batch, self.tables) if is_projection else {}
        found = []
        for layer, tables in self.tables.items():
            settings = candidates(self.policy, self.top_k, tables.similarity_EE.cpu(), losses.get(layer))
            found.append((layer, [setting.model_dump() for setting in settings]))
        return found

    def run_trials(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        """Returns the fields of each trial's LockstepResult; all trials are of one set of texts.

        Half as many go through the layers at a time whenever memory runs out.
        """

        def in_parts(size: int) -> list[dict[str, Any]]:
            parts = [trials[start : start + size] for start in range(0, len(trials), size)]
            return [fields for part in parts for fields in self._run(part)]

        return with_halving(len(trials), in_parts, "a trial")[0]

    def _run(self, trials: Sequence[Trial]) -> list[dict[str, Any]]:
        (texts,) = {trial.texts for trial in trials}
        rerouters = [rerouter_of(self.tables, self.policy, trial.layers) for trial in trials]
        estimating = [Estimating(each, self.tables) for each in rerouters] if self.policy == "projection" else []
        results = self.held_out[texts].run_all(
            [
                Decoding(rerouter, trial.batch, min(trial.layers, default=self.num_layers))
                for rerouter, trial in zip(estimating or rerouters, trials, strict=True)
            ]
        )
        if estimating:
            pairs = zip(results, estimating, strict=True)
            results = [replace(result, estimated_error=each.error) for result, each in pairs]
        return [asdict(result) for result in results]


@dataclass
class TrialRunner:
    """Runs trials on all workers, none twice, and says how far it is."""

    pool: ActorPool  # of Evaluators
    measurements: Measurements
    trials_a_pass: int = 1  # that a worker runs together: by layers, they share what it reads

    def find_candidates(self, batch: int) -> dict[int, list[LayerSetting]]:
        """Returns the settings to try in each layer."""
        key = json.dumps({"candidates": batch})
        if key not in self.measurements.values:
            for _, found in self.pool.run({key: ("find_candidates", batch)}):
                self.measurements.add(key, found)
        found = self.measurements.values[key]
        return {layer: [LayerSetting(**setting) for setting in settings] for layer, settings in found}

    def run(self, title: str, trials: Sequence[Trial]) -> list[LockstepResult]:
        """Returns the result of each trial; `title` names them all where progress is shown."""
        values = self.measurements.values
        missing = [trial for trial in trials if trial.key not in values]
        groups = {str(place): group for place, group in enumerate(self._groups(missing))}
        known, measured, started = len(trials) - len(missing), 0, time.monotonic()
        with tqdm(total=len(trials), initial=known, desc=title, disable=not sys.stderr.isatty()) as bar:
            for place, found in self.pool.run({place: ("run_trials", group) for place, group in groups.items()}):
                for trial, value in zip(groups[place], found, strict=True):
                    self.measurements.add(trial.key, value)
                before, measured = measured, measured + len(found)
                bar.update(len(found))
                tenth_before, tenth = (10 * (known + count) // len(trials) for count in (before, measured))
                if bar.disable and (not before or tenth > tenth_before):
                    left = (len(missing) - measured) * (time.monotonic() - started) / measured
                    about = f", about {tqdm.format_interval(left)} left" if measured < len(missing) else ""
                    print(f"{title}: {known + measured} of {len(trials)}{about}", flush=True)
        return [LockstepResult(**values[trial.key]) for trial in trials]

    def _groups(self, trials: Sequence[Trial]) -> list[Sequence[Trial]]:
        """Parts trials into passes, as many for each worker, that take about as long.

        Trials come in the order of the layers that they change, and those of the first layers take longest.
        """
        if not trials:
            return []
        workers = self.pool.workers.count
        passes = ceil(len(trials) / self.trials_a_pass)
        passes = min(len(trials), ceil(passes / workers) * workers)
        return [trials[first::passes] for first in range(passes)]
