"""Check the kernels on this machine's GPU, or look at them without one.

    python -m kernels --check [--json]                                 does this GPU compute what the reference says?
    python -m kernels [--arch sm_80 sm_90]                             registers and shared memory of every kernel
    python -m kernels --sass gru_forward_persistent --arch sm_90       what a turn of each loop executes
    python -m kernels --plan --device-like h100                        how a GPU would run a training step, and text
    python -m kernels --run gru_forward --sizes T=3,B=2,H=8 --trace    one op on the CPU: who loads, stores, waits
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from char_gru.kernels import sass
from char_gru.kernels.modules import MODULES, PLANNED, modules_for
from char_gru.kernels.plan.costs import EXPECTED_ERROR
from char_gru.kernels.plan.generation import GenerationPlan, generation_plan
from char_gru.kernels.plan.gpus import GPU, GPUS, precisions
from char_gru.kernels.plan.recurrence import ELEMENT_BYTES, RecurrencePlan, backward_plan, forward_plan
from char_gru.kernels.plan.training_step import table, training_step
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
_GENERATION_CUT = GenerationPlan._fields[GenerationPlan._fields.index("groups"):-1]  # all but predicted_us
_WIDTHS = (12, 23, 75, 23, 9, 12, 13)
_ROOT = Path(__file__).parents[1]
_OPTIONS = {"compile": ("arch",),
            "sass": ("arch",),
            "check": ("json",),
            "plan": ("device_like", "precision", "batch_size", "rnn_units", "layers", "vocabulary", "seq_length",
                     "embedding_dim"),
            "run": ("sizes", "precision", "variant", "order", "trace")}


class Entry(NamedTuple):
    """The resources that one kernel, compiled with some constants, takes on one architecture."""

    architecture: str
    module: str
    constants: str
    kernel: str
    use: ResourceUse


def resource_use(architecture: str) -> Iterator[Entry]:
    """Compile every module that an architecture can run.

    Raises: DeviceError where the compiler is missing; CompileError where a source does not compile.
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
            for *names, use in resource_use(architecture):
                print(row((*names, use.registers, use.shared_bytes, use.spill_stores + use.spill_loads)))
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 2
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def loops(stems: Sequence[str], arch: Sequence[str] = ("sm_90",)) -> int:
    """Print what a turn of each loop executes in the kernels of some .cu files.

    Args:
        stems: names of .cu files, without their ending.
        arch: GPU architectures to compile for.

    Returns:
        Exit status: 0; 1 where a source does not compile.

    Raises: ValueError for a file that does not exist; DeviceError where the compiler or the disassembler is missing.
    """
    known = (*MODULES, *PLANNED)
    if unknown := [stem for stem in stems if stem not in known]:
        raise ValueError(f"--sass: there is no {unknown[0]}.cu; there are {', '.join(sorted(known))}")
    try:
        for architecture in arch:
            for stem in stems:
                for line in sass.lines(sass.entries(architecture, stem)):
                    print(line)
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def plan_lines(gpu: GPU, precision: str = "auto", batch_size: int = 64, rnn_units: int = 1024, layers: int = 1,
               vocabulary: int = 66, seq_length: int = 100, embedding_dim: int = 256) -> Iterator[str]:
    """How each layer's recurrence and the generation of text run on a GPU, and why; then a training step as a timeline.

    Raises: ValueError for a precision that the GPU lacks.
    """
    if precision == "auto":
        precision = "tf32" if "tf32" in precisions(gpu) else "fp32"
    yield (f"{gpu.name}: {gpu.multiprocessors} multiprocessors, {gpu.shared_bytes >> 10} KiB of shared memory a block; "
           f"{batch_size} rows, {rnn_units} units, {precision}")
    for layer in range(layers):
        V_out, V_in = vocabulary * (layer == layers - 1), vocabulary if layer == 0 else seq_length * batch_size
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
    yield (f"a training step, {seq_length} characters of each row: microseconds as predicted, to be wrong by some "
           f"{EXPECTED_ERROR:.0%}, the floor, and what a launch waits for most")
    yield from table(training_step(gpu, seq_length, batch_size, vocabulary, embedding_dim, rnn_units, layers,
                                   precision))


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line on stderr, with exit status 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _run(op: str, **options) -> int:
    """Run one op on the CPU; returns the exit status.

    Raises: ValueError for options that do not fit the op, and where the harness or a C++ compiler is missing.
    """
    if not (_ROOT / "tests" / "host_cuda" / "run.py").exists():
        raise ValueError("--run needs the harness in tests/host_cuda: use a checkout of the repository")
    sys.path.insert(0, str(_ROOT))
    from tests.host_cuda.run import run

    return run(op, **options)


