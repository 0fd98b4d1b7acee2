"""The table of the instructions that the checks of tests/host_ptx/checks.py execute: complete, explained, and so."""

import pytest

from char_gru.kernels import runtime
from char_gru.kernels.modules import TENSOR_CORES_FROM
from tests import host_cuda
from tests.host_ptx import coverage

pytest.importorskip("cuda.bindings")  # with it comes NVRTC
pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")

NEEDS_TENSOR_CORES = ("matmul_multistage", "generate_batched")


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
def test_table_has_every_kernel_and_every_inline_ptx(architecture):
    kernels = {(path.stem, kernel) for path in coverage.KERNELS.glob("*.cu")
               for kernel in host_cuda._kernels(path.read_text())}
    if int(architecture.removeprefix("sm_")) < TENSOR_CORES_FROM:
        kernels = {kernel for kernel in kernels if kernel[0] not in NEEDS_TENSOR_CORES}
    table = coverage.read_table()
    assert {(row.module, row.kernel) for row in table.rows if row.architecture == architecture} == kernels
    assert ([(inline.function, inline.statement) for inline in table.inline if inline.architecture == architecture]
            == list(coverage.inline_ptx(architecture).values()))


def test_table_has_nothing_below_the_bar_that_is_not_explained():
    table = coverage.read_table()
    assert coverage.wrong(table) == []
    row = table.rows[0]
    few = row._replace(executed=int(coverage.BAR * row.instructions) - 1)
    missed = coverage.Missed(*row[:4], "x.cu: a line", row.instructions - few.executed)
    [said] = coverage.wrong(coverage.Coverage([few], [missed], []))
    assert "a line" in said
    inline = next(inline for inline in table.inline if inline.executed)
    [said] = coverage.wrong(coverage.Coverage([], [], [inline._replace(executed=0)]))
    assert inline.function in said


def test_each_explanation_explains_instructions_of_the_table():
    missed = coverage.read_table().missed
    for kernel, text in coverage.EXPLAINED:
        assert any(kernel in ("", row.kernel) and text in row.line for row in missed), (kernel, text)


def test_what_other_modules_are_said_to_execute_is_missed_by_one_module_at_least_and_not_by_all():
    table = coverage.read_table()
    missed = next(missed for missed in table.missed if coverage.explanation(missed) == coverage._OTHER_MODULE)
    assert coverage._explained(missed, table)
    kernel = missed.architecture, missed.module, missed.kernel
    everywhere = [missed._replace(constants=row.constants) for row in table.rows
                  if (row.architecture, row.module, row.kernel) == kernel]
    assert not coverage._explained(missed, table._replace(missed=everywhere))


def test_rows_of_two_modules_are_as_in_the_table():
    """Another version of the compiler may make other instructions, of which as many have to run."""
    measured = coverage.measured("sm_90", "adam|norm|dropout")
    table = {row[:4]: row for row in coverage.read_table().rows}
    assert {row.module for row in measured.rows} == {"adam", "dropout"}
    for row in measured.rows:
        expected = table[row[:4]]
        assert row.executed / row.instructions == pytest.approx(expected.executed / expected.instructions, abs=0.01)
        assert row.instructions == pytest.approx(expected.instructions, rel=0.1)
