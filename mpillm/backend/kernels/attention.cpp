// Attention by tiles with an online softmax (Dao et al. 2022; Milakov & Gimelshein 2018): nothing of size T x S is kept.
// One task is a (batch, kv head): it packs its keys and values once for all query heads that share them.
#include "attention.h"

namespace mpillm {

// few queries (generation): dot products in place, packing the keys would cost more than the products
template <class T>
void attend_one(T* out, T* lse, const T* q, const View<const T>& k, const View<const T>& v, const Shape& shape, T scale,
                const ProbabilityDropout& drop, int64_t b, int64_t t, int64_t h, Scratch<T>& scratch) {
    const int64_t kv = h / shape.group(), visible = shape.visible(t), width = shape.width;
    scratch.start(round_up(shape.keys, 16));
    T* scores = scratch.take(shape.keys);
    T top = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t j = 0; j < visible; ++j) {
        const T* key = k.at(b, j, kv);
        T dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < width; ++c) dot += q[c] * key[c];
        scores[j] = dot * scale;
        top = scores[j] > top ? scores[j] : top;
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < visible; ++j) {
        scores[j] = exp(scores[j] - top);
        sum += scores[j];
    }
    *lse = visible ? top + std::log(sum) : top;
    for (int64_t c = 0; c < width; ++c) out[c] = 0;
    T factors[key_block];
    for (int64_t j = 0; j < visible; ++j) {
        T p = scores[j] / sum;
        if (drop.scale != 0) {
            if (j % key_block == 0) drop.factors(factors, b, t, h, j, key_block < shape.keys - j ? key_block : shape.keys - j);
            p *= factors[j % key_block];
        }
        const T* value = v.at(b, j, kv);
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) out[c] += p * value[c];
    }
}

// running maximum, sum and output of the queries of a block
template <class T>
struct Running {
    T *top, *sum, *out;  // (query_block,), (query_block,), (query_block, padded)
};

// turns a row of scores into exp(score - max), rescales what the row had; zeros from `visible` to `end`
template <class T>
inline void softmax_row(T* __restrict scores, int64_t visible, int64_t end, T& top, T& sum, T* __restrict out, int64_t padded) {
    if (visible <= 0) {
        for (int64_t j = 0; j < end; ++j) scores[j] = 0;
        return;
    }
    const int64_t whole = hide_behind(scores, visible);
    const T largest = maximum(static_cast<const T*>(scores), whole / Vector<T>::lanes, top);
    if (largest > top) {
        const T shrink = exp(top - largest);
        if (sum != 0) {
            sum *= shrink;
#pragma omp simd
            for (int64_t c = 0; c < padded; ++c) out[c] *= shrink;
        }
        top = largest;
    }
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < whole; ++j) {
        scores[j] = exp(scores[j] - largest);
        total += scores[j];
    }
    sum += total;
    for (int64_t j = whole; j < end; ++j) scores[j] = 0;
}

template <class T>
struct Forward {
    View<T> out;
    T* lse;
    View<const T> q, k, v;
    T scale;
    Shape shape;
    ProbabilityDropout drop;

    // one block of queries of one head, against packed keys and values
    void block(int64_t b, int64_t h, int64_t t0, const T* k_panels, const T* values, T* q_rows, T* scores, Running<T> run) const {
        const int64_t width = shape.width, padded = round_up(width, Vector<T>::lanes);
        const int64_t count = t0 + query_block < shape.queries ? query_block : shape.queries - t0;
        const int64_t rows = round_up(count, strip_rows);
        pack_rows(q_rows, static_cast<const T*>(q.at(b, t0, h)), q.of_token, count, width, rows, width, scale);
        for (int64_t r = 0; r < rows; ++r) run.top[r] = -std::numeric_limits<T>::infinity(), run.sum[r] = 0;
        std::memset(run.out, 0, size_t(rows * padded) * sizeof(T));
        const int64_t end = shape.visible(t0 + count - 1);
        for (int64_t j0 = 0; j0 < end; j0 += key_block)
            for (int64_t r = 0; r < rows; r += strip_rows) strip(b, h, t0, r, count, j0, k_panels, values, q_rows, scores, run);
        for (int64_t r = 0; r < count; ++r) {
            const T inverse = run.sum[r] != 0 ? T(1) / run.sum[r] : T(0);
            T* to = out.at(b, t0 + r, h);
            for (int64_t c = 0; c < width; ++c) to[c] = run.out[r * padded + c] * inverse;
            lse[(b * shape.heads + h) * shape.queries + t0 + r] = run.top[r] + std::log(run.sum[r]);
        }
    }

