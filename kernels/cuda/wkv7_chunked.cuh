// WKV7 forward in its chunk form on tensor cores: bf16 in and out, head size 64, 16 tokens per chunk.
//
// One block per head of a batch entry. Four warps prepare a chunk (everything that does not need the state: scaled rows,
// the four score matrices, the inverse of the triangular system) while four others take the state, 16 of its rows each,
// through the chunk before. Sums and the state are float, operands of the products bf16. kernels/README.md derives the
// form; the names are the same here.
//
// Keys are divided by the decay since the chunk's start. A chunk whose decay falls below FLOOR in any channel, which
// RWKV-7's cannot, is computed token by token instead.
#pragma once

#include "tensor_cores.cuh"
#include "tiles.cuh"

namespace wkv7 {

constexpr int L = 16, N = 64;
constexpr int PREPARERS = 128, CARRIERS = 128;
constexpr int PREPARED = 1, HANDOVER = 2;  // numbers of barriers
constexpr float FLOOR = 1e-15f;  // 1 / FLOOR times any score stays inside float; RWKV-7's decay over a chunk is > 6e-5
// Rows are 16 bytes longer than full, so that eight of them start in different banks.
using ChunkRows = bf16[L][N + 8];
using Scores = bf16[L][L + 8];

// What the carriers need of a chunk. In one that is computed token by token, r, k, a, b are as they came.
struct Chunk {
    ChunkRows r, a, v, k, b;          // R', A', V, and K, B decayed to the end of the chunk
    Scores a_k, r_k, r_b, solved;     // solved: (I - A'B'ᵀ ⊙ M₋)⁻¹
    float w[L][N];
    float p_end[N];
};

// What the preparers also make on their way: K', B', the sums of w, and A'B'ᵀ ⊙ M₋.
struct Scratch {
    ChunkRows k, b;
    float log_p[L][N];
    float a_b[L][L + 1];
};

struct ChunkedMemory {
    Chunk chunk[2];
    Scratch scratch;
    ChunkRows y;
};

// One thread's sixteenth of a row of every input: 8 channels of one token.
template <class W>
struct Raw {
    uint4 r, k, v, a, b;
    float w[8];
};

template <class W>
__device__ __forceinline__ void fetch(Raw<W>& raw, const bf16* r, const W* w, const bf16* k, const bf16* v,
                                      const bf16* a, const bf16* b, std::size_t at, bool there) {
    const uint4 zero = make_uint4(0, 0, 0, 0);  // a token that changes nothing
    const auto sixteen = [&](const bf16* x) { return there ? *reinterpret_cast<const uint4*>(x + at) : zero; };
    raw.r = sixteen(r), raw.k = sixteen(k), raw.v = sixteen(v), raw.a = sixteen(a), raw.b = sixteen(b);
    constexpr int WIDTH = 16 / sizeof(W);
#pragma unroll
    for (int i = 0; i < 8; i += WIDTH) {
        const uint4 bits = there ? *reinterpret_cast<const uint4*>(w + at + i) : zero;
        const W* x = reinterpret_cast<const W*>(&bits);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) raw.w[i + j] = to_float(x[j]);
    }
}

