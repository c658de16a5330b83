"""lm-eval against the served example model, as a user runs it."""

import json
import subprocess

import pytest

from examples.application import ROOT
from sere_dist.admin import AdminError, request_settings
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.evaluation.accuracy import evaluate_off_and_on, restore_settings

pytestmark = pytest.mark.parametrize("url", ["one worker"], indirect=True)


@pytest.fixture
def enabled(cluster, url, monkeypatch):
    """Says whether re-routing is on."""
    monkeypatch.setenv(ADMIN_TOKEN, cluster.environment[ADMIN_TOKEN])
    with restore_settings(url):
        yield lambda: request_settings(url)["settings"]["enabled"]


def accuracy(cluster, url: str, *options: str) -> subprocess.CompletedProcess:
    command = ["sere-dist", "accuracy", url, "--suite", "examples/tiny_moe/tasks/heldout.yaml", *options]
    return cluster.run(command, cwd=ROOT, capture_output=True, text=True)


def test_off_and_on(cluster, url, enabled, tmp_path):
    results = tmp_path / "accuracy.json"
    done = accuracy(cluster, url, "--limit", "32", "--concurrency", "8", "--results", str(results))
    assert done.returncode == 0, done.stderr
    assert "8 requests at a time, S = 2" in done.stdout and "other answers" in done.stdout
    assert json.loads(results.read_text()) == json.loads(done.stdout.splitlines()[-1])
    report = json.loads(results.read_text())["tiny_moe_heldout"]
    assert report["settings"]["enabled"] and report["settings"]["rows"] == "decode" and report["concurrency"] == 8
    assert [report["runs"][way]["requests"] for way in ("off", "on")] == [32, 32]
    assert [row["metric"] for row in report["scores"]] == ["next_word", "right_words"]
    for row in report["scores"]:
        assert row["documents"] == 32 and row["other_answers"] > 0.2
        assert 0 < row["off"] < 1 and 0 < row["on"] < 1
        assert row["off_stderr"] > 0 and row["on_stderr"] > 0
        assert row["difference"] == pytest.approx(row["on"] - row["off"])
        # Both answers to a text are alike: their difference is known better than two scores of other texts would tell.
        assert 0 <= row["difference_stderr"] < (row["off_stderr"] ** 2 + row["on_stderr"] ** 2) ** 0.5
    assert enabled()


@pytest.mark.slow
def test_the_first_token_is_not_rerouted(cluster, url, enabled):
    """Why short answers tell nothing: the prompt's own step makes the first token."""
    done = accuracy(cluster, url, "--limit", "12", "--concurrency", "1", "--gen-kwargs", '{"max_gen_toks": 1}')
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])["tiny_moe_heldout"]
    assert [row["other_answers"] for row in report["scores"]] == [0, 0]
    assert "did it act at all?" in done.stderr


def test_the_settings_are_restored_after_a_failure(cluster, url, enabled):
    request_settings(url, {"enabled": False})
    done = accuracy(cluster, url, "--limit", "2", "--concurrency", "1", "--gen-kwargs", '{"max_gen_toks": 9999}')
    assert done.returncode == 1 and not done.stdout
    assert "max_model_len=512" in done.stderr and "error: 400" in done.stderr  # the server's words, and ours
    assert not enabled()
    request_settings(url, {"enabled": True})
    seen = []
    with pytest.raises(ZeroDivisionError):
        evaluate_off_and_on(url, lambda: seen.append(enabled()) or 1 / 0)
    assert seen == [False] and enabled()


def test_other_settings_meanwhile(url, enabled):
    with pytest.raises(AdminError, match="someone else changed the settings"):
        evaluate_off_and_on(url, lambda: request_settings(url, {"threshold": 0.0}) and {})
    assert enabled()
