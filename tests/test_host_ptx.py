"""Kernels run from the PTX that NVRTC makes of them; and the executor of that PTX, instruction by instruction."""

import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from bench.timing import RESULTS
from char_gru.kernels import runtime
from char_gru.kernels.matmul import PRECISIONS, matmul
from char_gru.rnn import check, reference
from tests import host_cuda, host_ptx
from tests.helpers.commands import ROOT
from tests.helpers.compare import assert_close
from tests.helpers.ptx import HEAD, kernel, run
from tests.host_ptx import drift
from tests.host_ptx.parser import parse

pytest.importorskip("cuda.bindings")  # with it comes NVRTC

WINDOW = check.Window(T=3, B=5, E=7, H=18, V=11, rows=(1, 10))

pytestmark = pytest.mark.skipif(host_cuda.compiler() is None, reason="needs a C++ compiler")


# ---- Kernels of the project ------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("architecture, worst", [("sm_75", False), ("sm_80", True), ("sm_90", False)])
def test_kernels_compute_from_their_ptx_what_the_specification_says(architecture, worst):
    """On sm_80 with tensor cores and approximate instructions at their worst."""
    executor = host_ptx.PtxExecutor(architecture, worst)
    with runtime.use(executor):
        checks = [named for named in check.checks_of((WINDOW,)) if not re.search("generate.*layers=2", named[0])]
        failed = [result for result in check.results_of(checks) if not result.passed]
    assert not failed, failed
    assert len(checks) > (14 if architecture == "sm_75" else 25) and not executor.from_source


@pytest.mark.slow
@pytest.mark.parametrize("architecture, precision", [("sm_80", "tf32"), ("sm_90", "bf16")])
@pytest.mark.parametrize("transposed", ["", "transpose_a", "transpose_b"])
def test_multistage_products_from_ptx_match_reference(architecture, precision, transposed):
    """Of sizes that no check has: models as small as these take no multistage product."""
    (M, N, K), rng = (200, 132, 44), np.random.default_rng(0)
    A, B = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    with runtime.use(host_ptx.PtxExecutor(architecture, worst=True)):
        on_device = [runtime.to_device(np.ascontiguousarray(x.T if transposed == name else x))
                     for name, x in (("transpose_a", A), ("transpose_b", B))]
        C = runtime.empty((M, N), np.float32)
        matmul(*on_device, C, precision=precision, variant="multistage", **{transposed: True} if transposed else {})
    assert_close("C", C, A.astype(float) @ B.astype(float), reference.product(A, B, precision))


