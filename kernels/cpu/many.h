// Products with so many tokens that arithmetic is what takes time: a lane is a token, and every weight is broadcast.
//
// A weight that has been read serves all tokens at once, and no lanes are left to be added up.
#pragma once

#include "quantised.h"
#include "transpose.h"

namespace rwkv_lab {

constexpr int FEWEST = 3 * LANES / 4;                           // tokens from which on this is the faster way
constexpr int TOGETHER = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // outputs whose sums fill the registers, for two vectors

// Activations of B tokens, LANES of them side by side: [vectors][units][LANES], a unit being one float32 or two bfloat16.
struct PackedRows {
    const float *at = nullptr;
    int64_t units = 0;  // padded
    int vectors = 0;
    bool pairs = false;
};

// Whether weights of this format are multiplied in pairs. Codes of 8 and 4 bits are bfloat16 numbers, too.
inline bool takes_pairs([[maybe_unused]] const Tensor &w, [[maybe_unused]] const Rows &x) {
#if defined(BFLOAT_DOTS)
    return x.half && (w.format == BFLOAT16 || w.format == INT8 || w.format == INT4);
#else
    return false;
#endif
}

inline int64_t packed_units(const Tensor &w, bool pairs) {
    return pairs ? round_up((w.columns + 1) / 2, GROUP8 / 2) : round_up(w.columns, LANES);  // whole groups of codes
}

inline int64_t packed_size(const Tensor &w, const Rows &x, int64_t B) {
    return (B + LANES - 1) / LANES * LANES * packed_units(w, takes_pairs(w, x));
}

// Packs x for products with w, into `scratch` of packed_size floats.
inline PackedRows pack(const Tensor &w, const Rows &x, int64_t B, float *scratch) {
    const bool pairs = takes_pairs(w, x);
    PackedRows out{scratch, packed_units(w, pairs), int((B + LANES - 1) / LANES), pairs};
    for (int v = 0; v < out.vectors; v++) {
        const int64_t b0 = int64_t(v) * LANES;
        const int count = int(std::min<int64_t>(LANES, B - b0));
        const float *rows = pairs ? reinterpret_cast<const float *>(x.half + b0 * x.stride) : x.row(b0);
        for (int64_t u = 0; u < out.units; u += LANES, scratch += LANES * LANES)
            transpose_square<LANES>(scratch, rows + u, pairs ? x.stride / 2 : x.stride, count);
    }
    return out;
}

// One row of a matrix as float32; `to` holds whole groups.
inline void decode_row(const Tensor &w, int64_t row, float *to) {
    if (!is_coded(w.format)) {
        load_row(to, {w.data, w.format}, row * w.columns, w.columns, round_up(w.columns, LANES));
        return;
    }
    const int group = group_of(w);
    for (int i = 0; i < w.columns; i += LANES) store(to + i, codes_of(w, row, i) * scale_of(w, row, i / group));
}

// One row's codes as bfloat16, which loses nothing, in whole lines.
inline void decode_codes([[maybe_unused]] const Tensor &w, [[maybe_unused]] int64_t row, [[maybe_unused]] uint16_t *to) {
#if defined(BFLOAT_DOTS)
    if (w.format == INT8) {
        for (int i = 0; i < round_up(w.columns, GROUP8); i += 2 * LANES)
            _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)codes_of(w, row, i + LANES), (__m512)codes_of(w, row, i)));
        return;
    }
    const __m512i values = code_values();
    const int lines = round_up(w.columns, LINE4) / LINE4;
    const auto *words = static_cast<const uint16_t *>(w.data) + row * lines * 32;
    for (int line = 0; line < lines; line++, words += 32, to += LINE4) {
        const __m512i some = _mm512_loadu_si512(words);
#pragma GCC unroll 4
        for (int group = 0; group < 4; group++)
            _mm512_storeu_si512(to + group * GROUP4, _mm512_permutexvar_epi16(_mm512_srli_epi16(some, 4 * group), values));
    }
#endif
}

// sums[r][v] += the products of ROWS rows of weights, `stride` bytes from one to the next, with NV vectors of tokens. HALF:
// the last unit has only its first bfloat16.
template <bool PAIRS, int ROWS, int NV>
INLINE void lanes_of(const char *weights, int64_t stride, const float *x, int64_t x_stride, int64_t units, bool half,
                     const char *next, Vec (&sums)[ROWS][NV]) {
    auto step = [&](int64_t u, auto get) __attribute__((always_inline)) {
        Vec xs[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) xs[v] = held(load(x + v * x_stride + u * LANES));
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const Vec weight = broadcast(get(weights + r * stride + 4 * u));
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) sums[r][v] = multiply_add<PAIRS>(sums[r][v], weight, xs[v]);
        }
    };
    const auto whole = [](const char *at) __attribute__((always_inline)) {
        float out;
        memcpy(&out, at, 4);
        return out;
    };
    int64_t u = 0;
    for (; u + 16 <= units; u += 16) {
        if (next)  // rows of the next block lie stride, which hardware does not foresee
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) __builtin_prefetch(next + r * stride + 4 * u, 0, 2);
#pragma GCC unroll 2
        for (int i = 0; i < 16; i++) step(u + i, whole);
    }
    for (; u < units; u++) step(u, whole);
    if (half)
        step(u, [](const char *at) __attribute__((always_inline)) {
            uint32_t bits = 0;
            memcpy(&bits, at, 2);
            float out;
            memcpy(&out, &bits, 4);
            return out;
        });
}

