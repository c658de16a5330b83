"""The re-routing settings of a model's replicas, while they serve: a keeper, and what a replica does to follow it."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import ray
import ray.util
from ray import serve
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from sere_dist.config import CHANGEABLE, RECOMMENDED, ReroutingConfig

KEEPER = "SereSettings"  # the deployment's name
HEARTBEAT_SECONDS = 10.0  # a replica asks again at least this often
CONFIRM_SECONDS = 20.0  # a change waits this long for replicas to confirm it

logger = logging.getLogger("ray.serve")


class Cluster(Protocol):
    """What the keeper asks of the cluster that it runs in."""

    def load(self) -> dict[str, Any] | None:
        """Returns what was saved last, if anything."""

    def save(self, kept: dict[str, Any]) -> None: ...

    def replicas(self) -> set[str]:
        """Returns the ids of the model's living replicas, those included that are still starting or ending."""


class ServeCluster:
    """The cluster of the Serve replica that runs this.

    What is saved is in Ray's key-value store, in the GCS. It outlives every replica and the keeper, and with GCS fault
    tolerance the head node, too. It does not outlive `serve shutdown`, after which a file's settings hold again.
    """

    NAMESPACE = b"sere_dist"

    def __init__(self, deployment_prefix: str):
        application = serve.get_replica_context().app_name
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        self.key = f"{application} of {controller._actor_id.hex()}"
        self.prefix = f"SERVE_REPLICA::{application}#{deployment_prefix}"  # of the names of Serve's actors

    def load(self) -> dict[str, Any] | None:
        kept = internal_kv._internal_kv_get(self.key, namespace=self.NAMESPACE)
        return None if kept is None else json.loads(kept)

    def save(self, kept: dict[str, Any]) -> None:
        internal_kv._internal_kv_put(self.key, json.dumps(kept), overwrite=True, namespace=self.NAMESPACE)

    def replicas(self) -> set[str]:
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        return {name.rpartition("#")[2] for name in names if name.startswith(self.prefix)}


class SettingsKeeper:
    """What is in force beyond the settings that the application started with. One replica, beside the model's own.

    Replicas ask with `follow` and are answered as soon as something is new: those that run, and those that start later.
    They are told all settings that may change, not what a change is about: whatever a replica ran before, it then runs
    the same as the others. What is in force is saved in the cluster before any replica is told.

    `changes` maps settings to values, `revision` counts the changes.
    """

    def __init__(self, settings: dict[str, Any], num_experts_per_token: int, cluster: Cluster):
        self.initial = ReroutingConfig.model_validate(settings)
        self.num_experts_per_token = num_experts_per_token
        self.cluster = cluster
        self.changes: dict[str, Any] = {}
        self.revision = 0
        self.confirmed: dict[str, int] = {}  # replica -> the revision it said it runs
        self.news = asyncio.Condition()
        kept = cluster.load()
        if kept is not None:
            self.revision = kept["revision"]
            if kept["initial"] == self.initial.model_dump(mode="json"):
                self.changes = kept["changes"]
            else:  # deployed anew with other settings, which hold from now on
                self.revision += 1
        self._save()

    def _save(self) -> None:
        initial = self.initial.model_dump(mode="json")
        self.cluster.save({"initial": initial, "changes": self.changes, "revision": self.revision})

    async def follow(
        self, replica: str, settings: dict[str, Any], revision: int, wait_s: float
    ) -> tuple[int, dict[str, Any]]:
        """Takes note that `replica` runs `revision`. Returns the revision and settings in force: at once if they are
        another revision's, else after `wait_s` at most.

        A replica that started with other `settings`, of an application before or after an upgrade, is left alone.
        """
        if ReroutingConfig.model_validate(settings) != self.initial:
            await asyncio.sleep(wait_s)
            return revision, {}
        async with self.news:
            self.confirmed[replica] = revision
            self.news.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait_for(lambda: self.revision != revision), wait_s)
            return self.revision, self._changeable()

    async def change(
        self, changes: dict[str, Any], by: str = "nobody", wait_s: float = CONFIRM_SECONDS
    ) -> dict[str, Any]:
        """Changes the settings, waits until every living replica runs them, and returns `state`; or {"error": why not}.

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
            self.changes, self.revision = {**self.changes, **changes}, self.revision + 1
            self._save()
            self.news.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait_for(lambda: not self._pending()), wait_s)
        return await self.state()

    async def state(self) -> dict[str, Any]:
        """Returns the `settings` in force, their `revision`, the living `replicas`, and those that have not confirmed
        that they run them: they are starting, stuck, or of another version of the application."""
        return {
            "settings": self._settings().model_dump(mode="json"),
            "revision": self.revision,
            "replicas": sorted(self.cluster.replicas()),
            "pending": sorted(self._pending()),
        }

    def _settings(self) -> ReroutingConfig:
        return self.initial.changed(self.changes, self.num_experts_per_token)

    def _changeable(self) -> dict[str, Any]:
        """Returns all settings in force that a replica may be told."""
        taken = RECOMMENDED if self.initial.policy == "recommended" else ()
        return self._settings().model_dump(mode="json", include=set(CHANGEABLE) - set(taken))

    def _pending(self) -> set[str]:
        living = self.cluster.replicas()
        self.confirmed = {replica: revision for replica, revision in self.confirmed.items() if replica in living}
        return {replica for replica in living if self.confirmed.get(replica) != self.revision}


class DeployedKeeper(SettingsKeeper):
    """The keeper as Ray Serve starts it, for the replicas of deployments whose names have this prefix."""

    def __init__(self, settings: dict[str, Any], num_experts_per_token: int, deployment_prefix: str):
        super().__init__(settings, num_experts_per_token, ServeCluster(deployment_prefix))


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
        self.revision = -1  # none: it starts with the file's settings, which may no longer be those in force

    async def once(self, wait_s: float) -> None:
        revision, settings = await self.follow(self.replica, self.settings, self.revision, wait_s)
        if revision != self.revision:
            await self.apply(settings)
            self.revision = revision
