// Matrix products of many rows in integers: weights in 8 and 4 bits as they are stored, activations rounded to 8 bits with
// a scale per row and group of the weights' groups.
//
// A group's products and sums are exact; then they are multiplied by both scales and added up in float32. Which
// instructions multiply four bytes at once is chosen when the library runs, not when it is compiled: all paths give the
// same integers.
#pragma once

#include <cmath>

#include "quantised.h"
#include "transpose.h"

namespace rwkv_lab {

constexpr int TILE = LANES == 16 ? 14 : LANES == 8 ? 6 : 4;  // rows: with 2 vectors each, all registers but those in use
constexpr int PATH_WIDTH = 16;                               // lanes of the widest path

// What a path multiplies: `groups` groups of `units_of_group` units of four bytes.
struct IntegerTile {
    const int32_t *x, *w;         // [units][TILE], [units][panel]
    const float *x_scales;        // [groups][TILE]
    const int32_t *starts;        // the same, what a group's sum begins with
    const float *w_scales;        // [groups][panel]
    int64_t groups;
    int units_of_group;
};

}  // namespace rwkv_lab

// ------------------------------------------------------------------ the paths

#if defined(__x86_64__) && !defined(__clang__)
#define INTEGER_PATHS_OF_X86 1

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define INTEGER_PATH by_avx2
#define INTEGER_WIDTH 8
#define INTEGER_BIAS 0
// |w| times x with w's sign: pairs of such products stay below 2^15.
#define INTEGER_DOT                                                                                                       \
    sum + (Sums)_mm256_madd_epi16(                                                                                        \
              _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w)),                \
              _mm256_set1_epi16(1))
#include "integer_path.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avxvnni")
#define INTEGER_PATH by_avx_vnni
#define INTEGER_WIDTH 8
#define INTEGER_BIAS 128
#define INTEGER_DOT (Sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x)
#include "integer_path.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#define INTEGER_PATH by_avx512_vnni
#define INTEGER_WIDTH 16
#define INTEGER_BIAS 128
#define INTEGER_DOT (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x)
#include "integer_path.h"
#pragma GCC pop_options
#endif

#define INTEGER_PATH by_any
#define INTEGER_WIDTH LANES
#define INTEGER_BIAS 0
#define INTEGER_DOT                                                                                                       \
    sum + ((w << 24) >> 24) * ((x << 24) >> 24) + ((w << 16) >> 24) * ((x << 16) >> 24) +                                 \
        ((w << 8) >> 24) * ((x << 8) >> 24) + (w >> 24) * (x >> 24)
#include "integer_path.h"

namespace rwkv_lab {

enum IntegerPath { NO_INTEGERS = 0, ANY = 1, AVX2 = 2, AVX_VNNI = 3, AVX512_VNNI = 4 };

struct Path {
    int width, bias;  // lanes of a vector; what is added to the codes of 8 bits
    void (*multiply)(const IntegerTile &, float *);
};

inline Path path_of(int64_t which) {
#if defined(INTEGER_PATHS_OF_X86)
    if (which == AVX2) return {by_avx2::WIDTH, by_avx2::BIAS, by_avx2::multiply};
    if (which == AVX_VNNI) return {by_avx_vnni::WIDTH, by_avx_vnni::BIAS, by_avx_vnni::multiply};
    if (which == AVX512_VNNI) return {by_avx512_vnni::WIDTH, by_avx512_vnni::BIAS, by_avx512_vnni::multiply};
#endif
    return {by_any::WIDTH, by_any::BIAS, by_any::multiply};
}

// Whether the processor that this runs on has a path.
inline bool has_path(int64_t which) {
#if defined(INTEGER_PATHS_OF_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (which == AVX2) return avx2;
    if (which == AVX_VNNI) return avx2 && __builtin_cpu_supports("avxvnni");
    if (which == AVX512_VNNI)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return which == ANY;
}

// ------------------------------------------------------------------ activations

// A tile of packed rows (matmul.h) rounded: group by group of `group` numbers, those behind k being 0.
struct RoundedRows {
    int64_t groups;
    int group, offset;  // offset: what lies on top of the weights' codes
    int32_t *x;         // [tiles][groups * group / 4][TILE], four numbers in each
    float *scales;      // [tiles][groups][TILE]
    int32_t *starts;    // the same: minus `offset` times the sum of the numbers

