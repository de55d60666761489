// One warp's products of small bf16 matrices with sums in float, and how their operands come from shared memory.
// Each instruction has a twin for the emulation that follows the same layout, given here once:
//
// lane = 4 g + q holds, of an operand A [16,16]: x[0] (g, 2q..2q+1), x[1] (g+8, 2q..), x[2] (g, 2q+8..),
// x[3] (g+8, 2q+8..); of an operand B [16,8]: x[0] (2q..2q+1, g), x[1] (2q+8.., g); of the sums C [16,8]:
// c[0], c[1] (g, 2q..2q+1), c[2], c[3] (g+8, 2q..). Two neighbouring C are an A when rounded: nothing has to move.
#pragma once

#include "platform.cuh"

using bf16 = __nv_bfloat16;

struct FragmentA {
    unsigned x[4];
};

struct FragmentsB {  // two operands B, of columns 0-7 and 8-15
    unsigned x[4];
};

// The low half is the element that comes first in memory.
__device__ __forceinline__ unsigned pack(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    unsigned both;
    memcpy(&both, &pair, sizeof both);
    return both;
}

__device__ __forceinline__ FragmentA as_operand(const float (&left)[4], const float (&right)[4]) {
    return {{pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]), pack(right[2], right[3])}};
}

#ifdef __CUDACC__

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

// c += A B
__device__ __forceinline__ void multiply_add(float (&c)[4], const FragmentA& a, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices: lane 8 m + i says where row i of matrix m is. Lane 4 g + q gets of each the elements
// (g, 2q..2q+1), or, transposed, (2q..2q+1, g).
template <bool TRANSPOSED>
__device__ __forceinline__ void load_four(unsigned (&x)[4], const bf16* row) {
    const unsigned address = __cvta_generic_to_shared(row);
    if constexpr (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(address)
                     : "memory");
    }
}

// A barrier for `threads` threads of the block; numbers are 1 to 15, 0 is that of __syncthreads.
__device__ __forceinline__ void meet(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

#else

inline int lane_of_warp() { return emulation::lane(); }

inline void multiply_add(float (&c)[4], const FragmentA& a, unsigned b0, unsigned b1) {
    struct Operands {
        FragmentA a;
        unsigned b[2];
    };
    const auto element = [](unsigned pair, int which) {
        return std::bit_cast<float>(which ? pair & 0xffff0000u : pair << 16);
    };
    emulation::among_lanes(Operands{a, {b0, b1}}, [&](auto of) {
        const int g = emulation::lane() / 4, q = emulation::lane() % 4;
        for (int i = 0; i < 4; ++i) {
            const int column = 2 * q + i % 2;
            for (int k = 0; k < 16; ++k) {
                const float left = element(of(4 * g + k % 8 / 2).a.x[i / 2 + 2 * (k / 8)], k % 2);
                const float right = element(of(4 * column + k % 8 / 2).b[k / 8], k % 2);
                c[i] += left * right;
            }
        }
    });
}

template <bool TRANSPOSED>
void load_four(unsigned (&x)[4], const bf16* row) {
    emulation::among_lanes(row, [&](auto of) {
        const int g = emulation::lane() / 4, q = emulation::lane() % 4;
        for (int m = 0; m < 4; ++m) {
            bf16 pair[2];
            for (int i = 0; i < 2; ++i) pair[i] = TRANSPOSED ? of(8 * m + 2 * q + i)[g] : of(8 * m + g)[2 * q + i];
            std::memcpy(&x[m], pair, sizeof x[m]);
        }
    });
}

inline void meet(int number, int threads) { emulation::block->among(number, threads).wait(); }

#endif

// The operands of X Yᵀ: rows of both are contiguous. X is [16, from column k on].
template <int STRIDE>
__device__ __forceinline__ FragmentA rows_as_a(const bf16 (*x)[STRIDE], int k) {
    const int lane = lane_of_warp();
    FragmentA a;
    load_four<false>(a.x, &x[lane % 16][k + lane / 16 * 8]);
    return a;
}

// Yᵀ, Y being [16 rows, from column k on].
template <int STRIDE>
__device__ __forceinline__ FragmentsB rows_as_b(const bf16 (*y)[STRIDE], int k) {
    const int lane = lane_of_warp();
    FragmentsB b;
    load_four<false>(b.x, &y[lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
    return b;
}

// The operands of Xᵀ Y: columns of both run along what is summed over. Xᵀ, X being [16, from column m on].
template <int STRIDE>
__device__ __forceinline__ FragmentA columns_as_a(const bf16 (*x)[STRIDE], int m) {
    const int lane = lane_of_warp();
    FragmentA a;
    load_four<true>(a.x, &x[lane / 16 * 8 + lane % 8][m + lane / 8 % 2 * 8]);
    return a;
}

// Y itself, [16, from column n on].
template <int STRIDE>
__device__ __forceinline__ FragmentsB columns_as_b(const bf16 (*y)[STRIDE], int n) {
    const int lane = lane_of_warp();
    FragmentsB b;
    load_four<true>(b.x, &y[lane % 16][n + lane / 16 * 8]);
    return b;
}

// Both halves of sums C [16,16] += A B.
__device__ __forceinline__ void multiply_add(float (&c)[2][4], const FragmentA& a, const FragmentsB& b) {
    multiply_add(c[0], a, b.x[0], b.x[1]);
    multiply_add(c[1], a, b.x[2], b.x[3]);
}
