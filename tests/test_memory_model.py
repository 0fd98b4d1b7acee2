"""The weak memory of tests/host_ptx, on litmus tests of the PTX memory model: an outcome that the model forbids never
shows, and a weak outcome that it allows does.

Source: PTX ISA, "Memory Consistency Model"; the tests' names and shapes are those of Alglave, Maranget and Tautschnig,
"Herding Cats", 2014, and of Lustig, Sahasrabuddhe and Giroux, "A Formal Analysis of the NVIDIA PTX Memory Consistency
Model", 2019.
"""

import ctypes
import functools
import re
from typing import NamedTuple

import numpy as np
import pytest

from tests import host_cuda, host_ptx
from tests.helpers.ptx import HEAD, kernel

pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")

SEEDS = 60
"""Launches of a litmus test in each schedule."""


Outcomes = set[tuple[int, ...]] | frozenset[tuple[int, ...]]


class Litmus(NamedTuple):
    """What each thread does, and the results of all loads, thread by thread.

    A line is an instruction, then for an access the word, x, y or z, and for a store or an atomic its value. Words are
    zero at the start.
    """

    threads: list[str]  # lines with ";" between them
    forbidden: Outcomes = frozenset()
    shows: Outcomes = frozenset()
    in_block: int = 1  # threads per block


def mp(writer: str, reader: str, **outcomes) -> Litmus:
    """Message passing: may the reader see the flag, y, and miss the data, x?"""
    return Litmus([f"st x 1; {writer}", f"{reader}; ld x"], **outcomes)


STALE, WEAK, ANY = {(1, 0)}, {(1, 0), (0, 0), (1, 1)}, {(0, 0), (1, 1)}

MESSAGE_PASSING = {
    "MP": mp("st y 1", "ld y", shows=WEAK),
    "MP+relaxed": mp("st.relaxed.gpu y 1", "ld.relaxed.gpu y", shows=WEAK),
    "MP+volatile": mp("st.volatile y 1", "ld.volatile y", shows=WEAK),
    "MP+release+relaxed": mp("st.release.gpu y 1", "ld.relaxed.gpu y", shows=WEAK),
    "MP+relaxed+acquire": mp("st.relaxed.gpu y 1", "ld.acquire.gpu y", shows=WEAK),
    "MP+release+weak": mp("st.release.gpu y 1", "ld y", shows=WEAK),
    "MP+release+acquire": mp("st.release.gpu y 1", "ld.acquire.gpu y", forbidden=STALE, shows=ANY),
    "MP+red.release+acquire": mp("red.release.gpu y 1", "ld.acquire.gpu y", forbidden=STALE, shows=ANY),
    "MP+red.relaxed+acquire": mp("red.relaxed.gpu y 1", "ld.acquire.gpu y", shows=WEAK),
    "MP+atom.release+atom.acquire": mp("atom.release.gpu.add y 1", "atom.acquire.gpu.add y 0",
                                       forbidden={(0, 1, 0)}, shows={(0, 0, 0), (0, 1, 1)}),
    "MP+atoms": mp("atom.add y 1", "atom.add y 0", shows={(0, 1, 0)}),
    "MP+fences": mp("fence.acq_rel.gpu; st.relaxed.gpu y 1", "ld.relaxed.gpu y; fence.acq_rel.gpu",
                    forbidden=STALE, shows=ANY),
    "MP+membars+volatile": mp("membar.gl; st.volatile y 1", "ld.volatile y; membar.gl", forbidden=STALE, shows=ANY),
    "MP+fence+relaxed": mp("fence.acq_rel.gpu; st.relaxed.gpu y 1", "ld.relaxed.gpu y", shows=WEAK),
    "MP+relaxed+fence": mp("st.relaxed.gpu y 1", "ld.relaxed.gpu y; fence.acq_rel.gpu", shows=WEAK),
    "MP+fences+weak": mp("fence.acq_rel.gpu; st y 1", "ld y; fence.acq_rel.gpu", shows=WEAK),
    "MP+fences of blocks": mp("fence.acq_rel.cta; st.relaxed.gpu y 1", "ld.relaxed.gpu y; fence.acq_rel.cta",
                              shows=WEAK),
    "MP+release.cta": mp("st.release.cta y 1", "ld.acquire.gpu y", shows=WEAK),
    "MP+acquire.cta": mp("st.release.gpu y 1", "ld.acquire.cta y", shows=WEAK),
    "MP+poll, then acquire": Litmus(["st x 1; red.release.gpu y 1", "ld.relaxed.gpu y; ld.acquire.gpu y; ld x"],
                                    forbidden={(1, 1, 0), (1, 0, 0), (1, 0, 1), (0, 1, 0)},
                                    shows={(0, 0, 0), (0, 1, 1), (1, 1, 1)}),
    "MP in a block+cta": mp("st.release.cta y 1", "ld.acquire.cta y", forbidden=STALE, shows=ANY, in_block=2),
    "MP in a block+fences": mp("fence.acq_rel.cta; st.relaxed.cta y 1", "ld.relaxed.cta y; fence.acq_rel.cta",
                               forbidden=STALE, shows=ANY, in_block=2),
    # So many writes to y that its history forgets the first: whoever still reads 1 sees what was released with it.
    "MP+release+acquire, forgotten": mp("st.release.gpu y 1" + 7 * "; st.relaxed.gpu y 2", "ld.acquire.gpu y",
                                        forbidden=STALE, shows={(1, 1), (2, 0)}),
    "MP in a block+cta, forgotten": mp("st.release.cta y 1" + 7 * "; st.relaxed.cta y 2", "ld.acquire.cta y",
                                       forbidden=STALE, shows={(1, 1), (2, 0)}, in_block=2),
    "MP in a block": mp("st.relaxed.cta y 1", "ld.relaxed.cta y", shows=WEAK, in_block=2),
}


