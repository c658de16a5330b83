"""Layers that a calibration has finished, one file each, so that the same command goes on where it was stopped."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from calibration_jobs.lock import Lock
from calibration_jobs.resume import Fingerprint, check_same_job
from sere_dist.artifact.layer import LayerStatistics
from sere_dist.artifact.sources import SourceStatistics
from sere_dist.calibration.layers import LayerResult
from sere_dist.calibration.sensitivity import Sensitivities, Sensitivity
from sere_dist.files import written_whole

JOB_FILE, LOCK_FILE, LAYER_FILES = "job.json", "lock.json", "layer-*.safetensors"
SENSITIVITIES_FILE = "sensitivities.json"
TOKENS = "tokens"  # beside the tensors of an artifact
SALIENCY = "saliency"


class FinishedLayers:
    """The folder `<output>.partial`: which calibration it belongs to, who works on it, and each layer's result as it
    lands. Use as a context manager."""

    def __init__(self, output: Path, fingerprint: Fingerprint, restart: bool):
        """Opens the folder, or makes it. With `restart` the layers of whichever calibration are thrown away.

        Raises:
            ValueError: another job works on the folder, or it holds the layers of another calibration; the message says
                which job, or what differs.
        """
        self.path = output.resolve().with_name(f"{output.name}.partial")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.path / LOCK_FILE)
        self.lock.take()
        try:
            self._open(fingerprint, restart)
        except BaseException:
            self.lock.leave()
            raise

    def _open(self, fingerprint: Fingerprint, restart: bool) -> None:
        job = self.path / JOB_FILE
        if restart:
            for file in (*self.path.glob(LAYER_FILES), self.path / SENSITIVITIES_FILE, job):
                file.unlink(missing_ok=True)
        if job.exists():
            try:
                kept = json.loads(job.read_text())
            except ValueError as error:
                raise ValueError(f"{job} can't be read ({error}): throw its layers away with --restart") from error
            check_same_job(
                self.path,
                kept=kept,
                own=fingerprint,
                what="layers of another calibration",
                instead="finish that one with the command that began it, choose another --output",
            )
        with written_whole(job) as file:
            file.write_text(json.dumps(fingerprint, indent=2))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception) -> None:
        self.lock.leave()

    def add(self, result: LayerResult) -> None:
        """Writes one layer's result; it is there whole or not at all."""
        tensors = result.tensors()
        if result.tokens_E is not None:
            tensors[TOKENS] = result.tokens_E
        if result.saliency_E is not None:
            tensors[SALIENCY] = result.saliency_E
        metadata = {
            "statistics": result.statistics.model_dump_json(),
            "block_tokens": str(result.block_tokens),
            "halved": str(result.halved),
            "sources": json.dumps([row.model_dump() for row in result.sources]),
        }
        with written_whole(self.path / LAYER_FILES.replace("*", f"{result.statistics.layer:04}")) as file:
            file.write_bytes(save(tensors, metadata))

    def __iter__(self) -> Iterator[LayerResult]:
        """Yields the finished layers in order. One whose file is damaged is not finished."""
        for path in sorted(self.path.glob(LAYER_FILES)):
            try:
                result = read_layer(path)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                print(f"{path} can't be read, so its layer is scored again: {error}", flush=True)
                continue
            yield result

    @property
    def sensitivities(self) -> Sensitivities | None:
        """The sensitivities of layers, None until they are set. A damaged file holds none."""
        try:
            kept = json.loads((self.path / SENSITIVITIES_FILE).read_text())
            return {int(layer): Sensitivity(*pair) for layer, pair in kept.items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            print(f"{self.path / SENSITIVITIES_FILE} can't be read, so it is measured again: {error}", flush=True)
            return None

    @sensitivities.setter
    def sensitivities(self, found: Sensitivities) -> None:
        with written_whole(self.path / SENSITIVITIES_FILE) as file:
            file.write_text(json.dumps(found))

    def discard(self) -> None:
        self.lock.leave()
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():  # a network file system keeps files that some process still reads
            print(f"{self.path} could not be removed; it is not needed any more", flush=True)


def read_layer(path: Path) -> LayerResult:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        # Copies: the tensors are views of the file, which stays mapped as long as one of them is there.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no dict
    return LayerResult(
        similarity_EE=tensors["similarity"],
        statistics=LayerStatistics.model_validate_json(metadata["statistics"]),
        coefficient_EE=tensors.get("coefficient"),
        size_E=tensors.get("size"),
        coactivation_EE=tensors.get("coactivation"),
        tokens_E=tensors.get(TOKENS),
        saliency_E=tensors.get(SALIENCY),
        sources=[SourceStatistics.model_validate(row) for row in json.loads(metadata["sources"])],
        block_tokens=int(metadata["block_tokens"]),
        halved=int(metadata["halved"]),
    )
