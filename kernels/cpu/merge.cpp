// What a merge computes for every value: a change of low rank added to rows of a matrix and rounded once, and how much of
// the change is in the output, in one pass.
//
// The change is d = value - base, and what arrived of it a = output - base. Sums of squares and products are taken in
// float32 over some thousand elements, in as many parts as a vector has lanes, and those sums are added in float64.
#include "elements.h"
#include "spans.h"

namespace {

using namespace rwkv_lab;

constexpr int64_t CHUNK = 4096;  // elements of one sum in float32

INLINE Vec magnitude(Vec x) { return (Vec)((Ints)x & INT32_MAX); }

struct Sums {
    Vec wanted{}, along{}, size{};  // d·d, d·a, Σ |base|
    Ints moved{};                   // minus the number of elements in which a is not 0

    INLINE void add(Vec value, Vec base, Vec output) {
        const Vec d = value - base, a = output - base;
        wanted += d * d;
        along += d * a;
        size += magnitude(base);
        moved += a != Vec{};
    }

    INLINE void add_to(double *out) const {
        out[0] -= sum(__builtin_convertvector(moved, Vec));
        out[1] += sum(wanted);
        out[2] += sum(along);
        out[3] += sum(size);
    }
};

// ------------------------------------------------------------------ of values that were computed elsewhere

// LANES elements, those behind the first n as zeros.
template <int DTYPE>
Vec first_elements(const void *data, int64_t i, int64_t n) {
    constexpr int SIZE = int(DTYPE == FLOAT32 ? 4 : 2);
    char there[SIZE * LANES]{};
    memcpy(there, static_cast<const char *>(data) + i * SIZE, size_t(n) * SIZE);
    return elements<DTYPE>(there, 0);
}

template <int BASE, int OUTPUT>
void measure(const float *values, const void *base, const void *output, int64_t n, double *out) {
    for (int64_t first = 0; first < n; first += CHUNK) {
        const int64_t end = std::min(first + CHUNK, n);
        Sums sums;
        int64_t i = first;
        for (; i + LANES <= end; i += LANES)
            sums.add(load(values + i), elements<BASE>(base, i), elements<OUTPUT>(output, i));
        if (const int64_t left = end - i; left > 0)
            sums.add(first_elements<FLOAT32>(values, i, left), first_elements<BASE>(base, i, left),
                     first_elements<OUTPUT>(output, i, left));
        sums.add_to(out);
    }
}

// ------------------------------------------------------------------ of a change of low rank

constexpr int ROWS = 6, NV = REGISTERS == 32 ? 4 : 2, COLUMNS = NV * LANES;  // of a tile, whose sums are held in registers
constexpr int64_t GROUP = std::max<int64_t>(CHUNK / (ROWS * COLUMNS), 1) * ROWS;  // rows of one sum

// base + product, and where nothing is added the base itself: -0 + 0 would be 0.
INLINE Vec added(Vec base, Vec product) {
    const Vec value = unfused(base + product);
    return product == Vec{} ? base : value;
}

// The sums of products in ROWS rows of `left` with a panel [k][COLUMNS] of the other factor.
INLINE void multiply(Vec (&product)[ROWS][NV], const float *const (&left)[ROWS], const float *panel, int64_t k) {
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < NV; v++) product[i][v] = Vec{};
    for (int64_t j = 0; j < k; j++) {
        Vec right[NV];
        for (int v = 0; v < NV; v++) right[v] = held(load(panel + j * COLUMNS + v * LANES));
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            const Vec factor = broadcast(left[i][j]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) product[i][v] += factor * right[v];
        }
    }
}

struct Matrix {
    const float *left, *right;  // [rows][k], [k][columns]
    const char *base;
    char *output;
    int64_t rows, columns, k;
};

