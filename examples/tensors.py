"""Re-route one decode step of one layer, with tensors alone: no model, no vLLM.

python -m examples.tensors
"""

import torch

from sere_dist import expert_similarity, reroute

EXPERTS, TOKENS, TOP_K, KEPT = 64, 16, 8, 2

torch.manual_seed(0)
similarity_EE = expert_similarity(torch.randn(EXPERTS, 128, 32), method="frobenius")  # of outputs [E, N, H]
weights_TK, ids_TK = torch.randn(TOKENS, EXPERTS).softmax(dim=1).topk(TOP_K)  # what a router chooses

new_ids_TK = reroute(weights_TK, ids_TK, similarity_EE, select_top_k=KEPT)

print(f"{(new_ids_TK != ids_TK).sum()} of {ids_TK.numel()} slots moved")
print(f"{len(ids_TK.unique())} active experts before, {len(new_ids_TK.unique())} after")
print(f"first token: {ids_TK[0].tolist()} -> {new_ids_TK[0].tolist()}")
