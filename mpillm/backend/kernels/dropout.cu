// Dropout in place: x (rows, width) *= 0 or 1 / (1 - rate), by Philox counters (step, sample, position, channel / 4).
#include "philox.cuh"

// A thread takes the four channels of a counter. `first`: global number of the first channel; words below the threshold drop.
extern "C" __global__ void __launch_bounds__(256) dropout(real* x, long long key, long long threshold, double scale, long long step,
                                                          const long long* samples, const long long* positions, long long first,
                                                          long long rows, long long width) {
    const long long lead = first % 4, counters = (width + lead + 3) / 4, total = rows * counters;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (long long)gridDim.x * blockDim.x) {
        const long long row = i / counters, counter = i - row * counters;
        const Words words = philox(unsigned(step), unsigned(samples[row]), unsigned(positions[row]), unsigned(first / 4 + counter),
                                   (unsigned long long)key);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const long long column = 4 * counter + j - lead;
            if (column >= 0 && column < width) {
                real* at = x + row * width + column;
                *at = (long long)words.lane(j) >= threshold ? to_real(to_wide(*at) * wide(scale)) : to_real(0);
            }
        }
    }
}
