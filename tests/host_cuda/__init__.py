"""Runs the project's CUDA kernels on a CPU, unchanged, to find mistakes that a GPU hides. README.md explains how.

A kernel source is compiled by the host compiler behind ``host_cuda.h`` and run by ``runtime.cpp``: one CUDA thread is
one fiber, one block one OS thread. The order in which threads get their turns is selectable (a result that changes is a
missing barrier), shared memory and fresh arrays are poisoned (a read of bytes that were never written shows), a
deadlock is reported with the threads that wait and where, and launches can run under AddressSanitizer and
UndefinedBehaviorSanitizer, or under ThreadSanitizer, which sees races between blocks and inside a block. A launch can
also count the bytes that it reads from and writes to the array of each argument.

    with kernels.runtime.use(HostExecutor(order="descending")):
        ...  # any launcher

Linux only. It says nothing about speed, and little about device rounding: the mathematical functions are the host's,
and nothing is contracted to fma. A kernel must wait for other blocks through ``wait_at_least`` of ``ptx.cuh`` only; a
thread has 64 KiB of stack; under ThreadSanitizer at most about 8,000 CUDA threads live at once.
"""

import bisect
import ctypes
import functools
import hashlib
import os
import pathlib
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from char_gru.kernels.plan.gpus import GPU

__all__ = [
    "ORDERS",
    "BuildError",
    "Deadlock",
    "HostExecutor",
    "LaunchCounts",
    "SanitizerReport",
    "allocation",
    "compiler",
    "parameters_of",
    "run_sanitized",
    "unwritten",
]

ORDERS = ("ascending", "descending", "random")
ADDRESS = "address,undefined"
THREAD = "thread"

_HERE = pathlib.Path(__file__).parent
_POISON = 0xFF  # as in runtime.cpp
_ALIGNMENT = 256  # bytes, as cudaMalloc gives it
_RESIDENT_BLOCKS = 256  # of a cooperative launch: each is an OS thread
_EXIT_REPORT = 3  # of standalone.cpp
_ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)

# No contraction, so that sums are the same in every build; kernels read floats through float4 pointers; equal names in
# two modules loaded at once must stay apart.
_FLAGS = ("-O2", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden", "-pthread")
_SANITIZER_FLAGS = {
    "": (),
    ADDRESS: ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
    THREAD: ("-fsanitize=thread", "-fno-omit-frame-pointer"),
}
# See counting.cpp.
_COUNTING_FLAGS = ("-O0", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0",
                   "-DHOST_CUDA_COUNT_BYTES")
_SANITIZER_DEFINES = {"": (), ADDRESS: ("-DHOST_CUDA_SANITIZE_ADDRESS",), THREAD: ("-DHOST_CUDA_SANITIZE_THREAD",)}
_SANITIZER_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "report_thread_leaks=0",
}


class BuildError(RuntimeError):
    """The kernel source does not compile: the compiler's messages."""


class Deadlock(RuntimeError):
    """No thread could go on: which threads wait where, block by block."""


class SanitizerReport(RuntimeError):
    """The report of a sanitizer, in its own words."""


class LaunchCounts(NamedTuple):
    """Sums over one launch."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    group_barriers: int  # arrivals of blocks at group barriers: blocks times barriers
    mma_calls: int  # mma instructions, one per warp
    bytes_read: tuple[int, ...]  # per argument, 0 for a number; empty unless counted
    bytes_written: tuple[int, ...]
    recording: "Recording | None" = None


class Recording(NamedTuple):
    """The arguments of one launch, and every step that its threads took."""

    shared_bytes: int  # dynamic, per block
    cooperative: bool
    arguments: dict[str, Any]  # parameter name -> NumPy array or scalar
    events: np.ndarray  # Event of launch.h, block after block; the arguments are numbered
    names: dict[int, str]  # offset of a COLLECTIVE event -> its name


class _Parameter(NamedTuple):
    kind: str  # f, i, u or V, as NumPy has them
    size: int  # bytes of the number, or of the numbers that a pointer points to
    pointer: bool
    readonly: bool

    def __str__(self):
        names = {"f4": "float", "f8": "double", "i4": "int", "u4": "unsigned", "u2": "unsigned short",
                 "u8": "unsigned long long", "i8": "long long", "V1": "void"}
        name = names.get(f"{self.kind}{self.size}", f"{self.kind}{self.size}")
        return ("const " if self.readonly else "") + name + (" *" if self.pointer else "")


class _Traffic(ctypes.Structure):
    """Traffic of launch.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "size", "read", "written")]


