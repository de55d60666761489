// Vectors of consecutive elements of a tensor in any dtype, as float32.
#pragma once

#include "simd.h"

namespace rwkv_lab {

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE Vec from_bfloats(const uint16_t *from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from))), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))), 16);
#else
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return (Vec)(__builtin_convertvector(halves, Ints) << 16);
#endif
}

INLINE Vec from_halves(const uint16_t *from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(__F16C__) && defined(__AVX__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
    float x[LANES];
    for (int i = 0; i < LANES; i++) x[i] = half_to_float(from[i]);
    return load(x);
#endif
}

// LANES elements from element i on.
template <int DTYPE>
INLINE Vec elements(const void *data, int64_t i) {
    if constexpr (DTYPE == FLOAT32) return load(static_cast<const float *>(data) + i);
    if constexpr (DTYPE == BFLOAT16) return from_bfloats(static_cast<const uint16_t *>(data) + i);
    return from_halves(static_cast<const uint16_t *>(data) + i);
}

// LANES numbers rounded to the nearest bfloat16, ties to even; those numbers. Of NaN neither means anything.
INLINE Vec store_bfloats(uint16_t *to, Vec x) {
    const Ints bits = (Ints)x + 0x7fff + ((Ints)x >> 16 & 1), high = bits >> 16 & 0xffff;
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16((__m512i)high));
#elif defined(__AVX2__)
    const __m128i low_half = _mm256_castsi256_si128((__m256i)high), high_half = _mm256_extracti128_si256((__m256i)high, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm_packus_epi32(low_half, high_half));
#else
    const Halves halves = __builtin_convertvector(high, Halves);
    memcpy(to, &halves, sizeof halves);
#endif
    return (Vec)(bits & ~0xffff);
}

// Stores LANES numbers as elements from element i on, float32 or bfloat16; what they are there.
template <int DTYPE>
INLINE Vec store_elements(void *data, int64_t i, Vec x) {
    static_assert(DTYPE == FLOAT32 || DTYPE == BFLOAT16);
    if constexpr (DTYPE == BFLOAT16) return store_bfloats(static_cast<uint16_t *>(data) + i, x);
    store(static_cast<float *>(data) + i, x);
    return x;
}

}  // namespace rwkv_lab
