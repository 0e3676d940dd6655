// Hash of a slab: the sum mod 2^64 of splitmix64((bits << 32) xor global index) over its 32-bit words (Steele et al. 2014).
// types: float32
#include "common.cuh"

constexpr int segment = 4096;  // words of a row that a block takes at a time
using Sum = unsigned long long;

__device__ inline Sum splitmix64(Sum x) {
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// sums (blocks,) of words (rows, width), row stride in words; the first word of row r has the global index start + r * columns
extern "C" __global__ void tensor_hash(Sum* sums, const unsigned* words, long long stride, long long start, long long columns,
                                       long long rows, long long width) {
    __shared__ Sum scratch[32];
    const long long segments = (width + segment - 1) / segment;
    Sum sum = 0;
    for (long long tile = blockIdx.x; tile < rows * segments; tile += gridDim.x) {
        const long long row = tile / segments, begin = tile % segments * segment;
        const long long end = begin + segment < width ? begin + segment : width;
        const Sum index = Sum(start) + Sum(row) * Sum(columns);
        for (long long i = begin + thread(); i < end; i += blockDim.x)
            sum += splitmix64((Sum(words[row * stride + i]) << 32) ^ (index + Sum(i)));
    }
    sum = block_sum(sum, scratch);
    if (thread() == 0) sums[blockIdx.x] = sum;
}

// total (1,) = the sum of sums (n,), by one block
extern "C" __global__ void add_hashes(Sum* total, const Sum* sums, long long n) {
    __shared__ Sum scratch[32];
    Sum sum = 0;
    for (long long i = thread(); i < n; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, scratch);
    if (thread() == 0) total[0] = sum;
}
