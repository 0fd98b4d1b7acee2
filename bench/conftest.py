"""What all benchmarks share: `python -m pytest bench/` runs them, prints their tables and records their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import report, timing

RECORDED_ROUNDS = 5
"""Fewer rounds than these are for trying something out: their results are printed and not recorded."""

_TABLES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=9,
                     help=f"rounds of each benchmark; fewer than {RECORDED_ROUNDS} are printed and not recorded")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[_TABLES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for table in config.stash[_TABLES]:
        terminalreporter.write_line("\n" + table)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> int:
    """How often each candidate is timed."""
    return pytestconfig.getoption("rounds")


@pytest.fixture
def publish(pytestconfig: pytest.Config, rounds: int, tmp_path: Path) -> Callable[[str, dict, dict], None]:
    """A function of (name, sizes, results) that records the results of a benchmark and prints its table."""
    def publish(name: str, sizes: dict, results: dict) -> None:
        folder = timing.RESULTS if rounds >= RECORDED_ROUNDS else tmp_path
        entry = timing.record(name, sizes, results, folder)
        pytestconfig.stash[_TABLES].append(report.BENCHMARKS[name](entry))

    return publish