// 8 values times 8 factors, as bf16.
__device__ __forceinline__ uint4 scaled(const uint4& values, const float (&factors)[8]) {
    const bf16* x = reinterpret_cast<const bf16*>(&values);
    unsigned out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[i] = pack(to_float(x[2 * i]) * factors[2 * i], to_float(x[2 * i + 1]) * factors[2 * i + 1]);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

__device__ __forceinline__ void put(ChunkRows& rows, int t, int n, const uint4& values) {
    *reinterpret_cast<uint4*>(&rows[t][n]) = values;
}

// The same answer in every warp that asks.
__device__ __forceinline__ bool decays_too_much(const float (&p_end)[N]) {
    const int lane = lane_of_warp();
    return __any_sync(0xffffffffu, !(p_end[lane] >= FLOOR) || !(p_end[lane + 32] >= FLOOR));
}

// The preparers' work on one chunk. `raw` is of this chunk; next() replaces it once it is used up.
template <class W, class Next>
__device__ __forceinline__ void prepare(Chunk& chunk, Scratch& scratch, Raw<W>& raw, int rank, Next next) {
    const int t = rank / 8, n = rank % 8 * 8;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(&chunk.w[t][n + i]) =
            make_float4(raw.w[i], raw.w[i + 1], raw.w[i + 2], raw.w[i + 3]);
    }
    meet(PREPARED, PREPARERS);
    if (rank < N) {
        float sum = 0;
#pragma unroll
        for (int s = 0; s < L; ++s) scratch.log_p[s][rank] = sum += chunk.w[s][rank];
        chunk.p_end[rank] = __expf(sum);
    }
    meet(PREPARED, PREPARERS);
    put(chunk.v, t, n, raw.v);
    if (decays_too_much(chunk.p_end)) {
        put(chunk.r, t, n, raw.r), put(chunk.a, t, n, raw.a), put(chunk.k, t, n, raw.k), put(chunk.b, t, n, raw.b);
        next();
        return;
    }
    float p[8], p_before[8], inverse[8], to_end[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float log_p = scratch.log_p[t][n + i];
        p[i] = __expf(log_p);
        p_before[i] = __expf(log_p - raw.w[i]);
        inverse[i] = __expf(-log_p);
        to_end[i] = __expf(scratch.log_p[L - 1][n + i] - log_p);
    }
    put(chunk.r, t, n, scaled(raw.r, p)), put(chunk.a, t, n, scaled(raw.a, p_before));
    put(scratch.k, t, n, scaled(raw.k, inverse)), put(scratch.b, t, n, scaled(raw.b, inverse));
    put(chunk.k, t, n, scaled(raw.k, to_end)), put(chunk.b, t, n, scaled(raw.b, to_end));
    next();
    meet(PREPARED, PREPARERS);

    // One score matrix per warp: A'B'ᵀ, A'K'ᵀ, R'K'ᵀ, R'B'ᵀ.
    const int which = rank / 32, lane = rank % 32;
    const ChunkRows& left = which < 2 ? chunk.a : chunk.r;
    const ChunkRows& right = which == 0 || which == 3 ? scratch.b : scratch.k;
    float c[2][4] = {};
#pragma unroll
    for (int i = 0; i < N; i += 16) multiply_add(c, rows_as_a(left, i), rows_as_b(right, i));
    Scores& out = which == 1 ? chunk.a_k : which == 2 ? chunk.r_k : chunk.r_b;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int row = lane / 4 + i / 2 * 8, s = half * 8 + lane % 4 * 2;
            const int last = which < 2 ? row - 1 : row;  // the last token that this one reads from
            const float first = s <= last ? c[half][i] : 0, second = s + 1 <= last ? c[half][i + 1] : 0;
            if (which == 0) {
                scratch.a_b[row][s] = first, scratch.a_b[row][s + 1] = second;
            } else {
                *reinterpret_cast<unsigned*>(&out[row][s]) = pack(first, second);
            }
        }
    }
    if (which != 0) return;
    __syncwarp();
    if (lane < L) {  // column `lane` of the inverse, by substitution
        float x[L];
#pragma unroll
        for (int row = 0; row < L; ++row) {
            x[row] = row == lane ? 1.0f : 0.0f;
#pragma unroll
            for (int s = 0; s < row; ++s) x[row] += scratch.a_b[row][s] * x[s];
            chunk.solved[row][lane] = __float2bfloat16_rn(x[row]);
        }
    }
}

// 16 rows of the state, in the layout of sums: tile n has columns 8 n to 8 n + 7.
using StateRows = float[N / 8][4];

// Calls use(float&, float&, offset) for pairs of neighbours in the [N,N] matrix.
template <class Use>
__device__ __forceinline__ void each_pair(StateRows& S, int first_row, Use use) {
    const int lane = lane_of_warp();
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            use(S[n][i], S[n][i + 1], (first_row + lane / 4 + i / 2 * 8) * N + n * 8 + lane % 4 * 2);
        }
    }
}

__device__ __forceinline__ void carry(StateRows& S, const Chunk& chunk, ChunkRows& y, int first_row) {
    const int lane = lane_of_warp();
    FragmentA S0[N / 16];
#pragma unroll
    for (int i = 0; i < N / 16; ++i) S0[i] = as_operand(S[2 * i], S[2 * i + 1]);
    const FragmentA Vt = columns_as_a(chunk.v, first_row);

    float c[2][4] = {};  // S₀ A'ᵀ + Vᵀ (A'K'ᵀ ⊙ M₋)ᵀ, [values, tokens]
#pragma unroll
    for (int i = 0; i < N / 16; ++i) multiply_add(c, S0[i], rows_as_b(chunk.a, i * 16));
    multiply_add(c, Vt, rows_as_b(chunk.a_k, 0));
    const FragmentA read = as_operand(c[0], c[1]);
    float u[2][4] = {};
    multiply_add(u, read, rows_as_b(chunk.solved, 0));
    const FragmentA Ut = as_operand(u[0], u[1]);

    float out[2][4] = {};
#pragma unroll
    for (int i = 0; i < N / 16; ++i) multiply_add(out, S0[i], rows_as_b(chunk.r, i * 16));
    multiply_add(out, Vt, rows_as_b(chunk.r_k, 0));
    multiply_add(out, Ut, rows_as_b(chunk.r_b, 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = half * 8 + lane % 4 * 2 + i % 2;
            y[t][first_row + lane / 4 + i / 2 * 8] = __float2bfloat16_rn(out[half][i]);
        }
    }

#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = n * 8 + lane % 4 * 2 + i % 2;
            S[n][i] *= chunk.p_end[column];
            S[n + 1][i] *= chunk.p_end[column + 8];
        }
        const FragmentsB k = columns_as_b(chunk.k, n * 8), b = columns_as_b(chunk.b, n * 8);
        multiply_add(S[n], Vt, k.x[0], k.x[1]);
        multiply_add(S[n], Ut, b.x[0], b.x[1]);
        multiply_add(S[n + 1], Vt, k.x[2], k.x[3]);
        multiply_add(S[n + 1], Ut, b.x[2], b.x[3]);
    }
}

