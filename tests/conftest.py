"""Settings of all tests, and the executors that run the kernels in them."""

import os

import pytest
from hypothesis import settings

from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS
from char_gru.kernels.plan.gpus import precisions
from tests import host_cuda

pytest_plugins = ["tests.cuda_device.plugin", "tests.host_ptx.plugin"]

settings.register_profile("char-gru", deadline=None)  # a slow machine is no failure
settings.load_profile("char-gru")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the kernels on the GPU, not on the CPU")


def pytest_configure(config):
    """With `-n`: files go to the workers in their order, the one that waits for another process first, and not by the
    number of their tests; each worker multiplies in one thread, since waiting threads of BLAS take the cores of other
    workers; and a process that a test starts, which may run tests of its own, is not told that it is a worker."""
    config.option.loadscopereorder = False
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the workers, which start after this
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def _session_executor(request):
    if request.config.getoption("--gpu"):
        return runtime.CupyExecutor()
    _require_compiler()
    return _cpu_executor(request.config)


@pytest.fixture
def executor(_session_executor, request):
    """Runs the launches of a test: the CPU, or with --gpu the GPU; that GPU may lack the test's precision or compute
    capability, which skips the test."""
    _skip_unless_possible(_session_executor.gpu, request)
    with runtime.use(_session_executor) as executor:
        yield executor


def _skip_unless_possible(gpu, request):
    precision = request.node.callspec.params.get("precision") if hasattr(request.node, "callspec") else None
    if precision in set(PRECISIONS) - set(precisions(gpu)):
        pytest.skip(f"{gpu.name} does not compute in {precision}")
    needed = request.node.get_closest_marker("capability")
    if needed and gpu.capability < needed.args[0]:
        pytest.skip(f"{gpu.name} has compute capability {gpu.capability / 10}; this needs {needed.args[0] / 10}")


@pytest.fixture(params=host_cuda.ORDERS)
def ordered_executor(request):
    """Runs the launches of a test on the CPU, its threads in one order after the other: all have to give equal bits."""
    _require_compiler()
    executor = _cpu_executor(request.config, request.param)
    _skip_unless_possible(executor.gpu, request)
    with runtime.use(executor):
        yield executor


@pytest.fixture
def plant(monkeypatch):
    """Kernels run on the CPU, and `plant(old, new)` changes the one place of their sources that has a text."""
    planted = {}

    def planting(old: str, new: str) -> None:
        def changed(stem, constants):
            text = source(stem, constants)
            assert text.count(old) <= 1, f"{text.count(old)} times in {stem}.cu: {old}"
            planted[old] |= old in text
            return text.replace(old, new)

        source = runtime.source
        planted[old] = False
        monkeypatch.setattr(runtime, "source", changed)

    _require_compiler()
    with runtime.use(host_cuda.HostExecutor()):
        yield planting
    assert all(planted.values()), f"no source that was compiled has all of {list(planted)}"


def _cpu_executor(config, order="ascending"):
    """Runs kernels from their source, or with --ptx from their PTX."""
    return config.pluginmanager.get_plugin("tests.host_ptx.plugin").executor_of(config, order) or (
        host_cuda.HostExecutor(order=order))


def _require_compiler():
    if host_cuda.compiler() is None:
        pytest.skip("the kernels run on the CPU only where there is a C++ compiler")
