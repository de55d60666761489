// Weights to 8 and 4 bits with a bfloat16 scale per group, in the layout of weights.h, bit for bit as
// rwkv_lab/checkpoint/grouped.py rounds them; and to NF4, as rwkv_lab/checkpoint/four_bits.py does.
//
// Products of a code and a scale have 12 bits and are exact, and so are squares of differences in float64: a compiler may
// fuse them with what comes next. A weight times the inverse of a scale is rounded by itself.
#include <cmath>
#include <limits>

#include "parallel.h"
#include "quantised.h"

namespace {

using namespace rwkv_lab;

typedef double Doubles __attribute__((vector_size(8 * LANES)));

template <int K>
struct Group {
    Vec x[K];
};

INLINE float largest_lane(Vec x) {
    float lanes[LANES];
    store(lanes, x);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    return lanes[0];
}

// The largest size of a group's numbers; NaN or infinity where one of them is.
template <int K>
INLINE float size_of_largest(const Group<K> &g) {
    Vec most{}, odd{};
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
        const Vec size = g.x[k] < 0.0f ? -g.x[k] : g.x[k];
        most = size > most ? size : most;
        odd += size - size;  // NaN of what is no finite number
    }
    return largest_lane(most) + sum(odd);
}

INLINE float inverse_of(float scale) {
    const float inverse = 1.0f / scale;
    return std::isfinite(inverse) ? inverse : 0.0f;
}

template <int K>
INLINE Group<K> codes_with(const Group<K> &g, float scale, float low, float high) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
    const Vec inverse = broadcast(inverse_of(scale)), least = broadcast(low), most = broadcast(high);
    Group<K> out;
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
        const Vec near = unfused(unfused(g.x[k] * inverse) + SHIFT) - SHIFT;
        out.x[k] = near < least ? least : near > most ? most : near;
    }
    return out;
}

template <int K>
INLINE double squared_error(const Group<K> &g, const Group<K> &codes, float scale) {
    Doubles sums{};
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
        const Doubles apart = __builtin_convertvector(codes.x[k] * broadcast(scale) - g.x[k], Doubles);
        sums += apart * apart;
    }
    double lanes[LANES];
    memcpy(lanes, &sums, sizeof lanes);
#pragma GCC unroll 4
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float to_bfloat(float x) { return bfloat_to_float(float_to_bfloat(x)); }

constexpr uint16_t NO_NUMBER = 0x7fc0;

// 64 numbers: codes to `codes`; returns the bits of their scale.
INLINE uint16_t pack8(const float *from, int8_t *codes) {
    constexpr int K = GROUP8 / LANES;
    Group<K> g;
    for (int k = 0; k < K; k++) g.x[k] = load(from + k * LANES);
    const float most = size_of_largest(g);
    if (!std::isfinite(most)) return memset(codes, 0, GROUP8), NO_NUMBER;
    const uint16_t bits = float_to_bfloat(most / 127);
    const Group<K> found = codes_with(g, bfloat_to_float(bits), -127, 127);
    for (int k = 0; k < K; k++) {
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(found.x[k], Ints), Bytes);
        memcpy(codes + k * LANES, &bytes, sizeof bytes);
    }
    return bits;
}

// The number of a group, which lies at `from`, that has the largest size, `most`; the first of several.
template <int K>
INLINE float largest_of(const Group<K> &g, const float *from, float most) {
    Vec above = g.x[0], below = -g.x[0];
    for (int k = 1; k < K; k++) {
        above = g.x[k] > above ? g.x[k] : above;
        below = -g.x[k] > below ? -g.x[k] : below;
    }
    const float high = largest_lane(above), low = largest_lane(below);
    if (high != low) return high > low ? most : -most;
    int i = 0;
    while (i + 1 < K * LANES && !(std::fabs(from[i]) == most)) i++;
    return from[i];
}

// 32 numbers: their codes plus 8 into nibble `place` of 32 words; returns the bits of their scale.
INLINE uint16_t pack4(const float *from, Ints *words, int place) {
    constexpr int K = GROUP4 / LANES;
    Group<K> g;
    for (int k = 0; k < K; k++) g.x[k] = load(from + k * LANES);
    const float most = size_of_largest(g);
    Group<K> best{};
    float best_scale = bfloat_to_float(NO_NUMBER);
    if (std::isfinite(most)) {
        const float largest = largest_of(g, from, most);
        double least = 0;
        for (const float code : {-8.0f, -7.4f, -6.8f}) {
            const float scale = to_bfloat(largest / code);
            const Group<K> codes = codes_with(g, scale, -8, 7);
            const double error = squared_error(g, codes, scale);
            if (code == -8.0f || error < least) best = codes, best_scale = scale, least = error;
        }
    }
    for (int k = 0; k < K; k++) words[k] |= (__builtin_convertvector(best.x[k], Ints) + 8) << (4 * place);
    return float_to_bfloat(best_scale);
}

struct Matrix {
    Input from;
    int64_t rows, columns;
};

