"""Settings of all tests, and the executors that run the kernels in them."""

import pytest
from hypothesis import settings

from char_gru.kernels import runtime
from tests import host_cuda

settings.register_profile("char-gru", deadline=None)  # a slow machine is no failure
settings.load_profile("char-gru")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the kernels on the GPU, not on the CPU")


@pytest.fixture(scope="session")
def _session_executor(request):
    if request.config.getoption("--gpu"):
        return runtime.CupyExecutor()
    _require_compiler()
    return host_cuda.HostExecutor()


@pytest.fixture
def executor(_session_executor):
    """Runs the launches of a test: the CPU, or with --gpu the GPU."""
    with runtime.use(_session_executor) as executor:
        yield executor


@pytest.fixture(params=host_cuda.ORDERS)
def ordered_executor(request):
    """Runs the launches of a test on the CPU, its threads in one order after the other: all have to give equal bits."""
    _require_compiler()
    with runtime.use(host_cuda.HostExecutor(order=request.param)) as executor:
        yield executor


def _require_compiler():
    if host_cuda.compiler() is None:
        pytest.skip("the kernels run on the CPU only where there is a C++ compiler")
