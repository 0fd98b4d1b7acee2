"""The least work of an op, and the least time that it takes on a device: the floor that a kernel is measured by.

An op's work follows from its sizes alone. Only matrix products count as floating-point operations (two for a
multiply-add); elementwise operations never limit an op. Every array that comes from memory or goes there counts once,
in float32; a table that is looked up counts as one pass over its rows. `launches` is the least number of kernels, and
`barriers` the number of times that all blocks inside a launch must wait for each other: once per step of a recurrence.
Such a wait takes at least as long as an exchange of words with tags, the quickest way that there is.
A device's ceilings are measured, in the same run as the op.
"""

from __future__ import annotations

from typing import NamedTuple

FLOAT, ID, MASK = 4, 4, 1
"""Bytes of an element."""


class Work(NamedTuple):
    """The least work of an op."""

    flop: int
    bytes: int
    launches: int = 1
    barriers: int = 0

    def then(self, other: Work) -> Work:
        """This op followed by another."""
        return Work(*map(sum, zip(self, other)))


class Ceilings(NamedTuple):
    """The rates and costs of a device: bytes read and written in large arrays and operations of a large product in each
    precision, per second; seconds from one empty kernel to the next, from one barrier among all blocks to the next,
    from one exchange of words with tags among all blocks to the next, and from a load from L2 to the next that needs
    it.
    """

    bytes_per_second: float
    flop_per_second: dict[str, float]
    launch_seconds: float
    barrier_seconds: float
    exchange_seconds: float = 0.0
    load_seconds: float = 0.0


def floor_seconds(work: Work, ceilings: Ceilings, precision: str) -> float:
    """The least time: memory and arithmetic overlap, launches and barriers do not."""
    streaming = max(work.bytes / ceilings.bytes_per_second, work.flop / ceilings.flop_per_second[precision])
    return streaming + work.launches * ceilings.launch_seconds + work.barriers * ceilings.exchange_seconds


def matmul(M: int, N: int, K: int) -> Work:
    """C (M, N) = A (M, K) B (K, N)."""
    return Work(2 * M * N * K, FLOAT * (M * K + K * N + M * N))


def input_table_forward(N: int, E: int, H: int) -> Work:
    """P (N, 3H) = x (N, E) W_ih^T + b_ih."""
    return _and_bytes(matmul(N, 3 * H, E), FLOAT * 3 * H)


def input_table_backward(N: int, E: int, H: int) -> Work:
    """dx and dW_ih, two products that share dP (N, 3H), and the sums of its columns."""
    flop = 2 * matmul(N, 3 * H, E).flop
    return Work(flop, FLOAT * (3 * N * H + 2 * N * E + 2 * 3 * H * E + 3 * H))


def gru_forward(T: int, B: int, V: int, H: int) -> Work:
    """W_hh and the table read once and kept; h, gates, a_n of every step written. A step waits for the one before."""
    read = FLOAT * (3 * H * H + 3 * H + 3 * V * H + B * H) + ID * T * B
    return Work(T * matmul(B, 3 * H, H).flop, read + FLOAT * 5 * T * B * H, barriers=T)


def gru_backward(T: int, B: int, V: int, H: int) -> Work:
    """dh of every step from dlogits (T, B, V) and from the step after; then dW_hh, one product over all steps, whose
    operands da and h come from memory once more."""
    flop = T * (2 * matmul(B, H, 3 * H).flop + matmul(B, H, V).flop)
    read = FLOAT * (T * B * (V + 5 * H) + V * H + 3 * H * H) + ID * T * B
    written = FLOAT * (3 * T * B * H + 3 * H * H + 3 * H + 3 * V * H + B * H)
    return Work(flop, read + written + FLOAT * 4 * T * B * H, launches=2, barriers=T)


def gru_module(T: int, B: int, I: int, H: int) -> Work:
    """Both passes of a layer whose inputs are a row for each position."""
    work, N = input_table_forward(T * B, I, H), T * B
    for op in (gru_forward(T, B, N, H), gru_backward(T, B, 0, H), input_table_backward(N, I, H)):
        work = work.then(op)
    return work


def cross_entropy_forward(T: int, B: int, V: int, H: int) -> Work:
    """Logits that never leave the chip, dlogits written; the mean loss is one sum over all blocks."""
    work = _and_bytes(matmul(T * B, V, H), FLOAT * V + ID * T * B)
    return work._replace(barriers=1)


def cross_entropy_backward(T: int, B: int, V: int, H: int) -> Work:
    """dW_out (V, H) = dlogits^T h, and the sums of the columns of dlogits."""
    return _and_bytes(matmul(V, H, T * B), FLOAT * V)


def dropout_forward(N: int) -> Work:
    """x read, mask and y written."""
    return Work(0, (2 * FLOAT + MASK) * N)


def dropout_backward(N: int) -> Work:
    """dy and mask read, dx written."""
    return Work(0, (2 * FLOAT + MASK) * N)


def global_norm(N: int) -> Work:
    """One pass over the gradients, one sum over all blocks."""
    return Work(0, FLOAT * N, barriers=1)


def adam(N: int) -> Work:
    """Parameters, gradients and two moments read, all but the gradients written."""
    return Work(0, 7 * FLOAT * N)


def sample(R: int, V: int) -> Work:
    """Logits and a uniform number a row read, a character written."""
    return Work(0, FLOAT * R * (V + 1) + ID * R)


def generate(T: int, R: int, V: int, H: int) -> Work:
    """One layer: all weights read once and kept; a character waits for the state of the one before."""
    read = FLOAT * (3 * H * H + 3 * H + 3 * V * H + V * H + V) + (FLOAT + ID) * T * R
    return Work(T * (matmul(R, 3 * H, H).flop + matmul(R, V, H).flop), read + ID * T * R, barriers=T)


def train_step(T: int, B: int, V: int, E: int, H: int) -> Work:
    """All ops of a step, one after the other."""
    N = V * E + 3 * H * (E + H + 2) + V * (H + 1)
    work = input_table_forward(V, E, H)
    for op in (gru_forward(T, B, V, H), cross_entropy_forward(T, B, V, H), cross_entropy_backward(T, B, V, H),
               gru_backward(T, B, V, H), input_table_backward(V, E, H), global_norm(N), adam(N)):
        work = work.then(op)
    return work


def _and_bytes(work: Work, more: int) -> Work:
    return work._replace(bytes=work.bytes + more)
