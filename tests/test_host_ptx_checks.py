"""What the executor of PTX says of reads ahead of every write, of warps that are not whole, and of barriers."""

import functools
from typing import NamedTuple

import numpy as np
import pytest

from char_gru.kernels import runtime
from tests import host_cuda, host_ptx
from tests.helpers.ptx import HEAD, kernel, run
from tests.host_ptx.parser import parse
from tests.host_ptx.translator import translate

pytest.importorskip("cuda.bindings")  # with it comes NVRTC

pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")


class Case(NamedTuple):
    """Lines of a kernel on an array `floats` at %rd0, whose elements behind the fourth nobody wrote, and an array of
    words at %rd1; `said` is in the report, and "" where all is right."""

    lines: str
    said: str = ""
    threads: int = 1
    floats: type = np.float32


TID = "mov.u32 %r9, %tid.x;\n"
TID_IS_0 = TID + "setp.eq.u32 %p1, %r9, 0;\n"
ZEROS = "mov.u32 %r1, 0;\n"  # for an address, or an operand
MMA = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r2, %r3, %r4, %r5}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, " \
      "{%r1, %r1, %r1, %r1};\n"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];\n"

REGISTER = "a register read before it is written; register %"
SHARED = "shared memory read before it is written"
GLOBAL = "global memory read before it is written"

