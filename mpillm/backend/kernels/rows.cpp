// Rows and one number each: x (N, C) *= scale (N,); inner products (N,) of the rows of a and b (N, C). Contiguous.
#include "common.h"

namespace mpillm {

template <class T>
void scale_rows(T* x, const T* scale, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [=](int64_t r) {
        T* __restrict row = x + r * width;
        const T factor = scale[r];
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) row[c] *= factor;
    });
}

template <class T>
void row_dot(T* y, const T* a, const T* b, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [=](int64_t r) {
        const T *left = a + r * width, *right = b + r * width;
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; ++c) sum += left[c] * right[c];
        y[r] = sum;
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                       \
    extern "C" void mpillm_scale_rows_##S(T* x, const T* scale, int64_t rows, int64_t width) {             \
        mpillm::scale_rows(x, scale, rows, width);                                                         \
    }                                                                                                      \
    extern "C" void mpillm_row_dot_##S(T* y, const T* a, const T* b, int64_t rows, int64_t width) {        \
        mpillm::row_dot(y, a, b, rows, width);                                                             \
    }
EXPORT(float, f32)
EXPORT(double, f64)