def sb(between: str, forbidden: Outcomes = frozenset(), shows: Outcomes = frozenset()) -> Litmus:
    """Store buffering: may both threads miss the other one's store?"""
    return Litmus([f"st.relaxed.gpu x 1; {between}ld.relaxed.gpu y", f"st.relaxed.gpu y 1; {between}ld.relaxed.gpu x"],
                  forbidden, shows)


BOTH_MISS, ONE_MISSES = {(0, 0)}, {(0, 1), (1, 0)}

STORE_BUFFERING = {
    "SB": sb("", shows=BOTH_MISS | ONE_MISSES),
    "SB+fence.acq_rel": sb("fence.acq_rel.gpu; ", shows=BOTH_MISS | ONE_MISSES),
    "SB+fence.sc": sb("fence.sc.gpu; ", forbidden=BOTH_MISS, shows=ONE_MISSES),
    "SB+membar": sb("membar.gl; ", forbidden=BOTH_MISS, shows=ONE_MISSES),
    "SB+fence.sc of blocks": sb("fence.sc.cta; ", shows=BOTH_MISS),
    "SB+release+acquire": Litmus(["st.release.gpu x 1; ld.acquire.gpu y", "st.release.gpu y 1; ld.acquire.gpu x"],
                                 shows=BOTH_MISS | ONE_MISSES),
}


def lb(between: str) -> Litmus:
    """Load buffering: may both threads see a store that comes after the other one's load? This model never shows it,
    although PTX allows it without fences."""
    return Litmus([f"ld.relaxed.gpu x; {between}st.relaxed.gpu y 1", f"ld.relaxed.gpu y; {between}st.relaxed.gpu x 1"],
                  forbidden={(1, 1)}, shows={(0, 0), (0, 1), (1, 0)})


LOAD_BUFFERING = {"LB": lb(""), "LB+fences": lb("fence.acq_rel.gpu; ")}


def iriw(load: str, between: str, **outcomes) -> Litmus:
    """Independent reads of independent writes: may two readers disagree which write came first?"""
    return Litmus(["st.relaxed.gpu x 1", "st.relaxed.gpu y 1", f"{load} x; {between}{load} y",
                   f"{load} y; {between}{load} x"], **outcomes)


DISAGREE = {(1, 0, 1, 0)}

