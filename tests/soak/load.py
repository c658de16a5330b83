"""What fuzzing and survival share: the prompts, the answers to compare, memory over time, and how a run ends."""

import json
import random
import secrets
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import typer
from rich.table import Table

from examples.tiny_moe.data import MODEL_ID
from sere_dist.admin import SETTINGS_PATH
from sere_dist.console import tables
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.testing.local_cluster import LocalCluster
from tests.support.hosts import Hosts

PROMPTS = ("In the beginning", "sea lion (noun):", ".. function:: sorted(", "And the king answered", "def main(", "The")
GREEDY = {"max_tokens": 32, "temperature": 0, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
GROWTH = 1.05, 16  # memory may grow under load by this factor and so many MiB
# Two engines that spin on the same cores slow each other tenfold.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
REPLICA, ENGINE = f"ray::ServeReplica:sere:LLMServer:{MODEL_ID}", "VLLM::EngineCore"


def seeded(seed: int | None) -> int:
    """Seeds what is asked at random, anew where there is no seed; returns the seed."""
    seed = secrets.randbelow(2**31) if seed is None else seed
    random.seed(seed)
    return seed


def processes(cluster: LocalCluster | Hosts, *titles: str) -> list[psutil.Process]:
    """Returns the cluster's processes whose title begins with one of these."""
    found = []
    for process in cluster.processes():
        try:
            if process.cmdline()[0].startswith(titles):
                found.append(process)
        except (psutil.NoSuchProcess, IndexError):
            continue
    return found


def greedy_without_rerouting(cluster: LocalCluster, url: str, key: str = "none") -> list[list[int]]:
    """Returns the tokens that follow each prompt, after re-routing is switched off."""
    headers = {"Authorization": f"Bearer {cluster.environment[ADMIN_TOKEN]}"}
    httpx.patch(f"{url}{SETTINGS_PATH}", headers=headers, json={"enabled": False}, timeout=60).raise_for_status()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    answers = [client.completions.create(model=MODEL_ID, prompt=prompt, **GREEDY) for prompt in PROMPTS]
    return [answer.choices[0].token_ids for answer in answers]


class Memory:
    """The resident memory of the application's processes over time: Serve's replicas, vLLM's engines and workers."""

    def __init__(self, cluster: LocalCluster):
        self.cluster = cluster
        self.mib: dict[tuple[int, str], list[float]] = {}  # (process id, title) -> samples

    def sample(self) -> None:
        for process in processes(self.cluster, "ray::ServeReplica:", "VLLM::"):
            try:
                title = process.cmdline()[0].split(".")[0].removeprefix("ray::ServeReplica:")  # Ray adds the method
                self.mib.setdefault((process.pid, title), []).append(process.memory_info().rss / 2**20)
            except (psutil.NoSuchProcess, IndexError):
                continue

    def growth(self) -> list[dict[str, Any]]:
        """Returns medians of the second and of the last third of each process's life [MiB]: the first warms up."""
        found = []
        for (_pid, title), sizes in self.mib.items():
            third = len(sizes) // 3
            if third > 1:
                early, late = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[-third:])
                found.append({"process": title, "samples": len(sizes), "early": rounded(early), "late": rounded(late)})
        return sorted(found, key=lambda process: process["process"])


def is_flat(growth: list[dict[str, Any]]) -> bool:
    factor, more = GROWTH
    return all(process["late"] <= factor * process["early"] + more for process in growth)


def finish(name: str, command: str, result: dict[str, Any], details: Iterable[Table], results: Path, **tools) -> None:
    """Prints a result for people and, last, for machines; keeps it; exits with 1 if one of its checks failed.

    `tools` are versions of what else took part.
    """
    about = versions("sere-dist", "vllm", "vllm-cpu", "torch", "ray") | tools
    result = {"command": command, "machine": machine(), "versions": about, **result}
    checks = Table("check", "")
    for check, holds in result["checks"].items():
        checks.add_row(check, "yes" if holds else "[red]no[/]")
    tables().print(checks, *details)
    keep(results, {name: result})
    print(json.dumps({name: result}))
    if not all(result["checks"].values()):
        raise typer.Exit(1)
