"""This machine's GPUs and their links, as NVIDIA's management library (NVML) describes them."""

from dataclasses import dataclass
from itertools import combinations
from types import ModuleType
from typing import Any

from sere_dist.cli.fresh_process import describe

NO_DRIVER = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory_bytes: int | None  # None where the GPU shares the host's


@dataclass(frozen=True)
class Gpus:
    """All GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says.

    Attributes:
        links: how each pair is linked: "NVLink", "PCIe", "across sockets" or "unknown".
        driver: the driver's version; empty without one.
        cuda: the newest CUDA that the driver runs, (major, minor).
        trouble: why NVML could not be asked; empty if it could.
        is_broken: the trouble is not just that there is no driver.
    """

    devices: tuple[Gpu, ...] = ()
    links: tuple[str, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    trouble: str = ""
    is_broken: bool = False


def load_nvml() -> ModuleType:
    import pynvml

    return pynvml


def read_gpus() -> Gpus:
    """Asks NVML. Raises nothing: what went wrong is in `trouble`."""
    try:
        nvml = load_nvml()
        nvml.nvmlInit()
    except Exception as error:
        if type(error).__name__ in NO_DRIVER:
            return Gpus(trouble=str(error))
        return Gpus(trouble=describe(error), is_broken=True)
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 13020 is 13.2
        return Gpus(
            devices=tuple(_gpu(nvml, handle) for handle in handles),
            links=tuple(_link(nvml, *pair) for pair in combinations(handles, 2)),
            driver=nvml.nvmlSystemGetDriverVersion(),
            cuda=(cuda // 1000, cuda % 1000 // 10),
        )
    except Exception as error:
        return Gpus(trouble=describe(error), is_broken=True)
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ModuleType, handle: Any) -> Gpu:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    except nvml.NVMLError_NotSupported:
        memory = None
    return Gpu(nvml.nvmlDeviceGetName(handle), tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)), memory)


def _link(nvml: ModuleType, one: Any, other: Any) -> str:
    try:
        if nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK:
            return "NVLink"
        ancestor = nvml.nvmlDeviceGetTopologyCommonAncestor(one, other)
    except nvml.NVMLError:  # virtual machines and parts of a GPU (MIG) don't say
        return "unknown"
    return "across sockets" if ancestor >= nvml.NVML_TOPOLOGY_SYSTEM else "PCIe"
