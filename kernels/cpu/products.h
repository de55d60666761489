// Products of weight matrices, used where they lie, with the activations of a few tokens at once.
//
// With one token nothing is used twice, so the speed is that of reading the weights: bfloat16, float16, 8-bit and 4-bit
// weights become float32 in registers. With many tokens a tile of weights in the L1 cache serves all of them.
#pragma once

#include "quantised.h"

namespace rwkv_lab {

// ------------------------------------------------------------------ tiles: TR outputs of TB tokens

// Adds to sums[r * TB + b], whose lanes are still to be added up, for rows row .. row+TR-1 and tokens b0 .. b0+TB-1.
template <int F, int TR, int TB>
INLINE void dots(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
    constexpr int CHAINS = TR * TB == 1 ? 4 : 1;  // so that additions do not wait for each other
    const int n = w.columns;
    const int64_t first = row * n;
    int k = 0;
    if constexpr (CHAINS > 1) {
        Vec chains[CHAINS] = {};
        for (; k + CHAINS * LANES <= n; k += CHAINS * LANES) {
            constexpr int BYTES = CHAINS * LANES * (F == FLOAT32 ? 4 : 2);
#pragma GCC unroll 4
            for (int i = 0; i < BYTES; i += 64)
                prefetch_ahead<std::min(BYTES, 64)>(static_cast<const char *>(w.data) + (first + k) * (F == FLOAT32 ? 4 : 2) + i);
#pragma GCC unroll 4
            for (int i = 0; i < CHAINS; i++)
                chains[i] += widened<F>(w.data, first + k + i * LANES) * load(x.row(b0) + k + i * LANES);
        }
        sums[0] += (chains[0] + chains[1]) + (chains[2] + chains[3]);
    }
    for (; k + LANES <= n; k += LANES) {
        Vec weight[TR];
#pragma GCC unroll 4
        for (int r = 0; r < TR; r++) weight[r] = held(widened<F>(w.data, first + r * int64_t(n) + k));
#pragma GCC unroll 8
        for (int b = 0; b < TB; b++) {
            const Vec xb = held(load(x.row(b0 + b) + k));
#pragma GCC unroll 4
            for (int r = 0; r < TR; r++) sums[r * TB + b] += weight[r] * xb;
        }
    }
    if (k < n)
        for (int r = 0; r < TR; r++) {
            const Vec weight = widened_part<F>(w.data, first + r * int64_t(n) + k, n - k);
            for (int b = 0; b < TB; b++) sums[r * TB + b] += weight * load(x.row(b0 + b) + k);
        }
}

#if defined(BFLOAT_DOTS)
// bfloat16 weights and bfloat16 activations: products are exact, sums are float32.
template <int TR, int TB>
INLINE void bfloat_dots(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
    constexpr int CHAINS = TR * TB == 1 ? 4 : 1;
    const int n = w.columns;
    const auto *weights = static_cast<const uint16_t *>(w.data) + row * n;
    __m512 acc[TR * TB * CHAINS];
#pragma GCC unroll 16
    for (int i = 0; i < TR * TB * CHAINS; i++) acc[i] = _mm512_setzero_ps();
    int k = 0;
    if constexpr (CHAINS > 1)
        for (; k + 32 * CHAINS <= n; k += 32 * CHAINS)
#pragma GCC unroll 4
            for (int i = 0; i < CHAINS; i++) {
                prefetch_ahead<64>(weights + k + 32 * i);
                acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_loadu_si512(weights + k + 32 * i),
                                          (__m512bh)_mm512_loadu_si512(x.half + b0 * x.stride + k + 32 * i));
            }
    auto step = [&](int k, auto get) __attribute__((always_inline)) {
        __m512i weight[TR];
#pragma GCC unroll 4
        for (int r = 0; r < TR; r++) weight[r] = (__m512i)held((Vec)get(weights + r * int64_t(n) + k));
#pragma GCC unroll 8
        for (int b = 0; b < TB; b++) {
            const __m512i xb = _mm512_loadu_si512(x.half + (b0 + b) * x.stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < TR; r++) acc[r * TB + b] = _mm512_dpbf16_ps(acc[r * TB + b], (__m512bh)weight[r], (__m512bh)xb);
        }
    };
    for (; k + 32 <= n; k += 32) step(k, [](const uint16_t *at) { return _mm512_loadu_si512(at); });
    if (k < n) {
        const __mmask32 left = (uint32_t(1) << (n - k)) - 1;
        step(k, [left](const uint16_t *at) { return _mm512_maskz_loadu_epi16(left, at); });
    }
#pragma GCC unroll 16
    for (int i = 0; i < TR * TB * CHAINS; i++) sums[i / CHAINS] += (Vec)acc[i];
}
#endif

