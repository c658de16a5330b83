"""What a served model does when more is asked of it than it can answer: four times as much, for ten minutes.

    python -m tests.soak.overload --seconds 600

Serves the example model, with a bound on the requests that it takes at a time. First, as many clients ask one request
after the other: that is its capacity, and how long its answers take. Then requests come at four times that rate,
whether or not those before were answered. Those that are admitted should take as long as before, the others be told at
once that there is no room, and memory should stay as it was.

Exits with 1 if a check failed.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from benchmarks.common import spread
from examples.application import ROOT, calibrate, served
from examples.tiny_moe.data import MODEL_ID
from sere_dist.provenance import rounded
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from tests.soak.load import ENVIRONMENT, PROMPTS, Memory, finish, is_flat, seeded

TAKES = 16  # requests that the engine takes, half of them to wait
TOKENS = 32  # of each answer
TIMES = 4  # the capacity
SLOWER = 2.0  # how much longer the median of the admitted may take than before: clients and refusals take a core, too
AT_ONCE_SECONDS = 1.0  # within which half of the others are refused
ARGUMENTS = {
    "environment": ENVIRONMENT,
    "engine": {
        "max_model_len": 512,
        "max_num_seqs": TAKES // 2,
        "max_num_queued_reqs": TAKES,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**27,
    },
}


class Clients:
    """What was asked and answered: seconds until an answer, by its status."""

    def __init__(self, url: str):
        self.http = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
        self.took: dict[int, list[float]] = {}
        self.wrong = 0  # refusals without Retry-After, answers that are too short

    async def ask(self) -> None:
        request = {"model": MODEL_ID, "prompt": random.choice(PROMPTS), "max_tokens": TOKENS, "ignore_eos": True}
        began = time.monotonic()
        answer = await self.http.post("/completions", json=request)
        self.took.setdefault(answer.status_code, []).append(time.monotonic() - began)
        is_whole = answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == TOKENS
        self.wrong += not is_whole and "retry-after" not in answer.headers

    async def one_after_the_other(self, clients: int, seconds: float) -> float:
        """Returns the answers per second."""
        end = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask()

        await asyncio.gather(*(client() for _ in range(clients)))
        return len(self.took[200]) / seconds

    async def at_rate(self, rate: float, seconds: float, memory: Memory) -> None:
        """Asks at random times, so many times per second."""
        began = time.monotonic()
        sampled = began
        async with asyncio.TaskGroup() as group:
            while (now := time.monotonic()) < began + seconds:
                group.create_task(self.ask())
                if now > sampled + 2:
                    sampled = now
                    group.create_task(asyncio.to_thread(memory.sample))
                await asyncio.sleep(random.expovariate(rate))


async def overload(cluster: LocalCluster, url: str, seconds: float) -> dict[str, Any]:
    """Returns what became of the requests."""
    warm, before, over = Clients(url), Clients(url), Clients(url)
    await warm.one_after_the_other(TAKES, 20)
    capacity = await before.one_after_the_other(TAKES, min(60, seconds))
    memory = Memory(cluster)
    await over.at_rate(TIMES * capacity, seconds, memory)
    growth, unloaded, admitted, refused = (
        memory.growth(),
        before.took[200],
        over.took.get(200, []),
        over.took.get(503, []),
    )
    slower = statistics.median(admitted) / statistics.median(unloaded)
    return {
        "seconds": seconds,
        "requests_per_second": {"capacity": rounded(capacity), "asked": rounded(TIMES * capacity)},
        "answered_per_second": rounded(len(admitted) / seconds),
        "requests": {str(status): len(took) for status, took in sorted(over.took.items())},
        "answered_in_seconds": {"at capacity": spread(unloaded), "overloaded": spread(admitted)},
        "median_times_slower": rounded(slower),
        "refused_in_seconds": spread(refused),
        "memory_mib": growth,
        "checks": {
            "all are answered or told to come again": over.took.keys() <= {200, 503} and not over.wrong,
            "those admitted take as long as before": slower < SLOWER,
            "the others are told at once": statistics.median(refused) < AT_ONCE_SECONDS,
            "memory flat": is_flat(growth),
        },
    }


def details(result: dict[str, Any]) -> Iterator[Table]:
    asked, answered = result["requests_per_second"], result["answered_per_second"]
    title = f"{asked['asked']} requests per second, of which {asked['capacity']} can be answered and {answered} were"
    table = Table("", "median", "fastest", "slowest", title=title)
    rows = {**result["answered_in_seconds"], "refused": result["refused_in_seconds"]}
    for name, seconds in rows.items():
        table.add_row(f"{name} [s]", *(str(seconds[which]) for which in ("median", "min", "max")))
    yield table


def main(
    seconds: Annotated[int, typer.Option(help="Seconds of overload.", min=10)] = 600,
    seed: Annotated[int | None, typer.Option(help="Seed of the requests. By default, it is drawn.")] = None,
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "tests" / "soak" / "results" / "overload.json",
) -> None:
    seed = seeded(seed)
    with LocalCluster() as cluster:
        artifact = cluster.folder / "artifact"
        calibrate(cluster, artifact=artifact)
        with served(cluster, free_ports(1)[0], artifact=artifact, **ARGUMENTS) as url:
            result = asyncio.run(overload(cluster, url, seconds))
    finish(
        "overload", f"python -m tests.soak.overload --seconds {seconds} --seed {seed}", result, details(result), results
    )


if __name__ == "__main__":
    typer.run(main)
