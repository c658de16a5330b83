"""What the jobs print for people: their plans, and what a tuning found."""

from collections.abc import Sequence
from dataclasses import replace

from rich import box
from rich.table import Table

from sere_dist.artifact.recommendation import Outcome, Recommendation
from sere_dist.artifact.sources import Service
from sere_dist.calibration.plan import H200, Plan
from sere_dist.evaluation.plan import TuningPlan
from sere_dist.evaluation.tuning import Budget


def plan_table(plan: Plan, workers: str, sensitivity_texts: int) -> Table:
    """Returns the plan of a calibration; `workers` describes what the cluster has for it."""
    layers = len(plan.layer_names)
    forwards = max(plan.layer_names) + 1 if plan.method.needs_data else 0
    method = plan.method.name
    if plan.method.has_kernel:
        method += f", {plan.kernel} kernel, from {'features' if plan.of_features else 'Gram matrices of tokens'}"
    rows = {
        "model": f"{plan.shape.architecture}, {plan.parameters / 1e9:.3g} billion parameters",
        "layers": f"{plan.shape.num_layers}, of which {layers} MoE: {plan.shape.num_experts} experts, "
        f"{plan.shape.num_experts_per_token} per token",
        "method": method,
        "workers": workers,
        "a scoring task holds": size(plan.score_bytes),
        "reads": f"{size(layers * plan.score_read)} for {layers} scoring tasks (1 pass over the experts)",
    }
    if plan.method.needs_data:
        passes = f"{plan.expert_passes} passes" if plan.expert_passes > 1 else "1 pass"
        rows |= {
            "tokens": f"{plan.num_tokens:,}; a scoring task takes {plan.block_tokens:,} at a time, "
            f"{passes} of all of them through every expert",
            "a forward task holds": size(plan.forward_bytes),
            "object store": f"{size(plan.states_bytes)} per layer in flight",
            "reads": f"{size(forwards * plan.forward_read)} for {forwards} forward tasks, one after another "
            f"(1 pass over the layers); {rows['reads']}",
            "sensitivities": "not measured"
            if not sensitivity_texts
            else f"{sensitivity_texts} texts; one more task reads the "
            f"layers twice, {size(2 * forwards * plan.forward_read)}, and has their states in memory",
            "work": f"forward {flops(forwards * plan.forward_flops)}, scoring "
            f"{flops(layers * plan.score_float32)} in float32 and {flops(layers * plan.score_float64)} in float64",
        }
    rows["expected"] = _expected(replace(plan, device="cuda"))
    return _plan(plan.model, rows)


def tuning_plan_table(plan: TuningPlan, workers: str) -> Table:
    """Returns the plan of a tuning; `workers` describes what the cluster has for it."""
    rows = {
        "model": f"{plan.shape.architecture}, {plan.parameters / 1e9:.3g} billion parameters, "
        f"{len(plan.layer_names)} MoE layers",
        "workers": workers,
        "trials": f"up to {plan.trials:,}, of {plan.num_texts} texts of {plan.length} tokens",
    }
    whole = f"the model, {size(plan.whole_bytes)} {'as it is stored' if plan.dtype == 'auto' else f'in {plan.dtype}'}"
    if not plan.by_layers:
        rows |= {
            "a worker holds": f"{whole}; with --by-layers one part of it at a time, at most {size(plan.part_bytes)}",
            "reads": f"{size(plan.pass_read)} for each worker",
            "expected": "the log says it after the first trial of a kind",
        }
        return _plan(plan.model, rows)
    together = plan.trials_a_pass
    rows |= {
        "a worker holds": f"one part of the model at a time, at most {size(plan.part_bytes)} in float32, instead of "
        f"{whole}; and in the host's memory the states of {together:,} trials and of the model as it is, "
        f"{size(plan.states_bytes)} each",
        "reads": f"{size(plan.pass_read)} a pass of up to {together:,} trials, which is "
        f"{size(plan.pass_read / together)} a trial; about {plan.passes:,} passes in all",
        "work": f"up to {flops(plan.trial_flops)} a trial, in float32",
        "expected": f"{_expected(plan)}. The log says it anew after the first pass of a kind",
    }
    return _plan(plan.model, rows)


def _expected(plan: Plan | TuningPlan) -> str:
    return (
        f"{plan.seconds(H200, 1):,.0f} s on 1 {H200.name}, {plan.seconds(H200, 8):,.0f} s on 8. Not measured: "
        f"half of {H200.float32 / 1e12:.0f} TFLOP/s, reads of {H200.read / 1e9:g} GB/s per task"
    )


def _plan(model: str, rows: dict[str, str]) -> Table:
    table = Table(title=f"Plan for {model}", show_header=False, title_justify="left")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def flops(count: float) -> str:
    return f"{count / 1e12:,.1f} TFLOP" if count < 1e15 else f"{count / 1e15:,.1f} PFLOP"


def source_table(served: Sequence[Service]) -> Table:
    """Returns how well each source of a calibration's texts is served."""
    table = _open_table(*Service.HEADINGS, title="what substitutes are worth to each source of the texts")
    table.columns[0].overflow = "fold"  # a path that is too long goes on in the next line
    for service in served:
        table.add_row(*service.cells())
    return table


def tuning_tables(recommended: Recommendation, budget: Budget) -> list[Table]:
    """Returns the trade-off, what was found for each layer, and what it costs on held-out texts."""
    curve = _open_table("", *Outcome.HEADINGS, title=f"trade-off on the texts to tune on, batch {recommended.batch}")
    for outcome in recommended.curve:
        mark = "->" if outcome == recommended.tuned else "" if budget.holds(outcome) else "over budget"
        curve.add_row(mark, *outcome.cells())
    layers = _open_table("layer", "setting", title=f"recommended, policy {recommended.policy}")
    for layer, setting in recommended.layers.items():
        layers.add_row(str(layer), str(setting))
    held_out = _open_table("", *Outcome.HEADINGS, title="on held-out texts")
    for row in recommended.held_out():
        held_out.add_row(*row)
    return [curve, layers, held_out]


def _open_table(*headings: str, title: str) -> Table:
    return Table(*headings, title=title, title_justify="left", box=box.SIMPLE)
