// Sums of arrays: y += x, y += bias by rows, and the column sums of a gradient, which are the gradient of a bias.
#include "common.cuh"

__device__ inline Pack sum_of(const Pack& a, const Pack& b) {
    wide x[PACK], y[PACK];
    widen_pack(x, a);
    widen_pack(y, b);
#pragma unroll
    for (int j = 0; j < PACK; ++j) x[j] += y[j];
    return round_pack(x);
}

// y (n) += x (n)
extern "C" __global__ void __launch_bounds__(256) add(real* y, const real* x, long long n) {
    const long long packs = is_aligned(y) && is_aligned(x) ? n / PACK : 0;
    const long long step = (long long)gridDim.x * blockDim.x, first = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = first; i < packs; i += step) {
        store_pack(y + i * PACK, sum_of(load_pack(y + i * PACK), load_pack(x + i * PACK)));
    }
    for (long long i = packs * PACK + first; i < n; i += step) y[i] = to_real(to_wide(y[i]) + to_wide(x[i]));
}

// y (rows, width), `stride` elements from row to row, += bias (width)
extern "C" __global__ void __launch_bounds__(256) add_bias(real* y, long long stride, const real* bias, long long rows, long long width) {
    const bool packed = is_aligned(y) && is_aligned(bias) && stride % PACK == 0 && width % PACK == 0;
    const int unit = packed ? PACK : 1;
    const long long across = width / unit, total = rows * across, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const long long row = i / across, column = (i - row * across) * unit;
        real* at = y + row * stride + column;
        if (packed) {
            store_pack(at, sum_of(load_pack(at), load_pack(bias + column)));
        } else {
            *at = to_real(to_wide(*at) + to_wide(bias[column]));
        }
    }
}

__device__ inline void add_pack(wide (&sums)[PACK], const Pack& pack) {
    wide x[PACK];
    widen_pack(x, pack);
#pragma unroll
    for (int j = 0; j < PACK; ++j) sums[j] += x[j];
}

// parts (gridDim.y, width) = column sums of dy (rows, width) over the rows that a block row takes: block.x = 32 lanes of a
// pack each, 8 warps that take every eighth row, joined in the order of the warps.
extern "C" __global__ void __launch_bounds__(256) sum_rows(const real* dy, long long stride, wide* parts, long long rows, long long width) {
    __shared__ wide sums[8][32 * PACK];
    const bool packed = is_aligned(dy) && stride % PACK == 0;
    const long long column = ((long long)blockIdx.x * 32 + lane()) * PACK;
    wide own[PACK];
#pragma unroll
    for (int j = 0; j < PACK; ++j) own[j] = 0;
    if (column < width) {
        const bool whole = packed && column + PACK <= width;
        const long long step = 8LL * gridDim.y;
        long long row = blockIdx.y * 8LL + warp();
        for (; whole && row + 3 * step < rows; row += 4 * step) {
            Pack packs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) packs[i] = load_pack(dy + (row + i * step) * stride + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) add_pack(own, packs[i]);
        }
        for (; row < rows; row += step) {
            const real* from = dy + row * stride + column;
            if (whole) {
                add_pack(own, load_pack(from));
            } else {
#pragma unroll
                for (int j = 0; j < PACK; ++j)
                    if (column + j < width) own[j] += to_wide(from[j]);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < PACK; ++j) sums[warp()][j * 32 + lane()] = own[j];
    __syncthreads();
    if (warp() == 0 && column < width) {
#pragma unroll
        for (int j = 0; j < PACK; ++j) {
            wide sum = 0;
            for (int i = 0; i < 8; ++i) sum += sums[i][j * 32 + lane()];
            if (column + j < width) parts[blockIdx.y * width + column + j] = sum;
        }
    }
}

// sums (width) += column sums of parts (count, width), in the order of the parts.
extern "C" __global__ void __launch_bounds__(1024) add_parts(wide* sums, const wide* parts, long long count, long long width) {
    __shared__ wide found[32][32];
    add_column_parts(sums, parts, count, width, width, found);
}