CASES = {
    # Registers
    "a register that is never written": Case("add.s32 %r1, %r2, 1;", REGISTER + "r2"),
    "a register that is stored": Case("st.global.v2.u32 [%rd1], {%r0, %r2};", REGISTER + "r2"),
    "a register with an address": Case("ld.global.u32 %r1, [%rd5];", REGISTER + "rd5"),
    "a register that decides a branch": Case("@%p1 bra END{i};\nEND{i}:", REGISTER + "p1"),
    "half of a pair": Case("mov.b64 %rd2, {%r0, %r2};", REGISTER + "r2"),
    "a matrix of an mma": Case(MMA, REGISTER + "r1", threads=32),
    "a register that one path leaves out": Case(
        TID_IS_0 + "@%p1 bra END{i};\nmov.u32 %r2, 1;\nEND{i}:\nadd.s32 %r1, %r2, 1;", REGISTER + "r2"),
    "a register that a false guard leaves out": Case(
        TID_IS_0 + "@!%p1 mov.u32 %r2, 1;\nadd.s32 %r1, %r2, 1;", REGISTER + "r2"),
    "a register that selp chooses": Case(TID_IS_0 + "selp.b32 %r1, %r2, %r0, %p1;", REGISTER + "r2"),
    "a register of a scope that has ended": Case(
        "{\n.reg .b32 t;\nmov.u32 t, 1;\n}\n{\n.reg .b32 t;\nadd.u32 %r1, t, 1;\n}", REGISTER + "t"),
    "a register behind a loop that never runs": Case(
        TID + "TURN{i}:\nsetp.eq.u32 %p1, %r9, 0;\n@%p1 bra END{i};\nmov.u32 %r2, 1;\nbra TURN{i};\nEND{i}:\n"
        "add.s32 %r1, %r2, 1;", REGISTER + "r2"),
    "registers that are written": Case(
        TID_IS_0 + "@%p1 mov.u32 %r2, 1;\n@!%p1 mov.u32 %r2, 2;\n@%p1 bra OTHER{i};\nmov.u32 %r3, 1;\nbra END{i};\n"
        "OTHER{i}:\nmov.u32 %r3, 2;\nEND{i}:\nadd.u32 %r1, %r2, %r3;\nselp.b32 %r1, %r3, %r8, %p1;\n"
        "@!%p1 add.u32 %r1, %r8, %r8;\nst.global.u32 [%rd1], %r1;"),
    # Shared memory, of which a launch has 512 bytes
    "shared memory that is never written": Case(ZEROS + "ld.shared.u32 %r2, [%r1];", SHARED),
    "a vector of which half is written": Case(
        ZEROS + "st.shared.u32 [%r1], %r0;\nld.shared.v2.u32 {%r2, %r3}, [%r1];", SHARED + "; address 0, 8 bytes"),
    "a vector whose end is never written": Case(
        ZEROS + "st.shared.v2.u32 [%r1], {%r0, %r0};\nst.shared.u32 [%r1+8], %r0;\n"
        "ld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [%r1];", SHARED),
    "a word of which a byte is written": Case(
        ZEROS + "st.shared.u8 [%r1+3], %r0;\nld.shared.u32 %r2, [%r1];", SHARED),
    "an atomic on shared memory": Case(ZEROS + "atom.shared.add.u32 %r2, [%r1], 1;", SHARED),
    "a row of a matrix": Case(
        TID + "shl.b32 %r1, %r9, 4;\nsetp.ne.u32 %p1, %r9, 5;\n@%p1 st.shared.v4.u32 [%r1], {%r0, %r0, %r0, %r0};\n"
        "bar.warp.sync -1;\n" + LDMATRIX, SHARED + "; address 0x50, 16 bytes", threads=32),
    "shared memory that is written": Case(
        TID + "shl.b32 %r1, %r9, 4;\nst.shared.v4.u32 [%r1], {%r0, %r0, %r0, %r0};\nbar.warp.sync -1;\n" + LDMATRIX +
        "ld.shared.u8 %r2, [%r1+1];\natom.shared.add.u32 %r2, [%r1], 1;\n"
        "cp.async.ca.shared.global [%r1], [%rd0], 4;\ncp.async.ca.shared.global [%r1+4], [%rd0], 4, 0;\n"
        "cp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.v2.u32 {%r2, %r3}, [%r1];", threads=32),
    # Global memory
    "a float that is never written": Case("ld.global.f32 %r1, [%rd0+16];", GLOBAL + "; address"),
    "a float of a vector": Case("ld.global.v2.f32 {%r1, %r2}, [%rd0+16];", GLOBAL),
    "a float that is loaded as bits": Case("ld.volatile.global.u32 %r1, [%rd0+16];", GLOBAL),
    "half of a word of 64 bits": Case("st.global.f32 [%rd0+16], %r0;\nld.global.u64 %rd2, [%rd0+16];", GLOBAL),
    "a float from one of two arrays": Case(
        TID_IS_0 + "selp.b64 %rd2, %rd0, %rd1, %p1;\nld.global.f32 %r1, [%rd2+16];", GLOBAL),
    "a bfloat16": Case("ld.global.u16 %r1, [%rd0+8];", GLOBAL + "; address", floats=np.uint16),
    "a pair of bfloat16": Case("st.global.u16 [%rd0+8], %r0;\nld.global.u32 %r1, [%rd0+8];", GLOBAL,
                               floats=np.uint16),
    "an id": Case("ld.global.u32 %r1, [%rd0+16];", GLOBAL, floats=np.int32),
    "the source of an asynchronous copy": Case(
        ZEROS + "cp.async.cg.shared.global [%r1], [%rd0+16], 16;", GLOBAL),
    "global memory that is written": Case(
        "st.global.f32 [%rd0+16], %r0;\nld.global.v2.f32 {%r1, %r2}, [%rd0+8];\nld.global.f32 %r2, [%rd0+16];\n"
        "mov.u32 %r1, 0x7fffffff;\nst.global.f32 [%rd0+20], %r1;\nld.global.f32 %r2, [%rd0+20];\n"
        "mov.u32 %r1, -1;\nst.global.u32 [%rd1], %r1;\nld.global.u32 %r2, [%rd1];"),
    "integers and floats of ones alone": Case(
        "mov.u32 %r1, -1;\nst.global.u32 [%rd0+16], %r1;\nld.global.u32 %r2, [%rd0+16];\n"
        "ld.global.f32 %r3, [%rd0+16];"),
    # Warps
    "a shuffle by a lane that is no member": Case(
        "shfl.sync.idx.b32 %r1, %r0, 0, 31, 0xfffffffe;", "a lane that the member mask leaves out; members 0xfffffffe, "
        "lane 0", threads=32),
    "a vote by a lane that is no member": Case(
        TID_IS_0 + "vote.sync.any.pred %p2, %p1, 2;", "a lane that the member mask leaves out", threads=2),
    "a barrier of a warp by a lane that is no member": Case(
        "bar.warp.sync 2;", "a lane that the member mask leaves out", threads=2),
    "a shuffle from a lane that is no member": Case(
        TID_IS_0 + "@!%p1 bra END{i};\nshfl.sync.idx.b32 %r1, %r0, 1, 31, 1;\nEND{i}:",
        "a shuffle from a lane that takes no part in it", threads=2),
    "a shuffle from a lane that has returned": Case(
        TID_IS_0 + "@!%p1 ret;\nshfl.sync.down.b32 %r1, %r0, 1, 31, -1;",
        "a shuffle from a lane that takes no part in it", threads=2),
    "a shuffle from a lane that the block lacks": Case(
        "shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;", "a shuffle from a lane that takes no part in it", threads=16),
    "lanes in two instructions for all of them": Case(
        TID_IS_0 + ZEROS + "@%p1 bra OTHER{i};\n" + MMA + "bra END{i};\nOTHER{i}:\n" + MMA + "END{i}:",
        "lanes of a warp in different instructions that are .aligned", threads=32),
    "warps that are whole": Case(
        TID_IS_0 + ZEROS + "shfl.sync.down.b32 %r2, %r0, 16, 31, -1;\n" + MMA + "@!%p1 bra END{i};\n"
        "vote.sync.any.pred %p2, %p1, 1;\nshfl.sync.idx.b32 %r2, %r0, 0, 31, 1;\nEND{i}:\nbar.warp.sync -1;",
        threads=32),
}
NAMES = {name: f"kernel{i}" for i, name in enumerate(CASES)}


