"""What a served model's clients see while its processes are killed and replaced.

    make soak                                # 5 minutes; beside it the fuzzing of tests.soak.fuzz
    python -m tests.soak.survival --seconds 60

Serves two replicas of the example model. 16 clients ask, streaming or not, and never ask again for what failed.
The settings change every 10 seconds. Meanwhile a replica is killed, then the engine of one, then the application is
deployed again with other settings. Afterwards greedy tokens without re-routing must be those of before.

Exits with 1 if a check failed.
"""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import typer
import yaml
from rich.table import Table

from benchmarks.common import spread
from examples.demo import MODEL_ID, ROOT, calibrate, served
from sere_dist.admin import SETTINGS_PATH
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.provenance import rounded
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from tests.soak.load import (
    ENGINE,
    ENVIRONMENT,
    PROMPTS,
    REPLICA,
    Memory,
    finish,
    greedy_without_rerouting,
    is_flat,
    processes,
    seeded,
)

CLIENTS, REPLICAS = 16, 2
CHANGE_SECONDS = 10  # between changes of settings
HUNG_SECONDS = 60  # a request that takes longer
FAST_SECONDS = 5  # after a death its requests have failed
RECOVERY_SECONDS = 240


@dataclass(frozen=True)
class Failure:
    """A request that was not answered in full."""

    began: float
    ended: float  # seconds since the load began
    streams: bool
    tokens: int  # that had come
    error: str


@dataclass(frozen=True)
class Event:
    """A disturbance: when, and until the application was whole again."""

    name: str
    at: float
    recovered: float | None = None


