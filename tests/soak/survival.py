"""What a served model's clients see while its processes die, hang and are replaced.

    make soak                                # an hour; beside it overload and the fuzzing of tests.soak.fuzz
    python -m tests.soak.survival --seconds 600

Serves two replicas of the example model on a head and a further node. Clients ask and never ask again for what failed:
most for short answers, streamed or not, some for eight long ones at once, which take a minute. Some leave in the middle
of an answer. The settings change every 10 seconds. Meanwhile one disturbance after the other is made, again and again.
Afterwards greedy tokens without re-routing must be those of before.

Exits with 1 if a check failed.
"""

import asyncio
import itertools
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import openai
import psutil
import typer
import yaml
from rich.table import Table

from benchmarks.common import spread
from examples.application import ROOT, calibrate, served
from examples.tiny_moe.data import MODEL_ID
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

CLIENTS, LONG_CLIENTS, REPLICAS, INGRESSES = 12, 4, 2, 2
LONG = {"prompt": "In the beginning", "max_tokens": 480, "n": 8}  # all that the model's context holds
PAUSE_SECONDS = 0.0  # of a client between two requests, on average
LEAVES = 0.1  # share of the short streams whose client leaves
CHANGE_SECONDS = 10  # between changes of settings
HUNG_SECONDS = 600  # a request that takes longer
FAST_SECONDS = 10  # after a death its requests have failed
ENGINE_TIMEOUT_SECONDS = 30  # the application's
RECOVERY_SECONDS = 1200  # old replicas end once their long answers have
REPLICA_CPUS = 2  # its own, and its worker's
KEEPER, INGRESS = (f"ray::ServeReplica:sere:{name}" for name in ("SereSettings", "SereIngress"))
CONTROLLER, WORKER = "ray::ServeController", "VLLM::Worker"
ARGUMENTS = {
    "num_replicas": REPLICAS,
    "environment": ENVIRONMENT,
    "engine_timeout_s": ENGINE_TIMEOUT_SECONDS,
    # Without CPUs of its own: an ingress that moves to the further node while a replica leaves it would take the place
    # of the replica that comes.
    "ingress": {"num_replicas": INGRESSES, "ray_actor_options": {"num_cpus": 0}},
}


@dataclass(frozen=True)
class Failure:
    """A request that was not answered in full."""

    began: float
    ended: float  # seconds since the load began
    kind: str
    tokens: int  # that had come
    error: str


@dataclass(frozen=True)
class Event:
    """A disturbance: when, until the application was whole again, and how long after it requests may fail, if ever."""

    name: str
    at: float
    recovered: float | None
    fails_for: float


class Load:
    """The clients, the changes of settings, and what came of them. Times are in seconds since it began."""

    def __init__(self, cluster: LocalCluster, url: str, seconds: float):
        self.cluster, self.url, self.seconds = cluster, url, seconds
        self.sent, self.answered, self.left, self.changes = Counter(), Counter(), Counter(), Counter()
        self.latencies: dict[str, list[float]] = {"short": [], "long": []}
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
            for client in range(CLIENTS + LONG_CLIENTS):
                group.create_task(self._ask(goes_on, is_long=client < LONG_CLIENTS))
            group.create_task(self._change(goes_on))
            group.create_task(self._watch(goes_on))
        await disturbing

    async def _ask(self, goes_on: Callable[[], bool], *, is_long: bool) -> None:
        while goes_on():
            streams = is_long or random.random() < 0.5
            leaves_after = random.randint(1, 4) if not is_long and streams and random.random() < LEAVES else None
            prompt = random.choice(PROMPTS) * random.randint(1, 8)
            request = LONG if is_long else {"prompt": prompt, "max_tokens": random.randint(4, 48)}
            kind = "long" if is_long else "streamed" if streams else "whole"
            began, came, error = self.now, 0, ""
            self.sent[kind] += 1
            options = {"stream_options": {"include_usage": True}} if streams else {}
            try:
                answer = await self.openai.completions.create(
                    model=MODEL_ID, stream=streams, extra_body={"ignore_eos": True}, **request, **options
                )
                usage = answer.usage if not streams else None
                if streams:
                    async with answer:
                        async for chunk in answer:
                            came += bool(chunk.choices)
                            usage = chunk.usage or usage
                            if came == leaves_after:
                                break
                if came != leaves_after and (
                    not usage or usage.completion_tokens != request["max_tokens"] * request.get("n", 1)
                ):
                    error = f"the answer ended early: {usage}"
            except (openai.APIError, httpx.HTTPError) as caught:
                status = getattr(caught, "status_code", "")
                error = f"{type(caught).__name__} {status}: {caught}"
            if error:
                self.failures.append(Failure(began, self.now, kind, came, error))
            elif leaves_after is not None and came == leaves_after:
                self.left[kind] += 1
            else:
                self.answered[kind] += 1
                self.latencies["long" if is_long else "short"].append(self.now - began)
            await asyncio.sleep(2 * PAUSE_SECONDS * random.random())

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

    async def disturb(self, name: str, act: Callable[[], list[psutil.Process]], fails_for: float = 0.0) -> None:
        """Acts, and waits until the processes that `act` returns are gone and everything is whole again."""
        at = self.now
        ending = await asyncio.to_thread(act)
        deadline = self.now + RECOVERY_SECONDS
        while self.now < deadline and (any(process.is_running() for process in ending) or not await self._is_whole()):
            await asyncio.sleep(0.5)
        self.events.append(Event(name, at, self.now - at if self.now < deadline else None, fails_for))
        answered, failed = sum(self.answered.values()), len(self.failures)
        print(f"{name}: {self.now - at:.0f} s until whole; {answered} answered, {failed} failed so far", flush=True)

    async def _is_whole(self) -> bool:
        """Whether Serve says that everything runs, and all processes are there, no more: Serve may not have noticed."""
        address = f"{self.cluster.environment['RAY_API_SERVER_ADDRESS']}/api/serve/applications/"
        headers = {"Authorization": f"Bearer {self.cluster.environment['RAY_AUTH_TOKEN']}"}
        try:
            answer = (await self.admin.get(address, headers=headers)).raise_for_status().json()
        except httpx.HTTPError:  # the controller is what died
            return False
        deployments = answer["applications"]["sere"]["deployments"].values()
        states = [replica["state"] for deployment in deployments for replica in deployment["replicas"]]
        healthy = all(deployment["status"] == "HEALTHY" for deployment in deployments)
        counts = [len(processes(self.cluster, title)) for title in (ENGINE, INGRESS, KEEPER)]
        return healthy and set(states) == {"RUNNING"} and counts == [REPLICAS, INGRESSES, 1]


