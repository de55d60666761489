// Quantised blocks of GGUF files, 32 values each: made bit for bit as by the package gguf, and compared with their source.
//
// A product and a sum are rounded one after the other: fused, a value next to a tie would take another level.
#include <bit>
#include <cstring>

#include "elements.h"
#include "spans.h"

namespace {

using namespace rwkv_lab;

constexpr int N = 32, K = N / LANES;  // values of a block, vectors of them
constexpr int64_t NO_SUCH_STEP = 2;
constexpr float BELOW_HALF = 0x1.fffffep-2f;  // 0.5 itself would take what is just below a tie
constexpr int32_t SIGN = INT32_MIN, INFINITE = 0x7f800000;

typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct Values {
    Vec v[K];
};

template <int DTYPE>
INLINE Values block_of(const void *values, int64_t b) {
    Values out;
    for (int k = 0; k < K; k++) out.v[k] = elements<DTYPE>(values, b * N + k * LANES);
    return out;
}

INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// LANES bytes with a sign as int32, and the low bytes of int32; compilers take one after the other if they are not told.
INLINE Ints widened(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
#else
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
#endif
}

template <int COUNT>
INLINE void store_low_bytes(uint8_t *to, const Ints (&x)[COUNT]) {
#if defined(__AVX512F__)
    for (int k = 0; k < COUNT; k++)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + k * LANES), _mm512_cvtepi32_epi8((__m512i)x[k]));
#else
    int32_t lanes[COUNT * LANES];
    memcpy(lanes, x, sizeof lanes);
    for (int i = 0; i < COUNT * LANES; i++) to[i] = uint8_t(lanes[i]);
#endif
}

INLINE int32_t largest_lane(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#endif
    int32_t lanes[LANES];
    memcpy(lanes, &x, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// Bits of a magnitude, which are in its order; at or above INFINITE where the value is not finite.
INLINE int32_t magnitude(float x) { return std::bit_cast<int32_t>(x) & ~SIGN; }

INLINE int32_t largest_magnitude(const Values &x) {
    Ints largest{};
    for (int k = 0; k < K; k++) largest = larger((Ints)x.v[k] & ~SIGN, largest);
    return largest_lane(largest);
}

// A block lies in a file as its step in float16, then its levels. It is read and written in place: a copy of both would be
// read while it is still being stored.
constexpr int bytes_of(int bits) { return 2 + bits * N / 8; }

#if defined(__F16C__)
INLINE uint16_t half_of(float x) { return _cvtss_sh(x, 0); }
INLINE float float_of(uint16_t x) { return _cvtsh_ss(x); }
#else
INLINE uint16_t half_of(float x) { return float_to_half(x); }
INLINE float float_of(uint16_t x) { return half_to_float(x); }
#endif

INLINE float inverse_of(float step) {
    const float inverse = step == 0 ? 0 : 1 / step;
    return magnitude(inverse) >= INFINITE ? 0 : inverse;  // such a step is 0 in float16
}

// The step; levels -127 to 127, two's complement.
INLINE float q8_0(const Values &x, uint8_t *out) {
    const int32_t largest = largest_magnitude(x);
    if (largest >= INFINITE) return std::bit_cast<float>(INFINITE);
    const float step = std::bit_cast<float>(largest) / 127, inverse = inverse_of(step);
    Ints levels[K];
    for (int k = 0; k < K; k++) {
        const Vec scaled = unfused(x.v[k] * inverse);
        const Vec half = (Vec)(((Ints)scaled & SIGN) | std::bit_cast<int32_t>(BELOW_HALF));
        levels[k] = __builtin_convertvector(scaled + half, Ints);
    }
    store_low_bytes(out, levels);
    return step;
}

// The first of the values of the largest magnitude.
INLINE float largest_value(const Values &x) {
    Ints above = Ints{} + SIGN, below = above;
    for (int k = 0; k < K; k++) {
        above = larger((Ints)x.v[k], above);
        below = larger((Ints)x.v[k] ^ SIGN, below);
    }
    const int32_t positive = largest_lane(above), negative = largest_lane(below);
    if (positive != negative) return std::bit_cast<float>(positive > negative ? positive : negative ^ SIGN);
    float values[N];
    memcpy(values, &x, sizeof values);
    int first = 0;
    while (first < N - 1 && magnitude(values[first]) != positive) first++;
    return values[first];
}

// The step; levels 0 to 15, which stand for -8 to 7, of value i in the low half of byte i, of value i + 16 in the high one.
INLINE float q4_0(const Values &x, uint8_t *out) {
    const float largest = largest_value(x);
    if (magnitude(largest) >= INFINITE) return std::bit_cast<float>(INFINITE);
    const float step = largest / -8, inverse = inverse_of(step);
    Ints levels[K];
    for (int k = 0; k < K; k++) {
        const Ints level = __builtin_convertvector(unfused(x.v[k] * inverse) + 8.5f, Ints);
        levels[k] = level > 15 ? Ints{} + 15 : level;
    }
    Ints pairs[K / 2];
    for (int k = 0; k < K / 2; k++) pairs[k] = levels[k] | levels[k + K / 2] << 4;
    store_low_bytes(out, pairs);
    return step;
}

template <int DTYPE, int BITS>
int64_t make(const void *values, uint8_t *out, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t *block = out + b * bytes_of(BITS);
        const Values x = block_of<DTYPE>(values, b);
        const uint16_t step = half_of(BITS == 8 ? q8_0(x, block + 2) : q4_0(x, block + 2));
        if ((step & 0x7fffu) >= 0x7c00u) return NO_SUCH_STEP;
        memcpy(block, &step, 2);
    }
    return FITS;
}

template <int BITS>
INLINE Values levels_of(const uint8_t *from) {
    Values out;
    if constexpr (BITS == 8) {
        for (int k = 0; k < K; k++) out.v[k] = __builtin_convertvector(widened(from + k * LANES), Vec);
    } else {
        for (int k = 0; k < K / 2; k++) {
            const Ints levels = widened(from + k * LANES);
            out.v[k] = __builtin_convertvector((levels & 15) - 8, Vec);
            out.v[k + K / 2] = __builtin_convertvector((levels >> 4 & 15) - 8, Vec);
        }
    }
    return out;
}

template <int DTYPE, int BITS>
float excess(const void *values, const uint8_t *made, int64_t blocks, float per_step, float least) {
    float most = 0, nearly = 0;
    for (int64_t b = 0; b < blocks; b++) {
        const uint8_t *block = made + b * bytes_of(BITS);
        uint16_t half;
        memcpy(&half, block, 2);
        const float step = float_of(half);
        Values x = block_of<DTYPE>(values, b);
        const float needed = std::bit_cast<float>(largest_magnitude(x)) / (BITS == 8 ? 127 : 8);
        const Values levels = levels_of<BITS>(block + 2);
        for (int k = 0; k < K; k++) x.v[k] -= unfused(levels.v[k] * step);
        const float difference = std::bit_cast<float>(largest_magnitude(x));
        const float allowed = per_step * needed + least;
        if (difference < nearly * allowed) continue;  // the common case, without a division; not where both are infinite
        const float found = difference / allowed;
        if (found <= most) continue;
        if (!(found < std::bit_cast<float>(INFINITE))) return std::bit_cast<float>(INFINITE);  // or NaN, which is no answer
        most = found;
        nearly = most * 0.999f;
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
// The step is that which the values need, not the one in the block: a step too large would allow itself any difference.
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
