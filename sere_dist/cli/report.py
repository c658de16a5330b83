"""One self-contained HTML page about the similarities that a calibration found, for an engineer who judges them.

Shape suffix: E experts. The page is `report.html.jinja`; its pictures are PNG data URIs.
"""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from tqdm import tqdm

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import MIN_TOKENS_PER_EXPERT, Layer, LayerStatistics
from sere_dist.artifact.recommendation import Recommendation
from sere_dist.artifact.sources import Service, services
from sere_dist.evaluation.figures import ACTIVE_EXPERTS, BLUE, GREY, KL_DIVERGENCE, PALE_RED, RED, draw_recommendation
from sere_dist.files import written_whole
from sere_dist.method.similarity import method_named

PERCENTILES = 1, 99.5  # of the similarities between different experts, all layers: the ends of the colour scale
ROWS = 5  # of each of a layer's tables

# Layout of the pictures, in pixels at DPI.
DPI = 150
HEAT_MAP, STRIP, GAP = 640, 80, 16
LEFT, RIGHT, TOP, BOTTOM = 64, 128, 12, 64
COLOUR_BAR, LABEL = 18, 10

COLOURS = matplotlib.colormaps["YlGnBu"].with_extremes(bad="0.62")  # prints well; bad: the diagonal
TEXT = 7  # points


@dataclass
class Picture:
    """A PNG as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass
class Strip:
    """Bars above a heat map, one per expert; `few` marks those that got too few tokens."""

    label: str
    values_E: np.ndarray
    few_E: np.ndarray


def clustered_order(similarity_EE: torch.Tensor) -> list[int]:
    """Returns the experts in an order that puts similar ones side by side.

    Leaves of average linkage over 1 - the mean of both directions' similarity, ordered so that neighbours are alike.
    """
    if len(similarity_EE) == 1:  # no pair to link
        return [0]
    distance_EE = 1 - (similarity_EE + similarity_EE.T).double() / 2
    distance_EE = distance_EE.clamp(min=0).fill_diagonal_(0)
    return leaves_list(linkage(squareform(distance_EE.numpy()), "average", optimal_ordering=True)).tolist()


def similar_pairs(similarity_EE: torch.Tensor, count: int, directed: bool) -> list[tuple[int, int, float]]:
    """Returns the `count` most similar pairs of different experts, best first; of equal ones, the lower ids.

    A directed pair is an expert and its substitute. Otherwise each pair is named once, the lower id first.
    """
    different_EE = ~torch.eye(len(similarity_EE), dtype=torch.bool)
    pairs = (different_EE if directed else different_EE.triu()).nonzero()
    ranked = similarity_EE[tuple(pairs.T)].sort(descending=True, stable=True)
    best = ranked.indices[:count]
    return [(*pair, value) for pair, value in zip(pairs[best].tolist(), ranked.values[:count].tolist(), strict=True)]


def hardest_to_replace(similarity_EE: torch.Tensor, count: int) -> list[tuple[int, int, float]]:
    """Returns the `count` experts whose best substitute is least similar: expert, substitute, similarity."""
    best_E = similarity_EE.clone().fill_diagonal_(-torch.inf).max(dim=1)
    ranked = best_E.values.sort(stable=True)
    experts = ranked.indices[:count]
    return list(zip(experts.tolist(), best_E.indices[experts].tolist(), ranked.values[:count].tolist(), strict=True))


def write_report(artifact: Artifact, path: Path, min_tokens: int = MIN_TOKENS_PER_EXPERT) -> None:
    """Writes the page to `path` when it is whole. A file there is replaced.

    Experts that were routed fewer than `min_tokens` of the calibration's tokens are listed and marked.

    Raises:
        OSError: `path` can't be written, or is a folder; what was there is unchanged.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file for the report")
    # Before the drawing, which takes a while: a folder that can't be written is noticed at once.
    with written_whole(path) as file:
        file.write_text(_page(artifact, min_tokens), encoding="utf-8")


def _page(artifact: Artifact, min_tokens: int) -> str:
    scale = _colour_scale([layer.similarity_EE for layer in artifact.layers.values()])
    layers = artifact.layers.values()
    tokens = {layer.statistics.layer: layer.tokens_E.tolist() for layer in layers if layer.tokens_E is not None}
    few = {
        index: [expert for expert, count in enumerate(counts) if count < min_tokens] for index, counts in tokens.items()
    }
    sections = [
        _section(layer, min_tokens, scale, directed=method_named(artifact.config.method).directed)
        for layer in tqdm(layers, desc="layers", disable=None)  # None: no bar where stderr is no terminal
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        config=artifact.config,
        summary=_draw_summary(artifact, min_tokens),
        sections=sections,
        few={layer: experts for layer, experts in few.items() if experts},
        tokens_per_expert=tokens,
        min_tokens=min_tokens,
        scale=scale,
        percentiles=PERCENTILES,
        directed=method_named(artifact.config.method).directed,
        has_tokens=_has_tokens(artifact),
        has_sensitivities=_has_sensitivities(artifact),
        has_size=artifact.is_projection,
        source_headings=Service.HEADINGS,
        served=services(row for layer in layers for row in layer.sources),
        recommended=artifact.recommended,
        trade_off=_draw_trade_off(artifact.recommended) if artifact.recommended else None,
    )


