// Levels and steps of GGUF's quantised blocks of 32 values, bit for bit those of the package gguf.
//
// A product and a sum are rounded one after the other: fused, a value next to a tie would take another level.
#include <bit>
#include <cstring>

#include "spans.h"

namespace {

constexpr int N = 32;
constexpr float BELOW_HALF = 0x1.fffffep-2f;  // 0.5 itself would take what is just below a tie
constexpr int32_t SIGN = INT32_MIN, INFINITE = 0x7f800000;

// Bits of a magnitude, which are in its order; at or above INFINITE where the value is not finite.
inline int32_t magnitude(float x) { return std::bit_cast<int32_t>(x) & ~SIGN; }

inline int32_t largest_magnitude(const float *x) {
    int32_t largest = 0;
    for (int i = 0; i < N; i++) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
    return largest;
}

// x / step, in memory, where no compiler looks for a product to fuse.
struct Scaled {
    float x[N];

    Scaled(const float *values, float step) {
        float inverse = step == 0 ? 0 : 1 / step;
        if (magnitude(inverse) >= INFINITE) inverse = 0;  // such a step is 0 in float16
        for (int i = 0; i < N; i++) x[i] = values[i] * inverse;
        asm("" : "+m"(x));
    }
};

void q8_0(const float *x, float *step, int8_t *levels) {
    *step = std::bit_cast<float>(largest_magnitude(x)) / 127;
    const Scaled scaled(x, *step);
    for (int i = 0; i < N; i++) {
        const int32_t sign = std::bit_cast<int32_t>(scaled.x[i]) & SIGN;
        const float half = std::bit_cast<float>(sign | std::bit_cast<int32_t>(BELOW_HALF));
        levels[i] = int8_t(int32_t(scaled.x[i] + half));
    }
}

void q4_0(const float *x, float *step, uint8_t *levels) {
    const int32_t largest = largest_magnitude(x);
    int first = 0;  // of the values of the largest magnitude
    while (first < N - 1 && magnitude(x[first]) != largest) first++;
    *step = x[first] / -8;
    const Scaled scaled(x, *step);
    for (int i = 0; i < N / 2; i++) {
        const int32_t low = int32_t(scaled.x[i] + 8.5f), high = int32_t(scaled.x[i + N / 2] + 8.5f);
        levels[i] = uint8_t((low > 15 ? 15 : low) | (high > 15 ? 15 : high) << 4);
    }
}

}  // namespace

// rows [blocks, 32] float32 -> steps [blocks, 1] float32, levels [blocks, 32] for bits = 8, [blocks, 16] for bits = 4.
// A block with a value that is not finite has a step that is none, and levels 0.
extern "C" int64_t gguf_blocks(rwkv_lab::Span rows, rwkv_lab::Span steps, rwkv_lab::Span levels, int64_t blocks, int64_t bits) {
    using namespace rwkv_lab;
    if ((bits != 8 && bits != 4) || !holds(rows, 4, {blocks, N}) || !holds(steps, 4, {blocks})) return MISFIT;
    if (!holds(levels, 1, {blocks, bits * N / 8})) return MISFIT;
    for (int64_t b = 0; b < blocks; b++) {
        const float *x = rows.as<float>() + b * N;
        float *step = steps.as<float>() + b;
        if (largest_magnitude(x) >= INFINITE) {
            *step = std::bit_cast<float>(INFINITE);
            memset(levels.as<int8_t>() + b * bits * N / 8, 0, bits * N / 8);
        } else if (bits == 8) {
            q8_0(x, step, levels.as<int8_t>() + b * N);
        } else {
            q4_0(x, step, levels.as<uint8_t>() + b * N / 2);
        }
    }
    return FITS;
}
