// Weights where they lie, activations beside them, and weights as float32 in registers.
#pragma once

#include <type_traits>

#include "simd.h"

namespace rwkv_lab {

// Beside the dtypes of simd.h. A row of INT8 is padded to whole groups of 64 numbers, each with a scale; one of INT4 to
// lines of 128 numbers with four scales. Nibble j of 16-bit word i of a line is number 32 j + i, and 8 stands for zero.
// Scales are bfloat16. Padding holds zeros.
//
// The others have float32 scales and no padding: rows are whole groups of 64 numbers. ROWS8: a scale per row. BLOCKS4: two
// numbers to a byte, the first in its low half, a scale and a zero point for 32. NF4: the first in the high half, numbers of
// levels, a scale for 64.
enum Quantised { INT8 = 3, INT4 = 4, ROWS8 = 5, BLOCKS4 = 6, NF4 = 7 };
constexpr int GROUP8 = 64, GROUP4 = 32, LINE4 = 128;
constexpr bool is_coded(int64_t format) { return format >= INT8 && format <= NF4; }
constexpr int PADDED = 128;  // activations have zeros up to a multiple of it

// A parameter as the model has it. Matrices are [rows,columns]; `transposed` ones stand for their transposes.
struct Tensor {
    const void *data;
    const void *scales;
    int32_t format, rows, columns, transposed;
    int64_t bytes, scales_bytes;  // behind `data` and `scales`
    const uint8_t *zeros;         // of BLOCKS4, two to a byte
    int64_t zeros_bytes;

    int outputs() const { return transposed ? columns : rows; }
    int inputs() const { return transposed ? rows : columns; }
    int64_t row_bytes() const {  // of the memory that one output needs
        const int64_t n = inputs();
        if (format == INT8) return n + n / GROUP8 * 2;
        if (format == INT4) return n / 2 + n / GROUP4 * 2;
        if (format == ROWS8) return n;
        if (format == BLOCKS4 || format == NF4) return n / 2 + n / 8;
        return std::max<int64_t>(n, 1) * (format == FLOAT32 ? 4 : 2);
    }

    // Whether it is a [r,c], or has r c numbers in a row, and there is memory for all of it.
    bool is(int64_t r, int64_t c) const {
        if (r < 1 || c < 1 || !data || rows < 1 || columns < 1) return false;
        if ((rows != r || columns != c) && (r != 1 || int64_t(rows) * columns != c)) return false;
        const int64_t all = int64_t(rows) * columns;
        if (format == FLOAT32 || format == BFLOAT16 || format == FLOAT16) return bytes >= all * (format == FLOAT32 ? 4 : 2);
        if (transposed || !scales) return false;
        const int64_t groups8 = rows * ((int64_t(columns) + GROUP8 - 1) / GROUP8), lines = rows * ((int64_t(columns) + LINE4 - 1) / LINE4);
        if (format == INT8) return bytes >= groups8 * GROUP8 && scales_bytes >= 2 * groups8;
        if (format == INT4) return bytes >= lines * 64 && scales_bytes >= lines * 8;
        if (columns % GROUP8) return false;
        if (format == ROWS8) return bytes >= all && scales_bytes >= 4 * int64_t(rows);
        if (format == NF4) return bytes >= all / 2 && scales_bytes >= all / GROUP8 * 4;
        return format == BLOCKS4 && zeros && bytes >= all / 2 && scales_bytes >= all / GROUP4 * 4 && zeros_bytes >= all / GROUP8;
    }
};

// Of INT8 and INT4, bfloat16.
inline const uint16_t *short_scales(const Tensor &w) { return static_cast<const uint16_t *>(w.scales); }

// Rows of numbers, one row per token of the batch; in a bfloat16 model they lie there rounded as bfloat16, too.
struct Rows {
    float *at = nullptr;
    uint16_t *half = nullptr;
    int64_t stride = 0;

    float *row(int64_t b) const { return at + b * stride; }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BFLOAT_DOTS 1
#endif

// Rounds to a dtype: its numbers lose what the dtype cannot hold.
template <int D>
INLINE float rounded(float x) {
    if constexpr (D == BFLOAT16) return bfloat_to_float(float_to_bfloat(x));
    if constexpr (D == FLOAT16) return half_to_float(float_to_half(x));
    return x;
}

// ------------------------------------------------------------------ weights as float32

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

template <int F>
INLINE Vec widened(const void *from, int64_t at) {
    if constexpr (F == FLOAT32) return load(static_cast<const float *>(from) + at);
    if constexpr (F == INT8) {
#if defined(__AVX512F__)
        const auto *bytes = reinterpret_cast<const __m128i *>(static_cast<const int8_t *>(from) + at);
        return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
#elif defined(__AVX2__)
        const auto *bytes = reinterpret_cast<const __m128i *>(static_cast<const int8_t *>(from) + at);
        return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes)));
#endif
        Bytes x;
        memcpy(&x, static_cast<const int8_t *>(from) + at, sizeof x);
        return __builtin_convertvector(__builtin_convertvector(x, Ints), Vec);
    }
    Halves x;
    memcpy(&x, static_cast<const uint16_t *>(from) + at, sizeof x);
#if defined(__AVX512F__)
    if constexpr (F == BFLOAT16) return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif defined(__AVX2__)
    if constexpr (F == BFLOAT16) return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#endif
    if constexpr (F == BFLOAT16) return (Vec)(__builtin_convertvector(x, Ints) << 16);
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && defined(__AVX__)
    return (Vec)_mm256_cvtph_ps((__m128i)x);
#else
    Vec out;
    for (int i = 0; i < LANES; i++) out[i] = half_to_float(x[i]);
    return out;
#endif
}

// The first `count` of LANES numbers, zeros behind them.
template <int F>
INLINE Vec widened_part(const void *from, int64_t at, int count) {
    constexpr int SIZE = F == FLOAT32 ? 4 : 2;
    float part[LANES] = {};
    memcpy(part, static_cast<const char *>(from) + at * SIZE, size_t(count) * SIZE);
    return widened<F>(part, 0);
}

// ------------------------------------------------------------------ reading ahead

// Rows follow each other in memory, but hardware stops foreseeing at the end of a page.
constexpr int AHEAD = 8192;  // bytes

template <int BYTES>
INLINE void prefetch_ahead(const void *at) {
    if constexpr (BYTES == 64) __builtin_prefetch(static_cast<const char *>(at) + AHEAD, 0, 2);
    if constexpr (BYTES < 64)  // one request per line of the cache
        if ((reinterpret_cast<uintptr_t>(at) & 63) < BYTES) __builtin_prefetch(static_cast<const char *>(at) + AHEAD, 0, 2);
}

}  // namespace rwkv_lab
