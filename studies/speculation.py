"""Study of speculative decoding: how much the rows that verify drafts should say about which experts run.

    python -m studies.speculation          # 26 minutes on 2 busy cores; calibrates into build/studies if need be
    python -m studies.speculation --draw   # only the picture, from the JSON

A step verifies k drafted tokens of each request beside its last token, and the output of most drafted rows is thrown
away. The texts, their cut and the calibrations are the protocol's, and the drafts are real: greedy ones of the
example's draft model. The example model is teacher-forced, so a draft is accepted as far as it is the text. For a text
that a model sampled, that is what rejection sampling does with greedy drafts.

Rows attend to what they would see in serving, so one forward pass holds all steps: behind each text stand its rejected
drafts. KL divergences are means over the rows whose output is used. Chances are measured on the half of the held-out
texts on which choices may be made. Writes `studies/results/speculation.json` and `docs/speculation.png`.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedModel

from examples.tiny_moe.data import DRAFT, HELDOUT, MODEL
from sere_dist.artifact.folder import Artifact
from sere_dist.console import progress, tables
from sere_dist.evaluation.figures import ACTIVE_EXPERTS, KL_DIVERGENCE, draw_kl, set_trade_off_axes
from sere_dist.evaluation.lockstep import active_by_step
from sere_dist.evaluation.protocol import PROMPT, Half, held_out_texts
from sere_dist.method.projection import reroute_projection
from sere_dist.method.records import LayerTables, Settings, Step
from sere_dist.method.rerouting import primary_experts, replace_experts, substitutes
from sere_dist.method.slots import fill_dropped
from sere_dist.moe import Routing, hooked_routing, load_model
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.standard_errors import with_error
from studies.artifacts import calibrated
from studies.common import RESULTS, ROOT

LENGTHS, BATCHES = (1, 3), (4, 16)
KEEPS, PRICES = (1, 2, 3, 4), (0.005, 0.01, 0.02, 0.04, 0.08)
STOCK, PAPER, EQUAL, CHANCE, CLAIMS = "stock", "paper", "price, rows equal", "price, by chance", "and no claims"
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    PAPER: ("SERE, the paper's policy", {"color": "tab:red", "marker": "o"}),
    EQUAL: ("expert_price, all rows equal", {"color": "tab:gray", "marker": "s"}),
    CHANCE: ("expert_price, rows by their chance (ours)", {"color": "black", "marker": "*", "markersize": 8}),
    CLAIMS: ("the same, and drafts keep no expert", {"color": "tab:blue", "marker": "v", "linestyle": ":"}),
}


class Turn(NamedTuple):
    """One verification step of one text."""

    start: int  # position of the token that is known
    drafts: tuple[int, ...]
    accepted: int


@torch.inference_mode()
def turns_of(drafter: PreTrainedModel, ids_NL: torch.Tensor, k: int) -> list[list[Turn]]:
    """Returns the verification steps of each text, from its prompt's end on, with greedy drafts of k tokens."""
    num_texts, length = ids_NL.shape
    texts, positions = torch.arange(num_texts), torch.full((num_texts,), PROMPT)
    found: list[list[Turn]] = [[] for _ in range(num_texts)]
    while True:
        live = positions + k < length - 1  # every row has a next token
        if not live.any():
            return found
        context, drafts = F.pad(ids_NL, (0, k)), []
        for place in range(k):
            logits_NV = drafter(context).logits[texts, (positions + place).clamp(max=length - 1)]
            drafts.append(logits_NV.argmax(dim=1))
            context[texts, (positions + place + 1).clamp(max=length + k - 1)] = drafts[-1]
        for text in live.nonzero().flatten().tolist():
            start, mine = int(positions[text]), tuple(int(draft[text]) for draft in drafts)
            is_next = [draft == token for draft, token in zip(mine, ids_NL[text, start + 1 :].tolist(), strict=False)]
            accepted = (*is_next, False).index(False)
            found[text].append(Turn(start, mine, accepted))
            positions[text] = start + accepted + 1
        positions[~live] = length


@dataclass(frozen=True)
class Batch:
    """Texts that are verified together, laid out for one forward pass.

    Shape suffixes: B texts, F places (those of a text, then its rejected drafts), S steps, R = k + 1 rows of a text.
    """

    ids_BF: torch.Tensor
    positions_BF: torch.Tensor
    sees_BFF: torch.Tensor  # bool: what each place attends to
    rows_BSR: torch.Tensor  # the places of each step's rows
    used_BSR: torch.Tensor  # bool: rows whose output is used


