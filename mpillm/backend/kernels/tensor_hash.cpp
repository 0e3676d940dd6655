// Hash of a slab: the sum mod 2^64 of splitmix64((bits << 32) xor global index) over its 32-bit words.
#include "common.h"

namespace mpillm {

inline uint64_t splitmix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

}  // namespace mpillm

// words (rows, width), row stride in words; the first word of row r has the global index start + r * columns (in words)
extern "C" uint64_t mpillm_tensor_hash(const uint32_t* words, int64_t stride, uint64_t start, uint64_t columns, int64_t rows,
                                       int64_t width) {
    std::vector<uint64_t> sums(size_t(rows), 0);
    mpillm::parallel_for(rows, rows * width, [&](int64_t r) {
        const uint32_t* row = words + r * stride;
        const uint64_t index = start + uint64_t(r) * columns;
        uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; ++c) sum += mpillm::splitmix64((uint64_t(row[c]) << 32) ^ (index + uint64_t(c)));
        sums[size_t(r)] = sum;
    });
    uint64_t total = 0;
    for (uint64_t sum : sums) total += sum;
    return total;
}
