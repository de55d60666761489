// Matrix products of many rows, Y[T,n] = X[T,k] W[k,n], on float32 vectors or on pairs of bfloat16.
//
// Both factors are packed anew in units of 32 bits, one float32 or two bfloat16 that follow each other along k, so that
// the innermost loop reads both in order: X in tiles of TILE rows [k][TILE], W in panels of PANEL columns [k][PANEL]. Who
// computes X packs it, while it is in the cache; W is packed block by block on the way, so that no copy is kept. Weights in
// 8 and 4 bits become numbers there, code times scale: they are read once for as many tokens as a call has.
#pragma once

#include <vector>

#include "integer.h"
#include "quantised.h"
#include "torch_threads.h"
#include "transpose.h"

namespace rwkv_lab {

constexpr int PANEL = 2 * LANES;
constexpr int BLOCK_PANELS = 4;   // columns of a task: wide enough that reading X from L3 does not count
constexpr int BLOCK_UNITS = 768;  // of k: a block of W stays below half a megabyte, in the L2 cache

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif

inline int64_t units_of(int64_t k, bool pairs) { return pairs ? (k + 1) / 2 : k; }

// ------------------------------------------------------------------ laying out

// to[u * TILE + i] = rows[i * stride + u] for u < units, i < count; zeros for i from count to TILE.
inline void columns_of_rows(float *to, const float *rows, int64_t stride, int count, int64_t units) {
    int64_t u = 0;
    // The last column is written alone: a whole vector would reach into what another thread packs out behind it.
    for (; u + LANES < units; u += LANES) transpose_square<TILE>(to + u * TILE, rows + u, stride, count);
    for (; u < units; u++)
        for (int i = 0; i < TILE; i++) to[u * TILE + i] = i < count ? rows[i * stride + u] : 0;
}

// Rounds n floats to bfloat16, which may lie in the floats' own place, with a zero behind an odd one.
inline void round_to_bfloats(void *to, const float *from, int64_t n) {
    const char *floats = reinterpret_cast<const char *>(from);
    char *bytes = static_cast<char *>(to);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 16 <= n; i += 16) {
        __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(floats + 4 * i));
        memcpy(bytes + 2 * i, &half, 32);
    }
#endif
    for (; i < n; i++) {
        float x;
        memcpy(&x, floats + 4 * i, 4);
        uint16_t rounded = float_to_bfloat(x);
        memcpy(bytes + 2 * i, &rounded, 2);
    }
    if (n % 2) memset(bytes + 2 * n, 0, 2);
}

// Packs out `count` rows of k floats, `stride` floats from one to the next, as tile number `tile` of X.
// With pairs, the rows are rounded to bfloat16 in their own place.
inline void pack_tile(float *packed, int64_t tile, float *rows, int64_t stride, int count, int64_t k, bool pairs) {
    const int64_t units = units_of(k, pairs);
    if (pairs)
        for (int i = 0; i < count; i++) round_to_bfloats(rows + i * stride, rows + i * stride, k);
    columns_of_rows(packed + tile * units * TILE, rows, stride, count, units);
}

struct Weight {
    const void *data;
    int dtype;
    int64_t stride_n, stride_k;  // strides in elements, one of them 1
    const void *scales;          // of codes
    const uint8_t *zeros;
};

// What numbers at .. at+count-1 of column n of a coded W[k,n] are; `at` is a multiple of 64, and whole groups are written.
inline void decode(float *to, const Weight &w, int64_t k, int64_t n, int64_t at, int64_t count) {
    const Tensor matrix{w.data, w.scales, int32_t(w.dtype), int32_t(n + 1), int32_t(k), 0, 0, 0, w.zeros, 0};
    const int group = group_of(matrix);
    for (int64_t i = 0; i < count; i += LANES)
        store(to + i, codes_of(matrix, n, int(at + i)) * scale_of(matrix, n, int(at + i) / group));
}

