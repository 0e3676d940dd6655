// LayerNorm of rows: y = (x - mean) rstd weight + bias. x (N, C), contiguous.
#include "common.h"

namespace mpillm {

template <class T>
void layer_norm(T* y, T* mean, T* rstd, const T* x, const T* weight, const T* bias, T eps, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [=](int64_t r) {
        const T *in = x + r * width, *w = weight, *b = bias;
        T* __restrict out = y + r * width;
        T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; ++c) sum += in[c];
        const T m = sum / T(width);
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < width; ++c) squares += (in[c] - m) * (in[c] - m);
        const T s = T(1) / std::sqrt(squares / T(width) + eps);
        mean[r] = m;
        rstd[r] = s;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) out[c] = (in[c] - m) * s * w[c] + b[c];
    });
}

template <class T>
void layer_norm_backward(T* dx, T* dweight, T* dbias, const T* dy, const T* x, const T* weight, const T* mean,
                         const T* rstd, int64_t rows, int64_t width) {
    std::vector<T> both(size_t(2 * width), T(0));  // dweight, then dbias
    sum_over_rows(rows, 2 * width, both.data(), [=](int64_t begin, int64_t end, T* partial) {
        const T* w = weight;
        T *__restrict dw = partial, *__restrict db = partial + width;
        for (int64_t r = begin; r < end; ++r) {
            const T *in = x + r * width, *d = dy + r * width;
            T* __restrict out = dx + r * width;
            const T m = mean[r], s = rstd[r];
            T sum = 0, inner = 0;
#pragma omp simd reduction(+ : sum, inner)
            for (int64_t c = 0; c < width; ++c) {
                const T normed = (in[c] - m) * s, dnormed = d[c] * w[c];
                dw[c] += d[c] * normed;
                db[c] += d[c];
                sum += dnormed;
                inner += dnormed * normed;
            }
            const T mean_d = sum / T(width), shift = inner / T(width);
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) out[c] = s * (d[c] * w[c] - mean_d - (in[c] - m) * s * shift);
        }
    });
    for (int64_t c = 0; c < width; ++c) dweight[c] += both[c];
    for (int64_t c = 0; c < width; ++c) dbias[c] += both[width + c];
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                  \
    extern "C" void mpillm_layer_norm_##S(T* y, T* mean, T* rstd, const T* x, const T* weight, const T* bias,         \
                                          double eps, int64_t rows, int64_t width) {                                  \
        mpillm::layer_norm(y, mean, rstd, x, weight, bias, T(eps), rows, width);                                      \
    }                                                                                                                 \
    extern "C" void mpillm_layer_norm_backward_##S(T* dx, T* dweight, T* dbias, const T* dy, const T* x,              \
                                                   const T* weight, const T* mean, const T* rstd, int64_t rows,       \
                                                   int64_t width) {                                                   \
        mpillm::layer_norm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd, rows, width);                      \
    }
EXPORT(float, f32)
EXPORT(double, f64)
