"""What vLLM's expert kernels take: slots that repeat an expert, empty slots, or both.

Re-routed slots reach an expert kernel in one of two forms; see `method.slots`. A kernel that can't take the form that
it gets does not fail: it loses slots, or mixes up rows. So a layer is re-routed only if the classes that run it are in
the tables below, which say what their sources do. These were read in vLLM 0.32.0, FlashInfer 0.7.0, DeepEP d4f41e4 and
triton_kernels 3.5.1, the versions that this vLLM is built with; vLLM 0.31 has the same. In 0.30 merged slots were not
looked at. None of it was seen on a GPU.
"""

from typing import NamedTuple

import vllm
from packaging.version import Version
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

ALWAYS, WITH_EXPERT_MAP, NEVER = "always", "with an expert map", "never"


class Takes(NamedTuple):
    """What a class takes, and why."""

    repeats: bool  # slots of one token that name the same expert
    empty: str  # slots with the id -1: ALWAYS, NEVER, or WITH_EXPERT_MAP, which expert parallelism brings
    because: str


class Placement(NamedTuple):
    """How a layer's experts are spread over ranks."""

    is_split: bool = False  # each rank has some of them, and a map that says which
    is_linear: bool = True  # rank r has the r-th share of them, in order
    experts_per_rank: int = 128


_ALIGN = "moe_align_block_size sorts slots and leaves out -1; moe_sum skips their rows only with an expert map"
_COUNTS = "gets its rows from the dispatcher, with the number of rows of each expert"
_CPU = "counts slots by expert without looking whether the id is negative"

# The classes that compute experts.
EXPERTS = {
    "TritonExperts": Takes(True, WITH_EXPERT_MAP, _ALIGN),
    "Int4EmulationTritonExperts": Takes(True, WITH_EXPERT_MAP, _ALIGN),
    "Mxfp8EmulationTritonExperts": Takes(True, WITH_EXPERT_MAP, _ALIGN),
    "OCP_MXQuantizationEmulationTritonExperts": Takes(True, WITH_EXPERT_MAP, _ALIGN),
    "Nvfp4QuantizationEmulationTritonExperts": Takes(True, NEVER, "moe_sum never gets the ids, so it adds empty rows"),
    "TritonWNA16Experts": Takes(True, NEVER, "moe_sum never gets the ids, so it adds empty rows"),
    "MarlinExperts": Takes(True, WITH_EXPERT_MAP, _ALIGN),
    "DeepGemmExperts": Takes(True, ALWAYS, "ep_scatter counts slots by atomics; scatter and gather skip -1"),
    "DeepGemmFP4Experts": Takes(True, ALWAYS, "ep_scatter counts slots by atomics; scatter and gather skip -1"),
    "TritonOrDeepGemmExperts": Takes(True, WITH_EXPERT_MAP, "as TritonExperts, which small steps use"),
    "CutlassExpertsFp8": Takes(True, WITH_EXPERT_MAP, "moe_permute sorts slots, and maps -1 only with an expert map"),
    "CutlassExpertsW4A8Fp8": Takes(True, WITH_EXPERT_MAP, "moe_permute sorts slots, and maps -1 only with a map"),
    "TritonOrCutlassExperts": Takes(True, WITH_EXPERT_MAP, "as TritonExperts and CutlassExpertsFp8"),
    "CutlassExpertsFp4": Takes(True, ALWAYS, "get_cutlass_moe_mm_data sorts slots; shuffle_rows makes zeros of -1"),
    "CutlassExpertsMxfp4": Takes(True, ALWAYS, "get_cutlass_moe_mm_data sorts slots; shuffle_rows makes zeros of -1"),
    "HummingIndexedExperts": Takes(True, ALWAYS, "moe_align_block_size sorts slots; the sum looks at the ids"),
    "FlashInferExperts": Takes(False, ALWAYS, "its prologue takes the first slot of a token and expert, and no other"),
    "TrtLlmNvFp4ExpertsModular": Takes(False, ALWAYS, "up to 16 rows, one slot of a token and expert wins"),
    "TrtLlmBf16ExpertsModular": Takes(False, ALWAYS, "up to 16 rows, one slot of a token and expert wins"),
    "TrtLlmFp8ExpertsModular": Takes(False, ALWAYS, "up to 16 rows, one slot of a token and expert wins"),
    "TrtLlmMxfp4ExpertsModular": Takes(False, ALWAYS, "up to 16 rows, one slot of a token and expert wins"),
    "TrtLlmBf16LoRAExperts": Takes(False, ALWAYS, "up to 16 rows, one slot of a token and expert wins"),
    "FlashInferCuteDSLExperts": Takes(False, ALWAYS, "up to 16 rows, one slot of a token and expert wins"),
    "OAITritonExperts": Takes(False, ALWAYS, "counts a token's experts in a bit matrix, and its slots by rank"),
    "UnfusedOAITritonExperts": Takes(False, ALWAYS, "counts a token's experts in a bit matrix, and its slots by rank"),
    "HummingGroupedExperts": Takes(True, NEVER, "with FP8 activations, moe_permute gets no map"),
    "BatchedTritonExperts": Takes(True, ALWAYS, _COUNTS),
    "BatchedMarlinExperts": Takes(True, ALWAYS, _COUNTS),
    "BatchedDeepGemmExperts": Takes(True, ALWAYS, _COUNTS),
    "BatchedHummingGroupedExperts": Takes(True, ALWAYS, _COUNTS),
    "CutlassBatchedExpertsFp8": Takes(True, ALWAYS, _COUNTS),
    "FlashInferCuteDSLBatchedExperts": Takes(True, ALWAYS, _COUNTS),
    "NaiveBatchedExperts": Takes(True, ALWAYS, _COUNTS),
    "CPUUnquantizedExperts": Takes(True, NEVER, _CPU),
    "X86CPUUnquantizedExperts": Takes(True, NEVER, _CPU),
    "ArmCPUUnquantizedExperts": Takes(True, NEVER, _CPU),
    "PowerCPUUnquantizedExperts": Takes(True, NEVER, _CPU),
    "CPUExpertsFp8": Takes(True, NEVER, _CPU),
    "CPUExpertsFp8W8A8": Takes(True, NEVER, _CPU),
    "CPUExpertsInt8": Takes(True, NEVER, _CPU),
    "CPUExpertsMxfp4": Takes(True, NEVER, _CPU),
}

