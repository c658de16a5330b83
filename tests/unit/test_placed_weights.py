"""A checkpoint's tensors on their way into vLLM, permuted to a placement."""

import pytest
import torch

from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.placement import LayerPlacement, Placement
from sere_dist.vllm_plugin.weights import PlacedWeights
from tests.support.artifacts import small_artifact

RANKS = [1, 0, 0, 1]  # so the order of the experts is 1, 2, 0, 3


@pytest.fixture
def placed() -> PlacedWeights:
    layer = LayerPlacement(**dict.fromkeys(LayerPlacement.model_fields, 1) | {"rank_of_expert": RANKS})
    about = {"base_model": "nobody/small-moe", "num_experts": 4, "num_ranks": 2, "affinity": "similarity"}
    return PlacedWeights(Placement(**about, layers={1: layer}))


def numbered(*shape: int) -> torch.Tensor:
    """[E, ...]: what belongs to expert e holds e."""
    return torch.arange(4.0).view(-1, *[1] * len(shape)).expand(4, *shape)


def test_experts_by_id_change_their_names(placed):
    names = [f"model.layers.1.mlp.experts.{i}.{part}.weight" for i in range(4) for part in ("gate_proj", "up_proj")]
    router = "model.layers.1.mlp.gate.weight"
    came = dict(placed([(name, torch.tensor(float(i // 2))) for i, name in enumerate(names)] + [(router, numbered(8))]))
    placed.check()
    for position, expert in enumerate([1, 2, 0, 3]):
        assert came[f"model.layers.1.mlp.experts.{position}.gate_proj.weight"] == expert
        assert came[f"model.layers.1.mlp.experts.{position}.up_proj.weight"] == expert
    assert came[router][:, 0].tolist() == [1, 2, 0, 3]


def test_fused_experts_and_biases_are_permuted(placed):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj_bias", "mlp.router.weight", "mlp.router.bias"]
    names += ["mlp.gate.e_score_correction_bias"]
    came = dict(placed([(f"model.layers.1.{name}", numbered(3)) for name in names]))
    placed.check()
    assert all(tensor[:, 0].tolist() == [1, 2, 0, 3] for tensor in came.values())


def test_everything_else_stays(placed):
    others = {
        "model.layers.0.mlp.experts.2.up_proj.weight": torch.rand(4, 4),  # another layer
        "model.layers.1.mlp.shared_expert.gate_proj.weight": torch.rand(4, 4),
        "model.layers.1.mlp.shared_expert_gate.weight": torch.rand(1, 4),
        "model.layers.1.self_attn.q_proj.weight": torch.rand(4, 4),
        "lm_head.weight": torch.rand(4, 4),
    }
    came = dict(placed(others.items()))
    assert came.keys() == others.keys() and all(came[name] is others[name] for name in others)


@pytest.mark.parametrize("missing", ["mlp.gate.weight", "mlp.experts.3.w"])
def test_what_did_not_come_by_stops_the_start(placed, missing):
    names = ["mlp.gate.weight", *(f"mlp.experts.{i}.w" for i in range(4))]
    list(placed((f"model.layers.1.{name}", numbered(3)) for name in names if name != missing))
    with pytest.raises(ValueError, match="layer 1: the checkpoint's tensors do not show its router and 4 experts"):
        placed.check()


def test_the_artifact_follows():
    artifact: Artifact = small_artifact(layers=(1,))
    order = torch.tensor([1, 2, 0, 3])
    placed = artifact.in_order({1: order})
    for position, expert in enumerate(order):
        expected = artifact.layers[1].similarity_EE[expert][order]
        assert placed.layers[1].similarity_EE[position].equal(expected)
