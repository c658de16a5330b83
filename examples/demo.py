"""Calibrate the example model and serve it, re-routed, on this machine: `make demo` and `make serve` run this.

    python -m examples.demo                 # calibrate, serve, ask, measure, stop
    python -m examples.demo --keep-serving  # calibrate, serve, stay up until Ctrl-C

Starts a Ray cluster of its own, submits the calibration of the example model with `ray job submit`, serves the model
with `serve run`, talks to it with the official `openai` client, and stops everything that it started. What it serves is
the example model widened: the same outputs, from experts that take time to read, as a large model's do.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
import yaml
from openai.types.chat import ChatCompletionUserMessageParam
from rich.console import Console

from examples.tiny_moe.data import MODEL
from examples.tiny_moe.widen import widen
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import LocalCluster, port_is_free

ROOT = Path(__file__).resolve().parents[1]
ARTIFACT = ROOT / "build" / "tiny-moe-sere"
WIDE, WIDTH = ROOT / "build" / "tiny-moe-wide", 1536  # 870 MB; the example model's experts have 32 columns
APP = ROOT / "serve_apps" / "tiny_moe.yaml"
MODEL_ID = "tiny-moe"

READY_SECONDS = 900  # two engines that start together on two busy cores took 150; a throttled machine takes longer
SAMPLING: dict[str, Any] = {"max_tokens": 48, "temperature": 0.7, "seed": 1}

console = Console()


def calibrate(cluster: LocalCluster, artifact: Path = ARTIFACT) -> None:
    """Submits the calibration as a Ray job and shows its log until it ends."""
    console.rule("calibrate: ray job submit")
    command = [
        *("ray", "job", "submit", "--log-style=record", "--log-color=false", "--runtime-env"),
        *("calibration_jobs/runtime_env.yaml", "--", "python", "-m", "calibration_jobs.calibrate"),
        *("--model", str(MODEL), "--dataset", "examples/tiny_moe/calibration.parquet"),
        *("--num-samples", "64", "--output", str(artifact), "--overwrite"),
        *("--cpus-per-task", "4"),  # two workers: more would start one after the other on a small machine
    ]
    if cluster.run(command, cwd=ROOT).returncode:
        raise SystemExit("error: the calibration job failed; its log is above")


@contextmanager
def served(
    cluster: LocalCluster,
    port: int,
    artifact: Path = ARTIFACT,
    key: str = "none",
    proxy_location: str = "EveryNode",
    **arguments: Any,
) -> Generator[str]:
    """Runs `serve run` on the example's application at this port; yields the base URL once the model answers.

    `arguments` are the application's, instead of the file's or beside them; `key` is what it asks its clients for, and
    `proxy_location` says which nodes of the cluster listen.
    """
    console.rule("serve: serve run")
    app = yaml.safe_load(APP.read_text())
    app["http_options"]["port"] = port
    app["proxy_location"] = proxy_location
    app["applications"][0]["args"]["rerouting"]["artifact"] = str(artifact)
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
            wait_until_ready(server, url, log, key)
        console.print(f"{MODEL_ID} answers at {url}")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_until_ready(server: subprocess.Popen, url: str, log: Path, key: str) -> None:
    """Returns once a completion is answered: the ingress lists the model before its engine is up."""
    client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=10)
    deadline, last = time.monotonic() + READY_SECONDS, "nothing was asked"
    while time.monotonic() < deadline and server.poll() is None:
        try:
            client.completions.create(model=MODEL_ID, prompt="In the beginning", max_tokens=1)
            return
        except openai.APIError as error:
            last = f"{type(error).__name__}: {error}"
            time.sleep(0.5)
    tail = "\n".join(log.read_text().splitlines()[-40:])
    raise SystemExit(f"error: the application was not ready within {READY_SECONDS} s, at last {last}\n{tail}")


def ask(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none")
    console.rule("ask: openai client")
    for prompt in ("In the beginning", "sea lion (noun):", ".. function:: sorted("):
        answer = client.completions.create(model=MODEL_ID, prompt=prompt, **SAMPLING)
        console.print(f"[bold]{prompt}[/]{answer.choices[0].text}\n", highlight=False)
    question: ChatCompletionUserMessageParam = {"role": "user", "content": "And the king answered and said unto"}
    chat = client.chat.completions.create(model=MODEL_ID, messages=[question], **SAMPLING)
    console.print(f"[bold]chat: {question['content']}[/] {chat.choices[0].message.content}\n", highlight=False)


def main(
    port: Annotated[int, typer.Option(help="HTTP port of the endpoint.")] = 8000,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Stay up until Ctrl-C.")] = False,
) -> None:
    if not port_is_free(port):
        raise SystemExit(f"error: port {port} is in use; give another one: make demo PORT={port + 1}")
    for stop in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in what a script starts in the background
        signal.signal(stop, signal.default_int_handler)
    cluster = LocalCluster()
    with console.status("starting Ray"):
        cluster.__enter__()
    try:
        calibrate(cluster)
        with served(cluster, port, model=str(widen(MODEL, WIDE, WIDTH))) as url:
            if keep_serving:
                # Browsers do not send what is behind the #.
                page = url.removesuffix("/v1") + f"/#token={cluster.environment[ADMIN_TOKEN]}"
                console.print(f"look: {page}", soft_wrap=True, highlight=False)
                console.print(f"try:  curl {url}/completions -H 'Content-Type: application/json' \\")
                console.print(
                    f'        -d \'{{"model": "{MODEL_ID}", "prompt": "In the beginning", "max_tokens": 40}}\''
                )
                console.print("Ctrl-C stops it.")
                signal.pause()
            ask(url)
            console.rule("measure: re-routing off and on")
            if cluster.run([sys.executable, "-m", "examples.measure", url], cwd=ROOT).returncode:
                raise SystemExit("error: the measurement failed; its output is above")
            console.print(
                "The example model's experts were widened with zero columns: the same answers, from experts that take "
                "time to read, as a large model's do."
            )
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        with console.status("stopping what was started"):
            cluster.__exit__()
            shutil.rmtree(WIDE, ignore_errors=True)
    console.print(f"left behind: {len(cluster.processes())} processes; the artifact is {ARTIFACT.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
