"""How well an artifact serves each source of the texts that it was calibrated on, where there were several."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from pydantic import BaseModel, FiniteFloat, NonNegativeInt


class SourceStatistics(BaseModel):
    """One row of `sources.csv`: a layer and a source. See `SourceFit`."""

    layer: int
    source: str
    tokens: NonNegativeInt
    # None: the source had too few texts.
    substitute_kept: FiniteFloat | None = None
    own_kept: FiniteFloat | None = None
    same_substitute: FiniteFloat | None = None


@dataclass(frozen=True)
class Service:
    """How well all layers together serve one source: means over layers, None where it had too few texts.

    Attributes:
        worst: the layer in which the source loses most to the others.
    """

    HEADINGS: ClassVar = ("source", "tokens", "kept", "kept by its own choice", "same best", "worst layer")

    source: str
    tokens: int
    substitute_kept: float | None = None
    own_kept: float | None = None
    same_substitute: float | None = None
    worst: SourceStatistics | None = None

    def cells(self) -> list[str]:
        """The row as people read it, below `HEADINGS`."""
        shares = (self.substitute_kept, self.own_kept, self.same_substitute)
        worst = "-"
        if self.worst is not None:
            worst = f"{self.worst.layer}: {self.worst.substitute_kept:.0%} ({self.worst.own_kept:.0%})"
        return [self.source, f"{self.tokens:,}", *("-" if it is None else f"{it:.0%}" for it in shares), worst]


def services(rows: Iterable[SourceStatistics]) -> list[Service]:
    """Returns a summary of each source over all layers that know of it, in the order in which they come."""
    by_source: dict[str, list[SourceStatistics]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    return [_service(source, of_source) for source, of_source in by_source.items()]


def _service(source: str, rows: list[SourceStatistics]) -> Service:
    known = [
        (row.substitute_kept, row.own_kept, row.same_substitute, row)
        for row in rows
        if row.substitute_kept is not None and row.own_kept is not None and row.same_substitute is not None
    ]
    if not known:
        return Service(source, rows[0].tokens)
    kept, own_kept, same, _ = zip(*known, strict=True)
    worst = min(known, key=lambda each: each[0] - each[1])[-1]
    return Service(source, rows[0].tokens, fmean(kept), fmean(own_kept), fmean(same), worst)
