// WKV5 and WKV6 as a recurrence: one block per head of a batch entry, the state in registers. Any decay, any length.
// The maths, the layouts and the gradient are in kernels/README.md; the names are the same here.
//
// WKV5 is WKV6 with one decay for all tokens: w is [H,N], and its tile is filled once.
#pragma once

#include "tiles.cuh"

namespace wkv6 {

template <int N>
struct ForwardTiles {
    float r[TILE][N], d[TILE][N], k[TILE][N], v[TILE][N], y[TILE][N];
    float u[N];
};

// The first element and the stride of this head's log-decays: per token, or the same for all.
template <bool PER_TOKEN, int N>
__device__ __forceinline__ Rows<N> decay_rows(int T, int H) {
    Rows<N> rows(T, H);
    if constexpr (!PER_TOKEN) rows.first = std::size_t(blockIdx.x % H) * N, rows.stride = 0;
    return rows;
}

// checkpoints: [B,H,ceil(T/TILE),V,K], the state before each tile; or null.
template <int N, bool PER_TOKEN, class X, class W>
__global__ void __launch_bounds__(Share<N>::THREADS)
    forward(const X* r, const W* w, const X* k, const X* v, const float* bonus, const float* state, X* y, float* last,
            float* checkpoints, int T, int H) {
    constexpr int OWN = Share<N>::OWN, THREADS = Share<N>::THREADS;
    auto& tile = block_memory<ForwardTiles<N>>();
    const Share<N> share;  // a row: one value index, all keys
    const Rows<N> rows(T, H), decays = decay_rows<PER_TOKEN, N>(T, H);
    const std::size_t matrix = std::size_t(blockIdx.x) * N * N;
    if (checkpoints) checkpoints += matrix * ((T + TILE - 1) / TILE);

    if (share.part == 0) tile.u[share.line] = bonus[blockIdx.x % H * N + share.line];
    if constexpr (!PER_TOKEN) load_decay(tile.d, w + decays.first, 0, TILE, THREADS);
    float S[OWN];
    load_row(S, state + matrix, share);
    for (int t0 = 0; t0 < T; t0 += TILE) {
        const int count = min(TILE, T - t0);
        const std::size_t from = rows.first + t0 * rows.stride;
        load(tile.r, r + from, rows.stride, count, THREADS);
        if constexpr (PER_TOKEN) load_decay(tile.d, w + from, rows.stride, count, THREADS);
        load(tile.k, k + from, rows.stride, count, THREADS);
        load(tile.v, v + from, rows.stride, count, THREADS);
        __syncthreads();
        if (checkpoints) {
            store_row(checkpoints, S, share);
            checkpoints += N * N;
        }
        for (int t = 0; t < count; ++t) {
            const float v_t = tile.v[t][share.line];
            float out = 0;
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int n = share.at(i);
                const float written = v_t * tile.k[t][n];
                out += (S[i] + tile.u[n] * written) * tile.r[t][n];
                S[i] = S[i] * tile.d[t][n] + written;
            }
            out = share.sum(out);
            if (share.part == 0) tile.y[t][share.line] = out;
        }
        __syncthreads();  // y is whole, and no thread reads the inputs any more
        store(y + from, tile.y, rows.stride, count, THREADS);
    }
    store_row(last + matrix, S, share);
}

template <int N>
struct BackwardTiles {
    // r, d, k become their own gradients, but in WKV5 d stays: what thread j has read of column j, no other will.
    float r[TILE][N], d[TILE][N], k[TILE][N], v[TILE][N], dy[TILE][N], dv[TILE][N];
    float u[N], own_bonus[TILE];  // own_bonus: sum over keys of r u k
};

