"""A CUDA device made of host memory, under the unmodified CuPy: see README.md beside this file.

    device = cuda_device.install("t4")  # before the first `import cupy`
    import cupy
"""

import ctypes
import hashlib
import importlib.util
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
from typing import NamedTuple

from char_gru.kernels.plan.gpus import GPU, GPUS
from tests import host_cuda, host_ptx
from tests.cuda_device import elf

__all__ = ["SMALL", "Device", "DoesNotFit", "architecture_of", "gpu_named", "install", "installable"]

SMALL = "small"
"""The name of the harness's GPU, beside those of ``GPUS``."""

MEMORY_BYTES = 4 << 30

_HERE = pathlib.Path(__file__).parent
_HEADERS = _HERE.parent / "host_cuda"  # launch.h
_SOURCES = ("work.cpp", "memory.cpp", "launch.cpp")
_FLAGS = ("-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-pthread", "-Wl,-Bsymbolic",
          "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs")
_KEPT_REAL = {"cudaGetErrorName", "cudaGetErrorString", "cudaRuntimeGetVersion"}  # tables, which ask no driver
_READ_WRITE_EXECUTE = 7

# Kernels that the harness cannot run, and what is run in their place: the wait of bench/devices.py reads a clock.
_SUBSTITUTES = {"wait": 'extern "C" __global__ void wait(unsigned long long nanoseconds) {}'}


class DoesNotFit(RuntimeError):
    """The device does not go with this CuPy, this machine or this process."""


class Device:
    """The device that this process has, for tests to disturb and to ask."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cuda_device_reports.restype = library.cuda_device_launches.restype = ctypes.c_char_p
        library.cuda_device_used_memory.restype = ctypes.c_uint64
        library.cuda_device_limit_memory.argtypes = [ctypes.c_uint64]

    def set(self, gpu: str = "h100", memory_bytes: int = MEMORY_BYTES, at_once: bool = False,
            trace: bool = False) -> None:
        """What the device is. CuPy remembers some of it from its import on."""
        name, capability, multiprocessors, shared_bytes = gpu_named(gpu)
        self._library.cuda_device_set(name.encode(), capability, multiprocessors, shared_bytes,
                                      ctypes.c_uint64(memory_bytes), at_once, trace)

    def work_at_once(self, at_once: bool) -> None:
        """From now on, work is done when it is queued, or as late as CUDA allows."""
        self._library.cuda_device_work_at_once(at_once)

    def limit_memory(self, memory_bytes: int) -> None:
        """From now on, allocations beyond this fail."""
        self._library.cuda_device_limit_memory(memory_bytes)

    def used_memory(self) -> int:
        """Bytes that are allocated now."""
        return self._library.cuda_device_used_memory()

    def fail_launch(self, kernel: str = "any", n: int = 1) -> None:
        """The n-th launch of a kernel from now on fails when it is done, and every call after it; 0: none."""
        self._library.cuda_device_fail_launch(kernel.encode(), n)

    @property
    def failed(self) -> bool:
        """Whether every call fails now."""
        return bool(self._library.cuda_device_failed())

    def reset(self) -> None:
        """End all captures and work, and undo a failure, which on a GPU only the end of a process does."""
        self._library.cuda_device_reset()

    def reports(self) -> list[str]:
        """What the device had to say since the call before: mistakes of the program, and what is not modelled."""
        return self._library.cuda_device_reports().decode().splitlines()

    def summary(self) -> str:
        """How many launches ran to their end, kernel by kernel, first those from PTX."""
        texts = []
        for from_ptx, name in ((True, "PTX"), (False, "source")):
            counts = dict(map(str.split, self._library.cuda_device_launches(from_ptx).decode().splitlines()))
            kernels = ", ".join(f"{kernel} {count}" for kernel, count in counts.items())
            texts.append(f"{sum(map(int, counts.values()))} launches from {name}" + f": {kernels}" * bool(kernels))
        return "; ".join(texts)

    def _report(self, text: str) -> None:
        self._library.cuda_device_report(text.encode())


def gpu_named(name: str) -> GPU:
    """One of GPUS, or SMALL."""
    return host_cuda.HostExecutor.gpu if name == SMALL else GPUS[name]


def architecture_of(gpu: str) -> str:
    """What NVRTC compiles for, such as "sm_90"."""
    return f"sm_{gpu_named(gpu).capability}"


def installable() -> bool:
    """Whether this machine has all that the device needs."""
    return (sys.platform == "linux" and struct.calcsize("P") == 8 and os.uname().machine == "x86_64"
            and all(map(importlib.util.find_spec, ("cupy", "nvidia"))) and host_cuda.compiler() is not None)


def install(gpu: str = "h100", memory_bytes: int = MEMORY_BYTES, at_once: bool = False, trace: bool = False,
            from_ptx: bool = False, worst: bool = False) -> Device:
    """Gives this process the device; ``import cupy`` then finds it.

    from_ptx: kernels run from their PTX, by tests/host_ptx, not from their source. worst: with approximate instructions
    and sums inside mma that err as much as hardware may.

    Raises: DoesNotFit.
    """
    if "cupy" in sys.modules:
        raise DoesNotFit("CuPy is imported already")
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"  # else a cubin from disk would have no known source
    path = _library()
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    _replace_runtime(library, elf.functions(path.read_bytes()))
    device = Device(library)
    device.set(gpu, memory_bytes, at_once, trace)
    device._modules = _Modules(device, from_ptx, worst)
    device._modules.watch()
    if from_ptx:
        _watch_arrays(library)
    return device


def _watch_arrays(library: ctypes.CDLL) -> None:
    """Tells the device of each array that CuPy's pool hands out: a part of an allocation, and the bytes asked for."""
    import cupy

    pool = cupy.get_default_memory_pool()
    library.cuda_device_array.argtypes = [ctypes.c_uint64, ctypes.c_uint64]

    def allocate(size):
        memory = pool.malloc(size)
        if size:
            library.cuda_device_array(memory.ptr, size)
        return memory

    cupy.cuda.set_allocator(allocate)


