"""What a step did: slots that changed, experts that run, domains that tokens visit, and bytes that they send.

Shape suffixes: T tokens of the step, K experts per token, E experts of the layer.
"""

import torch
from torch.nn.functional import pad

from sere_dist.method.fixed_point import FIXED_POINT_ONE
from sere_dist.method.projection import estimated_error
from sere_dist.method.records import ExpertPlaces, LayerTables, Step
from sere_dist.method.rerouting import active_experts

# What `count_step` counts. Experts are those of valid rows; "before" is what the router chose, "after" is what runs.
# The largest rank is the one with the most active experts. Domains and slots are summed over tokens; a domain is remote
# if it is not the token's home. A merged slot names an expert that the token has in an earlier slot, and is empty. The
# estimated error is in fixed point, and 0 under the paper's policy, which has no estimate.
COUNTERS = (
    "steps",
    "rows",
    "rerouted_slots",
    "critical_slots",
    "dropped_slots",
    "merged_slots",
    "active_experts_before",
    "active_experts_after",
    "largest_rank_before",
    "largest_rank_after",
    "domains_before",
    "domains_after",
    "remote_domains_before",
    "remote_domains_after",
    "remote_slots_before",
    "remote_slots_after",
    "estimated_error",
)


def named(totals: list[int]) -> dict[str, float]:
    """Returns counters by their names, the estimated error in the unit of w² n."""
    return dict(zip(COUNTERS, totals, strict=True)) | {"estimated_error": totals[-1] / FIXED_POINT_ONE}


def count_step(
    step: Step,
    new_ids_TK: torch.Tensor,
    primary_E: torch.Tensor,
    places: ExpertPlaces | None = None,
    merged_ids_TK: torch.Tensor | None = None,
    tables: LayerTables | None = None,
) -> torch.Tensor:
    """Returns int64 [len(COUNTERS) + num_ranks]: what one step of one layer adds to its counters.

    The active experts of each rank, after re-routing, stand behind the counters. A step without a valid row counts
    nothing. Experts are those that these rows choose: ranks that have other rows may run more.

    Args:
        step: what the router chose.
        new_ids_TK: what became of it.
        primary_E: bool [E], the primary experts; none where re-routing was off.
        places: where the experts live. Without domains none of the counters of domains and remote slots moves.
        merged_ids_TK: what `slots.merge_repeats` made of the new ids. None: slots that repeat an expert stay.
        tables: of method projection, for an estimate of the error. None: it is not estimated.
    """
    merged_ids_TK = new_ids_TK if merged_ids_TK is None else merged_ids_TK
    places, num_experts = places or ExpertPlaces(), len(primary_E)
    valid_T = torch.ones_like(step.ids_TK[:, 0], dtype=torch.bool) if step.valid_T is None else step.valid_T
    valid_TK = valid_T[:, None].expand_as(step.ids_TK)
    changed_TK = step.ids_TK != new_ids_TK
    dropped_TK = changed_TK & (new_ids_TK < 0)
    # What still runs outside the primary union stayed there because nothing was similar enough.
    is_primary_TK = primary_E[new_ids_TK.clamp(min=0).long()]
    critical_TK = valid_TK & (new_ids_TK >= 0) & ~is_primary_TK & primary_E.any()
    merged_TK = (new_ids_TK >= 0) & (merged_ids_TK < 0)
    slots = [(changed_TK & ~dropped_TK).sum(), critical_TK.sum(), dropped_TK.sum(), merged_TK.sum()]

    both = (step.ids_TK, merged_ids_TK)
    active_EN = torch.stack([active_experts(ids_TK, valid_TK, num_experts) for ids_TK in both], dim=1).long()
    rank_E = torch.zeros_like(active_EN[:, 0]) if places.rank_E is None else places.rank_E.long()
    by_rank_RN = active_EN.new_zeros(max(places.num_ranks, 1), 2).index_add_(0, rank_E, active_EN)
    pairs = [active_EN.sum(dim=0), by_rank_RN.amax(dim=0), *active_EN.new_zeros(3, 2)]
    if places.domain_E is not None:
        for when, ids_TK in enumerate(both):
            ids_of_valid_TK = ids_TK.masked_fill(~valid_TK, -1)
            pairs[2][when] = remote_domains(ids_of_valid_TK, places.domain_E).sum()
            pairs[3][when] = remote_domains(ids_of_valid_TK, places.domain_E, step.home_T).sum()
            pairs[4][when] = is_remote(ids_of_valid_TK, places.domain_E, step.home_T).sum()
    rows = valid_T.sum()
    error = torch.zeros_like(rows)
    if tables is not None and tables.size_E is not None:
        error = estimated_error(step, new_ids_TK, tables)
    of_slots = torch.stack([torch.ones_like(rows), rows, *slots])
    counts = torch.cat([of_slots, *pairs, error[None], by_rank_RN[: places.num_ranks, 1]])
    return counts * (rows > 0)


def is_remote(topk_ids_TK: torch.Tensor, domain_E: torch.Tensor, home_T: torch.Tensor | None = None) -> torch.Tensor:
    """Returns bool [T, K]: slots whose expert lives in another domain than the token's home (-1: no expert or home)."""
    domains_TK = domain_E[topk_ids_TK.clamp(min=0).long()]
    filled_TK = topk_ids_TK >= 0
    return filled_TK if home_T is None else filled_TK & (domains_TK != home_T[:, None])


def remote_domains(
    topk_ids_TK: torch.Tensor, domain_E: torch.Tensor, home_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns int64 [T]: the distinct domains other than its home that each token visits; without homes, all (C_T)."""
    domains_TK = domain_E[topk_ids_TK.clamp(min=0).long()].masked_fill(~is_remote(topk_ids_TK, domain_E, home_T), -1)
    in_order_TK = domains_TK.sort(dim=1).values
    new_TK = in_order_TK != pad(in_order_TK[:, :-1], (1, 0), value=-1)
    return (new_TK & (in_order_TK >= 0)).sum(dim=1)


def dispatch_bytes(
    tokens: float, remote_domains: float, remote_slots: float, *, num_ranks: int, hidden_size: int, element_size: int
) -> dict[str, float]:
    """Returns the bytes of hidden states that tokens send and receive in a layer, both together, by kind of dispatch.

    `remote_domains` and `remote_slots` are summed over the tokens; domains are ranks. The kinds:
    - `all_gather`: all-gather and reduce-scatter, vLLM's default: every token goes to every rank, whatever its experts.
    - `per_rank`: once to each remote rank (DeepEP high-throughput).
    - `per_slot`: once for each remote slot (DeepEP low-latency).
    """
    copies = {"all_gather": tokens * (num_ranks - 1), "per_rank": remote_domains, "per_slot": remote_slots}
    return {kind: 2 * count * hidden_size * element_size for kind, count in copies.items()}