@pytest.mark.slow
def test_command_says_how_much_of_the_tolerances_was_used():
    test = "tests/test_input_table.py::test_input_table_hands_the_precision_on"
    said = subprocess.run([sys.executable, "-m", "pytest", "--ptx", "sm_80", "--worst", "-q", test], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout
    used = re.findall(rf"^tolerances used at most in (\w+): (\d+)% \(P, {test}\[(\w+)\]\), the largest of 1$", said,
                      re.MULTILINE)
    assert [(precision, case) for precision, _, case in used] == [(name, name) for name in sorted(PRECISIONS)]
    assert all(0 < int(share) < 50 for _, share, _ in used)


@pytest.mark.slow
def test_training_at_the_hardwares_worst_drifts_less_than_rounded_operands():
    """The short version of `python -m tests.host_ptx.drift`: the kernels stay nearer to the specification with rounded
    operands than this does to float64; and at their worst they compute something else than rounded once."""
    entries = list(drift.drifts(3, ["tf32"], [("sm_80", False), ("sm_80", True)]))
    drifted = {(entry["run"], entry["from"]): entry for entry in entries}
    assert len(drifted) == len(entries) == 6
    rounding, once, worst = (drifted[run] for run in (("specification", "float64"),
                                                      ("kernels, sm_80", "specification"),
                                                      ("kernels, sm_80, worst", "specification")))
    assert drifted["CPU", "float64"]["loss"] < 1e-6 < rounding["loss"] < check.ROUNDING["tf32"]
    for name in ("loss", "weights"):
        assert 0 < worst[name] < rounding[name] / 4 and worst[name] != once[name], name


def test_recorded_drift_has_every_run_of_the_command_and_the_worst_drift_little_farther():
    recorded = json.loads((RESULTS / "drift.json").read_text())
    assert recorded["sizes"] == drift.SIZES | {"steps": drift.STEPS}
    runs = [(entry["precision"], entry["run"], entry["from"]) for entry in recorded["runs"]]
    of_kernels = [(f"kernels, {architecture}{', worst' * worst}", start) for architecture, worst in drift.KERNELS
                  for start in ("float64", "specification")]
    assert runs == [("fp32", "CPU", "float64"), *((precision, *run) for precision in PRECISIONS
                                                  for run in [("specification", "float64"), *of_kernels])]
    for precision in PRECISIONS:
        from_float64 = [entry for entry in recorded["runs"]
                        if entry["precision"] == precision and entry["from"] == "float64"]
        worst, others = ([entry["loss"] for entry in from_float64 if entry["run"].endswith("worst") == wanted]
                         for wanted in (True, False))
        assert max(worst) < 1.5 * max(others), precision


def test_a_barrier_polls_without_an_acquire_and_acquires_once_behind_the_loop():
    """An acquire invalidates L1: in the loop it would do so in each turn."""
    source = """
        #include "barrier.cuh"
        extern "C" __global__ void kernel(unsigned *counters)
        {
            Group(counters, 0, blockIdx.x, gridDim.x).barrier();
        }"""
    statements = parse(runtime.ptx_for(runtime.assemble("test.cu", source, {}), "sm_90")).functions["kernel"].statements
    labels = {statement.text: i for i, statement in enumerate(statements) if statement.kind == "label"}
    [poll] = (i for i, statement in enumerate(statements) if statement.operation == "ld.relaxed.gpu.global.u32")
    [acquire] = (i for i, statement in enumerate(statements) if statement.operation == "ld.acquire.gpu.global.u32")
    [turn] = (i for i, statement in enumerate(statements) if statement.operation == "bra" and i > poll
              and labels[statement.operands[0]] <= poll)
    assert poll < turn < acquire


def test_orders_of_threads_give_the_same_bits():
    grads, norms = np.linspace(-1, 1, 1000, dtype=np.float32), []
    source = runtime.source("adam", {})
    for order in host_cuda.ORDERS:
        executor, sums, norm = host_ptx.PtxExecutor(order=order), np.zeros(1024, np.float32), np.zeros(1, np.float32)
        executor.launch(source, "square_sums", (1, 1, 1), (256, 1, 1), [sums, grads, np.uint64(1000)], 0, False)
        executor.launch(source, "norm_of_sums", (1, 1, 1), (256, 1, 1), [norm, sums, np.int32(1)], 0, False)
        norms.append(norm.tobytes())
    assert len(set(norms)) == 1
    assert np.frombuffer(norms[0], np.float32)[0] == pytest.approx(np.linalg.norm(grads.astype(float)), rel=1e-6)


def test_coverage_tells_executed_instructions_from_others():
    source = 'extern "C" __global__ void kernel(float *x, int n) { if (n > 3) x[0] = sqrtf(x[0]); else x[1] = 2; }'
    executor, x = host_ptx.PtxExecutor(), np.ones(2, np.float32)
    executor.launch(source, "kernel", (1, 1, 1), (1, 1, 1), [x, np.int32(1)], 0, False)
    coverage = host_ptx.build(source, "sm_90").coverage("kernel")
    ran = {statement.operation: ran for statement, ran in zip(*coverage)}
    assert x.tolist() == [1, 2] and ran["ld.param.u64"] and not ran["sqrt.rn.ftz.f32"]
    executor.launch(source, "kernel", (1, 1, 1), (1, 1, 1), [x, np.int32(4)], 0, False)
    assert all(host_ptx.build(source, "sm_90").coverage("kernel").executed)


def test_functions_that_are_called_have_shared_memory_of_their_own():
    source = """
        __device__ __noinline__ float called(float x)
        {
            __shared__ float kept[32];
            kept[threadIdx.x] = x;
            __syncthreads();
            return kept[31 - threadIdx.x];
        }
        extern "C" __global__ void kernel(float *x)
        {
            __shared__ float mine[32];
            mine[threadIdx.x] = x[threadIdx.x];
            const float other = called(-1.0f);
            __syncthreads();
            x[threadIdx.x] = mine[31 - threadIdx.x] + other;
        }"""
    x = np.arange(32, dtype=np.float32)
    host_ptx.PtxExecutor().launch(source, "kernel", (1, 1, 1), (32, 1, 1), [x], 0, False)
    assert x.tolist() == [30 - i for i in range(32)]


def test_kernel_that_an_architecture_lacks_is_named():
    source = """
        #if __CUDA_ARCH__ >= 800
        extern "C" __global__ void kernel(float *x) { x[0] = 1; }
        #endif"""
    with pytest.raises(ValueError, match="no kernel 'kernel' in the source for sm_75"):
        host_ptx.PtxExecutor("sm_75").launch(source, "kernel", (1, 1, 1), (1, 1, 1), [np.zeros(1, np.float32)], 0,
                                             False)


def test_source_for_the_host_alone_runs_from_its_source():
    source = '#ifndef HOST_CUDA\n#error host\n#endif\nextern "C" __global__ void kernel(float *x) { x[0] = 1; }'
    executor, x = host_ptx.PtxExecutor(), np.zeros(1, np.float32)
    executor.launch(source, "kernel", (1, 1, 1), (1, 1, 1), [x], 0, False)
    assert x[0] == 1 and executor.from_source == {"kernel"}


# ---- Instructions ----------------------------------------------------------------------------------------------------

def signed(x):
    return x.astype(np.int32)


INTEGERS = {  # instruction on a, b, c -> its result by NumPy, in 64 bits
    "add.s32 d, a, b": lambda a, b, c: a + b,
    "sub.s32 d, a, b": lambda a, b, c: a - b,
    "mul.lo.s32 d, a, b": lambda a, b, c: a * b,
    "mul.hi.s32 d, a, b": lambda a, b, c: signed(a).astype(np.int64) * signed(b).astype(np.int64) >> 32,
    "mul.hi.u32 d, a, b": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 d, a, b, c": lambda a, b, c: a * b + c,
    "div.s32 d, a, 7": lambda a, b, c: np.trunc(signed(a) / 7).astype(np.int64),
    "rem.u32 d, a, 7": lambda a, b, c: a % 7,
    "min.s32 d, a, b": lambda a, b, c: np.minimum(signed(a), signed(b)),
    "max.u32 d, a, b": lambda a, b, c: np.maximum(a, b),
    "shl.b32 d, a, 5": lambda a, b, c: a << 5,
    "shl.b32 d, a, 32": lambda a, b, c: 0 * a,
    "shr.u32 d, a, 5": lambda a, b, c: a >> 5,
    "shr.s32 d, a, 40": lambda a, b, c: signed(a) >> 31,
    "and.b32 d, a, b": lambda a, b, c: a & b,
    "xor.b32 d, a, -2": lambda a, b, c: a ^ 0xFFFFFFFE,
    "not.b32 d, a": lambda a, b, c: ~a,
    "neg.s32 d, a": lambda a, b, c: 0 - a,
    "bfi.b32 d, a, b, 8, 4": lambda a, b, c: (b & 0xFFFFF0FF) | (a & 0xF) << 8,
    "shf.l.wrap.b32 d, a, b, 19": lambda a, b, c: b << 19 | a >> 13,
    "prmt.b32 d, a, b, 0x5410": lambda a, b, c: (b & 0xFFFF) << 16 | a & 0xFFFF,
    "prmt.b32 d, a, b, 0xF246": lambda a, b, c: (b >> 31) * 0xFF000000 | (a >> 16 & 0xFF) << 16 | (b & 0xFF) << 8
                                                | b >> 16 & 0xFF,
    "clz.b32 d, a": lambda a, b, c: np.array([32 - int(x).bit_length() for x in a]),
}


def bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


FLOATS = {  # instruction on floats a, b, c -> its result, rounded once
    "add.ftz.f32 d, a, b": lambda a, b, c: a + b,
    "sub.ftz.f32 d, a, b": lambda a, b, c: a - b,
    "mul.ftz.f32 d, a, b": lambda a, b, c: a * b,
    "fma.rn.ftz.f32 d, a, b, c": lambda a, b, c: a * b + c,
    "div.rn.ftz.f32 d, a, b": lambda a, b, c: a / b,
    "sqrt.rn.ftz.f32 d, a": lambda a, b, c: np.sqrt(a),
    "max.ftz.f32 d, a, b": lambda a, b, c: np.maximum(a, b),
    "min.ftz.f32 d, a, b": lambda a, b, c: np.minimum(a, b),
    "neg.ftz.f32 d, a": lambda a, b, c: -a,
    "abs.ftz.f32 d, b": lambda a, b, c: np.abs(b),
    "copysign.f32 d, b, a": lambda a, b, c: np.copysign(a, b),
}
def each(instructions, type_: str) -> str:
    """A kernel that stores what each instruction makes of element t of a, b and c to out[instruction, t]."""
    letter = {"u32": "r", "f32": "f"}[type_]
    names = dict(zip("abcd", range(4)))
    lines = []
    for i, instruction in enumerate(instructions):
        operation, _, operands = instruction.partition(" ")
        operands = re.sub(r"\b[abcd]\b", lambda match: f"%{letter}{names[match[0]]}", operands)
        lines.append(f"{operation} {operands};\nst.global.{type_} [%rd9+{128 * i}], %{letter}3;")
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];\nadd.s64 %rd{i}, %rd{i}, %rd8;\n"
                      f"ld.global.{type_} %{letter}{i}, [%rd{i}];" for i in range(3))
    return f"""
.visible .entry kernel(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3)
{{
.reg .b32 %r<12>;
.reg .f32 %f<12>;
.reg .b64 %rd<12>;
mov.u32 %r9, %tid.x;
mul.wide.u32 %rd8, %r9, 4;
{loads}
ld.param.u64 %rd9, [p3];
add.s64 %rd9, %rd9, %rd8;
{chr(10).join(lines)}
ret;
}}"""


