"""Which instructions of the kernels' PTX the checks of checks.py execute, as a table: coverage.txt.

    python -m tests.host_ptx.coverage [--architecture sm_90 ...]   # renews the table's rows of these, or of all

It fails where a check fails, where inline PTX of kernels/ptx.cuh was not executed, and where less than BAR of a
kernel's instructions are either executed or explained by EXPLAINED.
"""

import argparse
import collections
import ctypes
import importlib.metadata
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from char_gru.kernels import runtime
from tests import host_ptx
from tests.host_ptx.checks import SHARED_BYTES, checks

__all__ = ["BAR", "EXPLAINED", "TABLE", "Coverage", "inline_ptx", "measured", "read_table", "wrong"]

TABLE = pathlib.Path(__file__).with_name("coverage.txt")
KERNELS = pathlib.Path(runtime.__file__).parent
BAR = 0.98
"""The share of a kernel's instructions that has to be executed, or whose absence has to be explained."""

_INDEX = "a 64-bit division, for an index above 2^32"
_SUMS = "the compiler's loop of sixteen turns: a thread adds at most four of 1,024 sums"
_LATE = "a packet is late in some orders of blocks, not in all"
_MANY_POSITIONS = "the compiler's loop of sixteen turns, 16,384 positions: a check has as many, of another module"
_OTHER_MODULE = "turns of a loop that the checks of this kernel's other modules execute"
_NO_RANKS = "the compiler's code for a V of 1, which has no character to rank"
_NO_STEPS = "the compiler's code for a window of no steps"

EXPLAINED = {  # kernel, or "" for any, and a text of the first instruction's source line -> why it never runs
    ("generate_persistent", "for (int layer = 0"): "the compiler's copy of the code for a block without units",
    ("generate_persistent", "generate_logits.cuh: for (int v = threadIdx.x"): "the compiler's code for no shares",
    ("generate_persistent", "own[q] ="): _OTHER_MODULE,
    ("generate_persistent", "for (int q = threadIdx.x"): _OTHER_MODULE,
    ("generate_persistent", "float p(int v) const"): _OTHER_MODULE,
    ("generate_persistent", "load(w, W_all"): _OTHER_MODULE,
    ("generate_persistent", "for (int u = 0; u < units"): _OTHER_MODULE,
    ("generate_persistent", "const float weight = W_out"): _OTHER_MODULE,
    ("generate_persistent", "if (t > 0)"): "the wait for a word that is late: a block alone waits for none",
    ("pack_weights", "const size_t count"): _INDEX,
    ("pack_weights", "const int row = e /"): _INDEX,
    ("output_layer", "int unit_of_warp"): _INDEX,
    ("step_first", "int unit_of_warp"): _INDEX,
    ("step_upper", "int unit_of_warp"): _INDEX,
    ("gru_backward_step", "gru.cu: const int element"): _NO_STEPS,
    ("gru_backward_step", "gru.cu: continue;"): _NO_STEPS,
    ("mean_loss", "common.cuh: for (int i = threadIdx.x"): _MANY_POSITIONS,
    ("mean_loss", "common.cuh: sum += values[i]"): _MANY_POSITIONS,
    ("gru_backward_persistent", "resident.cuh: if (misses())"): _LATE,
    ("gru_backward_persistent", "resident_mma.cuh: const int first"): _LATE,
    ("next_character", "generate.cuh: for (int first_v"): _NO_RANKS,
    ("next_character", "generate.cuh: for (int digits"): _NO_RANKS,
    ("sample", "generate.cuh: for (int first_v"): _NO_RANKS,
    ("sample", "generate.cuh: for (int v = 1 + team_thread"): _NO_RANKS,
    ("norm_of_sums", "common.cuh: for (int i = threadIdx.x"): _SUMS,
    ("norm_of_sums", "common.cuh: sum += values[i]"): _SUMS,
    ("sample", "naive.cu: for (float reached"): "the compiler's code for a V of 1",
    ("sum_by_id", "for (int column"): "the compiler's code for a block without warps",
    ("sum_by_id", "const size_t v = thread_in_grid()"): _INDEX,
    ("matmul", "thread_in_grid()"): _INDEX,
    ("add_partial_sums", "C[i] = add_bias"): _INDEX,
    ("gru_forward_step", "thread_in_grid()"): _INDEX,
    ("gru_forward_step", "a[gate] = sum"): "the compiler's code for a width of 0",
    ("gru_backward_step", "thread_in_grid()"): _INDEX,
}

UNUSED = {("sm_75", name) for name in ("ldmatrix_x4", "ldmatrix_x4_trans", "add_release", "load_acquire")}
"""Architecture and function of ptx.cuh that no kernel calls there: matmul_multistage.cu alone loads matrices, and
generate_batched.cu alone has a barrier among blocks; both are for sm_80 and later."""