// From the last tile to the first. In each, rows of G give dv, then columns of S and G the rest. The states of a tile
// come from its checkpoint again: through every fourth token, so that a token is not recomputed 7.5 times but 3.
//
// dlast: gradient of the final state. dstate: gradient of the initial one; G waits there from tile to tile.
// dw: as w in WKV6; in WKV5 float [B,H,N], as dbonus is in both: their sums over tokens.
template <int N, bool PER_TOKEN, class X, class W>
__global__ void __launch_bounds__(Share<N>::THREADS)
    backward(const X* r, const W* w, const X* k, const X* v, const float* bonus, const float* checkpoints, const X* dy,
             const float* dlast, X* dr, W* dw, X* dk, X* dv, float* dbonus, float* dstate, int T, int H) {
    constexpr int OWN = Share<N>::OWN, THREADS = Share<N>::THREADS, STEP = 4;
    auto& tile = block_memory<BackwardTiles<N>>();
    const Share<N> share;
    const Rows<N> rows(T, H), decays = decay_rows<PER_TOKEN, N>(T, H);
    const std::size_t matrix = std::size_t(blockIdx.x) * N * N;
    const int tiles = (T + TILE - 1) / TILE;
    checkpoints += matrix * tiles;
    dstate += matrix;
    const float* G_from = dlast + matrix;

    if (share.part == 0) tile.u[share.line] = bonus[blockIdx.x % H * N + share.line];
    if constexpr (!PER_TOKEN) load_decay(tile.d, w + decays.first, 0, TILE, THREADS);
    float du = 0, dw_sum = 0;
    for (int number = tiles - 1; number >= 0; --number) {
        const int t0 = number * TILE, count = min(TILE, T - t0);
        const std::size_t from = rows.first + t0 * rows.stride;
        const float* checkpoint = checkpoints + std::size_t(number) * N * N;
        load(tile.r, r + from, rows.stride, count, THREADS);
        if constexpr (PER_TOKEN) load_decay(tile.d, w + from, rows.stride, count, THREADS);
        load(tile.k, k + from, rows.stride, count, THREADS);
        load(tile.v, v + from, rows.stride, count, THREADS);
        load(tile.dy, dy + from, rows.stride, count, THREADS);
        __syncthreads();
        if (threadIdx.x < TILE) {
            float sum = 0;
            for (int n = 0; n < N; ++n) sum += tile.r[threadIdx.x][n] * tile.u[n] * tile.k[threadIdx.x][n];
            tile.own_bonus[threadIdx.x] = sum;
        }
        __syncthreads();
        {
            float G[OWN];
            load_row(G, G_from, share);
            for (int t = count - 1; t >= 0; --t) {
                const float dy_t = tile.dy[t][share.line];
                float dv_t = 0;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int n = share.at(i);
                    dv_t += G[i] * tile.k[t][n];
                    G[i] = G[i] * tile.d[t][n] + dy_t * tile.r[t][n];
                }
                dv_t = share.sum(dv_t) + dy_t * tile.own_bonus[t];
                if (share.part == 0) tile.dv[t][share.line] = dv_t;
            }
        }
        __syncthreads();  // rows have read all they need; from here on share.line is a column

        const int j = share.line;
        const float u = tile.u[j];
        float G[OWN], S_step[OWN], S[OWN];
        load_column(G, G_from, share);
        const auto advance = [&](float(&state)[OWN], int t) {
            const float d_t = tile.d[t][j], k_t = tile.k[t][j];
#pragma unroll
            for (int i = 0; i < OWN; ++i) state[i] = state[i] * d_t + tile.v[t][share.at(i)] * k_t;
        };
        for (int step = (count - 1) / STEP * STEP; step >= 0; step -= STEP) {
            load_column(S_step, checkpoint, share);
            for (int t = 0; t < step; ++t) advance(S_step, t);
            for (int t = min(step + STEP, count) - 1; t >= step; --t) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) S[i] = S_step[i];
                for (int s = step; s < t; ++s) advance(S, s);
                const float r_t = tile.r[t][j], d_t = tile.d[t][j], k_t = tile.k[t][j];
                float dr_t = 0, dd_t = 0, dk_t = 0, v_dy = 0;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int n = share.at(i);
                    const float v_t = tile.v[t][n], dy_t = tile.dy[t][n];
                    dr_t += S[i] * dy_t;
                    dd_t += G[i] * S[i];
                    dk_t += G[i] * v_t;
                    v_dy += v_t * dy_t;
                    G[i] = G[i] * d_t + dy_t * r_t;
                }
                dr_t = share.sum(dr_t), dd_t = share.sum(dd_t), dk_t = share.sum(dk_t), v_dy = share.sum(v_dy);
                du += r_t * k_t * v_dy;
                dw_sum += dd_t * d_t;
                if constexpr (Share<N>::PARTS > 1) __syncwarp();  // the other part has read this token, too
                if (share.part == 0) {
                    tile.r[t][j] = dr_t + u * k_t * v_dy;
                    tile.k[t][j] = dk_t + u * r_t * v_dy;
                    if constexpr (PER_TOKEN) tile.d[t][j] = dd_t * d_t;
                }
            }
        }
        store_column(dstate, G, share);
        G_from = dstate;
        __syncthreads();
        store(dr + from, tile.r, rows.stride, count, THREADS);
        if constexpr (PER_TOKEN) store(dw + from, tile.d, rows.stride, count, THREADS);
        store(dk + from, tile.k, rows.stride, count, THREADS);
        store(dv + from, tile.dv, rows.stride, count, THREADS);
        __syncthreads();  // the tile may be filled anew
    }
    if (share.part == 0) {
        dbonus[std::size_t(blockIdx.x) * N + share.line] = du;
        if constexpr (!PER_TOKEN) dw[std::size_t(blockIdx.x) * N + share.line] = dw_sum;
    }
}

}  // namespace wkv6