SEVERAL_WRITERS = {
    "IRIW": iriw("ld.relaxed.gpu", "", shows=DISAGREE),
    "IRIW+acquire": iriw("ld.acquire.gpu", "", shows=DISAGREE),
    "IRIW+fence.acq_rel": iriw("ld.relaxed.gpu", "fence.acq_rel.gpu; ", shows=DISAGREE),
    "IRIW+fence.sc": iriw("ld.relaxed.gpu", "fence.sc.gpu; ", forbidden=DISAGREE, shows={(1, 1, 1, 1), (1, 0, 1, 1)}),
    "WRC": Litmus(["st.relaxed.gpu x 1", "ld.relaxed.gpu x; st.relaxed.gpu y 1", "ld.relaxed.gpu y; ld x"],
                  shows={(1, 1, 0), (1, 1, 1)}),
    "WRC+release+acquire": Litmus(["st.relaxed.gpu x 1", "ld.relaxed.gpu x; st.release.gpu y 1",
                                   "ld.acquire.gpu y; ld x"], forbidden={(1, 1, 0)}, shows={(1, 1, 1), (0, 1, 0)}),
    "WRC+weak load": Litmus(["st.relaxed.gpu x 1", "ld x; st.release.gpu y 1", "ld.acquire.gpu y; ld x"],
                            shows={(1, 1, 0)}),
    "WRC+weak store": Litmus(["st x 1", "ld.relaxed.gpu x; st.release.gpu y 1", "ld.acquire.gpu y; ld x"],
                             shows={(1, 1, 0)}),
    "ISA2": Litmus(["st x 1; st.release.gpu y 1", "ld.acquire.gpu y; st.release.gpu z 1", "ld.acquire.gpu z; ld x"],
                   forbidden={(1, 1, 0)}, shows={(1, 1, 1), (0, 1, 0)}),
    "ISA2+relaxed": Litmus(["st x 1; st.release.gpu y 1", "ld.relaxed.gpu y; st.release.gpu z 1",
                            "ld.acquire.gpu z; ld x"], shows={(1, 1, 0)}),
    # An atomic continues what it replaces; a store does not. Whoever sees 3 sees both additions.
    "release sequence+red": Litmus(["st x 1; red.release.gpu y 1", "red.relaxed.gpu y 2", "ld.acquire.gpu y; ld x"],
                                   forbidden={(1, 0), (3, 0)}, shows={(3, 1), (2, 0), (1, 1)}),
    "release sequence+store": Litmus(["st x 1; st.release.gpu y 1", "atom.add y 0; st.relaxed.gpu y 2",
                                      "ld.acquire.gpu y; ld x"], forbidden={(0, 1, 0), (1, 1, 0)},
                                     shows={(1, 2, 0), (1, 2, 1)}),
}

COHERENCE = {
    "CoRR": Litmus(["st.relaxed.gpu x 1", "ld.relaxed.gpu x; ld.relaxed.gpu x"], forbidden={(1, 0)},
                   shows={(0, 0), (0, 1), (1, 1)}),
    "CoRR+weak": Litmus(["st x 1", "ld x; ld x"], shows={(1, 0), (0, 1)}),
    "CoRR+relaxed, then weak": Litmus(["st.relaxed.gpu x 1", "ld.relaxed.gpu x; ld x"], forbidden={(1, 0)},
                                      shows={(0, 1), (1, 1)}),
    "CoWR": Litmus(["st x 1; ld x", "st x 2"], forbidden={(0,)}, shows={(1,)}),
    "CoWR+relaxed": Litmus(["st.relaxed.gpu x 1; ld.relaxed.gpu x", "st.relaxed.gpu x 2"], forbidden={(0,)},
                           shows={(1,), (2,)}),
    "atomicity+add": Litmus(["atom.add x 1", "atom.add x 1", "atom.add x 1"],
                            forbidden={(a, b, c) for a in range(3) for b in range(3) for c in range(3)
                                       if len({a, b, c}) < 3}, shows={(0, 1, 2), (2, 1, 0)}),
    "atomicity+exch": Litmus(["atom.exch x 1", "atom.exch x 2"], forbidden={(0, 0), (2, 1)}, shows={(0, 1), (2, 0)}),
    "atomics do not go back": Litmus(["st.relaxed.gpu x 1", "ld.relaxed.gpu x; atom.add x 0; ld.relaxed.gpu x"],
                                     forbidden={(1, 0, 0), (1, 0, 1), (1, 1, 0), (0, 1, 0)},
                                     shows={(0, 0, 1), (0, 1, 1), (1, 1, 1)}),
    "words of 8 bytes are not torn": Litmus(["st.relaxed.gpu.u64 x 0x0000000100000001", "ld.relaxed.gpu.u64 x"],
                                            shows={(0,), (0x0000000100000001,)},
                                            forbidden={(1,), (0x0000000100000000,)}),
    "vectors are torn": Litmus(["st.v2 x 1", "ld.v2 x"], shows={(0,), (1,), (1 << 32,), (1 << 32 | 1,)}),
}