def test_integer_instructions():
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 2**32, (3, 32), np.uint32)
    a[:3], b[:3] = (0, 1, 2**32 - 1), (2**31, 2**31 - 1, 2**32 - 1)
    out = np.zeros((len(INTEGERS), 32), np.uint32)
    run(each(INTEGERS, "u32"), a, b, c, out)
    for row, (instruction, exact) in zip(out, INTEGERS.items()):
        expected = np.asarray(exact(*(x.astype(np.uint64) for x in (a, b, c)))).astype(np.int64) & 0xFFFFFFFF
        np.testing.assert_array_equal(row, expected.astype(np.uint32), instruction)


def float_operands():
    a, b, c = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    return np.abs(a) + np.float32(0.1), b, c


def test_float_instructions_round_once():
    operands = float_operands()
    out = np.zeros((len(FLOATS), 32), np.float32)
    run(each(FLOATS, "f32"), *operands, out)
    for row, (instruction, exact) in zip(out, FLOATS.items()):
        expected = exact(*(x.astype(np.float64) for x in operands)).astype(np.float32)
        np.testing.assert_array_equal(row.view(np.uint32), expected.view(np.uint32), instruction)


def test_subnormal_numbers_are_flushed():
    tiny = np.full(32, 1e-39, np.float32)
    out = np.full((3, 32), 7, np.float32)
    run(each(["add.ftz.f32 d, a, b", "mul.ftz.f32 d, a, c", "neg.ftz.f32 d, a"], "f32"), tiny, 0 * tiny,
        np.full(32, 2, np.float32), out)
    assert (out == 0).all() and np.signbit(out[2]).all()
    assert (tiny + tiny > 0).all(), "NumPy flushes now, too"


