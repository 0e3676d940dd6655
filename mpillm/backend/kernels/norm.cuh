// LayerNorm (CENTRED) and RMSNorm over rows of (rows, width), forward and backward, with a residual in the same pass.
// Fast form: a row lies in the registers of WARPS warps, PACKS packs a lane; a block has 8 warps. Else (PACKS = 0) the general
// one: a warp a row, one element at a time.
#pragma once

#include "common.cuh"

constexpr int BLOCK_WARPS = 8;

__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }    // rounded, not a part of an FMA: the difference
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }  // of two equal ones is 0

#if PACKS > 0
constexpr int GROUPS = BLOCK_WARPS / WARPS;  // of warps that share a row

// Sums over the lanes of the warps of a row, in all of them.
template <int n>
__device__ inline void row_sums(wide (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = warp_sum(x[i]);
    if (WARPS == 1) return;
    __shared__ wide scratch[n][BLOCK_WARPS];
    if (lane() == 0)
        for (int i = 0; i < n; ++i) scratch[i][warp()] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
        x[i] = 0;
        for (int other = 0; other < WARPS; ++other) x[i] += scratch[i][warp() / WARPS * WARPS + other];
    }
    __syncthreads();
}

// This lane's packs of a row: where pack i begins, and whether it has it; `whole`: rows are as wide as all lanes' packs.
struct Lane {
    int first, width;

    __device__ explicit Lane(long long width) : first((warp() % WARPS * 32 + lane()) * PACK), width(int(width)) {}
    __device__ int column(int i) const { return first + i * WARPS * 32 * PACK; }
    template <bool whole>
    __device__ bool has(int i) const { return whole || column(i) < width; }

    // Zeros where it has none.
    template <bool whole>
    __device__ void load(Pack (&packs)[PACKS], const real* row) const {
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            if (has<whole>(i)) packs[i] = load_pack(row + column(i));
            else packs[i] = {};
        }
    }
};

__device__ inline bool is_whole(long long width) { return width == PACKS * WARPS * 32 * PACK; }

