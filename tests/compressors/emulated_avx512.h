// The AVX-512 instructions that isa.h uses, in plain C++, so that the level's logic is tested on CPUs without them
// (compiled with -include this file). Written from the operations in Intel's Intrinsics Guide.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

template <typename To, typename From>
static inline To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
struct Floats { float at[16]; };
struct Ints { int32_t at[16]; };

static inline Floats zero() { return Floats{}; }
static inline Floats set(float value) {
    Floats r;
    for (float& one : r.at) one = value;
    return r;
}
static inline Floats load(const float* p) {
    Floats r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
static inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
static inline Ints load_bits(const void* p) {
    Ints r;
    std::memcpy(&r, p, sizeof r);
    return r;
}
static inline Floats fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < 16; ++i) c.at[i] = __builtin_fmaf(a.at[i], b.at[i], c.at[i]);
    return c;
}
static inline Floats add(Floats a, Floats b) {
    for (int i = 0; i < 16; ++i) a.at[i] += b.at[i];
    return a;
}
static inline Floats mul(Floats a, Floats b) {
    for (int i = 0; i < 16; ++i) a.at[i] *= b.at[i];
    return a;
}
static inline float sum(Floats v) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) v.at[i] += v.at[i + step];
    return v.at[0];
}
static inline Ints from_bytes(__m128i v) {
    int8_t bytes[16];
    std::memcpy(bytes, &v, 16);
    Ints r;
    for (int i = 0; i < 16; ++i) r.at[i] = bytes[i];
    return r;
}
static inline Ints from_words(__m256i v) {
    uint16_t words[16];
    std::memcpy(words, &v, 32);
    Ints r;
    for (int i = 0; i < 16; ++i) r.at[i] = words[i];
    return r;
}
static inline Floats to_floats(Ints v) {
    Floats r;
    for (int i = 0; i < 16; ++i) r.at[i] = static_cast<float>(v.at[i]);
    return r;
}
static inline Floats as_floats(Ints v) { return cast<Floats>(v); }
static inline Ints shift_left(Ints v, unsigned count) {
    for (int32_t& one : v.at) one = static_cast<int32_t>(static_cast<uint32_t>(one) << count);
    return v;
}
static inline Ints expand(uint16_t mask, Ints v) {  // DEST[i] := mask[i] ? SRC[next] : 0
    Ints r{};
    for (int i = 0, next = 0; i < 16; ++i)
        if (mask >> i & 1) r.at[i] = v.at[next++];
    return r;
}

}  // namespace emulated

#define __m512 emulated::Floats
#define __m512i emulated::Ints
#define _mm512_setzero_ps emulated::zero
#define _mm512_set1_ps emulated::set
#define _mm512_loadu_ps emulated::load
#define _mm512_storeu_ps emulated::store
#define _mm512_loadu_si512 emulated::load_bits
#define _mm512_fmadd_ps emulated::fma
#define _mm512_add_ps emulated::add
#define _mm512_mul_ps emulated::mul
#define _mm512_reduce_add_ps emulated::sum
#define _mm512_cvtepi8_epi32 emulated::from_bytes
#define _mm512_cvtepu16_epi32 emulated::from_words
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_castsi512_ps emulated::as_floats
#define _mm512_slli_epi32 emulated::shift_left
#undef _mm512_maskz_expand_epi32
#define _mm512_maskz_expand_epi32 emulated::expand
