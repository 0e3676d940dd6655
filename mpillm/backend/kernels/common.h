// What the kernels share: threads, exp, and the fixed chunks that make sums independent of the number of threads.
// -ffast-math is never used: NaN and inf must come through. Loops marked `omp simd` may reorder sums, nothing else.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace mpillm {

extern int num_threads;  // threads.cpp

constexpr int64_t serial_below = 1 << 15;  // elements; starting threads costs more than the work
constexpr int64_t chunk_rows = 128;        // rows that share one partial sum

// calls body(i) for i < count, on all threads when `work` elements are worth it
template <class Body>
inline void parallel_for(int64_t count, int64_t work, const Body& body) {
#ifdef _OPENMP
    if (num_threads > 1 && count > 1 && work >= serial_below) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#endif
    for (int64_t i = 0; i < count; ++i) body(i);
}

// calls body(begin, end) for consecutive parts of n elements
template <class Body>
inline void parallel_range(int64_t n, const Body& body) {
    constexpr int64_t part = 1 << 14;
    if (num_threads <= 1 || n < serial_below) return body(int64_t(0), n);
    parallel_for((n + part - 1) / part, n, [&](int64_t i) { body(i * part, i * part + part < n ? i * part + part : n); });
}

// body(first row, end row, partial sums of `width`), then total += the partial sums in order: one result for any threads
template <class T, class Body>
inline void sum_over_rows(int64_t rows, int64_t width, T* total, const Body& body) {
    const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
    std::vector<T> partial(size_t(chunks * width), T(0));
    parallel_for(chunks, rows * width, [&](int64_t i) {
        const int64_t begin = i * chunk_rows;
        body(begin, begin + chunk_rows < rows ? begin + chunk_rows : rows, partial.data() + i * width);
    });
    for (int64_t i = 0; i < chunks; ++i) {
        const T* from = partial.data() + i * width;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) total[c] += from[c];
    }
}

// asks for the cache lines of n elements
template <class T>
inline void prefetch(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + i, 0, 2);
}

inline int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline double exp(double x) { return std::exp(x); }

// e^x to about 1e-7, vectorises: 2^n e^r with |r| <= ln(2)/2; coefficients of Cephes' expf. Two factors of 2^(n/2), so
// that the ends of the range round to inf and 0 by themselves; comparisons are written so that NaN stays NaN.
inline float exp(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const float shifted = x * 1.44269504f + magic;
    const int32_t n = bits_of(shifted) - 0x4B400000;
    const float k = shifted - magic;
    float r = x - k * 0.693359375f;
    r = r - k * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const int32_t half = n >> 1;
    return p * float_of((half + 127) << 23) * float_of((n - half + 127) << 23);
}

template <class T>
inline T sigmoid(T x) {
    return T(1) / (T(1) + exp(-x));
}

}  // namespace mpillm
