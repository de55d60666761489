// WKV7, forward and backward; kernels/README.md has the formulas and says why the loops run as they do.
#include "simd.h"
#include "torch_threads.h"

using namespace rwkv_lab;

namespace {

constexpr int CHUNK = 32;  // tokens between two states that the forward pass keeps for the backward pass
constexpr int AHEAD = 3;   // tokens between asking memory for a row and using it

struct Sizes {
    int64_t B, T, H;
    int N;
    int64_t row(int64_t b, int64_t t, int64_t h) const { return ((b * T + t) * H + h) * N; }
    int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
};

struct Forward {
    Sizes size;
    Input r, w, k, v, a, b;
    State state;
    Output y;
    float *final_state;  // [B,H,K,V]
    float *kept;         // [B,H,chunks,K,V], the state before each chunk; or null
    float *readings;     // [B,T,H,N], S a of every token; or null
};

// What one token brings, as float32: r, decay, k, b and a, N numbers each.
struct Token {
    float *r, *d, *k, *b, *a;
};

// One token on values of NV vectors: S[K][NV*LANES]. `reading` holds S a for this token, and for the next one after it.
template <int FIXED, int NV>
INLINE void step(float *S, int n, const Token &x, const float *next_a, const float *v_in, float *reading, float *y_out) {
    const int N = FIXED ? FIXED : n;
    constexpr int W = NV * LANES;
    Vec u[NV], v[NV], y[NV], next[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) {
        u[i] = load(reading + i * LANES);
        v[i] = load(v_in + i * LANES);
        y[i] = Vec{};
        next[i] = Vec{};
    }
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) {
        float *row = S + j * W;
        // All read before anything is written: the compiler cannot know that S is not one of them.
        const Vec d = broadcast(x.d[j]), b = broadcast(x.b[j]), k = broadcast(x.k[j]);
        const Vec r = broadcast(x.r[j]), a = broadcast(next_a[j]);
        Vec s[NV];
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) s[i] = load(row + i * LANES) * d;
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) s[i] = s[i] + u[i] * b + v[i] * k;
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) store(row + i * LANES, s[i]);
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) {
            y[i] += s[i] * r;
            next[i] += s[i] * a;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) {
        store(reading + i * LANES, next[i]);
        store(y_out + i * LANES, y[i]);
    }
}

