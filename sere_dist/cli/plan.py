"""Which split of so many GPUs serves a model best: what `sere-dist plan-serving` says of `sere_dist.serving`."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import Outcome
from sere_dist.cli.forecast import of_batch
from sere_dist.serving import (
    MEMORY_SHARE,
    MOST_COPIES,
    OFF,
    OTHER_MEMORY,
    RECOMMENDED,
    Demand,
    DrawnRouting,
    Memory,
    ServedModel,
    Site,
    Split,
    Work,
    exchanged,
    splits,
    timed,
    work,
)

Objective = Literal["throughput", "latency"]
BATCHES = tuple(2**power for power in range(11))  # vLLM's own max_num_seqs is 1,024 on large GPUs
LINKS = {  # by GPU, where no --network says otherwise
    "a100": "a100-200g",
    "h100": "h100-400g",
    "h200": "h100-400g",
    "b200": "b200-400g",
    "l40s": "l40s-pcie",
}


@dataclass(frozen=True)
class Goal:
    """What makes a plan good.

    Attributes:
        objective: most tokens per second, or the least time per token.
        token_ms: most milliseconds that an output token may take. None: no limit.
        requests: that decode at once in the whole deployment. None: as many as serve the objective.
    """

    objective: Objective
    token_ms: float | None = None
    requests: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError: the fastest token would be that of a single request."""
        if self.objective == "latency" and self.requests is None:
            raise ValueError("--objective latency needs --requests: one request alone is always the fastest")

    def score(self, tokens_per_second: float, seconds: float) -> float:
        """Returns what is to be as large as possible. `seconds`: per output token."""
        return tokens_per_second if self.objective == "throughput" else -seconds

    def __str__(self) -> str:
        words = {"throughput": "most tokens per second", "latency": "least time per output token"}[self.objective]
        if self.token_ms is not None:
            words += f" at no more than {self.token_ms:g} ms per output token"
        return words + (f", with {self.requests} requests at once" if self.requests else "")


@dataclass(frozen=True)
class Prediction:
    """A split with one batch under one setting. `least` and `most` are one standard deviation of one number off.

    Attributes:
        batch: rows of each engine.
        seconds: per output token of a row.
        active, largest_rank: experts per layer and step, of the group and of the rank that has most.
        exchanged: bytes of dispatch and combine, per token.
        faster: than the same batch without re-routing.
    """

    setting: str
    batch: int
    seconds: float
    seconds_least: float
    seconds_most: float
    tokens_per_second: float
    active: float
    largest_rank: float
    exchanged: float
    faster: float
    faster_least: float
    faster_most: float
    is_host_bound: bool


@dataclass(frozen=True)
class Plan:
    split: Split
    memory: Memory
    by_setting: dict[str, Prediction]

    def best(self, goal: Goal) -> Prediction:
        """Returns the prediction to start with: off, or what a tuning recommends if that reaches more.

        Other settings do not count: nobody knows yet what they cost in quality.
        """
        known = [self.by_setting[name] for name in (OFF, RECOMMENDED) if name in self.by_setting]
        return max(known, key=lambda each: goal.score(each.tokens_per_second, each.seconds))

    def numbers(self) -> dict[str, Any]:
        """Returns what is printed as JSON."""
        return {
            "tensor_parallel_size": self.split.tensor_parallel,
            "data_parallel_size": self.split.data_parallel,
            "expert_parallel": self.split.expert_parallel,
            "all2all_backend": self.split.backend,
            "groups": self.split.replicas,
            "weights_gb": round(self.memory.weights / 1e9, 2),
            "cache_gb": round(self.memory.cache / 1e9, 2),
            "cache_tokens": self.memory.tokens,
            "settings": [
                {
                    "setting": each.setting,
                    "batch": each.batch,
                    "ms_per_token": round(1e3 * each.seconds, 3),
                    "ms_per_token_range": [round(1e3 * each.seconds_least, 3), round(1e3 * each.seconds_most, 3)],
                    "tokens_per_second": round(each.tokens_per_second),
                    "active_experts": round(each.active, 2),
                    "active_experts_of_largest_rank": round(each.largest_rank, 2),
                    "exchanged_kb_per_token": round(each.exchanged / 1e3, 1),
                    "times_faster": round(each.faster, 3),
                    "times_faster_range": [round(each.faster_least, 3), round(each.faster_most, 3)],
                    "host_bound": each.is_host_bound,
                }
                for each in self.by_setting.values()
            ],
        }


