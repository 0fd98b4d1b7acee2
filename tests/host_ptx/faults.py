"""Faults planted in what only a device build has, each of which a check of checks.py has to catch from PTX.

    python -m tests.host_ptx.faults [NAME...]   # all, or some; exit status 1 where one is not as the table says

A fault is caught where the check that it names fails, or the executor reports a fault or a deadlock, in any of the
orders of threads. A fault that cannot matter has to pass the check in all of them.
"""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

from char_gru.kernels import runtime
from tests import host_cuda, host_ptx
from tests.helpers.recurrence import assert_matches_reference, on_device
from tests.host_ptx.checks import SHARED_BYTES, checks
from tests.test_gru_persistent import Cut

__all__ = ["FAULTS", "Fault", "outcome", "wrong_entry"]

SECONDS = 300
"""A fault whose check takes longer, as in a loop without end, is caught."""

SAME_PTX = "the compiler makes the same PTX of both"


class Fault(NamedTuple):
    """A text of a file in kernels/, the first behind `place`, that becomes another, and the check that catches it. A
    fault in a header is planted in one of the modules that the check runs.

    harmless: why no check can catch the fault; such a fault has to pass. weak: it shows only where memory is as late
    and as stale as the PTX memory model allows.
    """

    file: str
    place: str
    old: str
    new: str
    check: str
    harmless: str = ""
    weak: bool = False


PTX, BARRIER, GRU = "ptx.cuh", "barrier.cuh", "gru.cu"
LDMATRIX, LDMATRIX_TRANS = "void ldmatrix_x4(", "void ldmatrix_x4_trans("
TF32, BF16 = "void mma_m16n8k8_tf32(", "void mma_m16n8k16_bf16("
COPY_16, COPY_4 = "void cp_async_16(", "void cp_async_4("
COMMIT, WAIT = "void cp_async_commit()", "void cp_async_wait()"
A_AND_B = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])'
PRODUCT, PRODUCT_TF32 = "product multistage 192 bf16 of bf16 ", "product multistage 192 tf32 nt"
PRODUCT_FP32 = "product multistage 192 fp32 nt"
FORWARD_TF32, FORWARD_BF16 = "gru persistent tf32", "gru persistent bf16"
FORWARD, STEPWISE = "gru persistent fp32", "gru stepwise fp32"
TEXT = "text persistent fp32 rows=17 layers=2 with options"
TRAINING, SPLIT = "training fp32", "gru persistent fp32 of four splits of K"
BATCHED = "text batched fp32 rows=17 layers=1 with options"
LOSS = "loss tf32 B=300 H=164 V=75"

PRODUCT_OF_TF32, WRITE_BF16 = "product tiled 64 tf32 nn", "generate persistent bf16 rows=1"
WRITE_MANY = "text batched fp32 rows=17 layers=1 temperature=0"
MODULES = {FORWARD: "gru_forward_persistent", TEXT: "generate_persistent", WRITE_BF16: "generate_persistent",
           TRAINING: "gru_forward_persistent", "training tf32": "gru_forward_persistent",
           WRITE_MANY: "generate_batched", BATCHED: "generate_batched",
           FORWARD_TF32: "gru_forward_persistent", FORWARD_BF16: "gru_forward_persistent",
           "input_table bf16": "matmul", PRODUCT_OF_TF32: "matmul", LOSS: "cross_entropy"}
"""Check -> the stem of the module in which faults of headers are planted; matmul_multistage where none is named."""


