// Quantised blocks of GGUF files, 32 values each: made bit for bit as by the package gguf, and compared with their source.
//
// A product and a sum are rounded one after the other: fused, a value next to a tie would take another level.
#include <bit>
#include <cstring>

#include "simd.h"
#include "spans.h"

namespace {

using namespace rwkv_lab;

constexpr int N = 32;
constexpr int64_t NO_SUCH_STEP = 2;
constexpr float BELOW_HALF = 0x1.fffffep-2f;  // 0.5 itself would take what is just below a tie
constexpr int32_t SIGN = INT32_MIN, INFINITE = 0x7f800000;

struct Values {
    float x[N];
};

INLINE void keep(Values &v) { asm("" : "+m"(v)); }  // in memory, where no compiler looks for a product to fuse

template <int DTYPE>
INLINE Values block_of(const void *values, int64_t b) {
    Values out;
    if constexpr (DTYPE == FLOAT32) {
        memcpy(&out, static_cast<const float *>(values) + b * N, sizeof out);
    } else {
        const uint16_t *from = static_cast<const uint16_t *>(values) + b * N;
#if defined(__F16C__)
        if constexpr (DTYPE == FLOAT16) {
            for (int i = 0; i < N; i += 8)
                _mm256_storeu_ps(out.x + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
            return out;
        }
#endif
        for (int i = 0; i < N; i++) out.x[i] = DTYPE == BFLOAT16 ? bfloat_to_float(from[i]) : half_to_float(from[i]);
    }
    return out;
}

// Bits of a magnitude, which are in its order; at or above INFINITE where the value is not finite.
INLINE int32_t magnitude(float x) { return std::bit_cast<int32_t>(x) & ~SIGN; }

INLINE int32_t largest_magnitude(const Values &v) {
    int32_t largest = 0;
    for (int i = 0; i < N; i++) largest = magnitude(v.x[i]) > largest ? magnitude(v.x[i]) : largest;
    return largest;
}

// A block as it lies in a file: its step, then its levels.
template <int BITS>
struct Block {
    static constexpr int LEVELS = BITS * N / 8, BYTES = 2 + LEVELS;
    uint16_t step;
    uint8_t levels[LEVELS];
};

// v / step.
INLINE Values scaled(const Values &v, float step) {
    float inverse = step == 0 ? 0 : 1 / step;
    if (magnitude(inverse) >= INFINITE) inverse = 0;  // such a step is 0 in float16
    Values out;
    for (int i = 0; i < N; i++) out.x[i] = v.x[i] * inverse;
    keep(out);
    return out;
}

INLINE float quantise(const Values &v, int32_t largest, Block<8> &out) {
    const float step = std::bit_cast<float>(largest) / 127;
    const Values s = scaled(v, step);
    for (int i = 0; i < N; i++) {
        const int32_t sign = std::bit_cast<int32_t>(s.x[i]) & SIGN;
        const float half = std::bit_cast<float>(sign | std::bit_cast<int32_t>(BELOW_HALF));
        out.levels[i] = uint8_t(int32_t(s.x[i] + half));
    }
    return step;
}

INLINE float quantise(const Values &v, int32_t largest, Block<4> &out) {
    int first = 0;  // of the values of the largest magnitude
    while (first < N - 1 && magnitude(v.x[first]) != largest) first++;
    const float step = v.x[first] / -8;
    const Values s = scaled(v, step);
    for (int i = 0; i < N / 2; i++) {
        const int32_t low = int32_t(s.x[i] + 8.5f), high = int32_t(s.x[i + N / 2] + 8.5f);
        out.levels[i] = uint8_t((low > 15 ? 15 : low) | (high > 15 ? 15 : high) << 4);
    }
    return step;
}

template <int DTYPE, int BITS>
int64_t make(const void *values, uint8_t *out, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        const Values v = block_of<DTYPE>(values, b);
        const int32_t largest = largest_magnitude(v);
        if (largest >= INFINITE) return NO_SUCH_STEP;
        Block<BITS> block;
        block.step = float_to_half(quantise(v, largest, block));
        if ((block.step & 0x7fffu) >= 0x7c00u) return NO_SUCH_STEP;
        memcpy(out + b * Block<BITS>::BYTES, &block, Block<BITS>::BYTES);
    }
    return FITS;
}

INLINE Values meant(const Block<8> &block, float step) {
    Values out;
    for (int i = 0; i < N; i++) out.x[i] = step * float(int8_t(block.levels[i]));
    return out;
}

INLINE Values meant(const Block<4> &block, float step) {
    Values out;
    for (int i = 0; i < N / 2; i++) {
        out.x[i] = step * float(int(block.levels[i] & 15) - 8);
        out.x[i + N / 2] = step * float(int(block.levels[i] >> 4) - 8);
    }
    return out;
}

template <int DTYPE, int BITS>
float excess(const void *values, const uint8_t *made, int64_t blocks, float per_step, float least) {
    float most = 0;
    for (int64_t b = 0; b < blocks; b++) {
        Block<BITS> block;
        memcpy(&block, made + b * Block<BITS>::BYTES, Block<BITS>::BYTES);
        const float step = half_to_float(block.step);
        Values v = block_of<DTYPE>(values, b), m = meant(block, step);
        keep(m);
        for (int i = 0; i < N; i++) v.x[i] -= m.x[i];
        const int32_t largest = largest_magnitude(v);
        Values allowed{{per_step * std::bit_cast<float>(magnitude(step))}};
        keep(allowed);
        const float found = std::bit_cast<float>(largest) / (allowed.x[0] + least);
        if (!(found <= most)) most = magnitude(found) > INFINITE ? std::bit_cast<float>(INFINITE) : found;  // NaN is no answer
    }
    return most;
}

// Whether there are so many values of that dtype and so many blocks of that kind.
bool fit(const Span &values, int64_t dtype, const Span &made, int64_t blocks, int64_t bits) {
    if ((bits != 8 && bits != 4) || dtype < FLOAT32 || dtype > FLOAT16) return false;
    return holds(values, size_of(int(dtype)), {blocks, N}) && holds(made, 1, {blocks, 2 + bits * N / 8});
}

}  // namespace

