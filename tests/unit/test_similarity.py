from typing import get_args

import pytest
import torch

from sere_dist.method import cka as cka_module
from sere_dist.method import similarity
from sere_dist.method.cka import features_are_cheaper
from sere_dist.method.similarity import expert_projection, expert_similarity, random_similarity, weight_similarity

E, N, H = 6, 40, 16


@pytest.fixture
def outputs() -> torch.Tensor:
    torch.manual_seed(0)
    shared = torch.randn(N, H)
    return torch.stack([e / E * shared + torch.randn(N, H) for e in range(E)])


def pairwise(outputs: torch.Tensor, score) -> torch.Tensor:
    """A score of every pair by the plain double loop, in float64."""
    outputs = outputs.double()
    return torch.stack([torch.stack([score(a, b) for b in outputs]) for a in outputs])


def centred(gram: torch.Tensor) -> torch.Tensor:
    centring = torch.eye(len(gram), dtype=gram.dtype) - 1 / len(gram)
    return centring @ gram @ centring


def rbf(x: torch.Tensor) -> torch.Tensor:
    squared = torch.stack([((x - row) ** 2).sum(dim=1) for row in x])
    return torch.exp(-squared / (2 * squared.flatten().var(correction=1)))


KERNELS = {"linear": lambda x: x @ x.T, "polynomial": lambda x: (x @ x.T + 1) ** 2, "rbf": rbf}


def test_frobenius(outputs):
    distance = pairwise(outputs, lambda a, b: (a - b).norm())
    assert torch.allclose(expert_similarity(outputs).double(), 1 - distance / distance.max(), atol=1e-6)


def test_cosine(outputs):
    expected = pairwise(outputs, lambda a, b: (torch.cosine_similarity(a, b, dim=1) + 1).mean() / 2)
    assert torch.allclose(expert_similarity(outputs, "cosine").double(), expected, atol=1e-6)


def cka(outputs: torch.Tensor, kernel: str) -> torch.Tensor:
    def score(a, b):
        first, second = (centred(KERNELS[kernel](x)) for x in (a, b))
        return (first * second).sum() / (first.norm() * second.norm())

    return pairwise(outputs, score).clamp(0, 1)


