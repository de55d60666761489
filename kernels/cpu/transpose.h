// Rows of numbers side by side, so that a lane of a vector is a row: what matrix products of many rows read.
#pragma once

#include "simd.h"

namespace rwkv_lab {

// x[j] lane i <- x[i] lane j. Every round zips the first half of the rows with the second.
INLINE void transpose_square(Vec *x) {
    constexpr int HALF = LANES / 2;
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 2 + i % 2 * LANES;
        high[i] = low[i] + HALF;
    }
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        Vec y[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < HALF; i++) {
#if defined(__clang__)
            for (int j = 0; j < LANES; j++) {
                y[2 * i][j] = low[j] < LANES ? x[i][low[j]] : x[i + HALF][low[j] - LANES];
                y[2 * i + 1][j] = high[j] < LANES ? x[i][high[j]] : x[i + HALF][high[j] - LANES];
            }
#else
            y[2 * i] = __builtin_shuffle(x[i], x[i + HALF], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + HALF], high);
#endif
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

// to[j * width ..] = lane j of every row, rows `stride` floats from one to the next; zeros for rows from `count` on.
template <int WIDTH>
INLINE void transpose_square(float *to, const float *rows, int64_t stride, int count) {
    Vec x[LANES];
    if (count >= std::min(WIDTH, LANES)) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = i < WIDTH ? load(rows + i * stride) : Vec{};
    } else {
        for (int i = 0; i < LANES; i++) x[i] = i < count ? load(rows + i * stride) : Vec{};
    }
    transpose_square(x);
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) store(to + j * WIDTH, x[j]);
}

// Adds products of float32 numbers, or of two pairs of bfloat16 numbers in each lane.
template <bool PAIRS>
INLINE Vec multiply_add(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    if constexpr (PAIRS) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

}  // namespace rwkv_lab
