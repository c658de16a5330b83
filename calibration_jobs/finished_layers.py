"""Layers that a calibration has finished, one file each, so that the same command goes on where it was stopped."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from calibration_jobs.resume import Fingerprint, check_same_job
from sere_dist.artifact.layer import LayerStatistics
from sere_dist.calibration.layers import LayerResult
from sere_dist.files import written_whole

JOB_FILE = "job.json"
TOKENS = "tokens"  # beside the tensors of an artifact


class FinishedLayers:
    """The folder `<output>.partial`: which calibration it belongs to, and each layer's result as it lands."""

    def __init__(self, output: Path, fingerprint: Fingerprint, restart: bool):
        """Opens the folder, or makes it. With `restart` the layers of whichever calibration are thrown away.

        Raises:
            ValueError: the folder holds the layers of another calibration; the message says what differs.
        """
        self.path = output.resolve().with_name(f"{output.name}.partial")
        if restart and (self.path / JOB_FILE).exists():
            self.discard()
        if (self.path / JOB_FILE).exists():
            check_same_job(
                self.path,
                kept=json.loads((self.path / JOB_FILE).read_text()),
                own=fingerprint,
                what="layers of another calibration",
                instead="finish that one with the command that began it, choose another --output",
            )
        self.path.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path / JOB_FILE) as file:
            file.write_text(json.dumps(fingerprint, indent=2))

    def add(self, result: LayerResult) -> None:
        """Writes one layer's result; it is there whole or not at all."""
        tensors = result.tensors()
        if result.tokens_E is not None:
            tensors[TOKENS] = result.tokens_E
        metadata = {
            "statistics": result.statistics.model_dump_json(),
            "block_tokens": str(result.block_tokens),
            "halved": str(result.halved),
        }
        with written_whole(self.path / f"layer-{result.statistics.layer:04}.safetensors") as file:
            file.write_bytes(save(tensors, metadata))

    def __iter__(self) -> Iterator[LayerResult]:
        """Yields the finished layers in order."""
        for path in sorted(self.path.glob("layer-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
            yield LayerResult(
                similarity_EE=tensors["similarity"],
                statistics=LayerStatistics.model_validate_json(metadata["statistics"]),
                coefficient_EE=tensors.get("coefficient"),
                size_E=tensors.get("size"),
                coactivation_EE=tensors.get("coactivation"),
                tokens_E=tensors.get(TOKENS),
                block_tokens=int(metadata["block_tokens"]),
                halved=int(metadata["halved"]),
            )

    def discard(self) -> None:
        shutil.rmtree(self.path)
