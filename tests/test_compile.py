"""Every kernel compiles for every architecture, and takes the resources that the table says; no GPU is needed.

`python -m kernels > tests/kernel_resources.txt` renews the table.
"""

import importlib.resources
from pathlib import Path

import pytest

from char_gru.kernels.__main__ import HEADER, resource_use, row
from char_gru.kernels.modules import MODULES, PLANNED
from char_gru.kernels.runtime import ARCHITECTURES, compile_for, source

TABLE = Path(__file__).parent / "kernel_resources.txt"
ROOT = Path(__file__).parents[1]

MORE_REGISTERS = 16
"""How many more registers than the table says another version of the compiler may take."""


def table(architecture: str) -> dict[tuple[str, str, str], list[int]]:
    """(module, constants, kernel) -> registers, shared bytes, spilled bytes."""
    header, *lines = TABLE.read_text().splitlines()
    assert header == row(HEADER)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {tuple(cell[1:4]): [int(number) for number in cell[4:]] for cell in cells if cell[0] == architecture}


def test_every_kernel_file_is_registered():
    files = {path.name for path in importlib.resources.files("char_gru.kernels").iterdir() if path.name.endswith(".cu")}
    assert files == {f"{stem}.cu" for stem in (*MODULES, *PLANNED)}


@pytest.mark.parametrize("stem", ["naive", "adam", "gru"])
def test_some_kernels_take_what_the_table_says(stem):
    """A quick part of the test of all kernels."""
    expected = table("sm_90")
    for constants in MODULES[stem]:
        sizes = " ".join(f"{name}={value}" for name, value in constants.items())
        for kernel, use in compile_for(source(stem, constants), "sm_90").items():
            registers, shared_bytes, spilled = expected[stem, sizes, kernel]
            assert use.spill_stores == use.spill_loads == spilled == 0, kernel
            assert use.shared_bytes == shared_bytes and use.registers <= registers + MORE_REGISTERS, kernel


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_take_what_the_table_says_and_spill_nothing(architecture):
    expected = table(architecture)
    actual = {entry[1:4]: entry.use for entry in resource_use(architecture)}
    assert actual.keys() == expected.keys()
    for name, use in actual.items():
        registers, shared_bytes, spilled = expected[name]
        assert use.spill_stores == use.spill_loads == spilled == 0, name
        assert use.shared_bytes == shared_bytes, name
        assert use.registers <= registers + MORE_REGISTERS, name
