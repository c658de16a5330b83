"""How good is the choice of what runs, and of what becomes of a slot whose expert does not?

    python -m studies.selection                        # the example model of the tests
    python -m studies.selection --example smollm2-moe  # SmolLM2-MoE, once the demo has put it together

Three comparisons, all against policy `projection` with an `expert_price` at S = 1, as it is served:

- choices: the experts that a step runs. With the loss L_e that the step has without e, any set P is thought to cost

      sum over e of L_e (1 - the largest s_ep over p in P)  +  expert_price * |P|.

  The policy takes the experts *in order* of what is left of their losses beside the heaviest experts: those that are
  worth the price beside all that come before them. The *threshold* is simpler: it takes those whose own loss reaches
  the price, whatever could stand in for them. *One at a time* adds the expert of which most is left, until that is
  worth less than the price.
  *Greedy* adds the expert that lowers the sum most, until that is worth less than the price. *Exact* is the least
  possible, by integer programming, on a sample of steps of the model as it is: also at the number of experts that the
  policy runs. *Free* choices need not run the heaviest expert of each token.
- curves: KL divergence with these choices, but for the exact one, at equal active experts.
- fills: a fourth way to settle a slot. The token takes the running expert p that its router scores highest beyond its
  own choice, as in OEA. That p stands in for e is no measured fact. It is a bet that scores are worth: p recovers the
  share `trust` * score_p / score_e of what e was worth, so that

      cost(fill) = w² n_e (1 - trust * score_p / score_e),

  and the slot goes to whatever costs least. p runs at `scale` times the weight that its score is worth. Both constants
  are chosen on the half `choice`; everything else is measured on the half `final`.

Errors are standard errors over texts, of ratios by pairs; those of sampled steps are over the steps. Prints tables;
writes `studies/results/selection-<example>.json`.

Shape suffixes: D decode steps, B texts, K experts per token, E experts, N tokens of all steps.
"""

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.table import Table
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, eye_array, hstack, kron, vstack
from tqdm import tqdm
from transformers import AutoTokenizer

from examples.application import EXAMPLES
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.console import tables
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult, Rerouter, Routed
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import (
    BATCH,
    CALIBRATION_LENGTH,
    CALIBRATION_TEXTS,
    LENGTH,
    PROMPT,
    TEXTS,
    calibration_texts,
    decoded,
    held_out_texts,
)
from sere_dist.evaluation.rerouters import primary_by_step, projection_rerouter
from sere_dist.method.fixed_point import ALWAYS_PRIMARY, FIXED_POINT_ONE
from sere_dist.method.projection import projection_tables, worth_running
from sere_dist.method.records import LayerTables, Settings
from sere_dist.method.rerouting import slots_by_weight
from sere_dist.moe import MoeShape, load_model
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.standard_errors import ratio_with_error
from studies.common import RESULTS
from studies.quality import SHARES, at_equal_experts, calibrate, compared, equal_experts_table

BATCHES = (4, 16, 64)
PRICES = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
PRICES_OF_PARTS = (0.005, 0.02, 0.08)  # of choices and of fills
TODAY, FILLED = "in order", "in order, and fills"
ALWAYS = 1e9  # as `trust`: a slot is filled wherever an expert is left


class Fill(NamedTuple):
    """What the fourth way to settle a slot is thought to be worth, and its weight; see above."""

    trust: float
    scale: float = 1.0
    renormalise: bool = False  # the weights of tokens with a filled slot, to the sum that they had: OEA's rule

    def __str__(self) -> str:
        trust = "always" if self.trust == ALWAYS else f"trust {self.trust:g}"
        return f"{trust}, scale {self.scale:g}" + (", renormalised" if self.renormalise else "")


FILLS = (
    *(Fill(trust, scale) for trust in (0.03, 0.1, 0.3, 1.0, ALWAYS) for scale in (0.5, 1.0)),
    Fill(ALWAYS, renormalise=True),
)