@pytest.mark.parametrize(("block", "columns"), [(None, 128), (None, 6), (17, 5), (7, 128), (1, 1)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cka(outputs, kernel, block, columns, monkeypatch):
    monkeypatch.setattr(cka_module, "COLUMN_TOKENS", columns)
    matrix = expert_similarity(outputs, "cka", kernel, block)
    assert torch.allclose(matrix.double(), cka(outputs, kernel), atol=1e-6)


@pytest.mark.parametrize("experts_a_tile", [1, 4, E])
def test_linear_cka_from_features(outputs, experts_a_tile, monkeypatch):
    """More tokens than experts and features make it the cheaper form, whatever number of experts is held at a time."""
    many = outputs.repeat(1, 5, 1) + torch.randn(E, 5 * N, H)
    assert features_are_cheaper(*many.shape) and not features_are_cheaper(*outputs.shape)
    monkeypatch.setattr(cka_module, "BLOCK_BYTES", 8 * (experts_a_tile * H) ** 2)
    monkeypatch.setattr(cka_module, "_of_kernel_matrices", None)
    matrix = expert_similarity(many, "cka", "linear", block_tokens=33)
    assert torch.allclose(matrix.double(), cka(many, "linear"), atol=1e-6)


@pytest.mark.parametrize("form", ["tokens", "features"])
def test_an_expert_whose_output_never_varies_is_like_no_other(outputs, form, monkeypatch):
    monkeypatch.setattr(cka_module, "features_are_cheaper", lambda *_: form == "features")
    outputs[2] = torch.randn(H)
    matrix = expert_similarity(outputs, "cka", "linear")
    others = [0, 1, 3, 4, 5]
    assert torch.equal(matrix[2, others], torch.zeros(5)) and matrix[2, 2] == 1
    assert torch.allclose(matrix[others][:, others].double(), cka(outputs[others], "linear"), atol=1e-6)


def test_rbf_of_outputs_that_hardly_vary_sees_no_difference():
    """Its variance of squared distances is at most 1e-8: every kernel value is 1, and centring leaves nothing."""
    assert torch.equal(expert_similarity(1e-3 * torch.randn(E, N, H), "cka", "rbf"), torch.eye(E))


@pytest.mark.parametrize("method", ["frobenius", "cosine"])
def test_blocks_of_tokens_add_up(outputs, method, monkeypatch):
    whole = expert_similarity(outputs, method)
    assert torch.allclose(expert_similarity(outputs, method, block_tokens=7), whole, atol=1e-6)
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 0)  # one token at a time
    assert torch.allclose(expert_similarity(outputs, method), whole, atol=1e-6)


@pytest.mark.parametrize("spread", [1e-3, 1e-1, 10])
def test_nearly_equal_experts_keep_their_distances(spread):
    """As in upcycled models: a Gram of the raw float32 outputs would lose these distances altogether."""
    torch.manual_seed(0)
    outputs = 100 * torch.randn(1, N, H) + spread * torch.randn(E, N, H)
    distance = pairwise(outputs, lambda a, b: (a - b).norm())
    assert torch.allclose(expert_similarity(outputs).double(), 1 - distance / distance.max(), atol=1e-5)


def test_two_nearly_equal_experts_among_others(outputs):
    outputs[3] = outputs[1] + 1e-5 * torch.randn(N, H)
    distance = pairwise(outputs, lambda a, b: (a - b).norm())
    expected = 1 - distance / distance.max()
    assert torch.allclose(expert_similarity(outputs, block_tokens=9).double(), expected, atol=1e-6)
    assert 0.99998 < expected[1, 3] < 0.999999


def projection(outputs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Design section 3, pair by pair, in float64."""
    outputs, squared_weights = outputs.double(), weights.double() ** 2
    similarity, coefficient = torch.ones(2, E, E, dtype=torch.float64)
    for i in range(E):
        importance = squared_weights[:, i] if squared_weights[:, i].any() else torch.ones(N, dtype=torch.float64)
        for j in range(E):
            product = (importance * (outputs[i] * outputs[j]).sum(dim=1)).sum()
            own, other = ((importance * outputs[k].square().sum(dim=1)).sum() for k in (i, j))
            coefficient[i, j] = (product / other).clamp(min=0)
            similarity[i, j] = product**2 / (own * other) if product > 0 else 0
    sizes = outputs.square().sum(dim=2).mean(dim=1)
    added = weights.double() * outputs.norm(dim=2).T  # [N, E]
    saliency = added.sum(dim=0) / (weights != 0).sum(dim=0).clamp(min=1)
    return similarity, coefficient, sizes / sizes.mean(), sizes.mean(), saliency


@pytest.mark.parametrize("block", [None, 7])
def test_projection(outputs, block):
    outputs[4] = -outputs[0] + 0.1 * torch.randn(N, H)  # only a negative multiple would do
    weights = torch.rand(N, E) * (torch.rand(N, E) < 0.4)
    weights[:, 2] = 0  # no token reached this expert
    for found, expected in zip(expert_projection(outputs, weights, block), projection(outputs, weights), strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found.double(), expected, atol=1e-6)
    similarity_EE, coefficient_EE, size_E, _, saliency_E = expert_projection(outputs, weights)
    assert saliency_E[2] == 0 and saliency_E[0] > 0
    assert similarity_EE[0, 4] == coefficient_EE[0, 4] == 0
    assert not torch.equal(similarity_EE, similarity_EE.T)
    assert torch.equal(similarity_EE.diagonal(), torch.ones(E)) and torch.equal(
        coefficient_EE.diagonal(), torch.ones(E)
    )
    assert size_E.mean() == pytest.approx(1)


@pytest.mark.parametrize("shared", [0, 1e4], ids=["", "nearly equal"])
@pytest.mark.parametrize("method", ["frobenius", "cosine", "projection"])
def test_some_groups_give_what_their_tokens_give(outputs, method, shared):
    """Without another pass over the tokens. Nearly equal experts take frobenius's second pass."""
    outputs = outputs + shared * torch.randn(N, H)
    weights = 0.1 + torch.rand(N, E)
    groups = [slice(0, 11), slice(11, 12), slice(12, 30), slice(30, N)]
    if method == "projection":
        of_groups = similarity.projection_of_groups(outputs, weights, groups, 7)
    else:
        of_groups = similarity.SIMILARITY_OF_GROUPS[method](outputs, groups, 7)
    for chosen in ([0, 1, 2, 3], [1], [3, 0]):
        tokens = torch.cat([torch.arange(N)[groups[place]] for place in chosen])
        if method == "projection":
            expected = expert_projection(outputs[:, tokens], weights[tokens])
        else:
            expected = (expert_similarity(outputs[:, tokens], method),)
        found = of_groups(chosen)
        for ours, theirs in zip(found if method == "projection" else (found,), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-5)


def test_projection_finds_the_multiple(outputs):
    outputs[5] = 2.5 * outputs[1]
    similarity_EE, coefficient_EE, *_ = expert_projection(outputs, torch.rand(N, E))
    assert similarity_EE[1, 5] == pytest.approx(1) and similarity_EE[5, 1] == pytest.approx(1)
    assert coefficient_EE[1, 5] == pytest.approx(0.4) and coefficient_EE[5, 1] == pytest.approx(2.5)


def test_projection_of_an_expert_without_output(outputs):
    outputs[2] = 0
    for matrix in expert_projection(outputs, torch.rand(N, E)):
        assert matrix.isfinite().all()


def test_weights_and_random():
    torch.manual_seed(0)
    up, down = torch.randn(E, 5, H), torch.randn(E, H, 3)
    flat = torch.cat([up.flatten(1), down.flatten(1)], dim=1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat, dim=2)
    assert torch.allclose(weight_similarity([up, down]), expected, atol=1e-6)
    first, again, other = random_similarity(E, 1), random_similarity(E, 1), random_similarity(E, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, first.T) and torch.equal(first.diagonal(), torch.ones(E))


class Sliced:
    """Outputs that exist only as slices, and remembers the largest one."""

    def __init__(self, outputs: torch.Tensor):
        self.outputs, self.shape, self.largest = outputs, outputs.shape, 0

    def __getitem__(self, index) -> torch.Tensor:
        part = self.outputs[index]
        self.largest = max(self.largest, part.shape[1])
        return part.clone()


@pytest.mark.parametrize(("method", "kernel"), [("frobenius", "linear"), ("cosine", "linear"), ("cka", "rbf")])
def test_outputs_may_be_computed_when_sliced(outputs, method, kernel):
    sliced = Sliced(outputs)
    assert torch.equal(
        expert_similarity(sliced, method, kernel, block_tokens=9), expert_similarity(outputs, method, kernel, 9)
    )
    assert sliced.largest <= 9
    weights = torch.rand(N, E)
    for lazy, direct in zip(expert_projection(sliced, weights, 9), expert_projection(outputs, weights, 9), strict=True):
        assert torch.equal(lazy, direct)


@pytest.mark.parametrize("kernel", ["linear"])
def test_cka_does_not_depend_on_scale(outputs, kernel):
    small = expert_similarity(1e-8 * outputs.double(), "cka", kernel)
    assert torch.allclose(small, expert_similarity(outputs, "cka", kernel), atol=1e-6)


def test_equal_experts_are_wholly_similar():
    assert torch.equal(expert_similarity(torch.ones(3, N, H)), torch.ones(3, 3))


@pytest.mark.parametrize("method", ["frobenius", "cosine", "cka"])
def test_shape(outputs, method):
    matrix = expert_similarity(outputs.bfloat16(), method)
    assert matrix.dtype == torch.float32 and matrix.shape == (E, E)
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix.diagonal(), torch.ones(E))


def test_every_method_has_a_record():
    assert get_args(similarity.MethodName) == tuple(similarity.METHODS)
    assert similarity.method_named("cka") is similarity.METHODS["cka"]
    assert similarity.method_named("reference") == similarity.Method("reference", tensors=("similarity",))


def test_unknown_names(outputs):
    with pytest.raises(ValueError, match="'frob' is not one of frobenius, cosine, cka"):
        expert_similarity(outputs, "frob")
    with pytest.raises(ValueError, match="'gauss' is not one of linear, polynomial, rbf"):
        expert_similarity(outputs, "cka", "gauss")
    with pytest.raises(ValueError, match="no tokens"):
        expert_similarity(outputs[:, :0])
    with pytest.raises(ValueError, match=r"routing weights are \(6, 40\), not \[N, E\] \(40, 6\)"):
        expert_projection(outputs, torch.rand(E, N))