// One head of one sequence, for values first .. first + NV*LANES - 1.
template <int FIXED, int NV>
void forward_block(const Forward &f, int64_t b, int64_t h, int first) {
    FlushToZero flush;
    constexpr int W = NV * LANES;
    const int N = FIXED ? FIXED : f.size.N, wide = round_up(N, LANES), there = std::min(W, N - first);
    const int64_t T = f.size.T, head = b * f.size.H + h;
    Buffer buffer(size_t(N) * W + 10 * wide + 3 * W);
    float *free = buffer.get();
    auto take = [&free](int size) { return (free += size) - size; };
    float *S = take(N * W), *v = take(W), *reading = take(W), *y = take(W);
    const Token tokens[2] = {{take(wide), take(wide), take(wide), take(wide), take(wide)},
                             {take(wide), take(wide), take(wide), take(wide), take(wide)}};
    auto fetch = [&](const Token &to, int64_t t) {
        const int64_t at = f.size.row(b, t, h);
        load_row(to.r, f.r, at, N, wide);
        load_row(to.d, f.w, at, N, wide);
        load_row(to.k, f.k, at, N, wide);
        load_row(to.b, f.b, at, N, wide);
        load_row(to.a, f.a, at, N, wide);
        exponentials(to.d, wide);
    };
    load_key_major(S, W, f.state, f.state.of(b, h), N, first, W);
    fetch(tokens[0], 0);
    for (int i = 0; i < W; i += LANES) {
        Vec u{};
        for (int j = 0; j < N; j++) u += load(S + j * W + i) * tokens[0].a[j];
        store(reading + i, u);
    }
    for (int64_t t = 0; t < T; t++) {
        const Token &now = tokens[t % 2], &next = tokens[(t + 1) % 2];
        const int64_t at = f.size.row(b, t, h) + first;
        if (f.kept) {
            memcpy(f.readings + at, reading, size_t(there) * sizeof(float));
            if (t % CHUNK == 0) keep_key_major(f.kept + (head * f.size.chunks() + t / CHUNK) * N * N, S, W, N, first, W);
        }
        if (t + AHEAD < T) {
            const int64_t soon = f.size.row(b, t + AHEAD, h);
            for (const Input &in : {f.r, f.w, f.k, f.a, f.b}) prefetch_row(in, soon, N);
            prefetch_row(f.v, soon + first, there);
            prefetch_row(f.y, soon + first, there);
        }
        load_row(v, f.v, at, there, W);
        const bool last = t + 1 == T;
        if (!last) fetch(next, t + 1);
        step<FIXED, NV>(S, N, now, last ? now.a : next.a, v, reading, y);
        store_row(f.y, at, y, there);
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
    Input r, w, k, v, a, b, dy;
    State d_final;      // gradient of the final state; data is null for zeros
    const float *kept;  // from the forward pass
    const float *readings;
    Output dr, dw, dk, dv, da, db;
    float *d_state;  // [B,H,V,K]
};

constexpr int ROWS = 32;                        // values that are gone through at a time: states of a chunk stay in L2
constexpr int KEYS = REGISTERS >= 32 ? 2 : 1;  // vectors of keys whose ten constants and sums stay in registers

// One chunk of one head as float32, in rows of `wide`. Row 0 belongs to the token before the chunk, row i + 1 to its token i.
struct Chunk {
    float *r, *d, *k, *b, *a, *v, *u, *dy;     // u = S a, the readings
    float *dr, *dw, *dk, *db, *da, *dv;        // sums over the values so far
};

// States before every token of the chunk, and after the last, from the one before the first: P[i][row][key].
INLINE void states(float *P, const Chunk &x, int count, int wide, int first, int rows) {
    for (int i = 0; i < count; i++) {
        const float *from = P + i * ROWS * wide, *d = x.d + (i + 1) * wide, *k = x.k + (i + 1) * wide;
        const float *b = x.b + (i + 1) * wide, *v = x.v + (i + 1) * wide + first, *u = x.u + (i + 1) * wide + first;
        float *to = P + (i + 1) * ROWS * wide;
        for (int j = 0; j < wide; j += LANES) {
            const Vec dj = load(d + j), bj = load(b + j), kj = load(k + j);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++)
                store(to + row * wide + j, load(from + row * wide + j) * dj + bj * u[row] + kj * v[row]);
        }
    }
}

