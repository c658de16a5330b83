"""The re-routing kernel: `reroute.cu`, compiled by NVRTC for the device at hand and launched on torch's current stream.

    settings = DeviceSettings("cuda")
    settings.set(Settings(select_top_k=2))
    layer = LayerKernel(LayerTables(similarity_EE.cuda()), settings)
    layer.reroute(Step(topk_weights_TK, topk_ids_TK, valid_T))  # in place
    dict(zip(COUNTERS, layer.counters.tolist()))

A step allocates nothing and waits for nothing, so it can be captured in a CUDA graph, after a first step that compiled
and loaded the kernel. What a replay may change lies in device memory: the settings, the tables of a layer, the mask
of valid rows. `sere_dist.method` computes the same, to the bit. Shape suffixes: T tokens of the step, K experts per
token, E experts of the layer.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from cuda.bindings import driver, nvrtc
    from cuda.core import Kernel, LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch
    from cuda.core.utils import FileStreamProgramCache
except ImportError as error:  # older ones lack names, or don't find one another's
    raise ImportError(
        f"the re-routing kernel needs cuda-core 1.0 or newer and cuda-python 12.9.1 or newer ({error}): "
        "pip install -U 'cuda-core>=1' 'cuda-python>=12.9.1,<14'"
    ) from error

from sere_dist.kernels.neighbors import ranked_neighbors
from sere_dist.method.counters import COUNTERS
from sere_dist.method.projection import projection_tables, to_fixed_point
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step

SOURCE = Path(__file__).with_name("reroute.cu")
MAX_EXPERTS, MAX_TOP_K = 1024, 32
ONE_LAUNCH_ROWS = 1024  # more rows than this take two launches
MAX_THREADS = 1024
EXPERTS_A_WARP = 4  # at most, where the threads suffice: a warp finds their substitutes one after the other
THREADS_OF_TWO, BLOCKS_OF_TWO = 512, 264  # two blocks for each multiprocessor of an H200
WORKSPACE_BYTES = 10 * MAX_EXPERTS + 8  # struct Workspace
NO_LIMIT = 2**31 - 1

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ID_DTYPES = (torch.int32, torch.int64)
# What these types are called in reroute.cu.
MACROS = {
    torch.float32: (),
    torch.bfloat16: ("BFLOAT16",),
    torch.float16: ("FLOAT16",),
    torch.int32: (),
    torch.int64: ("IDS_64",),
}
Argument = torch.Tensor | int | float | None
ENTRIES = ("reroute", "reroute_vote", "reroute_settle")


class DeviceSettings:
    """The settings in force, one block of device memory for any number of layers. Off until they are set."""

    def __init__(self, device: torch.device | str):
        self.block = torch.zeros(8, dtype=torch.int32, device=device)  # struct Settings

    def set(self, settings: Settings, *, enabled: bool = True, min_rows: int = 0, max_rows: int | None = None) -> None:
        """Sets S and both prices, whether re-routing is on, and the valid rows of a step between which it is.

        The threshold is each layer's own: `LayerKernel.set_threshold`. Takes effect in the steps that the current
        stream runs afterwards, replays of captured graphs too.
        """
        most = NO_LIMIT if max_rows is None else max_rows
        numbers = torch.tensor([enabled, settings.select_top_k, min_rows, most, 0, 0, 0, 0], dtype=torch.int32)
        numbers[4:5] = torch.tensor([settings.traffic_price], dtype=torch.float32).view(torch.int32)
        numbers[6:] = torch.tensor([to_fixed_point(settings.expert_price)]).view(torch.int32)
        self.block.copy_(numbers)


class LayerKernel:
    """One MoE layer's tables and counters on a device, and the kernel that re-routes its steps.

    Attributes:
        counters: int64 [len(COUNTERS) + num_ranks], summed over the steps; see `counters.count_step`.
        domain_E, rank_E: int16 [E], or None: where each expert lives now. May be changed in place between steps; are
            the very tensors given, if these were int16 on the settings' device.
    """

    def __init__(
        self,
        tables: LayerTables,
        settings: DeviceSettings,
        places: ExpertPlaces | None = None,
        *,
        threshold: float = 0.0,
        merges: bool = False,
    ):
        """With coefficients and sizes the layer follows policy projection, otherwise the paper's.

        Args:
            tables: on any device, copied to that of the settings.
            settings: those in force; layers may share them.
            places: where experts live. Without domains none is counted and none has a price; without ranks one rank
                holds all. A rank beyond `num_ranks` is not counted.
            threshold: rho.
            merges: what a step ends in: `slots.merge_repeats`, or `slots.fill_dropped`.

        Raises:
            ValueError: more experts or ranks than MAX_EXPERTS, or tables that don't fit one another.
        """
        places = places or ExpertPlaces()
        num_experts = len(tables.similarity_EE)
        _check_sizes(tables, places)
        device = settings.block.device
        tables = tables.to(device)
        similarity_EE = tables.similarity_EE.float()
        self.coefficient_EE = self.size_E = None
        if tables.coefficient_EE is not None and tables.size_E is not None:
            similarity_EE, coefficient_EE, size_E = projection_tables(tables)
            self.coefficient_EE, self.size_E = coefficient_EE.contiguous(), size_E.contiguous()
        self.settings, self.merges = settings, merges
        neighbors_EE, ranked_similarity_EE = ranked_neighbors(similarity_EE)
        self.neighbors_EE = neighbors_EE.to(torch.int16).contiguous()
        self.ranked_similarity_EE = ranked_similarity_EE.contiguous()
        self.cutoff_E = torch.zeros(num_experts, dtype=torch.int16, device=device)
        self.domain_E = None if places.domain_E is None else places.domain_E.to(device, torch.int16).contiguous()
        self.rank_E = None if places.rank_E is None else places.rank_E.to(device, torch.int16).contiguous()
        self.num_ranks = places.num_ranks
        self.counters = torch.zeros(len(COUNTERS) + places.num_ranks, dtype=torch.int64, device=device)
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.losses_E = self.workspace.view(torch.int64)[:num_experts]  # the first member of struct Workspace
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float) -> None:
        """Sets rho: only new cut-offs, in place. 0 or less: every neighbour is similar enough."""
        rho = torch.tensor(threshold, dtype=torch.float32, device=self.cutoff_E.device)
        self.cutoff_E.copy_(((self.ranked_similarity_EE >= rho) | (rho <= 0)).sum(dim=1))

    def reroute(self, step: Step, all_reduce: Callable[[torch.Tensor], None] | None = None) -> None:
        """Re-routes one step in place and counts it.

        One launch up to ONE_LAUNCH_ROWS rows, two above that and with `all_reduce`. Steps of one layer must follow one
        another (one stream, or events between); different layers need not.

        Args:
            step: contiguous tensors on the device. Weights [T, K] are float32, bfloat16 or float16, and changed by
                policy projection and by merging; ids [T, K] are int32 or int64, -1 is an empty slot. `valid_T` (bool,
                None: all rows) and `home_T` (int32, -1: none) are at least T long.
            all_reduce: where ranks share one primary set: gets this rank's losses, int64 [E], on torch's current
                stream, and puts the sum over all ranks in their place. They are `projection.primary_losses`, but for a
                primary expert some multiple of ALWAYS_PRIMARY. Called once in every call, whatever the settings, the
                rows and the masks: the other ranks wait. Whether this rank then acts, its own settings and rows
                decide.

        Raises:
            ValueError: a tensor of the step is of another type or size.
        """
        topk_weights_TK, topk_ids_TK, valid_T, home_T = step
        num_rows, top_k = topk_ids_TK.shape
        _check("topk_ids", topk_ids_TK, ID_DTYPES)
        _check("topk_weights", topk_weights_TK, WEIGHT_DTYPES)
        if topk_weights_TK.shape != topk_ids_TK.shape or top_k > MAX_TOP_K:
            shapes = f"weights {tuple(topk_weights_TK.shape)} and ids {tuple(topk_ids_TK.shape)}"
            raise ValueError(f"{shapes} must be alike, with at most {MAX_TOP_K} slots per token")
        for name, mask, dtype in (("valid", valid_T, torch.bool), ("home", home_T, torch.int32)):
            if mask is not None:
                _check(name, mask, (dtype,))
                if len(mask) < num_rows:
                    raise ValueError(f"{name} has {len(mask)} rows, the step {num_rows}")
        if num_rows == 0:
            if all_reduce is not None:
                all_reduce(self.losses_E)
                self.losses_E.zero_()
            return
        kernels = kernels_for(topk_ids_TK.device, topk_weights_TK.dtype, topk_ids_TK.dtype)
        num_experts = len(self.cutoff_E)
        arguments = [topk_weights_TK, topk_ids_TK, num_rows, top_k, num_experts, self.settings.block, valid_T]
        arguments += [self.neighbors_EE, self.cutoff_E, self.ranked_similarity_EE, self.coefficient_EE, self.size_E]
        arguments += [self.domain_E, home_T, self.rank_E, self.num_ranks, int(self.merges)]
        arguments += [self.counters, self.workspace]
        lanes = num_rows << (top_k - 1).bit_length()  # as many for each token as the next power of two
        if num_rows <= ONE_LAUNCH_ROWS:
            warps = max(-(-lanes // 32), -(-num_experts // EXPERTS_A_WARP))
            shape = 1, min(MAX_THREADS, 32 * warps)
        else:
            shape = min(BLOCKS_OF_TWO, -(-lanes // THREADS_OF_TWO)), THREADS_OF_TWO
        if num_rows <= ONE_LAUNCH_ROWS and all_reduce is None:
            kernels.launch("reroute", *shape, arguments)
        else:
            try:
                kernels.launch("reroute_vote", *shape, arguments)
                if all_reduce is not None:
                    all_reduce(self.losses_E)
                kernels.launch("reroute_settle", *shape, arguments)
            except BaseException:
                self.workspace.zero_()  # the votes of a step that was not settled must not count in the next
                raise


def _check_sizes(tables: LayerTables, places: ExpertPlaces) -> None:
    num_experts = len(tables.similarity_EE)
    for name, number in (("experts", num_experts), ("ranks", places.num_ranks)):
        if number > MAX_EXPERTS:
            raise ValueError(f"the kernel takes at most {MAX_EXPERTS} {name}, not {number}")
    if (tables.coefficient_EE is None) != (tables.size_E is None):
        raise ValueError("policy projection needs both coefficient and size")
    if (places.rank_E is None) != (places.num_ranks == 0):
        raise ValueError("rank_E and num_ranks come together")
    for name, table, dimensions in (
        ("similarity", tables.similarity_EE, 2),
        ("coefficient", tables.coefficient_EE, 2),
        ("size", tables.size_E, 1),
        ("domain", places.domain_E, 1),
        ("rank", places.rank_E, 1),
    ):
        if table is not None and table.shape != (num_experts,) * dimensions:
            raise ValueError(f"{name} is {tuple(table.shape)}, {num_experts} experts call for {dimensions} such axes")


def _check(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes or not tensor.is_contiguous():
        kinds = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}, strides {tensor.stride()}: the kernel takes contiguous {kinds}")


def compile_options(arch: str, weight_dtype: torch.dtype, id_dtype: torch.dtype) -> ProgramOptions:
    """Returns NVRTC's options. All of them are part of the key in cuda.core's cache."""
    macros = [*MACROS[weight_dtype], *MACROS[id_dtype]]
    # Line numbers are for sanitizers and profilers; the machine code is the same with them and without.
    return ProgramOptions(
        name=SOURCE.name, arch=arch, std="c++17", fma=False, lineinfo=True, define_macro=macros or None
    )


def compile_kernels(
    arch: str, weight_dtype: torch.dtype, id_dtype: torch.dtype, cache_folder: Path | None = None
) -> ObjectCode:
    """Returns the cubin for an architecture ("sm_90"), from cuda.core's file cache if it is there.

    Replicas of a node that start together share the cache: entries are written whole. Where its folder can't be
    written (default: `$XDG_CACHE_HOME/cuda-python`), the kernel is compiled anyway, with a warning.

    Raises:
        RuntimeError: NVRTC is missing, or refused the source; its log is in the message.
    """

    def compile_with(cache: FileStreamProgramCache | None) -> ObjectCode:
        options = compile_options(arch, weight_dtype, id_dtype)
        try:
            return Program(SOURCE.read_text(), "c++", options).compile("cubin", cache=cache)
        except OSError:
            raise
        except Exception as error:  # cuda.core's, cuda.bindings' and cuda.pathfinder's have no common type
            raise RuntimeError(
                f"the re-routing kernel can't be compiled for {arch} ({type(error).__name__}: {error}); "
                "`sere-dist doctor` says what to install"
            ) from error

    try:
        return compile_with(FileStreamProgramCache(cache_folder))
    except OSError as error:
        warnings.warn(
            f"the compiled re-routing kernel can't be kept ({error}): every replica compiles its own. Set "
            "XDG_CACHE_HOME to a folder that can be written",
            stacklevel=2,
        )
        return compile_with(None)


def nvrtc_version() -> tuple[int, int]:
    _error, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def compiler_advice(compiler: int, runs: int) -> str:
    """Says what to install where NVRTC belongs to a newer major version of CUDA than the driver runs."""
    return (
        f"install a driver for CUDA {compiler}, or have CUDA {runs} compile the kernel: "
        f"pip uninstall nvidia-cuda-nvrtc; pip install 'cuda-python=={runs}.*' nvidia-cuda-nvrtc-cu{runs}"
    )


def load_kernels(module: ObjectCode, names: Sequence[str]) -> dict[str, Kernel]:
    """Returns kernels of a cubin by name, loaded on the current device.

    Raises:
        RuntimeError: the driver is older than the CUDA of the NVRTC that compiled them.
    """
    try:
        kernels = {name: module.get_kernel(name) for name in names}
        for kernel in kernels.values():
            kernel.attributes.num_regs  # noqa: B018 loads it: the driver would load it in a capture otherwise
    except Exception as error:  # cuda.core's error has no public name
        (compiler, minor), (_error, newest) = nvrtc_version(), driver.cuDriverGetVersion()
        runs = newest // 1000
        if compiler <= runs:
            raise
        at_most = f"{runs}.{newest % 1000 // 10}"  # 12090 is 12.9
        raise RuntimeError(
            f"the driver can't load the re-routing kernel ({error}): it runs CUDA {at_most} at most, and NVRTC "
            f"{compiler}.{minor} compiled it; {compiler_advice(compiler, runs)}"
        ) from error
    return kernels


class Kernels:
    """The kernels of one device for one pair of dtypes."""

    def __init__(self, device: torch.device, weight_dtype: torch.dtype, id_dtype: torch.dtype):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(f"the re-routing kernel needs compute capability 8.0, {device} has {major}.{minor}")
        module = compile_kernels(f"sm_{major}{minor}", weight_dtype, id_dtype)
        with torch.cuda.device(device):
            self.entries = load_kernels(module, ENTRIES)
        self.device = device

    def launch(self, name: str, blocks: int, threads: int, arguments: Sequence[Argument]) -> None:
        launch_kernel(self.entries[name], self.device, blocks, threads, arguments)


def launch_kernel(
    kernel: Kernel, device: torch.device, blocks: int, threads: int, arguments: Sequence[Argument]
) -> None:
    """Launches a kernel on torch's current stream of the device. Tensors are passed as pointers, None as a null one."""
    with torch.cuda.device(device):
        # Asked for at each call: a stream remembered from before would capture an empty graph.
        stream = _stream(torch.cuda.current_stream().cuda_stream)
        launch(stream, LaunchConfig(grid=blocks, block=threads), kernel, *map(_kernel_argument, arguments))


@functools.cache
def _stream(handle: int) -> Stream:
    return Stream.from_handle(handle)


def _kernel_argument(value: Argument) -> Any:
    """cuda.core takes a Python int for a pointer, and a Python float for a double."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)


@functools.cache
def kernels_for(device: torch.device, weight_dtype: torch.dtype, id_dtype: torch.dtype) -> Kernels:
    return Kernels(device, weight_dtype, id_dtype)