WAITING = {  # lines of a kernel on 32 threads that cannot go on, and what is said
    "a lane of an mma that has returned": (TID_IS_0 + ZEROS + "@%p1 ret;\n" + MMA,
                                           r"threads 1-31 waiting in mma.m16n8k8.tf32 \(PTX line \d+ "),
    "a member of a shuffle that waits elsewhere": (
        TID_IS_0 + "@%p1 bra.uni END{i};\nshfl.sync.idx.b32 %r1, %r0, 0, 31, -1;\nEND{i}:\nbar.sync 0;",
        r"thread 0 waiting in __syncthreads \(no source line:0\); threads 1-31 waiting in shfl.idx \(PTX line \d+ "),
    "threads at two barriers": (  # of the source: the compiler may copy one of them
        TID_IS_0 + '.file 1 "a.cu"\n@%p1 bra OTHER{i};\n.loc 1 7 0\nbar.sync 0;\nbra END{i};\nOTHER{i}:\n.loc 1 8 0\n'
        "bar.sync 0;\nEND{i}:",
        r"different __syncthreads\n.*thread 0 waiting in __syncthreads \(a.cu:8\); threads 1-31 waiting .*\(a.cu:7\)"),
}
NAMES |= {name: f"kernel{i}" for i, name in enumerate(WAITING, len(CASES))}


@functools.cache
def all_kernels() -> str:
    """One PTX text, to be built once."""
    lines = [case.lines for case in CASES.values()] + [lines for lines, _ in WAITING.values()]
    return "".join(kernel(text.replace("{i}", str(i)), name=f"kernel{i}") for i, text in enumerate(lines))


def launch(name: str, threads: int, dtype: type = np.float32) -> None:
    floats = host_ptx.PtxExecutor().empty((8,), dtype)
    floats[:4] = 1
    run(all_kernels(), floats, np.zeros(8, np.uint32), threads=threads, shared_bytes=512, name=NAMES[name])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].said])
def test_mistake_is_reported_with_its_place(name):
    with pytest.raises(host_ptx.Fault) as report:
        launch(name, CASES[name].threads, CASES[name].floats)
    said = str(report.value).splitlines()[0]
    assert said.startswith(f"{NAMES[name]}: PTX line ") and CASES[name].said in said
    assert "; block 0 0 0, thread " in said


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].said])
def test_correct_code_gives_no_alarm(name):
    launch(name, CASES[name].threads, CASES[name].floats)


@pytest.mark.parametrize("name", WAITING)
def test_threads_that_wait_in_vain_are_named_with_their_lines(name):
    with pytest.raises(host_cuda.Deadlock, match=WAITING[name][1]):
        launch(name, threads=32)


def test_register_that_is_written_for_certain_is_not_checked_in_the_run():
    written, unwritten = "mov.u32 %r2, 1;\nTURN:\nadd.u32 %r2, %r2, 1;\nbra TURN;", "add.u32 %r1, %r2, 1;"
    texts = [translate(parse(HEAD + kernel(lines)), 90).text for lines in (written, unwritten)]
    assert ["checked(" in text for text in texts] == [False, True]


# ---- Barriers among blocks -------------------------------------------------------------------------------------------

def barriers(end: str) -> None:
    """Two blocks meet twice at a barrier, and do more."""
    source = runtime.assemble("test.cu", """
        #include "barrier.cuh"
        extern "C" __global__ void kernel(unsigned *counters)
        {
            Group group(counters, 0, blockIdx.x, gridDim.x);
            group.barrier();
            group.barrier();
            END
        }""".replace("END", end), {})
    host_ptx.PtxExecutor().launch(source, "kernel", (2, 1, 1), (32, 1, 1), [np.zeros(32, np.uint32)], 0, True)


def test_blocks_that_leave_a_barrier_as_it_was_give_no_alarm():
    barriers("group.leave();")


def test_counter_that_a_launch_leaves_changed_is_reported():
    said = r"kernel: PTX line \d+ \(kernels/ptx.cuh:\d+\): a counter that is not as it was before the launch; " \
           r"address 0x\w+, then 0, now 4; block [01] 0 0, thread 0 0 0"
    with pytest.raises(host_ptx.Fault, match=said):
        barriers("")


def test_block_that_arrives_more_often_than_another_is_reported():
    said = r"kernel: PTX line \d+ \(kernels/ptx.cuh:\d+\): a block that arrives at a counter more often than another " \
           r"block; address 0x\w+, 3 times, not 2; block 1 0 0, thread 0 0 0"
    with pytest.raises(host_ptx.Fault, match=said):
        barriers("if (blockIdx.x == 1) group.arrive(); group.leave();")


def test_read_ahead_of_every_write_is_reported_with_its_source_line():
    source = '''#line 1 "kernels/wrong.cu"
        extern "C" __global__ void kernel(float *x)
        {
            __shared__ float tile[32];
            if (threadIdx.x > 0)
                tile[threadIdx.x] = x[threadIdx.x];
            __syncthreads();
            x[threadIdx.x] = tile[31 - threadIdx.x];
        }'''
    said = r"^kernel: PTX line \d+ \(kernels/wrong.cu:7\): shared memory read before it is written; address 0, " \
           r"4 bytes; block 0 0 0, thread 31 0 0"
    with pytest.raises(host_ptx.Fault, match=said):
        host_ptx.PtxExecutor().launch(source, "kernel", (1, 1, 1), (32, 1, 1), [np.ones(32, np.float32)], 0, False)