# The classes that bring tokens to their experts and back. vLLM's `all2all_backend` chooses one.
DISPATCHERS = {
    "MoEPrepareAndFinalizeNoDPEPModular": Takes(True, ALWAYS, "nothing is sent"),
    "MoEPrepareAndFinalizeNaiveDPEPModular": Takes(True, ALWAYS, "every token goes to every rank, with its ids"),
    "BatchedPrepareAndFinalize": Takes(True, ALWAYS, "adds up the weights of a token and expert"),
    "DeepEPHTPrepareAndFinalize": Takes(True, ALWAYS, "a token goes to a rank once; -1 becomes another rank's expert"),
    "DeepEPLLPrepareAndFinalize": Takes(False, ALWAYS, "an expert has room for one message of each token and rank"),
    "NixlEPPrepareAndFinalize": Takes(False, ALWAYS, "an expert has room for one message of each token and rank"),
    "DeepEPV2PrepareAndFinalize": Takes(False, ALWAYS, "traps if a token names an expert twice"),
    "FlashInferNVLinkOneSidedPrepareAndFinalize": Takes(True, ALWAYS, "-1 is sent to the first rank, for nothing"),
    "FlashInferNVLinkTwoSidedPrepareAndFinalize": Takes(True, NEVER, "-1 counts as an expert of the first rank"),
}
# They look up where an expert lives in a table, whose last entry -1 would find, unless placement is linear.
LOOKS_UP_PLACES = ("DeepEPLLPrepareAndFinalize", "NixlEPPrepareAndFinalize")
# Finds the rank of an expert by division, which takes -1 for rank 0 unless every rank has one expert alone.
DIVIDES = "FlashInferNVLinkOneSidedPrepareAndFinalize"

# Classes that choose experts themselves, and the `moe_backend` that leaves the choice to vLLM's router.
MONOLITHIC = {
    "TrtLlmBf16ExpertsMonolithic": "triton",
    "TrtLlmFp8ExpertsMonolithic": "triton",
    "TrtLlmNvFp4ExpertsMonolithic": "flashinfer_cutlass",
    "TrtLlmMxfp4ExpertsMonolithic": "marlin",
    "TrtLlmMxint4ExpertsMonolithic": "marlin",
    "OAITritonMxfp4ExpertsMonolithic": "marlin",
}
OTHER_DISPATCH = 'all2all_backend="allgather_reducescatter"'
OTHER_BACKEND = 'moe_backend="triton" (bfloat16, FP8) or "marlin" (FP4, INT4)'


