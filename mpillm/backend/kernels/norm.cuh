// LayerNorm (CENTRED) and RMSNorm over rows of (rows, width), forward and backward, with a residual in the same pass.
// Fast form: a row is done by WARPS warps, PACKS packs a lane; 8 / WARPS rows in a block at a time. Else (PACKS = 0) the
// general one: a warp a row, one element at a time.
#pragma once

#include "common.cuh"

constexpr int BLOCK_WARPS = 8;

#if PACKS > 0
constexpr int GROUPS = BLOCK_WARPS / WARPS;  // rows of a block at a time

struct Two {
    wide first, second;
};

// Sums over the lanes of the warps of a row, in all of them.
__device__ inline Two row_sums(Two x, Two* scratch) {
    x = {warp_sum(x.first), warp_sum(x.second)};
    if (WARPS == 1) return x;
    if (lane() == 0) scratch[warp()] = x;
    __syncthreads();
    const int begin = warp() / WARPS * WARPS;
    x = scratch[begin];
    for (int i = 1; i < WARPS; ++i) x = {x.first + scratch[begin + i].first, x.second + scratch[begin + i].second};
    __syncthreads();
    return x;
}

// Where a lane's pack number i of its row begins.
__device__ inline int column_of(int i) { return ((i * WARPS + warp() % WARPS) * 32 + lane()) * PACK; }

constexpr int STAGES = PACKS <= 4 ? 2 : 1;  // rows of a warp in shared memory: one, and the next, which is on its way

// This lane's packs of its rows of some arrays, in shared memory. It copies and reads them itself, so nobody waits.
struct Slots {
    Pack* front;
    int arrays;

    __device__ Slots(unsigned char* memory, int arrays) : front(reinterpret_cast<Pack*>(memory) + thread()), arrays(arrays) {}
    __device__ Pack& at(int stage, int array, int i) const { return front[((stage * arrays + array) * PACKS + i) * 32 * BLOCK_WARPS]; }

    __device__ void copy(int stage, int array, const real* x, long long row, long long rows, long long width) const {
#pragma unroll
        for (int i = 0; i < PACKS; ++i)
            if (row < rows && column_of(i) < width) copy_async(&at(stage, array, i), x + row * width + column_of(i), true);
    }
};

// The rows of this warp, one after the other: copies of the next one run while `work` (row, stage) does one.
template <class Start, class Work>
__device__ inline void for_rows(long long rows, Start start, Work work) {
    const long long first = (long long)blockIdx.x * GROUPS + warp() / WARPS, step = (long long)gridDim.x * GROUPS;
    int stage = 0;
    start(first, 0);
    commit_copies();
    for (long long row = first; row - warp() / WARPS < rows; row += step) {
        if (STAGES == 2) start(row + step, stage ^ 1);
        commit_copies();
        wait_copies<1>();
        if (STAGES == 1) wait_copies<0>();
        work(row, stage);
        if (STAGES == 1) start(row + step, 0);
        if (STAGES == 1) commit_copies();
        stage ^= STAGES - 1;
    }
    wait_copies<0>();
}

extern "C" __global__ void __launch_bounds__(256) forward(real* y, wide* mean, wide* rstd, real* x, const real* residual, const real* weight,
                                                          const real* bias, double eps, long long rows, long long width) {
    __shared__ Two scratch[BLOCK_WARPS];
    DYNAMIC_SHARED(memory);
    const Slots slots(memory, residual ? 2 : 1);
    auto start = [&](long long row, int stage) {
        slots.copy(stage, 0, x, row, rows, width);
        if (residual) slots.copy(stage, 1, residual, row, rows, width);
    };
    for_rows(rows, start, [&](long long row, int stage) {
        const bool there = row < rows;
        Pack packs[PACKS];
        wide sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of(i);
            if (!there || column >= width) continue;
            packs[i] = slots.at(stage, 0, i);
            if (residual) {
                const Pack other = slots.at(stage, 1, i);
#pragma unroll
                for (int j = 0; j < PACK; ++j) packs[i].at[j] = to_real(to_wide(packs[i].at[j]) + to_wide(other.at[j]));
                store_pack(x + row * width + column, packs[i]);
            }
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const wide value = to_wide(packs[i].at[j]);
                sum += value;
                squares += value * value;
            }
        }
        wide centre = 0, square = 0;
        if (CENTRED) {
            centre = row_sums({sum, 0}, scratch).first / width;
#pragma unroll
            for (int i = 0; i < PACKS; ++i)
                if (there && column_of(i) < width)
#pragma unroll
                    for (int j = 0; j < PACK; ++j) {
                        const wide value = to_wide(packs[i].at[j]) - centre;
                        square += value * value;
                    }
        } else {
            square = squares;
        }
        const wide scale = 1 / sqrt(row_sums({square, 0}, scratch).first / width + wide(eps));
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of(i);
            if (!there || column >= width) continue;
            const Pack w = load_pack(weight + column);
            Pack b, result;
            if (CENTRED) b = load_pack(bias + column);
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                wide value = (to_wide(packs[i].at[j]) - centre) * scale * to_wide(w.at[j]);
                if (CENTRED) value += to_wide(b.at[j]);
                result.at[j] = to_real(value);
            }
            store_pack(y + row * width + column, result);
        }
        if (there && warp() % WARPS == 0 && lane() == 0) {
            rstd[row] = scale;
            if (CENTRED) mean[row] = centre;
        }
    });
}

