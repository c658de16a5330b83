"""The table of environment variables, and how flags are read. `test_ingress.py` has the secrets."""

import re
from pathlib import Path

import pytest

from sere_dist.environment import ALLOW_UNTESTED_VLLM, VARIABLES, environment_flag

ROOT = Path(__file__).parents[2]
NAMED_BY_USERS = ("sere_dist", "serve_apps", "calibration_jobs", "deploy", "docs", "README.md", "cluster.yaml")


def test_every_variable_that_is_named_anywhere_is_in_the_table():
    paths = [ROOT / name for name in NAMED_BY_USERS]
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    text = "\n".join(file.read_text() for file in files if file.suffix in (".py", ".yaml", ".md"))
    assert set(re.findall(r"\bSERE_[A-Z]+(?:_[A-Z]+)*\b", text)) == VARIABLES.keys()


@pytest.mark.parametrize(("value", "is_on"), [(None, False), ("0", False), ("1", True)])
def test_flags(monkeypatch, value, is_on):
    monkeypatch.delenv(ALLOW_UNTESTED_VLLM, raising=False)
    if value is not None:
        monkeypatch.setenv(ALLOW_UNTESTED_VLLM, value)
    assert environment_flag(ALLOW_UNTESTED_VLLM) is is_on


@pytest.mark.parametrize("value", ["", "yes", "true", "2"])
def test_a_malformed_flag(monkeypatch, value):
    monkeypatch.setenv(ALLOW_UNTESTED_VLLM, value)
    with pytest.raises(ValueError, match=f"{ALLOW_UNTESTED_VLLM} must be 0 or 1, not"):
        environment_flag(ALLOW_UNTESTED_VLLM)
