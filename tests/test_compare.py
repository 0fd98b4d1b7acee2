"""The comparison catches the faults that comparisons are known to let pass."""

import numpy as np
import pytest

from tests.helpers import compare
from tests.helpers.compare import assert_close

T, B, H = 3, 2, 5


def states() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((T, B, H))


def gates_swapped(x: np.ndarray) -> np.ndarray:
    return np.roll(x, 1, axis=-1)


FAULTS = {
    "a NaN": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x),
    "an infinity": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, np.inf, x),
    "all zeros": np.zeros_like,
    "the sign flipped": np.negative,
    "one sign flipped": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 7, -x, x),
    "axes swapped": lambda x: x.transpose(1, 0, 2),
    "axes swapped behind the same shape": lambda x: x.transpose(2, 1, 0).reshape(x.shape),
    "gates swapped": gates_swapped,
    "shifted by a step": lambda x: np.roll(x, 1, axis=0),
    "a mean for a sum": lambda x: x / T,
    "an axis too many": lambda x: x[None],
    "another dtype": lambda x: x.astype(np.float16),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_comparison_catches(fault):
    exact = states()
    reference = exact.astype(np.float32)
    with pytest.raises(AssertionError, match="states"):
        assert_close("states", FAULTS[fault](exact.astype(np.float32)), exact, reference)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_comparison_accepts_rounding_and_no_more(scale):
    exact = states() * scale
    reference = exact.astype(np.float32)
    assert_close("states", reference, exact, reference)
    with pytest.raises(AssertionError):
        assert_close("states", reference * np.float32(1 + 1e-5), exact, reference)


def test_comparison_refuses_expected_values_that_are_not_finite():
    with pytest.raises(AssertionError, match="not finite"):
        assert_close("states", np.array([np.nan]), np.array([np.nan]))


def test_comparison_names_the_worst_element():
    exact = states()
    actual = exact.copy()
    actual[2, 1, 3] += 0.5
    with pytest.raises(AssertionError, match=r"states\[2, 1, 3\] is .* error 0.5"):
        assert_close("states", actual, exact)


def test_share_of_the_tolerance_that_a_comparison_used_is_noted():
    """Without a reference, four epsilons of the largest entry are allowed; a comparison that fails is not noted."""
    exact = np.array([1.0, -8.0, 0.0])
    compare.used.clear()
    assert_close("states", exact + np.array([0.0, 0.0, 8 * np.finfo(float).eps]), exact)
    assert_close("states", exact, exact)
    compare.assert_within("loss", 0, 0)
    with pytest.raises(AssertionError):
        assert_close("states", exact + np.array([0.0, 0.0, 40 * np.finfo(float).eps]), exact)
    assert compare.used == [(0.25, "states"), (0.0, "states"), (0.0, "loss")]
