// One token of every sequence of a batch through a whole model: what all generations share.
//
// Numbers are float32 here, whatever the model's dtype; only shifts and, in a bfloat16 model, what a product reads are
// rounded: where the parallel pass in mix.cpp rounds too, so that both modes give the same up to the order of sums.
#pragma once

#include <vector>

#include "jobs.h"

namespace rwkv_lab {

// A model and its sizes; `tensors` are those of the enum below, and then of each layer those of the generation's enum.
struct Model {
    const Tensor *tensors;
    int32_t dtype;  // of the activations
    int32_t L, C, A, F, V, H, N;
    float norm_eps, head_norm_eps;
    int32_t generation;
    int32_t rescale;  // layers after which x is halved; 0 for never
    int64_t n_tensors;
};

// States before and after. wkv before: strides of [B,L,H,V,K]; after: [B,L,H,K,V]. RWKV-4: [B,L,3,A] both.
// Shifts [B,L,C] with strides of the first two dimensions; after: contiguous.
struct Call {
    const int64_t *tokens;
    int64_t B;
    const float *wkv;
    int64_t wkv_strides[5];
    const void *att_shift, *ffn_shift;
    int64_t att_strides[2], ffn_strides[2];
    float *new_wkv;
    void *new_att_shift, *new_ffn_shift, *logits;
    int64_t threads;
    // Bytes behind each.
    int64_t tokens_bytes, wkv_bytes, att_bytes, ffn_bytes, new_wkv_bytes, new_att_bytes, new_ffn_bytes, logits_bytes;
};

enum { EMB, LN0, LN_OUT = 3, HEAD = 5, LAYERS };  // what comes before the layers' tensors

// Whether a call's tokens and states, whose WKV state is `per_layer` numbers per sequence and layer, fit the model, as what
// stands before the layers does.
inline bool fits(const Model &m, const Call &c, int64_t per_layer, int64_t tensors_per_layer, bool matrices) {
    if (m.L < 1 || m.C < 1 || m.A < 1 || m.F < 1 || m.V < 1 || c.B < 1 || c.threads < 1 || !is_dtype(m.dtype)) return false;
    if (matrices && (m.H < 1 || m.N < 1 || int64_t(m.H) * m.N != m.A)) return false;
    if (m.n_tensors != LAYERS + m.L * tensors_per_layer) return false;
    for (int i = LN0; i < HEAD; i++)
        if (!m.tensors[i].is(1, m.C)) return false;
    if (!m.tensors[EMB].is(m.V, m.C) || !m.tensors[HEAD].is(m.V, m.C) || m.tensors[HEAD].transposed) return false;
    const int64_t size = size_of(m.dtype), *s = c.wkv_strides;
    const Span wkv{const_cast<float *>(c.wkv), c.wkv_bytes}, tokens{const_cast<int64_t *>(c.tokens), c.tokens_bytes};
    const Span att{const_cast<void *>(c.att_shift), c.att_bytes}, ffn{const_cast<void *>(c.ffn_shift), c.ffn_bytes};
    if (!holds(tokens, 8, {c.B})) return false;
    for (int64_t b = 0; b < c.B; b++)
        if (c.tokens[b] < 0 || c.tokens[b] >= m.V) return false;
    return (matrices ? reaches(wkv, 4, {c.B, m.L, m.H, m.N, m.N}, {s[0], s[1], s[2], s[3], s[4]})
                     : s[3] == 1 && reaches(wkv, 4, {c.B, m.L, 3, m.A}, {s[0], s[1], s[2], s[3]})) &&
           reaches(att, size, {c.B, m.L, m.C}, {c.att_strides[0], c.att_strides[1], 1}) &&
           reaches(ffn, size, {c.B, m.L, m.C}, {c.ffn_strides[0], c.ffn_strides[1], 1}) &&
           holds({c.new_wkv, c.new_wkv_bytes}, 4, {c.B, m.L, per_layer}) &&
           holds({c.new_att_shift, c.new_att_bytes}, size, {c.B, m.L, m.C}) &&
           holds({c.new_ffn_shift, c.new_ffn_bytes}, size, {c.B, m.L, m.C}) && holds({c.logits, c.logits_bytes}, size, {c.B, m.V});
}

// What a tensor of a layer has to be; `optional` ones may be missing.
struct Shape {
    int at;
    int64_t rows, columns;
    bool optional = false;
};

// Whether the tensors of a layer have these shapes. Vectors have the model's dtype.
inline bool have_shapes(const Model &m, const Tensor *t, std::initializer_list<Shape> shapes) {
    for (const Shape &s : shapes) {
        if (s.optional && !t[s.at].data) continue;
        if (!t[s.at].is(s.rows, s.columns) || ((s.rows == 1 || t[s.at].transposed) && t[s.at].format != m.dtype)) return false;
    }
    return true;
}

// Memory of one call, handed out in pieces whose rows have zeros behind their end. The thread that calls keeps it.
class Scratch {
public:
    Scratch(int64_t B, int dtype) : B_(B), dtype_(dtype) {}

