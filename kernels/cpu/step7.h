// RWKV-7: one token of every sequence through the whole model; formulas as in rwkv_lab/model/rwkv7.py.
#pragma once

#include "step.h"

namespace rwkv_lab::step7 {

enum { LN1 = 0, LN2 = 2, X_R = 4, X_W, X_K, X_V, X_A, X_G, W0, W1, W2, A0, A1, A2, V0, V1, V2, G1, G2, K_K, K_A, R_K,
       RECEPTANCE, KEY, VALUE, OUTPUT, LN_X, FFN_X_K = LN_X + 2, FFN_KEY, FFN_VALUE, PER_LAYER };

// S' = S diag(d) + (S a) bᵀ + v kᵀ, y = S' r for `NV` vectors of values; S[K][V], N floats per key.
template <int NV>
INLINE void wkv_block(float *to, const float *S, int N, int v0, const float *r, const float *d, const float *k, const float *v,
                      const float *a, const float *b, float *y) {
    Vec u[NV] = {}, value[NV], out[NV] = {};
    for (int j = 0; j < N; j++)
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) u[i] += load(S + j * N + v0 + i * LANES) * broadcast(a[j]);
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) value[i] = load(v + v0 + i * LANES);
    for (int j = 0; j < N; j++) {
        const Vec dj = broadcast(d[j]), bj = broadcast(b[j]), kj = broadcast(k[j]), rj = broadcast(r[j]);
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) {
            const Vec s = load(S + j * N + v0 + i * LANES) * dj + u[i] * bj + value[i] * kj;
            store(to + j * N + v0 + i * LANES, s);
            out[i] += s * rj;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NV; i++) store(y + v0 + i * LANES, out[i]);
}

inline void wkv(float *to, const float *S, int N, const float *r, const float *d, const float *k, const float *v, const float *a,
         const float *b, float *y) {
    int v0 = 0;
    for (; v0 + 4 * LANES <= N; v0 += 4 * LANES) wkv_block<4>(to, S, N, v0, r, d, k, v, a, b, y);
    for (; v0 + LANES <= N; v0 += LANES) wkv_block<1>(to, S, N, v0, r, d, k, v, a, b, y);
    for (; v0 < N; v0++) {
        float u = 0;
        y[v0] = 0;
        for (int j = 0; j < N; j++) u += S[j * N + v0] * a[j];
        for (int j = 0; j < N; j++) {
            const float s = S[j * N + v0] * d[j] + u * b[j] + v[v0] * k[j];
            to[j * N + v0] = s;
            y[v0] += s * r[j];
        }
    }
}

// What a layer's first products leave, and what the heads make of it.
struct Mixed {
    Rows r, k, v, v_first, w, a, g, gate;  // `w`, `a`, `g`, `gate`: the inner halves of the low-rank pairs
    Rows y;
};

