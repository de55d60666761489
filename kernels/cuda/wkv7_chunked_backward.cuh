// The gradient of WKV7 in its chunk form on tensor cores: bf16, head size 64, 16 tokens per chunk, last chunk first.
//
// As in wkv7_chunked.cuh, four warps prepare a chunk while four others work on the one before. The latter first go by
// rows of the state, 16 each: U, dZ, dV, and the step of G, which is all that has to wait for one another. Then they go
// by channels, 16 each, for what sums over rows. kernels/README.md derives it; the names are the same here.
#pragma once

#include "wkv7_chunked.cuh"

namespace wkv7 {

using Matrix = bf16[N][N + 8];
using Sums = float[2][4];  // [16 tokens, 16 channels of this warp], in the layout of sums

struct ChunkedBackwardMemory {
    Chunk chunk[2];
    Scratch scratch[2];
    ChunkRows dy[2];
    ChunkRows u, dz, out;
    Matrix S0, G;
    Scores dr_k, dr_b, da_b, da_k;
    float sums[2 * CARRIERS / 8][N + 8];  // per 2 rows of the state: G ⊙ S at the chunk's end; then what w gets
};

constexpr int ROWS_MET = 3;  // the barrier of the carriers

// 16 rows of an [N,N] matrix as operands, and their copy in shared memory.
__device__ __forceinline__ void share_rows(Matrix& shared, const FragmentA (&rows)[N / 16], int first_row) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = first_row + lane / 4 + j % 2 * 8, column = i * 16 + j / 2 * 8 + lane % 4 * 2;
            *reinterpret_cast<unsigned*>(&shared[row][column]) = rows[i].x[j];
        }
    }
}

// Sums [16 values, 16 tokens] into a tile of tokens.
__device__ __forceinline__ void put_transposed(ChunkRows& tile, const Sums& c, int first_row) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            tile[half * 8 + lane % 4 * 2 + i % 2][first_row + lane / 4 + i / 2 * 8] = __float2bfloat16_rn(c[half][i]);
        }
    }
}

// This warp's 16 columns of a tile, 16 bytes per lane.
__device__ __forceinline__ void store_columns(bf16* rows, const ChunkRows& tile, std::size_t stride, int count,
                                              int first_column) {
    const int t = lane_of_warp() / 2, column = first_column + lane_of_warp() % 2 * 8;
    if (t < count) {
        *reinterpret_cast<uint4*>(rows + t * stride + column) = *reinterpret_cast<const uint4*>(&tile[t][column]);
    }
}

// Calls use(sum, token, channel) for each of this lane's sums.
template <class Use>
__device__ __forceinline__ void each_sum(int first_column, Use use) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            use(half, i, lane / 4 + i / 2 * 8, first_column + half * 8 + lane % 4 * 2 + i % 2);
        }
    }
}