// The same, rounded to bfloat16; `numbers` holds whole groups.
inline void decode_pairs(float *to, float *numbers, const Weight &w, int64_t k, int64_t n, int64_t at, int64_t count) {
    decode(numbers, w, k, n, at, count);
    round_to_bfloats(to, numbers, count);
}

// Units begin .. end-1 of columns first .. first+columns-1 of W, to[unit][PANEL], zeros behind the last column.
inline void pack_panel(float *to, const Weight &w, int64_t k, int64_t begin, int64_t end, int64_t first, int columns,
                      bool pairs) {
    const int64_t units = end - begin, per_unit = pairs ? 2 : 1;
    const bool last_is_half = pairs && end * 2 > k;
    const uint16_t *halves = static_cast<const uint16_t *>(w.data);
    if (w.stride_k == 1) {  // rows of n: transpose
        float rows[LANES * 64], numbers[2 * 64];
        for (int c0 = 0; c0 < PANEL; c0 += LANES) {
            const int count = std::clamp(columns - c0, 0, LANES);
            for (int64_t u = 0; u < units; u += 64) {
                const int64_t some = std::min<int64_t>(64, units - u), k0 = (begin + u) * per_unit;
                const float *from = rows;
                int64_t stride = 64;
                if (is_coded(w.dtype)) {
                    const int64_t there = std::min(some * per_unit, k - k0);
                    for (int i = 0; i < count; i++) {
                        float *row = rows + i * 64;
                        if (pairs)
                            decode_pairs(row, numbers, w, k, first + c0 + i, k0, there);
                        else
                            decode(row, w, k, first + c0 + i, k0, there);
                    }
                } else if (w.dtype == FLOAT32) {
                    from = static_cast<const float *>(w.data) + (first + c0) * w.stride_n + k0;
                    stride = w.stride_n;
                } else if (!pairs) {
                    for (int i = 0; i < count; i++)
                        load_row(rows + i * 64, {w.data, w.dtype}, (first + c0 + i) * w.stride_n + k0, int(some),
                                 int(some));
                } else if (w.stride_n % 2 == 0) {  // whole units already
                    from = reinterpret_cast<const float *>(halves + (first + c0) * w.stride_n + k0);
                    stride = w.stride_n / 2;
                } else {
                    const bool half = last_is_half && u + some == units;
                    for (int i = 0; i < count; i++) {
                        rows[i * 64 + some - 1] = 0;
                        memcpy(rows + i * 64, halves + (first + c0 + i) * w.stride_n + k0, size_t(4 * some - 2 * half));
                    }
                }
                float *out = to + u * PANEL + c0;
                int64_t j = 0;
                for (; j + LANES <= some; j += LANES) transpose_square<PANEL>(out + j * PANEL, from + j, stride, count);
                for (; j < some; j++)
                    for (int i = 0; i < LANES; i++) out[j * PANEL + i] = i < count ? from[i * stride + j] : 0;
            }
        }
        return;
    }
    for (int64_t u = 0; u < units; u++) {  // rows of k: they lie right already, but for the pairs
        float *row = to + u * PANEL;
        const int64_t at = (begin + u) * per_unit * w.stride_k + first;
        if (!pairs) {
            load_row(row, {w.data, w.dtype}, at, columns, PANEL);
        } else {
            uint32_t both[PANEL] = {};
            const uint16_t *even = halves + at, *odd = even + w.stride_k;
            if (last_is_half && u + 1 == units)
                for (int i = 0; i < columns; i++) both[i] = even[i];
            else
                for (int i = 0; i < columns; i++) both[i] = even[i] | uint32_t(odd[i]) << 16;
            memcpy(row, both, sizeof both);
        }
    }
}

// ------------------------------------------------------------------ multiplying

