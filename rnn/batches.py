"""Training text as batches: shuffled windows (the tutorial's way) or contiguous streams.

The order of the windows is a pure function of (seed, epoch), so a run resumes inside an epoch, on any device, from two
numbers: the epoch and the index of its next batch.
"""

from __future__ import annotations

import numbers
from typing import NamedTuple

import numpy as np

from char_gru.rnn.config import UserError, check_seed


class Batch(NamedTuple):
    """One batch, time-major.

    Shapes: inputs_tb (T, B), ids; targets_tb (T, B), the id that follows each input; dtype that of the text's ids.
    """

    inputs_tb: np.ndarray
    targets_tb: np.ndarray


class ShuffledWindows:
    """Non-overlapping windows of T + 1 characters, shuffled anew in each epoch; every batch starts from a zero state.

    Dropped are the characters after the last whole window and, in each epoch, the windows after the last whole batch.

    Shapes: ids (N,), any integer dtype.
    Raises: UserError for a text shorter than one batch; ValueError for other arguments.
    """

    def __init__(self, ids: np.ndarray, B: int, T: int, seed: int) -> None:
        ids = _checked(ids, B, T)
        check_seed(seed, 63)
        _check_length(ids, B * (T + 1), B, T)
        windows = len(ids) // (T + 1)
        self._windows = ids[:windows * (T + 1)].reshape(windows, T + 1)
        self._B, self._seed = B, seed
        self.batches_per_epoch = windows // B
        self._epoch, self._order = -1, np.empty(0, np.intp)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of epoch `epoch`, both counted from 0. Raises: ValueError for an index past the last batch."""
        _check_place(epoch, index, self.batches_per_epoch)
        if epoch != self._epoch:
            keys = np.random.Philox(key=[self._seed, 1 + epoch]).random_raw(len(self._windows))
            self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
        windows = self._windows[self._order[index * self._B:(index + 1) * self._B]].T
        return Batch(windows[:-1], windows[1:])


class ContiguousStreams:
    """B equal streams: row b of a batch continues row b of the batch before it, so the state is carried on, too.

    Shapes: ids (N,), any integer dtype.
    Raises: UserError for a text shorter than one batch; ValueError for other arguments.
    """

    def __init__(self, ids: np.ndarray, B: int, T: int) -> None:
        ids = _checked(ids, B, T)
        _check_length(ids, B * T + 1, B, T)
        self.batches_per_epoch = (len(ids) - 1) // (B * T)
        length = self.batches_per_epoch * T
        self._inputs_bl = ids[:B * length].reshape(B, length)
        self._targets_bl = ids[1:B * length + 1].reshape(B, length)
        self._T = T

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index`, counted from 0, which is the same in every epoch. Raises: as in `ShuffledWindows`."""
        _check_place(epoch, index, self.batches_per_epoch)
        window = slice(index * self._T, (index + 1) * self._T)
        return Batch(self._inputs_bl[:, window].T, self._targets_bl[:, window].T)


def validation_windows(ids: np.ndarray, B: int, T: int) -> list[Batch]:
    """Validation text as B rows, each read from its start to its end in windows of T; the last window may be
    shorter.

    With n ids and L = (n - 1) // B, inputs are ids[:B*L] and targets ids[1:B*L+1], cut into B rows of L.

    Raises: UserError for fewer than B + 1 ids.
    """
    length = (len(ids) - 1) // B
    if length < 1:
        raise UserError(f"the validation text has {len(ids):,} characters, too few for {B} rows; "
                        "give more text, a larger --val-fraction, a smaller --batch-size, or --val-fraction 0")
    inputs_bl = ids[:B * length].reshape(B, length)
    targets_bl = ids[1:B * length + 1].reshape(B, length)
    return [Batch(inputs_bl[:, start:start + T].T, targets_bl[:, start:start + T].T)
            for start in range(0, length, T)]


def sizes_that_fit(N: int, B: int, T: int, val_fraction: float) -> str:
    """Options, none larger than B, T and val_fraction, with which a text of N characters makes a few batches."""
    validation = int(N * val_fraction)
    if 0 < val_fraction and validation < 2:
        validation = val_fraction = 0
    if validation:
        B = min(B, validation - 1)
    while B * (T + 1) > (N - validation) // 4 and B * T > 1:
        B, T = (B, T // 2) if T > 4 * B or B == 1 else (B // 2, T)
    if N - validation < B * (T + 1):
        return "no sizes fit so short a text"
    return (f"--batch-size {B} --seq-length {T}" + ("" if val_fraction else " --val-fraction 0")) + " would fit"


def _checked(ids, B: int, T: int) -> np.ndarray:
    """Ids as a NumPy array. Raises: ValueError that names the argument, for others than the classes above take."""
    for name, size in (("B", B), ("T", T)):
        if not isinstance(size, numbers.Integral) or size < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r:.50}")
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"ids: expected integers of shape (N,), got {ids.dtype} of shape {ids.shape}")
    return ids


def _check_place(epoch: int, index: int, batches_per_epoch: int) -> None:
    if not isinstance(epoch, numbers.Integral) or epoch < 0:
        raise ValueError(f"epoch: expected a whole number of at least 0, got {epoch!r:.50}")
    if not isinstance(index, numbers.Integral) or not 0 <= index < batches_per_epoch:
        raise ValueError(f"index: expected 0 to {batches_per_epoch - 1}, one of the {batches_per_epoch:,} batches of "
                         f"an epoch, got {index!r:.50}")


def _check_length(ids: np.ndarray, needed: int, B: int, T: int) -> None:
    if len(ids) < needed:
        raise UserError(f"the training text has {len(ids):,} characters, but one batch takes {needed:,} "
                        f"(--batch-size {B}, --seq-length {T}); give more text or lower one of them")
