// Sum of squares in float64, in parts of fixed size added in order: one result for any number of threads.
#include "common.h"

namespace mpillm {

template <class T>
double part_square_sum(const T* x, int64_t n) {
    double a = 0, b = 0, c = 0, d = 0;
    const int64_t quarter = n / 4;
    const T *xa = x, *xb = x + quarter, *xc = x + 2 * quarter, *xd = x + 3 * quarter;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < quarter; ++i) {  // four sums in flight hide the latency of the additions
        a += double(xa[i]) * double(xa[i]);
        b += double(xb[i]) * double(xb[i]);
        c += double(xc[i]) * double(xc[i]);
        d += double(xd[i]) * double(xd[i]);
    }
    for (int64_t i = 4 * quarter; i < n; ++i) a += double(x[i]) * double(x[i]);
    return (a + b) + (c + d);
}

template <class T>
double square_sum(const T* x, int64_t n) {
    constexpr int64_t part = 1 << 14;
    const int64_t parts = (n + part - 1) / part;
    std::vector<double> sums(static_cast<size_t>(parts));
    parallel_for(parts, n, [&](int64_t i) { sums[i] = part_square_sum(x + i * part, i * part + part < n ? part : n - i * part); });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

}  // namespace mpillm

extern "C" double mpillm_square_sum_f32(const float* x, int64_t n) { return mpillm::square_sum(x, n); }
extern "C" double mpillm_square_sum_f64(const double* x, int64_t n) { return mpillm::square_sum(x, n); }