// The first ROWS rows of a tile times one panel: y[ROWS][PANEL] (+)= x[units][TILE] w[units][PANEL]; rows and columns are
// what y has of both.
template <bool PAIRS, int ROWS>
void multiply_rows(const float *x, const float *w, int64_t units, float *y, int64_t stride, int rows, int columns, bool add) {
    Vec sum[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) sum[i][0] = sum[i][1] = Vec{};
    for (int64_t u = 0; u < units; u++, x += TILE, w += PANEL) {
        const Vec left = load(w), right = load(w + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const Vec a = broadcast(x[i]);
            sum[i][0] = multiply_add<PAIRS>(sum[i][0], a, left);
            sum[i][1] = multiply_add<PAIRS>(sum[i][1], a, right);
        }
    }
    if (rows == ROWS && columns == PANEL) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++, y += stride) {
            store(y, add ? load(y) + sum[i][0] : sum[i][0]);
            store(y + LANES, add ? load(y + LANES) + sum[i][1] : sum[i][1]);
        }
        return;
    }
    float all[ROWS * PANEL];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
        store(all + i * PANEL, sum[i][0]);
        store(all + i * PANEL + LANES, sum[i][1]);
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) y[i * stride + j] = all[i * PANEL + j] + (add ? y[i * stride + j] : 0);
}

template <bool PAIRS>
void multiply_tile(const float *x, const float *w, int64_t units, float *y, int64_t stride, int rows, int columns, bool add) {
    if (rows <= 2) return multiply_rows<PAIRS, 2>(x, w, units, y, stride, rows, columns, add);
    if (rows <= TILE / 2) return multiply_rows<PAIRS, TILE / 2>(x, w, units, y, stride, rows, columns, add);
    multiply_rows<PAIRS, TILE>(x, w, units, y, stride, rows, columns, add);
}

// As the caller in Python fills it in; strides in elements.
struct Product {
    const float *x;  // packed by pack_tile
    const void *w;
    void *y;
    int64_t rows, k, n;
    int64_t w_dtype, w_stride_n, w_stride_k;
    int64_t y_dtype, y_stride;
    int64_t add;  // to what y holds, which is float32 then
    int64_t x_bytes, w_bytes, y_bytes;
    const void *scales;  // of a W of codes
    int64_t scales_bytes;
    int64_t integers;  // an IntegerPath, for a W of codes: X is rounded to 8 bits
    const uint8_t *zeros;
    int64_t zeros_bytes;

    Weight weight() const { return {w, int(w_dtype), w_stride_n, w_stride_k, scales, zeros}; }
    Tensor codes() const { return {w, scales, int32_t(w_dtype), int32_t(n), int32_t(k), 0, w_bytes, scales_bytes, zeros, zeros_bytes}; }
    int64_t tiles() const { return (rows + TILE - 1) / TILE; }
};

inline int64_t packed_floats_of(int64_t rows, int64_t k, bool pairs) { return (rows + TILE - 1) / TILE * TILE * units_of(k, pairs); }

// Whether there is memory for all of W, and it can be multiplied so.
inline bool weight_fits(const Product &p, bool pairs) {
    if (is_coded(p.w_dtype)) {
        constexpr int64_t MOST = INT32_MAX - LINE4;
        if (p.n > MOST || p.k > MOST || p.w_stride_k != 1) return false;
        return p.codes().is(p.n, p.k);
    }
    return is_dtype(p.w_dtype) && (!pairs || p.w_dtype == BFLOAT16) && (p.w_stride_k == 1 || p.w_stride_n == 1) &&
           reaches({const_cast<void *>(p.w), p.w_bytes}, size_of(p.w_dtype), {p.n, p.k}, {p.w_stride_n, p.w_stride_k});
}

inline bool fits(const Product &p, bool pairs) {
    if (p.integers != NO_INTEGERS && (!is_coded(p.w_dtype) || !has_path(p.integers))) return false;
    return p.rows > 0 && p.k > 0 && p.n > 0 && is_dtype(p.y_dtype) && weight_fits(p, pairs) && (!p.add || p.y_dtype == FLOAT32) &&
           p.y_stride >= p.n && holds({const_cast<float *>(p.x), p.x_bytes}, 4, {packed_floats_of(p.rows, p.k, pairs)}) &&
           reaches({p.y, p.y_bytes}, size_of(p.y_dtype), {p.rows, p.n}, {p.y_stride, 1});
}

