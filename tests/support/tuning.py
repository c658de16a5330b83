"""The tuning of the tests: few short texts, and few workers that start."""

from pathlib import Path

from examples.tiny_moe.data import HELDOUT, MODEL

SIZES = {"--num-samples": "6", "--length": "24", "--prompt-length": "12", "--batch": "3", "--cpus-per-task": "4"}


def options(artifact: Path, **sizes: str) -> list[str]:
    """Returns the options of `calibration_jobs.tune`; with others, or others' values, as given."""
    given = {"--model": str(MODEL), "--artifact": str(artifact), "--dataset": str(HELDOUT)}
    given |= SIZES | {f"--{name.replace('_', '-')}": value for name, value in sizes.items()}
    return [word for option in given.items() for word in option]