def lay_out(ids_BL: torch.Tensor, turns: Sequence[Sequence[Turn]]) -> Batch:
    """Lays out the steps that all texts take part in."""
    steps, length = min(map(len, turns)), ids_BL.shape[1]
    texts = []
    for ids, mine in zip(ids_BL, turns, strict=True):
        flat, positions, rows = ids.tolist(), list(range(length)), []
        sees = [list(range(place + 1)) for place in range(length)]
        for turn in mine[:steps]:
            accepted = list(range(turn.start, turn.start + turn.accepted + 1))
            rejected: list[int] = []
            for place in range(turn.accepted, len(turn.drafts)):
                rejected.append(len(flat))
                flat.append(turn.drafts[place])
                positions.append(turn.start + place + 1)
                sees.append([*range(accepted[-1] + 1), *rejected])
            rows.append(accepted + rejected)
        texts.append((flat, positions, sees, rows))
    most = max(len(flat) for flat, *_ in texts)
    ids_BF, positions_BF = torch.zeros(2, len(texts), most, dtype=torch.long)
    sees_BFF = torch.eye(most, dtype=torch.bool).repeat(len(texts), 1, 1)
    for text, (flat, positions, sees, _) in enumerate(texts):
        ids_BF[text, : len(flat)], positions_BF[text, : len(flat)] = torch.tensor(flat), torch.tensor(positions)
        for place, seen in enumerate(sees):
            sees_BFF[text, place, seen] = True
    rows_BSR = torch.tensor([rows for *_, rows in texts])
    return Batch(ids_BF, positions_BF, sees_BFF, rows_BSR, rows_BSR < length)


# (layer, weights_SNK, ids_SNK, place of each row in its draft [N]) -> the first two of what runs; N = B R rows.
Rule = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@torch.inference_mode()
def verify(model: PreTrainedModel, batch: Batch, rule: Rule) -> tuple[torch.Tensor, float]:
    """Returns the logits [B, S, R, V] of the steps' rows, and the active experts per layer and step."""
    num_texts, num_places = batch.ids_BF.shape
    _, steps, width = batch.rows_BSR.shape
    place_N, texts_B11 = torch.arange(width).repeat(num_texts), torch.arange(num_texts)[:, None, None]
    active: list[int] = []

    def route(layer: int, routing: Routing, _scores: torch.Tensor | None) -> Routing:
        hidden_states, *index_and_weights = routing
        ids_BFK, weights_BFK = (each.view(num_texts, num_places, -1).clone() for each in index_and_weights)
        ids_SNK, weights_SNK = (
            each[texts_B11, batch.rows_BSR].transpose(0, 1).flatten(1, 2) for each in (ids_BFK, weights_BFK)
        )
        new_weights_SNK, new_ids_SNK = rule(layer, weights_SNK, ids_SNK, place_N)
        active.append(int(active_by_step(new_ids_SNK, model.config.num_experts).sum()))
        before = Step(weights_SNK.flatten(0, 1), ids_SNK.flatten(0, 1))
        run_ids_SNK = fill_dropped(before, new_ids_SNK.flatten(0, 1)).view_as(ids_SNK)
        for each_BFK, new_SNK in ((ids_BFK, run_ids_SNK), (weights_BFK, new_weights_SNK)):
            each_BFK[texts_B11, batch.rows_BSR] = new_SNK.view(steps, num_texts, width, -1).transpose(0, 1)
        return hidden_states, ids_BFK.flatten(0, 1), weights_BFK.flatten(0, 1)

    mask_BFF = torch.zeros(batch.sees_BFF.shape).masked_fill(~batch.sees_BFF, torch.finfo(torch.float32).min)
    with hooked_routing(model, route):
        logits = model(batch.ids_BF, attention_mask=mask_BFF[:, None], position_ids=batch.positions_BF).logits
    return logits[texts_B11, batch.rows_BSR].float(), sum(active) / len(active) / steps


def stock(_layer: int, weights_SNK: torch.Tensor, ids_SNK: torch.Tensor, _place_N: torch.Tensor):
    return weights_SNK, ids_SNK


def paper(similarities: Mapping[int, LayerTables], select_top_k: float) -> Rule:
    """The paper's policy: every row keeps its S heaviest experts."""

    def rule(layer: int, weights_SNK: torch.Tensor, ids_SNK: torch.Tensor, _place_N: torch.Tensor):
        similarity_EE = similarities[layer].similarity_EE

        def step(weights_NK: torch.Tensor, ids_NK: torch.Tensor):
            primary_E = primary_experts(weights_NK, ids_NK, len(similarity_EE), int(select_top_k))
            return weights_NK, replace_experts(ids_NK, substitutes(similarity_EE, primary_E))

        return torch.vmap(step)(weights_SNK, ids_SNK)

    return rule


def priced(
    projections: Mapping[int, LayerTables],
    price: float,
    chance_R: torch.Tensor | None = None,
    drafts_claim: bool = True,
) -> Rule:
    """Policy projection at S = 1.

    Args:
        chance_R: the chance that the row at each place of a draft is used. None: all rows count as much.
        drafts_claim: whether a drafted row, too, keeps its heaviest expert.
    """
    settings = Settings(1, expert_price=price)

    def rule(layer: int, weights_SNK: torch.Tensor, ids_SNK: torch.Tensor, place_N: torch.Tensor):
        chance_N = None if chance_R is None else chance_R[place_N]
        # An empty slot takes the heaviest one's place where a row is to keep nothing, and the last place elsewhere.
        is_draft = (place_N > 0) & (not drafts_claim)
        more_N1 = torch.where(is_draft, torch.inf, -torch.inf).to(weights_SNK.dtype)[:, None]

        def step(weights_NK: torch.Tensor, ids_NK: torch.Tensor):
            weights_NK, ids_NK = torch.cat([weights_NK, more_N1], 1), F.pad(ids_NK, (0, 1), value=-1)
            new = reroute_projection(Step(weights_NK, ids_NK, chance_T=chance_N), projections[layer], settings)
            return tuple(each[:, :-1] for each in new)

        return torch.vmap(step)(weights_SNK, ids_SNK)

    return rule