// dx, and in parts (gridDim.x, CENTRED + 1, width) the sums over this block's rows for dweight and dbias.
extern "C" __global__ void __launch_bounds__(256, PACKS <= 3 ? 3 : PACKS == 4 ? 2 : 1)
    backward(real* dx, wide* parts, const real* dy, const real* x, const real* residual, const real* weight, const wide* mean, const wide* rstd,
             long long rows, long long width) {
    __shared__ Two scratch[BLOCK_WARPS];
    DYNAMIC_SHARED(memory);
    const Slots slots(memory, residual ? 3 : 2);
    wide dweight[PACKS][PACK], dbias[PACKS][PACK];
#pragma unroll
    for (int i = 0; i < PACKS; ++i)
#pragma unroll
        for (int j = 0; j < PACK; ++j) dweight[i][j] = dbias[i][j] = 0;
    auto start = [&](long long row, int stage) {
        slots.copy(stage, 0, dy, row, rows, width);
        slots.copy(stage, 1, x, row, rows, width);
        if (residual) slots.copy(stage, 2, residual, row, rows, width);
    };
    for_rows(rows, start, [&](long long row, int stage) {
        const bool there = row < rows;
        const wide scale = there ? rstd[row] : wide(0), centre = CENTRED && there ? mean[row] : wide(0);
        Two own = {0, 0};
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of(i);
            if (!there || column >= width) continue;
            const Pack w = load_pack(weight + column), slopes = slots.at(stage, 0, i), values = slots.at(stage, 1, i);
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const wide slope = to_wide(slopes.at[j]), normed = (to_wide(values.at[j]) - centre) * scale;
                dweight[i][j] += slope * normed;
                if (CENTRED) dbias[i][j] += slope;
                const wide dnormed = slope * to_wide(w.at[j]);
                own.first += dnormed;
                own.second += dnormed * normed;
            }
        }
        own = row_sums(own, scratch);
        const wide offset = CENTRED ? own.first / width : wide(0), tilt = own.second / width;
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of(i);
            if (!there || column >= width) continue;
            const Pack w = load_pack(weight + column), slopes = slots.at(stage, 0, i), values = slots.at(stage, 1, i);
            Pack other, result;
            if (residual) other = slots.at(stage, 2, i);
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const wide normed = (to_wide(values.at[j]) - centre) * scale;
                wide value = scale * (to_wide(slopes.at[j]) * to_wide(w.at[j]) - offset - normed * tilt);
                if (residual) value += to_wide(other.at[j]);
                result.at[j] = to_real(value);
            }
            store_pack(dx + row * width + column, result);
        }
    });
    wide* sums = reinterpret_cast<wide*>(memory);
#pragma unroll
    for (int which = 0; which <= CENTRED; ++which) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const int column = column_of(i);
            if (column >= width) continue;
#pragma unroll
            for (int j = 0; j < PACK; ++j) sums[warp() / WARPS * width + column + j] = which ? dbias[i][j] : dweight[i][j];
        }
        __syncthreads();
        for (long long column = thread(); column < width; column += blockDim.x) {
            wide sum = 0;
            for (int group = 0; group < GROUPS; ++group) sum += sums[group * width + column];
            parts[((long long)blockIdx.x * (CENTRED + 1) + which) * width + column] = sum;
        }
    }
}

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
            const wide dnormed = to_wide(dy[start + c]) * to_wide(weight[c]);
            sum += dnormed;
            tilt += dnormed * (to_wide(x[start + c]) - centre) * scale;
        }
        sum = CENTRED ? warp_sum(sum) / width : wide(0);
        tilt = warp_sum(tilt) / width;
        for (long long c = lane(); c < width; c += 32) {
            const wide normed = (to_wide(x[start + c]) - centre) * scale;
            wide value = scale * (to_wide(dy[start + c]) * to_wide(weight[c]) - sum - normed * tilt);
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
extern "C" __global__ void __launch_bounds__(256) add_parts(wide* dweight, wide* dbias, const wide* parts, long long count, long long width) {
    __shared__ wide found[BLOCK_WARPS][32];
    const long long column = (long long)blockIdx.x * 32 + lane();
    wide sum = 0;
    if (column < width)
        for (long long part = warp(); part < count; part += BLOCK_WARPS) sum += parts[(part * (CENTRED + 1) + blockIdx.y) * width + column];
    found[warp()][lane()] = sum;
    __syncthreads();
    if (warp() == 0 && column < width) {
        wide* target = (blockIdx.y ? dbias : dweight) + column;
        sum = *target;
        for (int i = 0; i < BLOCK_WARPS; ++i) sum += found[i][lane()];
        *target = sum;
    }
}