def _matrices() -> dict[str, Fault]:
    """ldmatrix and mma."""
    faults = {}
    for name, place, check in (("ldmatrix", LDMATRIX, PRODUCT + "nt"),
                               ("ldmatrix.trans", LDMATRIX_TRANS, PRODUCT + "nn")):
        faults |= {
            f"{name}: registers exchanged": Fault(PTX, place, "{%0, %1, %2, %3}", "{%0, %2, %1, %3}", check),
            f"{name}: halves of k exchanged": Fault(PTX, place, "{%0, %1, %2, %3}", "{%2, %3, %0, %1}", check),
            f"{name}: two matrices": Fault(PTX, place, "x4", "x2", check),
            f"{name}: the next 16 bytes": Fault(
                PTX, place, "(__cvta_generic_to_shared(row))", "(__cvta_generic_to_shared(row)) + 16", check),
            f"{name}: not aligned": Fault(
                PTX, place, "(__cvta_generic_to_shared(row))", "(__cvta_generic_to_shared(row)) + 2", check),
        }
    faults |= {
        "ldmatrix: transposed": Fault(PTX, LDMATRIX, "x4.shared", "x4.trans.shared", PRODUCT + "nt"),
        "ldmatrix.trans: not transposed": Fault(PTX, LDMATRIX_TRANS, ".trans", "", PRODUCT + "nn"),
    }
    for name, place, check in (("mma tf32", TF32, FORWARD_TF32), ("mma bf16", BF16, FORWARD_BF16)):
        def of_a_and_b(order, check=check, place=place, harmless=""):
            return Fault(PTX, place, A_AND_B, ", ".join(f'"r"({word[0]}[{word[1]}])' for word in order.split()), check,
                         harmless)

        faults |= {
            f"{name}: rows of A exchanged": of_a_and_b("a1 a0 a3 a2 b0 b1"),
            f"{name}: k of A exchanged": of_a_and_b("a2 a3 a0 a1 b0 b1"),
            f"{name}: a register of A twice": of_a_and_b("a0 a1 a2 a2 b0 b1", check + " in many tiles"),
            f"{name}: k of B exchanged": of_a_and_b("a0 a1 a2 a3 b1 b0"),
            f"{name}: k of A and of B exchanged": of_a_and_b(
                "a2 a3 a0 a1 b1 b0", harmless="the same products, added in another order"),
            f"{name}: sums exchanged": Fault(PTX, place, '{%8, %9}, {%0, %1, %2, %3}', '{%8, %9}, {%1, %0, %2, %3}',
                                             check),
            f"{name}: results exchanged": Fault(PTX, place, '"{%0, %1, %2, %3}, {%4', '"{%0, %2, %1, %3}, {%4', check),
            f"{name}: B by rows": Fault(PTX, place, "row.col", "row.row", check),
        }
    return faults | {
        "mma tf32: half of k": Fault(PTX, TF32, "m16n8k8.", "m16n8k4.", FORWARD_TF32),
        "mma bf16: half of k": Fault(PTX, BF16, "m16n8k16.", "m16n8k8.", FORWARD_BF16),
        "mma bf16: as fp16": Fault(PTX, BF16, "bf16.bf16", "f16.f16", FORWARD_BF16),
        "mma tf32: as bf16": Fault(PTX, TF32, "m16n8k8.row.col.f32.tf32.tf32", "m16n8k16.row.col.f32.bf16.bf16",
                                   FORWARD_TF32),
    }


TO_BF16, PACK, TO_TF32 = "unsigned short to_bf16(float x)", "unsigned pack_bf16(", "unsigned to_tf32(float x)"

