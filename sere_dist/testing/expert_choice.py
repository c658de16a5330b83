"""Which expert kernel vLLM picks on a GPU, asked on a machine without one.

vLLM's own oracles choose, and are told that the platform is a GPU of some compute capability on which everything is
installed that vLLM's CUDA requirements name (FlashInfer, DeepGEMM, triton_kernels). `expert_kernels` then gives its
verdict. Used by the tests, and by `python -m docs.generate_reference` for the table of what works.
"""

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.kernel import MoEBackend
from vllm.model_executor.layers.fused_moe import experts as experts_package
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts
from vllm.model_executor.layers.fused_moe.oracle import fp8, int_wna16, mxfp4, nvfp4, unquantized
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from sere_dist.vllm_plugin.expert_kernels import Placement, merges, monolithic_refusal

NUM_EXPERTS = 128
CAPABILITIES = {"A100": 80, "H100": 90, "B200": 100}


@dataclass(frozen=True)
class Layout:
    """How experts are spread over GPUs."""

    name: str
    tensor_parallel: int = 1
    data_parallel: int = 1
    all2all_backend: str = "allgather_reducescatter"
    dispatcher: str = "MoEPrepareAndFinalizeNoDPEPModular"
    expert_parallel: bool = False


LAYOUTS = (
    Layout("1 GPU"),
    Layout("TP2", tensor_parallel=2),
    Layout("TP2, EP2", tensor_parallel=2, expert_parallel=True),
    *(
        Layout(f"DP8, EP8, {backend}", 1, 8, backend, dispatcher, expert_parallel=True)
        for backend, dispatcher in (
            ("allgather_reducescatter", "MoEPrepareAndFinalizeNaiveDPEPModular"),
            ("deepep_high_throughput", "DeepEPHTPrepareAndFinalize"),
            ("deepep_low_latency", "DeepEPLLPrepareAndFinalize"),
            ("deepep_v2", "DeepEPV2PrepareAndFinalize"),
            ("nixl_ep", "NixlEPPrepareAndFinalize"),
            ("moonep", "MoonEPPrepareAndFinalize"),
            ("passthrough", "PassThroughPrepareAndFinalize"),
            ("flashinfer_nvlink_one_sided", "FlashInferNVLinkOneSidedPrepareAndFinalize"),
            ("flashinfer_nvlink_two_sided", "FlashInferNVLinkTwoSidedPrepareAndFinalize"),
        )
    ),
)

Choice = tuple[Any, type[FusedMoEExperts] | None]


def _int4(config: Any) -> Choice:
    quantisation = AutoGPTQConfig(4, 128, False, True, False, {}, {})
    return int_wna16.select_wna16_moe_backend(config, quant_utils.kInt4Static, quantisation, False, False)


# A quantisation, and the oracle that picks its kernel.
QUANTISATIONS: dict[str, Callable[[Any], Choice]] = {
    "bfloat16": unquantized.select_unquantized_moe_backend,
    "FP8, blocks of 128": lambda config: fp8.select_fp8_moe_backend(
        config, quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym
    ),
    "FP8 per tensor": lambda config: fp8.select_fp8_moe_backend(
        config, quant_utils.kFp8StaticTensorSym, quant_utils.kFp8StaticTensorSym, allow_vllm_cutlass=True
    ),
    "MXFP4 (GPT-OSS)": lambda config: mxfp4.select_mxfp4_moe_backend(config),
    "NVFP4": lambda config: nvfp4.select_nvfp4_moe_backend(config, quant_utils.kNvfp4Static, quant_utils.kNvfp4Dynamic),
    "INT4 (GPTQ)": _int4,
}