WORK = "st x 1"
BARRIERS = {  # blocks of two threads: 0 and 1, 2 and 3
    "barrier, release, acquire, barrier": Litmus(
        [WORK + "; bar", "bar; red.release.gpu y 1", "ld.acquire.gpu y; bar", "bar; ld x"],
        forbidden={(1, 0)}, shows={(0, 0), (1, 1)}, in_block=2),
    "no barrier ahead of the release": Litmus(
        [WORK, "red.release.gpu y 1", "ld.acquire.gpu y; bar", "bar; ld x"], shows={(1, 0), (1, 1)}, in_block=2),
    "no barrier behind the acquire": Litmus(
        [WORK + "; bar", "bar; red.release.gpu y 1", "ld.acquire.gpu y", "ld x"], shows={(1, 0), (1, 1)}, in_block=2),
    "barrier alone": Litmus(
        [WORK + "; bar", "bar; red.relaxed.gpu y 1", "ld.acquire.gpu y; bar", "bar; ld x"], shows={(1, 0)},
        in_block=2),
    "barrier in a block": Litmus(["st x 1; bar", "bar; ld x"], forbidden={(0,)}, shows={(1,)}, in_block=2),
    "nothing in a block": Litmus(["st x 1", "ld x"], shows={(0,), (1,)}, in_block=2),
    "warp barrier in a block": Litmus(["st x 1; warp", "warp; ld x"], forbidden={(0,)}, shows={(1,)}, in_block=2),
    "warp barrier, release": Litmus(
        [WORK + "; warp", "warp; red.release.gpu y 1", "ld.acquire.gpu y; warp", "warp; ld x"],
        forbidden={(1, 0)}, shows={(0, 0), (1, 1)}, in_block=2),
    "last block": Litmus(  # as in gru.cu: who arrives last sees the work of the other
        ["st x 1; membar.gl; atom.add y 1; membar.gl; ld z", "st z 1; membar.gl; atom.add y 1; membar.gl; ld x"],
        forbidden={(0, 1, 1, 0), (1, 0, 0, 1), (1, 0, 0, 0), (0, 0, 1, 0)}, shows={(0, 0, 1, 1), (1, 1, 0, 0)}),
    "last block without fences": Litmus(
        ["st x 1; atom.add y 1; ld z", "st z 1; atom.add y 1; ld x"], shows={(0, 0, 1, 0), (1, 0, 0, 0)}),
}

COPIES = {
    "copy behind the acquire": Litmus(["st x 1; st.release.gpu y 1", "ld.acquire.gpu y; start x; end"],
                                      forbidden={(1, 0)}, shows={(0, 0), (1, 1)}),
    "copy ahead of the acquire": Litmus(["st x 1; st.release.gpu y 1", "start x; ld.acquire.gpu y; end"],
                                        shows={(1, 0), (1, 1), (0, 1)}),
}

LITMUS = (MESSAGE_PASSING | STORE_BUFFERING | LOAD_BUFFERING | SEVERAL_WRITERS | COHERENCE | BARRIERS | COPIES)


