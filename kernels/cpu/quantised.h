// Products of weights in 8 and 4 bits: TR rows with TB tokens, added to sums[r * TB + b], whose lanes are still to be added up.
#pragma once

#include "weights.h"

namespace rwkv_lab {

constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// LANES numbers of 4 bits, two to a byte, from `bytes` on.
template <bool HIGH_FIRST>
INLINE Ints of_pairs(const uint8_t *bytes) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes));
#else
    int32_t four;
    memcpy(&four, bytes, 4);
    const __m128i both = _mm_cvtsi32_si128(four);
#endif
    const __m128i half = _mm_set1_epi8(15), low = _mm_and_si128(both, half), high = _mm_and_si128(_mm_srli_epi16(both, 4), half);
    const __m128i each = HIGH_FIRST ? _mm_unpacklo_epi8(high, low) : _mm_unpacklo_epi8(low, high);
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(each);
#else
    return (Ints)_mm256_cvtepu8_epi32(each);
#endif
#else
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = bytes[i / 2] >> (HIGH_FIRST == (i % 2 == 0) ? 4 : 0) & 15;
    return out;
#endif
}

INLINE Vec nf4_levels(Ints numbers) {
#if defined(__AVX512F__)
    return (Vec)_mm512_permutexvar_ps((__m512i)numbers, _mm512_loadu_ps(NF4_LEVELS));
#elif defined(__AVX2__)
    return (Vec)_mm256_i32gather_ps(NF4_LEVELS, (__m256i)numbers, 4);
#else
    Vec out;
    for (int i = 0; i < LANES; i++) out[i] = NF4_LEVELS[numbers[i]];
    return out;
#endif
}

// The zero point of 32 numbers of BLOCKS4.
INLINE int zero_of(const Tensor &w, int64_t row, int group) { return w.zeros[row * (w.columns / GROUP8) + group / 2] >> (4 * (group % 2)) & 15; }

// Codes in one of the formats without padding, LANES of them from number `at` of their row on, before their scale.
template <int F>
INLINE Vec codes_in(const Tensor &w, int64_t row, int at) {
    if constexpr (F == ROWS8) return widened<INT8>(w.data, row * w.columns + at);
    const uint8_t *pairs = static_cast<const uint8_t *>(w.data) + (row * w.columns + at) / 2;
    if constexpr (F == NF4) return nf4_levels(of_pairs<true>(pairs));
    return __builtin_convertvector(of_pairs<false>(pairs) - zero_of(w, row, at / GROUP4), Vec);
}

// Codes of 8 or 4 bits, LANES of them from number `at` of their row on.
INLINE Vec codes_of(const Tensor &w, int64_t row, int at) {
    if (w.format == INT8) return widened<INT8>(w.data, row * round_up(w.columns, GROUP8) + at);
    if (w.format == ROWS8) return codes_in<ROWS8>(w, row, at);
    if (w.format == BLOCKS4) return codes_in<BLOCKS4>(w, row, at);
    if (w.format == NF4) return codes_in<NF4>(w, row, at);
    const auto *words = static_cast<const uint16_t *>(w.data) + row * round_up(w.columns, LINE4) / 4 + at / LINE4 * 32;
    Halves some;
    memcpy(&some, words + at % GROUP4, sizeof some);
    const Ints codes = (__builtin_convertvector(some, Ints) >> (4 * (at % LINE4 / GROUP4)) & 15) - 8;
    return __builtin_convertvector(codes, Vec);
}

INLINE int group_of(const Tensor &w) { return w.format == INT4 || w.format == BLOCKS4 ? GROUP4 : GROUP8; }

INLINE float scale_of(const Tensor &w, int64_t row, int group) {
    const auto *wide = static_cast<const float *>(w.scales);
    if (w.format == ROWS8) return wide[row];
    if (w.format == BLOCKS4) return wide[row * (w.columns / GROUP4) + group];
    if (w.format == NF4) return wide[row * (w.columns / GROUP8) + group];
    const int groups = w.format == INT8 ? (w.columns + GROUP8 - 1) / GROUP8 : round_up(w.columns, LINE4) / GROUP4;
    return bfloat_to_float(short_scales(w)[row * groups + group]);
}

template <int TR, int TB>
INLINE void int8_dots(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
    const int groups = (w.columns + GROUP8 - 1) / GROUP8;
    for (int g = 0; g < groups; g++) {
#pragma GCC unroll 4
        for (int r = 0; r < TR; r++) {
            const int64_t group = (row + r) * groups + g;
            prefetch_ahead<64>(static_cast<const int8_t *>(w.data) + group * GROUP8);
            const Vec scale = broadcast(bfloat_to_float(short_scales(w)[group]));
            Vec part[TB] = {};
#pragma GCC unroll 16
            for (int i = 0; i < GROUP8; i += LANES) {
                const Vec weight = widened<INT8>(w.data, group * GROUP8 + i);
#pragma GCC unroll 8
                for (int b = 0; b < TB; b++) part[b] += weight * load(x.row(b0 + b) + g * GROUP8 + i);
            }
#pragma GCC unroll 8
            for (int b = 0; b < TB; b++) sums[r * TB + b] += part[b] * scale;
        }
    }
}

