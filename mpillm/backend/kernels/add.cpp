// y += x; y (N, C) += bias (C,); dbias (C,) += column sums of dy (N, C). Row strides in elements.
#include "common.h"

namespace mpillm {

template <class T>
void add(T* __restrict y, const T* __restrict x, int64_t n) {
    parallel_range(n, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) y[i] += x[i];
    });
}

template <class T>
void add_bias(T* y, int64_t stride, const T* bias, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [&](int64_t r) {
        T* __restrict row = y + r * stride;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) row[c] += bias[c];
    });
}

template <class T>
void sum_rows(const T* dy, int64_t stride, T* dbias, int64_t rows, int64_t width) {
    sum_over_rows(rows, width, dbias, [&](int64_t begin, int64_t end, T* __restrict sums) {
        int64_t r = begin;
        for (; r + 4 <= end; r += 4) {  // four rows a pass over the sums
            const T *a = dy + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) sums[i] += (a[i] + b[i]) + (c[i] + d[i]);
        }
        for (; r < end; ++r) {
            const T* row = dy + r * stride;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) sums[i] += row[i];
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                 \
    extern "C" void mpillm_add_##S(T* y, const T* x, int64_t n) { mpillm::add(y, x, n); }                            \
    extern "C" void mpillm_add_bias_##S(T* y, int64_t stride, const T* bias, int64_t rows, int64_t width) {          \
        mpillm::add_bias(y, stride, bias, rows, width);                                                              \
    }                                                                                                                \
    extern "C" void mpillm_sum_rows_##S(const T* dy, int64_t stride, T* dbias, int64_t rows, int64_t width) {        \
        mpillm::sum_rows(dy, stride, dbias, rows, width);                                                            \
    }
EXPORT(float, f32)
EXPORT(double, f64)
