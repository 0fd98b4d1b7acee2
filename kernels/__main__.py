"""Compiles every kernel, with no GPU, and prints what each takes: ``python -m kernels [--arch sm_80 sm_90]``."""

import sys

import tyro

from .modules import MODULES
from .runtime import ARCHITECTURES, CompileError, DeviceError, compile_for, source


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
        print(f"{'module':16} {'constants':32} {'kernel':32} {'arch':7} {'registers':>9} {'shared B':>8} {'spilled B':>9}")
        for stem, variants in MODULES.items():
            for constants in variants:
                sizes = " ".join(f"{name}={value}" for name, value in constants.items())
                for architecture in arch:
                    for kernel, use in sorted(compile_for(source(stem, constants), architecture).items()):
                        print(f"{stem:16} {sizes:32} {kernel:32} {architecture:7} {use.registers:9} {use.shared_bytes:8} "
                              f"{use.spill_stores + use.spill_loads:9}")
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m kernels"))