// Rows of tiles begin .. end-1 and columns first .. first+columns-1 of a product.
template <bool PAIRS>
void multiply_block(const Product &p, int64_t begin, int64_t end, int64_t first, int columns) {
    thread_local Buffer packed(BLOCK_UNITS * PANEL * BLOCK_PANELS);
    const Weight weight = p.weight();
    const int64_t units = units_of(p.k, PAIRS), first_row = begin * TILE, rows = std::min(end * TILE, p.rows) - first_row;
    const bool direct = p.y_dtype == FLOAT32;
    Buffer own(direct ? 0 : size_t(rows * columns));
    float *y = direct ? static_cast<float *>(p.y) + first_row * p.y_stride + first : own.get();
    const int64_t stride = direct ? p.y_stride : columns;
    for (int64_t u = 0; u < units; u += BLOCK_UNITS) {
        const int64_t some = std::min<int64_t>(BLOCK_UNITS, units - u);
        for (int c = 0; c < columns; c += PANEL)
            pack_panel(packed.get() + c * some, weight, p.k, u, u + some, first + c, std::min(PANEL, columns - c), PAIRS);
        for (int64_t tile = begin; tile < end; tile++)
            for (int c = 0; c < columns; c += PANEL)
                multiply_tile<PAIRS>(p.x + (tile * units + u) * TILE, packed.get() + c * some, some,
                                     y + (tile - begin) * TILE * stride + c, stride,
                                     int(std::min<int64_t>(TILE, p.rows - tile * TILE)), std::min(PANEL, columns - c),
                                     p.add || u > 0);
    }
    if (!direct)
        for (int64_t i = 0; i < rows; i++)
            store_row({p.y, int(p.y_dtype)}, (first_row + i) * p.y_stride + first, y + i * columns, columns);
}

// The same for one or two rows and a W whose columns lie together: every column is read once, as it lies.
template <bool PAIRS>
void multiply_few(const Product &p, int64_t first, int columns) {
    const int64_t units = units_of(p.k, PAIRS), whole = p.k / (PAIRS ? 2 : 1) / LANES * LANES;
    Buffer x(p.rows * units);
    for (int64_t i = 0; i < p.rows; i++)
        for (int64_t u = 0; u < units; u++) x.get()[i * units + u] = p.x[u * TILE + i];
    const int size = p.w_dtype == FLOAT32 ? 4 : 2;
    const bool coded = is_coded(p.w_dtype);
    const int64_t decoded = round_up(int(p.k), LINE4);
    Buffer wide(coded ? decoded : units), numbers(coded && PAIRS ? decoded : 0), y(columns);
    for (int64_t i = 0; i < p.rows; i++) {
        const float *row = x.get() + i * units;
        const int64_t at = i * p.y_stride + first;
        if (p.add) load_row(y.get(), {p.y, FLOAT32}, at, columns, columns);
        for (int c = 0; c < columns; c++) {
            const char *column = static_cast<const char *>(p.w) + (first + c) * p.w_stride_n * size;
            const float *w = reinterpret_cast<const float *>(column);
            if (coded) {
                if (PAIRS)
                    decode_pairs(wide.get(), numbers.get(), p.weight(), p.k, first + c, 0, p.k);
                else
                    decode(wide.get(), p.weight(), p.k, first + c, 0, p.k);
                w = wide.get();
            } else if (!PAIRS && size == 2) {
                load_row(wide.get(), {column, int(p.w_dtype)}, 0, int(p.k), int(p.k));
                w = wide.get();
            }
            Vec sums[4] = {};
            int64_t u = 0;
            for (; u + 4 * LANES <= whole; u += 4 * LANES)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sums[j] = multiply_add<PAIRS>(sums[j], load(row + u + j * LANES), load(w + u + j * LANES));
            for (; u < whole; u += LANES) sums[0] = multiply_add<PAIRS>(sums[0], load(row + u), load(w + u));
            if (u < units) {
                float rest[LANES] = {}, of_row[LANES] = {};
                memcpy(rest, w + u, size_t(p.k - u * (PAIRS ? 2 : 1)) * (PAIRS ? 2 : 4));
                memcpy(of_row, row + u, size_t(units - u) * 4);
                sums[1] = multiply_add<PAIRS>(sums[1], load(of_row), load(rest));
            }
            y.get()[c] = sum(sums[0] + sums[1] + sums[2] + sums[3]) + (p.add ? y.get()[c] : 0);
        }
        store_row({p.y, int(p.y_dtype)}, at, y.get(), columns);
    }
}

