"""What a tuning measures, and the workers that measure it.

A trial decodes texts in lockstep batches (`sere_dist.evaluation.lockstep`) with a setting for each layer. Workers hold
the model and the texts; the driver hands them trials, and keeps every result.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult
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


def policy_for(artifact: Artifact) -> Literal["sere", "projection"]:
    """Returns the policy that is tuned: projection where the artifact has the tables for it."""
    return "projection" if artifact.is_projection else "sere"


@ray.remote
class Evaluator:
    """A worker with the model and the texts."""

    def __init__(self, source: ModelSource, artifact: Artifact, texts: dict[str, torch.Tensor], prompt_length: int):
        transformers_logging.disable_progress_bar()
        dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
        model = load_model(source.name, source.device, dtype, source.revision)
        self.held_out = {name: HeldOut(model, ids_NL, prompt_length) for name, ids_NL in texts.items()}
        self.tables = {layer: tables.to(source.device) for layer, tables in artifact.tables.items()}
        self.top_k = artifact.config.num_experts_per_token
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

    def run_trial(self, trial: Trial) -> dict[str, Any]:
        """Returns the fields of a LockstepResult."""
        rerouter = rerouter_of(self.tables, self.policy, trial.layers)
        if self.policy != "projection":
            return asdict(self.held_out[trial.texts].run(rerouter, trial.batch))
        estimating = Estimating(rerouter, self.tables)
        result = self.held_out[trial.texts].run(estimating, trial.batch)
        return asdict(replace(result, estimated_error=estimating.error))


@dataclass
class TrialRunner:
    """Runs trials on all workers, none twice, and says how far it is."""

    pool: ActorPool  # of Evaluators
    measurements: Measurements

    def find_candidates(self, batch: int) -> dict[int, list[LayerSetting]]:
        """Returns the settings to try in each layer."""
        key = json.dumps({"candidates": batch})
        found = self._measure("settings to try", {key: ("find_candidates", batch)})[key]
        return {layer: [LayerSetting(**setting) for setting in settings] for layer, settings in found}

    def run(self, title: str, trials: Sequence[Trial]) -> list[LockstepResult]:
        """Returns the result of each trial; `title` names them all where progress is shown."""
        values = self._measure(title, {trial.key: ("run_trial", trial) for trial in trials})
        return [LockstepResult(**values[trial.key]) for trial in trials]

    def _measure(self, title: str, calls: dict[str, tuple[str, Any]]) -> dict[str, Any]:
        values = self.measurements.values
        missing = {key: call for key, call in calls.items() if key not in values}
        with tqdm(
            total=len(calls), initial=len(calls) - len(missing), desc=title, disable=not sys.stderr.isatty()
        ) as bar:
            for count, (key, value) in enumerate(self.pool.run(missing), len(calls) - len(missing) + 1):
                self.measurements.add(key, value)
                bar.update()
                if bar.disable and (10 * count // len(calls) > 10 * (count - 1) // len(calls)):
                    print(f"{title}: {count} of {len(calls)}", flush=True)
        return {key: values[key] for key in calls}