CONVERSIONS = {
    "to_bf16: truncated": Fault(PTX, TO_BF16, "cvt.rn", "cvt.rz", FORWARD_BF16),
    "to_bf16: of another sign": Fault(PTX, TO_BF16, '"f"(x)', '"f"(-x)', FORWARD_BF16),
    "pack_bf16: halves exchanged": Fault(PTX, PACK, '"f"(high), "f"(low)', '"f"(low), "f"(high)', WRITE_BF16),
    "pack_bf16: halves exchanged in both operands": Fault(
        PTX, PACK, '"f"(high), "f"(low)', '"f"(low), "f"(high)', "input_table bf16",
        "the same products, added in another order"),
    "pack_bf16: one half twice": Fault(PTX, PACK, '"f"(high)', '"f"(low)', WRITE_BF16),
    "pack_bf16: truncated": Fault(PTX, PACK, "cvt.rn.bf16x2", "cvt.rz.bf16x2", WRITE_BF16),
    "to_tf32: left out": Fault(PTX, TO_TF32, "cvt.rna.tf32.f32", "mov.b32", PRODUCT_OF_TF32),
    "to_tf32: to even": Fault(PTX, TO_TF32, "cvt.rna", "cvt.rn", PRODUCT_OF_TF32),
    "opaque: left out": Fault(PTX, "unsigned opaque(", 'asm volatile("" : "+r"(bits));', "", WRITE_MANY,
                              "it hides a value from the compiler and computes nothing"),
    "opaque: another value": Fault(PTX, "unsigned opaque(", '""', '"xor.b32 %0, %0, 0x00800000;"', WRITE_MANY),
}

COPIES = {
    "cp.async 16: of 8 bytes": Fault(PTX, COPY_16, "16, %2", "8, %2", PRODUCT_TF32),
    "cp.async 16: never zeros": Fault(PTX, COPY_16, "inside ? 16 : 0", "16", PRODUCT_TF32),
    "cp.async 16: zeros inside": Fault(PTX, COPY_16, "inside ? 16 : 0", "inside ? 0 : 16", PRODUCT_TF32),
    "cp.async 16: of the next 16 bytes": Fault(PTX, COPY_16, '"l"(global)', '"l"((const char *)global + 16)',
                                               PRODUCT_TF32),
    "cp.async 16: not aligned": Fault(PTX, COPY_16, '"l"(global)', '"l"((const char *)global + 4)', PRODUCT_TF32),
    "cp.async 16: to the next 16 bytes": Fault(PTX, COPY_16, "(shared))", "(shared)) + 16", PRODUCT_TF32),
    "cp.async 16: by way of L1": Fault(PTX, COPY_16, ".cg", ".ca", PRODUCT_TF32, "no launch writes what it copies"),
    "cp.async 4: of 8 bytes": Fault(PTX, COPY_4, "4, %2", "8, %2", PRODUCT_FP32),
    "cp.async 4: never zeros": Fault(PTX, COPY_4, "inside ? 4 : 0", "4", PRODUCT_FP32),
    "cp.async 4: of the next number": Fault(PTX, COPY_4, '"l"(global)', '"l"((const char *)global + 4)', PRODUCT_FP32),
    "cp.async commit: left out": Fault(PTX, COMMIT, 'asm volatile("cp.async.commit_group;" ::: "memory");', "",
                                       PRODUCT_TF32),
    "cp.async wait: for a group less": Fault(PTX, WAIT, '"n"(Pending)', '"n"(Pending + 1)', PRODUCT_TF32),
    "cp.async wait: for a group less, loss": Fault(PTX, WAIT, '"n"(Pending)', '"n"(Pending + 1)', LOSS),
    "cp.async wait: left out": Fault(
        PTX, WAIT, 'asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");', "", PRODUCT_FP32),
    "cp.async wait: for all groups": Fault(PTX, WAIT, '"n"(Pending)', '"n"(0)', PRODUCT_TF32,
                                           "it waits longer, and no result depends on that"),
}

