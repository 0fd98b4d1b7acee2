"""``python -m pytest --ptx sm_90``: the tests of kernels, and only they, with every launch run from its PTX.

With it, and with --gpu, the last lines say for each precision which share of its tolerance any comparison used at most.
"""

import pytest

from tests.helpers import compare
from tests.host_ptx import SCHEDULES, PtxExecutor

FIXTURES = {"executor", "ordered_executor"}
"""A test that asks for one of these runs from PTX."""


def pytest_addoption(parser):
    parser.addoption("--ptx", metavar="ARCHITECTURE", help="run kernels from the PTX that NVRTC makes for sm_75, ...")
    parser.addoption("--worst", action="store_true",
                     help="with --ptx: approximate instructions and sums in mma err as much as hardware may")
    parser.addoption("--schedule", choices=SCHEDULES, default="",
                     help="with --ptx: global memory is as late and as stale as may be; which block goes on")


def pytest_configure(config):
    for name in ("worst", "schedule"):
        if config.getoption(name) and not config.getoption("ptx"):
            raise pytest.UsageError(f"--{name} needs --ptx ARCHITECTURE")
    if config.getoption("schedule") and config.getoption("cuda_device"):
        raise pytest.UsageError("--schedule: memory is not weak under --cuda-device")


def pytest_collection_modifyitems(config, items):
    if config.getoption("ptx") and not config.getoption("cuda_device"):  # which chooses its own
        chosen = [item for item in items if FIXTURES & set(item.fixturenames)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    compare.used.clear()
    try:
        return (yield)
    finally:
        if compare.used:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            precision = given.get("precision", given.get("weights", "fp32"))
            tolerances = item.config.stash.setdefault(TOLERANCES, {})
            tolerances.setdefault(precision, []).append((max(compare.used), item.nodeid))


def executor_of(config: pytest.Config, order: str = "ascending") -> PtxExecutor | None:
    """The executor that the command line asks for; None without --ptx."""
    architecture = config.getoption("ptx")
    if not architecture:
        return None
    executor = PtxExecutor(architecture, worst=config.getoption("worst"), order=order,
                           schedule=config.getoption("schedule"))
    config.stash.setdefault(EXECUTORS, []).append(executor)
    return executor


def pytest_terminal_summary(terminalreporter, config):
    executors = config.stash.get(EXECUTORS, [])
    if executors:
        kernels = sorted({kernel for executor in executors for kernel in executor.from_source})
        launches = sum(len(executor.launches) for executor in executors)
        terminalreporter.write_line(f"{launches:,} launches from PTX for {config.getoption('ptx')}"
                                    + f"; NVRTC refuses the sources of {', '.join(kernels)}" * bool(kernels))
    if executors or config.getoption("gpu"):
        for precision, tests in sorted(config.stash.get(TOLERANCES, {}).items()):
            (share, name), test = max(tests)
            terminalreporter.write_line(f"tolerances used at most in {precision}: {share:.0%} ({name}, {test}), "
                                        f"the largest of {len(tests):,}")


EXECUTORS = pytest.StashKey[list[PtxExecutor]]()

TOLERANCES = pytest.StashKey[dict[str, list[tuple[compare.Used, str]]]]()
"""Precision -> of each test, its comparison that used the largest share of its tolerance, and the test's name."""
