"""What a compiled kernel will take of a GPU."""

import io

from elftools.elf.elffile import ELFFile


def local_memory(cubin: bytes) -> dict[str, int]:
    """Bytes of local memory a thread of each kernel has: register spills, and arrays that need an address."""
    elf = ELFFile(io.BytesIO(cubin))
    symbols = elf.get_section_by_name(".symtab")
    info = elf.get_section_by_name(".nv.info").data()
    frames, at = {}, 0
    while at < len(info):
        form, attribute = info[at], info[at + 1]
        size = int.from_bytes(info[at + 2 : at + 4], "little") if form == 4 else 0
        if attribute == 0x11:  # EIATTR_FRAME_SIZE: symbol, bytes
            symbol, frame = (int.from_bytes(info[at + i : at + i + 4], "little") for i in (4, 8))
            frames[symbols.get_symbol(symbol).name] = frame
        at += 4 + size
    return frames