    int32_t *of_tile(int64_t tile) const { return x + tile * groups * (group / 4) * TILE; }
    float *scales_of(int64_t tile) const { return scales + tile * groups * TILE; }
    int32_t *starts_of(int64_t tile) const { return starts + tile * groups * TILE; }
    static int64_t words_of(int64_t tiles, int64_t groups, int group) { return tiles * groups * TILE * (group / 4 + 2); }
};

INLINE void keep_tile(int32_t *to, Ints x, bool is_last) { memcpy(to, &x, is_last ? 4 * TILE : sizeof x); }

// Rounds one tile of rows of k numbers, packed as float32 or as pairs of bfloat16.
template <bool PAIRS>
void round_tile(const RoundedRows &to, int64_t tile, const float *packed, int64_t k) {
    constexpr float SHIFT = 12582912.0f, TINY = 1.17549435e-38f;  // 1.5 * 2^23 rounds to a whole number, ties to even
    constexpr int64_t PER_UNIT = PAIRS ? 2 : 1;
    const int64_t units = (k + PER_UNIT - 1) / PER_UNIT, units_of_group = to.group / PER_UNIT;
    float copy[GROUP8 * TILE + LANES];
    for (int64_t g = 0; g < to.groups; g++) {
        const int64_t first = g * units_of_group, there = std::clamp<int64_t>(units - first, 0, units_of_group);
        const float *at = packed + (tile * units + first) * TILE;
        if (first + there >= units) {  // a whole vector would reach over the last unit
            memset(copy, 0, sizeof copy);
            memcpy(copy, at, size_t(there * TILE) * sizeof(float));
            at = copy;
        }
        Ints most{};  // bits of sizes are in the order of the sizes; those of what is no finite number come last
        for (int64_t u = 0; u < units_of_group; u++) {
            const Ints x = (Ints)load(at + u * TILE), size = x & 0x7fffffff, other = x << 16 & 0x7fffffff;
            most = size > most ? size : most;
            if (PAIRS) most = other > most ? other : most;
        }
        if (PAIRS) most &= 0x7fff0000;
        const Ints finite = most < 0x7f800000;
        const Vec scale = (Vec)most / 127.0f, inverse = scale >= TINY ? 1.0f / scale : Vec{};
        Ints sum{};
        for (int i = 0; i < to.group; i += 4) {
            Ints word{};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const Ints lanes = (Ints)load(at + (i + j) / PER_UNIT * TILE);
                const Vec x = (Vec)(!PAIRS ? lanes : j % 2 ? lanes & int32_t(0xffff0000) : lanes << 16);
                const Ints bits = (Ints)(unfused(x * inverse) + SHIFT);  // those of SHIFT plus the number
                const Ints byte = bits & 255;
                sum += byte - ((bits & 128) << 1);
                word |= byte << (8 * j);
            }
            keep_tile(to.of_tile(tile) + (g * to.group + i) / 4 * TILE, word, g + 1 == to.groups && i + 4 == to.group);
        }
        const bool is_last = g + 1 == to.groups;
        const Vec lost = broadcast(__builtin_nanf(""));
        keep_tile(reinterpret_cast<int32_t *>(to.scales_of(tile)) + g * TILE, (Ints)(finite ? scale : lost), is_last);
        keep_tile(to.starts_of(tile) + g * TILE, -to.offset * sum, is_last);
    }
}

// ------------------------------------------------------------------ weights

// 127 times the levels of NF4, rounded: what is multiplied in their place, which costs far less than NF4 itself.
alignas(16) constexpr int8_t NF4_CODES[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

// Numbers of a row that are added up as integers, and all of them with their padding.
inline int integer_group(int64_t format) { return format == INT4 || format == BLOCKS4 ? GROUP4 : GROUP8; }
inline int64_t integers_of_row(int64_t format, int64_t k) { return round_up(int(k), format == INT4 ? LINE4 : GROUP8); }

// Of every byte the codes of both halves, 2 n in all; n is a multiple of 16.
template <bool HIGH_FIRST>
INLINE void look_up_pairs(uint8_t *to, const uint8_t *bytes, int n, const uint8_t *codes) {
#if defined(__SSSE3__)
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)), half = _mm_set1_epi8(15);
    for (int i = 0; i < n; i += 16) {
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes + i));
        const __m128i high = _mm_shuffle_epi8(all, _mm_and_si128(_mm_srli_epi16(both, 4), half));
        const __m128i low = _mm_shuffle_epi8(all, _mm_and_si128(both, half));
        const __m128i one = HIGH_FIRST ? high : low, two = HIGH_FIRST ? low : high;
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 2 * i), _mm_unpacklo_epi8(one, two));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + 2 * i + 16), _mm_unpackhi_epi8(one, two));
    }
