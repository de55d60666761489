// How the recurrent kernels divide their work, and how they move runs of tokens between global and shared memory.
#pragma once

#include <cstddef>

#include "platform.cuh"

constexpr int TILE = 16;  // tokens that are loaded together; the state is checkpointed before each such run

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float& out, float x) { out = x; }
__device__ __forceinline__ void from_float(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(__half& out, float x) { out = __float2half_rn(x); }

// The N threads of a block own one row or column of the state each; where that would be more numbers than registers,
// several neighbouring threads own one together, in turns of four numbers.
template <int N>
struct Share {
    static constexpr int PARTS = N > 64 ? N / 64 : 1;
    static constexpr int OWN = N / PARTS;  // numbers per thread
    static constexpr int THREADS = N * PARTS;
    int line, part;  // which row or column; which part of it

    __device__ __forceinline__ Share() : line(threadIdx.x / PARTS), part(threadIdx.x % PARTS) {}

    // Where this thread's i-th number lies in its row or column.
    __device__ __forceinline__ int at(int i) const { return (i / 4 * PARTS + part) * 4 + i % 4; }

    // The sum over the threads that share a line; each of them gets it.
    __device__ __forceinline__ float sum(float x) const {
        static_assert(PARTS <= 2);
        if constexpr (PARTS == 2) x += __shfl_xor_sync(0xffffffffu, x, 1);
        return x;
    }
};

// One block's view of a [B,T,H,N] tensor: head h of batch entry b.
template <int N>
struct Rows {
    std::size_t first;   // of the elements of this head
    std::size_t stride;  // from token to token

    __device__ __forceinline__ Rows(int T, int H) : stride(std::size_t(H) * N) {
        const int b = blockIdx.x / H, h = blockIdx.x % H;
        first = std::size_t(b) * T * stride + std::size_t(h) * N;
    }
};

// Calls use(token, first channel, the 16 / sizeof(X) values as floats) for every 16 bytes of `count` tokens, one thread
// each. The other tokens of the tile get zeros.
template <int N, class X, class Use>
__device__ __forceinline__ void read_rows(const X* rows, std::size_t stride, int count, int threads, Use use) {
    constexpr int WIDTH = 16 / sizeof(X), PER_ROW = N / WIDTH;
    for (int i = threadIdx.x; i < TILE * PER_ROW; i += threads) {
        const int t = i / PER_ROW, n = i % PER_ROW * WIDTH;
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (t < count) raw = *reinterpret_cast<const uint4*>(rows + t * stride + n);
        const X* x = reinterpret_cast<const X*>(&raw);
        float values[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) values[j] = to_float(x[j]);
        use(t, n, values);
    }
}

template <int N, class X>
__device__ __forceinline__ void load(float (&tile)[TILE][N], const X* rows, std::size_t stride, int count, int threads) {
    read_rows<N>(rows, stride, count, threads, [&](int t, int n, const float* values) {
#pragma unroll
        for (int j = 0; j < 16 / int(sizeof(X)); ++j) tile[t][n + j] = values[j];
    });
}

// Log-decays, as decays.
template <int N, class X>
__device__ __forceinline__ void load_decay(float (&tile)[TILE][N], const X* rows, std::size_t stride, int count,
                                           int threads) {
    read_rows<N>(rows, stride, count, threads, [&](int t, int n, const float* values) {
#pragma unroll
        for (int j = 0; j < 16 / int(sizeof(X)); ++j) tile[t][n + j] = expf(values[j]);
    });
}

template <int N, class X>
__device__ __forceinline__ void store(X* rows, const float (&tile)[TILE][N], std::size_t stride, int count,
                                      int threads) {
    constexpr int WIDTH = 16 / sizeof(X), PER_ROW = N / WIDTH;
    for (int i = threadIdx.x; i < count * PER_ROW; i += threads) {
        const int t = i / PER_ROW, n = i % PER_ROW * WIDTH;
        uint4 raw;
        X* x = reinterpret_cast<X*>(&raw);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) from_float(x[j], tile[t][n + j]);
        *reinterpret_cast<uint4*>(rows + t * stride + n) = raw;
    }
}

// This thread's part of a row of an [N,N] matrix, 16 bytes at a time.
template <int N>
__device__ __forceinline__ void load_row(float (&own)[Share<N>::OWN], const float* matrix, const Share<N>& share) {
#pragma unroll
    for (int i = 0; i < Share<N>::OWN; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(matrix + share.line * N + share.at(i));
        own[i] = x.x, own[i + 1] = x.y, own[i + 2] = x.z, own[i + 3] = x.w;
    }
}

template <int N>
__device__ __forceinline__ void store_row(float* matrix, const float (&own)[Share<N>::OWN], const Share<N>& share) {
#pragma unroll
    for (int i = 0; i < Share<N>::OWN; i += 4) {
        *reinterpret_cast<float4*>(matrix + share.line * N + share.at(i)) =
            make_float4(own[i], own[i + 1], own[i + 2], own[i + 3]);
    }
}

// This thread's part of a column; neighbouring threads read and write neighbouring columns.
template <int N>
__device__ __forceinline__ void load_column(float (&own)[Share<N>::OWN], const float* matrix, const Share<N>& share) {
#pragma unroll
    for (int i = 0; i < Share<N>::OWN; ++i) own[i] = matrix[share.at(i) * N + share.line];
}

template <int N>
__device__ __forceinline__ void store_column(float* matrix, const float (&own)[Share<N>::OWN], const Share<N>& share) {
#pragma unroll
    for (int i = 0; i < Share<N>::OWN; ++i) matrix[share.at(i) * N + share.line] = own[i];
}