void pack_rows8(const Matrix &m, int64_t begin, int64_t end, int8_t *codes, uint16_t *scales) {
    const int64_t groups = (m.columns + GROUP8 - 1) / GROUP8;
    float some[GROUP8];
    for (int64_t row = begin; row < end; row++)
        for (int64_t g = 0; g < groups; g++) {
            const int there = int(std::min<int64_t>(GROUP8, m.columns - g * GROUP8));
            load_row(some, m.from, row * m.columns + g * GROUP8, there, GROUP8);
            scales[row * groups + g] = pack8(some, codes + (row * groups + g) * GROUP8);
        }
}

void pack_rows4(const Matrix &m, int64_t begin, int64_t end, uint16_t *codes, uint16_t *scales) {
    const int64_t lines = (m.columns + LINE4 - 1) / LINE4;
    constexpr int K = GROUP4 / LANES, GROUPS = LINE4 / GROUP4;
    float some[LINE4];
    for (int64_t row = begin; row < end; row++)
        for (int64_t line = 0; line < lines; line++) {
            const int there = int(std::min<int64_t>(LINE4, m.columns - line * LINE4));
            load_row(some, m.from, row * m.columns + line * LINE4, there, LINE4);
            Ints words[K] = {};
            const int64_t at = row * lines + line;
            for (int g = 0; g < GROUPS; g++) scales[at * GROUPS + g] = pack4(some + g * GROUP4, words, g);
            for (int k = 0; k < K; k++) {
                const Halves halves = __builtin_convertvector(words[k], Halves);
                memcpy(codes + at * GROUP4 + k * LANES, &halves, sizeof halves);
            }
        }
}

// 64 numbers: two codes to a byte, the first in its high half; returns the largest size, by which they were divided.
INLINE float pack_nf4_block(const float *from, uint8_t *bytes) {
    constexpr int K = GROUP8 / LANES;
    Group<K> g;
    for (int k = 0; k < K; k++) g.x[k] = load(from + k * LANES);
    const float most = size_of_largest(g);
    const Vec divisor = broadcast(std::max(most, std::numeric_limits<float>::min()));
    int32_t codes[GROUP8];
    for (int k = 0; k < K; k++) {
        const Vec share = g.x[k] / divisor;
        Ints code{};  // how many of the numbers half-way between two levels are smaller
#pragma GCC unroll 15
        for (int i = 0; i < 15; i++) code -= share > broadcast((NF4_LEVELS[i + 1] + NF4_LEVELS[i]) / 2);
        memcpy(codes + k * LANES, &code, sizeof code);
    }
    for (int i = 0; i < GROUP8 / 2; i++) bytes[i] = uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
    return most;
}

}  // namespace

// n weights of any dtype to codes of NF4, two to a byte, and the largest size of every 64, which is NaN or infinity where one
// of them is; codes mean nothing then.
extern "C" int64_t pack_nf4(Span weight, int64_t dtype, int64_t n, Span codes, Span sizes, int64_t threads) {
    if (!is_dtype(dtype) || n < 2 || n % 2 || n > INT64_MAX / 8) return MISFIT;
    const int64_t blocks = (n + GROUP8 - 1) / GROUP8;
    if (!holds(weight, size_of(dtype), {n}) || !holds(codes, 1, {n / 2}) || !holds(sizes, 4, {blocks})) return MISFIT;
    parallel_ranges(blocks, 1 << 10, int(threads), [&](int64_t begin, int64_t end) {
        float some[GROUP8];
        uint8_t bytes[GROUP8 / 2];
        for (int64_t block = begin; block < end; block++) {
            const int there = int(std::min<int64_t>(GROUP8, n - block * GROUP8));
            load_row(some, {weight.data, int(dtype), n}, block * GROUP8, there, GROUP8);
            sizes.as<float>()[block] = pack_nf4_block(some, bytes);
            memcpy(codes.as<uint8_t>() + block * (GROUP8 / 2), bytes, size_t(there) / 2);
        }
    });
    return FITS;
}

// weight[rows,columns] of any dtype to codes and scales of `bits` bits.
extern "C" int64_t pack(Span weight, int64_t dtype, int64_t rows, int64_t columns, int64_t bits, Span codes, Span scales,
                        int64_t threads) {
    if (!is_dtype(dtype) || rows < 1 || columns < 1 || columns > INT32_MAX - LINE4 || (bits != 8 && bits != 4)) return MISFIT;
    const int64_t width = bits == 8 ? round_up(int(columns), GROUP8) : round_up(int(columns), LINE4);
    if (!holds(weight, size_of(dtype), {rows, columns}) || !holds(codes, 1, {rows, bits == 8 ? width : width / 2}) ||
        !holds(scales, 2, {rows, width / (bits == 8 ? GROUP8 : GROUP4)}))
        return MISFIT;
    const Matrix m{{weight.data, int(dtype), rows * columns}, rows, columns};
    parallel_ranges(rows, std::max<int64_t>(1, (1 << 16) / columns), int(threads), [&](int64_t begin, int64_t end) {
        if (bits == 8)
            pack_rows8(m, begin, end, codes.as<int8_t>(), scales.as<uint16_t>());
        else
            pack_rows4(m, begin, end, codes.as<uint16_t>(), scales.as<uint16_t>());
    });
    return FITS;
}
