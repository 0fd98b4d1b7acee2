"""``python -m pytest --cuda-device``: the tests that need a GPU, and only they, on the device of this folder."""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest

from tests import cuda_device

FIXTURES = {"executor", "device"}
"""A test that asks for one of these runs on the device."""

WAITING = "test_gpu_tests_pass_on_the_device"


def pytest_addoption(parser):
    parser.addoption("--cuda-device", action="store_true",
                     help="run the tests of --gpu, and those of the device, on a device made of host memory")
    parser.addoption("--device-like", default="h100", metavar="GPU",
                     help="what that device is: t4, ..., 5090, or small")
    parser.addoption("--at-once", action="store_true",
                     help="the device does its work when it is queued, not as late as it may")


def pytest_configure(config):
    if config.getoption("cuda_device"):
        gpu, ptx = config.getoption("device_like"), config.getoption("ptx")
        if ptx not in (None, architecture := cuda_device.architecture_of(gpu)):
            raise pytest.UsageError(f"--ptx {ptx}: the GPU of --device-like {gpu} has PTX for {architecture}")
        config.option.gpu = True
        config.stash[DEVICE] = cuda_device.install(gpu, at_once=config.getoption("at_once"), from_ptx=bool(ptx),
                                                   worst=config.getoption("worst"))


def pytest_collection_modifyitems(config, items):
    on_device = config.getoption("cuda_device")
    wanted = FIXTURES if on_device else {"device"}
    chosen = [item for item in items if bool(wanted & set(item.fixturenames)) == on_device]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    # That one waits for a process that runs beside the other tests: of this process, or of the other workers of xdist.
    items[:] = sorted(chosen, key=lambda item: (item.name == WAITING) != _is_worker(config))


class Run(NamedTuple):
    """All tests of the device, in a process beside this one."""

    process: subprocess.Popen
    folder: pathlib.Path  # of output.txt and results.xml


def pytest_collection_finish(session):
    waits = any(item.name == WAITING for item in session.items)
    if waits and cuda_device.installable() and not (session.config.option.collectonly or _is_worker(session.config)):
        run_of(session.config)


def run_of(config) -> Run:
    """The tests of the device, started now unless they have been."""
    if RUN not in config.stash:
        folder = pathlib.Path(tempfile.mkdtemp())
        with open(folder / "output.txt", "w") as output:
            process = subprocess.Popen([sys.executable, "-m", "pytest", "--cuda-device", "-q", "-p", "no:cacheprovider",
                                        "--junitxml", folder / "results.xml"], stdout=output, stderr=subprocess.STDOUT,
                                       cwd=config.rootpath)
        config.stash[RUN] = Run(process, folder)
    return config.stash[RUN]


def _is_worker(config) -> bool:
    """Whether this process runs a share of the tests (`-n`)."""
    return hasattr(config, "workerinput")


def pytest_terminal_summary(terminalreporter, config):
    if DEVICE in config.stash and config.getoption("ptx"):
        terminalreporter.write_line(config.stash[DEVICE].summary())


def pytest_unconfigure(config):
    if run := config.stash.get(RUN, None):
        run.process.kill()
        run.process.wait()
        shutil.rmtree(run.folder)


@pytest.fixture
def device(request):
    """The device of this process; a test may disturb it, and reads the reports that it expects."""
    device = request.config.stash[DEVICE]
    yield device
    device.fail_launch("any", 0)
    device.reset()
    device.set(request.config.getoption("device_like"), at_once=request.config.getoption("at_once"))


@pytest.fixture
def device_options(request) -> tuple[str, ...]:
    """Options of ``python tests/cuda_device`` that give another process the same device."""
    switches = [f"--{name}" for name in ("ptx", "worst") if request.config.getoption(name)]
    return "--gpu", request.config.getoption("device_like"), *switches


@pytest.fixture(autouse=True)
def _no_reports(request):
    """A report that a test does not read is a failure of it."""
    yield
    device = request.config.stash.get(DEVICE, None)
    if device is not None and (reports := device.reports()):
        pytest.fail("the device reports: " + "; ".join(reports))


DEVICE = pytest.StashKey[cuda_device.Device]()
RUN = pytest.StashKey[Run]()
