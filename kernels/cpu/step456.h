// What the token steps of RWKV-4, 5 and 6 share: the channel mix, and the scale of float16.
#pragma once

#include "step.h"

namespace rwkv_lab {

// What goes into the last matrix of a mix is scaled down with depth in float16, as x itself is; see Block in
// rwkv_lab/model/block.py.
inline void halve(const Model &m, int layer, float *x, int n) {
    if (!m.rescale || layer < m.rescale) return;
    const float scale = std::ldexp(1.0f, -(layer / m.rescale));
    for (int i = 0; i < n; i++) x[i] *= scale;
}

// to = before + (now - before) * mu
inline void from_before(const Rows &to, int64_t b, const float *now, const float *before, const Tensor &mu, int n) {
    const float *share = numbers(mu, n);
    float *out = to.row(b);
    for (int i = 0; i < n; i++) out[i] = before[i] + (now[i] - before[i]) * share[i];
    mirror(to, b, n);
}

struct ChannelMix {
    Rows xk, xr, key, receptance, out;

    ChannelMix(Scratch &scratch, const Model &m)
        : xk(scratch.rows(m.C)), xr(scratch.rows(m.C)), key(scratch.rows(m.F)), receptance(scratch.rows(m.C)),
          out(scratch.rows(m.C)) {}

    // x += att, norm, and the mixes with the token before. `stored_present`: mu is the present token's share (4 and 5).
    void mixes(const Model &m, const Call &c, int layer, const Tensor *ln, const Rows &x, const Rows &now, const Rows &before,
               const Rows &att, const Tensor &mu_k, const Tensor &mu_r, bool stored_present) {
        each_sequence(c.B, int(c.threads), [&](int64_t b) {
            add(x.row(b), att.row(b), m.C);
            norm_and_shift(m, c, layer, b, false, ln, x.row(b), now.row(b), before.row(b));
            if (stored_present) {
                from_before(xk, b, now.row(b), before.row(b), mu_k, m.C);
                from_before(xr, b, now.row(b), before.row(b), mu_r, m.C);
            } else {
                for (int i = 0; i < m.C; i++) before.row(b)[i] -= now.row(b)[i];
                mix(xk, b, now.row(b), before.row(b), mu_k, m.C);
                mix(xr, b, now.row(b), before.row(b), mu_r, m.C);
            }
        });
    }

    // x += sigmoid(R xr) * V relu(K xk)^2
    void run(const Model &m, const Call &c, int layer, const Tensor &k, const Tensor &r, const Tensor &v, const Rows &x) {
        const int threads = int(c.threads);
        run_jobs({{&k, xk, key, SQUARED_RELU}, {&r, xr, receptance, SIGMOID}}, c.B, threads);
        if (m.rescale && layer >= m.rescale)
            each_sequence(c.B, threads, [&](int64_t b) { halve(m, layer, key.row(b), m.F); });
        run_jobs({{&v, key, out}}, c.B, threads);
        const bool halves = m.rescale && layer % m.rescale == m.rescale - 1;
        each_sequence(c.B, threads, [&](int64_t b) {
            float *gated = out.row(b);
            for (int i = 0; i < m.C; i++) gated[i] *= receptance.row(b)[i];
            add(x.row(b), gated, m.C);
            if (halves)
                for (int i = 0; i < m.C; i++) x.row(b)[i] *= 0.5f;
        });
    }
};

}  // namespace rwkv_lab