def _has_tokens(artifact: Artifact) -> bool:
    """Returns whether the fewest and the median tokens of an expert are known: a method may look at none."""
    return all(row.tokens_per_expert_min is not None for row in _statistics(artifact))


def _has_sensitivities(artifact: Artifact) -> bool:
    """Returns whether it is known what an error costs in each layer: old artifacts and other methods do not say."""
    return all(row.sensitivity is not None for row in _statistics(artifact))


def _statistics(artifact: Artifact) -> list[LayerStatistics]:
    return [layer.statistics for layer in artifact.layers.values()]


def _section(layer: Layer, min_tokens: int, scale: tuple[float, float], directed: bool) -> dict[str, Any]:
    """Returns what the template shows of one layer."""
    strips = []
    if layer.tokens_E is not None:
        tokens_E = layer.tokens_E.numpy()
        strips.append(Strip(f"tokens,\n0 to {tokens_E.max():,}", tokens_E, tokens_E < min_tokens))
    if layer.size_E is not None:
        size_E = layer.size_E.numpy()
        strips.append(Strip(f"size,\n0 to {size_E.max():.2f}", size_E, np.zeros(len(size_E), dtype=bool)))
    order = clustered_order(layer.similarity_EE)
    return {
        "row": layer.statistics,
        "sources": layer.sources,
        "order": order,
        "picture": _draw_layer(layer.similarity_EE, order, strips, scale, directed),
        "pairs": similar_pairs(layer.similarity_EE, ROWS, directed),
        "hardest": hardest_to_replace(layer.similarity_EE, ROWS),
        "tokens": None if layer.tokens_E is None else layer.tokens_E.tolist(),
        "coefficient": layer.coefficient_EE,
    }


def _colour_scale(matrices: list[torch.Tensor]) -> tuple[float, float]:
    """Returns the similarities at the ends of the colour scale: a few extreme pairs must not blanch all others."""
    different = [matrix[~torch.eye(len(matrix), dtype=torch.bool)] for matrix in matrices]
    low, high = np.percentile(torch.cat(different).numpy(), PERCENTILES).tolist()
    return (low, high) if low < high else (0.0, 1.0)  # all alike: nothing to resolve


