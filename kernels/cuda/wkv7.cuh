// WKV7 as a recurrence: one block per head of a batch entry, the state in registers. Any decay, any length.
// The maths, the layouts and the gradient are in kernels/README.md; the names are the same here.
#pragma once

#include "tiles.cuh"

namespace wkv7 {

template <int N>
struct ForwardTiles {
    float r[TILE][N], d[TILE][N], k[TILE][N], v[TILE][N], a[TILE][N], b[TILE][N], y[TILE][N];
};

// checkpoints: [B,H,ceil(T/TILE)+1,V,K], the state before each tile and after the last; or null.
template <int N, class X, class W>
__global__ void __launch_bounds__(Share<N>::THREADS)
    forward(const X* r, const W* w, const X* k, const X* v, const X* a, const X* b, const float* state, X* y,
            float* last, float* checkpoints, int T, int H) {
    constexpr int OWN = Share<N>::OWN, THREADS = Share<N>::THREADS;
    auto& tile = block_memory<ForwardTiles<N>>();
    const Share<N> share;  // a row: one value index, all keys
    const Rows<N> rows(T, H);
    const std::size_t matrix = std::size_t(blockIdx.x) * N * N;
    if (checkpoints) checkpoints += matrix * ((T + TILE - 1) / TILE + 1);

    float S[OWN];
    load_row(S, state + matrix, share);
    for (int t0 = 0; t0 < T; t0 += TILE) {
        const int count = min(TILE, T - t0);
        const std::size_t from = rows.first + t0 * rows.stride;
        load(tile.r, r + from, rows.stride, count, THREADS);
        load_decay(tile.d, w + from, rows.stride, count, THREADS);
        load(tile.k, k + from, rows.stride, count, THREADS);
        load(tile.v, v + from, rows.stride, count, THREADS);
        load(tile.a, a + from, rows.stride, count, THREADS);
        load(tile.b, b + from, rows.stride, count, THREADS);
        __syncthreads();
        if (checkpoints) {
            store_row(checkpoints, S, share);
            checkpoints += N * N;
        }
        for (int t = 0; t < count; ++t) {
            float u = 0, out = 0;
#pragma unroll
            for (int i = 0; i < OWN; ++i) u += S[i] * tile.a[t][share.at(i)];
            u = share.sum(u);
            const float v_t = tile.v[t][share.line];
#pragma unroll
            for (int i = 0; i < OWN; ++i) {
                const int n = share.at(i);
                S[i] = S[i] * tile.d[t][n] + u * tile.b[t][n] + v_t * tile.k[t][n];
                out += S[i] * tile.r[t][n];
            }
            out = share.sum(out);
            if (share.part == 0) tile.y[t][share.line] = out;
        }
        __syncthreads();  // y is whole, and no thread reads the inputs any more
        store(y + from, tile.y, rows.stride, count, THREADS);
    }
    store_row(last + matrix, S, share);
    if (checkpoints) store_row(checkpoints, S, share);
}

template <int N>
struct BackwardTiles {
    // r, d, k, a, b become their own gradients: what thread j has read of column j, no other will.
    float r[TILE][N], d[TILE][N], k[TILE][N], v[TILE][N], a[TILE][N], b[TILE][N], dy[TILE][N];
    float u[TILE][N], du[TILE][N], dv[TILE][N];
};

// One token of column j of the state, when u and v are known.
template <int N>
__device__ __forceinline__ void advance(float (&S)[Share<N>::OWN], const BackwardTiles<N>& tile, int t,
                                        const Share<N>& share) {
    const float d = tile.d[t][share.line], b = tile.b[t][share.line], k = tile.k[t][share.line];
#pragma unroll
    for (int i = 0; i < Share<N>::OWN; ++i) {
        const int n = share.at(i);
        S[i] = S[i] * d + tile.u[t][n] * b + tile.v[t][n] * k;
    }
}

// From the last tile to the first. In each, rows of S give u forwards, rows of G give dv and du backwards, and columns
// of both, which by then need nothing of one another, give the rest. The states of a tile come from its checkpoint
// again: through every fourth token, so that a token is not recomputed 7.5 times but 3.
//
// dlast: gradient of the final state. dstate: gradient of the initial one; G waits there from tile to tile.
// wanted: null, or one number per block, 0 where there is nothing left to do.
template <int N, class X, class W>
__global__ void __launch_bounds__(Share<N>::THREADS)
    backward(const X* r, const W* w, const X* k, const X* v, const X* a, const X* b, const float* checkpoints,
             const X* dy, const float* dlast, X* dr, W* dw, X* dk, X* dv, X* da, X* db, float* dstate,
             const int* wanted, int T, int H) {
    if (wanted && !wanted[blockIdx.x]) return;
    constexpr int OWN = Share<N>::OWN, THREADS = Share<N>::THREADS, STEP = 4;
    auto& tile = block_memory<BackwardTiles<N>>();
    const Share<N> share;
    const Rows<N> rows(T, H);
    const std::size_t matrix = std::size_t(blockIdx.x) * N * N;
    const int tiles = (T + TILE - 1) / TILE;
    checkpoints += matrix * (tiles + 1);
    dstate += matrix;
    const float* G_from = dlast + matrix;

    for (int number = tiles - 1; number >= 0; --number) {
        const int t0 = number * TILE, count = min(TILE, T - t0);
        const std::size_t from = rows.first + t0 * rows.stride;
        const float* checkpoint = checkpoints + std::size_t(number) * N * N;
        load(tile.r, r + from, rows.stride, count, THREADS);
        load_decay(tile.d, w + from, rows.stride, count, THREADS);
        load(tile.k, k + from, rows.stride, count, THREADS);
        load(tile.v, v + from, rows.stride, count, THREADS);
        load(tile.a, a + from, rows.stride, count, THREADS);
        load(tile.b, b + from, rows.stride, count, THREADS);
        load(tile.dy, dy + from, rows.stride, count, THREADS);
        __syncthreads();

        {
            float S[OWN];
            load_row(S, checkpoint, share);
            for (int t = 0; t < count; ++t) {
                float u = 0;
#pragma unroll
                for (int i = 0; i < OWN; ++i) u += S[i] * tile.a[t][share.at(i)];
                u = share.sum(u);
                if (share.part == 0) tile.u[t][share.line] = u;
                const float v_t = tile.v[t][share.line];
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int n = share.at(i);
                    S[i] = S[i] * tile.d[t][n] + u * tile.b[t][n] + v_t * tile.k[t][n];
                }
            }
        }
        {
            float G[OWN];
            load_row(G, G_from, share);
            for (int t = count - 1; t >= 0; --t) {
                const float dy_t = tile.dy[t][share.line];
                float dv_t = 0, du_t = 0;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int n = share.at(i);
                    G[i] += dy_t * tile.r[t][n];
                    dv_t += G[i] * tile.k[t][n];
                    du_t += G[i] * tile.b[t][n];
                }
                dv_t = share.sum(dv_t);
                du_t = share.sum(du_t);
                if (share.part == 0) {
                    tile.dv[t][share.line] = dv_t;
                    tile.du[t][share.line] = du_t;
                }
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int n = share.at(i);
                    G[i] = G[i] * tile.d[t][n] + du_t * tile.a[t][n];
                }
            }
        }
        __syncthreads();  // u, du and dv are whole; from here on share.line is a column

        float G[OWN], S_step[OWN], S[OWN];
        load_column(G, G_from, share);
        for (int step = (count - 1) / STEP * STEP; step >= 0; step -= STEP) {
            load_column(S_step, checkpoint, share);
            for (int t = 0; t < step; ++t) advance(S_step, tile, t, share);
            for (int t = min(step + STEP, count) - 1; t >= step; --t) {
#pragma unroll
                for (int i = 0; i < OWN; ++i) S[i] = S_step[i];
                for (int s = step; s < t; ++s) advance(S, tile, s, share);
                const int j = share.line;
                const float r_t = tile.r[t][j], d_t = tile.d[t][j], k_t = tile.k[t][j], a_t = tile.a[t][j],
                            b_t = tile.b[t][j];
                float dr_t = 0, dd_t = 0, dk_t = 0, da_t = 0, db_t = 0;
#pragma unroll
                for (int i = 0; i < OWN; ++i) {
                    const int n = share.at(i);
                    const float u = tile.u[t][n], v_t = tile.v[t][n], du = tile.du[t][n], dy_t = tile.dy[t][n];
                    dr_t += (S[i] * d_t + u * b_t + v_t * k_t) * dy_t;
                    G[i] += dy_t * r_t;
                    dk_t += G[i] * v_t;
                    db_t += G[i] * u;
                    dd_t += G[i] * S[i];
                    da_t += S[i] * du;
                    G[i] = G[i] * d_t + du * a_t;
                }
                dr_t = share.sum(dr_t), dd_t = share.sum(dd_t), dk_t = share.sum(dk_t);
                da_t = share.sum(da_t), db_t = share.sum(db_t);
                if constexpr (Share<N>::PARTS > 1) __syncwarp();  // the other part has read this token, too
                if (share.part == 0) {
                    tile.r[t][j] = dr_t, tile.d[t][j] = dd_t * d_t, tile.k[t][j] = dk_t;
                    tile.a[t][j] = da_t, tile.b[t][j] = db_t;
                }
            }
        }
        store_column(dstate, G, share);
        G_from = dstate;
        __syncthreads();
        store(dr + from, tile.r, rows.stride, count, THREADS);
        store(dw + from, tile.d, rows.stride, count, THREADS);
        store(dk + from, tile.k, rows.stride, count, THREADS);
        store(dv + from, tile.dv, rows.stride, count, THREADS);
        store(da + from, tile.a, rows.stride, count, THREADS);
        store(db + from, tile.b, rows.stride, count, THREADS);
        __syncthreads();  // the tile may be filled anew
    }
}

}  // namespace wkv7
