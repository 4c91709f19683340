// The vectors of one instruction level, chosen by the flags that the including file is compiled with.
//
// A level provides W floats in one of its REGISTERS (Isa::V) and `expand`: W positions of a column, the values of the set bits of
// a mask in their places and zeros between, advancing the pointer past what it took. Nothing of the C++ library is used: an inline
// function of it, compiled here for a newer CPU, could be the copy that the linker keeps for all.

#ifndef DELTAWORKS_ISA_H
#define DELTAWORKS_ISA_H

#include <cstdint>
#include <cstring>

#if defined(DW_AVX512) || defined(DW_AVX2)
#include <immintrin.h>
#endif

namespace {

#define DW_INLINE static inline __attribute__((always_inline))
#define DW_APART static __attribute__((noinline))  // a loop that has the registers for itself

struct Bf16 {
    uint16_t bits;
};

DW_INLINE float number(int8_t value) { return static_cast<float>(value); }
DW_INLINE float number(float value) { return value; }
DW_INLINE float number(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
DW_INLINE void assign(float* p, float value) { *p = value; }
DW_INLINE void assign(Bf16* p, float value) {  // to nearest, ties to even; a NaN stays a NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
    p->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

// Any CPU, and value kinds for which a level has no instruction.
template <int W, typename Value>
DW_INLINE void expand_plain(const Value*& values, uint32_t mask, float* out) {
    for (int i = 0; i < W; ++i) out[i] = 0;
    for (; mask; mask &= mask - 1) out[__builtin_ctz(mask)] = number(*values++);
}

#if defined(DW_AVX512)

struct Isa {
    static constexpr int W = 16;
    static constexpr int REGISTERS = 32;
    using V = __m512;
    DW_INLINE V zero() { return _mm512_setzero_ps(); }
    DW_INLINE V set(float value) { return _mm512_set1_ps(value); }
    DW_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
    DW_INLINE void store(float* p, V value) { _mm512_storeu_ps(p, value); }
    DW_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    DW_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
    DW_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
    DW_INLINE float sum(V value) { return _mm512_reduce_add_ps(value); }
    DW_INLINE uint32_t mask(const uint8_t* bits, int chunk) {
        uint16_t result;
        std::memcpy(&result, bits + 2 * static_cast<size_t>(chunk), 2);
        return result;
    }
    DW_INLINE __m512i wide(const int8_t* p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    DW_INLINE __m512i wide(const Bf16* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    DW_INLINE __m512i wide(const float* p) { return _mm512_loadu_si512(p); }
    DW_INLINE V numbers(const int8_t*, __m512i value) { return _mm512_cvtepi32_ps(value); }
    DW_INLINE V numbers(const Bf16*, __m512i value) { return _mm512_castsi512_ps(_mm512_slli_epi32(value, 16)); }
    DW_INLINE V numbers(const float*, __m512i value) { return _mm512_castsi512_ps(value); }
    template <typename Value>
    DW_INLINE V dense(const Value* p) { return numbers(p, wide(p)); }
    // The register form of vpexpandd: from memory it is microcode on some CPUs.
    template <typename Value>
    DW_INLINE V expand(const Value*& values, uint32_t mask) {
        const V result = numbers(values, _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), wide(values)));
        values += __builtin_popcount(mask);
        return result;
    }
};

#elif defined(DW_AVX2)

// Shuffle controls: byte j of entry m is the rank of bit j among the set bits of m, 0x80 (a zero) where the bit is not set.
struct Shuffles {
    alignas(64) uint64_t bytes[256];
    constexpr Shuffles() : bytes() {
        for (int m = 0; m < 256; ++m) {
            uint64_t control = 0;
            int rank = 0;
            for (int j = 0; j < 8; ++j) control |= static_cast<uint64_t>((m >> j & 1) ? rank++ : 0x80) << (8 * j);
            bytes[m] = control;
        }
    }
};
constexpr Shuffles SHUFFLES;

struct Isa {
    static constexpr int W = 8;
    static constexpr int REGISTERS = 16;
    using V = __m256;
    DW_INLINE V zero() { return _mm256_setzero_ps(); }
    DW_INLINE V set(float value) { return _mm256_set1_ps(value); }
    DW_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
    DW_INLINE void store(float* p, V value) { _mm256_storeu_ps(p, value); }
    DW_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    DW_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
    DW_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
    DW_INLINE float sum(V value) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    DW_INLINE uint32_t mask(const uint8_t* bits, int chunk) { return bits[chunk]; }
    DW_INLINE V dense(const int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }
    DW_INLINE V dense(const Bf16* p) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    DW_INLINE V dense(const float* p) { return load(p); }
    DW_INLINE V expand(const int8_t*& values, uint32_t mask) {
        const __m128i taken = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
        const __m128i placed = _mm_shuffle_epi8(taken, _mm_cvtsi64_si128(static_cast<int64_t>(SHUFFLES.bytes[mask])));
        values += __builtin_popcount(mask);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(placed));
    }
    DW_INLINE V expand(const Bf16*& values, uint32_t mask) {
        const __m256i order = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(SHUFFLES.bytes[mask])));
        const __m256i taken = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
        const __m256i placed = _mm256_slli_epi32(_mm256_permutevar8x32_epi32(taken, order), 16);
        values += __builtin_popcount(mask);
        return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srai_epi32(order, 31), placed));
    }
    DW_INLINE V expand(const float*& values, uint32_t mask) {
        const __m256i order = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(SHUFFLES.bytes[mask])));
        const __m256 placed = _mm256_permutevar8x32_ps(load(values), order);
        values += __builtin_popcount(mask);
        return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(order, 31)), placed);
    }
};

