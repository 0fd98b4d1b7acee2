"""Runs the PTX that NVRTC makes of a kernel source, on a CPU: see README.md beside this file.

    with kernels.runtime.use(PtxExecutor("sm_90")):
        ...  # any launcher
"""

import ctypes
import functools
import hashlib
import math
import os
import pathlib
import platform
import re
from typing import NamedTuple

import numpy as np

from char_gru.kernels.runtime import CompileError, ptx_for
from tests import host_cuda
from tests.host_ptx.parser import Statement, parse
from tests.host_ptx.translator import Untranslated, translate

__all__ = ["SCHEDULES", "Built", "Coverage", "Fault", "PtxExecutor", "Untranslated", "build", "build_ptx", "run"]

SCHEDULES = ("random", "starved", "fast")
"""Which block goes on, as Schedule of host_cuda/launch.h has it."""

_HERE = pathlib.Path(__file__).parent
# -w: what NVRTC leaves unused is not worth a warning. Without -mfma, an fma is a slow function of the C library.
_FLAGS = ("-std=c++20", "-shared", "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden",
          "-pthread", "-w", "-fno-trapping-math", *["-mfma"] * (platform.machine() == "x86_64"), f"-I{_HERE}")
_PLACES = 16  # an address and its place in the shadow are equal modulo this
_FAULT = re.compile(r"[\w$]+: PTX line ")
_POISON = 0xFFF3FFF5
"""In arrays that nobody wrote: a NaN that no arithmetic on a GPU gives, and no id, position or count. In arrays of 2
bytes its lower half, which is such a NaN as a bfloat16."""


class Fault(RuntimeError):
    """A mistake of a kernel that memory.h sees: kernel, PTX line, CUDA source line, address, block, thread."""


class Coverage(NamedTuple):
    """The instructions of a kernel, and which of them have been executed in this process."""

    instructions: list[Statement]
    executed: list[bool]


class Built(NamedTuple):
    """The library that runs a module, and what its PTX said."""

    path: pathlib.Path
    library: ctypes.CDLL
    blocks: list[tuple[str, list[Statement]]]
    weak: bool  # whether global memory is

    def coverage(self, kernel: str) -> Coverage:
        """Of a kernel, without the functions that it calls."""
        executed = (ctypes.c_uint8 * max(len(self.blocks), 1)).in_dll(self.library, "ptx_executed")
        pairs = [(statement, bool(executed[i])) for i, (name, statements) in enumerate(self.blocks) if name == kernel
                 for statement in statements]
        return Coverage([statement for statement, _ in pairs], [ran for _, ran in pairs])


@functools.cache
def build(source: str, architecture: str, worst: bool = False, weak: bool = False, banks: bool = False) -> Built:
    """Compiles a source to PTX and the PTX to a library, or finds both in the cache.

    Raises: CompileError where NVRTC refuses the source; Untranslated; host_cuda.BuildError.
    """
    return build_ptx(_ptx(source, architecture), architecture, worst, weak, banks)


def build_ptx(ptx: str, architecture: str, worst: bool = False, weak: bool = False, banks: bool = False) -> Built:
    """Compiles a PTX text to a library, or finds it in the cache.

    Raises: Untranslated; host_cuda.BuildError.
    """
    module = parse(ptx)
    translated = translate(module, int(architecture.removeprefix("sm_")), worst, weak, banks)
    headers = "".join(f"// {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sorted(_HERE.glob("*.h")))
    path = host_cuda.compiled(headers + translated.text, _FLAGS)
    library = host_cuda.opened(path)
    library.ptx_wrong_counter.restype = ctypes.c_char_p
    return Built(path, library, translated.blocks, weak)


@functools.cache
def _compiler_version(architecture: str) -> str:
    """Of the NVRTC that is loaded, which its PTX tells: packages of several versions may be installed."""
    return re.search(r"release .* V([\d.]+)", ptx_for("", architecture))[1]


def _ptx(source: str, architecture: str) -> str:
    """The PTX of a source, from the cache if it is there."""
    key = hashlib.sha256(f"{_compiler_version(architecture)} {architecture} {source}".encode()).hexdigest()[:32]
    target = host_cuda.cache() / f"{key}.ptx"
    if not target.exists():
        text = ptx_for(source, architecture)
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, target)
    return target.read_text()


