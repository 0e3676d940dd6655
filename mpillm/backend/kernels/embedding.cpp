// Rows of a table by token id, and sums into them. table (V_local, C) holds the ids first..; other ids give zeros.
#include "common.h"

namespace mpillm {

template <class T>
void embedding(T* y, const int64_t* ids, const T* table, int64_t stride, int64_t first, int64_t rows, int64_t table_rows,
               int64_t width) {
    parallel_for(rows, rows * width, [&](int64_t r) {
        const int64_t id = ids[r] - first;
        T* out = y + r * width;
        if (id >= 0 && id < table_rows)
            std::memcpy(out, table + id * stride, size_t(width) * sizeof(T));
        else
            std::memset(out, 0, size_t(width) * sizeof(T));
    });
}

// table[ids[r] - first] += scale[r] x[r]; scale null for 1. Each thread takes some columns of all rows: every sum is in
// the order of the rows, whatever the threads.
template <class T>
void add_rows(T* table, int64_t stride, const int64_t* ids, const T* x, const T* scale, int64_t first, int64_t rows,
              int64_t table_rows, int64_t width) {
    if (width == 0) return;
    const int64_t parts = rows * width >= serial_below ? num_threads : 1;
    const int64_t columns = ((width + parts - 1) / parts + 15) / 16 * 16;
    parallel_for((width + columns - 1) / columns, rows * width, [&](int64_t part) {
        const int64_t begin = part * columns, end = begin + columns < width ? begin + columns : width;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t id = ids[r] - first;
            if (id < 0 || id >= table_rows) continue;
            T* __restrict out = table + id * stride;
            const T* in = x + r * width;
            const T factor = scale ? scale[r] : T(1);
#pragma omp simd
            for (int64_t c = begin; c < end; ++c) out[c] += factor * in[c];
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                  \
    extern "C" void mpillm_embedding_##S(T* y, const int64_t* ids, const T* table, int64_t stride, int64_t first,     \
                                         int64_t rows, int64_t table_rows, int64_t width) {                           \
        mpillm::embedding(y, ids, table, stride, first, rows, table_rows, width);                                     \
    }                                                                                                                 \
    extern "C" void mpillm_embedding_backward_##S(T* dtable, int64_t stride, const int64_t* ids, const T* dy,         \
                                                  int64_t first, int64_t rows, int64_t table_rows, int64_t width) {   \
        mpillm::add_rows<T>(dtable, stride, ids, dy, nullptr, first, rows, table_rows, width);                        \
    }                                                                                                                 \
    extern "C" void mpillm_add_rows_##S(T* y, int64_t stride, const int64_t* rows, const T* x, const T* scale,        \
                                        int64_t count, int64_t y_rows, int64_t width) {                               \
        mpillm::add_rows(y, stride, rows, x, scale, 0, count, y_rows, width);                                         \
    }
EXPORT(float, f32)
EXPORT(double, f64)
