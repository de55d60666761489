// WKV6, forward and backward, and WKV5, which is WKV6 with one decay for all tokens; kernels/README.md has the formulas.
#include "simd.h"
#include "torch_threads.h"

using namespace rwkv_lab;

namespace {

constexpr int AHEAD = 3;   // tokens between asking memory for a row and using it
constexpr int CHUNK = 32;  // tokens between two states that the forward pass keeps for the backward pass

struct Sizes {
    int64_t B, T, H;
    int N;
    bool per_token;  // w is [B,T,H,N], else [H,N]
    int64_t row(int64_t b, int64_t t, int64_t h) const { return ((b * T + t) * H + h) * N; }
    int64_t decay_row(int64_t b, int64_t t, int64_t h) const { return per_token ? row(b, t, h) : h * N; }
    int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
};

struct Forward {
    Sizes size;
    Input r, w, k, v, u;
    State state;
    Output y;
    float *final_state;  // [B,H,K,V]
    float *kept;         // [B,H,chunks,K,V], the state before each chunk; or null
};

// Σ r u k: how much of its own value a token's output gets.
INLINE float own_share(const float *r, const float *u, const float *k, int wide) {
    Vec total{};
    for (int j = 0; j < wide; j += LANES) total += load(r + j) * load(u + j) * load(k + j);
    return sum(total);
}

// One token on values of NV vectors: S[K][NV*LANES].
template <int FIXED, int NV>
INLINE void step(float *S, int n, const float *pr, const float *pd, const float *pk, const float *v_in, float own,
                 float *y_out) {
    const int N = FIXED ? FIXED : n;
    constexpr int W = NV * LANES;
    Vec v[NV], y[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) {
        v[i] = load(v_in + i * LANES);
        y[i] = v[i] * own;
    }
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
        float *row = S + j * W;
        // All read before anything is written: the compiler cannot know that S is not one of them.
        const Vec r = broadcast(pr[j]), d = broadcast(pd[j]), k = broadcast(pk[j]);
        Vec s[NV];
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) {
            s[i] = load(row + i * LANES);
            y[i] += s[i] * r;
        }
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) store(row + i * LANES, s[i] * d + v[i] * k);
    }
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) store(y_out + i * LANES, y[i]);
}

// One head of one sequence, for values first .. first + NV*LANES - 1.
template <int FIXED, int NV>
void forward_block(const Forward &f, int64_t b, int64_t h, int first) {
    FlushToZero flush;
    constexpr int W = NV * LANES;
    const int N = FIXED ? FIXED : f.size.N, wide = round_up(N, LANES), there = std::min(W, N - first);
    const int64_t T = f.size.T, head = b * f.size.H + h;
    Buffer buffer(size_t(N) * W + 4 * wide + 2 * W);
    float *free = buffer.get();
    auto take = [&free](int size) { return (free += size) - size; };
    float *S = take(N * W), *v = take(W), *y = take(W), *r = take(wide), *d = take(wide), *k = take(wide), *u = take(wide);
    load_key_major(S, W, f.state, f.state.of(b, h), N, first, W);
    load_row(u, f.u, h * N, N, wide);
    for (int64_t t = 0; t < T; t++) {
        const int64_t at = f.size.row(b, t, h);
        if (f.kept && t % CHUNK == 0)
            keep_key_major(f.kept + (head * f.size.chunks() + t / CHUNK) * N * N, S, W, N, first, W);
        if (t + AHEAD < T) {
            const int64_t soon = f.size.row(b, t + AHEAD, h);
            for (const Input &in : {f.r, f.k}) prefetch_row(in, soon, N);
            if (f.size.per_token) prefetch_row(f.w, soon, N);
            prefetch_row(f.v, soon + first, there);
            prefetch_row(f.y, soon + first, there);
        }
        load_row(r, f.r, at, N, wide);
        load_row(k, f.k, at, N, wide);
        load_row(v, f.v, at + first, there, W);
        if (t == 0 || f.size.per_token) {
            load_row(d, f.w, f.size.decay_row(b, t, h), N, wide);
            exponentials(d, wide);
        }
        step<FIXED, NV>(S, N, r, d, k, v, own_share(r, u, k, wide), y);
        store_row(f.y, at + first, y, there);
    }
    float *out = f.final_state + head * N * N + first;
    for (int j = 0; j < N; j++) memcpy(out + j * N, S + j * W, size_t(there) * sizeof(float));
}

template <int FIXED, int NV>
void forward_all(const Forward &f, int threads) {
    const int blocks = (f.size.N + NV * LANES - 1) / (NV * LANES);
    parallel_with_torch(int(f.size.B * f.size.H * blocks), threads, [&](int i) {
        const int head = i / blocks;
        forward_block<FIXED, NV>(f, head / f.size.H, head % f.size.H, i % blocks * NV * LANES);
    });
}

