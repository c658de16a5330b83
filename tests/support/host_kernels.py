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
        self.launches.append(name)
        function = self.library[f"{name}_on_host"]
        function.restype = ctypes.c_char_p
        passed = map(_host_argument, arguments)
        if error := function(ctypes.c_uint(blocks), ctypes.c_uint(threads), ctypes.c_uint(self.seed), *passed):
            raise RuntimeError(error.decode())


def _host_argument(value):
    if isinstance(value, int | float):
        return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())


class CompiledOnDemand(dict[tuple[torch.dtype, torch.dtype], HostKernels]):
    """reroute.cu for each pair of types (of weights, of ids), compiled when it is first asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, types: tuple[torch.dtype, torch.dtype]) -> HostKernels:
        folder = self.folder / str(len(self))
        folder.mkdir()
        self[types] = compile_on_host(folder, kernel.SOURCE.read_text(), *types)
        return self[types]


def compile_on_host(folder: Path, source: str, weight_dtype=torch.float32, id_dtype=torch.int32) -> HostKernels:
    """Compiles `source` in place of reroute.cu."""
    (folder / "reroute.cu").write_text(source)
    macros = [*kernel.MACROS[weight_dtype], *kernel.MACROS[id_dtype]]
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
