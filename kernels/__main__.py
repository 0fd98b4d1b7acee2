"""What can be said of the kernels with no GPU: compiles every one and prints what it takes, ``python -m kernels [--arch
sm_80 sm_90]``; or prints how recurrence and generation would run, ``python -m kernels --plan --device-like h100``.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from char_gru.kernels.modules import modules_for
from char_gru.kernels.plan.generation import GenerationPlan, generation_plan
from char_gru.kernels.plan.gpus import GPU, GPUS, precisions
from char_gru.kernels.plan.recurrence import PACK, RecurrencePlan, backward_plan, forward_plan
from char_gru.kernels.runtime import (
    ARCHITECTURES,
    CompileError,
    DeviceError,
    ResourceUse,
    compile_for,
    current_executor,
    source,
)

HEADER = ("architecture", "module", "constants", "kernel", "registers", "shared bytes", "spilled bytes")
_CUT = RecurrencePlan._fields[RecurrencePlan._fields.index("groups"):] + ("registers", "shared_bytes")
_GENERATION_CUT = GenerationPlan._fields[GenerationPlan._fields.index("groups"):]
_WIDTHS = (12, 23, 75, 23, 9, 12, 13)


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
    modules = list(modules_for(architecture))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiler takes seconds for some, without Python's lock
        uses = threads.map(lambda module: compile_for(source(*module), architecture), modules)
        for (stem, constants), kernels in zip(modules, uses):
            sizes = " ".join(f"{name}={value}" for name, value in constants.items())
            for kernel, use in sorted(kernels.items()):
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


def plan_lines(gpu: GPU, precision: str, batch_size: int, rnn_units: int, layers: int,
               vocabulary: int) -> Iterator[str]:
    """How each layer's recurrence and the generation of text run on a GPU, and why.

    Raises: ValueError for a precision that the GPU has not.
    """
    if precision == "auto":
        precision = "tf32" if "tf32" in precisions(gpu) else "fp32"
    yield (f"{gpu.name}: {gpu.multiprocessors} multiprocessors, {gpu.shared_bytes >> 10} KiB of shared memory a block; "
           f"{batch_size} rows, {rnn_units} units, {precision}")
    for layer in range(layers):
        V_out, V_in = vocabulary * (layer == layers - 1), vocabulary * (layer == 0)
        for direction, plan in (
                ("forward", forward_plan(gpu, batch_size, rnn_units, precision)),
                ("backward", backward_plan(gpu, batch_size, rnn_units, precision, V_out=V_out, V_in=V_in))):
            yield f"layer {layer} {direction}: {plan.variant}; {plan.reason}"
            if plan.variant == "persistent":
                yield "    " + " ".join(f"{name}={getattr(plan, name)}" for name in _CUT)
    weights = "bf16" if precision == "bf16" else "fp32"
    for rows in sorted({1, batch_size}):
        plan = generation_plan(gpu, rows, vocabulary, rnn_units, layers, weights)
        yield f"generation, {rows} row{'s' * (rows > 1)}: {plan.variant}; {plan.reason}"
        if plan.variant != "stepwise":
            yield "    " + " ".join(f"{name}={getattr(plan, name)}" for name in _GENERATION_CUT)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: as `main`; 2 also for a bad command line, and for a plan where there is no GPU.
    """
    parser = _Parser(prog="python -m kernels", allow_abbrev=False,
                     description="Compile every kernel and print what it takes, or plan recurrence and "
                                 "generation; with no GPU.")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="GPU architectures to compile for")
    parser.add_argument("--plan", action="store_true",
                        help="print how recurrence and generation run on a GPU; compile nothing")
    of_plan = parser.add_argument_group("with --plan")
    of_plan.add_argument("--device-like", choices=GPUS, help="the GPU to plan for (default: this machine's)")
    of_plan.add_argument("--precision", choices=("auto", *PACK), default="auto")
    of_plan.add_argument("--batch-size", type=_positive, default=64)
    of_plan.add_argument("--rnn-units", type=_positive, default=1024)
    of_plan.add_argument("--layers", type=_positive, default=1)
    of_plan.add_argument("--vocabulary", type=_positive, default=66)
    options = vars(parser.parse_args(arguments))
    arch, plan = options.pop("arch"), options.pop("plan")
    if not plan:
        if any(value != parser.get_default(name) for name, value in options.items()):
            parser.error("GPU, precision and sizes are those of a --plan")
        return main(arch)
    device_like = options.pop("device_like")
    try:
        lines = list(plan_lines(GPUS[device_like] if device_like else current_executor().gpu, **options))
    except (DeviceError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(command())
