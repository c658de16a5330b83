"""The re-routing settings of a model's replicas, while they serve: a keeper, and what a replica does to follow it."""

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from statistics import fmean
from typing import Any, Literal, Protocol

import ray
import ray.util
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from sere_dist.artifact.recommendation import KlEstimate
from sere_dist.config import CHANGEABLE, RECOMMENDED, ReroutingConfig, explain
from serve_apps.control import ControlConfig, Controller, Load

KEEPER = "SereSettings"  # the deployment's name
HEARTBEAT_SECONDS = 10.0  # a replica asks again at least this often
CONFIRM_SECONDS = 20.0  # a change waits this long for replicas to confirm it
FEWEST_REQUESTS = 16  # of a replica, before a limit of a trial is compared with what was measured

logger = logging.getLogger("ray.serve")

Limited = Literal[
    "inter_token_ms",
    "first_token_ms",
    "refused_share",
    "rerouted_share",
    "estimated_error",
    "estimated_kl",
    "shadow_kl",
]


class Trial(BaseModel):
    """Settings that some replicas try, or all of them, until a limit is exceeded. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")

    changes: dict[str, Any] = Field(min_length=1, description="The settings to try, and their values.")
    replicas: int | None = Field(default=None, ge=1, description="Number of replicas that try them; all by default.")
    take_back_if: dict[Limited, float] = Field(
        default_factory=dict,
        description="Limits. The trial ends as soon as a replica that takes part measures more, over at least "
        f"{FEWEST_REQUESTS} requests.",
    )


def measures(
    totals: dict[str, float], num_experts_per_token: int, kl_estimate: KlEstimate | None = None
) -> dict[str, float]:
    """Returns what a replica's totals since its settings last changed amount to: `requests`, the share of them that it
    refused, mean latencies, experts per layer and step, the share of slots that were re-routed, the error that this is
    estimated to make per row and layer, the KL divergence per token that this comes to, and the one that shadow checks
    measured. What nothing was counted for is left out."""
    of = {
        "inter_token_ms": (1000 * totals.get("next_token_s", 0.0), totals.get("next_tokens", 0)),
        "first_token_ms": (1000 * totals.get("first_token_s", 0.0), totals.get("first_tokens", 0)),
        "refused_share": (totals.get("refused", 0), totals.get("requests", 0)),
        "active_experts": (totals.get("active_experts_after", 0), totals.get("steps", 0)),
        "rerouted_share": (totals.get("rerouted_slots", 0), totals.get("rows", 0) * num_experts_per_token),
        "estimated_error": (totals.get("estimated_error", 0.0), totals.get("rows", 0)),
        "shadow_kl": (totals.get("shadow_kl", 0.0), totals.get("shadow_rows", 0)),
    }
    means = {name: total / count for name, (total, count) in of.items() if count}
    if kl_estimate is not None and totals.get("rows"):
        means["estimated_kl"] = kl_estimate.of(totals["estimated_error"], totals["rows"])
    return {"requests": totals.get("requests", 0), **means}


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

    `changes` maps settings to values. `trial` has further ones, which `triers` run, and which end by themselves when a
    limit is exceeded. `revision` counts the changes of all three.

    `is_group` says that replicas are the ranks of data-parallel groups, which can't run different settings.
    `kl_estimate` says what estimated errors come to, where the artifact was tuned. `control` lets a controller change
    the price, until somebody else does.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        num_experts_per_token: int,
        cluster: Cluster,
        *,
        is_group: bool = False,
        kl_estimate: KlEstimate | None = None,
        control: ControlConfig | None = None,
    ):
        self.initial = ReroutingConfig.model_validate(settings)
        self.num_experts_per_token = num_experts_per_token
        self.cluster = cluster
        self.is_group = is_group
        self.kl_estimate = kl_estimate
        self.controller = None if control is None else Controller(control)
        self.pinned, self.why = False, "nothing was decided yet"
        self.seen: dict[str, dict[str, float]] = {}  # replica -> its totals at the controller's last look
        self.changes: dict[str, Any] = {}
        self.trial: Trial | None = None
        self.triers: set[str] = set()
        self.taken_back: str | None = None  # why the last trial ended by itself
        self.revision = 0
        self.confirmed: dict[str, int] = {}  # replica -> the revision it said it runs
        self.measured: dict[str, dict[str, float]] = {}  # replica -> its totals since that revision
        self.news = asyncio.Condition()
        kept = cluster.load()
        if kept is not None:
            self.revision = kept["revision"]
            if kept["initial"] == self.initial.model_dump(mode="json"):
                self.changes, self.triers, self.taken_back = kept["changes"], set(kept["triers"]), kept["taken_back"]
                self.trial = kept["trial"] and Trial.model_validate(kept["trial"])
                if self.controller is not None and (control := kept.get("control")) is not None:
                    most = len(self.controller.config.prices) - 1
                    self.controller.place, self.pinned = min(control["place"], most), control["pinned"]
            else:  # deployed anew with other settings, which hold from now on
                self.revision += 1
        if self.controller is not None and not self.pinned:
            self.changes |= self.controller.settings
        self._save()

    def _save(self) -> None:
        self.cluster.save(
            {
                "initial": self.initial.model_dump(mode="json"),
                "changes": self.changes,
                "trial": None if self.trial is None else self.trial.model_dump(),
                "triers": sorted(self.triers),
                "taken_back": self.taken_back,
                "revision": self.revision,
                "control": self._control(),
            }
        )

    def _control(self) -> dict[str, Any] | None:
        """Returns the place of the controller's price, and whether somebody else has set one; None without control."""
        return None if self.controller is None else {"place": self.controller.place, "pinned": self.pinned}

    async def follow(
        self, replica: str, settings: dict[str, Any], revision: int, totals: dict[str, float], wait_s: float
    ) -> tuple[int, dict[str, Any]]:
        """Takes note that `replica` runs `revision`, and of its totals since. Returns revision and settings in force
        for it: at once if they are another revision's, else after `wait_s` at most.

        A replica that started with other `settings`, of an application before or after an upgrade, is left alone.
        """
        if ReroutingConfig.model_validate(settings) != self.initial:
            await asyncio.sleep(wait_s)
            return revision, {}
        async with self.news:
            self.confirmed[replica] = revision
            self.measured[replica] = totals if revision == self.revision else {}
            self._judge(replica)
            self._choose_triers()
            self.news.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait_for(lambda: self.revision != revision), wait_s)
            return self.revision, self._changeable(replica)

    async def change(
        self, changes: dict[str, Any], by: str = "nobody", wait_s: float = CONFIRM_SECONDS
    ) -> dict[str, Any]:
        """Changes the settings, waits until every living replica runs them, and returns `state`; or {"error": why not}.

        A trial is over then. The log says what was changed `by` whom.
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
            if self.controller is not None and changes.keys() & self.controller.settings.keys():
                self.pinned = True
                logger.warning("audit: the controller stops, as a price was set by %s", by)
            self._put_trial(None)
            await self._confirmed(wait_s)
        return await self.state()

    async def try_out(
        self, trial: dict[str, Any] | None, by: str = "nobody", wait_s: float = CONFIRM_SECONDS
    ) -> dict[str, Any]:
        """Starts a trial, of the fields of `Trial`, in place of the one that there is; with None, ends that.

        Otherwise as `change`.
        """
        async with self.news:
            started = None
            try:
                if trial is not None:
                    started = Trial.model_validate(trial)
                    tried = self.initial.changed({**self.changes, **started.changes}, self.num_experts_per_token)
                    if self.is_group and started.replicas is not None:
                        raise ValueError(
                            "the ranks of data-parallel groups run the same settings: leave out `replicas`"
                        )
                    if "estimated_error" in started.take_back_if and self.initial.policy == "sere":
                        raise ValueError("policy sere estimates no error: leave that limit out, or serve projection")
                    if "estimated_kl" in started.take_back_if and self.kl_estimate is None:
                        raise ValueError(
                            "estimated_kl needs an artifact of method projection that was tuned: run python -m "
                            "calibration_jobs.tune, or limit estimated_error"
                        )
                    if "shadow_kl" in started.take_back_if and not tried.shadow_share:
                        raise ValueError("shadow_kl is measured with a shadow_share: set one, or leave that limit out")
            except ValueError as error:
                message = explain(error) if isinstance(error, ValidationError) else str(error)
                logger.warning("audit: no trial: %s; asked for by %s", message, by)
                return {"error": message}
            logger.warning("audit: trial %s, by %s", started or "ends", by)
            self._put_trial(started)
            await self._confirmed(wait_s)
        return await self.state()

    async def pin(self, told: dict[str, Any], by: str = "nobody", wait_s: float = CONFIRM_SECONDS) -> dict[str, Any]:
        """Stops the controller at the price in force (`{"pinned": true}`), or lets it go on. Otherwise as `change`."""
        if self.controller is None:
            return {"error": "the application has no control: set it in its configuration"}
        if told.keys() != {"pinned"} or not isinstance(told["pinned"], bool):
            return {"error": 'the body must be {"pinned": true} or {"pinned": false}'}
        async with self.news:
            self.pinned = told["pinned"]
            logger.warning("audit: the controller %s, by %s", "stops" if self.pinned else "goes on", by)
            if not self.pinned:
                self.changes |= self.controller.settings
            self._renew()
            await self._confirmed(wait_s)
        return await self.state()

    async def control_once(self) -> None:
        """Lets the controller decide by what was measured since it last did. Not while a price is pinned or tried."""
        async with self.news:
            if self.controller is None or self.pinned or self.trial is not None:
                self.seen.clear()
                return
            before = self.controller.settings
            decision = self.controller.decide(self._load())
            self.why, after = decision.why, self.controller.settings
            if after != before:
                logger.warning("audit: settings change from %s to %s, by the controller: %s", before, after, self.why)
                self.changes |= after
                self._renew()

    def _load(self) -> Load:
        """Returns what the replicas that run the settings in force have measured since the last look.

        They report every `HEARTBEAT_SECONDS`, and as soon as they run new settings: then there is nothing to judge yet.
        """
        recent: Counter[str] = Counter()
        living, rates = self.cluster.replicas(), list[float]()
        for replica, totals in self.measured.items():
            before = self.seen.get(replica, {})
            since = {name: total - before.get(name, 0) for name, total in totals.items()}
            if replica not in living or since.get("seconds", 0) < HEARTBEAT_SECONDS / 2:
                continue
            recent.update(since)
            rates.append(since["next_tokens"] / since["seconds"])
            self.seen[replica] = totals
        if not rates:
            return Load()
        tokens, steps, estimate = recent["next_tokens"], recent["engine_steps"], None
        if self.kl_estimate is not None and recent["rows"]:
            estimate = self.kl_estimate.of(recent["estimated_error"], recent["rows"])
        return Load(
            slow_share=recent["slow_tokens"] / tokens if tokens else 0.0,
            waiting=recent["waiting_requests"] / steps if steps else 0.0,
            tokens_per_s=fmean(rates),
            estimated_kl=estimate,
        )

    async def state(self) -> dict[str, Any]:
        """Returns the `settings` in force, their `revision`, the living `replicas`, and those that have not confirmed
        that they run them: they are starting, stuck, or of another version of the application.

        And what the controller does under `control`, if there is one: its `price`, whether somebody has `pinned`
        another, and `why`. The `trial`, if there is one, with its `triers`; why the last one ended, if by itself; and
        what replicas `measured` since their settings last changed, as `measures` returns it.
        """
        living = self.cluster.replicas()
        return {
            "settings": self._settings().model_dump(mode="json"),
            "revision": self.revision,
            "replicas": sorted(living),
            "pending": sorted(self._pending()),
            "trial": None if self.trial is None else self.trial.model_dump() | {"triers": sorted(self.triers)},
            "taken_back": self.taken_back,
            "control": None
            if self.controller is None
            else {"price": self.controller.price, "pinned": self.pinned, "why": self.why},
            "measured": {
                replica: measures(totals, self.num_experts_per_token, self.kl_estimate)
                for replica, totals in sorted(self.measured.items())
                if replica in living
            },
        }

    def _settings(self, replica: str | None = None) -> ReroutingConfig:
        """Returns the settings in force for a replica; without one, for those that try nothing."""
        tried = self.trial.changes if self.trial is not None and replica in self.triers else {}
        return self.initial.changed({**self.changes, **tried}, self.num_experts_per_token)

    def _changeable(self, replica: str) -> dict[str, Any]:
        """Returns all settings in force that a replica may be told."""
        taken = RECOMMENDED if self.initial.policy == "recommended" else ()
        return self._settings(replica).model_dump(mode="json", include=set(CHANGEABLE) - set(taken))

    def _put_trial(self, trial: Trial | None, taken_back: str | None = None) -> None:
        self.trial, self.triers, self.taken_back = trial, set(), taken_back
        self._choose_triers()
        self._renew()

    def _renew(self) -> None:
        self.revision += 1
        self.measured.clear()
        self.seen.clear()
        self._save()
        self.news.notify_all()

    def _choose_triers(self) -> None:
        """Keeps those that live, and lets others take the place of those that don't."""
        if self.trial is None:
            return
        living = sorted(self.cluster.replicas())
        most = len(living) if self.trial.replicas is None else self.trial.replicas
        staying = [replica for replica in living if replica in self.triers]
        triers = set((staying + [replica for replica in living if replica not in self.triers])[:most])
        if triers != self.triers:
            self.triers = triers
            self._renew()

    def _judge(self, replica: str) -> None:
        """Ends the trial if what this replica measured exceeds a limit."""
        if self.trial is None or replica not in self.triers:
            return
        measured = measures(self.measured[replica], self.num_experts_per_token, self.kl_estimate)
        if measured["requests"] < FEWEST_REQUESTS:
            return
        for name, limit in self.trial.take_back_if.items():
            if measured.get(name, limit) > limit:
                why = f"{name} {measured[name]:.4g} > {limit:g} on replica {replica} with {self.trial.changes}"
                logger.warning("audit: the trial is taken back: %s", why)
                self._put_trial(None, taken_back=why)
                return

    async def _confirmed(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.news.wait_for(lambda: not self._pending()), wait_s)

    def _pending(self) -> set[str]:
        living = self.cluster.replicas()
        self.confirmed = {replica: revision for replica, revision in self.confirmed.items() if replica in living}
        return {replica for replica in living if self.confirmed.get(replica) != self.revision}


