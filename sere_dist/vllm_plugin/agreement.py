"""Ranks of one engine must re-route alike: under tensor parallelism all of them choose experts for the same tokens.

A node may have been started with another artifact, or without the plugin, and nothing in vLLM would notice. So each
rank says at its start what it re-routes by, and waits to hear the same from the others.
"""

import hashlib
import json
from datetime import timedelta

import torch
import torch.distributed as dist

import sere_dist
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.placement import Placement
from sere_dist.config import ReroutingConfig

TIMEOUT = timedelta(minutes=5)  # ranks start together, and have only read the artifact by then


def what_must_agree(
    settings: ReroutingConfig, artifact: Artifact, placement: Placement | None, draft_artifact: Artifact | None = None
) -> dict[str, str]:
    """Returns what a rank re-routes by: as text, and without the paths, which may differ between nodes."""
    recommended = artifact.recommended
    return {
        "version of sere_dist": sere_dist.__version__,
        "settings": settings.model_dump_json(exclude={"artifact": True, "placement": True, "draft": {"artifact"}}),
        "artifact": _digest(artifact),
        "recommended settings": "none" if recommended is None else recommended.model_dump_json(),
        "placement": "none" if placement is None else placement.model_dump_json(),
        "artifact of the draft model": "none" if draft_artifact is None else _digest(draft_artifact),
    }


def _digest(artifact: Artifact) -> str:
    """Returns a digest of what is in an artifact's tables."""
    digest = hashlib.sha256()
    for layer, tables in artifact.tables.items():
        for table in tables:
            if table is not None:
                digest.update(f"{layer} {tuple(table.shape)}".encode())
                digest.update(table.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_agreement(own: dict[str, str], timeout: timedelta = TIMEOUT) -> None:
    """Returns once all ranks of torch's default process group have said the same as this one.

    Not by a collective: a rank without the plugin goes on to vLLM's next one, and would take part in ours instead.

    Raises:
        RuntimeError: another rank said something else, or nothing in time.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    store.set(f"sere_dist/{rank}", json.dumps(own))
    for other in range(num_ranks):
        try:
            store.wait([f"sere_dist/{other}"], timeout)
        except RuntimeError as error:  # a store that waited in vain raises DistStoreError, or its parent
            raise RuntimeError(
                f"rank {other} has not said in {timeout.total_seconds():.0f} s that it re-routes: install sere_dist on "
                "every node, start all of them with the same additional_config, and look for an error in its log"
            ) from error
        theirs = json.loads(store.get(f"sere_dist/{other}"))
        if differing := [name for name in own if theirs.get(name) != own[name]]:
            what = "; ".join(f"{name}: {own[name]} here, {theirs.get(name)} there" for name in differing)
            raise RuntimeError(f"ranks {rank} and {other} would not re-route alike, which they must: {what}")
