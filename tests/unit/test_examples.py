"""The examples that need no engine, run as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from examples.tiny_moe.data import MODEL
from sere_dist import Artifact
from sere_dist.moe import MoeShape

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *arguments: str) -> str:
    """Runs an example, and returns what it printed."""
    command = [sys.executable, "-m", f"examples.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout


def test_tensors_alone():
    """Slots move, fewer experts run, and the two heaviest experts of the first token stay."""
    printed = run("tensors")
    moved, slots = re.search(r"(\d+) of (\d+) slots moved", printed).groups()
    before, after = re.search(r"(\d+) active experts before, (\d+) after", printed).groups()
    assert 0 < int(moved) < int(slots) == 128 and int(after) < int(before)
    routed, rerouted = (json.loads(ids) for ids in re.search(r"first token: (\[.*\]) -> (\[.*\])", printed).groups())
    assert routed[:2] == rerouted[:2] and routed != rerouted


@pytest.mark.slow
def test_a_similarity_of_ones_own(tmp_path):
    """The artifact loads, fits the example model, and is symmetric."""
    assert "wrote" in run("own_similarity", str(tmp_path / "own-sere"))
    artifact = Artifact.load(tmp_path / "own-sere")
    artifact.check_serves(MoeShape.from_config(AutoConfig.from_pretrained(MODEL)), str(MODEL))
    assert artifact.config.method == "sign agreement" and len(artifact.layers) == 6
    for layer in artifact.layers.values():
        assert layer.similarity_EE.equal(layer.similarity_EE.T) and layer.statistics.similarity_mean < 0.9
