"""Teacher-forced loss, and divergence from another model, as batched decoding has them, in one forward pass.

B sequences run side by side; the tokens at one position form a decode step, and are re-routed together. Attention is
causal, so one forward pass over the whole sequences gives what stepwise decoding would: a later token sees what the
re-routed experts made of the earlier ones. The prompt part is not re-routed, as in serving. (vLLM's own prompt
log-probabilities would show no difference: prefill is not re-routed.)

Shape suffixes: B sequences, L positions, D decode steps, K experts per token, E experts, V tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sere_dist.method.records import Step
from sere_dist.method.slots import fill_dropped
from sere_dist.moe import Routing, hooked_routing, routed_experts

Routed = tuple[torch.Tensor, torch.Tensor]  # weights_DBK, ids_DBK; an id of -1 is a dropped slot, of weight 0
# What re-routes all decode steps of a layer, each by itself: (layer, weights_DBK, ids_DBK, scores_DBE) -> the first two
# of what runs. The router's scores of all experts are in proportion to the weights; None where they can't be read.
Rerouter = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], Routed]

REFERENCE_BATCH = 16  # texts of a forward pass of the model as it is, in which no text depends on others


@dataclass(frozen=True)
class LockstepResult:
    """Loss and active experts over the decode steps of a set of batches."""

    losses: tuple[float, ...]  # of each sequence, nats, summed over its scored tokens
    divergences: tuple[float, ...]  # likewise KL(reference, model) of the next token; empty without a reference
    agreements: tuple[int, ...]  # steps of each sequence whose likeliest token is the reference's; likewise
    tokens: int  # scored, of all sequences
    active_sum: int  # active experts, summed over steps and layers
    steps: int  # decode steps times MoE layers
    estimated_error: float | None = None  # of all tokens and layers; None: not estimated, see `rerouters.Estimating`

    def __add__(self, other: "LockstepResult") -> "LockstepResult":
        return LockstepResult(
            self.losses + other.losses,
            self.divergences + other.divergences,
            self.agreements + other.agreements,
            self.tokens + other.tokens,
            self.active_sum + other.active_sum,
            self.steps + other.steps,
        )

    @property
    def loss(self) -> float:
        """Nats a token."""
        return math.fsum(self.losses) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def loss_of_texts(self) -> list[float]:
        """Nats a token, of each sequence."""
        return self._a_token(self.losses)

    @property
    def divergence_of_texts(self) -> list[float]:
        """KL from the reference, nats a token, of each sequence."""
        return self._a_token(self.divergences)

    @property
    def agreement_of_texts(self) -> list[float]:
        """The share of each sequence's steps whose likeliest token is the reference's."""
        return self._a_token(self.agreements)

    def _a_token(self, sums: tuple[float, ...]) -> list[float]:
        return [of_text * len(self.losses) / self.tokens for of_text in sums]

    @property
    def divergence(self) -> float:
        """KL from the reference, nats a token."""
        return math.fsum(self.divergences) / self.tokens

    @property
    def agreement(self) -> float:
        """The share of steps whose likeliest token is the reference's."""
        return sum(self.agreements) / self.tokens

    @property
    def active_experts(self) -> float:
        """Distinct experts that a layer runs in a step, the mean over steps and layers."""
        return self.active_sum / self.steps


def unchanged(
    _layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores_DBE: torch.Tensor | None
) -> Routed:
    """The rerouter of the baseline: the model without re-routing."""
    return weights_DBK, ids_DBK


class Counting:
    """A rerouter that also counts the experts that run.

    Attributes:
        active_sum: active experts, summed over all steps and layers so far.
        steps: decode steps times layers so far.
    """

    def __init__(self, rerouter: Rerouter, num_experts: Mapping[int, int]):
        """`num_experts`: of each MoE layer, by decoder layer index; see `experts_of_layers`."""
        self.rerouter, self.num_experts = rerouter, num_experts
        self.active_sum = self.steps = 0

    def __call__(
        self, layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, scores_DBE: torch.Tensor | None
    ) -> Routed:
        weights_DBK, ids_DBK = self.rerouter(layer, weights_DBK, ids_DBK, scores_DBE)
        self.count(layer, ids_DBK)
        return weights_DBK, ids_DBK

    def count(self, layer: int, ids_DBK: torch.Tensor) -> None:
        """Counts the experts that the steps of one batch run in a layer."""
        self.active_sum += int(active_by_step(ids_DBK, self.num_experts[layer]).sum())
        self.steps += len(ids_DBK)


