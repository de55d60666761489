// Everything in a layer that is no WKV, for many tokens of an RWKV model of any generation: matrix products, and between
// them all that works token by token, in as few passes as there are products to wait for.
//
// Between two products everything is float32, whatever the model's dtype: only what a product reads is rounded. Tokens
// are worked on in tiles, and each tile is packed for the product that comes next while it is in the cache.
#include <cmath>

#include "matmul.h"

using namespace rwkv_lab;

namespace {

INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE Vec hyperbolic_tangent(Vec x) {
    const Vec y = x * x;  // near 0 the quotient would lose digits
    const Vec near = x + x * y * (y * (y * (y * 2.1869489e-2f - 5.3968254e-2f) + 1.3333334e-1f) - 3.3333334e-1f);
    const Vec far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
    return y < 0.0625f ? near : far;
}

INLINE Vec first_lanes(Vec x, int64_t n) {  // zeros from lane n on
    Ints lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < int(std::min<int64_t>(n, LANES)) ? x : Vec{};
}

int padded(int64_t n) { return round_up(int(n), LANES); }

// A vector of parameters as float32, with zeros behind it, a whole vector at least: heads may end anywhere.
struct Parameter {
    Buffer values;
    Parameter(const void *data, int64_t dtype, int64_t n) : values(size_t(padded(n) + LANES)) {
        if (data) load_row(values.get(), {data, int(dtype)}, 0, int(n), padded(n) + LANES);
    }
    Vec operator[](int64_t i) const { return load(values.get() + i); }
};

struct Norm {
    Parameter weight, bias;
    float eps;
    int64_t dtype, C;
    Norm(const void *w, const void *b, double e, int64_t dtype_, int64_t C_)
        : weight(w, dtype_, C_), bias(b, dtype_, C_), eps(float(e)), dtype(dtype_), C(C_) {}

    // In place, padded. Zeros stay behind the end.
    void operator()(float *x) const {
        Vec sums{};
        for (int64_t i = 0; i < C; i += LANES) sums += load(x + i);
        const float mean = sum(sums) / float(C);
        sums = Vec{};
        for (int64_t i = 0; i < C; i += LANES) {
            const Vec d = first_lanes(load(x + i) - mean, C - i);
            sums += d * d;
        }
        const float scale = 1.0f / std::sqrt(sum(sums) / float(C) + eps);
        for (int64_t i = 0; i < C; i += LANES) store(x + i, (load(x + i) - mean) * scale * weight[i] + bias[i]);
    }