// A block of ROWS rows as the products read it.
struct Block {
    const char *weights;  // float32, bfloat16, or codes as bfloat16
    int64_t stride;        // bytes from row to row
    const char *next;     // the block behind it, where memory has to be asked for it
    int64_t next_bytes;   // of it, where its rows follow each other
    const float *scales;  // of codes, [groups][ROWS]; else null
};

template <int ROWS, int NV>
INLINE void clear(Vec (&sums)[ROWS][NV]) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sums[r][v] = Vec{};
}

template <bool PAIRS, int ROWS, int NV>
INLINE void lanes_block(const Tensor &w, const Block &block, const PackedRows &x, int v, int64_t B, float *out, int64_t out_stride) {
    Vec sums[ROWS][NV];
    clear(sums);
    const float *xs = x.at + v * x.units * LANES;
    const int64_t x_stride = x.units * LANES;
    if (PAIRS && block.scales) {
        const int units = group_of(w) / 2, groups = round_up(w.columns, 2 * units) / (2 * units);
        for (int g = 0; g < groups; g++) {
            if (block.next)
                for (int64_t i = block.next_bytes * g / groups; i < block.next_bytes * (g + 1) / groups; i += 64)
                    __builtin_prefetch(block.next + i, 0, 2);
            Vec part[ROWS][NV];
            clear(part);
            lanes_of<PAIRS, ROWS, NV>(block.weights + 4 * g * units, block.stride, xs + int64_t(g) * units * LANES, x_stride, units,
                                      false, nullptr, part);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const Vec scale = broadcast(block.scales[g * ROWS + r]);
#pragma GCC unroll 2
                for (int i = 0; i < NV; i++) sums[r][i] += part[r][i] * scale;
            }
        }
    } else {
        const int64_t units = PAIRS ? w.columns / 2 : w.columns;
        lanes_of<PAIRS, ROWS, NV>(block.weights, block.stride, xs, x_stride, units, PAIRS && w.columns % 2, block.next, sums);
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < NV; i++) {
            float each[LANES];
            store(each, sums[r][i]);
            const int64_t b0 = int64_t(v + i) * LANES;
            const int count = int(std::min<int64_t>(LANES, B - b0));
            for (int b = 0; b < count; b++) out[(b0 + b) * out_stride + r] = each[b];
        }
}

// Rows row .. row+ROWS-1 as the products read them: where they are stored, or unpacked into `scratch` of ROWS padded rows and scales.
template <bool PAIRS, int ROWS>
INLINE Block block_of(const Tensor &w, int row, float *scratch) {
    const bool codes = is_coded(w.format);
    if (!codes && (PAIRS || w.format == FLOAT32)) {
        const int64_t stride = int64_t(w.columns) * (PAIRS ? 2 : 4);
        const char *from = static_cast<const char *>(w.data) + row * stride;
        return {from, stride, row + 2 * ROWS <= w.rows ? from + ROWS * stride : nullptr, 0, nullptr};
    }
    const int64_t wide = round_up(w.columns, PADDED);
    float *scales = nullptr;
    for (int r = 0; r < ROWS; r++)
        if (PAIRS)
            decode_codes(w, row + r, reinterpret_cast<uint16_t *>(scratch) + r * wide);
        else
            decode_row(w, row + r, scratch + r * wide);
    if (PAIRS) {
        scales = scratch + ROWS * wide / 2;
        for (int g = 0; g < round_up(w.columns, group_of(w)) / group_of(w); g++)
            for (int r = 0; r < ROWS; r++) scales[g * ROWS + r] = scale_of(w, row + r, g);
    }
    const int64_t stored = w.format == INT4 ? round_up(w.columns, LINE4) / 2 : round_up(w.columns, GROUP8);
    const bool ask = PAIRS && row + 2 * ROWS <= w.rows;
    return {reinterpret_cast<const char *>(scratch), wide * (PAIRS ? 2 : 4),
            ask ? static_cast<const char *>(w.data) + (row + ROWS) * stored : nullptr, ROWS * stored, scales};
}

// Outputs first .. last-1 of all B tokens, as `product` gives them.
inline void product_of_many(const Tensor &w, int first, int last, const PackedRows &x, int64_t B, float *out, int64_t out_stride) {
    thread_local std::unique_ptr<Buffer> scratch;
    thread_local int64_t size = 0;
    const int64_t needed = TOGETHER * (int64_t(round_up(w.columns, PADDED)) + LANES);
    if (size < needed) scratch = std::make_unique<Buffer>(size_t(size = needed));
    auto some = [&](int row, auto pairs, auto rows) __attribute__((always_inline)) {
        constexpr int ROWS = decltype(rows)::value;
        constexpr bool PAIRS = decltype(pairs)::value;
        Block block = block_of<PAIRS, ROWS>(w, row, scratch->get());
        float *to = out + row - first;
        int v = 0;
        for (; v + 2 <= x.vectors; v += 2, block.next = nullptr)
            lanes_block<PAIRS, ROWS, 2>(w, block, x, v, B, to, out_stride);
        if (v < x.vectors) lanes_block<PAIRS, ROWS, 1>(w, block, x, v, B, to, out_stride);
    };
    auto all = [&](auto pairs) __attribute__((always_inline)) {
        if (last - first < TOGETHER)
            for (int row = first; row < last; row++) some(row, pairs, std::integral_constant<int, 1>{});
        else  // at the end some once more, which is faster than one by one
            for (int row = first; row < last; row += TOGETHER)
                some(std::min(row, last - TOGETHER), pairs, std::integral_constant<int, TOGETHER>{});
    };
    if (x.pairs)
        all(std::true_type{});
    else
        all(std::false_type{});
}

}  // namespace rwkv_lab