// Wide blocks of values share the loads of a token's numbers; narrow ones give every thread something to do.
template <int FIXED>
void forward_width(const Forward &f, int threads) {
    if constexpr (REGISTERS >= 32)
        if (fits_block(4, f.size.B * f.size.H, f.size.N, threads)) return forward_all<FIXED, 4>(f, threads);
    if (fits_block(2, f.size.B * f.size.H, f.size.N, threads)) return forward_all<FIXED, 2>(f, threads);
    forward_all<FIXED, 1>(f, threads);
}

// ------------------------------------------------------------------ backward

struct Backward {
    Sizes size;
    Input r, w, k, v, u, dy;
    State d_final;      // gradient of the final state; data is null for zeros
    const float *kept;  // from the forward pass
    Output dr, dw, dk, dv;  // dw per token
    float *dw_sum;          // [B,H,N] instead, where w is [H,N]
    float *du;              // [B,H,N]
    float *d_state;         // [B,H,V,K]
};

constexpr int ROWS = 32;                        // values that are gone through at a time: states of a chunk stay in L2
constexpr int KEYS = REGISTERS >= 32 ? 4 : 2;  // vectors of keys whose constants and sums stay in registers

// One chunk of one head as float32, in rows of `wide`.
struct Chunk {
    float *r, *d, *k, *v, *dy;
    float *dr, *dw, *dk, *dv;  // sums over the values so far
};

// States before every token of the chunk, from the one before the first: P[i][row][key].
INLINE void states(float *P, const Chunk &x, int count, int wide, int first, int rows) {
    for (int i = 0; i + 1 < count; i++) {
        const float *from = P + i * ROWS * wide, *v = x.v + i * wide + first;
        float *to = P + (i + 1) * ROWS * wide;
        for (int j = 0; j < wide; j += LANES) {
            const Vec d = load(x.d + i * wide + j), k = load(x.k + i * wide + j);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) store(to + row * wide + j, load(from + row * wide + j) * d + k * v[row]);
        }
    }
}

// Goes from G = dL/dS_t to the one of the token before, over keys j .. j + NK*LANES - 1 and the rows of one block. P holds
// S_{t-1}, at is the token's place in x; partial sums over keys for its dv go to pv.
template <int NK>
INLINE void back_keys(float *G, const float *P, const Chunk &x, int at, int wide, int first, int rows, int j, float *pv) {
    Vec d[NK], r[NK], k[NK], sd[NK], sk[NK], sr[NK];
    const float *v = x.v + at + first, *dy = x.dy + at + first;
    const bool begin = j == 0;
    at += j;
#pragma GCC unroll 4
    for (int n = 0; n < NK; n++) {
        d[n] = load(x.d + at + n * LANES);
        r[n] = load(x.r + at + n * LANES);
        k[n] = load(x.k + at + n * LANES);
        sd[n] = sk[n] = sr[n] = Vec{};
    }
    for (int row = 0; row < rows; row++) {
        const Vec vr = broadcast(v[row]), dyr = broadcast(dy[row]);
        Vec to_v{};
        float *g_at = G + row * wide + j;
        const float *s_at = P + row * wide + j;
#pragma GCC unroll 4
        for (int n = 0; n < NK; n++) {
            const Vec g = load(g_at + n * LANES), s = load(s_at + n * LANES);
            sd[n] += g * s;
            sk[n] += g * vr;
            sr[n] += s * dyr;
            to_v += g * k[n];
            store(g_at + n * LANES, g * d[n] + r[n] * dyr);
        }
        store(pv + row * LANES, begin ? to_v : load(pv + row * LANES) + to_v);
    }
#pragma GCC unroll 4
    for (int n = 0; n < NK; n++) {
        const int here = at + n * LANES;
        store(x.dw + here, load(x.dw + here) + sd[n] * d[n]);
        store(x.dk + here, load(x.dk + here) + sk[n]);
        store(x.dr + here, load(x.dr + here) + sr[n]);
    }
}