template <int F, bool BFLOAT, int TR, int TB>
INLINE void tile(const Tensor &w, int64_t row, const Rows &x, int64_t b0, Vec *sums) {
#if defined(BFLOAT_DOTS)
    if constexpr (BFLOAT && F == INT4) return int4_bfloat_dots<TR, TB>(w, row, x, b0, sums);
    if constexpr (BFLOAT) return bfloat_dots<TR, TB>(w, row, x, b0, sums);
#endif
    if constexpr (F == INT8)
        int8_dots<TR, TB>(w, row, x, b0, sums);
    else if constexpr (F == INT4)
        int4_dots<TR, TB>(w, row, x, b0, sums);
    else if constexpr (is_coded(F))
        dots_in<F, TR, TB>(w, row, x, b0, sums);
    else
        dots<F, TR, TB>(w, row, x, b0, sums);
}

// Rows first .. last-1 of tokens b .. b+TB-1, as many tiles at a time as make their sums fill whole vectors.
template <int F, bool BFLOAT, int TR, int TB>
void rows_by(const Tensor &w, int first, int last, const Rows &x, int64_t b, float *out, int64_t out_stride) {
    constexpr int TILES = std::max(LANES / (TR * TB), 1), SUMS = (TILES * TR * TB + LANES - 1) / LANES * LANES;
    int row = first;
    auto some = [&](auto tiles, auto rows) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(rows)::value;
        alignas(64) Vec sums[SUMS] = {};
#pragma GCC unroll 1
        for (int i = 0; i < decltype(tiles)::value; i++) tile<F, BFLOAT, ROWS, TB>(w, row + i * ROWS, x, b, sums + i * ROWS * TB);
        constexpr int COUNT = decltype(tiles)::value * ROWS * TB;
        for (int i = 0; i < COUNT; i += LANES) {
            float each[LANES];
            store(each, row_sums(reinterpret_cast<const float *>(sums + i)));
            for (int j = i; j < std::min(i + LANES, COUNT); j++) out[j % TB * out_stride + j / TB + row - first] = each[j - i];
        }
        row += COUNT / TB;
    };
    while (row + TILES * TR <= last) some(std::integral_constant<int, TILES>{}, std::integral_constant<int, TR>{});
    while (row < last) some(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{});
}

// Bytes of a row as it lies in memory.
template <int F>
INLINE int64_t stored_bytes(int columns) {
    if constexpr (F == INT8) return int64_t(columns + GROUP8 - 1) / GROUP8 * GROUP8;
    if constexpr (F == INT4) return int64_t(columns + LINE4 - 1) / LINE4 * LINE4 / 2;
    if constexpr (is_coded(F)) return F == ROWS8 ? columns : columns / 2;
    return int64_t(columns) * (F == FLOAT32 ? 4 : 2);
}

// A tile's rows come from memory for the first tokens, from the cache for the others. While the others are computed, memory
// has time to bring the next rows: each tile of tokens asks for its share of them.
template <int F, bool BFLOAT = false>
void dot_rows(const Tensor &w, int first, int last, const Rows &x, int64_t b0, int64_t b1, float *out, int64_t out_stride) {
    constexpr bool DECODED = is_coded(F);
    constexpr int MANY = DECODED ? 8 : 4, TR = DECODED ? 2 : 4, CACHED = 16;
    for (int row = first; row < last; row += CACHED) {
        const int end = std::min(row + CACHED, last);
        float *to = out + row - first;
        const int64_t size = stored_bytes<F>(w.columns) * (std::min(end + CACHED, last) - end);
        const char *next = static_cast<const char *>(w.data) + stored_bytes<F>(w.columns) * end;
        int64_t b = b0;
        for (; b + MANY <= b1; b += MANY) {
            for (int64_t i = size * (b - b0) / (b1 - b0); i < size * (b + MANY - b0) / (b1 - b0); i += 64)
                __builtin_prefetch(next + i, 0, 2);
            rows_by<F, BFLOAT, TR, MANY>(w, row, end, x, b, to + (b - b0) * out_stride, out_stride);
        }
        for (; b + 2 <= b1; b += 2) rows_by<F, BFLOAT, 4, 2>(w, row, end, x, b, to + (b - b0) * out_stride, out_stride);
        for (; b < b1; b++) rows_by<F, BFLOAT, DECODED ? 2 : 1, 1>(w, row, end, x, b, to + (b - b0) * out_stride, out_stride);
    }
}

// Activation k of token b, as a product with weights of format F reads it.
template <int F>
INLINE Vec factor(const Rows &x, int64_t b, int64_t k) {
#if defined(BFLOAT_DOTS)
    if constexpr (F == BFLOAT16) return broadcast(x.half ? bfloat_to_float(x.half[b * x.stride + k]) : rounded<BFLOAT16>(x.row(b)[k]));
#endif
    return broadcast(x.row(b)[k]);
}

