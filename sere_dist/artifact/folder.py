"""The artifact of a calibration: expert similarities of one model, in a folder of its own.

Keep it apart from the model's weights: vLLM loads every safetensors file that it finds beside them. The files are
`sere_config.json`, `similarity.safetensors`, `layers.csv` and `experts.csv` (what was seen), `sources.csv` (how well
each source of the texts is served, if there were several), `README.md` (a model card), `calibration.yaml` (the job's
resolved settings) and, once tuned, `recommended.json`. Nothing is pickled.
"""

import csv
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sere_dist.artifact.card import card
from sere_dist.artifact.hub import local_folder
from sere_dist.artifact.layer import ExpertStatistics, Layer, LayerStatistics, layer_of
from sere_dist.artifact.recommendation import Recommendation
from sere_dist.artifact.schema import (
    CARD_FILE,
    CONFIG_FILE,
    EXPERTS_FILE,
    LAYERS_FILE,
    RECOMMENDATION_FILE,
    SETTINGS_FILE,
    SOURCES_FILE,
    TENSORS_FILE,
    ArtifactConfig,
    ArtifactError,
)
from sere_dist.artifact.sources import SourceStatistics
from sere_dist.config import RECOMMENDED, ReroutingConfig
from sere_dist.files import written_whole
from sere_dist.method.records import LayerTables
from sere_dist.moe import MoeShape

logger = logging.getLogger(__name__)

Row = TypeVar("Row", bound=BaseModel)