template <int FIXED>
void backward_head(const Backward &f, int64_t b, int64_t h) {
    FlushToZero flush;
    const int N = FIXED ? FIXED : f.size.N, wide = round_up(N, LANES), chunk_rows = CHUNK * wide;
    const int64_t T = f.size.T, head = b * f.size.H + h;
    Buffer buffer(size_t(wide) * wide + size_t(CHUNK) * ROWS * wide + 9 * size_t(chunk_rows) + ROWS * LANES + 3 * wide);
    float *free = buffer.get();
    auto take = [&free](int size) { return (free += size) - size; };
    float *G = take(wide * wide), *P = take(CHUNK * ROWS * wide), *pv = take(ROWS * LANES);
    float *u = take(wide), *du = take(wide), *dw_sum = take(wide);
    const Chunk x{take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows),
            take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows)};
    memset(G, 0, size_t(free - G) * sizeof(float));
    if (f.d_final.data)
        for (int v = 0; v < N; v++)
            for (int k = 0; k < N; k++) G[v * wide + k] = f.d_final.of(b, h)[v * f.d_final.value + k * f.d_final.key];
    load_row(u, f.u, h * N, N, wide);

    for (int64_t c = f.size.chunks() - 1; c >= 0; c--) {
        const int64_t t0 = c * CHUNK;
        const int count = int(std::min<int64_t>(CHUNK, T - t0));
        memset(x.dr, 0, 4 * size_t(chunk_rows) * sizeof(float));
        for (int i = 0; i < count; i++) {
            const int64_t at = f.size.row(b, t0 + i, h);
            load_row(x.r + i * wide, f.r, at, N, wide);
            load_row(x.d + i * wide, f.w, f.size.decay_row(b, t0 + i, h), N, wide);
            load_row(x.k + i * wide, f.k, at, N, wide);
            load_row(x.v + i * wide, f.v, at, N, wide);
            load_row(x.dy + i * wide, f.dy, at, N, wide);
        }
        exponentials(x.d, count * wide);
        const float *kept = f.kept + (head * f.size.chunks() + c) * N * N;
        for (int first = 0; first < N; first += ROWS) {
            const int rows = std::min(ROWS, N - first);
            float *g = G + first * wide;
            transpose(P, wide, kept + first, N, N, rows);
            states(P, x, count, wide, first, rows);
            for (int i = count - 1; i >= 0; i--) {
                if (first == 0) {  // what will be written for this token, and read for one of the chunk before
                    const int64_t at = f.size.row(b, t0 + i, h), soon = at - CHUNK * f.size.H * N;
                    for (const Output &out : {f.dr, f.dk, f.dv}) prefetch_row(out, at, N);
                    if (f.size.per_token) prefetch_row(f.dw, at, N);
                    if (t0 > 0) {
                        for (const Input &in : {f.r, f.k, f.v, f.dy}) prefetch_row(in, soon, N);
                        if (f.size.per_token) prefetch_row(f.w, soon, N);
                        prefetch_row(Input{kept - N * N, FLOAT32}, i * N * N / CHUNK, N * N / CHUNK);
                    }
                }
                const float *before = P + i * ROWS * wide;
                int j = 0;
                for (; j + KEYS * LANES <= wide; j += KEYS * LANES)
                    back_keys<KEYS>(g, before, x, i * wide, wide, first, rows, j, pv);
                for (; j < wide; j += LANES) back_keys<1>(g, before, x, i * wide, wide, first, rows, j, pv);
                for (int row = 0; row < rows; row += LANES)
                    store(x.dv + i * wide + first + row, row_sums(pv + row * LANES));
            }
        }
        for (int i = 0; i < count; i++) {  // the present token's own share, which never went through the state
            const int64_t at = f.size.row(b, t0 + i, h);
            float *r = x.r + i * wide, *k = x.k + i * wide, *dr = x.dr + i * wide, *dk = x.dk + i * wide;
            float *dv = x.dv + i * wide, *dw = x.dw + i * wide, *v = x.v + i * wide, *dy = x.dy + i * wide;
            const float own = own_share(r, u, k, wide);
            Vec total{};
            for (int j = 0; j < wide; j += LANES) total += load(v + j) * load(dy + j);
            const float v_dy = sum(total);
            for (int j = 0; j < wide; j += LANES) {
                const Vec rj = load(r + j), kj = load(k + j), uj = load(u + j);
                store(dr + j, load(dr + j) + uj * kj * v_dy);
                store(dk + j, load(dk + j) + uj * rj * v_dy);
                store(dv + j, load(dv + j) + load(dy + j) * own);
                store(du + j, load(du + j) + rj * kj * v_dy);
                store(dw_sum + j, load(dw_sum + j) + load(dw + j));
            }
            store_row(f.dr, at, dr, N);
            store_row(f.dk, at, dk, N);
            store_row(f.dv, at, dv, N);
            if (f.size.per_token) store_row(f.dw, at, dw, N);
        }
    }
    memcpy(f.du + head * N, du, size_t(N) * sizeof(float));
    if (!f.size.per_token) memcpy(f.dw_sum + head * N, dw_sum, size_t(N) * sizeof(float));
    for (int v = 0; v < N; v++) memcpy(f.d_state + (head * N + v) * N, G + v * wide, size_t(N) * sizeof(float));
}

