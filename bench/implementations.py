"""The implementations of ops that are compared: char-gru's op sets, plain array code on NumPy or CuPy, and PyTorch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bench.devices import Device, cores, cublas_matmul
from bench.side_by_side import Arrays, Candidate, Runnable
from char_gru import kernels
from char_gru.kernels import naive
from char_gru.rnn import cpu, reference

OURS = "char-gru"

BUILT_ON = {"flashrnn": "torch", "keras": "jax"}
"""Library -> the library that it runs on here."""

WARM_UP_CALLS = 3
"""Calls before PyTorch records a graph, as its documentation asks."""


def on(ops: Any, array: np.ndarray, activations: bool = False):
    """A copy of a NumPy array on an op set; activations in the memory order in which the op set keeps sequences."""
    new = (ops.empty_activations if activations else ops.empty)(array.shape, array.dtype)
    ops.copy_in(new, array)
    return new


def bfloat16_bits(array: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, as its 16 bits."""
    return (reference.rounded(array, "bf16").view(np.uint32) >> 16).astype(np.uint16)


def runnable(ops: Any, run: Callable[[], None], **outputs: Any) -> Runnable:
    """An op of char-gru on fixed arrays: replayed as a CUDA graph where the op set can, as in a training step."""
    run = ops.replayable(run)

    def results() -> Arrays:
        run()
        return {name: ops.to_host(array) for name, array in outputs.items()}

    return Runnable(run, results)


def our_candidates(
        device: Device, make: Callable[..., Runnable], products: bool = True, twin: bool = True,
        variants: Callable[[str], Mapping[str, Mapping]] = lambda precision: {"": {}}) -> Iterator[Candidate]:
    """The candidates of char-gru: make(ops, inputs, **options) for the CPU's op set; or, on a GPU, for the naive op set
    (twin: whether the op has a naive twin), then for each variant in each precision (products: whether the op
    multiplies matrices; if not, in fp32 only). variants(precision) gives the options of each variant by its name."""
    if device.kind == "cpu":
        yield Candidate(OURS, "fp32", functools.partial(make, cpu))
        return
    if twin:
        yield Candidate(f"{OURS} naive fp32", "fp32", functools.partial(make, naive.op_set()))
    for precision in device.precisions if products else ("fp32",):
        for variant, options in variants(precision).items():
            yield Candidate(" ".join(filter(None, (OURS, variant, precision))), precision,
                            functools.partial(make, kernels.op_set(precision), **options))


class Plain:
    """Array code as a textbook has it: NumPy on the CPU, CuPy, whose products are cuBLAS's, on a GPU."""

    def __init__(self, device: Device, precision: str) -> None:
        self.xp = np if device.kind == "cpu" else _cupy()
        self._on_cpu, self._precision = device.kind == "cpu", precision

    def array(self, array: np.ndarray):
        return self.xp.array(array)

    def matmul(self, A, B, out=None):
        if self._on_cpu:
            return np.matmul(A, B, out=out)
        return cublas_matmul(A, B, out, self._precision)

    def runnable(self, run: Callable[[], dict[str, Any]]) -> Runnable:
        """run() returns its results by name."""
        def results() -> Arrays:
            outputs = run()
            return {name: np.array(array) if self._on_cpu else self.xp.asnumpy(array)
                    for name, array in outputs.items()}

        return Runnable(run, results)


def plain_candidates(device: Device, make: Callable[[Plain, Arrays], Runnable],
                     products: bool = True) -> Iterator[Candidate]:
    """Plain array code in each precision in which CuPy multiplies float32; an op without products in fp32 only."""
    for precision in device.precisions[:2] if products else ("fp32",):
        name = "NumPy" if device.kind == "cpu" else f"CuPy {precision}"
        yield Candidate(name, precision, lambda inputs, precision=precision: make(Plain(device, precision), inputs))