@dataclass
class Artifact:
    """What a calibration found out about the experts of one model.

    Attributes:
        config: what was calibrated, on what, with what.
        layers: decoder layer index -> the tables of a MoE layer, in order.
        settings: the calibration job's resolved settings.
        recommended: the settings that a tuning found, None without one.
    """

    config: ArtifactConfig
    layers: dict[int, Layer]
    settings: dict[str, Any] = field(default_factory=dict)
    recommended: Recommendation | None = None

    @property
    def is_projection(self) -> bool:
        """Whether the tables are those of method projection, which policy projection needs."""
        return self.config.method == "projection"

    @property
    def tables(self) -> dict[int, LayerTables]:
        """What re-routing reads, by decoder layer index."""
        return {index: layer.tables for index, layer in self.layers.items()}

    def policy(self, settings: ReroutingConfig) -> str:
        """Returns the policy that all layers follow, "sere" or "projection".

        Raises:
            ArtifactError: policy `recommended`, and the artifact has none; or policy `projection`, and the artifact is
                not of that method.
        """
        policy = settings.policy
        if policy == "recommended":
            if self.recommended is None:
                raise ArtifactError(
                    f"policy: recommended needs an artifact that was tuned, {settings.artifact} was not: run python -m "
                    "calibration_jobs.tune, or set another policy"
                )
            policy = self.recommended.policy
        if policy == "projection" and not self.is_projection:
            raise ArtifactError(
                f"policy: projection needs an artifact of method projection, {settings.artifact} has "
                f"{self.config.method}: calibrate with --method projection, or set policy: sere"
            )
        return policy

    def settings_by_layer(self, settings: ReroutingConfig) -> dict[int, ReroutingConfig]:
        """Returns what each layer does: the settings themselves, or with policy `recommended` what that says.

        Raises:
            ArtifactError: see `policy`.
            ValueError: other settings don't go with what is recommended.
        """
        policy = self.policy(settings)
        if settings.policy != "recommended" or self.recommended is None:
            return dict.fromkeys(self.layers, settings)
        common: dict[str, Any] = settings.model_dump(exclude=set(RECOMMENDED)) | {"policy": policy}
        of_layers = self.recommended.layers
        return {layer: ReroutingConfig(**common, **of_layers[layer].model_dump()) for layer in self.layers}

    def check_serves(self, shape: MoeShape, model: str, revision: str | None = None) -> None:
        """Checks that the artifact is for the model being served.

        Another name or revision is only warned of: it may be a local copy, or a quantised sibling.

        Raises:
            ArtifactError: the model has another shape; the message names every field that differs.
        """
        own = self.config.shape
        differing = [
            f"{name}: artifact {getattr(own, name)}, model {getattr(shape, name)}"
            for name in MoeShape.__dataclass_fields__
            if getattr(own, name) != getattr(shape, name)
        ]
        if differing:
            raise ArtifactError(
                f"the artifact was calibrated for {self.config.base_model}, another model than the one being served "
                f"({'; '.join(differing)}). Calibrate this model: python -m calibration_jobs.calibrate --model ..."
            )
        if (self.config.base_model, self.config.revision) != (model, revision):
            logger.warning(
                "the artifact was calibrated on %s (revision %s), the model being served is %s (revision %s): "
                "make sure that their experts are the same",
                self.config.base_model,
                self.config.revision,
                model,
                revision,
            )

    def of_stage(self, layers: Container[int]) -> "Artifact":
        """Returns the artifact with the tables of some decoder layers alone, those of one stage of a pipeline."""
        return replace(self, layers={index: layer for index, layer in self.layers.items() if index in layers})

    def in_order(self, order: dict[int, torch.Tensor]) -> "Artifact":
        """Returns the tables for a model whose expert p of a layer is this artifact's expert `order[layer][p]`."""
        return replace(self, layers={index: layer.in_order(order[index]) for index, layer in self.layers.items()})

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes the artifact aside, in the same parent folder, and renames it to `path` when it is whole.

        Raises:
            FileExistsError: `path` is there and `overwrite` is not set; nothing was changed.
            OSError: `path` can't be written; what was there is there again.
            ArtifactError: the content would not load again; nothing was changed.
        """
        path = Path(path).resolve()
        check_output(path, overwrite)
        tensors = {
            f"layers.{index}.{name}": tensor
            for index, layer in self.layers.items()
            for name, tensor in layer.tensors().items()
        }
        payload = save_tensors(tensors)
        has_coactivation = any(layer.coactivation_EE is not None for layer in self.layers.values())
        decided = {"tensors_sha256": hashlib.sha256(payload).hexdigest(), "coactivation": has_coactivation}
        config = self.config.model_copy(update=decided)
        rows = [layer.statistics for layer in self.layers.values()]
        experts = [row for layer in self.layers.values() for row in layer.experts()]
        _check_tensors(path, config, tensors)
        sources = [row for layer in self.layers.values() for row in layer.sources]
        _check_layers(path, config, rows, experts, sources)
        if self.recommended is not None:
            _check_recommended(path, config, self.recommended)

        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            written = Path(aside) / "new"
            written.mkdir()
            (written / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
            (written / TENSORS_FILE).write_bytes(payload)
            (written / SETTINGS_FILE).write_text(yaml.safe_dump(self.settings, sort_keys=False))
            (written / CARD_FILE).write_text(card(config, self.layers.values(), self.recommended))
            if self.recommended is not None:
                (written / RECOMMENDATION_FILE).write_text(self.recommended.model_dump_json(indent=1) + "\n")
            _write_rows(written / LAYERS_FILE, rows)
            if sources:
                _write_rows(written / SOURCES_FILE, sources)
            if experts:
                _write_rows(written / EXPERTS_FILE, experts)
            _replace(path, written, overwrite)

    @classmethod
    def load(cls, path: str | Path) -> "Artifact":
        """Reads and checks an artifact in a folder, or on the Hub: `hf://ORG/NAME`, or `hf://ORG/NAME@REVISION`.

        Raises:
            ArtifactError: a file is missing or damaged, or a field is wrong, and the message names it; or it can't be
                fetched.
        """
        path = local_folder(path)
        try:
            config = ArtifactConfig.model_validate_json((path / CONFIG_FILE).read_bytes())
            payload = (path / TENSORS_FILE).read_bytes()
            settings = yaml.safe_load((path / SETTINGS_FILE).read_text())
            statistics = _read_rows(path / LAYERS_FILE, LayerStatistics)
            sources = _rows_if_any(path / SOURCES_FILE, SourceStatistics)
            experts = _rows_if_any(path / EXPERTS_FILE, ExpertStatistics)
            tuned = path / RECOMMENDATION_FILE
            recommended = Recommendation.model_validate_json(tuned.read_bytes()) if tuned.exists() else None
        except FileNotFoundError as error:
            raise ArtifactError(f"no artifact at {path}: {error.filename} is missing") from error
        except OSError as error:
            raise ArtifactError(f"no artifact can be read at {path}: {error}") from error
        except (ValueError, yaml.YAMLError, csv.Error) as error:
            raise ArtifactError(f"damaged artifact at {path}: {error}") from error
        digest = hashlib.sha256(payload).hexdigest()
        if digest != config.tensors_sha256:
            raise ArtifactError(
                f"{path / TENSORS_FILE} is not the file that was written: its SHA-256 is {digest}, "
                f"tensors_sha256 in {CONFIG_FILE} is {config.tensors_sha256}. Copy it again, or calibrate again."
            )
        try:
            tensors = load_tensors(payload)
        except SafetensorError as error:
            raise ArtifactError(f"{path / TENSORS_FILE}: {error}") from error
        _check_tensors(path, config, tensors)
        _check_layers(path, config, statistics, experts, sources)
        if recommended is not None:
            _check_recommended(path, config, recommended)
        layers = {
            row.layer: layer_of(
                {name: tensors[f"layers.{row.layer}.{name}"] for name in config.tensor_kinds},
                statistics=row,
                experts=[each for each in experts if each.layer == row.layer],
                sources=[each for each in sources if each.layer == row.layer],
            )
            for row in statistics
        }
        return cls(config, layers, settings or {}, recommended)


def write_recommendation(path: Path, recommended: Recommendation) -> None:
    """Writes what is recommended into the artifact at `path`, and into its card; nothing else there is touched.

    Raises:
        ArtifactError: the artifact is no longer the one that was tuned, or can't be read; nothing was changed.
        OSError: it can't be written.
    """
    artifact = Artifact.load(path)
    _check_recommended(path, artifact.config, recommended)
    texts = {
        RECOMMENDATION_FILE: recommended.model_dump_json(indent=1) + "\n",
        CARD_FILE: card(artifact.config, artifact.layers.values(), recommended),
    }
    for name, text in texts.items():
        with written_whole(path / name) as file:
            file.write_text(text)


def _replace(path: Path, written: Path, overwrite: bool) -> None:
    """Renames `written` to `path`; an artifact that is there goes only once the new one is in its place."""
    if not (overwrite and path.exists()):
        written.rename(path)  # raises if another job has put an artifact there meanwhile
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    path.rename(aside / "old")
    try:
        written.rename(path)
    except BaseException:
        (aside / "old").rename(path)
        raise
    finally:
        shutil.rmtree(aside)


def check_output(path: Path, overwrite: bool) -> None:
    """Raises an error if an artifact can't be written at `path`: before hours of work, not after.

    A folder that holds no artifact is never replaced, whatever `overwrite` says: it is somebody's something else.

    Raises:
        FileExistsError: `path` is there and may not be replaced.
        OSError: its parent folder can't be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
    if not path.exists():
        return
    is_artifact = (path / CONFIG_FILE).is_file()
    if not overwrite:
        hint = "--overwrite to replace it, or another --output" if is_artifact else "choose another --output"
        raise FileExistsError(f"{path} is already there: {hint}")
    if not is_artifact:
        raise FileExistsError(f"{path} is already there and holds no artifact ({CONFIG_FILE}): not replaced")


