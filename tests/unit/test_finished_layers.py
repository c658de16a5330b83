"""What a stopped calibration left on disk: damaged, or another job's."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from calibration_jobs import lock
from calibration_jobs.finished_layers import JOB_FILE, LOCK_FILE, SENSITIVITIES_FILE, FinishedLayers
from sere_dist.artifact.sources import SourceStatistics
from sere_dist.calibration.layers import LayerResult
from sere_dist.calibration.sensitivity import Sensitivity
from tests.support.artifacts import small_artifact

FINGERPRINT = {"model": "nobody/small-moe", "seed": 1}


def result(layer: int) -> LayerResult:
    made = small_artifact(layers=(layer,)).layers[layer]
    sources = [
        SourceStatistics(layer=layer, source="chats", tokens=9, own_kept=0.5),
        SourceStatistics(layer=layer, source="code", tokens=1),
    ]
    return LayerResult(made.similarity_EE, made.statistics, sources=sources, block_tokens=8, halved=0)


@pytest.fixture
def output(tmp_path):
    """Where a calibration has finished layers 0 to 2."""
    with FinishedLayers(tmp_path / "out", FINGERPRINT, restart=False) as finished:
        for layer in range(3):
            finished.add(result(layer))
    return tmp_path / "out"


def layers(output, **how) -> list[int]:
    with FinishedLayers(output, FINGERPRINT, **{"restart": False} | how) as finished:
        return [each.statistics.layer for each in finished]


def test_finished_layers_are_there_again(output):
    with FinishedLayers(output, FINGERPRINT, restart=False) as finished:
        again = {each.statistics.layer: each for each in finished}
        assert again.keys() == {0, 1, 2} and torch.equal(again[1].similarity_EE, result(1).similarity_EE)
        assert again[1].sources == result(1).sources
        assert "layer-0001" not in Path("/proc/self/maps").read_text(), (
            "a network file system could not remove a file that is mapped"
        )
        finished.discard()
        assert not finished.path.exists()


@pytest.mark.parametrize("damage", [b"", b"garbage", 100])
def test_a_damaged_layer_is_not_finished(output, damage, capsys):
    file = output.with_name("out.partial") / "layer-0001.safetensors"
    file.write_bytes(file.read_bytes()[:damage] if isinstance(damage, int) else damage)
    assert layers(output) == [0, 2]
    assert f"{file} can't be read, so its layer is scored again" in capsys.readouterr().out


def test_what_errors_cost_is_there_again(output, capsys):
    found = {0: Sensitivity(2e-4, 1e-5), 2: Sensitivity(1e-4, 3e-6)}
    with FinishedLayers(output, FINGERPRINT, restart=False) as finished:
        assert finished.sensitivities is None
        finished.sensitivities = found
    with FinishedLayers(output, FINGERPRINT, restart=False) as finished:
        assert finished.sensitivities == found
        (finished.path / SENSITIVITIES_FILE).write_text('{"0": 1}')
        assert finished.sensitivities is None
        assert f"{SENSITIVITIES_FILE} can't be read, so it is measured again" in capsys.readouterr().out
        finished.sensitivities = found
    with FinishedLayers(output, FINGERPRINT, restart=True) as finished:
        assert finished.sensitivities is None


def test_a_damaged_description_is_named(output):
    file = output.with_name("out.partial") / JOB_FILE
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{JOB_FILE} can't be read .*--restart"):
        layers(output)
    assert layers(output, restart=True) == []


def test_one_job_at_a_time(output):
    """Not with --restart either, which would throw the layers of the running one away."""
    with FinishedLayers(output, FINGERPRINT, restart=False) as running:
        for restart in (False, True):
            with pytest.raises(ValueError, match=f"another job's .process {os.getpid()} on .*: wait for it or stop it"):
                layers(output, restart=restart)
        assert len(list(running)) == 3
    assert layers(output) == [0, 1, 2]


def hold(path) -> None:
    lock.Lock(path).take()
    time.sleep(600)


def test_the_lock_of_a_job_that_was_killed_is_taken_over(output, monkeypatch):
    """At once where its process is known to be gone; else once the lock has not moved for a while."""
    file = output.with_name("out.partial") / LOCK_FILE
    process = multiprocessing.get_context("fork").Process(target=hold, args=(file,))
    process.start()
    while not file.exists() or not file.read_text().endswith("}"):
        time.sleep(0.01)
    process.kill()
    process.join()
    abandoned = file.read_text()
    assert layers(output) == [0, 1, 2] and not file.exists()
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    for left in (json.dumps(json.loads(abandoned) | {"host": "elsewhere"}), abandoned[:20], "", "[]"):
        file.write_text(left)
        assert layers(output) == [0, 1, 2]
