"""The Mixture-of-Experts model that is carved from a dense one: the form that trains, and the one that is served."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2MoeForCausalLM

from examples.smollm2_moe import questions
from examples.smollm2_moe.assemble import TOP_K, moe_config, moe_state
from examples.smollm2_moe.carving import (
    CarvedFeedForward,
    Shape,
    carve,
    clusters,
    load_carvings,
    neurons,
    save_carvings,
)
from examples.smollm2_moe.recipe import carved, carvings_of, divergence, feed_forward_inputs

SHAPE = Shape(shared=16, blocks=8, experts_per_block=2, width=8)  # of 96 neurons: 10 to a block


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig()
    for parameter in model.parameters():  # layers that change what passes through them
        parameter.data *= 4 if parameter.dim() > 1 else 1
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def carvings(dense, ids):
    """Carvings whose routers, scales and normalisations are not what they begin with."""
    made = []
    with torch.no_grad():
        for layer, inputs in zip(dense.model.layers, feed_forward_inputs(dense, ids), strict=True):
            carving, _best = carve(layer, inputs.float(), SHAPE)
            for tensor in (carving.shared_scale_S, carving.expert_scale_EM, carving.router_EH, carving.norm_H):
                tensor += 0.2 * torch.randn_like(tensor)
            made.append(carving)
    return made


def test_the_served_form_gives_what_the_trained_form_gives(dense, carvings, ids):
    served = Qwen2MoeForCausalLM(moe_config(dense, carvings[0])).float().eval()
    missing, unexpected = served.load_state_dict(fused(served, moe_state(dense, carvings)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    served.tie_weights()
    with torch.no_grad():
        trained = carved(dense, carvings)(ids).logits
        assert (trained - dense(ids).logits).abs().max() > 0.1
        torch.testing.assert_close(served(ids).logits, trained, rtol=0, atol=1e-4)


def fused(served: Qwen2MoeForCausalLM, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the checkpoint's weights as the module holds them: the experts of a layer in one tensor."""
    weights = {name: weight for name, weight in state.items() if ".mlp.experts." not in name}
    for layer in range(served.config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.experts"

        def stacked(projection: str, name: str = name) -> torch.Tensor:
            return torch.stack(
                [state[f"{name}.{expert}.{projection}.weight"] for expert in range(served.config.num_experts)]
            )

        weights[f"{name}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
        weights[f"{name}.down_proj"] = stacked("down_proj")
    return weights


def test_a_carving_is_read_as_it_was_written(carvings, tmp_path):
    save_carvings(carvings, tmp_path / "carving.safetensors")
    for written, read in zip(carvings, load_carvings(tmp_path / "carving.safetensors"), strict=True):
        for name, tensor in vars(written).items():
            torch.testing.assert_close(getattr(read, name), tensor.detach(), rtol=1e-3, atol=1e-3)


def test_every_neuron_has_a_place_and_none_is_shared_and_routed(carvings):
    for carving in carvings:
        shared, routed = set(carving.shared_ids_S.tolist()), set(carving.expert_ids_EM.flatten().tolist())
        assert not shared & routed
        assert len(shared) == SHAPE.shared
        blocks = carving.expert_ids_EM.unflatten(0, (SHAPE.blocks, -1))
        members = [set(block.flatten().tolist()) for block in blocks]
        assert sum(map(len, members)) == len(routed)  # no neuron is in two blocks
        assert all(len(set(expert.tolist())) == SHAPE.width for expert in carving.expert_ids_EM)


def test_clusters_find_the_groups_that_are_there():
    groups = torch.eye(3).repeat_interleave(4, dim=1)  # [3, 12]: three kinds of tokens, four neurons each
    energy = groups[torch.arange(60) % 3] + 0.01 * torch.rand(60, 12, generator=torch.Generator().manual_seed(0))
    members, best = clusters(energy, 3, 4, 10)
    assert sorted(sorted(expert.tolist()) for expert in members) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(len(best[kind::3].unique()) == 1 for kind in range(3))


def test_experts_that_hold_every_neuron_give_the_dense_layer(dense, ids):
    layer = dense.model.layers[0]
    (inputs, _) = feed_forward_inputs(dense, ids)
    carving, _ = carve(layer, inputs.float(), Shape(shared=96 - 8, blocks=8, experts_per_block=1, width=1))
    assert CarvedFeedForward(layer.mlp, carving, TOP_K).error(inputs.float()) < 1e-9


def test_the_error_is_that_of_the_output(dense, carvings, ids):
    (inputs, _) = (kept.float() for kept in feed_forward_inputs(dense, ids))
    layer = CarvedFeedForward(dense.model.layers[0].mlp, carvings[0], TOP_K)
    with torch.no_grad():
        wanted = layer.dense(inputs)
        expected = ((layer(inputs) - wanted).square().sum(1) / wanted.square().sum(1)).mean()
    torch.testing.assert_close(layer.error(inputs).detach(), expected, rtol=1e-4, atol=0)


def test_all_that_is_carved_trains_and_nothing_else(dense, carvings, ids):
    student = carved(dense, carvings)
    divergence(student, dense, ids).backward()
    moved = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    learned = ("router_EH", "shared_scale_S", "expert_scale_EM", "post_attention_layernorm.weight")
    assert moved == {name for name, _ in student.named_parameters() if name.endswith(learned)}
    assert all(parameter.grad.any() for parameter in student.parameters() if parameter.grad is not None)
    assert [vars(carving).keys() for carving in carvings_of(student)] == [vars(carving).keys() for carving in carvings]


def test_the_experts_energy_is_a_share_of_all(dense, ids):
    layer = dense.model.layers[0]
    (inputs, _) = feed_forward_inputs(dense, ids)
    with torch.no_grad():
        carving, best = carve(layer, inputs.float(), SHAPE)
        energy = neurons(layer.mlp, inputs.float()).square() * layer.mlp.down_proj.weight.square().sum(0)
        kept = energy[:, carving.expert_ids_EM].sum(-1)  # [T, E]
    for block in range(SHAPE.blocks):
        experts = range(block * SHAPE.experts_per_block, (block + 1) * SHAPE.experts_per_block)
        assert (kept[:, experts].argmax(1) + experts.start == best[:, block]).float().mean() > 0.9


def test_held_out_questions_are_not_learned():
    learned, held_out = questions.learned(), questions.held_out()
    assert not {text for _, text in learned} & {text for _, text in held_out}
    assert not {kind for kind, _ in learned} & questions.HELD_OUT_KINDS.keys()
    assert len(learned) > 800 and len(held_out) > 200