APPROXIMATE = {  # instruction -> its exact result; its results of SPECIAL in the tables of the PTX ISA
    "ex2.approx.ftz.f32": (np.exp2, [0, 1, 1, 1, 1, np.inf, np.nan]),
    "rcp.approx.ftz.f32": (lambda a: 1 / a, [-0.0, -np.inf, -np.inf, np.inf, np.inf, 0, np.nan]),
    "rsqrt.approx.ftz.f32": (lambda a: 1 / np.sqrt(a), [np.nan, -np.inf, -np.inf, np.inf, np.inf, 0, np.nan]),
}
SPECIAL = np.array([-np.inf, -1e-39, -0.0, 0, 1e-39, np.inf, np.nan], np.float32)


def approximated(a: np.ndarray, worst: bool) -> dict[str, np.ndarray]:
    """Instruction of APPROXIMATE -> what it makes of the 32 numbers a."""
    out = np.zeros((len(APPROXIMATE), 32), np.float32)
    run(each([f"{instruction} d, a" for instruction in APPROXIMATE], "f32"), a, a, a, out, worst=worst)
    return dict(zip(APPROXIMATE, out))


def errors(row: np.ndarray, exact: np.ndarray, instruction: str) -> np.ndarray:
    """Errors in the unit of the instruction's section of the PTX ISA: ulps of the correctly rounded result, or relative
    to the exact one; as shares of the largest that is allowed."""
    if instruction.startswith("rsqrt"):
        return (row - exact) / exact / 2**-22.9
    nearest = exact.astype(np.float32)
    return (row - nearest.astype(float)) / np.spacing(np.abs(nearest)) / {"ex2": 2, "rcp": 1, "div": 2}[instruction[:3]]


