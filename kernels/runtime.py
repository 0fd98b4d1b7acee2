"""Sources, compiling and launching of the CUDA kernels: the one place where arguments are checked and converted.

A launcher calls ``check`` for each array it is given, ``empty`` for its results and ``launch`` for the kernel. Who runs
the kernel is an executor: CuPy on a GPU, or the one that ``use`` installed. Importing this module imports neither CuPy
nor a driver.
"""

import contextlib
import functools
import importlib.resources
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from char_gru.kernels.plan.gpus import GPU

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
MAX_THREADS_PER_BLOCK = 1024
SHARED_BYTES_WITHOUT_ASKING = 48 * 1024  # more dynamic shared memory has to be requested per kernel

_OPTIONS = ("--std=c++17", "--generate-line-info")
_REFUSED_IMAGES = ("CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_INVALID_PTX", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
                   "CUDA_ERROR_JIT_COMPILER_NOT_FOUND")
_CAPTURE_ERRORS = (800, 801, *range(900, 909))  # not permitted, not supported, cudaErrorStreamCapture...
_SCALARS = (np.int32, np.uint32, np.int64, np.uint64, np.float32)


class DeviceError(RuntimeError):
    """CuPy, a GPU or a compiler is missing; the text says what to install."""


class CompileError(RuntimeError):
    """A kernel source does not compile: the compiler's messages."""


class ResourceUse(NamedTuple):
    """The resources that one kernel takes on one architecture."""

    registers: int  # per thread
    shared_bytes: int  # static, per block
    spill_stores: int  # bytes per thread
    spill_loads: int  # bytes per thread


class Graph(Protocol):
    """Launches and copies recorded once, to be started together any number of times."""

    def launch(self) -> None: ...


class Executor(Protocol):
    """Runs kernels, and owns the arrays that they work on."""

    array_type: type
    gpu: GPU

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any: ...

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any: ...

    def to_device(self, array: np.ndarray) -> Any: ...

    def to_host(self, array: Any) -> np.ndarray: ...

    def copy(self, destination: Any, source: Any) -> None:
        """Starts a copy between arrays of equal dtype and shape."""

    def peak_memory_mib(self) -> float:
        """The most memory that arrays have taken so far, in MiB."""

    def versions(self) -> dict[str, str]:
        """What the results depend on beside the GPU: name -> version."""

    def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        """How many blocks of the kernel the device holds at once."""

    def launch(self, source: str, kernel: str, grid: tuple[int, int, int], block: tuple[int, int, int], args: list,
               shared_bytes: int, cooperative: bool) -> None:
        """Starts the kernel with arguments that ``launch`` has checked."""

    def capture(self, function: Callable[[], None]) -> Graph:
        """Records what a function launches and copies, without doing it. The arrays have to outlive the graph."""