class _Compiled(NamedTuple):
    """What NVRTC was given by CuPy, and the PTX that it made on the way to the cubin."""

    source: str
    options: tuple[str, ...]
    ptx: str


class _Modules:
    """Remembers what each cubin was compiled from, and describes a cubin that the driver loads."""

    def __init__(self, device: Device, from_ptx: bool, worst: bool) -> None:
        self._device, self._from_ptx, self._worst = device, from_ptx, worst
        self.compiled: dict[bytes, _Compiled] = {}
        self._kept: list = []

    def watch(self) -> None:
        from cupy.cuda import compiler

        program, modules = compiler._NVRTCProgram, self
        compile_program = program.compile

        def remembering(self, options=(), log_stream=None):
            image, mapping = compile_program(self, options, log_stream)
            modules.compiled[image] = _Compiled(self.src, tuple(options), compiler.nvrtc.getPTX(self.ptr).decode())
            return image, mapping

        program.compile = remembering
        callback = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self._describe)
        self._kept.append(callback)
        self._device._library.cuda_device_set_describe(callback)

    def _describe(self, address: int) -> int | None:
        """describe() of launch.cpp. No exception can leave it: what is wrong becomes a report."""
        try:
            size = elf.file_size(ctypes.string_at(address, 64), lambda offset, n: ctypes.string_at(address + offset, n))
            text = ctypes.create_string_buffer(self._description(ctypes.string_at(address, size)).encode())
        except Exception as error:  # noqa: BLE001
            self._device._report(f"{type(error).__name__}: {error}")
            return None
        self._kept.append(text)
        return ctypes.addressof(text)

    def _description(self, image: bytes) -> str:
        kernels = elf.kernels(image)
        names = ", ".join(kernel.name for kernel in kernels)
        # CuPy leaves out the last byte of what NVRTC gives.
        known = next((known for known in self.compiled if image[:-1] == known[:len(image) - 1]), None)
        if known is None:
            raise DoesNotFit(f"the source of {names} is not known")
        compiled = self.compiled[known]
        if "#include <cupy/" in compiled.source:
            raise DoesNotFit(f"{names}: a kernel of CuPy's own, which is not modelled")
        architecture = re.search(r"-arch=sm_(\d+)", " ".join(compiled.options))
        if architecture is None:
            raise DoesNotFit(f"{names}: not compiled for one architecture")
        source = _SUBSTITUTES.get(names, compiled.source)
        if self._from_ptx and source == compiled.source:
            path = host_ptx.build_ptx(compiled.ptx, f"sm_{architecture[1]}", self._worst).path
        else:
            path = host_cuda._build(source, "", False).path
        declared = host_cuda.parameters_of(source)
        lines = [str(path), architecture[1]]
        for kernel in kernels:
            pointers = ["*" in parameter for parameter in declared[kernel.name]]
            if len(pointers) != len(kernel.parameters):
                raise DoesNotFit(f"{kernel.name}: {len(kernel.parameters)} parameters in the cubin, {len(pointers)} in "
                                 "the source")
            parameters = (f"{size}*" if pointer else str(size) for size, pointer in zip(kernel.parameters, pointers))
            lines.append(" ".join((kernel.name, str(kernel.registers), str(kernel.shared_bytes),
                                   str(kernel.max_threads), *parameters)))
        return "\n".join(lines)