def _check_tensors(path: Path, config: ArtifactConfig, tensors: dict[str, torch.Tensor]) -> None:
    expected = {f"layers.{layer}.{kind}" for layer in config.layer_names for kind in config.tensor_kinds}
    if not expected or set(tensors) != expected:
        missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ArtifactError(f"{path}: tensors do not match layer_names: missing {missing}, unexpected {extra}")
    if outside := [layer for layer in config.layer_names if not 0 <= layer < config.num_layers]:
        raise ArtifactError(f"{path}: layer_names has {outside}, but num_layers is {config.num_layers}")
    for name, tensor in tensors.items():
        shape = (config.num_experts,) if name.endswith(".size") else (config.num_experts, config.num_experts)
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ArtifactError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, but num_experts calls for float32 {shape}"
            )
        if not tensor.isfinite().all():
            raise ArtifactError(f"{path}: {name} holds NaN or infinity")
        if not name.endswith(".similarity") and tensor.min() < 0:
            raise ArtifactError(f"{path}: {name} holds negative numbers")


def _check_layers(
    path: Path,
    config: ArtifactConfig,
    rows: list[LayerStatistics],
    experts: list[ExpertStatistics],
    sources: list[SourceStatistics],
) -> None:
    expected = sorted(config.layer_names)
    if [row.layer for row in rows] != expected:
        raise ArtifactError(
            f"{path}: {LAYERS_FILE} has rows for {[row.layer for row in rows]}, layer_names has {expected}"
        )
    in_order = [(layer, expert) for layer in expected for expert in range(config.num_experts)]
    if experts and [(row.layer, row.expert) for row in experts] != in_order:
        raise ArtifactError(f"{path}: {EXPERTS_FILE} does not have a row for each of num_experts in layer_names")
    if len({row.saliency is None for row in experts}) > 1:
        raise ArtifactError(f"{path}: {EXPERTS_FILE} has the saliency of some experts and not of others")
    of_layers = {layer: [row.source for row in sources if row.layer == layer] for layer in expected}
    if sources and (
        len(sources) != sum(map(len, of_layers.values()))
        or any(each != of_layers[expected[0]] or len(set(each)) < len(each) for each in of_layers.values())
    ):
        raise ArtifactError(f"{path}: {SOURCES_FILE} does not have one row for each source in layer_names")


def _check_recommended(path: Path, config: ArtifactConfig, recommended: Recommendation) -> None:
    if recommended.tensors_sha256 != config.tensors_sha256:
        raise ArtifactError(
            f"{path / RECOMMENDATION_FILE} was found with other matrices (tensors_sha256 {recommended.tensors_sha256}, "
            f"in {CONFIG_FILE} {config.tensors_sha256}): delete it, or run python -m calibration_jobs.tune again"
        )
    if recommended.layers.keys() != config.layer_names.keys():
        raise ArtifactError(
            f"{path / RECOMMENDATION_FILE} has layers {sorted(recommended.layers)}, layer_names has "
            f"{sorted(config.layer_names)}"
        )
    most = config.num_experts_per_token
    if wrong := [layer for layer, setting in recommended.layers.items() if setting.select_top_k > most]:
        raise ArtifactError(f"{path / RECOMMENDATION_FILE}: select_top_k of layers {wrong} is more than {most}")


def _write_rows(path: Path, rows: Sequence[BaseModel]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(type(rows[0]).model_fields))
        writer.writeheader()
        writer.writerows(row.model_dump() for row in rows)


def _read_rows(path: Path, kind: type[Row]) -> list[Row]:
    with path.open(newline="") as file:
        rows = ({name: value or None for name, value in row.items()} for row in csv.DictReader(file))
        return [kind.model_validate(row) for row in rows]


def _rows_if_any(path: Path, kind: type[Row]) -> list[Row]:
    return _read_rows(path, kind) if path.exists() else []