_EVENT = np.dtype([("block", "u4"), ("thread", "u4"), ("did", "i4"), ("argument", "i4"), ("offset", "u8"),
                   ("size", "u8")])
READ, WRITE, ATOMIC, BARRIER, ARRIVE, WAIT, COLLECTIVE = range(7)  # Did of launch.h


class Request(ctypes.Structure):
    """LaunchRequest of launch.h: a launch, and what it counted."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("cooperative", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("traffic", ctypes.POINTER(_Traffic)),
        ("recording", ctypes.c_int32),
        ("group_barriers", ctypes.c_uint64),
        ("mma_calls", ctypes.c_uint64),
        ("events", ctypes.c_void_p),
        ("event_count", ctypes.c_uint64),
    ]


def compiler() -> str | None:
    """Path of the C++ compiler: ``$CXX``, or the first of g++, clang++ and c++; None without one."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next(filter(None, map(shutil.which, names)), None)


def unwritten(array: np.ndarray) -> int:
    """How many elements of an array from ``HostExecutor.empty`` still hold the poison."""
    content = np.ascontiguousarray(array)
    return int((content.reshape(-1, 1).view(np.uint8) == _POISON).all(axis=1).sum())


def allocation(array: np.ndarray) -> tuple[int, int]:
    """Address and bytes of the array from ``HostExecutor.empty`` that an array is a part of; else of the array."""
    memory = array.base
    if isinstance(memory, np.ndarray) and memory.dtype == np.uint8 and memory.ndim == 1 and memory.size >= _ALIGNMENT:
        return memory.ctypes.data + -memory.ctypes.data % _ALIGNMENT, memory.size - _ALIGNMENT
    return array.ctypes.data, array.nbytes


class _Graph(NamedTuple):
    """Launches and copies with their arguments, as they were when captured."""

    recorded: list[tuple]

    def launch(self) -> None:
        for run, *arguments in self.recorded:
            run(*arguments)