def _lines(thread: str, number: int, start: int) -> tuple[list[str], int]:
    """PTX of a thread whose results begin at index `start`, and where the results of the next thread begin."""
    lines = []
    for part in thread.split("; "):
        operation, *operands = part.split()
        at = f"[%rd0+{64 * 'xyz'.index(operands[0])}]" if operands else ""
        wide = operation.endswith((".u64", ".v2"))
        value = operands[1] if len(operands) > 1 else ""
        result = f"st.global.u64 [%rd1+{8 * start}], %rd2;"
        if operation == "bar":
            lines.append("bar.sync 0;")
        elif operation == "warp":
            lines.append("bar.warp.sync 3;")
        elif operation.startswith(("fence", "membar")):
            lines.append(f"{operation};")
        elif operation == "start":
            lines.append(f"mov.u32 %r2, 0;\ncp.async.ca.shared.global [%r2], {at}, 4;\ncp.async.commit_group;")
        elif operation == "end":
            lines.append(f"cp.async.wait_group 0;\nld.shared.u32 %r1, [%r2];\ncvt.u64.u32 %rd2, %r1;\n{result}")
        elif operation == "st.v2":
            lines.append(f"mov.u32 %r1, {value};\nst.global.v2.u32 {at}, {{%r1, %r1}};")
        elif operation == "ld.v2":
            lines.append(f"ld.global.v2.u32 {{%r1, %r2}}, {at};\nmov.b64 %rd2, {{%r1, %r2}};\n{result}")
        elif operation.startswith("st"):
            name, register = operation.removesuffix(".u64"), "%rd2" if wide else "%r1"
            type_ = "u64" if wide else "u32"
            lines.append(f"mov.{type_} {register}, {value};\n{name}.global.{type_} {at}, {register};")
        elif operation.startswith("red"):
            lines.append(f"mov.u32 %r1, {value};\n{operation}.global.add.u32 {at}, %r1;")
        elif operation.startswith("atom"):
            *name, change = operation.split(".")
            type_ = "u32" if change == "add" else "b32"
            lines.append(f"mov.u32 %r1, {value};\n{'.'.join(name)}.global.{change}.{type_} %r1, {at}, %r1;\n"
                         f"cvt.u64.u32 %rd2, %r1;\n{result}")
        elif wide:
            lines.append(f"{operation.removesuffix('.u64')}.global.u64 %rd2, {at};\n{result}")
        else:
            lines.append(f"{operation}.global.u32 %r1, {at};\ncvt.u64.u32 %rd2, %r1;\n{result}")
        start += result in lines[-1]
    return [f"$thread{number}:", *lines, "ret;"], start


def _kernel(name: str, litmus: Litmus) -> tuple[str, int]:
    """PTX of a litmus test, and the number of its results."""
    branches, bodies, results = [], [], 0
    for number, thread in enumerate(litmus.threads):
        branches.append(f"setp.eq.s32 %p0, %r0, {number};\n@%p0 bra $thread{number};")
        lines, results = _lines(thread, number, results)
        bodies += lines
    index = "mov.u32 %r3, %ctaid.x;\nmov.u32 %r4, %ntid.x;\nmov.u32 %r5, %tid.x;\nmad.lo.s32 %r0, %r3, %r4, %r5;"
    return kernel("\n".join((index, *branches, "ret;", *bodies)), name=name), results


def _name(litmus: str) -> str:
    return "t_" + re.sub(r"\W", "_", litmus)


@functools.cache
def built() -> tuple[host_ptx.Built, dict[str, int]]:
    """All litmus tests in one module, and the number of results of each."""
    kernels = {name: _kernel(_name(name), litmus) for name, litmus in LITMUS.items()}
    text = HEAD + "".join(text for text, _ in kernels.values())
    return (host_ptx.build_ptx(text, "sm_90", weak=True), {name: results for name, (_, results) in kernels.items()})


def outcome_of(name: str, schedule: str, seed: int) -> tuple[int, ...]:
    """What a litmus test's loads give in a launch."""
    module, results = built()
    threads, in_block = len(LITMUS[name].threads), LITMUS[name].in_block
    request = host_cuda.Request(_name(name).encode(), (ctypes.c_uint32 * 3)(threads // in_block, 1, 1),
                                (ctypes.c_uint32 * 3)(in_block, 1, 1), 64, True,
                                schedule=1 + host_ptx.SCHEDULES.index(schedule), seed=seed)
    words, out = np.zeros(48, np.uint32), np.zeros(results[name], np.uint64)
    host_ptx.run(module, request, [words, out], check_counters=False)
    return tuple(map(int, out))


@pytest.mark.parametrize("name", LITMUS)
def test_forbidden_outcomes_never_show_and_weak_ones_do(name):
    litmus = LITMUS[name]
    outcomes = {outcome_of(name, schedule, seed) for schedule in host_ptx.SCHEDULES for seed in range(SEEDS)}
    assert not outcomes & litmus.forbidden, outcomes
    assert outcomes >= litmus.shows, outcomes


def test_a_seed_gives_the_same_outcome_again():
    """And others give others: the choices come from the seed alone."""
    first = [outcome_of("IRIW", "random", seed) for seed in range(40)]
    assert first == [outcome_of("IRIW", "random", seed) for seed in range(40)]
    assert len(set(first)) > 4
