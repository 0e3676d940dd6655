// Cross entropy of a slab of the vocabulary: statistics forward, dlogits backward. logits (N, V_local), row stride in
// elements; column c is the token first + c. Two passes over a row of the logits, which stays in the cache between.
#include "common.h"

namespace mpillm {

// largest element; a NaN may be passed over, it then comes through row_sum
template <class T>
inline T row_maximum(const T* row, int64_t width) {
    constexpr int lanes = 64;
    T top[lanes], result = -std::numeric_limits<T>::infinity();
    for (int j = 0; j < lanes; ++j) top[j] = result;
    int64_t c = 0;
    for (; c + lanes <= width; c += lanes)
        for (int j = 0; j < lanes; ++j) top[j] = row[c + j] > top[j] ? row[c + j] : top[j];
    for (int j = 0; j < lanes; ++j) result = top[j] > result ? top[j] : result;
    for (; c < width; ++c) result = row[c] > result ? row[c] : result;
    return result;
}

template <class T>
void cross_entropy_stats(T* logits, int64_t stride, const int64_t* targets, int64_t first, T* row_max, T* row_sum,
                         T* target_logit, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [&](int64_t r) {
        T* __restrict row = logits + r * stride;
        const int64_t target = targets[r] - first;
        target_logit[r] = target >= 0 && target < width ? row[target] : T(0);
        const T top = row_maximum(row, width);
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; ++c) {
            const T e = exp(row[c] - top);
            row[c] = e;
            sum += e;
        }
        row_max[r] = top;
        row_sum[r] = sum;
    });
}

template <class T>
void cross_entropy_gradient(T* exps, int64_t stride, const int64_t* targets, const T* factor, const T* coefficient,
                            int64_t first, int64_t rows, int64_t width) {
    parallel_for(rows, rows * width, [&](int64_t r) {
        T* __restrict row = exps + r * stride;
        const T scale = factor[r] * coefficient[r];
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) row[c] *= scale;
        const int64_t target = targets[r] - first;
        if (target >= 0 && target < width) row[target] -= coefficient[r];
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                   \
    extern "C" void mpillm_cross_entropy_stats_##S(T* logits, int64_t stride, const int64_t* targets, int64_t first,   \
                                                   T* row_max, T* row_sum, T* target_logit, int64_t rows,              \
                                                   int64_t width) {                                                    \
        mpillm::cross_entropy_stats(logits, stride, targets, first, row_max, row_sum, target_logit, rows, width);      \
    }                                                                                                                  \
    extern "C" void mpillm_cross_entropy_gradient_##S(T* exps, int64_t stride, const int64_t* targets, const T* factor, \
                                                      const T* coefficient, int64_t first, int64_t rows,               \
                                                      int64_t width) {                                                 \
        mpillm::cross_entropy_gradient(exps, stride, targets, factor, coefficient, first, rows, width);                \
    }
EXPORT(float, f32)
EXPORT(double, f64)
