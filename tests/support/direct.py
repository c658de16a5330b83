"""What a calibration finds, computed from whole forward passes of the example model, one text at a time."""

import torch
from transformers import AutoTokenizer, PreTrainedModel

from examples.tiny_moe.data import CALIBRATION, MODEL
from sere_dist.calibration.texts import read_texts, tokenise
from sere_dist.moe import hooked_experts


def calibration_texts(count: int, length: int, **which: int) -> list[list[int]]:
    """Returns the token ids of the texts that a calibration with these settings uses."""
    return tokenise(read_texts(str(CALIBRATION)), AutoTokenizer.from_pretrained(MODEL), count, length, **which)


def direct(model: PreTrainedModel, texts: list[list[int]]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Returns, by layer, the outputs [E, N, H] of every expert and the routing weights [N, E], from the weights alone.

    Without our streaming, padding or scoring.
    """
    captured: dict[int, list] = {}
    with torch.no_grad(), hooked_experts(model, lambda layer, routing: captured.setdefault(layer, []).append(routing)):
        for text in texts:
            model(torch.tensor([text]))
    results = {}
    for layer, routings in captured.items():
        hidden_NH, index_NK, weights_NK = (torch.cat(parts) for parts in zip(*routings, strict=True))
        experts = model.model.layers[layer].mlp.experts
        with torch.no_grad():
            gate, up = torch.einsum("nh,eih->eni", hidden_NH, experts.gate_up_proj).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            outputs_ENH = torch.einsum("eni,ehi->enh", inner, experts.down_proj)
        weights_NE = torch.zeros(len(hidden_NH), experts.num_experts).scatter(1, index_NK, weights_NK.float())
        results[layer] = outputs_ENH, weights_NE
    return results
