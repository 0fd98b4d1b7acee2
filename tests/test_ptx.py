"""The functions of ptx.cuh, the narrow formats and the fragment layout against NumPy.

The same kernels run on the host harness and, where there is one, on a GPU: a function computes in tests/host_cuda/ptx.h
what its instruction computes.
"""

import numpy as np
import pytest

from char_gru.kernels import runtime
from char_gru.rnn.reference import rounded
from tests.helpers.compare import assert_within
from tests.host_cuda import HostExecutor, compiler

ROUNDING = """
#include "common.cuh"
extern "C" __global__ void formats(unsigned short *bf16, unsigned *two_bf16, float *from16, const float *in)
{
    const size_t i = thread_in_grid();
    bf16[i] = to_bf16(in[i]);
    two_bf16[i] = pack_bf16(in[i], in[i ^ 1]);
    from16[i] = from_bf16(bf16[i]);
}
"""
KERNELS = ROUNDING + """
#include "ptx.cuh"

// D (16,8) = A (16,K) B (K,8) by one warp, from row-major matrices in global memory.
#define FRAGMENTS(P, PACK)                                                                                           \\
    const int g = lane() / 4, q = lane() % 4;                                                                        \\
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};                                                                           \\
    for (int r = 0; r < A; ++r)                                                                                      \\
        fa[r] = PACK(a + (g + 8 * (r % 2)) * K + q * P + 4 * P * (r / 2), 1);                                        \\
    for (int r = 0; r < A / 2; ++r)                                                                                  \\
        fb[r] = PACK(b + (q * P + 4 * P * r) * 8 + g, 8);

#define STORE                                                                                                        \\
    for (int i = 0; i < 4; ++i)                                                                                      \\
        out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2] = d[i];

__device__ __forceinline__ unsigned bits(const float *x, int) { return __float_as_uint(*x); }
// Element k of row r of each of four 8x8 matrices, gathered in fragments: registers[m] of a lane, and the same
// transposed.
extern "C" __global__ void matrices(unsigned *out, unsigned *transposed, const unsigned short *in)
{
    __shared__ __align__(16) unsigned short tile[32 * 24];  // rows of 48 bytes
    for (int i = lane(); i < 256; i += 32)
        tile[i / 8 * 24 + i % 8] = in[i];
    __syncwarp();
    unsigned registers[4];
    ldmatrix_x4(registers, tile + lane() * 24);
    for (int m = 0; m < 4; ++m)
        out[m * 32 + lane()] = registers[m];
    ldmatrix_x4_trans(registers, tile + lane() * 24);
    for (int m = 0; m < 4; ++m)
        transposed[m * 32 + lane()] = registers[m];
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned two_bf16(const float *x, int stride) { return pack_bf16(x[0], x[stride]); }

extern "C" __global__ void tf32(float *out, const float *a, const float *b)
{
    const int K = 8, A = 4;
    unsigned fa[4], fb[2];
    FRAGMENTS(1, bits)
    mma_m16n8k8_tf32(d, fa, fb);
    mma_m16n8k8_tf32(d, fa, fb);
    STORE
}

extern "C" __global__ void bf16(float *out, const float *a, const float *b)
{
    const int K = 16, A = 4;
    unsigned fa[4], fb[2];
    FRAGMENTS(2, two_bf16)
    mma_m16n8k16_bf16(d, fa, fb);
    mma_m16n8k16_bf16(d, fa, fb);
    STORE
}

extern "C" __global__ void rounded_tf32(unsigned *out, unsigned *operand, const float *in)
{
    const size_t i = thread_in_grid();
    out[i] = to_tf32(in[i]);
    operand[i] = tf32_operand(__float_as_uint(in[i]));
}

extern "C" __global__ void copies(float *out, const float *in)
{
    __shared__ __align__(16) float tile[160];
    cp_async_16(tile + 4 * lane(), in + 4 * lane(), lane() < 31);
    cp_async_4(tile + 128 + lane(), in + 128 + lane(), lane() > 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int i = lane(); i < 160; i += 32)
        out[i] = tile[i];
}
#endif
"""
SOURCE = runtime.assemble("fragments.cu", KERNELS, {})


