// mma and ldmatrix on a CPU, from the tables of the PTX ISA; kernels/ptx.cuh and its host branch have no part in it.
//
// Sums inside mma: without PTX_WORST one rounding of the sum of all exact products and the accumulator. With it, as
// measured on GPUs: the terms of a chunk are aligned to the largest exponent of them, truncated below EXTRA_BITS bits
// more than a float has, added as integers, and the sum is truncated to a float. One mma adds its chunks in turn.
//
//                       capability 8.0 to 8.9   9.0 to 12.0
//   chunk, bf16                  8                   16
//   chunk, tf32                  4                    8
//   extra bits                   1                    2
//   lowest exponent           -132                 -133    to which terms are aligned
//
// Subnormal operands and results are kept, whatever -ftz says; the low bits of a tf32 operand are dropped.
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k8", "Matrix Fragments for mma.m16n8k16", "ldmatrix". The sums, from
// two models that were compared with GPUs bit by bit and agree on the table: Khattak, Mikaitis, "Accurate Models of
// NVIDIA Tensor Cores" (arXiv 2512.07004; A100, A2, A30, L40S, Ada, H100, H200, B200, RTX PRO 6000; it alone has the
// lowest exponent); Xie, Wang, Yang, Yang, "MMA-Sim" (arXiv 2511.10909; mma.sync from Volta to RTX Blackwell).
#pragma once

#include "memory.h"

#if !defined(PTX_WORST) || PTX_CAPABILITY >= 90
constexpr int CHUNK_BF16 = 16, CHUNK_TF32 = 8, EXTRA_BITS = 2, LOWEST_EXPONENT = -133;
#else
constexpr int CHUNK_BF16 = 8, CHUNK_TF32 = 4, EXTRA_BITS = 1, LOWEST_EXPONENT = -132;
#endif

// A number as sign * mantissa * 2^exponent: the CPU flushes subnormal floats, this does not.
struct Exact {
    s64 mantissa;
    int exponent;
};

PTX bool is_finite(u32 x) { return (x & 0x7f800000u) != 0x7f800000u; }

PTX Exact exact_of(u32 x)
{
    const int exponent = int(x >> 23 & 255);
    const s64 mantissa = exponent ? s64(x & 0x7fffffu) | 0x800000 : s64(x & 0x7fffffu);
    return {x >> 31 ? -mantissa : mantissa, (exponent ? exponent : 1) - 150};
}

PTX int bit_length(u64 x) { return x ? 64 - __builtin_clzll(x) : 0; }

// mantissa 2^exponent as the bits of a float, truncated.
PTX u32 float_of(s64 signed_mantissa, int exponent)
{
    const u32 sign = signed_mantissa < 0 ? 0x80000000u : 0;
    u64 mantissa = signed_mantissa < 0 ? u64(-signed_mantissa) : u64(signed_mantissa);
    if (!mantissa)
        return 0;
    const int wanted = bit_length(mantissa) - 24, lowest = -149 - exponent, drop = wanted > lowest ? wanted : lowest;
    mantissa = drop > 63 ? 0 : drop > 0 ? mantissa >> drop : mantissa << -drop;
    exponent += drop;
    if (!(mantissa >> 23))
        return sign | u32(mantissa);  // subnormal, or zero
    const int biased = exponent + 150;
    if (biased >= 255)
        return sign | 0x7f7fffffu;
    return sign | u32(biased) << 23 | (mantissa & 0x7fffff);
}

// Terms with infinities or NaN, whose sum has no rounding to speak of.
PTX_CALL u32 unbounded_sum(u32 c, const u32 *a, const u32 *b, int n)
{
    f64 sum = F(c);
    for (int i = 0; i < n; ++i)
        sum += f64(F(a[i])) * f64(F(b[i]));
    return sum != sum ? 0x7fffffffu : bits<u32>(f32(sum));
}

PTX f64 double_of(u32 x)
{
    return x & 0x7f800000u ? f64(F(x)) : (x >> 31 ? -0x1p-149 : 0x1p-149) * f64(x & 0x7fffffu);
}

// Exact products of floats whose exponents differ by less than a double's reach add without error but the last.
PTX u32 rounded_sum(u32 c, const u32 *a, const u32 *b, int n)
{
    f64 sum = double_of(c);
    for (int i = 0; i < n; ++i)
        sum += double_of(a[i]) * double_of(b[i]);
    if (std::fabs(sum) < 0x1p-126)
        return (sum < 0 ? 0x80000000u : 0u) | u32(std::rint(std::fabs(sum) * 0x1p149));
    return bits<u32>(f32(sum));
}

// The unit of all terms is 23 + EXTRA_BITS below the largest exponent. That of a product is the sum of its operands'
// exponents, though the product may be 2 or more: it is not normalized.
template <int N>
PTX u32 truncated_sum(u32 c, const u32 *a, const u32 *b)
{
    Exact terms[N + 1];
    int highest = LOWEST_EXPONENT;  // exponent of a term's leading bit, 23 above that of the last bit of a float
    const auto add = [&](int i, Exact term, int leading) {
        terms[i] = term;
        if (term.mantissa && leading > highest)
            highest = leading;
    };
    for (int i = 0; i < N; ++i) {
        const Exact x = exact_of(a[i]), y = exact_of(b[i]);
        add(i, {x.mantissa * y.mantissa, x.exponent + y.exponent}, x.exponent + 23 + y.exponent + 23);
    }
    const Exact before = exact_of(c);
    add(N, before, before.exponent + 23);
    const int unit = highest - 23 - EXTRA_BITS;
    s64 sum = 0;
    for (const Exact &term : terms) {
        const int shift = term.exponent - unit;
        if (term.mantissa)
            sum += shift >= 0 ? term.mantissa << shift : shift > -63 ? term.mantissa / (s64(1) << -shift) : 0;
    }
    return float_of(sum, unit);
}