#else
    for (int i = 0; i < n; i++) to[2 * i + !HIGH_FIRST] = codes[bytes[i] >> 4], to[2 * i + HIGH_FIRST] = codes[bytes[i] & 15];
#endif
}

// `there` numbers of a row, from number `at` on, with `bias` on top; `there` is a multiple of a group.
INLINE void codes_with_bias(uint8_t *to, const Tensor &w, int64_t row, int64_t at, int there, int bias) {
    const int64_t first = row * integers_of_row(w.format, w.columns) + at;
    const auto *bytes = static_cast<const uint8_t *>(w.data);
    if (w.format == INT8 || w.format == ROWS8) {
        for (int j = 0; j < there; j++) to[j] = uint8_t(bytes[first + j] + bias);
    } else if (w.format == INT4) {  // always a whole line, as it is stored
        uint16_t line[LINE4 / 4];
        memcpy(line, bytes + first / 2, sizeof line);
        for (int n = 0; n < 4; n++)
            for (int j = 0; j < 32; j++) to[32 * n + j] = uint8_t(line[j] >> (4 * n) & 15);
    } else {
        uint8_t codes[16];
        for (int i = 0; i < 16; i++) codes[i] = uint8_t(NF4_CODES[i] + bias);
        if (w.format == NF4) return look_up_pairs<true>(to, bytes + first / 2, there / 2, codes);
        for (int j = 0; j < there; j += GROUP4) {
            const int zero = zero_of(w, row, int(at + j) / GROUP4);
            for (int i = 0; i < 16; i++) codes[i] = uint8_t(i - zero + bias);
            look_up_pairs<false>(to + j, bytes + (first + j) / 2, GROUP4 / 2, codes);
        }
    }
}

// Codes of groups begin .. end-1 of columns first .. first+columns-1, to[unit][panel], and their scales [group][panel].
inline void pack_codes(int32_t *to, float *scales, const Tensor &w, const Path &path, int64_t begin, int64_t end, int64_t first,
                       int columns) {
    const int panel = 2 * path.width, group = integer_group(w.format);
    const int64_t units = (end - begin) * (group / 4);
    const float unit = w.format == NF4 ? 127 : 1;  // of the codes
    for (int c = 0; c < panel; c++)
        for (int64_t g = begin; g < end; g++)
            scales[(g - begin) * panel + c] = c < columns ? scale_of(w, first + c, int(g)) / unit : 0;
    constexpr int SOME = 32;  // units at a time: a line of 128 codes
    alignas(64) uint8_t rows[PATH_WIDTH][4 * SOME];
    for (int c0 = 0; c0 < panel; c0 += path.width) {
        const int count = std::clamp(columns - c0, 0, path.width);
        for (int64_t u = 0; u < units; u += SOME) {
            const int there = int(std::min<int64_t>(SOME, units - u));
            for (int i = 0; i < count; i++) codes_with_bias(rows[i], w, first + c0 + i, begin * group + 4 * u, 4 * there, path.bias);
            int32_t *out = to + u * panel + c0;
            if (path.width == LANES && there % LANES == 0) {
                for (int j = 0; j < there; j += LANES)
                    transpose_square<2 * LANES>(reinterpret_cast<float *>(out + j * panel), reinterpret_cast<float *>(rows[0] + 4 * j),
                                                SOME, count);
                continue;
            }
            for (int j = 0; j < there; j++)
                for (int i = 0; i < path.width; i++) {
                    int32_t four = 0;
                    if (i < count) memcpy(&four, rows[i] + 4 * j, 4);
                    out[j * panel + i] = four;
                }
        }
    }
}

}  // namespace rwkv_lab