class Row(NamedTuple):
    """A kernel of a module: how many checks and launches ran it, and its instructions."""

    architecture: str
    module: str
    constants: str
    kernel: str
    checks: int
    launches: int
    instructions: int
    executed: int


class Missed(NamedTuple):
    """Instructions that never ran. Of several that follow one another, the first gives the source line."""

    architecture: str
    module: str
    constants: str
    kernel: str
    line: str  # file, number: text
    instructions: int


class Inline(NamedTuple):
    """A statement of inline PTX: in how many kernels it stands, and in how many of them it was executed."""

    architecture: str
    function: str
    statement: str
    kernels: int
    executed: int


class Coverage(NamedTuple):
    """The three tables."""

    rows: list[Row]
    missed: list[Missed]
    inline: list[Inline]


class Recorder(host_ptx.PtxExecutor):
    """Keeps which checks launched which kernels; at the first launch of a module, what ran before is forgotten."""

    def __init__(self, architecture: str):
        super().__init__(architecture)
        self.gpu = self.gpu._replace(shared_bytes=SHARED_BYTES)
        self.check = ""
        self.ran: dict[tuple[str, str], collections.Counter] = {}  # source and kernel -> check -> launches
        self._seen: set[str] = set()

    def _run(self, source, module, request, parameters, args):
        if source not in self._seen:
            self._seen.add(source)
            built = host_ptx.build(source, self.architecture)
            ctypes.memset((ctypes.c_uint8 * len(built.blocks)).in_dll(built.library, "ptx_executed"), 0,
                          len(built.blocks))
        self.ran.setdefault((source, request.kernel.decode()), collections.Counter())[self.check] += 1
        return super()._run(source, module, request, parameters, args)


def measured(architecture: str, chosen: str = "", say: Callable[[str], None] = lambda name: None) -> Coverage:
    """Runs the checks whose name a regular expression finds.

    Raises: AssertionError where a check fails.
    """
    executor = Recorder(architecture)
    with runtime.use(executor):
        for name, check in checks().items():
            if re.search(chosen, name):
                say(name)
                executor.check = name
                check()
    assert not executor.from_source, executor.from_source
    coverage = Coverage([], [], [])
    statements: dict[int, set] = {line: set() for line in inline_ptx(architecture)}  # -> kernels and whether it ran
    for (source, kernel), ran in executor.ran.items():
        named = architecture, *_module_of(source), kernel
        instructions = _instructions(host_ptx.build(source, architecture), kernel)
        coverage.rows.append(Row(*named, len(ran), ran.total(), len(instructions.executed),
                                 sum(instructions.executed)))
        lines = collections.Counter()
        for executed, run in itertools.groupby(zip(*instructions), key=lambda pair: pair[1]):
            if not executed:
                first, *others = run
                lines[_source_line(first[0].location)] += 1 + len(others)
        coverage.missed.extend(Missed(*named, line, count) for line, count in lines.items())
        for statement, executed in zip(*instructions):
            if statement.location.file == "kernels/ptx.cuh" and statement.location.line in statements:
                statements[statement.location.line].add((source, kernel, executed))
    for line, (function, text) in inline_ptx(architecture).items():
        stands = {found[:2] for found in statements[line]}
        runs = {found[:2] for found in statements[line] if found[2]}
        coverage.inline.append(Inline(architecture, function, text, len(stands), len(runs)))
    return Coverage(sorted(coverage.rows), sorted(coverage.missed, key=lambda missed: missed[:4]), coverage.inline)


def _instructions(built: host_ptx.Built, kernel: str) -> host_ptx.Coverage:
    """Those of a kernel, and of the functions of its module that kernels call."""
    parts = [built.coverage(name) for name in dict(built.blocks) if name == kernel or name.startswith("_Z")]
    return host_ptx.Coverage(*(list(itertools.chain(*part)) for part in zip(*parts)))


def _module_of(source: str) -> tuple[str, str]:
    """Stem and constants of a module's source."""
    head, _, rest = source.partition('#line 1 "kernels/')
    return rest.partition(".cu")[0], " ".join("=".join(found) for found in re.findall(r"#define (\w+) (\S+)", head))


def _source_line(location) -> str:
    if location is None:
        return "no line"
    file = location.file.removeprefix("kernels/")
    return f"{file}: {(KERNELS / file).read_text().splitlines()[location.line - 1].strip().replace('|', '/')}"