def experts_of_layers(model: PreTrainedModel) -> dict[int, int]:
    """Returns the number of experts of each MoE layer, by decoder layer index."""
    return {layer: experts.num_experts for layer, (_, experts) in routed_experts(model).items()}


@torch.inference_mode()
def lockstep(
    model: PreTrainedModel,
    ids_BL: torch.Tensor,
    *,
    prompt_length: int,
    rerouter: Rerouter = unchanged,
    reference_BDV: torch.Tensor | None = None,
) -> LockstepResult:
    """Scores one batch decoded in lockstep.

    Args:
        model: any transformers model with routed experts.
        ids_BL: token ids [B, L].
        prompt_length: positions before this one are prefill: neither re-routed nor scored. The steps are the positions
            from here to L - 2, each predicting the token that follows.
        rerouter: what re-routes.
        reference_BDV: logits of the steps, those of the model as it is (`decode_logits`), to diverge from.
    """
    counting = Counting(rerouter, experts_of_layers(model))
    logits_BDV = decode_logits(model, ids_BL, prompt_length=prompt_length, rerouter=counting)
    next_BD = ids_BL[:, prompt_length + 1 :].to(logits_BDV.device)
    # A sequence at a time: over a large vocabulary each of these tensors is as large as a model's layer.
    losses = tuple(loss_of(*pair) for pair in zip(logits_BDV, next_BD, strict=True))
    divergences: tuple[float, ...] = ()
    agreements: tuple[int, ...] = ()
    if reference_BDV is not None:
        found = [divergence_and_agreement(*pair) for pair in zip(reference_BDV, logits_BDV, strict=True)]
        divergences, agreements = zip(*found, strict=True)
    return LockstepResult(losses, divergences, agreements, next_BD.numel(), counting.active_sum, counting.steps)


def loss_of(logits_DV: torch.Tensor, next_D: torch.Tensor) -> float:
    """Returns the loss of a sequence's steps, nats, summed; `next_D` are the tokens that they should predict."""
    return float(F.cross_entropy(logits_DV, next_D, reduction="none").double().sum())


def divergence_and_agreement(reference_DV: torch.Tensor, logits_DV: torch.Tensor) -> tuple[float, int]:
    """Returns KL(reference, model) of a sequence's steps, summed, and the steps whose likeliest token is the same."""
    reference_DV = reference_DV.to(logits_DV.device)
    log_p_DV, log_q_DV = reference_DV.log_softmax(dim=1), logits_DV.log_softmax(dim=1)
    divergence_D = F.kl_div(log_q_DV, log_p_DV, reduction="none", log_target=True).sum(dim=1)
    return float(divergence_D.double().sum()), int((logits_DV.argmax(dim=1) == reference_DV.argmax(dim=1)).sum())


@torch.inference_mode()
def decode_logits(
    model: PreTrainedModel, ids_BL: torch.Tensor, *, prompt_length: int, rerouter: Rerouter = unchanged
) -> torch.Tensor:
    """Returns the logits [B, D, V], float32, of one batch's decode steps; arguments as in `lockstep`."""
    steps = decode_steps(ids_BL, prompt_length)
    with rerouted_steps(model, ids_BL, prompt_length, rerouter):
        return model(ids_BL.to(model.device)).logits[:, steps].float()


def decode_steps(ids_BL: torch.Tensor, prompt_length: int) -> slice:
    """Returns the positions that are decode steps.

    Raises:
        ValueError: there is none.
    """
    length = ids_BL.shape[1]
    if not 0 < prompt_length < length - 1:
        raise ValueError(f"prompt_length ({prompt_length}) must leave a decode step in sequences of {length} tokens")
    return slice(prompt_length, length - 1)


