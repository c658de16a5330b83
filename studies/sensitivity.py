"""What sizes should be relative to: policy `expert_price` with each way to weigh them, at equal active experts.

    python -m studies.sensitivity   # 10 minutes on 2 cores

Sizes of method projection decide what an error is thought to cost. Ways to weigh them:

- each layer alone: relative to the layer's mean, as in artifacts without sensitivities;
- first order: times the layer's sensitivity, as `sere_dist.calibration.sensitivity` estimates it;
- measured: times the KL divergence per estimated error when that layer alone is re-routed, on as many texts;
- routed: an expert's mean squared output on the tokens that are routed to it, not on all, by the square of the router
  weight, shrunk towards the layer's mean by `PRIOR` tokens; alone, and times the first-order sensitivity.

Similarities and coefficients are the same everywhere. With first-order sensitivities the errors that a policy is
estimated to make add up to a KL divergence, which the study compares with the measured one.

Then it leaves out each kind of text in turn: the model is calibrated and tuned on the other kinds, and the KL
divergence that a served model would estimate for the kind left out is compared with the measured one.

Choices are made by this study on the half `choice`. Errors are standard errors over texts, of ratios by pairs. Prints a
table; writes `studies/results/sensitivity-<example>.json`.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from examples.application import EXAMPLES
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import (
    ExpertInputs,
    ExpertOutputs,
    LayerResult,
    RoutingWeights,
    expert_inputs,
    score_layer,
    text_blocks,
)
from sere_dist.calibration.sensitivity import layer_sensitivities, weigh_layers
from sere_dist.console import tables
from sere_dist.evaluation.lockstep import HeldOut, LockstepResult, unchanged
from sere_dist.evaluation.protocol import (
    BATCH,
    CALIBRATION_LENGTH,
    LENGTH,
    PROMPT,
    TEXTS,
    Half,
    Text,
    calibration_texts,
    decoded,
    held_out_texts,
)
from sere_dist.evaluation.rerouters import Estimating, of_layers, paper_rerouter, projection_rerouter
from sere_dist.evaluation.rivals import oea_rerouter
from sere_dist.method.records import LayerTables, Settings
from sere_dist.moe import MoeShape, load_model, routed_experts
from sere_dist.provenance import keep, machine, rounded, versions
from sere_dist.standard_errors import with_error
from studies.common import RESULTS
from studies.quality import SHARES, at_equal_experts, equal_experts_table

BATCHES = (4, 16, 64)
PRICES = (0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
KEEPS = (1, 2, 3, 4, 6)
ALONE, FIRST_ORDER, MEASURED = "each layer alone", "first order", "measured"
ROUTED, ROUTED_FIRST_ORDER = "routed", "routed, first order"
PRIOR = 50.0
SENSITIVITY_SAMPLES = 64  # of the texts of a calibration, those that sensitivities are found on

Sizes = dict[int, torch.Tensor]  # of experts, by decoder layer


def weighted(sizes: Sizes, weights: dict[int, float]) -> Sizes:
    """Returns the sizes times a weight of each layer, relative to the weights' mean."""
    mean = sum(weights.values()) / len(weights)
    return {layer: size_E * weights[layer] / mean for layer, size_E in sizes.items()}


def routed_sizes(checkpoint: Checkpoint, layer: int, inputs: Sequence[ExpertInputs]) -> torch.Tensor:
    """Returns [E], relative to the layer's mean: mean squared outputs on the tokens that are routed to an expert."""
    model = checkpoint.empty_model()
    name, experts = routed_experts(model)[layer]
    checkpoint.load(model, lambda parameter: parameter.startswith(f"{name}."), "cpu")
    outputs = ExpertOutputs(experts, inputs, "cpu")
    weights = RoutingWeights(inputs, experts.num_experts, "cpu")
    whole, squared, counted = (torch.zeros(experts.num_experts, dtype=torch.float64) for _ in range(3))
    for start in range(0, outputs.shape[1], 1024):
        tokens = slice(start, start + 1024)
        square_EN = outputs[:, tokens].double().square().sum(-1)
        importance_EN = weights[tokens, :].double().square().T
        whole += (importance_EN * square_EN).sum(1)
        squared += importance_EN.square().sum(1)
        counted += importance_EN.sum(1)
    mean = whole.sum() / counted.sum()
    tokens_E = (counted.square() / squared).nan_to_num(0)  # as many as if all counted alike
    own_E = (whole / counted).nan_to_num(0)
    return ((tokens_E * own_E + PRIOR * mean) / (tokens_E + PRIOR) / mean).float()