# The experts that each step runs, bool [D, E], of their losses [D, E], those that must run, and similarities [E, E].
Selection = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def losses(weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, size_E: torch.Tensor) -> torch.Tensor:
    """Returns [D, E], float64: the squared error that each step makes without each expert."""
    errors_DN = (weights_DBK.double().square() * size_E.double()[ids_DBK.long()]).flatten(1)
    losses_DE = torch.zeros(len(ids_DBK), len(size_E), dtype=torch.float64)
    return losses_DE.scatter_add_(1, ids_DBK.flatten(1).long(), errors_DN)


def errors_left(losses_DE: torch.Tensor, runs_DE: torch.Tensor, similarity_EE: torch.Tensor) -> torch.Tensor:
    """Returns [D]: the error of each step when every slot goes to the best of the experts that run."""
    best_DE = _best(runs_DE, similarity_EE)
    return (losses_DE * (1 - best_DE)).sum(dim=1)


def threshold(
    losses_DE: torch.Tensor, must_DE: torch.Tensor, _similarity_EE: torch.Tensor, *, price: float
) -> torch.Tensor:
    """Every expert whose own loss reaches the price."""
    return must_DE | (losses_DE >= price)


def in_order(
    losses_DE: torch.Tensor, must_DE: torch.Tensor, similarity_EE: torch.Tensor, *, price: float
) -> torch.Tensor:
    """The policy's choice, by `projection.worth_running`."""
    fixed_DE = (losses_DE * FIXED_POINT_ONE).round().long().masked_fill(must_DE, ALWAYS_PRIMARY)
    tables, settings = LayerTables(similarity_EE), Settings(1, expert_price=price)
    return torch.stack([worth_running(fixed_E, tables, settings) for fixed_E in fixed_DE])


def greedy(
    losses_DE: torch.Tensor,
    must_DE: torch.Tensor,
    similarity_EE: torch.Tensor,
    *,
    price: float = 0.0,
    count_D: torch.Tensor | None = None,
    own_alone: bool = False,
) -> torch.Tensor:
    """The expert that lowers the error most comes next, until that is worth less than the price, or there are enough.

    With `count_D` each step runs so many experts, if that many must not run anyway. With `own_alone` what an expert
    would do for others does not count: this is the choice of one at a time, which needs no sum over pairs of experts.
    """
    runs_DE, similarity_EE = must_DE.clone(), similarity_EE.double()
    best_DE = _best(runs_DE, similarity_EE)
    while True:
        if own_alone:
            gain_DE = losses_DE * (1 - best_DE)
        else:
            gain_DE = torch.einsum("de,dep->dp", losses_DE, (similarity_EE - best_DE[:, :, None]).clamp(min=0))
        gain_D, expert_D = gain_DE.masked_fill(runs_DE, -1).max(dim=1)
        wanted_D = gain_D >= max(price, 1e-12) if count_D is None else (runs_DE.sum(dim=1) < count_D) & (gain_D >= 0)
        if not wanted_D.any():
            return runs_DE
        runs_DE[wanted_D, expert_D[wanted_D]] = True
        best_DE[wanted_D] = best_DE[wanted_D].maximum(similarity_EE.T[expert_D[wanted_D]])


def exact(
    losses_E: torch.Tensor,
    must_E: torch.Tensor,
    similarity_EE: torch.Tensor,
    *,
    price: float = 0.0,
    count: int | None = None,
) -> torch.Tensor:
    """Returns bool [E]: the least error and price of one step, or the least error of exactly `count` experts.

    This is the facility location problem. Its variables say which experts run, and which of them stands in for each
    expert that a token named.
    """
    named = losses_E.nonzero().flatten()
    experts, clients = len(losses_E), len(named)
    worth = (losses_E[named, None] * similarity_EE[named].double()).numpy()
    running, standing_in = eye_array(experts), eye_array(clients * experts)
    only_who_runs = hstack([kron(np.ones((clients, 1)), -running), standing_in])  # x_ep <= y_p
    one_for_each = hstack([csr_array((clients, experts)), kron(eye_array(clients), np.ones((1, experts)))])
    rows, most = [only_who_runs, one_for_each], [np.zeros(clients * experts), np.ones(clients)]
    least = [np.full(clients * experts, -np.inf), np.zeros(clients)]
    if count is not None:
        rows.append(csr_array(np.r_[np.ones(experts), np.zeros(clients * experts)][None]))
        most.append(np.array([count]))
        least.append(np.array([count]))
    found = milp(
        np.r_[np.full(experts, price), -worth.flatten()],
        integrality=np.r_[np.ones(experts), np.zeros(clients * experts)],
        bounds=Bounds(np.r_[must_E.double().numpy(), np.zeros(clients * experts)], 1),
        constraints=LinearConstraint(vstack(rows), np.concatenate(least), np.concatenate(most)),
        options={"mip_rel_gap": 0},
    )
    assert found.success, found.message
    return torch.from_numpy(found.x[:experts] > 0.5)


