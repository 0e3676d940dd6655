// Dropout in place: x (N, C) *= 0 or 1 / (1 - rate), by Philox counters; the same call on dy is the backward.
#include "philox.h"

namespace mpillm {

template <class T>
void dropout(T* x, uint64_t key, uint64_t threshold, double scale, uint32_t step, const int64_t* samples,
             const int64_t* positions, int64_t first, int64_t rows, int64_t width) {
    constexpr int64_t most = DropoutRow::most;
    const int64_t lead = first % 4;  // lanes of the first block that belong to another rank
    parallel_for(rows, rows * width, [&](int64_t r) {
        const DropoutRow row{key, threshold, scale, step, uint32_t(samples[r]), uint32_t(positions[r])};
        T* __restrict at = x + r * width - lead;
        T factors[most];
        for (int64_t begin = 0; begin < width + lead; begin += most) {
            const int64_t end = begin + most < width + lead ? begin + most : width + lead;
            row.factors(factors, uint64_t((first + begin) / 4), (end - begin + 3) / 4);
            const int64_t skip = begin == 0 ? lead : 0;
#pragma omp simd
            for (int64_t i = begin + skip; i < end; ++i) at[i] *= factors[i - begin];
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                    \
    extern "C" void mpillm_dropout_##S(T* x, uint64_t key, uint64_t threshold, double scale, uint32_t step,             \
                                       const int64_t* samples, const int64_t* positions, int64_t first, int64_t rows,  \
                                       int64_t width) {                                                                 \
        mpillm::dropout(x, key, threshold, scale, step, samples, positions, first, rows, width);                        \
    }
EXPORT(float, f32)
EXPORT(double, f64)
