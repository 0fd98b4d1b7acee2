"""The one comparison of the tests: shape, dtype, finiteness, then error against a derived tolerance."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from char_gru.rnn.check import FACTOR, FLOOR, allowed_error

__all__ = ["FACTOR", "FLOOR", "Used", "assert_close", "assert_within", "used"]


class Used(NamedTuple):
    """The share of its tolerance that a comparison used, and what was compared."""

    share: float
    name: str


used: list[Used] = []
"""Of the comparisons of the running test that passed, in their order; tests/host_ptx/plugin.py reports the largest."""


def assert_within(name: str, error: float, allowed: float, message: str = "") -> None:
    """Assert that an error is at most what is allowed, and note the share of it that was used. `name` is the array, or
    what else is compared; `message` (default: the name) begins the message of a failure."""
    assert error <= allowed, f"{message or name}: error {error:.3g}, allowed {allowed:.3g}"
    used.append(Used(float(error / allowed) if error else 0.0, name))


def assert_close(name: str, actual, exact, reference=None, *, dtype=None) -> None:
    """Assert that `actual` is `exact` up to rounding.

    exact: the value in float64. reference: the same value by the specification in float32; its error is the measure of
    how much rounding the computation does. Without it only the floor is allowed. dtype: the dtype that `actual` must
    have (default: float64 if there is no reference, else float32).

    Raises: AssertionError that names the tensor, the worst index and both values.
    """
    actual, exact = np.asarray(actual), np.asarray(exact, np.float64)
    dtype = np.dtype(dtype or (np.float64 if reference is None else np.float32))
    assert actual.shape == exact.shape, f"{name} has shape {actual.shape}, not {exact.shape}"
    assert actual.dtype == dtype, f"{name} has dtype {actual.dtype}, not {dtype}"
    assert np.isfinite(exact).all(), f"{name}: the exact value is not finite"
    if actual.size == 0:
        return
    if not np.isfinite(actual).all():
        worst = np.unravel_index(np.argmin(np.isfinite(actual)), actual.shape)
        raise AssertionError(f"{name}{_shown(worst)} is {actual[worst]}, not {exact[worst]}")
    allowed = allowed_error(exact, reference, dtype)
    error = np.abs(actual.astype(np.float64) - exact)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert_within(name, error[worst], allowed, f"{name}{_shown(worst)} is {actual[worst]!r}, not {exact[worst]!r}")


def _shown(index: tuple) -> str:
    return f"[{', '.join(str(int(k)) for k in index)}]"
