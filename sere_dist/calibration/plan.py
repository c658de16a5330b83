"""What a calibration will take, from shapes alone: nothing is loaded, no GPU is touched.

FLOPs count a multiplication and an addition as two. Expected seconds are arithmetic, not measurements: work divided by
a device's peak rates, at the share of them that is assumed below.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.calibration.layers import BLOCK_BYTES_ON, TOKENS_A_FORWARD
from sere_dist.method.blocks import BLOCK_BYTES
from sere_dist.method.cka import Kernel, features_are_cheaper
from sere_dist.method.similarity import METHODS, Method, MethodName, tokens_a_block
from sere_dist.moe import MoeShape, decoder_layers, routed_experts

FLOAT_BYTES = 4  # weights and states are float32 in every task


@dataclass(frozen=True)
class Device:
    """Peak rates of a device by its maker's data sheet, and what is assumed of them."""

    name: str
    float32: float  # FLOP/s
    float64: float
    used: float = 0.5  # share of the peak
    read: float = 2e9  # bytes/s, each task, from storage to device


H200 = Device("H200", 67e12, 67e12)


@dataclass(frozen=True)
class Sizes:
    """The parameters of a model by their places."""

    model: str
    shape: MoeShape
    layer_names: dict[int, str]  # of MoE layers
    parameters: int
    layer_parameters: int  # of the largest decoder layer
    expert_parameters: int  # of a layer's experts together
    embedding_parameters: int  # of the input
    head_parameters: int  # that are loaded to make logits: all outside the decoder layers, tied ones twice
    stored_bytes: float  # of a parameter in the checkpoint

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "Sizes":
        """Counts, from the configuration alone.

        Raises:
            ValueError: the model has no routed experts.
        """
        shape = MoeShape.from_config(checkpoint.config)
        model = checkpoint.empty_model()
        tied = model.all_tied_weights_keys  # counted once
        count_of = {name: tensor.numel() for name, tensor in model.named_parameters() if name not in tied}
        experts = routed_experts(model)
        stack, layers = decoder_layers(model)
        return cls(
            model=checkpoint.name,
            shape=shape,
            layer_names={layer: name for layer, (name, _) in experts.items()},
            parameters=sum(count_of.values()),
            layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
            expert_parameters=max(sum(p.numel() for p in each.parameters()) for _, each in experts.values()),
            embedding_parameters=sum(p.numel() for p in model.get_input_embeddings().parameters()),
            head_parameters=sum(
                t.numel() for name, t in model.state_dict().items() if not name.startswith(f"{stack}.")
            ),
            stored_bytes=checkpoint.stored_bytes(sum(count_of.values())),
        )

    def layer_flops(self, num_tokens: int, max_length: int) -> float:
        """Of one decoder layer: K of E experts, the rest whole, and attention over texts of the greatest length."""
        used = self.shape.num_experts_per_token / self.shape.num_experts
        active = self.layer_parameters - self.expert_parameters * (1 - used)
        return num_tokens * (2 * active + 4 * max_length * self.shape.hidden_size)


