"""Ranks that would not re-route alike stop at their start: real processes, joined as vLLM joins its workers."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.agreement import what_must_agree
from tests.support.artifacts import small_artifact

RANK = textwrap.dedent(
    """
    import json, sys
    from datetime import timedelta
    import torch.distributed as dist
    from sere_dist.vllm_plugin.agreement import check_agreement

    rank, file, own, timeout = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=2)
    if own != "no plugin":
        check_agreement(json.loads(own), timedelta(seconds=float(timeout)))
    print("goes on")
    dist.barrier()
    """
)


def start(tmp_path, *owns: str, timeout: float = 120) -> list[subprocess.CompletedProcess]:
    arguments = [sys.executable, "-c", RANK]
    processes = [
        subprocess.Popen(
            [*arguments, str(rank), str(tmp_path / "store"), own, str(timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, own in enumerate(owns)
    ]
    outputs = []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            outputs.append(subprocess.CompletedProcess(process.args, process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return outputs


@pytest.mark.long
def test_ranks_that_agree_go_on(tmp_path):
    for done in start(tmp_path, '{"settings": "S = 2"}', '{"settings": "S = 2"}'):
        assert done.returncode == 0 and "goes on" in done.stdout, done.stdout


@pytest.mark.long
def test_ranks_that_differ_stop(tmp_path):
    for done in start(tmp_path, '{"settings": "S = 2"}', '{"settings": "S = 3"}'):
        assert done.returncode != 0 and "goes on" not in done.stdout
        assert "would not re-route alike" in done.stdout and "settings: S = " in done.stdout, done.stdout


@pytest.mark.long
def test_a_rank_without_the_plugin_is_named(tmp_path):
    first, second = start(tmp_path, '{"settings": "S = 2"}', "no plugin", timeout=5)
    assert "rank 1 has not said in 5 s that it re-routes" in first.stdout, first.stdout
    assert "goes on" in second.stdout


def test_what_must_agree(tmp_path):
    """Paths may differ between nodes, what is read from them may not."""
    settings = ReroutingConfig(artifact=tmp_path / "here", select_top_k=2)
    artifact = small_artifact()
    own = what_must_agree(settings, artifact, None)
    elsewhere = what_must_agree(settings.model_copy(update={"artifact": tmp_path / "there"}), small_artifact(), None)
    assert own == elsewhere
    other = what_must_agree(settings.model_copy(update={"threshold": 0.5}), artifact, None)
    assert {name for name in own if own[name] != other[name]} == {"settings"}
    first = next(iter(artifact.layers))
    layer = artifact.layers[first]
    changed = replace(layer, similarity_EE=torch.zeros_like(layer.similarity_EE))
    other = what_must_agree(settings, replace(artifact, layers={**artifact.layers, first: changed}), None)
    assert {name for name in own if own[name] != other[name]} == {"artifact"}