COUNTERS = {
    "add: two": Fault(PTX, "void add_release(", '"r"(value)', '"r"(value + 1)', BATCHED),
    "add: to another counter": Fault(PTX, "void add_release(", '"l"(counter)', '"l"(counter + 1)', BATCHED),
    "poll: of another counter": Fault(PTX, "unsigned load_relaxed(", '"l"(counter)', '"l"(counter + 1)', BATCHED),
    "poll: for one more": Fault(PTX, "void wait_at_least(", "< 0", "<= 0", BATCHED),
    "poll: for one less": Fault(PTX, "void wait_at_least(", "< 0", "< -1", BATCHED, weak=True),
    "acquire: left out": Fault(PTX, "void wait_at_least(", "    load_acquire(counter);\n", "", BATCHED, weak=True),
    "acquire: relaxed": Fault(PTX, "unsigned load_acquire(", "ld.acquire.gpu", "ld.relaxed.gpu", BATCHED, weak=True),
    "acquire: of another counter": Fault(PTX, "unsigned load_acquire(", '"l"(counter)', '"l"(counter + 1)', BATCHED,
                                         weak=True),
    "acquire: volatile": Fault(PTX, "unsigned load_acquire(", "ld.acquire.gpu", "ld.volatile", BATCHED, weak=True),
    "acquire: within a block": Fault(PTX, "unsigned load_acquire(", "ld.acquire.gpu", "ld.acquire.cta", BATCHED,
                                     weak=True),
    "release: relaxed": Fault(PTX, "void add_release(", "red.release.gpu", "red.relaxed.gpu", BATCHED, weak=True),
    "release: within a block": Fault(PTX, "void add_release(", "red.release.gpu", "red.release.cta", BATCHED,
                                     weak=True),
    "poll: volatile": Fault(PTX, "unsigned load_relaxed(", "ld.relaxed.gpu", "ld.volatile", BATCHED,
                            "a volatile load is a relaxed one of a wider scope", weak=True),
}

WORDS = {
    "word: to the next": Fault(PTX, "void store_word(", '"l"(to)', '"l"(to + 1)', FORWARD_TF32),
    "word: low half alone": Fault(PTX, "void store_word(", "st.relaxed.gpu.global.u64", "st.relaxed.gpu.global.u32",
                                  FORWARD_TF32),
    "words: the next two": Fault(PTX, "void load_two_words(", '"l"(from)', '"l"(from + 2)', FORWARD_TF32),
    "words: not aligned": Fault(PTX, "void load_two_words(", '"l"(from)', '"l"(from + 1)', FORWARD_TF32),
    "words: exchanged": Fault(PTX, "void load_two_words(", "{%0, %1}", "{%1, %0}", FORWARD_TF32),
    "words: one twice": Fault(PTX, "void load_two_words(", '"=l"(words[1])', '"=l"(words[0])', FORWARD_TF32),
    "words: missing in all lanes": Fault(PTX, "bool any_missing(", "__any_sync", "__all_sync", FORWARD),
    "words: never missing": Fault(PTX, "bool any_missing(", "__any_sync(0xffffffffu, missing)", "false", FORWARD),
    **{f"tag {name}: {what}": Fault("exchange.cuh", place, "number + 1", new, check)
       for name, place, recurrence in (("tf32", "constexpr unsigned TAG_MASK = 0x7fu;", FORWARD_TF32),
                                       ("fp32", "constexpr unsigned TAG_MASK = 0xffff0000u;", FORWARD))
       for what, new, check in (("of the number before", "number", recurrence),
                                ("never another", "1", f"training {name}"))},
    "packet tf32: a bit less of value 2": Fault("exchange.cuh", "word_of((a & TF32)", "c << 13", "c << 14",
                                                FORWARD_TF32),
    "packet tf32: no tag": Fault("exchange.cuh", "#if PRECISION == 1", "TAG_MASK = 0x7fu", "TAG_MASK = 0",
                                 FORWARD_TF32),
    "half: always the first": Fault("gru_forward_persistent.cu", "const auto exchanged", "% 2", "% 1", FORWARD),
    "half: always the first, backward": Fault("gru_backward_persistent.cu", "const auto exchanged", "% 2", "% 1",
                                              FORWARD),
    "half: always the first, partial sums": Fault("gru_backward_persistent.cu", "const size_t range_of_tile",
                                                  "number % 2", "number % 1", SPLIT, weak=True),
    "sums: overwritten early": Fault("gru_forward_persistent.cu", "publish(t + 1", "            __syncthreads();", "",
                                     FORWARD),
    "sums: overwritten early, backward": Fault("gru_backward_persistent.cu", "gradient_sums.end_tile(rows);\n",
                                               "            __syncthreads();", "", FORWARD),
    "numbers: begin again": Fault("words.cuh", "void leave_group(", "+ exchanges", "", TRAINING),
    "leave: one block early": Fault("words.cuh", "void leave_group(", "blocks - 1", "blocks - 2", TRAINING),
    "leave: leavers not reset": Fault("words.cuh", "void leave_group(", "atomicExch(left, 0u);", ";", TRAINING),
}