class PtxExecutor(host_cuda.HostExecutor):
    """As HostExecutor, with every kernel run from its PTX for an architecture.

    worst: approximate instructions and sums inside mma err as much as hardware may. schedule: one of SCHEDULES, by
    which one block runs at a time; global memory is then as late and as stale as the PTX memory model allows, and a
    seed decides all of it. banks: keep the accesses to shared memory, for bank_conflicts.py. A source that NVRTC
    refuses, since a test wrote it for the host alone, runs as HostExecutor runs it; `from_source` has these kernels.
    """

    def __init__(self, architecture: str = "sm_90", worst: bool = False, order: str = "ascending", seed: int = 0,
                 schedule: str = "", banks: bool = False):
        super().__init__(order, seed)
        self.architecture, self._worst, self._banks = architecture, worst, banks
        self._schedule = SCHEDULES.index(schedule) + 1 if schedule else 0
        self.gpu = host_cuda.HostExecutor.gpu._replace(capability=int(architecture.removeprefix("sm_")))
        self.from_source: set[str] = set()

    def empty(self, shape, dtype):
        """Array full of poison: NaN in every float format, and a number below -1 as an integer."""
        array = super().empty(shape, dtype)
        if unit := _poison_bytes(array):
            array.reshape(-1).view(f"u{unit}")[...] = _POISON % 256**unit
        return array

    def ascending(self):
        return PtxExecutor(self.architecture, self._worst, banks=self._banks)

    def _run(self, source, module, request, parameters, args):
        kernel = request.kernel.decode()
        try:
            built = build(source, self.architecture, self._worst, self._schedule != 0, self._banks)
        except CompileError:
            self.from_source.add(kernel)
            return super()._run(source, module, request, parameters, args)
        if kernel not in dict(built.blocks):
            raise ValueError(f"no kernel {kernel!r} in the source for {self.architecture}")
        if self._schedule:  # each launch with other choices
            request.schedule, request.seed = self._schedule, self._seed << 32 | len(self.launches)
        return run(built, request, args)


def run(built: Built, request: host_cuda.Request, args: list, check_counters: bool = True) -> tuple[int, int]:
    """Runs a launch of a built module; returns the arrivals at group barriers and the mma instructions.

    check_counters: whether words that blocks add to have to end as they were (counters.h).

    Raises: Fault; host_cuda.Deadlock.
    """
    shadow_bytes = _describe_arrays(built.library, args)
    if built.weak:
        built.library.ptx_memory(math.prod((*request.grid, *request.block)), ctypes.c_uint64(shadow_bytes),
                                 ctypes.c_uint64(request.seed))
    try:
        counts = host_cuda.run_inside(built.library, request, args)
    except host_cuda.Deadlock as report:
        if _FAULT.match(str(report)):
            raise Fault(str(report)) from None
        raise
    blocks = ctypes.c_uint64(request.grid[0] * request.grid[1] * request.grid[2])
    if check_counters and (wrong := built.library.ptx_wrong_counter(blocks)):
        raise Fault(f"{request.kernel.decode()}: {wrong.decode()}")
    return counts


def _describe_arrays(library: ctypes.CDLL, args: list) -> int:
    """Tells the library where the arrays of the next launch lie; returns the bytes of their shadow. A part of an array
    counts as the whole of it, which is what a graph may use later. Arrays that overlap share their bytes of the shadow.
    """
    arrays = {i: host_cuda.allocation(arg) for i, arg in enumerate(args) if isinstance(arg, np.ndarray)}
    ranges: list[list[int]] = []
    for start, size in sorted(arrays.values()):
        if ranges and start < ranges[-1][1]:
            ranges[-1][1] = max(start + size, ranges[-1][1])
        else:
            ranges.append([start, start + size])
    described, shadow_bytes = (ctypes.c_uint64 * 3 * len(args))(), 0
    for first, last in ranges:
        shadow_bytes += first % _PLACES
        for i, (start, size) in arrays.items():
            if first <= start < last:
                described[i][:] = start, size, shadow_bytes + start - first
        shadow_bytes += last - first
        shadow_bytes += -shadow_bytes % _PLACES
    library.ptx_arrays(len(args), described, ctypes.c_uint64(shadow_bytes))
    units = (ctypes.c_uint32 * len(args))(*(_poison_bytes(arg) if i in arrays else 0 for i, arg in enumerate(args)))
    library.ptx_poison(units, ctypes.c_uint32(_POISON))
    return shadow_bytes


def _poison_bytes(array: np.ndarray) -> int:
    """The bytes of the poison that an array is full of as long as nobody wrote it; 0 where its elements are single
    bytes, of which any value may be meant."""
    return min(array.itemsize, 4) if array.itemsize in (2, 4, 8) else 0