def launched(executor, kernel, outputs, inputs, threads=32, source=SOURCE):
    """The outputs, given as (shape, dtype), of a launch of one block."""
    arrays = [executor.empty(shape, dtype) for shape, dtype in outputs]
    args = arrays + [executor.to_device(x) for x in inputs]
    executor.launch(source, kernel, (1, 1, 1), (threads, 1, 1), args, 0, False)
    return [executor.to_host(array) for array in arrays]


def truncated_tf32(x):
    """float32 without the low 13 bits of its mantissa, as the tensor core reads it."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def operands(k):
    random = np.random.default_rng(k)
    return random.normal(size=(16, k)).astype(np.float32), random.normal(size=(k, 8)).astype(np.float32)


FORMATS = {"tf32": (8, truncated_tf32), "bf16": (16, lambda x: rounded(x, "bf16"))}


@pytest.mark.capability(80)
@pytest.mark.parametrize("precision", FORMATS)
def test_product_of_fragments_equals_numpy(executor, precision):
    k, as_read = FORMATS[precision]
    a, b = operands(k)
    (out,) = launched(executor, precision, [((16, 8), np.float32)], [a, b])
    exact = 2 * (as_read(a).astype(np.float64) @ as_read(b).astype(np.float64))
    assert_within("product", np.abs(out - exact).max(), 1e-5)  # products are exact, sums of 2 k terms are fp32
    assert np.abs(out - 2 * (a.astype(np.float64) @ b)).max() > 1e-4  # the operands were rounded


@pytest.mark.capability(80)
@pytest.mark.parametrize("right, wrong", [
    ("(g + 8 * (r % 2)) * K + q * P + 4 * P * (r / 2)", "(g + 8 * (r / 2)) * K + q * P + 4 * P * (r % 2)"),
    ("fb[r] = PACK", "fb[A / 2 - 1 - r] = PACK"),
    ("out[(g + 8 * (i / 2)) * 8 + 2 * q + i % 2]", "out[(g + 8 * (i % 2)) * 8 + 2 * q + i / 2]"),
])
def test_wrong_fragment_layout_gives_a_wrong_product(executor, right, wrong):
    assert SOURCE.count(right) == 1
    a, b = operands(16)
    (out,) = launched(executor, "bf16", [((16, 8), np.float32)], [a, b], source=SOURCE.replace(right, wrong))
    assert np.abs(out - 2 * (rounded(a, "bf16") @ rounded(b, "bf16"))).max() > 0.1


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_mma_calls_are_counted():
    executor = HostExecutor()
    launched(executor, "bf16", [((16, 8), np.float32)], operands(16))
    assert executor.launches[0].mma_calls == 2


def test_ldmatrix_gives_each_lane_two_neighbours_of_its_row(executor):
    values = np.random.default_rng(0).permutation(256).astype(np.uint16).reshape(4, 8, 8)
    out, transposed = launched(executor, "matrices", [((4, 32), np.uint32)] * 2, [values])
    for got, matrices in ((out, values), (transposed, values.transpose(0, 2, 1))):
        np.testing.assert_array_equal(got.view(np.uint16).reshape(4, 8, 8), matrices)


@pytest.mark.capability(80)
def test_asynchronous_copies_arrive_and_fill_with_zeros_outside(executor):
    values = np.random.default_rng(0).normal(size=160).astype(np.float32)
    (out,) = launched(executor, "copies", [((160,), np.float32)], [values])
    values[124:129] = 0
    np.testing.assert_array_equal(out, values)


def awkward_floats():
    """Ordinary numbers, ties, the largest and smallest of each format, infinities and NaN; 256 of them."""
    random = np.random.default_rng(2)
    special = np.array([0, -0.0, 1, 65504, 65519.99, 65520, 1e6, 3.3895314e38, 3.39e38, np.inf, -np.inf, np.nan, 6e-5,
                        6.1e-5, 2**-24, 2**-25, 1.5 * 2**-24, 2.5 * 2**-24, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9,
                        1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20], np.float32)
    ordinary = (random.normal(size=208) * 10.0**random.integers(-9, 9, 208)).astype(np.float32)
    return np.concatenate([special, -special, ordinary])


def test_bf16_rounds_to_nearest_even(executor):
    assert_rounded_to_bf16(executor, SOURCE)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_bf16_of_gpus_without_the_instruction_rounds_to_nearest_even():
    text = f"namespace turing {{\n#undef __CUDA_ARCH__\n#define __CUDA_ARCH__ 750\n{ROUNDING}}}\nusing turing::formats;"
    assert_rounded_to_bf16(HostExecutor(), runtime.assemble("turing.cu", text, {}))


def assert_rounded_to_bf16(executor, source):
    values = awkward_floats()
    outputs = [((256,), dtype) for dtype in (np.uint16, np.uint32, np.float32)]
    bf16, two_bf16, from_bf16 = launched(executor, "formats", outputs, [values], 256, source)
    number = ~np.isnan(values)
    expected = (rounded(values, "bf16").view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(bf16[number], expected[number])
    assert (bf16[~number] == 0x7FFF).all() and np.isnan(from_bf16[~number]).all()
    np.testing.assert_array_equal(from_bf16[number], rounded(values, "bf16")[number])
    np.testing.assert_array_equal(two_bf16, bf16.astype(np.uint32) | bf16[np.arange(256) ^ 1].astype(np.uint32) << 16)


@pytest.mark.capability(80)
def test_tf32_rounds_to_nearest_away_from_zero(executor):
    values = awkward_floats()
    values = values[np.abs(values) > 1e-30]  # neither NaN nor zero
    values = np.resize(values, 256)
    out, operand = launched(executor, "rounded_tf32", [((256,), np.uint32)] * 2, [values], threads=256)
    finite = np.isfinite(values)
    mantissa, exponent = np.frexp(values[finite].astype(np.float64))
    expected = np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), mantissa) * 2.0 ** (exponent - 11)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out.view(np.float32)[finite], expected.astype(np.float32))
    np.testing.assert_array_equal(out.view(np.float32)[~finite], values[~finite])
    np.testing.assert_array_equal(truncated_tf32(operand), out.view(np.float32))


@pytest.mark.capability(80)
def test_tf32_operand_keeps_nan(executor):
    values = np.full(256, 0x7FFFFFFF, np.uint32).view(np.float32)  # as the GPU itself makes them
    _, operand = launched(executor, "rounded_tf32", [((256,), np.uint32)] * 2, [values], threads=256)
    assert np.isnan(truncated_tf32(operand)).all()


@pytest.mark.parametrize("architecture", runtime.ARCHITECTURES)
def test_instructions_are_accepted_for_every_architecture_that_has_them(architecture):
    kernels = runtime.compile_for(SOURCE, architecture)
    expected = {"matrices", "formats"}
    if architecture != "sm_75":
        expected |= {"tf32", "bf16", "rounded_tf32", "copies"}
    assert set(kernels) == expected
    assert all(use.registers > 0 and use.spill_stores == use.spill_loads == 0 for use in kernels.values())


@pytest.mark.parametrize("call", ["mma_m16n8k8_tf32(d, a, b)", "mma_m16n8k16_bf16(d, a, b)", "cp_async_commit()",
                                  "to_tf32(1.0f)"])
def test_instruction_that_turing_lacks_stops_its_build(call):
    text = f"""
    #include "common.cuh"
    #include "ptx.cuh"
    extern "C" __global__ void newer() {{ float d[4] = {{}}; unsigned a[4] = {{}}, b[2] = {{}}; {call}; }}
    """
    source = runtime.assemble("newer.cu", text, {})
    assert runtime.compile_for(source, "sm_80").keys() == {"newer"}
    with pytest.raises(runtime.CompileError, match="undefined"):
        runtime.compile_for(source, "sm_75")