def measured_sensitivities(bench: HeldOut, of_layer: dict[int, LayerTables]) -> dict[int, float]:
    """Returns the KL divergence per estimated error of each layer, re-routed alone at S = 1 without a price."""
    found = {}
    for layer in tqdm(of_layer, desc="layers alone"):
        estimating = Estimating(projection_rerouter(of_layer, Settings(1)), of_layer)
        result = bench.run(of_layers({layer: estimating}), BATCH)
        found[layer] = result.divergence * result.tokens / estimating.error
    return found


def curves(bench: HeldOut, batch: int, ways: dict[str, dict[int, LayerTables]]) -> dict[str, list[LockstepResult]]:
    """Returns each way's policy over its prices, and rivals over S or k0."""
    found = {
        way: [bench.run(projection_rerouter(of_layer, Settings(1, expert_price=price)), batch) for price in PRICES]
        for way, of_layer in tqdm(ways.items(), desc=f"batch {batch}")
    }
    of_layer = ways[ALONE]
    found["SERE"] = [bench.run(paper_rerouter(of_layer, Settings(keep)), batch) for keep in KEEPS]
    found["projection, S alone"] = [bench.run(projection_rerouter(of_layer, Settings(keep)), batch) for keep in KEEPS]
    found["OEA"] = [bench.run(oea_rerouter(keep), batch) for keep in KEEPS]
    return found


def predictions(bench: HeldOut, of_layer: dict[int, LayerTables], nats_per_error: float) -> list[dict[str, Any]]:
    """Returns, at each batch and price, the KL divergence that the estimated errors of all layers add up to, and the
    measured one."""
    rows = []
    for batch in BATCHES:
        for price in tqdm(PRICES, desc=f"predictions, batch {batch}"):
            estimating = Estimating(projection_rerouter(of_layer, Settings(1, expert_price=price)), of_layer)
            result = bench.run(estimating, batch)
            kl, kl_error = with_error(result.divergence_of_texts)
            predicted = nats_per_error * estimating.error / result.tokens
            row = {"batch": batch, "price": price, "predicted": predicted, "kl": kl, "kl_error": kl_error}
            rows.append({name: rounded(number) for name, number in row.items()})
    return rows


def unlike(
    checkpoint: Checkpoint, model: PreTrainedModel, to_calibrate: Sequence[Text], held_out: Mapping[Half, list[Text]]
) -> list[dict[str, Any]]:
    """Returns, for each kind of text and price, the KL divergence that is estimated by the other kinds alone, and the
    measured one, with errors.

    As in a tuning, the factor between estimated errors and nats is the geometric mean over prices, of the other kinds'
    texts of the half `choice`.
    """
    rows = []
    for kind in sorted({text.kind for text in to_calibrate}):
        others = [text.ids for text in to_calibrate if text.kind != kind]
        found = {
            layer: score_layer(checkpoint, layer, inputs, "projection")
            for layer, inputs in expert_inputs(checkpoint, text_blocks(others))
        }
        weigh_layers(found, layer_sensitivities(checkpoint, others[:SENSITIVITY_SAMPLES]))
        of_layer = {layer: result.tables for layer, result in found.items()}
        tuned = decoded(model, [text for text in held_out["choice"] if text.kind != kind])
        left_out = decoded(model, [text for text in held_out["final"] if text.kind == kind])
        by_price = []
        for price in tqdm(PRICES, desc=f"without {kind}"):
            error_of = Estimating(projection_rerouter(of_layer, Settings(1, expert_price=price)), of_layer)
            tuned_on = tuned.run(error_of, BATCH)
            factor, error_of.error = tuned_on.divergence * tuned_on.tokens / error_of.error, 0.0
            result = left_out.run(error_of, BATCH)
            by_price.append((price, factor, error_of.error / result.tokens, with_error(result.divergence_of_texts)))
        nats = geometric_mean(factor for _, factor, _, _ in by_price)
        for price, _, error, (kl, kl_error) in by_price:
            row = {"price": price, "estimated": nats * error, "kl": kl, "kl_error": kl_error}
            rows.append({"kind": kind} | {name: rounded(number) for name, number in row.items()})
    return rows


