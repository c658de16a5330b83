"""Calibrate a small language model and serve it, re-routed, on this machine: `make demo` and `make serve` run this.

    python -m examples.demo                 # calibrate, serve, ask, measure, stop
    python -m examples.demo --keep-serving  # calibrate, serve, stay up until Ctrl-C

The model is SmolLM2-135M-Instruct as a Mixture-of-Experts model of 64 experts per layer (`examples/smollm2_moe`). The
demo puts it together, starts a Ray cluster of its own, submits the calibration with `ray job submit`, serves the model
with `serve run`, asks it with the official `openai` client, re-routing off and on, and stops all that it started.
"""

import asyncio
import os
import random
import signal
import sys
from typing import Annotated, Any

import openai
import typer
from openai.types.chat import ChatCompletionUserMessageParam
from rich.markup import escape

from examples.application import ROOT, SMOLLM2_MOE, calibrate, console, served
from examples.smollm2_moe.assemble import assemble_committed
from examples.smollm2_moe.questions import held_out
from sere_dist.admin import change_settings
from sere_dist.environment import ADMIN_TOKEN
from sere_dist.testing.local_cluster import LocalCluster, port_is_free

QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.", "How do I boil an egg?")
CROWD = 13  # other requests beside these: re-routing is for batches
SAMPLING: dict[str, Any] = {"max_tokens": 80, "temperature": 0}


async def answers(url: str) -> list[str]:
    """Returns the answers to our questions, which decode beside others as they would on a busy server."""
    others = [question for _, question in random.Random(0).sample(held_out(), CROWD)]

    async def answer(client: openai.AsyncOpenAI, question: str) -> str:
        message: ChatCompletionUserMessageParam = {"role": "user", "content": question}
        done = await client.chat.completions.create(model=SMOLLM2_MOE.model_id, messages=[message], **SAMPLING)
        return done.choices[0].message.content or ""

    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        return await asyncio.gather(*(answer(client, question) for question in (*QUESTIONS, *others)))


def ask(url: str) -> None:
    console.rule("ask: openai client")
    found = {}
    for enabled in (False, True):
        change_settings(url, {"enabled": enabled})
        found[enabled] = asyncio.run(answers(url))
    for question, off, on in zip(QUESTIONS, found[False], found[True], strict=False):
        console.print(f"[bold]{question}[/]", highlight=False)
        console.print(f"[dim]off:[/] {escape(off)}\n[dim]on:[/]  {escape(on)}\n", highlight=False)


def main(
    port: Annotated[int, typer.Option(help="HTTP port of the endpoint.")] = 8000,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Stay up until Ctrl-C.")] = False,
) -> None:
    if not port_is_free(port):
        raise SystemExit(f"error: port {port} is in use; give another one: make demo PORT={port + 1}")
    for stop in (signal.SIGINT, signal.SIGTERM):  # SIGINT is ignored in what a script starts in the background
        signal.signal(stop, signal.default_int_handler)
    with console.status("putting the model together"):
        assemble_committed(SMOLLM2_MOE.model)
    cluster = LocalCluster()
    with console.status("starting Ray"):
        cluster.__enter__()
    os.environ[ADMIN_TOKEN] = cluster.environment[ADMIN_TOKEN]  # it opens the settings of what is served
    try:
        calibrate(cluster, SMOLLM2_MOE)
        with served(cluster, port, SMOLLM2_MOE) as url:
            if keep_serving:
                # Browsers do not send what is behind the #.
                page = url.removesuffix("/v1") + f"/#token={cluster.environment[ADMIN_TOKEN]}"
                console.print(f"look: {page}", soft_wrap=True, highlight=False)
                console.print(f"try:  curl {url}/chat/completions -H 'Content-Type: application/json' \\")
                console.print(
                    f'        -d \'{{"model": "{SMOLLM2_MOE.model_id}", "max_tokens": 80, '
                    f'"messages": [{{"role": "user", "content": "{QUESTIONS[0]}"}}]}}\'',
                    soft_wrap=True,
                )
                console.print("Ctrl-C stops it.")
                signal.pause()
            ask(url)
            console.rule("measure: re-routing off and on")
            if cluster.run([sys.executable, "-m", "examples.measure", url, "--new-tokens", "64"], cwd=ROOT).returncode:
                raise SystemExit("error: the measurement failed; its output is above")
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        with console.status("stopping what was started"):
            cluster.__exit__()
    artifact = SMOLLM2_MOE.artifact.relative_to(ROOT)
    console.print(f"left behind: {len(cluster.processes())} processes; the artifact is {artifact}")


if __name__ == "__main__":
    typer.run(main)