// Rows of a block of outputs lie stride, which hardware does not foresee.
constexpr int SOON = 24;  // rows

template <int F>
INLINE void expect_row(const void *from, int64_t at, int n) {
    constexpr int SIZE = F == FLOAT32 ? 4 : 2;
    const char *first = static_cast<const char *>(from) + at * SIZE;
    for (int i = 0; i < n * SIZE; i += 64) __builtin_prefetch(first + i);
}

// Outputs at .. at+n-1, at most NV vectors of them, of TB tokens. WHOLE: n is NV vectors.
template <int F, int NV, int TB, bool WHOLE>
INLINE void add_block(const Tensor &w, int at, int n, const Rows &x, int64_t b0, float *out, int64_t out_stride) {
    Vec sums[TB * NV] = {};
    for (int k = 0; k < w.rows; k++) {
        const int64_t row = int64_t(k) * w.columns + at;
        expect_row<F>(w.data, row + int64_t(SOON) * w.columns, n);
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) {
            const int there = WHOLE ? LANES : std::clamp(n - i * LANES, 0, LANES);
            const Vec weight = there == LANES ? widened<F>(w.data, row + i * LANES) : widened_part<F>(w.data, row + i * LANES, there);
#pragma GCC unroll 6
            for (int b = 0; b < TB; b++) sums[b * NV + i] += weight * factor<F>(x, b0 + b, k);
        }
    }
    for (int b = 0; b < TB; b++) memcpy(out + b * out_stride, sums + b * NV, size_t(n) * sizeof(float));
}

template <int F, int TB>
void add_rows_of(const Tensor &w, int first, int last, const Rows &x, int64_t b0, float *out, int64_t out_stride) {
    constexpr int NV = 4;
    int at = first;
    for (; at + NV * LANES <= last; at += NV * LANES)
        add_block<F, NV, TB, true>(w, at, NV * LANES, x, b0, out + at - first, out_stride);
    for (; at + 2 * LANES <= last; at += 2 * LANES)
        add_block<F, 2, TB, true>(w, at, 2 * LANES, x, b0, out + at - first, out_stride);
    if (at < last) add_block<F, 2, TB, false>(w, at, last - at, x, b0, out + at - first, out_stride);
}

// Matrices [in,out]: every input adds its multiple of a row. A block of outputs stays in registers.
template <int F>
void add_rows(const Tensor &w, int first, int last, const Rows &x, int64_t b0, int64_t b1, float *out, int64_t out_stride) {
    int64_t b = b0;
    for (; b + 6 <= b1; b += 6) add_rows_of<F, 6>(w, first, last, x, b, out + (b - b0) * out_stride, out_stride);
    for (; b + 2 <= b1; b += 2) add_rows_of<F, 2>(w, first, last, x, b, out + (b - b0) * out_stride, out_stride);
    for (; b < b1; b++) add_rows_of<F, 1>(w, first, last, x, b, out + (b - b0) * out_stride, out_stride);
}

// Outputs first .. last-1 for tokens b0 .. b1-1: out[b - b0][i - first] = sum over k of W[i][k] x[b][k].
inline void product(const Tensor &w, int first, int last, const Rows &x, int64_t b0, int64_t b1, float *out, int64_t out_stride) {
    if (w.transposed) {
        if (w.format == FLOAT32) return add_rows<FLOAT32>(w, first, last, x, b0, b1, out, out_stride);
        if (w.format == BFLOAT16) return add_rows<BFLOAT16>(w, first, last, x, b0, b1, out, out_stride);
        return add_rows<FLOAT16>(w, first, last, x, b0, b1, out, out_stride);
    }
#if defined(BFLOAT_DOTS)
    if (x.half && w.format == BFLOAT16) return dot_rows<BFLOAT16, true>(w, first, last, x, b0, b1, out, out_stride);
    if (x.half && w.format == INT4) return dot_rows<INT4, true>(w, first, last, x, b0, b1, out, out_stride);
#endif
    switch (w.format) {
        case FLOAT32: return dot_rows<FLOAT32>(w, first, last, x, b0, b1, out, out_stride);
        case FLOAT16: return dot_rows<FLOAT16>(w, first, last, x, b0, b1, out, out_stride);
        case INT8: return dot_rows<INT8>(w, first, last, x, b0, b1, out, out_stride);
        case INT4: return dot_rows<INT4>(w, first, last, x, b0, b1, out, out_stride);
        case ROWS8: return dot_rows<ROWS8>(w, first, last, x, b0, b1, out, out_stride);
        case BLOCKS4: return dot_rows<BLOCKS4>(w, first, last, x, b0, b1, out, out_stride);
        case NF4: return dot_rows<NF4>(w, first, last, x, b0, b1, out, out_stride);
        default: return dot_rows<BFLOAT16>(w, first, last, x, b0, b1, out, out_stride);
    }
}

}  // namespace rwkv_lab