def plans(
    model: ServedModel,
    site: Site,
    gpus: int,
    nodes: int,
    routing: DrawnRouting,
    demand: Demand,
    goal: Goal,
    progress: Callable[[Iterable[Split]], Iterable[Split]] = iter,
) -> tuple[list[Plan], list[str]]:
    """Returns the plans that fit and meet the goal, the best first, and why others are left out.

    Plans are ordered by what the model as it is reaches, or by what a tuning recommends if that is better.

    Raises:
        ValueError: the GPUs are not shared evenly by the nodes, or nothing is known of a GPU's memory.
    """
    if (capacity := site.device.memory) is None:
        raise ValueError(f"nothing is known of the memory of {site.device.name}")
    site = site._replace(network=replace(site.network, ranks_per_node=min(site.network.ranks_per_node, gpus // nodes)))
    possible, why = splits(gpus, nodes, model.architecture)
    found = []
    for split in progress(possible):
        memory = model.memory(split, capacity)
        if memory.cache <= 0:
            why.append(f"{split}: weights take {memory.weights / 1e9:.0f} GB of each GPU.")
            continue
        rows = batches(split, memory, demand, goal)
        if not rows:
            why.append(
                f"{split}: {memory.cache / 1e9:.1f} GB of cache are {memory.tokens} tokens, too few for its requests."
            )
            continue
        by_setting = best_by_setting(model, split, site, routing, demand, goal, rows)
        if OFF not in by_setting and RECOMMENDED not in by_setting:
            why.append(f"{split}: no batch keeps {goal.token_ms:g} ms per output token.")
            continue
        found.append(Plan(split, memory, by_setting))

    def score(plan: Plan) -> float:
        best = plan.best(goal)
        return goal.score(best.tokens_per_second, best.seconds)

    return sorted(found, key=score, reverse=True), list(dict.fromkeys(why))


def batches(split: Split, memory: Memory, demand: Demand, goal: Goal) -> list[int]:
    """Returns the batches of an engine to look at: those that the KV cache has room for when answers are whole."""
    fitting = memory.tokens // (demand.prompt + demand.answer)
    if goal.requests is not None:
        batch = math.ceil(goal.requests / split.engines)
        return [batch] if batch <= fitting else []
    return [batch for batch in BATCHES if batch <= fitting and batch * split.data_parallel**2 <= MOST_COPIES]


def best_by_setting(
    model: ServedModel,
    split: Split,
    site: Site,
    routing: DrawnRouting,
    demand: Demand,
    goal: Goal,
    rows: list[int],
) -> dict[str, Prediction]:
    """Returns the best batch under each setting, of those that keep the goal's limit. A setting may have none."""
    baselines = {batch: work(model, split, routing, batch, OFF, site) for batch in rows}
    found = {}
    for setting in routing.rerouters:
        kept = []
        for batch in rows:
            ours = baselines[batch] if setting == OFF else work(model, split, routing, batch, setting, site)
            step = timed(model, split, ours, site, demand)
            if goal.token_ms is not None and 1e3 * step.seconds > goal.token_ms:
                break  # larger batches take longer
            kept.append((goal.score(split.engines * batch / step.seconds, step.seconds), batch, ours))
        if kept:
            _, batch, ours = max(kept, key=lambda each: each[0])
            found[setting] = predict(model, split, site, demand, setting, baselines[batch], ours)
    return found


def predict(
    model: ServedModel, split: Split, site: Site, demand: Demand, setting: str, off: Work, ours: Work
) -> Prediction:
    """Returns what a split does under a setting, whose work is `ours`, and the same batch's without it `off`."""

    def seconds(of: Work, at: Site) -> float:
        return timed(model, split, of, at, demand).seconds

    here, shaken = timed(model, split, ours, site, demand), site.shaken()
    every = [seconds(ours, other) for other in shaken]
    ratios = [seconds(off, other) / after for other, after in zip(shaken, every, strict=True)]
    return Prediction(
        setting,
        ours.rows,
        here.seconds,
        min(every),
        max(every),
        tokens_per_second=split.engines * ours.rows / here.seconds,
        active=here.step.active,
        largest_rank=here.step.largest_rank,
        exchanged=exchanged(model, split, ours),
        faster=seconds(off, site) / here.seconds,
        faster_least=min(ratios),
        faster_most=max(ratios),
        is_host_bound=here.is_host_bound,
    )


HEADINGS = ("split", "batch", "setting", "ms/token", "tokens/s", "faster", "experts", "kB/token")
LEGEND = """\
split: groups x sizes, dispatch, and weights + room for the cache in each GPU. batch: rows of each engine.
ms/token: per output token of a row, with the prompts that are computed in between. faster: than off at the same batch.
experts: that run per layer and step / on the largest rank. kB/token: of dispatch and combine.
In brackets: what it comes to if one rate or time is off by its uncertainty."""


def as_rows(plan: Plan) -> list[list[str]]:
    """Returns a plan's rows of the table: one per setting."""
    about = str(plan.split).split(", ")
    about.append(f"{plan.memory.weights / 1e9:.1f} + {plan.memory.cache / 1e9:.1f} GB")
    rows = []
    for each in plan.by_setting.values():
        faster = f"{each.faster:.2f} ({each.faster_least:.2f}-{each.faster_most:.2f})"
        rows.append(
            [
                about.pop(0) if about else "",
                str(each.batch),
                each.setting,
                f"{1e3 * each.seconds:.1f} ({1e3 * each.seconds_least:.1f}-{1e3 * each.seconds_most:.1f})",
                f"{each.tokens_per_second:,.0f}",
                "" if each.setting == OFF else faster,
                f"{each.active:.0f}" + (f" / {each.largest_rank:.1f}" if plan.split.expert_parallel else ""),
                f"{each.exchanged / 1e3:,.0f}" if plan.split.data_parallel > 1 else "-",
            ]
        )
    return rows + [[line] for line in about]


def evidence(model: ServedModel, site: Site, artifact: Artifact | None) -> list[str]:
    """Returns what the predictions rest on, a sentence or two each."""
    device, network = site.device, site.network
    if artifact is None:
        popular = (
            "Routing is drawn from a router fitted to this project's example model, and substitutes are drawn at "
            "random: without an artifact nothing is known of either, and S and prices are left to tune."
        )
    else:
        policy = "projection" if artifact.is_projection else "sere"
        popular = (
            "Experts are as popular as the artifact's calibration saw them; which ones tokens use together is drawn. "
            f"Substitutes follow its tables, by policy {policy}."
        )
    return [
        f"{device.name}: {device.source}. No GPU time of these plans was measured.",
        f"Links ({network.name}): {network.source}; 60% of them inside a node and 80% between nodes. They "
        f"and {1e6 * network.latency:.0f} us per exchange were chosen on DeepEP's low-latency kernels: -15% to +6% of "
        "their 12 published times (docs/scale.md). All-gathers, deepep_v2 and all-reduces are taken to reach the same.",
        f"Expert parallelism is simulated (sere_dist.simulation): the largest rank decides at each of {model.layers} "
        "layers, -16% to +12% of 6 published times. Nothing is hidden behind computing. Each rank has a primary set of "
        "its own.",
        popular,
        f"Ranges: one of the rates or times is off by a factor of {math.exp(device.uncertainty):.2f}.",
        f"Memory: {MEMORY_SHARE:.0%} of a GPU, less {OTHER_MEMORY / 1e9:.0f} GB for activations and CUDA graphs, which "
        "is assumed. A batch must fit with whole answers.",
        "Not known: what a setting costs in quality on your texts (python -m calibration_jobs.tune), whether an expert "
        "kernel takes the slices of an expert or a dispatcher runs on these GPUs (docs/expert_kernels.md), queues, "
        "prefix caches, speculation, and how uneven your requests are.",
    ]


def quality(artifact: Artifact | None, batch: int) -> str:
    """Returns what is known of the quality of the recommended setting at a batch."""
    if artifact is None or (tuned := artifact.recommended) is None:
        command = f"python -m calibration_jobs.tune --batch {batch} --max-kl 0.02"
        return f"Re-routing is left to tune, at the batch of the plan: calibrate, then {command}."
    measured = of_batch(tuned.recommended, batch)
    if measured is not None:
        return f"The recommended setting was measured at batch {batch}: {cost(measured)}."
    return (
        f"The recommended setting was tuned for batch {tuned.batch} ({cost(tuned.at(tuned.recommended))}), and nothing "
        f"was measured at {batch}: tune again with --batch {batch}."
    )


def cost(outcome: Outcome) -> str:
    return f"KL divergence {outcome.kl:.4f} +- {outcome.kl_error:.4f} nats per token"


def application(plan: Plan, goal: Goal, name: str, gpu: str, artifact: str | None) -> dict[str, Any]:
    """Returns the `args` of a Serve application that serves the plan (`serve_apps.sere`)."""
    split, best = plan.split, plan.best(goal)
    arguments: dict[str, Any] = {"model": name}
    if best.setting == RECOMMENDED:
        arguments["rerouting"] = rerouting(artifact)
    arguments["accelerator_type"] = gpu.upper()  # Ray's names of NVIDIA's GPUs
    arguments |= {"tensor_parallel_size": split.tensor_parallel, "data_parallel_size": split.data_parallel}
    arguments |= {"expert_parallel": split.expert_parallel, "num_replicas": split.replicas}
    backend = {"all2all_backend": split.backend} if split.backend else {}
    return arguments | {"engine": backend | {"max_num_seqs": best.batch}}


def rerouting(artifact: str | None) -> dict[str, Any]:
    return {"artifact": artifact or "ARTIFACT", "policy": "recommended", "min_rows": 2}


def serve_yaml(arguments: dict[str, Any], artifact: str | None) -> str:
    """Returns these arguments as lines of a Serve file, with re-routing as a comment where they have none."""
    lines = yaml.safe_dump({"args": arguments}, sort_keys=False)
    if "rerouting" not in arguments:
        lines += f"  # once tuned: rerouting: {json.dumps(rerouting(artifact))}\n"
    return lines


def engine_arguments(arguments: dict[str, Any]) -> list[str]:
    """Returns the same as arguments of one `vllm serve`, of which there are `num_replicas`."""
    flags = ["--tensor-parallel-size", str(arguments["tensor_parallel_size"])]
    flags += ["--data-parallel-size", str(arguments["data_parallel_size"])]
    flags += ["--enable-expert-parallel"] * arguments["expert_parallel"]
    for name, value in arguments["engine"].items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    if "rerouting" in arguments:
        flags += ["--additional-config", json.dumps({"sere": arguments["rerouting"]})]
    return flags
