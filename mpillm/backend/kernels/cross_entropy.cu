// Cross entropy over rows of logits (N, V), row stride in elements: loss and gradient in one kernel, or in parts when the
// columns of a row lie on several ranks. A block takes a row: one pass for its maximum and the sum of its exponentials, in
// which the front of the row stays in shared memory, and one pass that writes. What lies between V and the stride is not
// touched.
#include "common.cuh"

__device__ inline float natural_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }
__device__ inline double natural_exp(double x) { return exp(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // passes a NaN over: it comes through the sum
__device__ inline double larger(double a, double b) { return fmax(a, b); }

constexpr int blocks = sizeof(wide) == 8 ? 1 : 2;  // of a multiprocessor: one works while the other waits for memory

// One row: full packs where it is aligned, then single columns.
struct Row {
    real* at;
    int width, packs;

    __device__ Row(real* logits, long long stride, int columns)
        : at(logits + blockIdx.x * stride), width(columns), packs(is_aligned(at) ? columns / PACK : 0) {}

    __device__ int first_single() const { return packs * PACK + thread(); }
    __device__ bool has(long long column) const { return column >= 0 && column < width; }
};

struct Softmax {
    wide top, sum;  // the maximum, and the sum of exp(x - maximum)

    template <int n>
    __device__ void take(const wide (&x)[n]) {
        wide part = x[0];
#pragma unroll
        for (int i = 1; i < n; ++i) part = larger(part, x[i]);
        if (part > top) {
            sum *= natural_exp(top - part);
            top = part;
        }
        const wide shift = top == -INFINITY ? wide(0) : top;  // -inf - -inf is no number
#pragma unroll
        for (int i = 0; i < n; ++i) sum += natural_exp(x[i] - shift);
    }
};

// Of the whole row, for all threads. The packs below `held` are copied to shared memory first, all in flight at once, and
// stay there: each thread reads those that it copied.
__device__ Softmax row_softmax(const Row& row, Pack* held_packs, int held) {
    __shared__ wide scratch[32];
    const wide lowest = -INFINITY;
    Softmax own = {lowest, 0};
    auto take = [&](const Pack& pack) {
        wide x[PACK];
        widen_pack(x, pack);
        own.take(x);
    };
    const int stride = int(blockDim.x), front = min(held, row.packs), part = (front + 4 * stride - 1) / (4 * stride) * stride;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        for (int pack = i * part + thread(); pack < min((i + 1) * part, front); pack += stride)
            copy_async(held_packs + pack, row.at + pack * PACK, true);
        commit_copies();
    }
    auto take_part = [&](int i) {
#pragma unroll 2
        for (int pack = i * part + thread(); pack < min((i + 1) * part, front); pack += stride) take(held_packs[pack]);
    };
    wait_copies<3>(), take_part(0);
    wait_copies<2>(), take_part(1);
    wait_copies<1>(), take_part(2);
    wait_copies<0>(), take_part(3);
#pragma unroll 2
    for (int pack = front + thread(); pack < row.packs; pack += stride) take(load_pack(row.at + pack * PACK));
    for (int column = row.first_single(); column < row.width; column += blockDim.x) {
        const wide x[1] = {to_wide(row.at[column])};
        own.take(x);
    }
    const wide top = block_max(own.top, scratch);
    return {top, block_sum(own.top == lowest ? own.sum : own.sum * natural_exp(own.top - top), scratch)};
}

// The columns become exp(x - shift) * factor.
__device__ void write_row(const Row& row, const Pack* held_packs, int held, wide shift, wide factor) {
    constexpr int flight = 2;
    for (int base = thread(); base < row.packs; base += flight * blockDim.x) {
        Pack x[flight];
#pragma unroll
        for (int i = 0; i < flight; ++i) {
            const int pack = base + i * int(blockDim.x);
            if (pack < held) x[i] = held_packs[pack];
            else if (pack < row.packs) x[i] = load_pack(row.at + pack * PACK);
        }
#pragma unroll
        for (int i = 0; i < flight; ++i) {
            const int pack = base + i * int(blockDim.x);
            if (pack >= row.packs) continue;
            wide numbers[PACK];
            widen_pack(numbers, x[i]);
#pragma unroll
            for (int j = 0; j < PACK; ++j) numbers[j] = natural_exp(numbers[j] - shift) * factor;
            store_pack(row.at + pack * PACK, round_pack(numbers));
        }
    }
    for (int column = row.first_single(); column < row.width; column += blockDim.x)
        row.at[column] = to_real(natural_exp(to_wide(row.at[column]) - shift) * factor);
}

// The columns become x * factor; zeros for a factor of 0, whatever x is.
__device__ void scale_row(const Row& row, wide factor) {
#pragma unroll 4
    for (int pack = thread(); pack < row.packs; pack += blockDim.x) {
        Pack x = load_pack(row.at + pack * PACK);
#pragma unroll
        for (int j = 0; j < PACK; ++j) x.at[j] = to_real(factor == 0 ? wide(0) : to_wide(x.at[j]) * factor);
        store_pack(row.at + pack * PACK, x);
    }
    for (int column = row.first_single(); column < row.width; column += blockDim.x)
        row.at[column] = to_real(factor == 0 ? wide(0) : to_wide(row.at[column]) * factor);
}

// nll (N,) double = scale * (lse - logit of the target); with `gradient`, logits become (softmax - onehot) * scale.
// The first `held` packs of a row fit into the dynamic shared memory.
extern "C" __global__ void __launch_bounds__(512, blocks)
    cross_entropy(real* logits, long long stride, const long long* targets, const wide* scale, double* nll, long long width,
                  long long held, long long gradient) {
    DYNAMIC_SHARED(shared);
    const Row row(logits, stride, int(width));
    const long long target = targets[blockIdx.x];
    const wide weight = scale[blockIdx.x];
    if (weight == 0) {  // whatever the row holds, it does not count
        if (thread() == 0) nll[blockIdx.x] = 0;
        if (gradient) scale_row(row, 0);
        return;
    }
    Pack* packs = reinterpret_cast<Pack*>(shared);
    const wide logit = row.has(target) ? to_wide(row.at[target]) : wide(0);
    const Softmax softmax = row_softmax(row, packs, int(held));
    const wide factor = weight / softmax.sum;
    if (thread() == 0) nll[blockIdx.x] = double(weight) * (log(double(softmax.sum)) + (double(softmax.top) - double(logit)));
    if (!gradient) return;
    write_row(row, packs, int(held), softmax.top, factor);
    __syncthreads();
    if (thread() == 0 && row.has(target)) row.at[target] = to_real(natural_exp(logit - softmax.top) * factor - weight);
}

// row_max, row_sum, target_logit (N,) of the columns first..first + width; logits become exp(logit - row_max).
extern "C" __global__ void __launch_bounds__(512, blocks)
    cross_entropy_stats(real* logits, long long stride, const long long* targets, wide* row_max, wide* row_sum,
                        wide* target_logit, long long first, long long width, long long held) {
    DYNAMIC_SHARED(shared);
    const Row row(logits, stride, int(width));
    const long long target = targets[blockIdx.x] - first;
    const wide logit = row.has(target) ? to_wide(row.at[target]) : wide(0);
    Pack* packs = reinterpret_cast<Pack*>(shared);
    const Softmax softmax = row_softmax(row, packs, int(held));
    if (thread() == 0) {
        row_max[blockIdx.x] = softmax.top;
        row_sum[blockIdx.x] = softmax.sum;
        target_logit[blockIdx.x] = logit;
    }
    write_row(row, packs, int(held), softmax.top, 1);
}

// exps (N, width) become exps * factor * coefficient, minus coefficient at the target.
extern "C" __global__ void __launch_bounds__(512)
    cross_entropy_gradient(real* exps, long long stride, const long long* targets, const wide* factor, const wide* coefficient,
                           long long first, long long width) {
    const Row row(exps, stride, int(width));
    const long long target = targets[blockIdx.x] - first;
    const wide taken = coefficient[blockIdx.x], scale = taken == 0 ? wide(0) : factor[blockIdx.x] * taken;
    const wide e = row.has(target) && scale != 0 ? to_wide(row.at[target]) : wide(0);
    __syncthreads();  // all have read it
    scale_row(row, scale);
    __syncthreads();
    if (thread() == 0 && row.has(target)) row.at[target] = to_real(e * scale - taken);
}

// loss (1,) += the sum of nll (n,), by one block in a fixed order.
extern "C" __global__ void add_losses(double* loss, const double* nll, long long n) {
    __shared__ double scratch[32];
    double sum = 0;
    for (long long i = thread(); i < n; i += blockDim.x) sum += nll[i];
    sum = block_sum(sum, scratch);
    if (thread() == 0) loss[0] += sum;
}

// loss (1,) += the sum of scale * (log(row_sum) + row_max - target_logit), by one block in a fixed order; all (n,).
extern "C" __global__ void loss_sum(double* loss, const wide* row_max, const wide* row_sum, const wide* target_logit,
                                    const wide* scale, long long n) {
    __shared__ double scratch[32];
    double sum = 0;
    for (long long i = thread(); i < n; i += blockDim.x)
        if (scale[i] != 0) sum += double(scale[i]) * (log(double(row_sum[i])) + (double(row_max[i]) - double(target_logit[i])));
    sum = block_sum(sum, scratch);
    if (thread() == 0) loss[0] += sum;
}

// shrink (n,) = exp(row_max - largest); sums (2, n) = row_sum * shrink, target_logit.
extern "C" __global__ void softmax_parts(wide* sums, wide* shrink, const wide* row_max, const wide* largest, const wide* row_sum,
                                         const wide* target_logit, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= n) return;
    const wide factor = row_max[i] == -INFINITY ? wide(0) : wide(exp(row_max[i] - largest[i]));  // no columns, or none above -inf
    shrink[i] = factor;
    sums[i] = row_sum[i] * factor;
    sums[n + i] = target_logit[i];
}

// factor (n,) = shrink / row_sum
extern "C" __global__ void softmax_factor(wide* factor, const wide* shrink, const wide* row_sum, long long n) {
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) factor[i] = shrink[i] / row_sum[i];
}
