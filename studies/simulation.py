"""What re-routing saves in the decode step of a group of ranks, by simulation, and how far the simulation is off.

    python -m studies.simulation           # 6 minutes on a core; calibrates into build/studies if nothing is there
    python -m studies.simulation --parts synthetic --parts validation   # without decoding: a minute
    python -m studies.simulation --quick   # the same on a handful of texts and shapes: that it runs

Policies, each over its knob: off; the paper's (S); and projection with an `expert_price`, or with a `balance_price`,
each where the heaviest slots of tokens stay (S = 1), and where prices alone decide (S = 0). Prices are quantiles of
what is left without experts, or places, in the first steps. Experts are placed linearly, and the primary set is the
group's.

- validation: the simulator against published figures, and against this project's engines on a CPU.
- real: the example model decodes held-out texts by the protocol of `sere_dist.evaluation.protocol`. KL divergence,
  experts and largest ranks are measured; the time is that of a model of DeepSeek-V3's sizes that had the same routing,
  where one expert of the example stands for four.
- synthetic: routers fitted to the example's (`evaluation.synthetic`), at the shapes of large models. Similarities and
  sizes are drawn from the example's, independently. There is no KL divergence: what stands in for it is the error that
  the tables estimate, in the unit of w² n, by the same formula for all policies.

Prints one JSON line last; writes `studies/results/simulation.json` and `docs/simulation.png`.
"""

import itertools
import json
import math
import statistics as numbers
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.evaluation.figures import BLACK, BLUE, GREEN, GREY, ORANGE, RED
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult, Rerouter, Routed, lockstep, unchanged
from sere_dist.evaluation.protocol import LENGTH, TEXTS, decoded, held_out_texts
from sere_dist.evaluation.rerouters import paper_rerouter
from sere_dist.evaluation.synthetic import Statistics, SyntheticRouter, fit, statistics
from sere_dist.evaluation.traffic import Layout, traffic
from sere_dist.forecast import DEVICES
from sere_dist.method.balance import places
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE
from sere_dist.method.projection import (
    left_without_each_expert,
    primary_losses,
    reroute_projection,
)
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step
from sere_dist.moe import load_model
from sere_dist.provenance import line_by_line, machine, rounded, versions
from sere_dist.standard_errors import with_error
from studies.artifacts import ARTIFACTS, calibrated
from studies.common import RESULTS, ROOT, at_kl
from studies.large_models import (
    HARDWARE,
    MODELS,
    PARTS,
    STAND_IN,
    fits,
    linear,
    times,
)
from studies.published_times import beside_measured

QUANTILES = (0.2, 0.5, 0.8, 0.95, 1.0)
ALL = ("validation", "synthetic", "real")
OFF, PAPER, PRICED, BALANCED = "off", "paper", "expert price, S = 1", "balance price, S = 1"
PRICED_ALL, BALANCED_ALL = "expert price, S = 0", "balance price, S = 0"
OURS = PRICED, BALANCED, PRICED_ALL, BALANCED_ALL
LOOKS = {OFF: GREY, PAPER: RED, PRICED: BLUE, BALANCED: GREEN, PRICED_ALL: ORANGE, BALANCED_ALL: BLACK}


@dataclass(frozen=True)
class Size:
    """How much is simulated. `cells`: batch, ranks."""

    texts: int = TEXTS
    length: int = LENGTH
    cells: tuple[tuple[int, int], ...] = ((64, 32), (64, 16), (32, 32))
    keeps: tuple[int, ...] = (1, 2, 4)
    quantiles: tuple[float, ...] = (0.1, 0.3, 0.7, 1.0)
    synthetic_quantiles: tuple[float, ...] = QUANTILES
    replayed_ranks: tuple[int, ...] = (2, 4, 8, 16)
    models: tuple[str, ...] = ("DeepSeek-V3", "Kimi-K3", "Qwen3-235B-A22B", "Kimi-K2")
    ranks: tuple[int, ...] = (8, 32, 64, 320)
    rows_per_rank: tuple[int, ...] = (1, 8)
    steps: int = 4  # of synthetic routing; as many as have `rows` rows together, where that is fewer
    rows: int = 1024