def test_approximate_instructions_round_once_or_err_by_their_bounds_in_both_directions():
    a, rng = np.empty(32, np.float32), np.random.default_rng(1)
    a[:4], a[4:] = (1, 2, 0.25, 100), np.abs(rng.standard_normal(28)) * 10.0 ** rng.integers(-30, 2, 28)
    for instruction, (exact, _) in APPROXIMATE.items():
        expected = exact(a.astype(np.float64))
        np.testing.assert_array_equal(approximated(a, False)[instruction], expected.astype(np.float32))
        worst = approximated(a, True)[instruction]
        shares = errors(worst, expected, instruction)
        assert (np.abs(shares) <= 1).all() and shares.min() < 0 < shares.max(), instruction
        next_float = np.nextafter(worst, np.where(shares > 0, np.inf, -np.inf).astype(np.float32))
        assert (np.abs(errors(next_float, expected, instruction)) > 1).all(), instruction


@pytest.mark.parametrize("worst", [False, True])
def test_approximate_instructions_of_special_values(worst):
    rows = approximated(np.resize(SPECIAL, 32), worst)
    for instruction, (_, expected) in APPROXIMATE.items():
        np.testing.assert_array_equal(rows[instruction], np.resize(expected, 32).astype(np.float32), instruction)
        signed = ~np.isnan(np.resize(expected, 32))
        np.testing.assert_array_equal(np.signbit(rows[instruction])[signed],
                                      np.signbit(np.resize(expected, 32))[signed], instruction)
    assert np.isnan(approximated(np.full(32, -2, np.float32), worst)["rsqrt.approx.ftz.f32"]).all()


def approximate_quotients(a: np.ndarray, b: np.ndarray, worst: bool) -> np.ndarray:
    out = np.zeros((1, 32), np.float32)
    run(each(["div.approx.ftz.f32 d, a, b"], "f32"), a, b, b, out, worst=worst)
    return out[0]


