"""Where a layer's experts live: on which rank of vLLM's expert-parallel group, and on which node.

Shape suffixes: L MoE layers, E experts, R ranks, X replicas of an expert.
"""

from typing import Literal

import torch
from torch.distributed import ProcessGroup
from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_ep_group, in_the_same_node_as
from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner


def ranks_of_placement(num_experts: int, num_ranks: int, strategy: Literal["linear", "round_robin"]) -> torch.Tensor:
    """Returns int64 [E]: the rank of each expert under vLLM's placement; there are several ranks."""
    is_local_RE = torch.zeros(num_ranks, num_experts, dtype=torch.bool)
    for rank in range(num_ranks):
        _, local_E, *_ = determine_expert_map(num_ranks, rank, num_experts, strategy)
        assert local_E is not None  # only a single rank has no map
        is_local_RE[rank] = local_E >= 0
    return is_local_RE.int().argmax(dim=0)


def ranks_of_replicas(logical_to_physical_LEX: torch.Tensor, experts_a_rank: int) -> torch.Tensor:
    """Returns the rank [L, E] of each expert's first replica, from EPLB's map of physical experts (-1: none).

    vLLM spreads an expert's tokens over its replicas by their place in the batch, which re-routing does not foresee.
    """
    return logical_to_physical_LEX[..., 0] // experts_a_rank


def nodes_of_ranks(group: ProcessGroup) -> torch.Tensor:
    """Returns int64 [R]: the node of each rank, named by its first rank. All ranks of the group must call it."""
    together = torch.tensor([in_the_same_node_as(group, source) for source in range(group.size())])
    return together.int().argmax(dim=0)


def _replicas(runner: MoERunner) -> torch.Tensor:
    """Returns EPLB's map [E, X] of a layer's physical experts."""
    state = runner.router.eplb_state
    assert state is not None and state.logical_to_physical_map is not None  # EPLB is on
    return state.logical_to_physical_map


class ExpertMap:
    """Of every re-routed layer, at one place in memory, so that captured graphs see experts move.

    Attributes:
        num_ranks: of the expert-parallel group.
        rank, domain: decoder layer index -> int16 [E] on the model's device; a domain is a rank or a node.
        home: the domain where this worker's tokens have their attention; None where every rank has all tokens.
    """

    def __init__(
        self,
        runners: dict[int, MoERunner],
        num_experts: int,
        domain: str,
        parallel: ParallelConfig,
        device: torch.device | str,
    ):
        group = get_ep_group()
        self.runners, self.num_ranks = runners, group.world_size
        ranks_R = torch.arange(self.num_ranks) if domain == "rank" else nodes_of_ranks(group.cpu_group)
        self.domain_R = ranks_R.to(device, torch.int16)
        self.home = int(self.domain_R[group.rank_in_group]) if parallel.data_parallel_size > 1 else None
        self.is_moving = parallel.enable_eplb
        self.rank_LE = torch.zeros(len(runners), num_experts, dtype=torch.int16, device=device)
        self.domain_LE = torch.zeros_like(self.rank_LE)
        self.refresh()
        self.rank = dict(zip(runners, self.rank_LE, strict=True))
        self.domain = dict(zip(runners, self.domain_LE, strict=True))

    def refresh(self) -> None:
        """Takes over where the experts are now."""
        if self.is_moving:
            first_LE1 = torch.stack([_replicas(runner)[:, :1] for runner in self.runners.values()])
            local = next(iter(self.runners.values())).moe_config.num_local_experts
            self.rank_LE.copy_(ranks_of_replicas(first_LE1, local))
        else:
            for rank_E, runner in zip(self.rank_LE, self.runners.values(), strict=True):
                strategy = runner.expert_placement_strategy
                rank_E.copy_(ranks_of_placement(len(rank_E), self.num_ranks, strategy))
        self.domain_LE.copy_(self.domain_R[self.rank_LE.long()])
