"""Families other than the example's, calibrated by our functions as small random checkpoints."""

import copy
import json
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from sere_dist.artifact.folder import Artifact
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import ExpertInputs, expert_inputs, run_layer, score_layer, text_blocks
from sere_dist.calibration.sensitivity import TOKENS_A_BACKWARD, layer_sensitivities
from sere_dist.moe import MoeShape, expert_outputs, routed_experts
from sere_dist.standard_errors import with_error
from tests.support.artifacts import small_artifact
from tests.support.families import EXPERTS, FAMILIES

TEXT_LENGTHS = (23, 40, 9, 31, 16, 38)
TOLERANCE = 1e-5


def save_random(config: PretrainedConfig, folder: Path, **how) -> None:
    """Saves a model whose every tensor is random: biases too, and weights large enough for gates and clamps to act."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        tensor.normal_(mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder, **how)


class Calibrated(NamedTuple):
    """A saved model, what our functions say reaches its experts, and what does in a plain forward pass, by layer."""

    folder: Path
    moe_layers: tuple[int, ...]
    model: PreTrainedModel
    texts: list[list[int]]
    inputs: dict[int, list[ExpertInputs]]
    direct: dict[int, list[torch.Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def calibrated(request, tmp_path_factory) -> Calibrated:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    save_random(family.config, folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    texts = [torch.randint(3, 256, (length,)).tolist() for length in TEXT_LENGTHS]
    blocks = text_blocks(texts, tokens_a_block=100)
    assert len(blocks) > 1 and any(len(set(block.lengths_B)) > 1 for block in blocks), "texts must be padded, in blocks"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    inputs = dict(expert_inputs(Checkpoint(str(folder)), blocks))
    return Calibrated(folder, family.moe_layers, model, texts, inputs, direct_inputs(model, texts))


@torch.no_grad()
def direct_inputs(model: PreTrainedModel, texts: list[list[int]]) -> dict[int, list[torch.Tensor]]:
    """Returns what the experts of each layer are called with, from whole forward passes of one text each."""
    calls: dict[str, list] = defaultdict(list)
    handles = [
        module.register_forward_pre_hook(lambda _module, arguments, name=name: calls[name].append(arguments))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    for text in texts:
        model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return {
        int(re.search(r"\d+", name)[0]): [torch.cat(parts) for parts in zip(*each, strict=True)]
        for name, each in calls.items()
    }


@torch.no_grad()
def direct_outputs(calibrated: Calibrated, layer: int) -> torch.Tensor:
    """Returns [E, N, H], float64: every expert on every token, from the weights."""
    experts = calibrated.model.get_submodule(layer_experts(calibrated, layer))
    weights = {name: tensor.double() for name, tensor in experts.named_parameters()}
    hidden_NH = calibrated.direct[layer][0].double()
    if calibrated.model.config.model_type != "gpt_oss":
        gate_ENI, up_ENI = torch.einsum("nh,eih->eni", hidden_NH, weights["gate_up_proj"]).chunk(2, dim=-1)
        inner_ENI = gate_ENI * gate_ENI.sigmoid() * up_ENI
        return torch.einsum("eni,ehi->enh", inner_ENI, weights["down_proj"])
    gate_up = torch.einsum("nh,ehi->eni", hidden_NH, weights["gate_up_proj"]) + weights["gate_up_proj_bias"][:, None]
    gate_ENI, up_ENI = gate_up[..., 0::2], gate_up[..., 1::2]
    assert gate_ENI.max() > 7 and up_ENI.min() < -7, "the clamps must act"
    gate_ENI, up_ENI = gate_ENI.clamp(max=7), up_ENI.clamp(-7, 7)
    inner_ENI = gate_ENI * (1.702 * gate_ENI).sigmoid() * (up_ENI + 1)
    return torch.einsum("eni,eih->enh", inner_ENI, weights["down_proj"]) + weights["down_proj_bias"][:, None]


def layer_experts(calibrated: Calibrated, layer: int) -> str:
    (name,) = (
        name for name, _ in calibrated.model.named_modules() if name.endswith(".experts") and f".{layer}." in name
    )
    return name


def test_dense_layers_have_no_inputs(calibrated):
    assert tuple(calibrated.inputs) == tuple(calibrated.direct) == calibrated.moe_layers
    assert tuple(routed_experts(calibrated.model)) == calibrated.moe_layers


def test_experts_get_what_they_get_in_the_whole_model(calibrated):
    """Token by token: `text_blocks` puts the longest text first."""
    longest_first = sorted(range(len(TEXT_LENGTHS)), key=lambda text: -TEXT_LENGTHS[text])
    for layer, inputs in calibrated.inputs.items():
        tensors = (each[:3] for each in inputs)  # without the group of texts
        for ours, theirs in zip(zip(*tensors, strict=True), calibrated.direct[layer], strict=True):
            ours = torch.cat([torch.from_numpy(block) for block in ours])
            parts = theirs.split(TEXT_LENGTHS)
            theirs = torch.cat([parts[text] for text in longest_first])
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-4


def test_outputs_of_experts_are_those_of_their_weights(calibrated):
    for layer in calibrated.moe_layers:
        _, experts = routed_experts(calibrated.model)[layer]
        expected_ENH = direct_outputs(calibrated, layer)
        outputs_ENH = expert_outputs(experts, calibrated.direct[layer][0])
        assert (outputs_ENH - expected_ENH).abs().max() < 1e-5 * expected_ENH.abs().max()
        assert torch.equal(expert_outputs(experts, calibrated.direct[layer][0], range(2, 5)), outputs_ENH[2:5])


def test_what_an_error_costs_is_what_the_whole_model_says(calibrated):
    """The gradient that goes back layer by layer is that of the whole model, for the same drawn tokens."""
    found = layer_sensitivities(Checkpoint(str(calibrated.folder)), calibrated.texts, seed=3)
    assert tuple(found) == calibrated.moe_layers
    generator, model = torch.Generator().manual_seed(3), calibrated.model
    squares: dict[int, list[float]] = defaultdict(list)
    for block in text_blocks(calibrated.texts, TOKENS_A_BACKWARD):
        outputs: dict[int, torch.Tensor] = {}

        def keep(layer: int, _module: torch.nn.Module, _args: tuple, output: torch.Tensor, outputs=outputs):
            outputs[layer] = output + torch.zeros_like(output, requires_grad=True)
            return outputs[layer]

        handles = [
            model.get_submodule(name).register_forward_hook(partial(keep, layer))
            for layer, (name, _) in routed_experts(model).items()
        ]
        is_token = torch.from_numpy(block.is_token_BL.flatten())
        log_p_NV = model(torch.from_numpy(block.ids_BL)).logits.flatten(0, 1).log_softmax(-1)[is_token]
        drawn_N1 = torch.multinomial(log_p_NV.detach().exp(), 1, generator=generator)
        of_layers = torch.autograd.grad(log_p_NV.gather(1, drawn_N1).sum(), list(outputs.values()))
        for layer, gradient_NH in zip(outputs, of_layers, strict=True):
            of_texts = gradient_NH.square().sum(-1)[is_token].split(block.lengths_B.tolist())
            squares[layer] += [float(each.mean()) / (2 * gradient_NH.shape[-1]) for each in of_texts]
        for handle in handles:
            handle.remove()
    for layer, of_texts in squares.items():
        assert tuple(found[layer]) == pytest.approx(with_error(of_texts), rel=1e-3)


def frobenius(outputs_ENH: torch.Tensor, _routing_weights_NE: torch.Tensor) -> torch.Tensor:
    distance_EE = torch.tensor([[(left - right).norm() for right in outputs_ENH] for left in outputs_ENH])
    return 1 - distance_EE / distance_EE.max()


def projection(outputs_ENH: torch.Tensor, routing_weights_NE: torch.Tensor) -> torch.Tensor:
    similarity_EE = torch.ones(EXPERTS, EXPERTS)
    for i, own_NH in enumerate(outputs_ENH):
        weight_N1 = routing_weights_NE[:, i, None]
        if not weight_N1.any():  # of an expert that no token was routed to, all count alike
            weight_N1 = torch.ones_like(weight_N1)
        own = weight_N1 * own_NH
        for j, other_NH in enumerate(outputs_ENH):
            other = weight_N1 * other_NH
            coefficient = max(0, (own * other).sum() / (other * other).sum())
            similarity_EE[i, j] = 1 - (own - coefficient * other).square().sum() / own.square().sum()
    return similarity_EE


@pytest.mark.parametrize("method", [frobenius, projection])
def test_similarity_is_that_of_a_direct_computation(calibrated, method):
    for layer in calibrated.moe_layers:
        _, index_NK, weights_NK = calibrated.direct[layer]
        routing_weights_NE = torch.zeros(len(index_NK), EXPERTS).scatter(1, index_NK, weights_NK.float())
        expected_EE = method(direct_outputs(calibrated, layer), routing_weights_NE.double())
        result = score_layer(Checkpoint(str(calibrated.folder)), layer, calibrated.inputs[layer], method.__name__)
        assert (result.similarity_EE - expected_EE).abs().max() < TOLERANCE
        assert result.tokens_E.tolist() == index_NK.flatten().bincount(minlength=EXPERTS).tolist()


def test_similarity_of_weights_is_that_of_a_direct_computation(calibrated):
    for layer in calibrated.moe_layers:
        experts = calibrated.model.get_submodule(layer_experts(calibrated, layer))
        flat = [torch.cat([tensor[e].flatten().double() for tensor in experts.parameters()]) for e in range(EXPERTS)]
        expected_EE = torch.tensor([[torch.cosine_similarity(a, b, dim=0) for b in flat] for a in flat])
        result = score_layer(Checkpoint(str(calibrated.folder)), layer, [], "weights")
        assert (result.similarity_EE - expected_EE).abs().max() < TOLERANCE


def test_each_step_reads_its_own_tensors_alone(calibrated, tmp_path):
    """Of a checkpoint of one tensor a file, all files but those of the step are gone."""
    whole = Checkpoint(str(calibrated.folder))
    tensors = tmp_path / "tensors"
    one_tensor_a_file(whole, tensors)
    blocks, states = text_blocks(calibrated.texts, tokens_a_block=100), None
    for layer in range(max(calibrated.moe_layers) + 1):
        outside = r"model\.norm\." + (r"|model\.embed_tokens\." if layer == 0 else "")
        its_own = with_only(tensors, rf"{outside}|model\.layers\.{layer}\.", tmp_path / f"layer-{layer}")
        states, inputs = zip(*run_layer(its_own, layer, blocks, states), strict=True)
        if layer not in calibrated.moe_layers:
            assert inputs == (None,) * len(blocks)
            continue
        for ours, theirs in zip(inputs, calibrated.inputs[layer], strict=True):
            assert all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
        its_experts = with_only(tensors, rf"model\.layers\.{layer}\..*\bexperts\.", tmp_path / f"experts-{layer}")
        result = score_layer(its_experts, layer, inputs, "frobenius")
        assert torch.equal(result.similarity_EE, score_layer(whole, layer, inputs, "frobenius").similarity_EE)
        with pytest.raises(OSError, match=r"the folder has no model\.(embed_tokens|layers|norm)"):
            list(run_layer(its_experts, layer, blocks, states))


def one_tensor_a_file(checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    checkpoint.config.save_pretrained(folder)
    for name, file in checkpoint.files.items():
        with safe_open(checkpoint.path(file), framework="pt") as opened:
            save_file({name: opened.get_tensor(name)}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in checkpoint.files}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_only(tensors: Path, pattern: str, folder: Path) -> Checkpoint:
    """Returns the checkpoint less the files of all tensors whose names don't start with the pattern."""
    folder.mkdir()
    for file in tensors.iterdir():
        if file.suffix == ".json" or re.match(pattern, file.name):
            (folder / file.name).symlink_to(file)
    return Checkpoint(str(folder))


def test_two_sets_of_experts_in_one_layer_are_refused():
    """As in models with experts of their own for text and images."""
    model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"].config)
    model.model.layers[1].more = copy.deepcopy(routed_experts(model)[0][1])
    with pytest.raises(ValueError, match=r"layer 1 has several sets of routed experts: .*layers\.1\.mlp\.experts and "):
        routed_experts(model)


def test_the_artifact_of_one_family_is_not_for_another():
    artifact: Artifact = small_artifact()
    shape = MoeShape.from_config(FAMILIES["mixtral"].config)
    with pytest.raises(ValueError, match="architecture: artifact Qwen3MoeForCausalLM"):
        artifact.check_serves(shape, "some/mixtral")