// Goes from G = dL/dS_t to the one of the token before, over keys j .. j + NK*LANES - 1 and the rows of one block.
// P holds S_{t-1}; i is the token's row in x. Partial sums over keys for dv and du of the token before go to pv and pu.
template <int NK, bool BEGIN>
INLINE void back_keys(float *G, const float *P, const Chunk &x, int i, int wide, int first, int rows, int j, const float *du,
                      float *pv, float *pu) {
    Vec d[NK], a[NK], r[NK], k[NK], b[NK], sd[NK], sk[NK], sb[NK], sa[NK], sr[NK];
    const int at = i * wide + j, before = at - wide;
#pragma GCC unroll 2
    for (int n = 0; n < NK; n++) {
        d[n] = load(x.d + at + n * LANES);
        a[n] = load(x.a + at + n * LANES);
        r[n] = load(x.r + before + n * LANES);
        k[n] = load(x.k + before + n * LANES);
        b[n] = load(x.b + before + n * LANES);
        sd[n] = sk[n] = sb[n] = sa[n] = sr[n] = Vec{};
    }
    const float *v = x.v + i * wide + first, *u = x.u + i * wide + first, *dy = x.dy + (i - 1) * wide + first;
    for (int row = 0; row < rows; row++) {
        const Vec vr = broadcast(v[row]), ur = broadcast(u[row]), dur = broadcast(du[row]), dyr = broadcast(dy[row]);
        Vec to_v{}, to_u{};
        float *g_at = G + row * wide + j;
        const float *s_at = P + row * wide + j;
#pragma GCC unroll 2
        for (int n = 0; n < NK; n++) {
            const Vec g = load(g_at + n * LANES), s = load(s_at + n * LANES);
            sd[n] += g * s;
            sk[n] += g * vr;
            sb[n] += g * ur;
            sa[n] += s * dur;
            sr[n] += s * dyr;
            const Vec next = g * d[n] + a[n] * dur + r[n] * dyr;
            store(g_at + n * LANES, next);
            to_v += next * k[n];
            to_u += next * b[n];
        }
        float *pv_at = pv + row * LANES, *pu_at = pu + row * LANES;
        store(pv_at, BEGIN ? to_v : load(pv_at) + to_v);
        store(pu_at, BEGIN ? to_u : load(pu_at) + to_u);
    }
#pragma GCC unroll 2
    for (int n = 0; n < NK; n++) {
        const int here = at + n * LANES;
        store(x.dw + here, load(x.dw + here) + sd[n] * d[n]);
        store(x.dk + here, load(x.dk + here) + sk[n]);
        store(x.db + here, load(x.db + here) + sb[n]);
        store(x.da + here, load(x.da + here) + sa[n]);
        store(x.dr + before + n * LANES, load(x.dr + before + n * LANES) + sr[n]);
    }
}

// What the last token adds to the gradient of the final state, G, and what of it belongs to that token.
inline void begin_back(float *G, const float *S, const Chunk &x, int i, int wide, int first, int rows, float *pv, float *pu) {
    const float *dy = x.dy + i * wide + first;
    for (int row = 0; row < rows; row++) {
        Vec to_v{}, to_u{};
        for (int j = 0; j < wide; j += LANES) {
            const int at = i * wide + j;
            const Vec g = load(G + row * wide + j) + load(x.r + at) * dy[row];
            store(G + row * wide + j, g);
            to_v += g * load(x.k + at);
            to_u += g * load(x.b + at);
            store(x.dr + at, load(x.dr + at) + load(S + row * wide + j) * dy[row]);
        }
        store(pv + row * LANES, to_v);
        store(pu + row * LANES, to_u);
    }
}