def sender(cluster: LocalCluster, title: str, number: signal.Signals = signal.SIGKILL) -> Callable:
    """Returns what sends a signal to a process of this title, which is to end by it."""

    def send() -> list[psutil.Process]:
        process = random.choice(processes(cluster, title))
        process.send_signal(number)
        return [process]

    return send


def worker_killer(cluster: LocalCluster) -> Callable:
    """Returns what kills an engine's worker. Its engine is to end, too, which takes a moment."""

    def kill() -> list[psutil.Process]:
        worker = random.choice(processes(cluster, WORKER))
        engine = worker.parent()
        assert engine is not None
        worker.kill()
        return [worker, engine]

    return kill


def deployer(cluster: LocalCluster) -> Callable:
    """Returns what deploys the running application again, with other settings of re-routing each time."""

    def deploy() -> list[psutil.Process]:
        old = processes(cluster, ENGINE)
        file = cluster.folder / "app.yaml"
        app = yaml.safe_load(file.read_text())
        rerouting = app["applications"][0]["args"]["rerouting"]
        rerouting["select_top_k"] = rerouting["select_top_k"] % 4 + 1
        file.write_text(yaml.safe_dump(app))
        command = ["serve", "deploy", str(file), "--address", cluster.environment["RAY_API_SERVER_ADDRESS"]]
        done = cluster.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"serve deploy failed:\n{done.stdout}{done.stderr}")
        return old

    return deploy