def command(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: as `main`; 1 also where a result of --check or --run is wrong; 2 also for a bad command line, for a
        check or a plan where there is no GPU, and for a run where there is no C++ compiler.
    """
    parser = _Parser(prog="python -m kernels", allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     description="Compile every kernel and print its registers and shared memory; count what their "
                                 "loops execute; check this machine's GPU; plan recurrence and generation, or run one "
                                 "op on the CPU, without a GPU.")
    parser.add_argument("--arch", nargs="+", help="GPU architectures to compile for (default: all; with --sass: sm_90)")
    parser.add_argument("--sass", nargs="+", metavar="FILE", help="disassemble the kernels of these .cu files, such as "
                                                                  "gru_forward_persistent, and count what each loop "
                                                                  "executes")
    parser.add_argument("--check", action="store_true",
                        help="compare every op, training and generation on this machine's GPU with the reference")
    parser.add_argument("--json", action="store_true", help="with --check: print one object of JSON")
    parser.add_argument("--plan", action="store_true",
                        help="print how recurrence and generation run on a GPU, and what each launch of a training "
                             "step is predicted to take; compile nothing")
    parser.add_argument("--run", metavar="OP", help="run the kernels of an op, such as gru_forward, on the CPU, print "
                                                    "their accesses and waits, and check their results; in a checkout")
    parser.add_argument("--precision", choices=("auto", *ELEMENT_BYTES), help="with --plan or --run (default: auto)")
    of_plan = parser.add_argument_group("with --plan")
    of_plan.add_argument("--device-like", choices=GPUS, help="the GPU to plan for (default: this machine's)")
    of_plan.add_argument("--batch-size", type=_positive, help="(default: 64)")
    of_plan.add_argument("--rnn-units", type=_positive, help="(default: 1024)")
    of_plan.add_argument("--layers", type=_positive, help="(default: 1)")
    of_plan.add_argument("--vocabulary", type=_positive, help="(default: 66)")
    of_plan.add_argument("--seq-length", type=_positive, help="(default: 100)")
    of_plan.add_argument("--embedding-dim", type=_positive, help="(default: 256)")
    of_run = parser.add_argument_group("with --run")
    of_run.add_argument("--sizes", help="such as T=3,B=2,H=8 (default: small ones)")
    of_run.add_argument("--variant", help="of the op (default: chosen by its launcher)")
    of_run.add_argument("--order", choices=("ascending", "descending", "random"),
                        help="in which threads and blocks get their turns (default: ascending)")
    of_run.add_argument("--trace", action="store_true", help="print every access and every wait, not only their sums")
    options = vars(parser.parse_args(arguments))
    modes = [mode for mode in _OPTIONS if mode in options]
    if len(modes) > 1:
        parser.error(f"--{modes[0]} and --{modes[1]} exclude each other")
    mode = modes[0] if modes else "compile"
    for name in options:
        if name not in (mode, *_OPTIONS[mode]):
            where = ["compiling" if other == "compile" else f"--{other}" for other in _OPTIONS
                     if name in _OPTIONS[other]]
            parser.error(f"--{name.replace('_', '-')} is for {' or '.join(where)}")
    try:
        if mode == "compile":
            return main(**options)
        if mode == "sass":
            return loops(options.pop("sass"), **options)
        if mode == "run":
            return _run(options.pop("run"), **options)
        del options[mode]
        if mode == "check":
            from char_gru.rnn.check import run  # which imports this package

            return run("json" in options)
        device_like = options.pop("device_like", None)
        print("\n".join(plan_lines(GPUS[device_like] if device_like else current_executor().gpu, **options)))
    except (DeviceError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program without a traceback
    sys.exit(command())