template <int FIXED>
void backward_head(const Backward &f, int64_t b, int64_t h) {
    FlushToZero flush;
    const int N = FIXED ? FIXED : f.size.N, wide = round_up(N, LANES);
    const int64_t T = f.size.T, head = b * f.size.H + h, stride = f.size.H * N;
    const int chunk_rows = (CHUNK + 1) * wide;
    Buffer buffer(size_t(wide) * wide + size_t(CHUNK + 1) * ROWS * wide + size_t(14) * chunk_rows + 2 * ROWS * LANES + wide);
    float *free = buffer.get();
    auto take = [&free](int size) { return (free += size) - size; };
    float *G = take(wide * wide), *P = take((CHUNK + 1) * ROWS * wide), *pv = take(ROWS * LANES), *pu = take(ROWS * LANES);
    float *du = take(wide);
    float *inputs = free;
    const Chunk x{take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows),
                  take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows),
                  take(chunk_rows), take(chunk_rows), take(chunk_rows), take(chunk_rows)};
    memset(G, 0, size_t(wide) * wide * sizeof(float));
    memset(P, 0, size_t(free - P) * sizeof(float));
    if (f.d_final.data)
        for (int v = 0; v < N; v++)
            for (int k = 0; k < N; k++) G[v * wide + k] = f.d_final.of(b, h)[v * f.d_final.value + k * f.d_final.key];

    for (int64_t c = f.size.chunks() - 1; c >= 0; c--) {
        const int64_t t0 = c * CHUNK, t1 = std::min(t0 + CHUNK, T);
        const int count = int(t1 - t0);
        const Input readings{f.readings, FLOAT32};
        if (t0 == 0) memset(inputs, 0, size_t(8) * chunk_rows * sizeof(float));
        memset(x.dr, 0, size_t(6) * chunk_rows * sizeof(float));
        for (int i = t0 == 0 ? 1 : 0; i <= count; i++) {
            const int64_t at = f.size.row(b, t0 + i - 1, h);
            load_row(x.r + i * wide, f.r, at, N, wide);
            load_row(x.d + i * wide, f.w, at, N, wide);
            load_row(x.k + i * wide, f.k, at, N, wide);
            load_row(x.b + i * wide, f.b, at, N, wide);
            load_row(x.a + i * wide, f.a, at, N, wide);
            load_row(x.v + i * wide, f.v, at, N, wide);
            load_row(x.u + i * wide, readings, at, N, wide);
            load_row(x.dy + i * wide, f.dy, at, N, wide);
        }
        exponentials(x.d, (count + 1) * wide);
        const float *kept = f.kept + (head * f.size.chunks() + c) * N * N;
        for (int first = 0; first < N; first += ROWS) {
            const int rows = std::min(ROWS, N - first);
            float *g = G + first * wide;
            transpose(P, wide, kept + first, N, N, rows);
            states(P, x, t1 == T ? count : count - 1, wide, first, rows);
            auto finish = [&](int i) {  // dv and du of row i of x, from the partial sums over keys
                for (int row = 0; row < rows; row += LANES) {
                    store(x.dv + i * wide + first + row, row_sums(pv + row * LANES));
                    store(du + first + row, row_sums(pu + row * LANES));
                }
            };
            if (t1 == T) {
                begin_back(g, P + count * ROWS * wide, x, count, wide, first, rows, pv, pu);
                finish(count);
            }
            for (int i = count; i > 0; i--) {
                if (first == 0) {  // what will be written for this token, and read for one of the chunk before
                    const int64_t at = f.size.row(b, t0 + i - 1, h), soon = at - CHUNK * stride;
                    for (const Output &out : {f.dr, f.dw, f.dk, f.dv, f.da, f.db}) prefetch_row(out, at, N);
                    if (t0 > 0) {
                        for (const Input &in : {f.r, f.w, f.k, f.v, f.a, f.b, f.dy, readings}) prefetch_row(in, soon, N);
                        prefetch_row(Input{kept - N * N, FLOAT32}, (i - 1) * N * N / CHUNK, N * N / CHUNK);
                    }
                }
                const float *before = P + (i - 1) * ROWS * wide;
                int j = wide >= KEYS * LANES ? KEYS * LANES : LANES;
                if (wide >= KEYS * LANES)
                    back_keys<KEYS, true>(g, before, x, i, wide, first, rows, 0, du + first, pv, pu);
                else
                    back_keys<1, true>(g, before, x, i, wide, first, rows, 0, du + first, pv, pu);
                for (; j + KEYS * LANES <= wide; j += KEYS * LANES)
                    back_keys<KEYS, false>(g, before, x, i, wide, first, rows, j, du + first, pv, pu);
                for (; j < wide; j += LANES)
                    back_keys<1, false>(g, before, x, i, wide, first, rows, j, du + first, pv, pu);
                finish(i - 1);
            }
        }
        for (int i = 0; i <= count; i++) {
            const int64_t at = f.size.row(b, t0, h) + (i - 1) * stride;
            if (i > 0) {
                store_row(f.dw, at, x.dw + i * wide, N);
                store_row(f.dk, at, x.dk + i * wide, N);
                store_row(f.db, at, x.db + i * wide, N);
                store_row(f.da, at, x.da + i * wide, N);
            }
            if (i < count ? t0 + i > 0 : t1 == T) {  // the last row's were written with the chunk behind this one
                store_row(f.dr, at, x.dr + i * wide, N);
                store_row(f.dv, at, x.dv + i * wide, N);
            }
        }
    }
    for (int v = 0; v < N; v++) memcpy(f.d_state + (head * N + v) * N, G + v * wide, size_t(N) * sizeof(float));
}

