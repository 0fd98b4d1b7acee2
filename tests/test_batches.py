"""Shuffled windows, contiguous streams and validation windows hold exactly what the model's description says.

The ids are positions in the text (0, 1, 2, ...), so a batch shows where each of its characters comes from.
"""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from char_gru.rnn.batches import ContiguousStreams, ShuffledWindows, validation_windows
from char_gru.rnn.config import UserError

SIZES = {"B": st.integers(1, 5), "T": st.integers(1, 7), "extra": st.integers(0, 100)}
SEEDS, EPOCHS = st.integers(0, 2**63 - 1), st.integers(0, 1000)


def positions(count: int) -> np.ndarray:
    return np.arange(count)


def batches_of(source, epoch: int) -> list:
    return [source.batch(epoch, index) for index in range(source.batches_per_epoch)]


@given(**SIZES, seed=SEEDS, epoch=EPOCHS)
def test_every_window_occurs_at_most_once_per_epoch(B, T, extra, seed, epoch):
    ids = positions(B * (T + 1) + extra)
    windows = ShuffledWindows(ids, B, T, seed)
    assert windows.batches_per_epoch == len(ids) // (T + 1) // B
    starts = []
    for inputs_tb, targets_tb in batches_of(windows, epoch):
        assert inputs_tb.shape == targets_tb.shape == (T, B)
        assert (inputs_tb == inputs_tb[0] + positions(T)[:, None]).all()
        assert (targets_tb == inputs_tb + 1).all()
        starts.extend(inputs_tb[0].tolist())
    assert len(set(starts)) == len(starts) == windows.batches_per_epoch * B
    assert all(start % (T + 1) == 0 and 0 <= start <= len(ids) - (T + 1) for start in starts)


@pytest.mark.parametrize(("arguments", "part"), [
    ({"B": 0}, "B: expected a whole number of at least 1, got 0"), ({"T": 0}, "T: expected"),
    ({"T": 2.5}, "T: expected"),
    ({"ids": np.zeros(99)}, "ids: expected integers of shape .*float64"), ({"ids": "text"}, "ids: expected"),
    ({"ids": np.zeros((9, 9), int)}, "ids: expected")])
def test_other_arguments_are_refused_with_their_name(arguments, part):
    for make in (functools.partial(ShuffledWindows, seed=0), ContiguousStreams):
        with pytest.raises(ValueError, match=f"^{part}"):
            make(**{"ids": positions(99), "B": 2, "T": 3} | arguments)


def test_list_of_ids_is_taken():
    for make in (functools.partial(ShuffledWindows, seed=0), ContiguousStreams):
        taken, expected = (make(ids, B=2, T=3) for ids in (list(range(99)), positions(99)))
        np.testing.assert_array_equal(taken.batch(0, 1), expected.batch(0, 1))


def test_batch_that_an_epoch_does_not_have_is_refused():
    for source in (ShuffledWindows(positions(99), 2, 3, seed=0), ContiguousStreams(positions(99), 2, 3)):
        for index in (-1, source.batches_per_epoch, 10**6, 1.0):
            with pytest.raises(ValueError, match=f"index: expected 0 to {source.batches_per_epoch - 1}, .*got {index}"):
                source.batch(0, index)
        with pytest.raises(ValueError, match="epoch: expected"):
            source.batch(-1, 0)


@given(**SIZES, seed=SEEDS, epoch=EPOCHS, other=EPOCHS)
def test_order_is_a_function_of_seed_and_epoch_alone(B, T, extra, seed, epoch, other):
    ids = positions(B * (T + 1) + extra)
    fresh, used = (ShuffledWindows(ids, B, T, seed) for _ in range(2))
    used.batch(other, 0)
    for index in reversed(range(fresh.batches_per_epoch)):
        assert (used.batch(epoch, index).inputs_tb == fresh.batch(epoch, index).inputs_tb).all()
        used.batch(other, index)


def order(seed: int, epoch: int, windows: int = 12) -> list[int]:
    source = ShuffledWindows(positions(2 * windows), B=1, T=1, seed=seed)
    return [int(batch.inputs_tb[0, 0]) // 2 for batch in batches_of(source, epoch)]


def test_order_differs_between_epochs_and_seeds():
    orders = [tuple(order(seed, epoch, windows=50)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize(("seed", "epoch", "expected"), [
    (0, 0, [5, 3, 7, 8, 11, 2, 4, 1, 10, 0, 6, 9]),
    (7, 3, [1, 11, 7, 6, 10, 5, 0, 4, 3, 9, 8, 2]),
])
def test_order_stays_what_it_was_in_earlier_versions(seed, epoch, expected):
    assert order(seed, epoch) == expected


@pytest.mark.parametrize(("characters", "batches"),
                         [(11_043 * 101, 172), (172 * 64 * 101, 172), (172 * 64 * 101 - 1, 171)])
def test_incomplete_batch_is_dropped(characters, batches):
    assert ShuffledWindows(np.zeros(characters, np.uint8), B=64, T=100, seed=0).batches_per_epoch == batches


@given(**SIZES, epoch=EPOCHS)
def test_streams_continue_from_batch_to_batch(B, T, extra, epoch):
    ids = positions(B * T + 1 + extra)
    streams = ContiguousStreams(ids, B, T)
    batches = batches_of(streams, epoch)
    inputs_lb = np.concatenate([batch.inputs_tb for batch in batches])
    targets_lb = np.concatenate([batch.targets_tb for batch in batches])
    assert all(batch.inputs_tb.shape == batch.targets_tb.shape == (T, B) for batch in batches)
    assert inputs_lb.T.ravel().tolist() == list(range(B * T * len(batches)))
    assert (targets_lb == inputs_lb + 1).all()
    assert 0 <= len(ids) - 1 - B * T * len(batches) < B * T


@given(B=SIZES["B"], T=SIZES["T"], extra=SIZES["extra"])
def test_validation_reads_every_row_from_its_start_to_its_end(B, T, extra):
    ids = positions(B + 1 + extra)
    L = (len(ids) - 1) // B
    windows = validation_windows(ids, B, T)
    assert (np.concatenate([window.inputs_tb for window in windows]) == ids[:B * L].reshape(B, L).T).all()
    assert (np.concatenate([window.targets_tb for window in windows]) == ids[1:B * L + 1].reshape(B, L).T).all()
    lengths = [len(window.inputs_tb) for window in windows]
    assert lengths[:-1] == [T] * (len(windows) - 1) and 1 <= lengths[-1] <= T


@pytest.mark.parametrize(("make", "needed"), [
    (lambda ids: ShuffledWindows(ids, 4, 300, 0), 1204), (lambda ids: ContiguousStreams(ids, 4, 300), 1201)])
def test_text_shorter_than_one_batch_is_refused_with_the_numbers(make, needed):
    assert make(positions(needed)).batches_per_epoch == 1
    with pytest.raises(UserError) as caught:
        make(positions(needed - 1))
    message = str(caught.value)
    assert all(number in message for number in (f"{needed - 1:,}", f"{needed:,}", "--batch-size 4", "--seq-length 300"))


def test_validation_text_shorter_than_its_rows_is_refused_with_the_numbers():
    assert len(validation_windows(positions(6), 5, 3)) == 1
    with pytest.raises(UserError) as caught:
        validation_windows(positions(5), 5, 3)
    assert "5 characters" in str(caught.value) and "5 rows" in str(caught.value)
    with pytest.raises(UserError, match="0 characters"):
        validation_windows(positions(0), 5, 3)