def inline_ptx(architecture: str) -> dict[int, tuple[str, str]]:
    """Line of ptx.cuh -> function and PTX of each asm statement that has PTX and that an architecture compiles."""
    found, function, compiled = {}, "", [True]
    for number, line in enumerate((KERNELS / "ptx.cuh").read_text().splitlines(), 1):
        if condition := re.fullmatch(r"#if __CUDA_ARCH__ >= (\d+)|#ifndef HOST_CUDA", line):
            compiled.append(10 * int(architecture.removeprefix("sm_")) >= int(condition[1] or 0))
        elif line == "#endif":
            compiled.pop()
        if head := re.match(r"__device__ .*?(\w+)\(", line):
            function = head[1]
        if all(compiled) and (statement := re.search(r'\basm(?: volatile)?\("([^"]+)', line)):
            found[number] = function, statement[1].strip().split(" ")[0].rstrip(";")
    return found


def wrong(coverage: Coverage) -> list[str]:
    """What is below the bar and not explained."""
    said = [f"{inline.architecture}: {inline.function} was not executed" for inline in coverage.inline
            if not inline.executed and inline[:2] not in UNUSED]
    for row in coverage.rows:
        unexplained = [missed for missed in coverage.missed
                       if missed[:4] == row[:4] and not _explained(missed, coverage)]
        if sum(missed.instructions for missed in unexplained) > (1 - BAR) * row.instructions:
            said += [f"{' '.join(row[:4])}: {row.executed / row.instructions:.1%}: {missed.line} "
                     f"({missed.instructions})" for missed in unexplained]
    return said


def _explained(missed: Missed, coverage: Coverage) -> bool:
    """Whether something explains it; that other modules execute a line has to be true of one of them."""
    why = explanation(missed)
    if why != _OTHER_MODULE:
        return bool(why)
    named = missed.architecture, missed.module, missed.kernel
    modules = {row.constants for row in coverage.rows if (row.architecture, row.module, row.kernel) == named}
    without = {other.constants for other in coverage.missed
               if (other.architecture, other.module, other.kernel, other.line) == (*named, missed.line)}
    return bool(modules - without)


def explanation(missed: Missed) -> str:
    """Why instructions are not executed; "" if nothing explains it."""
    return next((why for (kernel, text), why in EXPLAINED.items()
                 if kernel in ("", missed.kernel) and text in missed.line), "")


def read_table() -> Coverage:
    """The committed table."""
    tables = []
    for kind, text in zip((Row, Missed, Inline), TABLE.read_text().split("\n\n")[1:]):
        cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[1:]]
        types = kind.__annotations__.values()
        tables.append([kind(*(type_(cell) for type_, cell in zip(types, row))) for row in cells])
    return Coverage(*tables)


def _written(coverage: Coverage) -> str:
    head = (f"The instructions of each kernel's PTX, by NVRTC {importlib.metadata.version('nvidia-cuda-nvrtc')}, and "
            "how many of them the checks of checks.py execute;\nthen those that never ran, by the source line of the "
            "first of several; then inline PTX. Made by python -m tests.host_ptx.coverage")
    parts = [head]
    more = {Row: lambda row: f" | {row.executed / row.instructions:.1%}",
            Missed: lambda missed: f" | {explanation(missed)}", Inline: lambda inline: ""}
    last = {Row: " | share", Missed: " | why", Inline: ""}
    for kind, entries in zip((Row, Missed, Inline), coverage):
        lines = [list(kind._fields), *[list(map(str, entry)) for entry in entries]]
        widths = [max(map(len, column)) for column in zip(*lines)]
        ends = [last[kind], *map(more[kind], entries)]
        parts.append("\n".join(" | ".join(map(str.ljust, line, widths)) + end for line, end in zip(lines, ends)))
    return "\n\n".join(parts) + "\n"


def _replaced(old: Coverage, new: Coverage, architectures: Iterable[str]) -> Coverage:
    order = {architecture: i for i, architecture in enumerate(runtime.ARCHITECTURES)}
    return Coverage(*(sorted([entry for entry in before if entry.architecture not in architectures] + after,
                             key=lambda entry: order[entry.architecture]) for before, after in zip(old, new)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", nargs="+", choices=runtime.ARCHITECTURES, default=runtime.ARCHITECTURES)
    table = read_table() if TABLE.exists() else Coverage([], [], [])
    for architecture in parser.parse_args().architecture:
        coverage = measured(architecture, say=lambda name: print(f"{name:70}\r", end="", file=sys.stderr, flush=True))
        table = _replaced(table, coverage, (architecture,))
        TABLE.write_text(_written(table))
        shares = [row.executed / row.instructions for row in coverage.rows]
        print(f"{architecture}: {len(shares)} kernels, least share {min(shares):.1%}", flush=True)
    said = wrong(table)
    print("\n".join(said))
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