    Rows rows(int64_t n) {
        Rows out;
        out.stride = (n + PADDED - 1) / PADDED * PADDED;
        out.at = piece(size_t(B_ * out.stride));
#if defined(BFLOAT_DOTS)
        if (dtype_ == BFLOAT16) out.half = reinterpret_cast<uint16_t *>(piece(size_t(B_ * out.stride + 1) / 2));
#endif
        return out;
    }

private:
    struct Piece {
        std::unique_ptr<Buffer> memory;
        size_t size = 0;
    };

    float *piece(size_t size) {
        thread_local std::vector<Piece> kept;
        if (next_ == kept.size()) kept.emplace_back();
        Piece &mine = kept[next_++];
        size += LANES;
        if (size > mine.size) mine.memory = std::make_unique<Buffer>(mine.size = size);
        memset(mine.memory->get(), 0, size * sizeof(float));
        return mine.memory->get();
    }

    int64_t B_;
    int dtype_;
    size_t next_ = 0;
};

// The first n numbers of a vector as float32: where they lie, or in memory of this thread, which keeps them until the next
// call with this SLOT. Widened before they are used, so that what uses them is compiled once instead of for every dtype.
template <int SLOT = 0>
const float *numbers(const Tensor &t, int n) {
    if (t.format == FLOAT32) return static_cast<const float *>(t.data);
    thread_local std::unique_ptr<Buffer> mine;
    thread_local int there = 0;
    if (n > there) mine = std::make_unique<Buffer>(size_t(there = n));
    load_row(mine->get(), {t.data, t.format}, 0, n, n);
    return mine->get();
}

inline float total(const float *x, int n) {
    Vec sums{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(x + i);
    float out = sum(sums);
    for (; i < n; i++) out += x[i];
    return out;
}

inline float total_of_products(const float *x, const float *y, int n) {
    Vec sums{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(x + i) * load(y + i);
    float out = sum(sums);
    for (; i < n; i++) out += x[i] * y[i];
    return out;
}

// (x - mean) / sqrt(variance + eps); `to` may be x.
inline void standardise(float *to, const float *x, int n, float eps) {
    const float mean = total(x, n) / float(n);
    for (int i = 0; i < n; i++) to[i] = x[i] - mean;
    const float scale = 1 / std::sqrt(total_of_products(to, to, n) / float(n) + eps);
    for (int i = 0; i < n; i++) to[i] *= scale;
}

inline void layer_norm(float *to, const float *x, const Tensor &weight, const Tensor &bias, int n, float eps) {
    standardise(to, x, n, eps);
    const float *w = numbers<0>(weight, n), *b = numbers<1>(bias, n);
    for (int i = 0; i < n; i++) to[i] = to[i] * w[i] + b[i];
}

// The bfloat16 twins of a row, where there are any.
inline void mirror(const Rows &x, int64_t b, int n) {
    if (x.half) store_row({x.half, BFLOAT16}, b * x.stride, x.row(b), n);
}

// Work on each sequence; spread over the threads where there are several.
template <class Task>
void each_sequence(int64_t B, int threads, Task &&task) {
    parallel_for(int(B), B < 4 ? 1 : threads, [&](int b) {
        FlushToZero flush;
        task(b);
    });
}

// x[b] = ln0(embedding of the token)
inline void embed(const Model &m, const Call &c, int64_t b, float *x) {
    const Tensor &table = m.tensors[EMB];
    const int64_t token = c.tokens[b];
    if (table.format <= FLOAT16) {
        load_row(x, {table.data, table.format}, token * m.C, m.C, m.C);
    } else if (table.format >= ROWS8) {
        for (int i = 0; i < m.C; i += LANES) store(x + i, codes_of(table, token, i) * scale_of(table, token, i / group_of(table)));
    } else if (table.format == INT8) {
        const int groups = (m.C + GROUP8 - 1) / GROUP8;
        const auto *from = static_cast<const int8_t *>(table.data) + token * groups * GROUP8;
        for (int i = 0; i < m.C; i++) x[i] = float(from[i]) * bfloat_to_float(short_scales(table)[token * groups + i / GROUP8]);
    } else {
        const int lines = (m.C + LINE4 - 1) / LINE4;
        const auto *words = static_cast<const uint16_t *>(table.data) + token * lines * 32;
        for (int i = 0; i < m.C; i++) {
            const int line = i / LINE4, inside = i % LINE4;
            const int code = int(words[line * 32 + inside % 32] >> (4 * (inside / 32)) & 15) - 8;
            x[i] = float(code) * bfloat_to_float(short_scales(table)[token * lines * 4 + i / GROUP4]);
        }
    }
    layer_norm(x, x, m.tensors[LN0], m.tensors[LN0 + 1], m.C, m.norm_eps);
}

// now = ln(x), kept as the new shift; before = the shift given.
inline void norm_and_shift(const Model &m, const Call &c, int layer, int64_t b, bool att, const Tensor *ln, const float *x,
                           float *now, float *before) {
    layer_norm(now, x, ln[0], ln[1], m.C, m.norm_eps);
    const int64_t *strides = att ? c.att_strides : c.ffn_strides, at = (b * m.L + layer) * m.C;
    void *shift = att ? c.new_att_shift : c.new_ffn_shift;
    load_row(before, {att ? c.att_shift : c.ffn_shift, m.dtype}, b * strides[0] + layer * strides[1], m.C, m.C);
    store_row({shift, m.dtype}, at, now, m.C);
    if (m.dtype != FLOAT32) load_row(now, {shift, m.dtype}, at, m.C, m.C);  // rounded as the state has it
}

// to = now + (before - now) * mu
inline void mix(const Rows &to, int64_t b, const float *now, const float *delta, const Tensor &mu, int n) {
    const float *share = numbers(mu, n);
    float *out = to.row(b);
    for (int i = 0; i < n; i++) out[i] = now[i] + delta[i] * share[i];
    mirror(to, b, n);
}

inline void add(float *x, const float *y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

// Logits of x.
inline void head(const Model &m, const Call &c, const Rows &x, const Rows &now) {
    each_sequence(c.B, int(c.threads), [&](int64_t b) {
        layer_norm(now.row(b), x.row(b), m.tensors[LN_OUT], m.tensors[LN_OUT + 1], m.C, m.norm_eps);
        mirror(now, b, m.C);
    });
    run_jobs({{&m.tensors[HEAD], now, {}, NONE, c.logits, m.dtype}}, c.B, int(c.threads));
}

// A state of one head, key-major: S[k][v] for values v0 .. v0+width-1 into rows of `width`.
struct HeadState {
    const float *from;
    int64_t value, key;  // strides
    float *to;           // [K,V], contiguous
};

inline HeadState head_state(const Model &m, const Call &c, int layer, int64_t b, int h) {
    const int64_t *s = c.wkv_strides;
    return {c.wkv + b * s[0] + layer * s[1] + h * s[2], s[3], s[4],
            c.new_wkv + ((b * m.L + layer) * m.H + h) * int64_t(m.N) * m.N};
}

// The state as the kernels here want it, [K,V]: where it lies, or in `scratch`.
inline const float *key_major(const HeadState &s, int N, float *scratch) {
    if (s.value == 1 && s.key == N) return s.from;
    load_key_major(scratch, N, {nullptr, 0, 0, s.value, s.key}, s.from, N, 0, N);
    return scratch;
}

}  // namespace rwkv_lab