    // And rounded to the model's dtype, as the shift in a state is: a text may be cut anywhere.
    void rounded(float *x, uint16_t *scratch) const {
        (*this)(x);
        if (dtype == FLOAT32) return;
        store_row({scratch, int(dtype)}, 0, x, int(C));
        load_row(x, {scratch, int(dtype)}, 0, int(C), padded(C));
    }
};

// For every head of a padded row, over[h*N .. h*N+N-1] = value of the head's sum of term(i), i its first channel in steps
// of LANES.
template <class Term, class Value>
INLINE void per_head(float *over, int64_t H, int64_t N, Term term, Value value) {
    for (int64_t h = 0; h < H; h++) {
        Vec sums{};
        for (int64_t j = 0; j < N; j += LANES) sums += N - j >= LANES ? term(h * N + j) : first_lanes(term(h * N + j), N - j);
        const float found = value(sum(sums));
        for (int64_t j = 0; j < N; j++) over[h * N + j] = found;
    }
}

// Calls task(tile, first row, count of rows) for all tiles.
template <class Task>
void over_tiles(int64_t rows, int threads, Task task) {
    const int64_t tiles = (rows + TILE - 1) / TILE;
    parallel_with_torch(int(tiles), threads, [&](int i) { task(i, i * int64_t(TILE), int(std::min<int64_t>(TILE, rows - i * TILE))); });
}

// A tile of rows that is computed row by row and then packed for a product.
struct Tile {
    int64_t k, stride;
    Buffer rows;
    explicit Tile(int64_t k_) : k(k_), stride(padded(k_) + LANES), rows(size_t(TILE * stride)) {}
    float *row(int i) const { return rows.get() + i * stride; }
    void pack(float *packed, int64_t tile, int count, bool pairs) const {
        pack_tile(packed, tile, rows.get(), stride, count, k, pairs);
    }
};

struct Scratch {  // some padded rows
    int64_t width;
    Buffer rows;
    Scratch(int count, int64_t n) : width(padded(n) + LANES), rows(size_t(count * width)) {}
    float *operator[](int i) const { return rows.get() + i * width; }
    float *take(int i, const float *from, int64_t n) const {
        load_row((*this)[i], {from, FLOAT32}, 0, int(n), padded(n));
        return (*this)[i];
    }
};

enum Activation { NONE = 0, TANH = 1, SIGMOID = 2, RELU_SQUARE = 3 };

// Vectors of parameters of n numbers each; those that are not there count as fitting.
bool parameters(std::initializer_list<Span> spans, int64_t dtype, int64_t n) {
    if (!is_dtype(dtype) || n < 1) return false;
    for (const Span &x : spans)
        if (x.data && !holds(x, size_of(dtype), {n})) return false;
    return true;
}

// float32 [rows,n] each; those that are not there count as fitting.
bool floats(std::initializer_list<Span> spans, int64_t rows, int64_t n) {
    if (rows < 1 || n < 1) return false;
    for (const Span &x : spans)
        if (x.data && !holds(x, 4, {rows, n})) return false;
    return true;
}

bool there(std::initializer_list<Span> spans) {
    for (const Span &x : spans)
        if (!x.data) return false;
    return true;
}

bool packed_fits(const Span &packed, int64_t rows, int64_t k, int64_t pairs) {
    return rows > 0 && k > 0 && there({packed}) && holds(packed, 4, {packed_floats_of(rows, k, pairs)});
}

template <class Function>
INLINE void map(float *x, int64_t n, Function f) {
    for (int64_t i = 0; i < n; i += LANES) store(x + i, f(load(x + i)));
}

}  // namespace

