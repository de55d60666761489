// RWKV-4: one token of every sequence through the whole model; formulas as in rwkv_lab/model/rwkv4.py.
#pragma once

#include "step456.h"

namespace rwkv_lab::step4 {

enum { LN1 = 0, LN2 = 2, DECAY = 4, FIRST, MIX_K, MIX_V, MIX_R, KEY, VALUE, RECEPTANCE, OUTPUT, FFN_MIX_K, FFN_MIX_R, FFN_KEY,
       FFN_RECEPTANCE, FFN_VALUE, PER_LAYER };

inline void step(const Model &m, const Call &c) {
    FlushToZero flush;
    const int threads = int(c.threads), C = m.C, A = m.A;
    const int64_t B = c.B;
    const Tensor *t = m.tensors + LAYERS;
    Scratch scratch(B, m.dtype);
    const Rows x = scratch.rows(C), now = scratch.rows(C), before = scratch.rows(C), out = scratch.rows(C);
    const Rows xk = scratch.rows(C), xv = scratch.rows(C), xr = scratch.rows(C);
    const Rows k = scratch.rows(A), v = scratch.rows(A), r = scratch.rows(A), y = scratch.rows(A), work = scratch.rows(5 * A);
    ChannelMix ffn(scratch, m);

    each_sequence(B, threads, [&](int64_t b) { embed(m, c, b, x.row(b)); });
    for (int layer = 0; layer < m.L; layer++, t += PER_LAYER) {
        each_sequence(B, threads, [&](int64_t b) {
            norm_and_shift(m, c, layer, b, true, t + LN1, x.row(b), now.row(b), before.row(b));
            from_before(xk, b, now.row(b), before.row(b), t[MIX_K], C);
            from_before(xv, b, now.row(b), before.row(b), t[MIX_V], C);
            from_before(xr, b, now.row(b), before.row(b), t[MIX_R], C);
        });
        const Job projections[] = {{&t[KEY], xk, k}, {&t[VALUE], xv, v}, {&t[RECEPTANCE], xr, r, SIGMOID}};
        run_jobs(projections, B, threads);
        each_sequence(B, threads, [&](int64_t b) {
            const float *decay = numbers<0>(t[DECAY], A), *first = numbers<1>(t[FIRST], A);
            const float *a = c.wkv + b * c.wkv_strides[0] + layer * c.wkv_strides[1], *sum = a + c.wkv_strides[2];
            const float *p = sum + c.wkv_strides[2], *key = k.row(b), *value = v.row(b);
            float *new_a = c.new_wkv + (b * m.L + layer) * 3 * A, *new_sum = new_a + A, *new_p = new_sum + A;
            float *past = work.row(b), *present = past + A, *w = present + A, *old = w + A, *fresh = old + A;
            for (int i = 0; i < A; i++) w[i] = decay[i];
            exponentials_of(w, A);
            for (int i = 0; i < A; i++) {
                const float q = std::max(p[i], first[i] + key[i]);
                past[i] = p[i] - q;
                present[i] = first[i] + key[i] - q;
                new_p[i] = std::max(p[i] - w[i], key[i]);
                old[i] = p[i] - w[i] - new_p[i];
                fresh[i] = key[i] - new_p[i];
            }
            for (float *e : {past, present, old, fresh}) exponentials_of(e, A);
            for (int i = 0; i < A; i++) {
                const float wkv = (past[i] * a[i] + present[i] * value[i]) / (past[i] * sum[i] + present[i]);
                new_a[i] = old[i] * a[i] + fresh[i] * value[i];
                new_sum[i] = old[i] * sum[i] + fresh[i];
                y.row(b)[i] = r.row(b)[i] * wkv;
            }
            halve(m, layer, y.row(b), A);
            mirror(y, b, A);
        });
        run_jobs({{&t[OUTPUT], y, out}}, B, threads);
        ffn.mixes(m, c, layer, t + LN2, x, now, before, out, t[FFN_MIX_K], t[FFN_MIX_R], true);
        ffn.run(m, c, layer, t[FFN_KEY], t[FFN_RECEPTANCE], t[FFN_VALUE], x);
    }
    head(m, c, x, now);
}

inline bool fit(const Model &m, const Call &c) {
    const int64_t C = m.C, A = m.A, F = m.F;
    if (!fits(m, c, 3 * A, PER_LAYER, false)) return false;
    for (int layer = 0; layer < m.L; layer++)
        if (!have_shapes(m, m.tensors + LAYERS + layer * PER_LAYER,
                         {{LN1, 1, C}, {LN1 + 1, 1, C}, {LN2, 1, C}, {LN2 + 1, 1, C}, {DECAY, 1, A}, {FIRST, 1, A}, {MIX_K, 1, C},
                          {MIX_V, 1, C}, {MIX_R, 1, C}, {KEY, A, C}, {VALUE, A, C}, {RECEPTANCE, A, C}, {OUTPUT, C, A},
                          {FFN_MIX_K, 1, C}, {FFN_MIX_R, 1, C}, {FFN_KEY, F, C}, {FFN_RECEPTANCE, C, C}, {FFN_VALUE, C, F}}))
            return false;
    return true;
}

}  // namespace rwkv_lab::step4