one_at_a_time = partial(greedy, own_alone=True)
CHOICES: dict[str, tuple[Callable[..., torch.Tensor], int]] = {  # and how many heaviest experts of each token run
    "threshold": (threshold, 1),
    "one at a time": (one_at_a_time, 1),
    "greedy": (greedy, 1),
    "greedy, free": (greedy, 0),
}


def _best(runs_DE: torch.Tensor, similarity_EE: torch.Tensor) -> torch.Tensor:
    """Returns [D, E], float64: the similarity of each expert to the best that runs, 0 if none runs."""
    similarity_EE = similarity_EE.double().clamp(min=0)
    return torch.stack([(similarity_EE * runs_E).amax(dim=1) for runs_E in runs_DE])


def settled(
    weights_NK: torch.Tensor,
    ids_NK: torch.Tensor,
    scores_NE: torch.Tensor | None,
    runs_NE: torch.Tensor,
    of_layer: LayerTables,
    fill: Fill | None = None,
) -> Routed:
    """Returns weights and ids [N, K] in which every slot took its cheapest way, the heaviest first.

    Args:
        scores_NE: the router's, which a `fill` needs.
        runs_NE: bool, the experts that run in each token's step: slots that name them stay.
        fill: None: slots stay, are substituted, or are dropped, as in `method.projection` without domains.
    """
    own = projection_tables(of_layer)
    new_weights_NK, new_ids_NK = weights_NK.clone(), ids_NK.clone()
    beyond_NE, filled_N1 = runs_NE.scatter(1, ids_NK.long(), False), torch.zeros(len(ids_NK), 1, dtype=torch.bool)
    for slot_N1 in slots_by_weight(weights_NK).split(1, dim=1):
        expert_N1, weight_N1 = ids_NK.gather(1, slot_N1).long(), weights_NK.gather(1, slot_N1)
        lost_N1 = ~runs_NE.gather(1, expert_N1)
        similarity_NE = own.similarity_EE[expert_N1.squeeze(1)].masked_fill(~runs_NE, 0)
        share_N1, id_N1 = similarity_NE.max(dim=1, keepdim=True)
        new_N1 = weight_N1 * own.coefficient_EE[expert_N1, id_N1] * (share_N1 > 0)
        id_N1 = id_N1.masked_fill(share_N1 <= 0, -1)
        if fill is not None:
            assert scores_NE is not None, "fills need the router's scores"
            score_N1, next_N1 = scores_NE.masked_fill(~beyond_NE, 0).max(dim=1, keepdim=True)
            beside_N1 = score_N1 / scores_NE.gather(1, expert_N1)
            fills_N1 = lost_N1 & (score_N1 > 0) & (fill.trust * beside_N1 > share_N1)
            new_N1 = torch.where(fills_N1, fill.scale * beside_N1 * weight_N1, new_N1)
            id_N1 = torch.where(fills_N1, next_N1, id_N1)
            taken_NE = torch.zeros_like(beyond_NE).scatter(1, next_N1, fills_N1)
            beyond_NE, filled_N1 = beyond_NE & ~taken_NE, filled_N1 | fills_N1
        new_weights_NK.scatter_(1, slot_N1, torch.where(lost_N1, new_N1, weight_N1))
        new_ids_NK.scatter_(1, slot_N1, torch.where(lost_N1, id_N1, expert_N1).to(ids_NK.dtype))
    if fill is not None and fill.renormalise:
        scale_N1 = weights_NK.sum(dim=1, keepdim=True) / new_weights_NK.sum(dim=1, keepdim=True)
        new_weights_NK = torch.where(filled_N1, new_weights_NK * scale_N1, new_weights_NK)
    return new_weights_NK, new_ids_NK