// The part that goes by rows. G, of the state at the chunk's end, becomes that at its start.
__device__ __forceinline__ void carry_back(StateRows& G, const FragmentA (&S0)[N / 16], const Chunk& chunk,
                                           const ChunkRows& dy, ChunkedBackwardMemory& memory, int first_row) {
    share_rows(memory.S0, S0, first_row);
    const FragmentA Vt = columns_as_a(chunk.v, first_row), dYt = columns_as_a(dy, first_row);
    {
        Sums c = {}, u = {};
#pragma unroll
        for (int i = 0; i < N / 16; ++i) multiply_add(c, S0[i], rows_as_b(chunk.a, i * 16));
        multiply_add(c, Vt, rows_as_b(chunk.a_k, 0));
        multiply_add(u, as_operand(c[0], c[1]), rows_as_b(chunk.solved, 0));
        put_transposed(memory.u, u, first_row);
    }
    FragmentA dZt;
    {
        FragmentA G_rows[N / 16];
#pragma unroll
        for (int i = 0; i < N / 16; ++i) G_rows[i] = as_operand(G[2 * i], G[2 * i + 1]);
        share_rows(memory.G, G_rows, first_row);
        Sums du = {}, dz = {}, dv = {};
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            multiply_add(du, G_rows[i], rows_as_b(chunk.b, i * 16));
            multiply_add(dv, G_rows[i], rows_as_b(chunk.k, i * 16));
        }
        multiply_add(du, dYt, columns_as_b(chunk.r_b, 0));
        multiply_add(dz, as_operand(du[0], du[1]), columns_as_b(chunk.solved, 0));
        put_transposed(memory.dz, dz, first_row);
        dZt = as_operand(dz[0], dz[1]);
        multiply_add(dv, dYt, columns_as_b(chunk.r_k, 0));
        multiply_add(dv, dZt, columns_as_b(chunk.a_k, 0));
        put_transposed(memory.out, dv, first_row);
    }
    const int lane = lane_of_warp();
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = n * 8 + lane % 4 * 2 + i % 2;
            G[n][i] *= chunk.p_end[column];
            G[n + 1][i] *= chunk.p_end[column + 8];
        }
        const FragmentsB r = columns_as_b(chunk.r, n * 8), a = columns_as_b(chunk.a, n * 8);
        multiply_add(G[n], dYt, r.x[0], r.x[1]);
        multiply_add(G[n], dZt, a.x[0], a.x[1]);
        multiply_add(G[n + 1], dYt, r.x[2], r.x[3]);
        multiply_add(G[n + 1], dZt, a.x[2], a.x[3]);
    }
}

// One gradient of a score matrix per warp: dY Vᵀ, dY Uᵀ, dZ Uᵀ, dZ Vᵀ.
__device__ __forceinline__ void score_gradients(const Chunk& chunk, const ChunkRows& dy, ChunkedBackwardMemory& memory,
                                                int which) {
    const ChunkRows &u = memory.u, &dz = memory.dz;
    const ChunkRows& left = which < 2 ? dy : dz;
    const ChunkRows& right = which == 0 || which == 3 ? chunk.v : u;
    Sums c = {};
#pragma unroll
    for (int i = 0; i < N; i += 16) multiply_add(c, rows_as_a(left, i), rows_as_b(right, i));
    Scores& out = which == 0 ? memory.dr_k : which == 1 ? memory.dr_b : which == 2 ? memory.da_b : memory.da_k;
    each_sum(0, [&](int half, int i, int t, int s) {
        out[t][s] = __float2bfloat16_rn(s < t || (s == t && which < 2) ? c[half][i] : 0.0f);
    });
}

// X Y, X being [16,N] and Y [N, 16 columns].
__device__ __forceinline__ void multiply_state(Sums& c, const ChunkRows& x, const Matrix& y, int first_column) {
#pragma unroll
    for (int i = 0; i < N / 16; ++i) multiply_add(c, rows_as_a(x, i * 16), columns_as_b(&y[i * 16], first_column));
}