@contextmanager
def rerouted_steps(
    model: PreTrainedModel, ids_BL: torch.Tensor, prompt_length: int, rerouter: Rerouter
) -> Generator[None]:
    """Re-routes the decode steps in forward passes of these texts through the model, or through layers of it."""
    (batch, length), steps = ids_BL.shape, decode_steps(ids_BL, prompt_length)

    def route(layer: int, routing: Routing, scores_NE: torch.Tensor | None) -> Routing:
        hidden_states, *index_and_weights = routing
        ids_BLK, weights_BLK = (tensor.view(batch, length, -1).clone() for tensor in index_and_weights)
        weights_DBK, ids_DBK = weights_BLK[:, steps].transpose(0, 1), ids_BLK[:, steps].transpose(0, 1)
        scores_DBE = None if scores_NE is None else scores_NE.view(batch, length, -1)[:, steps].transpose(0, 1)
        new_weights_DBK, new_ids_DBK = rerouter(layer, weights_DBK, ids_DBK, scores_DBE)
        # The experts of transformers can't skip a slot.
        step = Step(weights_DBK.flatten(0, 1), ids_DBK.flatten(0, 1))
        run_ids_DBK = fill_dropped(step, new_ids_DBK.flatten(0, 1)).view_as(ids_DBK)
        weights_BLK[:, steps], ids_BLK[:, steps] = new_weights_DBK.transpose(0, 1), run_ids_DBK.transpose(0, 1)
        return hidden_states, ids_BLK.flatten(0, 1), weights_BLK.flatten(0, 1)

    with hooked_routing(model, route):
        yield


class Decoding(NamedTuple):
    """A rerouter, and how many texts decode together under it."""

    rerouter: Rerouter
    batch: int
    first_layer: int = 0  # decoder layers before this one stay as they are


def whole_batches(num_texts: int, batch: int) -> int:
    """Returns how many texts fill batches of so many.

    Raises:
        ValueError: there are not even enough for one batch.
    """
    if (whole := num_texts // batch * batch) == 0:
        raise ValueError(f"{num_texts} texts do not fill a batch of {batch}: use more texts")
    return whole


@dataclass(frozen=True)
class HeldOut:
    """Texts that a model decodes, all of one length, and its own logits, which do not depend on the batch."""

    model: PreTrainedModel
    ids_NL: torch.Tensor  # token ids [texts, L]
    prompt_length: int

    @cached_property
    def reference_NDV(self) -> torch.Tensor:
        parts = self.ids_NL.split(REFERENCE_BATCH)
        return torch.cat([decode_logits(self.model, part, prompt_length=self.prompt_length).cpu() for part in parts])

    def run(self, rerouter: Rerouter, batch: int) -> LockstepResult:
        """Scores the texts, in batches of so many in their order, under a rerouter, beside the model as it is.

        Those at the end that do not fill a batch are left out: fewer rows run fewer experts.

        Raises:
            ValueError: there are not even enough for one batch.
        """
        whole = whole_batches(len(self.ids_NL), batch)
        parts = zip(self.ids_NL[:whole].split(batch), self.reference_NDV[:whole].split(batch), strict=True)
        results = [
            lockstep(self.model, ids_BL, prompt_length=self.prompt_length, rerouter=rerouter, reference_BDV=reference)
            for ids_BL, reference in parts
        ]
        return sum(results[1:], results[0])

    def run_all(self, decodings: Sequence[Decoding]) -> list[LockstepResult]:
        """Returns the result of each, as `run` does."""
        return [self.run(decoding.rerouter, decoding.batch) for decoding in decodings]


def active_by_step(ids_DBK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Returns bool [D, E]: the experts that each step runs; an id of -1 names none."""
    named_DN = torch.where(ids_DBK < 0, num_experts, ids_DBK).flatten(1).long()
    active_DE = torch.zeros(len(ids_DBK), num_experts + 1, dtype=torch.bool, device=ids_DBK.device)
    return active_DE.scatter_(1, named_DN, True)[:, :num_experts]