def selecting_rerouter(
    of_layers: Mapping[int, LayerTables], select: Selection, *, keeps: int = 1, fill: Fill | None = None
) -> Rerouter:
    """Returns the rerouter of a choice, in which the `keeps` heaviest experts of each token run, and of a fill."""

    def route(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None) -> Routed:
        own, batch = projection_tables(of_layers[layer]), ids_DBK.shape[1]
        must_DE = primary_by_step(weights_DBK, ids_DBK, keeps, len(own.size_E))
        runs_DE = select(losses(weights_DBK, ids_DBK, own.size_E), must_DE, own.similarity_EE)
        scores_NE = None if scores_DBE is None else scores_DBE.flatten(0, 1)
        runs_NE = runs_DE.repeat_interleave(batch, dim=0)
        rows = (weights_DBK.flatten(0, 1), ids_DBK.flatten(0, 1))
        new_weights_NK, new_ids_NK = settled(*rows, scores_NE, runs_NE, of_layers[layer], fill)
        return new_weights_NK.view_as(weights_DBK), new_ids_NK.view_as(ids_DBK)

    return route


class SampledStep(NamedTuple):
    losses_E: torch.Tensor
    heaviest_E: torch.Tensor
    similarity_EE: torch.Tensor


def sampled_steps(
    bench: HeldOut, of_layers: Mapping[int, LayerTables], batch: int, count: int
) -> tuple[list[SampledStep], LockstepResult]:
    """Returns so many decode steps of the model as it is, spread over layers, positions and texts, and its result."""
    found: list[SampledStep] = []

    def look(layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        own = projection_tables(of_layers[layer])
        losses_DE = losses(weights_DBK, ids_DBK, own.size_E)
        heaviest_DE = primary_by_step(weights_DBK, ids_DBK, 1, len(own.size_E))
        pairs = zip(losses_DE, heaviest_DE, strict=True)
        found.extend(SampledStep(losses_E, heaviest_E, own.similarity_EE) for losses_E, heaviest_E in pairs)
        return weights_DBK, ids_DBK

    off = bench.run(look, batch)
    places = torch.linspace(0, len(found) - 1, min(count, len(found))).long().tolist()
    return [found[place] for place in places], off


def choices(steps: Sequence[SampledStep], price: float) -> list[dict[str, Any]]:
    """Returns a row for each way to choose: its experts, error and objective beside the least that is possible.

    Those of "at equal experts" run as many as the policy in each step.
    """
    objectives: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    active: dict[str, list[int]] = {}

    def add(name: str, step: SampledStep, runs_E: torch.Tensor) -> None:
        error = float(errors_left(step.losses_E[None], runs_E[None], step.similarity_EE))
        errors.setdefault(name, []).append(error)
        active.setdefault(name, []).append(int(runs_E.sum()))
        objectives.setdefault(name, []).append(error + price * int(runs_E.sum()))

    for step in tqdm(steps, desc=f"choices at {price:g}"):
        one = step.losses_E[None], step.heaviest_E[None], step.similarity_EE
        nothing_E = torch.zeros_like(step.heaviest_E)
        today_E = in_order(*one, price=price)[0]
        count = int(today_E.sum())
        add(TODAY, step, today_E)
        add("threshold", step, threshold(*one, price=price)[0])
        add("one at a time", step, one_at_a_time(*one, price=price)[0])
        add("greedy", step, greedy(*one, price=price)[0])
        add("exact", step, exact(*step, price=price))
        add("exact, free", step, exact(step.losses_E, nothing_E, step.similarity_EE, price=price))
        add("one at a time, at equal experts", step, one_at_a_time(*one, count_D=torch.tensor([count]))[0])
        add("greedy, at equal experts", step, greedy(*one, count_D=torch.tensor([count]))[0])
        add("exact, at equal experts", step, exact(*step, count=count))
        add("exact, free, at equal experts", step, exact(step.losses_E, nothing_E, step.similarity_EE, count=count))
    rows = []
    for name, objective in objectives.items():
        equal = name == TODAY or "equal" in name
        row = {
            "choice": name,
            "active_experts": sum(active[name]) / len(steps),
            "error": sum(errors[name]) / len(steps),
        }
        ratio, ratio_error = ratio_with_error(objective, objectives["exact"])
        row |= {"objective": sum(objective) / len(steps), "beside_exact": ratio, "beside_exact_error": ratio_error}
        if equal:
            ratio, ratio_error = ratio_with_error(errors[name], errors["exact, at equal experts"])
            row |= {"error_beside_exact": ratio, "error_beside_exact_error": ratio_error}
        rows.append({key: rounded(value) if isinstance(value, float) else value for key, value in row.items()})
    return rows


def fills_compared(
    bench: HeldOut, of_layers: Mapping[int, LayerTables], prices: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns each fill's KL divergence as a factor of that of the policy, at each price."""
    rows = []
    for price in prices:
        today = bench.run(projection_rerouter(of_layers, Settings(1, expert_price=price)), BATCH)
        for fill in tqdm(FILLS, desc=f"fills at {price:g}"):
            rerouter = selecting_rerouter(of_layers, partial(in_order, price=price), fill=fill)
            ours = bench.run(rerouter, BATCH)
            found = compared(ours.divergence_of_texts, today.divergence_of_texts)
            active = {"active_experts": rounded(ours.active_experts), "kl": rounded(ours.divergence)}
            rows.append({"fill": str(fill), "price": price, **active, **found})
    return rows


def best_fill(rows: Sequence[dict[str, Any]]) -> Fill:
    """Returns the fill whose factors have the least product over the prices."""
    factors = {str(fill): [row["ratio"] for row in rows if row["fill"] == str(fill)] for fill in FILLS}
    return min(FILLS, key=lambda fill: float(np.prod(factors[str(fill)])))


def curves(
    bench: HeldOut, of_layers: Mapping[int, LayerTables], batch: int, prices: Sequence[float], fill: Fill
) -> dict[str, list[LockstepResult]]:
    """Returns the results of every policy over the prices."""
    policies: dict[str, Callable[[float], Rerouter]] = {
        TODAY: lambda price: projection_rerouter(of_layers, Settings(1, expert_price=price)),
        FILLED: lambda price: selecting_rerouter(of_layers, partial(in_order, price=price), fill=fill),
    }
    for name, (choice, keeps) in CHOICES.items():
        policies[name] = partial(_chosen, of_layers, choice, keeps)
    bar = tqdm(total=len(policies) * len(prices), desc=f"curves, batch {batch}")
    found: dict[str, list[LockstepResult]] = {name: [] for name in policies}
    for name, policy in policies.items():
        for price in prices:
            found[name].append(bench.run(policy(price), batch))
            bar.update()
    bar.close()
    return found


def _chosen(
    of_layers: Mapping[int, LayerTables], choice: Callable[..., torch.Tensor], keeps: int, price: float
) -> Rerouter:
    return selecting_rerouter(of_layers, partial(choice, price=price), keeps=keeps)


def choices_table(rows: Sequence[dict[str, Any]], batch: int, price: float) -> Table:
    title = f"batch {batch}, price {price:g}: steps of the model as it is, beside the exact choice"
    table = Table("choice", "experts", "error", "objective", "beside exact", "error beside exact", title=title)
    for row in rows:
        if (row["batch"], row["price"]) == (batch, price):
            cells = [f"{row['active_experts']:.1f}", f"{row['error']:.4g}", f"{row['objective']:.4g}"]
            cells.append(f"{row['beside_exact']:.4f} ±{row['beside_exact_error']:.4f}")
            if "error_beside_exact" in row:
                cells.append(f"{row['error_beside_exact']:.4f} ±{row['error_beside_exact_error']:.4f}")
            table.add_row(row["choice"], *cells)
    return table


def fills_table(rows: Sequence[dict[str, Any]]) -> Table:
    prices = list(dict.fromkeys(row["price"] for row in rows))
    title = f"batch {BATCH}, half choice: KL divergence with fills as a factor of the policy's"
    table = Table("fill", *(f"price {price:g}" for price in prices), title=title)
    for fill in dict.fromkeys(row["fill"] for row in rows):
        of_fill = [row for row in rows if row["fill"] == fill]
        table.add_row(fill, *(f"{row['ratio']:.3f} ±{row['ratio_error']:.3f}" for row in of_fill))
    return table


def main(
    example: Annotated[str, typer.Option(help=f"The model: {' or '.join(EXAMPLES)}.")] = "tiny-moe",
    texts: Annotated[int, typer.Option(help="Held-out texts of all kinds together, of each half.")] = TEXTS,
    samples: Annotated[int, typer.Option(help="Texts of the calibration.")] = CALIBRATION_TEXTS,
    steps: Annotated[int, typer.Option(help="Decode steps of each batch whose choices are compared.")] = 60,
    batches: Annotated[list[int] | None, typer.Option(help=f"Batches, {BATCHES} by default.")] = None,
    prices: Annotated[list[float] | None, typer.Option(help=f"Of the curves, {PRICES} by default.")] = None,
    results: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    started, console, own = time.perf_counter(), tables(), EXAMPLES[example]
    batches, prices = batches or list(BATCHES), prices or list(PRICES)
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(own.model), Checkpoint(str(own.model))
    to_calibrate = calibration_texts(own.calibration, tokenizer, count=samples, length=CALIBRATION_LENGTH)
    (calibration,) = calibrate(checkpoint, to_calibrate, ("projection",))
    of_layers = calibration.tables
    model = load_model(str(own.model), "cpu")
    to_choose, to_report = (
        decoded(model, held_out_texts(own.held_out, tokenizer, half=half, count=texts)) for half in ("choice", "final")
    )

    of_fills = fills_compared(to_choose, of_layers, PRICES_OF_PARTS)
    console.print(fills_table(of_fills))
    fill = best_fill(of_fills)
    chosen: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    for batch in batches:
        sample, off = sampled_steps(to_report, of_layers, batch, steps)
        for price in PRICES_OF_PARTS:
            chosen += [{"batch": batch, "price": price, **row} for row in choices(sample, price)]
            console.print(choices_table(chosen, batch, price))
        found = curves(to_report, of_layers, batch, prices, fill)
        points.append({"policy": "off", "price": None, **outcome_of(off, off, batch).model_dump()})
        for name, curve in found.items():
            for price, result in zip(prices, curve, strict=True):
                points.append({"policy": name, "price": price, **outcome_of(result, off, batch).model_dump()})
        beside += at_equal_experts(found, TODAY, batch, SHARES)
        title = ": KL divergence as a factor of the policy's"
        console.print(equal_experts_table(beside, TODAY, batch, (*CHOICES, FILLED), title))
    keep(
        results or RESULTS / f"selection-{example}.json",
        {
            "command": shlex.join(["python", "-m", "studies.selection", *sys.argv[1:]]),
            "machine": machine() | {"threads": torch.get_num_threads()},
            "versions": versions("sere-dist", "torch", "transformers", "scipy"),
            "shape": vars(MoeShape.from_config(model.config)),
            "texts": texts,
            "length": LENGTH,
            "prompt": PROMPT,
            "calibration_texts": len(to_calibrate),
            "steps": steps,
            "seconds": round(time.perf_counter() - started),
            "fills": of_fills,
            "fill": fill._asdict(),
            "choices": chosen,
            "points": points,
            "at_equal_experts": beside,
        },
    )


if __name__ == "__main__":
    typer.run(main)