// The part that goes by channels: the gradients of r, w, k, a, b.
template <class W>
__device__ __forceinline__ void token_gradients(const Chunk& chunk, const Scratch& scratch, const ChunkRows& dy,
                                                ChunkedBackwardMemory& memory, int first_column, bf16* dr, W* dw,
                                                bf16* dk, bf16* da, bf16* db, std::size_t stride, int count) {
    const int lane = lane_of_warp();
    // Of w gets token s: G ⊙ S at the end, and what r, k, b of tokens >= s and a of tokens > s get, each times itself.
    float at_end = 0;
#pragma unroll
    for (int i = 0; i < CARRIERS / 8; ++i) {
        at_end += memory.sums[lane / 16 * (CARRIERS / 8) + i][first_column + lane % 16];
    }
    at_end += __shfl_xor_sync(0xffffffffu, at_end, 16);
    __syncwarp();  // the sums of these columns may be filled anew

    const auto give = [&](bf16* out, auto value) {
        __syncwarp();
        each_sum(first_column, [&](int half, int i, int t, int n) {
            memory.out[t][n] = __float2bfloat16_rn(value(half, i, t, n));
        });
        __syncwarp();
        store_columns(out, memory.out, stride, count, first_column);
    };
    const auto at = [](const ChunkRows& x, int t, int n) { return to_float(x[t][n]); };
    Sums gains = {}, of_a;
    {
        Sums d = {};
        multiply_state(d, dy, memory.S0, first_column);
        multiply_add(d, rows_as_a(memory.dr_k, 0), columns_as_b(scratch.k, first_column));
        multiply_add(d, rows_as_a(memory.dr_b, 0), columns_as_b(scratch.b, first_column));
        give(dr, [&](int half, int i, int t, int n) {
            gains[half][i] += d[half][i] * at(chunk.r, t, n);
            return d[half][i] * __expf(scratch.log_p[t][n]);
        });
    }
    {
        Sums d = {};
        multiply_state(d, memory.dz, memory.S0, first_column);
        multiply_add(d, rows_as_a(memory.da_k, 0), columns_as_b(scratch.k, first_column));
        multiply_add(d, rows_as_a(memory.da_b, 0), columns_as_b(scratch.b, first_column));
        give(da, [&](int half, int i, int t, int n) {
            of_a[half][i] = d[half][i] * at(chunk.a, t, n);
            gains[half][i] += of_a[half][i];
            return d[half][i] * (t == 0 ? 1.0f : __expf(scratch.log_p[t - 1][n]));
        });
    }
    // k and b act within the chunk, divided by the decay so far, and on its end.
    const auto written = [&](bf16* out, const Scores& by_r, const Scores& by_a, const ChunkRows& by_end,
                             const ChunkRows& inside, const ChunkRows& to_end) {
        Sums d = {}, d_end = {};
        multiply_add(d, columns_as_a(by_r, 0), columns_as_b(chunk.r, first_column));
        multiply_add(d, columns_as_a(by_a, 0), columns_as_b(chunk.a, first_column));
        multiply_state(d_end, by_end, memory.G, first_column);
        give(out, [&](int half, int i, int t, int n) {
            gains[half][i] -= d[half][i] * at(inside, t, n) + d_end[half][i] * at(to_end, t, n);
            const float log_p = scratch.log_p[t][n];
            return d[half][i] * __expf(-log_p) + d_end[half][i] * __expf(scratch.log_p[L - 1][n] - log_p);
        });
    };
    written(dk, memory.dr_k, memory.da_k, chunk.v, scratch.k, chunk.k);
    written(db, memory.dr_b, memory.da_b, memory.u, scratch.b, chunk.b);

    each_sum(first_column, [&](int half, int i, int t, int n) { memory.sums[t][n] = gains[half][i]; });
    __syncwarp();
    if (lane < 16) {
        float sum = at_end;
#pragma unroll
        for (int t = L - 1; t >= 0; --t) {
            float& here = memory.sums[t][first_column + lane];
            here = sum += here;
        }
    }
    __syncwarp();
    each_sum(first_column, [&](int half, int i, int t, int n) { memory.sums[t][n] -= of_a[half][i]; });
    __syncwarp();
    constexpr int WIDTH = 16 / sizeof(W);
    const int t = lane / 2;
#pragma unroll
    for (int i = 0; i < 8; i += WIDTH) {
        const int n = first_column + lane % 2 * 8 + i;
        uint4 raw;
        W* x = reinterpret_cast<W*>(&raw);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) from_float(x[j], memory.sums[t][n + j]);
        if (t < count) *reinterpret_cast<uint4*>(dw + t * stride + n) = raw;
    }
}

