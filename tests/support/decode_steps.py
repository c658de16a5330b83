"""Small decode steps for property tests of the method."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from sere_dist.method.records import Step


class DrawnStep(NamedTuple):
    """A step, a similarity of its experts, S and rho."""

    step: Step
    similarity_EE: torch.Tensor
    select_top_k: int
    threshold: float

    def copy(self) -> "DrawnStep":
        step = Step(*(each.clone() for each in self.step[:3]))
        return self._replace(step=step, similarity_EE=self.similarity_EE.clone())

    def equals(self, other: "DrawnStep") -> bool:
        mine, theirs = ((*each.step[:3], each.similarity_EE) for each in (self, other))
        return all(map(torch.equal, mine, theirs))


@st.composite
def drawn_steps(draw):
    """A decode step of few experts and coarse values, so that ties, empty slots and full unions are common."""
    num_experts = draw(st.integers(1, 12))
    num_slots = draw(st.integers(1, min(6, num_experts)))
    num_tokens = draw(st.integers(0, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([2, 5, 1000]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    weights = (torch.randint(1, levels + 1, (num_tokens, num_slots), generator=generator) / levels).to(dtype)
    ids = torch.stack(
        [torch.randperm(num_experts, generator=generator)[:num_slots] for _ in range(num_tokens)]
        or [torch.empty(num_slots, dtype=torch.long)]
    )[:num_tokens]
    empty = torch.rand(ids.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    ids = ids.masked_fill(empty, -1).to(draw(st.sampled_from([torch.int32, torch.int64])))
    similarity = torch.randint(0, levels + 1, (num_experts, num_experts), generator=generator) / levels
    valid = torch.rand(num_tokens, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    select_top_k = draw(st.integers(-1, num_slots + 1))
    threshold = draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
    return DrawnStep(Step(weights, ids, valid), similarity.fill_diagonal_(1), select_top_k, threshold)
