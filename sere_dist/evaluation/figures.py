"""KL divergence against active experts: one figure, drawn alike by the studies and by `sere-dist report`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from sere_dist.artifact.recommendation import Outcome, Recommendation

BLUE, RED, GREY, PALE_RED = "#2b6a9e", "#c0392b", "#777777", "#f6c9c3"
ORANGE, PURPLE, GREEN, BLACK = "#e08214", "#8e5ea2", "#4d9a4a", "#222222"

ACTIVE_EXPERTS = "Active experts per layer and decode step"
KL_DIVERGENCE = "KL divergence from the baseline\n(nats per token, log scale)"


class Curve(NamedTuple):
    """What one policy came to at its settings."""

    label: str
    outcomes: Sequence[Outcome]
    style: dict[str, Any]  # of matplotlib's `errorbar`


def draw_trade_off(axes: Axes, curves: Sequence[Curve], baseline: Outcome) -> None:
    """Draws each curve with its standard errors, and the baseline's active experts as a dashed line.

    The caller names the axes (`ACTIVE_EXPERTS`, `KL_DIVERGENCE`) and places the legend: several such axes may stand
    side by side.
    """
    for label, outcomes, style in curves:
        ordered = sorted(outcomes, key=lambda outcome: outcome.active_experts)
        draw_kl(axes, [(outcome.active_experts, outcome.kl, outcome.kl_error) for outcome in ordered], label, style)
    set_trade_off_axes(axes, baseline.active_experts)


def draw_kl(axes: Axes, points: Sequence[tuple[float, float, float]], label: str, style: dict[str, Any]) -> None:
    """Draws KL divergences with their standard errors: points are (place across, KL divergence, error), in order."""
    across, kl, error = ([point[place] for point in points] for place in range(3))
    look: dict[str, Any] = {"linewidth": 1.2, "markersize": 4, **style}
    axes.errorbar(across, kl, yerr=error, **look, label=label)


def set_trade_off_axes(axes: Axes, baseline: float) -> None:
    """Draws the baseline as a dashed line, and gives KL divergences a logarithmic scale."""
    axes.axvline(baseline, color=GREY, linestyle="--", linewidth=0.9)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def draw_recommendation(axes: Axes, recommended: Recommendation) -> None:
    """Draws what a tuning weighed and recommends, at the batch that it tuned for."""
    uniform = list(recommended.uniform.values())
    curves = [
        Curve("weighed, on the texts to tune on", recommended.curve, {"color": BLUE, "marker": ".", "alpha": 0.6}),
        Curve("the same S in all layers, on other texts", uniform, {"color": GREY, "marker": "s"}),
        Curve("recommended, on other texts", [recommended.at(recommended.recommended)], {"color": RED, "marker": "D"}),
    ]
    draw_trade_off(axes, curves, recommended.at(recommended.off))
