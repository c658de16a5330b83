"""What vLLM lacks for expert parallelism on CPUs: experts by local ids, and dispatch over gloo.

Loaded by workers on a CPU alone. Each part steps aside when vLLM has its own. With it, all-gather dispatch (vLLM's only
one on CPUs) works under data-parallel attention; `SparseAll2AllManager` is one that sends a token only where its
experts are, as DeepEP does on GPUs, so that what re-routing saves can be seen on the wire.

Shape suffixes: T tokens of this rank, K experts per token, E experts, R ranks, H hidden size.
"""

import dis
import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.parallel_state import get_ep_group
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

bytes_sent = 0  # by this worker to others, in `exchange`


def provide() -> None:
    """Adds to vLLM's classes what they lack."""
    reads_map = any(step.argval == "expert_map" for step in dis.get_instructions(CPUUnquantizedExperts.apply))
    if not reads_map:
        _choose_local_experts()
    if CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv:
        CpuCommunicator.all_gatherv = all_gatherv  # ty: ignore[invalid-assignment]  # the method that it lacks
    if CpuCommunicator.reduce_scatterv is DeviceCommunicatorBase.reduce_scatterv:
        CpuCommunicator.reduce_scatterv = reduce_scatterv  # ty: ignore[invalid-assignment]  # likewise


def send_sparsely(rank_E: torch.Tensor) -> None:
    """Has this worker's expert-parallel group dispatch by `SparseAll2AllManager` from now on."""
    group = get_ep_group()
    assert group.device_communicator is not None  # the group has several ranks
    group.device_communicator.all2all_manager = SparseAll2AllManager(group.cpu_group, rank_E)


def local_slots(
    topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, expert_map_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights and local ids: a slot whose expert lives elsewhere gets weight 0 and an id that runs anyway.

    `expert_map_E` holds local ids, -1 for experts of other ranks. The CPU kernel skips no slot, so the id is one of the
    token's other local experts, else one of the step's, else 0.
    """
    local_TK = expert_map_E[topk_ids_TK.long()].to(topk_ids_TK.dtype)
    any_of_token_T1 = local_TK.amax(dim=1, keepdim=True)
    stand_in_T1 = torch.where(any_of_token_T1 >= 0, any_of_token_T1, any_of_token_T1.amax().clamp(min=0))
    elsewhere_TK = local_TK < 0
    return topk_weights_TK.masked_fill(elsewhere_TK, 0), torch.where(elsewhere_TK, stand_in_T1, local_TK)


def _choose_local_experts() -> None:
    original = CPUUnquantizedExperts.apply

    @functools.wraps(original)
    def apply(self, *, topk_weights, topk_ids, expert_map, **others):
        if expert_map is not None:
            topk_weights, topk_ids = local_slots(topk_weights, topk_ids, expert_map)
        original(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=expert_map, **others)

    CPUUnquantizedExperts.apply = apply  # ty: ignore[invalid-assignment]  # vLLM calls it by names alone


def exchange(group: dist.ProcessGroup, parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
    """Sends `parts[r]` to rank r of the group, and returns what each rank sent here, `sizes[r]` rows from rank r.

    All parts have one dtype and one shape behind the rows. Adds to `bytes_sent` what goes to other ranks.
    """
    global bytes_sent
    arrived = [parts[0].new_empty(size, *parts[0].shape[1:]) for size in sizes]
    arrived[group.rank()].copy_(parts[group.rank()])
    others = [rank for rank in range(group.size()) if rank != group.rank()]
    # As bytes: gloo does not know every dtype. Its messages go in order, and no data goes before the receiver has said
    # that it is ready. So that comes first: behind the data, as in gloo's all-to-all, the other direction would wait.
    incoming = {rank: arrived[rank].view(torch.uint8) for rank in others if sizes[rank]}
    outgoing = {rank: parts[rank].contiguous().view(torch.uint8) for rank in others if len(parts[rank])}
    on_their_way = [dist.irecv(part, group=group, group_src=rank) for rank, part in incoming.items()]
    on_their_way += [dist.isend(part, group=group, group_dst=rank) for rank, part in outgoing.items()]
    for each in on_their_way:
        assert each is not None  # this rank is one of the group
        each.wait()
    bytes_sent += sum(part.nbytes for part in outgoing.values())
    return arrived


def all_gatherv(
    self: CpuCommunicator, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
) -> torch.Tensor | list[torch.Tensor]:
    """Returns the rows of all ranks, in order; rank r has `sizes[r]` (None: as many as this one)."""
    if dim != 0:
        raise NotImplementedError(f"all_gatherv gathers rows (dim 0), not dim {dim}")

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        rows = sizes or [len(tensor)] * self.world_size
        return torch.cat(exchange(self.cpu_group, [tensor] * self.world_size, rows))

    return [gather(tensor) for tensor in input_] if isinstance(input_, list) else gather(input_)


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
) -> torch.Tensor:
    """Returns this rank's rows of the sum over ranks; rank r gets `sizes[r]` rows (None: all get as many)."""
    if dim not in (0, -input_.dim()):
        raise NotImplementedError(f"reduce_scatterv scatters rows (dim 0), not dim {dim}")
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    parts = exchange(self.cpu_group, input_.split(sizes), [sizes[self.rank_in_group]] * self.world_size)
    return functools.reduce(torch.add, parts)  # in the order of ranks: the same sum everywhere


class SparseAll2AllManager(AgRsAll2AllManager):
    """Sends a token only to the ranks that hold one of its experts, and gets its output from them alone."""

    def __init__(self, cpu_group: dist.ProcessGroup, rank_E: torch.Tensor):
        """`rank_E` [E]: the rank that holds each expert."""
        super().__init__(cpu_group)
        self.rank_E = rank_E
        # Of the dispatch that is to be combined: the tokens that went to each rank, and how many came from it.
        self.sent: list[torch.Tensor] = []
        self.received: list[int] = []
        self.num_tokens = 0

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
    ):
        ranks_TK = self.rank_E[topk_ids.long()]
        self.sent = [(ranks_TK == rank).any(dim=1).nonzero().squeeze(1) for rank in range(self.world_size)]
        self.num_tokens = len(hidden_states)
        counts = [torch.tensor([len(tokens)]) for tokens in self.sent]
        self.received = torch.cat(exchange(self.cpu_group, counts, [1] * self.world_size)).tolist()
        arrived = [
            torch.cat(exchange(self.cpu_group, [tensor[tokens] for tokens in self.sent], self.received))
            for tensor in (hidden_states, topk_weights, topk_ids, *(extra_tensors or []))
        ]
        return tuple(arrived) if extra_tensors is None else (*arrived[:3], arrived[3:])

    def combine(self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False) -> torch.Tensor:
        parts = exchange(self.cpu_group, hidden_states.split(self.received), [len(tokens) for tokens in self.sent])
        output = hidden_states.new_zeros(self.num_tokens, *hidden_states.shape[1:])
        for tokens, part in zip(self.sent, parts, strict=True):  # in the order of ranks, as in `reduce_scatterv`
            output.index_add_(0, tokens, part)
        return output

    def combine_into_output(
        self, hidden_states: torch.Tensor, output: torch.Tensor, is_sequence_parallel: bool = False
    ) -> torch.Tensor:
        return output.copy_(self.combine(hidden_states))

    def allocate_combine_input(self, *_args, **_named) -> None:
        return None