class HostExecutor:
    """Executor of ``kernels.runtime`` that runs launches on the CPU.

    ``order`` is the order in which the threads of a block, and the blocks, get their turns; ``seed`` the seed of the
    random order. ``sanitize`` is "", "address,undefined" or "thread": each launch then runs as a process of its own,
    and a report of the sanitizer is raised as SanitizerReport. ``launches`` has the counts of every launch.

    With ``count_bytes``, and no sanitizer, that includes the bytes that all threads together read from and wrote to the
    array of each argument, as the source says: a second read of an element counts again, a float4 counts 16, and there
    is no cache. Asynchronous copies count the bytes that they read. Atomics do not count. Where arrays overlap,
    accesses count for the first. It needs GCC, and makes kernels run about ten times as long. With ``record``, each of
    ``launches`` also holds every access, in order: for small sizes only.
    """

    array_type = np.ndarray
    gpu = GPU("CPU", capability=90, multiprocessors=8, shared_bytes=64 * 1024)  # small, as the sizes of tests are

    def __init__(self, order: str = "ascending", seed: int = 0, sanitize: str = "", count_bytes: bool = False,
                 record: bool = False):
        count_bytes |= record
        if sanitize and count_bytes:
            raise ValueError("bytes are not counted under a sanitizer")
        self._order = ORDERS.index(order)
        self._seed = seed
        self._sanitize = sanitize
        self._count_bytes, self._record = count_bytes, record
        self.launches: list[LaunchCounts] = []
        self._captured: list[tuple] | None = None

    def ascending(self) -> "HostExecutor":
        """A new executor that runs the same builds of kernels, its threads in ascending order."""
        return HostExecutor()

    def empty(self, shape, dtype) -> np.ndarray:
        """Array full of poison: NaN in every float format, -1 as an integer.

        Raises: RuntimeError inside ``capture``, where it need not outlive the graph.
        """
        if self._captured is not None:
            raise RuntimeError(f"an array {tuple(shape)} is made while launches are captured; make it before")
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + _ALIGNMENT, _POISON, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start:start + size].view(dtype).reshape(shape)

    def zeros(self, shape, dtype) -> np.ndarray:
        """Array of zeros."""
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def to_device(self, array: np.ndarray) -> np.ndarray:
        """Copy of a NumPy array, for launches to use."""
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def to_host(self, array: np.ndarray) -> np.ndarray:
        """Copy of an array as a NumPy array."""
        return array.copy()

    def copy(self, destination: np.ndarray, source: np.ndarray) -> None:
        """Copies between arrays of equal dtype and shape."""
        if self._captured is not None:
            self._captured.append((self.copy, destination, source))
            return
        destination[...] = source

    def peak_memory_mib(self) -> float:
        """The most memory that this process has taken so far, in MiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def versions(self) -> dict[str, str]:
        """The compiler of the kernels."""
        return {"compiler": str(compiler())}

    def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        """How many blocks a cooperative launch may have."""
        return _RESIDENT_BLOCKS

    def capture(self, function: Callable[[], None]) -> "_Graph":
        """Records what a function launches and copies; ``launch`` of the result does it, at each call."""
        self._captured = []
        try:
            function()
            return _Graph(self._captured)
        finally:
            self._captured = None

    def compile(self, source: str) -> None:
        """Builds a source, or finds it in the cache.

        Raises: BuildError with the compiler's messages.
        """
        _build(source, self._sanitize, self._count_bytes)

    def launch(self, source: str, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], args: list,
               shared_bytes: int, cooperative: bool) -> None:
        """Runs one kernel to its end.

        ``args`` are NumPy arrays, passed as pointers, and NumPy scalars; their number, types and widths are checked
        against the kernel's signature.

        Raises: BuildError; TypeError for arguments that do not fit the signature; ValueError for an unknown kernel;
        Deadlock; SanitizerReport.
        """
        if self._captured is not None:
            self._captured.append((self.launch, source, kernel, grid, block, args, shared_bytes, cooperative))
            return
        module = _build(source, self._sanitize, self._count_bytes)
        if kernel not in module.signatures:
            raise ValueError(f"no kernel {kernel!r} in the source; it has {', '.join(module.signatures) or 'none'}")
        parameters = module.signatures[kernel]
        _check_arguments(kernel, parameters, args)
        request = Request(kernel.encode(), (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), shared_bytes,
                           cooperative, self._order, seed=self._seed)
        traffic = ()
        if self._count_bytes:
            ranges = ((arg.ctypes.data, arg.nbytes) if isinstance(arg, np.ndarray) else () for arg in args)
            traffic = request.traffic = (_Traffic * len(args))(*ranges)
            request.recording = self._record
        group_barriers, mma_calls = self._run(source, module, request, parameters, args)
        recording = None
        if self._record:
            arguments = dict(zip(_parameter_names(source, kernel), args, strict=True))
            recording = Recording(shared_bytes, cooperative, arguments, *_events(request))
        self.launches.append(LaunchCounts(kernel, grid, block, group_barriers, mma_calls,
                                          tuple(argument.read for argument in traffic),
                                          tuple(argument.written for argument in traffic), recording))

    def _run(self, source: str, module: "_Module", request: "Request", parameters: list[_Parameter],
             args: list) -> tuple[int, int]:
        """Runs a launch of a built source; returns the arrivals at group barriers and the mma instructions."""
        if self._sanitize:
            return _run_standalone(module.path, request, parameters, args)
        return run_inside(module.library, request, args)


def run_sanitized(function, sanitize: str, order: str = "ascending", seed: int = 0) -> str:
    """Calls ``function()`` with every launch under a sanitizer; returns its report, "" where it found nothing.

    ``sanitize`` is "address,undefined" (indices, alignment, undefined arithmetic) or "thread" (races between blocks,
    and between threads of a block that no barrier orders).
    """
    from char_gru.kernels import runtime

    try:
        with runtime.use(HostExecutor(order, seed, sanitize)):
            function()
    except SanitizerReport as report:
        return str(report)
    return ""


class _Module(NamedTuple):
    path: pathlib.Path  # shared library, or program where sanitized
    library: Any  # ctypes.CDLL, None where sanitized
    signatures: dict[str, list[_Parameter]]


@functools.cache
def _build(source: str, sanitize: str, count_bytes: bool) -> _Module:
    runtime = _object("runtime.cpp", ("-std=c++20", *_SANITIZER_DEFINES[sanitize]))
    text = f'#include "host_cuda.h"\n{_with_dynamic_shared(source)}\n{_kernel_table(source)}'
    if count_bytes:  # linked without -fsanitize, which would bring the runtime that counting.cpp replaces
        counting = _object("counting.cpp", ("-std=c++17",))
        kernel = _compiled(text, ("-std=c++17", *_FLAGS, *_COUNTING_FLAGS, "-c"), ())
        text, flags, objects = "", ("-shared", *_FLAGS, "-Wl,-z,defs"), (runtime, counting, kernel)
    elif sanitize:
        flags = ("-std=c++17", *_FLAGS, *_SANITIZER_FLAGS[sanitize])
        objects = (runtime, _object("standalone.cpp", ("-std=c++17",)))
    else:
        flags = ("-std=c++17", "-shared", *_FLAGS)
        objects = (runtime,)
    path = _compiled(text, flags, objects)
    if sanitize:
        library, listing = None, subprocess.run([path], check=True, capture_output=True, text=True).stdout
    else:
        library = opened(path)
        listing = library.host_cuda_signatures().decode()
    signatures = {}
    for line in listing.splitlines():
        name, *words = line.split()
        signatures[name] = [_Parameter(word[0], int(word[1:].rstrip("*c")), "*" in word, "c" in word) for word in words]
    return _Module(path, library, signatures)


def compiled(text: str, flags: tuple[str, ...]) -> pathlib.Path:
    """Path of a library of kernels that are written as C++ already, with the runtime in it."""
    return _compiled(text, flags, (_object("runtime.cpp", ("-std=c++20",)),))


def opened(path: pathlib.Path) -> ctypes.CDLL:
    """A library of kernels."""
    library = ctypes.CDLL(str(path))
    library.host_cuda_launch.restype = library.host_cuda_signatures.restype = ctypes.c_char_p
    return library


def _object(name: str, flags: tuple[str, ...]) -> pathlib.Path:
    return _compiled((_HERE / name).read_text(), (*flags, *_FLAGS, "-c"), ())


def _compiled(text: str, flags: tuple[str, ...], objects: tuple[pathlib.Path, ...]) -> pathlib.Path:
    """Path of the compiled text in the cache, whose key is everything that the result depends on."""
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler: install g++, or name one in CXX")
    headers = (path.read_text() for path in sorted(_HERE.glob("*.h")))
    everything = "\0".join((_compiler_version(cxx), text, *headers, *flags, *map(str, objects)))
    key = hashlib.sha256(everything.encode()).hexdigest()[:32]
    target = cache() / f"{key}.out"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        source = pathlib.Path(folder, "source.cpp")
        source.write_text(text)
        output = pathlib.Path(folder, "output")
        done = subprocess.run([cxx, "-I", str(_HERE), *flags, str(source), *map(str, objects), "-o", str(output)],
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(done.stderr)
        os.replace(output, target)
    return target


@functools.cache
def _compiler_version(cxx: str) -> str:
    return subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout


@functools.cache
def cache() -> pathlib.Path:
    """The folder of everything that is compiled here."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(base, "char-gru", "host_cuda")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _with_dynamic_shared(source: str) -> str:
    """The source with each ``extern __shared__ T name[];``, which is no C++, as a pointer to the block's buffer."""
    return re.sub(r"\bextern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;",
                  r"HOST_CUDA_DYNAMIC_SHARED(\1, \2);", source)


