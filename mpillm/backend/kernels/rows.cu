// Rows of a mixture of experts: sums by row number, scaling, inner products. `stride`: elements from row to row.
#include "common.cuh"

// y[row] += scale[i] x[i] for the places i of each row, one after the other. order (2, n): rows and places, by rows, then places.
// A block takes a place and works only if it is the first of its row.
extern "C" __global__ void __launch_bounds__(128) add_rows(real* y, long long stride, const int* order, const real* x, const wide* scale,
                                                           long long n, long long rows, long long width) {
    const long long first = blockIdx.x;
    const int row = order[first];
    if (row >= rows || (first && order[first - 1] == row)) return;
    for (long long column = (long long)blockIdx.y * blockDim.x + threadIdx.x; column < width; column += (long long)gridDim.y * blockDim.x) {
        real* at = y + row * stride + column;
        wide sum = to_wide(*at);
        for (long long place = first; place < n && order[place] == row; ++place) {
            const int i = order[n + place];
            const wide value = to_wide(x[i * width + column]);
            sum += scale ? scale[i] * value : value;
        }
        *at = to_real(sum);
    }
}

// x (rows, width) *= scale (rows)
extern "C" __global__ void __launch_bounds__(256) scale_rows(real* x, const wide* scale, long long rows, long long width) {
    const bool packed = is_aligned(x) && width % PACK == 0;
    const int unit = packed ? PACK : 1;
    const long long across = width / unit, total = rows * across, step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const wide factor = scale[i / across];
        if (packed) {
            Pack a = load_pack(x + i * PACK);
#pragma unroll
            for (int j = 0; j < PACK; ++j) a.at[j] = to_real(to_wide(a.at[j]) * factor);
            store_pack(x + i * PACK, a);
        } else {
            x[i] = to_real(to_wide(x[i]) * factor);
        }
    }
}

// products (rows) = inner products of the rows of a and b (rows, width): a warp a row.
extern "C" __global__ void __launch_bounds__(256) row_dot(wide* products, const real* a, const real* b, long long rows, long long width) {
    for (long long row = (long long)blockIdx.x * 8 + warp(); row < rows; row += (long long)gridDim.x * 8) {
        const real *left = a + row * width, *right = b + row * width;
        const long long packs = is_aligned(left) && is_aligned(right) ? width / PACK : 0;
        wide sum = 0;
        for (long long i = lane(); i < packs; i += 32) {
            const Pack p = load_pack(left + i * PACK), q = load_pack(right + i * PACK);
#pragma unroll
            for (int j = 0; j < PACK; ++j) sum += to_wide(p.at[j]) * to_wide(q.at[j]);
        }
        for (long long i = packs * PACK + lane(); i < width; i += 32) sum += to_wide(left[i]) * to_wide(right[i]);
        sum = warp_sum(sum);
        if (lane() == 0) products[row] = sum;
    }
}