BARRIERS = {
    "target: one less": Fault(BARRIER, "void arrive()", "target += blocks", "target += blocks - 1", BATCHED),
    "target: one more": Fault(BARRIER, "void arrive()", "target += blocks", "target += blocks + 1", BATCHED),
    "arrival: by two threads": Fault(BARRIER, "void arrive()", "threadIdx.x == 0", "threadIdx.x < 2", BATCHED),
    "arrival: by another thread": Fault(BARRIER, "void arrive()", "threadIdx.x == 0", "threadIdx.x == 33", BATCHED,
                                        "any thread may arrive for its block"),
    "arrival: no barrier ahead": Fault(BARRIER, "void arrive()", "        __syncthreads();\n", "", BATCHED,
                                        weak=True),
    "wait: no barrier behind": Fault(BARRIER, "void wait() const", "        __syncthreads();\n", "", BATCHED),
    "wait: left out": Fault(BARRIER, "void wait() const", "            wait_at_least(counter, target);\n",
                            "            ;\n", BATCHED),
    "leave the barrier: one block early": Fault(BARRIER, "void leave() const", "blocks - 1", "blocks - 2", BATCHED),
    "leave the barrier: arrivals not reset": Fault(BARRIER, "void leave() const",
                                                   "            atomicExch(counter, 0u);\n", "", BATCHED),
    "leave the barrier: leavers not reset": Fault(BARRIER, "void leave() const",
                                                  "            atomicExch(left, 0u);\n", "", BATCHED),
    "last block: one early": Fault(GRU, "bool arrives_last(", "blocks - 1", "blocks - 2", STEPWISE),
    "last block: no barrier ahead": Fault(GRU, "__shared__ bool last;", "    __syncthreads();\n", "", STEPWISE,
                                          weak=True),
    "last block: no barrier behind": Fault(GRU, "atomicExch(arrived, 0u);\n    }\n", "    __syncthreads();\n", "",
                                           STEPWISE),
    "last block: counter not reset": Fault(GRU, "        if (last)\n", "            atomicExch(arrived, 0u);",
                                           "            ;", STEPWISE),
    "last block: no release": Fault(GRU, "if (threadIdx.x == 0) {\n", "        __threadfence();", "", STEPWISE,
                                    weak=True),
    "last block: no acquire": Fault(GRU, "blocks - 1;\n", "        __threadfence();", "", STEPWISE, weak=True),
    "last block: release within a block": Fault(GRU, "if (threadIdx.x == 0) {\n", "__threadfence()",
                                                "__threadfence_block()", STEPWISE, weak=True),
    "last block: acquire within a block": Fault(GRU, "blocks - 1;\n", "__threadfence()", "__threadfence_block()",
                                                STEPWISE, weak=True),
}



def _read_only(file: str, place: str, type_: str, address: str, check: str) -> Fault:
    """What other blocks write, read by __ldg."""
    return Fault(file, place, f"*reinterpret_cast<const {type_} *>({address})",
                 f"__ldg(reinterpret_cast<const {type_} *>({address}))", check)


READ_ONLY = {
    "__ldg: states, batched": _read_only(
        "resident_mma.cuh", "const uint4 words = ", "uint4", "x + m * 128 + lane() * 4", BATCHED),
    "__ldg: products of the other gates": Fault(GRU, "has_later ? dh_z_b", "product[state_size]",
                                                "__ldg(product + state_size)", STEPWISE),
}