// Columns first .. first + width - 1 of rows top .. bottom - 1.
template <int DTYPE>
INLINE void tiles(const Matrix &m, const float *panel, int64_t first, int64_t width, int64_t top, int64_t bottom, Sums &sums) {
    constexpr int SIZE = int(DTYPE == FLOAT32 ? 4 : 2);
    for (int64_t row = top; row < bottom; row += ROWS) {
        const float *left[ROWS];
        for (int i = 0; i < ROWS; i++) left[i] = m.left + std::min(row + i, bottom - 1) * m.k;
        Vec product[ROWS][NV];
        multiply(product, left, panel, m.k);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            if (row + i >= bottom) break;
            const int64_t at = ((row + i) * m.columns + first) * SIZE;
            char edge[SIZE * COLUMNS]{};  // where a row ends inside the tile
            const bool whole = width == COLUMNS;
            if (!whole) memcpy(edge, m.base + at, size_t(width) * SIZE);
            const char *from = whole ? m.base + at : edge;
            char *to = whole ? m.output + at : edge;
            for (int v = 0; v < NV; v++) {
                const Vec base = elements<DTYPE>(from, v * LANES), value = added(base, product[i][v]);
                sums.add(value, base, store_elements<DTYPE>(to, v * LANES, value));
            }
            if (!whole) memcpy(m.output + at, edge, size_t(width) * SIZE);
        }
    }
}

template <int DTYPE>
void add_low_rank(const Matrix &m, double *out) {
    float *panel = workspace(size_t(m.k) * COLUMNS);
    for (int64_t first = 0; first < m.columns; first += COLUMNS) {
        const int64_t width = std::min<int64_t>(COLUMNS, m.columns - first);
        for (int64_t j = 0; j < m.k; j++) {
            float *row = panel + j * COLUMNS;
            memcpy(row, m.right + j * m.columns + first, size_t(width) * sizeof(float));
            std::fill(row + width, row + COLUMNS, 0.0f);
        }
        for (int64_t top = 0; top < m.rows; top += GROUP) {
            Sums sums;
            tiles<DTYPE>(m, panel, first, width, top, std::min(top + GROUP, m.rows), sums);
            sums.add_to(out);
        }
    }
}

}  // namespace

// values [n] float32, base [n] and output [n] of any dtype; the base's values are numbers of the output's dtype.
// sums [4] float64: how many of the output are not the base's, d·d, d·a, Σ |base|. Where the second or third is not finite
// they mean nothing: there is NaN or infinity among the values, or squares are too large for float32.
extern "C" int64_t merge_effect(Span values, Span base, int64_t base_dtype, Span output, int64_t output_dtype, int64_t n, Span sums) {
    if (!is_dtype(base_dtype) || !is_dtype(output_dtype)) return MISFIT;
    if (!holds(values, 4, {n}) || !holds(base, size_of(base_dtype), {n}) || !holds(output, size_of(output_dtype), {n})) return MISFIT;
    if (!holds(sums, 8, {4})) return MISFIT;
    double *out = sums.as<double>();
    std::fill(out, out + 4, 0.0);
    const auto with = [&](auto base_of, auto output_of) {
        measure<decltype(base_of)::value, decltype(output_of)::value>(values.as<float>(), base.data, output.data, n, out);
    };
    const auto with_base = [&](auto base_of) {
        if (output_dtype == FLOAT32) return with(base_of, std::integral_constant<int, FLOAT32>{});
        if (output_dtype == BFLOAT16) return with(base_of, std::integral_constant<int, BFLOAT16>{});
        with(base_of, std::integral_constant<int, FLOAT16>{});
    };
    if (base_dtype == FLOAT32)
        with_base(std::integral_constant<int, FLOAT32>{});
    else if (base_dtype == BFLOAT16)
        with_base(std::integral_constant<int, BFLOAT16>{});
    else
        with_base(std::integral_constant<int, FLOAT16>{});
    return FITS;
}

// base [rows, columns] + left [rows, k] right [k, columns] -> output [rows, columns], rounded once; base and output of the
// same dtype, float32 or bfloat16. sums [4] as of merge_effect; where those are not finite, `output` means nothing either.
extern "C" int64_t merge_low_rank(Span base, Span left, Span right, Span output, int64_t dtype, int64_t rows, int64_t columns,
                                  int64_t k, Span sums) {
    if (dtype != FLOAT32 && dtype != BFLOAT16) return MISFIT;
    const int64_t size = size_of(dtype);
    if (!holds(base, size, {rows, columns}) || !holds(output, size, {rows, columns})) return MISFIT;
    if (!holds(left, 4, {rows, k}) || !holds(right, 4, {k, columns}) || !holds(sums, 8, {4})) return MISFIT;
    double *out = sums.as<double>();
    std::fill(out, out + 4, 0.0);
    const Matrix m{left.as<float>(), right.as<float>(), base.as<char>(), output.as<char>(), rows, columns, k};
    if (dtype == FLOAT32)
        add_low_rank<FLOAT32>(m, out);
    else
        add_low_rank<BFLOAT16>(m, out);
    return FITS;
}
