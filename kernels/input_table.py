"""Launchers of the input table, of its gradients, and of input_table.cu, which sums di by id: dP."""

import numpy as np

from char_gru.kernels import runtime
from char_gru.kernels.matmul import column_sums, matmul
from char_gru.kernels.sizes import ceil_div, round_up

RADIX = 256  # of input_table.cu: values of a digit, positions of a chunk, threads of a block
COLUMNS = 128  # of input_table.cu: columns of dP that a block of sum_by_id owns
WARP, MAX_WARPS = 32, 32


def input_table_forward(x, W_ih, b_ih, P, *, precision="fp32") -> None:
    """Input products of a layer, one row for each distinct input.

    Shapes: x (N, E); W_ih (3H, E); b_ih (3H,); result P (N, 3H); all float32.
    Raises: ValueError.
    Equals: x @ W_ih.T + b_ih
    """
    check_input_table_forward(x, W_ih, b_ih, P)
    matmul(x, W_ih, P, transpose_b=True, bias=b_ih, precision=precision)


def input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih, *, precision="fp32") -> None:
    """Gradients of `input_table_forward`.

    Shapes: dP (N, 3H); x (N, E); W_ih (3H, E); results dx (N, E), dW_ih (3H, E), db_ih (3H,); all float32.
    Raises: ValueError.
    Equals: dP @ W_ih, dP.T @ x, dP.sum(axis=0)
    """
    check_input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih)
    matmul(dP, W_ih, dx, precision=precision)
    matmul(dP, x, dW_ih, transpose_a=True, precision=precision)
    column_sums(dP, db_ih)


def sum_by_id_scratch_size(N: int) -> int:
    """Integers that `sum_by_id` needs for N positions: two buffers of ids and positions, and the counts of digits."""
    return 4 * N + round_up(N, RADIX)


def sum_by_id(da_tb, di_n_tb, ids_tb, dP, scratch) -> None:
    """For each id, the sum of di over its positions; 0 for an id that does not occur.

    di and da, the gradients of the input and of the recurrent products, are equal in the columns of r and z.

    Shapes: da_tb (T, B, 3H), its last H columns are not read; di_n_tb (T, B, H); ids_tb (T, B) int32, in [0, V);
    result dP (V, 3H); scratch (sum_by_id_scratch_size(T*B),) int32, overwritten. Floating arrays are float32.
    Raises: ValueError.
    Equals: np.add.at(dP, ids_tb, np.concatenate([da_tb[:, :, :2 * H], di_n_tb], axis=2)), from dP = 0
    """
    check_sum_by_id(da_tb, di_n_tb, ids_tb, dP)
    H, V, N = di_n_tb.shape[2], len(dP), ids_tb.size
    runtime.check("scratch", scratch, np.int32, (sum_by_id_scratch_size(N),))
    buffers, counts = scratch[:4 * N].reshape(2, 2, N), scratch[4 * N:]
    chunks = ceil_div(N, RADIX)
    ids = positions = ids_tb  # the first pass does not read positions
    for digit in range(_digits(V)):
        shift = np.int32(8 * digit)
        sorted_ids, sorted_positions = buffers[digit % 2]
        _launch("count_digits", chunks, [counts, ids, np.int32(N), shift])
        _launch("scan_digits", 1, [counts, np.int32(chunks)])
        _launch("place_by_digit", chunks, [sorted_ids, sorted_positions, ids, positions, counts, np.int32(N), shift])
        ids, positions = sorted_ids, sorted_positions
    # Warps for two positions each of an average character: the commonest characters of a text have many times as many.
    warps = min(max(N // (2 * V), 1), MAX_WARPS)
    runtime.launch("input_table", "sum_by_id", (V, ceil_div(3 * H, COLUMNS)), warps * WARP,
                   [dP, da_tb, di_n_tb, ids, positions, np.int32(N), np.int32(H)], constants={},
                   shared_bytes=warps * COLUMNS * 4)


def check_input_table_forward(x, W_ih, b_ih, P) -> None:
    """Check the arrays of `input_table_forward`. Raises: ValueError."""
    N, E = x.shape
    runtime.check("x", x, np.float32, (N, E))
    runtime.check("W_ih", W_ih, np.float32, (len(W_ih), E))
    runtime.check("b_ih", b_ih, np.float32, (len(W_ih),))
    runtime.check("P", P, np.float32, (N, len(W_ih)))


def check_input_table_backward(dP, x, W_ih, dx, dW_ih, db_ih) -> None:
    """Check the arrays of `input_table_backward`. Raises: ValueError."""
    N, E = x.shape
    runtime.check("x", x, np.float32, (N, E))
    runtime.check("W_ih", W_ih, np.float32, (len(W_ih), E))
    runtime.check("dP", dP, np.float32, (N, len(W_ih)))
    runtime.check("dx", dx, np.float32, (N, E))
    runtime.check("dW_ih", dW_ih, np.float32, (len(W_ih), E))
    runtime.check("db_ih", db_ih, np.float32, (len(W_ih),))


def check_sum_by_id(da_tb, di_n_tb, ids_tb, dP) -> None:
    """Check the arrays of `sum_by_id`, except scratch. Raises: ValueError."""
    (T, B, H), V = di_n_tb.shape, len(dP)
    runtime.check("da_tb", da_tb, np.float32, (T, B, 3 * H))
    runtime.check("di_n_tb", di_n_tb, np.float32, (T, B, H))
    runtime.check("ids_tb", ids_tb, np.int32, (T, B))
    runtime.check("dP", dP, np.float32, (V, 3 * H))


def _digits(V: int) -> int:
    """How many digits of 8 bits an id below V has, at least 1."""
    return max(ceil_div((V - 1).bit_length(), 8), 1)


def _launch(kernel: str, blocks: int, args: list) -> None:
    runtime.launch("input_table", kernel, blocks, RADIX, args, constants={})