WAITS = {
    f"{kernel}: no {what}": Fault(f"{kernel}.cu", place, old, ";", check)
    for kernel, what, place, old, check in (
        ("generate_persistent", "wait for characters", "layer == 0)\n",
         "read_characters(own_ids, characters_of(t), tag(t), rows);", TEXT),
        ("generate_batched", "wait for characters", "multiply(weights, t);\n",
         "read_characters(own_ids, characters_of(t), tag(t), rows);", BATCHED),
        ("generate_batched", "wait for states", "void step(", "group.wait();", BATCHED),
    )
}

LOGITS = {
    f"words of logits: {what}": Fault("generate_logits.cuh", place, old, new, TEXT)
    for what, place, old, new in (
        ("not waited for", "missing = from", "any_missing(", "false && any_missing("),
        ("any tag will do", "missing = nullptr", "upper_half(words[i / 2][i % 2]) != tag",
         "upper_half(words[i / 2][i % 2]) == 0"))
}

VOLATILE = {
    f"{name}: {what}": Fault(PTX, place, old, new, check, SAME_PTX)
    for name, place, check in (
        ("ldmatrix", LDMATRIX, PRODUCT + "nt"), ("ldmatrix.trans", LDMATRIX_TRANS, PRODUCT + "nn"),
        ("add", "void add_release(", BATCHED), ("poll", "unsigned load_relaxed(", BATCHED),
        ("acquire", "unsigned load_acquire(", BATCHED), ("store", "void store_word(", FORWARD),
        ("words", "void load_two_words(", FORWARD), ("mma tf32", TF32, FORWARD_TF32),
        ("mma bf16", BF16, FORWARD_BF16), ("cp.async 16", COPY_16, PRODUCT_TF32), ("cp.async 4", COPY_4, PRODUCT_FP32),
        ("cp.async commit", COMMIT, PRODUCT_TF32), ("cp.async wait", WAIT, PRODUCT_TF32))
    for what, old, new in (("not volatile", "asm volatile", "asm"), ("memory not named", ' "memory"', ""))
    if not (name.startswith("mma") and "memory" in what)
}

FAULTS = _matrices() | CONVERSIONS | COPIES | COUNTERS | WORDS | BARRIERS | READ_ONLY | WAITS | LOGITS | VOLATILE


class Planted(host_ptx.PtxExecutor):
    """Runs kernels that have a fault, or without one None."""

    def __init__(self, fault: Fault | None, **options):
        super().__init__("sm_90", **options)
        self.gpu = self.gpu._replace(shared_bytes=SHARED_BYTES)
        self.sources: dict[str, str] = {}  # of the launches: as it is -> as it ran
        self._fault = fault

    def _run(self, source, module, request, parameters, args):
        if source not in self.sources:
            self.sources[source] = planted(source, self._fault) if self._fault else source
        return super()._run(self.sources[source], module, request, parameters, args)


def planted(source: str, fault: Fault) -> str:
    """The source of a module with the fault, if it is planted in this module.

    Raises: ValueError where the file no longer has the place once, with the text behind it.
    """
    file = runtime._read(fault.file)
    if file.count(fault.place) != 1 or fault.old not in file.partition(fault.place)[2]:
        raise ValueError(f"{fault.file} has not once {fault.place!r} and behind it {fault.old!r}")
    stem, _, suffix = fault.file.partition(".")
    if suffix != "cu":
        stem = MODULES.get(fault.check.removesuffix(" in many tiles"), "matmul_multistage")
    if f'#line 1 "kernels/{stem}.cu"' not in source:
        return source
    before, place, after = source.partition(fault.place)
    return before + place + after.replace(fault.old, fault.new, 1)


def _four_splits() -> None:
    """A split of K needs the units of other ranges only, and may be a step ahead of its own range's other splits."""
    size = Cut(T=2, B=2, H=140, V=2, M=None, groups=1, rows=16, units=36, units_back=18, splits=4)
    assert_matches_reference(size.case, on_device(size.case, "fp32", size.plans("fp32")))


