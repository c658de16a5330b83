"""What re-routing saves between the ranks of expert parallelism, and what it costs in quality.

    python -m studies.traffic           # 10 minutes on 2 cores; calibrates into build/studies if nothing is there
    python -m studies.traffic --quick   # the same on a handful of texts: that it runs, not what comes out

Real routing: the example model decodes held-out texts in lockstep batches, by the protocol of
`sere_dist.evaluation.protocol`, as if its experts were on 2 to 16 ranks. Row b of a batch has its home on rank b mod R;
the primary set is the whole batch's; the prompt is not re-routed. Policies: off; the paper's (frobenius); dropping the
slots of experts that are not primary; projection at a traffic price. Experts are placed linearly, or as
`sere-dist place` proposes from the calibration. Prices are chosen on the half of the held-out texts that is there for
choices.

Synthetic routing: at the shapes of Qwen3-30B-A3B and DeepSeek-V3 (without its group limit), with experts all equally
popular, or the n-th most popular one in proportion to 1/sqrt(n). Router weights, similarities and sizes are the example
model's, drawn independently. That says what tokens would send, and nothing of quality.

Errors are standard errors over texts, of differences by pairs. Prints tables and one JSON line last; writes
`studies/results/traffic.json` and `docs/traffic.png`.
"""

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from rich import box
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from examples.tiny_moe.data import HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.placement import propose
from sere_dist.console import progress, tables
from sere_dist.evaluation.figures import BLUE, GREEN, GREY, ORANGE, RED
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult, Rerouter, Routed, lockstep, unchanged
from sere_dist.evaluation.outcome import outcome_of
from sere_dist.evaluation.protocol import BATCH, LENGTH, PROMPT, TEXTS, decoded, held_out_texts
from sere_dist.evaluation.rerouters import paper_rerouter, projection_rerouter
from sere_dist.evaluation.rivals import dropping_rerouter
from sere_dist.evaluation.traffic import Layout, Traffic, recorded, traffic, uniform_domains
from sere_dist.method.counters import dispatch_bytes
from sere_dist.method.placement import linear_ranks
from sere_dist.method.records import LayerTables, Settings
from sere_dist.method.similarity import random_similarity
from sere_dist.moe import load_model
from sere_dist.provenance import line_by_line, machine, rounded, versions
from sere_dist.standard_errors import difference_with_error, ratio_with_error, with_error
from studies.artifacts import ARTIFACTS, calibrated
from studies.common import RESULTS, ROOT

GOAL_RANKS = 8
SHAPES = {"Qwen3-30B-A3B": (128, 2048), "DeepSeek-V3": (256, 7168)}  # experts, hidden size; both top-8, as the example
TOLERANCE = 0.01  # of the closed form of C_T
COLORS = {
    "off": GREY,
    "paper": RED,
    "dropping": GREEN,
    "dropping, weights renormalised": ORANGE,
    "projection": BLUE,
}
LINEAR, PLACED, BY_SIMILARITY = "linear", "placed", "placed by similarity"
STYLES: dict[str, dict[str, Any]] = {
    LINEAR: {"fmt": "o-"},
    PLACED: {"fmt": "s-", "markerfacecolor": "white"},
    BY_SIMILARITY: {"fmt": "^:", "markerfacecolor": "white"},
}


@dataclass(frozen=True)
class Size:
    """How much is measured. The goal is on 8 ranks, in batches of `goal_batch`: at more prices."""

    texts: int = TEXTS
    length: int = LENGTH
    prompt: int = PROMPT
    batches: tuple[int, ...] = (4, 16, 64)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    prices: tuple[float, ...] = (0.0, 0.0025, 0.01, 0.05)
    goal_batch: int = BATCH
    goal_prices: tuple[float, ...] = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.05)
    synthetic_rows: int = 64
    synthetic_steps: int = 128


QUICK = Size(
    texts=8,
    length=48,
    batches=(4, 8),
    ranks=(4, 8),
    prices=(0.0, 0.05),
    goal_batch=8,
    goal_prices=(0.0, 0.05),
    synthetic_steps=64,
)


class Setting(NamedTuple):
    """A policy; the price is that of projection."""

    policy: str
    price: float | None = None

    def __str__(self) -> str:
        return self.policy if self.price is None else f"{self.policy}, price {self.price:g}"


