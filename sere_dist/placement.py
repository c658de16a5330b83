"""Which rank holds which expert: a map per layer that keeps on one rank the experts that tokens use together.

Pure functions on tensors find the map; `Placement` is the file that carries it. Under a traffic price a token's lesser
slots go where its primary experts are, so what it still sends is decided by whether those share a rank. Shape
suffixes: E experts of the layer, R ranks.

A placement is realised by permuting a layer's experts and router rows at load, under vLLM's linear placement; see
`Placement.order`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sere_dist.artifact import Artifact
from sere_dist.config import MAX_LOAD
from sere_dist.moe import MoeShape

SCHEMA_VERSION = 1
STARTS = 4  # searches for a map; more gain little
Affinity = Literal["coactivation", "similarity"]


class PlacementError(ValueError):
    """A placement that can't be used; the message names the file and the field."""


def linear_ranks(num_experts: int, num_ranks: int) -> torch.Tensor:
    """Returns int64 [E], vLLM's linear placement: E // R experts in a row on each rank, one more on the first E % R."""
    sizes_R = torch.full((num_ranks,), num_experts // num_ranks) + (torch.arange(num_ranks) < num_experts % num_ranks)
    return torch.arange(num_ranks).repeat_interleave(sizes_R)


def rank_loads(load_E: torch.Tensor, rank_E: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Returns float64 [R]: the load of each rank relative to the mean."""
    load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E.double())
    return load_R / load_R.mean()


def together(affinity_EE: torch.Tensor, rank_E: torch.Tensor) -> float:
    """Returns the share of the affinity between different experts that lies within ranks."""
    between_EE = affinity_EE.double().clone().fill_diagonal_(0)
    total = between_EE.sum()
    return float((between_EE * (rank_E[:, None] == rank_E)).sum() / total) if total > 0 else 0.0


def expected_remote_domains(affinity_EE: torch.Tensor, rank_E: torch.Tensor, num_ranks: int) -> float:
    """Returns how many ranks other than its own a token visits if two experts serve it, any pair as often as it has
    affinity, and its own rank is any of them.
    """
    return (1 - 1 / num_ranks) * (2 - together(affinity_EE, rank_E))


def spread_by_load(load_E: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Returns int64 [E]: each expert, the heaviest first, on the least loaded rank that has room.

    Ranks have room for as many experts as linear placement gives them.
    """
    room_R = linear_ranks(len(load_E), num_ranks).bincount(minlength=num_ranks)
    load_R = torch.zeros(num_ranks, dtype=torch.float64)
    rank_E = torch.empty(len(load_E), dtype=torch.int64)
    for expert in load_E.argsort(descending=True, stable=True).tolist():
        rank = int(load_R.masked_fill(room_R == 0, torch.inf).argmin())
        rank_E[expert] = rank
        room_R[rank] -= 1
        load_R[rank] += load_E[expert]
    return rank_E


def swap_experts(
    affinity_EE: torch.Tensor, load_E: torch.Tensor, rank_E: torch.Tensor, num_ranks: int, max_load: float
) -> torch.Tensor:
    """Returns int64 [E]: `rank_E` after swaps of two experts, the best first, until none brings more together.

    `affinity_EE` is symmetric. Only swaps that leave both ranks with at most `max_load` times the mean load count.
    """
    affinity_EE = affinity_EE.double().clone().fill_diagonal_(0)
    affinity_EE /= affinity_EE.max().clamp(min=1e-30)
    load_E = load_E.double() / (load_E.double().sum() / num_ranks).clamp(min=1e-30)  # a rank's mean load is 1
    rank_E = rank_E.clone()
    while True:
        load_R = torch.zeros(num_ranks, dtype=torch.float64).index_add_(0, rank_E, load_E)
        to_rank_ER = torch.zeros(len(rank_E), num_ranks, dtype=torch.float64).index_add_(1, rank_E, affinity_EE)
        # What expert i gains on the rank of j. A swap is two moves; the affinity of the two themselves is not gained.
        moves_EE = to_rank_ER[:, rank_E] - to_rank_ER.gather(1, rank_E[:, None])
        gain_EE = moves_EE + moves_EE.T - 2 * affinity_EE
        fits_EE = load_R[rank_E][:, None] - load_E[:, None] + load_E <= max_load + 1e-9  # the rank of i, with j for i
        allowed_EE = fits_EE & fits_EE.T & (rank_E[:, None] != rank_E)
        gain_EE = gain_EE.masked_fill(~allowed_EE, -torch.inf)
        if gain_EE.max() <= 1e-9:  # less is rounding, and could be gained for ever
            return rank_E
        i, j = divmod(int(gain_EE.argmax()), len(rank_E))
        rank_E[[i, j]] = rank_E[[j, i]]


def place(
    affinity_EE: torch.Tensor, load_E: torch.Tensor, num_ranks: int, max_load: float = MAX_LOAD, starts: int = STARTS
) -> torch.Tensor:
    """Returns int64 [E]: the rank of each expert, so that experts of high affinity share one and loads are even.

    Args:
        affinity_EE: [E, E], at least 0: what is gained by having two experts on one rank.
        load_E: [E], at least 0: what each expert adds to the load of its rank.
        num_ranks: R; each gets as many experts as under linear placement.
        max_load: the most that a rank may carry, relative to the mean; where `spread_by_load` can't keep to it, what it
            comes to.
        starts: searches, from random maps within the limit; the best end is returned, the same in every run.
    """
    affinity_EE = (affinity_EE + affinity_EE.T) / 2
    even_E = spread_by_load(load_E, num_ranks)
    limit = max(max_load, float(rank_loads(load_E, even_E, num_ranks).max()))
    random, best_E, most = torch.Generator().manual_seed(0), even_E, -1.0
    for _ in range(starts):
        chance_EE = torch.rand(affinity_EE.shape, generator=random)
        start_E = swap_experts(chance_EE + chance_EE.T, load_E, even_E, num_ranks, limit)
        rank_E = swap_experts(affinity_EE, load_E, start_E, num_ranks, limit)
        if (share := together(affinity_EE, rank_E)) > most:
            best_E, most = rank_E, share
    return best_E


class LayerPlacement(BaseModel):
    """One layer's map, and what it is expected to do for the texts of the calibration."""

    model_config = ConfigDict(extra="forbid")

    rank_of_expert: list[int]  # by logical expert id
    remote_domains: float = Field(description="Of a token with two experts: see expected_remote_domains.")
    remote_domains_linear: float = Field(description="The same under linear placement.")
    load: float = Field(description="Tokens routed to the experts of the largest rank, over the mean of the ranks.")
    load_linear: float = Field(description="The same under linear placement.")


class Placement(BaseModel):
    """Which rank holds which expert, for the MoE layers of one model: the content of `placement.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    base_model: str
    revision: str | None = None
    num_experts: int
    num_ranks: int = Field(ge=2)
    affinity: Affinity = Field(description="What says that two experts belong together.")
    layers: dict[int, LayerPlacement]  # by decoder layer index

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"this version of sere_dist reads schema {SCHEMA_VERSION}; place again or upgrade")
        return value

    @model_validator(mode="after")
    def _fills_ranks(self) -> "Placement":
        if not self.layers:
            raise ValueError("layers is empty")
        sizes = linear_ranks(self.num_experts, self.num_ranks).bincount(minlength=self.num_ranks).tolist()
        for layer, placed in self.layers.items():
            ranks = placed.rank_of_expert
            if len(ranks) != self.num_experts:
                raise ValueError(
                    f"layers.{layer}.rank_of_expert has {len(ranks)} entries, num_experts is {self.num_experts}"
                )
            if (found := [ranks.count(rank) for rank in range(self.num_ranks)]) != sizes:
                raise ValueError(
                    f"layers.{layer}.rank_of_expert gives the {self.num_ranks} ranks {found} experts, not {sizes}"
                )
        return self

    def ranks(self, layer: int) -> torch.Tensor:
        """Returns int64 [E]: the rank of each logical expert."""
        return torch.tensor(self.layers[layer].rank_of_expert)

    def order(self, layer: int) -> torch.Tensor:
        """Returns int64 [E]: the logical expert at each position, so that linear placement is this placement.

        Position p of the layer's permuted experts, and row p of its permuted router, are those of expert order[p].
        """
        return self.ranks(layer).argsort(stable=True)

    def orders(self) -> dict[int, torch.Tensor]:
        """Returns `order` of every layer."""
        return {layer: self.order(layer) for layer in self.layers}

    def check_serves(self, shape: MoeShape, layers: set[int], num_ranks: int) -> None:
        """Raises PlacementError, with every field that differs, if the placement is not for this model and ranks."""
        wanted = {"num_experts": shape.num_experts, "num_ranks": num_ranks, "layers": sorted(layers)}
        own = {"num_experts": self.num_experts, "num_ranks": self.num_ranks, "layers": sorted(self.layers)}
        if differing := [
            f"{name}: placement {own[name]}, served {wanted[name]}" for name in own if own[name] != wanted[name]
        ]:
            raise PlacementError(
                f"the placement was made for {self.base_model} on {self.num_ranks} ranks, not for what is being served "
                f"({'; '.join(differing)}). Make one: sere-dist place ARTIFACT --ranks {num_ranks}"
            )

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        """Reads and checks a placement.

        Raises:
            PlacementError: the file is missing or damaged, or a field is wrong; the message names it.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise PlacementError(f"no placement can be read at {path}: {error}") from error
        except ValidationError as error:
            raise PlacementError(f"damaged placement at {path}: {error}") from error


def propose(
    artifact: Artifact,
    num_ranks: int,
    max_load: float = MAX_LOAD,
    affinity: Affinity | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Placement:
    """Returns a map for every MoE layer, from what a calibration found.

    Args:
        artifact: of any method that looks at tokens.
        num_ranks, max_load: as in `place`; an expert's load is the tokens that were routed to it.
        affinity: what says that two experts belong together: how often tokens were routed to both, counted by the
            product of their router weights, or as a guess at that, how similar they are times the tokens of each.
            None: the better one that the artifact has.
        progress: wraps the layers, to show how far it is.

    Raises:
        PlacementError: the ranks are not 2 to E, or the artifact does not have what it takes.
    """
    config = artifact.config
    if not 2 <= num_ranks <= config.num_experts:
        raise PlacementError(f"{num_ranks} ranks: a placement needs 2 to num_experts ({config.num_experts})")
    if not artifact.tokens_per_expert:
        raise PlacementError("the artifact has no routing counts (experts.csv): calibrate with a method that uses data")
    coactivation = artifact.coactivation
    affinity = affinity or ("coactivation" if coactivation else "similarity")
    if affinity == "coactivation" and not coactivation:
        raise PlacementError("the artifact has no coactivation: calibrate again, or place by similarity")

    def placed(layer: int) -> LayerPlacement:
        load_E = torch.tensor(artifact.tokens_per_expert[layer], dtype=torch.float64)
        if affinity == "coactivation":
            affinity_EE = coactivation[layer]
        else:
            affinity_EE = artifact.similarity[layer].clamp(min=0) * load_E[:, None] * load_E
        rank_E = place(affinity_EE, load_E, num_ranks, max_load)
        linear_E = linear_ranks(config.num_experts, num_ranks)
        return LayerPlacement(
            rank_of_expert=rank_E.tolist(),
            remote_domains=expected_remote_domains(affinity_EE, rank_E, num_ranks),
            remote_domains_linear=expected_remote_domains(affinity_EE, linear_E, num_ranks),
            load=float(rank_loads(load_E, rank_E, num_ranks).max()),
            load_linear=float(rank_loads(load_E, linear_E, num_ranks).max()),
        )

    return Placement(
        base_model=config.base_model,
        revision=config.revision,
        num_experts=config.num_experts,
        num_ranks=num_ranks,
        affinity=affinity,
        layers={layer: placed(layer) for layer in progress(sorted(artifact.similarity))},
    )