def executors(fault: Fault | None, weak: bool) -> Iterator[Planted]:
    """In each order of threads; or, for faults of the weak memory model, in each schedule."""
    if weak:
        for schedule, seed in (("random", 0), ("fast", 0), *(("starved", seed) for seed in range(12))):
            yield Planted(fault, schedule=schedule, seed=seed)
    else:
        for order in host_cuda.ORDERS:
            yield Planted(fault, order=order)


def outcome(fault: Fault | None, check: str, weak: bool) -> str:
    """How a check catches a fault: the first line of what is said; "" where it passes in all orders of threads.

    Raises: ValueError where no source has the fault, or does not compile with it.
    """
    for executor in executors(fault, weak):
        with runtime.use(executor):
            try:
                (checks() | {SPLIT: _four_splits})[check]()
            except host_cuda.BuildError as error:
                raise ValueError("the translated kernel does not compile") from error
            except (AssertionError, RuntimeError) as error:
                return f"{type(error).__name__}: {' '.join(str(error).split())}"
            finally:
                if executor.from_source:
                    raise ValueError(f"NVRTC refuses {executor.from_source}")
        if fault and all(source == ran for source, ran in executor.sources.items()):
            raise ValueError("no source that the check runs has the fault")
    return ""


def ptx_of_the_fault(fault: Fault) -> str:
    """What `outcome` says of a fault that the compiler is to make nothing of, whose check need not run."""
    executor = Planted(None)
    with runtime.use(executor):
        checks()[fault.check]()
    changed = {source: planted(source, fault) for source in executor.sources}
    if all(source == new for source, new in changed.items()):
        raise ValueError("no source that the check runs has the fault")
    return "" if all(same_ptx(source, new) for source, new in changed.items()) else "other PTX"


def same_ptx(*sources: str) -> bool:
    """Whether the PTX of two sources is the same but for the lines that it names."""
    first, second = (re.sub(r"(?m)^\s*(//|\.loc|\.file).*", "", host_ptx._ptx(source, "sm_90")) for source in sources)
    return first == second


def in_a_process(name: str, check: str, weak: bool) -> str:
    """`outcome` of a fault by name, or "" for none, in a process of its own: a fault may write anywhere, or never end.

    Raises: ValueError as `outcome`.
    """
    try:
        done = subprocess.run([sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.host_ptx.faults",
                               "--alone", name, check, "weak" * weak], capture_output=True, text=True, check=False,
                              timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS} s"
    if done.returncode < 0:
        return f"the process ended with signal {-done.returncode}"
    if done.returncode:
        raise ValueError(f"{name or check}: {done.stderr.splitlines()[-1]}")
    return done.stdout.strip()


@functools.cache
def _require_pass(check: str, weak: bool) -> None:
    if said := in_a_process("", check, weak):
        raise ValueError(f"{check} fails without a fault: {said}")


def wrong_entry(name: str) -> tuple[str, bool]:
    """How a fault shows, "" where it does not; and whether the table says otherwise.

    Raises: ValueError where the check fails without the fault, too, or the fault cannot be planted.
    """
    fault = FAULTS[name]
    _require_pass(fault.check, fault.weak)
    said = in_a_process(name, fault.check, fault.weak)
    return said, bool(said) == bool(fault.harmless)


def main(names: list[str]) -> int:
    if names[:1] == ["--alone"]:
        _, name, check, weak = names
        fault = FAULTS[name] if name else None
        print(ptx_of_the_fault(fault) if fault and fault.harmless == SAME_PTX else outcome(fault, check, bool(weak)))
        return 0
    wrong = 0
    for name in names or FAULTS:
        said, otherwise = wrong_entry(name)
        wrong += otherwise
        result = "caught" if said else "passes"
        print(f"{result.upper() if otherwise else result:8}{name:45} {said or FAULTS[name].harmless}"[:180], flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