OFF, PAPER, DROPPING, RENORMALISED = map(Setting, ("off", "paper", "dropping", "dropping, weights renormalised"))
FIXED = (OFF, PAPER, DROPPING, RENORMALISED)  # what they run does not depend on where experts are


class Place(NamedTuple):
    """On how many ranks, and how experts are placed on them."""

    ranks: int
    placement: str


@dataclass(frozen=True)
class Point:
    """What one setting came to in one place."""

    result: LockstepResult
    traffic: Traffic

    def __add__(self, other: "Point") -> "Point":
        return Point(self.result + other.result, self.traffic + other.traffic)


Points = dict[tuple[int, Place, Setting], Point]  # by batch, place and setting


@dataclass(frozen=True)
class Bench:
    """What was calibrated of the example model, and where its experts are said to be."""

    frobenius: Artifact
    projection: Artifact
    layouts: dict[Place, Layout]
    size: Size
    select_top_k: int

    def policy(self, setting: Setting, place: Place) -> Rerouter:
        if setting == OFF:
            return unchanged
        if setting == PAPER:
            return paper_rerouter(self.frobenius.tables, Settings(self.select_top_k))
        if setting.price is None:
            num_experts = self.projection.config.num_experts
            return dropping_rerouter(num_experts, self.select_top_k, renormalise=setting == RENORMALISED)
        settings = Settings(self.select_top_k, traffic_price=setting.price)
        return projection_rerouter(self.projection.tables, settings, self.layouts[place])

    def is_goal(self, batch: int, place: Place) -> bool:
        return batch == self.size.goal_batch and place.ranks == GOAL_RANKS

    def jobs(self, goal_only: bool) -> Iterator[tuple[int, Setting, list[Place]]]:
        """Yields batch, setting, and the places where it is measured: all that it does the same in."""
        for batch in self.size.batches:
            goal = [place for place in self.layouts if self.is_goal(batch, place)]
            others = [place for place in self.layouts if place not in goal and place.placement != BY_SIMILARITY]
            places = goal if goal_only else goal + others
            if not places:
                continue
            for setting in (*FIXED, Setting("projection", 0.0)):
                yield batch, setting, places
            for place in places:
                for price in (self.size.goal_prices if place in goal else self.size.prices)[1:]:
                    yield batch, Setting("projection", price), [place]

    def decode(self, texts: HeldOut, batch: int, setting: Setting, places: list[Place]) -> Points:
        """Decodes texts in batches, and measures them in all places."""
        points: Points = {}
        policy = self.policy(setting, places[0])
        for part_BL, reference in zip(texts.ids_NL.split(batch), texts.reference_NDV.split(batch), strict=True):
            ids: dict[int, torch.Tensor] = {}
            settings = {"prompt_length": texts.prompt_length, "reference_BDV": reference}
            result = lockstep(texts.model, part_BL, rerouter=recorded(policy, ids), **settings)
            for place in places:
                point, key = Point(result, traffic(ids, self.layouts[place])), (batch, place, setting)
                points[key] = points[key] + point if key in points else point
        return points

    def measure(self, texts: HeldOut, what: str, goal_only: bool = False) -> Points:
        """Decodes the texts under every setting in every place, or only where the goal is."""
        points: Points = {}
        for batch, setting, places in track(list(self.jobs(goal_only)), what, console=progress()):
            points |= self.decode(texts, batch, setting, places)
        return points


def layouts(artifact: Artifact, ranks: tuple[int, ...]) -> dict[Place, Layout]:
    """Returns where experts are, linearly and as proposed; on 8 ranks also by what an older artifact would know."""
    found = {}
    for num_ranks in ranks:
        linear = linear_ranks(artifact.config.num_experts, num_ranks)
        found[Place(num_ranks, LINEAR)] = Layout(num_ranks, dict.fromkeys(artifact.layers, linear))
        proposed = {PLACED: propose(artifact, num_ranks)}
        if num_ranks == GOAL_RANKS and proposed[PLACED].affinity != "similarity":
            proposed[BY_SIMILARITY] = propose(artifact, num_ranks, affinity="similarity")
        for name, placement in proposed.items():
            rank = {layer: placement.ranks(layer) for layer in placement.layers}
            found[Place(num_ranks, name)] = Layout(num_ranks, rank)
    return found