def _draw_layer(
    similarity_EE: torch.Tensor, order: list[int], strips: list[Strip], scale: tuple[float, float], directed: bool
) -> Picture:
    """Draws a layer's heat map in this order, its strips above it."""
    num_experts = len(order)
    cell = max(1, round(HEAT_MAP / num_experts))  # whole pixels: every expert's row is as wide as the next
    side = cell * num_experts
    width, height = LEFT + side + RIGHT, BOTTOM + side + len(strips) * (GAP + STRIP) + TOP
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def place(left: int, bottom: int, wide: int, high: int) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    ordered_EE = similarity_EE[order][:, order].clone().fill_diagonal_(torch.nan)
    axes = place(LEFT, BOTTOM, side, side)
    image = axes.imshow(ordered_EE, COLOURS, aspect="auto", interpolation="nearest", vmin=scale[0], vmax=scale[1])
    every = -(-LABEL // cell)
    names = [str(expert) for expert in order[::every]]
    axes.set_xticks(range(0, num_experts, every), names, rotation=90)
    axes.set_yticks(range(0, num_experts, every), names)
    axes.tick_params(labelsize=min(TEXT, 0.95 * every * cell * 72 / DPI), length=2, pad=1.5, width=0.5)
    axes.set_xlabel("substitute" if directed else "expert", fontsize=TEXT)
    axes.set_ylabel("expert that is replaced" if directed else "expert", fontsize=TEXT)

    bar = figure.colorbar(image, cax=place(LEFT + side + GAP, BOTTOM, COLOUR_BAR, side), extend="both")
    bar.ax.tick_params(labelsize=TEXT, length=2, width=0.5)
    bar.set_label("similarity", fontsize=TEXT)

    for above, strip in enumerate(strips):
        bars = place(LEFT, BOTTOM + side + GAP + above * (STRIP + GAP), side, STRIP)
        values_E, few_E = strip.values_E[order], strip.few_E[order]
        edges = np.arange(num_experts + 1) - 0.5
        highest = float(values_E.max()) or 1.0  # 1: an axis needs some height
        bars.stairs(np.where(few_E, highest, 0), edges, fill=True, color=PALE_RED)  # an empty bar is seen too
        bars.stairs(np.where(few_E, 0, values_E), edges, fill=True, color=BLUE)
        bars.stairs(np.where(few_E, values_E, 0), edges, fill=True, color=RED)
        bars.set(xlim=(edges[0], edges[-1]), ylim=(0, highest), xticks=[], yticks=[])
        bars.text(1 + GAP / side, 0.5, strip.label, fontsize=TEXT, va="center", transform=bars.transAxes)
        bars.spines[["top", "right", "left"]].set_visible(False)
    for drawn in figure.axes:
        drawn.spines[:].set_linewidth(0.5)
    return _picture(figure)


def _draw_summary(artifact: Artifact, min_tokens: int) -> Picture:
    """Draws the layers side by side: similarities, and below them tokens and sensitivities if there."""
    rows = _statistics(artifact)
    layers = [row.layer for row in rows]
    has_tokens, has_sensitivities = _has_tokens(artifact), _has_sensitivities(artifact)
    num_panels = 1 + has_tokens + has_sensitivities
    figure = Figure(figsize=(8, 2.1 * num_panels + 0.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(num_panels, sharex=True, squeeze=False)[:, 0]

    lowest, highest = [row.similarity_min for row in rows], [row.similarity_max for row in rows]
    panels[0].fill_between(layers, lowest, highest, color=BLUE, alpha=0.15, linewidth=0)
    panels[0].plot(layers, highest, "^-", color=BLUE, alpha=0.6, label="max")
    panels[0].plot(layers, [row.similarity_mean for row in rows], "o-", color=BLUE, label="mean")
    panels[0].plot(layers, lowest, "v-", color=BLUE, alpha=0.6, label="min")
    panels[0].set_ylabel("similarity of\ndifferent experts", fontsize=TEXT)

    if has_tokens:
        medians = [row.tokens_per_expert_median or 0.0 for row in rows]
        fewest = [row.tokens_per_expert_min for row in rows]
        panels[1].plot(layers, medians, "o-", color=GREY, label="median")
        panels[1].plot(layers, fewest, "v-", color=BLUE, label="fewest")
        panels[1].axhline(min_tokens, color=RED, linestyle="--", linewidth=0.8, label=f"floor: {min_tokens}")
        panels[1].set_yscale("symlog", linthresh=1)  # logarithmic, with a place for 0
        panels[1].yaxis.set_major_formatter(ScalarFormatter())
        panels[1].set_ylim(-0.2, 2 * max(*medians, min_tokens))
        panels[1].set_ylabel("tokens per expert", fontsize=TEXT)
    if has_sensitivities:
        costs, errors = [row.sensitivity for row in rows], [row.sensitivity_error or 0.0 for row in rows]
        panels[-1].errorbar(layers, costs, errors, fmt="o-", color=BLUE, label="sensitivity")
        panels[-1].axhline(1, color=GREY, linestyle="--", linewidth=0.8, label="mean")
        panels[-1].set_ylim(bottom=0)
        panels[-1].set_ylabel("what an error costs,\nrelative to the mean", fontsize=TEXT)

    for panel in panels:
        for line in panel.lines:
            line.set(markersize=2.5, linewidth=0.9)
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.tick_params(labelsize=TEXT, labelbottom=True)
        panel.legend(fontsize=TEXT, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=30, steps=[1, 2, 5, 10], integer=True))
    panels[-1].set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    panels[-1].set_xlabel("decoder layer", fontsize=TEXT)
    return _picture(figure)


def _draw_trade_off(recommended: Recommendation) -> Picture:
    """Draws KL divergence against active experts, at the batch that was tuned for."""
    figure = Figure(figsize=(8, 3.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    draw_recommendation(axes, recommended)
    axes.set_ylabel(KL_DIVERGENCE, fontsize=TEXT)
    axes.set_xlabel(f"{ACTIVE_EXPERTS}, batch {recommended.batch} (dashed: the baseline)", fontsize=TEXT)
    axes.tick_params(labelsize=TEXT)
    axes.legend(fontsize=TEXT, frameon=False)
    return _picture(figure)


def _picture(figure: Figure) -> Picture:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=DPI, metadata={"Software": None})
    width, height = figure.canvas.get_width_height()
    return Picture("data:image/png;base64," + base64.b64encode(written.getvalue()).decode(), width, height)