// ------------------------------------------------------------------ in integers

// How X of a product lies once it is rounded, in memory that begins at `at`.
inline RoundedRows rounded_rows(const Product &p, int32_t *at) {
    const int group = integer_group(p.w_dtype);
    const int64_t groups = integers_of_row(p.w_dtype, p.k) / group, all = p.tiles() * groups * TILE;
    int32_t *scales = at + all * (group / 4);
    return {groups, group, p.w_dtype == INT4 ? 8 : path_of(p.integers).bias, at, reinterpret_cast<float *>(scales), scales + all};
}

inline int64_t words_of_rounded(const Product &p) {
    const RoundedRows r = rounded_rows(p, nullptr);
    return RoundedRows::words_of(p.tiles(), r.groups, r.group);
}

// Adds up to `columns` numbers to y, or puts them there.
INLINE void put(float *y, const float *from, int columns, bool add) {
    int j = 0;
    for (; j + LANES <= columns; j += LANES) store(y + j, add ? load(y + j) + load(from + j) : load(from + j));
    for (; j < columns; j++) y[j] = from[j] + (add ? y[j] : 0);
}

// Has count rows of `columns` floats brought to the cache while the products are made that will be written there.
INLINE void fetch_to_write(const float *y, int64_t stride, int count, int columns) {
    for (int i = 0; i < count; i++)
        for (int j = 0; j < columns; j += 16) __builtin_prefetch(y + i * stride + j, 1);
}

// As multiply_block.
inline void multiply_integers(const Product &p, const RoundedRows &x, int64_t begin, int64_t end, int64_t first, int columns) {
    constexpr int WIDEST = BLOCK_PANELS * PANEL, MOST_GROUPS = 4 * BLOCK_UNITS / GROUP4;
    thread_local Buffer packed(BLOCK_UNITS * WIDEST), scales(MOST_GROUPS * WIDEST);
    const Path path = path_of(p.integers);
    const int panel = 2 * path.width, units = x.group / 4;
    const int64_t at_once = BLOCK_UNITS / units, first_row = begin * TILE, rows = std::min(end * TILE, p.rows) - first_row;
    const bool direct = p.y_dtype == FLOAT32;
    Buffer own(direct ? 0 : size_t(rows * columns));
    float *y = direct ? static_cast<float *>(p.y) + first_row * p.y_stride + first : own.get();
    const int64_t stride = direct ? p.y_stride : columns;
    alignas(64) float out[TILE * 2 * PATH_WIDTH];
    for (int64_t g = 0; g < x.groups; g += at_once) {
        const int64_t some = std::min(at_once, x.groups - g);
        int32_t *codes = reinterpret_cast<int32_t *>(packed.get());
        for (int c = 0; c < columns; c += panel)
            pack_codes(codes + c * some * units, scales.get() + c * some, p.codes(), path, g, g + some, first + c,
                       std::min(panel, columns - c));
        for (int64_t tile = begin; tile < end; tile++) {
            const int count = int(std::min<int64_t>(TILE, p.rows - tile * TILE));
            for (int c = 0; c < columns; c += panel) {
                float *to = y + (tile - begin) * TILE * stride + c;
                fetch_to_write(to, stride, count, std::min(panel, columns - c));
                path.multiply({x.of_tile(tile) + g * units * TILE, codes + c * some * units, x.scales_of(tile) + g * TILE,
                               x.starts_of(tile) + g * TILE, scales.get() + c * some, some, units},
                              out);
                for (int i = 0; i < count; i++, to += stride) put(to, out + i * panel, std::min(panel, columns - c), p.add || g > 0);
            }
        }
    }
    if (!direct)
        for (int64_t i = 0; i < rows; i++)
            store_row({p.y, int(p.y_dtype)}, (first_row + i) * p.y_stride + first, y + i * columns, columns);
}