def sent(of: Traffic, num_ranks: int, hidden_size: int) -> dict[str, float]:
    """Returns the means of all measures, and the bytes that a token sends and receives in a layer."""
    means = {name: statistics.fmean(values) for name, values in vars(of).items()}
    shape = {"num_ranks": num_ranks, "hidden_size": hidden_size, "element_size": torch.bfloat16.itemsize}
    sizes = dispatch_bytes(1, means["remote_domains"], means["remote_slots"], **shape)
    return means | {f"{kind}_bytes": size for kind, size in sizes.items()}


def rows_of(points: Points, hidden_size: int) -> list[dict[str, Any]]:
    rows = []
    for (batch, place, setting), point in points.items():
        _, remote_error = with_error(point.traffic.remote_domains)
        found = sent(point.traffic, place.ranks, hidden_size) | {"remote_domains_error": remote_error}
        outcome = outcome_of(point.result, points[batch, place, OFF].result, batch)
        about = {**place._asdict(), **setting._asdict(), "texts": len(point.result.losses)}
        rows.append(about | outcome.model_dump() | {name: rounded(value) for name, value in found.items()})
    return rows


def choose(points: Points, batch: int, place: Place, baseline: Setting) -> Setting:
    """Returns projection at the highest price that costs no more quality than the baseline; if all do, at price 0."""
    most = points[batch, place, baseline].result.divergence
    candidates = [key[2] for key in points if key[:2] == (batch, place) and key[2].price is not None]
    good = [setting for setting in candidates if points[batch, place, setting].result.divergence <= most]
    return max(good, key=lambda setting: setting.price, default=Setting("projection", 0.0))


def compare(points: Points, batch: int, place: Place, setting: Setting, baseline: Setting) -> dict[str, Any]:
    """Returns what a setting saves of the baseline's remote domains under linear placement, and its quality."""
    ours, theirs = points[batch, place, setting], points[batch, Place(place.ranks, LINEAR), baseline]
    left, error = ratio_with_error(ours.traffic.remote_domains, theirs.traffic.remote_domains)
    of_texts = ours.result.divergence_of_texts, theirs.result.divergence_of_texts
    difference, difference_error = difference_with_error(*of_texts)
    found = {
        "fewer_remote_domains": 1 - left,
        "error": error,
        "kl_difference": difference,
        "kl_difference_error": difference_error,
        "active_experts": statistics.fmean(ours.traffic.active_experts),
        "active_experts_of_baseline": statistics.fmean(theirs.traffic.active_experts),
    }
    about = {"baseline": baseline.policy, "placement": place.placement, "price": setting.price}
    return about | {name: rounded(value) for name, value in found.items()}