def chances_of(turns: Sequence[Sequence[Turn]], k: int) -> torch.Tensor:
    """Returns [k + 1]: how often the output of the row at each place is used."""
    accepted = torch.tensor([turn.accepted for of_text in turns for turn in of_text])
    return torch.stack([(accepted >= place).float().mean() for place in range(k + 1)])


def texts_of(half: Half) -> torch.Tensor:
    return torch.tensor([text.ids for text in held_out_texts(HELDOUT, AutoTokenizer.from_pretrained(MODEL), half=half)])


def measure(k: int, batch: int) -> list[dict[str, Any]]:
    """Returns a row for every rule."""
    model, drafter = (load_model(str(folder), "cpu") for folder in (MODEL, DRAFT))
    similarities, projections = (Artifact.load(calibrated(method)).tables for method in ("frobenius", "projection"))
    chance_R = chances_of(turns_of(drafter, texts_of("choice"), k), k)
    ids_NL = texts_of("final")
    turns = turns_of(drafter, ids_NL, k)
    parts = range(0, len(ids_NL) - batch + 1, batch)
    batches = [lay_out(ids_NL[part : part + batch], turns[part : part + batch]) for part in parts]
    rules: list[tuple[str, float, Rule]] = [(STOCK, 0, stock)]
    rules += [(PAPER, s, paper(similarities, s)) for s in KEEPS]
    for price in PRICES:
        of_price = partial(priced, projections, price)
        rules += [(EQUAL, price, of_price()), (CHANCE, price, of_price(chance_R))]
        rules.append((CLAIMS, price, of_price(chance_R, drafts_claim=False)))
    references = [verify(model, each, stock)[0].log_softmax(-1) for each in batches]
    rows = []
    for name, number, rule in track(rules, f"k {k}, batch {batch}", console=progress()):
        active, kl_of_texts = [], []
        for each, reference in zip(batches, references, strict=True):
            logits, found = verify(model, each, rule)
            kl_BSR = F.kl_div(logits.log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
            active.append(found)
            kl_of_texts += ((kl_BSR * each.used_BSR).sum((1, 2)) / each.used_BSR.sum((1, 2))).tolist()
        kl, kl_error = with_error(kl_of_texts)
        row = {"k": k, "batch": batch, "rule": name, "number": number, "kl": rounded(kl), "kl_error": rounded(kl_error)}
        rows.append(row | {"active_experts": rounded(sum(active) / len(active)), "chances": chance_R.tolist()})
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = [(k, batch) for k in LENGTHS for batch in BATCHES]
    for axes, (k, batch) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        of_panel = [row for row in rows if (row["k"], row["batch"]) == (k, batch)]
        for name, (label, style) in LOOKS.items():
            shown = [row for row in of_panel if row["rule"] == name]
            draw_kl(axes, [(row["active_experts"], row["kl"], row["kl_error"]) for row in shown], label, style)
        (baseline,) = (row["active_experts"] for row in of_panel if row["rule"] == STOCK)
        set_trade_off_axes(axes, baseline)
        axes.set(title=f"batch {batch}, {k} drafted token{'s' * (k > 1)}")
    figure.axes[0].set_ylabel(KL_DIVERGENCE)
    figure.supxlabel(ACTIVE_EXPERTS, fontsize="medium")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main(
    only_draw: Annotated[bool, typer.Option("--draw", help="Draw the picture from the JSON file, and stop.")] = False,
    results: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "speculation.json",
    figure: Annotated[Path, typer.Option(help="Picture to draw.")] = ROOT / "docs" / "speculation.png",
) -> None:
    if only_draw:
        draw(json.loads(results.read_text())["rows"], figure)
        return
    started = time.monotonic()
    rows = [row for k in LENGTHS for batch in BATCHES for row in measure(k, batch)]
    result = {
        "command": " ".join(["python -m studies.speculation", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions("sere-dist", "torch", "transformers"),
        "rows": rows,
        "seconds": round(time.monotonic() - started),
    }
    keep(results, result)
    draw(rows, figure)
    table = Table("k", "batch", "rule", "number", "active experts", "KL divergence")
    for row in rows:
        kl = f"{row['kl']:.4f} ±{row['kl_error']:.4f}"
        table.add_row(*(str(row[name]) for name in ("k", "batch", "rule", "number", "active_experts")), kl)
    tables().print(table)
    print(json.dumps({"seconds": result["seconds"]}))


if __name__ == "__main__":
    typer.run(main)