def _replace_runtime(library: ctypes.CDLL, ours: dict[str, int]) -> None:
    """Puts a jump to our function at the head of each runtime function in CuPy's library: that is linked statically,
    and has kept its symbol table. What we do not have says its name."""
    [path] = _package("cupy_backends").glob("cuda/api/runtime.cpython-*.so")
    ctypes.CDLL(str(path))  # the mapping that `import cupy` takes
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    base = next(int(line.split("-")[0], 16) for line in maps if line.endswith(str(path)))
    theirs = {name: offset for name, offset in elf.functions(path.read_bytes()).items() if _is_runtime_function(name)}
    missing = {name for name in ours if _is_runtime_function(name)} - theirs.keys()
    if missing or not theirs.keys() >= _KEPT_REAL:
        raise DoesNotFit(f"{path} lacks {', '.join(sorted(missing | (_KEPT_REAL - theirs.keys())))}: "
                         "tests/cuda_device does not know this version of CuPy")
    not_modelled = ctypes.cast(library.cuda_device_not_modelled, ctypes.c_void_p).value
    offsets = sorted(theirs.values())
    libc = ctypes.CDLL(None, use_errno=True)
    for name, offset in theirs.items():
        if name in _KEPT_REAL:
            continue
        if name in ours:
            code = b"\x48\xb8" + struct.pack("<Q", ctypes.cast(library[name], ctypes.c_void_p).value)  # mov rax, ...
        else:
            text = ctypes.create_string_buffer(name.encode())
            _names.append(text)
            code = b"\x48\xbf" + struct.pack("<Q", ctypes.addressof(text))  # mov rdi, ...
            code += b"\x48\xb8" + struct.pack("<Q", not_modelled)
        code += b"\xff\xe0"  # jmp rax
        if any(offset < other < offset + len(code) for other in offsets):
            raise DoesNotFit(f"{path}: {name} is too short to be replaced")
        start, page = base + offset, (base + offset) & ~0xFFF
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(start + len(code) - page), _READ_WRITE_EXECUTE):
            raise OSError(ctypes.get_errno(), "mprotect")
        ctypes.memmove(start, code, len(code))


_names: list = []  # of functions that are not modelled: the code points to them


def _is_runtime_function(name: str) -> bool:
    return name.startswith("cuda") and name[4:5].isupper()


def _library() -> pathlib.Path:
    """Path of the device's library, built unless it is in the cache."""
    cxx, includes = host_cuda.compiler(), _includes()
    if cxx is None:
        raise DoesNotFit("no C++ compiler")
    texts = [(_HERE / name).read_text() for name in (*_SOURCES, "device.h")] + [(_HEADERS / "launch.h").read_text()]
    key = hashlib.sha256("\0".join((cxx, *includes, *_FLAGS, *texts)).encode()).hexdigest()[:32]
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    target = base / "char-gru" / "cuda_device" / key / "libcuda.so.1"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = pathlib.Path(folder, "library")
        done = subprocess.run([cxx, *_FLAGS, *includes, f"-I{_HEADERS}", *(str(_HERE / name) for name in _SOURCES),
                               "-o", str(output)], check=False, capture_output=True, text=True)
        if done.returncode:
            raise DoesNotFit(done.stderr)
        os.replace(output, target)
    return target


def _includes() -> list[str]:
    """The compiler's options for CUDA's headers. The packages of CUDA 13 share a folder, those of CUDA 12 do not."""
    folders = (_package("nvidia") / part / "include" for part in ("cu13", "cuda_runtime", "cuda_nvcc"))
    return [f"-I{folder}" for folder in folders if folder.is_dir()]


def _package(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise DoesNotFit(f"{name} is not installed")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))
