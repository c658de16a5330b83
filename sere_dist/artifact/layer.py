"""What a calibration found out about one MoE layer. Shape suffix: E experts of the layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from pydantic import BaseModel, Field, FiniteFloat

from sere_dist.artifact.sources import SourceStatistics
from sere_dist.method.certainty import Certainty
from sere_dist.method.records import LayerTables

MIN_TOKENS_PER_EXPERT = 32  # an expert that got fewer in a calibration is worth a warning


class LayerStatistics(BaseModel):
    """One row of `layers.csv`. Similarities are those of different experts."""

    HEADINGS: ClassVar = (
        "layer",
        "fewest tokens of an expert",
        "median",
        "similarity mean",
        "min",
        "max",
        "error",
        "same best",
        "best kept",
        "sensitivity",
    )

    layer: int
    name: str
    tokens_per_expert_min: int | None  # None for a method that looks at no tokens
    tokens_per_expert_median: float | None
    similarity_mean: float
    similarity_min: float
    similarity_max: float
    seconds: float
    mean_square: float | None = None  # of experts and tokens, what sizes are relative to. Of method projection alone
    sensitivity: float | None = None  # what an error costs, relative to the mean over layers. None: not measured
    sensitivity_error: float | None = None  # its standard error over texts
    # Over different experts, see `Certainty`. None: too few texts, another method, or an older version.
    similarity_error: float | None = None
    same_substitute: float | None = None
    substitute_kept: float | None = None

    @classmethod
    def of(
        cls,
        layer: int,
        name: str,
        similarity_EE: torch.Tensor,
        tokens_E: torch.Tensor | None = None,
        seconds: float = 0.0,
        mean_square: float | None = None,
        certainty: Certainty | None = None,
    ) -> "LayerStatistics":
        """Sums up a layer's similarities, and the tokens routed to each expert where there were any."""
        different = similarity_EE[~torch.eye(len(similarity_EE), dtype=torch.bool)]
        return cls(
            layer=layer,
            name=name,
            tokens_per_expert_min=None if tokens_E is None else int(tokens_E.min()),
            tokens_per_expert_median=None if tokens_E is None else float(tokens_E.double().quantile(0.5)),
            similarity_mean=float(different.mean()),
            similarity_min=float(different.min()),
            similarity_max=float(different.max()),
            seconds=round(seconds, 3),
            mean_square=mean_square,
            **({} if certainty is None else certainty._asdict()),
        )

    def cells(self) -> list[str]:
        """The row as people read it, below `HEADINGS`."""
        tokens = (self.tokens_per_expert_min, self.tokens_per_expert_median)
        similarity = (self.similarity_mean, self.similarity_min, self.similarity_max)
        return [
            str(self.layer),
            *("-" if value is None else f"{value:g}" for value in tokens),
            *(f"{value:.3f}" for value in similarity),
            "-" if self.similarity_error is None else f"{self.similarity_error:.4f}",
            *("-" if share is None else f"{share:.0%}" for share in (self.same_substitute, self.substitute_kept)),
            "-" if self.sensitivity is None else f"{self.sensitivity:.2f} ±{self.sensitivity_error:.2f}",
        ]


class ExpertStatistics(BaseModel):
    """One row of `experts.csv`."""

    layer: int
    expert: int
    tokens: int = Field(ge=0, lt=2**63)  # routed to it
    saliency: FiniteFloat | None = None  # see `Layer.saliency_E`


@dataclass
class Layer:
    """One layer's tables, all by logical expert id.

    Attributes:
        similarity_EE: float32 [E, E], diagonal 1; row e holds the similarity of e to each possible substitute.
        statistics: a summary, for people.
        coefficient_EE: float32 [E, E], diagonal 1: the multiple of the substitute that is nearest to e. Of method
            projection alone.
        size_E: float32 [E]: mean squared output relative to the layer's mean. Of method projection alone.
        coactivation_EE: float32 [E, E]: products of the router weights that a token gave two experts, summed over
            tokens. None for a method without data, and in artifacts of older versions.
        tokens_E: int64 [E]: tokens routed to each expert. None for a method without data.
        saliency_E: float32 [E]: what REAP would prune by, see `Projection`. Of method projection alone, and None in
            artifacts of older versions.
        sources: how well it serves each source of the texts. Empty where there was one, or that was not measured.
    """

    similarity_EE: torch.Tensor
    statistics: LayerStatistics
    coefficient_EE: torch.Tensor | None = None
    size_E: torch.Tensor | None = None
    coactivation_EE: torch.Tensor | None = None
    tokens_E: torch.Tensor | None = None
    saliency_E: torch.Tensor | None = None
    sources: list[SourceStatistics] = field(default_factory=list)

    @property
    def tables(self) -> LayerTables:
        """What re-routing reads. Sizes count by the layer's sensitivity, so that a price means the same everywhere."""
        sensitivity = self.statistics.sensitivity
        size_E = self.size_E if self.size_E is None or sensitivity is None else self.size_E * sensitivity
        return LayerTables(self.similarity_EE, self.coefficient_EE, size_E)

    def experts(self) -> list["ExpertStatistics"]:
        """Returns the layer's rows of `experts.csv`; none for a method without data."""
        if self.tokens_E is None:
            return []
        saliency = [None] * len(self.tokens_E) if self.saliency_E is None else self.saliency_E.tolist()
        return [
            ExpertStatistics(layer=self.statistics.layer, expert=expert, tokens=tokens, saliency=each)
            for expert, (tokens, each) in enumerate(zip(self.tokens_E.tolist(), saliency, strict=True))
        ]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns what `similarity.safetensors` holds of the layer, by the names that it has there."""
        named = {name: getattr(self, field) for name, field in TENSORS.items()}
        return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}

    def in_order(self, order_E: torch.Tensor) -> Self:
        """Returns the layer of a model whose expert p is this layer's expert `order_E[p]`."""

        def permuted(table: torch.Tensor | None) -> torch.Tensor | None:
            if table is None:
                return None
            return table[order_E] if table.dim() == 1 else table[order_E][:, order_E]

        fields = (*TENSORS.values(), "tokens_E", "saliency_E")
        return replace(self, **{name: permuted(getattr(self, name)) for name in fields})


TENSORS = {
    "similarity": "similarity_EE",
    "coefficient": "coefficient_EE",
    "size": "size_E",
    "coactivation": "coactivation_EE",
}


def layer_of(
    tensors: dict[str, torch.Tensor],
    statistics: LayerStatistics,
    experts: Sequence[ExpertStatistics] = (),
    sources: Sequence[SourceStatistics] = (),
) -> Layer:
    """Returns a layer of the tensors that `Layer.tensors` returned, and of what is kept beside them."""
    saliency = [row.saliency for row in experts if row.saliency is not None]
    return Layer(
        similarity_EE=tensors["similarity"],
        statistics=statistics,
        coefficient_EE=tensors.get("coefficient"),
        size_E=tensors.get("size"),
        coactivation_EE=tensors.get("coactivation"),
        tokens_E=torch.tensor([row.tokens for row in experts]) if experts else None,
        saliency_E=torch.tensor(saliency) if saliency else None,
        sources=list(sources),
    )