// The sum over the four lanes that share a row; each gets it.
__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The same chunk token by token, for decays that nothing can be divided by.
__device__ __noinline__ void carry_each(StateRows& S, const Chunk& chunk, ChunkRows& y, int first_row) {
    const int lane = lane_of_warp(), row = first_row + lane / 4;
    const auto at = [](const ChunkRows& x, int t, int n) { return to_float(x[t][n]); };
    for (int t = 0; t < L; ++t) {
        float u[2] = {}, out[2] = {};
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) u[i / 2] += S[n][i] * at(chunk.a, t, n * 8 + lane % 4 * 2 + i % 2);
        }
        u[0] = sum_of_row(u[0]), u[1] = sum_of_row(u[1]);
        const float v[2] = {at(chunk.v, t, row), at(chunk.v, t, row + 8)};
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = n * 8 + lane % 4 * 2 + i % 2;
                S[n][i] = S[n][i] * expf(chunk.w[t][column]) + u[i / 2] * at(chunk.b, t, column) +
                          v[i / 2] * at(chunk.k, t, column);
                out[i / 2] += S[n][i] * at(chunk.r, t, column);
            }
        }
        out[0] = sum_of_row(out[0]), out[1] = sum_of_row(out[1]);
        if (lane % 4 == 0) y[t][row] = __float2bfloat16_rn(out[0]), y[t][row + 8] = __float2bfloat16_rn(out[1]);
    }
}

// As `forward`, which is its check; TILE and L are the same, so that `backward` takes its checkpoints.
template <class W>
__global__ void __launch_bounds__(PREPARERS + CARRIERS, 2)
    forward_chunked(const bf16* r, const W* w, const bf16* k, const bf16* v, const bf16* a, const bf16* b,
                    const float* state, bf16* y, float* last, float* checkpoints, int T, int H) {
    static_assert(L == TILE);
    auto& memory = block_memory<ChunkedMemory>();
    const Rows<N> rows(T, H);
    const int chunks = (T + L - 1) / L;
    const bool carrier = threadIdx.x < CARRIERS;
    if (carrier) {
        const std::size_t matrix = std::size_t(blockIdx.x) * N * N;
        const int lane = lane_of_warp(), first_row = threadIdx.x / 32 * 16;
        StateRows S;
        each_pair(S, first_row, [&](float& x, float& next, int at) {
            x = state[matrix + at], next = state[matrix + at + 1];
        });
        const auto save = [&](float* to) {
            each_pair(S, first_row, [&](float& x, float& next, int at) { to[at] = x, to[at + 1] = next; });
        };
        for (int number = 0; number < chunks; ++number) {
            if (checkpoints) save(checkpoints + (std::size_t(blockIdx.x) * (chunks + 1) + number) * N * N);
            meet(HANDOVER, PREPARERS + CARRIERS);  // this chunk is prepared, the one before may be overwritten
            const Chunk& chunk = memory.chunk[number % 2];
            if (decays_too_much(chunk.p_end)) {
                carry_each(S, chunk, memory.y, first_row);
            } else {
                carry(S, chunk, memory.y, first_row);
            }
            __syncwarp();  // this warp's 16 columns of y are whole
            const int t = lane / 2, column = first_row + lane % 2 * 8, from = number * L + t;
            if (from < T) {
                *reinterpret_cast<uint4*>(y + rows.first + from * rows.stride + column) =
                    *reinterpret_cast<const uint4*>(&memory.y[t][column]);
            }
            __syncwarp();  // they may be filled anew
        }
        save(last + matrix);
        if (checkpoints) save(checkpoints + (std::size_t(blockIdx.x) * (chunks + 1) + chunks) * N * N);
    } else {
        const int rank = threadIdx.x - CARRIERS;
        Raw<W> raw;
        int token = rank / 8;
        const auto next = [&] {
            fetch(raw, r, w, k, v, a, b, rows.first + token * rows.stride + rank % 8 * 8, token < T);
            token += L;
        };
        next();
        for (int number = 0; number < chunks; ++number) {
            prepare(memory.chunk[number % 2], memory.scratch, raw, rank, next);
            meet(HANDOVER, PREPARERS + CARRIERS);
        }
    }
}

}  // namespace wkv7