#if WARPS == 1 || PACKS == 8
template <bool whole>
__device__ inline void forward_rows(real* y, wide* mean, wide* rstd, real* x, const real* residual, const real* weight, const real* bias,
                                    wide eps, long long rows, long long width) {
    const Lane own(width);
    const wide share = wide(1) / wide(width);
    for (long long base = (long long)blockIdx.x * GROUPS; base < rows; base += (long long)gridDim.x * GROUPS) {
        const bool there = base + warp() / WARPS < rows;
        const long long row = there ? base + warp() / WARPS : rows - 1;  // beyond the last row that one again, and nothing is stored
        Pack packs[PACKS], others[PACKS];
        own.load<whole>(packs, x + row * width);
        if (residual) own.load<whole>(others, residual + row * width);
        wide values[PACKS][PACK], centre[1] = {0}, scale[1] = {0};
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            widen_pack(values[i], packs[i]);
            if (residual) {
                wide other[PACK];
                widen_pack(other, others[i]);
#pragma unroll
                for (int j = 0; j < PACK; ++j) values[i][j] += other[j];
                const Pack rounded = round_pack(values[i]);
                if (there && own.has<whole>(i)) store_pack(x + row * width + own.column(i), rounded);
                widen_pack(values[i], rounded);
            }
            if (CENTRED)
#pragma unroll
                for (int j = 0; j < PACK; ++j) centre[0] += values[i][j];
        }
        if (CENTRED) row_sums(centre);
        centre[0] *= share;
#pragma unroll
        for (int i = 0; i < PACKS; ++i)
            if (own.has<whole>(i))
#pragma unroll
                for (int j = 0; j < PACK; ++j) {
                    if (CENTRED) values[i][j] -= centre[0];
                    scale[0] += values[i][j] * values[i][j];
                }
        row_sums(scale);
        scale[0] = 1 / sqrt(scale[0] * share + eps);
        if (!there) continue;
        if (warp() % WARPS == 0 && lane() == 0) {
            rstd[row] = scale[0];
            if (CENTRED) mean[row] = centre[0];
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            if (!own.has<whole>(i)) continue;
            wide w[PACK], b[PACK];
            widen_pack(w, load_pack(weight + own.column(i)));
            if (CENTRED) widen_pack(b, load_pack(bias + own.column(i)));
#pragma unroll
            for (int j = 0; j < PACK; ++j) values[i][j] = values[i][j] * scale[0] * w[j] + (CENTRED ? b[j] : wide(0));
            store_pack(y + row * width + own.column(i), round_pack(values[i]));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, PACKS <= 3 ? 4 : 2)
    forward(real* y, wide* mean, wide* rstd, real* x, const real* residual, const real* weight, const real* bias, double eps, long long rows,
            long long width) {
    if (is_whole(width)) forward_rows<true>(y, mean, rstd, x, residual, weight, bias, wide(eps), rows, width);
    else forward_rows<false>(y, mean, rstd, x, residual, weight, bias, wide(eps), rows, width);
}
#endif

#if WARPS == 8 || PACKS <= 3
template <bool whole>
__device__ inline void backward_rows(wide (&dweight)[PACKS][PACK], wide (&dbias)[PACKS][PACK], real* dx, const real* dy, const real* x,
                                     const real* residual, const real* weight, const wide* mean, const wide* rstd, long long rows,
                                     long long width) {
    const Lane own(width);
    const wide share = wide(1) / wide(width);
    for (long long base = (long long)blockIdx.x * GROUPS; base < rows; base += (long long)gridDim.x * GROUPS) {
        const long long row = base + warp() / WARPS;
        const bool there = row < rows;
        Pack slopes[PACKS], values[PACKS], others[PACKS];
        wide scale = 0, centre = 0, sums[2] = {0, 0};
        if (there) {
            own.load<whole>(slopes, dy + row * width);
            own.load<whole>(values, x + row * width);
            if (residual) own.load<whole>(others, residual + row * width);
            scale = rstd[row];
            if (CENTRED) centre = mean[row];
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            if (!there || !own.has<whole>(i)) continue;
            wide w[PACK], slope[PACK], normed[PACK];
            widen_pack(w, load_pack(weight + own.column(i)));
            widen_pack(slope, slopes[i]);
            widen_pack(normed, values[i]);
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                normed[j] = (normed[j] - centre) * scale;
                dweight[i][j] += slope[j] * normed[j];
                if (CENTRED) dbias[i][j] += slope[j];
                slope[j] = product(slope[j], w[j]);
                if (CENTRED) sums[0] += slope[j];
                sums[1] += slope[j] * normed[j];
            }
        }
        row_sums(sums);
        const wide offset = -sums[0] * share, tilt = -sums[1] * share;
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {  // what the sums were made of is made again: there are no registers to keep it
            if (!there || !own.has<whole>(i)) continue;
            wide w[PACK], slope[PACK], normed[PACK];
            widen_pack(w, load_pack(weight + own.column(i)));
            widen_pack(slope, slopes[i]);
            widen_pack(normed, values[i]);
#pragma unroll
            for (int j = 0; j < PACK; ++j) slope[j] = (product(slope[j], w[j]) + offset + (normed[j] - centre) * scale * tilt) * scale;
            if (residual) {
                widen_pack(normed, others[i]);
#pragma unroll
                for (int j = 0; j < PACK; ++j) slope[j] += normed[j];
            }
            store_pack(dx + row * width + own.column(i), round_pack(slope));
        }
    }
}

// dx, and in parts (gridDim.x, CENTRED + 1, width) the sums over this block's rows for dweight and dbias.
extern "C" __global__ void __launch_bounds__(256, PACKS <= 3 ? 2 : 1)
    backward(real* dx, wide* parts, const real* dy, const real* x, const real* residual, const real* weight, const wide* mean, const wide* rstd,
             long long rows, long long width) {
    DYNAMIC_SHARED(memory);  // (GROUPS, width) wide
    wide dweight[PACKS][PACK], dbias[PACKS][PACK];
#pragma unroll
    for (int i = 0; i < PACKS; ++i)
#pragma unroll
        for (int j = 0; j < PACK; ++j) dweight[i][j] = dbias[i][j] = 0;
    if (is_whole(width)) backward_rows<true>(dweight, dbias, dx, dy, x, residual, weight, mean, rstd, rows, width);
    else backward_rows<false>(dweight, dbias, dx, dy, x, residual, weight, mean, rstd, rows, width);
    wide* sums = reinterpret_cast<wide*>(memory);
    const Lane own(width);
#pragma unroll
    for (int which = 0; which <= CENTRED; ++which) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            if (!own.has<false>(i)) continue;
#pragma unroll
            for (int j = 0; j < PACK; ++j) sums[warp() / WARPS * width + own.column(i) + j] = which ? dbias[i][j] : dweight[i][j];
        }
        __syncthreads();
        for (long long column = thread(); column < width; column += blockDim.x) {
            wide sum = 0;
            for (int group = 0; group < GROUPS; ++group) sum += sums[group * width + column];
            parts[((long long)blockIdx.x * (CENTRED + 1) + which) * width + column] = sum;
        }
    }
}
#endif

