"""The file `placement.json`: which rank holds which expert of every layer. `method.placement` finds the maps.

A placement is realised by permuting a layer's experts and router rows at load, under vLLM's linear placement; see
`Placement.order`.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import Layer
from sere_dist.files import written_whole
from sere_dist.method.placement import MAX_LOAD, expected_remote_domains, linear_ranks, place, rank_loads
from sere_dist.moe import MoeShape

SCHEMA_VERSION = 1
Affinity = Literal["coactivation", "similarity"]


class PlacementError(ValueError):
    """A placement that can't be used; the message names the file and the field."""


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
        """Writes the placement; a file that is there is replaced once the new one is whole.

        Raises:
            OSError: `path` can't be written; what was there is unchanged.
        """
        with written_whole(path) as file:
            file.write_text(self.model_dump_json(indent=1) + "\n")

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
    first = next(iter(artifact.layers.values()))
    if first.tokens_E is None:
        raise PlacementError("the artifact has no routing counts (experts.csv): calibrate with a method that uses data")
    has_coactivation = first.coactivation_EE is not None
    affinity = affinity or ("coactivation" if has_coactivation else "similarity")
    if affinity == "coactivation" and not has_coactivation:
        raise PlacementError("the artifact has no coactivation: calibrate again, or place by similarity")

    def placed(layer: Layer) -> LayerPlacement:
        assert layer.tokens_E is not None  # as in the first layer
        load_E = layer.tokens_E.double()
        if affinity == "coactivation":
            assert layer.coactivation_EE is not None  # as in the first layer
            affinity_EE = layer.coactivation_EE
        else:
            affinity_EE = layer.similarity_EE.clamp(min=0) * load_E[:, None] * load_E
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
        layers={layer: placed(artifact.layers[layer]) for layer in progress(sorted(artifact.layers))},
    )
