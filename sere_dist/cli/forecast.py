"""Whether re-routing will help: the verdict of `sere-dist forecast`. What it rests on is in `sere_dist.forecast`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.recommendation import Outcome
from sere_dist.forecast import Device, ModelCost, Step, decode_step, prefill_seconds, uniform_shares, union

WORTH_IT = 1.1  # times faster; the verdict calls less than that no gain
CROWDED = 0.9  # of the active experts: a setting that leaves so many has little to save
FLAT = 0.05  # share of an expert's mean square that its best substitute explains


@dataclass(frozen=True)
class Forecast:
    """One batch under one setting.

    Attributes:
        active: experts per layer and step.
        step: the decode step's parts.
        faster: than a step without re-routing. `least` and `most` are one standard deviation of the device off.
        faster_served: the same for a whole request, with the prefill of its prompt.
    """

    rows: int
    setting: str
    active: float
    step: Step
    faster: float
    least: float
    most: float
    faster_served: float

    def numbers(self) -> dict[str, float | str]:
        """Returns what is printed as JSON."""
        return {
            "batch": self.rows,
            "setting": self.setting,
            "active_experts": round(self.active, 2),
            "ms_per_step": round(1e3 * self.step.seconds, 4),
            "expert_share": round(self.step.experts / self.step.seconds, 3),
            "times_faster": round(self.faster, 3),
            "least": round(self.least, 3),
            "most": round(self.most, 3),
            "times_faster_with_prefill": round(self.faster_served, 3),
        }


@dataclass(frozen=True)
class Load:
    """What a replica serves: tokens of a prompt and of an answer, as means."""

    prompt: int
    answer: int

    @property
    def context(self) -> int:
        """Tokens that a row has behind it in the middle of its answer."""
        return self.prompt + self.answer // 2


def forecast(
    cost: ModelCost, device: Device, load: Load, batches: Sequence[int], artifact: Artifact | None
) -> list[Forecast]:
    """Returns a forecast for each batch: without re-routing, at each S, and as a tuning recommends.

    With an artifact, each layer's experts are as popular as its calibration saw them, else all alike.
    """
    found = []
    for rows in batches:
        active = active_experts(cost, rows, artifact)
        off = active.pop("off")
        steps = {setting: decode_step(cost, device, rows, each, load.context) for setting, each in active.items()}
        baseline = decode_step(cost, device, rows, off, load.context)
        found.append(Forecast(rows, "off", off, baseline, 1.0, 1.0, 1.0, 1.0))
        prefill = prefill_seconds(cost, device, rows * load.prompt)
        for setting, step in steps.items():
            ratios = [
                decode_step(cost, other, rows, off, load.context).seconds
                / decode_step(cost, other, rows, active[setting], load.context).seconds
                for other in shaken(device)
            ]
            served = (prefill + load.answer * baseline.seconds) / (prefill + load.answer * step.seconds)
            faster = baseline.seconds / step.seconds
            found.append(Forecast(rows, setting, active[setting], step, faster, min(ratios), max(ratios), served))
    return found


def shaken(device: Device) -> list[Device]:
    """Returns the device with each of its numbers off by one standard deviation, up and down."""
    names = ("bandwidth", "speed", "layer_seconds", "host_seconds")
    return [
        replace(device, **{name: getattr(device, name) * factor})
        for name in names
        for factor in (math.exp(device.uncertainty), math.exp(-device.uncertainty))
    ]


def active_experts(cost: ModelCost, rows: int, artifact: Artifact | None) -> dict[str, float]:
    """Returns the active experts per layer by setting: `off`, each S that halves the top-k, and `recommended`."""
    top_k = cost.shape.num_experts_per_token
    shares = [uniform_shares(cost.shape)] if artifact is None else popularity(artifact, top_k)

    def mean_union(kept: int) -> float:
        return math.fsum(union(share_E * kept / top_k, rows) for share_E in shares) / len(shares)

    halves = [top_k >> times for times in range(1, top_k.bit_length())]
    found = {"off": mean_union(top_k)} | {f"S = {kept}": mean_union(kept) for kept in halves}
    if artifact is not None and artifact.recommended is not None:
        off, ours = of_batch(artifact.recommended.off, rows), of_batch(artifact.recommended.recommended, rows)
        if off is not None and ours is not None:
            found["recommended"] = found["off"] * ours.active_experts / off.active_experts
    return found


def of_batch(outcomes: Sequence[Outcome], rows: int) -> Outcome | None:
    return next((outcome for outcome in outcomes if outcome.batch == rows), None)


def popularity(artifact: Artifact, top_k: int) -> list[torch.Tensor]:
    """Returns, for each layer, how likely a token uses each expert [E]; uniform where no token was looked at."""
    shares = []
    for layer in artifact.layers.values():
        if layer.tokens_E is None:
            shares.append(uniform_shares(artifact.config.shape))
        else:
            shares.append((layer.tokens_E * (top_k / layer.tokens_E.sum())).clamp(max=1))
    return shares


def explained(artifact: Artifact) -> float | None:
    """Returns the share of an expert's mean square that its best substitute explains, as the median over experts.

    None: the artifact is not of method projection, whose similarity is that share.
    """
    if not artifact.is_projection:
        return None
    best = [
        layer.similarity_EE.masked_fill(torch.eye(len(layer.similarity_EE), dtype=torch.bool), 0).amax(1)
        for layer in artifact.layers.values()
    ]
    return float(torch.cat(best).median())


def verdict(found: Sequence[Forecast], cost: ModelCost, device: Device, load: Load, artifact: Artifact | None) -> str:
    """Returns the verdict and its reasons, a sentence per line."""
    lines = []
    for rows in dict.fromkeys(each.rows for each in found):
        off, *others = [each for each in found if each.rows == rows]
        best = max(others, key=lambda each: each.faster)
        moderate = next((each for each in others if each.setting == "recommended"), others[0])
        if best.faster < WORTH_IT:
            lines.append(f"Batch {rows}: no gain. {' '.join(reasons(off, best, cost, device))}")
        else:
            lines.append(
                f"Batch {rows}: up to {best.faster:.2f} times faster ({best.least:.2f} to {best.most:.2f}) at "
                f"{best.setting}, {moderate.faster:.2f} at {moderate.setting}; experts are "
                f"{off.step.experts / off.step.seconds:.0%} of a step without re-routing."
            )
        if best.faster >= WORTH_IT > best.faster_served:
            lines.append(
                f"With prompts of {load.prompt} and answers of {load.answer} tokens a request is only "
                f"{best.faster_served:.2f} times faster: its time is prefill, which is not re-routed."
            )
    if artifact is not None and (share := explained(artifact)) is not None and share < FLAT:
        lines.append(
            f"The best substitute explains {share:.1%} of an expert's output, as the median: substitutes are hardly "
            "better than none, and what a setting costs in quality must be measured (python -m calibration_jobs.tune)."
        )
    return "\n".join(lines)


def reasons(off: Forecast, best: Forecast, cost: ModelCost, device: Device) -> list[str]:
    """Returns why a batch gains nothing."""
    found, step = [], off.step
    if step.is_host_bound:
        found.append(
            f"The host takes {1e3 * step.host:.1f} ms for a step, longer than the device: look for what holds it up "
            "(eager mode, sampling, a slow processor) first."
        )
    if best.active > CROWDED * off.active:
        found.append(f"Even at {best.setting} the batch runs {best.active:.0f} of {off.active:.0f} active experts.")
    read = off.active * cost.expert_bytes / device.bandwidth
    if not step.is_host_bound and step.experts < step.seconds / 4:
        parts = {"other weights": step.others, "attention": step.attention, "gaps between kernels": step.waiting}
        largest = max(parts, key=parts.__getitem__)
        found.append(
            f"Experts are {step.experts / step.seconds:.0%} of a step, {largest} {parts[largest] / step.seconds:.0%}."
        )
    elif step.experts > 2 * read:
        found.append("The experts' time is computing, not reading weights: so many rows share each expert already.")
    return found or ["No part of a step is large enough."]


def as_cells(each: Forecast) -> list[str]:
    """Returns a row of the table."""
    faster = "" if each.setting == "off" else f"{each.faster:.2f} ({each.least:.2f}-{each.most:.2f})"
    return [
        str(each.rows),
        each.setting,
        f"{each.active:.1f}",
        f"{1e3 * each.step.seconds:.2f}",
        f"{each.step.experts / each.step.seconds:.0%}",
        faster,
        "" if each.setting == "off" else f"{each.faster_served:.2f}",
    ]