#else

struct Isa {
    static constexpr int W = 4;
    static constexpr int REGISTERS = 16;
    typedef float V __attribute__((vector_size(16)));
    DW_INLINE V zero() { return V{}; }
    DW_INLINE V set(float value) { return value - V{}; }
    DW_INLINE V load(const float* p) {
        V result;
        std::memcpy(&result, p, sizeof(V));
        return result;
    }
    DW_INLINE void store(float* p, V value) { std::memcpy(p, &value, sizeof(V)); }
    DW_INLINE V fma(V a, V b, V c) { return a * b + c; }
    DW_INLINE V add(V a, V b) { return a + b; }
    DW_INLINE V mul(V a, V b) { return a * b; }
    DW_INLINE float sum(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
    DW_INLINE uint32_t mask(const uint8_t* bits, int chunk) { return bits[chunk >> 1] >> (chunk & 1) * 4 & 15u; }
    template <typename Value>
    DW_INLINE V dense(const Value* p) {
        V result;
        for (int i = 0; i < W; ++i) result[i] = number(p[i]);
        return result;
    }
    template <typename Value>
    DW_INLINE V expand(const Value*& values, uint32_t mask) {
        float out[W];
        expand_plain<W>(values, mask, out);
        return load(out);
    }
};

#endif

// 8 x 8 floats: rows in, columns out.
#if defined(DW_AVX512) || defined(DW_AVX2)
DW_INLINE void transpose8(__m256* r) {
    __m256 t[8], s[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            s[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            s[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xEE);
        }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
    }
}
DW_INLINE __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
DW_INLINE __m256 eight(const Bf16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
DW_INLINE void put_eight(float* p, __m256 value) { _mm256_storeu_ps(p, value); }
DW_INLINE void put_eight(Bf16* p, __m256 value) {
    const __m256i bits = _mm256_castps_si256(value), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), nan);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(words));
}
#endif

// W numbers; bf16 to nearest.
DW_INLINE void put(float* p, Isa::V value) { Isa::store(p, value); }
DW_INLINE void put(Bf16* p, Isa::V value) {
    float numbers[Isa::W];
    Isa::store(numbers, value);
#if defined(DW_AVX512) || defined(DW_AVX2)
    for (int i = 0; i < Isa::W; i += 8) put_eight(p + i, _mm256_loadu_ps(numbers + i));
#else
    for (int i = 0; i < Isa::W; ++i) assign(p + i, numbers[i]);
#endif
}

}  // namespace

#endif
