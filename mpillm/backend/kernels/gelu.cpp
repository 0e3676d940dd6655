// GELU, tanh form, as x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3): the same function, no cancellation.
#include "common.h"

namespace mpillm {

template <class T>
inline T twice_u(T x) {
    return T(1.5957691216057308) * x * (T(1) + T(0.044715) * x * x);
}

// x += bias (may be null), y = GELU(x); x, y (N, C) contiguous
template <class T>
void gelu(T* __restrict y, T* __restrict x, const T* bias, int64_t rows, int64_t width) {
    if (!bias) {
        parallel_range(rows * width, [&](int64_t begin, int64_t end) {
#pragma omp simd
            for (int64_t i = begin; i < end; ++i) y[i] = x[i] * sigmoid(twice_u(x[i]));
        });
        return;
    }
    parallel_for(rows, rows * width, [&](int64_t r) {
        T *__restrict in = x + r * width, *__restrict out = y + r * width;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
            const T sum = in[c] + bias[c];
            in[c] = sum;
            out[c] = sum * sigmoid(twice_u(sum));
        }
    });
}

// dy becomes dx
template <class T>
void gelu_backward(T* __restrict dy, const T* __restrict x, int64_t n) {
    parallel_range(n, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const T s = sigmoid(twice_u(x[i]));
            const T slope = T(1.5957691216057308) * (T(1) + T(3 * 0.044715) * x[i] * x[i]);
            dy[i] *= s + x[i] * slope * s * (T(1) - s);
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                   \
    extern "C" void mpillm_gelu_##S(T* y, T* x, const T* bias, int64_t rows, int64_t width) {          \
        mpillm::gelu(y, x, bias, rows, width);                                                         \
    }                                                                                                  \
    extern "C" void mpillm_gelu_backward_##S(T* dy, const T* x, int64_t n) { mpillm::gelu_backward(dy, x, n); }
EXPORT(float, f32)
EXPORT(double, f64)