class DeployedKeeper(SettingsKeeper):
    """The keeper as Ray Serve starts it, for the replicas of deployments whose names have this prefix."""

    def __init__(
        self,
        settings: dict[str, Any],
        num_experts_per_token: int,
        deployment_prefix: str,
        is_group: bool,
        kl_estimate: KlEstimate | None,
        control: ControlConfig | None,
    ):
        cluster = ServeCluster(deployment_prefix)
        super().__init__(
            settings, num_experts_per_token, cluster, is_group=is_group, kl_estimate=kl_estimate, control=control
        )
        self.controlling: asyncio.Task | None = None

    async def follow(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, Any]]:
        if self.controller is not None and self.controlling is None:  # the first replica is there
            self.controlling = asyncio.create_task(self._control_for_ever(self.controller.config.period_s))
        return await super().follow(*args, **kwargs)

    async def _control_for_ever(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.control_once()
            except Exception:
                logger.exception("sere_dist: the controller could not decide, it tries again in %g s", period_s)


class Follower:
    """A replica's side: asks the keeper, and has the replica's workers apply what is new.

    `follow` is the keeper's method of this name, `apply` changes the settings of all workers, `count` returns totals
    since the replica started, with the `seconds` that have passed; see `measures`.
    """

    def __init__(
        self,
        replica: str,
        settings: dict[str, Any],
        follow: Callable[..., Awaitable[tuple[int, dict[str, Any]]]],
        apply: Callable[[dict[str, Any]], Awaitable[Any]],
        count: Callable[[], Awaitable[dict[str, float]]],
    ):
        self.replica, self.settings = replica, settings
        self.follow, self.apply, self.count = follow, apply, count
        self.revision = -1  # none: it starts with the file's settings, which may no longer be those in force
        self.before: dict[str, float] = {}  # totals when the settings last changed

    async def once(self, wait_s: float) -> None:
        totals = {name: total - self.before.get(name, 0) for name, total in (await self.count()).items()}
        revision, settings = await self.follow(self.replica, self.settings, self.revision, totals, wait_s)
        if revision != self.revision:
            await self.apply(settings)
            self.before = await self.count()
            self.revision = revision
