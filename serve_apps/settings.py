"""The re-routing settings of a model's replicas, while they serve: a keeper, and what a replica does to follow it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sere_dist.config import ReroutingConfig

KEEPER = "SereSettings"  # the deployment's name
HEARTBEAT_SECONDS = 10.0  # a replica asks again at least this often
FORGET_SECONDS = 2.5 * HEARTBEAT_SECONDS  # one that has not asked for so long is gone


logger = logging.getLogger("ray.serve")


class SettingsKeeper:
    """What is in force beyond the settings that the application started with. One replica, beside the model's own.

    Replicas ask with `follow` and are answered as soon as something is new: those that run, and those that start later.
    Should the keeper's own process die, the next replica that asks brings it what was in force.

    `changes` maps settings to values; `revision`, milliseconds since 1970, says when they were made (0: never).
    """

    def __init__(self, settings: dict[str, Any], num_experts_per_token: int):
        self.initial = ReroutingConfig.model_validate(settings)
        self.num_experts_per_token = num_experts_per_token
        self.changes: dict[str, Any] = {}
        self.revision = 0
        self.followers: dict[str, tuple[int, float]] = {}  # replica -> the revision it runs, when it said so
        self.news = asyncio.Condition()

    async def follow(
        self, replica: str, settings: dict[str, Any], revision: int, changes: dict[str, Any], wait_s: float
    ) -> tuple[int, dict[str, Any]]:
        """Takes note that `replica` runs `changes` of `revision`, and returns newer ones, after `wait_s` at most.

        A replica that started with other `settings`, of an application before or after an upgrade, is left alone.
        """
        if ReroutingConfig.model_validate(settings) != self.initial:
            await asyncio.sleep(wait_s)
            return revision, changes
        async with self.news:
            if revision > self.revision:
                self.revision, self.changes = revision, changes
            self.followers[replica] = (revision, time.monotonic())
            self.news.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait_for(lambda: self.revision > revision), wait_s)
            return self.revision, self.changes

    async def change(
        self, changes: dict[str, Any], by: str = "nobody", wait_s: float = 2 * HEARTBEAT_SECONDS
    ) -> dict[str, Any]:
        """Changes the settings, waits until every replica runs them, and returns `state`; or {"error": why not}.

        The log says what was changed `by` whom.
        """
        async with self.news:
            before = self._settings()
            try:
                after = self.initial.changed({**self.changes, **changes}, self.num_experts_per_token)
            except ValueError as error:  # as an exception it would carry a traceback to whoever called
                logger.warning("audit: settings stay as they are: %s; asked for by %s", error, by)
                return {"error": str(error)}
            was = {name: value for name, value in before if value != getattr(after, name)}
            now = {name: getattr(after, name) for name in was}
            logger.warning("audit: settings change from %s to %s, by %s", was, now, by)
            self.changes = {**self.changes, **changes}
            self.revision = max(self.revision + 1, time.time_ns() // 10**6)
            self.news.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait_for(lambda: not self._behind()), wait_s)
        return await self.state()

    async def state(self) -> dict[str, Any]:
        """Returns the `settings` in force, their `revision`, the `replicas`, and those that don't run them yet."""
        return {
            "settings": self._settings().model_dump(mode="json"),
            "revision": self.revision,
            "replicas": sorted(self._present()),
            "pending": sorted(self._behind()),
        }

    def _settings(self) -> ReroutingConfig:
        return self.initial.changed(self.changes, self.num_experts_per_token)

    def _present(self) -> list[str]:
        oldest = time.monotonic() - FORGET_SECONDS
        return [replica for replica, (_revision, seen) in self.followers.items() if seen > oldest]

    def _behind(self) -> list[str]:
        return [replica for replica in self._present() if self.followers[replica][0] < self.revision]


class Follower:
    """A replica's side: asks the keeper, and has the replica's workers apply what is new.

    `follow` is the keeper's method of this name, `apply` changes the settings of all workers.
    """

    def __init__(
        self,
        replica: str,
        settings: dict[str, Any],
        follow: Callable[..., Awaitable[tuple[int, dict[str, Any]]]],
        apply: Callable[[dict[str, Any]], Awaitable[Any]],
    ):
        self.replica, self.settings = replica, settings
        self.follow, self.apply = follow, apply
        self.revision, self.changes = 0, {}

    async def once(self, wait_s: float) -> None:
        revision, changes = await self.follow(self.replica, self.settings, self.revision, self.changes, wait_s)
        if revision > self.revision:
            await self.apply(changes)
            self.revision, self.changes = revision, changes