def main(
    example: Annotated[str, typer.Option(help=f"The model: {' or '.join(EXAMPLES)}.")] = "tiny-moe",
    half: Annotated[Half, typer.Option(help="The half of each kind's held-out texts: final, or choice.")] = "final",
    texts: Annotated[int, typer.Option(help="Held-out texts of all kinds together.")] = TEXTS,
    samples: Annotated[int, typer.Option(help="Texts of the calibration.")] = 400,
    results: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    own = EXAMPLES[example]
    tokenizer, checkpoint = AutoTokenizer.from_pretrained(own.model), Checkpoint(str(own.model))
    to_calibrate = calibration_texts(own.calibration, tokenizer, count=samples, length=CALIBRATION_LENGTH)
    scored: dict[int, LayerResult] = {}
    routed: Sizes = {}
    for layer, inputs in expert_inputs(checkpoint, text_blocks([text.ids for text in to_calibrate])):
        scored[layer] = score_layer(checkpoint, layer, inputs, "projection")
        routed[layer] = routed_sizes(checkpoint, layer, inputs)
        print(f"layer {layer} scored", flush=True)
    alone = {layer: result.tables for layer, result in scored.items()}
    sizes: Sizes = {layer: result.size_E for layer, result in scored.items() if result.size_E is not None}

    began = time.perf_counter()
    estimated = layer_sensitivities(checkpoint, [text.ids for text in to_calibrate[:SENSITIVITY_SAMPLES]])
    seconds = {FIRST_ORDER: rounded(time.perf_counter() - began)}
    mean = weigh_layers(scored, estimated)
    assert mean is not None  # errors of a trained model's layers cost something
    rows_of = {layer: result.statistics for layer, result in scored.items()}
    first_order = {layer: mean * (row.sensitivity or 0.0) for layer, row in rows_of.items()}
    model = load_model(str(own.model), "cpu")
    began = time.perf_counter()
    measured = measured_sensitivities(decoded(model, to_calibrate[:SENSITIVITY_SAMPLES], 8), alone)
    seconds[MEASURED] = rounded(time.perf_counter() - began)
    print({layer: (rounded(first_order[layer]), rounded(measured[layer])) for layer in measured}, flush=True)

    all_sizes = {
        ALONE: sizes,
        FIRST_ORDER: weighted(sizes, first_order),
        MEASURED: weighted(sizes, measured),
        ROUTED: routed,
        ROUTED_FIRST_ORDER: weighted(routed, first_order),
    }
    ways = {
        way: {layer: alone[layer]._replace(size_E=size_E) for layer, size_E in of_way.items()}
        for way, of_way in all_sizes.items()
    }
    bench = decoded(model, held_out_texts(own.held_out, tokenizer, half=half, count=texts))
    rows = []
    for batch in BATCHES:
        found = curves(bench, batch, ways)
        rows += at_equal_experts(found, ALONE, batch, SHARES)
        baseline = bench.run(unchanged, batch).active_experts
        title = f", {baseline:.1f} active experts as it is: KL divergence as a factor of `{ALONE}`"
        tables().print(equal_experts_table(rows, ALONE, batch, found, title))
    predicted = predictions(bench, ways[FIRST_ORDER], mean)
    for row in predicted:
        print(row | {"kl / predicted": rounded(row["kl"] / row["predicted"])}, flush=True)
    halves: dict[Half, list[Text]] = {
        each: held_out_texts(own.held_out, tokenizer, half=each, count=2 * texts) for each in ("choice", "final")
    }
    of_unlike = unlike(checkpoint, model, to_calibrate, halves)
    for row in of_unlike:
        print(row | {"kl / estimated": rounded(row["kl"] / row["estimated"])}, flush=True)
    errors = {layer: rounded(mean * (row.sensitivity_error or 0.0)) for layer, row in rows_of.items()}
    keep(
        results or RESULTS / f"sensitivity-{example}.json",
        {
            "command": f"python -m studies.sensitivity --example {example}",
            "machine": machine() | {"threads": torch.get_num_threads()},
            "versions": versions("sere-dist", "torch", "transformers"),
            "shape": vars(MoeShape.from_config(model.config)),
            "half": half,
            "texts": len(bench.ids_NL),
            "length": LENGTH,
            "prompt": PROMPT,
            "calibration_texts": len(to_calibrate),
            "sensitivity_texts": SENSITIVITY_SAMPLES,
            "seconds": seconds,
            "nats_per_error": {
                FIRST_ORDER: {layer: rounded(cost) for layer, cost in first_order.items()},
                f"{FIRST_ORDER}, error": errors,
                MEASURED: {layer: rounded(cost) for layer, cost in measured.items()},
            },
            "rows": rows,
            "predictions": predicted,
            "unlike": of_unlike,
        },
    )


if __name__ == "__main__":
    typer.run(main)
