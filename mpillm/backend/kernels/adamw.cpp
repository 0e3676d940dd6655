// One AdamW step on flat arrays, one pass: decoupled decay, bias-corrected moments, eps outside the square root.
#include "common.h"

namespace mpillm {

// shrink = 1 - rate decay, pace = rate / (1 - beta1^step), correction = 1 / sqrt(1 - beta2^step)
template <class T>
void adamw(T* __restrict weight, const T* __restrict grad, T* __restrict moment1, T* __restrict moment2, T beta1, T beta2,
           T shrink, T pace, T correction, T eps, T scale, int64_t n) {
    const T rest1 = T(1) - beta1, rest2 = T(1) - beta2;
    parallel_range(n, [=](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const T g = grad[i] * scale;
            const T m = moment1[i] + rest1 * (g - moment1[i]);
            const T v = beta2 * moment2[i] + rest2 * g * g;
            moment1[i] = m;
            moment2[i] = v;
            weight[i] = weight[i] * shrink - pace * m / (std::sqrt(v) * correction + eps);
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                  \
    extern "C" void mpillm_adamw_##S(T* weight, const T* grad, T* moment1, T* moment2, double beta1, double beta2,    \
                                     double shrink, double pace, double correction, double eps, double scale,         \
                                     int64_t n) {                                                                     \
        mpillm::adamw(weight, grad, moment1, moment2, T(beta1), T(beta2), T(shrink), T(pace), T(correction), T(eps),  \
                      T(scale), n);                                                                                   \
    }
EXPORT(float, f32)
EXPORT(double, f64)