class Nodes:
    """The nodes beside the head, of which there is one, with one replica."""

    def __init__(self, cluster: LocalCluster):
        self.cluster = cluster
        self.id, self.process = self._start()

    def _start(self) -> tuple[str, Any]:
        before, process = self._living(), self.cluster.add_node(REPLICA_CPUS)
        deadline = time.monotonic() + RECOVERY_SECONDS
        while time.monotonic() < deadline and not (new := self._living() - before):
            time.sleep(0.5)
        (node,) = new
        return node, process

    def _living(self) -> set[str]:
        address = f"{self.cluster.environment['RAY_API_SERVER_ADDRESS']}/api/v0/nodes"
        headers = {"Authorization": f"Bearer {self.cluster.environment['RAY_AUTH_TOKEN']}"}
        answer = httpx.get(address, headers=headers, timeout=60).raise_for_status().json()
        return {node["node_id"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}

    def replace(self) -> list[psutil.Process]:
        """Starts another node, drains the first one, and ends it."""
        old, self.id, self.process = (self.id, self.process), *self._start()
        command = [sys.executable, "-m", "serve_apps.drain", "--node-id", old[0], "--seconds", str(RECOVERY_SECONDS)]
        done = self.cluster.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the node was not drained:\n{done.stdout}{done.stderr}")
        old[1].terminate()
        old[1].wait()
        return []


def survive(cluster: LocalCluster, url: str, seconds: float, nodes: Nodes | None = None) -> dict[str, Any]:
    """Returns what clients saw for at least `seconds`, and until each disturbance was made and overcome once.

    Without `nodes` only a replica and an engine are killed, once.
    """
    hang_seconds = 2 * (ENGINE_TIMEOUT_SECONDS + 10) + FAST_SECONDS
    disturbances = [
        ("a replica killed", sender(cluster, REPLICA), FAST_SECONDS),
        ("an engine killed", sender(cluster, ENGINE), FAST_SECONDS),
    ]
    if nodes is not None:
        disturbances += [
            ("the settings' keeper killed", sender(cluster, KEEPER), 0.0),
            ("deployed again", deployer(cluster), 0.0),
            ("a worker of an engine killed", worker_killer(cluster), FAST_SECONDS),
            ("Serve's controller killed", sender(cluster, CONTROLLER), 0.0),
            ("an engine stopped", sender(cluster, ENGINE, signal.SIGSTOP), hang_seconds),
            ("a node drained", nodes.replace, 0.0),
            ("an ingress killed", sender(cluster, INGRESS), FAST_SECONDS),
        ]

    async def disturb(load: Load) -> None:
        pause = min(60, seconds / 20)
        await asyncio.sleep(2 * pause)
        for number, (name, act, fails_for) in enumerate(itertools.cycle(disturbances)):
            if number >= len(disturbances) and (nodes is None or load.now > seconds):
                return
            await load.disturb(name, act, fails_for)
            await asyncio.sleep(pause)

    tokens = greedy_without_rerouting(cluster, url)
    load = Load(cluster, url, seconds)
    asyncio.run(load.run(disturb))
    same = greedy_without_rerouting(cluster, url) == tokens
    memory, causes = load.memory.growth(), why(load.failures, load.events)
    sent, answered, left = (sum(count.values()) for count in (load.sent, load.answered, load.left))
    slowest = max(latency for latencies in load.latencies.values() for latency in latencies)
    return {
        "seconds": rounded(load.now),
        "sent": dict(load.sent),
        "answered": dict(load.answered),
        "left": dict(load.left),
        "answered_in_seconds": {kind: spread(latencies) for kind, latencies in load.latencies.items() if latencies},
        "failed": len(load.failures),
        "lost": sent - answered - left - len(load.failures),
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
            and slowest < HUNG_SECONDS,
            "nothing is lost": sent == answered + left + len(load.failures),
            "requests fail by deaths alone, and soon": all(row["in_time"] for row in causes),
            "memory flat": is_flat(memory),
            "greedy tokens as before": same,
        },
    }


def why(failures: list[Failure], events: list[Event]) -> list[dict[str, Any]]:
    """Returns the failures by what had happened, how far the answer was, and the error."""
    found: dict[tuple[str, str, str], list[tuple[float, bool]]] = {}
    nothing = Event("nothing", 0.0, None, 0.0)
    for failure in failures:
        event = next((event for event in reversed(events) if event.at <= failure.ended), nothing)
        way = f"{failure.kind}, {'begun' if failure.tokens else 'not begun'}"
        later = failure.ended - event.at
        found.setdefault((event.name, way, failure.error[:200]), []).append((later, later <= event.fails_for))
    return [
        {
            "after": name,
            "request": way,
            "error": error,
            "times": len(ends),
            "seconds_later": spread([later for later, _in_time in ends]),
            "in_time": all(in_time for _later, in_time in ends),
        }
        for (name, way, error), ends in found.items()
    ]


def details(result: dict[str, Any]) -> Iterator[Table]:
    sent, answered, left = (sum(result[what].values()) for what in ("sent", "answered", "left"))
    title = f"{sent} requests sent, {answered} answered, {left} left by their clients, {result['failed']} failed, "
    title += f"{result['lost']} lost in {result['seconds']} s"
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
    seconds: Annotated[int, typer.Option(help="Seconds of load, at least.", min=20)] = 3600,
    seed: Annotated[int | None, typer.Option(help="Seed of the requests. By default, it is drawn.")] = None,
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "tests" / "soak" / "results" / "survival.json",
) -> None:
    seed = seeded(seed)
    # Room for one replica; the other one is on a node of its own.
    with LocalCluster(num_cpus=REPLICA_CPUS) as cluster:
        artifact = cluster.folder / "artifact"
        calibrate(cluster, artifact=artifact, cpus_per_task=REPLICA_CPUS)
        nodes = Nodes(cluster)
        with served(cluster, free_ports(1)[0], artifact=artifact, proxy_location="HeadOnly", **ARGUMENTS) as base_url:
            result = survive(cluster, base_url.removesuffix("/v1"), seconds, nodes)
    command = f"python -m tests.soak.survival --seconds {seconds} --seed {seed}"
    finish("survival", command, result, details(result), results)


if __name__ == "__main__":
    typer.run(main)
