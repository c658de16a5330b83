"""Which setting each layer gets, found with as few trials as it takes.

Every setting of every layer is measured alone. The combinations that follow from it (`sere_dist.evaluation.tuning`) lie
along a trade-off; a few of them are measured, then more of those between the two that the budget lies between. What is
chosen is measured once more on held-out texts.
"""

from collections.abc import Sequence
from typing import NamedTuple

from calibration_jobs.trials import Trial, TrialRunner
from sere_dist.artifact.recommendation import LayerSetting, Outcome
from sere_dist.evaluation.lockstep import LockstepResult
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.tuning import Budget, Combination, Cost, bracket, combinations, evenly_spaced

COMBINATIONS = 10  # measured first, along the whole trade-off
REFINED, ROUNDS = 6, 2  # then so many of those between the two that the budget lies between, so many times


class SearchResult(NamedTuple):
    """The combination to recommend, and what was measured on the texts for tuning."""

    chosen: Combination
    tuned: Outcome  # of the chosen one
    curve: list[Outcome]  # of all combinations that were measured, the mildest first


class HeldOutOutcomes(NamedTuple):
    """What settings came to on held-out texts."""

    off: list[Outcome]  # by batch
    recommended: list[Outcome]  # by batch
    uniform: dict[int, Outcome]  # by S: the same S, and nothing else, in all layers, at the batch that was tuned for


def search(layers: Sequence[int], batch: int, budget: Budget, runner: TrialRunner) -> SearchResult:
    """Finds the combination of the layers' settings that fits a budget best.

    Raises:
        ValueError: nothing fits the budget, or no setting saves an expert.
    """
    (off,) = runner.run("the model as it is", [Trial(texts="tuning", batch=batch)])
    path = combinations(measure_single_layers(batch, layers, off, runner), Cost(off.active_experts, 0.0))
    if not path:
        raise ValueError(f"no setting of any layer saves an expert at batch {batch}: there is nothing to choose")
    outcomes, place = measure_combinations(path, off, batch, budget, runner)
    return SearchResult(path[place], outcomes[place], [outcomes[each] for each in sorted(outcomes)])


def most_trials(layers: int, candidates: int, batches: int, top_k: int) -> int:
    """Returns how many trials a search takes at most, those on held-out texts included.

    `candidates`: settings to try in each layer; `batches`: those that are measured on held-out texts.
    """
    return 1 + layers * candidates + COMBINATIONS + ROUNDS * REFINED + 2 * batches + top_k - 1


def measure_single_layers(
    batch: int, layers: Sequence[int], off: LockstepResult, runner: TrialRunner
) -> dict[int, dict[LayerSetting, Cost]]:
    """Returns what each setting of each layer costs, the other layers as they are."""
    settings = runner.find_candidates(batch)
    singles = [(layer, setting) for layer in layers for setting in settings[layer]]
    trials = [Trial(texts="tuning", batch=batch, layers={layer: setting}) for layer, setting in singles]
    costs: dict[int, dict[LayerSetting, Cost]] = {layer: {} for layer in layers}
    for (layer, setting), result in zip(singles, runner.run("single layers", trials), strict=True):
        # A result has the mean over layers, of which one has changed.
        saved = (off.active_experts - result.active_experts) * len(layers)
        costs[layer][setting] = Cost(off.active_experts - saved, result.divergence)
    return costs


def measure_combinations(
    path: Sequence[Combination], off: LockstepResult, batch: int, budget: Budget, runner: TrialRunner
) -> tuple[dict[int, Outcome], int]:
    """Returns what combinations along the path came to, by their places on it, and the place of the one to choose.

    Raises:
        ValueError: none is within the budget.
    """
    outcomes: dict[int, Outcome] = {}
    ends, count = (0, len(path) - 1), COMBINATIONS
    for _ in range(1 + ROUNDS):
        places = [place for place in evenly_spaced(*ends, count) if place not in outcomes]
        trials = [Trial(texts="tuning", batch=batch, layers=path[place]) for place in places]
        for place, result in zip(places, runner.run("combinations", trials), strict=True):
            outcomes[place] = outcome_of(result, off, batch)
        within, outside = bracket(outcomes, budget)
        if within is None:
            raise ValueError(over_budget_message(budget, outcomes))
        if outside is None:
            break
        ends, count = (min(within, outside), max(within, outside)), REFINED + 2
    return outcomes, within


def measure_on_held_out(
    chosen: Combination, layers: Sequence[int], top_k: int, batch: int, batches: Sequence[int], runner: TrialRunner
) -> HeldOutOutcomes:
    """Measures the chosen combination and the model as it is at each batch, and every uniform S at `batch`."""
    same_in_all = {keep: dict.fromkeys(layers, LayerSetting(select_top_k=keep)) for keep in range(1, top_k)}
    off_trials, our_trials = (
        [Trial(texts="report", batch=each, layers=settings) for each in batches] for settings in ({}, chosen)
    )
    uniform_trials = [Trial(texts="report", batch=batch, layers=settings) for settings in same_in_all.values()]
    results = iter(runner.run("on held-out texts", [*off_trials, *our_trials, *uniform_trials]))
    off, ours = ({each: next(results) for each in batches} for _ in range(2))
    return HeldOutOutcomes(
        off=[outcome_of(off[each], off[each], each) for each in batches],
        recommended=[outcome_of(ours[each], off[each], each) for each in batches],
        uniform={
            keep: outcome_of(result, off[batch], batch) for keep, result in zip(same_in_all, results, strict=True)
        },
    )


def over_budget_message(budget: Budget, outcomes: dict[int, Outcome]) -> str:
    """Says how near the measured combinations came to a budget that none of them fits."""
    if budget.kind == "active_experts":
        fewest = min(outcome.active_experts for outcome in outcomes.values())
        return f"nothing fits the budget, {budget}: the fewest that were reached are {fewest:.1f}"
    mildest = outcomes[min(outcomes)]
    number, error = getattr(mildest, budget.kind), getattr(mildest, f"{budget.kind}_error")
    return (
        f"nothing fits the budget, {budget}: the mildest setting came to {number:.2g} +- {error:.2g} at "
        f"{mildest.active_experts:.1f} active experts, and two standard errors count as spent. Raise the budget, or "
        "use more texts (--num-samples)"
    )
