"""Lockstep decoding of a model that no device holds: one decoder layer at a time, for many settings at once.

`lockstep` decodes whole texts in one forward pass, and a layer re-routes each step by what that step's rows get there.
So all texts can go through one layer before the next is loaded, as in a calibration. Every setting that is to be
measured goes through it, too: a pass reads the checkpoint once for all of them. Until the first layer that a setting
changes, its states are those of the model as it is, which are computed once.

Shape suffixes: N texts, B texts that decode together, L positions, D decode steps, K experts per token, H hidden size,
V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import forward_layer, load_head, load_layer
from sere_dist.calibration.memory import with_halving
from sere_dist.evaluation.lockstep import (
    REFERENCE_BATCH,
    Counting,
    Decoding,
    LockstepResult,
    Rerouter,
    Routed,
    decode_steps,
    divergence_and_agreement,
    experts_of_layers,
    loss_of,
    rerouted_steps,
    whole_batches,
)
from sere_dist.moe import decoder_layers


@dataclass
class _OnItsWay:
    """A decoding, and what its texts have come to by the layer that is loaded."""

    batch: int
    first_layer: int
    counting: Counting
    num_texts: int  # those that fill batches
    states_NLH: torch.Tensor | None = None  # None: those of the model as it is
    scores: list[tuple[float, float, int]] = field(default_factory=list)  # of each text: loss, divergence, agreement


@dataclass(frozen=True)
class LayeredHeldOut:
    """Texts that a model decodes, as `HeldOut`, of a checkpoint of which one decoder layer at a time is in memory.

    Weights are float32. The states of all texts are in the host's memory, once for the model as it is and once for each
    decoding: 4 N L H bytes each.
    """

    checkpoint: Checkpoint
    ids_NL: torch.Tensor  # token ids [texts, L]
    prompt_length: int
    device: str = "cpu"

    def run(self, rerouter: Rerouter, batch: int) -> LockstepResult:
        """Scores the texts as `HeldOut.run` does, in a pass of its own."""
        return self.run_all([Decoding(rerouter, batch)])[0]

    @torch.no_grad()
    def run_all(self, decodings: Sequence[Decoding]) -> list[LockstepResult]:
        """Returns the result of each, as `HeldOut.run` does, from one pass over the checkpoint.

        Raises:
            ValueError: there are not enough texts for a batch, or the model does not run layer by layer.
            MemoryError: it does not fit; fewer decodings may.
        """
        model = self.checkpoint.empty_model()
        num_experts, num_layers = experts_of_layers(model), len(decoder_layers(model)[1])
        runs = [
            _OnItsWay(
                decoding.batch,
                decoding.first_layer,
                Counting(decoding.rerouter, num_experts),
                whole_batches(len(self.ids_NL), decoding.batch),
            )
            for decoding in decodings
        ]
        states_NLH = None
        for layer in range(num_layers):
            states_NLH = self._through_layer(layer, states_NLH, runs)
        assert states_NLH is not None
        self._score(states_NLH, runs)
        return [self._result(run) for run in runs]

    def _through_layer(self, layer: int, states_NLH: torch.Tensor | None, runs: Sequence[_OnItsWay]) -> torch.Tensor:
        """Takes all decodings through a layer; returns the states of the model as it is, given those before the layer.

        These are None before the first layer.
        """
        model, decoder, module = load_layer(self.checkpoint, layer, self.device)

        def forward(
            rerouter: Rerouter, batch: int, num_texts: int, given_NLH: torch.Tensor | None, into_NLH: torch.Tensor
        ) -> torch.Tensor:
            for start in range(0, num_texts, batch):
                part = slice(start, min(start + batch, num_texts))
                ids_BL = self.ids_NL[part].to(self.device)
                given_BLH = None if given_NLH is None else given_NLH[part].to(self.device)
                with rerouted_steps(model, ids_BL, self.prompt_length, rerouter):
                    into_NLH[part] = forward_layer(model, decoder, module, ids_BL, given_BLH)[0].cpu()
            return into_NLH

        def everything(_size: int) -> torch.Tensor:
            for run in (run for run in runs if run.first_layer <= layer):
                given = states_NLH if run.states_NLH is None else run.states_NLH
                into = self._empty(run.num_texts) if run.states_NLH is None else run.states_NLH
                run.states_NLH = forward(run.counting, run.batch, run.num_texts, given, into)
            into = self._empty(len(self.ids_NL)) if states_NLH is None else states_NLH
            return forward(look, REFERENCE_BATCH, len(self.ids_NL), states_NLH, into)

        routed: list[torch.Tensor] = []

        def look(_layer: int, weights_DBK: torch.Tensor, ids_DBK: torch.Tensor, _scores: torch.Tensor | None) -> Routed:
            routed.append(ids_DBK.cpu())
            return weights_DBK, ids_DBK

        after_NLH, _ = with_halving(1, everything, f"decoding through layer {layer}")
        if routed:
            ids_DNK = torch.cat(routed, dim=1)
            for run in (run for run in runs if run.first_layer > layer):
                for ids_DBK in ids_DNK[:, : run.num_texts].split(run.batch, dim=1):
                    run.counting.count(layer, ids_DBK)
        return after_NLH

    def _empty(self, num_texts: int) -> torch.Tensor:
        hidden_size = self.checkpoint.config.get_text_config().hidden_size
        return torch.empty(num_texts, self.ids_NL.shape[1], hidden_size)

    def _score(self, states_NLH: torch.Tensor, runs: Sequence[_OnItsWay]) -> None:
        """Adds what every text came to, a text at a time: logits are large."""
        logits_of, steps = load_head(self.checkpoint, self.device), decode_steps(self.ids_NL, self.prompt_length)

        def of_text(states_NLH: torch.Tensor, text: int) -> torch.Tensor:
            return logits_of(states_NLH[text : text + 1, steps].to(self.device))[0].float()

        def everything(_size: int) -> None:
            for text, ids_L in enumerate(self.ids_NL):
                reference_DV, next_D = of_text(states_NLH, text), ids_L[self.prompt_length + 1 :].to(self.device)
                for run in (run for run in runs if text < run.num_texts):
                    logits_DV = reference_DV if run.states_NLH is None else of_text(run.states_NLH, text)
                    run.scores.append((loss_of(logits_DV, next_D), *divergence_and_agreement(reference_DV, logits_DV)))

        with_halving(1, everything, "the output layer")

    def _result(self, run: _OnItsWay) -> LockstepResult:
        losses, divergences, agreements = zip(*run.scores, strict=True)
        tokens = run.num_texts * (self.ids_NL.shape[1] - 1 - self.prompt_length)
        return LockstepResult(losses, divergences, agreements, tokens, run.counting.active_sum, run.counting.steps)