bool fit(const Sizes &s, int64_t dtypes, const Span &r, const Span &w, const Span &k, const Span &v, const Span &u) {
    for (int i = 0; i < 5; i++)
        if (!is_dtype(dtype_of(dtypes, i))) return false;
    auto size = [&](int i) { return size_of(dtype_of(dtypes, i)); };
    auto tokens = [&](const Span &x, int i) { return holds(x, size(i), {s.B, s.T, s.H, s.N}); };
    return s.B > 0 && s.T > 0 && s.H > 0 && s.N > 0 && tokens(r, 0) && tokens(k, 2) && tokens(v, 3) &&
           (s.per_token ? tokens(w, 1) : holds(w, size(1), {s.H, s.N})) && holds(u, size(4), {s.H, s.N});
}

}  // namespace

// r, k, v `[B,T,H,N]`, w the same (per_token) or `[H,N]`, u `[H,N]`, all contiguous; dtypes of r, w, k, v, u in two bits each,
// r's lowest; y has v's dtype. state `[B,H,V,K]` float32 with strides; final_state `[B,H,K,V]`; kept: see `Forward`.
extern "C" int64_t wkv6_forward(Span r, Span w, Span k, Span v, Span u, int64_t dtypes, Span state, int64_t sb, int64_t sh,
                                int64_t sv, int64_t sk, Span y, Span final_state, Span kept, int64_t B, int64_t T, int64_t H,
                                int64_t N, int per_token, int threads) {
    Forward f{{B, T, H, int(N), per_token != 0},
              input(r, dtypes, 0),
              input(w, dtypes, 1),
              input(k, dtypes, 2),
              input(v, dtypes, 3),
              input(u, dtypes, 4),
              {state.as(), sb, sh, sv, sk},
              output(y, dtypes, 3),
              final_state.as(),
              kept.as()};
    if (!fit(f.size, dtypes, r, w, k, v, u) || !reaches(state, 4, {B, H, N, N}, {sb, sh, sv, sk}) ||
        !holds(y, size_of(dtype_of(dtypes, 3)), {B, T, H, N}) || !holds(final_state, 4, {B, H, N, N}) ||
        (f.kept && !holds(kept, 4, {B, H, f.size.chunks(), N, N})))
        return MISFIT;
    if (N == 32)
        forward_width<32>(f, threads);
    else if (N == 64)
        forward_width<64>(f, threads);
    else if (N == 128)
        forward_width<128>(f, threads);
    else
        forward_width<0>(f, threads);
    return FITS;
}

// Gradients of everything that `wkv6_forward` takes: dr, dw, dk, dv in their input's dtype, dw_sum (where w is `[H,N]`; dw is
// not written then) and du `[B,H,N]` float32; dy in y's dtype. d_final: gradient of the final state `[B,H,V,K]` with strides,
// or null; d_state `[B,H,V,K]` contiguous.
extern "C" int64_t wkv6_backward(Span r, Span w, Span k, Span v, Span u, int64_t dtypes, Span dy, Span d_final, int64_t sb,
                                 int64_t sh, int64_t sv, int64_t sk, Span kept, Span dr, Span dw, Span dk, Span dv, Span dw_sum,
                                 Span du, Span d_state, int64_t B, int64_t T, int64_t H, int64_t N, int per_token, int threads) {
    Backward f{{B, T, H, int(N), per_token != 0},
               input(r, dtypes, 0),
               input(w, dtypes, 1),
               input(k, dtypes, 2),
               input(v, dtypes, 3),
               input(u, dtypes, 4),
               input(dy, dtypes, 3),
               {d_final.as(), sb, sh, sv, sk},
               kept.as(),
               output(dr, dtypes, 0),
               output(dw, dtypes, 1),
               output(dk, dtypes, 2),
               output(dv, dtypes, 3),
               dw_sum.as(),
               du.as(),
               d_state.as()};
    auto tokens = [&](const Span &x, int i) { return holds(x, size_of(dtype_of(dtypes, i)), {B, T, H, N}); };
    if (!fit(f.size, dtypes, r, w, k, v, u) || !tokens(dy, 3) ||
        (f.d_final.data && !reaches(d_final, 4, {B, H, N, N}, {sb, sh, sv, sk})) ||
        !holds(kept, 4, {B, H, f.size.chunks(), N, N}) || !tokens(dr, 0) || !tokens(dk, 2) || !tokens(dv, 3) ||
        !(per_token ? tokens(dw, 1) : holds(dw_sum, 4, {B, H, N})) || !holds(du, 4, {B, H, N}) || !holds(d_state, 4, {B, H, N, N}))
        return MISFIT;
    parallel_with_torch(int(B * H), threads, [&](int i) {
        if (N == 32)
            backward_head<32>(f, i / H, i % H);
        else if (N == 64)
            backward_head<64>(f, i / H, i % H);
        else if (N == 128)
            backward_head<128>(f, i / H, i % H);
        else
            backward_head<0>(f, i / H, i % H);
    });
    return FITS;
}
