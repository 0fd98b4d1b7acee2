"""The machine code of kernels: what each of their loops executes in a turn, counted from the disassembly.

The counts are exact, whatever GPU there is or is not. They are no times: how many turns a loop takes, and how long its
loads wait, they do not say.
"""

import collections
import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from char_gru.kernels.modules import modules_for
from char_gru.kernels.runtime import DeviceError, cubin_for, source

PIPES = {
    "tensor": "HMMA IMMA DMMA HGMMA IGMMA",
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I IMAD HFMA2 HADD2 HMUL2 FSWZADD",
    "alu": "IADD3 VIADD VIADDMNMX LOP3 SHF ISETP FSETP SEL FSEL FMNMX VIMNMX IMNMX PRMT LEA MOV PLOP3 IABS F2FP FCHK "
           "P2R R2P LOP ICMP BMSK SGXT VOTE CS2R",
    "special": "MUFU F2I I2F F2F I2I FRND POPC FLO BREV I2FP",
    "shuffle": "SHFL",
    "global": "LDG STG",
    "shared": "LDS STS LDSM ATOMS",
    "copies": "LDGSTS",
    "local": "LDL STL",
    "atomics": "ATOM ATOMG RED REDG",
    "barriers": "BAR",
    "fences": "MEMBAR",
    "invalidations": "CCTL",
    "calls": "CALL",
}
"""Column of the table -> the operations that it counts: by the unit that executes them, or what they wait for. "local"
are registers that were spilled; "calls" are the slow paths of division and square root; "invalidations" those of L1."""

_PIPE = {operation: pipe for pipe, operations in PIPES.items() for operation in operations.split()}
_WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{ )?(@!?U?P\w+ )?\s*([A-Z]\w*)(\.?[^\s;]*)\s*(.*?)\s*;")
_LOCATION = re.compile(r'\s*//## File "(?:.*/)?([^/"]+)", line (\d+)( inlined at)?')


class Instruction(NamedTuple):
    """An instruction of the machine code, and the source line that it comes from."""

    guard: str  # "@P0 ", or ""
    operation: str  # LDG
    modifiers: str  # .E.128
    operands: str
    location: str  # gru.cu:93

    @property
    def target(self) -> str | None:
        """The label that it may jump to."""
        if self.operation not in ("BRA", "WARPSYNC", "JMP"):
            return None
        found = re.search(r"`\(([^)]+)\)", self.operands)
        return found[1] if found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.operation in ("EXIT", "RET"):
            return bool(self.guard)
        return self.operation != "BRA" or bool(self.guard) or "," in self.operands


class Loop(NamedTuple):
    """A loop of a kernel. counts, of instructions by `PIPES` and of "instructions" in all, are of a turn in which every
    branch is executed, loops within this one left out; widths: of those that access memory, by their bytes."""

    location: str  # of the jump back
    depth: int  # 1 for a loop that lies in no other
    counts: collections.Counter[str]
    widths: collections.Counter[str]  # LDG.128 -> how many


