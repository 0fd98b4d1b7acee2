"""A part of the faults of tests/host_ptx/faults.py, which runs all of them: from PTX, each is as the table says."""

from pathlib import Path

import pytest

from tests import host_cuda
from tests.host_ptx import faults
from tests.host_ptx.coverage import inline_ptx

pytest.importorskip("cuda.bindings")  # with it comes NVRTC
pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pack_bf16: halves exchanged in both operands", "__ldg: products of the other gates",
                                  "poll: for one more", "cp.async 16: never zeros"])
def test_fault_is_as_the_table_says(name):
    said, otherwise = faults.wrong_entry(name)
    assert not otherwise, said


def test_readme_tells_how_many_faults_there_are():
    assert f"Of {len(faults.FAULTS)} faults planted" in (Path(__file__).parents[1] / "README.md").read_text()


def test_every_inline_ptx_has_a_fault_and_every_fault_its_place():
    for fault in faults.FAULTS.values():
        faults.planted("", fault)  # raises where the place or the text is gone
    places = [fault.place for fault in faults.FAULTS.values()]
    for function, _ in inline_ptx("sm_90").values():
        assert any(f" {function}(" in place for place in places), function
