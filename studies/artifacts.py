"""The example model's artifacts, calibrated on the protocol's texts."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from transformers import AutoTokenizer

from calibration_jobs.calibrate import CalibrationConfig, calibrate
from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.evaluation.protocol import CALIBRATION_LENGTH, Text, calibration_texts
from sere_dist.method.similarity import MethodName
from studies.common import ROOT

ARTIFACTS = ROOT / "build" / "studies"


def calibrated(method: MethodName, folder: Path = ARTIFACTS) -> Path:
    """Returns the artifact of this method in the folder, calibrated on the protocol's texts first if it is missing.

    What it holds is what `studies.quality` finds in its own process.
    """
    path = folder / method
    if not path.exists():
        texts = calibration_texts(CALIBRATION, AutoTokenizer.from_pretrained(MODEL))
        dataset = write_texts(folder / "calibration.parquet", texts)
        options: dict[str, Any] = {"num_samples": len(texts), "max_length": CALIBRATION_LENGTH}
        calibrate_into(path, model=str(MODEL), dataset=str(dataset), method=method, **options)
    return path


def calibrate_into(path: Path, **options: Any) -> None:
    """Writes an artifact by the job with these options, in a Ray cluster of its own."""
    calibrate(CalibrationConfig(output=path, **options))
    ray.shutdown()


def write_texts(path: Path, texts: list[Text]) -> Path:
    """Writes texts, in their order, as a dataset that a job reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [text.text for text in texts]}), path)
    return path