bool fit(const Sizes &s, int64_t dtypes, std::initializer_list<Span> inputs) {
    int i = 0;
    for (const Span &x : inputs) {
        const int dtype = dtype_of(dtypes, i++);
        if (!is_dtype(dtype) || !holds(x, size_of(dtype), {s.B, s.T, s.H, s.N})) return false;
    }
    return s.B > 0 && s.T > 0 && s.H > 0 && s.N > 0;
}

}  // namespace

// r, w, k, v, a, b `[B,T,H,N]` contiguous, their dtypes in two bits each, r's lowest; y has v's dtype. state `[B,H,V,K]`
// float32 with strides; final_state `[B,H,K,V]`. kept and readings: see `Forward`.
extern "C" int64_t wkv7_forward(Span r, Span w, Span k, Span v, Span a, Span b, int64_t dtypes, Span state, int64_t sb, int64_t sh,
                                int64_t sv, int64_t sk, Span y, Span final_state, Span kept, Span readings, int64_t B, int64_t T,
                                int64_t H, int64_t N, int threads) {
    Forward f{{B, T, H, int(N)},
              input(r, dtypes, 0),
              input(w, dtypes, 1),
              input(k, dtypes, 2),
              input(v, dtypes, 3),
              input(a, dtypes, 4),
              input(b, dtypes, 5),
              {state.as(), sb, sh, sv, sk},
              output(y, dtypes, 3),
              final_state.as(),
              kept.as(),
              readings.as()};
    if (!fit(f.size, dtypes, {r, w, k, v, a, b}) || !reaches(state, 4, {B, H, N, N}, {sb, sh, sv, sk}) ||
        !holds(y, size_of(dtype_of(dtypes, 3)), {B, T, H, N}) || !holds(final_state, 4, {B, H, N, N}) ||
        (f.kept && (!holds(kept, 4, {B, H, f.size.chunks(), N, N}) || !holds(readings, 4, {B, T, H, N}))))
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

// Gradients of everything that `wkv7_forward` takes, each in its input's dtype; dy in y's. d_final: gradient of the final
// state `[B,H,V,K]` with strides, or null; d_state `[B,H,V,K]` contiguous.
extern "C" int64_t wkv7_backward(Span r, Span w, Span k, Span v, Span a, Span b, int64_t dtypes, Span dy, Span d_final, int64_t sb,
                                 int64_t sh, int64_t sv, int64_t sk, Span kept, Span readings, Span dr, Span dw, Span dk, Span dv,
                                 Span da, Span db, Span d_state, int64_t B, int64_t T, int64_t H, int64_t N, int threads) {
    Backward f{{B, T, H, int(N)},
               input(r, dtypes, 0),
               input(w, dtypes, 1),
               input(k, dtypes, 2),
               input(v, dtypes, 3),
               input(a, dtypes, 4),
               input(b, dtypes, 5),
               input(dy, dtypes, 3),
               {d_final.as(), sb, sh, sv, sk},
               kept.as(),
               readings.as(),
               output(dr, dtypes, 0),
               output(dw, dtypes, 1),
               output(dk, dtypes, 2),
               output(dv, dtypes, 3),
               output(da, dtypes, 4),
               output(db, dtypes, 5),
               d_state.as()};
    if (!fit(f.size, dtypes, {r, w, k, v, a, b}) || !fit(f.size, dtypes, {dr, dw, dk, dv, da, db}) ||
        !holds(dy, size_of(dtype_of(dtypes, 3)), {B, T, H, N}) ||
        (f.d_final.data && !reaches(d_final, 4, {B, H, N, N}, {sb, sh, sv, sk})) ||
        !holds(kept, 4, {B, H, f.size.chunks(), N, N}) || !holds(readings, 4, {B, T, H, N}) || !holds(d_state, 4, {B, H, N, N}))
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