@dataclass(frozen=True)
class Plan(Sizes):
    """Sizes in bytes and work in FLOPs of one calibration; `a layer` is a MoE layer."""

    method: Method
    kernel: Kernel
    num_tokens: int
    max_length: int
    device: Literal["cpu", "cuda"]
    wanted_block: int | None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        method: MethodName,
        kernel: Kernel,
        num_tokens: int,
        max_length: int,
        device: Literal["cpu", "cuda"],
        block_tokens: int | None = None,
    ) -> "Plan":
        """Plans the calibration of a checkpoint, of which no more than its configuration needs to be there.

        Raises:
            ValueError: the model has no routed experts.
        """
        return cls(
            **vars(Sizes.of_checkpoint(checkpoint)),
            method=METHODS[method],
            kernel=kernel,
            num_tokens=num_tokens if METHODS[method].needs_data else 0,
            max_length=max_length,
            device=device,
            wanted_block=block_tokens,
        )

    @property
    def block_bytes(self) -> int:
        return BLOCK_BYTES_ON[self.device]

    @property
    def block_tokens(self) -> int:
        fitting = tokens_a_block(self.shape.num_experts, self.shape.hidden_size, self.method, self.block_bytes)
        return min(self.wanted_block or fitting, self.num_tokens)

    @property
    def forward_bytes(self) -> int:
        """What a forward task holds: one decoder layer, and one block's states before and after it."""
        states = TOKENS_A_FORWARD * self.shape.hidden_size * FLOAT_BYTES
        return (self.layer_parameters * FLOAT_BYTES + 2 * states) if self.method.needs_data else 0

    @property
    def score_bytes(self) -> int:
        """What a scoring task holds: one layer's experts, one block's outputs and Gram matrices."""
        weights = self.expert_parameters * FLOAT_BYTES if self.method.needs_weights else 0
        return weights + (self.block_bytes if self.method.needs_data else 0)

    @property
    def states_bytes(self) -> int:
        """What the object store holds for a layer: the hidden states and routing that its experts get."""
        return self.num_tokens * (self.shape.hidden_size * FLOAT_BYTES + self.shape.num_experts_per_token * 8)

    @property
    def forward_read(self) -> float:
        """Bytes of the checkpoint that a layer's forward task reads."""
        return self.layer_parameters * self.stored_bytes if self.method.needs_data else 0

    @property
    def score_read(self) -> float:
        """Bytes of the checkpoint that a layer's scoring task reads."""
        return self.expert_parameters * self.stored_bytes if self.method.needs_weights else 0

    @property
    def forward_flops(self) -> float:
        """Of a layer's forward task."""
        return self.layer_flops(self.num_tokens, self.max_length)

    @property
    def expert_passes(self) -> int:
        """How often every token goes through every expert of a layer."""
        if not self.method.has_kernel:
            return int(self.method.needs_data)
        if self.of_features:
            tiles = ceil(self.shape.num_experts / max(1, int((BLOCK_BYTES / 8) ** 0.5) // self.shape.hidden_size))
            return tiles + 1
        return self.row_blocks + (self.kernel == "rbf")

    @property
    def row_blocks(self) -> int:
        """Blocks of rows of CKA's kernel matrices: each takes all other tokens for its columns."""
        return ceil(self.num_tokens / self.block_tokens)

    @property
    def of_features(self) -> bool:
        """Whether linear CKA takes products of features rather than Gram matrices of tokens."""
        if not self.method.has_kernel or self.kernel != "linear":
            return False
        return features_are_cheaper(self.shape.num_experts, self.num_tokens, self.shape.hidden_size)

    @property
    def score_float32(self) -> float:
        """Of one layer: every expert on every token, and the tokens' Gram matrices."""
        outputs = 2 * self.expert_parameters * self.num_tokens * self.expert_passes
        grams = 2 * self.num_tokens * self.shape.num_experts**2 * self.shape.hidden_size
        return outputs + (grams if self.method.needs_data and not self.method.has_kernel else 0)

    @property
    def score_float64(self) -> float:
        """Of one layer: products of weights, and those of CKA, which need the digits."""
        experts, tokens, hidden = self.shape.num_experts, self.num_tokens, self.shape.hidden_size
        if not self.method.needs_data:
            return 2 * experts * self.expert_parameters if self.method.needs_weights else 0
        if not self.method.has_kernel:
            return 0
        if self.of_features:
            return experts * (experts + 1) * tokens * hidden**2
        moments = 2 * experts * tokens * hidden**2 if self.kernel == "rbf" else 0
        pairs = tokens**2 * (1 - 0.5 / self.row_blocks)  # within a block of rows, each pair once
        return 2 * experts * pairs * (hidden + experts) + moments

    def seconds(self, device: Device, count: int) -> float:
        """Expected on `count` devices: forward passes follow one another; scoring goes on beside them."""
        forward = self.forward_read / device.read + self.forward_flops / (device.float32 * device.used)
        score = self.score_read / device.read
        score += (self.score_float32 / device.float32 + self.score_float64 / device.float64) / device.used
        layers = len(self.layer_names)
        return max(layers * (forward + score) / count, self.shape.num_layers * forward + score)