QUICK = Size(
    texts=8,
    length=40,
    cells=((8, 8),),
    keeps=(1, 2),
    quantiles=(0.25, 0.75),
    synthetic_quantiles=(0.25, 0.75),
    replayed_ranks=(2, 4),
    models=("DeepSeek-V3",),
    ranks=(8, 32),
    rows_per_rank=(1,),
    steps=2,
)


class Setting(NamedTuple):
    policy: str
    knob: float = 0.0  # S of the paper's policy, a price of ours


@dataclass(frozen=True)
class Priced:
    """Projection with a price: one of `OURS`."""

    tables: Mapping[int, LayerTables]
    layout: Layout
    policy: str
    price: float

    def __call__(self, layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: Any = None) -> Routed:
        tables, places = self.tables[layer], ExpertPlaces(self.layout.rank[layer], self.layout.num_ranks)
        settings = priced(self.policy, self.price)

        def step(weights_BK: torch.Tensor, ids_BK: torch.Tensor) -> Routed:
            return reroute_projection(Step(weights_BK, ids_BK), tables, settings, places)

        return torch.vmap(step)(weights_DBK, ids_DBK)


def priced(policy: str, price: float) -> Settings:
    keeps = 0 if policy in (PRICED_ALL, BALANCED_ALL) else 1
    if policy in (BALANCED, BALANCED_ALL):
        return Settings(keeps, balance_price=price)
    return Settings(keeps, expert_price=price)


def price_grid(
    routing: Mapping[int, Routed],
    tables: Mapping[int, LayerTables],
    layout: Layout,
    policy: str,
    quantiles: Sequence[float],
) -> list[float]:
    """Returns prices: quantiles of what is left without experts, or without places after a rank's first, over layers.

    There are none where all of these run in any case.
    """
    found = []
    for layer, (weights_DBK, ids_DBK) in routing.items():
        for weights_BK, ids_BK in zip(weights_DBK[:8], ids_DBK[:8], strict=True):
            keeps = priced(policy, 1.0).select_top_k
            losses_E = primary_losses(Step(weights_BK, ids_BK), tables[layer], Settings(keeps, expert_price=1.0))
            left_E = left_without_each_expert(losses_E, tables[layer])
            if policy in (BALANCED, BALANCED_ALL):
                place_E = places(left_E, layout.rank[layer])
                left_E = torch.zeros_like(left_E).index_add(0, place_E, left_E)[1:]
            found.append(left_E[(left_E > 0) & (left_E < ALWAYS_PRIMARY)])
    every = torch.cat(found).double() / FIXED_POINT_ONE
    at = torch.tensor(quantiles, dtype=torch.float64)
    return sorted({rounded(price) for price in every.quantile(at).tolist()}) if len(every) else []


def settings_of(
    routing: Mapping[int, Routed],
    tables: Mapping[int, LayerTables],
    layout: Layout,
    keeps: Sequence[int],
    quantiles: Sequence[float],
) -> Iterator[Setting]:
    """Yields what is compared in one place."""
    yield Setting(OFF)
    yield from (Setting(PAPER, keep) for keep in keeps)
    for policy in OURS:
        yield from (Setting(policy, price) for price in price_grid(routing, tables, layout, policy, quantiles))


def rerouter(
    setting: Setting, papers: Mapping[int, LayerTables], ours: Mapping[int, LayerTables], layout: Layout
) -> Rerouter:
    if setting.policy == OFF:
        return unchanged
    if setting.policy == PAPER:
        return paper_rerouter(papers, Settings(int(setting.knob)))
    return Priced(ours, layout, setting.policy, setting.knob)