// As `backward`, which is its check, and which takes over a head that has a chunk with too much decay: refused[block]
// says so.
template <class W>
__global__ void __launch_bounds__(PREPARERS + CARRIERS, 2)
    backward_chunked(const bf16* r, const W* w, const bf16* k, const bf16* v, const bf16* a, const bf16* b,
                     const float* checkpoints, const bf16* dy, const float* dlast, bf16* dr, W* dw,
                     bf16* dk, bf16* dv, bf16* da, bf16* db, float* dstate, int* refused, int T, int H) {
    auto& memory = block_memory<ChunkedBackwardMemory>();
    const Rows<N> rows(T, H);
    const int chunks = (T + L - 1) / L;
    const std::size_t matrix = std::size_t(blockIdx.x) * N * N;
    if (threadIdx.x < CARRIERS) {
        const int lane = lane_of_warp(), warp = threadIdx.x / 32, own = warp * 16;  // rows first, then channels
        StateRows G;
        each_pair(G, own, [&](float& x, float& next, int at) { x = dlast[matrix + at], next = dlast[matrix + at + 1]; });
        for (int number = chunks - 1; number >= 0; --number) {
            const float* S_start = checkpoints + (std::size_t(blockIdx.x) * (chunks + 1) + number) * N * N;
            const float* S_end = S_start + N * N;
            StateRows S;
            each_pair(S, own, [&](float& x, float& next, int at) { x = S_end[at], next = S_end[at + 1]; });
            float at_end[N / 8][2];
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) at_end[n][i] = G[n][i] * S[n][i] + G[n][i + 2] * S[n][i + 2];
            }
            each_pair(S, own, [&](float& x, float& next, int at) { x = S_start[at], next = S_start[at + 1]; });
            FragmentA S0[N / 16];
#pragma unroll
            for (int i = 0; i < N / 16; ++i) S0[i] = as_operand(S[2 * i], S[2 * i + 1]);

            meet(HANDOVER, PREPARERS + CARRIERS);  // this chunk is prepared, and all is done with the one before
            const Chunk& chunk = memory.chunk[number % 2];
            if (decays_too_much(chunk.p_end)) {
                if (threadIdx.x == 0) refused[blockIdx.x] = 1;
                return;
            }
            const ChunkRows& tile_dy = memory.dy[number % 2];
            const int count = min(L, T - number * L);
            const std::size_t from = rows.first + std::size_t(number) * L * rows.stride;
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    memory.sums[warp * 8 + lane / 4][n * 8 + lane % 4 * 2 + i] = at_end[n][i];
                }
            }
            carry_back(G, S0, chunk, tile_dy, memory, own);
            __syncwarp();  // this warp's columns of dv are whole
            store_columns(dv + from, memory.out, rows.stride, count, own);
            meet(ROWS_MET, CARRIERS);
            score_gradients(chunk, tile_dy, memory, warp);
            meet(ROWS_MET, CARRIERS);
            token_gradients(chunk, memory.scratch[number % 2], tile_dy, memory, own, dr + from, dw + from, dk + from,
                            da + from, db + from, rows.stride, count);
        }
        each_pair(G, own, [&](float& x, float& next, int at) { dstate[matrix + at] = x, dstate[matrix + at + 1] = next; });
        if (threadIdx.x == 0) refused[blockIdx.x] = 0;
    } else {
        const int rank = threadIdx.x - CARRIERS;
        Raw<W> raw;
        uint4 raw_dy;
        int token = (chunks - 1) * L + rank / 8;
        const auto next = [&] {
            const std::size_t at = rows.first + token * rows.stride + rank % 8 * 8;
            const bool there = token >= 0 && token < T;
            fetch(raw, r, w, k, v, a, b, at, there);
            raw_dy = there ? *reinterpret_cast<const uint4*>(dy + at) : make_uint4(0, 0, 0, 0);
            token -= L;
        };
        next();
        for (int number = chunks - 1; number >= 0; --number) {
            Chunk& chunk = memory.chunk[number % 2];
            put(memory.dy[number % 2], rank / 8, rank % 8 * 8, raw_dy);
            prepare(chunk, memory.scratch[number % 2], raw, rank, next);
            meet(HANDOVER, PREPARERS + CARRIERS);
            if (decays_too_much(chunk.p_end)) return;
        }
    }
}

}  // namespace wkv7
