"""What clients see while the cluster's head dies, all of its processes at once, and is started again.

    python -m tests.soak.head  # 6 minutes; needs root, iproute2 and redis-server

There are three hosts, in network namespaces: the head, which runs no work; a worker, with the replica, the ingress and
the proxy that clients ask; and Redis, where the head keeps its state. Requests must be answered all the while, by the
engine that was there before. The settings in force must be the same afterwards, and it must be possible to change them.

Exits with 1 if a check failed.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from benchmarks.common import spread
from examples.application import ROOT, TINY_MOE
from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.provenance import rounded
from sere_dist.testing.namespaces import can_be_made
from tests.soak.load import ENGINE, ENVIRONMENT, finish, processes
from tests.support.hosts import Hosts
from tests.support.polling import eventually

HEAD, WORKER = 0, 1
PORT = 8000
PATIENCE_SECONDS = 600
DOWN_SECONDS = 60  # between the death of the head and the start of another
QUIET_SECONDS = 30  # of load before it dies, and after it is back
# Reads the settings in force, or changes them and waits until every replica has them: of a URL, by a JSON object.
SETTINGS = """
import json, sys
from sere_dist.admin import change_settings, request_settings
url, changes = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps(change_settings(url, changes) if changes else request_settings(url)))
"""


def command(hosts: Hosts, host: int, *words: str) -> str:
    """Runs a command on a host, and returns what it printed.

    Raises:
        RuntimeError: it failed.
    """
    done = hosts.run(host, [*words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def settings_at(url: str, hosts: Hosts, host: int, **changes: Any) -> dict[str, Any]:
    """Changes the settings in force from a host, or reads them where no changes are given; returns them."""
    return json.loads(command(hosts, host, sys.executable, "-c", SETTINGS, url, json.dumps(changes)))["settings"]


def deploy(hosts: Hosts, **arguments: Any) -> None:
    """Calibrates the example model and deploys its application. `arguments` are the application's."""
    artifact = hosts.folder / "artifact"
    calibrate = (sys.executable, "-m", "calibration_jobs.calibrate", "--model", str(MODEL), "--output", str(artifact))
    command(hosts, HEAD, *calibrate, "--dataset", str(CALIBRATION), "--num-samples", "64")
    app = yaml.safe_load(TINY_MOE.app.read_text())
    app["http_options"] |= {"host": "0.0.0.0", "port": PORT}
    app["proxy_location"] = "EveryNode"
    app["applications"][0]["args"] |= {"environment": ENVIRONMENT, "model": str(MODEL), **arguments}
    app["applications"][0]["args"]["rerouting"]["artifact"] = str(artifact)
    app["applications"][0]["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    file = hosts.folder / "app.yaml"
    file.write_text(yaml.safe_dump(app))
    command(hosts, HEAD, "serve", "deploy", str(file), "--address", f"http://{hosts.ip(HEAD)}:8265")


def outcomes(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lose_head(hosts: Hosts) -> dict[str, Any]:
    """Returns what clients saw before, while and after there was no head."""
    url = f"http://{hosts.ip(WORKER)}:{PORT}"
    log = hosts.folder / "asked.jsonl"
    settings = partial(settings_at, url, hosts, WORKER)
    with log.open("w") as file:
        asking = hosts.popen(WORKER, [sys.executable, "-m", "tests.soak.ask", f"{url}/v1"], cwd=ROOT, stdout=file)
    eventually(lambda: any(not each["error"] for each in outcomes(log)), PATIENCE_SECONDS)
    ready, before = time.time(), settings(select_top_k=3, threshold=0.25)
    engine = processes(hosts, ENGINE)
    time.sleep(QUIET_SECONDS)

    died = time.time()
    hosts.kill(HEAD)
    time.sleep(DOWN_SECONDS)
    started = time.time()
    hosts.start(HEAD)
    status = ("serve", "status", "--address", f"http://{hosts.ip(HEAD)}:8265")

    def is_whole() -> bool:
        return yaml.safe_load(command(hosts, HEAD, *status))["applications"]["sere"]["status"] == "RUNNING"

    eventually(is_whole, PATIENCE_SECONDS)
    whole = time.time()
    time.sleep(QUIET_SECONDS)
    after = settings()
    eventually(lambda: settings(select_top_k=4), PATIENCE_SECONDS)
    changed, same_engine = settings(), processes(hosts, ENGINE) == engine != []
    asking.terminate()
    asking.wait()

    asked = [each for each in outcomes(log) if each["began"] > ready]
    phases = {"before": (ready, died), "without a head": (died, started), "after": (started, time.time())}
    counts, failures = {}, []
    for phase, (begin, end) in phases.items():
        within = [each for each in asked if begin <= each["ended"] < end]
        failed = [each for each in within if each["error"]]
        seconds = [each["ended"] - each["began"] for each in within if not each["error"]]
        failures += [
            {"phase": phase, "after_its_death": rounded(each["ended"] - died), "error": each["error"][:200]}
            for each in failed
        ]
        counts[phase] = {
            "answered": len(seconds),
            "failed": len(failed),
            **({"seconds": spread(seconds)} if seconds else {}),
        }
    return {
        "seconds_without_a_head": rounded(started - died),
        "seconds_until_whole": rounded(whole - started),
        "requests": counts,
        "failures": failures[:20],
        "checks": {
            "every request is answered": not failures,
            "by the engine that was there before": same_engine,
            "the settings in force are the same": before == after,
            "and can be changed": changed["select_top_k"] == 4,
        },
    }


def details(result: dict[str, Any]) -> Iterator[Table]:
    title = f"whole {result['seconds_until_whole']} s after another head was started"
    table = Table("", "answered", "failed", "median [s]", "slowest [s]", title=title)
    for phase, counts in result["requests"].items():
        median, slowest = (str(counts.get("seconds", {}).get(which, "")) for which in ("median", "max"))
        table.add_row(phase, str(counts["answered"]), str(counts["failed"]), median, slowest)
    yield table


def main(
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "tests" / "soak" / "results" / "head.json",
) -> None:
    if not can_be_made() or shutil.which("redis-server") is None:
        raise SystemExit("error: this needs root, iproute2 and redis-server: apt-get install iproute2 redis-server")
    os.environ[ADMIN_TOKEN] = secrets.token_hex(16)
    with Hosts(2, num_cpus=4, has_redis=True) as hosts:
        deploy(hosts)
        result = lose_head(hosts)
    redis = subprocess.run(["redis-server", "--version"], capture_output=True, text=True).stdout.split()[2]
    finish("head", "python -m tests.soak.head", result, details(result), results, redis=redis.removeprefix("v="))


if __name__ == "__main__":
    typer.run(main)