// One head of tokens b0 .. b1-1: the outer halves of the low-rank pairs, WKV, norm, bonus, gate.
inline void one_head(const Model &m, const Call &c, int layer, const Tensor *t, const Mixed &x, int h, int64_t b0, int64_t b1) {
    FlushToZero flush;
    const int N = m.N, first = h * N, wide = round_up(N, LANES);
    const int64_t count = b1 - b0, all = count * wide;
    float *low = workspace(size_t(4 * all) + 14 * wide + size_t(N) * N + LANES), *rows = low + 4 * all;
    const bool mixes_values = layer > 0;
    product(t[W2], first, first + N, x.w, b0, b1, low, wide);
    product(t[A2], first, first + N, x.a, b0, b1, low + all, wide);
    product(t[G2], first, first + N, x.g, b0, b1, low + 2 * all, wide);
    if (mixes_values) product(t[V2], first, first + N, x.gate, b0, b1, low + 3 * all, wide);
    float *d = rows, *k = d + wide, *kk = k + wide, *ka = kk + wide, *v = ka + wide, *y = v + wide, *next = y + wide;
    auto of_head = [&](int which) {
        float *to = next;
        load_row(to, {t[which].data, m.dtype}, first, N, N);
        next += wide;
        return to;
    };
    const float *w0 = of_head(W0), *a0 = of_head(A0), *v0 = mixes_values ? of_head(V0) : nullptr, *k_k = of_head(K_K);
    const float *k_a = of_head(K_A), *r_k = of_head(R_K), *ln_w = of_head(LN_X), *ln_b = of_head(LN_X + 1);
    float *S = next;
    for (int64_t b = b0; b < b1; b++) {
        float *pw = low + (b - b0) * wide, *pa = pw + all, *pg = pa + all, *pv = pg + all;
        const float *r = x.r.row(b) + first, *key = x.k.row(b) + first;
        for (int i = 0; i < N; i++) d[i] = w0[i] + pw[i];
        sigmoids(d, N);
        for (int i = 0; i < N; i++) d[i] *= -0.60653066f;  // -e^(-1/2)
        exponentials_of(d, N);
        for (int i = 0; i < N; i++) pa[i] = a0[i] + pa[i];
        sigmoids(pa, N);
        float *own = x.v.row(b) + first, *v_first = x.v_first.row(b) + first;
        if (mixes_values) {
            for (int i = 0; i < N; i++) pv[i] = v0[i] + pv[i];
            sigmoids(pv, N);
            for (int i = 0; i < N; i++) v[i] = own[i] + (v_first[i] - own[i]) * pv[i];
        } else {
            for (int i = 0; i < N; i++) v[i] = v_first[i] = own[i];
        }
        for (int i = 0; i < N; i++) kk[i] = key[i] * k_k[i];
        const float length = std::max(std::sqrt(total_of_products(kk, kk, N)), 1e-12f);
        for (int i = 0; i < N; i++) {
            kk[i] /= length;
            ka[i] = kk[i] * pa[i];
            kk[i] = -kk[i];
            k[i] = key[i] * (1 + (pa[i] - 1) * k_a[i]);
        }
        const HeadState state = head_state(m, c, layer, b, h);
        wkv(state.to, key_major(state, N, S), N, r, d, k, v, kk, ka, y);
        float bonus = 0;
        for (int i = 0; i < N; i++) bonus += r[i] * k[i] * r_k[i];
        standardise(y, y, N, m.head_norm_eps);
        float *out = x.y.row(b) + first;
        for (int i = 0; i < N; i++) {
            const float normed = ln_b[i] + y[i] * ln_w[i];
            out[i] = (normed + bonus * v[i]) * pg[i];
        }
        if (x.y.half) store_row({x.y.half, BFLOAT16}, b * x.y.stride + first, out, N);
    }
}