def estimated_error(before: Routed, after: Routed, tables: LayerTables) -> float:
    """Returns the squared error that a layer makes per row, by the tables, whatever policy changed the slots.

    A slot that is multiplied by w' where it was w is off by w² n_e (1 - s) of what its substitute cannot give, and by
    (w c - w')² n_p of what it can. A dropped one is off by w² n_e. The errors of slots are added.
    """
    assert tables.coefficient_EE is not None and tables.size_E is not None
    (weights, ids), (new_weights, new_ids) = (
        tuple(each.flatten(0, 1) for each in routed) for routed in (before, after)
    )
    old, new = ids.clamp(min=0).long(), new_ids.clamp(min=0).long()
    itself = torch.eye(len(tables.size_E), dtype=torch.bool)
    similarity_EE, coefficient_EE = (
        table.masked_fill(itself, 1.0) for table in (tables.similarity_EE, tables.coefficient_EE)
    )
    whole = weights.square() * tables.size_E[old]
    left = whole * (1 - similarity_EE[old, new])
    left += (weights * coefficient_EE[old, new] - new_weights).square() * tables.size_E[new]
    return float(torch.where(new_ids < 0, whole, left).sum() / len(ids))


def spread_of(of: dict[int, torch.Tensor], layout: Layout) -> dict[str, float]:
    found = traffic(of, layout)
    return {name: rounded(numbers.fmean(getattr(found, name))) for name in ("active_experts", "largest_rank")}


# --- the example model -----------------------------------------------------------------------------------------------


def recorded_routing(texts: HeldOut) -> dict[int, Routed]:
    """Returns what the model's routers choose at all decode steps of all texts: weights and ids [D, texts, K]."""
    seen: dict[int, Routed] = {}

    def look(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: Any) -> Routed:
        seen[layer] = (weights_DBK.float().clone(), ids_DBK.clone())
        return weights_DBK, ids_DBK

    lockstep(texts.model, texts.ids_NL, prompt_length=texts.prompt_length, rerouter=look)
    return seen


Decoded = tuple[LockstepResult, dict[int, torch.Tensor], float]  # what `decode` returns


def real(
    texts: HeldOut,
    routing: dict[int, Routed],
    papers: Artifact,
    ours: Artifact,
    size: Size,
    cell: tuple[int, int],
    done: dict[tuple, Decoded],
) -> list[dict[str, Any]]:
    """Measures the example model under every setting, and simulates its steps at the stand-in's sizes.

    `done` keeps what was decoded: policies that do not know where experts are do the same on any number of ranks.
    """
    rows, (batch, ranks) = [], cell
    layout = linear(list(routing), ours.config.num_experts, ranks)
    part = {layer: (weights[:, :batch], ids[:, :batch]) for layer, (weights, ids) in routing.items()}
    for setting in settings_of(part, ours.tables, layout, size.keeps, size.quantiles):
        key = (batch, setting, ranks if setting.policy in (BALANCED, BALANCED_ALL) else None)
        if key not in done:
            done[key] = decode(texts, batch, rerouter(setting, papers.tables, ours.tables, layout), ours.tables)
        result, ids, error = done[key]
        kl, kl_error = with_error(result.divergence_of_texts)
        row = {"batch": batch, "ranks": ranks, **setting._asdict(), "kl": rounded(kl), "kl_error": rounded(kl_error)}
        row |= {"estimated_error": rounded(error)} | spread_of(ids, layout)
        rows.append(row | {"ms": times(ids, layout, STAND_IN)})
        print(json.dumps(rows[-1] | {"ms": rows[-1]["ms"]["H200, 8 to a node, per_slot"]}), file=sys.stderr)
    return rows