// The same of the formats without padding.
template <int F, int TR, int TB>
INLINE void dots_in(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
    constexpr int GROUP = F == BLOCKS4 ? GROUP4 : GROUP8, PER_BYTE = F == ROWS8 ? 1 : 2;
    const auto *scales = static_cast<const float *>(w.scales);
    const int groups = w.columns / GROUP;
    for (int g = 0; g < groups; g++)
#pragma GCC unroll 4
        for (int r = 0; r < TR; r++) {
            const int64_t group = (row + r) * groups + g;
            prefetch_ahead<GROUP / PER_BYTE>(static_cast<const char *>(w.data) + group * (GROUP / PER_BYTE));
            const Vec scale = broadcast(F == ROWS8 ? scales[row + r] : scales[group]);
            Vec part[TB] = {};
#pragma GCC unroll 16
            for (int i = 0; i < GROUP; i += LANES) {
                const Vec weight = codes_in<F>(w, row + r, g * GROUP + i);
#pragma GCC unroll 8
                for (int b = 0; b < TB; b++) part[b] += weight * load(x.row(b0 + b) + g * GROUP + i);
            }
#pragma GCC unroll 8
            for (int b = 0; b < TB; b++) sums[r * TB + b] += part[b] * scale;
        }
}

// The 4-bit numbers in the lowest bits of each lane.
INLINE Vec nibbles(Ints x) {
#if defined(__AVX512F__)
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec)_mm512_permutexvar_ps((__m512i)x, values);
#else
    return __builtin_convertvector((x & 15) - 8, Vec);
#endif
}

// Numbers 0, 2, 4 .. and 1, 3, 5 .. of 2 LANES that follow each other: a 32-bit lane holds nibbles of two neighbours.
INLINE void every_other(const float *from, Vec &even, Vec &odd) {
#if defined(__AVX512F__)
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 low = (__m512)load(from), high = (__m512)load(from + LANES);
    even = (Vec)_mm512_permutex2var_ps(low, at, high);
    odd = (Vec)_mm512_permutex2var_ps(low, _mm512_add_epi32(at, _mm512_set1_epi32(1)), high);
#else
    for (int i = 0; i < LANES; i++) even[i] = from[2 * i], odd[i] = from[2 * i + 1];
#endif
}

template <int TR, int TB>
INLINE void int4_dots(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
    constexpr int CHAINS = TR * TB <= 2 ? 4 : 1;  // so that additions do not wait for each other
    const int lines = (w.columns + LINE4 - 1) / LINE4;
    Vec chains[TR * TB * CHAINS] = {};
    for (int line = 0; line < lines; line++)
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += LANES) {
            Ints words[TR];
#pragma GCC unroll 4
            for (int r = 0; r < TR; r++) {
                const auto *from = static_cast<const uint16_t *>(w.data) + ((row + r) * lines + line) * 32 + 2 * i;
                if (i == 0) prefetch_ahead<64>(from);
                memcpy(&words[r], from, sizeof words[r]);
            }
#pragma GCC unroll 4
            for (int group = 0; group < 4; group++)
#pragma GCC unroll 8
                for (int b = 0; b < TB; b++) {
                    Vec even, odd;
                    every_other(x.row(b0 + b) + line * LINE4 + group * GROUP4 + 2 * i, even, odd);
#pragma GCC unroll 4
                    for (int r = 0; r < TR; r++) {
                        const Vec scale = broadcast(bfloat_to_float(short_scales(w)[((row + r) * lines + line) * 4 + group]));
                        const Vec one = nibbles(words[r] >> (4 * group)), two = nibbles(words[r] >> (4 * group + 16));
                        chains[(r * TB + b) * CHAINS + group % CHAINS] += (one * even + two * odd) * scale;
                    }
                }
        }
#pragma GCC unroll 16
    for (int i = 0; i < TR * TB * CHAINS; i++) sums[i / CHAINS] += chains[i];
}

#if defined(BFLOAT_DOTS)
// Every number that 4 bits stand for is a bfloat16 number: one look-up makes 32 of them.
INLINE __m512i code_values() {
    constexpr uint16_t VALUES[32] = {  // -8 .. 7, twice: vpermw looks at five bits, of which the fifth means nothing here
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    return _mm512_loadu_si512(VALUES);
}

template <int TR, int TB>
INLINE void int4_bfloat_dots(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
    constexpr int CHAINS = TR * TB <= 2 ? 4 : 1;
    const __m512i values = code_values();
    const int lines = (w.columns + LINE4 - 1) / LINE4;
    Vec chains[TR * TB * CHAINS] = {};
    for (int line = 0; line < lines; line++) {
        __m512i words[TR];
#pragma GCC unroll 4
        for (int r = 0; r < TR; r++) {
            const auto *from = static_cast<const uint16_t *>(w.data) + ((row + r) * lines + line) * 32;
            prefetch_ahead<64>(from);
            words[r] = _mm512_loadu_si512(from);
        }
#pragma GCC unroll 4
        for (int group = 0; group < 4; group++) {
            __m512i xs[TB];
#pragma GCC unroll 8
            for (int b = 0; b < TB; b++) xs[b] = _mm512_loadu_si512(x.half + (b0 + b) * x.stride + line * LINE4 + group * GROUP4);
#pragma GCC unroll 4
            for (int r = 0; r < TR; r++) {
                const Vec scale = broadcast(bfloat_to_float(short_scales(w)[((row + r) * lines + line) * 4 + group]));
                const __m512i weight = _mm512_permutexvar_epi16(_mm512_srli_epi16(words[r], 4 * group), values);
#pragma GCC unroll 8
                for (int b = 0; b < TB; b++)
                    chains[(r * TB + b) * CHAINS + group % CHAINS] +=
                        (Vec)_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)weight, (__m512bh)xs[b]) * scale;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TR * TB * CHAINS; i++) sums[i / CHAINS] += chains[i];
}
#endif

}  // namespace rwkv_lab
