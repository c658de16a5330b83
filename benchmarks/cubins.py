"""What a compiled kernel will take of a GPU, read from its machine code."""

import io
import json
import subprocess
import tempfile
from importlib import metadata
from typing import Any

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

FRAME_SIZE, REGISTER_COUNT = 0x11, 0x2F  # EIATTR_FRAME_SIZE, EIATTR_REGCOUNT


def local_memory(cubin: bytes) -> dict[str, int]:
    """Bytes of local memory a thread of each kernel has: register spills, and arrays that need an address."""
    return _attribute(cubin, FRAME_SIZE)


def registers(cubin: bytes) -> dict[str, int]:
    """Registers a thread of each kernel has."""
    return _attribute(cubin, REGISTER_COUNT)


def _attribute(cubin: bytes, wanted: int) -> dict[str, int]:
    elf = ELFFile(io.BytesIO(cubin))
    symbols, section = elf.get_section_by_name(".symtab"), elf.get_section_by_name(".nv.info")
    assert isinstance(symbols, SymbolTableSection) and section is not None  # a cubin has both
    info, found, at = section.data(), {}, 0
    while at < len(info):
        form, attribute = info[at], info[at + 1]
        size = int.from_bytes(info[at + 2 : at + 4], "little") if form == 4 else 0
        if attribute == wanted:  # symbol, number
            symbol, number = (int.from_bytes(info[at + i : at + i + 4], "little") for i in (4, 8))
            found[symbols.get_symbol(symbol).name] = number
        at += 4 + size
    return found


def instructions(cubin: bytes) -> dict[str, list[dict[str, Any]]]:
    """Returns the instructions of each kernel, as nvdisasm's JSON has them (package nvidia-cuda-nvdisasm)."""
    (nvdisasm,) = (file for file in metadata.files("nvidia-cuda-nvdisasm") or [] if file.stem == "nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(nvdisasm.locate()), "-json", file.name], capture_output=True, text=True, check=True)
    _about, functions = json.loads(run.stdout)
    return {function["function-name"]: function["sass-instructions"] for function in functions}
