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
        passed = [
            ctypes.c_int(v) if isinstance(v, int) else ctypes.c_void_p(v.data_ptr() if v is not None else None)
            for v in arguments
        ]
        if error := function(ctypes.c_uint(blocks), ctypes.c_uint(threads), ctypes.c_uint(self.seed), *passed):
            raise RuntimeError(error.decode())


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
    library = folder / "reroute.so"
    macros = [f"-D{name}" for name in (*kernel.MACROS[weight_dtype], *kernel.MACROS[id_dtype])]
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas", *macros]
    command += ["-I", str(folder), "-I", str(HERE), str(HERE / "reroute_on_host.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return HostKernels(library)
