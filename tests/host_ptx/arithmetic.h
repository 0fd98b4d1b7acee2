// The arithmetic of PTX instructions on a CPU: integers, floats with -ftz=true, approximate instructions, conversions.
//
// Subnormal numbers: every kernel runs with the CPU's own flushing on (SSE: FTZ and DAZ), so that plain float
// operations flush their operands and results as .ftz does; an operation that moves bits flushes by flushed(). The
// same mode flushes subnormal doubles, which PTX does not; a NaN keeps its payload, where PTX writes 0x7fffffff.
//
// PTX_WORST: each approximate instruction errs by the bound that its section of the PTX ISA gives, up or down by the
// bits of its argument, except where the section's table says what comes out: of zeros, infinities, NaN.
// Source: PTX ISA, "Instruction Set", "Floating-Point Instructions: div", "... rcp", "... rsqrt", "... ex2".
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using f32 = float;
using f64 = double;

#define PTX __attribute__((always_inline)) static inline
#define PTX_CALL [[maybe_unused, gnu::noinline]] static

PTX void flush_subnormals()
{
#if defined(__SSE__)
    _mm_setcsr(_mm_getcsr() | 0x8040);
#elif defined(__aarch64__)
    u64 control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    __asm__ volatile("msr fpcr, %0" ::"r"(control | 1u << 24));
#else
#error "how does this CPU flush subnormal numbers?"
#endif
}

template <class To, class From>
PTX To bits(From from)
{
    return __builtin_bit_cast(To, from);
}

PTX f32 F(u32 x) { return bits<f32>(x); }
PTX f32 flushed(f32 x)
{
    const u32 b = bits<u32>(x);
    return b & 0x7f800000u ? x : F(b & 0x80000000u);
}

// ---- Integers -------------------------------------------------------------------------------------------------------

template <class T>
PTX T shl(T a, u32 n)
{
    return n >= sizeof(T) * 8 ? T(0) : T(a << n);
}

template <class T>
PTX T shr(T a, u32 n)  // of a signed type: fills with the sign
{
    const u32 last = sizeof(T) * 8 - 1;
    return n > last ? std::is_signed<T>::value ? T(a >> last) : T(0) : T(a >> n);
}

// "prmt": byte i of the result is the one of the eight bytes of b and a that bits 4 i to 4 i + 2 of the selector name,
// or eight times its sign where bit 4 i + 3 is set.
PTX u32 permuted_bytes(u32 a, u32 b, u32 selector)
{
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 chosen = selector >> 4 * i & 15, from = (chosen & 4 ? b : a) >> 8 * (chosen & 3) & 0xff;
        result |= (chosen & 8 ? (from & 0x80 ? 0xff : 0) : from) << 8 * i;
    }
    return result;
}

template <class T>
PTX T bfi(T a, T b, u32 position, u32 length)
{
    const u32 width = sizeof(T) * 8;
    position &= 255;
    length &= 255;
    if (position >= width)
        return b;
    const T mask = T((length >= width ? ~T(0) : (T(1) << length) - 1) << position);
    return (b & ~mask) | (T(a << position) & mask);
}

PTX u32 clz(u32 a) { return a ? __builtin_clz(a) : 32; }
PTX u32 clz(u64 a) { return a ? __builtin_clzll(a) : 64; }

// Division by zero gives all ones on a GPU; on a CPU it ends the process.
template <class T>
PTX T divided(T a, T b)
{
    return b == 0 ? T(~T(0)) : b == T(-1) && std::is_signed<T>::value ? T(0) - a : a / b;
}

template <class T>
PTX T remainder_of(T a, T b)
{
    return b == 0 ? a : b == T(-1) && std::is_signed<T>::value ? T(0) : a % b;
}

// ---- Floats ---------------------------------------------------------------------------------------------------------

PTX f32 largest(f32 a, f32 b)  // a number wins over NaN, +0 over -0
{
    a = flushed(a);
    b = flushed(b);
    return a != a ? b : b != b ? a : a == b ? F(bits<u32>(a) & bits<u32>(b)) : a > b ? a : b;
}

PTX f32 smallest(f32 a, f32 b)
{
    a = flushed(a);
    b = flushed(b);
    return a != a ? b : b != b ? a : a == b ? F(bits<u32>(a) | bits<u32>(b)) : a < b ? a : b;
}

