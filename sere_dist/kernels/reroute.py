"""The re-routing kernel: `reroute.cu`, compiled by NVRTC for the device at hand and launched on torch's current stream.

    settings = DeviceSettings("cuda")
    settings.set(Settings(select_top_k=2))
    layer = LayerKernel(LayerTables(similarity_EE.cuda()), settings)
    layer.reroute(Step(topk_weights_TK, topk_ids_TK, valid_T))  # in place
    dict(zip(COUNTERS, layer.counters.tolist()))

The kernel is compiled for each kind of layer: its numbers of experts and its features are constants in the code. A step
allocates nothing and waits for nothing, so it can be captured in a CUDA graph, after a first step that compiled and
loaded the kernel. What a replay may change lies in device memory: the settings, the tables of a layer, and the mask of
valid rows. `sere_dist.method` computes the same, to the bit. Shape suffixes: T tokens of the step, K experts per token,
E experts of the layer.
"""

import ctypes
import enum
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

try:
    from cuda.bindings import driver, nvrtc
    from cuda.core import Kernel, ObjectCode, Program, ProgramOptions
    from cuda.core.utils import FileStreamProgramCache
except ImportError as error:  # older ones lack names, or don't find one another's
    raise ImportError(
        f"the re-routing kernel needs cuda-core 1.0 or newer and cuda-python 12.9.1 or newer ({error}): "
        "pip install -U 'cuda-core>=1' 'cuda-python>=12.9.1,<14'"
    ) from error

from sere_dist.environment import NO_OVERLAP, environment_flag
from sere_dist.kernels.neighbors import ranked_neighbors
from sere_dist.method.counters import COUNTERS
from sere_dist.method.fixed_point import to_fixed_point
from sere_dist.method.projection import projection_tables
from sere_dist.method.records import ExpertPlaces, LayerTables, Settings, Step

SOURCE = Path(__file__).with_name("reroute.cu")
MAX_EXPERTS, MAX_TOP_K = 1024, 32
MAX_THREADS = 1024
ONE_LAUNCH_LANES = MAX_THREADS  # steps that need more, one for each slot, take two launches
EXPERTS_A_WARP = 8  # whose substitutes a warp looks up at once; a divisor of 32
THREADS_OF_TWO = 512  # of each block of two launches, at least
OVERLAPS = True  # a kernel may start, and ask for its neighbours, while the one before it ends
WORKSPACE_BYTES = 10 * MAX_EXPERTS + 8  # struct Workspace
PROGRAMMATIC_LAUNCH_DRIVER = 12030  # the CUDA of a driver that captures such launches in graphs
NO_LIMIT = 2**31 - 1

ID_DTYPES = (torch.int32, torch.int64)
ENTRIES = ("reroute", "reroute_vote", "reroute_settle")


class Feature(enum.IntFlag):
    """What a layer has, as in reroute.cu."""

    NONE = 0
    PROJECTION = 1
    DOMAINS = 2
    RANKS = 4
    MERGES = 8
    CHANCES = 16


class Build(NamedTuple):
    """What is a constant of the compiled kernel."""

    experts: int
    top_k: int
    features: Feature = Feature.NONE
    id_dtype: torch.dtype = torch.int32
    experts_a_warp: int = EXPERTS_A_WARP

    @property
    def macros(self) -> list[str | tuple[str, str]]:
        numbers = {"EXPERTS": self.experts, "TOP_K": self.top_k, "FEATURES": int(self.features)}
        numbers["EXPERTS_A_WARP"] = self.experts_a_warp
        return [(name, str(number)) for name, number in numbers.items()] + ["IDS_64"] * (self.id_dtype == torch.int64)


class StepArguments(ctypes.Structure):
    """struct Step of reroute.cu: tensors as pointers, then numbers."""

    TENSORS = (
        *("weights_TK", "ids_TK", "valid_T", "home_T", "chance_T", "runs_T", "settings", "neighbors_EE", "cutoff_E"),
        *("ranked_similarity_EE", "coefficient_EE", "size_E", "domain_E", "rank_E", "counters", "workspace"),
    )
    NUMBERS = ("T", "K", "E", "num_ranks", "features")
    _fields_ = [(name, ctypes.c_void_p) for name in TENSORS] + [(name, ctypes.c_int) for name in NUMBERS]

    def point_to(self, **tensors: torch.Tensor | None) -> None:
        """Sets pointers; the caller keeps the tensors alive."""
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


