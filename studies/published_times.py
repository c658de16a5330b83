"""The simulator of `sere_dist.simulation` beside published figures, and beside this project's engines on a CPU."""

import json
import statistics as numbers
from dataclasses import replace
from typing import Any

import torch

from examples.tiny_moe.data import MODEL
from sere_dist.evaluation.lockstep import Routed, active_by_step
from sere_dist.evaluation.traffic import traffic
from sere_dist.forecast import DEVICES, Device, ModelCost, decode_step
from sere_dist.moe import MoeShape, load_model
from sere_dist.provenance import rounded
from sere_dist.simulation import NETWORKS, Loads, exchange_seconds
from studies.common import ENGINES, RESULTS
from studies.large_models import FP4, FP8, HARDWARE, MODELS, Model, group_of, linear

# Milliseconds of a DeepSeek MoE layer in NVFP4 on one Blackwell GPU with 32 of 256 experts, by tokens: routing, experts
# and the sum, without an exchange. flashinfer-ai/flashinfer, pull request 5301; the workload is that of 4985.
FLASHINFER = {1: 0.026, 8: 0.065, 16: 0.075, 32: 0.106, 64: 0.140, 1024: 0.163}
# Microseconds of DeepEP's low-latency kernels, 128 tokens a rank, by ranks: dispatch, combine. deepseek-ai/DeepEP,
# docs/legacy.md: H800, ConnectX-7 400 Gb/s, hidden size 7168, top-8, FP8 out and bfloat16 back.
DEEPEP = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
# Tokens per second of a node of 8 H100: DeepSeek-V3, 72 ranks, 256 rows on each, prompts of 2,000 tokens. LMSYS,
# "Deploying DeepSeek with PD Disaggregation and Large-scale Expert Parallelism on 96 H100 GPUs", 5 May 2025.
LMSYS = {"ranks": 72, "rows_per_rank": 256, "context": 2000, "tokens_per_second": 22_300, "experts_per_rank": 4}


def compared(what: str, simulated: float, published: float, unit: str, source: str) -> dict[str, Any]:
    error = rounded(simulated / published - 1, 3)
    return {"what": what, "simulated": rounded(simulated), "measured": published, "unit": unit, "error": error} | {
        "source": source
    }


def beside_measured(routing: dict[int, Routed]) -> list[dict[str, Any]]:
    """Returns the simulator's numbers beside measured ones."""
    found = []
    model, device = MODELS["DeepSeek-V3"], DEVICES["b200"]
    for tokens, published in FLASHINFER.items():
        active = 32 * (1 - (1 - model.top_k / model.experts) ** tokens)
        read, operations = active * model.expert * FP4, tokens * 2 * model.expert * model.top_k / 8
        ms = 1e3 * (device.seconds(read, operations) + device.layer_seconds)
        what = f"MoE layer of one rank of 8, {tokens} tokens"
        found.append(compared(what, ms, published, "ms", "flashinfer#5301"))
    for ranks, published in DEEPEP.items():
        size = NETWORKS["h800-400g"].ranks_per_node
        inside, between = (
            128 * model.top_k * torch.tensor([[share]], dtype=torch.float64)
            for share in ((size - 1) / ranks, (ranks - size) / ranks)
        )
        of = Loads(inside, inside, inside, between)
        group = replace(
            group_of(HARDWARE["H200, 8 to a node"], model, ranks, "per_slot"), network=NETWORKS["h800-400g"]
        )
        for kind, copy, us in zip(("dispatch", "combine"), (FP8, 2.0), published, strict=True):
            simulated = 1e6 * float(exchange_seconds(of, group, model.sent * copy))
            found.append(compared(f"{kind}, {ranks} ranks", simulated, us, "us", "DeepEP, docs/legacy.md"))
    found.append(compared(*deployment(model), "ms", "LMSYS, 5 May 2025"))
    return [*found, *(row for results in ENGINES for row in of_engines(routing, results))]


