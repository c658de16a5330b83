"""The example models as Ray calibrates and serves them on this machine, for the demo, the tests and the soak runs."""

import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import yaml
from rich.console import Console

from examples.tiny_moe import data as tiny_moe
from sere_dist.method.similarity import MethodName
from sere_dist.testing.local_cluster import LocalCluster

ROOT = Path(__file__).resolve().parents[1]
READY_SECONDS = 900  # two engines that start together on two busy cores took 150; a throttled machine takes longer

console = Console()


@dataclass(frozen=True)
class Example:
    """A model and its texts, which stand in Parquet files with the columns `text` and `kind`."""

    model_id: str  # its name in requests
    model: Path
    calibration: Path
    held_out: Path


@dataclass(frozen=True)
class ServedExample(Example):
    """A model that is served, too."""

    artifact: Path
    app: Path  # the file for `serve run`
    method: MethodName = "frobenius"  # of the artifact
    samples: int = 64  # texts to calibrate on


TINY_MOE = ServedExample(
    model_id=tiny_moe.MODEL_ID,
    model=tiny_moe.MODEL,
    calibration=tiny_moe.CALIBRATION,
    held_out=tiny_moe.HELDOUT,
    artifact=ROOT / "build" / "tiny-moe-sere",
    app=ROOT / "serve_apps" / "tiny_moe.yaml",
)
SMOLLM2_MOE = ServedExample(
    model_id="smollm2-moe",
    model=ROOT / "build" / "smollm2-moe",  # `examples.smollm2_moe.assemble` writes it
    calibration=ROOT / "examples" / "smollm2_moe" / "calibration.parquet",
    held_out=ROOT / "examples" / "smollm2_moe" / "heldout.parquet",
    artifact=ROOT / "build" / "smollm2-moe-sere",
    app=ROOT / "serve_apps" / "smollm2_moe.yaml",
    method="projection",
    samples=32,  # a layer takes 5 to 10 s on two cores
)
TINY_GROUPED = Example("tiny-grouped", tiny_moe.GROUPED, tiny_moe.CALIBRATION, tiny_moe.HELDOUT)
SERVED = {example.model_id: example for example in (TINY_MOE, SMOLLM2_MOE)}
EXAMPLES: dict[str, Example] = {**SERVED, TINY_GROUPED.model_id: TINY_GROUPED}


def calibrate(
    cluster: LocalCluster, example: ServedExample = TINY_MOE, artifact: Path | None = None, cpus_per_task: int = 4
) -> None:
    """Submits the calibration as a Ray job and shows its log until it ends. `artifact` is the example's by default.

    At 4 CPUs per task a cluster of 8 has two workers: more would start one after the other on a small machine.
    """
    console.rule("calibrate: ray job submit")
    command = [
        *("ray", "job", "submit", "--log-style=record", "--log-color=false", "--runtime-env"),
        *("calibration_jobs/runtime_env.yaml", "--", "python", "-m", "calibration_jobs.calibrate"),
        *("--model", str(example.model), "--dataset", str(example.calibration)),
        *("--num-samples", str(example.samples), "--method", example.method),
        *("--output", str(artifact or example.artifact), "--overwrite"),
        *("--cpus-per-task", str(cpus_per_task)),
    ]
    if cluster.run(command, cwd=ROOT).returncode:
        raise SystemExit("error: the calibration job failed; its log is above")


@contextmanager
def served(
    cluster: LocalCluster,
    port: int,
    example: ServedExample = TINY_MOE,
    artifact: Path | None = None,
    key: str = "none",
    proxy_location: str = "EveryNode",
    **arguments: Any,
) -> Generator[str]:
    """Runs `serve run` on the example's application at this port; yields the base URL once the model answers.

    `artifact` is the example's by default. `arguments` are the application's, instead of the file's or beside them;
    `key` is what it asks its clients for, and `proxy_location` says which nodes of the cluster listen.
    """
    console.rule("serve: serve run")
    app = yaml.safe_load(example.app.read_text())
    app["http_options"]["port"] = port
    app["proxy_location"] = proxy_location
    app["applications"][0]["args"]["rerouting"]["artifact"] = str(artifact or example.artifact)
    app["applications"][0]["args"] |= arguments
    app_file, log = cluster.folder / "app.yaml", cluster.folder / "serve.log"
    app_file.write_text(yaml.safe_dump(app))
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("w") as file:
        server = subprocess.Popen(
            ["serve", "run", str(app_file)],
            env=cluster.environment,
            cwd=ROOT,
            stdout=file,
            stderr=file,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored here
        )
    try:
        with console.status(f"waiting for {url} (log: {log})"):
            wait_until_ready(server, url, log, example.model_id, key)
        console.print(f"{example.model_id} answers at {url}")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path, model_id: str, key: str) -> None:
    """Returns once a completion is answered: the ingress lists the model before its engine is up."""
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=10)
    deadline, last = time.monotonic() + READY_SECONDS, "nothing was asked"
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.completions.create(model=model_id, prompt="In the beginning", max_tokens=1)
            return
        except openai.APIError as error:
            last = f"{type(error).__name__}: {error}"
            time.sleep(0.5)
    tail = "\n".join(log.read_text().splitlines()[-40:])
    raise SystemExit(f"error: the application was not ready within {READY_SECONDS} s, at last {last}\n{tail}")