def test_approximate_division_rounds_once_or_errs_by_two_ulps_in_both_directions():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((2, 32)) * 10.0 ** rng.integers(-15, 15, (2, 32))).astype(np.float32)
    exact = a.astype(np.float64) / b
    np.testing.assert_array_equal(approximate_quotients(a, b, False), exact.astype(np.float32))
    shares = errors(approximate_quotients(a, b, True), exact, "div")
    assert set(np.abs(shares)) <= {0.5, 1} and shares.min() < 0 < shares.max()


@pytest.mark.parametrize("worst", [False, True])
def test_approximate_quotients_of_special_values(worst):
    """By zero, infinity and NaN as exact ones; by more than 2^126 zero, or NaN of an infinite dividend."""
    huge, inf, nan = np.float32(2) ** np.float32(126.5), np.inf, np.nan
    table = [(1, 0, inf), (-1, 0, -inf), (0, 0, nan), (1, 1e-39, inf), (3, inf, 0), (3, -inf, -0.0), (inf, inf, nan),
             (nan, 1, nan), (1, nan, nan), (1e30, huge, 0), (-1e30, huge, -0.0), (inf, huge, nan), (0, 3, 0)]
    a, b, expected = (np.resize(column, 32).astype(np.float32) for column in zip(*table))
    quotients = approximate_quotients(a, b, worst)
    np.testing.assert_array_equal(quotients, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(quotients)[numbers], np.signbit(expected)[numbers])


@pytest.mark.parametrize("architecture, worst", [("sm_75", False), ("sm_80", True), ("sm_90", False)])
def test_logistic_function_errs_by_little_and_keeps_nan(architecture, worst):
    """Within 5 ulp; a result may be 0 where a GPU flushes it."""
    source = runtime.assemble("test.cu", """
        #include "common.cuh"
        extern "C" __global__ void logistic(float *y, const float *x) { y[threadIdx.x] = sigmoid(x[threadIdx.x]); }""",
                              {})
    x = np.concatenate([np.linspace(-87, 87, 900, dtype=np.float32),
                        np.array([-np.inf, -3e38, -89, 0, 89, 3e38, np.inf, np.nan], np.float32)])
    for executor in (host_ptx.PtxExecutor(architecture, worst), host_cuda.HostExecutor()):
        y = np.full(len(x), 7, np.float32)
        executor.launch(source, "logistic", (1, 1, 1), (len(x), 1, 1), [y, x], 0, False)
        with np.errstate(over="ignore"):
            exact = 1 / (1 + np.exp(-x.astype(np.float64)))
        np.testing.assert_allclose(y, exact, rtol=5 * 2**-23, atol=1e-38)
        assert np.isnan(y[-1]) and y[900] == 0


