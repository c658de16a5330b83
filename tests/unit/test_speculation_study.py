"""The study of speculative decoding: one forward pass gives what verification step by step would."""

from itertools import pairwise

import pytest
import torch

from examples.tiny_moe.data import DRAFT
from sere_dist.evaluation.lockstep import lockstep
from sere_dist.evaluation.protocol import PROMPT
from sere_dist.evaluation.rerouters import paper_rerouter
from sere_dist.method.records import LayerTables, Settings
from sere_dist.method.similarity import random_similarity
from sere_dist.moe import load_model
from studies import speculation

LENGTH, BATCH, DRAFTED = 48, 2, 3


@pytest.fixture(scope="module")
def ids_BL(heldout_ids) -> torch.Tensor:
    return heldout_ids[:BATCH, :LENGTH]


@pytest.fixture(scope="module")
def turns(ids_BL) -> list[list[speculation.Turn]]:
    return speculation.turns_of(load_model(str(DRAFT), "cpu"), ids_BL, DRAFTED)


@pytest.fixture(scope="module")
def tables(model) -> dict[int, LayerTables]:
    shape = model.config.num_experts
    return {layer: LayerTables(random_similarity(shape, seed=layer)) for layer in range(6)}


def test_drafts_are_accepted_as_far_as_they_are_the_text(ids_BL, turns):
    for ids, of_text in zip(ids_BL.tolist(), turns, strict=True):
        assert of_text[0].start == PROMPT
        for turn, following in pairwise(of_text):
            assert following.start == turn.start + turn.accepted + 1
            real = ids[turn.start + 1 : turn.start + 1 + DRAFTED]
            assert list(turn.drafts[: turn.accepted]) == real[: turn.accepted]
            assert turn.accepted == DRAFTED or turn.drafts[turn.accepted] != real[turn.accepted]
    assert len({turn.accepted for of_text in turns for turn in of_text}) > 1, "some are accepted, and some are not"


def test_every_row_is_computed_as_its_step_alone_would(model, ids_BL, turns):
    batch = speculation.lay_out(ids_BL, turns)
    logits, _ = speculation.verify(model, batch, speculation.stock)
    assert logits.shape[1] == min(map(len, turns)) and logits.shape[2] == DRAFTED + 1
    for text, ids in enumerate(ids_BL):
        for step, turn in enumerate(turns[text][: logits.shape[1]]):
            so_far = torch.tensor([[*ids[: turn.start + 1].tolist(), *turn.drafts]])
            with torch.no_grad():
                alone = model(so_far).logits[0, turn.start :].float()
            torch.testing.assert_close(logits[text, step], alone, rtol=0, atol=1e-4)
            assert batch.used_BSR[text, step].tolist() == [place <= turn.accepted for place in range(DRAFTED + 1)]


def test_without_drafts_it_is_lockstep(model, ids_BL, tables):
    batch = speculation.lay_out(ids_BL, speculation.turns_of(model, ids_BL, 0))
    _, active = speculation.verify(model, batch, speculation.paper(tables, 2))
    expected = lockstep(model, ids_BL, prompt_length=PROMPT, rerouter=paper_rerouter(tables, Settings(2)))
    assert active == pytest.approx(expected.active_experts)


def test_drafts_that_keep_no_expert(model, ids_BL, turns):
    """At a price that nothing reaches, the last tokens' heaviest experts are all that run."""
    size = model.config.num_experts
    tables = {
        layer: LayerTables(random_similarity(size, seed=layer), torch.ones(size, size), torch.ones(size))
        for layer in range(6)
    }
    batch, chance_R = speculation.lay_out(ids_BL, turns), torch.tensor([1.0, 0.5, 0.25, 0.125])
    every, last = (
        speculation.verify(model, batch, speculation.priced(tables, 1e6, chance_R, drafts_claim=claim))[1]
        for claim in (True, False)
    )
    assert last <= BATCH < every <= BATCH * (DRAFTED + 1)
