// Tiles of attention on tensor cores: a block has ROWS rows of one side in shared memory (queries, or keys for their
// gradients), 32 a warp, and goes over the other side tile by tile. Flash attention: Dao 2023, arXiv:2307.08691.
#pragma once

#include "attention.cuh"
#include "mma.cuh"

constexpr int D = HEAD_WIDTH, CHUNKS = D / 8;                  // of 16 bytes in a row
constexpr int TILES = 2, ROW_WARPS = 4, ROWS = 16 * TILES * ROW_WARPS;  // of 16 rows a warp; warps that share the rows
constexpr float LOG2_E = 1.4426950408889634f;

// The first of this warp's rows in the block, and the row of the sums' registers 0, 1 (half 0) and 2, 3 (half 1) of tile t.
__device__ inline int row_of_warp() { return warp() % ROW_WARPS * TILES * 16; }
__device__ inline int row_in_block(int t, int half) { return row_of_warp() + t * 16 + lane() / 4 + 8 * half; }

// Keys of a tile from `base` on that the queries of this thread see, and whether all rows of the block see all of them.
struct Sight {
    int base_of_row, keys, step;  // row + base_of_row + 1 keys are seen, at most `keys`; step 0: all are

    __device__ Sight(const Layout& at, int first)
        : base_of_row(first + int(at.keys - at.queries)), keys(int(at.keys)), step(at.causal ? 1 : 0) {}
    __device__ int seen(int row) const { return step ? max(0, min(row + base_of_row + 1, keys)) : keys; }
    __device__ bool is_whole(int end) const { return end <= seen(0); }
};

// Where a chunk of a row lies: chunks of a row change places by the row's number, so that a column of rows meets all banks.
__device__ inline real* place(real* tile, int row, int chunk) { return tile + row * D + (chunk ^ (row & 7)) * 8; }

// Starts copying rows first .. first + rows - 1 of x, zeros from `end` on; by `threads` threads, which take a chunk of each
// row_step-th row, so that a thread's places differ by constants.
template <int rows, int threads>
__device__ inline void copy_tile(real* tile, const real* x, long long stride, int first, int end) {
    constexpr int row_step = threads / CHUNKS;
    static_assert(row_step % 8 == 0 && rows % row_step == 0, "the same place in each row");
    const int row = thread() / CHUNKS, chunk = thread() % CHUNKS;
    real* to = place(tile, row, chunk);
    const real *from = x + (first + row) * stride + chunk * 8, *source = from;
    if (first + rows <= end) {
#pragma unroll
        for (int i = 0; i < rows / row_step; ++i, source += row_step * stride) copy_async(to + i * row_step * D, source, true);
    } else {
#pragma unroll
        for (int i = 0; i < rows / row_step; ++i, source += row_step * stride) {
            const bool there = first + row + i * row_step < end;
            copy_async(to + i * row_step * D, there ? source : x, there);
        }
    }
}

// Where a lane's part of the first 16 rows lies, for load_a and load_b. The part 16 k columns on is the same place ^ 16 k: k
// changes other bits of the chunk's number than the lane does.
__device__ inline int place_a() { return int(place(nullptr, lane() % 16, lane() / 16) - static_cast<real*>(nullptr)); }
__device__ inline int place_b() {
    return int(place(nullptr, lane() % 8 + lane() / 16 * 8, lane() / 8 % 2) - static_cast<real*>(nullptr));
}

// The part (16 rows, 16 columns) of a tile as a factor A.
__device__ inline void load_a(unsigned (&a)[4], real* tile, int row, int k) { load_matrices(a, tile + (place_a() ^ 16 * k) + row * D); }

// 16 rows of a tile, 16 of their columns, as two factors B whose columns are these rows: b[0], b[1] and b[2], b[3].
__device__ inline void load_b(unsigned (&b)[4], real* tile, int row, int k) { load_matrices(b, tile + (place_b() ^ 16 * k) + row * D); }

// 16 rows of a tile as the inner dimension, 16 of their columns as the columns of two factors B.
__device__ inline void load_b_transposed(unsigned (&b)[4], real* tile, int row, int k) {
    load_transposed(b, tile + (place_a() ^ 16 * k) + row * D);
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

// sums (16 TILES, 8 n) += left, of columns 16 k .. 16 k + 15, x (8 n rows of `right` from `column` on)^T
template <int n>
__device__ inline void multiply_part(float (&sums)[TILES][n][4], const unsigned (&left)[TILES][4], real* right, int column, int k) {
#pragma unroll
    for (int j = 0; j < n / 2; ++j) {
        unsigned b[4];
        load_b(b, right, column + 16 * j, k);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            mma(sums[t][2 * j], left[t], b[0], b[1]);
            mma(sums[t][2 * j + 1], left[t], b[2], b[3]);
        }
    }
}

template <int n>
__device__ inline void multiply_kept(float (&sums)[TILES][n][4], const Kept& left, real* right, int column) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) multiply_part(sums, left.a[k], right, column, k);
}

// sums (16 TILES, 8 n) += rows of `left` from `row` on x (8 n rows of `right` from `column` on)^T
template <int n>
__device__ inline void multiply(float (&sums)[TILES][n][4], real* left, int row, real* right, int column) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        unsigned a[TILES][4];
#pragma unroll
        for (int t = 0; t < TILES; ++t) load_a(a[t], left, row + 16 * t, k);
        multiply_part(sums, a, right, column, k);
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

// x[first + row] = factor[t][half] x sums, through shared memory, which nobody else may use by now; by ROW_WARPS warps, while
// others may do the same with another tile.
__device__ inline void store_tile(real* tile, const float (&sums)[TILES][D / 8][4], const float (&factor)[TILES][2], real* x, long long stride,
                                  int first, int end) {
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
    for (int i = thread() % (32 * ROW_WARPS); i < ROWS * CHUNKS; i += 32 * ROW_WARPS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        if (first + row < end) store_pack(x + (first + row) * stride + chunk * 8, load_pack(place(tile, row, chunk)));
    }
}
