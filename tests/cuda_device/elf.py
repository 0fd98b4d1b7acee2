"""As much of ELF as is needed: the symbols of a wheel's library, and what a driver reads from a cubin.

Source: ELF-64 Object File Format; attributes of ``.nv.info`` as ``cuobjdump -elf`` (CUDA toolkit) prints them;
the flags of cubins as in LLVM's BinaryFormat/ELF.h (ELFABIVERSION_CUDA_V1, _V2).
"""

import struct
from typing import NamedTuple

_SYMBOL_TABLE, _NO_BITS, _FUNCTION = 2, 8, 2
_SIZED_VALUE = 4  # the format of an attribute of .nv.info that has a length
_MAX_THREADS, _PARAMETER, _REGISTERS = 0x05, 0x17, 0x2F
_RESERVED_SHARED = 1024  # bytes at the head of .nv.shared.*, from sm_90 on
_MAX_THREADS_PER_BLOCK = 1024
_ABI_OF_CUDA_13 = 8


class Section(NamedTuple):
    name: str
    kind: int
    offset: int
    size: int
    link: int
    entry: int


class Kernel(NamedTuple):
    """What a driver knows of a kernel."""

    name: str
    registers: int  # per thread
    shared_bytes: int  # static, per block
    max_threads: int  # per block
    parameters: tuple[int, ...]  # bytes of each


def file_size(header: bytes, read) -> int:
    """How long a file is whose first 64 bytes are given; ``read(offset, size)`` gives bytes of it."""
    program, sections = struct.unpack_from("<QQ", header, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
    ends = [program + program_size * program_count, sections + section_size * section_count]
    for i in range(section_count):
        _, kind, _, _, offset, size = struct.unpack_from("<IIQQQQ", read(sections + i * section_size, 40))
        if kind != _NO_BITS:
            ends.append(offset + size)
    return max(ends)


def sections(data: bytes) -> list[Section]:
    """All sections, in the file's order."""
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<3H", data, 58)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    return [Section(_text(data, rows[names][4] + name), kind, offset, length, link, entry)
            for name, kind, _, _, offset, length, link, _, _, entry in rows]


def functions(data: bytes) -> dict[str, int]:
    """Address of each function that the symbol table has, relative to where the file is loaded."""
    return {name: value for name, kind, section, value in _symbols(data) if kind == _FUNCTION and section}


def kernels(data: bytes) -> list[Kernel]:
    """The kernels of a cubin."""
    found = {section.name: section for section in sections(data)}
    names = [symbol[0] for symbol in _symbols(data)]
    registers = {names[symbol]: count for attribute, value in _attributes(data, found[".nv.info"])
                 if attribute == _REGISTERS for symbol, count in [struct.unpack("<II", value)]}
    reserved = _RESERVED_SHARED if _capability(data) >= 90 else 0
    result = []
    for name in (section.removeprefix(".text.") for section in found if section.startswith(".text.")):
        threads, parameters = _MAX_THREADS_PER_BLOCK, {}
        for attribute, value in _attributes(data, found[f".nv.info.{name}"]):
            if attribute == _MAX_THREADS:
                x, y, z = struct.unpack("<III", value)
                threads = x * y * z
            elif attribute == _PARAMETER:
                _, number, _, packed = struct.unpack("<IHHI", value)
                parameters[number] = packed >> 18
        shared = found.get(f".nv.shared.{name}")
        result.append(Kernel(name, registers[name], max(0, shared.size - reserved) if shared else 0, threads,
                             tuple(parameters[number] for number in sorted(parameters))))
    return result


def _capability(data: bytes) -> int:
    """The compute capability, times ten, that a cubin is for; CUDA 13 has moved it by a byte."""
    (flags,) = struct.unpack_from("<I", data, 48)
    return (flags >> 8 if data[8] >= _ABI_OF_CUDA_13 else flags) & 0xFF


def _symbols(data: bytes) -> list[tuple[str, int, int, int]]:
    """(name, type, section, value) of each symbol."""
    table, result = sections(data), []
    for section in table:
        if section.kind == _SYMBOL_TABLE:
            for offset in range(section.offset, section.offset + section.size, section.entry):
                name, info, _, index, value, _ = struct.unpack_from("<IBBHQQ", data, offset)
                result.append((_text(data, table[section.link].offset + name), info & 15, index, value))
    return result


def _attributes(data: bytes, section: Section) -> list[tuple[int, bytes]]:
    result, offset = [], section.offset
    while offset < section.offset + section.size:
        form, attribute, size = struct.unpack_from("<BBH", data, offset)
        offset += 4
        if form == _SIZED_VALUE:
            result.append((attribute, data[offset:offset + size]))
            offset += size
    return result


def _text(data: bytes, offset: int) -> str:
    return data[offset:data.index(b"\0", offset)].decode()
