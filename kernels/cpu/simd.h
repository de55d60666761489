// Vectors of float32 as wide as the machine has them, through the vector extensions of GCC and Clang: one source for
// AVX-512, AVX2 and anything else. Exponentials, transposition, and rows of bfloat16 and float16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "spans.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rwkv_lab {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#else
constexpr int LANES = 4;
constexpr int REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float *from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

// x in a register. A compiler may read a vector anew for every multiply-add that it goes into, and arithmetic then waits
// for the cache.
INLINE Vec held(Vec x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#endif
    return x;
}

// x, rounded: a compiler does not fuse or reorder what gave it with what takes it.
INLINE Vec unfused(Vec x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

INLINE void store(float *to, Vec x) { memcpy(to, &x, sizeof x); }

// Past the caches, for what is not read again soon; `to` is aligned to a vector.
INLINE void stream(float *to, Vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)x);
#elif defined(__SSE2__)
    _mm_stream_ps(to, (__m128)x);
#else
    store(to, x);
#endif
}

INLINE Vec broadcast(float x) { return x - Vec{}; }  // not x + 0: that would turn -0 into 0 and cost an addition

// e^x, within two units of the last place; 0 where the result would be below 1.2e-38; NaN stays NaN.
INLINE Vec exponential(Vec x) {
    constexpr float TINY = -87.336544f;
    Vec low = x < TINY ? broadcast(TINY) : x;
    low = low > 89.0f ? broadcast(89.0f) : low;
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
    Vec shifted = low * 1.44269504f + SHIFT;
    Vec n = shifted - SHIFT;
    Vec r = low - n * 0.693359375f;  // ln 2 in two parts; the first has so few bits that its product is exact
    r = r + n * 2.12194440e-4f;
    Vec p = r * 1.3981999e-3f + 8.3334519e-3f;  // minimax around the Taylor coefficients 1/6!, 1/5!, …
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000000e-1f;
    p = p * r * r + r + 1.0f;
    Ints scale = ((Ints)shifted << 23) + 0x3f800000;  // 2^n; the bits of SHIFT above leave no trace here
    return x < TINY ? Vec{} : p * (Vec)scale;
}