// values [blocks, 32] -> made [blocks, 34] for bits = 8, [blocks, 18] for bits = 4. NO_SUCH_STEP where a value is not
// finite, or so large that float16 has no step for its block; what is in `made` then means nothing.
extern "C" int64_t gguf_blocks(Span values, int64_t dtype, Span made, int64_t blocks, int64_t bits) {
    if (!fit(values, dtype, made, blocks, bits)) return MISFIT;
    const auto with = [&](auto of) {
        constexpr int D = decltype(of)::value;
        return bits == 8 ? make<D, 8>(values.data, made.as<uint8_t>(), blocks) : make<D, 4>(values.data, made.as<uint8_t>(), blocks);
    };
    if (dtype == FLOAT32) return with(std::integral_constant<int, FLOAT32>{});
    if (dtype == BFLOAT16) return with(std::integral_constant<int, BFLOAT16>{});
    return with(std::integral_constant<int, FLOAT16>{});
}

// The largest |value - what its block means| / (per_step |step| + least) into most [1] float32; infinity where it is NaN.
extern "C" int64_t gguf_excess(Span values, int64_t dtype, Span made, int64_t blocks, int64_t bits, float per_step, float least,
                               Span most) {
    if (!fit(values, dtype, made, blocks, bits) || !holds(most, 4, {1})) return MISFIT;
    const auto with = [&](auto of) {
        constexpr int D = decltype(of)::value;
        const uint8_t *bytes = made.as<uint8_t>();
        return bits == 8 ? excess<D, 8>(values.data, bytes, blocks, per_step, least)
                         : excess<D, 4>(values.data, bytes, blocks, per_step, least);
    };
    float *out = most.as<float>();
    if (dtype == FLOAT32)
        *out = with(std::integral_constant<int, FLOAT32>{});
    else if (dtype == BFLOAT16)
        *out = with(std::integral_constant<int, BFLOAT16>{});
    else
        *out = with(std::integral_constant<int, FLOAT16>{});
    return FITS;
}
