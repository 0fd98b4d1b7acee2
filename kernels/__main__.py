"""Compiles every kernel, with no GPU, and prints what each takes: ``python -m kernels [--arch sm_80 sm_90]``."""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import tyro

from .modules import modules_for
from .runtime import ARCHITECTURES, CompileError, DeviceError, ResourceUse, compile_for, source

HEADER = ("architecture", "module", "constants", "kernel", "registers", "shared bytes", "spilled bytes")
_WIDTHS = (12, 13, 42, 21, 9, 12, 13)


class Entry(NamedTuple):
    """What one kernel, compiled with some constants, takes on one architecture."""

    architecture: str
    module: str
    constants: str
    kernel: str
    use: ResourceUse


def resource_use(architecture: str) -> Iterator[Entry]:
    """Compile everything that an architecture can run.

    Raises: DeviceError where the compiler is missing; CompileError.
    """
    for stem, constants in modules_for(architecture):
        sizes = " ".join(f"{name}={value}" for name, value in constants.items())
        for kernel, use in sorted(compile_for(source(stem, constants), architecture).items()):
            yield Entry(architecture, stem, sizes, kernel, use)


def row(cells: tuple) -> str:
    """One line of the table."""
    return " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS)).rstrip()


def main(arch: tuple[str, ...] = ARCHITECTURES) -> int:
    """Print registers, static shared memory and spills of every kernel.

    Args:
        arch: GPU architectures to compile for.

    Returns:
        Exit status: 0, 1 where a source does not compile, 2 where the compiler is missing.
    """
    try:
        for architecture in arch:
            compile_for("", architecture)  # before any output: is there a compiler, does it know the name?
        print(row(HEADER))
        for architecture in arch:
            for *what, use in resource_use(architecture):
                print(row((*what, use.registers, use.shared_bytes, use.spill_stores + use.spill_loads)))
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m kernels"))
