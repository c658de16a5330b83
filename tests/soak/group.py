"""What clients see while ranks of a data-parallel group die, one on each of two hosts, and when they get answers again.

    python -m tests.soak.group  # 15 minutes; needs root and iproute2

There are three hosts, in network namespaces: the head, with the ingress and the proxy that clients ask, and two workers
with room for one rank of the group each. Clients ask without a pause, and never ask again for what failed. Under that
load the engine of a rank is killed, of the second one and of the first. Then all processes of a host are, which comes
back a while later.

Exits with 1 if a check failed.
"""

import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from benchmarks.common import spread
from examples.application import ROOT
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.provenance import rounded
from sere_dist.testing.namespaces import can_be_made
from tests.soak.head import HEAD, PATIENCE_SECONDS, PORT, deploy, outcomes, settings_at
from tests.soak.load import ENGINE, ENVIRONMENT, finish, processes
from tests.support.hosts import Hosts
from tests.support.polling import eventually

RANKS, CLIENTS = 2, 4
FIRST, LAST = 1, 2  # hosts of the ranks
QUIET_SECONDS = 20  # of load before the first disturbance, and after the group answers again
AWAY_SECONDS = 30  # of a host that comes back
FAST_SECONDS = 10  # after a death the requests that it touched have failed
ARGUMENTS = {
    "data_parallel_size": RANKS,
    "expert_parallel": True,
    "environment": {**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"},
    # Where no rank is.
    "ingress": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0, "resources": {"node:__internal_head__": 0.01}}},
}
SETTINGS = {"select_top_k": 3, "threshold": 0.25}

Outcome = dict[str, Any]


def kill_engine(hosts: Hosts, rank: int) -> None:
    (engine,) = processes(hosts, f"{ENGINE}_DP{rank}")
    engine.kill()


def lose_host(hosts: Hosts) -> None:
    """Ends all of a host at once; it is started again later."""
    hosts.kill(LAST)
    time.sleep(AWAY_SECONDS)
    hosts.start(LAST)


DISTURBANCES: dict[str, Callable[[Hosts], None]] = {
    "the engine of rank 1 killed": partial(kill_engine, rank=1),
    "the engine of rank 0 killed": partial(kill_engine, rank=0),
    f"a host killed, and back after {AWAY_SECONDS} s": lose_host,
}


def summary(name: str, at: float, ready: float, asked: list[Outcome]) -> dict[str, Any]:
    """Returns what clients saw of a disturbance.

    Args:
        name: the disturbance.
        at: when it was made.
        ready: from when on nothing stands in the group's way: when a host that it needs is back.
        asked: the requests that ended since.
    """
    failed = [each for each in asked if each["error"]]
    answered = [each for each in asked if not each["error"]]
    # The first that only the new group can have answered.
    last_failure = max((each["ended"] for each in failed), default=at)
    again = min(each["ended"] for each in answered if each["ended"] > last_failure)
    waited = max(each["ended"] - each["began"] for each in answered)
    return {
        "name": name,
        "at": at,
        "failed": len(failed),
        "statuses": dict(Counter(str(each["status"]) for each in failed)),
        "errors": dict(Counter(each["error"][:160] for each in failed)),
        **({"failed_after_seconds": spread([each["ended"] - at for each in failed])} if failed else {}),
        "answered_again_after_seconds": rounded(again - at),
        "of_these_with_room": rounded(again - ready),
        "slowest_answer_seconds": rounded(waited),
    }


def lose_ranks(hosts: Hosts) -> dict[str, Any]:
    """Returns what clients saw of each disturbance."""
    url = f"http://{hosts.ip(HEAD)}:{PORT}"
    log = hosts.folder / "asked.jsonl"
    settings = partial(settings_at, url, hosts, HEAD)

    def engines() -> set[int]:
        return {engine.pid for engine in processes(hosts, ENGINE)}

    def answered_since(when: float) -> int:
        return sum(each["began"] > when and not each["error"] for each in outcomes(log))

    with log.open("w") as file:
        words = ["tests.soak.ask", f"{url}/v1", "--clients", str(CLIENTS)]
        asking = hosts.popen(HEAD, [sys.executable, "-m", *words], cwd=ROOT, stdout=file)
    eventually(lambda: answered_since(0) > 0, PATIENCE_SECONDS)
    began, before = time.time(), settings(**SETTINGS)
    spread_out = [len(processes_on(hosts, host)) for host in (FIRST, LAST)] == [1, 1]
    time.sleep(QUIET_SECONDS)

    events, stays = [], []
    for name, disturb in DISTURBANCES.items():
        old, at = engines(), time.time()
        disturb(hosts)
        # What is back after a disturbance without an absence was never away.
        ready = time.time() if time.time() - at > AWAY_SECONDS else at

        def comes_back(old: set[int] = old, ready: float = ready) -> bool:
            return len(engines() - old) == RANKS and not old & engines() and answered_since(ready) >= 2 * CLIENTS

        eventually(comes_back, PATIENCE_SECONDS)
        time.sleep(QUIET_SECONDS)
        asked = [each for each in outcomes(log) if each["ended"] > at]
        events.append(summary(name, at, ready, asked))
        stays.append(settings() == before)
        print(events[-1], flush=True)
    asking.terminate()
    asking.wait()

    asked = [each for each in outcomes(log) if each["ended"] > began]
    late = [event["failed_after_seconds"]["max"] for event in events if event["failed"]]
    return {
        "clients": CLIENTS,
        "requests": len(asked),
        "answered": sum(not each["error"] for each in asked),
        "events": [event | {"at": rounded(event["at"] - began)} for event in events],
        "checks": {
            "a rank on each host": spread_out,
            "requests fail with status 503 alone": all(event["statuses"].keys() <= {"503"} for event in events),
            "and soon": all(seconds < FAST_SECONDS for seconds in late),
            "the settings in force stay": all(stays),
        },
    }


def processes_on(hosts: Hosts, host: int) -> list[int]:
    """Returns the engines of a host."""
    here = {process.pid for process in hosts.processes_of(host)}
    return [engine.pid for engine in processes(hosts, ENGINE) if engine.pid in here]


def details(result: dict[str, Any]) -> Iterator[Table]:
    title = f"{result['requests']} requests, {result['answered']} answered"
    table = Table("", "failed", "statuses", "within [s]", "answered again after [s]", "with room [s]", title=title)
    for event in result["events"]:
        within = event.get("failed_after_seconds", {}).get("max", "")
        again = (event["answered_again_after_seconds"], event["of_these_with_room"])
        table.add_row(event["name"], str(event["failed"]), str(event["statuses"]), str(within), *map(str, again))
    yield table


def main(
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "tests" / "soak" / "results" / "group.json",
) -> None:
    if not can_be_made():
        raise SystemExit("error: this needs root and iproute2: apt-get install iproute2")
    os.environ[ADMIN_TOKEN] = secrets.token_hex(16)
    with Hosts(3, num_cpus=2) as hosts:  # of a rank: its replica's, and its worker's
        deploy(hosts, **ARGUMENTS)
        result = lose_ranks(hosts)
    finish("group", "python -m tests.soak.group", result, details(result), results)


if __name__ == "__main__":
    typer.run(main)