class CupyExecutor:
    """Runs kernels on the current GPU and the current stream, compiled by NVRTC at their first use.

    The thread that makes it gets a stream to work on. Other threads work on the null stream, and the launches of both
    streams stay in order; no stream is shared with a capture, so that any thread may capture while others launch.

    Raises: DeviceError where CuPy is not installed or finds no GPU.
    """

    def __init__(self):
        try:
            import cupy
        except ImportError as error:
            raise DeviceError("CuPy is not installed: pip install 'char-gru[cuda13]' "
                              "(or 'char-gru[cuda12]' for a driver of CUDA 12)") from error
        if not cupy.is_available():
            raise DeviceError("CuPy finds no GPU: check the driver with nvidia-smi; "
                              "'char-gru[cuda13]' needs a driver of CUDA 13, 'char-gru[cuda12]' one of CUDA 12")
        self._cupy = cupy
        device = cupy.cuda.Device()
        self.device_id = device.id
        self._stream = cupy.cuda.Stream()
        self._stream.__enter__()  # for good; after use(), the end of an inner `with` would return to the null stream
        self._modules: dict = {}
        self._functions: dict = {}
        self._resident: dict = {}
        self._loading = threading.Lock()
        self._thread = threading.local()  # captures: whether this thread captures
        self.array_type = cupy.ndarray
        attributes = device.attributes
        self.gpu = GPU(cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode(),
                       int(device.compute_capability), attributes["MultiProcessorCount"],
                       attributes["MaxSharedMemoryPerBlockOptin"])

    def empty(self, shape, dtype):
        self._check_no_capture(shape)
        return self._cupy.empty(shape, dtype)

    def zeros(self, shape, dtype):
        self._check_no_capture(shape)
        return self._cupy.zeros(shape, dtype)

    def to_device(self, array):
        self._check_no_capture(array.shape)
        return self._cupy.asarray(np.ascontiguousarray(array)).reshape(array.shape)  # NumPy makes () to (1,)

    def to_host(self, array):
        return self._cupy.asnumpy(array)

    def copy(self, destination, source):
        destination.data.copy_from_device_async(source.data, source.nbytes)  # x[...] = y may run a kernel of CuPy's

    def peak_memory_mib(self):
        return self._cupy.get_default_memory_pool().total_bytes() / 2**20  # the pool never gives memory back

    def versions(self):
        cuda = self._cupy.cuda

        def version(number: int) -> str:
            return f"{number // 1000}.{number % 1000 // 10}"

        return {"driver": f"for CUDA {version(cuda.runtime.driverGetVersion())}",
                "cuda_runtime": version(cuda.runtime.runtimeGetVersion()),
                "nvrtc": ".".join(map(str, cuda.nvrtc.getVersion())), "cupy": self._cupy.__version__}

    def resident_blocks(self, source, kernel, threads, shared_bytes):
        key = source, kernel, threads, shared_bytes
        if key not in self._resident:
            function = self._function(source, kernel, shared_bytes, cooperative=True)
            per_multiprocessor = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
                function.kernel.ptr, threads, shared_bytes)
            self._resident[key] = per_multiprocessor * self.gpu.multiprocessors
        return self._resident[key]

    def launch(self, source, kernel, grid, block, args, shared_bytes, cooperative):
        function = self._function(source, kernel, shared_bytes, cooperative)
        if not cooperative:
            function(grid, block, tuple(args), shared_mem=shared_bytes)
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The grid size will be reduced")  # CuPy does so, and only warns
            function(grid, block, tuple(args), shared_mem=shared_bytes)

    def capture(self, function):
        # The null stream cannot be captured; and while a stream is captured that blocks it, no thread may use it.
        stream, cuda = self._cupy.cuda.Stream(non_blocking=True), self._cupy.cuda
        self._thread.captures = True
        try:
            with stream:
                stream.begin_capture()
                try:
                    function()
                except BaseException:
                    with contextlib.suppress(cuda.runtime.CUDARuntimeError):  # what the function raised says more
                        stream.end_capture()
                    raise
                return stream.end_capture()
        except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
            if error.status not in _CAPTURE_ERRORS:  # such as the failure of a launch before
                raise
            raise DeviceError(f"CUDA cannot capture launches as a graph ({error}): to train without, use --no-graph, "
                              "or graph=False from Python") from error
        finally:
            self._thread.captures = False

    def _check_no_capture(self, shape):
        """Memory that CuPy's pool hands out during a capture may go to another array while the graph still uses it."""
        if getattr(self._thread, "captures", False):
            raise DeviceError(f"an array of shape {tuple(shape)} is made while launches are captured as a graph: make "
                              "it before the capture")

    def _function(self, source, kernel, shared_bytes, cooperative):
        key = source, kernel, shared_bytes, cooperative
        if key not in self._functions:
            with self._loading:  # no other thread may change modules and limits between reading and writing
                self._functions[key] = self._loaded(*key)
        return self._functions[key]

    def _loaded(self, source, kernel, shared_bytes, cooperative):
        """The kernel, with leave to use that much shared memory. CuPy launches all kernels of a module in the same way,
        so a source with both kinds of launch becomes two modules."""
        limit = self.gpu.shared_bytes
        if (source, cooperative) not in self._modules:
            self._modules[source, cooperative] = self._cupy.RawModule(
                code=source, options=_OPTIONS, enable_cooperative_groups=cooperative)
        try:
            function = self._modules[source, cooperative].get_function(kernel)
        except (self._cupy.cuda.compiler.CompileException, RuntimeError) as error:
            if plain := self._plainly(error, source, kernel):
                raise plain from error
            raise
        total = function.shared_size_bytes + shared_bytes
        if total > limit:
            raise ValueError(f"{kernel}: {total} bytes of shared memory per block; this GPU has {limit}")
        if total > SHARED_BYTES_WITHOUT_ASKING:  # one attribute for all launches of the kernel: never lowered
            function.max_dynamic_shared_size_bytes = max(shared_bytes, function.max_dynamic_shared_size_bytes)
        return function

    def _plainly(self, error, source, kernel):
        """The error to raise for CuPy's about loading a kernel; None where CuPy's says enough."""
        text, cuda, capability = str(error).strip(), self._cupy.cuda, self.gpu.capability / 10
        if isinstance(error, cuda.compiler.CompileException):
            if "--gpu-architecture" in text:  # an older GPU: for a newer one, CuPy asks for the newest that NVRTC knows
                nvrtc = ".".join(map(str, cuda.nvrtc.getVersion()))
                return DeviceError(f"NVRTC {nvrtc} does not compile for compute capability {capability}: char-gru "
                                   "needs 7.5 or more, and a CuPy for a CUDA that still supports this GPU")
            first = next((line for line in text.splitlines() if "error" in line), text)
            return CompileError(f"{kernel}: {first}")
        if isinstance(error, cuda.runtime.CUDARuntimeError):
            return None
        if not isinstance(error, cuda.driver.CUDADriverError):
            return DeviceError(f"CuPy cannot compile ({text}): install it as 'char-gru[cuda13]' or 'char-gru[cuda12]', "
                               "which bring NVRTC and CUDA's headers")
        status = text.partition(":")[0]
        if status == "CUDA_ERROR_NOT_FOUND":
            module = re.search(r'#line 1 "(.*)"', source)
            return ValueError(f"{module[1] if module else 'the source'} has no kernel {kernel}")
        if status == "CUDA_ERROR_NO_BINARY_FOR_GPU":
            return DeviceError(f"the driver cannot load {kernel} ({text}): NVRTC is too old for compute capability "
                               f"{capability}; install a newer CuPy and NVRTC")
        if status in _REFUSED_IMAGES:
            return DeviceError(f"the driver cannot load {kernel} ({text}): update the driver, or install CuPy for an "
                               "older CUDA, 'char-gru[cuda12]'")
        return None


