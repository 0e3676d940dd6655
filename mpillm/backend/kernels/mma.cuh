// Tensor cores and what feeds them, for bfloat16 and float16: products of 16 x 8 x 16 with float32 sums (mma.sync, sm_80 on),
// loads of 8 x 8 matrices (ldmatrix). Who holds what is told by the PTX manual: lane 4 g + t has of A (16, 16) the rows g, g + 8
// and columns 2 t, 2 t + 1 and 8 more; of the sums (16, 8) the rows g, g + 8 and columns 2 t, 2 t + 1.
#pragma once

#include "common.cuh"

// Two numbers, rounded, in one register; the first in the low half.
__device__ inline unsigned pair_of(float low, float high) {
    const real two[2] = {to_real(low), to_real(high)};
    unsigned bits;
    memcpy(&bits, two, 4);
    return bits;
}

#ifndef EMULATED

// sums += A B
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if REAL == 3
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices; lane i tells where row i % 8 of matrix i / 8 begins, in shared memory.
__device__ inline void load_matrices(unsigned (&r)[4], const real* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

__device__ inline void load_transposed(unsigned (&r)[4], const real* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// Two warps that call it with the same number, 0 to 3, go on when both have. Numbers in the code, as a block would take all
// barriers of the hardware for one in a register.
__device__ inline void pair_barrier(int number) {
    if (number == 0) asm volatile("barrier.cta.sync 1, 64;" ::: "memory");
    else if (number == 1) asm volatile("barrier.cta.sync 2, 64;" ::: "memory");
    else if (number == 2) asm volatile("barrier.cta.sync 3, 64;" ::: "memory");
    else asm volatile("barrier.cta.sync 4, 64;" ::: "memory");
}

#else

inline float half_of(unsigned bits, int which) {
    real two[2];
    memcpy(two, &bits, 4);
    return to_wide(two[which]);
}

inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Factors {
        unsigned a[4], b[2];
    } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Lanes<Factors> lanes = warp_exchange(mine, 20);
    const int g = emulated_lane() / 4, t = emulated_lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const unsigned left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], right = lanes[column * 4 + k % 8 / 2].b[k / 8];
            c[i] += half_of(left, k % 2) * half_of(right, k % 2);
        }
    }
}

inline void load_matrices(unsigned (&r)[4], const real* row) {
    const Lanes<const real*> rows = warp_exchange(row, 21);
    for (int i = 0; i < 4; ++i) memcpy(&r[i], rows[8 * i + emulated_lane() / 4] + emulated_lane() % 4 * 2, 4);
}

inline void load_transposed(unsigned (&r)[4], const real* row) {
    const Lanes<const real*> rows = warp_exchange(row, 22);
    for (int i = 0; i < 4; ++i) {
        const int column = emulated_lane() / 4, first = 8 * i + emulated_lane() % 4 * 2;
        const real two[2] = {rows[first][column], rows[first + 1][column]};
        memcpy(&r[i], two, 4);
    }
}

inline void pair_barrier(int) { __syncthreads(); }  // more than it is: all warps call it as often

#endif
