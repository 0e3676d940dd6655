// Small matrix products on packed tiles that lie in the cache, for attention: no copy and no call per tile, which is
// where a BLAS loses (OpenBLAS reaches 60-70 % of its own rate at the sizes of one head).
#pragma once

#include "common.h"

namespace mpillm {

// vectors of the machine, and how many of them one step of the product keeps in registers: strip_rows x panel_vectors
#if defined(__AVX512F__)
constexpr int vector_bytes = 64, strip_rows = 6, panel_vectors = 4;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, strip_rows = 6, panel_vectors = 2;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16, strip_rows = 6, panel_vectors = 4;
#else
constexpr int vector_bytes = 16, strip_rows = 6, panel_vectors = 2;
#endif

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(vector_bytes)));
    static constexpr int lanes = vector_bytes / int(sizeof(T));
    static constexpr int panel = lanes * panel_vectors;  // columns of a packed panel
};

// c (strip_rows, N vectors) = or += a (strip_rows, depth) b (depth, N vectors); element (m, p) of a is a[m * down + p * across]
template <class T, int N>
inline void strip_times_panel(int64_t depth, const T* __restrict a, int64_t down, int64_t across, const T* __restrict b,
                              int64_t of_b, T* __restrict c, int64_t of_c, bool accumulate) {
    typedef typename Vector<T>::type V;
    constexpr int lanes = Vector<T>::lanes;
    V sum[strip_rows][N] = {};
    for (int64_t p = 0; p < depth; ++p) {
        V right[N];
        for (int n = 0; n < N; ++n) std::memcpy(&right[n], b + p * of_b + n * lanes, sizeof(V));
        for (int m = 0; m < strip_rows; ++m) {
            const T left = a[m * down + p * across];
            for (int n = 0; n < N; ++n) sum[m][n] += left * right[n];
        }
    }
    for (int m = 0; m < strip_rows; ++m)
        for (int n = 0; n < N; ++n) {
            T* to = c + m * of_c + n * lanes;
            if (accumulate) {
                V old;
                std::memcpy(&old, to, sizeof(V));
                sum[m][n] += old;
            }
            std::memcpy(to, &sum[m][n], sizeof(V));
        }
}

// the same for a number of vectors known at run time, at most panel_vectors
template <class T>
inline void strip_times_vectors(int64_t vectors, int64_t depth, const T* a, int64_t down, int64_t across, const T* b,
                                int64_t of_b, T* c, int64_t of_c, bool accumulate) {
    if (vectors == panel_vectors) return strip_times_panel<T, panel_vectors>(depth, a, down, across, b, of_b, c, of_c, accumulate);
    if (vectors == 1) return strip_times_panel<T, 1>(depth, a, down, across, b, of_b, c, of_c, accumulate);
    if constexpr (panel_vectors > 2) {
        if (vectors == 2) return strip_times_panel<T, 2>(depth, a, down, across, b, of_b, c, of_c, accumulate);
        strip_times_panel<T, 3>(depth, a, down, across, b, of_b, c, of_c, accumulate);
    }
}

// the same for any number of vectors, all of b's rows at one stride
template <class T>
inline void strip_times_rows(int64_t depth, const T* a, int64_t down, int64_t across, const T* b, int64_t of_b, T* c,
                             int64_t of_c, int64_t vectors, bool accumulate) {
    constexpr int64_t panel = Vector<T>::panel;
    for (; vectors > 0; vectors -= panel_vectors, b += panel, c += panel)
        strip_times_vectors(vectors < panel_vectors ? vectors : panel_vectors, depth, a, down, across, b, of_b, c, of_c, accumulate);
}

// largest of `vectors` whole vectors and `top`
template <class T>
inline T maximum(const T* x, int64_t vectors, T top) {
    typedef typename Vector<T>::type V;
    constexpr int lanes = Vector<T>::lanes;
    V largest = V{} + top;
    for (int64_t i = 0; i < vectors; ++i) {
        V value;
        std::memcpy(&value, x + i * lanes, sizeof(V));
        largest = value > largest ? value : largest;
    }
    for (int i = 0; i < lanes; ++i) top = largest[i] > top ? largest[i] : top;
    return top;
}

// (count, width) rows at a stride -> contiguous rows of `padded` elements times scale, `padded_count` rows, zeros behind
template <class T>
inline void pack_rows(T* __restrict to, const T* from, int64_t stride, int64_t count, int64_t width, int64_t padded_count,
                      int64_t padded, T scale) {
    for (int64_t r = 0; r < padded_count; ++r) {
        T* row = to + r * padded;
        const int64_t filled = r < count ? width : 0;
#pragma omp simd
        for (int64_t c = 0; c < filled; ++c) row[c] = from[r * stride + c] * scale;
        for (int64_t c = filled; c < padded; ++c) row[c] = 0;
    }
}

// (count, width) rows -> transposed panels: panel i holds rows i * panel.., as (width, panel), zeros behind
template <class T>
inline void pack_transposed(T* __restrict to, const T* from, int64_t stride, int64_t count, int64_t width) {
    constexpr int64_t panel = Vector<T>::panel;
    for (int64_t start = 0; start < count; start += panel, to += panel * width) {
        const int64_t filled = start + panel < count ? panel : count - start;
        for (int64_t c = 0; c < width; ++c) {
            const T* at = from + start * stride + c;
            T* row = to + c * panel;
            for (int64_t r = 0; r < filled; ++r) row[r] = at[r * stride];
            for (int64_t r = filled; r < panel; ++r) row[r] = 0;
        }
    }
}

}  // namespace mpillm