def disassembled(cubin: bytes) -> dict[str, list[Instruction | str]]:
    """Kernel -> its instructions, a label standing before the instruction that it names.

    Raises: DeviceError where nvdisasm is missing.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([_nvdisasm(), "-c", "-g", file.name], check=True, text=True,
                                 stdout=subprocess.PIPE).stdout
    kernels: dict[str, list[Instruction | str]] = {}
    for section in listing.split("\n.text.")[1:]:
        name, _, text = section.partition(":")
        code, location = kernels.setdefault(name, []), ""
        for line in text.splitlines():
            if found := _LOCATION.match(line):
                location = f"{found[1]}:{found[2]}"
            elif found := _INSTRUCTION.match(line):
                code.append(Instruction(found[2] or "", *found.groups()[2:], location))
            elif found := re.match(r"([.$][\w$.]+):", line):
                code.append(found[1])
    return kernels


def _nvdisasm() -> str:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    of_package = (str(file.locate()) for file in files if file.name == "nvdisasm")
    if (found := next(of_package, None) or shutil.which("nvdisasm")) is None:
        raise DeviceError("nvdisasm is not installed: pip install 'char-gru[test]'")
    return found


def loops(code: Iterable[Instruction | str]) -> list[Loop]:
    """The loops of a kernel, an outer one before those within it, in the order in which they begin."""
    instructions, labels = [], {}
    for item in code:
        if isinstance(item, str):
            labels[item] = len(instructions)
        else:
            instructions.append(item)
    following = [[*([i + 1] if instruction.goes_on and i + 1 < len(instructions) else []),
                  *([labels[instruction.target]] if instruction.target in labels else [])]
                 for i, instruction in enumerate(instructions)]
    bodies: dict[int, set[int]] = {}  # first instruction of a loop -> all of them
    jumps: dict[int, int] = {}  # -> the last jump back
    preceding = collections.defaultdict(list)
    for i, others in enumerate(following):
        for other in others:
            preceding[other].append(i)
    for i, first in _jumps_back(following):
        body, unseen = bodies.setdefault(first, {first}), [i]
        while unseen:
            if (j := unseen.pop()) not in body:
                body.add(j)
                unseen += preceding[j]
        jumps[first] = max(i, jumps.get(first, i))
    found = []
    for first, body in sorted(bodies.items()):
        depth = sum(first in other for other in bodies.values())
        inner = set().union(*(other for start, other in bodies.items() if start != first and start in body))
        own = [instructions[i] for i in sorted(body - inner)]
        counts = collections.Counter(_PIPE.get(instruction.operation, "other") for instruction in own)
        counts["instructions"] = len(own)
        widths = collections.Counter(_with_width(instruction) for instruction in own
                                     if _PIPE.get(instruction.operation) in ("global", "shared", "copies", "local"))
        found.append(Loop(instructions[jumps[first]].location, depth, counts, widths))
    return found


def _jumps_back(following: list[list[int]]) -> list[tuple[int, int]]:
    """The edges of the graph of instructions that lead from an instruction to one through which every way from the
    first instruction to it leads."""
    order, state, stack = [], [0] * len(following), [(0, 0)] if following else []
    while stack:  # depth first, by hand: kernels have thousands of instructions
        i, next_edge = stack.pop()
        state[i] = 1
        if next_edge < len(following[i]):
            stack.append((i, next_edge + 1))
            if not state[following[i][next_edge]]:
                stack.append((following[i][next_edge], 0))
        else:
            order.append(i)
    rank = {i: len(order) - position for position, i in enumerate(order)}
    dominator = _immediate_dominators(following, order, rank)

    def dominates(above: int, i: int) -> bool:
        while rank[i] > rank[above]:
            i = dominator[i]
        return i == above

    return [(i, other) for i in order for other in following[i] if rank[other] <= rank[i] and dominates(other, i)]


def _immediate_dominators(following: list[list[int]], order: list[int], rank: dict[int, int]) -> dict[int, int]:
    """Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm"."""
    preceding = collections.defaultdict(list)
    for i in order:
        for other in following[i]:
            preceding[other].append(i)
    dominator, changed = {0: 0}, True
    while changed:
        changed = False
        for i in reversed(order):
            if i == 0:
                continue
            known = [other for other in preceding[i] if other in dominator]
            common = known[0]
            for other in known[1:]:
                while common != other:
                    if rank[common] > rank[other]:
                        common = dominator[common]
                    else:
                        other = dominator[other]
            if dominator.get(i) != common:
                dominator[i], changed = common, True
    return dominator


def _with_width(instruction: Instruction) -> str:
    """LDG.128; of 32 bits where the code says nothing else."""
    found = _WIDTH.search(instruction.modifiers)
    if instruction.operation == "LDSM":
        return f"LDSM.{32 * int(re.search(r'[124]$', instruction.modifiers)[0])}"
    return f"{instruction.operation}.{found[1].lstrip('US') if found else 32}"


class Entry(NamedTuple):
    """A loop of a kernel of a module, compiled with some constants for an architecture."""

    architecture: str
    module: str
    constants: str
    kernel: str
    loop: Loop


def entries(architecture: str, stem: str) -> Iterator[Entry]:
    """The loops of all kernels of a .cu file, with the constants that an architecture's GPUs have.

    Raises: DeviceError where NVRTC or nvdisasm is missing; CompileError.
    """
    chosen = [constants for module, constants in modules_for(architecture) if module == stem]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # the compiler takes seconds for some, without Python's lock
        cubins = threads.map(lambda constants: cubin_for(source(stem, constants), architecture), chosen)
        for constants, cubin in zip(chosen, cubins):
            sizes = " ".join(f"{name}={value}" for name, value in constants.items())
            for kernel, code in disassembled(cubin).items():
                for loop in loops(code):
                    yield Entry(architecture, stem, sizes, kernel, loop)


def lines(found: Iterable[Entry]) -> Iterator[str]:
    """A table of loops, one line for each, and a line above those of a kernel."""
    columns = ("instructions", *PIPES)
    before = None
    for entry in found:
        if entry[:4] != before:
            before = entry[:4]
            yield " | ".join(before)
        counts = ", ".join(f"{entry.loop.counts[column]} {column}" for column in columns if entry.loop.counts[column])
        widths = " ".join(f"{count} {name}" for name, count in sorted(entry.loop.widths.items()))
        yield f"{'    ' * entry.loop.depth}{entry.loop.location}: {counts}{f' ({widths})' if widths else ''}"
