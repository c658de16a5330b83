"""The example that needs an engine, run as a user runs it, on the artifact that another example writes."""

import re
import subprocess
import sys
from pathlib import Path

from examples import own_similarity

ROOT = Path(__file__).resolve().parents[2]


def test_vllms_offline_engine(tmp_path):
    """Every prompt is answered, and fewer experts run."""
    own_similarity.calibrate(tmp_path / "own-sere")
    command = [sys.executable, "-m", "examples.offline", str(tmp_path / "own-sere")]
    printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, timeout=500).stdout
    assert all(prompt in printed for prompt in ("In the beginning", "sea lion (noun):", ".. function:: sorted("))
    before, after = map(float, re.search(r"layer 0: ([\d.]+) .* before re-routing, ([\d.]+) after", printed).groups())
    assert 0 < after < before <= 64
