"""What the tests of many ops run over: the naive twin beside the fast kernels, precisions, sanitizers."""

from __future__ import annotations

from types import ModuleType

import pytest

from char_gru.kernels import naive
from char_gru.kernels.matmul import PRECISIONS

each_sanitizer = pytest.mark.parametrize(
    "sanitizer", ["address,undefined", pytest.param("thread", marks=pytest.mark.slow)])
"""Runs a test under each sanitizer, as its argument `sanitizer`."""


def each_variant(launchers: ModuleType) -> pytest.MarkDecorator:
    """Runs a test with two modules of launchers, the fast one and naive.py, as its argument `ops`."""
    return pytest.mark.parametrize("ops", [launchers, naive], ids=["fast", "naive"])


def each_variant_and_precision(launchers: ModuleType) -> pytest.MarkDecorator:
    """As `each_variant`, in each precision that the module has, as the test's argument `precision`."""
    cases = [(launchers, precision) for precision in PRECISIONS]
    return pytest.mark.parametrize("ops, precision", [*cases, (naive, "fp32")],
                                   ids=[*(f"fast-{precision}" for precision in PRECISIONS), "naive-fp32"])