def merges_repeats(runners: dict[int, MoERunner], *, returns_ids: bool = False) -> bool:
    """Says which form of re-routed slots the expert kernels of a model get: `merge_repeats`, else `fill_dropped`.

    `returns_ids`: the engine returns the experts of each token, where an empty slot would look like an expert.

    Raises:
        ValueError: a layer's kernel takes neither, chooses experts itself, or is not known; the message says what to
            set.
    """
    forms = {layer: _merges(layer, runner) for layer, runner in runners.items()}
    if len(set(forms.values())) > 1:
        raise ValueError(f"the model's layers run different expert kernels, some of which need merged slots: {forms}")
    merged = next(iter(forms.values()))
    if merged and Version(vllm.__version__) < Version("0.31"):
        raise ValueError(
            f"these expert kernels need merged slots, which sere_dist has not looked at in vLLM {vllm.__version__}: "
            f"install vLLM 0.31 or later, or set {OTHER_BACKEND}"
        )
    if merged and returns_ids:
        raise ValueError(
            "these expert kernels need merged slots, of which some are empty, and enable_return_routed_experts would "
            f"return those as experts that do not exist: set {OTHER_BACKEND}, or enable_return_routed_experts=False"
        )
    return merged


def _merges(layer: int, runner: MoERunner) -> bool:
    kernel: FusedMoEKernel | None = runner.routed_experts.quant_method.moe_kernel
    if kernel is None:
        raise ValueError(f"layer {layer} does not say which kernel runs its experts: set {OTHER_BACKEND}")
    experts, dispatcher = (type(part).__name__ for part in (kernel.fused_experts, kernel.prepare_finalize))
    if runner.is_monolithic:
        raise ValueError(f"layer {layer}: {monolithic_refusal(experts)}")
    placement = Placement(
        is_split=runner.routed_experts.expert_map is not None,
        is_linear=runner.expert_placement_strategy == "linear",
        experts_per_rank=runner.moe_config.num_local_experts,
    )
    return merges(experts, dispatcher, placement, scales_rows_together=_scales_rows_together(kernel))


def monolithic_refusal(experts: str) -> str:
    """Says what to set in place of a class that chooses experts itself."""
    backend = MONOLITHIC.get(experts)
    cure = OTHER_BACKEND if backend is None else f'moe_backend="{backend}"'
    return f"{experts} chooses experts itself, which can't be re-routed: set {cure}"


def merges(experts: str, dispatcher: str, placement: Placement, *, scales_rows_together: bool = False) -> bool:
    """Says whether repeated slots are merged for these two classes, by name.

    `scales_rows_together`: one scale is computed for all rows of a step, those of empty slots included.

    Raises:
        ValueError: they can't be served re-routed; the message says what to set.
    """
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"sere_dist does not know whether {dispatcher} can send re-routed slots: set {OTHER_DISPATCH}")
    if experts not in EXPERTS:
        raise ValueError(f"sere_dist does not know whether {experts} can run re-routed slots: set {OTHER_BACKEND}")
    compute, send = EXPERTS[experts], DISPATCHERS[dispatcher]
    if compute.repeats and send.repeats:
        # Merging spares rows. Kernels that take empty slots under conditions are spared the conditions.
        return compute.empty == ALWAYS == send.empty and dispatcher != DIVIDES
    takes_empty = compute.empty == ALWAYS or (
        compute.empty == WITH_EXPERT_MAP and placement.is_split and not scales_rows_together
    )
    if not placement.is_linear and dispatcher in LOOKS_UP_PLACES:
        raise ValueError(f'{dispatcher} can\'t send re-routed slots: set expert_placement_strategy="linear"')
    sends_empty = send.empty == ALWAYS and not (dispatcher == DIVIDES and placement.experts_per_rank == 1)
    if takes_empty and sends_empty:
        return True
    raise ValueError(
        f"{experts} and {dispatcher} can't run re-routed slots together ({compute.because}; {send.because}): set "
        f"{OTHER_DISPATCH}"
    )


def _scales_rows_together(kernel: FusedMoEKernel) -> bool:
    config = kernel.fused_experts.quant_config
    is_dynamic = config.quant_dtype is not None and config.a2_scale is None
    return is_dynamic and not config.per_act_token_quant and config.block_shape is None