def test_sums_inside_mma_are_those_that_were_measured():
    """On the A100, by Khattak and Mikaitis: 1.5 * 1.5 + 2^-23 + 2^-24 + 2^-24 is 2.25 + 2^-22, as products are aligned
    by the sum of their operands' exponents; 2.25 * 1 + the same is 2.25. The sum of the last case is 2^-149, but its
    terms are aligned to no lower exponent than -132, so that bits below 2^-156 are lost."""
    registers = ", ".join(f"%r{i}" for i in range(1, 5))
    text = """
.visible .entry kernel(.param .u64 p0, .param .u64 p1)
{
.reg .pred %p<2>;
.reg .b32 %r<12>;
.reg .f32 %f<4>;
.reg .b64 %rd<4>;
ld.param.u64 %rd0, [p0];
ld.param.u64 %rd1, [p1];
mov.u32 %r0, %tid.x;
mul.wide.u32 %rd2, %r0, 24;
add.s64 %rd0, %rd0, %rd2;
""" + "".join(f"ld.global.u32 %r{i + 1}, [%rd0+{4 * i}];\n" for i in range(6)) + f"""
mov.f32 %f0, 0f00000000;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%f0, %f1, %f2, %f3}}, {{{registers}}}, {{%r5, %r6}},
    {{%f0, %f0, %f0, %f0}};
setp.eq.s32 %p1, %r0, 0;
@%p1 st.global.f32 [%rd1], %f0;
ret;
}}"""
    for a, b, expected in (((1.5, 1, 1, 1), (1.5, 2**-23, 2**-24, 2**-24), 2.25 + 2**-22),
                           ((2.25, 1, 1, 1), (1, 2**-23, 2**-24, 2**-24), 2.25),
                           ([2**-50] * 3 + [2**-50 * (2 - 2**-7), 2**-80, 0],
                            (2**-100, 2**-101, 2**-102, 2**-103, 2**-80, 0), 0)):
        # Lane 0 holds k = 0, 1 of row 0 of A and of column 0 of B in its first registers, lane 1 k = 2, 3, and so on.
        fragments = np.zeros((32, 6), np.uint32)
        for lane in range(len(a) // 2):
            for column, values in ((0, a), (4, b)):
                low, high = (bits(value) >> 16 for value in values[2 * lane:2 * lane + 2])
                fragments[lane, column] = low | high << 16
        out = np.zeros(1, np.float32)
        run(text, fragments, out, worst=True, architecture="sm_80")
        assert out[0] == expected


# ---- Mistakes that are seen ------------------------------------------------------------------------------------------

MISTAKES = {  # the lines of a kernel on two arrays of 8 words, and what is said of them
    "a misaligned load": ("ld.global.u32 %r1, [%rd0+2];", "misaligned access"),
    "a load behind the array": ("ld.global.u32 %r1, [%rd0+32];", "outside its array"),
    "a vector that ends behind the array": ("ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd0+32];", "outside its array"),
    "a store ahead of the array": ("add.s64 %rd2, %rd1, -4;\nst.global.u32 [%rd2], %r0;", "outside its array"),
    "an address from nowhere": ("mov.u64 %rd2, 64;\nst.global.u32 [%rd2], %r0;", "outside every array"),
    "shared memory behind its end": ("mov.u32 %r1, 64;\nst.shared.u32 [%r1], %r0;", "outside shared memory"),
    "a read-only load of what was stored": (
        "st.global.u32 [%rd0], %r0;\nld.global.nc.u32 %r1, [%rd0];", "ld.global.nc of what this launch has written"),
    "a store to what was loaded read-only": (
        "ld.global.nc.u32 %r1, [%rd0];\nst.global.u32 [%rd0], %r0;", "a store to what this launch read"),
    "a copy that is not waited for": (
        "mov.u32 %r1, 0;\ncp.async.ca.shared.global [%r1], [%rd0], 4;\nld.shared.u32 %r2, [%r1];",
        "before the wait for the asynchronous copy"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported_with_its_line_block_and_thread(name):
    lines, said = MISTAKES[name]
    arrays = np.zeros(8, np.uint32), np.zeros(8, np.uint32)
    with pytest.raises(host_ptx.Fault, match=rf"^kernel: PTX line \d+ .*{said}.*block 0 0 0, thread 0 0 0"):
        run(kernel(lines), *arrays, threads=1, shared_bytes=64)


def test_mistake_in_a_source_is_reported_with_its_source_line():
    source = '#line 1 "kernels/wrong.cu"\nextern "C" __global__ void kernel(float *x, int n)\n{\n    x[n] = 1;\n}\n'
    with pytest.raises(host_ptx.Fault, match=r"kernels/wrong.cu:3\): outside its array"):
        host_ptx.PtxExecutor().launch(source, "kernel", (1, 1, 1), (1, 1, 1), [np.zeros(4, np.float32), np.int32(4)],
                                      0, False)


@pytest.mark.parametrize("instruction", ["frobnicate.u32 %r1, %r0;", "add.sat.s32 %r1, %r0, %r0;",
                                         "ld.global.cv.u32 %r1, [%rd0];", "bar.sync 1;"])
def test_instruction_that_no_rule_knows_is_named(instruction):
    with pytest.raises(host_ptx.Untranslated, match=rf"^kernel, PTX line \d+: {re.escape(instruction[:-1])}"):
        host_ptx.build_ptx(HEAD + kernel(instruction), "sm_90")
