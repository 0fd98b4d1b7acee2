"""In a run of all tests: those that need a GPU pass on tests/cuda_device too, in a process of their own that has it.

A process has the device or it has not: with it, `--device auto` would train on it in every other test. plugin.py starts
that process first, so that it runs beside this one; with `-n` the test that waits for it starts it.
"""

from xml.etree import ElementTree

import pytest

from tests import cuda_device
from tests.cuda_device import faults
from tests.cuda_device.plugin import run_of

FEWEST = 700  # tests that have to pass: so that no filter leaves out all of them

needs_device = pytest.mark.skipif(not cuda_device.installable(),
                                  reason="needs Linux on x86-64, CuPy and a C++ compiler")


@needs_device
@pytest.mark.slow
def test_gpu_tests_pass_on_the_device(request, subtests):
    run = run_of(request.config)
    status = run.process.wait()
    output = (run.folder / "output.txt").read_text()
    assert status in (0, 1) and (run.folder / "results.xml").exists(), output[-5000:]
    passed = 0
    for case in ElementTree.parse(run.folder / "results.xml").iter("testcase"):
        [*problems] = (child for child in case if child.tag in ("failure", "error"))
        passed += not problems
        for problem in problems:
            with subtests.test(f"{case.get('classname')}::{case.get('name')}"):
                pytest.fail(problem.text, pytrace=False)
    assert passed >= FEWEST, output[-5000:]


@needs_device
@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "no wait for the copied data", "staging memory not kept", "capture on a blocking stream"])
def test_planted_fault_is_caught(name):
    """Some of tests/cuda_device/faults.py, which has them all."""
    assert faults.caught(faults.FAULTS[name])
