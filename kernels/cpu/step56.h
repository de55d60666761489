// RWKV-5 and 6: one token of every sequence through the whole model; formulas as in rwkv_lab/model/rwkv5.py and rwkv6.py.
#pragma once

#include "step456.h"

namespace rwkv_lab::step56 {

enum { LN1 = 0, LN2 = 2, BONUS = 4, LOG_BONUS, DECAY, RECEPTANCE, KEY, VALUE, GATE, OUTPUT, LN_X, FFN_MIX_K = LN_X + 2, FFN_MIX_R,
       FFN_KEY, FFN_RECEPTANCE, FFN_VALUE, SHARED };
enum { MIX_K = SHARED, MIX_V, MIX_R, MIX_G, PER_LAYER_5 };
enum { MAA_X = SHARED, MAA_W, MAA_K, MAA_V, MAA_R, MAA_G, MAA_W1, MAA_W2, DECAY_W1, DECAY_W2, PER_LAYER_6 };

// y = S r + (r . (u k)) v, S' = S diag(d) + v kᵀ; S[K][V].
inline void wkv(float *to, const float *S, int N, const float *r, const float *d, const float *k, const float *v, const float *u, float *y) {
    float bonus = 0;
    for (int j = 0; j < N; j++) bonus += r[j] * u[j] * k[j];
    for (int i = 0; i < N; i++) y[i] = bonus * v[i];
    for (int j = 0; j < N; j++) {
        const float dj = d[j], kj = k[j], rj = r[j], *from = S + j * N;
        float *out = to + j * N;
        for (int i = 0; i < N; i++) {
            const float s = from[i];
            y[i] += s * rj;
            out[i] = s * dj + v[i] * kj;
        }
    }
}

struct Mixed {
    Rows r, k, v, gate, decay, y;  // `decay`: the inner half of its low-rank pair
};

inline void one_head(const Model &m, const Call &c, int layer, const Tensor *t, const Mixed &x, int h, int64_t b0, int64_t b1) {
    FlushToZero flush;
    const int N = m.N, first = h * N, wide = round_up(N, LANES);
    const bool six = m.generation == 6;
    float *d = workspace(size_t(b1 - b0 + 6) * wide + size_t(N) * N + LANES), *u = d + (b1 - b0) * wide, *y = u + wide;
    float *decay = y + wide, *ln_w = decay + wide, *ln_b = ln_w + wide, *S = ln_b + wide;
    const bool per_channel = t[DECAY].rows * t[DECAY].columns == m.A && m.A != m.H;
    // Of this head's channels, or one of the head.
    auto of_head = [&](float *to, const Tensor &w) {
        load_row(to, {w.data, w.format}, per_channel ? first : h, per_channel ? N : 1, 1);
        if (!per_channel) std::fill(to + 1, to + N, to[0]);
    };
    of_head(u, t[BONUS].data ? t[BONUS] : t[LOG_BONUS]);
    of_head(decay, t[DECAY]);
    load_row(ln_w, {t[LN_X].data, m.dtype}, first, N, N);
    load_row(ln_b, {t[LN_X + 1].data, m.dtype}, first, N, N);
    if (!t[BONUS].data) exponentials_of(u, N);
    if (six) product(t[DECAY_W2], first, first + N, x.decay, b0, b1, d, wide);
    for (int64_t b = b0; b < b1; b++, d += wide) {
        for (int i = 0; i < N; i++) d[i] = six ? decay[i] + d[i] : decay[i];
        exponentials_of(d, N);
        for (int i = 0; i < N; i++) d[i] = -d[i];
        exponentials_of(d, N);
        const HeadState state = head_state(m, c, layer, b, h);
        wkv(state.to, key_major(state, N, S), N, x.r.row(b) + first, d, x.k.row(b) + first, x.v.row(b) + first, u, y);
        standardise(y, y, N, m.head_norm_eps);
        float *out = x.y.row(b) + first;
        for (int i = 0; i < N; i++) out[i] = ln_b[i] + y[i] * ln_w[i];
        if (t[GATE].data)
            for (int i = 0; i < N; i++) out[i] *= x.gate.row(b)[first + i];
        halve(m, layer, out, N);
        if (x.y.half) store_row({x.y.half, BFLOAT16}, b * x.y.stride + first, out, N);
    }
}

// One of the five matrices of time_maa_w2 [5,rank,C].
inline Tensor part(const Tensor &w, int which) {
    Tensor out = w;
    out.rows /= 5;
    out.data = static_cast<const char *>(w.data) + int64_t(which) * out.rows * w.columns * (w.format == FLOAT32 ? 4 : 2);
    return out;
}

inline void step(const Model &m, const Call &c) {
    FlushToZero flush;
    const int threads = int(c.threads), C = m.C;
    const int64_t B = c.B;
    const Tensor *t = m.tensors + LAYERS;
    Scratch scratch(B, m.dtype);
    const Rows x = scratch.rows(C), now = scratch.rows(C), before = scratch.rows(C), out = scratch.rows(C);
    const Rows xw = scratch.rows(C), xk = scratch.rows(C), xv = scratch.rows(C), xr = scratch.rows(C), xg = scratch.rows(C);
    const Rows *mixed[5] = {&xw, &xk, &xv, &xr, &xg};
    const bool six = m.generation == 6;
    Rows inner[5], shares[5];
    if (six)
        for (int i = 0; i < 5; i++) inner[i] = scratch.rows(t[MAA_W1].columns / 5), shares[i] = scratch.rows(C);
    const Rows all = scratch.rows(six ? t[MAA_W1].columns : 1);
    const Mixed z{scratch.rows(m.A), scratch.rows(m.A), scratch.rows(m.A), scratch.rows(m.A),
                  scratch.rows(six ? t[DECAY_W1].columns : 1), scratch.rows(m.A)};
    ChannelMix ffn(scratch, m);

    each_sequence(B, threads, [&](int64_t b) { embed(m, c, b, x.row(b)); });
    for (int layer = 0; layer < m.L; layer++, t += six ? int(PER_LAYER_6) : int(PER_LAYER_5)) {
        static const Tensor nothing{nullptr, nullptr, FLOAT32, 0, 0, 1, 0, 0};
        if (six) {
            each_sequence(B, threads, [&](int64_t b) {
                norm_and_shift(m, c, layer, b, true, t + LN1, x.row(b), now.row(b), before.row(b));
                for (int i = 0; i < C; i++) before.row(b)[i] -= now.row(b)[i];
                mix(xw, b, now.row(b), before.row(b), t[MAA_X], C);
            });
            run_jobs({{&t[MAA_W1], xw, all, TANH}}, B, threads);
            const int rank = t[MAA_W1].columns / 5;
            for (int i = 0; i < 5; i++)
                for (int64_t b = 0; b < B; b++) {
                    memcpy(inner[i].row(b), all.row(b) + i * rank, size_t(rank) * sizeof(float));
                    mirror(inner[i], b, rank);
                }
            const Tensor w2[] = {part(t[MAA_W2], 0), part(t[MAA_W2], 1), part(t[MAA_W2], 2), part(t[MAA_W2], 3), part(t[MAA_W2], 4)};
            const Job jobs[] = {{&w2[0], inner[0], shares[0]}, {&w2[1], inner[1], shares[1]}, {&w2[2], inner[2], shares[2]},
                                {&w2[3], inner[3], shares[3]}, {&w2[4], inner[4], shares[4]}};
            run_jobs(jobs, B, threads);
            each_sequence(B, threads, [&](int64_t b) {
                for (int i = 0; i < 5; i++) {
                    const float *mu = numbers(t[MAA_W + i], C), *more = shares[i].row(b), *present = now.row(b), *delta = before.row(b);
                    float *to = mixed[i]->row(b);
                    for (int j = 0; j < C; j++) to[j] = present[j] + delta[j] * (mu[j] + more[j]);
                    mirror(*mixed[i], b, C);
                }
            });
        } else {
            each_sequence(B, threads, [&](int64_t b) {
                norm_and_shift(m, c, layer, b, true, t + LN1, x.row(b), now.row(b), before.row(b));
                from_before(xk, b, now.row(b), before.row(b), t[MIX_K], C);
                from_before(xv, b, now.row(b), before.row(b), t[MIX_V], C);
                from_before(xr, b, now.row(b), before.row(b), t[MIX_R], C);
                if (t[GATE].data) from_before(xg, b, now.row(b), before.row(b), t[MIX_G], C);
            });
        }
        const Job projections[] = {{&t[RECEPTANCE], xr, z.r}, {&t[KEY], xk, z.k}, {&t[VALUE], xv, z.v}, {&t[GATE], xg, z.gate, SILU},
                                   {six ? &t[DECAY_W1] : &nothing, xw, z.decay, TANH}};
        run_jobs(projections, B, threads);
        constexpr int TOGETHER = 8;
        const int blocks = int((B + TOGETHER - 1) / TOGETHER);
        parallel_for(m.H * blocks, threads, [&](int i) {
            const int64_t b0 = i % blocks * TOGETHER;
            one_head(m, c, layer, t, z, i / blocks, b0, std::min(b0 + TOGETHER, B));
        });
        run_jobs({{&t[OUTPUT], z.y, out}}, B, threads);
        ffn.mixes(m, c, layer, t + LN2, x, now, before, out, t[FFN_MIX_K], t[FFN_MIX_R], !six);
        ffn.run(m, c, layer, t[FFN_KEY], t[FFN_RECEPTANCE], t[FFN_VALUE], x);
    }
    head(m, c, x, now);
}

inline bool fit(const Model &m, const Call &c) {
    const int64_t C = m.C, A = m.A, F = m.F, H = m.H;
    const bool six = m.generation == 6;
    const int per_layer = six ? int(PER_LAYER_6) : int(PER_LAYER_5);
    if (!fits(m, c, A * m.N, per_layer, true)) return false;
    const Tensor *first = m.tensors + LAYERS;
    for (int layer = 0; layer < m.L; layer++) {
        const Tensor *t = m.tensors + LAYERS + layer * per_layer;
        if (!have_shapes(m, t,
                         {{LN1, 1, C}, {LN1 + 1, 1, C}, {LN2, 1, C}, {LN2 + 1, 1, C}, {RECEPTANCE, A, C}, {KEY, A, C}, {VALUE, A, C},
                          {GATE, A, C, !six}, {OUTPUT, C, A}, {LN_X, 1, A}, {LN_X + 1, 1, A}, {FFN_MIX_K, 1, C}, {FFN_MIX_R, 1, C},
                          {FFN_KEY, F, C}, {FFN_RECEPTANCE, C, C}, {FFN_VALUE, C, F}}))
            return false;
        // One number per channel, or one per head.
        const int64_t decays = int64_t(t[DECAY].rows) * t[DECAY].columns == A ? A : H;
        const int bonus = t[BONUS].data ? BONUS : LOG_BONUS;
        if ((six && decays != A) || !have_shapes(m, t, {{DECAY, 1, decays}, {bonus, 1, decays}})) return false;
        if (!six) {
            if (!have_shapes(m, t, {{MIX_K, 1, C}, {MIX_V, 1, C}, {MIX_R, 1, C}, {MIX_G, 1, C, !t[GATE].data}})) return false;
            continue;
        }
        const int64_t wide = t[MAA_W1].columns, rank = t[DECAY_W1].columns;
        if (wide % 5 || wide != first[MAA_W1].columns || rank != first[DECAY_W1].columns) return false;
        if (!have_shapes(m, t,
                         {{MAA_X, 1, C}, {MAA_W, 1, C}, {MAA_K, 1, C}, {MAA_V, 1, C}, {MAA_R, 1, C}, {MAA_G, 1, C},
                          {MAA_W1, C, wide}, {MAA_W2, wide, C}, {DECAY_W1, C, rank}, {DECAY_W2, rank, A}}))
            return false;
        for (int i : {MAA_W1, MAA_W2, DECAY_W1, DECAY_W2})
            if (!t[i].transposed) return false;
    }
    return true;
}

}  // namespace rwkv_lab::step56