class DeviceSettings:
    """The settings in force, one block of device memory for any number of layers. Off until they are set."""

    def __init__(self, device: torch.device | str):
        self.block = torch.zeros(10, dtype=torch.int32, device=device)  # struct Settings

    def set(self, settings: Settings, *, enabled: bool = True, min_rows: int = 0, max_rows: int | None = None) -> None:
        """Sets S and the prices, whether re-routing is on, and the valid rows of a step between which it is.

        The threshold is each layer's own: `LayerKernel.set_threshold`. Takes effect in the steps that the current
        stream runs afterwards, replays of captured graphs too.
        """
        most = NO_LIMIT if max_rows is None else max_rows
        numbers = torch.tensor([enabled, settings.select_top_k, min_rows, most, *[0] * 6], dtype=torch.int32)
        numbers[4:5] = torch.tensor([settings.traffic_price], dtype=torch.float32).view(torch.int32)
        prices = [to_fixed_point(price) for price in (settings.expert_price, settings.balance_price)]
        numbers[6:] = torch.tensor(prices).view(torch.int32)
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
        self.settings = settings
        neighbors_EE, ranked_similarity_EE = ranked_neighbors(similarity_EE)
        more_rows = -num_experts % 32  # that the kernel reads, and does not use
        self.neighbors_EE = torch.nn.functional.pad(neighbors_EE.to(torch.int16), (0, 0, 0, more_rows)).contiguous()
        self.ranked_similarity_EE = ranked_similarity_EE.contiguous()
        self.cutoff_E = torch.zeros(num_experts, dtype=torch.int16, device=device)
        self.domain_E = None if places.domain_E is None else places.domain_E.to(device, torch.int16).contiguous()
        self.rank_E = None if places.rank_E is None else places.rank_E.to(device, torch.int16).contiguous()
        self.num_ranks = places.num_ranks
        self.counters = torch.zeros(len(COUNTERS) + places.num_ranks, dtype=torch.int64, device=device)
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.losses_E = self.workspace.view(torch.int64)[:num_experts]  # the first member of struct Workspace
        self.set_threshold(threshold)
        self.features = Feature.MERGES if merges else Feature.NONE
        for feature, table in (
            (Feature.PROJECTION, self.size_E),
            (Feature.DOMAINS, self.domain_E),
            (Feature.RANKS, self.rank_E),
        ):
            self.features |= feature if table is not None else Feature.NONE
        self.arguments = StepArguments(E=num_experts, num_ranks=self.num_ranks, features=self.features)
        self.arguments.point_to(
            settings=settings.block,
            neighbors_EE=self.neighbors_EE,
            cutoff_E=self.cutoff_E,
            ranked_similarity_EE=self.ranked_similarity_EE,
            coefficient_EE=self.coefficient_EE,
            size_E=self.size_E,
            domain_E=self.domain_E,
            rank_E=self.rank_E,
            counters=self.counters,
            workspace=self.workspace,
        )

    def set_threshold(self, threshold: float) -> None:
        """Sets rho: only new cut-offs, in place. 0 or less: every neighbour is similar enough."""
        rho = torch.tensor(threshold, dtype=torch.float32, device=self.cutoff_E.device)
        self.cutoff_E.copy_(((self.ranked_similarity_EE >= rho) | (rho <= 0)).sum(dim=1))

    def reroute(self, step: Step, all_reduce: Callable[[torch.Tensor], None] | None = None) -> None:
        """Re-routes one step in place and counts it.

        One launch up to ONE_LAUNCH_LANES lanes (rows times K, rounded up to a power of two), two above that and with
        `all_reduce`. Steps of one layer must follow one another (one stream, or events between); different layers need
        not. The first step of a kind of layers compiles, which a capture does not allow.

        Args:
            step: contiguous tensors on the device. Weights [T, K] are float32, as all routers of vLLM return them,
                and changed by policy projection and by merging; ids [T, K] are int32 or int64, -1 is an empty slot.
                `valid_T` (bool, None: all rows), `home_T` (int32, -1: none), `chance_T` (float32) and `runs_T` (bool,
                None: no row) are at least T long.
            all_reduce: where ranks share one primary set: gets this rank's losses, int64 [E], on torch's current
                stream, and puts the sum over all ranks in their place. They are `projection.primary_losses`, but for a
                primary expert they are ALWAYS_PRIMARY or more. Called once in every call, whatever the settings, the
                rows and the masks: the other ranks wait. Whether this rank then acts, its own settings and rows
                decide.

        Raises:
            ValueError: a tensor of the step is of another type or size.
        """
        topk_weights_TK, topk_ids_TK, valid_T, home_T, chance_T, runs_T = step
        num_rows, top_k = topk_ids_TK.shape
        _check("topk_ids", topk_ids_TK, ID_DTYPES)
        _check("topk_weights", topk_weights_TK, (torch.float32,))
        if topk_weights_TK.shape != topk_ids_TK.shape or not 0 < top_k <= MAX_TOP_K:
            shapes = f"weights {tuple(topk_weights_TK.shape)} and ids {tuple(topk_ids_TK.shape)}"
            raise ValueError(f"{shapes} must be alike, with 1 to {MAX_TOP_K} slots per token")
        masks = (
            ("valid", valid_T, torch.bool),
            ("home", home_T, torch.int32),
            ("chance", chance_T, torch.float32),
            ("runs", runs_T, torch.bool),
        )
        for name, mask, dtype in masks:
            if mask is not None:
                _check(name, mask, (dtype,))
                if len(mask) < num_rows:
                    raise ValueError(f"{name} has {len(mask)} rows, the step {num_rows}")
        if num_rows == 0:
            if all_reduce is not None:
                all_reduce(self.losses_E)
                self.losses_E.zero_()
            return
        arguments, num_experts = self.arguments, len(self.cutoff_E)
        arguments.point_to(weights_TK=topk_weights_TK, ids_TK=topk_ids_TK)
        arguments.point_to(valid_T=valid_T, home_T=home_T, chance_T=chance_T, runs_T=runs_T)
        features = self.features
        if chance_T is not None and Feature.PROJECTION in features:
            features |= Feature.CHANCES
        arguments.T, arguments.K, arguments.features = num_rows, top_k, features
        build = Build(num_experts, top_k, features, topk_ids_TK.dtype, EXPERTS_A_WARP)
        kernels = kernels_for(topk_ids_TK.device, build)
        lanes = num_rows << (top_k - 1).bit_length()  # as many for each token as the next power of two
        if lanes <= ONE_LAUNCH_LANES and all_reduce is None:
            warps = max(-(-lanes // 32), -(-num_experts // EXPERTS_A_WARP))
            kernels.launch("reroute", 1, min(MAX_THREADS, 32 * warps), arguments)
            return
        threads = max(THREADS_OF_TWO, 32 * -(-num_experts // 32))
        blocks = -(-lanes // threads)
        try:
            kernels.launch("reroute_vote", blocks, threads, arguments)
            if all_reduce is not None:
                all_reduce(self.losses_E)
            kernels.launch("reroute_settle", blocks, threads, arguments)
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


def compile_options(arch: str, build: Build) -> ProgramOptions:
    """Returns NVRTC's options. All of them are part of the key in cuda.core's cache."""
    # Line numbers are for sanitizers and profilers; the machine code is the same with them and without.
    return ProgramOptions(name=SOURCE.name, arch=arch, std="c++17", fma=False, lineinfo=True, define_macro=build.macros)


def compile_kernels(arch: str, build: Build, cache_folder: Path | None = None) -> ObjectCode:
    """Returns the cubin for an architecture ("sm_90"), from cuda.core's file cache if it is there.

    Replicas of a node that start together share the cache: entries are written whole. Where its folder can't be
    written (default: `$XDG_CACHE_HOME/cuda-python`), the kernel is compiled anyway, with a warning.

    Raises:
        RuntimeError: NVRTC is missing, or refused the source; its log is in the message.
    """

    def compile_with(cache: FileStreamProgramCache | None) -> ObjectCode:
        options = compile_options(arch, build)
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
    """The kernels of one device for one kind of layer."""

    def __init__(self, device: torch.device, build: Build):
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(f"the re-routing kernel needs compute capability 8.0, {device} has {major}.{minor}")
        module = compile_kernels(f"sm_{major}{minor}", build)
        with torch.cuda.device(device):
            self.entries = load_kernels(module, ENTRIES)
        _error, newest = driver.cuDriverGetVersion()
        is_allowed = newest >= PROGRAMMATIC_LAUNCH_DRIVER and not environment_flag(NO_OVERLAP)
        self.device, self.overlaps = device, major >= 9 and is_allowed

    def launch(self, name: str, blocks: int, threads: int, arguments: StepArguments) -> None:
        with torch.cuda.device(self.device):
            # Asked for at each call: a stream remembered from before would capture an empty graph.
            stream = torch.cuda.current_stream().cuda_stream
            launch_kernel(self.entries[name], stream, blocks, threads, arguments, self.overlaps and OVERLAPS)


def launch_kernel(
    kernel: Kernel, stream: int, blocks: int, threads: int, arguments: ctypes.Structure, overlaps: bool
) -> None:
    """Launches a kernel that takes one struct by value, which cuda.core's launch can't pass.

    Args:
        stream: its handle.
        arguments: copied by the driver before this returns.
        overlaps: the kernel may start while the last one still runs; it waits where it needs its results.

    Raises:
        RuntimeError: the driver refused.
    """
    config = driver.CUlaunchConfig()
    config.gridDimX, config.blockDimX = blocks, threads
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.hStream = driver.CUstream(stream)
    if overlaps:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    (error,) = driver.cuLaunchKernelEx(config, driver.CUfunction(int(kernel.handle)), ctypes.addressof(pointers), 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver did not launch the re-routing kernel: {error.name}")


@functools.cache
def kernels_for(device: torch.device, build: Build) -> Kernels:
    return Kernels(device, build)