template <int N>
PTX u32 chunk_sum(u32 c, const u32 *a, const u32 *b)
{
    bool finite = is_finite(c);
    for (int i = 0; i < N; ++i)
        finite &= is_finite(a[i]) && is_finite(b[i]);
    if (!finite)
        return unbounded_sum(c, a, b, N);
#if defined(PTX_WORST)
    return truncated_sum<N>(c, a, b);
#else
    return rounded_sum(c, a, b, N);
#endif
}

// ---- mma ------------------------------------------------------------------------------------------------------------

struct Mma {
    f32 *d;
    const u32 *a, *b;
    const f32 *c;
    int line;
};

// ".aligned": all lanes execute the same instruction of the PTX.
template <class T>
PTX void check_aligned(void *const *lanes)
{
    const int line = static_cast<const T *>(lanes[host_cuda::lane_in_warp()])->line;
    for (int lane = 0; lane < 32; ++lane)
        if (static_cast<const T *>(lanes[lane])->line != line)
            fault_of_warp("lanes of a warp in different instructions that are .aligned", ~0u, line);
}

// "mma.m16n8k16", .bf16: element i of a fragment is half i % 2 of register i / 2.
PTX void gather_bf16(const Mma &mma, int lane, u32 (*a)[16], u32 (*b)[16])
{
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
        a[row][column] = mma.a[i / 2] >> i % 2 * 16 << 16;
    }
    for (int i = 0; i < 4; ++i)
        b[group][in_group * 2 + (i & 1) + (i < 2 ? 0 : 8)] = mma.b[i / 2] >> i % 2 * 16 << 16;
}

// "mma.m16n8k8", .tf32: the low 13 bits of an operand are ignored.
PTX void gather_tf32(const Mma &mma, int lane, u32 (*a)[8], u32 (*b)[8])
{
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i)
        a[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4] = mma.a[i] & 0xffffe000u;
    for (int i = 0; i < 2; ++i)
        b[group][i == 0 ? in_group : in_group + 4] = mma.b[i] & 0xffffe000u;
}

template <int K, int CHUNK>
[[maybe_unused]] static void multiply(void *const *lanes)
{
    check_aligned<Mma>(lanes);
    u32 a[16][K], b[8][K], sums[16][8];
    const auto row = [](int lane, int i) { return i < 2 ? lane >> 2 : (lane >> 2) + 8; };
    const auto column = [](int lane, int i) { return lane % 4 * 2 + (i & 1); };
    for (int lane = 0; lane < 32; ++lane) {
        const Mma &mma = *static_cast<const Mma *>(lanes[lane]);
        if constexpr (K == 16)
            gather_bf16(mma, lane, a, b);
        else
            gather_tf32(mma, lane, a, b);
        for (int i = 0; i < 4; ++i)
            sums[row(lane, i)][column(lane, i)] = bits<u32>(mma.c[i]);
    }
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 8; ++n)
            for (int k = 0; k < K; k += CHUNK)
                sums[m][n] = chunk_sum<CHUNK>(sums[m][n], &a[m][k], &b[n][k]);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            static_cast<const Mma *>(lanes[lane])->d[i] = F(sums[row(lane, i)][column(lane, i)]);
    host_cuda::count_mma();
}

PTX void mma_bf16(f32 *d, const u32 *a, const u32 *b, const f32 *c, int line)
{
    Mma mine = {d, a, b, c, line};
    host_cuda::whole_warp("mma.m16n8k16.bf16", &mine, multiply<16, CHUNK_BF16>, SITE, line);
}

PTX void mma_tf32(f32 *d, const u32 *a, const u32 *b, const f32 *c, int line)
{
    Mma mine = {d, a, b, c, line};
    host_cuda::whole_warp("mma.m16n8k8.tf32", &mine, multiply<8, CHUNK_TF32>, SITE, line);
}

// ---- ldmatrix: lane 8 m + r gives the address of row r of matrix m --------------------------------------------------

struct Rows {
    const u8 *row;
    u32 *result;
    int line;
};

template <bool TRANSPOSED>
[[maybe_unused]] static void load_matrices(void *const *lanes)
{
    check_aligned<Rows>(lanes);
    u16 matrices[4][8][8];
    for (int lane = 0; lane < 32; ++lane)
        std::memcpy(matrices[lane / 8][lane % 8], static_cast<const Rows *>(lanes[lane])->row, 16);
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < 4; ++m) {
            const int i = lane / 4, j = lane % 4 * 2;
            const u32 low = TRANSPOSED ? matrices[m][j][i] : matrices[m][i][j];
            const u32 high = TRANSPOSED ? matrices[m][j + 1][i] : matrices[m][i][j + 1];
            static_cast<const Rows *>(lanes[lane])->result[m] = low | high << 16;
        }
}

template <bool TRANSPOSED>
PTX void ldmatrix(u32 *result, const u8 *row, int line)
{
    Rows mine = {row, result, line};
    host_cuda::whole_warp(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", &mine, load_matrices<TRANSPOSED>, SITE, line);
}
