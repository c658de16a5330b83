"""What travels together: a step's routing, a layer's tables, the numbers a user sets, and where experts live.

They are named tuples of tensors and numbers, so `torch.vmap` takes them. Shape suffixes: T tokens of the step, K
experts per token, E experts of the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # nothing here runs torch, and `config` is imported where seconds count
    import torch


class Step(NamedTuple):
    """What the router chose in one decode step of one layer."""

    weights_TK: torch.Tensor  # router weights, any float dtype, slots in any order
    ids_TK: torch.Tensor  # logical expert ids, int32 or int64; -1 is an empty slot
    valid_T: torch.Tensor | None = None  # bool; other rows (prefill, padding) neither change nor count. None: all
    home_T: torch.Tensor | None = None  # int, the domain where a token's attention ran. None: no token has one
    chance_T: torch.Tensor | None = None  # float32, that a token's output is used. None: it always is
    runs_T: torch.Tensor | None = None  # bool; rows that are not valid whose experts run all the same. None: no row


class LayerTables(NamedTuple):
    """What a calibration found out about one layer's experts. Row e of a table is about replacing expert e."""

    similarity_EE: torch.Tensor  # float32, of e to each possible substitute; diagonal 1
    coefficient_EE: torch.Tensor | None = None  # float32, the substitute's multiple nearest to e; method projection
    size_E: torch.Tensor | None = None  # float32, mean squared output relative to the layer's mean; method projection

    def to(self, device: torch.device | str) -> LayerTables:
        """Returns the tables on a device."""
        coefficient_EE = None if self.coefficient_EE is None else self.coefficient_EE.to(device)
        size_E = None if self.size_E is None else self.size_E.to(device)
        return LayerTables(self.similarity_EE.to(device), coefficient_EE, size_E)


class Settings(NamedTuple):
    """The numbers in force. Prices are squared errors in the unit of w² n: router weight squared times size."""

    select_top_k: int  # S, the experts that a token keeps. 0: none, prices alone decide. S < 0 and S >= K mean off
    threshold: float = 0.0  # rho: an expert with no primary expert this similar stays. 0: none stays
    expert_price: float = 0.0  # an expert runs if the step would lose this much without it. 0: S alone decides
    traffic_price: float = 0.0  # what one more domain to visit costs. 0: quality alone decides
    balance_price: float = 0.0  # what one more expert on the rank with most costs. 0: ranks do not matter


class ExpertPlaces(NamedTuple):
    """Where one layer's experts live under expert parallelism."""

    rank_E: torch.Tensor | None = None  # int, the rank that holds each expert. None: one rank holds all
    num_ranks: int = 0
    domain_E: torch.Tensor | None = None  # int, the rank or the node that counts for traffic. None: none does
