"""What a tuning will take, from shapes alone: nothing is loaded, no GPU is touched.

Expected seconds are arithmetic, as in `calibration.plan`.
"""

from dataclasses import dataclass
from math import ceil

import torch

from sere_dist.calibration.plan import FLOAT_BYTES, Device, Sizes

# Passes beside those for settings of single layers, one after another: the settings to try, the model as it is, three
# rounds of combinations, and held-out texts.
OTHER_PASSES = 6
STATES_BYTES = 8 * 2**30  # of a pass, where nobody says how much memory a task has


@dataclass(frozen=True)
class TuningPlan(Sizes):
    """Sizes in bytes and work in FLOPs of one tuning."""

    num_texts: int  # of a trial
    length: int  # of each text, in tokens
    trials: int  # at most
    by_layers: bool
    dtype: str  # of a model that a worker holds whole: a name of torch's, or `auto`, the checkpoint's own
    memory: int | None  # that each worker may take; None: nobody says

    @property
    def whole_bytes(self) -> float:
        """What the whole model takes."""
        return self.parameters * (self.stored_bytes if self.dtype == "auto" else getattr(torch, self.dtype).itemsize)

    @property
    def part_bytes(self) -> int:
        """What the largest part takes that is loaded at a time: a decoder layer, or what makes logits."""
        return max(self.layer_parameters + self.embedding_parameters, self.head_parameters) * FLOAT_BYTES

    @property
    def states_bytes(self) -> int:
        """What the states of a trial take, of all its texts."""
        return self.num_texts * self.length * self.shape.hidden_size * FLOAT_BYTES

    @property
    def trials_a_pass(self) -> int:
        """Trials that go through the layers together, beside the model as it is.

        Of the memory that a part leaves, states get half: there are also Python, what a layer computes, and tensors
        that are being read.
        """
        if not self.by_layers:
            return 1
        room = STATES_BYTES if self.memory is None else (self.memory - self.part_bytes) // 2
        return min(self.trials, max(1, room // self.states_bytes - 1))

    @property
    def passes(self) -> int:
        """Passes over the checkpoint; more workers may share one out among more passes."""
        return ceil(self.trials / self.trials_a_pass) + OTHER_PASSES

    @property
    def pass_read(self) -> float:
        """Bytes of the checkpoint that a pass reads."""
        return self.parameters * self.stored_bytes

    @property
    def trial_flops(self) -> float:
        """Of a trial that changes the first layer; one that changes the last runs no other."""
        tokens = self.num_texts * self.length
        return self.shape.num_layers * self.layer_flops(tokens, self.length) + 2 * self.head_parameters * tokens

    def seconds(self, device: Device, count: int) -> float:
        """Expected by layers on `count` devices, with trials that on average change a layer halfway."""
        passes = ceil(self.trials / self.trials_a_pass / count) + OTHER_PASSES
        flops = self.trials * self.trial_flops / 2 / count
        return passes * self.pass_read / device.read + flops / (device.float32 * device.used)

    def check(self) -> None:
        """Raises ValueError where the workers have less memory than they need."""
        if self.memory is None:
            return
        has = f"--memory-per-task gives a worker {self.memory / 1e9:.3g} GB"
        if not self.by_layers and self.memory < self.whole_bytes:
            raise ValueError(
                f"{has}, and the model takes {self.whole_bytes / 1e9:.3g} GB: give each "
                "worker more, or tune --by-layers, which holds one decoder layer at a time"
            )
        needed = self.part_bytes + 4 * self.states_bytes
        if self.by_layers and self.memory < needed:
            raise ValueError(
                f"{has}, and tuning by layers takes {needed / 1e9:.3g} GB: the largest part of the model is "
                f"{self.part_bytes / 1e9:.3g} GB, and {self.num_texts} texts have {self.states_bytes / 1e9:.3g} GB of "
                "states, in two sets that may take half of what is left. Give each worker more, or fewer --num-samples"
            )
