// One way to multiply bytes, included once for each by integer.h, which has its instructions switched on meanwhile:
// INTEGER_PATH names it, INTEGER_WIDTH says how many 32-bit lanes it has, INTEGER_BIAS what is added to int8 codes for it.
// No templates: compilers make those with the instructions of the file's end.

namespace rwkv_lab::INTEGER_PATH {

constexpr int WIDTH = INTEGER_WIDTH, BIAS = INTEGER_BIAS;
typedef int32_t Sums __attribute__((vector_size(4 * WIDTH)));
typedef float Floats __attribute__((vector_size(4 * WIDTH)));

// In every lane, sum + the products of four bytes of w, 0 to 255 (or -128 to 127 where there is no bias), and of x.
INLINE Sums dot(Sums sum, Sums w, Sums x) { return INTEGER_DOT; }

INLINE Sums loaded(const int32_t *from) {
    Sums x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE Floats loaded(const float *from) {
    Floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

// A tile of rows times a panel of 2 WIDTH columns to out[TILE][2 WIDTH].
static void multiply(const IntegerTile &t, float *__restrict__ out) {
    constexpr int PANEL_WIDTH = 2 * WIDTH;
    const int32_t *x = t.x, *w = t.w;
    memset(out, 0, TILE * PANEL_WIDTH * sizeof(float));
    for (int64_t g = 0; g < t.groups; g++) {
        Sums sums[TILE][2];
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) sums[i][0] = sums[i][1] = Sums{} + t.starts[g * TILE + i];
        for (int u = 0; u < t.units_of_group; u++, x += TILE, w += PANEL_WIDTH) {
            const Sums left = loaded(w), right = loaded(w + WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < TILE; i++) {
                const Sums one = Sums{} + x[i];
                sums[i][0] = dot(sums[i][0], left, one);
                sums[i][1] = dot(sums[i][1], right, one);
            }
        }
        const Floats left = loaded(t.w_scales + g * PANEL_WIDTH), right = loaded(t.w_scales + g * PANEL_WIDTH + WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            const float scale = t.x_scales[g * TILE + i];
            float *to = out + i * PANEL_WIDTH;
            const Floats one = loaded(to) + __builtin_convertvector(sums[i][0], Floats) * (left * scale);
            const Floats two = loaded(to + WIDTH) + __builtin_convertvector(sums[i][1], Floats) * (right * scale);
            memcpy(to, &one, sizeof one);
            memcpy(to + WIDTH, &two, sizeof two);
        }
        asm volatile("" : : : "memory");  // `out` stays in the cache: the registers are for the sums
    }
}

}  // namespace rwkv_lab::INTEGER_PATH

#undef INTEGER_PATH
#undef INTEGER_WIDTH
#undef INTEGER_BIAS
#undef INTEGER_DOT
