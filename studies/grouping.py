"""Which requests decode together: by what is known of the experts that each uses. Measured by `studies.scheduling`.

Shape suffixes: N requests, F layers times experts, R replicas, B requests that decode together, S decode steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

BATCHES, REPLICAS, WINDOWS = (4, 16, 64), (2, 4, 8), (2, 8, 32)
PASSES_OF_WINDOW = 2
RANDOM, KIND, PROMPT_EVEN, BY_PROMPT = "at random", "by kind", "by prompt, even loads", "by prompt"
BY_ANSWER, SWAPPED = "by answer", "by answer, swapped"


class Schedule(NamedTuple):
    """Which text and which of its decode steps stands in each row of each step, both [steps, B]."""

    text_SB: torch.Tensor
    step_SB: torch.Tensor


Arranged = dict[str, tuple[Schedule, list[int]]]


def similar(profile_XF: torch.Tensor, sum_YF: torch.Tensor) -> torch.Tensor:
    """Returns the cosines [X, Y]; 0 for a sum of nothing."""
    return F.normalize(profile_XF, dim=1) @ F.normalize(sum_YF, dim=1).T


def spread(profile_NF: torch.Tensor, replicas: int, room: int, slack: int | None = None) -> torch.Tensor:
    """Returns int64 [replicas, room]: the requests of each replica, which arrive in order and go to the most similar.

    Args:
        profile_NF: what is known of each request, less the mean over requests; N = replicas * room.
        slack: a replica may have so many requests more than the one with the fewest, at most. None: until it is full.
    """
    sum_RF = profile_NF.new_zeros(replicas, profile_NF.shape[1])
    members: list[list[int]] = [[] for _ in range(replicas)]
    for request, profile_F in enumerate(profile_NF):
        most = room - 1 if slack is None else min(map(len, members)) + slack
        is_open = torch.tensor([len(each) <= most for each in members])
        chosen = int(similar(profile_F[None], sum_RF)[0].masked_fill(~is_open, -torch.inf).argmax())
        members[chosen].append(request)
        sum_RF[chosen] += profile_F
    return torch.tensor(members)


def swapped(members_RB: torch.Tensor, share_NF: torch.Tensor, sweeps: int = 3) -> torch.Tensor:
    """Returns the groups after swaps of two requests that make the expected union smaller, the best for each in turn.

    A request uses each expert in this share of its steps [N, F], and independently of the others' steps.
    """
    replicas, room = members_RB.shape
    place_N, order_N = torch.arange(replicas).repeat_interleave(room), members_RB.flatten().clone()
    unused_NF = (1 - share_NF.double().clamp(max=0.999))[order_N]
    for _ in range(sweeps):
        before = order_N.clone()
        for one in range(len(order_N)):
            # How likely nobody in the group of each uses an expert, as it is and without that request.
            idle_NF = unused_NF.view(replicas, room, -1).prod(dim=1)[place_N]
            without_NF = idle_NF / unused_NF
            after_N = unused_NF @ without_NF[one] + without_NF @ unused_NF[one]
            gain_N = after_N - idle_NF.sum(dim=1) - idle_NF[one].sum()
            gain_N[place_N == place_N[one]] = 0
            if gain_N.max() > 1e-9:
                other = int(gain_N.argmax())
                order_N[[one, other]], unused_NF[[one, other]] = order_N[[other, one]], unused_NF[[other, one]]
        if torch.equal(before, order_N):
            break
    return order_N.view(replicas, room)


def side_by_side(members_RB: torch.Tensor, steps: int) -> Schedule:
    """Returns the decode steps of all replicas, one after the other, in each of which all requests are as far."""
    replicas, room = members_RB.shape
    text_SB = members_RB.repeat_interleave(steps, dim=0)
    return Schedule(text_SB, torch.arange(steps).repeat(replicas)[:, None].expand(-1, room))


def without_pause(
    profile_NF: torch.Tensor, batch: int, window: int, steps: int, most_passes: int, admit: int
) -> tuple[Schedule, list[int]]:
    """Returns the steps of one replica in which none of the first batch is left, and by how many each was passed.

    Requests wait in order from the beginning; each decodes so many steps. The first batch is spread over them.

    Args:
        window: the next is the most similar of so many that wait longest to the requests that decode.
        most_passes: one that so many later ones have passed is next.
        admit: requests after the first batch.
    """
    running, waiting = list(range(batch)), list(range(batch, len(profile_NF)))
    done = [slot * steps // batch for slot in range(batch)]
    passed, texts, places, passes = dict.fromkeys(waiting, 0), [], [], []
    while True:
        if min(running) >= batch:
            texts.append(list(running))
            places.append(list(done))
        done = [step + 1 for step in done]
        for slot in (slot for slot, step in enumerate(done) if step == steps):
            if len(passes) == admit:
                return Schedule(torch.tensor(texts), torch.tensor(places)), passes
            choice = 0
            if passed[waiting[0]] < most_passes:
                stay = profile_NF[[text for other, text in enumerate(running) if other != slot]].sum(0, keepdim=True)
                choice = int(similar(profile_NF[waiting[:window]], stay).argmax())
            for earlier in waiting[:choice]:
                passed[earlier] += 1
            running[slot], done[slot] = waiting.pop(choice), 0
            passes.append(passed[running[slot]])


class Cell(NamedTuple):
    """A choice among replicas, or with a window among those that wait at one."""

    replicas: int
    batch: int
    window: int | None = None


def cells(num_requests: int) -> list[Cell]:
    found = [Cell(replicas, batch) for batch in BATCHES for replicas in REPLICAS if replicas * batch <= num_requests]
    # Where the first batch has to leave before anything is measured, there must be requests for some time more.
    long = [batch for batch in BATCHES if 2 * admitted(num_requests, batch) >= 3 * batch]
    return found + [Cell(1, batch, window) for batch in long for window in WINDOWS]


def admitted(num_requests: int, batch: int) -> int:
    """Returns how many requests after the first batch are admitted: all while the largest window is full."""
    return num_requests - batch - max(WINDOWS)


def arranged(
    cell: Cell, steps: int, prompt_NF: torch.Tensor, answer_NF: torch.Tensor, kind_N: torch.Tensor
) -> Arranged:
    """Returns the schedule of each rule, and by how many others each request was passed where it waited.

    Args:
        steps: of each request.
        prompt_NF: the share of a request's tokens that use each expert of each layer, in the order of arrival. Likewise
            `answer_NF`, of what is decoded. Across replicas only as many requests come as there is room for.
    """
    prompt, answer = (share_NF - share_NF.mean(0) for share_NF in (prompt_NF, answer_NF))
    if cell.window is not None:
        rules = {RANDOM: (prompt, 1), BY_PROMPT: (prompt, cell.window), BY_ANSWER: (answer, cell.window)}
        admit, most_passes = admitted(len(prompt_NF), cell.batch), PASSES_OF_WINDOW * cell.window
        return {
            rule: without_pause(profile_NF, cell.batch, window, steps, most_passes, admit)
            for rule, (profile_NF, window) in rules.items()
        }
    shape = cell.replicas, cell.batch
    room = cell.replicas * cell.batch
    prompt, answer = prompt[:room], answer[:room]
    by_answer = spread(answer, *shape)
    groups = {
        RANDOM: torch.arange(room).view(shape),
        KIND: kind_N[:room].argsort(stable=True).view(shape),
        PROMPT_EVEN: spread(prompt, *shape, slack=0),
        BY_PROMPT: spread(prompt, *shape),
        BY_ANSWER: by_answer,
        SWAPPED: swapped(by_answer, answer_NF[:room]),
    }
    return {rule: (side_by_side(members_RB, steps), []) for rule, members_RB in groups.items()}
