// Attention over one more block of keys joins (out, lse), in place: the online softmax between blocks
// (Milakov & Gimelshein 2018; Ring Attention: Liu et al. 2023, arXiv:2310.01889).
#include "attention.h"

namespace mpillm {

template <class T>
struct Merge {
    View<T> out, lse;  // lse (B, H, T): of_batch, of_head, of_token
    View<const T> part_out, part_lse;
    int64_t heads, width;

    void token(int64_t b, int64_t t) const {
        for (int64_t h = 0; h < heads; ++h) {
            T& old = *lse.at(b, h, t);
            const T part = *part_lse.at(b, h, t), top = old > part ? old : part;
            if (top == -std::numeric_limits<T>::infinity()) continue;  // neither has seen a key
            const T old_exp = exp(old - top), part_exp = exp(part - top), sum = old_exp + part_exp;
            const T old_share = old_exp / sum, part_share = part_exp / sum;
            old = top + std::log(sum);
            T* __restrict to = out.at(b, t, h);
            const T* from = part_out.at(b, t, h);
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) to[c] = to[c] * old_share + from[c] * part_share;
        }
    }
};

}  // namespace mpillm

// sizes: B, T, H, D; strides: three each of out (B, T, H, D), lse (B, H, T), part_out, part_lse
#define EXPORT(T, S)                                                                                                   \
    extern "C" void mpillm_attention_merge_##S(T* out, T* lse, const T* part_out, const T* part_lse,                   \
                                               const int64_t* sizes, const int64_t* strides) {                         \
        using namespace mpillm;                                                                                        \
        const int64_t *n = sizes, *s = strides, tokens = n[1];                                                         \
        const Merge<T> run{{out, s[0], s[1], s[2]},      {lse, s[3], s[4], s[5]},      {part_out, s[6], s[7], s[8]},    \
                           {part_lse, s[9], s[10], s[11]}, n[2], n[3]};                                                 \
        parallel_for(n[0] * tokens, n[0] * tokens * n[2] * n[3], [&](int64_t i) { run.token(i / tokens, i % tokens); }); \
    }
EXPORT(float, f32)
EXPORT(double, f64)