// X of the products in integers, rounded; `words` is the memory for all of them.
inline std::vector<RoundedRows> round_all(const Product *products, int count, int32_t *words, bool pairs, int threads) {
    std::vector<RoundedRows> found;
    std::vector<std::pair<int, int64_t>> tasks;
    for (int i = 0; i < count; i++) {
        const Product &p = products[i];
        found.push_back(p.integers ? rounded_rows(p, words) : RoundedRows{});
        if (!p.integers) continue;
        words += words_of_rounded(p);
        for (int64_t tile = 0; tile < p.tiles(); tile++) tasks.push_back({i, tile});
    }
    if (tasks.empty()) return found;
    parallel_with_torch(int(tasks.size()), threads, [&](int i) {
        const auto [which, tile] = tasks[size_t(i)];
        const Product &p = products[which];
        if (pairs)
            round_tile<true>(found[size_t(which)], tile, p.x, p.k);
        else
            round_tile<false>(found[size_t(which)], tile, p.x, p.k);
    });
    return found;
}

// Floats of the caller's thread for rounded rows, which it keeps: fresh memory would cost as much as the rounding.
inline int32_t *memory_for_rounded(const Product *products, int count) {
    thread_local std::unique_ptr<Buffer> mine;
    thread_local int64_t there = 0;
    int64_t wanted = 0;
    for (int i = 0; i < count; i++) wanted += products[i].integers ? words_of_rounded(products[i]) : 0;
    if (wanted > there) mine = std::make_unique<Buffer>(size_t(there = wanted));
    return mine ? reinterpret_cast<int32_t *>(mine->get()) : nullptr;
}

// All products at once; tasks of different products run beside each other.
inline void multiply(const Product *products, int count, bool pairs, int threads) {
    constexpr int WIDTH = BLOCK_PANELS * PANEL;
    int64_t blocks = 0;
    for (int i = 0; i < count; i++) blocks += (products[i].n + WIDTH - 1) / WIDTH;
    const int64_t cuts = std::max<int64_t>(1, 4 * threads / std::max<int64_t>(blocks, 1));
    struct Task {
        const Product *product;
        int64_t begin, end, first;
    };
    std::vector<Task> tasks;
    for (int i = 0; i < count; i++) {
        const int64_t tiles = (products[i].rows + TILE - 1) / TILE, parts = std::clamp<int64_t>(tiles / 4, 1, cuts);
        for (int64_t first = 0; first < products[i].n; first += WIDTH)
            for (int64_t part = 0; part < parts; part++)
                tasks.push_back({products + i, tiles * part / parts, tiles * (part + 1) / parts, first});
    }
    const std::vector<RoundedRows> x = round_all(products, count, memory_for_rounded(products, count), pairs, threads);
    parallel_with_torch(int(tasks.size()), threads, [&](int i) {
        const Task &t = tasks[size_t(i)];
        const Product &p = *t.product;
        const int columns = int(std::min<int64_t>(WIDTH, p.n - t.first));
        if (p.integers) return multiply_integers(p, x[size_t(t.product - products)], t.begin, t.end, t.first, columns);
        if (p.rows <= 2 && p.w_stride_k == 1)
            return pairs ? multiply_few<true>(p, t.first, columns) : multiply_few<false>(p, t.first, columns);
        if (pairs)
            multiply_block<true>(p, t.begin, t.end, t.first, columns);
        else
            multiply_block<false>(p, t.begin, t.end, t.first, columns);
    });
}

}  // namespace rwkv_lab