def decode(texts: HeldOut, batch: int, policy: Rerouter, tables: Mapping[int, LayerTables]) -> Decoded:
    """Returns what decoding in batches came to, the ids that ran (batches one after the other), and the error."""
    results, ids, error = [], {}, 0.0

    def watching(layer: int, weights: torch.Tensor, before: torch.Tensor, scores: Any) -> Routed:
        nonlocal error
        after = policy(layer, weights, before, scores)
        error += estimated_error((weights, before), after, tables[layer])
        ids.setdefault(layer, []).append(after[1].clone())
        return after

    parts = zip(texts.ids_NL.split(batch), texts.reference_NDV.split(batch), strict=True)
    for part_BL, reference in parts:
        settings = {"prompt_length": texts.prompt_length, "reference_BDV": reference}
        results.append(lockstep(texts.model, part_BL, rerouter=watching, **settings))
    together = {layer: torch.cat(found) for layer, found in ids.items()}
    return sum(results[1:], results[0]), together, error / len(results)


def replayed(routing: dict[int, Routed], router: SyntheticRouter, num_experts: int, size: Size) -> list[dict[str, Any]]:
    """Compares the fitted router with the recorded routing: what runs if tokens keep all, two or one of their slots."""
    rows, random = [], torch.Generator().manual_seed(1)
    steps, texts, top_k = next(iter(routing.values()))[1].shape
    for batch in (each for each in (4, 16, 64) if each <= texts):
        made_up = router.route(steps, batch, num_experts, top_k, random)
        for ranks, keep in itertools.product(size.replayed_ranks, (top_k, 2, 1)):
            layout = linear([0], num_experts, ranks)
            of_layers = [
                spread_of({0: kept(part, keep)}, layout)
                for weights, ids in routing.values()
                for part in zip(weights.split(batch, dim=1), ids.split(batch, dim=1), strict=True)
                if part[1].shape[1] == batch
            ]
            recorded = {name: numbers.fmean(each[name] for each in of_layers) for name in of_layers[0]}
            drawn = spread_of({0: kept(made_up, keep)}, layout)
            row: dict[str, Any] = {"batch": batch, "ranks": ranks, "keep": keep}
            for name, number in recorded.items():
                row |= {name: rounded(number), f"synthetic_{name}": drawn[name]}
            rows.append(row)
    return rows


def kept(routed: Routed, keep: int) -> torch.Tensor:
    """Returns the ids of each token's heaviest slots [D, B, keep]."""
    weights_DBK, ids_DBK = routed
    return ids_DBK.gather(2, weights_DBK.argsort(dim=2, descending=True)[..., :keep])


# --- large shapes ----------------------------------------------------------------------------------------------------


def drawn_tables(known: Mapping[int, LayerTables], num_experts: int, random: torch.Generator) -> LayerTables:
    """Returns tables whose similarities and sizes are the example's, drawn independently.

    Sizes are relative to the mean of their layer, whose sensitivity all experts of a layer share.
    """
    different = ~torch.eye(len(next(iter(known.values())).similarity_EE), dtype=torch.bool)
    similarities = torch.cat([tables.similarity_EE[different] for tables in known.values()])
    sizes = torch.cat([tables.size_E / tables.size_E.mean() for tables in known.values() if tables.size_E is not None])
    similarity_EE = similarities[torch.randint(len(similarities), (num_experts, num_experts), generator=random)]
    size_E = sizes[torch.randint(len(sizes), (num_experts,), generator=random)]
    # The similarity is the share that is explained: c² n_p / n_e.
    return LayerTables(similarity_EE, (similarity_EE * size_E[:, None] / size_E).sqrt(), size_E)