def deployment(model: Model) -> tuple[str, float, float]:
    """Returns the step of LMSYS's deployment: uniform routing, all experts active, each rank with its replicas'."""
    ranks, rows = LMSYS["ranks"], LMSYS["rows_per_rank"]
    device: Device = replace(DEVICES["h100"], speed=2 * DEVICES["h100"].speed)  # FP8
    cost, slots = model.cost(FP8), rows * model.top_k
    own = decode_step(cost, device, rows, LMSYS["experts_per_rank"], LMSYS["context"])
    copies = [torch.tensor([[slots * share]], dtype=torch.float64) for share in (7 / ranks, (ranks - 8) / ranks)]
    group = group_of(HARDWARE["H200, 8 to a node"], model, ranks, "per_slot")
    of = Loads(copies[0], copies[0], *copies)
    exchanges = sum(float(exchange_seconds(of, group, model.sent * size)) for size in (FP8, 2.0))
    published = 1e3 * rows * 8 / LMSYS["tokens_per_second"]
    return "decode step, 72 ranks of 256 rows", 1e3 * (own.seconds + model.moe_layers * exchanges), rounded(published)


def of_engines(routing: dict[int, Routed], results: str) -> list[dict[str, Any]]:
    """Returns counts and times of engines on a CPU (`studies.data_parallel`), off, beside replayed ones."""
    measured = json.loads((RESULTS / results).read_text())
    off = next(row for row in measured["rows"] if row["turn"] == "off" and row["primary_scope"] == "group")
    batch, ranks = measured["batch"], measured["ranks"]
    ids = {layer: torch.cat(kinds[1].split(batch, dim=1)) for layer, kinds in routing.items()}
    of, rows = traffic(ids, linear(list(ids), 64, ranks)), batch // ranks
    cost, device = ModelCost.of(load_model(str(MODEL), "cpu"), 2.0), DEVICES["2-cpu-cores"]
    of_homes = [active_by_step(kinds[:, home::ranks], 64) for kinds in ids.values() for home in range(ranks)]
    visited, slots, active, largest = (
        numbers.fmean(each) for each in (of.remote_domains, of.remote_slots, of.active_experts, of.largest_rank)
    )
    share = replace(device, bandwidth=device.bandwidth / ranks, speed=device.speed / ranks)
    found = {
        "remote_domains": ("remote_domains", visited, "per token"),
        "remote_slots": ("remote_slots", slots, "per token"),
        "bytes_per_token_and_layer": ("bytes", bytes_of_token(visited, ranks, rows, cost.shape), "per token and layer"),
        "active_experts_of_a_ranks_tokens": (
            "active experts of a rank's tokens",
            numbers.fmean(float(each.sum(dim=1).double().mean()) for each in of_homes),
            "per layer",
        ),
        "active_experts_on_a_rank": ("active experts on a rank", active / ranks, "per layer"),
        "active_experts_on_the_largest_rank": ("active experts on the largest rank", largest, "per layer"),
        "ms_per_step": ("decode step", 1e3 * decode_step(cost, share, rows, largest, 100).seconds, "ms"),
    }
    off["ms_per_step"] = off["ms_per_step"]["median"]
    return [
        compared(f"{what}, {ranks} engines", simulated, off[name], unit, f"studies/results/{results}")
        for name, (what, simulated, unit) in found.items()
        if name in off  # two engines were measured before the experts on a rank were counted
    ]


def bytes_of_token(remote_domains: float, ranks: int, rows: int, shape: MoeShape) -> float:
    """Returns the bytes that ranks send for a token in a layer under `cpu_dispatch: all_to_all`.

    A token goes in bfloat16 to each remote rank, with its weights and ids of 4 bytes, and its output comes back. Before
    that, a rank of so many rows tells each other one by 8 bytes how many tokens it sends.
    """
    visit = 2 * 2 * shape.hidden_size + 2 * 4 * shape.num_experts_per_token
    return remote_domains * visit + 8 * (ranks - 1) / rows