inline void step(const Model &m, const Call &c) {
    FlushToZero flush;
    const int threads = int(c.threads), C = m.C;
    const int64_t B = c.B;
    const Tensor *t = m.tensors + LAYERS;
    auto inner = [&](int which) {  // the widest inner half of a low-rank pair
        int n = 1;
        for (int layer = 0; layer < m.L; layer++) n = std::max(n, t[layer * PER_LAYER + which].outputs());
        return n;
    };
    Scratch scratch(B, m.dtype);
    const Rows x = scratch.rows(C), now = scratch.rows(C), before = scratch.rows(C), out = scratch.rows(C);
    Rows mixed[6];
    for (Rows &z : mixed) z = scratch.rows(C);
    const auto [xr, xw, xk, xv, xa, xg] = mixed;
    Mixed z{scratch.rows(m.A), scratch.rows(m.A), scratch.rows(m.A), scratch.rows(m.A), scratch.rows(inner(W1)),
            scratch.rows(inner(A1)), scratch.rows(inner(G1)), scratch.rows(inner(V1)), scratch.rows(m.A)};
    const Rows key = scratch.rows(m.F);

    each_sequence(B, threads, [&](int64_t b) { embed(m, c, b, x.row(b)); });
    for (int layer = 0; layer < m.L; layer++, t += PER_LAYER) {
        each_sequence(B, threads, [&](int64_t b) {
            if (layer) add(x.row(b), out.row(b), C);
            float *delta = before.row(b);
            norm_and_shift(m, c, layer, b, true, t + LN1, x.row(b), now.row(b), delta);
            for (int i = 0; i < C; i++) delta[i] -= now.row(b)[i];
            for (int i = 0; i < 6; i++) mix(mixed[i], b, now.row(b), delta, t[X_R + i], C);
        });
        const Job projections[] = {{&t[RECEPTANCE], xr, z.r}, {&t[KEY], xk, z.k},           {&t[VALUE], xv, z.v},
                                   {&t[W1], xw, z.w, TANH},   {&t[A1], xa, z.a},            {&t[G1], xg, z.g, SIGMOID},
                                   {&t[V1], xv, z.gate}};
        run_jobs(projections, B, threads);
        constexpr int TOGETHER = 8;
        const int blocks = int((B + TOGETHER - 1) / TOGETHER);
        parallel_for(m.H * blocks, threads, [&](int i) {
            const int64_t b0 = i % blocks * TOGETHER;
            one_head(m, c, layer, t, z, i / blocks, b0, std::min(b0 + TOGETHER, B));
        });
        run_jobs({{&t[OUTPUT], z.y, out}}, B, threads);
        each_sequence(B, threads, [&](int64_t b) {
            add(x.row(b), out.row(b), C);
            float *delta = before.row(b);
            norm_and_shift(m, c, layer, b, false, t + LN2, x.row(b), now.row(b), delta);
            for (int i = 0; i < C; i++) delta[i] -= now.row(b)[i];
            mix(xk, b, now.row(b), delta, t[FFN_X_K], C);
        });
        run_jobs({{&t[FFN_KEY], xk, key, SQUARED_RELU}}, B, threads);
        run_jobs({{&t[FFN_VALUE], key, out}}, B, threads);
    }
    each_sequence(B, threads, [&](int64_t b) { add(x.row(b), out.row(b), C); });
    head(m, c, x, now);
}

inline bool fit(const Model &m, const Call &c) {
    const int64_t C = m.C, A = m.A, F = m.F;
    if (!fits(m, c, A * m.N, PER_LAYER, true)) return false;
    for (int layer = 0; layer < m.L; layer++) {
        const Tensor *t = m.tensors + LAYERS + layer * PER_LAYER;
        const bool first = layer == 0;
        if (!have_shapes(m, t,
                         {{LN1, 1, C}, {LN1 + 1, 1, C}, {LN2, 1, C}, {LN2 + 1, 1, C}, {X_R, 1, C}, {X_W, 1, C}, {X_K, 1, C},
                          {X_V, 1, C}, {X_A, 1, C}, {X_G, 1, C}, {W0, 1, A}, {W1, C, t[W1].columns}, {W2, t[W1].columns, A},
                          {A0, 1, A}, {A1, C, t[A1].columns}, {A2, t[A1].columns, A}, {V0, 1, A, first},
                          {V1, C, t[V1].columns, first}, {V2, t[V1].columns, A, first}, {G1, C, t[G1].columns},
                          {G2, t[G1].columns, A}, {K_K, 1, A}, {K_A, 1, A}, {R_K, 1, A}, {RECEPTANCE, A, C}, {KEY, A, C},
                          {VALUE, A, C}, {OUTPUT, C, A}, {LN_X, 1, A}, {LN_X + 1, 1, A}, {FFN_X_K, 1, C}, {FFN_KEY, F, C},
                          {FFN_VALUE, C, F}}))
            return false;
        for (int i : {W1, W2, A1, A2, G1, G2, V1, V2})
            if (t[i].data && !t[i].transposed) return false;
    }
    return true;
}

}  // namespace rwkv_lab::step7
