"""What a calibration says of each layer's coverage: experts that few tokens reached, and substitutes that depend on the
texts that were taken. It says what to change."""

from collections.abc import Iterable
from math import ceil

from sere_dist.artifact.layer import LayerStatistics
from sere_dist.artifact.sources import Service
from sere_dist.calibration.layers import LayerResult

NAMED = 8  # experts that a warning names


def coverage_warnings(result: LayerResult, num_texts: int, min_tokens: int, min_kept: float) -> list[str]:
    """Returns what is wrong with what a layer's experts were seen of, in `num_texts` texts; nothing if enough was seen.

    Args:
        result: of the layer.
        num_texts: how many texts it was calibrated on.
        min_tokens: that each expert should have received.
        min_kept: the least that `substitute_kept` should be.
    """
    row, warnings = result.statistics, []
    if result.tokens_E is not None and (few := (result.tokens_E < min_tokens).nonzero().flatten().tolist()):
        counts = ", ".join(f"{expert} ({result.tokens_E[expert]})" for expert in few[:NAMED])
        more = f" and {len(few) - NAMED} more" if len(few) > NAMED else ""
        fewest = int(result.tokens_E.min())
        cure = "no number of such texts is known to suffice: add texts of other kinds (--mixture)"
        if fewest:
            needed = ceil(num_texts * min_tokens / fewest)
            cure = f"at this rate it takes about {needed:,} such texts (--num-samples), or longer ones (--max-length)"
        experts = "1 expert" if len(few) == 1 else f"{len(few)} experts"
        warnings.append(f"layer {row.layer}: {experts} got fewer than {min_tokens} tokens: {counts}{more}; {cure}")
    if row.substitute_kept is not None and row.substitute_kept < min_kept:
        warnings.append(
            f"layer {row.layer}: substitutes chosen on half of the texts keep {row.substitute_kept:.0%} of what the "
            f"best are worth on the other half, less than {min_kept:.0%}; use more texts (--num-samples), or longer "
            "ones (--max-length)"
        )
    return warnings


def source_warnings(served: Iterable[Service], min_kept: float) -> list[str]:
    """Returns which sources of a mixture would be served better by an artifact of their own.

    Args:
        served: how well each source is served.
        min_kept: the least that the choice of all sources should keep, of what the source's own choice keeps.
    """
    return [
        f"{each.source}: substitutes chosen on all sources keep {each.substitute_kept:.0%} of what the best are worth "
        f"there, those chosen on its own texts {each.own_kept:.0%}; give it more weight (--mixture), or serve such "
        "requests with an artifact of their own"
        for each in served
        if each.substitute_kept is not None
        and each.own_kept is not None
        and each.substitute_kept < min_kept * each.own_kept
    ]


def certainty_line(layers: Iterable[LayerStatistics]) -> str | None:
    """Returns how surely the substitutes of all layers are known; None where that was not measured."""
    rows = [row for row in layers if row.same_substitute is not None and row.substitute_kept is not None]
    if not rows:
        return None
    same, kept = ([getattr(row, name) for row in rows] for name in ("same_substitute", "substitute_kept"))
    return (
        f"substitutes chosen on half of the texts are the other half's for {min(same):.0%} to {max(same):.0%} of a "
        f"layer's experts; they keep {min(kept):.0%} to {max(kept):.0%} of what the best are worth on the other half"
    )
