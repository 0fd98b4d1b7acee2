"""What a turn of each loop of the machine code executes: read from listings; of the loops that matter held in a table.

`python -m kernels --sass gru_forward_persistent gru_backward_persistent generate_one_text generate_persistent
generate_batched matmul_multistage cross_entropy > tests/kernel_loops.txt` renews the table.
"""

import collections
import re
from pathlib import Path

import pytest

from char_gru.kernels import sass
from char_gru.kernels.__main__ import command
from char_gru.kernels.runtime import assemble, cubin_for

TABLE = Path(__file__).parent / "kernel_loops.txt"

COSTLY = ("local", "atomics", "barriers", "fences", "invalidations", "calls")
"""Columns that may not grow at all, whichever version of the compiler there is."""

MORE = 1.15
"""How many times as many instructions as the table says another version of the compiler may make."""

Totals = dict[tuple[str, ...], collections.Counter]


def listing(text: str) -> list[sass.Instruction | str]:
    """A line `label:`, or an instruction: a guard, an operation with modifiers, and operands."""
    code = []
    for line in text.split("\n"):
        words = line.split()
        if line.strip().endswith(":"):
            code.append(line.strip()[:-1])
        elif words:
            guard = f"{words.pop(0)} " if words[0].startswith("@") else ""
            operation, dot, modifiers = words[0].partition(".")
            code.append(sass.Instruction(guard, operation, dot + modifiers, " ".join(words[1:]), f"x.cu:{len(code)}"))
    return code


def loops_of(text: str) -> list[tuple[int, dict[str, int]]]:
    return [(loop.depth, dict(loop.counts)) for loop in sass.loops(listing(text))]


def test_code_without_a_jump_back_has_no_loop():
    assert loops_of("""FADD
        @P0 BRA `(.L_1)
        FMUL
        .L_1:
        EXIT""") == []


def test_inner_loops_are_counted_apart():
    found = loops_of("""MOV
        .L_1:
        LDG.E.128
        .L_2:
        FFMA
        FFMA
        @P0 BRA `(.L_2)
        STS
        @P1 BRA `(.L_1)
        EXIT""")
    assert found == [(1, {"global": 1, "shared": 1, "other": 1, "instructions": 3}),
                     (2, {"fma": 2, "other": 1, "instructions": 3})]


def test_part_of_a_loop_may_lie_behind_the_end_of_the_kernel():
    assert loops_of(""".L_1:
        @P0 BRA `(.L_9)
        .L_2:
        HMMA
        @P1 BRA `(.L_1)
        EXIT
        .L_9:
        MEMBAR.ALL.GPU
        BRA `(.L_2)""") == [(1, {"other": 3, "tensor": 1, "fences": 1, "instructions": 5})]


def test_two_ways_back_are_one_loop_and_a_way_into_its_middle_makes_none():
    assert loops_of(""".L_1:
        FADD
        @P0 BRA `(.L_1)
        FADD
        @P1 BRA `(.L_1)
        EXIT""") == [(1, {"fma": 2, "other": 2, "instructions": 4})]
    assert loops_of("""@P0 BRA `(.L_2)
        .L_1:
        FADD
        .L_2:
        FMUL
        @P1 BRA `(.L_1)
        EXIT""") == []


def test_guards_and_predicates_of_branches_decide_what_follows():
    for branch, end in (("BRA `(.L_1)", []), ("BRA.U !UP0, `(.L_1)", ["FADD"]), ("@!P0 BRA `(.L_1)", ["FADD"])):
        code = listing(f".L_1:\nFMUL\n{branch}\nFADD\nEXIT")
        [loop] = sass.loops(code)
        assert loop.counts["instructions"] == 2 and code[2].goes_on == bool(end)


@pytest.fixture(scope="module")
def compiled() -> list[sass.Loop]:
    pytest.importorskip("cuda.bindings")
    text = """
    extern "C" __global__ void kernel(float4 *out, const float4 *in, float *c, int n)
    {
        __shared__ float tile[256];
    #pragma unroll 1
        for (int i = threadIdx.x; i < n; i += 256) {
            float4 x = in[i];
            tile[threadIdx.x] = x.x / x.y;
            __syncthreads();
            x.z = tile[255 - threadIdx.x];
            __threadfence();
            atomicAdd(c, 1.0f);
            out[i] = x;
        }
    }"""
    [code] = sass.disassembled(cubin_for(assemble("kernel.cu", text, {}), "sm_90")).values()
    return sass.loops(code)


def test_compiled_loop_has_the_accesses_and_waits_of_its_source(compiled):
    [loop] = compiled
    assert loop.depth == 1 and loop.location.startswith("kernel.cu:")
    assert loop.widths == {"LDG.128": 1, "STG.128": 1, "STS.32": 1, "LDS.32": 1}
    assert {column: loop.counts[column] for column in COSTLY} == {
        "local": 0, "atomics": 1, "barriers": 1, "fences": 1, "invalidations": 1, "calls": 1}
    assert loop.counts["instructions"] == sum(loop.counts.values()) - loop.counts["instructions"]


def read(lines: list[str]) -> Totals:
    """Module, constants and kernel -> the counts of all of its loops."""
    totals, counts = {}, collections.Counter()
    for line in lines:
        if not line.startswith(" "):
            counts = totals[tuple(cell.strip() for cell in line.split("|"))] = collections.Counter()
        for count, column in re.findall(r"(\d+) (\w+)", line.partition(": ")[2].partition("(")[0]):
            counts[column] += int(count)
    return totals


def assert_no_more_than(found: Totals, table: Totals) -> None:
    assert found.keys() <= table.keys()
    for name, counts in found.items():
        expected = table[name]
        grown = [column for column in COSTLY if counts[column] > expected[column]]
        assert not grown and counts["instructions"] <= MORE * expected["instructions"], (name, grown, counts, expected)


def test_loops_of_the_forward_recurrence_execute_what_the_table_says(capsys):
    pytest.importorskip("cuda.bindings")
    table = read(TABLE.read_text().splitlines())
    assert command(["--sass", "gru_forward_persistent"]) == 0
    found = read(capsys.readouterr().out.splitlines())
    assert found.keys() == {name for name in table if name[1] == "gru_forward_persistent"}
    assert_no_more_than(found, table)
    fence_more = {name: counts + collections.Counter(fences=1) for name, counts in found.items()}
    with pytest.raises(AssertionError, match="fences"):
        assert_no_more_than(fence_more, table)


@pytest.mark.slow
def test_all_loops_of_the_table_execute_what_it_says(capsys):
    pytest.importorskip("cuda.bindings")
    table = read(TABLE.read_text().splitlines())
    assert command(["--sass", *dict.fromkeys(name[1] for name in table)]) == 0
    found = read(capsys.readouterr().out.splitlines())
    assert found.keys() == table.keys()
    assert_no_more_than(found, table)


@pytest.mark.parametrize("arguments, said", [
    (["--sass", "gru_forward"], "--sass: there is no gru_forward.cu; there are adam, "),
    (["--sass", "adam", "--json"], "--json is for --check"),
    (["--sass"], "argument --sass: expected at least one argument")])
def test_wrong_command_line_is_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        command(arguments)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in line