def synthetic(router: SyntheticRouter, known: Mapping[int, LayerTables], size: Size, name: str) -> list[dict[str, Any]]:
    """Simulates steps at a model's shape, on all numbers of ranks, under every setting."""
    rows, model = [], MODELS[name]
    for ranks, rows_of_rank in itertools.product(size.ranks, size.rows_per_rank):
        random = torch.Generator().manual_seed(0)
        tables = {0: drawn_tables(known, model.experts, random)}
        if not any(fits(model, ranks, hardware) for hardware in HARDWARE.values()):
            continue
        batch = ranks * rows_of_rank
        steps = max(1, min(size.steps, size.rows // batch))
        routed = router.route(steps, batch, model.experts, model.top_k, random, model.groups)
        layout = linear([0], model.experts, ranks)
        keeps = [model.top_k * keep // 8 for keep in size.keeps]
        for setting in settings_of({0: routed}, tables, layout, keeps, size.synthetic_quantiles):
            after = rerouter(setting, tables, tables, layout)(0, *routed, None)
            row = {"model": name, "ranks": ranks, "rows_per_rank": rows_of_rank, **setting._asdict()}
            row |= {"estimated_error": rounded(estimated_error(routed, after, tables[0]))}
            row |= spread_of({0: after[1]}, layout)
            ms = times({0: after[1]}, layout, model)
            for label, hardware in HARDWARE.items():
                if not fits(model, ranks, hardware):
                    ms = {where: of for where, of in ms.items() if not where.startswith(label)}
            rows.append(row | {"ms": ms})
    return rows


# --- what is saved ---------------------------------------------------------------------------------------------------


def at_error(points: Sequence[dict[str, Any]], where: str, error: float, by: str) -> dict[str, float] | None:
    """Returns the parts of the step that a policy has at an error; None if all its settings make more.

    Where all make less it is the fastest one.
    """
    pairs = [(max(row[by], 1e-9), row["ms"][where]) for row in points]
    if error < min(pair[0] for pair in pairs):
        return None
    if error > max(pair[0] for pair in pairs):
        return min((ms for _, ms in pairs), key=lambda ms: ms["seconds"])
    found = {part: at_kl([(made, ms[part]) for made, ms in pairs], error) for part in pairs[0][1]}
    return {part: ms for part, ms in found.items() if ms is not None}


def savings(rows: list[dict[str, Any]], place: Sequence[str], by: str) -> list[dict[str, Any]]:
    """Returns what each policy of ours saves of the paper's step at the paper's error: by place, S, and hardware."""
    found = []
    for key, here in itertools.groupby(rows, key=lambda row: tuple(row[name] for name in place)):
        here = list(here)
        off = next(row for row in here if row["policy"] == OFF)
        for paper in (row for row in here if row["policy"] == PAPER):
            for where, theirs in paper["ms"].items():
                saved: dict[str, Any] = {}
                for policy in OURS:
                    points = [off, *(row for row in here if row["policy"] == policy)]
                    if len(points) > 1 and (ours := at_error(points, where, paper[by], by)):
                        saved[policy] = saving(theirs, ours)
                about = dict(zip(place, key, strict=True)) | {"S": paper["knob"], "where": where, by: paper[by]}
                about |= {"off_ms": off["ms"][where]["seconds"], "paper_ms": theirs["seconds"]}
                found.append(about | {"saved": saved})
    return found


def saving(theirs: dict[str, float], ours: dict[str, float]) -> list[float]:
    """Returns the share of the step that is saved, and the least and most if one part is off by the device's factor."""
    factor = math.exp(DEVICES["h200"].uncertainty)

    def share(scale: Mapping[str, float]) -> float:
        ours_ms, theirs_ms = (sum(scale.get(part, 1.0) * of[part] for part in PARTS) for of in (ours, theirs))
        return 1 - ours_ms / theirs_ms

    shaken = [share({part: by}) for part in PARTS for by in (factor, 1 / factor)]
    return [rounded(each) for each in (share({}), min(shaken), max(shaken))]


# --- the page --------------------------------------------------------------------------------------------------------


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the measured KL divergence against the simulated step, by place."""
    where = "H200, 8 to a node, per_slot"
    cells = list(dict.fromkeys((row["batch"], row["ranks"]) for row in rows))
    figure = Figure(figsize=(4 * len(cells), 4), dpi=150, layout="constrained")
    every = figure.subplots(1, len(cells), squeeze=False, sharey=True)[0]
    for axes, (batch, ranks) in zip(every, cells, strict=True):
        here = [row for row in rows if (row["batch"], row["ranks"]) == (batch, ranks)]
        for policy in (PAPER, *OURS):
            points = sorted((row["ms"][where]["seconds"], row["kl"]) for row in here if row["policy"] == policy)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=LOOKS[policy], markersize=4, label=policy)
        off = next(row for row in here if row["policy"] == OFF)
        axes.axvline(off["ms"][where]["seconds"], color=GREY, linestyle="--", linewidth=0.9)
        axes.set_title(f"{ranks} ranks, batch {batch}", fontsize="medium")
        axes.set_xlabel("ms per decode step (simulated)")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    every[0].set_ylabel("KL divergence from the baseline (measured)")
    every[-1].legend(fontsize=7)
    figure.savefig(path)


def main(
    artifacts: Annotated[
        Path, typer.Option(help="Folder with the artifacts frobenius and projection of the example model.")
    ] = ARTIFACTS,
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "simulation.json",
    picture: Annotated[Path, typer.Option(help="File for the figure.")] = ROOT / "docs/simulation.png",
    parts: Annotated[list[str] | None, typer.Option(help=f"What to do: {', '.join(ALL)}. Default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A handful of texts and shapes.")] = False,
) -> None:
    started, size, parts = time.perf_counter(), QUICK if quick else Size(), parts or list(ALL)
    papers, ours = (Artifact.load(calibrated(method, artifacts)) for method in ("frobenius", "projection"))
    model, tokenizer = load_model(str(MODEL), "cpu"), AutoTokenizer.from_pretrained(MODEL)
    choice_texts, texts = (
        decoded(model, held_out_texts(HELDOUT, tokenizer, half=half, count=size.texts, length=size.length))
        for half in ("choice", "final")
    )
    routing = recorded_routing(texts)
    report: dict[str, Any] = {
        "command": "python -m studies.simulation" + " --quick" * quick,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("sere-dist", "torch", "transformers"),
    }
    if "validation" in parts:
        report["validation"] = beside_measured(routing)
    if "synthetic" in parts:
        num_experts, top_k = ours.config.num_experts, ours.config.num_experts_per_token
        target = target_of(recorded_routing(choice_texts), num_experts)
        router = fit(target, num_experts, top_k)
        report["router"] = vars(router) | {"fitted_to": target._asdict()}
        report["replayed"] = replayed(routing, router, num_experts, size)
        made_up: list[dict[str, Any]] = []
        for name in size.models:
            made_up += synthetic(router, ours.tables, size, name)
            saved = savings(made_up, ("model", "ranks", "rows_per_rank"), "estimated_error")
            report |= {"synthetic_savings": saved, "synthetic": short(made_up)}
            write(results, report)
    if "real" in parts:
        measured: list[dict[str, Any]] = []
        done: dict[tuple, Decoded] = {}
        for cell in size.cells:
            measured += real(texts, routing, papers, ours, size, cell, done)
            report |= {"savings": savings(measured, ("batch", "ranks"), "kl"), "real": short(measured)}
            write(results, report)
        draw(measured, picture)
    write(results, report | {"seconds": round(time.perf_counter() - started)})
    print(json.dumps(report))


def write(results: Path, report: dict[str, Any]) -> None:
    """Writes the parts of a report over those of the same names; the others in the file stay."""
    before = json.loads(results.read_text()) if results.exists() else {}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(line_by_line(before | report))


def short(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with whole steps and the experts' part of them alone."""
    return [row | {"ms": {at: [of["seconds"], of["experts"]] for at, of in row["ms"].items()}} for row in rows]


def target_of(routing: dict[int, Routed], num_experts: int) -> Statistics:
    """Returns the means over layers of the statistics that a router is fitted to."""
    of_layers = [statistics(*(each.flatten(0, 1) for each in routed), num_experts) for routed in routing.values()]
    return Statistics(*(numbers.fmean(each) for each in zip(*of_layers, strict=True)))


if __name__ == "__main__":
    typer.run(main)