def _kernels(source: str) -> dict[str, str]:
    """Name of each kernel -> its parameters, as the source has them."""
    without_comments = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    bounds = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
    head = rf'extern\s+"C"\s+__global__\s+{bounds}void\s+{bounds}(\w+)\s*\(([^)]*)\)'
    return dict(re.findall(head, without_comments))


def parameters_of(source: str) -> dict[str, list[str]]:
    """Name of each kernel -> the declarations of its parameters, as the source has them."""
    return {name: parameters.split(",") if parameters.strip() else [] for name, parameters in _kernels(source).items()}


def _parameter_names(source: str, kernel: str) -> list[str]:
    return re.findall(r"(\w+)\s*(?:,|$)", _kernels(source)[kernel])


def _events(request: Request) -> tuple[np.ndarray, dict[int, str]]:
    """The events of a recorded launch, and the names of its collectives."""
    events = np.frombuffer(ctypes.string_at(request.events, request.event_count * _EVENT.itemsize), _EVENT)
    addresses = np.unique(events["offset"][events["did"] == COLLECTIVE])
    return events, {int(address): ctypes.string_at(int(address)).decode() for address in addresses}


def _kernel_table(source: str) -> str:
    entries = "".join(f"HOST_CUDA_KERNEL({name}), " for name in _kernels(source))
    return f"const host_cuda::Kernel host_cuda::kernels[] = {{{entries}{{nullptr, nullptr, nullptr, 0}}}};\n"


