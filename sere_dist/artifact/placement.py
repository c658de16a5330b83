"""The file `placement.json`: which rank holds which expert of every layer. `method.placement` finds the maps.

A placement is realised by permuting a layer's experts and router rows at load, under vLLM's linear placement; see
`Placement.order`. One with replicas (`ReplicaPlacement`) can't: only vLLM's EPLB has replicas, and it takes no map from
a file.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.layer import Layer
from sere_dist.files import written_whole
from sere_dist.method.placement import (
    MAX_LOAD,
    expected_remote_domains,
    linear_ranks,
    of_replicas,
    place,
    place_replicas,
    rank_loads,
)
from sere_dist.moe import MoeShape

SCHEMA_VERSION = 1
MOST_REDUNDANT = 1023  # vllm/distributed/eplb/eplb_state.py
Affinity = Literal["coactivation", "similarity"]


class PlacementError(ValueError):
    """A placement that can't be used; the message names the file and the field."""


class Expected(BaseModel):
    """What one layer's map is expected to do for the texts of the calibration, beside vLLM's own map.

    vLLM's is linear placement, or with replicas what EPLB starts from: the first experts once more, at the end.
    """

    model_config = ConfigDict(extra="forbid")

    remote_domains: float = Field(description="Of a token with two experts: see expected_remote_domains.")
    remote_domains_linear: float = Field(description="The same under vLLM's map.")
    remote_nodes: float | None = Field(default=None, description="Likewise, where the domains are nodes.")
    remote_nodes_linear: float | None = Field(default=None, description="The same under vLLM's map.")
    load: float = Field(description="Tokens routed to the experts of the largest rank, over the mean of the ranks.")
    load_linear: float = Field(description="The same under vLLM's map.")


class LayerPlacement(Expected):
    """One layer's map of ranks."""

    rank_of_expert: list[int]  # by logical expert id


class LayerReplicas(Expected):
    """One layer's map with replicas."""

    physical_to_logical: list[int]  # the logical expert of each physical one, ranks in order: as vLLM's EPLB has it