    // strip_rows queries against one block of keys
    void strip(int64_t b, int64_t h, int64_t t0, int64_t r, int64_t count, int64_t j0, const T* k_panels, const T* values,
               const T* q_rows, T* scores, Running<T> run) const {
        const int64_t width = shape.width, padded = round_up(width, Vector<T>::lanes);
        const int64_t last = r + strip_rows < count ? r + strip_rows : count;
        int64_t keys = shape.visible(t0 + last - 1) - j0;
        if (keys <= 0) return;
        keys = keys < key_block ? keys : key_block;
        strip_scores(scores, q_rows + r * width, width, k_panels, width, j0, keys);
        for (int64_t i = 0; i < strip_rows; ++i) {
            int64_t visible = r + i < count ? shape.visible(t0 + r + i) - j0 : 0;
            visible = visible < keys ? visible : keys;
            T* row = scores + i * key_block;
            softmax_row(row, visible, keys, run.top[r + i], run.sum[r + i], run.out + (r + i) * padded, padded);
            if (drop.scale != 0 && visible > 0) {
                T factors[key_block];
                drop.factors(factors, b, t0 + r + i, h, j0, visible);
#pragma omp simd
                for (int64_t j = 0; j < visible; ++j) row[j] *= factors[j];
            }
        }
        strip_times_rows(keys, scores, key_block, int64_t(1), values + j0 * padded, padded, run.out + r * padded, padded,
                         padded / Vector<T>::lanes, true);
    }

    void task(int64_t b, int64_t kv) const {
        thread_local Scratch<T> scratch;
        const int64_t group = shape.group(), width = shape.width, padded = round_up(width, Vector<T>::lanes);
        if (shape.queries * group < 8) {
            for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
                for (int64_t t = 0; t < shape.queries; ++t)
                    attend_one(out.at(b, t, h), lse + (b * shape.heads + h) * shape.queries + t,
                               static_cast<const T*>(q.at(b, t, h)), k, v, shape, scale, drop, b, t, h, scratch);
            return;
        }
        const int64_t panel_keys = round_up(shape.keys, Vector<T>::panel);
        scratch.start(panel_keys * width + shape.keys * padded + query_block * (width + padded + 2) + strip_rows * key_block + 8 * 16);
        T* k_panels = scratch.take(panel_keys * width);
        T* values = scratch.take(shape.keys * padded);
        T* q_rows = scratch.take(query_block * width);
        T* scores = scratch.take(strip_rows * key_block);
        const Running<T> run{scratch.take(query_block), scratch.take(query_block), scratch.take(query_block * padded)};
        pack_rows(values, static_cast<const T*>(k.at(b, 0, kv)), k.of_token, shape.keys, width, shape.keys, padded, T(1));
        pack_transposed(k_panels, static_cast<const T*>(values), padded, shape.keys, width);  // faster from packed rows
        pack_rows(values, static_cast<const T*>(v.at(b, 0, kv)), v.of_token, shape.keys, width, shape.keys, padded, T(1));
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
            for (int64_t t0 = 0; t0 < shape.queries; t0 += query_block) block(b, h, t0, k_panels, values, q_rows, scores, run);
    }
};

}  // namespace mpillm

// sizes: B, T, S, H, K, D, causal; strides: (of_batch, of_token, of_head) of out, q, k, v
#define EXPORT(T, S)                                                                                                    \
    extern "C" void mpillm_attention_##S(T* out, T* lse, const T* q, const T* k, const T* v, double scale,              \
                                         const int64_t* sizes, const int64_t* strides,                                  \
                                         const mpillm::ProbabilityDropout* drop) {                                      \
        using namespace mpillm;                                                                                         \
        const int64_t *n = sizes, *s = strides;                                                                         \
        const Shape shape{n[0], n[1], n[2], n[3], n[4], n[5], int(n[6])};                                               \
        const Forward<T> run{{out, s[0], s[1], s[2]}, lse, {q, s[3], s[4], s[5]}, {k, s[6], s[7], s[8]},                \
                             {v, s[9], s[10], s[11]}, T(scale), shape, *drop};                                          \
        parallel_for(shape.batch * shape.kv_heads, shape.batch * shape.heads * shape.queries * shape.keys,              \
                     [&](int64_t i) { run.task(i / shape.kv_heads, i % shape.kv_heads); });                             \
    }
EXPORT(float, f32)
EXPORT(double, f64)