PTX f32 saturated(f32 a) { return a > 0.0f ? a < 1.0f ? a : 1.0f : 0.0f; }  // NaN gives 0

// The next float below x, a finite number.
PTX f32 below(f32 x)
{
    const u32 b = bits<u32>(x);
    return F(b == 0 ? 0x80000001u : b >> 31 ? b + 1 : b - 1);
}

// a b + c rounded down: the product is exact in a double, and so are sum and error together.
PTX_CALL f32 fma_down(f32 a, f32 b, f32 c)
{
    const f64 product = f64(a) * f64(b), sum = product + f64(c);
    if (!(sum - sum == 0.0))  // infinity, NaN
        return f32(sum);
    const f64 virtual_c = sum - product, error = (product - (sum - virtual_c)) + (f64(c) - virtual_c);
    f32 result = f32(sum);
    if (result - result != 0.0f)
        return sum > 0 ? F(0x7f7fffffu) : result;  // a finite sum above the largest float
    if (f64(result) > sum || (f64(result) == sum && error < 0))
        result = below(result);
    return flushed(result);
}

// ---- Approximate instructions ---------------------------------------------------------------------------------------

// +1 or -1: the direction of an error, by the bits of the argument (Knuth's multiplicative hash).
PTX f64 direction(f32 argument) { return bits<u32>(argument) * 2654435761u >> 31 ? 1 : -1; }

// `exact` correctly rounded; at its worst, so many ulps away from it. The ulp is that of the correctly rounded result.
PTX f32 within_ulps(f64 exact, int ulps, f32 argument)
{
    const f32 nearest = f32(exact);
#if defined(PTX_WORST)
    if (nearest != 0.0f && nearest - nearest == 0.0f)
        return f32(nearest + direction(argument) * ulps * 0x1p-23 * f64(F(bits<u32>(nearest) & 0x7f800000u)));
#endif
    (void)ulps, (void)argument;
    return nearest;
}

// `exact`, not negative, correctly rounded; at its worst, the last float whose relative error is not above `error`.
PTX f32 within_relative(f64 exact, f64 error, f32 argument)
{
    const f32 nearest = f32(exact);
#if defined(PTX_WORST)
    if (nearest - nearest == 0.0f) {
        const f32 result = f32(exact + direction(argument) * error * exact);
        return std::fabs(f64(result) - exact) <= error * exact ? result : std::nextafter(result, nearest);
    }
#endif
    (void)error, (void)argument;
    return nearest;
}

// "ex2": at most 2 ulp from the correctly rounded result; exactly 1 of zero, to which subnormal arguments are flushed.
PTX_CALL f32 ex2_approx(f32 a) { return a == 0.0f ? 1.0f : within_ulps(std::exp2(f64(a)), 2, a); }

// "rcp": at most 1 ulp.
PTX_CALL f32 rcp_approx(f32 a) { return within_ulps(1.0 / f64(a), 1, a); }

// "div": at most 2 ulp where 2^-126 <= |b| <= 2^126; beyond, 0 of a finite dividend and NaN of an infinite one.
PTX_CALL f32 div_approx(f32 a, f32 b)
{
    const f32 size = std::fabs(b);
    if (size > 0x1p126f && size - size == 0.0f)
        return a - a == 0.0f ? std::copysign(0.0f, F(bits<u32>(a) ^ bits<u32>(b))) : a - a;
    return within_ulps(f64(a) / f64(b), 2, F(bits<u32>(a) ^ bits<u32>(b)));
}

// "rsqrt": a relative error of at most 2^-22.9.
PTX_CALL f32 rsqrt_approx(f32 a) { return within_relative(1.0 / std::sqrt(f64(a)), 0x1.125fbp-23, a); }

// ---- Conversions ----------------------------------------------------------------------------------------------------

PTX u32 bf16_of(f32 x)  // to nearest, ties to even
{
    const u32 b = bits<u32>(x);
    if ((b & 0x7fffffffu) > 0x7f800000u)
        return 0x7fffu;
    return (b + 0x7fffu + (b >> 16 & 1u)) >> 16;
}

PTX u32 tf32_of(f32 x)  // to nearest, ties away from zero
{
    const u32 b = bits<u32>(x);
    if ((b & 0x7f800000u) == 0x7f800000u)
        return b;
    return (b + 0x1000u) & 0xffffe000u;
}