class Torch:
    """PyTorch on a device, its products in one precision: float32, tf32 by its switches, or bf16 by autocast."""

    def __init__(self, device: Device, precision: str) -> None:
        import torch
        self.torch, self.precision, self.kind = torch, precision, device.kind
        if device.kind == "cpu":
            torch.set_num_threads(cores())
        else:
            torch.cuda.set_stream(torch.cuda.ExternalStream(_cupy().cuda.get_current_stream().ptr))

    def array(self, array: np.ndarray, requires_grad: bool = False):
        array = array.astype(np.int64) if array.dtype == np.int32 else array
        return self.torch.tensor(array, device=self.kind).requires_grad_(requires_grad)

    @contextlib.contextmanager
    def switched(self) -> Iterator[None]:
        """Inside the `with` block, PyTorch multiplies in this precision; its switches are global."""
        self.torch.set_float32_matmul_precision("highest" if self.precision == "fp32" else "high")
        self.torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
        with self.torch.autocast(self.kind, self.torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def replayable(self, function: Callable[[], None]) -> Callable[[], None]:
        """A function that works on fixed tensors. On a GPU, its first calls run as they are; then it is recorded as a
        CUDA graph, which later calls replay."""
        if self.kind == "cpu":
            return function
        calls, graph = 0, None

        def replayed() -> None:
            nonlocal calls, graph
            calls += 1
            if calls <= WARM_UP_CALLS:
                function()
                return
            if graph is None:
                graph = self.torch.cuda.CUDAGraph()
                with self.torch.cuda.graph(graph):
                    function()
            graph.replay()

        return replayed

    def runnable(self, run: Callable[[], dict[str, Any]]) -> Runnable:
        """run() returns its results by name."""
        def switched_run() -> dict[str, Any]:
            with self.switched():
                return run()

        def results() -> Arrays:
            return {name: tensor.detach().float().cpu().numpy() for name, tensor in switched_run().items()}

        return Runnable(switched_run, results)


def torch_candidates(device: Device, make: Callable[[Torch, Arrays], Runnable], products: bool = True,
                     name: str = "PyTorch", package: str = "torch",
                     precisions: Sequence[str] | None = None) -> Iterator[Candidate]:
    """PyTorch, or a package built on it, in each precision, an op without matrix products in fp32 only; no candidate
    where the package is not installed."""
    if not installed(package, device.kind):
        return
    for precision in (device.precisions if products else ("fp32",)) if precisions is None else precisions:
        yield Candidate(name if device.kind == "cpu" else f"{name} {precision}", precision,
                        lambda inputs, precision=precision: make(Torch(device, precision), inputs))


def op_candidates(ours: Callable[..., Runnable], plain: Callable[[Plain, Arrays], Runnable],
                  pytorch: Callable[[Torch, Arrays], Runnable], products: bool = True, twin: bool = True) -> Callable:
    """The candidates of an op that has no variants, as a `Benchmark` wants them."""
    def candidates(device: Device, **sizes: int) -> Iterator[Candidate]:
        yield from our_candidates(device, ours, products, twin)
        yield from plain_candidates(device, plain, products)
        yield from torch_candidates(device, pytorch, products)

    return candidates


def flashrnn_gru(library: Torch, gru):
    """A module with the parameters of a torch.nn.GRU and FlashRNN's kernels: (x_tb, h0) -> (h_tb, last), like the GRU.

    FlashRNN's reset gate, too, acts after the recurrent product and its bias, so it is the same function. It takes the
    gates r, z, n of the input product, but n, r, z of the recurrent one and of its biases; then a bias of n outside the
    reset gate, which is zero here and not trained, as b_ih is part of the input product. Parameters stay in float32;
    in bf16 FlashRNN keeps states, too, in bfloat16. On a CPU its `vanilla` backend runs, which is plain PyTorch.
    """
    from flashrnn import flashrnn

    torch, H = library.torch, gru.hidden_size
    backend = "vanilla" if library.kind == "cpu" else "cuda"
    dtype_name = {"fp32": "float32", "bf16": "bfloat16"}[library.precision]
    dtype = getattr(torch, dtype_name)

    class FlashGRU(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            r, z, n = range(3)
            self.W_ih, self.b_ih = gru.weight_ih_l0, gru.bias_ih_l0
            self.W_hh = torch.nn.Parameter(gru.weight_hh_l0.detach().view(3, 1, H, H)[[n, r, z]])
            self.b_hh = torch.nn.Parameter(gru.bias_hh_l0.detach().view(3, 1, H)[[n, r, z]])

        def forward(self, x_tb, h0=None):
            i_tb = torch.nn.functional.linear(x_tb, self.W_ih, self.b_ih).unflatten(2, (3, 1, H)).to(dtype)
            b = torch.cat([self.b_hh, torch.zeros_like(self.b_hh[:1])]).to(dtype)
            states = None if h0 is None else h0[:, :, None, None].to(dtype)
            # FlashRNN takes batch-major arrays and makes them time-major: transposed views need no copy.
            h_bt, last = flashrnn(i_tb.transpose(0, 1), self.W_hh.to(dtype), b, states, function="gru",
                                  backend=backend, dtype=dtype_name)
            return h_bt[0, :, :, 0].transpose(0, 1), last[0, :, :, 0].transpose(0, 1)

    return FlashGRU()


def installed(library: str, kind: str) -> bool:
    """Whether a library is installed, the library that it is built on as well, and, for a GPU, finds one."""
    if importlib.util.find_spec(library) is None:
        return False
    if library in BUILT_ON:
        return installed(BUILT_ON[library], kind)
    if kind == "cpu":
        return True
    if library == "torch":
        import torch
        return torch.cuda.is_available()
    return library == "jax" and imported_jax().default_backend() == "gpu"


def imported_jax():
    """JAX, set not to reserve most of a GPU's memory at its start."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    return jax


def random_inputs(shapes: dict[str, tuple[int, ...]], **ids: tuple[tuple[int, ...], int]) -> dict[str, np.ndarray]:
    """Normally distributed float32 arrays, and int32 ids (shape, limit), by name."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return arrays | {name: rng.integers(0, limit, shape, np.int32) for name, (shape, limit) in ids.items()}


def in_float64(inputs: Arrays) -> dict[str, np.ndarray]:
    """The inputs, with floating arrays in float64."""
    return {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in inputs.items()}


def _cupy():
    import cupy
    return cupy
