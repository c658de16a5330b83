"""What decoding some texts came to, in the numbers that every page and every artifact quotes."""

from sere_dist.artifact.recommendation import Outcome
from sere_dist.evaluation.lockstep import LockstepResult
from sere_dist.provenance import rounded
from sere_dist.standard_errors import difference_with_error, with_error


def outcome_of(result: LockstepResult, baseline: LockstepResult, batch: int) -> Outcome:
    """Returns the means over texts with their standard errors, to four significant digits.

    Args:
        result: what a re-routed model did; its KL divergence is already against the baseline's logits.
        baseline: the model without re-routing, on the same texts in the same order.
        batch: texts that decoded together in `result`.

    Raises:
        ValueError: the two do not hold as many texts.
    """
    kl, kl_error = with_error(result.divergence_of_texts)
    loss_rise, loss_rise_error = difference_with_error(result.loss_of_texts, baseline.loss_of_texts)
    top1, top1_error = with_error(result.agreement_of_texts)
    return Outcome(
        batch=batch,
        active_experts=rounded(result.active_experts),
        kl=rounded(kl),
        kl_error=rounded(kl_error),
        loss_rise=rounded(loss_rise),
        loss_rise_error=rounded(loss_rise_error),
        perplexity=rounded(result.perplexity),
        top1=rounded(top1),
        top1_error=rounded(top1_error),
        estimated_error=None if result.estimated_error is None else rounded(result.estimated_error / result.tokens),
    )
