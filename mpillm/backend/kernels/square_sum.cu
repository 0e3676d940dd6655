// Sum of squares of all elements of a list of arrays, in float64: a block takes a chunk of an array, then one block adds the
// sums of the chunks. Every order is fixed, so the result is the same in every run.
#include "common.cuh"

// A row of the table of arrays, (arrays, 3) 64-bit words.
struct Array {
    const real* at;
    long long count;        // elements
    long long first_chunk;  // number of its first chunk
};

// sums (chunks,): of each chunk of `length` elements; owners (chunks,): the array of each
extern "C" __global__ void __launch_bounds__(256)
    square_sum(double* sums, const Array* arrays, const int* owners, long long length) {
    constexpr int flight = 4;  // packs in flight a thread
    __shared__ double scratch[32];
    const Array array = arrays[owners[blockIdx.x]];
    const long long begin = (blockIdx.x - array.first_chunk) * length;
    const real* x = array.at + begin;
    const int count = int(begin + length < array.count ? length : array.count - begin);
    const int packs = is_aligned(x) ? count / PACK : 0;
    double sum = 0;
    for (int base = thread(); base < packs; base += flight * blockDim.x) {
        Pack part[flight];
#pragma unroll
        for (int i = 0; i < flight; ++i) {
            const int pack = base + i * int(blockDim.x);
            if (pack < packs) {
                part[i] = load_pack(x + pack * PACK);
            } else {
#pragma unroll
                for (int j = 0; j < PACK; ++j) part[i].at[j] = to_real(0);
            }
        }
#pragma unroll
        for (int i = 0; i < flight; ++i)
#pragma unroll
            for (int j = 0; j < PACK; ++j) {
                const double value = to_wide(part[i].at[j]);
                sum += value * value;
            }
    }
    for (int i = packs * PACK + thread(); i < count; i += blockDim.x) {
        const double value = to_wide(x[i]);
        sum += value * value;
    }
    sum = block_sum(sum, scratch);
    if (thread() == 0) sums[blockIdx.x] = sum;
}

// total (1,) = the sum of sums (n,), by one block
extern "C" __global__ void add_sums(double* total, const double* sums, long long n) {
    __shared__ double scratch[32];
    double sum = 0;
    for (long long i = thread(); i < n; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, scratch);
    if (thread() == 0) total[0] = sum;
}
