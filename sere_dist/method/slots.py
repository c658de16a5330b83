"""What an expert kernel is handed: the re-routed slots of a step, in a form that it can take.

Re-routing may send several slots of a token to one expert, and policy projection drops slots. Expert kernels differ in
which of the two they can take: slots that repeat an expert, or empty slots. So a step ends in one of two forms:

- `merge_repeats`: no token names an expert twice, and slots may be empty. The layer computes the same sum of experts,
  in fewer rows, and no expert gets more messages from a rank than that rank has tokens.
- `fill_dropped`: no slot that the router filled is empty, and tokens may repeat an expert.

Shape suffixes: T tokens of the step, K experts per token.
"""

import torch

from sere_dist.method.records import Step
from sere_dist.method.rerouting import filled_slots, slots_by_weight


def merge_repeats(
    weights_TK: torch.Tensor, ids_TK: torch.Tensor, valid_T: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns weights and ids [T, K] in which the valid tokens name every expert once.

    The first slot of an expert gets the sum of the token's weights there: in float32, in the order of the slots,
    rounded once. The others get the id -1 and the weight 0. Slots of an expert that a token names once do not change.
    """
    filled_TK = filled_slots(ids_TK, valid_T)
    weights_of_TK = weights_TK.float()
    sum_TK, slots_TK = torch.zeros_like(weights_of_TK), torch.zeros_like(ids_TK)
    is_first_TK = filled_TK
    for column in range(ids_TK.shape[1]):
        same_TK = filled_TK & (ids_TK == ids_TK[:, column : column + 1])
        sum_TK = sum_TK + torch.where(same_TK, weights_of_TK[:, column : column + 1], 0)
        slots_TK = slots_TK + same_TK
        is_first_TK = is_first_TK & ~(same_TK & (torch.arange(ids_TK.shape[1], device=ids_TK.device) > column))
    merged_TK = filled_TK & ~is_first_TK
    new_weights_TK = torch.where(is_first_TK & (slots_TK > 1), sum_TK.to(weights_TK.dtype), weights_TK)
    return new_weights_TK.masked_fill(merged_TK, 0), ids_TK.masked_fill(merged_TK, -1)


def fill_dropped(step: Step, new_ids_TK: torch.Tensor) -> torch.Tensor:
    """Returns new ids [T, K] in which a dropped slot, of weight 0, repeats the expert of its token's heaviest slot."""
    heaviest_T1 = new_ids_TK.gather(1, slots_by_weight(step.weights_TK)[:, :1])
    return torch.where((new_ids_TK < 0) & (step.ids_TK >= 0), heaviest_T1, new_ids_TK)
