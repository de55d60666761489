// WKV4 as a recurrence: a warp per 32 channels of a batch entry, one channel per thread. Any number of channels, any
// length. The maths and the layouts are in kernels/README.md; the names are the same here.
#pragma once

#include "tiles.cuh"

namespace wkv4 {

constexpr int CHANNELS = 32;  // per block; few, because blocks are all the parallelism there is

struct ForwardTiles {
    float k[TILE][CHANNELS], v[TILE][CHANNELS], y[TILE][CHANNELS];
};

struct BackwardTiles {
    float k[TILE][CHANNELS], v[TILE][CHANNELS], dy[TILE][CHANNELS], dk[TILE][CHANNELS], dv[TILE][CHANNELS];
    float a[TILE][CHANNELS], b[TILE][CHANNELS], p[TILE][CHANNELS];  // the state before each token
};

// The channels of this block. Where A is no multiple of 8, rows are not aligned and are moved one value at a time.
struct Channels {
    int b, first, width, A;
    bool whole;

    __device__ __forceinline__ explicit Channels(int A) : A(A) {
        const int per_entry = (A + CHANNELS - 1) / CHANNELS;
        b = blockIdx.x / per_entry;
        first = blockIdx.x % per_entry * CHANNELS;
        width = min(CHANNELS, A - first);
        whole = width == CHANNELS && A % 8 == 0;
    }

    template <class X>
    __device__ __forceinline__ void load(float (&tile)[TILE][CHANNELS], const X* x, int count) const {
        if (whole) return ::load(tile, x, std::size_t(A), count, CHANNELS);
        for (int t = 0; t < count; ++t) {
            if (int(threadIdx.x) < width) tile[t][threadIdx.x] = to_float(x[std::size_t(t) * A + threadIdx.x]);
        }
    }

    template <class X>
    __device__ __forceinline__ void store(X* x, const float (&tile)[TILE][CHANNELS], int count) const {
        if (whole) return ::store(x, tile, std::size_t(A), count, CHANNELS);
        for (int t = 0; t < count; ++t) {
            if (int(threadIdx.x) < width) from_float(x[std::size_t(t) * A + threadIdx.x], tile[t][threadIdx.x]);
        }
    }
};

// The sums a e^p and b e^p of one channel, p being the largest exponent so far.
struct State {
    float a, b, p;

