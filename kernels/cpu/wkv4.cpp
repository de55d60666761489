// WKV4, forward and backward; kernels/README.md has the formulas. Channels are independent: a task is a run of them.
#include "simd.h"
#include "torch_threads.h"

using namespace rwkv_lab;

namespace {

constexpr int NV = 4;  // vectors of channels at a time: enough exponentials to hide each other's latency
constexpr int W = NV * LANES;
constexpr int CHUNK = 32;  // tokens between two states that the forward pass keeps for the backward pass
constexpr int AHEAD = 4;   // tokens between asking memory for a row and using it

struct Sizes {
    int64_t B, T, A;
    int64_t row(int64_t b, int64_t t) const { return (b * T + t) * A; }
    int64_t chunks() const { return (T + CHUNK - 1) / CHUNK; }
};

INLINE Vec select(Ints which, Vec yes, Vec no) { return which ? yes : no; }

// Weights e^(x-q) and e^(y-q), q the larger of the two: one of them is 1, so one exponential is enough. It is NaN where
// q is infinite, as the formula has it.
struct Weights {
    Vec x, y;
    INLINE Weights(Vec x_exponent, Vec y_exponent) {
        const Vec more = x_exponent - y_exponent;
        const Ints x_larger = more > 0;
        const Vec q = select(x_larger, x_exponent, y_exponent);
        const Vec larger = 1 + (q - q), smaller = exponential(select(x_larger, -more, more));
        x = select(x_larger, larger, smaller);
        y = select(x_larger, smaller, larger);
    }
};

// The larger of two exponents, NaN where one of them is.
INLINE Vec larger(Vec x, Vec y) {
    const Vec both = x + y;
    return select(both == both, select(x > y, x, y), both);
}

// The sums of RWKV-4 with and without values, both divided by e^p.
struct Sums {
    Vec a, b, p;
};

// The state after a token.
INLINE Sums after(const Sums &s, Vec w, Vec k, Vec v) {
    const Vec aged = s.p + w;
    const Weights e(aged, k);
    return {e.x * s.a + e.y * v, e.x * s.b + e.y, larger(aged, k)};
}

struct Forward {
    Sizes size;
    Input w, u, k, v;
    const float *state;  // [B,3,A]
    Output y;
    float *final_state;  // [B,3,A]
    float *kept;         // [B,chunks,3,A], the state before each chunk; or null
};

INLINE void load_sums(Sums *s, const float *from, int64_t A, int there) {
    float rows[3][W];
    for (int i = 0; i < 3; i++) load_row(rows[i], {from, FLOAT32}, i * A, there, W);
    for (int i = 0; i < NV; i++) s[i] = {load(rows[0] + i * LANES), load(rows[1] + i * LANES), load(rows[2] + i * LANES)};
}

INLINE void store_sums(float *to, int64_t A, const Sums *s, int there) {
    float rows[3][W];
    for (int i = 0; i < NV; i++) {
        store(rows[0] + i * LANES, s[i].a);
        store(rows[1] + i * LANES, s[i].b);
        store(rows[2] + i * LANES, s[i].p);
    }
    for (int i = 0; i < 3; i++) store_row({to, FLOAT32}, i * A, rows[i], there);
}

// Channels first .. first + W - 1 of one sequence.
void forward_channels(const Forward &f, int64_t b, int64_t first) {
    FlushToZero flush;
    const int64_t A = f.size.A, T = f.size.T;
    const int there = int(std::min<int64_t>(W, A - first));
    alignas(64) float w[W], u[W], k[W], v[W], y[W];
    Sums s[NV];
    load_row(w, f.w, first, there, W);
    load_row(u, f.u, first, there, W);
    load_sums(s, f.state + b * 3 * A + first, A, there);
    for (int64_t t = 0; t < T; t++) {
        const int64_t at = f.size.row(b, t) + first;
        if (f.kept && t % CHUNK == 0) store_sums(f.kept + (b * f.size.chunks() + t / CHUNK) * 3 * A + first, A, s, there);
        if (t + AHEAD < T) {
            prefetch_row(f.k, at + AHEAD * A, there);
            prefetch_row(f.v, at + AHEAD * A, there);
            prefetch_row(f.y, at + AHEAD * A, there);
        }
        load_row(k, f.k, at, there, W);
        load_row(v, f.v, at, there, W);
#pragma GCC unroll 4
        for (int i = 0; i < NV; i++) {
            const int c = i * LANES;
            const Vec ki = load(k + c), vi = load(v + c);
            const Weights e(s[i].p, load(u + c) + ki);
            store(y + c, (e.x * s[i].a + e.y * vi) / (e.x * s[i].b + e.y));
            s[i] = after(s[i], load(w + c), ki, vi);
        }
        store_row(f.y, at, y, there);
    }
    store_sums(f.final_state + b * 3 * A + first, A, s, there);
}

struct Backward {
    Sizes size;
    Input w, u, k, v, dy;
    const float *d_final;  // [B,3,A], or null for zeros
    const float *kept;     // from the forward pass
    Output dk, dv;
    float *dw, *du;  // [B,A]
    float *d_state;  // [B,3,A]
};

void backward_channels(const Backward &f, int64_t b, int64_t first) {
    FlushToZero flush;
    const int64_t A = f.size.A, T = f.size.T;
    const int there = int(std::min<int64_t>(W, A - first));
    alignas(64) float w[W], u[W], k[CHUNK][W], v[CHUNK][W], dy[W], dk[W], dv[W];
    Sums before[CHUNK][NV], g[NV];  // states before each token, and the gradient of the state after the present one
    Vec dw[NV], du[NV];
    load_row(w, f.w, first, there, W);
    load_row(u, f.u, first, there, W);
    for (int i = 0; i < NV; i++) dw[i] = du[i] = g[i].a = g[i].b = g[i].p = Vec{};
    if (f.d_final) load_sums(g, f.d_final + b * 3 * A + first, A, there);
    for (int64_t c = f.size.chunks() - 1; c >= 0; c--) {
        const int64_t t0 = c * CHUNK;
        const int count = int(std::min<int64_t>(CHUNK, T - t0));
        load_sums(before[0], f.kept + (b * f.size.chunks() + c) * 3 * A + first, A, there);
        for (int t = 0; t < count; t++) {
            const int64_t at = f.size.row(b, t0 + t) + first;
            load_row(k[t], f.k, at, there, W);
            load_row(v[t], f.v, at, there, W);
            if (t + 1 < count)
                for (int i = 0; i < NV; i++)
                    before[t + 1][i] = after(before[t][i], load(w + i * LANES), load(k[t] + i * LANES), load(v[t] + i * LANES));
        }
        for (int t = count - 1; t >= 0; t--) {
            const int64_t at = f.size.row(b, t0 + t) + first;
            load_row(dy, f.dy, at, there, W);
#pragma GCC unroll 4
            for (int i = 0; i < NV; i++) {
                const int lane = i * LANES;
                const Sums s = before[t][i], after = g[i];
                const Vec kt = load(k[t] + lane), vt = load(v[t] + lane);

                // y does not depend on which exponent its sums are divided by, so no gradient goes to the maximum here.
                const Weights e(s.p, load(u + lane) + kt);
                const Vec below = e.x * s.b + e.y, y = (e.x * s.a + e.y * vt) / below, each = load(dy + lane) / below;
                const Vec d_bonus = each * (vt - y) * e.y;
                Vec da = each * e.x, db = -each * y * e.x, dp = each * (s.a - y * s.b) * e.x, d_value = each * e.y;

                // The state's own exponent is that maximum: it takes from the gradient of p what its sums do not need.
                const Vec aged = s.p + load(w + lane), lead = aged - kt;
                const Weights x(aged, kt);
                const Vec to_aged = x.x * (after.a * s.a + after.b * s.b), to_key = x.y * (after.a * vt + after.b);
                const Vec rest = after.p - to_aged - to_key;
                const Vec share = select(lead > 0, broadcast(1), select(lead < 0, Vec{}, broadcast(0.5f)));
                const Vec d_aged = to_aged + rest * share;
                da += after.a * x.x;
                db += after.b * x.x;
                dp += d_aged;
                d_value += after.a * x.y;
                store(dv + lane, d_value);
                store(dk + lane, d_bonus + to_key + rest * (1 - share));
                dw[i] += d_aged;
                du[i] += d_bonus;
                g[i] = {da, db, dp};
            }
            store_row(f.dk, at, dk, there);
            store_row(f.dv, at, dv, there);
        }
    }
    for (int i = 0; i < NV; i++) {
        store(dk + i * LANES, dw[i]);
        store(dv + i * LANES, du[i]);
    }
    store_row({f.dw, FLOAT32}, b * A + first, dk, there);
    store_row({f.du, FLOAT32}, b * A + first, dv, there);
    store_sums(f.d_state + b * 3 * A + first, A, g, there);
}

template <class Task>
void for_channels(const Sizes &size, int threads, Task &&task) {
    const int64_t runs = (size.A + W - 1) / W;
    parallel_with_torch(int(size.B * runs), threads, [&](int i) { task(i / runs, i % runs * W); });
}

bool fit(const Sizes &s, int64_t dtypes, const Span &w, const Span &u, const Span &k, const Span &v) {
    for (int i = 0; i < 4; i++)
        if (!is_dtype(dtype_of(dtypes, i))) return false;
    auto size = [&](int i) { return size_of(dtype_of(dtypes, i)); };
    return s.B > 0 && s.T > 0 && s.A > 0 && holds(w, size(0), {s.A}) && holds(u, size(1), {s.A}) &&
           holds(k, size(2), {s.B, s.T, s.A}) && holds(v, size(3), {s.B, s.T, s.A});
}

}  // namespace

