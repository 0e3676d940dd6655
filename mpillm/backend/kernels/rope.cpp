// Rotary positions: turns the pairs (i, i + D/2) of x (B, T, H, D) in place; inverse turns back, which is the backward.
#include "common.h"

namespace mpillm {

// strides in elements of batch, token and head; cos, sin (T, D/2) contiguous
template <class T>
void rope(T* x, int64_t of_batch, int64_t of_token, int64_t of_head, const T* cos, const T* sin, int inverse,
          int64_t batch, int64_t tokens, int64_t heads, int64_t width) {
    const int64_t half = width / 2;
    const T sign = inverse ? T(-1) : T(1);
    parallel_for(batch * tokens, batch * tokens * heads * width, [&](int64_t bt) {
        const int64_t t = bt % tokens;
        const T *c = cos + t * half, *s = sin + t * half;
        T* at = x + bt / tokens * of_batch + t * of_token;
        for (int64_t h = 0; h < heads; ++h) {
            T *__restrict first = at + h * of_head, *__restrict second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const T a = first[i], b = second[i], turn = sign * s[i];
                first[i] = a * c[i] - b * turn;
                second[i] = b * c[i] + a * turn;
            }
        }
    });
}

}  // namespace mpillm

#define EXPORT(T, S)                                                                                                \
    extern "C" void mpillm_rope_##S(T* x, int64_t of_batch, int64_t of_token, int64_t of_head, const T* cos,        \
                                    const T* sin, int inverse, int64_t batch, int64_t tokens, int64_t heads,        \
                                    int64_t width) {                                                                \
        mpillm::rope(x, of_batch, of_token, of_head, cos, sin, inverse, batch, tokens, heads, width);               \
    }
EXPORT(float, f32)
EXPORT(double, f64)