extern "C" {

// Whether 16-bit models are multiplied in pairs of bfloat16 here, and floats that `rows` rows of k take, packed.
int64_t has_pairs() { return HAS_PAIRS; }
int64_t packed_floats(int64_t rows, int64_t k, int64_t pairs) { return packed_floats_of(rows, k, pairs); }

// Whether bytes can be multiplied by a path here (see IntegerPath), and the fastest one.
int64_t has_integer_path(int64_t which) { return has_path(which); }
int64_t integer_path() {
    int64_t best = AVX512_VNNI;
    while (!has_path(best)) best--;
    return best;
}

int64_t multiply_all(Span products, int64_t count, int64_t pairs, int64_t threads) {
    if (count < 1 || !holds(products, sizeof(Product), {count})) return MISFIT;
    for (int64_t i = 0; i < count; i++)
        if (!fits(products.as<Product>()[i], pairs)) return MISFIT;
    multiply(products.as<Product>(), int(count), pairs, int(threads));
    return FITS;
}

// x[i] = LayerNorm(embedding[tokens[i]]), embedding[V,C].
int64_t embed(Span tokens, Span embedding, Span weight, Span bias, double eps, int64_t dtype, int64_t rows, int64_t V, int64_t C,
              Span x, int64_t threads) {
    if (!there({tokens, embedding, weight, bias, x}) || !parameters({weight, bias}, dtype, C) || !floats({x}, rows, C) ||
        !holds(tokens, 8, {rows}) || !holds(embedding, size_of(dtype), {V, C}))
        return MISFIT;
    const int64_t *ids = tokens.as<int64_t>();
    const std::vector<int64_t> token(ids, ids + rows);  // what was compared stays so, whoever writes into them meanwhile
    for (int64_t id : token)
        if (id < 0 || id >= V) return MISFIT;
    const Norm norm(weight.data, bias.data, eps, dtype, C);
    over_tiles(rows, int(threads), [&](int64_t, int64_t first, int count) {
        Scratch scratch(1, C);
        for (int64_t i = first; i < first + count; i++) {
            load_row(scratch[0], {embedding.data, int(dtype), V * C}, token[size_t(i)] * C, int(C), padded(C));
            norm(scratch[0]);
            store_row({x.data, FLOAT32, rows * C}, i * C, scratch[0], int(C));
        }
    });
    return FITS;
}

// LayerNorm of x[rows,C], packed: what the head reads.
int64_t norm_out(Span x, Span weight, Span bias, double eps, int64_t dtype, int64_t rows, int64_t C, Span packed, int64_t pairs,
                 int64_t threads) {
    if (!there({x, weight, bias}) || !floats({x}, rows, C) || !parameters({weight, bias}, dtype, C) ||
        !packed_fits(packed, rows, C, pairs))
        return MISFIT;
    const Norm norm(weight.data, bias.data, eps, dtype, C);
    over_tiles(rows, int(threads), [&](int64_t tile, int64_t first, int count) {
        Tile out(C);
        for (int i = 0; i < count; i++) {
            load_row(out.row(i), {x.data, FLOAT32, rows * C}, (first + i) * C, int(C), padded(C));
            norm(out.row(i));
        }
        out.pack(packed.as(), tile, count, pairs);
    });
    return FITS;
}

// LayerNorm, token shift, and n mixtures of a token z and the one before it p, packed: z + (p - z) share. x[B*T,C].
//
// share = mu[j], or 1 - mu[j] where `of_present`; plus extra[j,B*T,C] where given. shift[B,C] is before the first token of
// each sequence, new_shift[B,C] is after its last. mu and packed hold n spans.
int64_t mix_in(Span x, Span weight, Span bias, double eps, int64_t dtype, int64_t rows, int64_t T, int64_t C, Span shift,
               Span new_shift, int64_t n, Span mu, int64_t of_present, Span extra, Span packed, int64_t pairs, int64_t threads) {
    if (!there({x, weight, bias, shift, new_shift}) || n < 1 || T < 1 || rows % T || !floats({x}, rows, C) ||
        !parameters({weight, bias}, dtype, C) || !holds(shift, size_of(dtype), {rows / T, C}) ||
        !holds(new_shift, size_of(dtype), {rows / T, C}) || (extra.data && !holds(extra, 4, {n, rows, C})) ||
        !holds(mu, sizeof(Span), {n}) || !holds(packed, sizeof(Span), {n}))
        return MISFIT;
    for (int64_t j = 0; j < n; j++)
        if (!there({mu.as<Span>()[j]}) || !parameters({mu.as<Span>()[j]}, dtype, C) ||
            !packed_fits(packed.as<Span>()[j], rows, C, pairs))
            return MISFIT;
    const Input before_all{shift.data, int(dtype), rows / T * C}, more{extra.data, FLOAT32, n * rows * C};
    const Output after_all{new_shift.data, int(dtype), rows / T * C};
    const Norm norm(weight.data, bias.data, eps, dtype, C);
    std::vector<std::unique_ptr<Parameter>> shares;
    for (int64_t j = 0; j < n; j++) {
        shares.push_back(std::make_unique<Parameter>(mu.as<Span>()[j].data, dtype, C));
        if (of_present) map(shares.back()->values.get(), padded(C), [](Vec m) { return 1.0f - m; });
    }
    over_tiles(rows, int(threads), [&](int64_t tile, int64_t first, int count) {
        Scratch z(TILE + 1, C), before(TILE, C);
        Tile out(C);
        std::vector<uint16_t> half(size_t(padded(C)));
        for (int i = first % T ? -1 : 0; i < count; i++) {  // row -1 is the token before this tile
            z.take(i + 1, x.as() + (first + i) * C, C);
            norm.rounded(z[i + 1], half.data());
        }
        for (int i = 0; i < count; i++) {
            const int64_t b = (first + i) / T, t = (first + i) % T;
            if (t)
                memcpy(before[i], z[i], sizeof(float) * size_t(padded(C)));
            else
                load_row(before[i], before_all, b * C, int(C), padded(C));
            if (t == T - 1) store_row(after_all, b * C, z[i + 1], int(C));
        }
        for (int64_t j = 0; j < n; j++) {
            const Parameter &share = *shares[size_t(j)];
            for (int i = 0; i < count; i++) {
                const float *now = z[i + 1], *then = before[i];
                float *to = out.row(i);
                if (!extra.data) {
                    for (int64_t c = 0; c < C; c += LANES)
                        store(to + c, load(now + c) + (load(then + c) - load(now + c)) * share[c]);
                    continue;
                }
                load_row(to, more, (j * rows + first + i) * C, int(C), padded(C));
                for (int64_t c = 0; c < C; c += LANES)
                    store(to + c, load(now + c) + (load(then + c) - load(now + c)) * (share[c] + load(to + c)));
            }
            out.pack(packed.as<Span>()[j].as(), tile, count, pairs);
        }
    });
    return FITS;
}

struct Packing {
    const float *y;  // rows `stride` floats from one to the next
    float *packed;
    int64_t stride, k, activation;
    int64_t y_bytes, packed_bytes;
};

// Activations of y[rows,k], packed; several at once.
int64_t activate(Span packings, int64_t n, int64_t rows, int64_t pairs, int64_t threads) {
    if (n < 1 || !holds(packings, sizeof(Packing), {n})) return MISFIT;
    for (int64_t j = 0; j < n; j++) {
        const Packing &l = packings.as<Packing>()[j];
        if (!packed_fits({l.packed, l.packed_bytes}, rows, l.k, pairs) ||
            !reaches({const_cast<float *>(l.y), l.y_bytes}, 4, {rows, l.k}, {l.stride, 1}))
            return MISFIT;
    }
    over_tiles(rows, int(threads), [&](int64_t tile, int64_t first, int count) {
        for (int64_t j = 0; j < n; j++) {
            const Packing &l = packings.as<Packing>()[j];
            Tile out(l.k);
            for (int i = 0; i < count; i++) {
                float *row = out.row(i);
                load_row(row, {l.y, FLOAT32}, (first + i) * l.stride, int(l.k), padded(l.k));
                if (l.activation == TANH) map(row, l.k, hyperbolic_tangent);
                if (l.activation == SIGMOID) map(row, l.k, sigmoid);
                if (l.activation == RELU_SQUARE)
                    map(row, l.k, [](Vec x) { return x < 0.0f ? Vec{} : x * x; });  // NaN stays NaN
            }
            out.pack(l.packed, tile, count, pairs);
        }
    });
    return FITS;
}

// RWKV-7, between the products and the WKV operator; all [rows,A]. From k, v, wx, ax (before w0 and a0 are added) and vx
// (null in layer 0): k and v as the operator takes them, in place; wx becomes the log-decay, ax its b; a is new.
int64_t gates7(Span k_span, Span v_span, Span wx_span, Span ax_span, Span vx_span, Span v_first_span, Span a_span, Span w0,
               Span a0, Span v0, Span k_k, Span k_a, int64_t dtype, int64_t rows, int64_t H, int64_t N, int64_t threads) {
    const int64_t A = product_of({H, N});
    float *k = k_span.as(), *v = v_span.as(), *wx = wx_span.as(), *ax = ax_span.as(), *a = a_span.as();
    const float *vx = vx_span.as(), *v_first = v_first_span.as();
    if (!there({k_span, v_span, wx_span, ax_span, a_span, w0, a0, k_k, k_a}) || (vx && !there({v_first_span, v0})) ||
        !floats({k_span, v_span, wx_span, ax_span, vx_span, v_first_span, a_span}, rows, A) ||
        !parameters({w0, a0, v0, k_k, k_a}, dtype, A))
        return MISFIT;
    const Parameter w_0(w0.data, dtype, A), a_0(a0.data, dtype, A), v_0(vx ? v0.data : nullptr, dtype, A), kk(k_k.data, dtype, A),
        ka(k_a.data, dtype, A);
    over_tiles(rows, int(threads), [&](int64_t, int64_t first, int count) {
        Scratch scratch(8, A);
        float *scale = scratch[6], *read = scratch[7];
        for (int64_t at = first * A; at < (first + count) * A; at += A) {
            float *key = scratch.take(0, k + at, A), *value = scratch.take(1, v + at, A);
            float *decay = scratch.take(2, wx + at, A), *rate = scratch.take(3, ax + at, A);
            memset(scale, 0, sizeof(float) * size_t(scratch.width));
            per_head(
                scale, H, N,
                [&](int64_t i) {
                    const Vec x = load(key + i) * kk[i];
                    return x * x;
                },
                [](float squares) { return 1.0f / std::max(std::sqrt(squares), 1e-12f); });
            for (int64_t i = 0; i < A; i += LANES) {
                const Vec gate = sigmoid(a_0[i] + load(rate + i)), x = load(key + i), direction = x * kk[i] * load(scale + i);
                store(decay + i, -0.60653066f * sigmoid(w_0[i] + load(decay + i)));
                store(read + i, -direction);
                store(rate + i, direction * gate);
                store(key + i, x * (1.0f + (gate - 1.0f) * ka[i]));
            }
            if (vx) {
                const float *mix = scratch.take(4, vx + at, A), *one = scratch.take(5, v_first + at, A);
                for (int64_t i = 0; i < A; i += LANES) {
                    const Vec x = load(value + i);
                    store(value + i, x + (load(one + i) - x) * sigmoid(v_0[i] + load(mix + i)));
                }
                store_row({v, FLOAT32}, at, value, int(A));
            }
            store_row({k, FLOAT32}, at, key, int(A));
            store_row({wx, FLOAT32}, at, decay, int(A));
            store_row({ax, FLOAT32}, at, rate, int(A));
            store_row({a, FLOAT32}, at, read, int(A));
        }
    });
    return FITS;
}

// RWKV-6: the log-decay -exp(time_decay + x), in place; x[rows,A].
int64_t decays6(Span x_span, Span time_decay, int64_t dtype, int64_t rows, int64_t A, int64_t threads) {
    if (!there({x_span, time_decay}) || !floats({x_span}, rows, A) || !parameters({time_decay}, dtype, A)) return MISFIT;
    float *x = x_span.as();
    const Parameter base(time_decay.data, dtype, A);
    over_tiles(rows, int(threads), [&](int64_t, int64_t first, int count) {
        Scratch scratch(1, A);
        for (int64_t at = first * A; at < (first + count) * A; at += A) {
            float *row = scratch.take(0, x + at, A);
            for (int64_t i = 0; i < A; i += LANES) store(row + i, -exponential(base[i] + load(row + i)));
            store_row({x, FLOAT32}, at, row, int(A));
        }
    });
    return FITS;
}

// Behind the WKV operator of RWKV-5 to 7: norm over heads, the bonus of RWKV-7 (r_k null elsewhere), the gate (null in 5.0;
// through silu where asked), packed. All [rows,A].
int64_t heads_out(Span y_span, Span weight, Span bias, double eps, Span r_span, Span k_span, Span v_span, Span r_k, Span gate_span,
                  int64_t silu, int64_t dtype, int64_t rows, int64_t H, int64_t N, Span packed, int64_t pairs, int64_t threads) {
    const int64_t A = product_of({H, N});
    const float *y = y_span.as(), *r = r_span.as(), *k = k_span.as(), *v = v_span.as(), *gate = gate_span.as();
    if (!there({y_span, weight, bias}) || (r_k.data && !there({r_span, k_span, v_span})) ||
        !floats({y_span, r_span, k_span, v_span, gate_span}, rows, A) || !parameters({weight, bias, r_k}, dtype, A) ||
        !packed_fits(packed, rows, A, pairs))
        return MISFIT;
    const Parameter w(weight.data, dtype, A), b(bias.data, dtype, A), rk(r_k.data, dtype, A);
    over_tiles(rows, int(threads), [&](int64_t tile, int64_t first, int count) {
        Scratch scratch(8, A);
        Tile out(A);
        float *mean = scratch[5], *scale = scratch[6], *bonus = scratch[7];
        memset(mean, 0, 3 * sizeof(float) * size_t(scratch.width));
        for (int i = 0; i < count; i++) {
            const int64_t at = (first + i) * A;
            float *x = scratch.take(0, y + at, A), *to = out.row(i);
            per_head(mean, H, N, [&](int64_t c) { return load(x + c); }, [&](float s) { return s / float(N); });
            for (int64_t c = 0; c < A; c += LANES) store(x + c, load(x + c) - load(mean + c));
            per_head(
                scale, H, N, [&](int64_t c) { return load(x + c) * load(x + c); },
                [&](float s) { return 1.0f / std::sqrt(s / float(N) + float(eps)); });
            for (int64_t c = 0; c < A; c += LANES) store(to + c, load(x + c) * load(scale + c) * w[c] + b[c]);
            if (r_k.data) {
                float *receptance = scratch.take(1, r + at, A);
                const float *key = scratch.take(2, k + at, A), *value = scratch.take(3, v + at, A);
                for (int64_t c = 0; c < A; c += LANES) store(receptance + c, load(receptance + c) * load(key + c) * rk[c]);
                per_head(bonus, H, N, [&](int64_t c) { return load(receptance + c); }, [](float s) { return s; });
                for (int64_t c = 0; c < A; c += LANES) store(to + c, load(to + c) + load(bonus + c) * load(value + c));
            }
            if (gate) {
                const float *g = scratch.take(4, gate + at, A);
                for (int64_t c = 0; c < A; c += LANES) {
                    const Vec x_g = load(g + c);
                    store(to + c, load(to + c) * (silu ? x_g * sigmoid(x_g) : x_g));
                }
            }
        }
        out.pack(packed.as(), tile, count, pairs);
    });
    return FITS;
}

// RWKV-4: sigmoid(r) y of [rows,A], packed.
int64_t gate4(Span r_span, Span y_span, int64_t rows, int64_t A, Span packed, int64_t pairs, int64_t threads) {
    if (!there({r_span, y_span}) || !floats({r_span, y_span}, rows, A) || !packed_fits(packed, rows, A, pairs)) return MISFIT;
    const float *r = r_span.as(), *y = y_span.as();
    over_tiles(rows, int(threads), [&](int64_t tile, int64_t first, int count) {
        Scratch scratch(2, A);
        Tile out(A);
        for (int i = 0; i < count; i++) {
            const float *gate = scratch.take(0, r + (first + i) * A, A), *x = scratch.take(1, y + (first + i) * A, A);
            for (int64_t c = 0; c < A; c += LANES) store(out.row(i) + c, sigmoid(load(gate + c)) * load(x + c));
        }
        out.pack(packed.as(), tile, count, pairs);
    });
    return FITS;
}

// The channel mix of RWKV-4 to 6: x += sigmoid(r) y, all [rows,C].
int64_t add_gated(Span x_span, Span r_span, Span y_span, int64_t rows, int64_t C, int64_t threads) {
    if (!there({x_span, r_span, y_span}) || !floats({x_span, r_span, y_span}, rows, C)) return MISFIT;
    float *x = x_span.as();
    const float *r = r_span.as(), *y = y_span.as();
    over_tiles(rows, int(threads), [&](int64_t, int64_t first, int count) {
        Scratch scratch(3, C);
        for (int64_t at = first * C; at < (first + count) * C; at += C) {
            float *sum = scratch.take(0, x + at, C);
            const float *gate = scratch.take(1, r + at, C), *more = scratch.take(2, y + at, C);
            for (int64_t c = 0; c < C; c += LANES) store(sum + c, load(sum + c) + sigmoid(load(gate + c)) * load(more + c));
            store_row({x, FLOAT32}, at, sum, int(C));
        }
    });
    return FITS;
}

}  // extern "C"