// w, u `[A]`, k, v `[B,T,A]`, all contiguous; their dtypes in two bits each, w's lowest; y has v's dtype. state, final_state
// `[B,3,A]` float32 contiguous; kept: see `Forward`.
extern "C" int64_t wkv4_forward(Span w, Span u, Span k, Span v, int64_t dtypes, Span state, Span y, Span final_state, Span kept,
                                int64_t B, int64_t T, int64_t A, int threads) {
    Forward f{{B, T, A},           input(w, dtypes, 0),  input(u, dtypes, 1), input(k, dtypes, 2),
              input(v, dtypes, 3), state.as(),           output(y, dtypes, 3), final_state.as(),
              kept.as()};
    if (!fit(f.size, dtypes, w, u, k, v) || !holds(y, size_of(dtype_of(dtypes, 3)), {B, T, A}) || !holds(state, 4, {B, 3, A}) ||
        !holds(final_state, 4, {B, 3, A}) || (f.kept && !holds(kept, 4, {B, f.size.chunks(), 3, A})))
        return MISFIT;
    for_channels(f.size, threads, [&](int64_t b, int64_t first) { forward_channels(f, b, first); });
    return FITS;
}

// Gradients of everything that `wkv4_forward` takes: dk, dv in their input's dtype, dw and du `[B,A]` float32, d_state
// `[B,3,A]`; dy in y's dtype, d_final `[B,3,A]` contiguous or null.
extern "C" int64_t wkv4_backward(Span w, Span u, Span k, Span v, int64_t dtypes, Span dy, Span d_final, Span kept, Span dk,
                                 Span dv, Span dw, Span du, Span d_state, int64_t B, int64_t T, int64_t A, int threads) {
    Backward f{{B, T, A},
               input(w, dtypes, 0),
               input(u, dtypes, 1),
               input(k, dtypes, 2),
               input(v, dtypes, 3),
               input(dy, dtypes, 3),
               d_final.as(),
               kept.as(),
               output(dk, dtypes, 2),
               output(dv, dtypes, 3),
               dw.as(),
               du.as(),
               d_state.as()};
    const int64_t size_k = size_of(dtype_of(dtypes, 2)), size_v = size_of(dtype_of(dtypes, 3));
    if (!fit(f.size, dtypes, w, u, k, v) || !holds(dy, size_v, {B, T, A}) || (f.d_final && !holds(d_final, 4, {B, 3, A})) ||
        !holds(kept, 4, {B, f.size.chunks(), 3, A}) || !holds(dk, size_k, {B, T, A}) || !holds(dv, size_v, {B, T, A}) ||
        !holds(dw, 4, {B, A}) || !holds(du, 4, {B, A}) || !holds(d_state, 4, {B, 3, A}))
        return MISFIT;
    for_channels(f.size, threads, [&](int64_t b, int64_t first) { backward_channels(f, b, first); });
    return FITS;
}
