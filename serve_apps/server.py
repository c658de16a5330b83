"""Ray Serve LLM's replicas, with three things more: they follow the settings in force, report what re-routing does, and
end when their engine does."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING, Any

import psutil
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import DPServer, LLMServer, PDDecodeServer, PDPrefillServer
from vllm.exceptions import GracefulHTTPError

from sere_dist.artifact.recommendation import KlEstimate
from serve_apps.metrics import Latencies, ReroutingMetrics, totals_of
from serve_apps.settings import HEARTBEAT_SECONDS, Follower

METRICS_SECONDS = 10.0  # between two readings of the counters
RETRY_SECONDS = 5.0
HEALTH_SECONDS = 10.0  # between two questions whether the engine does anything
ENGINE_SECONDS = 0.2  # between two looks at the engine
LAST_WORDS_SECONDS = 1.0  # for errors on their way to clients

logger = logging.getLogger("ray.serve")

# What the two mixins below go before. Each of Ray Serve LLM's servers is an LLMServer.
if TYPE_CHECKING:
    Server = LLMServer
else:
    Server = object


class EngineIsGone(Exception):
    """A request came to a replica whose engine had died; no engine has seen it."""


class EngineDied(Exception):
    """The engine died while it worked on a request."""


class EngineIsFull(Exception):
    """The engine has as many requests or tokens waiting as it may; it has not taken this one.

    vLLM's own exceptions for this don't survive the way from one process to another.
    """


class EndsWithEngine(Server):
    """Goes before a class of Ray Serve LLM's servers: a replica ends soon after its engine, or if that hangs.

    Ray Serve's health checks would notice a dead engine after half a minute. Until then such a replica refuses every
    request at once, so it seems to be the least busy, and is sent most of them. They would never notice one that hangs:
    vLLM's own check asks whether the engine's process is there, not whether it does anything.

    `engine_timeout_s`: an engine whose workers do not answer for this long, twice in a row, hangs.
    """

    async def __init__(self, llm_config: LLMConfig, *, engine_timeout_s: float, **kwargs):
        with log_file_kept(logger):
            await super().__init__(llm_config, **kwargs)
        self.engine_timeout_s = engine_timeout_s
        self.requests = {"requests": 0, "refused": 0}
        self.watches = [
            asyncio.create_task(self._end_with_engine()),
            asyncio.create_task(self._end_if_engine_hangs()),
        ]

    async def _has_engine(self) -> bool:
        try:
            await self.check_health()
        except Exception:
            return False
        return not self._lost_coordinator()

    def _client(self) -> Any:
        """Returns vLLM's `AsyncLLM`, which Ray Serve LLM's engine keeps to itself."""
        return getattr(self.engine, "_engine_client", None)

    def _lost_coordinator(self) -> bool:
        """Says whether the process is gone that wakes the ranks of a data-parallel group. vLLM watches it only while it
        starts; without it, the ranks that a request wakes wait for the others for ever."""
        core = getattr(self._client(), "engine_core", None)
        coordinator = getattr(getattr(core, "resources", None), "coordinator", None)
        return coordinator is not None and not coordinator.proc.is_alive()

    async def _end_with_engine(self) -> None:
        while await self._has_engine():
            await asyncio.sleep(ENGINE_SECONDS)
        await self._end("the engine died")

    async def _end_if_engine_hangs(self) -> None:
        missed = 0
        while missed < 2:
            await asyncio.sleep(HEALTH_SECONDS)
            try:
                await self._of_workers("check_health")
                missed = 0
            except TimeoutError:
                missed += 1
                logger.warning("sere_dist: the engine has not answered for %g s", self.engine_timeout_s)
            except Exception:  # it died, which is seen elsewhere
                missed = 0
        await self._end("the engine hangs")

    async def _end(self, why: str) -> None:
        logger.error("sere_dist: %s; its replica ends, and Ray Serve starts another", why)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        for process in psutil.Process().children(recursive=True):  # a process that hangs outlives its parent
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)

    async def _of_workers(self, method: str, arguments: dict[str, Any] | None = None) -> list[Any]:
        """Returns what a method of every worker of the engine returned.

        Raises:
            TimeoutError: they have not answered in time.
        """
        async with asyncio.timeout(self.engine_timeout_s):
            return await self.collective_rpc(method, kwargs=arguments or {})

    async def chat(self, *args, **kwargs):
        return await self._accept(super().chat, *args, **kwargs)

    async def completions(self, *args, **kwargs):
        return await self._accept(super().completions, *args, **kwargs)

    async def _accept(self, method: Callable[..., Awaitable], *args, **kwargs):
        if not await self._has_engine():
            raise EngineIsGone
        self.requests["requests"] += 1
        return self._while_it_lives(await method(*args, **kwargs))

    async def _while_it_lives(self, answer: AsyncIterator[Any]) -> AsyncIterator[Any]:
        try:
            async for part in answer:
                yield part
        except GracefulHTTPError as refusal:
            self.requests["refused"] += 1
            raise EngineIsFull(refusal.message) from None
        except Exception as error:
            if await self._has_engine():
                raise
            raise EngineDied from error


class Rerouting(EndsWithEngine):
    """Goes before a class of Ray Serve LLM's servers.

    `keeper` is the application's `SettingsKeeper`, `artifact` what the metrics say of it, `kl_estimate` what they
    make of estimated errors, and `tuned_kl` what the artifact's tuning measured. `slow_ms`: see `Latencies`.
    """

    async def __init__(
        self,
        llm_config: LLMConfig,
        *,
        keeper: DeploymentHandle,
        artifact: dict[str, str],
        kl_estimate: KlEstimate | None,
        tuned_kl: float | None,
        slow_ms: float | None,
        **kwargs,
    ):
        await super().__init__(llm_config, **kwargs)
        settings = llm_config.engine_kwargs["additional_config"]["sere"]
        replica = serve.get_replica_context().replica_id.unique_id
        self.follower = Follower(replica, settings, keeper.follow.remote, self._apply_settings, self._count)
        self.metrics = ReroutingMetrics(llm_config.model_id, artifact, kl_estimate, tuned_kl)
        self.latencies = Latencies(slow_ms)
        if (vllm_loggers := getattr(self._client(), "logger_manager", None)) is not None:  # none if it logs nothing
            vllm_loggers.stat_loggers.append(self.latencies)
        await self.follower.once(wait_s=0)  # before the first request: a replica that starts later is like the others
        self.tasks = [
            asyncio.create_task(repeat_forever("follow the settings", lambda: self.follower.once(HEARTBEAT_SECONDS))),
            asyncio.create_task(repeat_forever("report metrics", self._report, METRICS_SECONDS)),
        ]

    async def _apply_settings(self, settings: dict[str, Any]) -> None:
        await self._of_workers("sere_settings", settings)

    async def _count(self) -> dict[str, float]:
        """Returns what the settings in force are judged by: requests, latencies, and what re-routing did, in total; and
        the time."""
        counted = totals_of(await self._of_workers("sere_counters"))
        return self.requests | self.latencies.totals | counted | {"seconds": time.monotonic()}

    async def activity(self) -> dict[int, dict[str, float]]:
        """Returns the counters of every layer, in total. The workers of a replica count the same, but for layers that
        only some of them have."""
        workers = await self._of_workers("sere_counters")
        return {layer: counters for worker in workers for layer, counters in worker["layers"].items()}

    async def _report(self) -> None:
        settings = await self._of_workers("sere_settings")
        self.metrics.update(await self._of_workers("sere_counters"), settings[0])


class PlainServer(EndsWithEngine, LLMServer):
    """A replica with an engine of its own."""


class PlainDPServer(EndsWithEngine, DPServer):
    """A replica that is one data-parallel rank of several."""


class PrefillServer(EndsWithEngine, PDPrefillServer):
    """The first, of a pool that computes prompts for another."""


class PrefillDPServer(EndsWithEngine, PDPrefillServer, DPServer):
    """The second, of such a pool."""


class PlainDecodeServer(EndsWithEngine, PDDecodeServer):
    """The first, of a pool that has prompts computed by another."""


class PlainDecodeDPServer(EndsWithEngine, PDDecodeServer, DPServer):
    """The second, of such a pool."""


class SereServer(Rerouting, PlainServer):
    pass


class SereDPServer(Rerouting, PlainDPServer):
    pass


class SereDecodeServer(Rerouting, PlainDecodeServer):
    pass


class SereDecodeDPServer(Rerouting, PlainDecodeDPServer):
    pass


# A replica with an engine of its own, and a data-parallel rank; the latter two without and with re-routing.
PREFILL_SERVERS = (PrefillServer, PrefillDPServer)
DECODE_SERVERS = ((PlainDecodeServer, PlainDecodeDPServer), (SereDecodeServer, SereDecodeDPServer))
SERVERS = ((PlainServer, PlainDPServer), (SereServer, SereDPServer))


@contextlib.contextmanager
def log_file_kept(of: logging.Logger) -> Generator[None]:
    """Within it, logging may be configured anew, and `of` writes to the same file afterwards.

    An engine that starts configures vLLM's logging, by which Python closes every handler that there is. Ray Serve's
    then has no file. What the replica logs is lost, and a controller that starts again, after its own death or the
    head's, replaces every replica that can't name its log file.
    """
    files = [(handler, handler.target) for handler in of.handlers if isinstance(handler, MemoryHandler)]
    try:
        yield
    finally:  # what an engine that does not start says of it belongs into the file, too
        for handler, file in files:
            handler.setTarget(file)


async def repeat_forever(what: str, act: Callable[[], Awaitable[None]], pause_s: float = 0.0) -> None:
    """Acts until the replica stops. A failure is logged and tried again: answering requests matters more."""
    while True:
        try:
            await act()
            await asyncio.sleep(pause_s)
        except Exception:
            logger.exception("sere_dist: could not %s, trying again in %g s", what, RETRY_SECONDS)
            await asyncio.sleep(RETRY_SECONDS)
