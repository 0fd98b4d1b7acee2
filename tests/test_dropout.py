"""Dropout on the device equals the specification, bit for bit."""

import numpy as np
import pytest

from char_gru.kernels import dropout as launchers
from char_gru.kernels import runtime
from char_gru.rnn import reference
from tests import host_cuda
from tests.helpers.variants import each_sanitizer

SHAPES = [(1, 1, 1), (3, 2, 5), (1, 17, 15), (2, 4, 32), (1, 1, 257), (5, 19, 23)]  # a warp takes 256, a block 2048


def sequence(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def forward(x_tb, rate, seed, layer, step):
    """Mask and result, arrays of the device."""
    keep_tb, y_tb, step = map(runtime.to_device, (np.zeros(x_tb.shape, bool), np.full_like(x_tb, np.nan),
                                                  np.array([step], np.uint64)))
    launchers.dropout_forward(runtime.to_device(x_tb), rate, seed, layer, step, keep_tb, y_tb)
    return keep_tb, y_tb


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate, seed, layer, step", [(0.3, 0, 0, 0), (0.5, 2**63 - 1, 1, 2**40), (0.0, 7, 0, 1),
                                                     (1 - 2**-40, 3, 2**33, 2**63 - 1)])
def test_dropout_equals_reference(executor, shape, rate, seed, layer, step):
    x_tb = sequence(shape)
    expected = reference.dropout_forward(x_tb, rate, seed, layer, step)
    actual = forward(x_tb, rate, seed, layer, step)
    for result, reference_result in zip(actual, expected):
        np.testing.assert_array_equal(runtime.to_host(result), reference_result)
    dy_tb, dx_tb = sequence(shape)[..., ::-1], runtime.to_device(np.full_like(x_tb, np.nan))
    launchers.dropout_backward(runtime.to_device(dy_tb), rate, actual[0], dx_tb)
    np.testing.assert_array_equal(runtime.to_host(dx_tb), reference.dropout_backward(dy_tb, rate, expected[0]))


def test_word_equal_to_the_threshold_is_kept(executor):
    word = int(np.random.Philox(key=[0, 0], counter=[0, 0, 0, 0]).random_raw()) % 2**32
    for rate, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        keep_tb, _ = forward(sequence((1, 1, 1)), rate, 0, 0, 0)
        assert runtime.to_host(keep_tb)[0, 0, 0] == kept


def test_dropout_backward_in_place(executor):
    keep_tb = np.random.default_rng(2).random((3, 7, 50)) < 0.5
    dy_tb = sequence(keep_tb.shape)
    device = runtime.to_device(dy_tb)
    launchers.dropout_backward(device, 0.25, runtime.to_device(keep_tb), device)
    np.testing.assert_array_equal(runtime.to_host(device), reference.dropout_backward(dy_tb, 0.25, keep_tb))


def test_dropped_nan_stays_visible(executor):
    _, y_tb = forward(np.full((1, 3, 5), np.nan, np.float32), 0.5, 0, 0, 0)
    assert np.isnan(runtime.to_host(y_tb)).all()


def test_dropout_writes_nothing_behind_its_end(executor):
    keep, y = runtime.to_device(np.full((6, 50), True)), runtime.to_device(np.full((6, 50), 7, np.float32))
    x_tb = runtime.to_device(sequence((5, 1, 50)))
    launchers.dropout_forward(x_tb, 1 - 2**-40, 0, 0, runtime.zeros((1,), np.uint64), keep[:5].reshape(5, 1, 50),
                              y[:5].reshape(5, 1, 50))
    assert not runtime.to_host(keep)[:5].any() and runtime.to_host(keep)[5].all()
    assert (runtime.to_host(y)[5] == 7).all()


def test_dropout_does_not_depend_on_the_order_of_threads():
    expected, _ = reference.dropout_forward(sequence((5, 19, 23)), 0.4, 5, 1, 9)
    for order in host_cuda.ORDERS:
        with runtime.use(host_cuda.HostExecutor(order)):
            keep_tb, _ = forward(sequence((5, 19, 23)), 0.4, 5, 1, 9)
        np.testing.assert_array_equal(keep_tb, expected)


@each_sanitizer
def test_sanitizer_finds_nothing_in_dropout(sanitizer):
    def both_directions():
        keep_tb, y_tb = forward(sequence((1, 3, 101)), 0.4, 5, 1, 9)
        launchers.dropout_backward(y_tb, 0.4, keep_tb, y_tb)

    assert host_cuda.run_sanitized(both_directions, sanitizer) == ""


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_dropout_refuses_a_rate_that_is_no_share(executor, rate):
    with pytest.raises(ValueError, match="^rate: expected a number from 0 to below 1"):
        forward(sequence((1, 2, 3)), rate, 0, 0, 0)


def test_dropout_names_the_argument_that_does_not_fit(executor):
    x_tb = runtime.to_device(sequence((1, 2, 3)))
    with pytest.raises(ValueError, match="^keep_tb: expected .* bool"):
        launchers.dropout_backward(x_tb, 0.5, runtime.zeros((1, 2, 3), np.uint8), x_tb)
