// Memory as the caller names it: where it begins and how many bytes are there. Every entry point compares these with the
// sizes that it is given before it touches anything, and returns MISFIT where they do not go together.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

namespace rwkv_lab {

struct Span {
    void *data;
    int64_t bytes;

    template <class T = float>
    T *as() const {
        return static_cast<T *>(data);
    }
};

constexpr int64_t FITS = 0, MISFIT = 1;

// The product of sizes, none of them negative; -1 where it is no number.
inline int64_t product_of(std::initializer_list<int64_t> sizes) {
    int64_t out = 1;
    for (int64_t n : sizes)
        if (n < 0 || __builtin_mul_overflow(out, n, &out)) return -1;
    return out;
}

// Whether a span has memory for so many elements of `size` bytes.
inline bool holds(const Span &span, int64_t size, std::initializer_list<int64_t> sizes) {
    const int64_t bytes = product_of({product_of(sizes), size});
    return bytes >= 0 && (bytes == 0 || (span.data != nullptr && span.bytes >= bytes));
}

// The same of a tensor with strides, counted in elements.
inline bool reaches(const Span &span, int64_t size, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
    int64_t last = 1;
    auto stride = strides.begin();
    for (int64_t n : sizes) {
        int64_t more;
        if (n < 1 || *stride < 0 || __builtin_mul_overflow(n - 1, *stride++, &more) || __builtin_add_overflow(last, more, &last))
            return false;
    }
    return holds(span, size, {last});
}

// In builds with -DRWKV_LAB_CHECKED every access to a tensor's row is compared with what is there.
inline void check_access([[maybe_unused]] int64_t at, [[maybe_unused]] int64_t n, [[maybe_unused]] int64_t count) {
#if defined(RWKV_LAB_CHECKED)
    if (at < 0 || n < 0 || at + n > count) {
        fprintf(stderr, "rwkv_lab: elements %lld to %lld of %lld\n", (long long)at, (long long)(at + n), (long long)count);
        abort();
    }
#endif
}

}  // namespace rwkv_lab
