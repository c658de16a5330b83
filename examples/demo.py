"""Calibrate the example model and serve it, re-routed, on this machine: `make demo` and `make serve` run this.

    python -m examples.demo                 # calibrate, serve, ask, measure, stop
    python -m examples.demo --keep-serving  # calibrate, serve, stay up until Ctrl-C

Starts a Ray cluster of its own, submits the calibration of the example model with `ray job submit`, serves the model
with `serve run`, talks to it with the official `openai` client, and stops everything that it started. What it serves is
the example model widened: the same outputs, from experts that take time to read, as a large model's do.
"""

import shutil
import signal
import sys
from typing import Annotated, Any

import openai
import typer
from openai.types.chat import ChatCompletionUserMessageParam

from examples.application import ROOT, TINY_MOE, calibrate, console, served
from examples.tiny_moe.widen import widen
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import LocalCluster, port_is_free

WIDE, WIDTH = ROOT / "build" / "tiny-moe-wide", 1536  # 870 MB; the example model's experts have 32 columns
SAMPLING: dict[str, Any] = {"max_tokens": 48, "temperature": 0.7, "seed": 1}


def ask(url: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none")
    console.rule("ask: openai client")
    for prompt in ("In the beginning", "sea lion (noun):", ".. function:: sorted("):
        answer = client.completions.create(model=TINY_MOE.model_id, prompt=prompt, **SAMPLING)
        console.print(f"[bold]{prompt}[/]{answer.choices[0].text}\n", highlight=False)
    question: ChatCompletionUserMessageParam = {"role": "user", "content": "And the king answered and said unto"}
    chat = client.chat.completions.create(model=TINY_MOE.model_id, messages=[question], **SAMPLING)
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
        with served(cluster, port, model=str(widen(TINY_MOE.model, WIDE, WIDTH))) as url:
            if keep_serving:
                # Browsers do not send what is behind the #.
                page = url.removesuffix("/v1") + f"/#token={cluster.environment[ADMIN_TOKEN]}"
                console.print(f"look: {page}", soft_wrap=True, highlight=False)
                # A command that is wrapped can't be copied.
                console.print(f"try:  curl {url}/completions -H 'Content-Type: application/json' \\", soft_wrap=True)
                body = f'{{"model": "{TINY_MOE.model_id}", "prompt": "In the beginning", "max_tokens": 40}}'
                console.print(f"        -d '{body}'", soft_wrap=True)
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
    console.print(
        f"left behind: {len(cluster.processes())} processes; the artifact is {TINY_MOE.artifact.relative_to(ROOT)}"
    )


if __name__ == "__main__":
    typer.run(main)
