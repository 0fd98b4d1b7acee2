"""The op set of the GPU: the functions of `char_gru.rnn.cpu`, each a launcher of CUDA kernels.

Importing this package imports neither CuPy nor a driver; kernels compile at their first use. An op hides the module of
the same name: `kernels.adam` is the function, and `from char_gru.kernels.adam import ...` gives the module's names.
"""

import functools
import types

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.adam import adam, global_norm
from char_gru.kernels.arrays import copy, copy_in, empty, empty_activations, peak_memory_mib, read, read_scalar, to_host
from char_gru.kernels.cross_entropy import cross_entropy_backward, cross_entropy_forward
from char_gru.kernels.dropout import dropout_backward, dropout_forward
from char_gru.kernels.generate import GenerationSaved, generate, generation_saved, sample
from char_gru.kernels.gru import GRUSaved, gru_backward, gru_forward, gru_saved
from char_gru.kernels.input_table import input_table_backward, input_table_forward
from char_gru.kernels.matmul import PRECISIONS
from char_gru.kernels.modules import TENSOR_CORES_FROM
from char_gru.kernels.runtime import replayable

_OPS = (
    empty, empty_activations, copy_in, copy, to_host, read, read_scalar, peak_memory_mib, replayable,
    input_table_forward, input_table_backward, gru_saved, gru_forward, gru_backward, dropout_forward, dropout_backward,
    cross_entropy_forward, cross_entropy_backward, global_norm, adam, sample, generation_saved, generate,
)
_BY_PRECISION = {
    input_table_forward, input_table_backward, gru_saved, gru_forward, gru_backward, cross_entropy_forward,
    cross_entropy_backward,
}

__all__ = ["GRUSaved", "GenerationSaved", "op_set"]
__all__ += [op.__name__ for op in _OPS]


def op_set(precision: str = "auto") -> types.SimpleNamespace:
    """All ops, their matrix products in one precision: fp32, tf32, bf16, or auto: tf32 where the GPU has it.

    tf32 and bf16 round the operands of products, never sums, states or parameters. Generation computes in fp32; the op
    set of bf16 rounds the weights for it, so that twice as many fit on chip.

    Raises: ValueError for a precision that is unknown or that this GPU lacks; DeviceError without a GPU.
    """
    if precision not in ("auto", *PRECISIONS):
        raise ValueError(f"precision: expected auto, {', '.join(PRECISIONS)}, got {precision!r}")
    executor = runtime.current_executor()
    on_host, has_tf32 = executor.array_type is np.ndarray, executor.gpu.capability >= TENSOR_CORES_FROM
    if precision == "auto":
        precision = "tf32" if has_tf32 and not on_host else "fp32"
    if precision != "fp32" and not has_tf32:
        raise ValueError(f"precision: {precision} needs a GPU of compute capability {TENSOR_CORES_FROM / 10} or more")
    ops = {op.__name__: functools.partial(op, precision=precision) if op in _BY_PRECISION else op for op in _OPS}
    if precision == "bf16":
        ops["generate"] = functools.partial(generate, weights="bf16")
    return types.SimpleNamespace(**ops)
