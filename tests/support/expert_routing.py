"""How expert kernels bring tokens to their experts, in plain Python, after the kernels' sources.

Each model returns the slots (token, column) that it gets wrong: for which no row, or another expert's row, is computed.
"""

from collections import Counter

import torch


def first_slot_routing(ids_TK: torch.Tensor, num_experts: int) -> list[tuple[int, int]]:
    """FlashInfer's CUTLASS prologue (cutlass_fused_moe_kernels.cuh, blockExpertPrefixSumKernel): for each expert and
    token the first slot that names it gets a row, and the search ends there. An id outside the experts gets none, and
    the sum leaves it out."""
    ids = ids_TK.tolist()
    rows = set()
    for expert in range(num_experts):
        for token, slots in enumerate(ids):
            for column, named in enumerate(slots):
                if named == expert:
                    rows.add((token, column))
                    break
    return [
        (token, column)
        for token, slots in enumerate(ids)
        for column, named in enumerate(slots)
        if 0 <= named < num_experts and (token, column) not in rows
    ]


def bit_matrix_routing(ids_TK: torch.Tensor, num_experts: int, block: int = 32) -> list[tuple[int, int]]:
    """OpenAI's triton_kernels 3.5 (make_routing_data): an expert's rows are counted as bits, one a token, but a slot's
    place among them by its rank among the sorted slots of a block of tokens. -1 sets no bit and gets no place."""
    ids = ids_TK.tolist()
    blocks = [range(start, min(start + block, len(ids))) for start in range(0, len(ids), block)]
    bits = [{expert for expert in slots if expert >= 0} for slots in ids]
    counts = [Counter(expert for token in tokens for expert in bits[token]) for tokens in blocks]
    of_expert = Counter()
    for each in counts:
        of_expert += each
    first_row, rows = {}, 0
    for expert in range(num_experts):
        first_row[expert] = rows
        rows += of_expert[expert]
    owner = [expert for expert in range(num_experts) for _ in range(of_expert[expert])]

    place, at, before = {}, {}, Counter()
    for tokens, count in zip(blocks, counts, strict=True):
        slots = sorted((e, t, k) for t in tokens for k, e in enumerate(ids[t]) if e >= 0)
        seen = Counter()
        for expert, token, column in slots:
            row = first_row[expert] + before[expert] + seen[expert]
            seen[expert] += 1
            place[token, column], at[row] = row, (token, column)
        before += count
    return [
        slot
        for slot, row in place.items()
        if row >= len(owner) or owner[row] != ids[slot[0]][slot[1]] or at[row] != slot
    ]


def messages_to_an_expert(ids_TK: torch.Tensor) -> int:
    """DeepEP's low-latency dispatch (internode_ll.cu): one message for every slot that names an expert, put into a
    buffer for this rank and that expert without a look at its size. Returns the most that one expert gets."""
    return int(torch.bincount(ids_TK[ids_TK >= 0].flatten().long()).max())