    __device__ __forceinline__ void add(float w, float k, float v) {
        const float q = fmaxf(p + w, k), past = expf(p + w - q), now = expf(k - q);
        a = past * a + now * v;
        b = past * b + now;
        p = q;
    }
};

// state, last: [B,3,A]. checkpoints: [B,ceil(T/TILE),3,A], the state before each tile; or null. w, bonus: [A].
template <class X>
__global__ void __launch_bounds__(CHANNELS)
    forward(const float* w, const float* bonus, const X* k, const X* v, const float* state, X* y, float* last,
            float* checkpoints, int T, int A) {
    auto& tile = block_memory<ForwardTiles>();
    const Channels channels(A);
    const int i = threadIdx.x, c = channels.first + i;
    const bool mine = i < channels.width;
    const std::size_t entry = std::size_t(channels.b) * 3 * A + c;
    if (checkpoints) checkpoints += std::size_t(channels.b) * ((T + TILE - 1) / TILE) * 3 * A + c;

    float w_c = 0, u = 0;
    State S{0, 0, 0};
    if (mine) {
        w_c = w[c], u = bonus[c];
        S = {state[entry], state[entry + A], state[entry + 2 * std::size_t(A)]};
    }
    for (int t0 = 0; t0 < T; t0 += TILE) {
        const int count = min(TILE, T - t0);
        const std::size_t from = (std::size_t(channels.b) * T + t0) * A + channels.first;
        channels.load(tile.k, k + from, count);
        channels.load(tile.v, v + from, count);
        __syncthreads();
        if (mine) {
            if (checkpoints) {
                checkpoints[0] = S.a, checkpoints[A] = S.b, checkpoints[2 * std::size_t(A)] = S.p;
                checkpoints += 3 * std::size_t(A);
            }
            for (int t = 0; t < count; ++t) {
                const float k_t = tile.k[t][i], v_t = tile.v[t][i];
                const float q = fmaxf(S.p, u + k_t), past = expf(S.p - q), now = expf(u + k_t - q);
                tile.y[t][i] = (past * S.a + now * v_t) / (past * S.b + now);
                S.add(w_c, k_t, v_t);
            }
        }
        __syncthreads();  // y is whole, and no thread reads the inputs any more
        channels.store(y + from, tile.y, count);
    }
    if (mine) last[entry] = S.a, last[entry + A] = S.b, last[entry + 2 * std::size_t(A)] = S.p;
}

// How much of a maximum's gradient its first argument gets: all, none, or half of it where both are equal.
__device__ __forceinline__ float first_of(float x, float y) { return x > y ? 1.0f : x < y ? 0.0f : 0.5f; }

// From the last tile to the first, the states of a tile computed from its checkpoint again.
// dlast, dstate: [B,3,A], gradients of the final and the initial state; dw, dbonus: [B,A], sums over the tokens.
template <class X>
__global__ void __launch_bounds__(CHANNELS)
    backward(const float* w, const float* bonus, const X* k, const X* v, const float* checkpoints, const X* dy,
             const float* dlast, float* dw, float* dbonus, X* dk, X* dv, float* dstate, int T, int A) {
    auto& tile = block_memory<BackwardTiles>();
    const Channels channels(A);
    const int i = threadIdx.x, c = channels.first + i;
    const bool mine = i < channels.width;
    const std::size_t entry = std::size_t(channels.b) * 3 * A + c;
    const int tiles = (T + TILE - 1) / TILE;
    checkpoints += std::size_t(channels.b) * tiles * 3 * A + c;

    float w_c = 0, u = 0, dw_sum = 0, du_sum = 0;
    State G{0, 0, 0};  // gradient of the state after the token
    if (mine) {
        w_c = w[c], u = bonus[c];
        G = {dlast[entry], dlast[entry + A], dlast[entry + 2 * std::size_t(A)]};
    }
    for (int number = tiles - 1; number >= 0; --number) {
        const int t0 = number * TILE, count = min(TILE, T - t0);
        const std::size_t from = (std::size_t(channels.b) * T + t0) * A + channels.first;
        channels.load(tile.k, k + from, count);
        channels.load(tile.v, v + from, count);
        channels.load(tile.dy, dy + from, count);
        __syncthreads();
        if (mine) {
            const float* checkpoint = checkpoints + std::size_t(number) * 3 * A;
            State S{checkpoint[0], checkpoint[A], checkpoint[2 * std::size_t(A)]};
            for (int t = 0; t < count; ++t) {
                tile.a[t][i] = S.a, tile.b[t][i] = S.b, tile.p[t][i] = S.p;
                S.add(w_c, tile.k[t][i], tile.v[t][i]);
            }
            for (int t = count - 1; t >= 0; --t) {
                const float k_t = tile.k[t][i], v_t = tile.v[t][i], a = tile.a[t][i], b = tile.b[t][i],
                            p = tile.p[t][i];
                // The update of the state. q shifts all three of it; what depends on it is what the sums lose.
                float q = fmaxf(p + w_c, k_t), past = expf(p + w_c - q), now = expf(k_t - q);
                const float dq = G.p - G.a * S.a - G.b * S.b, share = first_of(p + w_c, k_t);
                float dp = past * (G.a * a + G.b * b) + share * dq;
                float dk_t = now * (G.a * v_t + G.b) + (1 - share) * dq;
                float dv_t = now * G.a;
                G.a *= past, G.b *= past;
                dw_sum += dp;
                // The output: a ratio, which no shift changes.
                q = fmaxf(p, u + k_t), past = expf(p - q), now = expf(u + k_t - q);
                const float below = past * b + now, y = (past * a + now * v_t) / below;
                const float dabove = tile.dy[t][i] / below, dbelow = -dabove * y;
                const float dk_bonus = now * (v_t * dabove + dbelow);
                dp += past * (a * dabove + b * dbelow);
                G.a += past * dabove, G.b += past * dbelow, G.p = dp;
                du_sum += dk_bonus;
                tile.dk[t][i] = dk_t + dk_bonus;
                tile.dv[t][i] = dv_t + now * dabove;
                S = {a, b, p};
            }
        }
        __syncthreads();
        channels.store(dk + from, tile.dk, count);
        channels.store(dv + from, tile.dv, count);
        __syncthreads();  // the tile may be filled anew
    }
    if (mine) {
        dstate[entry] = G.a, dstate[entry + A] = G.b, dstate[entry + 2 * std::size_t(A)] = G.p;
        dw[std::size_t(channels.b) * A + c] = dw_sum;
        dbonus[std::size_t(channels.b) * A + c] = du_sum;
    }
}

}  // namespace wkv4
