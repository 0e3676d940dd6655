// Tiles of attention on tensor cores: a block has ROWS rows of one side in shared memory (queries, or keys for their
// gradients), TILES x 16 a warp, and goes over the other side in tiles of COLUMNS. Flash attention: Dao 2023, arXiv:2307.08691.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

constexpr int D = HEAD_WIDTH, CHUNKS = D / 8;                               // of 16 bytes in a row
constexpr int TILES = TILES_OF_WARP, WARPS = 8 / TILES, THREADS = 32 * WARPS;
constexpr int ROWS = 16 * TILES * WARPS, COLUMNS = 64;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// Keys of a tile from `base` on that the queries of this thread see, and whether all rows of the block see all of them.
struct Sight {
    int base_of_row, keys, step;  // row + base_of_row + 1 keys are seen, at most `keys`; step 0: all are

    __device__ Sight(const Layout& at, long long first)
        : base_of_row(int(first + at.keys - at.queries)), keys(int(at.keys)), step(at.causal ? 1 : 0) {}
    __device__ int seen(int row) const { return step ? max(0, min(row + base_of_row + 1, keys)) : keys; }
    __device__ bool is_whole(int base) const { return base + COLUMNS <= seen(0); }
};

// Where a chunk of a row lies: chunks of a row change places by the row's number, so that a column of rows meets all banks.
__device__ inline real* place(real* tile, int row, int chunk) { return tile + row * D + (chunk ^ (row & 7)) * 8; }

// Starts copying rows first .. first + rows - 1 of x, zeros from `end` on.
template <int rows>
__device__ inline void copy_tile(real* tile, const real* x, long long stride, long long first, long long end) {
#pragma unroll
    for (int i = thread(); i < rows * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool there = first + row < end;
        copy_async(place(tile, row, chunk), x + (there ? (first + row) * stride : 0) + chunk * 8, there);
    }
}

// The part (16 rows, 16 columns) of a tile as a factor A.
__device__ inline void load_a(unsigned (&a)[4], real* tile, int row, int k) {
    load_matrices(a, place(tile, row + lane() % 16, 2 * k + lane() / 16));
}

// 16 rows of a tile, 16 of their columns, as two factors B whose columns are these rows: b[0], b[1] and b[2], b[3].
__device__ inline void load_b(unsigned (&b)[4], real* tile, int row, int k) {
    load_matrices(b, place(tile, row + lane() % 8 + lane() / 16 * 8, 2 * k + lane() / 8 % 2));
}

// 16 rows of a tile as the inner dimension, 16 of their columns as the columns of two factors B.
__device__ inline void load_b_transposed(unsigned (&b)[4], real* tile, int row, int k) {
    load_transposed(b, place(tile, row + lane() % 16, 2 * k + lane() / 16));
}

// The rows of a tile from `row` on, kept as factors A.
struct Kept {
    unsigned a[D / 16][TILES][4];

    __device__ void load(real* tile, int row) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k)
#pragma unroll
            for (int t = 0; t < TILES; ++t) load_a(a[k][t], tile, row + 16 * t, k);
    }
};

// sums (16 TILES, 8 n) += left x (8 n rows of `right` from `column` on)^T
template <int n>
__device__ inline void multiply_kept(float (&sums)[TILES][n][4], const Kept& left, real* right, int column) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k)
#pragma unroll
        for (int j = 0; j < n / 2; ++j) {
            unsigned b[4];
            load_b(b, right, column + 16 * j, k);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma(sums[t][2 * j], left.a[k][t], b[0], b[1]);
                mma(sums[t][2 * j + 1], left.a[k][t], b[2], b[3]);
            }
        }
}

// sums (16 TILES, 8 n) += rows of `left` from `row` on x (8 n rows of `right` from `column` on)^T
template <int n>
__device__ inline void multiply(float (&sums)[TILES][n][4], real* left, int row, real* right, int column) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        unsigned a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t) load_a(a[t], left, row + 16 * t, k);
#pragma unroll
        for (int j = 0; j < n / 2; ++j) {
            unsigned b[4];
            load_b(b, right, column + 16 * j, k);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma(sums[t][2 * j], a[t], b[0], b[1]);
                mma(sums[t][2 * j + 1], a[t], b[2], b[3]);
            }
        }
    }
}

// sums (16 TILES, D) += factors (16 TILES, 8 n), rounded, x (8 n rows of `right` from `row` on)
template <int n>
__device__ inline void multiply_rows(float (&sums)[TILES][D / 8][4], const float (&factors)[TILES][n][4], real* right, int row) {
#pragma unroll
    for (int k = 0; k < n / 2; ++k) {
        unsigned a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float(&f)[4] = factors[t][2 * k + half];
                a[t][2 * half] = pair_of(f[0], f[1]);
                a[t][2 * half + 1] = pair_of(f[2], f[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            unsigned b[4];
            load_b_transposed(b, right, row + 16 * k, j);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                mma(sums[t][2 * j], a[t], b[0], b[1]);
                mma(sums[t][2 * j + 1], a[t], b[2], b[3]);
            }
        }
    }
}

template <int n>
__device__ inline void clear(float (&sums)[TILES][n][4]) {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int j = 0; j < n; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[t][j][i] = 0;
}

// Row of this block's tile that the sums' registers 0, 1 (half 0) and 2, 3 (half 1) of tile t belong to.
__device__ inline int row_in_block(int t, int half) { return (warp() * TILES + t) * 16 + lane() / 4 + 8 * half; }

// x[first + row] = factor[t][half] x sums, through shared memory, which nobody else may use by now.
__device__ inline void store_tile(real* tile, const float (&sums)[TILES][D / 8][4], const float (&factor)[TILES][2], real* x, long long stride,
                                  long long first, long long end) {
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned bits = pair_of(sums[t][j][2 * half] * factor[t][half], sums[t][j][2 * half + 1] * factor[t][half]);
                memcpy(place(tile, row_in_block(t, half), j) + lane() % 4 * 2, &bits, 4);
            }
    __syncthreads();
    for (int i = thread(); i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (first + row < end) store_pack(x + (first + row) * stride + chunk * 8, load_pack(place(tile, row, chunk)));
    }
}