def router_weights(texts: HeldOut) -> torch.Tensor:
    """Returns float32 [N, K], falling: the weights that the model's routers gave tokens of all layers."""
    seen: list[torch.Tensor] = []

    def look(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
        seen.append(weights_DBK.flatten(0, 1))
        return weights_DBK, ids_DBK

    texts.run(look, len(texts.ids_NL))
    return torch.cat(seen).sort(dim=1, descending=True).values


def synthetic_routing(
    popularity_E: torch.Tensor, weights_NK: torch.Tensor, size: Size, random: torch.Generator
) -> Routed:
    """Returns decode steps [D, B, K] whose tokens draw experts by popularity, and router weights by chance."""
    shape = size.synthetic_steps, size.synthetic_rows
    # The largest of log popularity with Gumbel noise: drawn one after the other, without putting back.
    noise_DBE = -torch.empty(*shape, len(popularity_E)).exponential_(generator=random).log()
    ids_DBK = (popularity_E.log() + noise_DBE).topk(weights_NK.shape[1], dim=2).indices
    return weights_NK[torch.randint(len(weights_NK), shape, generator=random)], ids_DBK


def synthetic(bench: Bench, weights_NK: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Yields what synthetic routing sends, by shape, popularity, ranks and setting.

    Raises:
        SystemExit: uniform routing does not visit as many domains as the closed form says.
    """
    random, keep_s = torch.Generator().manual_seed(0), bench.select_top_k
    different = ~torch.eye(bench.projection.config.num_experts, dtype=torch.bool)
    known = bench.projection.tables.values()
    similarities = torch.cat([tables.similarity_EE[different] for tables in known])
    sizes = torch.cat([tables.size_E for tables in known if tables.size_E is not None])
    for (name, (num_experts, hidden_size)), skewed in itertools.product(SHAPES.items(), (False, True)):
        drawn = similarities[torch.randint(len(similarities), (num_experts, num_experts), generator=random)]
        size_E = sizes[torch.randint(len(sizes), (num_experts,), generator=random)]
        popularity_E = torch.arange(1.0, num_experts + 1).rsqrt()[torch.randperm(num_experts, generator=random)]
        steps = synthetic_routing(popularity_E if skewed else torch.ones(num_experts), weights_NK, bench.size, random)
        for num_ranks in bench.size.ranks:
            layout = Layout(num_ranks, {0: linear_ranks(num_experts, num_ranks)})
            tables = {0: LayerTables(drawn, drawn.sqrt(), size_E)}
            random_tables = {0: LayerTables(random_similarity(num_experts, seed=0))}
            policies = {
                OFF: unchanged,
                PAPER: paper_rerouter(random_tables, Settings(keep_s)),
                DROPPING: dropping_rerouter(num_experts, keep_s),
                **{
                    Setting("projection", price): projection_rerouter(
                        tables, Settings(keep_s, traffic_price=price), layout
                    )
                    for price in bench.size.goal_prices
                },
            }
            for setting, policy in policies.items():
                about = {"shape": name, "skewed": skewed, "ranks": num_ranks, **setting._asdict()}
                found = sent(traffic({0: policy(0, *steps, None)[1]}, layout), num_ranks, hidden_size)
                if setting == OFF and not skewed:
                    expected = uniform_domains(num_experts, weights_NK.shape[1], num_ranks)
                    if abs(found["domains"] / expected - 1) > TOLERANCE:
                        raise SystemExit(f"{about}: C_T {found['domains']:.3f}, closed form {expected:.3f}")
                    found["closed_form_domains"] = expected
                yield about | {measure: rounded(value) for measure, value in found.items()}


def groupby(rows: list[dict[str, Any]], names: tuple[str, ...]) -> dict[tuple, list[dict[str, Any]]]:
    """Returns the rows that share the values of these names, in order."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def domains_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Returns a table of points or of synthetic routing; KB are those that a token sends and receives in a layer."""
    has_quality = "kl" in rows[0]
    columns = [
        "policy",
        "C_T",
        "remote\ndomains",
        "remote\nslots",
        "KB per rank,\nper slot",
        "active experts,\nlargest rank",
    ]
    columns += ["KL, nats\na token", "perplexity"] if has_quality else []
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE)
    for i, row in enumerate(rows):
        error = f" ±{row['remote_domains_error']:.2f}" if has_quality else ""
        cells = [
            str(Setting(row["policy"], row["price"])),
            f"{row['domains']:.2f}",
            f"{row['remote_domains']:.2f}{error}",
        ]
        cells += [f"{row['remote_slots']:.2f}", f"{row['per_rank_bytes'] / 1e3:.2f}, {row['per_slot_bytes'] / 1e3:.2f}"]
        cells += [f"{row['active_experts']:.1f}, {row['largest_rank']:.2f}"]
        if has_quality:
            cells += [f"{abs(row['kl']):.4f} ±{row['kl_error']:.4f}", f"{row['perplexity']:.2f}"]
            if row["placement"] != LINEAR and row["placement"] != rows[i - 1]["placement"]:
                table.add_section()
                table.add_row(f"{row['placement']}:")
        table.add_row(*cells)
    return table


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws remote domains against KL: projection along its prices, the other policies as points."""
    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    of_linear = {(row["policy"], row["price"]): row for row in rows if row["placement"] == LINEAR}
    for (placement, policy), points in groupby(rows, ("placement", "policy")).items():
        if placement == BY_SIMILARITY and policy != "projection":
            continue
        axes.errorbar(
            [row["remote_domains"] for row in points],
            [row["kl"] for row in points],
            xerr=[row["remote_domains_error"] for row in points],
            yerr=[row["kl_error"] for row in points],
            color=COLORS[policy],
            markersize=5,
            label=placement if policy == "projection" else None,
            **STYLES[placement],
        )
    for (policy, price), row in of_linear.items():
        place = (row["remote_domains"], row["kl"])
        label = f"{price:g}" if price else str(Setting(policy, price))
        offset: dict[str, Any] = {"xytext": (5, 5), "ha": "left"} if price else {"xytext": (0, 8), "ha": "center"}
        axes.annotate(label, place, textcoords="offset points", fontsize=7, color=COLORS[policy], **offset)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("Remote ranks that a token visits per layer")
    axes.set_ylabel("KL divergence from the baseline (nats per token)")
    axes.margins(0.08, 0.12)
    axes.grid(alpha=0.3)
    axes.legend(title="experts", fontsize=8, title_fontsize=8)
    figure.savefig(path)


def main(
    artifacts: Annotated[
        Path, typer.Option(help="Folder with the artifacts frobenius and projection of the example model.")
    ] = ARTIFACTS,
    select_top_k: Annotated[int, typer.Option(help="S, the slots that a token keeps.")] = 2,
    results: Annotated[Path, typer.Option(help="File for the JSON.")] = RESULTS / "traffic.json",
    picture: Annotated[Path, typer.Option(help="File for the figure.")] = ROOT / "docs/traffic.png",
    quick: Annotated[bool, typer.Option("--quick", help="Measure a handful of texts.")] = False,
) -> None:
    started, size, console = time.perf_counter(), QUICK if quick else Size(), tables()
    frobenius, projection = (Artifact.load(calibrated(method, artifacts)) for method in ("frobenius", "projection"))
    where = layouts(projection, size.ranks)
    bench = Bench(frobenius, projection, where, size, select_top_k)
    goal_places = [place for place in where if place.ranks == GOAL_RANKS]

    model, tokenizer = load_model(str(MODEL), "cpu"), AutoTokenizer.from_pretrained(MODEL)
    choice_texts, final_texts = (
        decoded(model, held_out_texts(HELDOUT, tokenizer, half=half, count=size.texts, length=size.length), size.prompt)
        for half in ("choice", "final")
    )
    choice = bench.measure(choice_texts, "choosing prices", goal_only=True)
    points = bench.measure(final_texts, "held-out text")
    rows = rows_of(points, projection.config.hidden_size)
    order = list(where)
    rows.sort(key=lambda row: (row["batch"], order.index(Place(row["ranks"], row["placement"]))))
    goals = [
        compare(points, size.goal_batch, place, choose(choice, size.goal_batch, place, baseline), baseline)
        for baseline in (PAPER, DROPPING)
        for place in goal_places
    ]
    made_up = list(synthetic(bench, router_weights(choice_texts)))

    for (batch, num_ranks), here in groupby(rows, ("batch", "ranks")).items():
        title = f"held-out text, batch {batch}, {num_ranks} ranks, S = {select_top_k}, {here[0]['texts']} texts; "
        title += f"all-gather sends {here[0]['all_gather_bytes'] / 1e3:.2f} KB a token whatever runs"
        console.print(domains_table(title, here))
    for (shape, skewed, num_ranks), here in groupby(made_up, ("shape", "skewed", "ranks")).items():
        title = f"{shape}, {'skewed' if skewed else 'uniform'} routing, batch {size.synthetic_rows}, {num_ranks} ranks"
        closed_form = here[0].get("closed_form_domains")
        title += f"; C_T off, closed form: {closed_form:.2f}" if closed_form else ""
        console.print(domains_table(title, here))
    table = Table("no more KL than", "placement", "price", "fewer remote domains", "KL less the baseline's")
    for goal in goals:
        fewer = f"{100 * goal['fewer_remote_domains']:.1f} ±{100 * goal['error']:.1f} %"
        kl = f"{goal['kl_difference']:.4f} ±{goal['kl_difference_error']:.4f}"
        table.add_row(goal["baseline"], goal["placement"], f"{goal['price']:g}", fewer, kl)
    table.title = f"goal: batch {size.goal_batch}, {GOAL_RANKS} ranks, S = {select_top_k}, baseline linear"
    console.print(table)

    title = f"S = {select_top_k}, batch {size.goal_batch}, {GOAL_RANKS} ranks; projection's traffic price at its points"
    batch_rows = [row for row in rows if (row["batch"], row["ranks"]) == (size.goal_batch, GOAL_RANKS)]
    draw(batch_rows, title, picture)
    report = {
        "command": "python -m studies.traffic" + " --quick" * quick,
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions("sere-dist", "torch", "transformers"),
        "seconds": round(time.perf_counter() - started),
        "select_top_k": select_top_k,
        "size": asdict(size),
        "goals": goals,
        "points": rows,
        "synthetic": made_up,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(line_by_line(report))
    print(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
