"""How well one calibration serves each source of its texts: from made-up experts whose substitutes are known, and
against calibrations of each source alone."""

from itertools import combinations

import pytest
import torch

from sere_dist.method.similarity import cosine_of_groups, expert_projection, expert_similarity, projection_of_groups
from sere_dist.method.sources import MOST_GROUPS, fits_of_sources, groups_per_source

EXPERTS, HIDDEN, GROUPS = 12, 24, 4


def outputs_of_pairs(partner_E: torch.Tensor, num_tokens: int, noise: float) -> torch.Tensor:
    """Outputs [E, N, H] by which expert e is like `partner_E[e]`, and like no other."""
    first_E = torch.minimum(torch.arange(EXPERTS), partner_E)
    return torch.randn(EXPERTS, num_tokens, HIDDEN)[first_E] + noise * torch.randn(EXPERTS, num_tokens, HIDDEN)


NEIGHBOURS = torch.arange(EXPERTS) ^ 1  # 0 with 1, 2 with 3, ...
CROSSED = torch.arange(EXPERTS) ^ 2  # 0 with 2, 1 with 3, ...


class Layer:
    """Experts on the texts of two sources; `tokens[source]` of them in each group."""

    def __init__(self, partners: dict[str, torch.Tensor], tokens: dict[str, int], noise: float = 0.3):
        torch.manual_seed(0)
        self.members = [(group, source) for group in range(GROUPS) for source in partners if tokens[source]]
        sizes = [tokens[source] for _, source in self.members]
        self.outputs_ENH = torch.cat(
            [outputs_of_pairs(partners[source], tokens[source], noise) for _, source in self.members], dim=1
        )
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        routed_NE = torch.rand(ends[-1], EXPERTS).argsort(dim=1) < 3
        self.weights_NE = torch.rand(ends[-1], EXPERTS) * routed_NE

    def tokens_of(self, groups, source: str | None = None) -> torch.Tensor:
        chosen = [
            torch.arange(tokens.start, tokens.stop)
            for (group, name), tokens in zip(self.members, self.slices, strict=True)
            if group in groups and source in (None, name)
        ]
        return torch.cat(chosen)

    def cosine_fits(self):
        return fits_of_sources(cosine_of_groups(self.outputs_ENH, self.slices, 64), self.members)


def test_sources_that_agree_are_served_as_by_themselves():
    fits = Layer({"chats": NEIGHBOURS, "code": NEIGHBOURS}, {"chats": 40, "code": 40}).cosine_fits()
    for fit in fits.values():
        assert fit == (1, 1, 1)


def test_a_source_of_few_texts_whose_substitutes_differ_is_served_badly():
    """The other source's texts outweigh its own: what it loses shows beside what its own texts would choose."""
    fits = Layer({"chats": NEIGHBOURS, "code": CROSSED}, {"chats": 90, "code": 10}).cosine_fits()
    assert fits["chats"] == (1, 1, 1)
    assert fits["code"].own_kept == 1
    assert -0.2 < fits["code"].substitute_kept < 0 and fits["code"].same_substitute == 0


def test_few_noisy_texts_alone_do_not_make_a_source_differ():
    """Its own texts choose badly, and the texts of the other source, which agrees, choose well."""
    fits = Layer({"chats": NEIGHBOURS, "code": NEIGHBOURS}, {"chats": 400, "code": 1}, noise=2.0).cosine_fits()
    assert fits["code"].own_kept < 0.5 < fits["code"].substitute_kept - fits["code"].own_kept


def substitutes(similarity_EE: torch.Tensor) -> torch.Tensor:
    return similarity_EE.clone().fill_diagonal_(-1).argmax(dim=1)


@pytest.mark.parametrize("method", ["cosine", "projection"])
def test_the_same_by_calibrations_of_their_own(method):
    """Each half, each source and all of them calibrated apart, on their own tokens."""
    layer = Layer({"chats": NEIGHBOURS, "code": CROSSED}, {"chats": 30, "code": 25}, noise=3.0)

    def calibrated(groups, source=None) -> torch.Tensor:
        tokens = layer.tokens_of(groups, source)
        if method == "projection":
            return expert_projection(layer.outputs_ENH[:, tokens], layer.weights_NE[tokens]).similarity_EE.double()
        return expert_similarity(layer.outputs_ENH[:, tokens], method).double()

    if method == "projection":
        projected = projection_of_groups(layer.outputs_ENH, layer.weights_NE, layer.slices)
        fits = fits_of_sources(lambda chosen: projected(chosen).similarity_EE, layer.members)
    else:
        fits = layer.cosine_fits()
    assert list(fits) == ["chats", "code"]
    rows, different = torch.arange(EXPERTS), ~torch.eye(EXPERTS, dtype=torch.bool)
    for source, fit in fits.items():
        worth = {"whole": 0.0, "own": 0.0, "best": 0.0}
        for half in combinations(range(GROUPS), GROUPS // 2):
            judges_EE = calibrated([group for group in range(GROUPS) if group not in half], source)
            choices = {"whole": calibrated(half), "own": calibrated(half, source), "best": judges_EE}
            for who, chosen_EE in choices.items():
                worth[who] += judges_EE[rows, substitutes(chosen_EE)].mean() - judges_EE[different].mean()
        assert fit.substitute_kept == pytest.approx(float(worth["whole"] / worth["best"]), abs=1e-4)
        assert fit.own_kept == pytest.approx(float(worth["own"] / worth["best"]), abs=1e-4)
        whole_E, own_E = (substitutes(calibrated(range(GROUPS), name)) for name in (None, source))
        assert fit.same_substitute == pytest.approx(float((whole_E == own_E).double().mean()))
        assert 0 < fit.same_substitute < 1 and fit.substitute_kept < fit.own_kept < 1, "noise and difference, both"


def test_experts_that_a_source_never_reaches_take_no_part():
    layer = Layer({"chats": NEIGHBOURS, "code": NEIGHBOURS}, {"chats": 90, "code": 90})
    layer.weights_NE[layer.tokens_of(range(GROUPS), "code"), :4] = 0
    projected = projection_of_groups(layer.outputs_ENH, layer.weights_NE, layer.slices)
    fits = fits_of_sources(lambda chosen: projected(chosen).similarity_EE, layer.members)
    assert fits["code"] == fits["chats"] == (1, 1, 1)


def test_too_few_texts_say_nothing():
    layer = Layer({"chats": NEIGHBOURS, "code": NEIGHBOURS}, {"chats": 10, "code": 10})
    kept = [place for place, (group, source) in enumerate(layer.members) if source == "chats" or group == 1]
    layer.members, layer.slices = ([each[place] for place in kept] for each in (layer.members, layer.slices))
    fits = layer.cosine_fits()
    assert fits["code"] is None and fits["chats"] == (1, 1, 1)
    assert fits_of_sources(lambda _: torch.eye(4), [(0, "chats"), (0, "code")]) == {"chats": None, "code": None}


def test_experts_that_are_all_alike():
    fits = fits_of_sources(lambda _: torch.ones(4, 4), [(0, "chats"), (0, "code"), (1, "chats"), (1, "code")])
    assert fits == {"chats": (1, 1, 1), "code": (1, 1, 1)}


def test_many_sources_keep_fewer_groups():
    assert [groups_per_source(count) for count in (1, 2, 8, 9, 16, 17, 32, 33)] == [8, 8, 8, 6, 4, 2, 2, 0]
    assert all(count * groups_per_source(count) <= MOST_GROUPS for count in range(1, 100))