class _PlacementFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    base_model: str
    revision: str | None = None
    num_experts: int
    num_ranks: int = Field(ge=2)
    num_nodes: int = Field(default=1, ge=1, description="Nodes of as many ranks each, in order.")
    affinity: Affinity = Field(description="What says that two experts belong together.")

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != SCHEMA_VERSION:
            raise ValueError(f"this version of sere_dist reads schema {SCHEMA_VERSION}; place again or upgrade")
        return value

    def save(self, path: str | Path) -> None:
        """Writes the placement; a file that is there is replaced once the new one is whole.

        Raises:
            OSError: `path` can't be written; what was there is unchanged.
        """
        with written_whole(path) as file:
            file.write_text(self.model_dump_json(indent=1, exclude_none=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
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


class Placement(_PlacementFile):
    """Which rank holds which expert, for the MoE layers of one model: the content of `placement.json`."""

    layers: dict[int, LayerPlacement]  # by decoder layer index

    @model_validator(mode="before")
    @classmethod
    def _has_no_replicas(cls, content: Any) -> Any:
        if isinstance(content, dict) and "num_redundant" in content:
            raise ValueError(
                "this placement has replicas, which vLLM takes from no file: place without --redundant, or let EPLB "
                "find replicas of its own (enable_eplb, without a placement)"
            )
        return content

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


class ReplicaPlacement(_PlacementFile):
    """Which expert is in which physical place, for the MoE layers of one model: `placement.json` with replicas."""

    num_redundant: int = Field(ge=1, le=MOST_REDUNDANT)
    layers: dict[int, LayerReplicas]  # by decoder layer index

    @model_validator(mode="after")
    def _fills_places(self) -> "ReplicaPlacement":
        if not self.layers:
            raise ValueError("layers is empty")
        places = self.num_experts + self.num_redundant
        for layer, placed in self.layers.items():
            if len(placed.physical_to_logical) != places:
                raise ValueError(
                    f"layers.{layer}.physical_to_logical has {len(placed.physical_to_logical)} entries, num_experts + "
                    f"num_redundant is {places}"
                )
            if set(placed.physical_to_logical) != set(range(self.num_experts)):
                raise ValueError(f"layers.{layer}.physical_to_logical does not name each of {self.num_experts} experts")
        return self

    def maps(self) -> torch.Tensor:
        """Returns int64 [layers, num_experts + num_redundant], as EPLB's policies return it, layers in order."""
        return torch.tensor([self.layers[layer].physical_to_logical for layer in sorted(self.layers)])


def propose(
    artifact: Artifact,
    num_ranks: int,
    max_load: float = MAX_LOAD,
    affinity: Affinity | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    num_nodes: int = 1,
) -> Placement:
    """Returns a map for every MoE layer, from what a calibration found.

    Args:
        artifact: of any method that looks at tokens.
        num_ranks, max_load, num_nodes: as in `place`; an expert's load is the tokens that were routed to it.
        affinity: what says that two experts belong together: how often tokens were routed to both, counted by the
            product of their router weights, or as a guess at that, how similar they are times the tokens of each.
            None: the better one that the artifact has.
        progress: wraps the layers, to show how far it is.

    Raises:
        PlacementError: the ranks are not 2 to E, or not shared evenly by the nodes, or the artifact does not have what
            it takes.
    """
    config = artifact.config
    affinity = _checked(artifact, num_ranks, num_nodes, affinity)

    def placed(layer: Layer) -> LayerPlacement:
        affinity_EE, load_E = _measured(layer, affinity)
        rank_E = place(affinity_EE, load_E, num_ranks, max_load, num_nodes=num_nodes)
        linear_E = linear_ranks(config.num_experts, num_ranks)
        both = [(affinity_EE, load_E, each_E) for each_E in (rank_E, linear_E)]
        return LayerPlacement(rank_of_expert=rank_E.tolist(), **_expected(both, num_ranks, num_nodes))

    return Placement(
        base_model=config.base_model,
        revision=config.revision,
        num_experts=config.num_experts,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        affinity=affinity,
        layers=_of_all(placed, artifact.layers, progress),
    )


def propose_replicas(
    artifact: Artifact,
    num_ranks: int,
    redundant: int,
    max_load: float = MAX_LOAD,
    affinity: Affinity | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    num_nodes: int = 1,
) -> ReplicaPlacement:
    """Returns a map with `redundant` replicas for every MoE layer, from what a calibration found.

    Arguments as in `propose`. Experts get replicas by their load, and each carries an even part of it.

    Raises:
        PlacementError: as in `propose`, or the replicas are not 1 to 1023, or leave ranks with more than others, which
            vLLM's EPLB does not take.
    """
    config = artifact.config
    affinity = _checked(artifact, num_ranks, num_nodes, affinity)
    if not 1 <= redundant <= MOST_REDUNDANT:
        raise PlacementError(f"{redundant} replicas: vLLM's EPLB takes 1 to {MOST_REDUNDANT}")
    if over := (config.num_experts + redundant) % num_ranks:
        more = redundant + num_ranks - over
        fewer = f"{redundant - over} or " if redundant > over else ""
        raise PlacementError(
            f"{config.num_experts} experts and {redundant} replicas are not shared evenly by {num_ranks} ranks, as "
            f"vLLM's EPLB wants it: give --redundant {fewer}{more}"
        )

    def placed(layer: Layer) -> LayerReplicas:
        affinity_EE, load_E = _measured(layer, affinity)
        logical_P = place_replicas(affinity_EE, load_E, num_ranks, redundant, max_load, num_nodes)
        linear_P = linear_ranks(len(logical_P), num_ranks)
        vllms_P = torch.arange(len(logical_P)) % config.num_experts
        both = [(*of_replicas(affinity_EE, load_E, each_P), linear_P) for each_P in (logical_P, vllms_P)]
        return LayerReplicas(physical_to_logical=logical_P.tolist(), **_expected(both, num_ranks, num_nodes))

    return ReplicaPlacement(
        base_model=config.base_model,
        revision=config.revision,
        num_experts=config.num_experts,
        num_ranks=num_ranks,
        num_nodes=num_nodes,
        num_redundant=redundant,
        affinity=affinity,
        layers=_of_all(placed, artifact.layers, progress),
    )


Placed = TypeVar("Placed", bound=Expected)


def _of_all(
    placed: Callable[[Layer], Placed],
    layers: Mapping[int, Layer],
    progress: Callable[[Iterable[int]], Iterable[int]],
) -> dict[int, Placed]:
    """Returns what `placed` returns for each layer, one on each core: the tensors are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            found = {layer: pool.submit(placed, layers[layer]) for layer in sorted(layers)}
            return {layer: found[layer].result() for layer in progress(sorted(layers))}
    finally:
        torch.set_num_threads(threads)


def _checked(artifact: Artifact, num_ranks: int, num_nodes: int, affinity: Affinity | None) -> Affinity:
    """Returns what says that experts belong together; raises PlacementError, see `propose`."""
    config = artifact.config
    if not 2 <= num_ranks <= config.num_experts:
        raise PlacementError(f"{num_ranks} ranks: a placement needs 2 to num_experts ({config.num_experts})")
    if num_ranks % num_nodes:
        raise PlacementError(f"{num_ranks} ranks on {num_nodes} nodes: each node must have as many")
    first = next(iter(artifact.layers.values()))
    if first.tokens_E is None:
        raise PlacementError("the artifact has no routing counts (experts.csv): calibrate with a method that uses data")
    has_coactivation = first.coactivation_EE is not None
    affinity = affinity or ("coactivation" if has_coactivation else "similarity")
    if affinity == "coactivation" and not has_coactivation:
        raise PlacementError("the artifact has no coactivation: calibrate again, or place by similarity")
    return affinity


def _measured(layer: Layer, affinity: Affinity) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the affinity [E, E] and the load [E] of a layer's experts."""
    assert layer.tokens_E is not None  # as `_checked` saw it in the first layer
    load_E = layer.tokens_E.double()
    if affinity == "coactivation":
        assert layer.coactivation_EE is not None  # likewise
        return layer.coactivation_EE, load_E
    return layer.similarity_EE.clamp(min=0) * load_E[:, None] * load_E, load_E


def _expected(
    both: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], num_ranks: int, num_nodes: int
) -> dict[str, float]:
    """Returns the fields of `Expected`, of our map and of vLLM's: affinity, load and ranks of (physical) experts."""
    found = {}
    for suffix, (affinity, load, rank) in zip(("", "_linear"), both, strict=True):
        found["remote_domains" + suffix] = expected_remote_domains(affinity, rank, num_ranks)
        if num_nodes > 1:
            node = rank // (num_ranks // num_nodes)
            found["remote_nodes" + suffix] = expected_remote_domains(affinity, node, num_nodes)
        found["load" + suffix] = float(rank_loads(load, rank, num_ranks).max())
    return found
