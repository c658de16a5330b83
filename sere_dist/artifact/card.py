"""The model card of an artifact: what a user of the Hugging Face Hub judges it by. Shape suffix: E experts."""

import json
import re
from collections.abc import Collection
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sere_dist.artifact.layer import MIN_TOKENS_PER_EXPERT, Layer, LayerStatistics
from sere_dist.artifact.recommendation import Outcome, Recommendation
from sere_dist.artifact.schema import ArtifactConfig
from sere_dist.artifact.sources import Service, services
from sere_dist.files import HUB, is_repository

NAME = f"{HUB}ORG/NAME"  # the artifact does not know where it will be
DATA_FILES = (".parquet", ".jsonl", ".json", ".gz", ".txt")


def card(config: ArtifactConfig, layers: Collection[Layer], recommended: Recommendation | None) -> str:
    """Returns the artifact's `README.md`."""
    is_of_hub = config.revision is not None  # a model in a folder has none
    model = config.base_model if is_of_hub else Path(config.base_model).name
    data = ModelCardData(
        base_model=model if is_of_hub and is_repository(model) else None,
        library_name="sere_dist",
        tags=["sere", "mixture-of-experts", "expert-rerouting", "vllm", "ray"],
        datasets=_hub_datasets(config.dataset) or None,
        model_name=f"Expert similarities of {model}",
        eval_results=None if recommended is None else _eval_results(recommended),
    )
    seen = "No text was looked at: the similarities know nothing of what experts do on yours."
    if config.dataset:
        seen = f"The similarities are those of this data: {config.data}. On other data, other experts may be alike."
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# Expert similarities of {model}",
        "This artifact says how alike the experts of each layer of a Mixture-of-Experts model are. With it, sere_dist "
        "lets vLLM run fewer experts per decode step (SERE, arXiv 2602.07616). It holds no weights of the model.",
        _facts(config, layers, model),
        "## Use",
        _use(config, model, tuned=recommended is not None),
    ]
    if recommended is not None:
        rows = list(recommended.held_out())
        parts += [
            "## What it costs and saves",
            f"Tuned {recommended}. Found on {recommended.texts}.",
            "On the held-out texts, with the number of active experts per layer and step, and KL and loss in nats per "
            "token against the model as it is. Errors are standard errors over texts. S is the number of experts that "
            "every token keeps, the same in all layers.",
            _table(("setting", *Outcome.HEADINGS), rows),
        ]
    if served := services(row for layer in layers for row in layer.sources):
        parts += [
            "## Sources",
            "What the substitutes are worth to each source of the texts, the mean over layers: 100% is as good as the "
            "best, and 0% is as good as others at random. Where a choice by the source's own texts keeps much more, an "
            "artifact of its own serves it better.",
            _table(Service.HEADINGS, [service.cells() for service in served]),
        ]
    parts += [
        "## Limits",
        f"- {seen}\n"
        "- How much quality re-routing costs depends on the task, the batch and the settings. Measure it on texts of "
        "your own before you serve: `python -m calibration_jobs.tune` and `sere-dist accuracy` do.\n"
        "- It serves models of this shape alone; a quantised version of the same model may use it too.\n"
        f"- Its format is schema {config.schema_version} of sere_dist. Versions that know only older ones refuse it.",
        "## Layers",
        _table(LayerStatistics.HEADINGS, [layer.statistics.cells() for layer in layers]),
    ]
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _eval_results(recommended: Recommendation) -> list[EvalResult]:
    """Returns what the recommended settings cost and save, as the Hub shows it."""
    metrics = {
        "kl": "KL divergence from the model as it is, nats per token",
        "active_experts": "active experts per layer and step",
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{recommended.texts}, batch {outcome.batch}",
            metric_type=metric,
            metric_name=name,
            metric_value=getattr(outcome, metric),
        )
        for outcome in recommended.recommended
        for metric, name in metrics.items()
    ]


def coverage(layers: Collection[Layer]) -> str:
    """Returns how many tokens the experts got that the similarities are judged by, in words."""
    counts = [layer.tokens_E for layer in layers if layer.tokens_E is not None]
    fewest = [layer.statistics.tokens_per_expert_min for layer in layers]
    known = [number for number in fewest if number is not None]
    if not known:
        return "no token was looked at"
    least = f"the expert with the fewest got {min(known)}"
    if not counts:
        return least
    few, experts = sum(int((tokens_E < MIN_TOKENS_PER_EXPERT).sum()) for tokens_E in counts), sum(map(len, counts))
    return f"{few:,} of {experts:,} experts got fewer than {MIN_TOKENS_PER_EXPERT} tokens; {least}"


def _facts(config: ArtifactConfig, layers: Collection[Layer], model: str) -> str:
    method = config.method + (f" ({config.kernel})" if config.kernel else "")
    rows = {
        "base model": f"{model} at {config.revision}" if config.revision else f"{model}, from a folder",
        "architecture": f"{config.architecture}, {config.num_layers} layers, {len(config.layer_names)} of them MoE",
        "experts": f"{config.num_experts} experts per layer, top-{config.num_experts_per_token}",
        "method": method,
        "data": config.data,
        "coverage": coverage(layers),
        "made with": ", ".join(f"{name} {version}" for name, version in config.versions.items()),
    }
    return _table(("", ""), [list(row) for row in rows.items()])


def _use(config: ArtifactConfig, model: str, tuned: bool) -> str:
    rerouting: dict[str, str | int] = {"artifact": NAME}
    if tuned:
        rerouting |= {"policy": "recommended"}
    else:
        rerouting |= {"policy": "projection"} if config.method == "projection" else {}
        rerouting |= {"select_top_k": min(2, config.num_experts_per_token)}
    application = {
        "applications": [
            {
                "name": "sere",
                "import_path": "serve_apps.sere:build_app",
                "args": {"model": model, "rerouting": rerouting},
            }
        ]
    }
    return (
        f"Write this repository's name for `{NAME}`. With `{NAME}@COMMIT`, what is pushed later changes nothing.\n\n"
        f"In vLLM, with sere_dist installed:\n\n```python\nllm = LLM({json.dumps(model)}, additional_config="
        f'{{"sere": {json.dumps(rerouting)}}})\n```\n\n'
        f"In Ray Serve:\n\n```yaml\n{yaml.safe_dump(application, sort_keys=False)}```"
    )


def _hub_datasets(dataset: str | None) -> list[str]:
    """Returns those datasets that are the Hub's. An artifact names one, or several as in "a/b (60%), c/d (40%)"."""
    names = [re.sub(r" \(\d+%\)$", "", name) for name in (dataset or "").split(", ")]
    return [name for name in names if is_repository(name) and not (Path(name).exists() or name.endswith(DATA_FILES))]


def _table(headings: Collection[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
