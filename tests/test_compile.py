"""Every kernel compiles for every architecture, and takes what the table says; no GPU is needed.

`python -m kernels > tests/kernel_resources.txt` writes the table anew.
"""

import importlib.resources
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.__main__ import HEADER, resource_use, row
from kernels.modules import MODULES, PLANNED
from kernels.runtime import ARCHITECTURES

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
    files = {path.name for path in importlib.resources.files("kernels").iterdir() if path.name.endswith(".cu")}
    assert files == {f"{stem}.cu" for stem in (*MODULES, *PLANNED)}


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


def test_installed_wheel_brings_its_sources(tmp_path):
    """Built, installed elsewhere, and compiled from there."""
    checkout, wheels, home = (tmp_path / name for name in ("checkout", "wheels", "home"))
    for package in ("rnn", "kernels"):
        shutil.copytree(ROOT / package, checkout / package)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, checkout)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, checkout], check=True)
    [wheel] = wheels.iterdir()
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", home, wheel], check=True)
    program = ("import sys, kernels.__main__ as m; assert sys.argv[1] in m.__file__, m.__file__; "
               "sys.exit(m.main(arch=('sm_90',)))")
    done = subprocess.run([sys.executable, "-c", program, str(home)], cwd=tmp_path, check=True, text=True,
                          capture_output=True, env={"PYTHONPATH": str(home)})
    assert {line.split("|")[1].strip() for line in done.stdout.splitlines()[1:]} == {*MODULES, *PLANNED}