@contextlib.contextmanager
def pretended_gpu(capability: int) -> Generator[None]:
    """Tells vLLM that it runs on a GPU of this compute capability, with everything installed."""

    def at_least(wanted: Any, *_args: Any) -> bool:
        return (wanted if isinstance(wanted, int) else wanted[0] * 10 + wanted[1]) <= capability

    platform = {
        "is_cuda": lambda: True,
        "is_cuda_alike": lambda: True,
        "is_cpu": lambda: False,
        "is_out_of_tree": lambda: False,
        "get_device_capability": lambda *_args, **_named: DeviceCapability(capability // 10, capability % 10),
        "is_device_capability": lambda wanted, *_args: wanted in (capability, (capability // 10, capability % 10)),
        "is_device_capability_family": lambda wanted, *_args: wanted // 10 == capability // 10,
        "has_device_capability": at_least,
        "supports_fp8": lambda: capability >= 89,
        "fp8_dtype": lambda: quant_utils.FP8_DTYPE,
    }
    installed = {
        "has_triton_kernels": True,
        "has_flashinfer": True,
        "has_flashinfer_cutlass_fused_moe": True,
        "has_flashinfer_trtllm_fused_moe": True,
        "has_flashinfer_cutedsl_grouped_gemm_nt_masked": True,
        "has_flashinfer_cutedsl_moe_nvfp4": True,
        "has_flashinfer_nvlink_one_sided": True,
        "has_flashinfer_nvlink_two_sided": True,
        "is_flashinfer_mxint4_moe_available": True,
        "has_deep_gemm": True,
        "is_deep_gemm_supported": capability in (90, 100),
        "cutlass_group_gemm_supported": capability in (90, 100),
        "cutlass_fp8_supported": capability >= 89,
        "has_deep_ep": True,
        "has_deep_ep_v2": True,
        "has_nixl_ep": True,
        "has_moonep": True,
    }
    for module in pkgutil.iter_modules(experts_package.__path__, f"{experts_package.__name__}."):
        with contextlib.suppress(ImportError):  # kernels of other makers
            importlib.import_module(module.name)
    with contextlib.ExitStack() as stack:
        for name, function in platform.items():
            stack.enter_context(mock.patch.object(type(current_platform), name, staticmethod(function)))
        for module in [m for name, m in sys.modules.items() if name.startswith("vllm.")]:
            for name, answer in installed.items():
                if name in vars(module):
                    stack.enter_context(mock.patch.object(module, name, lambda *_args, answer=answer, **_named: answer))
        stack.enter_context(mock.patch.object(mxfp4, "_user_moe_activation_override", lambda: None))
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        yield


def chosen(quantisation: str, layout: Layout, moe_backend: MoEBackend = "auto") -> type[FusedMoEExperts]:
    """Returns the class that vLLM picks, within `pretended_gpu`.

    Raises:
        ValueError, NotImplementedError: vLLM has none.
    """
    ranks = layout.tensor_parallel * layout.data_parallel
    parallel = FusedMoEParallelConfig(
        tp_size=1 if layout.expert_parallel else ranks,
        pcp_size=1,
        dp_size=layout.data_parallel,
        ep_size=ranks if layout.expert_parallel else 1,
        tp_rank=0,
        pcp_rank=0,
        dp_rank=0,
        ep_rank=0,
        sp_size=1,
        use_ep=layout.expert_parallel,
        all2all_backend=layout.all2all_backend,
        enable_eplb=False,
    )
    is_gpt_oss = "GPT-OSS" in quantisation
    config = FusedMoEConfig(
        num_experts=NUM_EXPERTS,
        experts_per_token=8,
        hidden_dim=2048,
        intermediate_size=768,
        num_local_experts=NUM_EXPERTS // parallel.ep_size,
        num_logical_experts=NUM_EXPERTS,
        activation=MoEActivation.SWIGLUOAI if is_gpt_oss else MoEActivation.SILU,
        device="cuda",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        moe_backend=moe_backend,
        has_bias=is_gpt_oss,
    )
    _backend, experts = QUANTISATIONS[quantisation](config)
    assert experts is not None  # vLLM has no class only for layers that it runs by themselves
    return experts


def verdict(experts: type[FusedMoEExperts], layout: Layout) -> str:
    """Returns "merged" or "repeats", the form that the kernel gets.

    Raises:
        ValueError: it is refused; the message says what to set.
    """
    name, ranks = experts.__name__, layout.tensor_parallel * layout.data_parallel
    if experts.is_monolithic():
        raise ValueError(monolithic_refusal(name))
    placement = Placement(layout.expert_parallel, True, NUM_EXPERTS // ranks if layout.expert_parallel else NUM_EXPERTS)
    return "merged" if merges(name, layout.dispatcher, placement) else "repeats"