def _check_arguments(kernel: str, parameters: list[_Parameter], args: list) -> None:
    if len(args) != len(parameters):
        raise TypeError(f"{kernel}: {len(args)} arguments, the kernel takes {len(parameters)}")
    for i, (parameter, arg) in enumerate(zip(parameters, args)):
        is_array = isinstance(arg, np.ndarray)
        fits = is_array == parameter.pointer and parameter.kind in (arg.dtype.kind, "V") and (
            parameter.kind == "V" or arg.dtype.itemsize == parameter.size)
        if not fits:
            raise TypeError(f"{kernel}: argument {i} is {'an array of ' if is_array else ''}{arg.dtype}, "
                            f"the kernel declares {parameter}")
        if is_array and not parameter.readonly and not arg.flags.writeable:
            raise TypeError(f"{kernel}: argument {i} is a read-only array, the kernel declares {parameter}")


def run_inside(library, request: Request, args: list) -> tuple[int, int]:
    """Runs a launch in this process."""
    values = [np.uint64(arg.ctypes.data) if isinstance(arg, np.ndarray) else arg for arg in args]
    storage = [ctypes.create_string_buffer(value.tobytes(), 8) for value in values]
    request.arguments = (ctypes.c_void_p * max(len(args), 1))(*map(ctypes.addressof, storage))
    report = library.host_cuda_launch(ctypes.byref(request))
    if report:
        raise Deadlock(f"{request.kernel.decode()}: {report.decode()}")
    return request.group_barriers, request.mma_calls


def _run_standalone(program: pathlib.Path, request: Request, parameters: list[_Parameter],
                    args: list) -> tuple[int, int]:
    arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
    buffers = _buffers(arrays)
    words = [request.kernel.decode(), *request.grid, *request.block, request.shared_bytes, request.cooperative,
             request.order, request.seed, len(buffers), len(args)]
    content = [" ".join(map(str, words)).encode() + b"\n"]
    for start, end in buffers:
        content += [struct.pack("<Q", end - start), ctypes.string_at(start, end - start)]
    locations = {}
    for array in arrays:
        index = bisect.bisect_right(buffers, array.ctypes.data, key=lambda buffer: buffer[0]) - 1
        locations[id(array)] = index, array.ctypes.data - buffers[index][0]
    for arg in args:
        content.append(struct.pack("<qq", *locations[id(arg)]) if isinstance(arg, np.ndarray) else
                     struct.pack("<q8s", -1, arg.tobytes()))
    with tempfile.TemporaryDirectory() as folder:
        sent, received = pathlib.Path(folder, "request"), pathlib.Path(folder, "results")
        sent.write_bytes(b"".join(content))
        # ThreadSanitizer wants its addresses where they are without randomisation; where a container forbids to turn
        # that off, it is left on, which works up to 28 random bits.
        start = (f"import ctypes, os, sys; ctypes.CDLL(None).personality({_ADDR_NO_RANDOMIZE}); "
                 "os.execv(sys.argv[1], sys.argv[1:])")
        done = subprocess.run([sys.executable, "-c", start, program, sent, received], capture_output=True, text=True,
                              check=False, env={**os.environ, **_SANITIZER_ENVIRONMENT})
        report = done.stderr.strip()
        if done.returncode == _EXIT_REPORT:
            raise Deadlock(f"{request.kernel.decode()}: {report}")
        if done.returncode:
            raise SanitizerReport(report or f"{program} ended with status {done.returncode}")
        results = received.read_bytes()
    offsets = np.cumsum([0, *(end - start for start, end in buffers)])
    for parameter, arg in zip(parameters, args):
        if parameter.pointer and not parameter.readonly:
            index, offset = locations[id(arg)]
            begin = int(offsets[index]) + offset
            ctypes.memmove(arg.ctypes.data, results[begin:begin + arg.nbytes], arg.nbytes)
    return struct.unpack("<QQ", results[-16:])


def _buffers(arrays: list[np.ndarray]) -> list[tuple[int, int]]:
    """Address ranges of the arrays; arrays that overlap share one; each starts at a multiple of the widest load, 16
    bytes, so that a slice is as misaligned in the program as it is here."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted((array.ctypes.data & ~15, array.ctypes.data + array.nbytes) for array in arrays):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
