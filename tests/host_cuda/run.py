"""One op's kernels on the CPU, on small random inputs: ``python -m kernels --run OP``.

The launches of the op are recorded, its results compared with those of the CPU's op set in float64. An op of the table
OPS is a function of its sizes, whose defaults are small: it makes the arguments of the op, the same for each op set.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from char_gru import kernels
from char_gru.kernels import runtime
from char_gru.kernels.matmul import matmul as matmul_launcher
from char_gru.kernels.plan.recurrence import backward_plan, forward_plan
from char_gru.rnn import devices
from tests import host_cuda
from tests.host_cuda import trace as words

ROUNDOFF = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-8}
"""Precision -> relative error of one rounded operand."""

ROUNDOFFS = 64
"""So many of them a result may be off, relative to its largest entry."""


class Case(NamedTuple):
    """The arguments of an op, and the arrays that it writes."""

    args: list
    results: dict[str, Any]


class Arrays:
    """Random arrays of an op set; for each op set the same numbers."""

    def __init__(self, ops, dtype):
        self.ops, self.dtype, self._random = ops, dtype, np.random.default_rng(0)

    def empty(self, *shape: int, dtype=None):
        return self.ops.empty(shape, dtype or self.dtype)

    def normal(self, *shape: int, scale: float = 1.0):
        return self._array(np.float32(scale) * self._random.standard_normal(shape, np.float32), self.dtype)

    def uniform(self, *shape: int):
        return self._array(self._random.random(shape, np.float32), self.dtype)

    def integers(self, end: int, *shape: int):
        return self._array(self._random.integers(0, end, shape), np.int32)

    def constant(self, value, *shape: int, dtype=None):
        return self._array(np.full(shape, value), dtype or self.dtype)

    def _array(self, values: np.ndarray, dtype):
        array = self.ops.empty(values.shape, dtype)
        self.ops.copy_in(array, values)
        return array


# ---- The ops --------------------------------------------------------------------------------------------------------

def matmul(make: Arrays, M=5, N=6, K=7) -> Case:
    C = make.empty(M, N)
    return Case([make.normal(M, K), make.normal(K, N), C], {"C": C})


def input_table_forward(make: Arrays, V=7, E=4, H=8) -> Case:
    P = make.empty(V, 3 * H)
    return Case([make.normal(V, E), make.normal(3 * H, E), make.normal(3 * H), P], {"P": P})


def input_table_backward(make: Arrays, V=7, E=4, H=8) -> Case:
    results = {"dx": make.empty(V, E), "dW_ih": make.empty(3 * H, E), "db_ih": make.empty(3 * H)}
    return Case([make.normal(V, 3 * H), make.normal(V, E), make.normal(3 * H, E), *results.values()], results)


def gru_forward(make: Arrays, T=3, B=2, H=8, V=7) -> Case:
    saved = make.ops.gru_saved(T, B, H, make.dtype)
    return Case([make.normal(V, 3 * H), make.integers(V, T, B), make.normal(3 * H, H, scale=H**-0.5),
                 make.normal(3 * H), make.normal(B, H), saved], {"h_tb": saved.h_tb})


def gru_backward(make: Arrays, T=3, B=2, H=8, V=7) -> Case:
    forward = gru_forward(make, T, B, H, V).args
    make.ops.gru_forward(*forward)
    _, ids_tb, W_hh, _, _, saved = forward
    shapes = {"dP": (V, 3 * H), "dW_hh": (3 * H, H), "db_hh": (3 * H,), "dh0": (B, H)}
    results = {name: make.empty(*shape) for name, shape in shapes.items()}
    return Case([make.normal(T, B, H), None, ids_tb, W_hh, saved, *results.values()], results)


def dropout_forward(make: Arrays, T=3, B=2, H=8) -> Case:
    results = {"keep_tb": make.empty(T, B, H, dtype=bool), "y_tb": make.empty(T, B, H)}
    return Case([make.normal(T, B, H), 0.5, 1, 0, make.constant(0, 1, dtype=np.uint64), *results.values()], results)


def dropout_backward(make: Arrays, T=3, B=2, H=8) -> Case:
    dx_tb, keep_tb = make.empty(T, B, H), make.empty(T, B, H, dtype=bool)
    make.ops.copy_in(keep_tb, np.arange(T * B * H).reshape(T, B, H) % 3 > 0)
    return Case([make.normal(T, B, H), 0.5, keep_tb, dx_tb], {"dx_tb": dx_tb})


def cross_entropy_forward(make: Arrays, T=3, B=2, H=8, V=7) -> Case:
    results = {"loss": make.empty(1), "dlogits_tb": make.empty(T, B, V)}
    return Case([make.normal(T, B, H), make.normal(V, H), make.normal(V), make.integers(V, T, B), *results.values()],
                results)


def cross_entropy_backward(make: Arrays, T=3, B=2, H=8, V=7) -> Case:
    results = {"dW_out": make.empty(V, H), "db_out": make.empty(V)}
    return Case([make.normal(T, B, V), make.normal(T, B, H), *results.values()], results)


def global_norm(make: Arrays, N=10) -> Case:
    norm = make.empty(1)
    return Case([make.normal(N), norm], {"norm": norm})


def adam(make: Arrays, N=10) -> Case:
    results = {"params": make.normal(N), "m": make.normal(N), "v": make.uniform(N)}
    params, m, v = results.values()
    return Case([params, make.normal(N), m, v, make.constant(3, 1), make.constant(0.001, 1)], results)


def sample(make: Arrays, R=2, V=7) -> Case:
    ids = make.empty(R, dtype=np.int32)
    return Case([make.normal(R, V), make.uniform(R), ids], {"ids": ids})


def generate(make: Arrays, T=3, R=2, H=8, V=7) -> Case:
    params = {"W_hh.0": make.normal(3 * H, H, scale=H**-0.5), "b_hh.0": make.normal(3 * H),
              "W_out": make.normal(V, H), "b_out": make.normal(V)}
    h, ids_tr = make.normal(1, R, H), make.empty(T, R, dtype=np.int32)
    nothing_forced = make.constant(-1, T, R, dtype=np.int32)
    return Case([params, make.normal(V, 3 * H), h, make.integers(V, R), nothing_forced, make.uniform(T, R), ids_tr,
                 make.ops.generation_saved(R, H, V, make.dtype)], {"ids_tr": ids_tr, "h": h})


OPS = {op.__name__: op for op in (
    matmul, input_table_forward, input_table_backward, gru_forward, gru_backward, dropout_forward, dropout_backward,
    cross_entropy_forward, cross_entropy_backward, global_norm, adam, sample, generate)}


# ---- Running one ----------------------------------------------------------------------------------------------------

def run(op: str, sizes: str = "", precision: str = "auto", variant: str | None = None, order: str = "ascending",
        trace: bool = False) -> int:
    """Run an op, print sums over its launches, or a trace, and whether the results are right.

    Args:
        op: a name of OPS.
        sizes: such as "T=3,B=2"; a size that is left out has the op's default.
        precision: of matrix products: auto, fp32, tf32 or bf16.
        variant: of the op; None for the one that the launcher chooses.
        order: of threads and blocks, one of ORDERS.
        trace: print every access and every wait, not only their sums.

    Returns:
        Exit status: 0, or 1 if a result is wrong.
    Raises: ValueError for arguments that do not fit, and without a C++ compiler.
    """
    if host_cuda.compiler() is None:
        raise ValueError("no C++ compiler: install g++, or name one in CXX")
    if op not in OPS:
        raise ValueError(f"--run: expected one of {', '.join(OPS)}, got {op!r}")
    values = _sizes(op, sizes)
    precision = "fp32" if precision == "auto" else precision
    executor = host_cuda.HostExecutor(order, record=True)
    try:
        with runtime.use(executor):
            make = Arrays(kernels.op_set(precision), np.float32)
            case = OPS[op](make, **values)
            launcher = _launcher(make.ops, op, precision, variant, values)
            before = len(executor.launches)
            launcher(*case.args)
    except host_cuda.BuildError as error:
        reason = next((line for line in str(error).splitlines() if "error" in line), error)
        raise ValueError(f"the C++ compiler fails: {reason}") from error
    for launch in executor.launches[before:]:
        print("\n".join((*words.header(launch), *(words.trace if trace else words.summary)(launch))))
    exact = Arrays(devices.op_set("cpu"), np.float64)
    expected = OPS[op](exact, **values)
    (_product if op == "matmul" else getattr(exact.ops, op))(*expected.args)
    allowed = ROUNDOFFS * ROUNDOFF[precision]
    errors = {name: _error(result, expected.results[name]) for name, result in case.results.items()}
    for name, error in errors.items():
        print(f"{name}: {'right' if error <= allowed else 'WRONG'}, largest error {error:.1e} of its largest entry")
    return int(not all(error <= allowed for error in errors.values()))


def _sizes(op: str, text: str) -> dict[str, int]:
    """Every size of an op: as the text has it, or its default."""
    _, *parameters = inspect.signature(OPS[op]).parameters.values()
    values = {parameter.name: parameter.default for parameter in parameters}
    for part in filter(None, text.split(",")):
        name, _, number = part.partition("=")
        if name not in values:
            raise ValueError(f"--sizes: {op} has the sizes {', '.join(values)}, got {part!r}")
        if not number.isdecimal() or int(number) == 0:
            raise ValueError(f"--sizes: expected a positive integer for {name}, got {number!r}")
        values[name] = int(number)
    return values


def _launcher(ops, op: str, precision: str, variant: str | None, sizes: dict[str, int]) -> Callable[..., None]:
    """The op of the kernels, with its precision and in a variant."""
    if variant == "naive":
        from char_gru.kernels import naive

        if not hasattr(naive, op) or precision != "fp32":
            raise ValueError(f"--variant: {op} has no naive variant in {precision}")
        return getattr(naive, op)
    launcher = functools.partial(matmul_launcher, precision=precision) if op == "matmul" else getattr(ops, op)
    if precision != "fp32" and not isinstance(launcher, functools.partial):
        raise ValueError(f"--precision: {op} does not compute in {precision}")
    if variant is None:
        return launcher
    gpu = runtime.current_executor().gpu
    match op:
        case "gru_forward":
            plan = forward_plan(gpu, sizes["B"], sizes["H"], precision, variant=variant)
            return functools.partial(launcher, plan=plan)
        case "gru_backward":
            plan = backward_plan(gpu, sizes["B"], sizes["H"], precision, V_in=sizes["V"], variant=variant)
            return functools.partial(launcher, plan=plan)
        case "matmul" | "generate":
            return functools.partial(launcher, variant=variant)
    raise ValueError(f"--variant: {op} has no variants")


def _product(A, B, C) -> None:
    C[...] = A @ B


def _error(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, relative to the largest entry; infinite for results that are not finite."""
    exact = exact.astype(np.float64)
    largest = np.abs(actual.astype(np.float64) - exact).max() / (np.abs(exact).max() or 1.0)
    return float(largest) if np.isfinite(largest) else np.inf
