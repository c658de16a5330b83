"""Ray Serve LLM's replicas, with two things more: they follow the policy in force, and report what re-routing does."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import DPServer, LLMServer

from serve_apps.metrics import ReroutingMetrics
from serve_apps.policy import HEARTBEAT_SECONDS, Follower

METRICS_SECONDS = 10.0  # between two readings of the counters
RETRY_SECONDS = 5.0

logger = logging.getLogger("ray.serve")


class Rerouting:
    """Goes before a class of Ray Serve LLM's servers.

    `keeper` is the application's `PolicyKeeper`, `artifact` what the metrics say of it.
    """

    async def __init__(self, llm_config: LLMConfig, *, keeper: DeploymentHandle, artifact: dict[str, str], **kwargs):
        await super().__init__(llm_config, **kwargs)
        settings = llm_config.engine_kwargs["additional_config"]["sere"]
        replica = serve.get_replica_context().replica_id.unique_id
        self.follower = Follower(replica, settings, keeper.follow.remote, self._set_policy)
        self.metrics = ReroutingMetrics(llm_config.model_id, artifact)
        await self.follower.once(wait_s=0)  # before the first request: a replica that starts later is like the others
        self.tasks = [
            asyncio.create_task(_again_and_again("follow the policy", lambda: self.follower.once(HEARTBEAT_SECONDS))),
            asyncio.create_task(_again_and_again("report metrics", self._report, METRICS_SECONDS)),
        ]

    async def _set_policy(self, changes: dict[str, Any]) -> None:
        await self.collective_rpc("sere_policy", kwargs=changes)

    async def _report(self) -> None:
        policies = await self.collective_rpc("sere_policy")
        self.metrics.update(await self.collective_rpc("sere_counters"), policies[0])


class SereServer(Rerouting, LLMServer):
    """A replica with an engine of its own."""


class SereDPServer(Rerouting, DPServer):
    """A replica that is one data-parallel rank of several."""


async def _again_and_again(what: str, act: Callable[[], Awaitable[None]], pause_s: float = 0.0) -> None:
    """Acts until the replica stops. A failure is logged and tried again: answering requests matters more."""
    while True:
        try:
            await act()
            await asyncio.sleep(pause_s)
        except Exception:
            logger.exception("sere_dist: could not %s, trying again in %g s", what, RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