// A block of at least LANES floats on a cache line, for as long as the object lives.
class Buffer {
public:
    explicit Buffer(size_t size) : at_(static_cast<float *>(::operator new(size * sizeof(float), std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(at_, std::align_val_t(64)); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    float *get() const { return at_; }

private:
    float *at_;
};

// At least `size` floats for a task that is done before the next one begins; each thread has its own and keeps it.
inline float *workspace(size_t size) {
    thread_local std::unique_ptr<Buffer> mine;
    thread_local size_t there = 0;
    if (size > there) mine = std::make_unique<Buffer>(there = size);
    return mine->get();
}

// Numbers below 1.2e-38 count as 0 while it lives. A state that decays by 0.9 per token ends there, and arithmetic with
// such numbers can be a hundred times slower.
class FlushToZero {
public:
#if defined(__x86_64__)
    FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushToZero() { _mm_setcsr(before_); }

private:
    unsigned before_;
#endif
};

// ------------------------------------------------------------------ sums and transposition across lanes

#if defined(__clang__)
INLINE Vec pair_sums(Vec a, Vec b) {
    Vec out;
    for (int i = 0; i < LANES / 2; i++) {
        out[i] = a[2 * i] + a[2 * i + 1];
        out[LANES / 2 + i] = b[2 * i] + b[2 * i + 1];
    }
    return out;
}
#else
INLINE Ints lanes_from(int start, int step) {
    Ints out{};
    for (int i = 0; i < LANES; i++) out[i] = start + step * i;
    return out;
}

// Lanes start, start + 1, … of one vector, each followed by the same lane of another.
INLINE Ints interleaved(int start) {
    Ints out{};
    for (int i = 0; i < LANES; i++) out[i] = start + i / 2 + i % 2 * LANES;
    return out;
}

// The sums of neighbours: of a's lanes, then of b's.
INLINE Vec pair_sums(Vec a, Vec b) {
    return __builtin_shuffle(a, b, lanes_from(0, 2)) + __builtin_shuffle(a, b, lanes_from(1, 2));
}
#endif

// Lane i of the result is the sum of all lanes of rows[i].
INLINE Vec row_sums(const float *rows) {
    Vec x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load(rows + i * LANES);
#pragma GCC unroll 4
    for (int left = LANES; left > 1; left /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < left / 2; i++) x[i] = pair_sums(x[2 * i], x[2 * i + 1]);
    return x[0];
}

INLINE float sum(Vec x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

#if !defined(__clang__)
// LANES x LANES numbers. Each round interleaves the first half of the rows with the second; after log2(LANES) rounds every
// number has changed its row for its column.
INLINE void transpose_square(float *to, int64_t to_stride, const float *from, int64_t from_stride) {
    const Ints LOW = interleaved(0), HIGH = interleaved(LANES / 2);
    Vec x[LANES], y[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load(from + i * from_stride);
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], LOW);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * to_stride, x[i]);
}
#endif

// to[j][i] = from[i][j] for i < rows, j < columns; strides count floats.
inline void transpose(float *to, int64_t to_stride, const float *from, int64_t from_stride, int rows, int columns) {
    for (int i0 = 0; i0 < rows; i0 += LANES)
        for (int j0 = 0; j0 < columns; j0 += LANES) {
#if !defined(__clang__)
            if (i0 + LANES <= rows && j0 + LANES <= columns) {
                transpose_square(to + j0 * to_stride + i0, to_stride, from + i0 * from_stride + j0, from_stride);
                continue;
            }
#endif
            for (int j = j0; j < std::min(j0 + LANES, columns); j++)
                for (int i = i0; i < std::min(i0 + LANES, rows); i++) to[j * to_stride + i] = from[i * from_stride + j];
        }
}

// ------------------------------------------------------------------ rows of any dtype

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }
inline bool is_dtype(int64_t dtype) { return dtype == FLOAT32 || dtype == BFLOAT16 || dtype == FLOAT16; }

// A tensor whose last axis is contiguous, the dtype of its elements, and how many there are.
struct Input {
    const void *data;
    int dtype;
    int64_t count = INT64_MAX;
};

struct Output {
    void *data;
    int dtype;
    int64_t count = INT64_MAX;
};

// The two bits of tensor i in a word that holds the dtypes of several, the first one's lowest.
INLINE int dtype_of(int64_t dtypes, int i) { return int(dtypes >> (2 * i) & 3); }
INLINE Input input(const Span &x, int64_t dtypes, int i) {
    return {x.data, dtype_of(dtypes, i), x.bytes / size_of(dtype_of(dtypes, i))};
}
INLINE Output output(const Span &x, int64_t dtypes, int i) {
    return {x.data, dtype_of(dtypes, i), x.bytes / size_of(dtype_of(dtypes, i))};
}

INLINE float half_to_float(uint16_t half) {
    uint32_t magnitude = half & 0x7fffu, sign = uint32_t(half & 0x8000u) << 16, bits;
    if (magnitude >= 0x7c00u)
        bits = (magnitude << 13) | 0x7f800000u;
    else if (magnitude >= 0x0400u)
        bits = (magnitude << 13) + (112u << 23);
    else {
        float small = float(int(magnitude)) * 5.9604645e-8f;  // 2^-24
        memcpy(&bits, &small, 4);
    }
    bits |= sign;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (bits >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
    if (bits < 0x38800000u) {                                  // below 2^-14: steps of 2^-24
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        float rounded = magnitude * 16777216.0f + 8388608.0f;  // rounds to a whole number, ties to even
        memcpy(&bits, &rounded, 4);
        return uint16_t(sign | (bits & 0x7ffu));
    }
    bits += 0xfffu + ((bits >> 13) & 1u);
    return uint16_t(sign | ((bits - (112u << 23)) >> 13));
}

INLINE float bfloat_to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

INLINE uint16_t float_to_bfloat(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Asks for n elements from position `offset` on. Rows of one head lie far apart; the hardware does not foresee them.
INLINE void prefetch_row(Input in, int64_t offset, int n) {
    const int size = in.dtype == FLOAT32 ? 4 : 2;
    const char *from = static_cast<const char *>(in.data) + offset * size;
    for (int i = 0; i < n * size; i += 64) __builtin_prefetch(from + i, 0, 2);
}

INLINE void prefetch_row(Output out, int64_t offset, int n) {
    const int size = out.dtype == FLOAT32 ? 4 : 2;
    char *to = static_cast<char *>(out.data) + offset * size;
    for (int i = 0; i < n * size; i += 64) __builtin_prefetch(to + i, 1, 2);
}

inline __attribute__((noinline)) void load_half_row(float *to, Input in, int64_t offset, int n) {
    const uint16_t *from = static_cast<const uint16_t *>(in.data) + offset;
    if (in.dtype == BFLOAT16) {
        for (int i = 0; i < n; i++) to[i] = bfloat_to_float(from[i]);
        return;
    }
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
#endif
    for (; i < n; i++) to[i] = half_to_float(from[i]);
}

// n elements from position `offset` on as float32, with zeros behind them up to `width`.
//
// A copy even where they are float32 already: large tensors begin at the same place of a page, so that rows of six of them,
// used where they lie, fall into one set of the cache and push each other out.
INLINE void load_row(float *to, Input in, int64_t offset, int n, int width) {
    check_access(offset, n, in.count);
    if (in.dtype == FLOAT32) {
        const float *from = static_cast<const float *>(in.data) + offset;
        int i = 0;
        for (; i + LANES <= n; i += LANES) store(to + i, load(from + i));
        for (; i < n; i++) to[i] = from[i];
    } else {
        load_half_row(to, in, offset, n);
    }
    for (int i = n; i < width; i++) to[i] = 0;
}

inline __attribute__((noinline)) void store_row(Output out, int64_t offset, const float *from, int n) {
    check_access(offset, n, out.count);
    if (out.dtype == FLOAT32) {
        memcpy(static_cast<float *>(out.data) + offset, from, size_t(n) * sizeof(float));
        return;
    }
    uint16_t *to = static_cast<uint16_t *>(out.data) + offset;
    if (out.dtype == BFLOAT16) {
        for (int i = 0; i < n; i++) to[i] = float_to_bfloat(from[i]);
        return;
    }
    int i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < n; i++) to[i] = float_to_half(from[i]);
}

// The decays e^w of log-decays, in place; size is a multiple of LANES.
inline void exponentials(float *x, int size) {
    for (int i = 0; i < size; i += LANES) store(x + i, exponential(load(x + i)));
}

// Whether values should be gone through nv vectors at a time: there are tasks for all threads, and no vector is empty.
inline bool fits_block(int nv, int64_t heads, int N, int threads) {
    const int blocks = (N + nv * LANES - 1) / (nv * LANES);
    return N > nv / 2 * LANES && heads * blocks >= threads;
}

INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// A state as the caller has it, float32, any strides (counted in floats): element [value][key] of one head.
struct State {
    const float *data;
    int64_t batch, head, value, key;  // strides

    const float *of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// S[key][value] of one head for values first .. first+width-1, 0 behind the last; S has `stride` floats per key.
inline void load_key_major(float *S, int stride, const State &state, const float *head, int N, int first, int width) {
    int there = std::clamp(N - first, 0, width);
    const float *from = head + first * state.value;
    if (there < width)
        for (int k = 0; k < N; k++) memset(S + k * stride + there, 0, size_t(width - there) * sizeof(float));
    if (state.value == 1) {
        for (int k = 0; k < N; k++) memcpy(S + k * stride, from + k * state.key, size_t(there) * sizeof(float));
    } else if (state.key == 1) {
        transpose(S, stride, from, state.value, there, N);
    } else {
        for (int k = 0; k < N; k++)
            for (int v = 0; v < there; v++) S[k * stride + v] = from[v * state.value + k * state.key];
    }
}

// Writes S[key][value], values first .. first+width-1 of N, to a whole head [N][N] that is not read again soon.
inline void keep_key_major(float *head, const float *S, int stride, int N, int first, int width) {
    const int there = std::min(width, N - first);
    float *to = head + first;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0 && N % LANES == 0;
    for (int k = 0; k < N; k++, to += N, S += stride) {
        int v = 0;
        if (aligned)
            for (; v + LANES <= there; v += LANES) stream(to + v, load(S + v));
        memcpy(to + v, S + v, size_t(there - v) * sizeof(float));
    }
}

}  // namespace rwkv_lab