_executor: Executor | None = None
_making = threading.Lock()


@contextlib.contextmanager
def use(executor: Executor) -> Iterator[Executor]:
    """Inside the ``with`` block, kernels run on this executor, also kernels that other threads launch."""
    global _executor
    before, _executor = _executor, executor
    try:
        yield executor
    finally:
        _executor = before


def current_executor() -> Executor:
    """The executor in use; without one, CuPy's from now on.

    Raises: DeviceError where CuPy or a GPU is missing.
    """
    global _executor
    if _executor is None:
        with _making:
            if _executor is None:
                _executor = CupyExecutor()
    return _executor


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Array with undefined content, on the device."""
    return current_executor().empty(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Array of zeros, on the device."""
    return current_executor().zeros(shape, dtype)


def to_device(array: np.ndarray) -> Any:
    """Copy of a NumPy array on the device."""
    return current_executor().to_device(array)


def to_host(array: Any) -> np.ndarray:
    """Copy of a device array as a NumPy array."""
    return current_executor().to_host(array)


def address(array: Any) -> int:
    """Where an array of the device begins."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def peak_memory_mib() -> float:
    """The most memory that arrays of the device have taken so far, in MiB."""
    return current_executor().peak_memory_mib()


def check(name: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    """Requires an array of exactly this dtype and shape, C-contiguous and of the executor in use.

    Raises: ValueError naming the argument, the expected dtype and shape, and the actual ones.
    """
    array_type = current_executor().array_type
    expected = (f"expected a C-contiguous {array_type.__module__}.{array_type.__name__} of {np.dtype(dtype)} "
                f"{tuple(shape)}")
    of_executor = isinstance(array, array_type)
    if not of_executor:
        raise ValueError(f"{name}: {expected}, got {type(array).__module__}.{type(array).__name__}")
    if array.dtype != dtype or array.shape != tuple(shape) or not array.flags.c_contiguous:
        order = "C-contiguous" if array.flags.c_contiguous else f"strided {array.strides}"
        raise ValueError(f"{name}: {expected}, got {array.dtype} {array.shape}, {order}")


def launch(stem: str, kernel: str, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence, *,
           constants: Mapping[str, int], shared_bytes: int = 0, cooperative: bool = False) -> None:
    """Launches one kernel of ``kernels/<stem>.cu`` on the executor in use.

    ``grid`` counts blocks, ``block`` threads, each one number or up to three. ``args`` are arrays of the executor and
    NumPy scalars, which fix the width of every parameter: np.int32 for int, np.uint32 for unsigned, np.int64 for long
    long, np.uint64 for unsigned long long, np.float32 for float. ``shared_bytes`` is dynamic shared memory per block; a
    ``cooperative`` launch has all its blocks on the device at once.

    Raises: TypeError for any other argument; ValueError for an array that is not C-contiguous, for an extent out of
    range, and for a cooperative grid larger than the device holds; DeviceError.
    """
    executor = current_executor()
    for i, arg in enumerate(args):
        if isinstance(arg, executor.array_type):
            if not arg.flags.c_contiguous:
                raise ValueError(f"{kernel}: argument {i} is not C-contiguous: {arg.dtype} {arg.shape}, "
                                 f"strides {arg.strides}")
        elif not isinstance(arg, _SCALARS):
            raise TypeError(f"{kernel}: argument {i} is a {type(arg).__module__}.{type(arg).__name__}; pass arrays of "
                            f"{executor.array_type.__module__} and scalars of an exact width, such as np.int32(1)")
    grid, block = _extent(kernel, "grid", grid), _extent(kernel, "block", block)
    threads, blocks = math.prod(block), math.prod(grid)
    if threads > MAX_THREADS_PER_BLOCK:
        raise ValueError(f"{kernel}: {threads} threads per block; at most {MAX_THREADS_PER_BLOCK} are possible")
    text = source(stem, constants)
    if cooperative:
        resident = executor.resident_blocks(text, kernel, threads, shared_bytes)
        if blocks > resident:
            raise ValueError(f"{kernel}: a cooperative grid of {blocks} blocks, of {threads} threads and "
                             f"{shared_bytes} bytes of dynamic shared memory each; the device holds {resident} at once")
    executor.launch(text, kernel, grid, block, list(args), shared_bytes, cooperative)


def replayable(function: Callable[..., None]) -> Callable[..., None]:
    """A fixed sequence of launches and copies on fixed arrays, which becomes a single launch of a graph.

    The first call runs the function as it is: that compiles and loads kernels and makes scratch arrays, all of which a
    capture must not do. The second call captures it; that one and all later ones launch the graph. Each thread has its
    own first call and its own graph, as it has its own scratch arrays. Every call is to have the arguments of the
    first, and the caller keeps the arrays alive.

    The result raises DeviceError where the function cannot be captured.
    """
    graphs: dict[int, Graph | None] = {}  # by thread; None after the first call

    @functools.wraps(function)
    def replayed(*arguments):
        thread = threading.get_ident()
        if thread not in graphs:
            function(*arguments)
            graphs[thread] = None
            return
        graph = graphs[thread]
        if graph is None:
            graph = graphs[thread] = current_executor().capture(functools.partial(function, *arguments))
        graph.launch()

    return replayed


def _extent(kernel: str, name: str, extent: int | Sequence[int]) -> tuple[int, int, int]:
    numbers = tuple(extent) if isinstance(extent, (tuple, list)) else (extent,)
    if not 1 <= len(numbers) <= 3 or not all(isinstance(n, int) and n >= 1 for n in numbers):
        raise ValueError(f"{kernel}: {name} {extent!r}; expected one to three positive integers")
    return (*numbers, 1, 1)[:3]


def source(stem: str, constants: Mapping[str, int]) -> str:
    """The text of one module: the constants as macros, then ``kernels/<stem>.cu`` with our own headers in it.

    Raises: FileNotFoundError; TypeError for a constant that is not an int.
    """
    return _source(stem, tuple(sorted(constants.items())))


@functools.cache
def _source(stem: str, constants: tuple[tuple[str, int], ...]) -> str:
    return assemble(f"{stem}.cu", _read(f"{stem}.cu"), dict(constants))


def assemble(name: str, text: str, constants: Mapping[str, int]) -> str:
    """A source that needs no file: ``#define`` lines, then the text with each ``#include "x.cuh"`` replaced, the first
    time, by that file of this package. Line directives make compilers name the file that a line comes from.

    Raises: TypeError for a constant that is not an int; ValueError for an ``#include`` that a compiler may skip.
    """
    for constant, value in constants.items():
        if type(value) is not int:
            raise TypeError(f"constant {constant} of {name}: expected an int, got {value!r}")
    defines = "".join(f"#define {constant} {value}\n" for constant, value in constants.items())
    return defines + _inlined(name, text, set())


def _inlined(name: str, text: str, seen: set[str]) -> str:
    lines, conditions = [f'#line 1 "kernels/{name}"'], 0
    for number, line in enumerate(text.splitlines(), 1):
        conditions += bool(re.match(r"\s*#\s*if", line)) - bool(re.match(r"\s*#\s*endif", line))
        include = re.fullmatch(r'\s*#\s*include\s+"([^"]+)"\s*', line)
        if not include:
            lines.append(line)
            continue
        header = include[1]
        if conditions:
            raise ValueError(f'kernels/{name}:{number}: #include "{header}" inside #if; a header is put in only once, '
                             "where it is included first, and the compiler might skip it there: "
                             "move the #include out of the #if")
        if header not in seen:
            seen.add(header)
            lines.append(_inlined(header, _read(header), seen))
        lines.append(f'#line {number + 1} "kernels/{name}"')
    return "\n".join(lines) + "\n"


def _read(name: str) -> str:
    return importlib.resources.files("char_gru.kernels").joinpath(name).read_text(encoding="utf-8")


def compile_for(source: str, architecture: str) -> dict[str, ResourceUse]:
    """Compiles a source for an architecture such as "sm_90", with no GPU and no driver; kernel name -> its resources.

    Raises: DeviceError where NVRTC is not installed; CompileError with its messages.
    """
    return _resource_use(_compiled(source, architecture, "--ptxas-options=-v").log)


def ptx_for(source: str, architecture: str) -> str:
    """The PTX of a source for an architecture such as "sm_90", with no GPU and no driver.

    Raises: as compile_for.
    """
    return _compiled(source, architecture.replace("sm_", "compute_")).ptx


def cubin_for(source: str, architecture: str) -> bytes:
    """The machine code of a source for an architecture such as "sm_90", with no GPU and no driver.

    Raises: as compile_for.
    """
    return _compiled(source, architecture).cubin


class _Compiled(NamedTuple):
    log: str
    ptx: str
    cubin: bytes  # empty for a virtual architecture


def _compiled(source: str, architecture: str, *more: str) -> _Compiled:
    """Messages, PTX and machine code of NVRTC for a source, with the options that CuPy has, and more.

    Raises: as compile_for.
    """
    try:
        from cuda.bindings import nvrtc

        status, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], [])
    except (ImportError, RuntimeError) as error:
        raise DeviceError("NVRTC is not installed: pip install 'char-gru[test]'") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"nvrtcCreateProgram: {status.name}")
    try:
        options = [option.encode() for option in (f"--gpu-architecture={architecture}", *more, "-ftz=true",
                                                  "--device-as-default-execution-space", *_OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        buffer = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, buffer)
        log = buffer.rstrip(b"\0").decode()
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{architecture}: {log.strip() or status.name}")
        _, size = nvrtc.nvrtcGetPTXSize(program)
        ptx = bytearray(size)
        nvrtc.nvrtcGetPTX(program, ptx)
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytearray(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return _Compiled(log, ptx.rstrip(b"\0").decode(), bytes(cubin))


def _resource_use(log: str) -> dict[str, ResourceUse]:
    """Reads the output of ``ptxas -v`` about each entry function."""
    use = {}
    patterns = (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    for entry in log.split("Compiling entry function ")[1:]:
        found = (re.search(pattern, entry) for pattern in patterns)
        use[entry.split("'")[1]] = ResourceUse(*(int(number[1]) if number else 0 for number in found))
    return use
