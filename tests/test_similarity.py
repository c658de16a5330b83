import subprocess
import sys

import pytest
import torch

from sere_dist import similarity
from sere_dist.similarity import expert_similarity, expert_similarity_from_blocks

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


@pytest.mark.parametrize("kernel", KERNELS)
def test_cka(outputs, kernel):
    def score(a, b):
        first, second = (centred(KERNELS[kernel](x)) for x in (a, b))
        return (first * second).sum() / (first.norm() * second.norm())

    expected = pairwise(outputs, score).clamp(0, 1)
    assert torch.allclose(expert_similarity(outputs, "cka", kernel).double(), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["frobenius", "cosine"])
def test_blocks_of_tokens_add_up(outputs, method, monkeypatch):
    whole = expert_similarity(outputs, method)
    assert torch.allclose(expert_similarity_from_blocks(outputs.split(7, dim=1), method), whole, atol=1e-7)
    monkeypatch.setattr(similarity, "BLOCK_BYTES", 8 * E * H * 3)  # three tokens at a time
    assert torch.allclose(expert_similarity(outputs, method), whole, atol=1e-7)


def test_nearly_equal_experts_keep_their_distances():
    """As in upcycled models: a Gram of the raw float32 outputs would lose these distances altogether."""
    torch.manual_seed(0)
    outputs = 100 * torch.randn(1, N, H) + 1e-3 * torch.randn(E, N, H)
    distance = pairwise(outputs, lambda a, b: (a - b).norm())
    assert torch.allclose(expert_similarity(outputs).double(), 1 - distance / distance.max(), atol=1e-6)


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


def test_unknown_names(outputs):
    with pytest.raises(ValueError, match="'frob' is not one of frobenius, cosine, cka"):
        expert_similarity(outputs, "frob")
    with pytest.raises(ValueError, match="'cka' is not one of frobenius, cosine"):
        expert_similarity_from_blocks([outputs], "cka")
    with pytest.raises(ValueError, match="'gauss' is not one of linear, polynomial, rbf"):
        expert_similarity(outputs, "cka", "gauss")
    with pytest.raises(ValueError, match="no tokens"):
        expert_similarity_from_blocks([])


def test_the_mathematics_import_alone():
    """Without Ray, without vLLM, and without waking CUDA."""
    program = (
        "import sys; sys.modules.update(ray=None, vllm=None); "
        "import sere_dist.rerouting, sere_dist.similarity, torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