class Load:
    """The clients, the changes of settings, and what came of them. Times are in seconds since it began."""

    def __init__(self, cluster: LocalCluster, url: str, seconds: float):
        self.cluster, self.url, self.seconds = cluster, url, seconds
        self.sent, self.answered, self.changes = Counter(), Counter(), Counter()
        self.latencies: list[float] = []
        self.failures: list[Failure] = []
        self.failed_changes: list[dict[str, Any]] = []
        self.events: list[Event] = []
        self.memory = Memory(cluster)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=2 * HUNG_SECONDS)
        self.admin = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {cluster.environment[ADMIN_TOKEN]}"}, timeout=HUNG_SECONDS
        )

    @property
    def now(self) -> float:
        return time.monotonic() - self.started

    async def run(self, disturb: Callable[["Load"], Awaitable[None]]) -> None:
        """Loads until the time is over and `disturb` has returned."""
        self.started = time.monotonic()
        disturbing = asyncio.create_task(disturb(self))

        def goes_on() -> bool:
            return self.now < self.seconds or not disturbing.done()

        async with asyncio.TaskGroup() as group:
            for _client in range(CLIENTS):
                group.create_task(self._ask(goes_on))
            group.create_task(self._change(goes_on))
            group.create_task(self._watch(goes_on))
        await disturbing

    async def _ask(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            asked, streams, began, came = random.randint(4, 48), random.random() < 0.5, self.now, 0
            kind = "streamed" if streams else "whole"
            self.sent[kind] += 1
            options = {"stream_options": {"include_usage": True}} if streams else {}
            try:
                answer = await self.openai.completions.create(
                    model=MODEL_ID,
                    prompt=random.choice(PROMPTS) * random.randint(1, 8),
                    max_tokens=asked,
                    stream=streams,
                    extra_body={"ignore_eos": True},
                    **options,
                )
                if streams:
                    usage = None
                    async for chunk in answer:
                        came += bool(chunk.choices)
                        usage = chunk.usage or usage
                else:
                    usage = answer.usage
                error = "" if usage and usage.completion_tokens == asked else f"the answer ended early: {usage}"
            except (openai.APIError, httpx.HTTPError) as caught:
                status = getattr(caught, "status_code", "")
                error = f"{type(caught).__name__} {status}: {caught}"
            if error:
                self.failures.append(Failure(began, self.now, streams, came, error))
            else:
                self.answered[kind] += 1
                self.latencies.append(self.now - began)

    async def _change(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            changes = {"enabled": random.random() < 0.8, "select_top_k": random.randint(1, 8)}
            at = self.now
            try:
                answer = await self.admin.patch(f"{self.url}{SETTINGS_PATH}", json=changes)
                outcome = {200: "confirmed", 202: "pending"}.get(answer.status_code)
                error = answer.text
            except httpx.HTTPError as caught:
                outcome, error = None, f"{type(caught).__name__}: {caught}"
            self.changes[outcome or "failed"] += 1
            if outcome is None:
                self.failed_changes.append({"at": rounded(at), "error": error[:300]})
            await asyncio.sleep(max(0, CHANGE_SECONDS - (self.now - at)))

    async def _watch(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            await asyncio.to_thread(self.memory.sample)
            await asyncio.sleep(2)

    async def disturb(self, name: str, act: Callable[[], None]) -> None:
        """Acts, and waits until all replicas are whole again."""
        before = self.engines()
        event = Event(name, self.now)
        await asyncio.to_thread(act)
        deadline = self.now + RECOVERY_SECONDS
        while self.now < deadline and not (self.engines() != before and await self._is_whole()):
            await asyncio.sleep(0.5)
        self.events.append(Event(name, event.at, self.now - event.at if self.now < deadline else None))

    def engines(self) -> set[int]:
        return {process.pid for process in processes(self.cluster, ENGINE)}

    async def _is_whole(self) -> bool:
        """Whether Serve says that everything runs, and there is an engine for each replica, no more."""
        address = f"{self.cluster.environment['RAY_API_SERVER_ADDRESS']}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {self.cluster.environment['RAY_AUTH_TOKEN']}"}
        answer = await self.admin.get(address, headers=headers)
        deployments = answer.raise_for_status().json()["applications"]["sere"]["deployments"].values()
        states = [replica["state"] for deployment in deployments for replica in deployment["replicas"]]
        healthy = all(deployment["status"] == "HEALTHY" for deployment in deployments)
        return healthy and set(states) == {"RUNNING"} and len(self.engines()) == REPLICAS

    def killer(self, title: str) -> Callable[[], None]:
        def kill() -> None:
            processes(self.cluster, title)[0].send_signal(signal.SIGKILL)

        return kill


def deploy_with(cluster: LocalCluster, **rerouting: Any) -> None:
    """Deploys the running application again, with these settings of re-routing."""
    file = cluster.folder / "app.yaml"
    app = yaml.safe_load(file.read_text())
    app["applications"][0]["args"]["rerouting"] |= rerouting
    file.write_text(yaml.safe_dump(app))
    command = ["serve", "deploy", str(file), "--address", cluster.environment["RAY_API_SERVER_ADDRESS"]]
    done = cluster.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"serve deploy failed:\n{done.stdout}{done.stderr}")


def survive(cluster: LocalCluster, url: str, seconds: float, deploys: bool = True) -> dict[str, Any]:
    """Returns what clients saw for `seconds`, or for as long as the disturbances took to be overcome."""

    async def disturbances(load: Load) -> None:
        pause = seconds / 20
        await asyncio.sleep(2 * pause)
        await load.disturb("a replica killed", load.killer(REPLICA))
        await asyncio.sleep(pause)
        await load.disturb("an engine killed", load.killer(ENGINE))
        await asyncio.sleep(pause)
        if deploys:
            await load.disturb("deployed again", lambda: deploy_with(cluster, select_top_k=3))
            await asyncio.sleep(4 * pause)

    tokens = greedy_without_rerouting(cluster, url)
    load = Load(cluster, url, seconds)
    asyncio.run(load.run(disturbances))
    same = greedy_without_rerouting(cluster, url) == tokens
    memory, causes = load.memory.growth(), why(load.failures, load.events)
    return {
        "seconds": rounded(load.now),
        "sent": dict(load.sent),
        "answered": dict(load.answered),
        "answered_in_seconds": spread(load.latencies),
        "failed": len(load.failures),
        "why": causes,
        "changes_of_settings": dict(load.changes),
        "failed_changes": load.failed_changes,
        "events": [
            {"name": e.name, "at": rounded(e.at), "whole_after": e.recovered and rounded(e.recovered)}
            for e in load.events
        ],
        "memory_mib": memory,
        "checks": {
            "every disturbance overcome": all(event.recovered is not None for event in load.events),
            "nothing hangs": all(failure.ended - failure.began < HUNG_SECONDS for failure in load.failures)
            and max(load.latencies) < HUNG_SECONDS,
            "failures are fast": all(row["seconds_later"]["max"] < FAST_SECONDS for row in causes),
            "memory flat": is_flat(memory),
            "greedy tokens as before": same,
        },
    }


def why(failures: list[Failure], events: list[Event]) -> list[dict[str, Any]]:
    """Returns the failures by what had happened, how far the answer was, and the error."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for failure in failures:
        before = [event for event in events if event.at <= failure.ended]
        name, at = (before[-1].name, before[-1].at) if before else ("nothing", 0.0)
        way = ("streamed, " if failure.streams else "whole, ") + ("begun" if failure.tokens else "not begun")
        found.setdefault((name, way, failure.error[:200]), []).append(failure.ended - at)
    return [
        {"after": name, "request": way, "error": error, "times": len(ends), "seconds_later": spread(ends)}
        for (name, way, error), ends in found.items()
    ]


def details(result: dict[str, Any]) -> Iterator[Table]:
    sent, answered = (sum(result[what].values()) for what in ("sent", "answered"))
    title = f"{sent} requests sent, {answered} answered, {result['failed']} failed in {result['seconds']} s"
    table = Table("after", "request", "error", "times", "seconds later", title=title)
    for row in result["why"]:
        later = row["seconds_later"]
        table.add_row(row["after"], row["request"], row["error"], str(row["times"]), f"{later['min']}-{later['max']}")
    yield table
    changes = f"changes of settings: {result['changes_of_settings']}"
    table = Table("disturbance", "at second", "seconds until whole", title=changes)
    for event in result["events"]:
        table.add_row(event["name"], str(event["at"]), str(event["whole_after"]))
    yield table


def main(
    seconds: Annotated[int, typer.Option(help="Seconds of load, at least.", min=20)] = 300,
    seed: Annotated[int | None, typer.Option(help="Seed of the requests. By default, it is drawn.")] = None,
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "tests" / "soak" / "results" / "survival.json",
) -> None:
    seed = seeded(seed)
    with LocalCluster(num_cpus=12) as cluster:
        artifact = cluster.folder / "artifact"
        calibrate(cluster, artifact)
        with served(cluster, free_ports(1)[0], artifact, num_replicas=REPLICAS, environment=ENVIRONMENT) as base_url:
            result = survive(cluster, base_url.removesuffix("/v1"), seconds)
    command = f"python -m tests.soak.survival --seconds {seconds} --seed {seed}"
    finish("survival", command, result, details(result), results)


if __name__ == "__main__":
    typer.run(main)
