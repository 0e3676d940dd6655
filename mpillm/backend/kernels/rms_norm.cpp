// RMSNorm of rows: y = x rstd weight, rstd = 1 / sqrt(mean(x^2) + eps). x (N, C), contiguous.
#include "common.h"

namespace mpillm {

template <class T>
void rms_norm(T* y, T* rstd, const T* x, const T* weight, T eps, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [=](int64_t r) {
        const T *in = x + r * width, *w = weight;
        T* __restrict out = y + r * width;
        T squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < width; ++c) squares += in[c] * in[c];
        const T s = T(1) / std::sqrt(squares / T(width) + eps);
        rstd[r] = s;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) out[c] = in[c] * s * w[c];
    });
}

template <class T>
void rms_norm_backward(T* dx, T* dweight, const T* dy, const T* x, const T* weight, const T* rstd, int64_t rows, int64_t width) {
    sum_over_rows(rows, width, dweight, [=](int64_t begin, int64_t end, T* __restrict dw) {
        const T* w = weight;
        for (int64_t r = begin; r < end; ++r) {
            const T *in = x + r * width, *d = dy + r * width;
            T* __restrict out = dx + r * width;
            const T s = rstd[r];
            T inner = 0;
#pragma omp simd reduction(+ : inner)
            for (int64_t c = 0; c < width; ++c) {
                const T product = d[c] * (in[c] * s);
                dw[c] += product;
                inner += product * w[c];
            }
            const T shift = inner / T(width) * s;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) out[c] = s * (d[c] * w[c] - in[c] * shift);
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                  \
    extern "C" void mpillm_rms_norm_##S(T* y, T* rstd, const T* x, const T* weight, double eps, int64_t rows,         \
                                        int64_t width) {                                                              \
        mpillm::rms_norm(y, rstd, x, weight, T(eps), rows, width);                                                    \
    }                                                                                                                 \
    extern "C" void mpillm_rms_norm_backward_##S(T* dx, T* dweight, const T* dy, const T* x, const T* weight,         \
                                                 const T* rstd, int64_t rows, int64_t width) {                        \
        mpillm::rms_norm_backward(dx, dweight, dy, x, weight, rstd, rows, width);                                     \
    }
EXPORT(float, f32)
EXPORT(double, f64)
