"""reroute.cu as a library for this CPU (cuda_on_host.h), launched as on a GPU."""

import ctypes
import subprocess
from pathlib import Path

import torch

from sere_dist.kernels import reroute as kernel

HERE = Path(__file__).parent


class HostKernels:
    """What `kernel.Kernels` is on a GPU: the same launches with the same arguments, run by the CPU."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.launches: list[str] = []
        self.seed = 0

    def launch(self, name, blocks, threads, arguments):
        """Takes a struct, or a list of tensors and numbers."""
        self.launches.append(name)
        function = self.library[f"{name}_on_host"]
        function.restype = ctypes.c_char_p
        is_struct = isinstance(arguments, ctypes.Structure)
        passed = [ctypes.byref(arguments)] if is_struct else map(_host_argument, arguments)
        if error := function(ctypes.c_uint(blocks), ctypes.c_uint(threads), ctypes.c_uint(self.seed), *passed):
            raise RuntimeError(error.decode())


def _host_argument(value):
    if isinstance(value, int | float):
        return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


class CompiledOnDemand(dict[torch.dtype, HostKernels]):
    """reroute.cu for each type of ids, compiled when it is first asked for. One build serves all kinds of layers."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, id_dtype: torch.dtype) -> HostKernels:
        folder = self.folder / str(len(self))
        folder.mkdir()
        self[id_dtype] = compile_on_host(folder, kernel.SOURCE.read_text(), id_dtype)
        return self[id_dtype]

    def kernels_for(self, _device: torch.device, build: kernel.Build) -> HostKernels:
        return self[build.id_dtype]


def compile_on_host(folder: Path, source: str, id_dtype=torch.int32, build: kernel.Build | None = None) -> HostKernels:
    """Compiles `source` in place of reroute.cu: for one kind of layer, else for all."""
    (folder / "reroute.cu").write_text(source)
    macros = build.macros if build else ["IDS_64"] * (id_dtype == torch.int64)
    macros = [macro if isinstance(macro, str) else "=".join(macro) for macro in macros]
    return _compile(folder, "reroute_on_host.cpp", folder, macros)


def compile_baselines_on_host(folder: Path, experts: int) -> HostKernels:
    """Compiles what `benchmarks.kernel` times re-routing against."""
    return _compile(folder, "baselines_on_host.cpp", HERE.parents[1] / "benchmarks", [f"EXPERTS={experts}"])


def _compile(folder: Path, wrapper: str, sources: Path, macros: list[str]) -> HostKernels:
    library = folder / f"{wrapper}.so"
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command += [f"-D{macro}" for macro in macros]
    command += ["-I", str(sources), "-I", str(HERE), str(HERE / wrapper), "-o", str(library)]
    subprocess.run(command, check=True)
    return HostKernels(library)
