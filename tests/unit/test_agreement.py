"""Ranks that would not re-route alike stop at their start: real processes, joined as vLLM joins its workers."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from sere_dist.config import ReroutingConfig
from sere_dist.vllm_plugin.agreement import what_must_agree
from tests.support.artifacts import small_artifact

SCENARIOS = {
    "agree": [{"settings": "S = 2"}, {"settings": "S = 2"}],
    "differ": [{"settings": "S = 2"}, {"settings": "S = 3"}],
    "no plugin": [{"settings": "S = 2"}, None],
}
# One process goes through all scenarios: most of its time is an import.
RANK = textwrap.dedent(
    """
    import json, sys
    from datetime import timedelta
    import torch.distributed as dist
    from sere_dist.vllm_plugin.agreement import check_agreement

    rank, folder, scenarios = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    for name, owns in scenarios.items():
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=2)
        try:
            if owns[rank] is not None:
                check_agreement(owns[rank], timedelta(seconds=5 if None in owns else 120))
            print(name, "goes on", flush=True)
        except RuntimeError as error:
            print(name, error, flush=True)
        dist.barrier()
        dist.destroy_process_group()
    """
)


@pytest.mark.long
def test_ranks_that_would_not_reroute_alike_stop(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), json.dumps(SCENARIOS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        (first, why), (second, why_second) = (process.communicate(timeout=300) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert "agree goes on" in first and "agree goes on" in second, why + why_second
    assert "differ ranks 0 and 1 would not re-route alike" in first and "settings: S = 2 here, S = 3 there" in first
    assert "differ ranks 1 and 0 would not re-route alike" in second
    assert "no plugin rank 1 has not said in 5 s that it re-routes" in first
    assert "no plugin goes on" in second


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