#else

extern "C" __global__ void __launch_bounds__(256) forward(real* y, wide* mean, wide* rstd, real* x, const real* residual, const real* weight,
                                                          const real* bias, double eps, long long rows, long long width) {
    for (long long row = (long long)blockIdx.x * BLOCK_WARPS + warp(); row < rows; row += (long long)gridDim.x * BLOCK_WARPS) {
        real* at = x + row * width;
        wide sum = 0, square = 0;
        for (long long c = lane(); c < width; c += 32) {
            if (residual) at[c] = to_real(to_wide(at[c]) + to_wide(residual[row * width + c]));
            sum += to_wide(at[c]);
        }
        const wide centre = CENTRED ? warp_sum(sum) / width : wide(0);
        for (long long c = lane(); c < width; c += 32) square += (to_wide(at[c]) - centre) * (to_wide(at[c]) - centre);
        const wide scale = 1 / sqrt(warp_sum(square) / width + wide(eps));
        for (long long c = lane(); c < width; c += 32) {
            wide value = (to_wide(at[c]) - centre) * scale * to_wide(weight[c]);
            if (CENTRED) value += to_wide(bias[c]);
            y[row * width + c] = to_real(value);
        }
        if (lane() == 0) {
            rstd[row] = scale;
            if (CENTRED) mean[row] = centre;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) backward(real* dx, const real* dy, const real* x, const real* residual, const real* weight,
                                                           const wide* mean, const wide* rstd, long long rows, long long width) {
    for (long long row = (long long)blockIdx.x * BLOCK_WARPS + warp(); row < rows; row += (long long)gridDim.x * BLOCK_WARPS) {
        const long long start = row * width;
        const wide scale = rstd[row], centre = CENTRED ? mean[row] : wide(0);
        wide sum = 0, tilt = 0;
        for (long long c = lane(); c < width; c += 32) {
            const wide dnormed = product(to_wide(dy[start + c]), to_wide(weight[c]));
            sum += dnormed;
            tilt += dnormed * (to_wide(x[start + c]) - centre) * scale;
        }
        sum = CENTRED ? warp_sum(sum) / width : wide(0);
        tilt = warp_sum(tilt) / width;
        for (long long c = lane(); c < width; c += 32) {
            const wide normed = (to_wide(x[start + c]) - centre) * scale;
            wide value = scale * (product(to_wide(dy[start + c]), to_wide(weight[c])) - sum - normed * tilt);
            if (residual) value += to_wide(residual[start + c]);
            dx[start + c] = to_real(value);
        }
    }
}

// parts (gridDim.y, CENTRED + 1, width): a thread a column, every gridDim.y-th row.
extern "C" __global__ void __launch_bounds__(256) column_sums(wide* parts, const real* dy, const real* x, const wide* mean, const wide* rstd,
                                                              long long rows, long long width) {
    const long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= width) return;
    wide dweight = 0, dbias = 0;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        const wide slope = to_wide(dy[row * width + column]), centre = CENTRED ? mean[row] : wide(0);
        dweight += slope * (to_wide(x[row * width + column]) - centre) * rstd[row];
        dbias += slope;
    }
    parts[((long long)blockIdx.y * (CENTRED + 1)) * width + column] = dweight;
    if (CENTRED) parts[((long long)blockIdx.y * 2 + 1) * width + column] = dbias;
}
#endif

// dweight, dbias (width) += the sums over parts (count, CENTRED + 1, width), in the order of the parts; block row 0 and 1.
extern "C" __global__ void __launch_bounds__(1024) add_parts(wide* dweight, wide* dbias, const wide* parts, long long count, long long width) {
    __shared__ wide found[32][32];
    add_column_parts(blockIdx.y ? dbias : dweight, parts + blockIdx.y * width, count, (CENTRED + 1) * width, width, found);
}
